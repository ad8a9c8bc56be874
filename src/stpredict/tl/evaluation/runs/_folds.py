"""Folds of cross-validation: whole groups, blocks of tissue with a margin, or (to see it leak) random spots."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scanpy import logging as logg
from scipy.spatial import cKDTree

from stpredict._data.columns import read_labels
from stpredict._data.messages import user_stacklevel
from stpredict._data.slide import Slide
from stpredict._data.spots import Spots

Split = Literal["groups", "blocks", "random"]

# Without a number, so many blocks or random parts.
_N_FOLDS = 5
# Fewer spots have no correlation.
_MIN_TEST = 3


class Fold(NamedTuple):
    """``train`` and ``test`` are ``(n_obs,)`` masks; rows in neither lie in the margin between the two."""

    name: str
    train: np.ndarray
    test: np.ndarray


def make_folds(
    slide: Slide,
    *,
    split: Split | None,
    group_key: str | None,
    n_folds: int | None,
    margin: float,
    random_state: int,
) -> tuple[str, list[Fold]]:
    """Cut the rows of a slide that lie in tissue into folds; see :func:`stpredict.tl.cross_validate` for the parameters.

    Returns
    -------
    What was split by, in words, and the folds.

    Raises
    ------
    KeyError, TypeError, ValueError
        A column that is not there or has missing values, fewer than two groups, groups too small to be scored, or a fold
        without training spots.
    """
    if split not in (None, "groups", "blocks", "random"):
        raise ValueError(f"`split` is {split!r}; expected 'groups', 'blocks', 'random' or None.")
    if n_folds is not None and not (isinstance(n_folds, int | np.integer) and n_folds >= 2):
        raise ValueError(f"`n_folds` is {n_folds!r}; expected an integer of at least 2, or None.")
    if not (np.isfinite(margin) and margin >= 0):
        raise ValueError(f"`margin` is {margin!r}; expected a number of spot diameters, at least 0.")
    if group_key is not None and split in ("blocks", "random"):
        raise ValueError(f"`group_key` is for whole groups, but `split` is {split!r}; leave one of them out.")
    in_tissue = slide.in_tissue
    rows = slide.rows[in_tissue[slide.rows]]
    if split in (None, "groups"):
        kind, labels = _groups(slide, rows, group_key)
        if split == "groups" or group_key is not None or len(set(labels[rows])) > 1:
            folds = _group_folds(kind, labels, rows, n_folds, random_state)
            how = f"{kind}s left out in turn" if n_folds is None else f"{n_folds} folds of whole {kind}s"
            _check(folds, margin)
            _warn_of_shared_patients(slide.patient_of, folds)
            return how, folds
        split = "blocks"
    n_folds = n_folds or _N_FOLDS
    if split == "blocks":
        folds = _block_folds(slide.spots, in_tissue, n_folds, margin)
        how = f"{n_folds} blocks of tissue, {margin:g} spot diameters apart"
    else:
        logg.warning(
            "Random spots leak: a held-out spot has neighbors in training that share its pixels and its tissue. Read "
            "these scores as a demonstration of that; `split='blocks'` is the honest way within a section."
        )
        folds = _random_folds(rows, slide.n_obs, n_folds, random_state)
        how = f"{n_folds} random parts of the spots"
    _check(folds, margin)
    return how, folds


def _groups(slide: Slide, rows: np.ndarray, group_key: str | None) -> tuple[str, np.ndarray]:
    """The label of each row; by default patients where several are known, else sections."""
    if group_key is not None:
        return group_key, read_labels(slide.table.obs, group_key, rows, "group_key")
    patients = slide.patient_of
    if patients is not None and len(set(patients[rows])) > 1:
        return "patient", patients
    return "section", slide.section_of


def _group_folds(kind: str, labels: np.ndarray, rows: np.ndarray, n_folds: int | None, random_state: int) -> list[Fold]:
    from sklearn.model_selection import GroupKFold

    of_rows = labels[rows].astype(str)
    names, codes, sizes = np.unique(of_rows, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise ValueError(
            f"All spots are of one group, {kind} {str(names[0])!r}: leaving it out leaves nothing to fit on. Use another "
            "`group_key`, or `split='blocks'` to hold out parts of the section."
        )
    if small := [f"{name} ({size})" for name, size in zip(names, sizes, strict=True) if size < _MIN_TEST]:
        raise ValueError(
            f"Groups of fewer than {_MIN_TEST} spots cannot be scored: {', '.join(small[:5])}. Merge them with others in "
            f"`obs[{kind!r}]`, or take them out of the table."
        )
    if n_folds is not None and n_folds > len(names):
        raise ValueError(f"`n_folds` is {n_folds}, but there are {len(names)} groups in {kind!r}.")
    # The largest groups first, each into the fold that has the fewest spots; groups of one size in random order.
    rank = np.argsort(np.random.default_rng(random_state).permutation(len(names))[::-1])
    folds = []
    for train, test in GroupKFold(n_folds or len(names)).split(rows, groups=rank[codes]):
        masks = [np.zeros(len(labels), dtype=bool) for _ in range(2)]
        masks[0][rows[train]], masks[1][rows[test]] = True, True
        folds.append(Fold(", ".join(np.unique(of_rows[test])), *masks))
    return sorted(folds, key=lambda fold: fold.name)


def _block_folds(spots: Sequence[Spots], in_tissue: np.ndarray, n_folds: int, margin: float) -> list[Fold]:
    """Strips across the longer side of every section: no other cut has fewer borders, and each border costs a margin."""
    n_obs = len(in_tissue)
    folds = [Fold(f"block {k + 1}", np.zeros(n_obs, bool), np.zeros(n_obs, bool)) for k in range(n_folds)]
    for section in spots:
        inside = in_tissue[section.rows]
        xy, rows = section.xy[inside], section.rows[inside]
        if not len(rows):
            continue
        along = xy[:, np.argmax(np.ptp(xy, axis=0))]
        reach = margin * 2 * float(np.median(section.radii))
        for fold, strip in zip(folds, np.array_split(np.argsort(along, kind="stable"), n_folds), strict=True):
            fold.test[rows[strip]] = True
            away = np.ones(len(rows), dtype=bool)
            away[strip] = False
            if reach > 0 and len(strip):
                # Along x or y, whichever is more: the squares that M2OST sees have corners.
                away &= cKDTree(xy[strip]).query(xy, p=np.inf)[0] >= reach
            fold.train[rows[away]] = True
    return folds


def _random_folds(rows: np.ndarray, n_obs: int, n_folds: int, random_state: int) -> list[Fold]:
    folds = []
    for k, part in enumerate(np.array_split(np.random.default_rng(random_state).permutation(rows), n_folds)):
        test, train = np.zeros(n_obs, dtype=bool), np.zeros(n_obs, dtype=bool)
        test[part] = True
        train[rows] = True
        folds.append(Fold(f"part {k + 1}", train & ~test, test))
    return folds


def _check(folds: Sequence[Fold], margin: float) -> None:
    for fold in folds:
        if fold.test.sum() < _MIN_TEST:
            raise ValueError(
                f"The fold {fold.name!r} has {fold.test.sum()} spots to test on; at least {_MIN_TEST} can be scored. Use "
                "fewer folds."
            )
        if not fold.train.any():
            raise ValueError(
                f"The fold {fold.name!r} has no training spot: all others lie within the margin of {margin:g} spot "
                "diameters. Use fewer folds or a smaller `margin`."
            )


def _warn_of_shared_patients(patient: np.ndarray | None, folds: Sequence[Fold]) -> None:
    if patient is None:
        return
    for fold in folds:
        if both := sorted(set(patient[fold.train]) & set(patient[fold.test])):
            warnings.warn(
                f"The same patient is on both sides: holding out {fold.name!r} leaves other spots of patient "
                f"{', '.join(both[:3])} to fit on. The scores tell about more tissue of known patients, not about new "
                "patients; hold out whole patients when there are several.",
                UserWarning,
                stacklevel=user_stacklevel(),
            )
            return
