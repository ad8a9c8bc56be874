from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from matplotlib.cbook import is_math_text  # type: ignore[attr-defined]
from scipy.stats import pearsonr

from stpredict.pl._gene import choose_genes, pcc, pcc_note, read_measured, read_predicted, seen_in_training
from stpredict.pl._style import number, plain


def table_of(x: np.ndarray) -> AnnData:
    return AnnData(np.column_stack([x]), var=pd.DataFrame(index=["g"]))


def values() -> tuple[np.ndarray, np.ndarray, AnnData]:
    x, y = np.random.default_rng(0).normal(size=(2, 40))
    return x, y, table_of(x)


# Which genes


@pytest.mark.parametrize(
    ("genes", "expected"),
    [
        ("b", ["b"]),
        (["c", "a"], ["c", "a"]),
        (("c",), ["c"]),
        (np.array(["c", "b"]), ["c", "b"]),
        (pd.Index(["a"]), ["a"]),
        (pd.Series(["b", "c"], index=[7, 8]), ["b", "c"]),
        ([False, True, True], ["b", "c"]),
        (np.array([True, False, False]), ["a"]),
        (pd.Series([True, False, True], index=["a", "b", "c"]), ["a", "c"]),
        (pd.Series([True, False, True], index=["c", "b", "a"]), ["a", "c"]),
        (pd.Series([True, False], index=["c", "b"]), ["c"]),
        (pd.Series([True, False, True], index=[4, 5, 6]), ["a", "c"]),
        ("panel", ["b"]),
        ("nobody", ["nobody"]),  # whoever reads it says so
    ],
)
def test_genes(genes: Any, expected: list[str]) -> None:
    table = AnnData(var=pd.DataFrame({"panel": [False, True, False], "words": "x"}, index=["a", "b", "c"]))
    assert choose_genes(table, genes) == expected


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        ([], "`genes` is empty; expected one or more of `var_names`"),
        (np.zeros(2, dtype=bool), "`genes` is empty"),
        (np.ones(5, dtype=bool), "`genes` is a mask of 5 values; the table has 2 genes"),
    ],
)
def test_genes_that_are_none(genes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_genes(AnnData(var=pd.DataFrame(index=["a", "b"])), genes)


# Values


def test_measured_is_what_the_model_was_fitted_to() -> None:
    x, y, table = values()
    table.layers["logged"], table.layers["nsl"] = sp.csr_matrix(table.X + 10), y[:, None].astype(np.float16)
    np.testing.assert_allclose(read_predicted(table, "g", "nsl"), y, atol=2e-3)
    for layer, fitted_to, expected in ((None, "X", x), (None, "logged", x + 10), ("X", "logged", x), (None, "gone", x)):
        table.uns["nsl"] = {"params": {"layer": fitted_to}}
        found = read_measured(table, "g", "nsl", layer)
        assert found is not None
        np.testing.assert_allclose(found, expected)
    table.X = None
    assert read_measured(table, "g", "nsl", None) is None


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ([True] * 4, "training fit"),
        ([False] * 4, "held out"),
        ([True, False, False, False], "partly training"),
        (pd.array([True, False, False, False], dtype="boolean"), "partly training"),
        ([1, 1, 1, 0], "training fit"),  # the last has no prediction
        (pd.array([None, False, False, False], dtype="boolean"), ""),
        (["yes"] * 4, ""),
        (None, ""),
    ],
)
def test_held_out_is_only_said_when_it_is_known(train: Any, expected: str) -> None:
    table = AnnData(obs=pd.DataFrame(index=list("abcde")))
    if train is not None:
        table.obs["nsl_train"] = pd.concat([pd.Series(train), pd.Series(train)[:1]]).to_numpy()
    table.obs["train"] = False
    assert seen_in_training(table, "nsl", np.arange(4), np.array([1.0, 2, 3, np.nan, 5])) == expected


def test_cross_validated_predictions_are_held_out() -> None:
    table = AnnData(obs=pd.DataFrame({"nsl_cv_fold": ["1", "2"]}, index=["a", "b"]))
    assert seen_in_training(table, "nsl_cv", np.arange(2), np.ones(2)) == "held out"


