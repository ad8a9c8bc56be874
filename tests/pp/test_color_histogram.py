from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import BaseTransformation, Identity, Translation, set_transformation

import stpredict as stp
from stpredict.pp import ColorHistogram, _histogram, _tiles
from stpredict.pp._footprints import whole_pixels
from stpredict.pp._histogram import codebook_od, optical_density

Placements = dict[str, tuple[BaseTransformation, np.ndarray]]
MakeSData = Callable[..., SpatialData]
NAMES = ["identity", "scale", "anisotropic", "translation", "rotation", "flip", "shear", "sequence"]


def count(sdata: SpatialData, **options: Any) -> ColorHistogram:
    histogram = stp.pp.color_histogram(sdata, inplace=False, **options)
    assert histogram is not None
    return histogram


def pixels_under(
    image: np.ndarray, center: np.ndarray, radius: float, to_pixels: np.ndarray, padding: int = 60
) -> tuple[np.ndarray, int]:
    """Colours ``(n, 3)`` of the pixels whose centres lie in a circle, found one by one; and how many it has in all.

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


@pytest.mark.parametrize("shapes_at", NAMES)
@pytest.mark.parametrize("image_at", NAMES)
def test_every_pixel_of_the_ellipse_and_no_other(
    make_sdata: MakeSData, placements: Placements, image_at: str, shapes_at: str
) -> None:
    size = (130, 170)
    sdata = make_sdata(size=size, n_spots=9, image_at=image_at, shapes_at=shapes_at, chunks=(3, 50, 60), n_genes=4)
    histogram = count(sdata, bits=6, field=1.7)
    image = sdata["A_image"].data.compute()
    to_pixels = np.linalg.inv(placements[image_at][1]) @ placements[shapes_at][1]
    n_cut = 0
    for row, spot_id in enumerate(sdata["table"].obs["spot_id"]):
        spot = sdata["A_spots"].loc[spot_id]
        center = np.array([spot.geometry.x, spot.geometry.y])
        colors, n_whole = pixels_under(image, center, 1.7 * spot["radius"], to_pixels)
        expected = Counter(map(tuple, (colors >> 2 << 2).tolist()))
        of_row = histogram.counts[row]
        found = {
            tuple(histogram.codebook[k].tolist()): int(n) for k, n in zip(of_row.indices, of_row.data, strict=True)
        }
        assert found == expected
        od = -np.log((colors.astype(float) + 1) / 256)
        np.testing.assert_allclose(histogram.mean_od[row], od.mean(axis=0), rtol=0, atol=1e-9)
        assert histogram.coverage[row] == len(colors) / n_whole
        n_cut += len(colors) < n_whole
    assert n_cut  # some are cut by the border


@pytest.mark.parametrize("image_at", NAMES)
def test_each_spot_has_the_color_that_was_painted_under_it(
    make_sdata: MakeSData, placements: Placements, new_image: Callable[..., Any], image_at: str
) -> None:
    sdata = make_sdata(image_at=image_at, shapes_at="sequence", instances="str")
    to_pixels = np.linalg.inv(placements[image_at][1]) @ placements["sequence"][1]
    canvas = np.zeros((3, 290, 330), dtype=np.uint8)
    y, x = np.mgrid[:290, :330] + 0.5
    color = {}
    for k, (name, spot) in enumerate(sdata["A_spots"].iterrows()):
        center = (to_pixels @ [spot.geometry.x, spot.geometry.y, 1])[:2]
        color[name] = np.array([7 * k + 9, 255 - 7 * k, (53 * k) % 256])
        near = np.hypot(x - center[0], y - center[1]) < 24  # larger than any ellipse, smaller than half the distance
        canvas[:, near] = color[name][:, None]
    sdata["A_image"] = new_image(canvas, {"A": placements[image_at][0]})

    histogram = count(sdata, bits=8, field=1.0)
    assert (np.diff(histogram.counts.indptr) == 1).all()
    np.testing.assert_array_equal(
        histogram.codebook[histogram.counts.indices], [color[name] for name in sdata["table"].obs["spot_id"]]
    )


def test_polygons_count_as_circles_of_their_area(make_sdata: MakeSData) -> None:
    circles, polygons = count(make_sdata()), count(make_sdata(polygons=True))
    assert np.abs(polygons.n_pixels / circles.n_pixels - 1).max() < 0.01
    np.testing.assert_allclose(polygons.mean_od, circles.mean_od, atol=0.01)


@pytest.mark.parametrize("radius", [1, 2, 5, 13, 25, 29, 65])
def test_pixels_at_exactly_the_radius_belong_to_the_spot(new_image: Callable[..., Any], radius: int) -> None:
    # 5² = 3² + 4²: many pixels of a circle around a pixel's centre lie exactly on its border, on all sides of it.
    from stpredict._data.slide import Section

    pixels = da.zeros((3, 150, 150), dtype=np.uint8)
    center = np.array([[75.5, 74.5]])
    one = np.array([1.0])
    section = Section("s", "i", "c", pixels, (0, 1, 2), np.eye(3), center, radius * one, np.array([0]), np.array([0]))
    histogram = _histogram.histogram_of_rows([section], n_obs=1, bits=1, spot_scale=1.0)
    dy, dx = np.mgrid[-80:81, -80:81]
    assert histogram.n_pixels[0] == (dx**2 + dy**2 <= radius**2).sum()


@pytest.mark.parametrize("bits", range(1, 9))
def test_codebook_holds_the_lowest_intensities_of_its_bins(make_sdata: MakeSData, bits: int) -> None:
    histogram = count(make_sdata(n_spots=4), bits=bits)
    width = 2 ** (8 - bits)
    assert histogram.bits == bits
    assert histogram.codebook.dtype == np.uint8
    assert (histogram.codebook % width == 0).all()
    assert len(np.unique(histogram.codebook, axis=0)) == len(histogram.codebook) == histogram.counts.shape[1]
    middle = histogram.codebook.astype(float) + (width - 1) / 2
    np.testing.assert_allclose(histogram.od, -np.log((middle + 1) / 256))


def test_five_bits_keep_the_mean_optical_density(make_sdata: MakeSData) -> None:
    histogram = count(make_sdata())
    from_bins = histogram.counts @ histogram.od / histogram.n_pixels[:, None]
    assert np.sqrt(np.mean((from_bins - histogram.mean_od) ** 2)) < 0.003


def test_optical_density() -> None:
    assert optical_density(np.array(255)) == 0
    np.testing.assert_allclose(optical_density(np.array([0, 127])), [np.log(256), np.log(2)])
    centers = np.array([[3.5, 131.5, 251.5]])
    found = codebook_od(np.array([[0, 128, 248]], dtype=np.uint8), 5)
    np.testing.assert_allclose(found, -np.log((centers + 1) / 256))


def test_field_is_in_spot_diameters(make_sdata: MakeSData) -> None:
    sdata = make_sdata(size=(400, 400), n_spots=4)
    small, large = count(sdata, field=1), count(sdata, field=3)
    np.testing.assert_allclose(large.n_pixels / small.n_pixels, 9, rtol=0.05)
    radii = sdata["A_spots"].loc[sdata["table"].obs["spot_id"], "radius"].to_numpy()
    np.testing.assert_allclose(small.n_pixels, np.pi * radii**2, rtol=0.03)


def test_spots_off_the_image_have_no_pixels(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    set_transformation(sdata["A_spots"], Translation([150, 0], axes=("x", "y")), "A")
    histogram = count(sdata)
    off = histogram.n_pixels == 0
    assert 0 < off.sum() < 30
    assert np.isnan(histogram.mean_od[off]).all()
    assert np.isfinite(histogram.mean_od[~off]).all()
    assert (histogram.coverage[off] == 0).all()
    assert ((histogram.coverage[~off] > 0) & (histogram.coverage[~off] <= 1)).all()


def test_rows_follow_the_table_through_several_sections(make_sdata: MakeSData) -> None:
    together = make_sdata(3, n_without_row=4)
    histogram = count(together)
    for name in "ABC":
        alone = count(together, shapes_key=f"{name}_spots")
        rows = (together["table"].obs["section"] == name).to_numpy()
        np.testing.assert_array_equal(alone.n_pixels > 0, rows)
        np.testing.assert_array_equal(histogram.mean_od[rows], alone.mean_od[rows])
        assert np.isnan(alone.mean_od[~rows]).all()


# Reading


def test_equal_pixels_in_every_dtype_with_alpha_and_scales(
    make_sdata: MakeSData, to_backed: Callable[[SpatialData, Path], SpatialData], tmp_path: Path
) -> None:
    expected = count(make_sdata())
    options: list[dict[str, Any]] = [
        {"dtype": "uint16"},
        {"dtype": "float32"},
        {"alpha": True},
        {"scale_factors": [2, 2]},
        {"channels": ["b", "r", "g"]},
        {"dtype": "uint16", "channels": ["a", "b", "g", "r"], "alpha": True, "scale_factors": [2]},
    ]
    for these in options:
        assert_same(count(make_sdata(**these)), expected)
    assert_same(count(to_backed(make_sdata(**options[-1]), tmp_path / "slide.zarr")), expected)


def test_deep_images_that_hold_fewer_bits_are_refused(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
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


@pytest.mark.parametrize("options", [{}, {"scale_factors": [2, 2]}], ids=["one scale", "three scales"])
@pytest.mark.parametrize("tile_px", [1, 200, 2048])
def test_backed_chunks_are_read_at_most_once(
    make_sdata: MakeSData,
    to_backed: Callable[[SpatialData, Path], SpatialData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    tile_px: int,
) -> None:
    monkeypatch.setattr(_tiles, "_TILE_PX", tile_px)
    in_memory = make_sdata(2, chunks=(3, 64, 100), **options)
    backed = to_backed(in_memory, tmp_path / "slide.zarr")
    reads: Counter[str] = Counter()
    original = zarr.storage.LocalStore.get

    async def get(self: Any, key: str, *arguments: Any, **keywords: Any) -> Any:
        if "/c/" in key or key.startswith("c/"):
            reads[f"{self.root}/{key}"] += 1
        return await original(self, key, *arguments, **keywords)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", get)
    histogram = count(backed)
    assert set(reads.values()) == {1}
    assert len(reads) == 2 * 5 * 4  # sections, rows and columns of chunks: no coarser scale
    assert_same(histogram, count(in_memory))


def test_lazy_blocks_are_computed_at_most_once_and_only_where_spots_are(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    expected = count(sdata)
    pixels = sdata["A_image"].data.compute()
    computed: Counter[tuple[int, ...]] = Counter()
    lock = threading.Lock()

    def block(block_info: Any = None) -> np.ndarray:
        (_, y, x) = block_info[None]["array-location"]
        with lock:
            computed[y[0], x[0]] += 1
        return pixels[:, y[0] : y[1], x[0] : x[1]]

    rows, columns = (40,) * 7 + (10,), (110,) * 3
    lazy = da.map_blocks(block, chunks=((3,), rows, columns), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    assert_same(_with_pixels(sdata, lazy), expected)
    assert set(computed.values()) == {1}

    few = sdata["table"].obs["spot_id"].map(lambda spot: sdata["A_spots"].geometry[spot].y < 60).to_numpy()
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


@pytest.mark.parametrize(
    "chunks", [((3,), (290,), (330,)), ((1, 1, 1), (7, 283), (300, 30)), ((2, 1), (145,) * 2, (33,) * 10)]
)
def test_chunks_do_not_matter(make_sdata: MakeSData, chunks: tuple[tuple[int, ...], ...]) -> None:
    sdata = make_sdata()
    pixels = sdata["A_image"].data
    for tile_px in (1, 100, 2048):
        assert_same(_with_pixels(sdata, pixels.rechunk(chunks), tile_px), count(sdata))


def test_schedulers_do_not_matter(make_sdata: MakeSData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "_TILE_PX", 100)
    sdata = make_sdata(2)
    expected = count(sdata)
    for options in ({"scheduler": "synchronous"}, {"scheduler": "threads", "num_workers": 7}):
        with dask.config.set(options):
            assert_same(count(sdata), expected)


def test_two_worker_processes_give_the_same_bits(
    make_sdata: MakeSData,
    to_backed: Callable[[SpatialData, Path], SpatialData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import distributed

    monkeypatch.setattr(_tiles, "_TILE_PX", 100)
    in_memory = make_sdata(2)
    backed = to_backed(in_memory, tmp_path / "slide.zarr")
    expected = count(in_memory)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=tmp_path
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        for sdata in (in_memory, backed):
            before = client.run(lambda dask_worker: dask_worker.state.executed_count)
            assert_same(count(sdata), expected)
            after = client.run(lambda dask_worker: dask_worker.state.executed_count)
            assert len(after) == 2
            assert all(after[worker] > before[worker] for worker in after)  # both took part


# What is written


def test_slots(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2)
    table = sdata["table"]
    assert stp.pp.color_histogram(sdata, bits=4, spot_scale=1.5) is None  # type: ignore[func-returns-value]
    histogram = count(sdata, bits=4, field=1.5)
    written = table.obsm["color_histogram"]
    assert written.format == "csr"
    assert written.dtype == np.int32
    assert (written != histogram.counts).nnz == 0
    np.testing.assert_array_equal(table.obsm["mean_od"], histogram.mean_od)
    np.testing.assert_array_equal(table.obs["n_pixels"], histogram.n_pixels)
    np.testing.assert_array_equal(table.obs["coverage"], histogram.coverage)
    about = table.uns["color_histogram"]
    np.testing.assert_array_equal(about["codebook"], histogram.codebook)
    assert (about["bits"], about["field"]) == (4, 1.5)
    assert {name: about["sections"][name]["image_key"] for name in about["sections"]} == {
        "A_spots": "A_image",
        "B_spots": "B_image",
    }


def test_not_in_place_leaves_the_table_alone(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    before = sdata["table"].copy()
    count(sdata)
    assert list(sdata["table"].obs) == list(before.obs)
    assert not sdata["table"].obsm
    assert sdata["table"].uns.keys() == before.uns.keys()


@pytest.mark.parametrize("bits", [0, 9, 5.0, "5", None])
def test_bits_out_of_range(make_sdata: MakeSData, bits: Any) -> None:
    with pytest.raises(ValueError, match=f"`bits` is {bits!r}; expected an integer from 1 to 8"):
        stp.pp.color_histogram(make_sdata(), bits=bits)


@pytest.mark.parametrize("field", [0, -1.0, np.nan, np.inf])
def test_field_out_of_range(make_sdata: MakeSData, field: float) -> None:
    with pytest.raises(ValueError, match=f"`field` is {field!r}; expected a positive number of spot diameters"):
        stp.pp.color_histogram(make_sdata(), spot_scale=field)


def test_failure_leaves_the_table_alone(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    image = sdata["A_image"]

    def fail(block: np.ndarray) -> np.ndarray:
        raise OSError("the disk is gone")

    sdata["A_image"] = image.copy(data=image.data.map_blocks(fail, meta=np.empty((0, 0, 0), np.uint8)))
    with pytest.raises(OSError, match="the disk is gone"):
        stp.pp.color_histogram(sdata)
    assert not sdata["table"].obsm
    assert "color_histogram" not in sdata["table"].uns


# Compiled code


def test_compiled_and_plain_counting_agree() -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (3, 12, 14), dtype=np.uint8)
    centers = np.array([[5.2, 6.1], [13.0, 1.0], [40.0, 5.0]])
    conic = np.tile(np.array([0.06, 0.01, 0.09]), (3, 1))
    half_height = np.sqrt(conic[:, 0] / (conic[:, 0] * conic[:, 2] - conic[:, 1] ** 2))
    units = np.arange(256, dtype=np.int64)
    arguments = (rgb, 0, 0, centers, conic, half_height, 8, units)
    for compiled, plain in zip(_histogram._count(*arguments), _histogram._count.py_func(*arguments), strict=True):
        np.testing.assert_array_equal(compiled, plain)


def test_room_for_colors_grows(new_image: Callable[..., Any]) -> None:
    # One spot with more colours than the first guess has room for.
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (3, 80, 80), dtype=np.uint8)
    center, conic = np.array([[40.0, 40.0]]), np.array([[1 / 900, 0, 1 / 900]])
    indptr, bins, counts, _ = _histogram._count(
        rgb, 0, 0, center, conic, np.array([30.0]), 8, np.zeros(256, dtype=np.int64)
    )
    assert indptr[-1] == len(bins) > 1024
    assert counts.sum() == whole_pixels(center, conic)[0]
    assert len(np.unique(bins)) == len(bins)


def test_nothing_is_shown_for_short_work(make_sdata: MakeSData, capsys: pytest.CaptureFixture[str]) -> None:
    count(make_sdata())
    assert "colour histograms" not in capsys.readouterr().err


def test_spots_smaller_than_a_pixel_are_named(make_sdata: MakeSData, log: io.StringIO) -> None:
    # Most likely the spots are in other units than the transformations say.
    sdata = make_sdata()
    sdata["A_spots"]["radius"] = 0.01
    assert (count(sdata, field=1.0).n_pixels == 0).sum() > 20
    assert "smaller than a pixel" in log.getvalue()
