"""Spots that are scored together, and their expression, a few genes or spots at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from stpredict._sdata import Spots, section_name

Matrix = np.ndarray | sp.csr_matrix | sp.csc_matrix
"""``(n_obs, n_vars)``, dense or sparse."""
# What the mean over sections is called where there is a name for each section.
MEAN = "mean of sections"
# Values that each thread holds dense at a time: 4 MB, and some ten times that for what is computed of them.
_CHUNK = 2**19


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


def section_names(sections: Sequence[Spots], table: AnnData) -> list[str]:
    """What to call sections: ``obs["section"]`` where each has one of its own, else the keys of the spots."""
    names = [section_name(section, table) for section in sections]
    return names if len(set(names)) == len(names) else [section.name for section in sections]


def by_gene(matrix: Matrix, rows: np.ndarray, columns: np.ndarray) -> Callable[[slice], np.ndarray]:
    """What gives some of the columns, ``(genes, len(rows))`` float64."""
    if not sp.issparse(matrix):
        return lambda genes: np.asarray(matrix)[np.ix_(rows, columns[genes])].T.astype(np.float64, order="C")
    chosen = sp.csc_matrix(sp.csr_matrix(matrix)[rows][:, columns])
    return lambda genes: chosen[:, genes].T.toarray().astype(np.float64)


def by_spot(matrix: Matrix, rows: np.ndarray, columns: np.ndarray) -> Callable[[slice], np.ndarray]:
    """What gives some of the rows, ``(spots, len(columns))`` float64."""
    if not sp.issparse(matrix):
        return lambda spots: np.asarray(matrix)[np.ix_(rows[spots], columns)].astype(np.float64)
    chosen = sp.csr_matrix(matrix)[rows][:, columns]
    return lambda spots: chosen[spots].toarray().astype(np.float64)


def slices(n: int, length: int) -> list[slice]:
    """Cut ``n`` rows of some length so that not too many values are dense at a time."""
    size = max(_CHUNK // max(length, 1), 1)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
