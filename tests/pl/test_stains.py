from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import dask.array as da
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Rectangle
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale

import stpredict as stp

MakeSData = Callable[[], SpatialData]
Unchanged = Callable[[SpatialData], AbstractContextManager[None]]


def _texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def _swatches(ax: Axes) -> np.ndarray:
    """``(3, 2, 3)``: hematoxylin, eosin, residual; learned and reference; RGB."""
    colors = [patch.get_facecolor()[:3] for patch in ax.patches if isinstance(patch, Rectangle)]
    return np.array(colors).reshape(3, 2, 3)


def test_a_row_for_each_gene(predicted_sdata: MakeSData) -> None:
    axes = stp.pl.stains(predicted_sdata(), ["ERBB2", "ACTB"])
    assert axes.shape == (2, 5)
    assert [row[0].get_title() for row in axes] == ["ERBB2", "ACTB"]
    assert [ax.get_title() for ax in axes[0, [1, 3, 4]]] == ["weights", "hematoxylin", "eosin"]
    assert stp.pl.stains(predicted_sdata(), "KRT19").shape == (1, 5)


def test_swatches_and_angles(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    learned = sdata["table"].uns["nsl"]
    for ax, i, angle in zip(stp.pl.stains(sdata, ["ACTB", "ERBB2", "KRT19"])[:, 0], range(3), (0, 20, 45), strict=True):
        swatches = _swatches(ax)
        np.testing.assert_allclose(swatches[:, 0], np.exp(-np.maximum(learned["stain_matrix"][i], 0)))
        np.testing.assert_allclose(swatches[:, 1], np.exp(-np.maximum(learned["reference"], 0)))
        assert [text for text in _texts(ax) if text.endswith("°")] == [f"{angle}°", "0°", "0°"]


def test_the_strip_runs_along_the_effective_direction(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    learned = sdata["table"].uns["nsl"]
    axes = stp.pl.stains(sdata, "ERBB2")
    (strip,) = axes[0, 0].images
    od = -np.log(np.asarray(strip.get_array())[0])
    middle = len(od) // 2  # where no channel is clipped at white
    step = od[middle] - od[middle - 1]
    unmix = np.linalg.inv(learned["stain_matrix"][1])[:, :2]
    gradient = unmix @ learned["weights"][1]
    np.testing.assert_allclose(step / np.linalg.norm(step), gradient / np.linalg.norm(gradient), atol=1e-6)
    assert strip.get_extent()[0] < strip.get_extent()[1]
    less, more = (next(text for text in axes[0, 0].texts if text.get_text() == word) for word in ("less", "more"))
    assert less.get_position()[0] < more.get_position()[0]


def test_weights_share_an_axis(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    axes = stp.pl.stains(sdata, ["ACTB", "ERBB2", "KRT19"])
    weights = sdata["table"].uns["nsl"]["weights"]
    for ax, expected in zip(axes[:, 1], weights, strict=True):
        assert [patch.get_width() for patch in ax.patches] == expected.tolist()
        assert ax.get_xlim() == pytest.approx((-3.3, 3.3))
    assert _texts(axes[0, 1]) == ["1", "−2"]


def test_the_patch_is_that_of_the_highest_prediction_whose_patch_is_on_the_image(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    table = sdata["table"]
    j = table.var_names.get_loc("ERBB2")
    table.layers["nsl"][:, j] = np.linspace(0, 1, table.n_obs)
    for spot, value in (("B20", 5), ("A0", 9), ("A33", np.nan)):
        table.layers["nsl"][table.obs_names.get_loc(spot), j] = value
    # The patch of A0 would begin left of the image.
    section = sdata.shapes["A_spots"]
    section.loc["A0", "geometry"] = type(section.geometry.iloc[0])(15.0, 50.0)
    axes = stp.pl.stains(sdata, "ERBB2", section_key="section")
    assert axes[0, 2].get_title() == "B20"  # which says in which section it is
    y, x = 50 + 40 * (20 // 8), 60 + 40 * (20 % 8)
    pixels = sdata.images["B_image"]["scale0"]["image"].to_numpy()[:, y - 20 : y + 20, x - 20 : x + 20]
    np.testing.assert_array_equal(axes[0, 2].images[0].get_array(), pixels.transpose(1, 2, 0))
    (circle,) = [patch for patch in axes[0, 2].patches if isinstance(patch, Circle)]
    assert circle.radius == 10
    assert circle.center == pytest.approx((19.5, 19.5))  # between the four pixels in the middle


def test_the_patch_is_split_by_the_genes_own_stains(predicted_sdata: MakeSData) -> None:
    """Light that hematoxylin and eosin of known amounts have let through comes apart into these amounts."""
    sdata = predicted_sdata()
    stains = sdata["table"].uns["nsl"]["stain_matrix"][1]
    y, x = np.mgrid[:300, :400]
    amounts = np.stack([0.4 + 0.3 * np.sin(x / 9), 0.3 + 0.2 * np.cos(y / 7)], axis=-1)
    rgb = np.rint(256 * np.exp(-(amounts @ stains[:2])) - 1).astype(np.uint8)
    sdata.images["A_image"] = Image2DModel.parse(
        rgb.transpose(2, 0, 1),
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        transformations={"A": Scale([0.5, 0.5], axes=("x", "y"))},
    )
    axes = stp.pl.stains(sdata, "ERBB2", spot="A12")
    assert axes[0, 2].get_title() == "A_spots · A12"
    top, left = 50 + 40 * (12 // 8) - 20, 60 + 40 * (12 % 8) - 20
    for s, ax in enumerate(axes[0, 3:]):
        alone = np.exp(-amounts[top : top + 40, left : left + 40, [s]] * stains[s])
        np.testing.assert_allclose(ax.images[0].get_array(), alone, atol=0.03)


def test_only_the_patch_is_read(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    read = []

    def note(block: np.ndarray, block_info: dict[int, dict[str, tuple[int, ...]]]) -> np.ndarray:
        read.append(block_info[0]["chunk-location"])
        return block

    pixels = da.full((3, 300, 400), 200, dtype=np.uint8, chunks=(3, 100, 100)).map_blocks(note, dtype=np.uint8)
    sdata.images["A_image"] = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations={"A": Scale([0.5, 0.5], ("x", "y"))}
    )
    read.clear()
    stp.pl.stains(sdata, "ACTB", spot="A18")  # at (140, 130)
    assert set(read) == {(0, 1, 1)}


def test_what_a_fit_has_written_can_be_drawn(make_sdata: Callable[..., SpatialData]) -> None:
    sdata = make_sdata(2, n_spots=15, n_genes=4, size=(150, 170))
    table = sdata["table"]
    table.obs["train"] = (table.obs["section"] == "A").to_numpy()
    model = stp.tl.fit_nsl(sdata, genes=["gene0", "gene1"], train_key="train")
    axes = stp.pl.stains(sdata, table.var["nsl_fitted"])
    np.testing.assert_allclose(_swatches(axes[1, 0])[:, 0], np.exp(-np.maximum(model.stain_matrix[1], 0)))
    table.X = None
    titles = [ax.get_title() for ax in stp.pl.expression(sdata, "gene0")[:, 0]]
    assert ["training fit" in title for title in titles] == [True, False]
    assert ["held out" in title for title in titles] == [False, True]


def test_nothing_is_changed(predicted_sdata: MakeSData, unchanged: Unchanged) -> None:
    sdata = predicted_sdata()
    with unchanged(sdata):
        stp.pl.stains(sdata, ["ACTB", "ERBB2"])


def test_given_axes(predicted_sdata: MakeSData) -> None:
    _, given = plt.subplots(5, 1)
    assert stp.pl.stains(predicted_sdata(), "ACTB", ax=given).ravel().tolist() == given.tolist()
    with pytest.raises(ValueError, match="this picture has 10 panels"):
        stp.pl.stains(predicted_sdata(), ["ACTB", "ERBB2"], ax=given)


def test_errors_say_what_there_is(predicted_sdata: MakeSData) -> None:
    sdata = predicted_sdata()
    table = sdata["table"]
    with pytest.raises(KeyError, match=r"No results 'm2ost' in `uns`; it has \['nsl'"):
        stp.pl.stains(sdata, "ACTB", key="m2ost")
    with pytest.raises(ValueError, match=r"`uns\['stage'\]` has no stains"):
        stp.pl.stains(sdata, "ACTB", key="stage")
    with pytest.raises(ValueError, match="'other' is in the table but was not modeled.*3 genes, such as"):
        stp.pl.stains(sdata, "other")
    with pytest.raises(KeyError, match="No gene 'actb'.*3 genes, such as"):
        stp.pl.stains(sdata, "actb")
    with pytest.raises(KeyError, match="No spot 'A99' in `obs_names`"):
        stp.pl.stains(sdata, "ACTB", spot="A99")
    table.layers["nsl"][:, 0] = np.nan
    with pytest.raises(ValueError, match="No spot with a prediction of 'ACTB'"):
        stp.pl.stains(sdata, "ACTB")
    del table.layers["nsl"]
    with pytest.raises(ValueError, match=r"no predictions `layers\['nsl'\]` of 'ACTB'.*Name one with `spot`"):
        stp.pl.stains(sdata, "ACTB")
    section = sdata.shapes["A_spots"]
    section.loc["A0", "geometry"] = type(section.geometry.iloc[0])(15.0, 50.0)
    with pytest.raises(ValueError, match="patch around the spot 'A0' is not wholly on an image"):
        stp.pl.stains(sdata, "ACTB", spot="A0")
