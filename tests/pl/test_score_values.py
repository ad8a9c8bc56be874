from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

import stpredict as stp
from stpredict.pl._score_values import ModelScores, noise_ceiling, read_scores, references, sections_of

MakeScores = Callable[..., pd.DataFrame]
BASELINES = [
    "mean of training spots",
    "mean of held-out section (oracle)",
    "position",
    "ridge on mean OD",
    "ridge on color statistics",
]


def read(scores: pd.DataFrame, **options: Any) -> list[ModelScores]:
    return read_scores(scores, **{"of": "gene", "metric": "pcc", "models": None, "sections": None} | options)


def names(found: list[ModelScores]) -> list[str]:
    return [model.name for model in found]


def test_values_are_those_of_the_frame(make_scores: MakeScores) -> None:
    scores = make_scores()
    nsl = next(model for model in read(scores) if model.name == "nsl")
    rows = scores[(scores["model"] == "nsl") & (scores["of"] == "gene")].set_index(["name", "section"])["pcc"]
    assert nsl.parts == ["C2", "C3", "D1", "D2"]
    assert nsl.values.loc["gene7", "D1"] == rows["gene7", "D1"]
    assert nsl.values.shape == (30, 4)
    assert nsl.of_each()["gene7"] == pytest.approx(rows["gene7", "mean of sections"])
    assert nsl.groups == ["C", "C", "D", "D"]


def test_baselines_come_first_unless_models_are_named(make_scores: MakeScores) -> None:
    scores = make_scores()
    assert names(read(scores)) == [*BASELINES, "nsl", "m2ost"]
    assert [model.is_baseline for model in read(scores)] == [True] * 5 + [False] * 2
    assert names(read(scores, models=["m2ost", "position"])) == ["m2ost", "position"]
    assert names(read(scores, models="nsl")) == ["nsl"]


def test_center_and_interval_are_those_of_the_summary(make_scores: MakeScores) -> None:
    scores = make_scores().assign(pvals_adj=np.nan)
    summary = stp.tl.summarize(scores)
    for model in read(scores):
        row = summary.loc[model.name]
        expected = row[["pcc", "pcc_low", "pcc_high"]].to_numpy(dtype=float)
        np.testing.assert_allclose([model.center(), *model.interval()], expected)
        of_spots = read(scores, of="spot", models=model.name)[0]
        assert of_spots.center() == pytest.approx(row["spot_pcc"])


def test_center_by_hand() -> None:
    values = pd.DataFrame({"A": [0.1, 0.2, 0.6], "B": [0.4, np.nan, 0.5], "C": [np.nan] * 3})
    model = ModelScores("nsl", False, values, ["A", "B", "C"])
    assert model.center() == pytest.approx((0.2 + 0.45) / 2)
    assert list(model.of_each()) == pytest.approx([0.25, 0.2, 0.55])
    # Two of three sections have a value: a draw is the one, the other or both.
    assert model.interval() == pytest.approx((0.2, 0.45))
    assert np.isnan(ModelScores("nsl", False, values[["A"]], ["A"]).interval()).all()


def test_sections_are_chosen(make_scores: MakeScores) -> None:
    scores = make_scores()
    assert read(scores, sections=["D1", "C2"])[0].parts == ["D1", "C2"]
    assert read(scores, sections=["D1", "C2"])[0].groups == ["D", "C"]
    (pooled,) = read(scores, models="nsl", sections="pooled")
    rows = scores[(scores["model"] == "nsl") & (scores["section"] == "pooled")]
    np.testing.assert_array_equal(pooled.values["pooled"].sort_index(), rows.sort_values("name")["pcc"])
    assert np.isnan(pooled.interval()).all()


def test_a_frame_without_baselines_or_categories(make_scores: MakeScores) -> None:
    scores = make_scores().drop(columns="baseline")
    plain = scores.astype(dict.fromkeys(["model", "of", "name", "section", "group"], "object"))
    assert names(read(plain)) == ["nsl", "m2ost", *BASELINES]
    assert not any(model.is_baseline for model in read(plain))
    assert read(plain)[0].center() == read(scores)[0].center()


