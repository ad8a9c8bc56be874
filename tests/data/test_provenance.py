from __future__ import annotations

import warnings
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from stpredict._data.messages import listed, user_stacklevel
from stpredict._data.provenance import (
    fold_of,
    measured_layer,
    model_params,
    read_halves,
    read_predictions,
    training_rows,
)


@pytest.fixture
def table() -> AnnData:
    table = AnnData(np.ones((4, 2), dtype=np.float32))
    table.layers["nsl"], table.layers["counts"] = np.zeros((4, 2)), np.ones((4, 2))
    table.obs["nsl_train"] = [True, False, True, False]
    table.uns["nsl"] = {"params": {"layer": "counts", "model": "nsl"}}
    return table


def rows(table: AnnData) -> list[bool] | None:
    found = training_rows(table, "nsl")
    return None if found is None else found.tolist()


def test_the_rows_that_a_model_was_fitted_to(table: AnnData) -> None:
    assert rows(table) == [True, False, True, False]
    del table.uns["nsl"]
    assert rows(table[[1, 0, 2]].copy()) == [False, True, True], "they go wherever the rows go"
    joined = ad.concat([table, table], index_unique="-")
    assert rows(joined) == [True, False, True, False] * 2
    unknown: list[Any] = [
        ["yes", "no", "yes", "no"],
        pd.array([True, None, True, False], dtype="boolean"),
        [1, 2, 1, 2],
    ]
    for values in unknown:
        table.obs["nsl_train"] = values
        assert rows(table) is None
    del table.obs["nsl_train"]
    assert rows(table) is None


def test_rows_that_folds_held_out(table: AnnData) -> None:
    assert fold_of(table, "nsl") is None
    del table.obs["nsl_train"]
    table.obs["nsl_fold"] = pd.Categorical(["a", "b", None, "a"])
    folds = fold_of(table, "nsl")
    assert folds is not None
    assert folds.tolist() == ["a", "b", "", "a"]
    assert rows(table) == [False] * 4
    table.obs["nsl_train"] = True
    assert fold_of(table, "nsl") is None, "a column of the user's own"


def test_what_predictions_are_held_against(table: AnnData) -> None:
    assert model_params(table, "nsl")["model"] == "nsl"
    assert model_params(table, "other") == {}
    assert read_predictions(table, "nsl") is table.layers["nsl"]
    with pytest.raises(
        KeyError, match=r"No predictions 'ridge' in `layers`; it has \['nsl', 'counts'\]. Predict first"
    ):
        read_predictions(table, "ridge")
    assert measured_layer(table, "nsl", None) == "counts"
    assert measured_layer(table, "nsl", "X") == "X"
    with pytest.raises(KeyError, match=r"No measured expression 'raw'; the table has \['X', 'nsl', 'counts'\]"):
        measured_layer(table, "nsl", "raw")
    del table.layers["counts"]
    assert measured_layer(table, "nsl", None) == "X"
    table.X = None
    assert measured_layer(table, "nsl", None) is None


def test_halves_are_found_by_gene_and_section(table: AnnData) -> None:
    assert read_halves(table, ["a"], ["s"]) is None
    stored = {"halves_pcc": np.array([[0.1, 0.2]]), "halves_error": np.array([[0.01, 0.02]])}
    table.uns["noise_ceiling"] = {**stored, "sections": np.array(["s"]), "genes": np.array(["a", "b"])}
    found = read_halves(table, ["b", "x"], ["t", "s"])
    assert found is not None
    np.testing.assert_array_equal(found[0], [[np.nan, np.nan], [0.2, np.nan]])
    np.testing.assert_array_equal(found[1], [[np.nan, np.nan], [0.02, np.nan]])
    assert read_halves(table, ["x"], ["s"]) is None
    table.uns["noise_ceiling"] = {"genes": ["a"]}
    assert read_halves(table, ["a"], ["s"]) is None


def test_messages() -> None:
    assert listed(["a", 1, np.float64(2.5)]) == "['a', 1, 2.5]"
    assert listed(range(20)) == "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... (20 in all)]"
    inside = {"__name__": "stpredict.deep", "user_stacklevel": user_stacklevel, "warnings": warnings}
    exec("def inner():\n    warnings.warn('w', stacklevel=user_stacklevel())\ndef outer():\n    inner()\n", inside)
    with pytest.warns(UserWarning, match="w") as raised:
        inside["outer"]()  # type: ignore[operator]
    assert raised[0].filename == __file__
