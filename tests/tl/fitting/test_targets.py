from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from stpredict.tl.fitting._targets import Targets, read_targets, training_mask

GENES = ["ACTB", "ERBB2", "KRT8", "CD3D", "MT-CO1", "ZEB1"]


@pytest.fixture
def table() -> AnnData:
    """40 spots; the last 10 are not for training. MT-CO1 is constant, ZEB1 is detected in 2 of the 30 others."""
    rng = np.random.default_rng(0)
    values = rng.uniform(0.5, 3, (40, len(GENES))).astype(np.float32)
    values[:, 4] = 1.25
    values[:, 5] = 0
    values[[3, 8], 5] = 1.5
    values[30:, 5] = 2.0
    table = AnnData(values, var=pd.DataFrame(index=GENES), layers={"scaled": values - 1, "counts": np.rint(values)})
    table.obs["train"] = np.arange(40) < 30
    return table


def read(
    table: AnnData, genes: Any = None, *, gene_key: str | None = None, layer: str | None = None, min_spots: int = 12
) -> Targets:
    return read_targets(table, np.arange(30), genes=genes, gene_key=gene_key, layer=layer, min_spots=min_spots)


# Training rows


def advice_of(error: Exception) -> str:
    return str(error).rpartition("with `")[2].removesuffix("`.")


def test_all_rows_without_a_key(table: AnnData) -> None:
    assert training_mask(table, None).all()


@pytest.mark.parametrize("dtype", ["bool", "boolean", "int64", "Int8", "float32", "category", "object"])
def test_truth_values_of_any_dtype(table: AnnData, dtype: str) -> None:
    table.obs["train"] = table.obs["train"].astype(dtype)
    mask = training_mask(table, "train")
    assert mask.dtype == bool
    np.testing.assert_array_equal(np.flatnonzero(mask), np.arange(30))


def test_unknown_train_key(table: AnnData) -> None:
    table.obs["train2"] = pd.array(table.obs["train"], dtype="boolean")
    with pytest.raises(KeyError, match=r"No column 'training' in `obs`; its boolean columns are \['train', 'train2'\]"):
        training_mask(table, "training")


@pytest.mark.parametrize(
    "column",
    [["yes"] * 40, [1, 2] * 20, [0.5, 1] * 20, pd.Categorical(["True", "False"] * 20)],
    ids=["str", "int", "float", "categorical"],
)
def test_train_key_of_other_values(table: AnnData, column: Any) -> None:
    table.obs["train"] = column
    with pytest.raises(
        TypeError, match=r"`obs\['train'\]` has dtype .*; expected True for spots to fit on and.*Make it boolean"
    ) as refused:
        training_mask(table, "train")
    table.obs["train"] = eval(advice_of(refused.value), {"obs": table.obs})
    assert training_mask(table, "train").sum() in (20, 40)


@pytest.mark.parametrize(
    "column",
    [pd.array([None, *[True] * 39], dtype="boolean"), [np.nan, *[1.0] * 39], pd.Categorical([None, *[True] * 39])],
    ids=["boolean", "float", "categorical"],
)
def test_train_key_with_missing_values(table: AnnData, column: Any) -> None:
    table.obs["train"] = column
    with pytest.raises(TypeError, match=r"`obs\['train'\]` has 1 missing values.*Fill them first") as refused:
        training_mask(table, "train")
    table.obs["train"] = eval(advice_of(refused.value), {"obs": table.obs})
    assert training_mask(table, "train").sum() == 39


def test_train_key_that_is_all_false(table: AnnData) -> None:
    table.obs["train"] = False
    with pytest.raises(ValueError, match=r"`obs\['train'\]` is False for all 40 spots"):
        training_mask(table, "train")


# Which genes


def test_genes_detected_in_a_tenth_of_the_training_spots(table: AnnData, log: io.StringIO) -> None:
    targets = read(table)
    assert targets.genes == ["ACTB", "ERBB2", "KRT8", "CD3D"]
    np.testing.assert_array_equal(targets.rows, np.arange(30))
    np.testing.assert_array_equal(targets.values, table.X[:30, :4])
    assert targets.values.dtype == np.float32
    assert "5 genes detected in at least 10% of the training spots" in log.getvalue()
    assert "Leaving out 1 genes that are constant" in log.getvalue()
    table.X[10, 5] = 0.1  # the third of 30
    assert "ZEB1" in read(table).genes


@pytest.mark.parametrize("wrap", [list, tuple, np.array, pd.Index])
def test_names_in_the_order_given(table: AnnData, wrap: Callable[[Any], Any]) -> None:
    targets = read(table, wrap(["ZEB1", "ACTB"]))
    assert targets.genes == ["ZEB1", "ACTB"]
    np.testing.assert_array_equal(targets.values, table.X[:30, [5, 0]])


def test_one_name(table: AnnData) -> None:
    assert read(table, "ERBB2").genes == ["ERBB2"]


