from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import dask.array as da
import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

from stpredict._data.matrix import read_csr, read_matrix, where_is

VALUES = np.array([[0.0, 1.5, 0.0], [2.0, 0.0, 3.0], [0.0, 0.0, 0.25], [7.0, 8.0, 0.0]], dtype=np.float32)

# However a table may keep the same numbers.
KEPT: dict[str, Callable[[np.ndarray], Any]] = {
    "dense": np.asarray,
    "fortran": np.asfortranarray,
    "csr_matrix": sp.csr_matrix,
    "csc_matrix": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "dask": lambda values: da.from_array(values, chunks=(3, 2)),
    "dask of csr": lambda values: da.from_array(values, chunks=(3, 3)).map_blocks(sp.csr_matrix),
    "dask of csc": lambda values: da.from_array(values, chunks=(4, 2)).map_blocks(sp.csc_matrix),
    "dask of csr_array": lambda values: da.from_array(values, chunks=(3, 3)).map_blocks(sp.csr_array),
    "dask of coo": lambda values: da.from_array(values, chunks=(4, 3)).map_blocks(sp.coo_matrix),
}


def table_of(matrix: Any) -> AnnData:
    table = AnnData(np.zeros((4, 3), dtype=np.float32))
    table.layers["counts"] = matrix
    return table


def dense(matrix: Any) -> np.ndarray:
    return np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix)


@pytest.mark.parametrize("kind", KEPT)
def test_the_same_numbers_however_they_are_kept(kind: str) -> None:
    matrix = read_matrix(table_of(KEPT[kind](VALUES)), "counts")
    assert isinstance(matrix, np.ndarray | sp.csr_matrix | sp.csc_matrix)
    assert matrix.dtype == np.float32
    assert matrix.dtype.isnative
    np.testing.assert_array_equal(dense(matrix), VALUES)
    csr = read_csr(table_of(KEPT[kind](VALUES)), "counts")
    assert isinstance(csr, sp.csr_matrix)
    np.testing.assert_array_equal(csr.toarray(), VALUES)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float16", "float32"),
        (">f2", "float32"),
        (">f4", "float32"),
        (">f8", "float64"),
        ("float64", "float64"),
        ("bool", "float32"),
        ("uint8", "uint8"),
        (">i4", "int32"),
        ("int64", "int64"),
    ],
)
def test_dtypes(dtype: str, expected: str) -> None:
    values = VALUES.astype(dtype)
    foreign = ["dense", "dask"]  # scipy holds neither half precision nor another byte order
    for kind in foreign if dtype[0] == ">" or dtype == "float16" else KEPT:
        matrix = read_matrix(table_of(KEPT[kind](values)), "counts")
        assert matrix.dtype == np.dtype(expected), kind
        assert matrix.dtype.isnative
        np.testing.assert_array_equal(dense(matrix), values.astype(expected), err_msg=kind)


@pytest.mark.parametrize("kind", ["dense", "csr_matrix", "csc_matrix"])
def test_backed_tables(kind: str, tmp_path: Path) -> None:
    table = AnnData(KEPT[kind](VALUES), layers={"counts": KEPT[kind](VALUES + VALUES)})
    table.write_h5ad(tmp_path / "table.h5ad")
    backed = ad.read_h5ad(tmp_path / "table.h5ad", backed="r")
    assert backed.isbacked
    for each in (backed, backed[[2, 0]]):
        rows = [2, 0] if each is not backed else slice(None)
        np.testing.assert_array_equal(dense(read_matrix(each, None)), VALUES[rows])
        np.testing.assert_array_equal(dense(read_matrix(each, "counts")), 2 * VALUES[rows])
    backed.file.close()


def test_what_needs_no_copy_is_none() -> None:
    for kind in ("dense", "csr_matrix"):
        table = table_of(KEPT[kind](VALUES))
        assert read_matrix(table, "counts") is table.layers["counts"]


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "object", "datetime64[s]"])
def test_what_are_no_real_numbers(dtype: str) -> None:
    table = table_of(VALUES.astype(dtype) if dtype != "datetime64[s]" else VALUES.astype(int).astype(dtype))
    with pytest.raises(TypeError, match=rf"`layers\['counts'\]` has dtype {dtype.replace('[', '.')}"[:40]):
        read_matrix(table, "counts")


def test_x_and_layers_that_are_not_there() -> None:
    table = table_of(VALUES)
    for layer in (None, "X"):
        assert read_matrix(table, layer) is table.X
        assert where_is(layer) == "`X`"
    assert where_is("counts") == "`layers['counts']`"
    with pytest.raises(KeyError, match=r"No layer 'count' in the table; it has \['counts'\]"):
        read_matrix(table, "count")
    table.X = None
    with pytest.raises(ValueError, match=r"no `X`. Say which of the layers \['counts'\] to use with `layer`"):
        read_matrix(table, None)
