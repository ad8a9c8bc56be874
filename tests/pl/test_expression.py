from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.cbook import is_math_text  # type: ignore[attr-defined]
from matplotlib.collections import Collection, PatchCollection, PathCollection
from matplotlib.colors import Normalize
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar  # type: ignore[import-untyped]
from scipy.stats import pearsonr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Scale

import stpredict as stp

MakeSData = Callable[[], SpatialData]
Unchanged = Callable[[SpatialData], AbstractContextManager[None]]
GENE = "ERBB2"


@pytest.fixture(scope="module")
def drawn(predicted_sdata: MakeSData) -> tuple[AnnData, np.ndarray]:
    """The table, and the picture that is drawn by default."""
    sdata = predicted_sdata()
    return sdata["table"], stp.pl.expression(sdata, GENE)


@pytest.fixture
def sdata(predicted_sdata: MakeSData) -> SpatialData:
    return predicted_sdata()


@pytest.fixture
def only_predicted(sdata: SpatialData) -> SpatialData:
    """Without expression, so that there are half as many panels."""
    sdata["table"].X = None
    return sdata


def _values(table: AnnData, section: str, layer: str | None) -> np.ndarray:
    """Values of the gene in the order of the section's rows in the table."""
    of_section = table[(table.obs["section"] == section).to_numpy(), GENE]
    return np.asarray(of_section.X if layer is None else of_section.layers[layer], dtype=float).ravel()


def _spots(ax: Axes) -> list[Collection]:
    """Circles, which are patches in spatialdata-plot 0.4.0 and paths in 0.4.3."""
    return [artist for artist in ax.collections if isinstance(artist, PatchCollection | PathCollection)]


def _faces(spots: Collection) -> np.ndarray:
    return np.asarray(spots.get_facecolor())


def _bars(axes: np.ndarray) -> list[Axes]:
    return [ax for ax in axes.flat[0].figure.axes if ax not in axes.ravel().tolist()]


def _assert_colors(ax: Axes, values: np.ndarray, norm: Normalize, cmap: str = "viridis") -> None:
    (spots,) = _spots(ax)
    np.testing.assert_allclose(_faces(spots), mpl.colormaps[cmap](norm(values)))


def _shared_norm(table: AnnData) -> Normalize:
    ends = [np.percentile(np.concatenate([_values(table, s, layer) for s in "AB"]), (5, 95)) for layer in (None, "nsl")]
    return Normalize(min(end[0] for end in ends), max(end[1] for end in ends))


def test_a_row_for_each_section_and_one_color_scale(drawn: tuple[AnnData, np.ndarray]) -> None:
    table, axes = drawn
    assert axes.shape == (2, 2)
    norm = _shared_norm(table)
    for name, row in zip("AB", axes, strict=True):
        for layer, ax in zip((None, "nsl"), row, strict=True):
            _assert_colors(ax, _values(table, name, layer), norm)
    (bar,) = _bars(axes)
    assert bar.get_ylabel() == f"{GENE} expression"
    mappable = bar._colorbar  # type: ignore[attr-defined]
    assert (mappable.vmin, mappable.vmax) == (norm.vmin, norm.vmax)
    assert mappable.extend == "both"


def test_every_spot_has_its_own_color(drawn: tuple[AnnData, np.ndarray]) -> None:
    table, axes = drawn
    norm = _shared_norm(table)
    (spots,) = _spots(axes[1, 1])
    for path, color in zip(spots.get_paths(), _faces(spots), strict=True):
        x, y = path.get_extents().get_points().mean(axis=0) / 0.5  # to pixels
        spot = f"B{round((y - 50) / 40) * 8 + round((x - 60) / 40)}"
        np.testing.assert_allclose(color, mpl.colormaps["viridis"](norm(table[spot, GENE].layers["nsl"].item())))


