from __future__ import annotations

import numpy as np
import pytest

from stpredict._data.slide import Spots
from stpredict.pp._position import frames, position_basis


def section(name: str, rows: np.ndarray, *, shift: float = 0, scale: float = 1, seed: int = 0) -> Spots:
    """Spots all over a box of 2 x 1."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, [2, 1], (len(rows), 2))
    xy[:2] = [[0, 0], [2, 1]]
    return Spots(name, shift + scale * xy, np.ones(len(rows)), np.arange(len(rows)), rows)


def test_frames() -> None:
    spots = [section("A", np.arange(20)), section("B", np.arange(20, 40), shift=10, scale=3)]
    assert frames(spots) == {"A": [1.0, 0.5, 1.0], "B": [13.0, 11.5, 3.0]}
    one = Spots("C", np.array([[4.0, 5.0]]), np.ones(1), np.arange(1), np.arange(1))
    assert frames([one]) == {"C": [4.0, 5.0, 1.0]}


def test_bumps_by_hand() -> None:
    spots = section("A", np.arange(20))
    basis = position_basis([spots], 20, {})
    place = spots.xy - [1, 0.5]
    for row in (0, 7):
        for column, (knot_y, knot_x) in enumerate((y, x) for y in np.linspace(-1, 1, 9) for x in np.linspace(-1, 1, 9)):
            distance = np.hypot(place[row, 0] - knot_x, place[row, 1] - knot_y)
            np.testing.assert_allclose(basis[row, column], np.exp(-((distance / 0.25) ** 2) / 2), rtol=1e-5)
    assert basis.shape == (20, 81)


def test_units_and_origin_do_not_matter() -> None:
    here, there = section("A", np.arange(20)), section("A", np.arange(20), shift=70, scale=300)
    np.testing.assert_allclose(position_basis([here], 20, {}), position_basis([there], 20, {}), atol=1e-5)


def test_each_section_has_columns_of_its_own() -> None:
    spots = [section("A", np.arange(0, 40, 2)), section("B", np.arange(1, 39, 2), seed=1)]
    basis = position_basis(spots, 40, frames(spots))
    assert basis.shape == (40, 3 * 81)
    a, b = spots[0].rows, spots[1].rows
    np.testing.assert_array_equal(basis[a, 81:162], basis[a, :81])
    np.testing.assert_array_equal(basis[b, 162:], basis[b, :81])
    assert (basis[a, 162:] == 0).all()
    assert (basis[b, 81:162] == 0).all()
    assert np.isnan(basis[39]).all()  # no spot
    assert np.isfinite(basis[:39]).all()


def test_an_unknown_section_shares_only() -> None:
    known = frames([section("A", np.arange(20))])
    for other in (section("B", np.arange(20)), section("A", np.arange(20), shift=5)):
        basis = position_basis([other], 20, known)
        assert (basis[:, :81].max(axis=0) > 0).all()
        assert (basis[:, 81:] == 0).all()


@pytest.mark.parametrize("held_out", [False, True])
def test_a_regression_smooths_what_it_has_seen_and_shares_the_rest(held_out: bool) -> None:
    from stpredict.models import Ridge

    rng = np.random.default_rng(0)
    spots = [section(name, np.arange(i * 150, (i + 1) * 150), seed=i) for i, name in enumerate("ABC")]
    xy = np.concatenate([one.xy for one in spots])
    shared, own = np.sin(3 * xy[:, 0]), np.where(np.arange(450) < 300, 0, 3 * np.cos(5 * xy[:, 1]))
    expression = (shared + own + rng.normal(0, 0.3, 450))[:, None].astype(np.float32)
    training = np.arange(450) < 300 if held_out else rng.random(450) < 0.7
    basis = position_basis(spots, 450, frames(spots))
    model = Ridge.fit(basis[training], expression[training], ["g"], common_scale=[slice(0, basis.shape[1])])
    tested = ~training & (np.arange(450) >= 300)
    predicted = model.predict(basis[tested])[:, 0]
    truth = (shared if held_out else shared + own)[tested]
    assert np.corrcoef(predicted, truth)[0, 1] > 0.9
