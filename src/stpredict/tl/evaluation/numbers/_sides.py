"""Measured and predicted values beside each other: what scores are made of, whatever the unit, each thing computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import NamedTuple

import numba
import numpy as np
import scipy.sparse as sp


class Span(NamedTuple):
    """Observations that lie next to each other, and ``(n, n)`` which of them are neighbours, where that matters."""

    where: slice
    graph: sp.csr_matrix | None = None


# Share of zeros from which rows are sorted without them, one by one.
_MANY_ZEROS = 0.1

WHOLE = (Span(slice(None)),)


class Side:
    """Values ``(G, n)`` of one side that have a partner on the other; the others are 0.

    Nothing that is computed of them depends on their unit, from the smallest to the largest number of float64: each row is
    divided by the power of 2 next to its largest magnitude, which is exact, before anything is added or squared.

    Attributes
    ----------
    values
        As they are.
    valid
        Which of them count. `None` where all do: masks would double the time.
    n, varies
        ``(G,)`` how many count, and whether they differ.
    exponent
        ``(G,)`` of the power of 2.
    centered
        Divided by it, around their mean.
    """

    def __init__(
        self,
        values: np.ndarray,
        valid: np.ndarray | None = None,
        *,
        graph: sp.csr_matrix | None = None,
        ranks: Callable[[], np.ndarray] | None = None,
    ) -> None:
        self.valid = None if valid is None or valid.all() else valid
        self._graph, self._ranks = graph, ranks
        if self.valid is None:
            self.n = np.full(values.shape[:-1], values.shape[-1])
            low, high = values.min(axis=-1), values.max(axis=-1)
        else:
            self.n = self.valid.sum(axis=-1)
            low = np.where(self.valid, values, np.inf).min(axis=-1)
            high = np.where(self.valid, values, -np.inf).max(axis=-1)
            values = np.where(self.valid, values, 0.0)
        self.values, self.varies = values, low < high
        self.exponent = exponents(np.where(self.n > 0, np.maximum(np.abs(low), np.abs(high)), 0.0))
        self.centered = values * np.ldexp(1.0, -self.exponent)[..., None]
        # Twice: far from 0, the mean is rounded by more than the values differ.
        for _ in range(2):
            self.centered -= (self.centered.sum(axis=-1) / np.maximum(self.n, 1))[..., None]
            if self.valid is not None:
                self.centered[~self.valid] = 0.0

    @cached_property
    def squares(self) -> np.ndarray:
        """``(G,)`` sums of squares around the mean."""
        return dot(self.centered, self.centered)

    @cached_property
    def ranks(self) -> np.ndarray:
        """Ranks around their mean, ties sharing theirs."""
        return centered_ranks(self.values, self.valid)[0] if self._ranks is None else self._ranks()

    @cached_property
    def morans_i(self) -> np.ndarray:
        """``(G,)`` Moran's I, neighbours weighing 1 together, as squidpy has it; NaN for constants, and without a graph.

        Spots without neighbours have no weight.
        """
        if self._graph is None or not self.varies.any():
            return np.full(self.varies.shape, np.nan)
        columns = np.ascontiguousarray(self.centered.T)
        if self.valid is None:
            n_neighbors = np.asarray(self._graph.sum(axis=1)).reshape(-1, 1)
            lag = sp.diags_array(1 / np.maximum(n_neighbors.ravel(), 1)) @ self._graph @ columns
        else:
            n_neighbors = (self._graph @ self.valid.T.astype(np.float64)) * self.valid.T
            lag = self._graph @ columns / np.maximum(n_neighbors, 1)
        weight = (n_neighbors > 0).sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.varies, self.n / weight * np.einsum("ng,ng->g", columns, lag) / self.squares, np.nan)


class Measured:
    """One side, of which other sides have the same or other values missing."""

    def __init__(self, values: np.ndarray, spans: Sequence[Span] = WHOLE) -> None:
        self._values, self._spans = values, spans
        self._finite = np.isfinite(values)
        self._both = np.empty(0, dtype=bool)
        self._sides: list[Side] = []

    def beside(self, predicted: np.ndarray) -> list[tuple[Side, Side]]:
        """Measured and predicted pairs in each span; what was computed of the measured side is kept while it can be."""
        both = self._finite & np.isfinite(predicted)
        if not np.array_equal(both, self._both):
            self._both, self._sides = both, _split(self._values, both, self._spans)
        return list(zip(self._sides, _split(predicted, both, self._spans), strict=True))


def _split(values: np.ndarray, valid: np.ndarray, spans: Sequence[Span]) -> list[Side]:
    """A side in each span. Several are followed by one that holds them all, and sorting that one ranks the others."""
    mask = None if valid.all() else valid
    part_of = np.zeros(values.shape[-1], dtype=np.int64)
    for i, span in enumerate(spans[:-1]):
        part_of[span.where] = i

    @cache
    def ranked() -> tuple[np.ndarray, np.ndarray]:
        return centered_ranks(values, mask, part_of)

    def ranks_of(span: Span) -> Callable[[], np.ndarray]:
        return lambda: ranked()[int(span is not spans[-1])][..., span.where]

    return [
        Side(
            values[..., span.where],
            None if mask is None else mask[..., span.where],
            graph=span.graph,
            ranks=ranks_of(span),
        )
        for span in spans
    ]


class Errors:
    """Distances of two sides, divided by the power of 2 next to the largest of each row.

    Attributes
    ----------
    exponent
        ``(G,)`` of the power of 2.
    sum, squares
        ``(G,)`` of the distances, and of their squares.
    """

    def __init__(self, x: Side, y: Side) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            distances = np.abs(y.values - x.values)
            self.exponent = exponents(distances.max(axis=-1))
            distances *= np.ldexp(1.0, -self.exponent)[..., None]
            self.sum, self.squares = distances.sum(axis=-1), dot(distances, distances)


def exponents(magnitudes: np.ndarray) -> np.ndarray:
    """Of the powers of 2 above magnitudes, so that what is divided by them is about 1; both ends of float64 are in reach."""
    return np.clip(np.frexp(magnitudes)[1], -1023, 1024).astype(np.int64)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Scalar products along the last axis; by einsum, because threads of BLAS and ours would be in each other's way."""
    return np.einsum("...n,...n->...", a, b)


