"""How training went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from stpredict.models import FittedM2OST


def history(model: FittedM2OST, *, ax: Axes | None = None) -> Axes:
    """Draw training and validation loss, and mark the epoch whose weights were kept.

    Parameters
    ----------
    model
        What :func:`stpredict.tl.fit_m2ost` returned or :func:`stpredict.models.load` read.
    ax
        Where to draw. `None` makes a figure.

    Returns
    -------
    The axes. A loss is the mean squared error in units of a gene's variance on training spots: 1 is what predicting
    the mean reaches there (drawn as a line).

    Raises
    ------
    ValueError
        The model was not trained here, so it has no history.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> model = stp.tl.fit_m2ost(sdata, preset="tiny", max_epochs=2)
    >>> stp.pl.history(model).get_xlabel()
    'epoch'
    """
    recorded = getattr(model, "history", None)
    if not recorded:
        raise ValueError(
            f"{type(model).__name__} has no training history; expected a model made by `stp.tl.fit_m2ost`."
        )
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    epochs = np.arange(1, len(recorded["train_loss"]) + 1)
    ax.axhline(1, color="0.6", linewidth=1, linestyle=":", label="mean of training spots")
    ax.plot(epochs, recorded["train_loss"], color="C0", label="training")
    val_loss = recorded["val_loss"]
    if np.isfinite(val_loss).any():
        best = int(np.nanargmin(val_loss))
        ax.plot(epochs, val_loss, color="C1", label="validation")
        ax.plot(
            epochs[best],
            val_loss[best],
            "o",
            color="C1",
            label=f"kept: epoch {epochs[best]}, validation PCC {recorded['val_pcc'][best]:.2f}",
        )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="epoch", ylabel="mean squared error / variance", title="M2OST")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
    return ax
