from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import spatialdata as sd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar  # type: ignore[import-untyped]
from scipy.stats import pearsonr
from spatialdata import SpatialData

import stpredict as stp

MakeSData = Callable[[], SpatialData]
Unchanged = Callable[[SpatialData], AbstractContextManager[None]]
GENE = "ERBB2"


def _values(table: AnnData, section: str, layer: str | None) -> np.ndarray:
    """Values of the gene in the order of the section's rows in the table."""
    of_section = table[(table.obs["section"] == section).to_numpy(), GENE]
    return np.asarray(of_section.X if layer is None else of_section.layers[layer], dtype=float).ravel()


def _spots(ax: Axes) -> list[PatchCollection]:
    return [artist for artist in ax.collections if isinstance(artist, PatchCollection)]


def _faces(spots: PatchCollection) -> np.ndarray:
    return np.asarray(spots.get_facecolor())


def _bars(axes: np.ndarray) -> list[Axes]:
    return [ax for ax in axes.flat[0].figure.axes if ax not in axes.ravel().tolist()]


def _assert_colors(ax: Axes, values: np.ndarray, norm: Normalize, cmap: str = "viridis") -> None:
    (spots,) = _spots(ax)
    np.testing.assert_allclose(_faces(spots), mpl.colormaps[cmap](norm(values)))


def _shared_norm(table: AnnData) -> Normalize:
    ends = [np.percentile(np.concatenate([_values(table, s, layer) for s in "AB"]), (5, 95)) for layer in (None, "nsl")]
    return Normalize(min(end[0] for end in ends), max(end[1] for end in ends))


