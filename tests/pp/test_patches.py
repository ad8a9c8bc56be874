from __future__ import annotations

import gc
import io
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import ShapesModel
from spatialdata.transformations import BaseTransformation

import stpredict as stp
from stpredict._data.slide import Section, read_sections
from stpredict.pp import _patches, _store
from stpredict.pp._bands import bands
from stpredict.pp._patches import Patches, extract, patches
from stpredict.pp._windows import place_windows

Placements = dict[str, tuple[BaseTransformation, np.ndarray]]
MakeSData = Callable[..., SpatialData]
NAMES = ["identity", "scale", "anisotropic", "translation", "rotation", "flip", "shear", "sequence"]

# Pixels of the image for one of level 0, with FIELD and a spot of 30 pixels: enlarged, plain, and resized.
FIELD, DIAMETER = 1.6, 30.0
SIZES = {0.75: 64, 1.0: 48, 1.5: 32, 2.0: 24, 2.4: 20, 6.0: 8}


def make_section(image: np.ndarray, centers: Any, diameters: Any = DIAMETER, chunks: int = 64) -> Section:
    """Round spots on an image, in pixels."""
    centers = np.asarray(centers, dtype=float)
    numbers = np.arange(len(centers))
    pixels = da.from_array(image, chunks=(3, chunks, chunks))
    radii = np.broadcast_to(np.asarray(diameters, dtype=float) / 2, len(centers))
    return Section("spots", "image", "global", pixels, (0, 1, 2), np.eye(3), centers, radii, numbers, numbers)


def make_image(height: int = 300, width: int = 260, seed: int = 0) -> np.ndarray:
    """Grains of several sizes."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(0, 1, (3, height, width))
    for size in (4, 16, 64):
        coarse = rng.uniform(0, 1, (3, height // size + 1, width // size + 1))
        image += coarse.repeat(size, 1).repeat(size, 2)[:, :height, :width]
    return np.rint(image / image.max() * 255).astype(np.uint8)


def cut(section: Section, image_size: int = 24, levels: int = 3, field: float = FIELD, **options: Any) -> Patches:
    return extract([section], levels=levels, image_size=image_size, spot_scale=field, **options)


def everything(made: Patches) -> np.ndarray:
    return np.array(made[:])


# --- where things are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", SIZES)
def test_every_pixel_shows_its_place(ratio: float) -> None:
    """On a ramp, intensity is position: to half a pixel of the patch, and half a grey level for each rounding."""
    y, x = np.mgrid[:250, :250].astype(np.uint8)
    image = np.stack([x, y, x])
    rng = np.random.default_rng(0)
    centers = rng.uniform(95, 155, (40, 2))
    size = SIZES[ratio]
    found = everything(cut(make_section(image, centers), size)).astype(float)
    for level in range(3):
        scale = ratio * 2**level
        there = centers[..., None] + (np.arange(size) + 0.5 - size / 2) * scale
        on_image = (there > 2 * scale) & (there < 250 - 2 * scale)
        middle = size // 2
        for axis, profile in enumerate((found[:, level, 0, middle], found[:, level, 1, :, middle])):
            # Pixel i covers [i, i + 1): at its centre, i + 0.5, it shows i.
            error = np.abs(profile + 0.5 - there[:, axis])[on_image[:, axis]]
            assert len(error) > 100
            assert error.max() <= 0.5 * scale + 0.5 * (1 + max(np.log2(scale), 0)), (level, axis)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("ratio", SIZES)
@pytest.mark.parametrize(("image_at", "shapes_at"), [*zip(NAMES, NAMES[3:] + NAMES[:3], strict=True)])
def test_dots_are_found_at_every_level(
    image_at: str, shapes_at: str, ratio: float, level: int, placements: Placements, new_image: Callable[..., Any]
) -> None:
    """A dot at a known place in each spot's field, found in the patch to half a pixel."""
    (to_world, image_matrix), (from_shapes, shapes_matrix) = placements[image_at], placements[shapes_at]
    to_shapes = np.linalg.inv(shapes_matrix) @ image_matrix
    size, scale = SIZES[ratio], ratio * 2**level
    rng = np.random.default_rng(0)
    side = max(FIELD * DIAMETER * 2**level, 80)
    grid = np.stack(np.meshgrid(np.arange(1, 4), np.arange(1, 3)), -1).reshape(-1, 2) * side
    centers = grid + rng.uniform(-3, 3, grid.shape)
    dots = centers + rng.uniform(-0.2, 0.2, grid.shape) * FIELD * DIAMETER * 2**level

    width = 1.2 * max(scale, 1)  # standard deviation of a dot
    height_px, width_px = int(3.2 * side), int(4.2 * side)
    y, x = np.mgrid[:height_px, :width_px] + 0.5
    dark = np.max([np.exp(-((x - dx) ** 2 + (y - dy) ** 2) / (2 * width**2)) for dx, dy in dots], axis=0)
    image = np.repeat(np.rint(255 * (1 - 0.9 * dark)).astype(np.uint8)[None], 3, 0)
    xy = centers @ to_shapes[:2, :2].T + to_shapes[:2, 2]
    radius = DIAMETER / 2 * np.sqrt(abs(np.linalg.det(to_shapes[:2, :2])))
    sdata = SpatialData(
        images={"image": new_image(image, {"world": to_world})},
        shapes={"spots": ShapesModel.parse(xy, geometry=0, radius=radius, transformations={"world": from_shapes})},
    )
    made = extract(read_sections(sdata, None), levels=level + 1, image_size=size, spot_scale=FIELD)
    assert len(made) == len(centers)
    expected = (dots - centers) / scale + size / 2
    column, row = np.mgrid[:size, :size][::-1] + 0.5
    for i in range(len(centers)):
        patch = 255.0 - made[i][level, 0]
        near = np.hypot(column - expected[i, 0], row - expected[i, 1]) < 4 * width / scale + 1
        weight = patch * near
        found = np.array([(weight * column).sum(), (weight * row).sum()]) / weight.sum()
        assert np.abs(found - expected[i]).max() <= 0.5, (found, expected[i])


