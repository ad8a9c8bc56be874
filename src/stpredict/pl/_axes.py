"""Axes to draw on: the caller's, or those of a new figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes


def take_axes(
    ax: Axes | Sequence[Axes] | np.ndarray | None,
    n_rows: int,
    n_columns: int,
    *,
    figsize: tuple[float, float],
    **figure: Any,
) -> np.ndarray:
    """Arrange the caller's axes in a grid, or make a new figure with one.

    Parameters
    ----------
    ax
        As many axes as the grid has panels, row by row, in any nesting; a single one for a single panel.
        `None` makes a figure.
    n_rows, n_columns
        Shape of the grid.
    figsize
        Width and height of a new figure in inches.
    **figure
        For :func:`matplotlib.pyplot.subplots`.

    Returns
    -------
    ``(n_rows, n_columns)`` axes.

    Raises
    ------
    TypeError
        ``ax`` holds something else than axes.
    ValueError
        ``ax`` has another number of axes.
    """
    if ax is None:
        _, axes = plt.subplots(n_rows, n_columns, squeeze=False, figsize=figsize, **figure)
        return axes
    given = np.asarray(ax, dtype=object).ravel()
    if strangers := [type(item).__name__ for item in given if not isinstance(item, Axes)]:
        raise TypeError(f"`ax` holds {strangers[0]}; expected matplotlib Axes (or a sequence or array of them).")
    if len(given) != n_rows * n_columns:
        raise ValueError(
            f"`ax` has {len(given)} axes; this picture has {n_rows * n_columns} panels ({n_rows} rows of {n_columns}). "
            f"Make them with `plt.subplots({n_rows}, {n_columns})`."
        )
    return given.reshape(n_rows, n_columns)


def take_single_axes(ax: Axes | Sequence[Axes] | np.ndarray | None, width: float, height: float) -> Axes:
    """Take the caller's axes for a picture of one panel, or make a figure of that size in inches."""
    axes: Axes = take_axes(ax, 1, 1, figsize=(width, height), layout="constrained")[0, 0]
    return axes
