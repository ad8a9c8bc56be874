"""How training went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from stpredict.pl._axes import take_single_axes
from stpredict.pl._style import PALETTE, number

if TYPE_CHECKING:
    from stpredict.models import M2OST

# Up to so many epochs are marked one by one: a line needs two.
_FEW = 10


def history(model: M2OST, *, ax: Axes | None = None) -> Axes:
    """Draw training and validation loss, and mark the epoch whose weights were kept.

    That is the epoch of the lowest validation loss; without validation spots, the last.

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
    ax = take_single_axes(ax, 5, 3.4)
    train_loss, val_loss = recorded["train_loss"], recorded["val_loss"]
    epochs = np.arange(1, len(train_loss) + 1)
    style: dict[str, Any] = {"linewidth": 1.6, "marker": "o" if len(epochs) <= _FEW else None, "markersize": 3}
    ax.axhline(1, color="0.5", linewidth=1, linestyle=":", label="mean of training spots")
    ax.plot(epochs, train_loss, color=PALETTE[0], label="training", **style)
    kept, loss, note = len(epochs) - 1, train_loss, "the last"
    if np.isfinite(val_loss).any():
        ax.plot(epochs, val_loss, color=PALETTE[1], label="validation", **style)
        kept, loss = int(np.nanargmin(val_loss)), val_loss
        note = f"validation PCC {number(recorded['val_pcc'][kept])}"
    ax.plot(
        epochs[kept],
        loss[kept],
        "D",
        color="black",
        markersize=5,
        label=f"kept: epoch {epochs[kept]}, {note}",
        zorder=3,
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    ax.set_xlim(0.5, len(epochs) + 0.5)
    ax.set_xlabel("epoch", fontsize="small")
    ax.set_ylabel("mean squared error / variance", fontsize="small")
    ax.tick_params(labelsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize="x-small", borderaxespad=0.2)
    return ax