# Correlation


def test_pcc_of_spots_that_have_both() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 40))
    expected = pearsonr(x[2:39], y[2:39]).statistic
    x[0], x[39], y[1] = np.nan, np.inf, np.nan
    assert pcc(x, y) == pytest.approx(expected)


def test_pcc_is_not_defined_without_variation_or_spots() -> None:
    assert np.isnan(pcc(np.arange(5.0), np.full(5, 0.1)))
    assert np.isnan(pcc(np.arange(5.0), np.array([1, 2, np.nan, np.nan, np.nan])))
    assert np.isnan(pcc(np.full(5, np.nan), np.arange(5.0)))


def test_note_of_several_sections() -> None:
    x, y, table = values()
    rows, sections = np.arange(1, 39), ["A"] * 19 + ["B"] * 19
    parts = [(x[1:20], y[1:20]), (x[20:39], y[20:39])]
    mean = statistics.mean([pearsonr(*part).statistic for part in parts])
    assert pcc_note(table, "g", "nsl", rows, sections, x, y) == f"mean PCC {number(mean)}"
    table.uns["noise_ceiling"] = {
        "genes": np.array(["g", "noise"], dtype=object),
        "sections": np.array(["A", "B"], dtype=object),
        "halves_pcc": np.array([[0.143, 0.05], [0.325, 0.05]]),
        "halves_error": np.array([[0.01, 0.1], [0.01, 0.1]]),
    }
    assert pcc_note(table, "g", "nsl", rows, sections, x, y).endswith(" of at most 0.62")
    assert pcc_note(table, "g", "nsl", rows, ["B"] * 38, x, y).endswith(" of at most 0.70")
    # A ceiling that is not told from none is none.
    assert "at most" not in pcc_note(table, "noise", "nsl", rows, sections, x, y)
    # Constant in one of them.
    y[1:20] = 1
    assert pcc_note(table, "g", "nsl", rows, sections, x, y).startswith(
        f"mean PCC {number(pearsonr(*parts[1]).statistic)}"
    )


def test_note_of_folds_within_a_section() -> None:
    x, y, table = values()
    y[20:] += 100  # another model, another level
    table.obs["nsl_cv_fold"] = np.repeat(["block 1", "block 2"], 20)
    mean = statistics.mean([pearsonr(x[:20], y[:20]).statistic, pearsonr(x[20:], y[20:]).statistic])
    expected = f"mean PCC {number(mean)}"
    assert pcc_note(table, "g", "nsl_cv", np.arange(40), ["A"] * 40, x, y) == expected
    alone = pearsonr(x[:20], y[:20]).statistic
    assert pcc_note(table, "g", "nsl_cv", np.arange(20), ["A"] * 20, x, y) == f"PCC {number(alone)}"


def test_note_without_a_correlation_or_with_a_negative_one() -> None:
    x, _, table = values()
    all_rows, one = np.arange(40), ["A"] * 40
    assert pcc_note(table, "g", "nsl", all_rows, one, x, np.full(40, 2.0)) == "PCC undefined"
    assert pcc_note(table, "g", "nsl", all_rows, one, x, -x) == "PCC −1.00"
    other = np.random.default_rng(1).normal(size=40)
    x = (x - x.mean()) / x.std()
    other -= other.mean() + x * (x @ other) / 40
    almost_none = other / other.std() - 0.001 * x
    assert pcc_note(table, "g", "nsl", all_rows, one, x, almost_none) == "PCC 0.00"  # not −0.00


def test_numbers_have_a_true_minus_and_no_negative_zero() -> None:
    assert [number(value) for value in (-0.414, -0.001, 0.625)] == ["−0.41", "0.00", "0.62"]


@pytest.mark.parametrize("name", ["a$b$c", "$", "HLA-A$1 · $x"])
def test_a_dollar_sign_begins_no_formula(name: str) -> None:
    assert not is_math_text(plain(name))
    assert plain(name).replace(r"\$", "$") == name
