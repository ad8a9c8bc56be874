from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from stpredict.tl.evaluation.numbers import _null as _permutation
from stpredict.tl.evaluation.numbers._metrics import neighbor_graph
from stpredict.tl.evaluation.numbers._null import permutation_p_values, spatial_modes
from stpredict.tl.evaluation.numbers._parts import Part
from stpredict.tl.evaluation.numbers._sides import Side

N_GENES = 400


def grid(n: int, *, ragged: bool = True) -> np.ndarray:
    xy = np.stack(np.meshgrid(np.arange(float(n)), np.arange(float(n))), axis=-1).reshape(-1, 2)
    return xy[np.hypot(*(xy - n / 2).T) < n / 2 + 0.3 * xy[:, 0]] if ragged else xy


def smooth_maps(xy: np.ndarray, length: float, rng: np.random.Generator) -> np.ndarray:
    """``(n, N_GENES)`` Gaussian maps."""
    distances = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    covariance = np.exp(-(distances**2) / (2 * length**2)) + 1e-6 * np.eye(len(xy))
    return np.linalg.cholesky(covariance) @ rng.normal(size=(len(xy), N_GENES))


def morans_i(values: np.ndarray, xy: np.ndarray) -> np.ndarray:
    return Side(values, graph=neighbor_graph(xy)).morans_i


def p_values(x: np.ndarray, y: np.ndarray, sections: list[np.ndarray], n_perms: int = 199, seed: int = 0) -> np.ndarray:
    ends = np.cumsum([0, *(len(xy) for xy in sections)])
    parts = [Part("", "", np.arange(a, b), xy) for a, b, xy in zip(ends[:-1], ends[1:], sections, strict=True)]
    rng = np.random.default_rng(seed)
    return permutation_p_values(x, {"m": y}, np.arange(x.shape[1]), parts, n_perms=n_perms, rng=rng)["m"]


def shuffled_p_values(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * b).mean(axis=0)

    x, y = ((z - z.mean(axis=0)) / z.std(axis=0) for z in (x, y))
    null = np.array([correlation(x, y[rng.permutation(len(y))]) for _ in range(199)])
    return (1 + (null >= correlation(x, y)).sum(axis=0)) / 200


@pytest.mark.parametrize("length", [0.3, 1.5, 4.0])
def test_unrelated_smooth_maps_are_not_significant(length: float) -> None:
    rng = np.random.default_rng(1)
    xy = grid(16)
    x, y = smooth_maps(xy, length, rng), smooth_maps(xy, length, rng)
    p = p_values(x, y, [xy])
    assert 0.02 <= np.mean(p <= 0.05) <= 0.10  # 3.5 standard errors of a share of 0.05, and what is not exact
    assert kstest(p, "uniform").statistic < 0.1
    if length > 1:  # where shuffled spots are no match for smooth maps
        assert np.mean(shuffled_p_values(x, y, rng) <= 0.05) > 0.2


def test_unrelated_maps_on_several_sections() -> None:
    rng = np.random.default_rng(2)
    sections = [grid(9), grid(12), grid(10, ragged=False)]
    x, y = (np.vstack([smooth_maps(xy, 2.0, rng) for xy in sections]) for _ in range(2))
    assert 0.02 <= np.mean(p_values(x, y, sections) <= 0.05) <= 0.10


def test_true_signal_is_found() -> None:
    rng = np.random.default_rng(3)
    xy = grid(16)
    y = smooth_maps(xy, 1.5, rng)
    p = p_values(y + 1.5 * rng.normal(size=y.shape), y, [xy])
    assert np.mean(p <= 0.05) > 0.99
    assert p.min() == 1 / 200
    assert (p_values(-y, y, [xy]) == 1).all()  # one-sided