def test_frames_with_and_without_baselines_together(make_scores: MakeScores) -> None:
    scores = make_scores(models=["nsl"])
    other = scores[(scores["model"] == "nsl").to_numpy()].drop(columns="baseline").assign(model="m2ost")
    found = read(pd.concat([other, scores], ignore_index=True))
    assert names(found) == [*BASELINES, "m2ost", "nsl"]
    assert [model.is_baseline for model in found] == [True] * 5 + [False] * 2


def test_what_has_to_be_beaten(make_scores: MakeScores) -> None:
    scores = make_scores()
    assert names(references(read(scores), "pcc", "gene")) == ["position", "ridge on color statistics"]
    # Of spots, what gene means alone reach, although the position does better; an oracle is out of competition.
    of_spots = read(scores, of="spot")
    assert names(references(of_spots, "pcc", "spot")) == ["mean of training spots", "ridge on color statistics"]
    assert references(read(scores, models=["nsl", "m2ost"]), "pcc", "gene") == []
    low = read(scores, metric="rmse")
    blind, seeing = references(low, "rmse", "gene")
    assert blind.center() == min(m.center() for m in low if m.name in ("mean of training spots", "position"))
    assert seeing.center() == min(m.center() for m in low if m.name.startswith("ridge"))
    assert references(low, "variance_ratio", "gene") == []


def test_noise_ceiling_of_the_sections_drawn(make_scores: MakeScores) -> None:
    scores = make_scores(models=["nsl"])
    found = read(scores, sections=["C2", "C3"])
    ceiling = noise_ceiling(scores, found)
    rows = scores[(scores["name"] == "gene3") & scores["section"].isin(["C2", "C3"])]
    assert ceiling["gene3"] == pytest.approx(rows["ceiling"].mean())
    assert len(ceiling) == 30
    assert noise_ceiling(scores.assign(ceiling=np.nan), found).empty
    assert noise_ceiling(scores.drop(columns="ceiling"), found).empty


def test_parts_of_sections() -> None:
    assert sections_of(["C2", "C3"]) == {"C2", "C3"}
    assert sections_of(["C2 · block 1", "C2 · block 2"]) == {"C2"}


def test_errors_say_what_there_is(make_scores: MakeScores) -> None:
    scores = make_scores()
    with pytest.raises(TypeError, match="`scores` is a dict; pass what `stp.tl.score` or `stp.tl.cross_validate` ret"):
        read({})  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"`scores` has no columns \['of', 'group'\]; pass what `stp.tl.score` or"):
        read(scores.drop(columns=["of", "group"]))
    with pytest.raises(ValueError, match=r"`metric` is 'PCC'; of genes there are \['pcc', 'rmse', 'ceiling', 'pcc_of"):
        read(scores, metric="PCC")
    with pytest.raises(ValueError, match=r"`metric` is 'ceiling'; of spots there are \['pcc', 'rmse'\]"):
        read(scores, metric="ceiling", of="spot")
    with pytest.raises(ValueError, match="`scores` has no rows of spots; pass what `stp.tl.score`"):
        read(scores[scores["of"] == "gene"], of="spot")
    with pytest.raises(KeyError, match=r"`models` is \['NSL'\]; expected one or more of \['mean of training spots', "):
        read(scores, models="NSL")
    with pytest.raises(KeyError, match=r"`models` is \[\]; expected"):
        read(scores, models=[])
    with pytest.raises(
        KeyError, match=r"`sections` is \['C2', 'C4'\]; expected one or more of \['C2', 'C3', 'D1', 'D2'"
    ):
        read(scores, sections=["C2", "C4"])
    with pytest.raises(ValueError, match="has 'gene0' in section 'C2' more than once for the model 'nsl'"):
        read(pd.concat([scores, scores]))
    with pytest.raises(ValueError, match=r"`pcc` is NaN for all genes of \['mean of training spots'\]"):
        read(scores, models=["mean of training spots"])
    with pytest.raises(ValueError, match="Measure the ceiling with `stp.tl.noise_ceiling` before scoring"):
        read(scores.assign(pcc_of_ceiling=np.nan), metric="pcc_of_ceiling")
