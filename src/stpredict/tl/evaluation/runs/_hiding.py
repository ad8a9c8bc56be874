"""What a model gets to see of a fold, and what it is measured by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData

from stpredict._data.slide import Slide
from stpredict._data.slots import written_under
from stpredict.tl.evaluation.runs._folds import Fold
from stpredict.tl.evaluation.runs._protocols import Protocol
from stpredict.tl.fitting._targets import Genes, select_genes

# Highly variable genes whose scores are also given apart, as the field does.
_N_VARIABLE = 50


class FoldData(NamedTuple):
    """A fold with its genes.

    Attributes
    ----------
    fold
        Which spots.
    columns
        ``(G,)`` columns of the table that are modelled.
    variable
        ``(G,)`` whether a gene is among the most variable ones of the training spots.
    visible
        ``(n_obs, n_vars)`` CSR, the targets of training spots; NaN in the modelled columns of all other rows.
    measured
        ``(n_test, G)`` float32, the targets of the spots to test on.
    """

    fold: Fold
    columns: np.ndarray
    variable: np.ndarray
    visible: sp.csr_matrix
    measured: np.ndarray


def fold_data(
    table: AnnData,
    expression: sp.csr_matrix,
    counts: sp.csr_matrix | None,
    fold: Fold,
    genes: Genes,
    protocol: Protocol,
) -> FoldData:
    """Choose the genes of a fold on its training spots, and hide the targets of all others.

    Parameters
    ----------
    table
        Names of genes, and columns that select some.
    expression
        ``(n_obs, n_vars)`` as it is given.
    counts
        ``(n_obs, n_vars)``, for protocols that start from them.
    fold
        Which spots.
    genes
        As in :func:`stpredict.tl.cross_validate`.
    protocol
        How targets are made, and which genes are taken unless they are named.
    """
    rows = np.flatnonzero(fold.train)
    chosen_from = expression if counts is None or protocol.choice == "mean" else counts.log1p()
    training = chosen_from[rows]
    if genes is None and protocol.choice == "variable":
        columns = _most_variable(training, protocol.n_genes or table.n_vars)
    else:
        columns = select_genes(table, training, protocol.n_genes if genes is None else genes)
    if counts is None:
        target, on_training = expression, training[:, columns]
    else:
        panel = sp.csr_matrix(protocol.targets(counts, columns))
        target = sp.csr_matrix((panel.data, columns[panel.indices], panel.indptr), shape=expression.shape)
        on_training = target[rows][:, columns]
    varies = np.asarray(on_training.max(axis=0).toarray() > on_training.min(axis=0).toarray()).ravel()
    if not varies.all():
        logg.info(f"Leaving out {(~varies).sum()} genes that are constant on the training spots of fold {fold.name!r}.")
        columns, on_training = columns[varies], on_training[:, varies]
    if not len(columns):
        raise ValueError(
            f"No gene is left to model in fold {fold.name!r}: all of `genes` are constant on its training spots."
        )
    variable = np.zeros(len(columns), dtype=bool)
    variable[_most_variable(on_training, _N_VARIABLE)] = True
    measured = target[np.flatnonzero(fold.test)][:, columns].toarray().astype(np.float32)
    return FoldData(fold, columns, variable, _hide(target, ~fold.train, columns), measured)


def bare_copy(slide: Slide) -> SpatialData:
    """The same elements beside a table without expression, results of models, or a choice of genes made on all spots."""
    table = slide.table
    results = [key for key, entry in table.uns.items() if isinstance(entry, Mapping) and "reads" not in entry]
    written = [written_under(table, key) for key in results]
    gone: dict[str, set[str]] = {
        place: set().union(*(names[place] for names in written)) for place in ("obs", "var", "uns")
    }
    bare = AnnData(
        obs=table.obs.drop(columns=list(gone["obs"])),
        var=table.var.drop(columns=["highly_variable", *gone["var"]], errors="ignore"),
        uns={key: entry for key, entry in table.uns.items() if key not in gone["uns"]},
        obsm=dict(table.obsm),
    )
    return with_table(slide, bare)


def free_key(table: AnnData) -> str:
    """A key for a model's predictions in a copy of a table, where all names that begin with it are free."""
    taken = [str(name).casefold() for place in (table.obs, table.var, table.uns, table.obsm) for name in place]
    key = "cv"
    while any(name.startswith(key) for name in taken):
        key += "_"
    return key


def visible_copy(bare: SpatialData, table_key: str, data: FoldData, train_key: str) -> SpatialData:
    """What a model gets: targets in ``X``, and in ``obs[train_key]`` which spots it may fit."""
    table = bare[table_key].copy()
    table.X = data.visible
    table.obs[train_key] = data.fold.train
    return _with_table(bare, table_key, table)


def with_table(slide: Slide, table: AnnData) -> SpatialData:
    """The same elements with another table; nothing of the slide changes."""
    assert slide.home is not None
    return _with_table(slide.home, slide.table_key, table)


def _with_table(sdata: SpatialData, table_key: str, table: AnnData) -> SpatialData:
    return SpatialData(
        images=dict(sdata.images),
        labels=dict(sdata.labels),
        points=dict(sdata.points),
        shapes=dict(sdata.shapes),
        tables={**sdata.tables, table_key: table},
        attrs=dict(sdata.attrs),
    )


def _most_variable(training: sp.csr_matrix, n: int) -> np.ndarray:
    """Columns of scanpy's most variable genes."""
    import scanpy as sc

    if training.shape[1] <= n:
        return np.arange(training.shape[1])
    found = sc.pp.highly_variable_genes(AnnData(training), n_top_genes=n, inplace=False)
    return np.flatnonzero(found["highly_variable"].to_numpy())


def _hide(target: sp.csr_matrix, hidden: np.ndarray, columns: np.ndarray) -> sp.csr_matrix:
    """Take out all values of some rows, zeros included: a zero that can be told from a missing value would tell a lot."""
    entries = target.tocoo()
    seen = ~hidden[entries.row]
    rows = np.flatnonzero(hidden)
    return sp.csr_matrix(
        (
            np.concatenate(
                [entries.data[seen].astype(np.float32), np.full(len(rows) * len(columns), np.nan, np.float32)]
            ),
            (
                np.concatenate([entries.row[seen], np.repeat(rows, len(columns))]),
                np.concatenate([entries.col[seen], np.tile(columns, len(rows))]),
            ),
        ),
        shape=target.shape,
    )
