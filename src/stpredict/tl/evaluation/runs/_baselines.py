"""Baselines of cross-validation: what is reached without the image, and with the least of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from stpredict.tl.evaluation.numbers._labels import POSITION, SECTION_MEAN, TRAINING_MEAN
from stpredict.tl.evaluation.runs._hiding import FoldData
from stpredict.tl.fitting._fit_ridge import fit_ridge

FITTED: dict[str, Callable[..., Any]] = {
    POSITION: partial(fit_ridge, features="position"),
    "ridge on mean OD": partial(fit_ridge, features="mean_od"),
    "ridge on color statistics": partial(fit_ridge, features="color_statistics"),
}
BASELINES = (TRAINING_MEAN, SECTION_MEAN, *FITTED)


def choose_baselines(baselines: bool | str | Sequence[str]) -> list[str]:
    """Names of the baselines to run, in their usual order."""
    if isinstance(baselines, bool):
        return list(BASELINES) if baselines else []
    wanted = [baselines] if isinstance(baselines, str) else list(baselines)
    if unknown := [name for name in wanted if name not in BASELINES]:
        raise ValueError(f"`baselines` names {unknown}; known are {list(BASELINES)}.")
    return [name for name in BASELINES if name in wanted]


def training_mean(part: FoldData) -> np.ndarray:
    """The same for every spot."""
    mean = np.asarray(part.visible[np.flatnonzero(part.fold.train)][:, part.columns].mean(axis=0))
    return np.repeat(mean.astype(np.float32).reshape(1, -1), len(part.measured), axis=0)


def section_mean(part: FoldData, section_of: np.ndarray) -> np.ndarray:
    """The held-out spots' own mean, section by section: no model can know it."""
    predicted = np.empty_like(part.measured)
    names = section_of[part.fold.test]
    for name in np.unique(names.astype(str)):
        here = names == name
        predicted[here] = part.measured[here].mean(axis=0)
    return predicted
