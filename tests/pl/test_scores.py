from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.text import Text

import stpredict as stp
from stpredict.pl._style import BASELINE, CEILING, PALETTE

MakeScores = Callable[..., pd.DataFrame]
CONSTANTS = ["mean of training spots", "mean of held-out section (oracle)"]


def of_genes(scores: pd.DataFrame, model: str, section: str = "mean of sections", metric: str = "pcc") -> pd.Series:
    """By hand, from the frame."""
    rows = scores[(scores["of"] == "gene") & (scores["model"] == model) & (scores["section"] == section)]
    return rows.set_index(rows["name"].astype(str))[metric]


def center(scores: pd.DataFrame, model: str) -> float:
    return float(np.mean([of_genes(scores, model, section).median() for section in ("C2", "C3", "D1", "D2")]))


def texts(ax: Axes) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in ax.texts]


def x_of(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_xdata(), dtype=float)


def y_of(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_ydata(), dtype=float)


def lines(ax: Axes, marker: str, color: str | None = None) -> list[Line2D]:
    found = [line for line in ax.lines if line.get_marker() == marker and line.get_linestyle() in ("None", "none")]
    return [line for line in found if color is None or to_rgba(line.get_color()) == to_rgba(color)]


def legend(ax: Axes) -> list[str]:
    box = ax.get_legend()
    assert box is not None
    return [text.get_text() for text in box.get_texts()]


def points(ax: Axes) -> list[Line2D]:
    """Genes or spots of the rows, from the top down."""
    return sorted((line for line in ax.lines if line.get_rasterized()), key=lambda line: np.mean(y_of(line)))


def test_a_point_for_each_gene_at_its_mean_over_sections(make_scores: MakeScores) -> None:
    scores = make_scores()
    ax = stp.pl.scores(scores)
    drawn = points(ax)
    models = ["position", "ridge on mean OD", "ridge on color statistics", "nsl", "m2ost"]
    for line, model in zip(drawn, models, strict=True):
        np.testing.assert_allclose(np.sort(x_of(line)), np.sort(of_genes(scores, model)))
    assert [line.get_color() for line in drawn] == [BASELINE] * 3 + list(PALETTE[:2])
    assert ax.get_xlabel() == "per-gene PCC on held-out spots\n(mean of 4 sections)"


def test_medians_and_intervals_are_printed(make_scores: MakeScores) -> None:
    scores = make_scores()
    summary = stp.tl.summarize(scores.assign(pvals_adj=np.nan))
    ax = stp.pl.scores(scores)
    for model in ("position", "nsl", "m2ost"):
        value, low, high = summary.loc[model, ["pcc", "pcc_low", "pcc_high"]]
        (text,) = [text for text in ax.texts if text.get_text() == f"{value:.2f}\n[{low:.2f}, {high:.2f}]"]
        (name,) = [text for text in ax.texts if text.get_text() == model]
        assert text.get_position()[1] == name.get_position()[1]
    assert legend(ax)[0] == "median, 95 % bootstrap over 2 patients"
    by_section = scores.assign(group=scores["section"])
    assert legend(stp.pl.scores(by_section))[0] == "median, 95 % bootstrap over 4 sections"


def undefined(scores: pd.DataFrame) -> pd.DataFrame:
    """A model has no error anywhere."""
    scores.loc[(scores["model"] == "m2ost").to_numpy(), "rmse"] = np.nan
    return scores


def test_constants_keep_a_row(make_scores: MakeScores) -> None:
    ax = stp.pl.scores(make_scores())
    shown = texts(ax)
    assert shown.count("constant: no correlation across spots") == 2
    assert [text for text in shown if text in CONSTANTS] == CONSTANTS
    assert "not defined" in texts(stp.pl.scores(undefined(make_scores()), metric="rmse"))


