"""Spots that are scored together, and their expression, a few genes or spots at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp

Matrix = np.ndarray | sp.csr_matrix | sp.csc_matrix
"""``(n_obs, n_vars)``, dense or sparse."""
# Values that each thread holds dense at a time: 2 MB, and some ten times that for what is computed of them. For arrays of
# 4 MB and more, numpy asks the system for fresh pages each time, which takes longer than the arithmetic.
_CHUNK = 2**18


@dataclass(frozen=True)
class Part:
    """Spots that are scored together: a section, or what a fold holds of it.

    Attributes
    ----------
    name
        What the scores frame calls it.
    group
        What the bootstrap resamples it with: a patient, or the section itself.
    rows
        ``(n,)`` positions in the table.
    xy
        ``(n, 2)`` centres, in any unit.
    """

    name: str
    group: str
    rows: np.ndarray = field(repr=False)
    xy: np.ndarray = field(repr=False)


def by_gene(matrix: Matrix, rows: np.ndarray, columns: np.ndarray) -> Callable[[slice], np.ndarray]:
    """What gives some of the columns, ``(genes, len(rows))`` float64."""
    if not sp.issparse(matrix):
        return lambda genes: np.asarray(matrix)[np.ix_(rows, columns[genes])].T.astype(np.float64, order="C")
    chosen = sp.csc_matrix(_select(matrix, rows, columns))
    return lambda genes: chosen[:, genes].T.toarray().astype(np.float64)


def by_spot(matrix: Matrix, rows: np.ndarray, columns: np.ndarray) -> Callable[[slice], np.ndarray]:
    """What gives some of the rows, ``(spots, len(columns))`` float64."""
    if not sp.issparse(matrix):
        return lambda spots: np.asarray(matrix)[np.ix_(rows[spots], columns)].astype(np.float64)
    chosen = _select(matrix, rows, columns)
    return lambda spots: chosen[spots].toarray().astype(np.float64)


def _select(matrix: Matrix, rows: np.ndarray, columns: np.ndarray) -> sp.csr_matrix:
    """Rows and columns of a sparse matrix; all columns, the common case, are taken without looking for them."""
    chosen = sp.csr_matrix(matrix)[rows]
    return chosen if np.array_equal(columns, np.arange(matrix.shape[1])) else chosen[:, columns]


def slices(n: int, length: int) -> list[slice]:
    """Cut ``n`` rows of some length so that not too many values are dense at a time."""
    size = max(_CHUNK // max(length, 1), 1)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
