"""Measured and predicted expression of a gene, and what a title says about the two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from anndata import AnnData

from stpredict._data.provenance import measured_layer, model_params, training_rows
from stpredict._data.slots import read_noise_ceiling
from stpredict.pl._style import number
from stpredict.tl.evaluation.runs._noise_ceiling import ceiling, mean_halves


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


def read_measured(table: AnnData, gene: str, layer: str, wanted: str | None) -> np.ndarray | None:
    """``(n_obs,)`` measured expression, by default what the model was fitted to; `None` where the table has none."""
    measured = measured_layer(table, layer, wanted)
    return None if measured is None else _column(table, gene, measured)


def _column(table: AnnData, gene: str, layer: str) -> np.ndarray:
    values = table[:, [gene]].to_df(layer=None if layer == "X" else layer)
    return values.to_numpy(dtype=np.float64).ravel()


def seen_in_training(table: AnnData, layer: str, rows: np.ndarray, predicted: np.ndarray) -> str:
    """Whether the model was fitted to these rows, in words; nothing where the table does not tell."""
    has_value = np.isfinite(predicted)
    training = training_rows(table, layer, has_value)
    if training is None:
        return ""
    here = training.rows[rows][has_value[rows]]
    if here.all():
        return "training fit"
    if here.any():
        return "partly training"
    return "held out" if training.as_fitted else ""


def pcc_note(
    table: AnnData,
    gene: str,
    layer: str,
    rows: np.ndarray,
    sections: Sequence[str],
    measured: np.ndarray,
    predicted: np.ndarray,
) -> str:
    """Such as "mean PCC 0.41 of at most 0.62".

    Parameters
    ----------
    table
        Its noise ceiling is told too, if it has one.
    gene, layer
        Gene, and where its predictions are.
    rows
        ``n`` rows to correlate.
    sections
        Their sections. Correlations are taken within each, and of a cross-validated layer also within each fold: levels
        of a gene that differ between folds are no prediction.
    measured, predicted
        ``(n_obs,)`` values.
    """
    parts, part = np.unique([*zip(sections, _folds(table, layer)[rows], strict=True)], axis=0, return_inverse=True)
    each = [pcc(measured[rows[part == i]], predicted[rows[part == i]]) for i in range(len(parts))]
    known = [value for value in each if np.isfinite(value)]
    if not known:
        return "PCC undefined"
    text = ("mean " if len(each) > 1 else "") + f"PCC {number(float(np.mean(known)))}"
    highest = _noise_ceiling(table, gene, list(dict.fromkeys(sections)))
    return text + (f" of at most {number(highest)}" if np.isfinite(highest) else "")


def _folds(table: AnnData, layer: str) -> np.ndarray:
    """``(n_obs,)`` fold that held a row out; the same for all rows where the layer is not of cross-validation."""
    column = str(model_params(table, layer).get("cv", ""))
    return table.obs[column].astype(str).to_numpy() if column in table.obs else np.full(table.n_obs, "")


def _noise_ceiling(table: AnnData, gene: str, sections: Sequence[str]) -> float:
    """The highest PCC within reach in these sections, where :func:`stpredict.tl.noise_ceiling` has found one, else NaN."""
    stored = read_noise_ceiling(table, [gene], sections)
    if stored is None:
        return np.nan
    mean = ceiling(mean_halves(stored))
    return float(mean.value[0]) if mean.determined[0] else np.nan


def pcc(measured: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson's correlation over the spots that have both; NaN with fewer than three of them or without variation."""
    both = np.isfinite(measured) & np.isfinite(predicted)
    x, y = measured[both], predicted[both]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(np.corrcoef(x, y)[0, 1])
