from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
from anndata import AnnData
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.transformations import BaseTransformation

import stpredict as stp
from stpredict._data.elements import Elements
from stpredict._data.slide import Section, Slide, open_slide
from stpredict.pp import _patches, _store
from stpredict.pp._bands import bands
from stpredict.pp._patches import Patches, PatchReads, patches
from stpredict.pp._windows import place_windows

Placements = dict[str, tuple[BaseTransformation, np.ndarray]]
MakeSData = Callable[..., SpatialData]
NAMES = ["identity", "scale", "anisotropic", "translation", "rotation", "flip", "shear", "sequence"]
SMALL: dict[str, Any] = {"size": (150, 190), "n_spots": 12, "n_genes": 3}

# Pixels of the image for one of level 0, with SCALE and a spot of 30 pixels: enlarged, plain, and resized.
SCALE, DIAMETER = 1.6, 30.0
SIZES = {0.75: 64, 1.0: 48, 1.5: 32, 2.0: 24, 2.4: 20, 6.0: 8}

MakeSection = Callable[..., Section]


@pytest.fixture(scope="session")
def make_section(new_section: Callable[..., Section]) -> MakeSection:
    """Round spots on an image, in pixels."""

    def make(image: np.ndarray, centers: Any, diameters: Any = DIAMETER, chunks: int = 64) -> Section:
        return new_section(da.from_array(image, chunks=(3, chunks, chunks)), centers, np.asarray(diameters) / 2)

    return make


def extract(sections: list[Section], levels: int, image_size: int, spot_scale: float, **options: Any) -> Patches:
    """Patches of sections whose rows are those of a table."""
    n_obs = sum(len(section.rows) for section in sections)
    slide = Slide(AnnData(shape=(n_obs, 0)), "", sections, sections, Elements())
    return PatchReads(levels, image_size, spot_scale).extract(slide, **options)


def make_image(height: int = 300, width: int = 260, seed: int = 0) -> np.ndarray:
    """Grains of several sizes."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(0, 1, (3, height, width))
    for size in (4, 16, 64):
        coarse = rng.uniform(0, 1, (3, height // size + 1, width // size + 1))
        image += coarse.repeat(size, 1).repeat(size, 2)[:, :height, :width]
    return np.rint(image / image.max() * 255).astype(np.uint8)


def cut(section: Section, image_size: int = 24, levels: int = 3, spot_scale: float = SCALE, **options: Any) -> Patches:
    return extract([section], levels, image_size, spot_scale, **options)


def everything(made: Patches) -> np.ndarray:
    return np.array(made[:])


# --- where things are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", SIZES)
def test_every_pixel_shows_its_place(ratio: float, make_section: MakeSection) -> None:
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


@pytest.mark.parametrize(
    ("level", "ratio"),
    [(0, 0.75), (0, 1.0), (0, 2.4), (0, 6.0), (1, 0.75), (1, 1.0), (1, 1.5), (2, 1.0), (2, 2.0), (2, 2.4), (2, 6.0)],
)
def test_dots_are_found_at_every_level(
    level: int, ratio: float, placements: Placements, new_section: Callable[..., Section]
) -> None:
    """A dot at a known place in each spot's field, found in the patch to half a pixel."""
    size, scale = SIZES[ratio], ratio * 2**level
    rng = np.random.default_rng(0)
    side = max(SCALE * DIAMETER * 2**level, 80)
    grid = np.stack(np.meshgrid(np.arange(1, 4), np.arange(1, 3)), -1).reshape(-1, 2) * side
    centers = grid + rng.uniform(-3, 3, grid.shape)
    dots = centers + rng.uniform(-0.2, 0.2, grid.shape) * SCALE * DIAMETER * 2**level
    width = 1.2 * max(scale, 1)  # standard deviation of a dot
    y, x = np.arange(int(3.2 * side)) + 0.5, np.arange(int(4.2 * side)) + 0.5
    dark = np.zeros((len(y), len(x)), dtype=np.float32)
    for dx, dy in dots:
        across, down = (np.exp(-((at - d) ** 2) / (2 * width**2)).astype(np.float32) for at, d in ((x, dx), (y, dy)))
        np.maximum(dark, np.outer(down, across), out=dark)
    image = np.repeat(np.rint(255 * (1 - 0.9 * dark)).astype(np.uint8)[None], 3, 0)
    expected = (dots - centers) / scale + size / 2
    column, row = np.mgrid[:size, :size][::-1] + 0.5
    pairs = list(zip(NAMES, NAMES[3:] + NAMES[:3], strict=True))
    for image_at, shapes_at in pairs[list(SIZES).index(ratio) % 2 :: 2]:
        to_pixels = np.linalg.inv(placements[image_at][1]) @ placements[shapes_at][1]
        to_shapes = np.linalg.inv(to_pixels)
        xy = centers @ to_shapes[:2, :2].T + to_shapes[:2, 2]
        radius = DIAMETER / 2 * np.sqrt(abs(np.linalg.det(to_shapes[:2, :2])))
        made = extract([new_section(image, xy, radius, affine=to_pixels)], level + 1, size, SCALE)
        assert len(made) == len(centers)
        for i, patch in enumerate(255.0 - made[:][:, level, 0]):
            near = np.hypot(column - expected[i, 0], row - expected[i, 1]) < 4 * width / scale + 1
            weight = patch * near
            found = np.array([(weight * column).sum(), (weight * row).sum()]) / weight.sum()
            assert np.abs(found - expected[i]).max() <= 0.5, (image_at, shapes_at, found, expected[i])


