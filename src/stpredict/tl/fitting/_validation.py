"""Splits of training spots that do not leak: whole groups, or blocks of tissue, never random neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from anndata import AnnData

from stpredict._data.slide import Section


def validation_mask(
    table: AnnData, rows: np.ndarray, sections: Sequence[Section], *, fraction: float, random_state: int
) -> tuple[np.ndarray, str]:
    """Choose training spots for validation.

    Whole patients when the training spots are of several patients (``obs["patient"]``), else whole sections when there
    are several, else the strip of tissue at one end of the section.

    Parameters
    ----------
    table
        Where ``obs["patient"]`` may be.
    rows
        Training rows.
    sections
        The sections that the rows belong to.
    fraction
        Share of the spots to aim at; at least one group, and never all.
    random_state
        Which groups.

    Returns
    -------
    ``(len(rows),)`` `True` for validation, and a sentence that says what was chosen.
    """
    section_of = np.full(table.n_obs, "", dtype=object)
    position = np.full((table.n_obs, 2), np.nan)
    for section in sections:
        section_of[section.rows] = section.name
        position[section.rows] = section.centers
    groups = {"section": section_of[rows].astype(str)}
    if "patient" in table.obs:
        groups = {"patient": table.obs["patient"].astype(str).to_numpy()[rows], **groups}
    for kind, labels in groups.items():
        names = np.unique(labels)
        if len(names) > 1:
            chosen = _some_groups(names, labels, fraction, random_state)
            return np.isin(labels, chosen), f"{kind} {', '.join(chosen)}"
    # One section: cut along its longer side, so that few training spots border on the strip.
    xy = position[rows]
    along = xy[:, np.argmax(np.ptp(xy, axis=0))]
    n_validation = int(np.clip(round(fraction * len(rows)), 1, len(rows) - 1))
    order = np.argsort(along if random_state % 2 == 0 else -along, kind="stable")
    mask = np.zeros(len(rows), dtype=bool)
    mask[order[:n_validation]] = True
    return mask, f"a strip at one end of {groups['section'][0]}"


def _some_groups(names: np.ndarray, labels: np.ndarray, fraction: float, random_state: int) -> list[str]:
    """Groups in random order until they hold the fraction; one is always left for training."""
    chosen: list[str] = []
    for name in np.random.default_rng(random_state).permutation(names)[:-1]:
        if chosen and np.isin(labels, chosen).mean() >= fraction:
            break
        chosen.append(str(name))
    return sorted(chosen)
