from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_rgba
from scipy.stats import pearsonr
from spatialdata import SpatialData

import stpredict as stp
from stpredict.pl import _scatter
from stpredict.pl._style import PALETTE

MakeSData = Callable[[], SpatialData]
Unchanged = Callable[[SpatialData], AbstractContextManager[None]]


def values(table: AnnData, section: str, gene: str) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and measured."""
    part = table[(table.obs["section"] == section).to_numpy(), gene]
    return np.asarray(part.layers["nsl"], dtype=float).ravel(), np.asarray(part.X, dtype=float).ravel()


def points(ax: Axes) -> PathCollection:
    (found,) = [artist for artist in ax.collections if isinstance(artist, PathCollection)]
    return found


def offsets(ax: Axes) -> np.ndarray:
    drawn = np.asarray(points(ax).get_offsets())
    return drawn[np.lexsort(drawn.T)]


def note(ax: Axes) -> str:
    return ax.texts[-1].get_text()


def expected(*pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    both = np.concatenate([np.column_stack(pair) for pair in pairs])
    return both[np.lexsort(both.T)]


def legend(ax: Axes) -> dict[str, tuple[float, ...]]:
    box = ax.get_legend()
    assert box is not None
    handles = [handle.get_color() for handle in box.legend_handles]  # type: ignore[union-attr]
    return dict(zip([text.get_text() for text in box.get_texts()], map(to_rgba, handles), strict=True))


def test_held_out_spots_are_drawn(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    axes = stp.pl.scatter(sdata, ["ERBB2", "ACTB"])
    assert axes.shape == (2,)
    for ax, gene in zip(axes, ["ERBB2", "ACTB"], strict=True):
        predicted, measured = values(sdata["table"], "B", gene)
        np.testing.assert_allclose(offsets(ax), expected((predicted, measured)), rtol=1e-6)
        assert ax.get_title() == gene
        assert note(ax) == f"held out · PCC {pearsonr(predicted, measured).statistic:.2f}"
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "measured")
        assert ax.get_xlim() == ax.get_ylim()
        line = np.asarray(ax.lines[0].get_xydata())
        np.testing.assert_array_equal(line[:, 0], line[:, 1])
    assert list(legend(axes[-1])) == ["B_spots"]
    assert axes[0].get_legend() is None


def test_all_spots_or_chosen_ones(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    table = sdata["table"]
    (ax,) = stp.pl.scatter(sdata, "ERBB2", spots="all")
    pairs = [values(table, section, "ERBB2") for section in "AB"]
    np.testing.assert_allclose(offsets(ax), expected(*pairs), rtol=1e-6)
    # As scores are: the mean over sections, not over all spots at once.
    mean = np.mean([pearsonr(*pair).statistic for pair in pairs])
    assert note(ax) == f"partly training · mean PCC {mean:.2f}"
    (ax,) = stp.pl.scatter(sdata, "ERBB2", spots="nsl_train")
    np.testing.assert_allclose(offsets(ax), expected(pairs[0]), rtol=1e-6)
    assert note(ax).startswith("training fit · PCC")


def test_a_model_fitted_to_all_spots_is_drawn_as_a_training_fit(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    sdata["table"].obs["nsl_train"] = True
    (ax,) = stp.pl.scatter(sdata, "ERBB2")
    assert len(offsets(ax)) == 96
    assert note(ax).startswith("training fit · mean PCC")


def test_points_have_the_color_of_their_section(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    (ax,) = stp.pl.scatter(sdata, "ERBB2", spots="all", section_key="section")
    colors = legend(ax)
    assert set(colors.values()) == {to_rgba(color) for color in PALETTE[:2]}
    for section in "AB":
        predicted, _ = values(sdata["table"], section, "ERBB2")
        own = np.isclose(np.asarray(points(ax).get_facecolor())[:, :3], colors[section][:3]).all(axis=1)
        drawn = np.asarray(points(ax).get_offsets())[own, 0]
        np.testing.assert_allclose(np.sort(drawn), np.sort(predicted), rtol=1e-6)


def test_colors_by_other_columns(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    obs = sdata["table"].obs
    obs["kind"] = np.where(np.arange(96) % 2 == 0, "tumour", "stroma")
    assert set(legend(stp.pl.scatter(sdata, "ERBB2", color="kind")[0])) == {"tumour", "stroma"}
    assert set(legend(stp.pl.scatter(sdata, "ERBB2", color="nsl_train", spots="all")[0])) == {"True", "False"}
    obs["many"] = np.arange(96) % 9
    obs["many"] = obs["many"].astype("category")
    assert len(set(legend(stp.pl.scatter(sdata, "ERBB2", color="many", spots="all")[0]).values())) == 9

    obs["depth"] = np.arange(96.0)
    (ax,) = stp.pl.scatter(sdata, "ERBB2", color="depth", spots="all")
    assert ax.get_legend() is None
    (bar,) = [other for other in ax.figure.axes if other is not ax]
    assert bar.get_ylabel() == "depth"
    predicted = np.asarray(points(ax).get_offsets())[:, 0]
    row = int(np.argmin(np.abs(predicted - sdata["table"][:, "ERBB2"].layers["nsl"][95, 0])))
    np.testing.assert_allclose(np.asarray(points(ax).get_facecolor())[row, :3], mpl.colormaps["viridis"]([1.0])[0, :3])

    (ax,) = stp.pl.scatter(sdata, "ERBB2", color=None)
    assert ax.get_legend() is None
    obs["section"] = "mine"  # sections are regions, or those of `section_key`
    assert list(legend(stp.pl.scatter(sdata, "ERBB2")[0])) == ["B_spots"]
    obs["kind"] = "$1"
    assert list(legend(stp.pl.scatter(sdata, "ERBB2", color="kind")[0])) == [r"\$1"]


def test_density_of_many_spots(predicted_sdata: MakeSData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_scatter, "_MAX_POINTS", 50)
    sdata = predicted_sdata()
    (ax,) = stp.pl.scatter(sdata, "ERBB2", spots="all")
    assert not [artist for artist in ax.collections if isinstance(artist, PathCollection)]
    (cells,) = [artist for artist in ax.collections if isinstance(artist, PolyCollection)]
    assert np.asarray(cells.get_array()).sum() == 96
    assert ax.get_legend() is None
    assert ax.texts[0].get_text() == "96 spots, darker: more"
    assert stp.pl.scatter(sdata, "ERBB2")[0].get_legend() is not None  # 48 spots


def test_noise_ceiling_of_the_sections_drawn(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    sdata["table"].uns["noise_ceiling"] = {
        "genes": np.array(["ERBB2"], dtype=object),
        "sections": np.array(["A_spots", "B_spots"], dtype=object),
        "halves_pcc": np.array([[0.22], [0.47]]),
        "halves_error": np.array([[0.02], [0.02]]),
    }
    assert note(stp.pl.scatter(sdata, "ERBB2")[0]).endswith(" of at most 0.80")
    assert note(stp.pl.scatter(sdata, "ERBB2", spots="all")[0]).endswith(" of at most 0.72")
    assert "at most" not in note(stp.pl.scatter(sdata, "ACTB")[0])


def test_spots_without_a_value_are_left_out(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    table = sdata["table"]
    gene = table.var_names.get_loc("ERBB2")
    table.layers["nsl"][table.obs_names.get_loc("B3"), gene] = np.nan
    table.X[table.obs_names.get_loc("B5"), gene] = np.nan
    (ax,) = stp.pl.scatter(sdata, "ERBB2")
    assert len(offsets(ax)) == 46
    assert ax.texts[0].get_text() == "46 spots"


def test_constant_prediction(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    sdata["table"].layers["nsl"][:] = 2
    (ax,) = stp.pl.scatter(sdata, "ERBB2", spots="all")
    assert note(ax) == "partly training · PCC undefined"


def test_spots_beside_the_tissue_are_left_out(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    table = sdata["table"]
    table.obs["in_tissue"] = (np.arange(96) % 4 > 0).astype(int)
    inside = table.obs["in_tissue"] == 1
    n_held_out = int((inside & ~table.obs["nsl_train"]).sum())
    for spots, n in ((None, n_held_out), ("all", 72), ("nsl_train", 48)):
        (ax,) = stp.pl.scatter(sdata, "ERBB2", spots=spots)
        assert len(offsets(ax)) == n
    (ax,) = stp.pl.scatter(sdata, "ERBB2")
    scores = stp.tl.score(sdata, n_perms=0, n_bootstrap=0, genes="ERBB2")
    pcc = scores.loc[scores["section"] == "mean of sections", "pcc"].item()
    assert note(ax) == f"held out · PCC {pcc:.2f}"


def test_a_table_by_itself_is_drawn_like_its_spatialdata(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    alone = sdata["table"].copy()
    alone.obsm["spatial"] = np.random.default_rng(0).normal(size=(96, 2))
    choices: list[dict[str, Any]] = [{}, {"spots": "all"}, {"section_key": "section"}]
    for options in choices:
        (ours,), (theirs,) = (stp.pl.scatter(each, "KRT19", **options) for each in (sdata, alone))
        np.testing.assert_array_equal(offsets(ours), offsets(theirs))
        assert note(ours) == note(theirs)
        assert legend(ours) == legend(theirs)


def test_genes_by_a_mask(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    table = sdata["table"]
    table.var_names = ["a$b$", "ERBB2", "KRT19", "other"]
    axes = stp.pl.scatter(sdata, table.var["nsl_fitted"])
    assert [ax.get_title() for ax in axes] == [r"a\$b\$", "ERBB2", "KRT19"]


def test_a_grid_of_panels(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    axes = stp.pl.scatter(sdata, ["ERBB2", "ACTB", "KRT19"], ncols=2)
    assert [ax.get_title() for ax in axes] == ["ERBB2", "ACTB", "KRT19"]
    assert len(axes[0].figure.axes) == 3
    assert axes[1].get_legend() is not None


def test_given_axes(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    _, given = plt.subplots(2, 2)
    axes = stp.pl.scatter(sdata, ["ERBB2", "ACTB"], ax=given[0], ncols=1)
    assert axes.tolist() == given[0].tolist()
    assert len(plt.get_fignums()) == 1
    with pytest.raises(ValueError, match="`ax` has 4 axes; this picture has 2 panels"):
        stp.pl.scatter(sdata, ["ERBB2", "ACTB"], ax=given)


def test_nothing_is_changed(predicted_sdata: MakeSData, unchanged: Unchanged) -> None:
    sdata = predicted_sdata()
    with unchanged(sdata):
        stp.pl.scatter(sdata, ["ERBB2", "ACTB"])


def test_errors_say_what_there_is(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    table = sdata["table"]
    with pytest.raises(KeyError, match=r"No predictions 'm2ost' in `layers`; it has \['nsl'\]"):
        stp.pl.scatter(sdata, "ERBB2", key="m2ost")
    with pytest.raises(KeyError, match="No gene 'erbb2' in `var_names`"):
        stp.pl.scatter(sdata, ["ACTB", "erbb2"])
    with pytest.raises(ValueError, match="`genes` is empty; expected one or more of `var_names`"):
        stp.pl.scatter(sdata, [])
    with pytest.raises(ValueError, match="'other' is in the table but was not modeled"):
        stp.pl.scatter(sdata, "other")
    with pytest.raises(KeyError, match=r"No measured expression 'raw'; the table has \['X', 'nsl'\]"):
        stp.pl.scatter(sdata, "ERBB2", layer="raw")
    with pytest.raises(
        KeyError, match=r"No column 'kind' in `obs`; it has \['section', 'region', 'spot_id', 'nsl_train'\]"
    ):
        stp.pl.scatter(sdata, "ERBB2", color="kind")
    with pytest.raises(KeyError, match=r"No column 'test' in `obs`; its boolean columns are \['nsl_train'\]"):
        stp.pl.scatter(sdata, "ERBB2", spots="test")
    with pytest.raises(
        TypeError, match=r"`obs\['section'\]` has dtype category and values such as .*; expected True for spots to draw"
    ):
        stp.pl.scatter(sdata, "ERBB2", spots="section")
    with pytest.raises(ValueError, match="`ncols` is 0; expected at least 1"):
        stp.pl.scatter(sdata, "ERBB2", ncols=0)
    table.obs["none"] = False
    with pytest.raises(ValueError, match=r"No spot among those that `obs\['none'\]` chooses has both a measured and"):
        stp.pl.scatter(sdata, "ERBB2", spots="none")
    table.X = None
    with pytest.raises(ValueError, match=r"The table has no `X` to draw against; name one of \['nsl'\] with `layer`"):
        stp.pl.scatter(sdata, "ERBB2")
    assert not plt.get_fignums()
