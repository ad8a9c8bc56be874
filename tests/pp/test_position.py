from __future__ import annotations

import numpy as np
import pytest

from stpredict._data.slide import Spots
from stpredict.pp._position import frames, position_basis, reached


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


def test_tents_by_hand() -> None:
    spots = section("A", np.arange(20))
    basis = position_basis([spots], 20, {})
    place = spots.xy - [1, 0.5]
    for row in (0, 7):
        for column, (knot_y, knot_x) in enumerate((y, x) for y in np.linspace(-1, 1, 9) for x in np.linspace(-1, 1, 9)):
            x, y = np.maximum(1 - np.abs(place[row] - [knot_x, knot_y]) / 0.25, 0)
            np.testing.assert_allclose(basis[row, column], x * y, rtol=1e-5)
    assert basis.shape == (20, 81)
    np.testing.assert_allclose(basis.sum(axis=1), 1, rtol=1e-5)


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
        np.testing.assert_allclose(basis[:, :81].sum(axis=1), 1, rtol=1e-5)
        assert (basis[:, 81:] == 0).all()


@pytest.mark.parametrize("held_out", [False, True])
def test_a_regression_smooths_what_it_has_seen_and_shares_the_rest(held_out: bool) -> None:
    from stpredict.models import Ridge

    rng = np.random.default_rng(0)
    spots = [section(name, np.arange(i * 90, (i + 1) * 90), seed=i) for i, name in enumerate("ABC")]
    xy = np.concatenate([one.xy for one in spots])
    shared, own = np.sin(3 * xy[:, 0]), np.where(np.arange(270) < 180, 0, 3 * np.cos(5 * xy[:, 1]))
    expression = (shared + own + rng.normal(0, 0.3, 270))[:, None].astype(np.float32)
    training = np.arange(270) < 180 if held_out else rng.random(270) < 0.7
    basis = position_basis(spots, 270, frames(spots))
    reads = {"kind": "features", "sources": {"position": {"from": "position", "n_features": basis.shape[1]}}}
    whole = [slice(0, basis.shape[1])]
    model = Ridge.fit(basis[training], expression[training], ["g"], common_scale=whole, uncentered=whole, reads=reads)
    tested = ~training & (np.arange(270) >= 180)
    predicted = model.predict(basis[tested])[:, 0]
    truth = (shared if held_out else shared + own)[tested]
    assert np.corrcoef(predicted, truth)[0, 1] > 0.9


def test_away_from_training_spots_the_mean_is_predicted() -> None:
    from stpredict.models import Ridge

    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(40.0), np.arange(20.0))
    xy = np.column_stack([x.ravel(), y.ravel()])
    spots = Spots("A", xy, np.ones(800), np.arange(800), np.arange(800))
    waves = np.cos(xy @ rng.normal(0, 0.3, (2, 40)) + rng.uniform(0, 6, 40)) @ rng.normal(size=(40, 8))
    expression = (waves + rng.normal(0, 0.5, waves.shape)).astype(np.float32)
    for start in (0, 16):
        apart = np.abs(xy[:, 0] - (start + 3.5)) - 4  # negative in the strip
        train = np.flatnonzero(apart > 1)
        basis = position_basis([spots], 800, frames([spots]))
        basis = basis[:, reached(basis, train)]
        reads = {"kind": "features", "sources": {"position": {"from": "position", "n_features": basis.shape[1]}}}
        whole = [slice(0, basis.shape[1])]
        genes = [f"g{j}" for j in range(8)]
        model = Ridge.fit(basis[train], expression[train], genes, common_scale=whole, uncentered=whole, reads=reads)
        held_out = np.flatnonzero(apart < 0)
        of_model, of_mean = (
            np.sqrt(((each - expression[held_out]) ** 2).mean())
            for each in (model.predict(basis[held_out]), expression[train].mean(axis=0))
        )
        assert of_model < 1.1 * of_mean


def test_few_training_spots_reach_a_tent_nevertheless() -> None:
    spots = section("A", np.arange(40))
    basis = position_basis([spots], 40, {})
    assert (basis.max(axis=1) < 0.7).any()
    for row in range(40):
        columns = reached(basis, np.array([row]))
        assert len(columns) >= 1
        assert basis[row, columns].max() == basis[row].max()
    all_rows = reached(basis, np.arange(40))
    assert (basis[:, all_rows].max(axis=0) >= 0.7).all()
