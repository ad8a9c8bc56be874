"""Baselines of cross-validation: what is reached without the image, and with the least of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from spatialdata import SpatialData

import stpredict.pp as pp
from stpredict._data.slide import Spots
from stpredict.tl.evaluation.runs._hiding import FoldData
from stpredict.tl.fitting._fit_ridge import fit_ridge

# Constants for every spot: they know nothing of the image, and yet their per-spot PCC is high.
TRAINING_MEAN = "mean of training spots"
SECTION_MEAN = "mean of held-out section (oracle)"

FITTED: dict[str, Callable[..., Any]] = {
    "position": partial(fit_ridge, features="position"),
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


def make_features(sdata: SpatialData, names: Collection[str], elements: Mapping[str, Any]) -> None:
    """Read the pixels that baselines need once for all folds."""
    if "ridge on mean OD" in names:
        pp.color_histogram(sdata, **elements)
    if "ridge on color statistics" in names:
        pp.color_statistics(sdata, **elements)


def training_mean(part: FoldData) -> np.ndarray:
    """The same for every spot."""
    mean = np.asarray(part.visible[np.flatnonzero(part.fold.train)][:, part.columns].mean(axis=0))
    return np.repeat(mean.astype(np.float32).reshape(1, -1), len(part.measured), axis=0)


def section_mean(part: FoldData, sections: Sequence[Spots]) -> np.ndarray:
    """The held-out spots' own mean, section by section: no model can know it."""
    predicted = np.empty_like(part.measured)
    position = np.cumsum(part.fold.test) - 1
    for section in sections:
        here = position[section.rows[part.fold.test[section.rows]]]
        if len(here):
            predicted[here] = part.measured[here].mean(axis=0)
    return predicted