def test_a_row_for_each_section_and_one_color_scale(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    axes = stp.pl.expression(sdata, GENE)
    assert axes.shape == (2, 2)
    table = sdata["table"]
    norm = _shared_norm(table)
    for name, row in zip("AB", axes, strict=True):
        for layer, ax in zip((None, "nsl"), row, strict=True):
            _assert_colors(ax, _values(table, name, layer), norm)
    (bar,) = _bars(axes)
    assert bar.get_ylabel() == f"{GENE} expression"
    mappable = bar._colorbar  # type: ignore[attr-defined]
    assert (mappable.vmin, mappable.vmax) == (norm.vmin, norm.vmax)
    assert mappable.extend == "both"


def test_every_spot_has_its_own_color(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    table = sdata["table"]
    norm = Normalize(0, 5)
    (spots,) = _spots(stp.pl.expression(sdata, GENE, sections="B", vmin=0, vmax=5)[0, 1])
    for path, color in zip(spots.get_paths(), _faces(spots), strict=True):
        x, y = path.get_extents().get_points().mean(axis=0) / 0.5  # to pixels
        spot = f"B{round((y - 50) / 40) * 8 + round((x - 60) / 40)}"
        np.testing.assert_allclose(color, mpl.colormaps["viridis"](norm(table[spot, GENE].layers["nsl"].item())))


def test_each_panel_its_own_scale(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    axes = stp.pl.expression(sdata, GENE, shared_scale=False, cmap="magma")
    for name, row in zip("AB", axes, strict=True):
        for layer, ax in zip((None, "nsl"), row, strict=True):
            values = _values(sdata["table"], name, layer)
            _assert_colors(ax, values, Normalize(*np.percentile(values, (5, 95))), "magma")
    assert len(_bars(axes)) == 4


def test_given_ends_of_the_scale(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    axes = stp.pl.expression(sdata, GENE, sections="A", vmin=0, vmax=100)
    _assert_colors(axes[0, 0], _values(sdata["table"], "A", None), Normalize(0, 100))
    assert _bars(axes)[0]._colorbar.extend == "neither"  # type: ignore[attr-defined]


def test_titles_say_the_pcc_and_what_was_fitted_to(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    axes = stp.pl.expression(sdata, GENE)
    for name, kind, row in zip("AB", ("training fit", "held out"), axes, strict=True):
        pcc = pearsonr(*(_values(sdata["table"], name, layer) for layer in (None, "nsl"))).statistic
        assert row[0].get_title() == f"{name} · {GENE} measured\n48 spots"
        assert row[1].get_title() == f"{name} · {GENE} predicted\n{kind} · PCC {pcc:.2f}"


def test_negative_and_undefined_pcc(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    table = sdata["table"]
    j = table.var_names.get_loc(GENE)
    table.layers["nsl"][:, j] = -table.X[:, j]
    assert stp.pl.expression(sdata, GENE, sections="A")[0, 1].get_title().endswith("PCC −1.00")
    x = table.X[(table.obs["section"] == "A").to_numpy(), j]
    table.layers["nsl"][(table.obs["section"] == "A").to_numpy(), j] = _almost_uncorrelated(x)
    assert stp.pl.expression(sdata, GENE, sections="A")[0, 1].get_title().endswith("PCC 0.00")  # not −0.00
    table.layers["nsl"][:, j] = 2
    axes = stp.pl.expression(sdata, GENE, sections="A", shared_scale=False)
    assert axes[0, 1].get_title().endswith("PCC undefined")
    _assert_colors(axes[0, 1], np.full(48, 2.0), Normalize(2, 3))


def test_noise_ceiling_beside_the_pcc(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    before = [ax.get_title() for ax in stp.pl.expression(sdata, GENE)[:, 1]]
    sdata["table"].uns["noise_ceiling"] = {
        "genes": np.array(["KRT19", GENE], dtype=object),
        "sections": np.array(["B", "A"], dtype=object),
        "halves_pcc": np.array([[0.05, 0.495], [0.05, 0.242]]),
        "halves_error": np.array([[0.1, 0.02], [0.1, 0.02]]),
    }
    after = [ax.get_title() for ax in stp.pl.expression(sdata, GENE)[:, 1]]
    assert after == [f"{before[0]} of at most 0.62", f"{before[1]} of at most 0.81"]
    # A ceiling that is not told from none is none.
    assert "at most" not in stp.pl.expression(sdata, "KRT19", sections="A")[0, 1].get_title()
    assert "at most" not in stp.pl.expression(sdata, "ACTB", sections="A")[0, 1].get_title()


def _almost_uncorrelated(x: np.ndarray) -> np.ndarray:
    """A vector whose PCC with x is −0.001."""
    x = (x - x.mean()) / x.std()
    other = np.random.default_rng(0).normal(size=len(x))
    other -= other.mean() + x * (x @ other) / len(x)
    return 5 + other / other.std() - 0.001 * x


@pytest.mark.parametrize(
    ("train_key", "n_train", "marked", "expected"),
    [
        ("train", 48, "A", {"A": "training fit · ", "B": "held out · "}),
        # The column has changed since the fit, or the table was cut: nothing is called held out on its word.
        ("train", 60, "A", {"A": "training fit · ", "B": ""}),
        ("train", 49, "A and one", {"A": "training fit · ", "B": "partly training · "}),
        ("missing", 48, "A", {"A": "", "B": ""}),
        # Fitted to all spots: of this table, of another one.
        ("", 96, "A", {"A": "training fit · ", "B": "training fit · "}),
        ("", 500, "A", {"A": "", "B": ""}),
    ],
)
def test_held_out_is_only_said_when_it_is_known(
    predicted_sdata: MakeSData, train_key: str, n_train: int, marked: str, expected: dict[str, str]
) -> None:
    sdata = predicted_sdata()
    table = sdata["table"]
    table.uns["nsl"]["params"] |= {"train_key": train_key, "n_train": n_train}
    if marked == "A and one":
        table.obs.loc["B7", "train"] = True
    for name, row in zip("AB", stp.pl.expression(sdata, GENE), strict=True):
        assert row[1].get_title().split("\n")[1].startswith(f"{expected[name]}PCC")


def test_a_layer_that_no_model_wrote_claims_nothing(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    sdata["table"].layers["truth"] = sdata["table"].layers["nsl"]
    title = stp.pl.expression(sdata, GENE, key="truth", sections="B")[0, 1].get_title()
    assert title.split("\n")[1].startswith("PCC")


def test_spots_without_a_value_are_empty_circles(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    table = sdata["table"]
    for spot in ("B3", "B11", "B40"):
        table.layers["nsl"][table.obs_names.get_loc(spot), table.var_names.get_loc(GENE)] = np.nan
    axes = stp.pl.expression(sdata, GENE)
    filled, empty, *_ = _spots(axes[1, 1])
    known = _values(table, "B", "nsl")
    assert len(filled.get_paths()) == np.isfinite(known).sum() == 45
    assert len(empty.get_paths()) == 3
    np.testing.assert_array_equal(_faces(empty)[:, 3], 0)
    assert (np.asarray(empty.get_edgecolor())[:, 3] > 0).all()
    assert axes[1, 1].get_legend().get_texts()[0].get_text() == "no value (3 spots)"
    assert all(ax.get_legend() is None for ax in (axes[0, 0], axes[0, 1], axes[1, 0]))
    both = np.isfinite(known)
    pcc = pearsonr(_values(table, "B", None)[both], known[both]).statistic
    assert axes[1, 1].get_title().endswith(f"PCC {pcc:.2f}")


def test_a_section_without_any_value(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    table = sdata["table"]
    table.layers["nsl"][(table.obs["section"] == "B").to_numpy()] = np.nan
    ax = stp.pl.expression(sdata, GENE)[1, 1]
    assert ax.get_legend().get_texts()[0].get_text() == "no value (48 spots)"
    assert ax.get_title().endswith("PCC undefined")
    stp.pl.expression(sdata, GENE, shared_scale=False)


def test_only_predictions(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    sdata["table"].X = None
    axes = stp.pl.expression(sdata, GENE)
    assert axes.shape == (2, 1)
    assert [ax.get_title() for ax in axes.flat] == [
        f"A · {GENE} predicted\ntraining fit",
        f"B · {GENE} predicted\nheld out",
    ]


def test_measured_is_what_was_fitted_to(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    table = sdata["table"]
    table.layers["logged"] = table.X + 10
    table.uns["nsl"]["params"]["layer"] = "logged"
    chosen = stp.pl.expression(sdata, GENE, sections="A", vmin=0, vmax=20)
    _assert_colors(chosen[0, 0], _values(table, "A", "logged"), Normalize(0, 20))
    asked = stp.pl.expression(sdata, GENE, sections="A", layer="X", vmin=0, vmax=20)
    _assert_colors(asked[0, 0], _values(table, "A", None), Normalize(0, 20))


def test_sections_are_chosen_by_name_or_key_in_the_order_given(predicted_sdata: MakeSData) -> None:
    axes = stp.pl.expression(predicted_sdata(), GENE, sections=["B", "A_spots"])
    assert [row[0].get_title()[0] for row in axes] == ["B", "A"]
    assert stp.pl.expression(predicted_sdata(), GENE, shapes_key="B_spots").shape == (1, 2)


def test_sections_without_a_name_are_called_by_their_key(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    del sdata["table"].obs["section"]
    assert stp.pl.expression(sdata, GENE)[0, 0].get_title().startswith("A_spots · ")


def test_panels_show_the_spots_and_the_tissue_behind_them(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    sdata.shapes["A_spots"] = sdata.shapes["A_spots"].iloc[:9]  # the first row of 8, and one of the second
    ax = stp.pl.expression(sdata, GENE, sections="A")[0, 0]
    # In micrometres: centres from (30, 25) to (170, 45), a radius of 5 and a diameter of room.
    assert ax.get_xlim() == pytest.approx((30 - 15, 170 + 15))
    bottom, top = ax.get_ylim()
    assert top == pytest.approx(25 - 15)
    assert 45 + 15 < bottom < 45 + 15 + 10
    (tissue,) = ax.images
    assert tissue.get_array().shape[2] == 3
    assert tissue.get_alpha() == 0.5
    assert not ax.axison


def test_size_and_opacity(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()

    def width(**style: float) -> float:
        (spots,) = _spots(stp.pl.expression(sdata, GENE, sections="A", **style)[0, 0])  # type: ignore[arg-type]
        return float(np.ptp(np.asarray(spots.get_paths()[0].vertices)[:, 0]))

    assert width(size=1) == pytest.approx(10)
    assert width() == pytest.approx(0.75 * 20)  # of a pitch of 20 µm
    axes = stp.pl.expression(sdata, GENE, alpha=0.25, img_alpha=0.1)
    np.testing.assert_allclose(_faces(_spots(axes[0, 0])[0])[:, 3], 0.25)
    assert axes[0, 0].images[0].get_alpha() == 0.1


def test_scale_bar_where_the_scale_is_known(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()

    def bars(ax: Axes) -> list[AnchoredSizeBar]:
        return [artist for artist in ax.artists if isinstance(artist, AnchoredSizeBar)]

    sdata["table"].uns["stage"]["mpp"]["A"] = 1.0  # 2 µm per unit, 340 µm in all
    axes = stp.pl.expression(sdata, GENE)
    (bar,) = bars(axes[0, 0])
    assert bar.txt_label.get_text() == "100 µm"
    assert bar.size_bar.get_children()[0].get_width() == pytest.approx(50)
    assert not bars(axes[0, 1])
    del sdata["table"].uns["stage"]
    assert not bars(stp.pl.expression(sdata, GENE)[0, 0])


def test_given_axes(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    _, given = plt.subplots(1, 4)
    axes = stp.pl.expression(sdata, GENE, ax=given)
    assert axes.ravel().tolist() == given.tolist()
    assert len(plt.get_fignums()) == 1
    with pytest.raises(ValueError, match="`ax` has 1 axes; this picture has 4 panels"):
        stp.pl.expression(sdata, GENE, ax=given[0])


def test_nothing_is_changed(predicted_sdata: MakeSData, unchanged: Unchanged) -> None:
    sdata = predicted_sdata()
    with unchanged(sdata):
        stp.pl.expression(sdata, GENE)


def test_after_a_round_trip_through_zarr(predicted_sdata: MakeSData, tmp_path: Path) -> None:
    sdata = predicted_sdata()
    sdata.write(tmp_path / "s.zarr")
    read = sd.read_zarr(tmp_path / "s.zarr")
    before, after = (stp.pl.expression(s, GENE) for s in (sdata, read))
    for ours, theirs in zip(before.flat, after.flat, strict=True):
        assert ours.get_title() == theirs.get_title()
        np.testing.assert_array_equal(_faces(_spots(ours)[0]), _faces(_spots(theirs)[0]))
        np.testing.assert_array_equal(ours.images[0].get_array(), theirs.images[0].get_array())


def test_errors_say_what_there_is(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    with pytest.raises(KeyError, match=r"No predictions 'm2ost' in `layers`; it has \['nsl'\].*stp.tl.fit_nsl"):
        stp.pl.expression(sdata, GENE, key="m2ost")
    with pytest.raises(KeyError, match="No gene 'erbb2' in `var_names`; it has 4, such as .*'ERBB2'"):
        stp.pl.expression(sdata, "erbb2")
    with pytest.raises(ValueError, match=r"'other' is in the table but was not modelled.*3 genes, such as \['ACTB'"):
        stp.pl.expression(sdata, "other")
    with pytest.raises(KeyError, match=r"No measured expression 'raw'; the table has \['X', 'nsl'\]"):
        stp.pl.expression(sdata, GENE, layer="raw")
    with pytest.raises(KeyError, match=r"`sections` is \['C'\]; expected one or more of \['A', 'B'\]"):
        stp.pl.expression(sdata, GENE, sections="C")
    with pytest.raises(TypeError, match="Expected a SpatialData, got AnnData"):
        stp.pl.expression(sdata["table"], GENE)
    assert not plt.get_fignums()
