"""What a model is fitted to: which genes, on which rows, in which units."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg

from stpredict._data.columns import read_mask
from stpredict._data.genes import find_genes, gene_names
from stpredict._data.matrix import read_csr, where_is
from stpredict._data.messages import listed, user_stacklevel

# Genes seen in fewer of the training spots than this are not modeled unless they are named.
MIN_DETECTED = 0.1

Genes = int | str | Sequence[str] | np.ndarray | pd.Series | pd.Index | None
"""Names, one name, a boolean column of ``var``, ``"highly_variable"``, a mask of the genes, a number of genes, or `None`."""


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
        A column of truth values. `None` means all rows.

    Raises
    ------
    KeyError
        No such column.
    TypeError
        The column holds something else, or has missing values.
    ValueError
        No row is marked.
    """
    if train_key is None:
        return np.ones(table.n_obs, dtype=bool)
    mask = read_mask(table.obs, train_key, where="obs", expected="True for spots to fit on and False for held-out ones")
    if not mask.any():
        raise ValueError(f"`obs[{train_key!r}]` is False for all {table.n_obs} spots, so there is nothing to fit on.")
    return mask


def read_targets(
    table: AnnData,
    rows: np.ndarray,
    *,
    genes: Genes,
    gene_key: str | None,
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
    gene_key
        Column of ``var`` that names genes. `None` means ``var_names``.
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
    check_enough(len(rows), min_spots)
    matrix = read_csr(table, layer)[rows]
    names = gene_names(table, gene_key)
    columns = select_genes(table, matrix, genes, gene_key)
    values = matrix[:, columns].toarray().astype(np.float32)
    _check_finite(values, names[columns], table.obs_names[rows], where_is(layer))
    constant = np.ptp(values, axis=0) == 0
    if constant.any() and _are_named(table, genes):
        raise ValueError(
            f"{constant.sum()} gene(s) have the same value on all training spots, such as "
            f"{listed(names[columns[constant]][:5])}: there is nothing to learn. Leave them out."
        )
    if constant.any():
        logg.info(f"Leaving out {constant.sum()} genes that are constant on the training spots.")
        values, columns = values[:, ~constant], columns[~constant]
    if not len(columns):
        raise ValueError("No gene is left to fit; name some with `genes`.")
    if np.array_equal(values, np.rint(values)) and values.min() >= 0:
        warnings.warn(
            f"{where_is(layer)} looks like counts. Models expect log-normalised expression: keep the counts with "
            "`adata.layers['counts'] = adata.X.copy()`, then call `sc.pp.normalize_total(adata, target_sum=1e4)` and "
            "`sc.pp.log1p(adata)`.",
            UserWarning,
            stacklevel=user_stacklevel(),
        )
    return Targets(list(names[columns]), rows, values)


def check_enough(n_rows: int, min_spots: int) -> None:
    """Refuse fewer training spots than a model needs."""
    if n_rows < min_spots:
        raise ValueError(f"There are {n_rows} training spots with pixels and a row; the model needs {min_spots}.")


def _check_finite(values: np.ndarray, genes: pd.Index, spots: pd.Index, where: str) -> None:
    """Blame missing values on the spots or on the genes, whichever are fewer."""
    bad = ~np.isfinite(values)
    if not bad.any():
        return
    bad_spots, bad_genes = bad.any(axis=1), bad.any(axis=0)
    if bad_spots.sum() <= bad_genes.sum():
        raise ValueError(
            f"{where} has NaN or infinite values in {bad_spots.sum()} training spot(s), such as {listed(spots[bad_spots][:5])}, "
            "as spots without counts have after normalisation. Leave them out (`sc.pp.filter_cells`, or `train_key`)."
        )
    raise ValueError(
        f"{where} has NaN or infinite values on training spots in {bad_genes.sum()} gene(s), such as "
        f"{listed(genes[bad_genes][:5])}. Normalise the counts anew, or leave these genes out."
    )


def _are_named(table: AnnData, genes: Genes) -> bool:
    """Whether genes are asked for one by one, so that none may be left out."""
    if genes is None or isinstance(genes, int | np.integer) or _as_mask(table, genes) is not None:
        return False
    return not (isinstance(genes, str) and (genes in table.var or genes == "highly_variable"))


def select_genes(table: AnnData, matrix: sp.csr_matrix, genes: Genes, gene_key: str | None = None) -> np.ndarray:
    """Columns of genes, chosen by their expression on training rows.

    Parameters
    ----------
    table
        Names of genes, and columns of ``var``.
    matrix
        ``(n, n_vars)`` expression of the training rows.
    genes
        Names, one name, a boolean column of ``var``, ``"highly_variable"`` (found on the training rows when ``var`` has
        no such column), a mask of all genes, a number, of the genes of highest mean on the training rows, or `None` for
        all genes detected in at least 10 % of them.
    gene_key
        Column of ``var`` that names genes. `None` means ``var_names``.

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
    if (mask := _as_mask(table, genes)) is not None:
        return np.flatnonzero(mask)
    if isinstance(genes, str) and genes in table.var:
        return np.flatnonzero(_var_mask(table, genes))
    if isinstance(genes, str) and genes == "highly_variable":
        return _highly_variable(matrix, table)
    try:
        wanted = [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
    except TypeError as error:
        raise TypeError(
            f"`genes` is {genes!r}; expected names, a boolean column of `var`, a mask, a whole number or None."
        ) from error
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"`genes` names {sorted({g for g in wanted if wanted.count(g) > 1})[:5]} more than once.")
    columns = find_genes(table, wanted, gene_key)
    if (columns < 0).any():
        unknown = [gene for gene, column in zip(wanted, columns, strict=True) if column < 0]
        raise KeyError(
            f"{len(unknown)} of `genes` are not in `var_names`, such as {unknown[:5]}; the table has genes such as "
            f"{list(gene_names(table, gene_key)[:5])}."
        )
    return columns


def _var_mask(table: AnnData, key: str) -> np.ndarray:
    """A column of ``var``; genes that it says nothing of, as after a join of tables, are not chosen."""
    frame = table.var
    if frame[key].isna().any() and not frame[key].isna().all():
        frame = pd.DataFrame({key: frame[key].astype(object).where(frame[key].notna(), False)})
    return read_mask(frame, key, where="var", expected="a boolean column that selects genes")


def _as_mask(table: AnnData, genes: Any) -> np.ndarray | None:
    """A mask of all genes, if that is what was given."""
    if isinstance(genes, pd.Series) and pd.api.types.is_bool_dtype(genes.dtype):
        if genes.index.equals(table.var_names) or not genes.index.isin(table.var_names).all():
            values = genes.to_numpy(dtype=bool)
        else:
            return genes.reindex(table.var_names, fill_value=False).to_numpy(dtype=bool)
    elif isinstance(genes, np.ndarray) and genes.dtype == bool or isinstance(genes, list) and _all_bool(genes):
        values = np.asarray(genes)
    else:
        return None
    if values.shape != (table.n_vars,):
        raise ValueError(f"`genes` is a mask of the shape {values.shape}; the table has {table.n_vars} genes.")
    return values


def _all_bool(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, bool | np.bool_) for value in values)


def _highly_variable(matrix: sp.csr_matrix, table: AnnData) -> np.ndarray:
    """Scanpy's highly variable genes, of the training rows alone."""
    import scanpy as sc

    training = AnnData(matrix.copy(), var=table.var[[]].copy())
    found = sc.pp.highly_variable_genes(training, inplace=False)
    columns = np.flatnonzero(found["highly_variable"].to_numpy())
    logg.info(f"Found {len(columns)} highly variable genes on the training spots.")
    return columns
