"""Genes of a table by name, by symbol or by Ensembl id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg

from stpredict._data.messages import listed

_VERSION = r"^(ENS[A-Z]*[0-9]{6,})\.[0-9]+$"


def gene_names(table: AnnData, gene_key: str | None) -> pd.Index:
    """Names that genes are known by: ``var_names``, or a column of ``var``.

    Raises
    ------
    KeyError
        No such column.
    ValueError
        Names that occur more than once or are missing, so that a gene could not be found by it.
    """
    if gene_key is None:
        names = table.var_names
        where, mend = "`var_names`", "call `adata.var_names_make_unique()`, or name a column of `var` with `gene_key`"
    elif gene_key in table.var:
        names = pd.Index(table.var[gene_key])
        where, mend = f"`var[{gene_key!r}]`", "choose another `gene_key`, or leave these genes out"
    else:
        raise KeyError(f"`gene_key` is {gene_key!r}, which `var` lacks; it has {listed(table.var.columns)}.")
    if not names.is_unique or names.hasnans:
        twice = names[names.duplicated()].unique()
        raise ValueError(
            f"{where} has names that are missing or occur more than once, such as {listed(twice[:5])}: {mend}."
        )
    return names.astype(str)


def find_genes(table: AnnData, wanted: Sequence[str], gene_key: str | None = None) -> np.ndarray:
    """Columns of genes, -1 where the table lacks one; versions of Ensembl ids do not matter."""
    names = gene_names(table, gene_key)
    columns = names.get_indexer(pd.Index(list(wanted)))
    if (columns < 0).any():
        bare, bare_wanted = (pd.Series(list(each)).str.replace(_VERSION, r"\1", regex=True) for each in (names, wanted))
        taken = np.isin(np.arange(len(bare)), columns) | bare.duplicated(keep=False).to_numpy()
        free = pd.Index(bare[~taken])
        places = np.append(np.flatnonzero(~taken), -1)[free.get_indexer(pd.Index(bare_wanted))]
        columns = np.where((columns < 0) & ~bare_wanted.duplicated(keep=False).to_numpy(), places, columns)
    return columns


def report_overlap(table: AnnData, genes: Sequence[str], columns: np.ndarray) -> None:
    """Log how many of a model's genes a table has.

    Raises
    ------
    ValueError
        None.
    """
    found = int((columns >= 0).sum())
    if found == 0:
        raise ValueError(
            f"The table has none of the model's {len(genes)} genes (such as {listed(genes[:5])}; the table has genes such as "
            f"{listed(table.var_names[:5])}). Are these the same kind of gene names? Name a column of `var` that has the "
            "model's kind with `gene_key`."
        )
    if found < len(genes):
        logg.warning(f"The table lacks {len(genes) - found} of the model's {len(genes)} genes: not predicted.")
