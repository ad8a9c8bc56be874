"""Scores of predictions: arrays in, arrays out. Observations lie along the last axis; pairs with a NaN do not count."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from stpredict.tl.evaluation.numbers._sides import Errors, Side, dot

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


def gene_metrics(x: Side, y: Side) -> dict[str, np.ndarray]:
    """Scores of genes across spots, from measured and predicted values of the same pairs, with a graph.

    Returns
    -------
    ``(G,)`` each; NaN where a score is not defined (a constant vector has no correlation).
    """
    error = Errors(x, y)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        return {
            "n": x.n,
            "pcc": correlation(x, y),
            "spearman": _rank_correlation(x, y),
            "rmse": _root_mean_square(error, x.n),
            "mae": np.ldexp(error.sum / x.n, error.exponent),
            "r2": np.where(x.varies, 1 - _ratio(error, x), np.nan),
            "variance_ratio": np.where(x.varies, _ratio(y, x), np.nan),
            "moran_measured": x.morans_i,
            "moran_predicted": y.morans_i,
        }


def spot_metrics(x: Side, y: Side) -> dict[str, np.ndarray]:
    """Scores of spots across genes, from measured and predicted values of the same pairs, ``(n, G)``."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        return {"n": x.n, "pcc": correlation(x, y), "rmse": _root_mean_square(Errors(x, y), x.n)}


def correlation(x: Side, y: Side) -> np.ndarray:
    """Pearson's; NaN where a side is constant."""
    norms = np.where(x.varies & y.varies, np.sqrt(x.squares) * np.sqrt(y.squares), np.nan)
    return np.clip(dot(x.centered, y.centered) / norms, -1, 1)


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where nothing is."""
    known = np.isfinite(values)
    n = known.sum(axis=0)
    return np.divide(np.where(known, values, 0).sum(axis=0), n, out=np.full(n.shape, np.nan), where=n > 0)


def _rank_correlation(x: Side, y: Side) -> np.ndarray:
    """Spearman's; nothing is sorted where no row has one."""
    defined = x.varies & y.varies
    if not defined.any():
        return np.full(defined.shape, np.nan)
    norms = np.sqrt(dot(x.ranks, x.ranks)) * np.sqrt(dot(y.ranks, y.ranks))
    return np.clip(dot(x.ranks, y.ranks) / np.where(defined, norms, np.nan), -1, 1)


def _root_mean_square(error: Errors, n: np.ndarray) -> np.ndarray:
    return np.ldexp(np.sqrt(error.squares / n), error.exponent)


def _ratio(a: Side | Errors, b: Side) -> np.ndarray:
    """Of sums of squares."""
    return np.ldexp(a.squares / b.squares, 2 * (a.exponent - b.exponent))
