from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import BaseTransformation, Identity, Translation, set_transformation

import stpredict as stp
from stpredict._data.slide import Section
from stpredict.pp import ColorHistogram, _histogram, _tiles
from stpredict.pp._footprints import whole_pixels
from stpredict.pp._histogram import HistogramReads, codebook_od, optical_density
from stpredict.pp._pass import read_pixels

Placements = dict[str, tuple[BaseTransformation, np.ndarray]]
MakeSData = Callable[..., SpatialData]
NewSection = Callable[..., Section]
SIZE = (150, 190)
SMALL: dict[str, Any] = {"size": SIZE, "n_spots": 12, "n_genes": 3, "chunks": (3, 64, 100)}


def count(sdata: SpatialData, **options: Any) -> ColorHistogram:
    histogram = stp.pp.color_histogram(sdata, inplace=False, **options)
    assert histogram is not None
    return histogram


def count_section(section: Section, bits: int = 5, spot_scale: float = 2.0) -> ColorHistogram:
    reads = HistogramReads(bits, spot_scale)
    found: ColorHistogram = read_pixels([section], [reads], len(section.rows))[reads]
    return found


def pixels_under(
    image: np.ndarray, center: np.ndarray, radius: float, to_pixels: np.ndarray, padding: int = 60
) -> tuple[np.ndarray, int]:
    """Colors ``(n, 3)`` of the pixels whose centers lie in a circle, found one by one; and how many it has in all.

    ``center`` and ``radius`` are in the shapes' own coordinates; the image is padded to see what is cut off.
    """
    height, width = image.shape[1:]
    y, x = np.mgrid[-padding : height + padding, -padding : width + padding] + 0.5
    to_shapes = np.linalg.inv(to_pixels)
    own_x = to_shapes[0, 0] * x + to_shapes[0, 1] * y + to_shapes[0, 2]
    own_y = to_shapes[1, 0] * x + to_shapes[1, 1] * y + to_shapes[1, 2]
    inside = np.hypot(own_x - center[0], own_y - center[1]) <= radius
    on_image = inside[padding : padding + height, padding : padding + width]
    return image[:, on_image].T, int(inside.sum())


def assert_same(a: ColorHistogram, b: ColorHistogram) -> None:
    """Bit by bit."""
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(a.counts, name), getattr(b.counts, name), err_msg=name)
    for name in ("codebook", "mean_od", "coverage"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_every_pixel_of_the_ellipse_and_no_other(new_section: NewSection, placements: Placements) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 80, 90), dtype=np.uint8)
    pixels = da.from_array(image, chunks=(3, 50, 37))
    centers = np.array([[45.2, 38.9], [3.0, 5.5], [70.5, 79.0], [89.1, 40.0]])
    matrices = [matrix for _, matrix in placements.values()]
    for i, image_matrix in enumerate(matrices):
        to_pixels = np.linalg.inv(image_matrix) @ matrices[(i + 3) % len(matrices)]
        to_shapes = np.linalg.inv(to_pixels)
        xy = centers @ to_shapes[:2, :2].T + to_shapes[:2, 2]
        radii = np.array([9.0, 8, 7, 10]) * np.sqrt(abs(np.linalg.det(to_shapes)))
        histogram = count_section(new_section(pixels, xy, radii, affine=to_pixels), bits=6, spot_scale=1.7)
        for row in range(4):
            colors, n_whole = pixels_under(image, xy[row], 1.7 * radii[row], to_pixels)
            assert (row > 0) == (len(colors) < n_whole)  # some are cut by the border
            of_row = histogram.counts[row]
            found = {
                tuple(histogram.codebook[k].tolist()): int(n) for k, n in zip(of_row.indices, of_row.data, strict=True)
            }
            assert found == Counter(map(tuple, (colors >> 2 << 2).tolist()))
            od = -np.log((colors.astype(float) + 1) / 256)
            np.testing.assert_allclose(histogram.mean_od[row], od.mean(axis=0), rtol=0, atol=1e-9)
            assert histogram.coverage[row] == len(colors) / n_whole