def test_what_has_to_be_beaten_and_the_ceiling_go_across(make_scores: MakeScores) -> None:
    scores = make_scores()
    # The ceiling of a gene is the same, whatever predicts it.
    rows = (scores["of"] == "gene").to_numpy() & scores["section"].isin(["C2", "C3", "D1", "D2"]).to_numpy()
    scores.loc[rows, "ceiling"] = scores[rows].groupby(["name", "section"], observed=True)["ceiling"].transform("first")
    ax = stp.pl.scores(scores)
    across = [line for line in ax.lines if list(y_of(line)) == [0, 1] and len(set(x_of(line))) == 1]
    at = [x_of(line)[0] for line in across]
    each = pd.concat([of_genes(scores, "nsl", section, "ceiling") for section in ("C2", "C3", "D1", "D2")], axis=1)
    ceiling = each.mean(axis=1)
    expected = [center(scores, "position"), center(scores, "ridge on color statistics"), float(ceiling.median()), 0.0]
    np.testing.assert_allclose(np.sort(at), np.sort(expected))
    (band,) = [patch for patch in ax.patches if to_rgba(CEILING) == patch.get_facecolor()]
    ends = ax.transData.inverted().transform(band.get_window_extent())
    np.testing.assert_allclose(ends[:, 0], ceiling.quantile([0.25, 0.75]))
    assert legend(ax)[1:] == [
        "position (median)",
        "ridge on color statistics (median)",
        f"noise ceiling {ceiling.median():.2f} (median, quartiles)",
    ]
    assert not stp.pl.scores(scores.assign(ceiling=np.nan)).patches
    assert not stp.pl.scores(scores, metric="rmse").patches


@pytest.mark.parametrize("n_models", [1, 9])
@pytest.mark.parametrize("width", [3.4, 7.0])
def test_names_of_genes_do_not_overlap(make_scores: MakeScores, n_models: int, width: float) -> None:
    scores = make_scores(models=[f"model_{i}" for i in range(n_models)])
    long = {"gene0": "ENSG00000281344.1", "gene1": "ERBB2"}
    scores["name"] = scores["name"].cat.rename_categories(long)
    genes = [*long.values(), *(f"gene{i}" for i in range(2, 8))]
    _, ax = plt.subplots(figsize=(width, 5), layout="constrained")
    stp.pl.scores(scores, genes=genes, ax=ax)
    labels = [text for text in ax.texts if text.get_text() in genes]
    assert sorted(text.get_text() for text in labels) == sorted(genes)
    for a, b in combinations(labels, 2):
        assert not a.get_window_extent().overlaps(b.get_window_extent())
    # From left to right as the genes of the first row that has values.
    labels.sort(key=lambda text: text.get_position()[0])
    in_row = of_genes(scores, "position")[[text.get_text() for text in labels]]
    assert (np.diff(in_row) >= 0).all()


def test_genes_of_interest_are_marked_in_all_rows(make_scores: MakeScores) -> None:
    scores = make_scores()
    ax = stp.pl.scores(scores, genes=["gene3", "gene5"])
    for gene, marker in (("gene3", "o"), ("gene5", "s")):
        (line,) = lines(ax, marker, "black")
        models = ["position", "ridge on mean OD", "ridge on color statistics", "nsl", "m2ost"]
        assert list(x_of(line)) == pytest.approx([of_genes(scores, model)[gene] for model in models])
        assert (np.diff(y_of(line)) > 0).all()


def test_a_gene_that_a_model_lacks_is_marked_where_it_is(make_scores: MakeScores) -> None:
    scores = make_scores()
    there = ~((scores["name"] == "gene3") & (scores["model"] == "nsl")).to_numpy()
    (line,) = lines(stp.pl.scores(scores[there], models=["nsl", "m2ost"], genes="gene3"), "o", "black")
    assert list(x_of(line)) == pytest.approx([of_genes(scores, "m2ost")["gene3"]])


def test_values_far_out_are_counted_at_the_end(make_scores: MakeScores) -> None:
    scores = make_scores()
    outlier = ((scores["name"] == "gene3") & (scores["model"] == "nsl")).to_numpy()
    scores.loc[outlier, "rmse"] = 50.0
    ax = stp.pl.scores(scores, metric="rmse")
    assert ax.get_xlim()[1] < 5
    assert "1 ▸" in texts(ax)
    assert not any("▸" in text or "◂" in text for text in texts(stp.pl.scores(scores)))
    # Unless it is asked for.
    assert stp.pl.scores(scores, metric="rmse", genes="gene3").get_xlim()[1] > 50