def test_levels_are_nested(make_section: MakeSection) -> None:
    """The middle of each level is the level before it, at half its resolution."""
    image = make_image(600, 600)
    found = everything(cut(make_section(image, [[300, 288], [280, 312]], 32), image_size=48, spot_scale=1.5)).astype(
        float
    )
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
def test_equal_to_a_slow_reference(ratio: float, make_section: MakeSection) -> None:
    """White beyond the image, box averages step by step, then weights written out."""
    image = make_image()
    rng = np.random.default_rng(1)
    centers = rng.uniform(-10, 270, (12, 2))
    section = make_section(image, centers)
    made = cut(section, SIZES[ratio])
    size = SIZES[ratio]
    padding = 704
    step = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), constant_values=255).astype(float)
    step = step[:, : step.shape[1] // 64 * 64, : step.shape[2] // 64 * 64]
    pyramid = [step]
    for _ in range(5):
        c, h, w = pyramid[-1].shape
        pyramid.append(np.rint(pyramid[-1].reshape(c, h // 2, 2, w // 2, 2).mean((2, 4))))
    windows = place_windows(section, 3, size, SCALE)
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


def test_averages_neither_brighten_nor_darken(make_section: MakeSection) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 512, 512), dtype=np.uint8)
    made = cut(make_section(image, [[256, 256]], 32), image_size=64, spot_scale=2, levels=4)
    assert made[0][3].mean() == pytest.approx(image.mean(), abs=0.03)  # eight times coarser, of the whole image


def test_other_images_give_the_same_patches(make_sdata: MakeSData) -> None:
    plain = everything(patches(make_sdata(2, **SMALL), image_size=20))
    options: list[dict[str, Any]] = [
        {"dtype": "uint16"},
        {"dtype": "float32"},
        {"alpha": True},
        {"channels": ["b", "g", "r"]},
    ]
    for each in options:
        np.testing.assert_array_equal(everything(patches(make_sdata(2, **SMALL, **each), image_size=20)), plain)


def test_channels_are_red_green_blue(make_section: MakeSection) -> None:
    image = np.zeros((3, 200, 200), dtype=np.uint8)
    image[0], image[1], image[2] = 10, 20, 30
    found = cut(make_section(image, [[100, 100]]), levels=2)[0]
    assert (found == np.array([10, 20, 30])[:, None, None]).all()


def test_what_can_be_seen_through_is_white(new_section: Callable[..., Section]) -> None:
    image = np.full((4, 100, 100), 255, dtype=np.uint8)
    image[:3], image[3, :, :50] = 7, 0
    section = new_section(image, [[50, 50]], DIAMETER / 2, channels=(0, 1, 2, 3))
    found = cut(section, 48, levels=1)[0][0]
    assert (found[:, :, :24] == 255).all()
    assert (found[:, :, 24:] == 7).all()


# --- the border -------------------------------------------------------------------------------------------------------


def test_white_beyond_the_image_and_coverage(make_section: MakeSection) -> None:
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
    sdata = make_sdata(**SMALL)
    far = sdata.shapes["A_spots"].geometry.iloc[3]
    instance = sdata.shapes["A_spots"].index[3]
    sdata.shapes["A_spots"].loc[instance, "geometry"] = type(far)(9000, 9000)
    made = patches(sdata, image_size=16)
    row = np.flatnonzero(sdata["table"].obs["spot_id"] == instance)
    np.testing.assert_array_equal(made.rows, np.setdiff1d(np.arange(12), row))
    assert made.shape == (11, 3, 3, 16, 16)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_each_patch_belongs_to_its_row(make_sdata: MakeSData) -> None:
    """Several sections, rows in an order of their own, spots without rows and rows without spots."""
    sdata = make_sdata(3, shapes_at="rotation", n_without_row=2, n_without_spot=2, **SMALL)
    table = sdata["table"][np.random.default_rng(0).permutation(sdata["table"].n_obs)].copy()
    del sdata.tables["table"]
    sdata["table"] = table
    made = patches(sdata, image_size=16)
    assert len(made) == 3 * 10
    assert (np.diff(made.rows) > 0).all()
    reads = PatchReads(3, 16)
    for section in open_slide(sdata, Elements(), images=True).sections:
        alone = everything(reads.extract(open_slide(sdata, Elements(shapes_key=section.name), images=True)))
        order = np.argsort(section.rows)
        np.testing.assert_array_equal(alone, made[np.searchsorted(made.rows, section.rows[order])])
        for i, (x, y) in enumerate(section.centers[order]):
            pixels = np.asarray(section.pixels)[:, int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2]
            assert np.abs(alone[i, 0, :, 7:9, 7:9].mean((1, 2)) - pixels.mean((1, 2))).max() < 60
    names = table.obs["region"].iloc[made.rows]
    assert names.value_counts().to_dict() == {"A_spots": 10, "B_spots": 10, "C_spots": 10}


def test_spots_of_different_sizes(make_section: MakeSection) -> None:
    image = make_image()
    diameters = [12.0, 30.0, 55.0]
    centers = [[100.0, 120.0]] * 3
    together = everything(cut(make_section(image, centers, diameters)))
    for i, diameter in enumerate(diameters):
        np.testing.assert_array_equal(together[i : i + 1], everything(cut(make_section(image, centers[:1], diameter))))


# --- how they are made does not matter --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [20, 48])
def test_bands_do_not_change_the_result(size: int, make_section: MakeSection, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_image()
    centers = np.random.default_rng(3).uniform(0, 260, (30, 2))
    expected = everything(cut(make_section(image, centers), size))
    for rows, chunks in ((1, 37), (70, 37), (1, 128), (10_000, 128), (70, 1000)):
        monkeypatch.setattr(_patches, "bands", partial(bands, rows=rows))
        np.testing.assert_array_equal(everything(cut(make_section(image, centers, chunks=chunks), size)), expected)


def test_chunks_on_disk_are_read_at_most_once(
    make_general: Callable[[], SpatialData], on_disk: Path, chunk_reads: Counter[str]
) -> None:
    expected = everything(patches(make_general(), image_size=20))
    np.testing.assert_array_equal(everything(patches(sd.read_zarr(on_disk), image_size=20)), expected)
    assert set(chunk_reads.values()) == {1}
    assert len(chunk_reads) == 2 * 3 * 2


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def spots(make_section: MakeSection) -> Section:
    return make_section(make_image(), np.random.default_rng(0).uniform(20, 240, (30, 2)))


@pytest.fixture(params=["memory", "temporary", "kept"])
def made(request: pytest.FixtureRequest, spots: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Patches:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(_store, "MAX_IN_MEMORY", 10**9 if request.param == "memory" else 0)
    store = tmp_path / "kept" if request.param == "kept" else None
    return cut(spots, store=store)


def test_random_access_equals_sequential(made: Patches, spots: Section) -> None:
    one_by_one = np.stack([made[i] for i in range(30)])
    assert one_by_one.shape == made.shape == (30, 3, 3, 24, 24)
    assert one_by_one.dtype == np.uint8
    np.testing.assert_array_equal(one_by_one, everything(cut(spots)))
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


def test_fingerprints_tell_patches_apart(make_section: MakeSection, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_image(100, 400)
    image[:, :, :100] = 240
    image[:, :, 300:] = image[:, :, 200:300]
    made = cut(make_section(image, [[50, 50], [150, 50], [250, 50], [350, 50]]), 24, levels=1)
    glass, first, second, again = made.fingerprints()
    assert glass == 0, "glass tells no spots apart"
    assert first not in (0, second)
    assert second == again
    expected = made.fingerprints()
    monkeypatch.setattr(_patches, "_FINGERPRINTED", 3)
    np.testing.assert_array_equal(made.fingerprints(), expected)
    assert made.arguments() == (made,)


# --- what they say ----------------------------------------------------------------------------------------------------


def test_descriptions() -> None:
    reads = PatchReads(np.int64(2), np.int32(16), 1)  # type: ignore[arg-type]
    assert reads.describe() == {"kind": "patches", "levels": 2, "image_size": 16, "spot_scale": 1.0}
    assert PatchReads(3, 16, 1.5).field_of_view == 6


def test_nothing_is_written(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    table = sdata["table"].copy()
    radii = sdata.shapes["A_spots"]["radius"].copy()
    patches(sdata, image_size=16)
    assert list(sdata["table"].uns) == list(table.uns) and list(sdata["table"].obs) == list(table.obs)
    assert (sdata.shapes["A_spots"]["radius"] == radii).all()
    assert sdata.coordinate_systems == ["A"]


def test_coarse_images_are_enlarged_with_a_warning(make_section: MakeSection, log: io.StringIO) -> None:
    section = make_section(make_image(), [[100, 100]])
    cut(section, image_size=48)
    assert not log.getvalue()
    cut(section, image_size=96)
    assert "level 0 is enlarged 2 times" in log.getvalue()
    assert "`image_size`" in log.getvalue()
    assert "`spot_scale`" in log.getvalue()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"levels": 0}, "`levels` is 0"),
        ({"levels": 2.0}, "`levels` is 2.0"),
        ({"levels": 9}, "from 1 to 8"),
        ({"image_size": 0}, "`image_size` is 0"),
        ({"image_size": 224.5}, "`image_size` is 224.5"),
        ({"spot_scale": 0}, "`spot_scale` is 0"),
        ({"spot_scale": np.nan}, "`spot_scale` is nan"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchReads(**{"levels": 3, "image_size": 224, **wrong})


def test_levels_that_reach_absurdly_far_are_refused(make_section: MakeSection, monkeypatch: pytest.MonkeyPatch) -> None:
    section = make_section(make_image(), [[100, 100]])
    with pytest.raises(ValueError, match=r"field of 204.8 spot diameters of 'spots' is 6.14e\+03 pixels wide"):
        cut(section, levels=8)
    monkeypatch.setattr("stpredict.pp._bands._MAX_BYTES", 10**5)
    with pytest.raises(ValueError, match=r"patches of 'spots' need 0 GB of memory for bands.*Use fewer `levels`"):
        cut(section, levels=4)


def test_wrong_elements(make_sdata: MakeSData) -> None:
    with pytest.raises(KeyError, match="No image 'B'"):
        patches(make_sdata(**SMALL), image_key="B")
    with pytest.raises(ValueError, match="There is no table"):
        patches(make_sdata(table=False, **SMALL))


# --- real tissue ------------------------------------------------------------------------------------------------------


def test_real_section(her2st_dir: Path) -> None:
    """The middle of each level shows what the level before it shows."""
    sdata = stp.datasets.her2st("C2", path=her2st_dir)
    sdata["table"] = sdata["table"][::10].copy()
    with patches(sdata) as made:
        assert made.shape == (19, 3, 3, 224, 224)
        assert (made.coverage == 1).all()
        found: NDArray[np.float64] = made[:].astype(float)
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
