"""Expression and predictions as matrices, however a table keeps them."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from stpredict._data.compat import layer_names
from stpredict._data.messages import listed

Matrix = np.ndarray | sp.csr_matrix | sp.csc_matrix
"""``(n_obs, n_vars)``, dense or sparse, of a native real dtype."""


def where_is(layer: str | None) -> str:
    """How messages name the expression."""
    return "`X`" if layer in (None, "X") else f"`layers[{layer!r}]`"


def read_matrix(table: AnnData, layer: str | None) -> Matrix:
    """Read ``X`` (`None` or ``"X"``) or a layer into memory.

    Dense, CSR and CSC matrices come as they are where that is possible. Backed and dask matrices are loaded, half precision
    and foreign byte orders are converted, which neither scipy nor numba would do.

    Raises
    ------
    KeyError
        No such layer.
    TypeError
        Values that are no real numbers.
    ValueError
        The table has no ``X``.
    """
    if layer not in (None, "X") and layer not in layer_names(table):
        raise KeyError(f"No layer {layer!r} in the table; it has {listed(layer_names(table))}.")
    matrix: Any = table.X if layer in (None, "X") else table.layers[layer]
    if matrix is None:
        raise ValueError(
            f"The table has no `X`. Say which of the layers {listed(layer_names(table))} to use with `layer`."
        )
    if hasattr(matrix, "to_memory"):  # backed by a file
        matrix = matrix.to_memory()
    elif type(matrix).__module__.startswith("h5py") or type(matrix).__module__.startswith("zarr"):
        matrix = matrix[:]
    if hasattr(matrix, "compute"):
        matrix = matrix.compute()
    if hasattr(matrix, "to_df"):  # a view of a data frame
        matrix = matrix.to_df()
    kind = np.dtype(matrix.dtype).kind
    if kind not in "fiub":
        raise TypeError(f"{where_is(layer)} has dtype {matrix.dtype}; expected real numbers.")
    if not sp.issparse(matrix):
        matrix = np.asarray(matrix)
    elif not isinstance(matrix, sp.csr_matrix | sp.csc_matrix):
        make: Any = sp.csc_matrix if getattr(matrix, "format", "") == "csc" else sp.csr_matrix
        matrix = make(matrix)
    wanted = np.dtype(matrix.dtype).newbyteorder("=")
    if kind == "b" or wanted == np.float16:
        wanted = np.dtype(np.float32)
    return matrix if matrix.dtype == wanted and matrix.dtype.isnative else matrix.astype(wanted)


def read_csr(table: AnnData, layer: str | None) -> sp.csr_matrix:
    """Read expression as CSR."""
    return sp.csr_matrix(read_matrix(table, layer))
