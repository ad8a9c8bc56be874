"""Fit models to folds, here or on a cluster, one call for each model and fold."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stpredict._data.compat import layer_names
from stpredict._data.elements import Elements
from stpredict._data.identity import code_identity, digest
from stpredict._data.slide import Slide, open_slide
from stpredict.pp._reads import Reads, needs_image, read_together, shared_reads
from stpredict.tl.evaluation.runs._checkpoint import KeptFolds
from stpredict.tl.evaluation.runs._hiding import FoldData, free_key, visible_copy
from stpredict.tl.evaluation.runs._identities import Job, identities

if TYPE_CHECKING:
    from distributed import Client

# What functions take by name or not at all: few of those that they pass their other arguments on to know of it.
_RARE = ("section_key", "patient_key")


def predict_folds(
    bare: SpatialData,
    slide: Slide,
    data: Sequence[FoldData],
    models: Mapping[str, Callable[..., Any]],
    reads: Mapping[str, Reads | None],
    *,
    settings: Mapping[str, Any],
    checkpoint_dir: str | os.PathLike[str] | None,
    client: Client | None,
) -> dict[str, list[np.ndarray]]:
    """Fit every model to every fold and predict what it holds out; pixels are read once for all of them.

    Parameters
    ----------
    bare
        Elements, and a table without expression.
    slide
        The same data as they were given.
    data
        The folds.
    models
        Functions by name, as :func:`stpredict.tl.cross_validate` documents them.
    reads
        What each of them reads; `None` where it does not say so.
    settings
        What must be the same for folds that were kept to be taken.
    checkpoint_dir, client
        As in :func:`stpredict.tl.cross_validate`.

    Returns
    -------
    By model, ``(n_test, G)`` float32 of each fold.
    """
    kept = KeptFolds(checkpoint_dir)
    alike = _alike(models, reads)
    jobs = [(name, i) for i in range(len(data)) for name in dict.fromkeys(alike.values())]
    given = _given(slide, free_key(bare[slide.table_key]))
    made_of: dict[Job, str | None] = dict.fromkeys(jobs)
    copied = replace(slide, table=bare[slide.table_key], home=bare)
    pictures = _Pictures(copied, models, reads)
    if kept.keeps:
        made_of |= identities(copied, pictures.of, data, models, reads, settings, given)
    found = {
        job: values
        for job in jobs
        if (values := kept.read(job[0], made_of[job], data[job[1]].measured.shape)) is not None
    }
    left = [job for job in jobs if job not in found]
    held: dict[Any, Any] = {}
    try:
        with tqdm(total=len(jobs), initial=len(found), desc="cross-validation", unit="fit", leave=False) as progress:
            with shared_reads(held):
                for seen, wanted in pictures.together(dict.fromkeys(name for name, _ in left)):
                    read_together(seen, wanted)
            for job, values in _run(left, bare, data, models, given, client, held):
                kept.write(job[0], made_of[job], values)
                found[job] = values
                progress.update()
    finally:
        for result in held.values():
            if hasattr(result, "close"):
                result.close()
    return {name: [found[first, i] for i in range(len(data))] for name, first in alike.items()}


def _alike(models: Mapping[str, Callable[..., Any]], reads: Mapping[str, Reads | None]) -> dict[str, str]:
    """For each model the first that is the same, such as a baseline: a partial of the same function with equal settings."""
    described = {name: name if each is None else digest(each.describe()) for name, each in reads.items()}
    found: dict[str, str] = {}
    firsts: dict[str, str] = {}
    for name, fit in models.items():
        has_twin = sum(each == described[name] for each in described.values()) > 1  # a network takes time to identify
        code = code_identity(fit) if has_twin else None
        found[name] = name if code is None else firsts.setdefault(code, name)
    return found


class _Pictures:
    """The images that models read, opened when they are asked for, once for all models that read the same."""

    def __init__(
        self, slide: Slide, models: Mapping[str, Callable[..., Any]], reads: Mapping[str, Reads | None]
    ) -> None:
        self._slide, self._models, self._reads = slide, models, reads
        self._opened: list[Slide] = []

    def of(self, name: str) -> Slide | None:
        """The slide with the images of a model; `None` for one that reads none, or does not say so."""
        each = self._reads[name]
        if each is None or not needs_image(each) or self._slide.home is None:
            return None
        elements = _own_elements(self._models[name], self._slide)
        for opened in self._opened:
            if opened.elements == elements:
                return opened
        self._opened.append(open_slide(self._slide.home, elements, images=True))
        return self._opened[-1]

    def together(self, names: Iterable[str]) -> list[tuple[Slide, list[Reads]]]:
        """What models read, by slide."""
        found: dict[int, tuple[Slide, list[Reads]]] = {}
        for name in names:
            each, slide = self._reads[name], self.of(name)
            if each is not None and slide is not None:
                found.setdefault(id(slide), (slide, []))[1].append(each)
        return list(found.values())


def _own_elements(fit: Callable[..., Any], slide: Slide) -> Elements:
    """The elements that a function is going to read: those that a partial sets, where nothing else was asked for."""
    elements = replace(slide.elements, table_key=slide.table_key)
    bound: dict[str, Any] = {}
    while isinstance(fit, partial):
        bound, fit = {**fit.keywords, **bound}, fit.func
    free = [name for name in ("image_key", "shapes_key", "coordinate_system") if getattr(elements, name) is None]
    return replace(elements, **{name: bound[name] for name in free if name in bound})


def _given(slide: Slide, key: str) -> dict[str, Any]:
    """Arguments of models, beside ``genes``."""
    elements = slide.elements
    return {
        "train_key": f"{key}_spots",
        "key_added": key,
        "layer": None,
        "image_key": elements.image_key,
        "shapes_key": elements.shapes_key,
        "table_key": slide.table_key,
        "coordinate_system": elements.coordinate_system,
        "section_key": elements.section_key,
        "patient_key": elements.patient_key,
    }


def _run(
    jobs: Sequence[Job],
    bare: SpatialData,
    data: Sequence[FoldData],
    models: Mapping[str, Callable[..., Any]],
    given: Mapping[str, Any],
    client: Client | None,
    held: dict[Any, Any],
) -> Iterator[tuple[Job, np.ndarray]]:
    """Work through the jobs, here or on a cluster's workers, and yield what is done."""
    if client is None:
        for name, i in jobs:
            yield (name, i), _fit_fold(bare, data[i], name, models[name], given, held)
        return
    from distributed import as_completed

    shared, parts, read = (client.scatter(each, broadcast=True) for each in (bare, list(data), held))
    futures = {
        client.submit(_fit_one, shared, parts, i, name, models[name], given, read, pure=False): (name, i)
        for name, i in jobs
    }
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        client.cancel(list(futures))


