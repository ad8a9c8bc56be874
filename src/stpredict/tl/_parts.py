"""Expression of the spots that are scored together, a few genes or spots at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from stpredict._sdata import Spots, section_name

Matrix = np.ndarray | sp.csr_matrix | sp.csc_matrix
"""``(n_obs, n_vars)``, dense or sparse."""
# What the mean over sections is called where there is a name for each section.
MEAN = "mean of sections"
# Values held dense at a time: 4 MB of them, which stay in a processor's cache.
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


def gene_chunks(matrix: Matrix, rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Some genes after the other across the rows: positions among ``columns``, and ``(genes, len(rows))`` float64."""
    by_gene = sp.csc_matrix(sp.csr_matrix(matrix)[rows][:, columns]) if sp.issparse(matrix) else None
    for genes in _slices(len(columns), len(rows)):
        if by_gene is None:
            yield genes, np.asarray(matrix)[np.ix_(rows, columns[genes])].T.astype(np.float64, order="C")
        else:
            yield genes, by_gene[:, genes].T.toarray().astype(np.float64)


def spot_chunks(matrix: Matrix, rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Some spots after the other across the genes: positions among ``rows``, and ``(spots, len(columns))`` float64."""
    by_spot = sp.csr_matrix(matrix) if sp.issparse(matrix) else None
    for spots in _slices(len(rows), len(columns)):
        if by_spot is None:
            yield spots, np.asarray(matrix)[np.ix_(rows[spots], columns)].astype(np.float64)
        else:
            yield spots, by_spot[rows[spots]][:, columns].toarray().astype(np.float64)


def _slices(n: int, length: int) -> Iterator[slice]:
    size = max(_CHUNK // max(length, 1), 1)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