@pytest.mark.parametrize("image_at", ["flip", "sequence"])
def test_each_spot_has_the_color_that_was_painted_under_it(
    make_sdata: MakeSData, placements: Placements, new_image: Callable[..., Any], image_at: str
) -> None:
    sdata = make_sdata(image_at=image_at, shapes_at="rotation", instances="str", **{**SMALL, "size": (190, 220)})
    to_pixels = np.linalg.inv(placements[image_at][1]) @ placements["rotation"][1]
    canvas = np.zeros((3, 190, 220), dtype=np.uint8)
    y, x = np.mgrid[:190, :220] + 0.5
    color = {}
    for k, (name, spot) in enumerate(sdata["A_spots"].iterrows()):
        center = (to_pixels @ [spot.geometry.x, spot.geometry.y, 1])[:2]
        color[name] = np.array([17 * k + 9, 255 - 17 * k, (53 * k) % 256])
        near = np.hypot(x - center[0], y - center[1]) < 24  # larger than any ellipse, smaller than half the distance
        canvas[:, near] = color[name][:, None]
    sdata["A_image"] = new_image(canvas, {"A": placements[image_at][0]})

    histogram = count(sdata, bits=6, spot_scale=1.0)
    assert (np.diff(histogram.counts.indptr) == 1).all()
    np.testing.assert_array_equal(
        histogram.codebook[histogram.counts.indices], [color[name] // 4 * 4 for name in sdata["table"].obs["spot_id"]]
    )


def test_pixels_at_exactly_the_radius_belong_to_the_spot(new_section: NewSection) -> None:
    # 5² = 3² + 4²: many pixels of a circle around a pixel's center lie exactly on its border, on all sides of it.
    dy, dx = np.mgrid[-80:81, -80:81]
    for radius in (1, 2, 5, 13, 25, 29, 65):
        section = new_section(np.zeros((3, 150, 150), dtype=np.uint8), [[75.5, 74.5]], radius)
        assert count_section(section, 1, 1.0).n_pixels[0] == (dx**2 + dy**2 <= radius**2).sum()


def test_codebook_holds_the_lowest_intensities_of_its_bins(new_section: NewSection) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 60, 60), dtype=np.uint8)
    for bits in range(1, 9):
        histogram = count_section(new_section(image, [[20, 30], [50, 50]], 9.0), bits)
        width = 2 ** (8 - bits)
        assert histogram.bits == bits
        assert histogram.codebook.dtype == np.uint8
        assert (histogram.codebook % width == 0).all()
        assert len(np.unique(histogram.codebook, axis=0)) == len(histogram.codebook) == histogram.counts.shape[1]
        middle = histogram.codebook.astype(float) + (width - 1) / 2
        np.testing.assert_allclose(histogram.od, -np.log((middle + 1) / 256))


def test_five_bits_keep_the_mean_optical_density(make_sdata: MakeSData) -> None:
    histogram = count(make_sdata(**SMALL))
    from_bins = histogram.counts @ histogram.od / histogram.n_pixels[:, None]
    assert np.sqrt(np.mean((from_bins - histogram.mean_od) ** 2)) < 0.003


def test_optical_density() -> None:
    assert optical_density(np.array(255)) == 0
    np.testing.assert_allclose(optical_density(np.array([0, 127])), [np.log(256), np.log(2)])
    centers = np.array([[3.5, 131.5, 251.5]])
    found = codebook_od(np.array([[0, 128, 248]], dtype=np.uint8), 5)
    np.testing.assert_allclose(found, -np.log((centers + 1) / 256))


def test_spot_scale_is_in_spot_diameters(new_section: NewSection) -> None:
    section = new_section(np.zeros((3, 400, 400), dtype=np.uint8), [[150, 200], [250, 170.2]], [30.0, 20.0])
    small, large = count_section(section, spot_scale=1.0), count_section(section, spot_scale=3.0)
    np.testing.assert_allclose(large.n_pixels / small.n_pixels, 9, rtol=0.01)
    np.testing.assert_allclose(small.n_pixels, np.pi * np.array([30.0, 20.0]) ** 2, rtol=0.01)


