"""What is scored together: sections, or what folds hold of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from anndata import AnnData
from scanpy import logging as logg

from stpredict._data.messages import listed
from stpredict._data.provenance import read_halves
from stpredict._data.slide import Slide
from stpredict.tl.evaluation.numbers._ceiling import Halves
from stpredict.tl.evaluation.numbers._parts import Part

# A correlation of two spots is 1 or -1 whatever they hold.
_MIN_SPOTS = 3
# Between the name of a section and of the fold that holds a part of it.
_OF_FOLD = " · "


def make_parts(slide: Slide, folds: Mapping[str, np.ndarray], *, whole_folds: bool = False) -> dict[str, list[Part]]:
    """What is scored together: what each fold holds of each section.

    Predictions of different folds are never scored together: their models differ, and with them the level of each gene,
    so that even constants would seem to be correlated with what was measured (negatively: the mean of the other folds is
    low where a fold's own is high).

    Parameters
    ----------
    slide
        Places, sections and patients.
    folds
        ``(n_obs,)`` masks of the rows to score by name of the fold; ``{"": rows}`` without folds.
    whole_folds
        Score all of a fold at once, not each section.

    Returns
    -------
    By fold. Parts of fewer than 3 spots are left out. The bootstrap's groups are patients where several are known, else
    sections, else (within one section) the parts themselves.

    Raises
    ------
    ValueError
        No part is large enough, or a section lies on several spots elements.
    """
    sections = _sections(slide)
    any_fold = np.any(list(folds.values()), axis=0)
    parts: dict[str, list[Part]] = {}
    for fold, rows in folds.items():
        of_fold = []
        for name, (members, xy) in sections.items():
            chosen = rows[members]
            is_whole = fold == "" or (chosen == any_fold[members]).all()
            title = name if is_whole else f"{name}{_OF_FOLD}{fold}"
            if chosen.sum() >= _MIN_SPOTS:
                of_fold.append(Part(title, name, members[chosen], xy[chosen]))
            elif chosen.any():
                logg.warning(f"Only {chosen.sum()} spots to score in {title!r}, which is left out.")
        parts[fold] = [_join(fold, of_fold)] if whole_folds and of_fold else of_fold
    flat = [part for of_fold in parts.values() for part in of_fold]
    if not flat:
        raise ValueError(
            f"No section has at least {_MIN_SPOTS} spots to score: there are {any_fold.sum()} in the sections "
            f"{list(sections)[:8]}."
        )
    patients = {part.name: _patient(slide.patient_of, part) for part in flat}
    if None not in patients.values() and len(set(patients.values())) > 1:
        groups = {name: str(patient) for name, patient in patients.items()}
    elif len({part.group for part in flat}) > 1:
        return parts
    else:
        groups = {part.name: part.name for part in flat}
    return {fold: [replace(part, group=groups[part.name]) for part in of_fold] for fold, of_fold in parts.items()}


def known_halves(table: AnnData, genes: Sequence[str], parts: Sequence[Part]) -> Halves | None:
    """What :func:`stpredict.tl.noise_ceiling` has stored of genes in parts that are whole sections, if anything."""
    halves = read_halves(table, genes, [part.name for part in parts])
    if halves is not None:
        return Halves(*halves)
    stored = table.uns.get("noise_ceiling")
    of = set(np.atleast_1d(stored["sections"])) if isinstance(stored, Mapping) and "sections" in stored else set()
    names = {part.name.partition(_OF_FOLD)[0] for part in parts}
    if of and not of & names:
        logg.warning(
            f"The noise ceiling is known of the sections {listed(sorted(of))}, not of {listed(sorted(names))}: PCCs are not held "
            "against it. Call `stp.tl.noise_ceiling` with the same `section_key`."
        )
    return None


def _sections(slide: Slide) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows and places of each section."""
    names = slide.section_of
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for spots in slide.spots:
        of_spots = names[spots.rows]
        for name in dict.fromkeys(of_spots):
            if name in found:
                raise ValueError(
                    f"The section {name!r} (`section_key`) lies on several spots elements, whose places cannot be compared. Name "
                    "a column in which each section is on one of them."
                )
            here = of_spots == name
            found[str(name)] = spots.rows[here], spots.xy[here]
    return found


def _patient(patient_of: np.ndarray | None, part: Part) -> str | None:
    """The patient of all of a part's rows, if there is one."""
    if patient_of is None:
        return None
    found = set(patient_of[part.rows])
    return str(next(iter(found))) if len(found) == 1 else None


def _join(fold: str, parts: Sequence[Part]) -> Part:
    """One part of several sections, which lie far apart."""
    widths = [float(np.ptp(part.xy[:, 0])) for part in parts]
    left = np.cumsum([0.0, *(3 * width + 1 for width in widths[:-1])])
    xy = [part.xy - part.xy.min(axis=0) + [x, 0] for part, x in zip(parts, left, strict=True)]
    return Part(fold, fold, np.concatenate([part.rows for part in parts]), np.concatenate(xy))
