from __future__ import annotations

import dask.array as da
import numpy as np
import pytest

from stpredict._data.slide import Section
from stpredict.pp import _tiles
from stpredict.pp._tiles import check_dtype, check_range, tiles, to_uint8


def section(centers: np.ndarray, chunks: tuple[tuple[int, ...], ...], dtype: str = "uint8") -> Section:
    """A section with unit spots at the given pixels."""
    n = len(centers)
    return Section(
        name="spots",
        image_key="HE",
        coordinate_system="global",
        pixels=da.zeros([sum(sizes) for sizes in chunks], chunks=chunks, dtype=dtype),
        channels=(0, 1, 2),
        affine=np.eye(3),
        centers=np.asarray(centers, dtype=float),
        radii=np.ones(n),
        instances=np.arange(n),
        rows=np.arange(n),
    )


@pytest.mark.parametrize("tile_px", [1, 40, 100, 10_000])
@pytest.mark.parametrize("chunks", [((3,), (64,) * 4 + (9,), (50, 70, 31)), ((1, 2), (265,), (151,))], ids=str)
def test_tiles_are_made_of_chunks_and_hold_every_touched_pixel_once(
    monkeypatch: pytest.MonkeyPatch, tile_px: int, chunks: tuple[tuple[int, ...], ...]
) -> None:
    monkeypatch.setattr(_tiles, "_TILE_PX", tile_px)
    rng = np.random.default_rng(0)
    centers = rng.uniform(-40, [191, 305], (60, 2))
    half = rng.uniform(0.2, 30, (2, 60))
    of_section = section(centers, chunks)
    seen = np.zeros((60, 265, 151), dtype=int)
    taken = np.zeros((265, 151), dtype=int)
    for tile in tiles(of_section, *half):
        assert tile.y.start in np.cumsum((0, *chunks[1]))
        assert tile.x.start in np.cumsum((0, *chunks[2]))
        assert len(tile.spots)
        taken[tile.y, tile.x] += 1
        seen[tile.spots, tile.y, tile.x] += 1
    assert taken.max() == 1

    x, y = np.arange(151) + 0.5, np.arange(265) + 0.5
    in_x = np.abs(x - centers[:, :1]) <= half[0][:, None]
    in_y = np.abs(y - centers[:, 1:]) <= half[1][:, None]
    assert (seen[in_y[:, :, None] & in_x[:, None, :]] == 1).all()


def test_small_chunks_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "_TILE_PX", 100)
    of_section = section(np.array([[150, 150]]), ((3,), (30,) * 10, (300,)))
    (tile,) = tiles(of_section, np.array([10]), np.array([10]))
    assert (tile.y, tile.x) == (slice(120, 240), slice(0, 300))


def test_tiles_that_no_spot_touches_are_left_out() -> None:
    off = section(np.array([[-50, 20], [20, 400], [9e9, -9e9]]), ((3,), (100, 100), (100,)))
    assert tiles(off, np.full(3, 10.0), np.full(3, 10.0)) == []


@pytest.mark.parametrize("channels", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("n_channels", [3, 4])
def test_uint8_pixels_stay_as_they_are(channels: tuple[int, int, int], n_channels: int) -> None:
    block = np.random.default_rng(0).integers(0, 256, (n_channels, 5, 6), dtype=np.uint8)
    rgb = to_uint8(block, channels, "HE")
    np.testing.assert_array_equal(rgb, block[list(channels)])
    assert rgb.flags.c_contiguous


@pytest.mark.parametrize("dtype", ["uint16", "float32", "float64"])
def test_conversion_is_rounded_and_keeps_8_bit_data(dtype: str) -> None:
    levels = np.arange(256, dtype=np.uint8)
    block = np.broadcast_to(levels, (3, 1, 256))
    deep = block.astype(np.uint16) * 257 if dtype == "uint16" else (block / 255).astype(dtype)
    rgb = to_uint8(deep, (0, 1, 2), "HE")
    np.testing.assert_array_equal(rgb, block)
    assert rgb.dtype == np.uint8


def test_uint16_is_divided_by_257_and_rounded_to_the_nearest() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(1, 1, -1).repeat(3, axis=0)
    np.testing.assert_array_equal(to_uint8(every, (0, 1, 2), "HE"), np.rint(every / 257))


@pytest.mark.parametrize("bad", [-0.01, 1.01, 255.0, np.nan, np.inf])
def test_floats_outside_of_0_to_1(bad: float) -> None:
    block = np.full((3, 2, 2), 0.5)
    block[1, 1, 0] = bad
    with pytest.raises(ValueError, match=r"float image 'HE' has values from .* to .*; expected 0 \(black\).*uint8"):
        to_uint8(block, (0, 1, 2), "HE")


@pytest.mark.parametrize("dtype", ["int16", "int64", "uint32", "bool"])
def test_other_dtypes(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"'HE' has dtype {dtype}; expected uint8"):
        check_dtype(section(np.zeros((1, 2)), ((3,), (10,), (10,)), dtype))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
def test_known_dtypes(dtype: str) -> None:
    check_dtype(section(np.zeros((1, 2)), ((3,), (10,), (10,)), dtype))


@pytest.mark.parametrize("white", [255, 1023, 4095])
def test_uint16_that_holds_fewer_bits(white: int) -> None:
    deep = section(np.zeros((1, 2)), ((3,), (10,), (10,)), "uint16")
    brightest = to_uint8(np.full((3, 1, 1), white, dtype=np.uint16), (0, 1, 2), "HE").max()
    with pytest.raises(ValueError, match=r"uint16 image 'HE' is nowhere brighter than \d+ of 65535.*12-bit"):
        check_range(deep, int(brightest))


def test_uint16_that_is_as_bright_as_it_should_be() -> None:
    check_range(section(np.zeros((1, 2)), ((3,), (10,), (10,)), "uint16"), 200)
    check_range(section(np.zeros((1, 2)), ((3,), (10,), (10,)), "uint8"), 3)
