from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import BaseTransformation, Identity, Translation, set_transformation

import stpredict as stp
from stpredict._data.slide import read_sections
from stpredict.pp import _statistics, _tiles
from stpredict.pp._statistics import cached_color_statistics

Placements = dict[str, tuple[BaseTransformation, np.ndarray]]
MakeSData = Callable[..., SpatialData]


def count(sdata: SpatialData, **options: Any) -> pd.DataFrame:
    statistics = stp.pp.color_statistics(sdata, inplace=False, **options)
    assert statistics is not None
    return statistics


def brute_force(sdata: SpatialData, to_pixels: np.ndarray, fields: tuple[float, ...]) -> np.ndarray:
    """The statistics of section A, from the pixels of each field found one by one."""
    image = sdata["A_image"].data.compute()
    y, x = np.mgrid[: image.shape[1], : image.shape[2]] + 0.5
    to_shapes = np.linalg.inv(to_pixels)
    own_x = to_shapes[0, 0] * x + to_shapes[0, 1] * y + to_shapes[0, 2]
    own_y = to_shapes[1, 0] * x + to_shapes[1, 1] * y + to_shapes[1, 2]
    rows = []
    for spot_id in sdata["table"].obs["spot_id"]:
        spot = sdata["A_spots"].loc[spot_id]
        distance = np.hypot(own_x - spot.geometry.x, own_y - spot.geometry.y)
        row = []
        for field in fields:
            for channel in -np.log((image[:, distance <= field * spot["radius"]].astype(float) + 1) / 256):
                ordered = np.sort(channel)
                deciles = [ordered[(k * len(ordered) + 9) // 10 - 1] for k in range(1, 10)]
                row += [channel.mean(), channel.std(), *deciles]
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("shapes_at", ["identity", "anisotropic", "sequence"])
@pytest.mark.parametrize("image_at", ["identity", "rotation", "flip", "shear"])
def test_all_pixels_of_each_field_and_no_other(
    make_sdata: MakeSData, placements: Placements, image_at: str, shapes_at: str
) -> None:
    fields = (0.5, 1.3, 4.0)
    sdata = make_sdata(size=(130, 170), n_spots=9, image_at=image_at, shapes_at=shapes_at, chunks=(3, 50, 60))
    found = count(sdata, fields=fields)
    to_pixels = np.linalg.inv(placements[image_at][1]) @ placements[shapes_at][1]
    np.testing.assert_allclose(found, brute_force(sdata, to_pixels, fields), rtol=0, atol=1e-6)
    assert list(found.index) == list(sdata["table"].obs_names)


def test_names_say_what_the_columns_are(make_sdata: MakeSData) -> None:
    found = count(make_sdata(), fields=(0.5, 2))
    assert len(found.columns) == 66
    assert list(found.columns[:3]) == ["red_mean_0.5", "red_sd_0.5", "red_decile1_0.5"]
    assert found.columns[-1] == "blue_decile9_2"
    assert (found["green_decile5_2"] >= found["green_decile4_2"]).all()
    histogram = stp.pp.color_histogram(make_sdata(), spot_scale=2, inplace=False)
    assert histogram is not None
    means = found[["red_mean_2", "green_mean_2", "blue_mean_2"]]
    np.testing.assert_allclose(means, histogram.mean_od, rtol=0, atol=1e-6)


def test_one_color_has_no_spread(make_sdata: MakeSData, new_image: Callable[..., Any]) -> None:
    sdata = make_sdata()
    sdata["A_image"] = new_image(np.full((3, 290, 330), 99, dtype=np.uint8), {"A": Identity()})
    found = count(sdata).to_numpy().reshape(30, -1, 11)
    np.testing.assert_allclose(np.delete(found, 1, axis=2), -np.log(100 / 256), rtol=1e-6)
    assert (found[..., 1] == 0).all()


def test_fields_off_the_image_are_nan(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    set_transformation(sdata["A_spots"], Translation([150, 0], axes=("x", "y")), "A")
    found = count(sdata, fields=(0.5, 8))
    small, large = np.isnan(found["red_mean_0.5"]), np.isnan(found["red_mean_8"])
    assert 0 < large.sum() < small.sum() < 30
    for field, lost in (("0.5", small), ("8", large)):
        of_field = found[[name for name in found if str(name).endswith(f"_{field}")]]
        np.testing.assert_array_equal(of_field.isna(), np.repeat(lost.to_numpy()[:, None], 33, axis=1))


def test_rows_follow_the_table_through_several_sections(make_sdata: MakeSData) -> None:
    together = make_sdata(3, n_without_row=4)
    found = count(together)
    for name in "ABC":
        alone = count(together, shapes_key=f"{name}_spots")
        rows = (together["table"].obs["section"] == name).to_numpy()
        pd.testing.assert_frame_equal(alone[rows], found[rows])
        assert alone[~rows].isna().all(axis=None)


# Reading


@pytest.mark.parametrize(
    "chunks", [((3,), (290,), (330,)), ((1, 1, 1), (7, 283), (300, 30)), ((2, 1), (145,) * 2, (33,) * 10)]
)
def test_chunks_do_not_matter(
    make_sdata: MakeSData, monkeypatch: pytest.MonkeyPatch, chunks: tuple[tuple[int, ...], ...]
) -> None:
    sdata = make_sdata()
    expected = count(sdata)
    pixels = sdata["A_image"].data.rechunk(chunks)
    sdata["A_image"] = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations={"A": Identity()})
    for tile_px in (1, 100, 2048):
        monkeypatch.setattr(_tiles, "_TILE_PX", tile_px)
        pd.testing.assert_frame_equal(count(sdata), expected, check_exact=True)


def test_schedulers_do_not_matter(make_sdata: MakeSData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "_TILE_PX", 100)
    sdata = make_sdata(2)
    expected = count(sdata)
    for options in ({"scheduler": "synchronous"}, {"scheduler": "threads", "num_workers": 7}):
        with dask.config.set(options):
            pd.testing.assert_frame_equal(count(sdata), expected, check_exact=True)


def test_equal_pixels_in_every_dtype(make_sdata: MakeSData) -> None:
    expected = count(make_sdata())
    options: list[dict[str, Any]] = [
        {"dtype": "uint16", "channels": ["a", "b", "g", "r"], "alpha": True, "scale_factors": [2]},
        {"dtype": "float32"},
    ]
    for these in options:
        pd.testing.assert_frame_equal(count(make_sdata(**these)), expected, check_exact=True)


def test_pixels_that_are_no_rgb_are_refused(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    image = sdata["A_image"]
    sdata["A_image"] = image.copy(data=image.data.astype(np.uint16) * 16)  # 12 bits
    with pytest.raises(ValueError, match="nowhere brighter than .* of 65535"):
        count(sdata)
    sdata["A_image"] = image.copy(data=image.data.astype(np.int32))
    with pytest.raises(ValueError, match="dtype int32; expected uint8"):
        count(sdata)


def test_spots_smaller_than_a_pixel_are_named(make_sdata: MakeSData, log: io.StringIO) -> None:
    sdata = make_sdata()
    sdata["A_spots"]["radius"] = 0.01
    assert count(sdata, fields=(1, 2)).isna().any(axis=1).sum() > 20
    assert "spots of 'A_spots' are smaller than a pixel of 'A_image'" in log.getvalue()
    assert "choose a larger `fields`" in log.getvalue()


# What is written


def test_slots(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2)
    table = sdata["table"]
    assert stp.pp.color_statistics(sdata, spot_scale=(1, 2.5)) is None
    found = count(sdata, fields=(1, 2.5))
    written = table.obsm["color_statistics"]
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, found)
    about = table.uns["color_statistics"]
    np.testing.assert_array_equal(about["fields"], [1, 2.5])
    assert about["names"].tolist() == list(found.columns)
    assert {name: about["sections"][name]["image_key"] for name in about["sections"]} == {
        "A_spots": "A_image",
        "B_spots": "B_image",
    }
    assert set(table.obsm) == {"color_statistics"}


def test_not_in_place_and_failures_leave_the_table_alone(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    count(sdata)
    assert not sdata["table"].obsm

    def fail(block: np.ndarray) -> np.ndarray:
        raise OSError("the disk is gone")

    image = sdata["A_image"]
    sdata["A_image"] = image.copy(data=image.data.map_blocks(fail, meta=np.empty((0, 0, 0), np.uint8)))
    with pytest.raises(OSError, match="the disk is gone"):
        stp.pp.color_statistics(sdata)
    assert not sdata["table"].obsm
    assert "color_statistics" not in sdata["table"].uns


@pytest.mark.parametrize("fields", [(), 2.0, (0, 1), (2, 1), (1, 1), (1, np.inf), (1, np.nan), "12", ("1",)])
def test_fields_that_are_none(make_sdata: MakeSData, fields: Any) -> None:
    with pytest.raises(ValueError, match="`fields` is .*; expected ascending positive numbers of spot diameters"):
        stp.pp.color_statistics(make_sdata(), spot_scale=fields)


# What is taken from the table


def cached(sdata: SpatialData, fields: tuple[float, ...] = (1, 2)) -> np.ndarray:
    table = sdata["table"]
    return cached_color_statistics(read_sections(sdata, table), table, spot_scales=fields).values


def test_statistics_of_the_same_image_are_taken_from_the_table(
    make_sdata: MakeSData, to_backed: Callable[[SpatialData, Path], SpatialData], tmp_path: Path
) -> None:
    sdata = make_sdata(2)
    stp.pp.color_statistics(sdata, spot_scale=(1, 2))
    sdata["table"].obsm["color_statistics"][:] = 7
    assert (cached(to_backed(sdata, tmp_path / "slide.zarr")) == 7).all()
    assert (cached(sdata) == 7).all()
    assert not (cached(sdata, (1, 3)) == 7).any()
    sdata["B_spots"]["radius"] *= 1.1
    assert not (cached(sdata) == 7).any()


def test_statistics_of_other_images_are_made_anew(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    stp.pp.color_statistics(sdata, spot_scale=(1, 2))
    sdata["table"].obsm["color_statistics"][:] = 7
    sdata["A_image"] = Image2DModel.parse(
        da.zeros((3, 290, 331), dtype=np.uint8), dims=("c", "y", "x"), transformations={"A": Identity()}
    )
    assert (cached(sdata).reshape(30, 6, 11)[..., 1] == 0).all()
    del sdata["table"].obsm["color_statistics"]
    assert (cached(sdata).reshape(30, 6, 11)[..., 1] == 0).all()


# Compiled code


def test_compiled_and_plain_counting_agree() -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (3, 12, 14), dtype=np.uint8)
    centers = np.array([[5.2, 6.1], [13.0, 1.0], [40.0, 5.0]])
    conics = np.tile(np.array([0.06, 0.01, 0.09]), (3, 1)) / np.array([0.3, 1, 2])[:, None, None] ** 2
    half_height = np.sqrt(conics[-1, :, 0] / (conics[-1, :, 0] * conics[-1, :, 2] - conics[-1, :, 1] ** 2))
    arguments = (rgb, 2, 1, centers, conics, half_height)
    compiled = _statistics._count(*arguments)
    np.testing.assert_array_equal(compiled, _statistics._count.py_func(*arguments))
    assert compiled[0].sum(axis=(1, 2)).all()
    od = -np.log((np.arange(256) + 1) / 256)
    np.testing.assert_allclose(
        _statistics._summarize(compiled, od), _statistics._summarize.py_func(compiled, od), atol=1e-12
    )