def test_titles_say_the_pcc_and_what_was_fitted_to(drawn: tuple[AnnData, np.ndarray]) -> None:
    table, axes = drawn
    for name, kind, row in zip("AB", ("training fit", "held out"), axes, strict=True):
        pcc = pearsonr(*(_values(table, name, layer) for layer in (None, "nsl"))).statistic
        assert row[0].get_title() == f"{name}_spots · {GENE} measured\n48 spots"
        assert row[1].get_title() == f"{name}_spots · {GENE} predicted\n{kind} · PCC {pcc:.2f}"


def test_scale_bar_where_the_scale_is_known(drawn: tuple[AnnData, np.ndarray], only_predicted: SpatialData) -> None:
    def bars(ax: Axes) -> list[AnchoredSizeBar]:
        return [artist for artist in ax.artists if isinstance(artist, AnchoredSizeBar)]

    _, axes = drawn
    (bar,) = bars(axes[0, 0])  # 1 µm per unit, 170 µm in all
    assert bar.txt_label.get_text() == "50 µm"
    assert bar.size_bar.get_children()[0].get_width() == pytest.approx(50)
    assert not bars(axes[0, 1])
    del only_predicted["table"].uns["stage"]["mpp"]["A_spots"]
    assert not bars(stp.pl.expression(only_predicted, GENE, sections="A_spots")[0, 0])


def test_each_panel_its_own_scale(sdata: SpatialData) -> None:
    axes = stp.pl.expression(sdata, GENE, sections="B_spots", shared_scale=False, cmap="magma")
    for layer, ax in zip((None, "nsl"), axes[0], strict=True):
        values = _values(sdata["table"], "B", layer)
        _assert_colors(ax, values, Normalize(*np.percentile(values, (5, 95))), "magma")
    assert len(_bars(axes)) == 2


