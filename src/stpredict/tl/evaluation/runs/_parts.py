"""Spots that are scored together, and their expression, a few genes or spots at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg

from stpredict._data.slide import Spots, section_name

Matrix = np.ndarray | sp.csr_matrix | sp.csc_matrix
"""``(n_obs, n_vars)``, dense or sparse."""
# What the mean over sections is called where there is a name for each section.
MEAN = "mean of sections"
# Values that each thread holds dense at a time: 4 MB, and some ten times that for what is computed of them.
_CHUNK = 2**19
# A correlation of two spots is 1 or -1 whatever they hold.
_MIN_SPOTS = 3


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


def make_parts(
    table: AnnData, sections: Sequence[Spots], folds: Mapping[str, np.ndarray], *, whole_folds: bool = False
) -> dict[str, list[Part]]:
    """What is scored together: what each fold holds of each section.

    Predictions of different folds are never scored together: their models differ, and with them the level of each gene,
    so that even constants would seem to be correlated with what was measured (negatively: the mean of the other folds is
    low where a fold's own is high).

    Parameters
    ----------
    table
        Names of sections and patients.
    sections
        Where the rows belong to.
    folds
        ``(n_obs,)`` masks of the rows to score by name of the fold; ``{"": rows}`` without folds.
    whole_folds
        Score all of a fold at once, not each section.

    Returns
    -------
    By fold. Parts of fewer than 3 spots are left out. The bootstrap's groups are patients where there are several, else
    sections, else (within one section) the parts themselves.

    Raises
    ------
    ValueError
        No part is large enough.
    """
    names = section_names(sections, table)
    any_fold = np.any(list(folds.values()), axis=0)
    parts: dict[str, list[Part]] = {}
    for fold, rows in folds.items():
        of_fold = []
        for section, name in zip(sections, names, strict=True):
            chosen = rows[section.rows]
            is_whole = fold == "" or (chosen == any_fold[section.rows]).all()
            title = name if is_whole else f"{name} · {fold}"
            if chosen.sum() >= _MIN_SPOTS:
                of_fold.append(Part(title, name, section.rows[chosen], section.xy[chosen]))
            elif chosen.any():
                logg.warning(f"Only {chosen.sum()} spots to score in {title!r}, which is left out.")
        parts[fold] = [_join(fold, of_fold)] if whole_folds and of_fold else of_fold
    flat = [part for of_fold in parts.values() for part in of_fold]
    if not flat:
        raise ValueError(
            f"No section has at least {_MIN_SPOTS} spots to score: there are {any_fold.sum()} in the sections {names[:8]}."
        )
    patients = {part.name: _patient(table, part) for part in flat}
    if None not in patients.values() and len(set(patients.values())) > 1:
        groups = {name: str(patient) for name, patient in patients.items()}
    elif len({part.group for part in flat}) > 1:
        return parts
    else:
        groups = {part.name: part.name for part in flat}
    return {fold: [replace(part, group=groups[part.name]) for part in of_fold] for fold, of_fold in parts.items()}


def _patient(table: AnnData, part: Part) -> str | None:
    """The patient of all of a part's rows, if there is one."""
    if "patient" not in table.obs:
        return None
    found = table.obs["patient"].iloc[part.rows].unique()
    return str(found[0]) if len(found) == 1 and not pd.isna(found[0]) else None


def _join(fold: str, parts: Sequence[Part]) -> Part:
    """One part of several sections, which lie far apart."""
    widths = [float(np.ptp(part.xy[:, 0])) for part in parts]
    left = np.cumsum([0.0, *(3 * width + 1 for width in widths[:-1])])
    xy = [part.xy - part.xy.min(axis=0) + [x, 0] for part, x in zip(parts, left, strict=True)]
    return Part(fold, fold, np.concatenate([part.rows for part in parts]), np.concatenate(xy))


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
