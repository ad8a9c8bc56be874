"""What a model is fitted to: which genes, on which rows, in which units."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg

# Genes seen in fewer of the training spots than this are not modelled unless they are named.
MIN_DETECTED = 0.1


class Targets(NamedTuple):
    """Expression to fit: ``genes`` (G names), ``rows`` (n positions in the table), ``values`` ``(n, G)`` float32."""

    genes: list[str]
    rows: np.ndarray
    values: np.ndarray


def training_mask(table: AnnData, train_key: str | None) -> np.ndarray:
    """``(n_obs,)`` which rows may be looked at.

    Parameters
    ----------
    table
        Where ``obs[train_key]`` is.
    train_key
        A boolean column. `None` means all rows.

    Raises
    ------
    KeyError
        No such column.
    TypeError
        The column is not boolean, or has missing values.
    ValueError
        No row is marked.
    """
    if train_key is None:
        return np.ones(table.n_obs, dtype=bool)
    mask = row_mask(table, train_key, "True for spots to fit on and False for held-out ones")
    if not mask.any():
        raise ValueError(f"`obs[{train_key!r}]` is False for all {table.n_obs} spots, so there is nothing to fit on.")
    return mask


def row_mask(table: AnnData, key: str, expected: str) -> np.ndarray:
    """``(n_obs,)`` a boolean column of ``obs``; ``expected`` says in errors what its values mean.

    Raises
    ------
    KeyError
        No such column.
    TypeError
        The column is not boolean, or has missing values.
    """
    if key not in table.obs:
        boolean = [name for name in table.obs if str(table.obs[name].dtype) in ("bool", "boolean")]
        raise KeyError(f"No column {key!r} in `obs`; its boolean columns are {boolean}.")
    column = table.obs[key]
    if str(column.dtype) not in ("bool", "boolean") or column.isna().any():
        raise TypeError(
            f"`obs[{key!r}]` has dtype {column.dtype}{' and missing values' if column.isna().any() else ''}; "
            f"expected {expected}."
        )
    return column.to_numpy(dtype=bool)


def read_targets(
    table: AnnData,
    rows: np.ndarray,
    *,
    genes: int | str | Sequence[str] | None,
    layer: str | None,
    min_spots: int,
) -> Targets:
    """Select genes and read their expression on training rows; no other row is looked at.

    Parameters
    ----------
    table
        Expression.
    rows
        Positions of the training rows.
    genes
        As for :func:`select_genes`.
    layer
        Key in ``layers``. `None` means ``X``.
    min_spots
        Rows that the model needs.

    Raises
    ------
    KeyError
        Unknown genes or layer.
    ValueError
        Too few rows, values that are not finite, constant genes, or no gene at all.
    """
    if len(rows) < min_spots:
        raise ValueError(f"There are {len(rows)} training spots with pixels and a row; the model needs {min_spots}.")
    if layer is not None and layer not in table.layers:
        raise KeyError(f"No layer {layer!r} in the table; it has {list(table.layers)}.")
    matrix = table.X if layer is None else table.layers[layer]
    if matrix is None:
        raise ValueError(f"The table has no `X`. Say which of the layers {list(table.layers)} to fit with `layer`.")
    matrix = sp.csr_matrix(matrix[rows])
    where = "`X`" if layer is None else f"`layers[{layer!r}]`"

    named = not (
        genes is None or isinstance(genes, int | np.integer) or (isinstance(genes, str) and genes in table.var)
    )
    columns = select_genes(table, matrix, genes)
    values = matrix[:, columns].toarray().astype(np.float32)
    names = table.var_names[columns]

    if not (finite := np.isfinite(values).all(axis=0)).all():
        raise ValueError(
            f"{where} has NaN or infinite values on training spots in {(~finite).sum()} gene(s), such as "
            f"{list(names[~finite][:5])}. Normalise the counts anew, or leave these genes out."
        )
    constant = np.ptp(values, axis=0) == 0
    if constant.any() and named:
        raise ValueError(
            f"{constant.sum()} gene(s) have the same value on all training spots, such as "
            f"{list(names[constant][:5])}: there is nothing to learn. Leave them out."
        )
    if constant.any():
        logg.info(f"Leaving out {constant.sum()} genes that are constant on the training spots.")
        values, names = values[:, ~constant], names[~constant]
    if not len(names):
        raise ValueError("No gene is left to fit; name some with `genes`.")
    if np.array_equal(values, np.rint(values)) and values.min() >= 0:
        warnings.warn(
            f"{where} looks like counts. Models expect log-normalised expression: keep the counts with "
            "`adata.layers['counts'] = adata.X.copy()`, then call `sc.pp.normalize_total(adata, target_sum=1e4)` and "
            "`sc.pp.log1p(adata)`.",
            UserWarning,
            stacklevel=4,  # the caller of the fit function
        )
    return Targets(list(names), rows, values)


def fitted_to(table: AnnData, layer: str | None, train_key: str | None) -> dict[str, Any]:
    """What a model was fitted to and made with, to be kept with it."""
    return {
        "layer": "X" if layer is None else layer,
        "transform": "log1p" if layer is None and "log1p" in table.uns else "unknown",
        "train_key": "" if train_key is None else train_key,
        "stpredict_version": version("stpredict-histology"),
        "torch_version": version("torch"),
    }


def select_genes(table: AnnData, matrix: sp.csr_matrix, genes: int | str | Sequence[str] | None) -> np.ndarray:
    """Columns of genes, chosen by their expression on training rows.

    Parameters
    ----------
    table
        Names of genes, and columns of ``var``.
    matrix
        ``(n, n_vars)`` expression of the training rows.
    genes
        Names, one name, a boolean column of ``var``, ``"highly_variable"`` (found on the training rows when ``var`` has
        no such column), a number, of the genes of highest mean on the training rows, or `None` for all genes detected in
        at least 10 % of them.

    Raises
    ------
    KeyError, TypeError, ValueError
        Genes that are unknown or named twice, a column that is not boolean, or a number that is not positive.
    """
    if genes is None:
        detected = np.asarray((matrix > 0).mean(axis=0)).ravel()
        columns = np.flatnonzero(detected >= MIN_DETECTED)
        logg.info(f"Modelling the {len(columns)} genes detected in at least {MIN_DETECTED:.0%} of the training spots.")
        return columns
    if isinstance(genes, int | np.integer):
        if isinstance(genes, bool) or genes < 1:
            raise ValueError(f"`genes` is {genes!r}; expected a positive number of genes.")
        return np.sort(np.argsort(-np.asarray(matrix.mean(axis=0)).ravel(), kind="stable")[:genes])
    if isinstance(genes, str) and genes in table.var:
        column = table.var[genes]
        if str(column.dtype) not in ("bool", "boolean"):
            raise TypeError(f"`var[{genes!r}]` has dtype {column.dtype}; expected a boolean column that selects genes.")
        return np.flatnonzero(column.fillna(False).to_numpy(dtype=bool))
    if isinstance(genes, str) and genes == "highly_variable":
        return _highly_variable(matrix, table)
    wanted = [genes] if isinstance(genes, str) else list(genes)
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"`genes` names {sorted({g for g in wanted if wanted.count(g) > 1})[:5]} more than once.")
    columns = table.var_names.get_indexer(wanted)
    if (columns < 0).any():
        unknown = [gene for gene, column in zip(wanted, columns, strict=True) if column < 0]
        raise KeyError(
            f"{len(unknown)} of `genes` are not in `var_names`, such as {unknown[:5]}; the table has genes such as "
            f"{list(table.var_names[:5])}."
        )
    return columns


def _highly_variable(matrix: sp.csr_matrix, table: AnnData) -> np.ndarray:
    """Scanpy's highly variable genes, of the training rows alone."""
    import scanpy as sc

    training = AnnData(matrix.copy(), var=table.var[[]].copy())
    found = sc.pp.highly_variable_genes(training, inplace=False)
    columns = np.flatnonzero(found["highly_variable"].to_numpy())
    logg.info(f"Found {len(columns)} highly variable genes on the training spots.")
    return columns
