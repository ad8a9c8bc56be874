from __future__ import annotations

import io
import warnings
from dataclasses import replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist

from stpredict._data.elements import Elements
from stpredict._data.slide import Slide, Spots
from stpredict.tl.evaluation.runs._folds import Fold, make_folds

RADIUS = 50.0


def make(n_per_section: dict[str, int], patients: dict[str, str] | None = None, n_strangers: int = 0) -> Slide:
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
    elements = Elements(section_key="section", patient_key="patient" if patients else None)
    return Slide(ad.AnnData(obs=obs), "table", sections, [], elements)


def folds(slide: Slide, **arguments: Any) -> tuple[str, list[Fold]]:
    """Split without a warning."""
    defaults = {"split": None, "group_key": None, "n_folds": None, "margin": 0.0, "random_state": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make_folds(slide, **{**defaults, **arguments})


def test_sections_are_left_out_one_at_a_time() -> None:
    slide = make({"C2": 20, "C3": 30, "C4": 25}, n_strangers=7)
    how, found = folds(slide)
    assert how == "sections left out in turn"
    assert [fold.name for fold in found] == ["C2", "C3", "C4"]
    for fold in found:
        np.testing.assert_array_equal(fold.test, slide.table.obs["section"] == fold.name)
        np.testing.assert_array_equal(fold.train, ~fold.test & (slide.table.obs["section"] != ""))


def test_patients_come_before_sections() -> None:
    slide = make({"A1": 20, "A2": 20, "B1": 20}, {"A1": "A", "A2": "A", "B1": "B"})
    how, found = folds(slide)
    assert how == "patients left out in turn"
    assert [(fold.name, int(fold.test.sum())) for fold in found] == [("A", 40), ("B", 20)]


def test_folds_of_groups_are_even_and_keep_groups_whole() -> None:
    slide = make(dict(zip("abcdefg", (60, 10, 10, 20, 20, 30, 30), strict=True)))
    how, found = folds(slide, n_folds=3)
    assert how == "3 folds of whole sections"
    assert [int(fold.test.sum()) for fold in found] == [60, 60, 60]
    for section in slide.spots:
        assert sorted(fold.test[section.rows].mean() for fold in found) == [0, 0, 1]


def test_same_patient_on_both_sides_is_said() -> None:
    slide = make({"C2": 20, "C3": 20}, {"C2": "C", "C3": "C"})
    with pytest.warns(
        UserWarning, match="same patient is on both sides: holding out 'C2' leaves other spots of patient C"
    ):
        make_folds(slide, split=None, group_key=None, n_folds=None, margin=0, random_state=0)


def test_sections_are_regions_where_no_column_names_them() -> None:
    slide = replace(make({"C2": 20, "C3": 20}), elements=Elements())
    slide.table.obs["section"] = "the user's own"
    assert [fold.name for fold in folds(slide)[1]] == ["C2_spots", "C3_spots"]


@pytest.mark.parametrize("split", ["groups", "blocks", "random"])
@pytest.mark.parametrize("marks", [np.int64, bool, "category", "Int8"])
def test_spots_beside_the_tissue_are_in_no_fold(split: str, marks: Any) -> None:
    slide = make({"C2": 40, "C3": 30})
    inside = np.arange(70) % 7 > 0
    slide.table.obs["in_tissue"] = pd.Series(inside.astype(int), index=slide.table.obs_names).astype(marks)
    for fold in folds(slide, split=split, n_folds=2)[1]:
        assert not (fold.train | fold.test)[~inside].any()
        np.testing.assert_array_equal((fold.train | fold.test), inside)


def test_blocks_keep_their_distance() -> None:
    slide = make({"A": 200, "B": 120})
    margin = 6.2
    how, found = folds(slide, split="blocks", n_folds=4, margin=margin)
    assert how == "4 blocks of tissue, 6.2 spot diameters apart"
    np.testing.assert_array_equal(np.sum([fold.test for fold in found], axis=0), 1)
    for fold in found:
        assert not (fold.train & fold.test).any()
        for section in slide.spots:
            test, train = fold.test[section.rows], fold.train[section.rows]
            distance = cdist(section.xy, section.xy[test], "chebyshev").min(axis=1)
            np.testing.assert_array_equal(train, ~test & (distance >= margin * 2 * RADIUS))
            # A strip across the longer side, with nothing of other folds in between.
            x = section.xy[:, 0]
            assert not ((x[~test] > x[test].min()) & (x[~test] < x[test].max())).any()


def test_one_section_is_cut_into_blocks() -> None:
    slide = make({"A": 100})
    how, found = folds(slide)
    assert how == "5 blocks of tissue, 0 spot diameters apart"
    assert [fold.name for fold in found] == [f"block {k}" for k in range(1, 6)]
    assert all(fold.test.sum() == 20 and fold.train.sum() == 80 for fold in found)


def test_random_spots_come_with_a_warning(log: io.StringIO) -> None:
    slide = make({"A": 50, "B": 51}, n_strangers=3)
    _, found = folds(slide, split="random", n_folds=4, random_state=3)
    assert "Random spots leak" in log.getvalue()
    np.testing.assert_array_equal(np.sum([fold.test for fold in found], axis=0), slide.table.obs["section"] != "")
    assert all((fold.train ^ fold.test)[slide.table.obs["section"] != ""].all() for fold in found)
    again = folds(slide, split="random", n_folds=4, random_state=3)[1]
    np.testing.assert_array_equal(found[0].test, again[0].test)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "chance"}, ValueError, "`split` is 'chance'; expected 'groups', 'blocks'"),
        ({"n_folds": 1}, ValueError, "`n_folds` is 1; expected an integer of at least 2"),
        ({"n_folds": 4}, ValueError, "`n_folds` is 4, but there are 3 groups in 'section'"),
        ({"margin": -1.0}, ValueError, "`margin` is -1.0; expected a number of spot diameters"),
        ({"split": "blocks", "group_key": "section"}, ValueError, "`group_key` is for whole groups, but `split`"),
        ({"group_key": "donor"}, KeyError, r"`group_key` is 'donor', which `obs` lacks; it has \['section', 'holes'"),
        ({"group_key": "holes"}, ValueError, r"`obs\['holes'\]` \(`group_key`\) has 1 missing values"),
        ({"group_key": "one"}, ValueError, "All spots are of one group, one 'x': leaving it out leaves nothing to fit on"),
        ({"group_key": "small"}, ValueError, r"fewer than 3 spots cannot be scored: lonely \(1\), pair \(2\)"),
        ({"split": "blocks", "margin": 100.0}, ValueError, "'block 1' has no training spot: .* margin of 100"),
        ({"split": "blocks", "n_folds": 30}, ValueError, "'block 13' has 0 spots to test on; at least 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_split(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    slide = make({"C2": 12, "C3": 12, "C4": 12})
    slide.table.obs["holes"] = [None, *["x"] * 35]
    slide.table.obs["one"] = "x"
    slide.table.obs["small"] = ["lonely", "pair", "pair", *["rest"] * 33]
    with pytest.raises(error, match=message):
        folds(slide, **arguments)