def test_levels_are_nested() -> None:
    """The middle of each level is the level before it, at half its resolution."""
    image = make_image(600, 600)
    found = everything(cut(make_section(image, [[300, 288], [280, 312]], 32), image_size=48, field=1.5)).astype(float)
    for level in (1, 2):
        middle = found[:, level, :, 12:36, 12:36]
        halved = found[:, level - 1].reshape(2, 3, 24, 2, 24, 2).mean((3, 5))
        np.testing.assert_allclose(middle, halved, atol=0.5)


# --- what they show ---------------------------------------------------------------------------------------------------


def triangle_weights(n: int, scale: float) -> np.ndarray:
    """Bilinear interpolation with antialiasing: each output is a weighted mean under a triangle, ``(out, n)``."""
    out = int(n / scale)
    reach = max(scale, 1.0)
    weights = np.zeros((out, n))
    for j in range(out):
        distance = np.abs(np.arange(n) + 0.5 - (j + 0.5) * scale) / reach
        weights[j] = np.maximum(1 - distance, 0)
        weights[j] /= weights[j].sum()
    return weights


@pytest.mark.parametrize("ratio", SIZES)
def test_equal_to_a_slow_reference(ratio: float) -> None:
    """White beyond the image, box averages step by step, then weights written out."""
    image = make_image()
    rng = np.random.default_rng(1)
    centers = rng.uniform(-10, 270, (25, 2))
    section = make_section(image, centers)
    made = cut(section, SIZES[ratio])
    size = SIZES[ratio]
    padding = 1024
    step = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), constant_values=255).astype(float)
    step = step[:, : step.shape[1] // 64 * 64, : step.shape[2] // 64 * 64]
    pyramid = [step]
    for _ in range(5):
        c, h, w = pyramid[-1].shape
        pyramid.append(np.rint(pyramid[-1].reshape(c, h // 2, 2, w // 2, 2).mean((2, 4))))
    windows = place_windows(section, 3, size, FIELD)
    for i, row in enumerate(made.rows):
        for level in range(3):
            k, scale = int(windows.halvings[row, level]), windows.scale[row, level]
            assert k == max(int(np.log2(ratio * 2**level)), 0)
            assert scale * 2**k == pytest.approx(ratio * 2**level)
            (x0, y0), (x1, y1) = windows.first[row, level], windows.stop[row, level]
            origin = padding >> k
            window = pyramid[k][:, y0 + origin : y1 + origin, x0 + origin : x1 + origin]
            if scale == 1:
                np.testing.assert_array_equal(made[i][level], window)
                continue
            x, y = windows.cut[row, level]
            across = triangle_weights(x1 - x0, scale)[x : x + size]
            down = triangle_weights(y1 - y0, scale)[y : y + size]
            assert across.shape[0] == down.shape[0] == size
            np.testing.assert_allclose(made[i][level], down @ window @ across.T, atol=1.6)


def test_averages_neither_brighten_nor_darken() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 512, 512), dtype=np.uint8)
    made = cut(make_section(image, [[256, 256]], 32), image_size=64, field=2, levels=4)
    assert made[0][3].mean() == pytest.approx(image.mean(), abs=0.03)  # eight times coarser, of the whole image


@pytest.mark.parametrize(
    "options", [{"dtype": "uint16"}, {"dtype": "float32"}, {"alpha": True}, {"channels": ["b", "g", "r"]}]
)
def test_other_images_give_the_same_patches(options: dict[str, Any], make_sdata: MakeSData) -> None:
    plain = everything(patches(make_sdata(2), image_size=20))
    np.testing.assert_array_equal(everything(patches(make_sdata(2, **options), image_size=20)), plain)


def test_channels_are_red_green_blue() -> None:
    image = np.zeros((3, 200, 200), dtype=np.uint8)
    image[0], image[1], image[2] = 10, 20, 30
    found = cut(make_section(image, [[100, 100]]), levels=2)[0]
    assert (found == np.array([10, 20, 30])[:, None, None]).all()


# --- the border -------------------------------------------------------------------------------------------------------


def test_white_beyond_the_image_and_coverage() -> None:
    image = np.full((3, 100, 100), 7, dtype=np.uint8)
    section = make_section(image, [[0, 0], [100, 50], [50, 50], [-20, 50], [-30, 50], [50, 124.6], [50, 123.4]])
    made = cut(section, image_size=48)  # a field of 48 pixels, one for one
    np.testing.assert_array_equal(made.rows, [0, 1, 2, 3, 6])
    np.testing.assert_allclose(made.coverage, [1 / 4, 1 / 2, 1, 4 / 48, 1 / 48])
    found = made[:]
    corner = found[0, 0]
    assert (corner[:, 24:, 24:] == 7).all() and (corner[:, :24] == 255).all() and (corner[:, :, :24] == 255).all()
    assert (found[1, 0, :, :, :24] == 7).all() and (found[1, 0, :, :, 24:] == 255).all()
    assert (found[2, 0] == 7).all()
    assert (found[2, 2, :, 12:36, 12:36] == 7).all() and (found[2, 2, :, :11] == 255).all()
    assert (found[4, 0, :, 0] == 7).all() and (found[4, 0, :, 1:] == 255).all()


def test_spots_off_the_image_are_left_out(make_sdata: MakeSData) -> None:
    sdata = make_sdata(n_spots=20)
    far = sdata.shapes["A_spots"].geometry.iloc[3]
    instance = sdata.shapes["A_spots"].index[3]
    sdata.shapes["A_spots"].loc[instance, "geometry"] = type(far)(9000, 9000)
    made = patches(sdata, image_size=16)
    row = np.flatnonzero(sdata["table"].obs["spot_id"] == instance)
    np.testing.assert_array_equal(made.rows, np.setdiff1d(np.arange(20), row))
    assert made.shape == (19, 3, 3, 16, 16)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_each_patch_belongs_to_its_row(make_sdata: MakeSData) -> None:
    """Several sections, rows in an order of their own, spots without rows and rows without spots."""
    sdata = make_sdata(3, n_spots=15, shapes_at="rotation", n_without_row=2, n_without_spot=2)
    table = sdata["table"][np.random.default_rng(0).permutation(sdata["table"].n_obs)].copy()
    del sdata.tables["table"]
    sdata["table"] = table
    made = patches(sdata, image_size=16)
    assert len(made) == 3 * 13
    assert (np.diff(made.rows) > 0).all()
    for section in read_sections(sdata, table):
        alone = everything(extract([section], levels=3, image_size=16, spot_scale=1.54))
        order = np.argsort(section.rows)
        np.testing.assert_array_equal(alone, made[np.searchsorted(made.rows, section.rows[order])])
        for i, (x, y) in enumerate(section.centers[order]):
            pixels = np.asarray(section.pixels)[:, int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2]
            assert np.abs(alone[i, 0, :, 7:9, 7:9].mean((1, 2)) - pixels.mean((1, 2))).max() < 60
    names = table.obs["region"].iloc[made.rows]
    assert names.value_counts().to_dict() == {"A_spots": 13, "B_spots": 13, "C_spots": 13}


def test_spots_of_different_sizes() -> None:
    image = make_image()
    diameters = [12.0, 30.0, 55.0]
    centers = [[100.0, 120.0]] * 3
    together = everything(cut(make_section(image, centers, diameters)))
    for i, diameter in enumerate(diameters):
        np.testing.assert_array_equal(together[i : i + 1], everything(cut(make_section(image, centers[:1], diameter))))


# --- how they are made does not matter --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 70, 10_000])
@pytest.mark.parametrize("chunks", [37, 128, 1000])
@pytest.mark.parametrize("size", [20, 48])
def test_bands_do_not_change_the_result(size: int, chunks: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_image()
    centers = np.random.default_rng(3).uniform(0, 260, (30, 2))
    expected = everything(cut(make_section(image, centers), size))
    monkeypatch.setattr(_patches, "bands", partial(bands, rows=rows))
    np.testing.assert_array_equal(everything(cut(make_section(image, centers, chunks=chunks), size)), expected)


def test_backed_images_give_the_same(
    make_sdata: MakeSData, to_backed: Callable[[SpatialData, Path], SpatialData], tmp_path: Path
) -> None:
    sdata = make_sdata(2)
    expected = everything(patches(sdata, image_size=20))
    np.testing.assert_array_equal(everything(patches(to_backed(sdata, tmp_path / "a.zarr"), image_size=20)), expected)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "temporary", "kept"])
def made(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Patches:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(_store, "MAX_IN_MEMORY", 10**9 if request.param == "memory" else 0)
    store = tmp_path / "kept" if request.param == "kept" else None
    return cut(make_section(make_image(), np.random.default_rng(0).uniform(20, 240, (30, 2))), store=store)


def test_random_access_equals_sequential(made: Patches) -> None:
    one_by_one = np.stack([made[i] for i in range(30)])
    assert one_by_one.shape == made.shape == (30, 3, 3, 24, 24)
    assert one_by_one.dtype == np.uint8
    np.testing.assert_array_equal(
        one_by_one, everything(cut(make_section(make_image(), np.random.default_rng(0).uniform(20, 240, (30, 2)))))
    )
    shuffled = np.random.default_rng(1).integers(0, 30, 50)
    np.testing.assert_array_equal(made[shuffled], one_by_one[shuffled])
    np.testing.assert_array_equal(made[:7], one_by_one[:7])
    np.testing.assert_array_equal(made[[-1, 4]], one_by_one[[-1, 4]])
    np.testing.assert_array_equal(made[np.arange(30) % 7 == 0], one_by_one[::7])
    assert made[[]].shape == (0, 3, 3, 24, 24)
    for wrong in (30, [3, 30], [-31]):
        with pytest.raises(IndexError):
            made[wrong]


def test_batches_can_be_overwritten(made: Patches) -> None:
    batch = made[[1, 2, 3]]
    expected = made[[7, 5, 6]]
    again = made.take([7, 5, 6], out=batch)
    assert np.shares_memory(again, batch)
    np.testing.assert_array_equal(batch, expected)
    for wrong in (batch[:2], np.ascontiguousarray(batch), batch.astype(np.int8)):
        with pytest.raises(ValueError, match="expected a batch that `take` returned"):
            made.take([7, 5, 6], out=wrong)


def test_torch_takes_batches_without_a_copy(made: Patches) -> None:
    import torch

    batch = torch.from_numpy(made[[1, 2]])
    assert batch.permute(0, 1, 3, 4, 2).is_contiguous()


def test_closed_patches_say_so(made: Patches) -> None:
    with made as same:
        assert same is made
        assert "24 x 24" in repr(made)
    assert repr(made) == "Patches of 30 spots, 3 levels of 24 x 24 pixels, closed"
    with pytest.raises(ValueError, match="closed.*`stp.pp.patches`"):
        made[0]
    made.close()


# --- keeping them -----------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many patches each extraction cut."""
    drawn = []
    draw = _patches._draw

    def count(target: Any, job: Any, *rest: Any) -> None:
        drawn.append(len(job.positions))
        draw(target, job, *rest)

    monkeypatch.setattr(_patches, "_draw", count)
    return drawn


def test_kept_patches_are_taken_again(
    make_sdata: MakeSData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: io.StringIO
) -> None:
    drawn = counted(monkeypatch)
    with patches(make_sdata(2), image_size=16, store=tmp_path) as first:
        expected = everything(first)
    assert drawn == [30, 30]
    drawn.clear()
    with patches(make_sdata(2), image_size=16, store=tmp_path) as second:
        np.testing.assert_array_equal(everything(second), expected)
        np.testing.assert_array_equal(second.rows, first.rows)
        np.testing.assert_array_equal(second.coverage, first.coverage)
    assert drawn == [3, 3], "a few, to see whether the image is still the same"
    assert f"Taking the patches of 60 spots in '{tmp_path}" in log.getvalue()


def test_those_who_keep_patches_at_once_make_them_once(
    make_sdata: MakeSData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = counted(monkeypatch)
    sections = [make_sdata(1, world="shared") for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda sdata: patches(sdata, image_size=16, store=tmp_path), sections))
    assert drawn == [30, 3, 3]
    for other in made[1:]:
        np.testing.assert_array_equal(everything(other), everything(made[0]))


@pytest.mark.parametrize("change", ["field", "levels", "size", "radius", "moved", "rows", "pixels"])
def test_stale_patches_are_not_taken(
    change: str, make_sdata: MakeSData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: io.StringIO
) -> None:
    options: dict[str, Any] = {"image_size": 16, "levels": 2, "field": 1.5}
    sdata = make_sdata()
    patches(sdata, store=tmp_path, **options)
    kept = set(tmp_path.glob("*.npy"))
    if change == "field":
        options["field"] = 1.6
    elif change == "levels":
        options["levels"] = 3
    elif change == "size":
        options["image_size"] = 17
    elif change == "radius":
        sdata.shapes["A_spots"]["radius"] *= 1.001
    elif change == "moved":
        sdata.shapes["A_spots"]["geometry"] = sdata.shapes["A_spots"].translate(0.3, 0)
    elif change == "rows":
        table = sdata["table"][::-1].copy()
        del sdata.tables["table"]
        sdata["table"] = table
    else:
        sdata.images["A_image"] = sdata.images["A_image"].copy(data=255 - sdata.images["A_image"].data)
    drawn = counted(monkeypatch)
    made = patches(sdata, store=tmp_path, **options)
    assert drawn[-1] == 30
    np.testing.assert_array_equal(everything(made), everything(patches(sdata, **options)))
    if change == "pixels":
        assert "show another image than 'A_image'" in log.getvalue()
        assert set(tmp_path.glob("*.npy")) == kept
    else:
        assert set(tmp_path.glob("*.npy")) > kept, "what was there serves others"


def test_patches_kept_in_another_order_of_sections_are_not_taken(make_sdata: MakeSData, tmp_path: Path) -> None:
    sdata = make_sdata(2)
    patches(sdata, image_size=16, store=tmp_path)
    table = sdata["table"][np.roll(np.arange(60), 30)].copy()
    del sdata.tables["table"]
    sdata["table"] = table
    kept = patches(sdata, image_size=16, store=tmp_path)
    np.testing.assert_array_equal(everything(kept), everything(patches(sdata, image_size=16)))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("keep", [True, False])
def test_failures_leave_nothing_behind(
    keep: bool, error: type[BaseException], make_sdata: MakeSData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(_store, "MAX_IN_MEMORY", 0)
    cut_patch, done = _patches.cut_patch, []

    def fail(*args: Any) -> np.ndarray:
        done.append(1)
        if len(done) > 10:
            raise error
        return cut_patch(*args)

    monkeypatch.setattr(_patches, "cut_patch", fail)
    with pytest.raises(error):
        patches(make_sdata(), image_size=16, store=tmp_path if keep else None)
    assert {file.name for file in tmp_path.iterdir()} <= {"patches.lock"}


def test_forgotten_patches_leave_no_file(
    make_sdata: MakeSData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(_store, "MAX_IN_MEMORY", 0)
    made = patches(make_sdata(), image_size=16)
    assert len(list(tmp_path.iterdir())) == 1
    del made
    gc.collect()
    assert not list(tmp_path.iterdir())


# --- what they say ----------------------------------------------------------------------------------------------------


def test_made_of_says_what_they_are_made_of(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2)
    made = patches(sdata, image_size=16, levels=2, spot_scale=1.25)
    assert {key: made.made_of[key] for key in ("levels", "image_size", "field")} == {
        "levels": 2,
        "image_size": 16,
        "field": 1.25,
    }
    assert list(made.made_of["sections"]) == ["A_spots", "B_spots"]
    assert made.made_of["sections"]["A_spots"]["image_key"] == "A_image"


def test_nothing_is_written(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    table = sdata["table"].copy()
    radii = sdata.shapes["A_spots"]["radius"].copy()
    patches(sdata, image_size=16)
    assert list(sdata["table"].uns) == list(table.uns) and list(sdata["table"].obs) == list(table.obs)
    assert (sdata.shapes["A_spots"]["radius"] == radii).all()
    assert sdata.coordinate_systems == ["A"]


def test_coarse_images_are_enlarged_with_a_warning(log: io.StringIO) -> None:
    section = make_section(make_image(), [[100, 100]])
    cut(section, image_size=48)
    assert not log.getvalue()
    cut(section, image_size=96)
    assert "level 0 is enlarged 2 times" in log.getvalue()
    assert "`image_size`" in log.getvalue() and "`field`" in log.getvalue()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"levels": 0}, "`levels` is 0"),
        ({"levels": 2.0}, "`levels` is 2.0"),
        ({"levels": 9}, "from 1 to 8"),
        ({"image_size": 0}, "`image_size` is 0"),
        ({"image_size": 224.5}, "`image_size` is 224.5"),
        ({"field": 0}, "`field` is 0"),
        ({"field": np.nan}, "`field` is nan"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str, make_sdata: MakeSData) -> None:
    with pytest.raises(ValueError, match=message):
        patches(make_sdata(), **wrong)


def test_wrong_elements(make_sdata: MakeSData) -> None:
    with pytest.raises(KeyError, match="No image 'B'"):
        patches(make_sdata(), image_key="B")
    with pytest.raises(ValueError, match="There is no table"):
        patches(make_sdata(table=False))


# --- real tissue ------------------------------------------------------------------------------------------------------


def test_real_section(her2st_dir: Path) -> None:
    """The middle of each level shows what the level before it shows."""
    sdata = stp.datasets.her2st("C2", path=her2st_dir)
    with patches(sdata) as made:
        assert made.shape == (187, 3, 3, 224, 224)
        assert (made.coverage == 1).all()
        found: NDArray[np.float64] = made[::10].astype(float)
    assert found.std() > 30
    for level in (1, 2):
        middle = found[:, level, :, 56:168, 56:168]
        halved = found[:, level - 1].reshape(-1, 3, 112, 2, 112, 2).mean((3, 5))
        assert np.abs(middle.mean((2, 3)) - halved.mean((2, 3))).max() < 2
        # Each level is placed to half a pixel of its own, which shows at edges of nuclei, less in means of 8 x 8 pixels.
        error = np.abs(middle - halved).mean()
        for shift, axis in ((1, 2), (-1, 2), (1, 3), (-1, 3)):
            assert error < 0.7 * np.abs(np.roll(middle, shift, axis) - halved).mean()
        blocks = (middle - halved).reshape(-1, 3, 14, 8, 14, 8).mean((3, 5))
        assert np.abs(blocks).mean() < 2
