"""How well one half of the counts predicts the other, and what that means for the whole: the highest PCC within reach."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from stpredict.tl.evaluation.numbers._metrics import mean_of_known

# What halves are drawn from; no instrument counts so far in one spot.
MAX_COUNT = int(np.iinfo(np.int32).max)
_TARGET_SUM = 1e4
# A gene that is seen in fewer spots has a correlation that a single spot can make or break, and no error that tells so.
_MIN_SEEN = 10
# Counts that are worked on at a time.
_BLOCK = 2**19
# A ceiling is told from none where it is as high as this, and the halves' PCC above 0 at the level of 0.05, one-sided.
_MIN_CEILING, _MIN_ERRORS = 0.1, 1.645


class Halves(NamedTuple):
    """PCC of the halves of the counts of genes in sections, and its standard error; ``(S, G)`` each, NaN where not known."""

    pcc: np.ndarray
    error: np.ndarray


class Ceiling(NamedTuple):
    """Highest PCC, its standard error, and whether it is told from none; the shape of the halves' PCC."""

    value: np.ndarray
    error: np.ndarray
    determined: np.ndarray


def ceiling(halves: Halves) -> Ceiling:
    """What the halves' PCC means for the whole."""
    value = _ceiling(halves.pcc)
    error = (_ceiling(halves.pcc + halves.error) - _ceiling(halves.pcc - halves.error)) / 2
    return Ceiling(value, error, (value >= _MIN_CEILING) & (halves.pcc >= _MIN_ERRORS * halves.error))


def mean_halves(halves: Halves) -> Halves:
    """``(G,)`` mean over the sections where it is known.

    Ceilings are never below 0, so that their mean would be above 0 for noise: the halves' PCC, which averages out, is
    averaged in their place.
    """
    n = np.isfinite(halves.pcc).sum(axis=0)
    error = np.sqrt(mean_of_known(halves.error**2) / np.maximum(n, 1))
    return Halves(mean_of_known(halves.pcc), error)


def correlate_halves(counts: sp.csr_matrix, columns: np.ndarray, n_draws: int, rng: np.random.Generator) -> Halves:
    """``(G,)`` PCC of the halves, averaged over draws, and its standard error; NaN for genes that are hardly ever seen.

    Both come from sums over the counts that are not 0: all zeros of a gene are alike. Counts are at most :data:`MAX_COUNT`.
    """
    n_spots, n_genes = counts.shape[0], len(columns)
    others = np.setdiff1d(np.arange(counts.shape[1]), columns)
    by_gene = sp.csc_matrix(counts)[:, np.concatenate([columns, others])]
    by_gene.eliminate_zeros()
    whole, spot, ends = by_gene.data.astype(np.int32), by_gene.indices, by_gene.indptr
    half = np.empty_like(whole)
    blocks = _blocks(ends, 0, n_genes)
    r, influence, influence_of_zero = np.zeros(n_genes), np.zeros(ends[n_genes], dtype=np.float32), np.zeros(n_genes)
    for _ in range(n_draws):
        total = np.zeros((2, n_spots))
        for _, stored in [*blocks, *_blocks(ends, n_genes, counts.shape[1])]:
            half[stored] = rng.binomial(whole[stored], 0.5)
            for of_half, values in zip(total, (half[stored], whole[stored] - half[stored]), strict=True):
                of_half += np.bincount(spot[stored], weights=values, minlength=n_spots)
        scale = _TARGET_SUM / np.maximum(total, 1)
        for genes, stored in blocks:
            x = np.log1p(scale[0, spot[stored]] * half[stored])
            y = np.log1p(scale[1, spot[stored]] * (whole[stored] - half[stored]))
            of_genes = _correlate(x, y, np.diff(ends[genes.start : genes.stop + 1]), n_spots)
            r[genes] += of_genes.r / n_draws
            influence[stored] += of_genes.influence
            influence_of_zero[genes] += of_genes.influence_of_zero
    n_seen = np.diff(ends)[:n_genes]
    squares = np.zeros(n_genes)
    for genes, stored in blocks:
        gene = np.repeat(np.arange(genes.stop - genes.start), n_seen[genes])
        squares[genes] = np.bincount(gene, weights=influence[stored] ** 2, minlength=genes.stop - genes.start)
    error = np.sqrt(squares + (n_spots - n_seen) * influence_of_zero**2) / n_draws / n_spots
    seen = n_seen >= _MIN_SEEN
    return Halves(np.where(seen, r, np.nan), np.where(seen, error, np.nan))


class _Correlations(NamedTuple):
    """``(G,)`` ``r``, and the influence on it of each value that is stored, and ``(G,)`` of each zero."""

    r: np.ndarray
    influence: np.ndarray
    influence_of_zero: np.ndarray


def _correlate(x: np.ndarray, y: np.ndarray, n_stored: np.ndarray, n_spots: int) -> _Correlations:
    """Of genes, from their stored values one gene after the other."""
    gene = np.repeat(np.arange(len(n_stored)), n_stored)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(gene, weights=values, minlength=len(n_stored)) / n_spots

    mean_x, mean_y = mean(x), mean(y)
    sd_x = np.sqrt(np.maximum(mean(x * x) - mean_x**2, 0))
    sd_y = np.sqrt(np.maximum(mean(y * y) - mean_y**2, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (mean(x * y) - mean_x * mean_y) / (sd_x * sd_y)
        stored = _influence((x - mean_x[gene]) / sd_x[gene], (y - mean_y[gene]) / sd_y[gene], r[gene])
        return _Correlations(r, stored, _influence(-mean_x / sd_x, -mean_y / sd_y, r))


def _blocks(ends: np.ndarray, first: int, last: int) -> list[tuple[slice, slice]]:
    """Cut genes so that each cut has about so many stored values: genes, and where their values are."""
    wanted = np.arange(ends[first], ends[last], _BLOCK)
    cuts = np.unique([first, *np.searchsorted(ends, wanted, side="right")[1:] - 1, last])
    return [(slice(a, b), slice(int(ends[a]), int(ends[b]))) for a, b in pairwise(cuts)]


def _influence(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Of one standardised pair on the correlation: what the jackknife of an infinitely small weight gives."""
    return x * y - r * (x * x + y * y) / 2


def _ceiling(r: np.ndarray) -> np.ndarray:
    """Root of Spearman and Brown's reliability of the whole, from the correlation of its halves."""
    r = np.clip(r, 0, 1)
    return np.sqrt(2 * r / (1 + r))
