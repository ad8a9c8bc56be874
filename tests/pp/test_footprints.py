from __future__ import annotations

import dask.array as da
import numpy as np
import pytest

from stpredict._data.slide import Section
from stpredict.pp._footprints import Footprints, chord, footprints, whole_pixels


def section(affine: np.ndarray) -> Section:
    rng = np.random.default_rng(0)
    centers, rows = rng.uniform(0, 40, (5, 2)), np.arange(5)
    return Section("s", "i", "c", da.zeros((3, 40, 40)), (0, 1, 2), affine, centers, rng.uniform(2, 4, 5), rows, rows)


@pytest.mark.parametrize("field", [0.5, 3.0])
def test_chords_are_the_pixels_of_the_circle(field: float) -> None:
    affine = np.array([[1.0, 0.4, 7.0], [-0.3, 1.3, 2.0], [0, 0, 1]])
    place = footprints(section(affine), field)
    y, x = np.mgrid[-40:80, -40:80] + 0.5
    for i, (center_x, center_y) in enumerate(place.centers):
        own = np.linalg.inv(affine[:2, :2]) @ np.array([(x - center_x).ravel(), (y - center_y).ravel()])
        inside = (np.hypot(*own) <= field * section(affine).radii[i]).reshape(x.shape)
        found = np.zeros_like(inside)
        for row in range(len(y)):
            start, stop = chord(row - 40 + 0.5 - center_y, place.conic[i], center_x)
            found[row, start + 40 : stop + 40] = True
        np.testing.assert_array_equal(found, inside)
        assert whole_pixels(place.centers, place.conic)[i] == inside.sum()
        columns, rows = inside.any(axis=0), inside.any(axis=1)
        assert (
            np.abs(x[0, columns] - center_x).max() <= place.half_width[i] < np.abs(x[0, columns] - center_x).max() + 1
        )
        assert np.abs(y[rows, 0] - center_y).max() <= place.half_height[i] < np.abs(y[rows, 0] - center_y).max() + 1


def test_some_spots() -> None:
    place = footprints(section(np.eye(3)), 1.0)
    some = place.of(np.array([3, 1]))
    assert isinstance(some, Footprints)
    for ours, theirs in zip(some, place, strict=True):
        np.testing.assert_array_equal(ours, theirs[[3, 1]])


def test_compiled_and_plain_agree() -> None:
    centers = np.array([[5.2, 6.1], [13.0, 1.0], [40.0, 5.0]])
    conic = np.tile(np.array([0.06, 0.01, 0.09]), (3, 1))
    np.testing.assert_array_equal(whole_pixels(centers, conic), whole_pixels.py_func(centers, conic))
    assert chord.py_func(9.0, conic[0], 5.0) == chord(9.0, conic[0], 5.0) == (0, 0)
