"""Fit models to folds, here or on a cluster, one call for each model and fold."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stpredict.tl.evaluation.runs._baselines import make_features
from stpredict.tl.evaluation.runs._checkpoint import KeptFolds
from stpredict.tl.evaluation.runs._hiding import TRAIN_KEY, FoldData, visible_copy

if TYPE_CHECKING:
    from distributed import Client

# Where a model writes in the copy of the table that it gets.
_KEY = "cv"


def predict_folds(
    bare: SpatialData,
    data: Sequence[FoldData],
    models: Mapping[str, Callable[..., Any]],
    elements: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    checkpoint_dir: str | os.PathLike[str] | None,
    client: Client | None,
) -> dict[str, list[np.ndarray]]:
    """Fit every model to every fold and predict what it holds out.

    Parameters
    ----------
    bare
        Elements, and a table without expression.
    data
        The folds.
    models
        Functions by name, as :func:`stpredict.tl.cross_validate` documents them.
    elements
        Keys of elements, ``table_key`` among them, for the models that take them.
    settings
        What must be the same for folds that were kept to be taken.
    checkpoint_dir, client
        As in :func:`stpredict.tl.cross_validate`.

    Returns
    -------
    By model, ``(n_test, G)`` float32 of each fold.
    """
    kept = KeptFolds(checkpoint_dir)
    for name, fit in models.items():
        kept.check(name, {"model": _describe(fit), "data": _digest(data), **settings})
    jobs = [(name, i) for i in range(len(data)) for name in models]
    found = {job: values for job in jobs if (values := kept.read(*job)) is not None}
    left = [job for job in jobs if job not in found]
    make_features(bare, {name for name, _ in left}, elements)
    with tqdm(total=len(jobs), initial=len(found), desc="cross-validation", unit="fit", leave=False) as progress:
        for job, values in _run(left, bare, data, models, elements, client):
            kept.write(*job, values)
            found[job] = values
            progress.update()
    return {name: [found[name, i] for i in range(len(data))] for name in models}


def _run(
    jobs: Sequence[tuple[str, int]],
    bare: SpatialData,
    data: Sequence[FoldData],
    models: Mapping[str, Callable[..., Any]],
    elements: Mapping[str, Any],
    client: Client | None,
) -> Iterator[tuple[tuple[str, int], np.ndarray]]:
    """Work through the jobs, here or on a cluster's workers, and yield what is done."""
    if client is None:
        for name, i in jobs:
            yield (name, i), _fit_fold(bare, data[i], name, models[name], elements)
        return
    from distributed import as_completed

    shared, parts = client.scatter(bare, broadcast=True), client.scatter(list(data))
    futures = {
        client.submit(_fit_fold, shared, parts[i], name, models[name], elements, pure=False): (name, i)
        for name, i in jobs
    }
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        client.cancel(list(futures))


def _fit_fold(
    bare: SpatialData, data: FoldData, name: str, fit: Callable[..., Any], elements: Mapping[str, Any]
) -> np.ndarray:
    """Predictions ``(n_test, G)`` of a model that has seen the training spots of a fold."""
    table_key = elements["table_key"]
    sdata = visible_copy(bare, table_key, data)
    table = sdata[table_key]
    offered = {"genes": list(table.var_names[data.columns]), **elements}
    taken = inspect.signature(fit).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    try:
        fit(
            sdata,
            train_key=TRAIN_KEY,
            key_added=_KEY,
            **{key: value for key, value in offered.items() if value is not None and (takes_any or key in taken)},
        )
        if _KEY not in table.layers:
            raise ValueError(
                f"The model {name!r} wrote no `layers[key_added]`; it has to predict all spots of the table that it gets."
            )
    except Exception as error:
        error.add_note(f"This happened to {name!r} in the fold that holds out {data.fold.name!r}.")
        raise
    predicted = table.layers[_KEY][np.flatnonzero(data.fold.test)][:, data.columns]
    return np.asarray(predicted, dtype=np.float32)


def _describe(fit: Callable[..., Any]) -> str:
    """What tells a function and its settings from others; the body of a user's own function is not looked at."""
    if isinstance(fit, partial):
        arguments = [*map(repr, fit.args), *(f"{name}={value!r}" for name, value in sorted(fit.keywords.items()))]
        return f"{_describe(fit.func)}({', '.join(arguments)})"
    return f"{getattr(fit, '__module__', '')}.{getattr(fit, '__qualname__', type(fit).__qualname__)}"


def _digest(data: Sequence[FoldData]) -> str:
    """What tells folds, genes and targets from others."""
    digest = hashlib.sha256()
    for part in data:
        for values in (part.fold.train, part.fold.test, part.columns, part.visible.indices, part.visible.data):
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
