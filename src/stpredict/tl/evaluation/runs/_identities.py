"""What a fold of a model is made of: all that the model may read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dask.array as da
import pandas as pd
from scanpy import logging as logg
from spatialdata.transformations import get_transformation

from stpredict._data.identity import code_identity, identity, pixels_identity
from stpredict._data.matrix import read_matrix
from stpredict._data.messages import listed
from stpredict._data.slide import Slide
from stpredict.pp._features import FeatureReads
from stpredict.pp._reads import Reads
from stpredict.tl.evaluation.runs._hiding import FoldData

_XY = ("x", "y")

Job = tuple[str, int]
"""A model, and the number of a fold."""


def identities(
    slide: Slide,
    pictures: Callable[[str], Slide | None],
    data: Sequence[FoldData],
    models: Mapping[str, Callable[..., Any]],
    reads: Mapping[str, Reads | None],
    settings: Mapping[str, Any],
    given: Mapping[str, Any],
) -> dict[Job, str | None]:
    """Identify each fold of each model: by code, fold, expression, and the pixels, places and features that it reads.

    A model that does not say what it reads may read everything.

    Parameters
    ----------
    slide
        The copy of the data that models get.
    pictures
        The same with the images that a model reads, if it says that it reads any.
    data
        The folds.
    models
        Functions by name.
    reads
        What each of them reads; `None` where it does not say so.
    settings
        What else must be the same.
    given
        Arguments of a model that does not say what it reads.

    Returns
    -------
    `None` for what cannot be identified, and is not to be kept.
    """
    pixels: dict[int, str | None] = {id(None): ""}
    for seen in map(pictures, models):
        if seen is not None and id(seen) not in pixels:
            pixels[id(seen)] = seen.identity()
    everything = _everything(slide) if None in reads.values() else ""
    places = [[spots.name, spots.xy, spots.radii, spots.rows] for spots in slide.spots]
    common = identity(settings, places, slide.section_of, [slide.patient_of])
    folds = [identity(part.fold.name, part.fold.train, part.fold.test, part.columns, part.visible) for part in data]
    found: dict[Job, str | None] = {}
    lacking: dict[str, list[str]] = {}
    for name, fit in models.items():
        each = reads[name]
        parts = {
            "the code or the state of the function": code_identity(fit),
            "the image": pixels[id(pictures(name))],
            "what it may read": identity(everything, given) if each is None else _features(slide, each),
        }
        for what in [what for what, made_of in parts.items() if made_of is None][:1]:
            lacking.setdefault(what, []).append(name)
        described = None if each is None else each.describe()
        for i, of_fold in enumerate(folds):
            found[name, i] = None if None in parts.values() else identity([*parts.values(), described], common, of_fold)
    for what, names in lacking.items():
        logg.warning(f"The folds of {listed(names)} are not kept: {what} cannot be identified.")
    return found


def _features(slide: Slide, reads: Reads) -> str | None:
    """Features that come from the table or another one."""
    if not isinstance(reads, FeatureReads):
        return ""
    of: list[Any] = []
    for name, source in reads.sources.items():
        if source["from"] == "obsm":
            of.append(slide.table.obsm.get(name))
        elif source["from"] == "table" and slide.home is not None:
            other = slide.home.tables[source["table_key"]]
            of.append([other.obs, other.obsm.get(source["key"]) if source["key"] else read_matrix(other, None)])
    return identity(of)


def _everything(slide: Slide) -> str | None:
    """All elements and tables; of the table of the spots, whose expression folds hide, all but that."""
    assert slide.home is not None
    found: list[Any] = []
    for kind, name, element in slide.home.gen_elements():
        content: Any
        if kind == "tables":
            content = [element.X, element.obs, element.var, dict(element.obsm), dict(element.uns), dict(element.layers)]
        elif kind in ("images", "labels"):
            content = _scales(element, name)
        elif kind == "shapes":
            content = [pd.DataFrame(element.drop(columns=element.geometry.name)), element.geometry.to_wkb().to_numpy()]
        else:
            content = element._name  # dask's, which follows from what the points are made of
        if content is None:
            return None
        if kind != "tables":
            placed = get_transformation(element, get_all=True)
            content = [content, {key: each.to_affine_matrix(_XY, _XY) for key, each in placed.items()}]
        found.append([kind, name, content])
    return identity(*found)


def _scales(image: Any, name: str) -> list[Any] | None:
    scales = (
        [next(iter(scale.ds.values())) for scale in image.children.values()] if hasattr(image, "children") else [image]
    )
    channels = [str(channel) for channel in scales[0].coords["c"].values] if "c" in scales[0].coords else []
    of_scales = [pixels_identity(da.asarray(scale.data), name) for scale in scales]
    return None if None in of_scales else [channels, *of_scales]
