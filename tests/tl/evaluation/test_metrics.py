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

from stpredict.tl.evaluation.numbers._metrics import (
    gene_metrics,
    mean_of_known,
    morans_i,
    neighbor_graph,
    ranks,
    spot_metrics,
)

# Few values, so that there are ties, constant rows and missing partners; and any.
TIED = st.sampled_from([0.0, 0.0, 1.0, 2.5, -3.0, np.nan])
ANY = st.floats(-1e3, 1e3, width=32) | st.just(np.nan)
VALUES = arrays(np.float64, st.tuples(st.just(2), st.integers(1, 4), st.integers(3, 12)), elements=TIED | ANY)

SQUARE = np.stack(np.meshgrid(np.arange(7.0), np.arange(6.0)), axis=-1).reshape(-1, 2)
HEXAGONAL = np.array([(x + 0.5 * (y % 2), y * np.sqrt(3) / 2) for x in range(7) for y in range(6)])


def line(n: int) -> np.ndarray:
    return np.column_stack([np.arange(n), np.zeros(n)])


def varies(values: np.ndarray) -> bool:
    return bool(len(values) and values.min() < values.max())


# Against scipy and scikit-learn


@settings(deadline=None, max_examples=200)
@given(VALUES)
def test_scores_are_those_of_scipy_and_sklearn(values: np.ndarray) -> None:
    measured, predicted = values
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gene_metrics(measured, predicted, neighbor_graph(line(measured.shape[1])))

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


@settings(deadline=None)
@given(VALUES)
def test_spots_are_scored_like_genes(values: np.ndarray) -> None:
    of_genes = gene_metrics(values[0], values[1], neighbor_graph(line(values.shape[2])))
    of_spots = spot_metrics(values[0], values[1])
    assert sorted(of_spots) == ["n", "pcc", "rmse"]
    for name, found in of_spots.items():
        np.testing.assert_array_equal(found, of_genes[name])


@settings(deadline=None)
@given(VALUES)
def test_ranks_are_those_of_scipy(values: np.ndarray) -> None:
    valid = np.isfinite(values[0])
    found = ranks(values[0], valid)
    for row, of_row, known in zip(values[0], found, valid, strict=True):
        np.testing.assert_array_equal(of_row[known], stats.rankdata(row[known]))
        assert (of_row[~known] == 0).all()
    np.testing.assert_array_equal(ranks(np.nan_to_num(values[0])), stats.rankdata(np.nan_to_num(values[0]), axis=1))


@pytest.mark.parametrize("xy", [SQUARE, HEXAGONAL, SQUARE[::3]], ids=["square", "hexagonal", "sparse"])
def test_morans_i_is_that_of_squidpy(xy: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    values = np.cumsum(rng.normal(size=(len(xy), 9)), axis=0)
    table = AnnData(values, obsm={"spatial": xy})
    table.obsp["spatial_connectivities"] = neighbor_graph(xy)
    sq.gr.spatial_autocorr(table, mode="moran")
    expected = table.uns["moranI"]["I"].reindex(table.var_names)
    np.testing.assert_allclose(morans_i(values.T, neighbor_graph(xy)), expected, rtol=1e-10)


def test_morans_i_leaves_missing_spots_out() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(3, len(SQUARE)))
    missing = np.zeros(values.shape, dtype=bool)
    missing[0, [0, 8, 9]], missing[1, 20:30] = True, True
    found = morans_i(np.where(missing, np.nan, values), neighbor_graph(SQUARE))
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
    found = gene_metrics(measured, predicted, neighbor_graph(line(4)))
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
    found = gene_metrics(measured, predicted, neighbor_graph(line(1001)))
    assert np.isnan([found[name][0] for name in ("pcc", "spearman", "r2", "variance_ratio", "moran_measured")]).all()
    assert np.isfinite([found[name][0] for name in ("rmse", "mae", "moran_predicted")]).all()


def test_values_far_from_zero() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 1, 50))
    found = gene_metrics(x + 1e6, y + 1e6, neighbor_graph(line(50)))
    np.testing.assert_allclose(found["pcc"], stats.pearsonr(x[0], y[0]).statistic, rtol=1e-6)


def test_spots_without_neighbors_have_no_part_in_morans_i() -> None:
    xy = np.vstack([line(6), [[50.0, 50.0]]])
    values = np.array([[1.0, 2, 4, 3, 5, 6, -20]])
    z = values[0] - values.mean()
    lag = np.array([z[1], (z[0] + z[2]) / 2, (z[1] + z[3]) / 2, (z[2] + z[4]) / 2, (z[3] + z[5]) / 2, z[4], 0])
    np.testing.assert_allclose(morans_i(values, neighbor_graph(xy)), 7 / 6 * (z @ lag) / (z @ z))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_graphs_of_few_spots(n: int) -> None:
    graph = neighbor_graph(line(n))
    assert graph.shape == (n, n)
    assert graph.nnz == (2 if n == 2 else 0)


def test_mean_of_known() -> None:
    values = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    np.testing.assert_array_equal(mean_of_known(values), [2, 5, np.nan])
