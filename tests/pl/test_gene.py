from __future__ import annotations

import statistics

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.stats import pearsonr

from stpredict.pl._gene import pcc, pcc_note
from stpredict.pl._style import number


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
        "genes": np.array(["g"], dtype=object),
        "sections": np.array(["A", "B"], dtype=object),
        "halves_pcc": np.array([[0.143], [0.325]]),
        "halves_error": np.array([[0.01], [0.01]]),
    }
    assert pcc_note(table, "g", "nsl", rows, sections, x, y).endswith(" of at most 0.62")
    assert pcc_note(table, "g", "nsl", rows, ["B"] * 38, x, y).endswith(" of at most 0.70")
    # Constant in one of them.
    y[1:20] = 1
    assert pcc_note(table, "g", "nsl", rows, sections, x, y).startswith(
        f"mean PCC {number(pearsonr(*parts[1]).statistic)}"
    )


def test_note_of_folds_within_a_section() -> None:
    x, y, table = values()
    y[20:] += 100  # another model, another level
    table.uns["nsl_cv"] = {"params": {"cv": "cv_fold"}}
    table.obs["cv_fold"] = np.repeat(["block 1", "block 2"], 20)
    mean = statistics.mean([pearsonr(x[:20], y[:20]).statistic, pearsonr(x[20:], y[20:]).statistic])
    expected = f"mean PCC {number(mean)}"
    assert pcc_note(table, "g", "nsl_cv", np.arange(40), ["A"] * 40, x, y) == expected
    alone = pearsonr(x[:20], y[:20]).statistic
    assert pcc_note(table, "g", "nsl_cv", np.arange(20), ["A"] * 20, x, y) == f"PCC {number(alone)}"


def test_note_without_a_correlation() -> None:
    x, y, table = values()
    assert pcc_note(table, "g", "nsl", np.arange(40), ["A"] * 40, x, np.full(40, 2.0)) == "PCC undefined"


def values() -> tuple[np.ndarray, np.ndarray, AnnData]:
    x, y = np.random.default_rng(0).normal(size=(2, 40))
    return x, y, AnnData(np.column_stack([x]), var=pd.DataFrame(index=["g"]))


def test_numbers_have_a_true_minus_and_no_negative_zero() -> None:
    assert [number(value) for value in (-0.414, -0.001, 0.625)] == ["−0.41", "0.00", "0.62"]
