from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from stpredict.pl._axes import take_axes, take_single_axes


def test_a_new_figure() -> None:
    axes = take_axes(None, 1, 3, figsize=(4.5, 2.0), layout="constrained")
    assert axes.shape == (1, 3)
    assert tuple(axes[0, 0].figure.get_size_inches()) == (4.5, 2.0)


def test_given_axes_are_arranged_row_by_row() -> None:
    _, given = plt.subplots(3, 2)
    axes = take_axes(given.ravel().tolist(), 2, 3, figsize=(1, 1))
    assert axes.shape == (2, 3)
    assert axes.ravel().tolist() == given.ravel().tolist()
    assert len(plt.get_fignums()) == 1


def test_a_single_axes_for_a_single_panel() -> None:
    _, given = plt.subplots()
    assert take_axes(given, 1, 1, figsize=(1, 1))[0, 0] is given


def test_wrong_axes_are_refused() -> None:
    _, given = plt.subplots(1, 3)
    with pytest.raises(
        ValueError, match=r"has 3 axes; this picture has 4 panels \(2 rows of 2\).*plt.subplots\(2, 2\)"
    ):
        take_axes(given, 2, 2, figsize=(1, 1))
    with pytest.raises(TypeError, match="`ax` holds str; expected matplotlib Axes"):
        take_axes("left", 1, 1, figsize=(1, 1))  # type: ignore[arg-type]


def test_a_picture_of_one_panel() -> None:
    ax = take_single_axes(None, 4, 3)
    assert tuple(ax.figure.get_size_inches()) == (4.0, 3.0)  # type: ignore[union-attr]
    assert take_single_axes(ax, 1, 1) is ax
    with pytest.raises(ValueError, match="`ax` has 2 axes; this picture has 1 panels"):
        take_single_axes(plt.subplots(1, 2)[1], 4, 3)