def centered_ranks(
    values: np.ndarray, valid: np.ndarray | None = None, part_of: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks among the valid values of each row around their mean, ties sharing their average; others are 0.

    As :func:`scipy.stats.rankdata`, which takes ten times as long.

    Parameters
    ----------
    values
        ``(G, n)``.
    valid
        ``(G, n)`` which values count. `None` means all.
    part_of
        ``(n,)`` parts, counted from 0. `None` means one.

    Returns
    -------
    Ranks in the whole row, and in each part of it; one sort makes both.
    """
    if valid is None:
        n_valid = np.full(len(values), values.shape[1])
    else:
        n_valid, values = valid.sum(axis=1), np.where(valid, values, np.inf)
    if part_of is None:
        part_of = np.zeros(values.shape[1], dtype=np.int64)
    return _average_ties(values, _order(values), n_valid, part_of, int(part_of.max(initial=0)) + 1)


def _order(values: np.ndarray) -> np.ndarray:
    """What sorts each row; zeros, of which expression is full, are set between the others unsorted: ties take longest."""
    zero = values == 0
    if zero.mean() < _MANY_ZEROS:
        return np.argsort(values, axis=-1)
    order = np.empty(values.shape, dtype=np.int64)
    for row, is_zero, found in zip(values, zero, order, strict=True):
        others = np.flatnonzero(~is_zero)
        others = others[np.argsort(row[others])]
        n_below = np.count_nonzero(row < 0)
        n_zero = len(row) - len(others)
        found[:n_below] = others[:n_below]
        found[n_below : n_below + n_zero] = np.flatnonzero(is_zero)
        found[n_below + n_zero :] = others[n_below:]
    return order


@numba.njit(nogil=True, cache=True)
def _average_ties(
    values: np.ndarray, order: np.ndarray, n_valid: np.ndarray, part_of: np.ndarray, n_parts: int
) -> tuple[np.ndarray, np.ndarray]:
    whole = np.zeros(values.shape)
    within = np.zeros(values.shape) if n_parts > 1 else whole
    seen, tied = np.zeros(n_parts), np.zeros(n_parts)
    for row in range(values.shape[0]):
        n = n_valid[row]
        start = 0
        for i in range(1, n + 1):
            if i == n or values[row, order[row, i]] != values[row, order[row, start]]:
                for j in range(start, i):
                    whole[row, order[row, j]] = (start + i - n) / 2
                if n_parts > 1:
                    for j in range(start, i):
                        tied[part_of[order[row, j]]] += 1
                    for j in range(start, i):
                        part = part_of[order[row, j]]
                        within[row, order[row, j]] = seen[part] + (tied[part] + 1) / 2
                    for j in range(start, i):
                        part = part_of[order[row, j]]
                        seen[part] += tied[part]
                        tied[part] = 0
                start = i
        if n_parts > 1:
            for j in range(n):
                within[row, order[row, j]] -= (seen[part_of[order[row, j]]] + 1) / 2
            seen[:] = 0
    return whole, within
