"""Measured and predicted expression of a gene, and what a title says about the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from anndata import AnnData

from stpredict.pl._style import number


def read_predicted(table: AnnData, gene: str, layer: str) -> np.ndarray:
    """``(n_obs,)`` predictions; an error where there are none."""
    if layer not in table.layers:
        raise KeyError(
            f"No predictions {layer!r} in `layers`; it has {list(table.layers)[:12]}. Predict first, with "
            "`stp.tl.fit_nsl(sdata)` or `stp.tl.predict(sdata, model)`."
        )
    if gene not in table.var_names:
        raise KeyError(f"No gene {gene!r} in `var_names`; it has {table.n_vars}, such as {list(table.var_names[:5])}.")
    values = _column(table, gene, layer)
    if not np.isfinite(values).any():
        marks = table.var.get(f"{layer}_fitted")
        known = [] if marks is None else list(table.var_names[marks.to_numpy(dtype=bool)])
        raise ValueError(
            f"The gene {gene!r} is in the table but was not modelled: it has no value in `layers[{layer!r}]`. Modelled "
            f"are {len(known)} genes, such as {known[:8]}."
        )
    return values


def read_measured(table: AnnData, gene: str, layer: str, measured_layer: str | None) -> np.ndarray | None:
    """``(n_obs,)`` measured expression, of what the model was fitted to; `None` where the table has none."""
    there = [*(["X"] if table.X is not None else []), *table.layers]
    if measured_layer is None:
        fitted_to = str(_params(table, layer).get("layer", "X"))
        measured_layer = fitted_to if fitted_to in there else "X"
        if measured_layer not in there:
            return None
    if measured_layer not in there:
        raise KeyError(f"No measured expression {measured_layer!r}; the table has {there[:12]}.")
    return _column(table, gene, measured_layer)


def _column(table: AnnData, gene: str, layer: str) -> np.ndarray:
    values = table[:, [gene]].to_df(layer=None if layer == "X" else layer)
    return values.to_numpy(dtype=np.float64).ravel()


def _params(table: AnnData, layer: str) -> Mapping[str, Any]:
    entry = table.uns.get(layer)
    return entry.get("params", {}) if isinstance(entry, Mapping) else {}


def seen_in_training(table: AnnData, layer: str, rows: np.ndarray, predicted: np.ndarray) -> str:
    """Whether the model was fitted to these rows; nothing where the table does not tell.

    A fit is called so on the word of ``obs[train_key]`` alone. Spots are called held out only when that column still
    marks as many spots as were fitted to: it may have changed since, or belong to another slide than the model.
    """
    params = _params(table, layer)
    train_key = str(params.get("train_key", ""))
    if "n_train" not in params or (train_key and train_key not in table.obs):
        return ""
    has_value = np.isfinite(predicted)
    training = has_value & (table.obs[train_key].to_numpy(dtype=bool) if train_key else True)
    as_fitted = training.sum() == int(params["n_train"])
    if not train_key and not as_fitted:  # fitted to all spots, but of another table
        return ""
    here = training[rows][has_value[rows]]
    if here.all():
        return "training fit"
    if here.any():
        return "partly training"
    return "held out" if as_fitted else ""


def pcc(measured: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson's correlation over the spots that have both; NaN with fewer than three of them or without variation."""
    both = np.isfinite(measured) & np.isfinite(predicted)
    x, y = measured[both], predicted[both]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(np.corrcoef(x, y)[0, 1])


def noise_ceiling(table: AnnData, gene: str) -> float:
    """The highest PCC within reach of any predictor, where :func:`stpredict.tl.noise_ceiling` has measured it, else NaN."""
    return float(table.var["noise_ceiling"][gene]) if "noise_ceiling" in table.var else np.nan


def pcc_text(pcc: float, ceiling: float) -> str:
    """Such as "PCC 0.41 of at most 0.62"."""
    if not np.isfinite(pcc):
        return "PCC undefined"
    return f"PCC {number(pcc)}" + (f" of at most {number(ceiling)}" if np.isfinite(ceiling) else "")
