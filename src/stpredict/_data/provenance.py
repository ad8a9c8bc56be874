"""What a table tells about its predictions: what made them, which rows it was fitted to, what to hold them against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from anndata import AnnData


class Training(NamedTuple):
    """Rows that a model was fitted to; ``as_fitted`` when they are as many as then, so that all others are held out."""

    rows: np.ndarray
    as_fitted: bool


def training_rows(table: AnnData, key: str, predicted: np.ndarray) -> Training | None:
    """Which rows the model under ``key`` was fitted to; `None` where the table does not tell.

    Rows are called so on the word of ``obs[train_key]`` alone. That they are not as many as were fitted to means that the
    column has changed since, or belongs to other data than the model.

    Parameters
    ----------
    table
        Holds ``uns[key]``.
    key
        Of the predictions.
    predicted
        ``(n_obs,)`` rows that have a prediction.
    """
    params = model_params(table, key)
    if "cv" in params:  # every row was predicted by a model that had not seen it
        return Training(np.zeros(table.n_obs, dtype=bool), True)
    train_key = str(params.get("train_key", ""))
    if "n_train" not in params or (train_key and train_key not in table.obs):
        return None
    rows = predicted & (table.obs[train_key].to_numpy(dtype=bool) if train_key else True)
    as_fitted = bool(rows.sum() == int(params["n_train"]) + int(params.get("n_validation", 0)))
    if not train_key and not as_fitted:  # fitted to all spots, but of another table
        return None
    return Training(rows, as_fitted)


def model_params(table: AnnData, key: str) -> Mapping[str, Any]:
    """What the model under ``key`` was made with; empty where the table does not tell."""
    entry = table.uns.get(key)
    return entry.get("params", {}) if isinstance(entry, Mapping) else {}


def measured_layer(table: AnnData, key: str, wanted: str | None) -> str | None:
    """The measured expression to hold against predictions: ``"X"`` or a key of ``layers``, `None` if there is none.

    Parameters
    ----------
    table
        Has it.
    key
        Of the predictions.
    wanted
        What to take. `None` takes what the model was fitted to, if the table has it, else ``X``.

    Raises
    ------
    KeyError
        The table lacks what is wanted.
    """
    there = [*(["X"] if table.X is not None else []), *table.layers]
    if wanted is None:
        fitted_to = str(model_params(table, key).get("layer", "X"))
        wanted = fitted_to if fitted_to in there else "X"
        return wanted if wanted in there else None
    if wanted not in there:
        raise KeyError(f"No measured expression {wanted!r}; the table has {there[:12]}.")
    return wanted
