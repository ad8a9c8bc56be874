"""What a table tells about its predictions: what made them, which rows were fitted to, what to hold them against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from stpredict._data.columns import mask_or_none
from stpredict._data.compat import layer_names
from stpredict._data.messages import listed


def model_params(table: AnnData, key: str) -> Mapping[str, Any]:
    """What the model under ``key`` was made with; empty where the table does not tell."""
    entry = table.uns.get(key)
    return entry.get("params", {}) if isinstance(entry, Mapping) else {}


def training_rows(table: AnnData, key: str) -> np.ndarray | None:
    """``(n_obs,)`` rows that the model under ``key`` was fitted to; `None` where the table does not tell.

    ``obs[f"{key}_train"]`` alone says so: it was written together with the predictions, and goes wherever they go. Every row
    of a cross-validated layer was predicted by a model that had not seen it.
    """
    if fold_of(table, key) is not None:
        return np.zeros(table.n_obs, dtype=bool)
    return mask_or_none(table.obs, f"{key}_train")


def fold_of(table: AnnData, key: str) -> np.ndarray | None:
    """``(n_obs,)`` name of the fold that held a row out, "" where none did; `None` for predictions of a single model."""
    column = f"{key}_fold"
    if column not in table.obs or f"{key}_train" in table.obs:  # a column of the user's own
        return None
    return table.obs[column].astype(object).where(table.obs[column].notna(), "").astype(str).to_numpy()


def read_predictions(table: AnnData, key: str) -> Any:
    """Predictions under a key, ``(n_obs, n_vars)``.

    Raises
    ------
    KeyError
        There are none.
    """
    if key not in layer_names(table):
        raise KeyError(
            f"No predictions {key!r} in `layers`; it has {listed(layer_names(table))}. Predict first, with "
            "`stp.tl.fit_nsl(sdata)` or `stp.tl.predict(sdata, model)`."
        )
    return table.layers[key]


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
    there = [*(["X"] if table.X is not None else []), *layer_names(table)]
    if wanted is None:
        fitted_to = str(model_params(table, key).get("layer", "X"))
        wanted = fitted_to if fitted_to in there else "X"
        return wanted if wanted in there else None
    if wanted not in there:
        raise KeyError(f"No measured expression {wanted!r}; the table has {listed(there)}.")
    return wanted


def read_halves(table: AnnData, genes: Sequence[str], sections: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """What :func:`stpredict.tl.noise_ceiling` has stored of genes in sections, if anything.

    Returns
    -------
    PCC of the halves of the counts, and its standard error; ``(S, G)`` each, NaN where not known.
    """
    stored = table.uns.get("noise_ceiling")
    if not isinstance(stored, Mapping) or not {"halves_pcc", "halves_error", "sections", "genes"} <= set(stored):
        return None
    rows = pd.Index(stored["sections"]).get_indexer(pd.Index(sections))
    columns = pd.Index(stored["genes"]).get_indexer(pd.Index(genes))
    known = (rows[:, None] >= 0) & (columns >= 0)
    if not known.any():
        return None
    pcc, error = (
        np.where(known, np.asarray(stored[name])[np.ix_(rows, columns)], np.nan)
        for name in ("halves_pcc", "halves_error")
    )
    return pcc, error