def _fit_one(bare: SpatialData, data: Sequence[FoldData], i: int, *rest: Any) -> np.ndarray:
    name, fit, given, held = rest
    return _fit_fold(bare, data[i], name, fit, given, dict(held))


def _fit_fold(
    bare: SpatialData,
    data: FoldData,
    name: str,
    fit: Callable[..., Any],
    given: Mapping[str, Any],
    held: dict[Any, Any],
) -> np.ndarray:
    """Predictions ``(n_test, G)`` of a model that has seen the training spots of a fold."""
    train_key, key = given["train_key"], given["key_added"]
    sdata = visible_copy(bare, given["table_key"], data, train_key)
    table = sdata[given["table_key"]]
    arguments = _taken(fit, {"genes": list(table.var_names[data.columns]), **given})
    try:
        with shared_reads(held):
            fit(sdata, **{**arguments, "train_key": train_key, "key_added": key})
        if key not in layer_names(table):
            raise ValueError(
                f"The model {name!r} wrote no `layers[key_added]`; it has to predict all spots of the table that it gets."
            )
    except Exception as error:
        error.add_note(f"This happened to {name!r} in the fold that holds out {data.fold.name!r}.")
        raise
    predicted = table.layers[key][np.flatnonzero(data.fold.test)][:, data.columns]
    return np.asarray(predicted, dtype=np.float32)


def _taken(fit: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a function takes; of what nobody has asked for (`None`), it keeps its own defaults."""
    parameters = inspect.signature(fit).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    def is_taken(name: str) -> bool:
        if name not in parameters:
            return takes_any and offered[name] is not None and name not in _RARE
        return offered[name] is not None or name == "layer" or parameters[name].default is inspect.Parameter.empty

    return {name: value for name, value in offered.items() if is_taken(name)}
