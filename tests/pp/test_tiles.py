from __future__ import annotations

from collections.abc import Callable

import dask.array as da
import numpy as np
import pytest

from stpredict._data.slide import Section
from stpredict.pp import _tiles
from stpredict.pp._tiles import brightest_of, check_dtype, check_range, tiles, to_uint8

NewSection = Callable[..., Section]


def zeros(chunks: tuple[tuple[int, ...], ...], dtype: str = "uint8") -> da.Array:
    return da.zeros([sum(sizes) for sizes in chunks], chunks=chunks, dtype=dtype)


TINY = ((3,), (10,), (10,))


@pytest.mark.parametrize("tile_px", [1, 40, 100, 10_000])
@pytest.mark.parametrize("chunks", [((3,), (64,) * 4 + (9,), (50, 70, 31)), ((1, 2), (265,), (151,))], ids=str)
def test_tiles_are_made_of_chunks_and_hold_every_touched_pixel_once(
    monkeypatch: pytest.MonkeyPatch, new_section: NewSection, tile_px: int, chunks: tuple[tuple[int, ...], ...]
) -> None:
    monkeypatch.setattr(_tiles, "_TILE_PX", tile_px)
    rng = np.random.default_rng(0)
    centers = rng.uniform(-40, [191, 305], (60, 2))
    half = rng.uniform(0.2, 30, (2, 60))
    of_section = new_section(zeros(chunks), centers)
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


def test_small_chunks_are_joined(monkeypatch: pytest.MonkeyPatch, new_section: NewSection) -> None:
    monkeypatch.setattr(_tiles, "_TILE_PX", 100)
    of_section = new_section(zeros(((3,), (30,) * 10, (300,))), [[150, 150]])
    (tile,) = tiles(of_section, np.array([10]), np.array([10]))
    assert (tile.y, tile.x) == (slice(120, 240), slice(0, 300))


def test_tiles_that_no_spot_touches_are_left_out(new_section: NewSection) -> None:
    off = new_section(zeros(((3,), (100, 100), (100,))), [[-50, 20], [20, 400], [9e9, -9e9]])
    assert tiles(off, np.full(3, 10.0), np.full(3, 10.0)) == []


@pytest.mark.parametrize(("channels", "n"), [((0, 1, 2), 3), ((2, 0, 1), 3), ((2, 0, 3), 4)])
def test_uint8_pixels_stay_as_they_are(channels: tuple[int, int, int], n: int) -> None:
    block = np.random.default_rng(0).integers(0, 256, (n, 5, 6), dtype=np.uint8)
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


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_what_can_be_seen_through_is_glass(dtype: str) -> None:
    color, opacity = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    block = np.stack([opacity, color, color, 255 - color])
    kept: dict[str, np.ndarray] = {
        "uint8": block.astype(np.uint8),
        "uint16": block.astype(np.uint16) * 257,
        "float32": block / 255,
    }
    stored = kept[dtype].astype(dtype)
    rgb = to_uint8(stored, (1, 2, 3, 0), "HE")
    expected = (block[1:] * opacity + 255 * (255 - opacity)) / 255
    np.testing.assert_array_equal(rgb, np.rint(expected))
    assert (rgb[:, opacity == 0] == 255).all()
    np.testing.assert_array_equal(rgb[:, :, 255], block[1:, :, 255], err_msg="what cannot be seen through stays")
    opaque = np.concatenate([np.full_like(stored[:1], stored.max()), stored[1:]]).astype(dtype)
    np.testing.assert_array_equal(to_uint8(opaque, (1, 2, 3, 0), "HE"), block[1:])


@pytest.mark.parametrize("bad", [-0.01, 1.01, 255.0, np.nan, np.inf])
def test_floats_outside_of_0_to_1(bad: float) -> None:
    block = np.full((3, 2, 2), 0.5)
    block[1, 1, 0] = bad
    with pytest.raises(ValueError, match=r"float image 'HE' has values from .* to .*; expected 0 \(black\).*uint8"):
        to_uint8(block, (0, 1, 2), "HE")


def test_dtypes(new_section: NewSection) -> None:
    for dtype in ("uint8", "uint16", "float16", "float32", "float64"):
        check_dtype(new_section(zeros(TINY, dtype)))
    for dtype in ("int16", "int64", "uint32", "bool"):
        with pytest.raises(ValueError, match=f"'HE' has dtype {dtype}; expected uint8"):
            check_dtype(new_section(zeros(TINY, dtype)))


@pytest.mark.parametrize("white", [255, 1023, 4095])
def test_uint16_that_holds_fewer_bits(white: int, new_section: NewSection) -> None:
    # Opacity of any depth: transparent pixels are white, and tell nothing of the others.
    for opacity in (None, white, 65535, 0):
        block = np.full((3, 1, 1), white, dtype=np.uint16)
        if opacity is not None:
            block = np.concatenate([block, np.full_like(block[:1], opacity)])
        brightest = brightest_of(block, tuple(range(len(block))))
        with pytest.raises(ValueError, match=r"uint16 image 'HE' is nowhere brighter than \d+ of 65535.*12-bit"):
            check_range(new_section(zeros(TINY, "uint16")), brightest)


def test_uint16_that_is_as_bright_as_it_should_be(new_section: NewSection) -> None:
    assert brightest_of(np.full((3, 1, 1), 60_000, dtype=np.uint16), (0, 1, 2)) == 233
    check_range(new_section(zeros(TINY, "uint16")), 200)
    check_range(new_section(zeros(TINY, "uint8")), 3)
