from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from stpredict._data.genes import find_genes, gene_names, report_overlap


def table_of(names: Sequence[Any], **columns: Any) -> AnnData:
    return AnnData(np.zeros((2, len(names)), dtype=np.float32), var=pd.DataFrame(columns, index=list(names)))


def test_genes_are_found_by_name_in_any_order() -> None:
    table = table_of(["ERBB2", "GNAS", "FASN"])
    assert find_genes(table, ["FASN", "erbb2", "ERBB2"]).tolist() == [2, -1, 0]
    assert find_genes(table, []).tolist() == []


@pytest.mark.parametrize("dtype", [object, "category", "string"])
def test_genes_are_found_by_a_column(dtype: Any) -> None:
    table = table_of(["a", "b", "c"], symbol=pd.array(["ERBB2", "GNAS", "FASN"], dtype=dtype), number=[7, 8, 9])
    assert find_genes(table, ["FASN", "a", "ERBB2"], "symbol").tolist() == [2, -1, 0]
    assert find_genes(table, ["9", "8"], "number").tolist() == [2, 1]


def test_versions_of_ensembl_ids_do_not_matter() -> None:
    table = table_of(["ENSG00000141736.14", "ENSMUSG00000062312", "ENSG00000087460.26", "GENE.1", "X1.2"])
    wanted = ["ENSMUSG00000062312.8", "ENSG00000141736", "ENSG00000087460.9", "GENE", "X1.3", "ENSG00000000001.1"]
    assert find_genes(table, wanted).tolist() == [1, 0, 2, -1, -1, -1]


def test_versions_that_leave_a_choice_are_not_chosen_from() -> None:
    table = table_of(["ENSG00000141736.14", "ENSG00000141736.15", "ENSG00000087460.26"])
    found = find_genes(table, ["ENSG00000141736", "ENSG00000141736.15", "ENSG00000087460"])
    assert found.tolist() == [-1, 1, 2], "other genes are found nevertheless"
    assert find_genes(table, ["ENSG00000141736", "ENSG00000087460.1"]).tolist() == [-1, 2]
    one = table_of(["ENSG00000141736.14"])
    assert find_genes(one, ["ENSG00000141736.14", "ENSG00000141736"]).tolist() == [0, -1], "never two in one column"
    assert find_genes(one, ["ENSG00000141736.1", "ENSG00000141736.2"]).tolist() == [-1, -1]


def test_names_that_would_not_find_a_gene() -> None:
    table = table_of(["a", "b", "c"], twice=["x", "y", "x"], gaps=["x", None, "y"])
    with pytest.raises(
        ValueError, match=r"`var\['twice'\]` has names that .* such as \['x'\]: choose another `gene_key`"
    ):
        gene_names(table, "twice")
    with pytest.raises(ValueError, match=r"`var\['gaps'\]` has names that are missing"):
        gene_names(table, "gaps")
    with pytest.raises(KeyError, match=r"`gene_key` is 'symbol', which `var` lacks; it has \['twice', 'gaps'\]"):
        gene_names(table, "symbol")
    with pytest.raises(
        ValueError, match=r"`var_names` has names .* such as \['a'\]: call `adata.var_names_make_unique"
    ):
        gene_names(table_of(["a", "a"]), None)


def test_overlap(log: io.StringIO) -> None:
    table = table_of(["a", "b", "c"])
    report_overlap(table, ["c", "b"], find_genes(table, ["c", "b"]))
    assert log.getvalue() == ""
    report_overlap(table, ["a", "x", "y"], find_genes(table, ["a", "x", "y"]))
    assert "The table lacks 2 of the model's 3 genes" in log.getvalue()
    with pytest.raises(ValueError, match=r"none of the model's 2 genes \(such as \['x', 'y'\]; .*\['a', 'b', 'c'\]\)"):
        report_overlap(table, ["x", "y"], find_genes(table, ["x", "y"]))
