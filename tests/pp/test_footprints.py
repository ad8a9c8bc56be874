from __future__ import annotations

import io
from collections.abc import Callable

import dask.array as da
import numpy as np
import pytest

from stpredict._data.slide import Section
from stpredict.pp._footprints import (
    Footprints,
    check_reach,
    chord,
    footprints,
    warn_of_tiny_spots,
    whole_pixels,
)

NewSection = Callable[..., Section]


@pytest.fixture
def section(new_section: NewSection) -> Section:
    """Circles that are ellipses in the image."""
    rng = np.random.default_rng(0)
    affine = np.array([[1.0, 0.4, 7.0], [-0.3, 1.3, 2.0], [0, 0, 1]])
    xy = (rng.uniform(0, 40, (5, 2)) - affine[:2, 2]) @ np.linalg.inv(affine[:2, :2]).T
    return new_section(da.zeros((3, 40, 40)), xy, rng.uniform(2, 4, 5), affine=affine)


@pytest.mark.parametrize("spot_scale", [0.5, 3.0])
def test_chords_are_the_pixels_of_the_circle(section: Section, spot_scale: float) -> None:
    place = footprints(section, spot_scale)
    y, x = np.mgrid[-40:80, -40:80] + 0.5
    for i, (center_x, center_y) in enumerate(place.centers):
        own = np.linalg.inv(section.affine[:2, :2]) @ np.array([(x - center_x).ravel(), (y - center_y).ravel()])
        inside = (np.hypot(*own) <= spot_scale * section.radii[i]).reshape(x.shape)
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


def test_some_spots(section: Section) -> None:
    place = footprints(section, 1.0)
    some = place.of(np.array([3, 1]))
    assert isinstance(some, Footprints)
    for ours, theirs in zip(some, place, strict=True):
        np.testing.assert_array_equal(ours, theirs[[3, 1]])


def test_fields_that_reach_absurdly_far_are_refused(new_section: NewSection) -> None:
    image = da.zeros((3, 100, 200))
    for radius, spot_scale in ((400.0, 2.0), (4.0, 200.0)):
        check_reach(new_section(image, [[50, 50]], radius), spot_scale)
    message = (
        r"A field of 2 spot diameters of 'spots' is 4e\+07 pixels wide, on an image 'HE' of 200 x 100. Check the sp"
    )
    with pytest.raises(ValueError, match=message):
        check_reach(new_section(image, [[50, 50]], 1e7), 2.0)
    with pytest.raises(ValueError, match=r"A field of 1e\+09 spot diameters"):
        check_reach(new_section(image, [[50, 50]], 1.0), 1e9)
    coarse = np.diag([1e6, 1e6, 1])
    with pytest.raises(ValueError, match=r"is 4e\+06 pixels wide"):
        check_reach(new_section(image, [[5e-5, 5e-5]], 1.0, affine=coarse), 2.0)


def test_fields_without_a_pixel_are_named(new_section: NewSection, log: io.StringIO) -> None:
    warn_of_tiny_spots(new_section(da.zeros((3, 9, 9)), [[1, 1]]), np.array([0, 3, 0]))
    assert "2 spots of 'spots' are smaller than a pixel of 'HE' and have no color" in log.getvalue()
    assert "choose a larger `spot_scale`" in log.getvalue()


def test_compiled_and_plain_agree() -> None:
    centers = np.array([[5.2, 6.1], [13.0, 1.0], [40.0, 5.0]])
    conic = np.tile(np.array([0.06, 0.01, 0.09]), (3, 1))
    np.testing.assert_array_equal(whole_pixels(centers, conic), whole_pixels.py_func(centers, conic))
    assert chord.py_func(9.0, conic[0], 5.0) == chord(9.0, conic[0], 5.0) == (0, 0)