@pytest.mark.parametrize("n_genes", [1, 8])
def test_few_genes(make_scores: MakeScores, n_genes: int) -> None:
    ax = stp.pl.scores(make_scores(n_genes))
    assert len(x_of(points(ax)[0])) == n_genes
    assert not [collection for collection in ax.collections if len(collection.get_paths())]


def test_frame_of_a_single_model_and_section(make_scores: MakeScores) -> None:
    scores = make_scores().drop(columns="baseline")
    ax = stp.pl.scores(scores, models="nsl", sections="D1")
    assert ax.get_xlabel() == "per-gene PCC\n(section D1)"
    assert f"{of_genes(scores, 'nsl', 'D1').median():.2f}" in texts(ax)
    assert legend(ax)[0] == "median"
    assert stp.pl.scores(scores, models="nsl", sections="pooled").get_xlabel() == "per-gene PCC\n(all sections pooled)"


def test_held_out_is_only_said_of_cross_validation(make_scores: MakeScores) -> None:
    scores = make_scores()
    other = scores[(scores["model"] == "nsl").to_numpy()].drop(columns="baseline").assign(model="other")
    ax = stp.pl.scores(pd.concat([scores, other], ignore_index=True))
    assert ax.get_xlabel() == "per-gene PCC\n(mean of 4 sections)"


def test_parts_of_sections_are_called_so(make_scores: MakeScores) -> None:
    scores = make_scores()
    blocks = {"C2": "C2 · block 1", "C3": "C2 · block 2", "D1": "D1 · block 1", "D2": "D1 · block 2"}
    scores["section"] = scores["section"].cat.rename_categories(blocks)
    scores["group"] = scores["group"].cat.rename_categories({"C": "C2", "D": "D1"})
    ax = stp.pl.scores(scores)
    assert ax.get_xlabel().endswith("(mean of 4 parts of sections)")
    assert legend(ax)[0] == "median, 95 % bootstrap over 2 sections"
    ax = stp.pl.scores(scores.assign(group=scores["section"]))
    assert legend(ax)[0] == "median, 95 % bootstrap over 4 parts of sections"


def test_spots(make_scores: MakeScores) -> None:
    scores = make_scores()
    ax = stp.pl.scores(scores, kind="spots")
    rows = scores[(scores["of"] == "spot") & (scores["model"] == "mean of training spots")]
    np.testing.assert_allclose(np.sort(x_of(points(ax)[0])), np.sort(rows["pcc"]))
    assert len(points(ax)) == 7
    assert ax.get_xlabel() == "per-spot PCC on held-out spots\n(4 sections)"
    assert legend(ax)[1:] == ["mean of training spots: gene means alone", "ridge on color statistics (median)"]
    assert not ax.patches


def test_ranks(make_scores: MakeScores) -> None:
    scores = make_scores(models=[f"model{i}" for i in range(7)])
    ax = stp.pl.scores(scores, kind="rank", genes="gene3")
    assert legend(ax)[:5] == [f"{name} (no value)" for name in CONSTANTS] + [
        "position",
        "ridge on mean OD",
        "ridge on color statistics",
    ]
    drawn = {str(line.get_label()): line for line in ax.lines if len(x_of(line)) == 30}
    assert len(drawn) == 10
    for model, line in drawn.items():
        np.testing.assert_allclose(y_of(line), np.sort(of_genes(scores, model))[::-1])
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn.values()}) == 10
    marks = lines(ax, "o")
    ranks = of_genes(scores, "model0").rank(ascending=False)
    (mark,) = [line for line in marks if line.get_color() == drawn["model0"].get_color()][:1]
    assert (x_of(mark)[0], y_of(mark)[0]) == (ranks["gene3"], of_genes(scores, "model0")["gene3"])
    assert legend(ax)[-1] == "gene3"
    assert legend(ax)[-2].startswith("noise ceiling 0.6")


