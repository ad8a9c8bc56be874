from __future__ import annotations

import io
from collections.abc import Callable
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
from stpredict._data.slide import Section
from stpredict.pp import _statistics, _tiles
from stpredict.pp._pass import read_pixels
from stpredict.pp._statistics import StatisticsReads

Placements = dict[str, tuple[BaseTransformation, np.ndarray]]
MakeSData = Callable[..., SpatialData]
NewSection = Callable[..., Section]
SMALL: dict[str, Any] = {"size": (150, 190), "n_spots": 12, "n_genes": 3, "chunks": (3, 64, 100)}


def count(sdata: SpatialData, **options: Any) -> pd.DataFrame:
    statistics = stp.pp.color_statistics(sdata, inplace=False, **options)
    assert statistics is not None
    return statistics


def brute_force(section: Section, scales: tuple[float, ...]) -> np.ndarray:
    """The statistics of a section, from the pixels of each field found one by one."""
    image = section.pixels.compute()
    y, x = np.mgrid[: image.shape[1], : image.shape[2]] + 0.5
    to_shapes = np.linalg.inv(section.affine)
    own_x = to_shapes[0, 0] * x + to_shapes[0, 1] * y + to_shapes[0, 2]
    own_y = to_shapes[1, 0] * x + to_shapes[1, 1] * y + to_shapes[1, 2]
    rows = []
    for center, radius in zip(section.xy, section.radii, strict=True):
        distance = np.hypot(own_x - center[0], own_y - center[1])
        row = []
        for scale in scales:
            for channel in -np.log((image[:, distance <= scale * radius].astype(float) + 1) / 256):
                ordered = np.sort(channel)
                deciles = [ordered[(k * len(ordered) + 9) // 10 - 1] for k in range(1, 10)]
                row += [channel.mean(), channel.std(), *deciles]
        rows.append(row)
    return np.array(rows)


def test_all_pixels_of_each_field_and_no_other(new_section: NewSection, placements: Placements) -> None:
    reads = StatisticsReads((0.5, 1.3, 4.0))
    rng = np.random.default_rng(0)
    pixels = da.from_array(rng.integers(0, 256, (3, 80, 90), dtype=np.uint8), chunks=(3, 50, 37))
    centers = np.array([[45.2137, 38.9071], [3.1137, 5.4071], [70.6137, 79.1071]])
    matrices = [matrix for _, matrix in placements.values()]
    for i, image_matrix in enumerate(matrices):
        to_pixels = np.linalg.inv(image_matrix) @ matrices[(i + 3) % len(matrices)]
        to_shapes = np.linalg.inv(to_pixels)
        xy = centers @ to_shapes[:2, :2].T + to_shapes[:2, 2]
        section = new_section(pixels, xy, 9 * np.sqrt(abs(np.linalg.det(to_shapes))), affine=to_pixels)
        found = read_pixels([section], [reads], 3)[reads].values
        np.testing.assert_allclose(found, brute_force(section, reads.spot_scales), rtol=0, atol=1e-6)


def test_names_say_what_the_columns_are(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    found = count(sdata, spot_scale=(0.5, 2))
    assert len(found.columns) == 66
    assert list(found.index) == list(sdata["table"].obs_names)
    assert list(found.columns[:3]) == ["red_mean_0.5", "red_sd_0.5", "red_decile1_0.5"]
    assert found.columns[-1] == "blue_decile9_2"
    assert (found["green_decile5_2"] >= found["green_decile4_2"]).all()
    histogram = stp.pp.color_histogram(sdata, spot_scale=2, inplace=False)
    assert histogram is not None
    means = found[["red_mean_2", "green_mean_2", "blue_mean_2"]]
    np.testing.assert_allclose(means, histogram.mean_od, rtol=0, atol=1e-6)


def test_one_color_has_no_spread(new_section: NewSection) -> None:
    reads = StatisticsReads()
    section = new_section(np.full((3, 90, 90), 99, dtype=np.uint8), [[40, 40], [80, 10.3]], 7.0)
    found = read_pixels([section], [reads], 2)[reads].values.reshape(2, -1, 11)
    np.testing.assert_allclose(np.delete(found, 1, axis=2), -np.log(100 / 256), rtol=1e-6)
    assert (found[..., 1] == 0).all()


def test_fields_off_the_image_are_nan(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    set_transformation(sdata["A_spots"], Translation([110, 0], axes=("x", "y")), "A")
    found = count(sdata, spot_scale=(0.5, 6))
    small, large = np.isnan(found["red_mean_0.5"]), np.isnan(found["red_mean_6"])
    assert 0 < large.sum() < small.sum() < 12
    for scale, lost in (("0.5", small), ("6", large)):
        of_field = found[[name for name in found if str(name).endswith(f"_{scale}")]]
        np.testing.assert_array_equal(of_field.isna(), np.repeat(lost.to_numpy()[:, None], 33, axis=1))


def test_rows_follow_the_table_through_several_sections(make_sdata: MakeSData) -> None:
    together = make_sdata(3, n_without_row=4, **SMALL)
    found = count(together, spot_scale=(1, 2))
    for name in "ABC":
        alone = count(together, shapes_key=f"{name}_spots", spot_scale=(1, 2))
        rows = (together["table"].obs["section"] == name).to_numpy()
        pd.testing.assert_frame_equal(alone[rows], found[rows])
        assert alone[~rows].isna().all(axis=None)


# Reading


def test_chunks_schedulers_and_dtypes_do_not_matter(make_sdata: MakeSData, monkeypatch: pytest.MonkeyPatch) -> None:
    sdata = make_sdata(**SMALL)
    expected = count(sdata)
    pixels = sdata["A_image"].data
    for chunks in (((3,), (150,), (190,)), ((1, 1, 1), (7, 143), (170, 20))):
        sdata["A_image"] = Image2DModel.parse(
            pixels.rechunk(chunks), dims=("c", "y", "x"), transformations={"A": Identity()}
        )
        for tile_px in (1, 60, 2048):
            monkeypatch.setattr(_tiles, "_TILE_PX", tile_px)
            pd.testing.assert_frame_equal(count(sdata), expected, check_exact=True)
    monkeypatch.setattr(_tiles, "_TILE_PX", 60)
    for options in ({"scheduler": "synchronous"}, {"scheduler": "threads", "num_workers": 7}):
        with dask.config.set(options):
            pd.testing.assert_frame_equal(count(sdata), expected, check_exact=True)
    deep = make_sdata(dtype="uint16", channels=["a", "b", "g", "r"], alpha=True, scale_factors=[2], **SMALL)
    pd.testing.assert_frame_equal(count(deep), expected, check_exact=True)


def test_pixels_that_are_no_rgb_are_refused(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    image = sdata["A_image"]
    sdata["A_image"] = image.copy(data=image.data.astype(np.uint16) * 16)  # 12 bits
    with pytest.raises(ValueError, match="nowhere brighter than .* of 65535"):
        count(sdata)
    sdata["A_image"] = image.copy(data=image.data.astype(np.int32))
    with pytest.raises(ValueError, match="dtype int32; expected uint8"):
        count(sdata)


def test_spots_smaller_than_a_pixel_are_named(make_sdata: MakeSData, log: io.StringIO) -> None:
    sdata = make_sdata(**SMALL)
    sdata["A_spots"]["radius"] = 0.01
    assert count(sdata, spot_scale=(1, 2)).isna().any(axis=1).sum() > 8
    assert "spots of 'A_spots' are smaller than a pixel of 'A_image'" in log.getvalue()
    assert "choose a larger `spot_scale`" in log.getvalue()


# What is written


def test_slots(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2, **SMALL)
    table = sdata["table"]
    assert stp.pp.color_statistics(sdata, spot_scale=(1, 2.5)) is None
    found = count(sdata, spot_scale=(1, 2.5))
    assert set(table.obsm) == {"color_statistics"}, "and `inplace=False` writes nothing"
    assert table.obsm["color_statistics"].dtype == np.float32
    np.testing.assert_array_equal(table.obsm["color_statistics"], found)
    about = table.uns["color_statistics"]
    assert about["names"].tolist() == list(found.columns)
    assert list(about["reads"]["spot_scales"]) == [1, 2.5]
    table.obsm["mine"] = np.ones((24, 1))
    with pytest.raises(ValueError, match=r"`obsm\['mine'\]` exists and holds no result of stpredict under the key"):
        stp.pp.color_statistics(sdata, key_added="mine")


@pytest.mark.parametrize("scales", [(), (0, 1), (2, 1), (1, 1), (1, np.inf), (1, np.nan), "12", ("1",), ((1, 2),)])
def test_spot_scales_that_are_none(scales: Any) -> None:
    with pytest.raises(ValueError, match="`spot_scale` is .*; expected ascending positive numbers of spot diameters"):
        StatisticsReads(scales)


def test_one_spot_scale() -> None:
    assert StatisticsReads(2.0) == StatisticsReads((2,))  # type: ignore[arg-type]


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
