"""Measured and predicted expression of a gene, and what a title says about the two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from stpredict._data.columns import mask_or_none
from stpredict._data.matrix import read_matrix
from stpredict._data.provenance import fold_of, measured_layer, read_halves, read_predictions, training_rows
from stpredict.pl._style import number
from stpredict.tl.evaluation.numbers._ceiling import Halves, ceiling, mean_halves

Genes = str | Sequence[str] | np.ndarray | pd.Series | pd.Index
"""One name, names, a mask of all genes, or a boolean column of ``var``."""


def choose_genes(table: AnnData, genes: Genes) -> list[str]:
    """Names of the genes to draw.

    Raises
    ------
    ValueError
        None, or a mask of another length.
    """
    if isinstance(genes, str):
        of_column = None if genes in table.var_names else mask_or_none(table.var, genes)
        if of_column is None:
            return [genes]
        genes = of_column
    names = list(genes)
    if names and all(isinstance(name, bool | np.bool_) for name in names):
        mask = np.array(names)
        if isinstance(genes, pd.Series) and genes.index.isin(table.var_names).all():
            mask = table.var_names.isin(genes.index[mask])
        if len(mask) != table.n_vars:
            raise ValueError(f"`genes` is a mask of {len(mask)} values; the table has {table.n_vars} genes.")
        names = list(table.var_names[mask])
    if not names:
        raise ValueError("`genes` is empty; expected one or more of `var_names`.")
    return [str(name) for name in names]


def read_predicted(table: AnnData, gene: str, key: str) -> np.ndarray:
    """``(n_obs,)`` predictions; an error where there are none."""
    read_predictions(table, key)
    if gene not in table.var_names:
        raise KeyError(f"No gene {gene!r} in `var_names`; it has {table.n_vars}, such as {list(table.var_names[:5])}.")
    values = read_column(table, gene, key)
    if not np.isfinite(values).any():
        marks = mask_or_none(table.var, f"{key}_fitted")
        known = [] if marks is None else list(table.var_names[marks])
        raise ValueError(
            f"The gene {gene!r} is in the table but was not modeled: it has no value in `layers[{key!r}]`. Modeled "
            f"are {len(known)} genes, such as {known[:8]}."
        )
    return values


def read_measured(table: AnnData, gene: str, key: str, wanted: str | None) -> np.ndarray | None:
    """``(n_obs,)`` measured expression, by default what the model was fitted to; `None` where the table has none."""
    measured = measured_layer(table, key, wanted)
    return None if measured is None else read_column(table, gene, measured)


def read_column(table: AnnData, gene: str, layer: str) -> np.ndarray:
    """``(n_obs,)`` values of a gene in ``X`` or a layer."""
    column = table.var_names.get_loc(gene)
    values = read_matrix(table, layer)[:, [column]]
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=np.float64).ravel()


def seen_in_training(table: AnnData, key: str, rows: np.ndarray, predicted: np.ndarray) -> str:
    """Whether the model was fitted to these rows, in words; nothing where the table does not tell."""
    training = training_rows(table, key)
    has_value = np.isfinite(predicted[rows])
    if training is None or not has_value.any():
        return ""
    here = training[rows][has_value]
    return "training fit" if here.all() else "partly training" if here.any() else "held out"


def pcc_note(
    table: AnnData,
    gene: str,
    key: str,
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
    gene, key
        Gene, and where its predictions are.
    rows
        ``n`` rows to correlate.
    sections
        Their sections. Correlations are taken within each, and of a cross-validated layer also within each fold: levels
        of a gene that differ between folds are no prediction.
    measured, predicted
        ``(n_obs,)`` values.
    """
    parts, part = np.unique([*zip(sections, _folds(table, key)[rows], strict=True)], axis=0, return_inverse=True)
    each = [pcc(measured[rows[part == i]], predicted[rows[part == i]]) for i in range(len(parts))]
    known = [value for value in each if np.isfinite(value)]
    if not known:
        return "PCC undefined"
    text = ("mean " if len(each) > 1 else "") + f"PCC {number(float(np.mean(known)))}"
    highest = _noise_ceiling(table, gene, list(dict.fromkeys(sections)))
    return text + (f" of at most {number(highest)}" if np.isfinite(highest) else "")


def _folds(table: AnnData, key: str) -> np.ndarray:
    """``(n_obs,)`` fold that held a row out; the same for all rows where the predictions are of a single model."""
    names = fold_of(table, key)
    return np.full(table.n_obs, "") if names is None else names


def _noise_ceiling(table: AnnData, gene: str, sections: Sequence[str]) -> float:
    """The highest PCC within reach in these sections, where :func:`stpredict.tl.noise_ceiling` has found one, else NaN."""
    stored = read_halves(table, [gene], sections)
    if stored is None:
        return np.nan
    mean = ceiling(mean_halves(Halves(*stored)))
    return float(mean.value[0]) if mean.determined[0] else np.nan


def pcc(measured: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson's correlation over the spots that have both; NaN with fewer than three of them or without variation."""
    both = np.isfinite(measured) & np.isfinite(predicted)
    x, y = measured[both], predicted[both]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(np.corrcoef(x, y)[0, 1])
