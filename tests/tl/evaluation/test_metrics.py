from __future__ import annotations

import warnings

import numpy as np
import pytest
import squidpy as sq
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from stpredict.tl.evaluation.numbers._metrics import gene_metrics, mean_of_known, neighbor_graph, spot_metrics
from stpredict.tl.evaluation.numbers._sides import Measured, Side, Span, centered_ranks

# Few values, so that there are ties, constant rows and missing partners; and any.
TIED = st.sampled_from([0.0, 0.0, 1.0, 2.5, -3.0, np.nan])
ANY = st.floats(-1e3, 1e3, width=32) | st.just(np.nan)
VALUES = arrays(np.float64, st.tuples(st.just(2), st.integers(1, 4), st.integers(3, 12)), elements=TIED | ANY)

SQUARE = np.stack(np.meshgrid(np.arange(7.0), np.arange(6.0)), axis=-1).reshape(-1, 2)
HEXAGONAL = np.array([(x + 0.5 * (y % 2), y * np.sqrt(3) / 2) for x in range(7) for y in range(6)])


def line(n: int) -> np.ndarray:
    return np.column_stack([np.arange(n), np.zeros(n)])


def of_genes(measured: np.ndarray, predicted: np.ndarray, xy: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Scores of all spots together."""
    graph = neighbor_graph(line(measured.shape[1]) if xy is None else xy)
    (sides,) = Measured(measured, [Span(slice(None), graph)]).beside(predicted)
    return gene_metrics(*sides)


def morans_i(values: np.ndarray, xy: np.ndarray) -> np.ndarray:
    return Side(values, np.isfinite(values), graph=neighbor_graph(xy)).morans_i


def varies(values: np.ndarray) -> bool:
    return bool(len(values) and values.min() < values.max())


# Against scipy and scikit-learn


@settings(deadline=None, max_examples=60)
@given(VALUES)
def test_scores_are_those_of_scipy_and_sklearn(values: np.ndarray) -> None:
    measured, predicted = values
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = of_genes(measured, predicted)

    for gene, (x, y) in enumerate(zip(measured, predicted, strict=True)):
        x, y = (side[np.isfinite(x) & np.isfinite(y)] for side in (x, y))
        expected = dict.fromkeys(("pcc", "spearman", "rmse", "mae", "r2", "variance_ratio"), np.nan)
        if len(x):
            expected |= {"rmse": root_mean_squared_error(x, y), "mae": mean_absolute_error(x, y)}
        if varies(x):
            expected |= {"r2": r2_score(x, y), "variance_ratio": np.var(y) / np.var(x)}
        if varies(x) and varies(y):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # scipy's, of nearly constant values
                expected |= {"pcc": stats.pearsonr(x, y).statistic, "spearman": stats.spearmanr(x, y).statistic}
        assert found["n"][gene] == len(x)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][gene], value, rtol=1e-6, atol=1e-9, err_msg=name)


@settings(deadline=None, max_examples=50)
@given(VALUES)
def test_spots_are_scored_like_genes(values: np.ndarray) -> None:
    (sides,) = Measured(values[0]).beside(values[1])
    of_spots, expected = spot_metrics(*sides), of_genes(*values)
    assert sorted(of_spots) == ["n", "pcc", "rmse"]
    for name, found in of_spots.items():
        np.testing.assert_array_equal(found, expected[name])


@settings(deadline=None, max_examples=50)
@given(VALUES)
def test_ranks_are_those_of_scipy(values: np.ndarray) -> None:
    valid = np.isfinite(values[0])
    part_of = np.arange(values.shape[2]) % 3
    whole, within = centered_ranks(values[0], valid, part_of)
    assert (whole[~valid] == 0).all() and (within[~valid] == 0).all()
    for row, of_row, in_parts, known in zip(values[0], whole, within, valid, strict=True):
        np.testing.assert_array_equal(of_row[known], stats.rankdata(row[known]) - (known.sum() + 1) / 2)
        for part in range(3):
            here = known & (part_of == part)
            np.testing.assert_array_equal(in_parts[here], stats.rankdata(row[here]) - (here.sum() + 1) / 2)
    complete = np.nan_to_num(values[0])
    expected = stats.rankdata(complete, axis=1) - (values.shape[2] + 1) / 2
    np.testing.assert_array_equal(centered_ranks(complete)[0], expected)


@pytest.mark.parametrize("xy", [SQUARE, HEXAGONAL, SQUARE[::3]], ids=["square", "hexagonal", "sparse"])
def test_morans_i_is_that_of_squidpy(xy: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    values = np.cumsum(rng.normal(size=(len(xy), 9)), axis=0)
    table = AnnData(values, obsm={"spatial": xy})
    table.obsp["spatial_connectivities"] = neighbor_graph(xy)
    sq.gr.spatial_autocorr(table, mode="moran")
    expected = table.uns["moranI"]["I"].reindex(table.var_names)
    np.testing.assert_allclose(morans_i(values.T, xy), expected, rtol=1e-10)


def test_morans_i_leaves_missing_spots_out() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(3, len(SQUARE)))
    missing = np.zeros(values.shape, dtype=bool)
    missing[0, [0, 8, 9]], missing[1, 20:30] = True, True
    found = morans_i(np.where(missing, np.nan, values), SQUARE)
    for gene, row in enumerate(values):
        there = ~missing[gene]
        table = AnnData(row[there, None], obsm={"spatial": SQUARE[there]})
        table.obsp["spatial_connectivities"] = neighbor_graph(SQUARE)[there][:, there]
        sq.gr.spatial_autocorr(table, mode="moran")
        np.testing.assert_allclose(found[gene], table.uns["moranI"]["I"].iloc[0])


@pytest.mark.parametrize(("xy", "most"), [(SQUARE, 8), (HEXAGONAL, 6)], ids=["square", "hexagonal"])
@pytest.mark.parametrize("scale", [1.0, 137.0])
def test_neighbors_are_those_of_squidpy(xy: np.ndarray, most: int, scale: float) -> None:
    scattered = (xy + np.random.default_rng(0).normal(0, 0.02, xy.shape)) * scale
    graph = neighbor_graph(scattered)
    assert graph.sum(axis=1).max() == most
    np.testing.assert_array_equal(graph.toarray(), graph.T.toarray())
    table = AnnData(np.zeros((len(xy), 1)), obsm={"spatial": scattered})
    sq.gr.spatial_neighbors_radius(table, radius=1.6 * scale)
    np.testing.assert_array_equal(graph.toarray(), table.obsp["spatial_connectivities"].toarray())


# By hand


def test_tiny_cases() -> None:
    measured = np.array([[0.0, 1, 2, 3], [0.0, 0, 4, 4], [1.0, 1, 1, 1]])
    predicted = np.array([[1.0, 1, 3, 3], [8.0, 8, 0, 0], [0.0, 1, 2, 3]])
    found = of_genes(measured, predicted)
    np.testing.assert_array_equal(found["n"], [4, 4, 4])
    np.testing.assert_allclose(found["pcc"], [4 / np.sqrt(20), -1, np.nan])
    np.testing.assert_allclose(found["spearman"], [4 / np.sqrt(20), -1, np.nan])
    np.testing.assert_allclose(found["rmse"], np.sqrt([0.5, 40, 1.5]))
    np.testing.assert_allclose(found["mae"], [0.5, 6, 1])
    np.testing.assert_allclose(found["r2"], [1 - 2 / 5, 1 - 160 / 16, np.nan])
    np.testing.assert_allclose(found["variance_ratio"], [4 / 5, 4, np.nan])
    # On a line, the lag is the mean of the neighbours: (-0.5, -0.5, 0.5, 0.5) for the first gene.
    np.testing.assert_allclose(found["moran_measured"], [(0.75 + 0.25 + 0.25 + 0.75) / 5, 0.5, np.nan])
    np.testing.assert_allclose(found["moran_predicted"], [0.5, 0.5, (0.75 + 0.25 + 0.25 + 0.75) / 5])


def test_a_constant_is_recognized_whatever_its_value() -> None:
    # Its mean in floating point is not it, and what is left of it would correlate with something.
    measured = np.full((1, 1001), np.float64(np.float32(0.1)))
    predicted = np.random.default_rng(0).normal(size=(1, 1001))
    found = of_genes(measured, predicted)
    assert np.isnan([found[name][0] for name in ("pcc", "spearman", "r2", "variance_ratio", "moran_measured")]).all()
    assert np.isfinite([found[name][0] for name in ("rmse", "mae", "moran_predicted")]).all()


# Units


@pytest.fixture
def correlated() -> np.ndarray:
    """Measured and predicted values of four genes, one with missing values, one with an outlier, one with a constant."""
    x, y = np.random.default_rng(0).normal(size=(2, 4, 40))
    y += x
    x[1, 3], y[1, 5] = np.nan, np.nan
    x[2, 7] = 1e6
    y[3] = 0.1
    return np.stack([x, y])


@pytest.mark.parametrize("unit", [1e-300, 1e-200, 1e-30, 3.0, 1e30, 1e200, 1e300])
def test_scores_do_not_depend_on_the_unit(correlated: np.ndarray, unit: float) -> None:
    expected, found = of_genes(*correlated), of_genes(*(correlated * unit))
    for name, values in expected.items():
        of_unit = values * unit if name in ("rmse", "mae") else values
        np.testing.assert_allclose(found[name], of_unit, rtol=1e-9, err_msg=name)
    assert np.isfinite(found["rmse"]).all() and np.isnan(found["pcc"]).tolist() == [False, False, False, True]
    mixed = of_genes(correlated[0] / unit, correlated[1] * unit)
    for name in ("pcc", "spearman", "moran_measured", "moran_predicted"):
        np.testing.assert_allclose(mixed[name], expected[name], rtol=1e-9, err_msg=name)
    of_spots = [spot_metrics(*Measured(x.T).beside(y.T)[0]) for x, y in (correlated, correlated * unit)]
    np.testing.assert_allclose(of_spots[1]["pcc"], of_spots[0]["pcc"], rtol=1e-9)
    np.testing.assert_allclose(of_spots[1]["rmse"], of_spots[0]["rmse"] * unit, rtol=1e-9)


@pytest.mark.parametrize("value", [0.1, 1e-320, 1e-200, -7.0, 1e200, 1.7e308])
def test_constants_are_undefined_whatever_their_value(correlated: np.ndarray, value: float) -> None:
    found = of_genes(np.full((4, 40), value), correlated[1])
    for name in ("pcc", "spearman", "r2", "variance_ratio", "moran_measured"):
        assert np.isnan(found[name]).all()
    assert np.isfinite(found["rmse"]).all() and np.isfinite(found["mae"]).all()


@pytest.mark.parametrize("offset", [1e6, 1e12])
def test_values_far_from_zero(correlated: np.ndarray, offset: float) -> None:
    far = correlated[:, :2] + offset  # rounded, so that what is expected is of what is left
    expected, found = of_genes(*(far - offset)), of_genes(*far)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-8, atol=1e-12, err_msg=name)


def test_a_difference_in_the_last_place_is_one() -> None:
    x = np.where(np.arange(40) % 3 == 0, np.nextafter(1.0, 2.0), 1.0)[None]
    y = (np.arange(40) % 3 == 0).astype(float)[None]
    assert of_genes(x, y)["pcc"] == pytest.approx(1)


def test_errors_of_zeros_are_in_the_unit_of_the_others() -> None:
    found = of_genes(np.zeros((1, 4)), np.full((1, 4), 1e-200))
    assert found["rmse"] == pytest.approx(1e-200, rel=1e-12) and found["mae"] == pytest.approx(1e-200, rel=1e-12)


def test_spots_without_neighbors_have_no_part_in_morans_i() -> None:
    xy = np.vstack([line(6), [[50.0, 50.0]]])
    values = np.array([[1.0, 2, 4, 3, 5, 6, -20]])
    z = values[0] - values.mean()
    lag = np.array([z[1], (z[0] + z[2]) / 2, (z[1] + z[3]) / 2, (z[2] + z[4]) / 2, (z[3] + z[5]) / 2, z[4], 0])
    np.testing.assert_allclose(morans_i(values, xy), 7 / 6 * (z @ lag) / (z @ z))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_graphs_of_few_spots(n: int) -> None:
    graph = neighbor_graph(line(n))
    assert graph.shape == (n, n)
    assert graph.nnz == (2 if n == 2 else 0)


def test_mean_of_known() -> None:
    values = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    np.testing.assert_array_equal(mean_of_known(values), [2, 5, np.nan])
