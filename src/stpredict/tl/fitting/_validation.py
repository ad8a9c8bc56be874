"""Spots set aside from training without leaks: whole groups, or blocks of tissue, never random neighbors."""

from __future__ import annotations

import numpy as np

from stpredict._data.slide import Slide


def validation_mask(slide: Slide, rows: np.ndarray, *, fraction: float, random_state: int) -> tuple[np.ndarray, str]:
    """Choose training spots for validation.

    Whole patients when the training spots are known to be of several, else whole sections when there are several, else the
    strip of tissue at one end of the section.

    Parameters
    ----------
    slide
        Sections and patients.
    rows
        Training rows.
    fraction
        Share of the spots to aim at; at least one group, and never all.
    random_state
        Which groups.

    Returns
    -------
    ``(len(rows),)`` `True` for validation, and a sentence that says what was chosen.
    """
    sections, patients = slide.section_of[rows], slide.patient_of
    groups = {"section": sections} if patients is None else {"patient": patients[rows], "section": sections}
    for kind, labels in groups.items():
        names = np.unique(labels.astype(str))
        if len(names) > 1:
            chosen = _some_groups(names, labels, fraction, random_state)
            return np.isin(labels, chosen), f"{kind} {', '.join(chosen)}"
    # One section: cut along its longer side, so that few training spots border on the strip.
    position = np.full((slide.n_obs, 2), np.nan)
    for section in slide.sections:
        position[section.rows] = section.centers
    xy = position[rows]
    along = xy[:, np.argmax(np.ptp(xy, axis=0))]
    n_validation = int(np.clip(round(fraction * len(rows)), 1, len(rows) - 1))
    order = np.argsort(along if random_state % 2 == 0 else -along, kind="stable")
    mask = np.zeros(len(rows), dtype=bool)
    mask[order[:n_validation]] = True
    return mask, f"a strip at one end of {sections[0]}"


def _some_groups(names: np.ndarray, labels: np.ndarray, fraction: float, random_state: int) -> list[str]:
    """Groups in random order until they hold the fraction; one is always left for training."""
    chosen: list[str] = []
    for name in np.random.default_rng(random_state).permutation(names)[:-1]:
        if chosen and np.isin(labels, chosen).mean() >= fraction:
            break
        chosen.append(str(name))
    return sorted(chosen)