def test_a_number_takes_the_genes_of_highest_mean_on_training_spots(table: AnnData) -> None:
    table.X[30:, 5] = 100  # held out
    by_mean = table.var_names[np.argsort(-table.X[:30].mean(axis=0))]
    expected = [gene for gene in table.var_names if gene in by_mean[:3] and gene != "MT-CO1"]  # which is constant
    assert read(table, 3).genes == expected
    assert "ZEB1" not in read(table, np.int64(5)).genes


@pytest.mark.parametrize("number", [0, -2, True])
def test_a_number_that_is_not_positive(table: AnnData, number: int) -> None:
    with pytest.raises(ValueError, match=f"`genes` is {number}; expected a positive number of genes"):
        read(table, number)


@pytest.mark.parametrize("dtype", ["bool", "boolean"])
def test_boolean_column_of_var(table: AnnData, dtype: str) -> None:
    table.var["panel"] = pd.Series([True, False, True, False, True, False], table.var_names, dtype=dtype)
    assert read(table, "panel").genes == ["ACTB", "KRT8"]  # MT-CO1 is constant
    if dtype == "boolean":
        table.var.loc["ACTB", "panel"] = pd.NA
        assert read(table, "panel").genes == ["KRT8"]


MASK = [True, False, True, False, False, True]


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        np.array(MASK),
        pd.Series(MASK, GENES),
        pd.Series(MASK, GENES, dtype="boolean").iloc[::-1],
        pd.Series(MASK),
        pd.Series({"ZEB1": True, "ACTB": True, "KRT8": True}),
    ],
    ids=["list", "array", "Series", "reordered Series", "Series without names", "Series of some genes"],
)
def test_masks(table: AnnData, mask: Any) -> None:
    assert read(table, mask).genes == ["ACTB", "KRT8", "ZEB1"]


def test_masks_of_another_length(table: AnnData) -> None:
    with pytest.raises(ValueError, match=r"`genes` is a mask of the shape \(5,\); the table has 6 genes"):
        read(table, MASK[:5])


@pytest.mark.parametrize("genes", [5.0, {"a": 1}.values, np.float32(3)], ids=["float", "function", "numpy"])
def test_what_is_no_choice_of_genes(table: AnnData, genes: Any) -> None:
    with pytest.raises(
        TypeError, match="`genes` is .*; expected names, a boolean column of `var`, a mask, a whole number"
    ):
        read(table, genes)


def test_genes_by_another_name(table: AnnData) -> None:
    table.var["symbol"] = GENES
    table.var_names = [f"ENSG0000012345{j}.{j + 1}" for j in range(6)]
    assert read(table, ["KRT8", "ACTB"], gene_key="symbol").genes == ["KRT8", "ACTB"]
    assert read(table, 2, gene_key="symbol").genes == [
        GENES[j] for j in np.sort(np.argsort(-table.X[:30].mean(axis=0))[:2])
    ]
    versions = read(table, ["ENSG00000123452", "ENSG00000123450.9"])
    np.testing.assert_array_equal(versions.values, table.X[:30, [2, 0]])
    table.var["symbol"] = ["ACTB", *GENES[:5]]
    with pytest.raises(
        ValueError, match=r"`var\['symbol'\]` has names that .*more than once, such as \['ACTB'\].*gene_key"
    ):
        read(table, ["KRT8"], gene_key="symbol")
    with pytest.raises(KeyError, match="`gene_key` is 'name', which `var` lacks"):
        read(table, ["KRT8"], gene_key="name")


def test_highly_variable_column_is_taken_as_it_is(table: AnnData) -> None:
    table.var["highly_variable"] = [False, True, False, True, False, False]
    assert read(table, "highly_variable").genes == ["ERBB2", "CD3D"]


def test_highly_variable_genes_are_found_on_training_spots(log: io.StringIO) -> None:
    rng = np.random.default_rng(1)
    means = rng.uniform(0.2, 3, 200)
    spread = np.where(np.arange(200) % 10 == 0, 1.0, 0.1)
    values = np.abs(means + spread * rng.normal(size=(40, 200))).astype(np.float32)
    table = AnnData(sparse.csr_matrix(values), var=pd.DataFrame(index=[f"g{j}" for j in range(200)]))
    before = read(table, "highly_variable")
    assert 0 < len(before.genes) < 100
    assert {gene for gene in before.genes if int(gene[1:]) % 10 == 0}
    assert f"Found {len(before.genes)} highly variable genes on the training spots" in log.getvalue()
    assert list(table.var) == []

    noisy = values.copy()
    noisy[30:] = rng.uniform(0, 100, (10, 200))
    table.X = sparse.csr_matrix(noisy)
    assert read(table, "highly_variable").genes == before.genes


def test_unknown_genes(table: AnnData) -> None:
    with pytest.raises(KeyError, match=r"2 of `genes` are not in `var_names`, such as \['HER2', 'P53'\].*'ACTB'"):
        read(table, ["HER2", "ERBB2", "P53"])
    with pytest.raises(KeyError, match=r"1 of `genes` are not in `var_names`, such as \['HER2'\]"):
        read(table, "HER2")