def test_sections(make_scores: MakeScores) -> None:
    scores = make_scores()
    ax = stp.pl.scores(scores, kind="sections")
    (image,) = ax.images
    values = np.asarray(image.get_array().filled(np.nan))  # type: ignore[union-attr]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["C2", "C3", "D1", "D2", "mean"]
    models = [label.get_text() for label in ax.get_yticklabels()]
    assert models == [*CONSTANTS, "position", "ridge on mean OD", "ridge on color statistics", "nsl", "m2ost"]
    assert np.isnan(values[:2]).all()
    assert values[5, 2] == pytest.approx(of_genes(scores, "nsl", "D1").median())
    assert values[5, 4] == pytest.approx(center(scores, "nsl"))
    printed = {text.get_position(): text.get_text() for text in ax.texts}
    assert printed[2, 5] == f"{values[5, 2]:.2f}"
    assert printed[2, 0] == "–"
    assert ax.get_title() == "per-gene PCC on held-out spots\nmedian over genes"
    assert len(stp.pl.scores(scores, kind="sections", sections="D1").get_xticklabels()) == 1


def test_a_lower_error_is_as_bright_as_a_higher_correlation(make_scores: MakeScores) -> None:
    for metric, best in (("pcc", np.nanargmax), ("rmse", np.nanargmin)):
        (image,) = stp.pl.scores(make_scores(), kind="sections", metric=metric).images
        values: np.ndarray = np.ma.asarray(image.get_array()).filled(np.nan)
        colors = np.asarray(image.to_rgba(values)).reshape(-1, 4)
        np.testing.assert_allclose(colors[best(values)], plt.get_cmap("viridis")(1.0))


def test_given_axes(make_scores: MakeScores) -> None:
    _, given = plt.subplots(1, 2)
    for kind in ("genes", "rank", "sections", "spots"):
        assert stp.pl.scores(make_scores(), kind=kind, ax=given[1]) is given[1]  # type: ignore[arg-type]
        given[1].clear()
    assert len(plt.get_fignums()) == 1
    with pytest.raises(ValueError, match="`ax` has 2 axes; this picture has 1 panel"):
        stp.pl.scores(make_scores(), ax=given)


def test_the_frame_is_not_changed(make_scores: MakeScores) -> None:
    scores = make_scores()
    before = scores.copy()
    for kind in ("genes", "rank", "sections", "spots"):
        stp.pl.scores(scores, kind=kind)  # type: ignore[arg-type]
    pd.testing.assert_frame_equal(scores, before)


def test_rows_do_not_touch(make_scores: MakeScores) -> None:
    ax = stp.pl.scores(
        make_scores(models=["nsl", "a_model_with_a_rather_long_name", "a model with a rather long name"])
    )
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    left: list[Text] = [text for text in ax.texts if text.get_position()[0] < 0]
    assert len(left) == 8
    for above, below in pairwise(sorted(left, key=lambda text: text.get_position()[1])):
        assert not above.get_window_extent().overlaps(below.get_window_extent())
    assert "a_model_with_a_rather_long_name" in [text.get_text() for text in left]


def test_errors_say_what_there_is(make_scores: MakeScores) -> None:
    scores = make_scores()
    with pytest.raises(
        ValueError, match=r"`kind` is 'violin'; expected one of \['genes', 'rank', 'sections', 'spots'\]"
    ):
        stp.pl.scores(scores, kind="violin")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="`genes` are marked in pictures of the kinds 'genes' and 'rank'; `kind` is 's"
    ):
        stp.pl.scores(scores, kind="spots", genes="gene3")
    with pytest.raises(KeyError, match=r"`genes` is \['ERBB2'\]; expected one or more of \['gene0', .*\(30 in all\)"):
        stp.pl.scores(scores, genes="ERBB2")
    with pytest.raises(KeyError, match=r"`models` is \['ridge'\]; expected one or more of"):
        stp.pl.scores(scores, models="ridge")
    with pytest.raises(KeyError, match=r"`scores` has no columns \['of'\]; pass what `stp.tl.score`"):
        stp.pl.scores(scores.drop(columns="of"))
    with pytest.raises(TypeError, match="`ax` holds str; expected matplotlib Axes"):
        stp.pl.scores(scores, ax="left")  # type: ignore[arg-type]
    assert not plt.get_fignums()