def test_given_ends_of_the_scale_and_layer(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["logged"] = table.X + 10
    axes = stp.pl.expression(sdata, GENE, layer="logged", sections="A_spots", vmin=0, vmax=100)
    _assert_colors(axes[0, 0], _values(table, "A", "logged"), Normalize(0, 100))
    assert _bars(axes)[0]._colorbar.extend == "neither"  # type: ignore[attr-defined]


def test_constant_predictions(sdata: SpatialData) -> None:
    sdata["table"].layers["nsl"][:] = 2
    axes = stp.pl.expression(sdata, GENE, sections="A_spots", shared_scale=False)
    assert axes[0, 1].get_title().endswith("PCC undefined")
    _assert_colors(axes[0, 1], np.full(48, 2.0), Normalize(2, 3))


def test_spots_without_a_value_are_empty_circles(sdata: SpatialData) -> None:
    table = sdata["table"]
    for spot in ("B3", "B11", "B40"):
        table.layers["nsl"][table.obs_names.get_loc(spot), table.var_names.get_loc(GENE)] = np.nan
    axes = stp.pl.expression(sdata, GENE, sections="B_spots")
    filled, empty, *_ = _spots(axes[0, 1])
    known = _values(table, "B", "nsl")
    assert len(filled.get_paths()) == np.isfinite(known).sum() == 45
    assert len(empty.get_paths()) == 3
    np.testing.assert_array_equal(_faces(empty)[:, 3], 0)
    assert (np.asarray(empty.get_edgecolor())[:, 3] > 0).all()
    assert axes[0, 1].get_legend().get_texts()[0].get_text() == "no value (3 spots)"
    assert axes[0, 0].get_legend() is None
    both = np.isfinite(known)
    pcc = pearsonr(_values(table, "B", None)[both], known[both]).statistic
    assert axes[0, 1].get_title().endswith(f"PCC {pcc:.2f}")


def test_spots_beside_the_tissue_do_not_count(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.obs["in_tissue"] = (np.arange(96) % 3 > 0).astype(int)
    axes = stp.pl.expression(sdata, GENE, sections="B_spots")
    inside = table.obs["in_tissue"][table.obs["section"] == "B"].to_numpy() == 1
    pcc = pearsonr(*(_values(table, "B", layer)[inside] for layer in (None, "nsl"))).statistic
    assert axes[0, 1].get_title().endswith(f"held out · PCC {pcc:.2f}")


@pytest.mark.parametrize("shared_scale", [True, False])
def test_a_section_without_any_value(only_predicted: SpatialData, shared_scale: bool) -> None:
    table = only_predicted["table"]
    table.layers["nsl"][(table.obs["section"] == "B").to_numpy()] = np.nan
    ax = stp.pl.expression(only_predicted, GENE, sections="B_spots", shared_scale=shared_scale)[0, 0]
    assert ax.get_legend().get_texts()[0].get_text() == "no value (48 spots)"


def test_only_predictions_of_sections_in_the_order_given(only_predicted: SpatialData) -> None:
    axes = stp.pl.expression(only_predicted, GENE, sections=["B", "A_spots"], section_key="section")
    assert axes.shape == (2, 1)
    assert [ax.get_title() for ax in axes.flat] == [
        f"B · {GENE} predicted\nheld out",
        f"A · {GENE} predicted\ntraining fit",
    ]


def test_panels_show_the_spots_and_the_tissue_behind_them(only_predicted: SpatialData) -> None:
    only_predicted.shapes["A_spots"] = only_predicted.shapes["A_spots"].iloc[:9]  # a row of 8, and one of the next
    ax = stp.pl.expression(only_predicted, GENE, sections="A_spots", alpha=0.25, img_alpha=0.1)[0, 0]
    # In micrometers: centers from (30, 25) to (170, 45), a radius of 5 and a diameter of room.
    assert ax.get_xlim() == pytest.approx((30 - 15, 170 + 15))
    bottom, top = ax.get_ylim()
    assert top == pytest.approx(25 - 15)
    assert 45 + 15 < bottom < 45 + 15 + 10
    (tissue,) = ax.images
    assert tissue.get_array().shape[2] == 3
    assert tissue.get_alpha() == 0.1
    np.testing.assert_allclose(_faces(_spots(ax)[0])[:, 3], 0.25)
    assert not ax.axison


def test_size(drawn: tuple[AnnData, np.ndarray], only_predicted: SpatialData) -> None:
    def width(ax: Axes) -> float:
        return float(np.ptp(np.asarray(_spots(ax)[0].get_paths()[0].vertices)[:, 0]))

    assert width(drawn[1][0, 0]) == pytest.approx(0.75 * 20)  # of a pitch of 20 µm
    assert width(stp.pl.expression(only_predicted, GENE, sections="A_spots", size=1)[0, 0]) == pytest.approx(10)


def test_given_axes(only_predicted: SpatialData) -> None:
    _, given = plt.subplots(1, 2)
    axes = stp.pl.expression(only_predicted, GENE, ax=given)
    assert axes.ravel().tolist() == given.tolist()
    assert len(plt.get_fignums()) == 1
    with pytest.raises(ValueError, match="`ax` has 1 axes; this picture has 2 panels"):
        stp.pl.expression(only_predicted, GENE, ax=given[0])


@pytest.mark.parametrize("genes", [["KRT19", "A$B$"], np.array([True, False, True, False]), "panel"])
def test_several_genes(only_predicted: SpatialData, genes: Any) -> None:
    table = only_predicted["table"]
    table.var_names = ["A$B$", "ERBB2", "KRT19", "other"]
    table.var["panel"] = table.var_names != "ERBB2"
    table.var.loc["other", "panel"] = False
    axes = stp.pl.expression(only_predicted, genes, sections="B_spots")
    titles = [ax.get_title().replace(r"\$", "$").split("\n")[0] for ax in axes.flat]
    names = genes if isinstance(genes, list) else ["A$B$", "KRT19"]
    assert titles == [f"B_spots · {name} predicted" for name in names]
    texts = [axes.flat[0].get_title(), axes.flat[1].get_title(), *(bar.get_ylabel() for bar in _bars(axes))]
    assert len(texts) == 4 and not any(is_math_text(text) for text in texts)


def test_many_spots_in_any_coordinate_system() -> None:
    n = 10_001
    xy = np.indices((101, 100)).reshape(2, -1).T[:n] * 6.0 + 3
    system = {"micrometers": Scale([0.5, 0.5], axes=("x", "y"))}
    obs = pd.DataFrame({"region": pd.Categorical(["spots"] * n), "spot": np.arange(n)}, index=np.arange(n).astype(str))
    table = AnnData(obs=obs, var=pd.DataFrame(index=["g"]), layers={"nsl": xy[:, :1].astype(np.float32)})
    sdata = SpatialData(
        images={
            "image": Image2DModel.parse(
                np.full((3, 620, 620), 200, np.uint8),
                dims=("c", "y", "x"),
                c_coords=["r", "g", "b"],
                transformations=system,
            )
        },
        shapes={"spots": ShapesModel.parse(xy, geometry=0, radius=2.0, transformations=system)},
        tables={"table": TableModel.parse(table, region="spots", region_key="region", instance_key="spot")},
    )
    ax = stp.pl.expression(sdata, "g", vmin=0, vmax=606)[0, 0]
    (spots,) = _spots(ax)
    assert len(spots.get_paths()) == n
    ends = np.array([path.get_extents().get_points().mean(axis=0) for path in spots.get_paths()[:: n - 1]])
    np.testing.assert_allclose(ends, xy[[0, -1]] * 0.5, atol=1e-6)
    np.testing.assert_allclose(_faces(spots)[[0, -1]], mpl.colormaps["viridis"](xy[[0, -1], 0] / 606))
    assert ax.get_xlim() == pytest.approx((1.5 - 3, 301.5 + 3))


def test_nothing_is_changed(sdata: SpatialData, unchanged: Unchanged) -> None:
    with unchanged(sdata):
        stp.pl.expression(sdata, GENE, sections="B_spots")


def test_after_a_round_trip_through_zarr(only_predicted: SpatialData, tmp_path: Path) -> None:
    only_predicted.write(tmp_path / "s.zarr")
    read = sd.read_zarr(tmp_path / "s.zarr")
    ours, theirs = (stp.pl.expression(s, GENE, sections="A_spots")[0, 0] for s in (only_predicted, read))
    assert ours.get_title() == theirs.get_title()
    np.testing.assert_array_equal(_faces(_spots(ours)[0]), _faces(_spots(theirs)[0]))
    np.testing.assert_array_equal(ours.images[0].get_array(), theirs.images[0].get_array())
    stains, again = (stp.pl.stains(s, ["KRT19"]) for s in (only_predicted, read))
    for one, other in zip(stains.flat, again.flat, strict=True):
        assert one.get_title() == other.get_title()
        assert [text.get_text() for text in one.texts] == [text.get_text() for text in other.texts]


def test_errors_say_what_there_is(sdata: SpatialData) -> None:
    with pytest.raises(KeyError, match=r"No predictions 'm2ost' in `layers`; it has \['nsl'\].*stp.tl.fit_nsl"):
        stp.pl.expression(sdata, GENE, key="m2ost")
    with pytest.raises(KeyError, match="No gene 'erbb2' in `var_names`; it has 4, such as .*'ERBB2'"):
        stp.pl.expression(sdata, "erbb2")
    with pytest.raises(ValueError, match=r"'other' is in the table but was not modeled.* 3 genes, such as \['ACTB'"):
        stp.pl.expression(sdata, "other")
    with pytest.raises(KeyError, match=r"No measured expression 'raw'; the table has \['X', 'nsl'\]"):
        stp.pl.expression(sdata, GENE, layer="raw")
    with pytest.raises(KeyError, match=r"`sections` is \['C'\]; expected one or more of \['A_spots', 'B_spots'\]"):
        stp.pl.expression(sdata, GENE, sections="C")
    with pytest.raises(TypeError, match="Expected a SpatialData, got AnnData"):
        stp.pl.expression(sdata["table"], GENE)
    assert not plt.get_fignums()
