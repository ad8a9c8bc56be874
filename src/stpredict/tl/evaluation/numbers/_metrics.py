"""Scores of predictions: arrays in, arrays out. Observations lie along the last axis; pairs with a NaN do not count."""

from __future__ import annotations

import numba
import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

# Distance up to which spots are neighbours, in medians of the distance to the nearest spot: between the diagonal of a square
# grid, 1.41, and the second neighbours of a hexagonal one, 1.73, also where spots scatter around their grid.
_REACH = 1.6


def neighbor_graph(xy: np.ndarray) -> sp.csr_matrix:
    """``(n, n)`` 1 for neighbouring spots: 8 neighbours on a square grid, 6 on a hexagonal one."""
    from sklearn.neighbors import radius_neighbors_graph

    if len(xy) < 2:
        return sp.csr_matrix((len(xy), len(xy)))
    distances = np.asarray(cKDTree(xy).query(xy, k=2)[0])
    return sp.csr_matrix(radius_neighbors_graph(xy, _REACH * float(np.median(distances[:, 1]))))


def gene_metrics(measured: np.ndarray, predicted: np.ndarray, graph: sp.csr_matrix) -> dict[str, np.ndarray]:
    """Scores of genes across spots.

    Parameters
    ----------
    measured, predicted
        ``(G, n)``.
    graph
        ``(n, n)`` neighbours among the spots.

    Returns
    -------
    ``(G,)`` each; NaN where a score is not defined (a constant vector has no correlation).
    """
    pairs = Pairs(measured, predicted)
    error = pairs.y - pairs.x
    squares = _dot(pairs.xc, pairs.xc)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "n": pairs.n,
            "pcc": pairs.correlation(),
            "spearman": Pairs(ranks(pairs.x, pairs.both), ranks(pairs.y, pairs.both), pairs.both).correlation(),
            "rmse": np.sqrt(_dot(error, error) / pairs.n),
            "mae": np.abs(error).sum(axis=-1) / pairs.n,
            "r2": np.where(pairs.x_varies, 1 - _dot(error, error) / squares, np.nan),
            "variance_ratio": np.where(pairs.x_varies, _dot(pairs.yc, pairs.yc) / squares, np.nan),
            "moran_measured": np.where(pairs.x_varies, _morans_i(pairs.xc, pairs.both, graph), np.nan),
            "moran_predicted": np.where(pairs.y_varies, _morans_i(pairs.yc, pairs.both, graph), np.nan),
        }


def spot_metrics(measured: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of ``n`` spots across genes, from two arrays ``(n, G)``."""
    pairs = Pairs(measured, predicted)
    error = pairs.y - pairs.x
    with np.errstate(divide="ignore", invalid="ignore"):
        return {"n": pairs.n, "pcc": pairs.correlation(), "rmse": np.sqrt(_dot(error, error) / pairs.n)}


def ranks(values: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Ranks from 1 among the valid values of each row, ties sharing their average; others are 0.

    As :func:`scipy.stats.rankdata`, which takes ten times as long.
    """
    if valid is not None:
        values = np.where(valid, values, np.inf)
    found = _average_ties(values, np.argsort(values, axis=-1))
    return found if valid is None else np.where(valid, found, 0)


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where nothing is."""
    known = np.isfinite(values)
    n = known.sum(axis=0)
    return np.divide(np.where(known, values, 0).sum(axis=0), n, out=np.full(n.shape, np.nan), where=n > 0)


def morans_i(values: np.ndarray, graph: sp.csr_matrix) -> np.ndarray:
    """Moran's I of each row of ``(G, n)``, neighbours weighing 1 together, as squidpy has it; NaN for constants."""
    pairs = Pairs(values, values)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(pairs.x_varies, _morans_i(pairs.xc, pairs.both, graph), np.nan)


class Pairs:
    """Values that have a partner, the others 0: ``x``, ``y``, and ``xc``, ``yc`` around their means.

    ``both`` is `None` where nothing is missing: masks would double the time.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, both: np.ndarray | None = None) -> None:
        if both is None:
            both = np.isfinite(x) & np.isfinite(y)
        self.both = None if both.all() else both
        self.n = both.sum(axis=-1)
        self.x, self.xc, self.x_varies = self._center(x)
        self.y, self.yc, self.y_varies = self._center(y)

    def _center(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.both is None:
            varies = values.min(axis=-1) < values.max(axis=-1)
            return values, values - values.mean(axis=-1, keepdims=True), varies
        low = np.where(self.both, values, np.inf).min(axis=-1)
        varies = low < np.where(self.both, values, -np.inf).max(axis=-1)
        values = np.where(self.both, values, 0.0)
        mean = values.sum(axis=-1) / np.maximum(self.n, 1)
        return values, np.where(self.both, values - mean[..., None], 0.0), varies

    def scale(self) -> np.ndarray:
        """Product of the sides' norms; NaN where a side is constant."""
        norms = np.sqrt(_dot(self.xc, self.xc)) * np.sqrt(_dot(self.yc, self.yc))
        return np.where(self.x_varies & self.y_varies & (norms > 0), norms, np.nan)

    def correlation(self) -> np.ndarray:
        """Pearson's; NaN where a side is constant."""
        return np.clip(_dot(self.xc, self.yc) / self.scale(), -1, 1)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Scalar products along the last axis; by einsum, because threads of BLAS and ours would be in each other's way."""
    return np.einsum("...n,...n->...", a, b)


def _morans_i(centered: np.ndarray, both: np.ndarray | None, graph: sp.csr_matrix) -> np.ndarray:
    """Of rows that are 0 where a value is missing; spots without neighbours have no weight."""
    columns = np.ascontiguousarray(centered.T)
    if both is None:
        n_neighbors = np.asarray(graph.sum(axis=1)).reshape(-1, 1)
        lag = sp.diags_array(1 / np.maximum(n_neighbors.ravel(), 1)) @ graph @ columns
        n = np.array(float(len(n_neighbors)))
    else:
        n_neighbors = (graph @ both.T.astype(np.float64)) * both.T
        lag = graph @ columns / np.maximum(n_neighbors, 1)
        n = both.sum(axis=-1)
    weight = (n_neighbors > 0).sum(axis=0)
    return n / weight * np.einsum("ng,ng->g", columns, lag) / _dot(centered, centered)


@numba.njit(nogil=True, cache=True)
def _average_ties(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    ranks = np.empty(values.shape)
    for row in range(values.shape[0]):
        start = 0
        for i in range(1, values.shape[1] + 1):
            if i == values.shape[1] or values[row, order[row, i]] != values[row, order[row, start]]:
                for j in range(start, i):
                    ranks[row, order[row, j]] = (start + 1 + i) / 2
                start = i
    return ranks
