from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr

from stpredict.pl._gene import pcc, pcc_text


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


def test_in_words() -> None:
    assert pcc_text(0.414, np.nan) == "PCC 0.41"
    assert pcc_text(-0.414, 0.625) == "PCC −0.41 of at most 0.62"
    assert pcc_text(-0.001, np.nan) == "PCC 0.00"
    assert pcc_text(np.nan, 0.6) == "PCC undefined"
