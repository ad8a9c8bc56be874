from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

import stpredict as stp


def trained(n_epochs: int, *, validated: bool) -> Any:
    """What a picture needs of a trained model: the lowest validation loss is halfway."""
    epochs = np.arange(n_epochs, dtype=float)
    nothing = np.full(n_epochs, np.nan)
    return SimpleNamespace(
        history={
            "train_loss": 1 - 0.01 * epochs,
            "val_loss": 1 + 0.01 * np.abs(epochs - n_epochs // 2) if validated else nothing,
            "val_pcc": 0.01 * epochs if validated else nothing,
        }
    )


def x_of(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_xdata(), dtype=float)


def y_of(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_ydata(), dtype=float)


def lines(ax: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in ax.lines}


def test_losses_and_the_epoch_of_the_lowest() -> None:
    model = trained(40, validated=True)
    drawn = lines(stp.pl.history(model))
    np.testing.assert_array_equal(x_of(drawn["training"]), np.arange(1, 41))
    np.testing.assert_array_equal(y_of(drawn["training"]), model.history["train_loss"])
    np.testing.assert_array_equal(y_of(drawn["validation"]), model.history["val_loss"])
    kept = drawn["kept: epoch 21, validation PCC 0.20"]
    assert (x_of(kept)[0], y_of(kept)[0]) == (21, 1.0)
    assert list(y_of(drawn["mean of training spots"])) == [1, 1]


def test_without_validation_the_last_epoch_is_kept() -> None:
    drawn = lines(stp.pl.history(trained(30, validated=False)))
    assert "validation" not in drawn
    kept = drawn["kept: epoch 30, the last"]
    assert (x_of(kept)[0], y_of(kept)[0]) == (30, pytest.approx(0.71))


def test_a_single_epoch_is_seen() -> None:
    ax = stp.pl.history(trained(1, validated=False))
    assert lines(ax)["training"].get_marker() == "o"
    assert [tick for tick in ax.get_xticks() if 0.5 <= tick <= 1.5] == [1]
    assert lines(stp.pl.history(trained(40, validated=True)))["training"].get_marker() in ("", "None")


def test_legend_covers_no_line() -> None:
    ax = stp.pl.history(trained(40, validated=True))
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    box = ax.get_legend()
    assert box is not None
    assert box.get_window_extent().y0 >= ax.get_window_extent().y1 - 1


def test_given_axes() -> None:
    _, given = plt.subplots(1, 2)
    assert stp.pl.history(trained(3, validated=True), ax=given[0]) is given[0]
    with pytest.raises(ValueError, match="`ax` has 2 axes"):
        stp.pl.history(trained(3, validated=True), ax=given)


def test_a_model_without_history() -> None:
    with pytest.raises(
        ValueError, match="SimpleNamespace has no training history; expected a model made by `stp.tl.fit"
    ):
        stp.pl.history(SimpleNamespace(history={}))  # type: ignore[arg-type]
