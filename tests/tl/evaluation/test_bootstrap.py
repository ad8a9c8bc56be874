from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import stats

from stpredict.tl.evaluation.numbers._bootstrap import bootstrap_interval


def interval(values: np.ndarray, groups: list[str], n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return bootstrap_interval(values, groups, n_bootstrap=n, rng=np.random.default_rng(0))


def test_interval_is_that_of_scipy() -> None:
    values = np.random.default_rng(1).normal(size=(8, 3))
    low, high = interval(values, list("abcdefgh"), 20_000)
    for gene in range(3):
        expected = stats.bootstrap((values[:, gene],), np.mean, method="percentile", n_resamples=20_000, rng=2)
        np.testing.assert_allclose(low[gene], expected.confidence_interval.low, atol=0.03)
        np.testing.assert_allclose(high[gene], expected.confidence_interval.high, atol=0.03)


def test_sections_of_a_patient_are_drawn_together() -> None:
    values = np.array([[0.0], [0.0], [0.0], [1.0]])
    # One patient in two: the mean is 0 or 1 in a quarter of the draws each, else 1/4 of the sections.
    low, high = interval(values, ["a", "a", "a", "b"])
    np.testing.assert_array_equal([low, high], [[0], [1]])
    alone_low, alone_high = interval(values, list("abcd"))
    assert alone_low[0] == 0 and alone_high[0] == 0.75


def test_groups_of_different_size_weigh_by_their_sections() -> None:
    values = np.array([[0.0], [0.0], [0.0], [1.0]])
    # The patients' own means would give 0, 1/2 or 1.
    ends = np.unique([interval(values, ["a", "a", "a", "b"], 1)[0] for _ in range(3)])
    assert set(ends) <= {0.0, 0.25, 1.0}


def test_missing_values() -> None:
    values = np.array([[0.2, 0.2, np.nan], [0.4, np.nan, np.nan], [np.nan, 0.6, 0.5], [0.6, np.nan, np.nan]])
    low, high = interval(values, list("abcd"))
    assert low[0] == pytest.approx(0.2) and high[0] == pytest.approx(0.6)
    assert low[1] == pytest.approx(0.2) and high[1] == pytest.approx(0.6)
    assert np.isnan([low[2], high[2]]).all()  # a single group has a value


@pytest.mark.parametrize(("groups", "n"), [(["a", "a"], 100), (["a", "b"], 0)], ids=["one group", "no draws"])
def test_no_interval(groups: list[str], n: int) -> None:
    assert np.isnan(interval(np.array([[0.1], [0.2]]), groups, n)).all()
