from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stpredict.tl.fitting._validation import validation_mask


def make(n_per_section: dict[str, int], patients: dict[str, str] | None = None) -> Any:
    """What of a slide the choice depends on."""
    rng = np.random.default_rng(0)
    names = np.repeat(list(n_per_section), list(n_per_section.values()))
    sections = [
        SimpleNamespace(
            name=name,
            rows=np.flatnonzero(names == name),
            centers=rng.uniform(0, [4000, 1000], (n_per_section[name], 2)),
        )
        for name in n_per_section
    ]
    patient_of = None if patients is None else np.array([patients[name] for name in names], dtype=object)
    return SimpleNamespace(n_obs=len(names), sections=sections, section_of=names, patient_of=patient_of)


def test_whole_patients_when_there_are_several() -> None:
    slide = make({"A1": 40, "A2": 40, "B1": 40, "C1": 40}, {"A1": "A", "A2": "A", "B1": "B", "C1": "C"})
    mask, how = validation_mask(slide, np.arange(160), fraction=0.2, random_state=0)
    inside = set(slide.patient_of[mask])
    assert how == f"patient {', '.join(sorted(inside))}"
    assert not inside & set(slide.patient_of[~mask])
    assert 0 < mask.sum() < 160


def test_whole_sections_of_one_patient() -> None:
    slide = make({"A1": 30, "A2": 30, "A3": 30}, dict.fromkeys(["A1", "A2", "A3"], "A"))
    mask, how = validation_mask(slide, np.arange(90), fraction=0.15, random_state=1)
    assert mask.sum() == 30
    assert how.startswith("section A")
    assert len(set(slide.section_of[mask])) == 1


def test_only_sections_of_the_training_rows_count() -> None:
    slide = make({"A1": 50, "A2": 50})
    mask, how = validation_mask(slide, np.arange(50), fraction=0.2, random_state=0)
    assert "strip" in how
    assert mask.sum() == 10


@pytest.mark.parametrize("random_state", [0, 1])
def test_a_strip_of_one_section_is_contiguous(random_state: int) -> None:
    slide = make({"A1": 100})
    mask, _ = validation_mask(slide, np.arange(100), fraction=0.2, random_state=random_state)
    x = slide.sections[0].centers[:, 0]  # the longer side
    assert mask.sum() == 20
    assert x[mask].max() < x[~mask].min() or x[mask].min() > x[~mask].max()


def test_one_group_is_always_left_to_learn_from() -> None:
    slide = make({"A1": 10, "A2": 10})
    mask, _ = validation_mask(slide, np.arange(20), fraction=0.99, random_state=0)
    assert mask.sum() == 10