def test_repeated_genes(table: AnnData) -> None:
    with pytest.raises(ValueError, match=r"`genes` names \['ACTB'\] more than once"):
        read(table, ["ACTB", "KRT8", "ACTB"])


@pytest.mark.parametrize("column", [[1, 0, 2, 0, 1, 0], list("abcdef")], ids=["int", "str"])
def test_columns_of_var_that_are_not_boolean(table: AnnData, column: list[Any]) -> None:
    table.var["panel"] = column
    with pytest.raises(TypeError, match=r"`var\['panel'\]` has dtype .*; expected a boolean column that selects genes"):
        read(table, "panel")


def test_no_gene(table: AnnData) -> None:
    table.var["none"] = False
    for genes in (list[str](), "none"):
        with pytest.raises(ValueError, match="No gene is left to fit; name some with `genes`"):
            read(table, genes)


def test_constant_genes(table: AnnData) -> None:
    with pytest.raises(
        ValueError, match=r"1 gene\(s\) have the same value on all training spots, such as \['MT-CO1'\]"
    ):
        read(table, ["ACTB", "MT-CO1"])
    table.X[35, 4] = 9  # another value, but not on a training spot
    with pytest.raises(ValueError, match="same value on all training spots"):
        read(table, "MT-CO1")


# Which values


@pytest.mark.parametrize(
    "to", [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array], ids=lambda f: f.__name__
)
def test_layers_dense_and_sparse(table: AnnData, to: Callable[[Any], Any]) -> None:
    expected = table.layers["scaled"][:30, [1, 2]]
    table.layers["scaled"] = to(table.layers["scaled"])
    np.testing.assert_array_equal(read(table, ["ERBB2", "KRT8"], layer="scaled").values, expected)


def test_unknown_layer(table: AnnData) -> None:
    with pytest.raises(KeyError, match=r"No layer 'log' in the table; it has \['scaled', 'counts'\]"):
        read(table, layer="log")


def test_table_without_x(table: AnnData) -> None:
    del table.X
    with pytest.raises(ValueError, match=r"The table has no `X`.*\['scaled', 'counts'\].*`layer`"):
        read(table)
    assert read(table, "ACTB", layer="scaled").genes == ["ACTB"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("to", [np.asarray, sparse.csr_matrix], ids=["dense", "sparse"])
def test_a_gene_that_is_not_finite(table: AnnData, bad: float, to: Callable[[Any], Any]) -> None:
    values = np.array(table.X)
    values[[7, 9], 1] = bad
    table.X = to(values)
    with pytest.raises(ValueError, match=r"`X` has NaN or inf.* in 1 gene\(s\), such as \['ERBB2'\].*these genes out"):
        read(table, ["ACTB", "ERBB2", "KRT8"])
    assert read(table, ["ACTB", "KRT8"]).genes == ["ACTB", "KRT8"]  # that gene is not asked for


def test_a_spot_that_is_not_finite(table: AnnData) -> None:
    table.X[7] = np.nan  # 0 / 0, of a spot without counts
    with pytest.raises(
        ValueError, match=r"`X` has NaN or inf.* in 1 training spot\(s\), such as \['7'\].*filter_cells.*train_key"
    ):
        read(table, ["ACTB", "ERBB2", "KRT8"])
    advised = read_targets(table, np.delete(np.arange(30), 7), genes=None, gene_key=None, layer=None, min_spots=12)
    assert len(advised.rows) == 29


@pytest.mark.parametrize("dtype", ["float16", ">f4", ">i2", "uint8", "float64", "bool"])
def test_dtypes(table: AnnData, dtype: str) -> None:
    table.X = (np.arange(240).reshape(40, 6) % 7 > 3).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # these look like counts
        targets = read(table, ["ACTB", "KRT8"])
    np.testing.assert_array_equal(targets.values, np.arange(240).reshape(40, 6)[:30, [0, 2]] % 7 > 3)
    assert targets.values.dtype == np.float32


def test_complex_numbers_are_no_expression(table: AnnData) -> None:
    table.X = table.X.astype(np.complex64)
    with pytest.raises(TypeError, match="`X` has dtype complex64; expected real numbers"):
        read(table)


def test_rows_that_are_not_for_training_are_not_looked_at(table: AnnData) -> None:
    before = read(table)
    table.X[30:] = np.nan
    after = read(table)
    assert after.genes == before.genes
    np.testing.assert_array_equal(after.values, before.values)


def test_too_few_spots(table: AnnData) -> None:
    with pytest.raises(ValueError, match="There are 30 training spots .*; the model needs 31"):
        read(table, min_spots=31)


def test_counts_are_warned_of(table: AnnData) -> None:
    with pytest.warns(
        UserWarning, match=r"`layers\['counts'\]` looks like counts.*sc\.pp\.normalize_total.*sc\.pp\.log1p"
    ):
        read(table, ["ACTB", "KRT8"], layer="counts")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(table)
        table.layers["centred"] = table.layers["counts"] - 2  # integers below zero are no counts
        read(table, "ACTB", layer="centred")