def test_more_sections_tell_more() -> None:
    rng = np.random.default_rng(4)
    sections = [grid(10, ragged=False)] * 4
    y = np.vstack([smooth_maps(xy, 2.0, rng) for xy in sections])
    x = y + 4 * rng.normal(size=y.shape)
    found = [np.mean(p_values(x[:n], y[:n], sections[: n // 100]) <= 0.05) for n in (100, 400)]
    assert found[1] > found[0] + 0.2


# What random maps keep


def test_modes_are_orthonormal_and_smooth_last() -> None:
    xy = grid(12)
    modes = spatial_modes(xy)
    np.testing.assert_allclose(modes.T @ modes, np.eye(len(xy)), atol=1e-5)
    assert np.ptp(modes[:, 0]) < 1e-5
    smoothness = morans_i(modes[:, 1:].T.astype(float), xy)
    assert smoothness[-10:].min() > 0.6
    assert smoothness[:10].max() < 0


def test_random_maps_have_the_mean_variance_and_smoothness_of_the_map() -> None:
    rng = np.random.default_rng(5)
    xy = grid(14)
    y = smooth_maps(xy, 2.0, rng)[:, :1]
    modes = spatial_modes(xy).astype(float)
    signs = rng.choice([-1.0, 1.0], size=(50, len(xy)))
    signs[:, 0] = 1  # the mean
    maps = modes @ (signs * (modes.T @ y).T).T
    np.testing.assert_allclose(maps.mean(axis=0), y.mean(), atol=1e-5)
    np.testing.assert_allclose(maps.std(axis=0), y.std(), rtol=1e-4)
    np.testing.assert_allclose(morans_i(maps.T, xy), morans_i(y.T, xy)[0], atol=0.12)
    assert morans_i(rng.permuted(y).T, xy)[0] < 0.2 < morans_i(y.T, xy)[0] - 0.5
    assert abs(np.corrcoef(maps.T)[0, 1:]).mean() < 0.5


def test_what_is_observed_is_the_correlation() -> None:
    rng = np.random.default_rng(6)
    xy = grid(8)
    x, y = smooth_maps(xy, 1.0, rng), smooth_maps(xy, 1.0, rng)
    one, other = (_permutation._Modes(Side(side.T), spatial_modes(xy)) for side in (x, y))
    products = one.products(other)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(x.T, y.T, strict=True)]
    np.testing.assert_allclose(products.sum(axis=1), expected, atol=1e-5)


# Missing values, constants, small and large sections


def test_constants_and_missing_values() -> None:
    rng = np.random.default_rng(7)
    sections = [grid(8), grid(8)]
    n = len(sections[0])
    y = np.vstack([smooth_maps(xy, 1.5, rng) for xy in sections])[:, :4]
    x = y + 0.5 * rng.normal(size=y.shape)
    x[:, 0] = 3.0  # constant everywhere
    y[:n, 1] = 1.0  # in one section
    x[::7, 2] = np.nan
    x[:n, 3] = np.nan
    p = p_values(x, y, sections)
    assert np.isnan(p[0])
    assert (p[1:] <= 0.02).all()


@pytest.mark.parametrize("unit", [1e-300, 1e-30, 1e30, 1e300])
def test_p_values_do_not_depend_on_the_unit(unit: float) -> None:
    rng = np.random.default_rng(11)
    xy = grid(8)
    y = smooth_maps(xy, 1.5, rng)[:, :20]
    x = 0.3 * y + smooth_maps(xy, 1.5, rng)[:, :20]
    x[:, 0] = 7.0
    expected = p_values(x, y, [xy])
    assert np.isnan(expected).sum() == 1 and len(np.unique(expected)) > 8
    np.testing.assert_array_equal(p_values(x * unit, y / unit, [xy]), expected)
    far = np.where(np.arange(20) > 0, x / 16 + 1e9, x)  # rounding moves draws that are next to what is observed
    np.testing.assert_allclose(p_values(far, y, [xy]), expected, atol=0.011)


def test_models_beside_each_other_have_the_p_values_of_each_alone() -> None:
    rng = np.random.default_rng(12)
    xy = grid(8)
    x, noise = (smooth_maps(xy, 1.5, rng)[:, :10] for _ in range(2))
    predictions = {"a": x + noise, "b": noise.copy(), "constant": np.ones_like(x), "c": x - noise}
    predictions["b"][:9, :4] = np.nan
    part = Part("", "", np.arange(len(xy)), xy)
    found = permutation_p_values(x, predictions, np.arange(10), [part], n_perms=99, rng=np.random.default_rng(0))
    assert list(found) == list(predictions)
    for name, predicted in predictions.items():
        np.testing.assert_array_equal(found[name], p_values(x, predicted, [xy], n_perms=99))
    assert np.isnan(found["constant"]).all() and np.isfinite(found["b"]).all()


def test_a_section_of_three_spots_proves_nothing() -> None:
    xy = np.array([[0.0, 0], [1, 0], [2, 0]])
    y = np.array([[0.0], [1], [2]])
    assert p_values(y, y, [xy])[0] > 0.2


def test_spots_apart_from_the_others() -> None:
    rng = np.random.default_rng(8)
    xy = np.vstack([grid(8), [[100.0, 100.0], [120.0, 100.0]]])
    y = rng.normal(size=(len(xy), 50))
    assert (p_values(y, y, [xy]) == 1 / 200).all()
    assert 0 <= np.mean(p_values(rng.normal(size=y.shape), y, [xy]) <= 0.05) <= 0.2


def test_a_sample_stands_for_a_large_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_permutation, "_MAX_SPOTS", 150)
    rng = np.random.default_rng(9)
    xy = grid(24)
    x, y = smooth_maps(xy, 2.0, rng), smooth_maps(xy, 2.0, rng)
    assert 0.02 <= np.mean(p_values(x, y, [xy]) <= 0.05) <= 0.10
    assert np.mean(p_values(x + y, y, [xy]) <= 0.05) > 0.9


def test_the_seed_decides() -> None:
    rng = np.random.default_rng(10)
    xy = grid(8)
    x, y = smooth_maps(xy, 1.0, rng), smooth_maps(xy, 1.0, rng)
    first = p_values(x, y, [xy], seed=0)
    np.testing.assert_array_equal(p_values(x, y, [xy], seed=0), first)
    assert (p_values(x, y, [xy], seed=1) != first).any()
