"""Protocols: what the field calls "the score" differs by paper, so each way to make it has a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from stpredict._data.compat import layer_names
from stpredict._data.matrix import read_csr
from stpredict._data.messages import listed


@dataclass(frozen=True)
class Protocol:
    """How targets are made, which genes are taken and over which spots a correlation runs.

    Attributes
    ----------
    target
        ``"as given"`` takes the layer as it is; ``"log1p"`` the logarithm of the counts; ``"log1p cpm of panel"`` of
        counts per million of the genes that are modelled.
    n_genes
        Genes to model unless they are named. `None` means all that are detected.
    choice
        How these are found, on the training spots: highest ``"mean"`` or scanpy's highly ``"variable"``.
    pooled
        Whether a correlation runs over all spots of a fold, rather than over each section.
    """

    target: Literal["as given", "log1p", "log1p cpm of panel"] = "as given"
    n_genes: int | None = None
    choice: Literal["mean", "variable"] = "mean"
    pooled: bool = False

    @property
    def needs_counts(self) -> bool:
        """Whether targets are made from counts."""
        return self.target != "as given"

    def targets(self, counts: sp.csr_matrix, columns: np.ndarray) -> np.ndarray:
        """``(n_obs, len(columns))`` float32 targets of some genes from the counts of all genes."""
        panel = counts[:, columns].toarray().astype(np.float32)
        if self.target == "log1p cpm of panel":
            total = panel.sum(axis=1, keepdims=True)
            panel *= np.divide(1e6, total, out=np.zeros_like(total), where=total > 0)
        return np.log1p(panel)


PROTOCOLS = {
    "default": Protocol(),
    "m2ost": Protocol(target="log1p cpm of panel", n_genes=250),
    "hest": Protocol(target="log1p", n_genes=50, choice="variable", pooled=True),
}


def read_counts(table: AnnData, layer: str, protocol: str) -> sp.csr_matrix:
    """Counts for a protocol that starts from them."""
    if layer not in layer_names(table):
        raise KeyError(
            f"The protocol {protocol!r} starts from counts, but there is no layer {layer!r}; the table has "
            f"{listed(layer_names(table))}. Keep the counts with `adata.layers['counts'] = adata.X.copy()` before normalising."
        )
    return read_csr(table, layer)
