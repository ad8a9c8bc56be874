from __future__ import annotations

import io
import warnings
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist

from stpredict._data.slide import Spots
from stpredict.tl.evaluation.runs._folds import make_folds

RADIUS = 50.0


def make(
    n_per_section: dict[str, int], patients: dict[str, str] | None = None, n_strangers: int = 0
) -> tuple[ad.AnnData, list[Spots]]:
    """Sections of spots on a grid of pitch 200, four times as wide as high, in shuffled rows of one table."""
    rng = np.random.default_rng(0)
    names = np.repeat([*n_per_section, ""], [*n_per_section.values(), n_strangers])
    names = names[rng.permutation(len(names))]
    obs = pd.DataFrame({"section": names}, index=[f"spot{i}" for i in range(len(names))])
    if patients:
        obs["patient"] = [patients.get(name, "nobody") for name in names]
    sections = []
    for name, n in n_per_section.items():
        width = int(np.ceil(np.sqrt(4 * n)))
        x, y = np.arange(n) % width, np.arange(n) // width
        rows = np.flatnonzero(names == name)
        sections.append(Spots(f"{name}_spots", 200.0 * np.column_stack([x, y]), np.full(n, RADIUS), rows, rows))
    return ad.AnnData(obs=obs), sections


def folds(table: ad.AnnData, sections: list[Spots], **arguments: Any) -> tuple[str, list[Any]]:
    defaults = {"split": None, "group_key": None, "n_folds": None, "margin": 0.0, "random_state": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_folds(table, sections, **{**defaults, **arguments})


def test_sections_are_left_out_one_at_a_time() -> None:
    table, sections = make({"C2": 20, "C3": 30, "C4": 25}, n_strangers=7)
    how, found = folds(table, sections)
    assert how == "sections left out in turn"
    assert [fold.name for fold in found] == ["C2", "C3", "C4"]
    for fold in found:
        np.testing.assert_array_equal(fold.test, table.obs["section"] == fold.name)
        np.testing.assert_array_equal(fold.train, ~fold.test & (table.obs["section"] != ""))


def test_patients_come_before_sections() -> None:
    table, sections = make({"A1": 20, "A2": 20, "B1": 20}, {"A1": "A", "A2": "A", "B1": "B"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        how, found = make_folds(table, sections, split=None, group_key=None, n_folds=None, margin=0, random_state=0)
    assert how == "patients left out in turn"
    assert [(fold.name, int(fold.test.sum())) for fold in found] == [("A", 40), ("B", 20)]


def test_folds_of_groups_are_even_and_keep_groups_whole() -> None:
    table, sections = make(dict(zip("abcdefg", (60, 10, 10, 20, 20, 30, 30), strict=True)))
    how, found = folds(table, sections, n_folds=3)
    assert how == "3 folds of whole sections"
    assert [int(fold.test.sum()) for fold in found] == [60, 60, 60]
    for section in sections:
        assert sorted(fold.test[section.rows].mean() for fold in found) == [0, 0, 1]


def test_same_patient_on_both_sides_is_said() -> None:
    table, sections = make({"C2": 20, "C3": 20}, {"C2": "C", "C3": "C"})
    with pytest.warns(
        UserWarning, match="same patient is on both sides: holding out 'C2' leaves other spots of patient C"
    ):
        make_folds(table, sections, split=None, group_key=None, n_folds=None, margin=0, random_state=0)


def test_blocks_keep_their_distance() -> None:
    table, sections = make({"A": 200, "B": 120})
    margin = 6.2
    how, found = folds(table, sections, split="blocks", n_folds=4, margin=margin)
    assert how == "4 blocks of tissue, 6.2 spot diameters apart"
    np.testing.assert_array_equal(np.sum([fold.test for fold in found], axis=0), 1)
    for fold in found:
        assert not (fold.train & fold.test).any()
        for section in sections:
            test, train = fold.test[section.rows], fold.train[section.rows]
            distance = cdist(section.xy, section.xy[test], "chebyshev").min(axis=1)
            np.testing.assert_array_equal(train, ~test & (distance >= margin * 2 * RADIUS))
            # A strip across the longer side, with nothing of other folds in between.
            x = section.xy[:, 0]
            assert not ((x[~test] > x[test].min()) & (x[~test] < x[test].max())).any()


def test_one_section_is_cut_into_blocks() -> None:
    table, sections = make({"A": 100})
    how, found = folds(table, sections)
    assert how == "5 blocks of tissue, 0 spot diameters apart"
    assert [fold.name for fold in found] == [f"block {k}" for k in range(1, 6)]
    assert all(fold.test.sum() == 20 and fold.train.sum() == 80 for fold in found)


def test_random_spots_come_with_a_warning(log: io.StringIO) -> None:
    table, sections = make({"A": 50, "B": 51}, n_strangers=3)
    _, found = folds(table, sections, split="random", n_folds=4, random_state=3)
    assert "Random spots leak" in log.getvalue()
    np.testing.assert_array_equal(np.sum([fold.test for fold in found], axis=0), table.obs["section"] != "")
    assert all((fold.train ^ fold.test)[table.obs["section"] != ""].all() for fold in found)
    again = folds(table, sections, split="random", n_folds=4, random_state=3)[1]
    np.testing.assert_array_equal(found[0].test, again[0].test)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "chance"}, ValueError, "`split` is 'chance'; expected 'groups', 'blocks'"),
        ({"n_folds": 1}, ValueError, "`n_folds` is 1; expected an integer of at least 2"),
        ({"n_folds": 4}, ValueError, "`n_folds` is 4, but there are 3 groups in 'section'"),
        ({"margin": -1.0}, ValueError, "`margin` is -1.0; expected a number of spot diameters"),
        ({"split": "blocks", "group_key": "section"}, ValueError, "`group_key` is for whole groups, but `split`"),
        ({"group_key": "donor"}, KeyError, r"No column 'donor' in `obs`; it has \['section', 'holes', 'one'"),
        ({"group_key": "holes"}, ValueError, r"`obs\['holes'\]` has missing values; every spot needs a group"),
        ({"group_key": "one"}, ValueError, "All spots are of one group, one 'x': leaving it out leaves nothing to fit on"),
        ({"group_key": "small"}, ValueError, r"fewer than 3 spots cannot be scored: lonely \(1\), pair \(2\)"),
        ({"split": "blocks", "margin": 100.0}, ValueError, "'block 1' has no training spot: .* margin of 100"),
        ({"split": "blocks", "n_folds": 30}, ValueError, "'block 13' has 0 spots to test on; at least 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_split(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    table, sections = make({"C2": 12, "C3": 12, "C4": 12})
    table.obs["holes"] = [None, *["x"] * 35]
    table.obs["one"] = "x"
    table.obs["small"] = ["lonely", "pair", "pair", *["rest"] * 33]
    with pytest.raises(error, match=message):
        folds(table, sections, **arguments)