def test_spots_off_the_image_have_no_pixels(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    set_transformation(sdata["A_spots"], Translation([90, 0], axes=("x", "y")), "A")
    histogram = count(sdata)
    off = histogram.n_pixels == 0
    assert 0 < off.sum() < 12
    assert np.isnan(histogram.mean_od[off]).all()
    assert np.isfinite(histogram.mean_od[~off]).all()
    assert (histogram.coverage[off] == 0).all()
    assert ((histogram.coverage[~off] > 0) & (histogram.coverage[~off] <= 1)).all()
    np.testing.assert_array_equal(histogram.rows, np.flatnonzero(~off))


def test_images_that_no_spot_touches_are_not_judged(new_section: NewSection) -> None:
    far = new_section(np.zeros((3, 50, 50), dtype=np.uint16), [[-500, 20], [20, 500]], 4.0)
    histogram = count_section(far)
    assert histogram.counts.shape == (2, 0)
    assert np.isnan(histogram.mean_od).all()


def test_rows_follow_the_table_through_several_sections(make_sdata: MakeSData) -> None:
    together = make_sdata(3, n_without_row=4, **SMALL)
    histogram = count(together)
    for name in "ABC":
        alone = count(together, shapes_key=f"{name}_spots")
        rows = (together["table"].obs["section"] == name).to_numpy()
        np.testing.assert_array_equal(alone.n_pixels > 0, rows)
        np.testing.assert_array_equal(histogram.mean_od[rows], alone.mean_od[rows])
        assert np.isnan(alone.mean_od[~rows]).all()


# What a model is given


def test_fractions_and_fingerprints(new_section: NewSection) -> None:
    rng = np.random.default_rng(0)
    image = np.full((3, 60, 200), 240, dtype=np.uint8)
    image[:, :, 50:] = rng.integers(0, 256, (3, 60, 150))
    image[:, :, 150:] = image[:, :, 100:150]
    section = new_section(image, [[20, 30], [75, 30], [125, 30], [175, 30], [400, 30]], 8.0)
    histogram = count_section(section)
    np.testing.assert_array_equal(histogram.rows, [0, 1, 2, 3])
    fractions, od = histogram.arguments()
    np.testing.assert_allclose(fractions.sum(axis=1), 1)
    np.testing.assert_allclose(
        fractions.toarray() * histogram.n_pixels[:4, None], histogram.counts[:4].toarray(), atol=1e-12
    )
    np.testing.assert_array_equal(od, histogram.od)
    assert histogram.fractions(np.array([4])).nnz == 0
    glass, first, second, again = histogram.fingerprints()
    assert glass == 0, "glass tells no spots apart"
    assert first not in (0, second)
    assert second == again


# Reading


def test_equal_pixels_in_every_dtype_with_alpha_and_scales(make_sdata: MakeSData) -> None:
    expected = count(make_sdata(**SMALL))
    options: list[dict[str, Any]] = [
        {"dtype": "uint16"},
        {"dtype": "float32"},
        {"alpha": True},
        {"scale_factors": [2, 2]},
        {"channels": ["b", "r", "g"]},
        {"dtype": "uint16", "channels": ["a", "b", "g", "r"], "alpha": True, "scale_factors": [2]},
    ]
    for these in options:
        assert_same(count(make_sdata(**these, **SMALL)), expected)


def test_transparent_pixels_are_glass(make_sdata: MakeSData, new_image: Callable[..., Any]) -> None:
    # Scanners leave what they did not look at transparent and black.
    sdata, expected = make_sdata(**SMALL), make_sdata(**SMALL)
    pixels = sdata["A_image"].data.compute()
    outside = np.zeros(SIZE, dtype=bool)
    outside[:, :80] = True
    opacity = np.where(outside, 0, 255).astype(np.uint8)[None]
    black = np.where(outside, 0, pixels)
    sdata["A_image"] = new_image(np.concatenate([black, opacity]), {"A": Identity()})
    expected["A_image"] = new_image(np.where(outside, 255, pixels).astype(np.uint8), {"A": Identity()})
    found = count(sdata)
    assert_same(found, count(expected))
    assert (found.mean_od == 0).all(axis=1).any()


def test_deep_images_that_hold_fewer_bits_are_refused(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    image = sdata["A_image"]
    sdata["A_image"] = image.copy(data=image.data.astype(np.uint16) * 16)  # 12 bits
    with pytest.raises(ValueError, match="nowhere brighter than .* of 65535"):
        count(sdata)
    sdata["A_image"] = image.copy(data=image.data.astype(np.int32))
    with pytest.raises(ValueError, match="dtype int32; expected uint8"):
        count(sdata)
    sdata["A_image"] = image.copy(data=image.data.astype(np.float32))
    with pytest.raises(ValueError, match="float image 'A_image' has values from .*; expected 0"):
        count(sdata)


def test_chunks_on_disk_are_read_at_most_once(
    make_general: Callable[[], SpatialData], on_disk: Path, chunk_reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, backed = count(make_general()), sd.read_zarr(on_disk)
    for tile_px in (1, 120, 2048):
        monkeypatch.setattr(_tiles, "_TILE_PX", tile_px)
        chunk_reads.clear()
        assert_same(count(backed), expected)
        assert set(chunk_reads.values()) == {1}
        assert len(chunk_reads) == 2 * 3 * 2  # sections, rows and columns of chunks: no coarser scale


def test_lazy_blocks_are_computed_at_most_once_and_only_where_spots_are(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    expected = count(sdata)
    pixels = sdata["A_image"].data.compute()
    computed: Counter[tuple[int, ...]] = Counter()
    lock = threading.Lock()

    def block(block_info: Any = None) -> np.ndarray:
        (_, y, x) = block_info[None]["array-location"]
        with lock:
            computed[y[0], x[0]] += 1
        return pixels[:, y[0] : y[1], x[0] : x[1]]

    rows, columns = (40, 40, 40, 30), (64, 63, 63)
    lazy = da.map_blocks(block, chunks=((3,), rows, columns), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    assert_same(_with_pixels(sdata, lazy), expected)
    assert set(computed.values()) == {1}

    few = sdata["table"].obs["spot_id"].map(lambda spot: sdata["A_spots"].geometry[spot].y < 50).to_numpy()
    sdata["table"] = sdata["table"][few].copy()
    computed.clear()
    _with_pixels(sdata, lazy, tile_px=1)
    assert {y for y, _ in computed} == {0, 40}


def _with_pixels(sdata: SpatialData, pixels: da.Array, tile_px: int | None = None) -> ColorHistogram:
    """The histogram of the same spots on other pixels."""
    other = SpatialData(
        images={"A_image": Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations={"A": Identity()})},
        shapes={"A_spots": sdata["A_spots"]},
        tables={"table": sdata["table"]},
    )
    with pytest.MonkeyPatch.context() as patch:
        if tile_px is not None:
            patch.setattr(_tiles, "_TILE_PX", tile_px)
        return count(other)


def test_chunks_and_schedulers_do_not_matter(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    expected, pixels = count(sdata), sdata["A_image"].data
    for chunks in (((3,), (150,), (190,)), ((1, 1, 1), (7, 143), (170, 20)), ((2, 1), (75,) * 2, (38,) * 5)):
        for tile_px in (1, 60, 2048):
            assert_same(_with_pixels(sdata, pixels.rechunk(chunks), tile_px), expected)
    for options in ({"scheduler": "synchronous"}, {"scheduler": "threads", "num_workers": 7}):
        with dask.config.set(options):
            assert_same(_with_pixels(sdata, pixels, 60), expected)


def test_another_process_gives_the_same_bits(
    make_general: Callable[[], SpatialData],
    on_disk: Path,
    other_process: ProcessPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_tiles, "_TILE_PX", 60)
    in_memory = make_general()
    expected = count(in_memory)
    for sdata in (in_memory, sd.read_zarr(on_disk)):
        with dask.config.set(scheduler="processes", pool=other_process):
            assert_same(count(sdata), expected)


# What is written


def test_slots(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2, **SMALL)
    table = sdata["table"]
    assert stp.pp.color_histogram(sdata, bits=4, spot_scale=1.5) is None
    histogram = count(sdata, bits=4, spot_scale=1.5)
    written = table.obsm["color_histogram"]
    assert written.format == "csr"
    assert written.dtype == np.int32
    assert (written != histogram.counts).nnz == 0
    np.testing.assert_array_equal(table.obsm["color_histogram_mean_od"], histogram.mean_od)
    np.testing.assert_array_equal(table.obs["color_histogram_n_pixels"], histogram.n_pixels)
    np.testing.assert_array_equal(table.obs["color_histogram_coverage"], histogram.coverage)
    np.testing.assert_array_equal(table.uns["color_histogram"]["codebook"], histogram.codebook)
    assert table.uns["color_histogram"]["reads"] == {"kind": "histogram", "bits": 4, "spot_scale": 1.5}


def test_what_is_there_already_stays(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    table = sdata["table"]
    for name in ("n_pixels", "coverage"):
        table.obs[name] = "mine"
    table.obsm["mean_od"] = np.ones((12, 1))
    stp.pp.color_histogram(sdata, key_added="colors")
    stp.pp.color_histogram(sdata, key_added="colors", bits=3)
    assert set(table.obsm) == {"mean_od", "colors", "colors_mean_od"}
    assert (table.obs[["n_pixels", "coverage"]] == "mine").all(axis=None)
    table.obs["other_coverage"] = "mine"
    with pytest.raises(ValueError, match=r"`obs\['other_coverage'\]` exists and holds no result of stpredict under"):
        stp.pp.color_histogram(sdata, key_added="other")
    assert "other" not in table.uns


def test_not_in_place_leaves_the_table_alone(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    before = sdata["table"].copy()
    count(sdata)
    assert list(sdata["table"].obs) == list(before.obs)
    assert not sdata["table"].obsm
    assert sdata["table"].uns.keys() == before.uns.keys()


@pytest.mark.parametrize("bits", [0, 9, 5.0, "5", None])
def test_bits_out_of_range(bits: Any) -> None:
    with pytest.raises(ValueError, match=f"`bits` is {bits!r}; expected an integer from 1 to 8"):
        HistogramReads(bits)


@pytest.mark.parametrize("spot_scale", [0, -1.0, np.nan, np.inf, "2", None])
def test_spot_scale_out_of_range(spot_scale: Any) -> None:
    with pytest.raises(
        ValueError, match=f"`spot_scale` is {spot_scale!r}; expected a positive number of spot diameters"
    ):
        HistogramReads(5, spot_scale)


def test_failure_leaves_the_table_alone(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    image = sdata["A_image"]

    def fail(block: np.ndarray) -> np.ndarray:
        raise OSError("the disk is gone")

    sdata["A_image"] = image.copy(data=image.data.map_blocks(fail, meta=np.empty((0, 0, 0), np.uint8)))
    for call in (stp.pp.color_histogram, stp.pp.color_statistics):
        with pytest.raises(OSError, match="the disk is gone"):
            call(sdata)
        assert not sdata["table"].obsm
        assert list(sdata["table"].uns) == ["spatialdata_attrs"]


# Compiled code


def test_compiled_and_plain_counting_agree() -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (3, 12, 14), dtype=np.uint8)
    centers = np.array([[5.2, 6.1], [13.0, 1.0], [40.0, 5.0]])
    conic = np.tile(np.array([0.06, 0.01, 0.09]), (3, 1))
    half_height = np.sqrt(conic[:, 0] / (conic[:, 0] * conic[:, 2] - conic[:, 1] ** 2))
    units = np.arange(256, dtype=np.int64)
    arguments = (rgb, 0, 0, centers, conic, half_height, 4, units)
    for compiled, plain in zip(_histogram._count(*arguments), _histogram._count.py_func(*arguments), strict=True):
        np.testing.assert_array_equal(compiled, plain)


def test_room_for_colors_grows() -> None:
    # One spot with more colors than the first guess has room for.
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (3, 80, 80), dtype=np.uint8)
    center, conic = np.array([[40.0, 40.0]]), np.array([[1 / 900, 0, 1 / 900]])
    indptr, bins, counts, _ = _histogram._count(
        rgb, 0, 0, center, conic, np.array([30.0]), 8, np.zeros(256, dtype=np.int64)
    )
    assert indptr[-1] == len(bins) > 1024
    assert counts.sum() == whole_pixels(center, conic)[0]
    assert len(np.unique(bins)) == len(bins)


def test_spots_smaller_than_a_pixel_are_named(
    make_sdata: MakeSData, log: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    # Most likely the spots are in other units than the transformations say.
    sdata = make_sdata(**SMALL)
    sdata["A_spots"]["radius"] = 0.01
    assert (count(sdata, spot_scale=1.0).n_pixels == 0).sum() > 8
    assert "spots of 'A_spots' are smaller than a pixel of 'A_image' and have no color" in log.getvalue()
    assert "colors of" not in capsys.readouterr().err, "short work shows no progress"
