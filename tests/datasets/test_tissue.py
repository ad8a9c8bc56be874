from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import KDTree

from stpredict.datasets import _tissue


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_outline_holds_the_spots_that_were_asked_for(rng: np.random.Generator) -> None:
    grid = 150.0 + 100 * np.indices((6, 6)).reshape(2, -1).T
    tissue = _tissue.draw_tissue(rng, (800, 800), grid, 25)
    assert tissue.covered.sum() == 25
    eosin = tissue.concentration[1]
    assert tissue.concentration.shape == (3, 800, 800) and tissue.concentration.dtype == np.float32
    assert (tissue.concentration >= 0).all()
    assert eosin[:20, :20].max() == 0  # beside the tissue
    around = np.array([eosin[int(y) - 20 : int(y) + 20, int(x) - 20 : int(x) + 20].mean() for y, x in grid])
    assert np.median(around[tissue.covered]) > 5 * np.median(around[~tissue.covered])


def test_nests_are_where_the_nuclei_are(rng: np.random.Generator) -> None:
    grid = 150.0 + 100 * np.indices((6, 6)).reshape(2, -1).T
    tissue = _tissue.draw_tissue(rng, (800, 800), grid, 25)
    on_tissue = tissue.concentration[1] > 0
    hematoxylin = tissue.concentration[0]
    assert 0 <= tissue.nests.min() and tissue.nests.max() <= 1
    nests = on_tissue & (tissue.nests > 0.9)
    assert hematoxylin[nests].mean() > 1.5 * hematoxylin[on_tissue & (tissue.nests < 0.1)].mean()


def test_field_has_its_length(rng: np.random.Generator) -> None:
    smooth = _tissue._field(rng, (600, 600), 10)
    banded = _tissue._field(rng, (600, 600), 40, banded=True)
    assert smooth.std() == pytest.approx(1, abs=1e-3)
    # A Gaussian filter of width L correlates as exp(-d² / (4 L²)); a band turns negative at half its wavelength.
    assert (smooth[:, 20:] * smooth[:, :-20]).mean() == pytest.approx(np.exp(-1), abs=0.08)
    assert (banded[:, 20:] * banded[:, :-20]).mean() < -0.2


@pytest.mark.parametrize("degrees", [0, 30, 82.5, 135])
def test_fibers_follow_the_angle(rng: np.random.Generator, degrees: float) -> None:
    angle = np.full((400, 400), np.radians(degrees), np.float32)
    slope_y, slope_x = np.gradient(_tissue._fibers(rng, angle, 40, 4))
    # Across the fibres the texture changes fastest: the mean structure tensor points there.
    across = 0.5 * np.arctan2(2 * (slope_x * slope_y).mean(), (slope_x**2 - slope_y**2).mean())
    difference = (np.degrees(across) + 90 - degrees + 90) % 180 - 90
    assert abs(difference) < 3


def test_strewn_points_keep_their_distance(rng: np.random.Generator) -> None:
    points = _tissue._strewn(rng, (300, 200), 5)
    assert (points >= 0).all() and (points < (300, 200)).all()
    assert len(points) == pytest.approx(300 * 200 / 25, rel=0.05)
    near = np.asarray(KDTree(points).query(points, k=2)[0])[:, 1]
    chance = KDTree(rng.uniform(0, (300, 200), points.shape)).query(points, k=1)[0]
    assert np.mean(near < 1) < 0.5 * np.mean(chance < 1)


def test_ellipses_have_their_area_place_and_direction(rng: np.random.Generator) -> None:
    one = (np.array([[50.3, 40.8]]), np.array([9.0]), np.array([4.0]), np.array([np.pi / 3]), np.array([0.7]))
    drawn = _tissue._ellipses((100, 90), *one)
    assert drawn.max() == pytest.approx(0.7)
    assert drawn.sum() == pytest.approx(0.7 * np.pi * 9 * 4, rel=0.05)
    y, x = np.indices(drawn.shape) + 0.5
    mean_y, mean_x = (drawn * y).sum() / drawn.sum(), (drawn * x).sum() / drawn.sum()
    np.testing.assert_allclose([mean_y, mean_x], [50.3, 40.8], atol=0.1)
    dy, dx = y - mean_y, x - mean_x
    axis = 0.5 * np.arctan2(2 * (drawn * dx * dy).sum(), (drawn * (dx**2 - dy**2)).sum())
    assert axis == pytest.approx(np.pi / 3, abs=0.03)


def test_ellipses_are_cut_at_the_border() -> None:
    ones = np.ones(2)
    center = np.array([[0.2, 0.2], [19.9, 10.0]])
    drawn = _tissue._ellipses((20, 20), center, 3 * ones, 3 * ones, 0 * ones, ones)
    assert drawn[0, 0] == drawn[19, 10] == 1
    assert drawn[0, 15] == drawn[15, 0] == 0
