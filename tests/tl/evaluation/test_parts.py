from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from stpredict._data.elements import Elements
from stpredict._data.slide import Slide, Spots
from stpredict.tl.evaluation.numbers import _parts
from stpredict.tl.evaluation.numbers._parts import Part, by_gene, by_spot, slices
from stpredict.tl.evaluation.runs._parts import make_parts

# Two sections of 10 spots, rows alternating.
SECTIONS = [
    Spots(f"{name}_spots", np.column_stack([np.arange(10.0), np.full(10, i)]), np.ones(10), np.arange(10), rows)
    for i, (name, rows) in enumerate({"A": np.arange(0, 20, 2), "B": np.arange(1, 20, 2)}.items())
]


@pytest.fixture
def slide() -> Slide:
    obs = pd.DataFrame({"section": ["A", "B"] * 10}, index=[f"s{i}" for i in range(20)])
    return Slide(AnnData(obs=obs), "", SECTIONS, [], Elements(section_key="section"))


def rows(*chosen: int) -> np.ndarray:
    return np.isin(np.arange(20), chosen)


def flat(parts: dict[str, list[Part]]) -> list[Part]:
    return [part for of_fold in parts.values() for part in of_fold]


# What is scored together


def test_sections(slide: Slide) -> None:
    parts = flat(make_parts(slide, {"": np.ones(20, dtype=bool)}))
    assert [(part.name, part.group) for part in parts] == [("A", "A"), ("B", "B")]
    np.testing.assert_array_equal(parts[1].rows, SECTIONS[1].rows)
    np.testing.assert_array_equal(parts[1].xy, SECTIONS[1].xy)


def test_only_the_rows_to_score(slide: Slide) -> None:
    (part,) = flat(make_parts(slide, {"": rows(3, 5, 9)}))
    assert (part.name, part.group) == ("B", "B")
    assert part.rows.tolist() == [3, 5, 9]
    np.testing.assert_array_equal(part.xy, SECTIONS[1].xy[[1, 2, 4]])


def test_folds_that_are_sections_bear_their_names(slide: Slide) -> None:
    parts = make_parts(slide, {"first": rows(*range(0, 20, 2)), "second": rows(*range(1, 20, 2))})
    assert {fold: [part.name for part in of_fold] for fold, of_fold in parts.items()} == {
        "first": ["A"],
        "second": ["B"],
    }


def test_folds_within_sections_are_apart(slide: Slide) -> None:
    parts = make_parts(slide, {"left": rows(*range(10)), "right": rows(*range(10, 20))})
    assert [part.name for part in flat(parts)] == ["A · left", "B · left", "A · right", "B · right"]
    assert [part.group for part in flat(parts)] == ["A", "B", "A", "B"]
    one = make_parts(replace(slide, spots=SECTIONS[:1]), {"left": rows(*range(10)), "right": rows(*range(10, 20))})
    assert [part.group for part in flat(one)] == ["A · left", "A · right"]  # all that there is to draw


def test_whole_folds_hold_sections_far_apart(slide: Slide) -> None:
    (part,) = flat(make_parts(slide, {"fold 1": np.ones(20, dtype=bool)}, whole_folds=True))
    assert part.name == "fold 1"
    assert part.rows.tolist() == [*range(0, 20, 2), *range(1, 20, 2)]
    assert part.xy[10:, 0].min() - part.xy[:10, 0].max() > 10


def test_patients_are_the_groups_where_there_are_several(slide: Slide) -> None:
    every = {"": np.ones(20, dtype=bool)}
    obs = slide.table.obs
    known = replace(slide, elements=Elements(section_key="section", patient_key="donor"))
    obs["donor"] = np.where(obs["section"] == "A", "P", "Q")
    assert [part.group for part in flat(make_parts(known, every))] == ["P", "Q"]
    assert [part.group for part in flat(make_parts(slide, every))] == ["A", "B"]  # nobody has named the column
    obs["donor"] = "P"
    assert [part.group for part in flat(make_parts(known, every))] == ["A", "B"]
    obs["donor"] = ["P", *["Q"] * 19]  # a section of two patients
    assert [part.group for part in flat(make_parts(known, every))] == ["A", "B"]
    obs["donor"] = ["P", None] * 10
    with pytest.raises(ValueError, match=r"`obs\['donor'\]` \(`patient_key`\) has 10 missing values"):
        make_parts(known, every)


def test_few_spots(slide: Slide, log: io.StringIO) -> None:
    (part,) = flat(make_parts(slide, {"": rows(0, 2, 4, 1, 3)}))
    assert part.name == "A"
    assert "Only 2 spots to score in 'B', which is left out" in log.getvalue()
    with pytest.raises(
        ValueError, match=r"No section has at least 3 spots to score: there are 4 in the sections \['A', 'B'\]"
    ):
        make_parts(slide, {"": rows(0, 2, 1, 3)})


def test_sections_of_one_spots_element(slide: Slide) -> None:
    slide.table.obs["part"] = np.repeat(["left", "right"], 10)
    halves = replace(slide, spots=SECTIONS[:1], elements=Elements(section_key="part"))
    parts = flat(make_parts(halves, {"": np.ones(20, dtype=bool)}))
    assert {part.name: part.rows.tolist() for part in parts} == {
        "left": [0, 2, 4, 6, 8],
        "right": [10, 12, 14, 16, 18],
    }


def test_a_section_on_two_spots_elements(slide: Slide) -> None:
    slide.table.obs["section"] = "same"
    with pytest.raises(ValueError, match="The section 'same' .* lies on several spots elements"):
        make_parts(slide, {"": np.ones(20, dtype=bool)})
    regions = replace(slide, elements=Elements())
    assert [part.name for part in flat(make_parts(regions, {"": np.ones(20, dtype=bool)}))] == ["A_spots", "B_spots"]


# A few genes or spots at a time


@pytest.mark.parametrize("to", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array], ids=lambda f: f.__name__)
def test_genes_and_spots(to: Callable[[np.ndarray], np.ndarray]) -> None:
    values = np.random.default_rng(0).poisson(1, (20, 6)).astype(np.float32)
    chosen, columns = np.array([7, 2, 19]), np.array([5, 0, 3, 1])
    expected = values[np.ix_(chosen, columns)]
    genes = by_gene(to(values), chosen, columns)(slice(1, 3))
    spots = by_spot(to(values), chosen, columns)(slice(1, 3))
    np.testing.assert_array_equal(genes, expected[:, 1:3].T)
    np.testing.assert_array_equal(spots, expected[1:3])
    assert genes.dtype == spots.dtype == np.float64
    assert genes.flags.c_contiguous


@pytest.mark.parametrize(("n", "length"), [(0, 5), (1, 5), (7, 5), (8, 0), (3, 100)])
def test_slices_hold_everything_once(n: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parts, "_CHUNK", 11)
    found = slices(n, length)
    assert [i for chunk in found for i in range(chunk.start, chunk.stop)] == list(range(n))
    assert all((chunk.stop - chunk.start) * length <= 11 or chunk.stop - chunk.start == 1 for chunk in found)
