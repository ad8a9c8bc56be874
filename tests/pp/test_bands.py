from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore, WrapperStore

from stpredict._data.slide import Section
from stpredict.pp._bands import Band, Boxes, bands, check_memory

PADDING = 150


class CountingStore(WrapperStore[MemoryStore]):
    """Counts how often each chunk is read."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.reads: Counter[str] = Counter()

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if "zarr.json" not in key:
            self.reads[key] += 1
        return await super().get(key, *args, **kwargs)


NewSection = Callable[..., Section]


def make_image(height: int = 300, width: int = 260) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)


def make_boxes(n: int, height: int = 300, width: int = 260, seed: int = 0) -> Boxes:
    """Boxes of many sizes, some of which reach far beyond the image."""
    rng = np.random.default_rng(seed)
    top, left = rng.integers(-60, height - 5, n), rng.integers(-60, width - 5, n)
    return Boxes(top, top + rng.integers(1, 120, n), left, left + rng.integers(1, 120, n))


def expected_box(image: np.ndarray, boxes: Boxes, i: int) -> np.ndarray:
    padded = np.pad(image, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)), constant_values=255)
    rows = slice(boxes.top[i] + PADDING, boxes.bottom[i] + PADDING)
    return padded[:, rows, boxes.left[i] + PADDING : boxes.right[i] + PADDING].transpose(1, 2, 0)


def box_of(band: Band, boxes: Boxes, i: int) -> np.ndarray:
    assert boxes.top[i] >= band.y and boxes.left[i] >= band.x
    rows = slice(boxes.top[i] - band.y, boxes.bottom[i] - band.y)
    found = band.pixels[rows, boxes.left[i] - band.x : boxes.right[i] - band.x]
    assert found.shape[:2] == (boxes.bottom[i] - boxes.top[i], boxes.right[i] - boxes.left[i]), "cut off"
    return found


@pytest.mark.parametrize("chunks", [(3, 64, 64), (1, 37, 300), (3, -1, 20)])
def test_every_box_is_met_once_and_whole(chunks: tuple[int, int, int], new_section: NewSection) -> None:
    image, boxes = make_image(), make_boxes(80)
    section = new_section(da.from_array(image, chunks=chunks))
    expected = [expected_box(image, boxes, i) for i in range(80)]
    for rows, align in ((1, 1), (1, 16), (50, 4), (50, 16), (128, 1), (10_000, 4)):
        met: list[int] = []
        for band in bands(section, boxes, align=align, rows=rows):
            assert band.y % align == 0
            assert band.x % align == 0
            for i in band.boxes:
                np.testing.assert_array_equal(box_of(band, boxes, i), expected[i])
            met.extend(band.boxes)
        assert sorted(met) == list(range(80))


def test_few_boxes_with_gaps_between_them(new_section: NewSection) -> None:
    image = make_image(900, 200)
    section = new_section(da.from_array(image, chunks=(3, 50, 70)))
    for seed in range(20):
        boxes = make_boxes(4, 900, 200, seed)
        met: list[int] = []
        for band in bands(section, boxes, align=8, rows=50):
            for i in band.boxes:
                np.testing.assert_array_equal(box_of(band, boxes, i), expected_box(image, boxes, i))
            met.extend(band.boxes)
        assert sorted(met) == list(range(4))


def test_boxes_beyond_memory_are_refused_before_anything_is_read(new_section: NewSection) -> None:
    def fail(*_: Any) -> np.ndarray:
        raise AssertionError("read")

    shape = (3,), (20_000,) * 3, (20_000,) * 3
    section = new_section(da.map_blocks(fail, chunks=shape, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8)))
    top = np.array([0, 30_000])
    check_memory(section, Boxes(top, top + 10_000, top, top + 10_000), align=8)
    with pytest.raises(ValueError, match=r"need 60 GB of memory for bands.*\(70,000 pixels\). Use fewer `levels`"):
        check_memory(section, Boxes(top, top + 70_000, top, top + 70_000), align=8)
    check_memory(section, Boxes(*(np.zeros(0, dtype=np.int64),) * 4), align=8)


def test_no_boxes(new_section: NewSection) -> None:
    assert list(bands(new_section(da.zeros((3, 90, 80), dtype=np.uint8)), make_boxes(0))) == []


@pytest.mark.parametrize("rows", [1, 90])
def test_each_chunk_is_read_at_most_once_and_only_if_needed(rows: int, new_section: NewSection) -> None:
    image = make_image(400, 5000)
    store = CountingStore(MemoryStore())
    on_disk = zarr.create_array(store, shape=image.shape, chunks=(3, 40, 100), dtype="u1")
    on_disk[:] = image
    store.reads.clear()
    top, left = np.array([10, 30, 55, 300, 310]), np.array([20, 30, 60, 4500, 4700])
    boxes = Boxes(top, top + 70, left, left + 70)
    for band in bands(new_section(da.from_zarr(on_disk)), boxes, rows=rows, align=16):
        for i in band.boxes:
            np.testing.assert_array_equal(box_of(band, boxes, i), expected_box(image, boxes, i))
    assert set(store.reads.values()) == {1}
    read = [tuple(int(part) for part in key.split("/")[-2:]) for key in store.reads]
    assert {(0, 0), (3, 1), (7, 45), (9, 47)} <= set(read)
    assert not {(row, column) for row, column in read if row in (5, 6) or 20 < column < 40}
    assert not {(row, column) for row, column in read if row < 4 and column > 40}


def test_alignment_reads_no_chunk_again(new_section: NewSection) -> None:
    """A band that must begin above its chunks, where nothing is wanted, leaves those of the band before alone."""
    store = CountingStore(MemoryStore())
    on_disk = zarr.create_array(store, shape=(3, 80, 40), chunks=(3, 40, 40), dtype="u1", fill_value=1)
    on_disk[:] = 7
    store.reads.clear()
    top = np.array([5, 48])
    met = [
        box_of(band, boxes, i)
        for boxes in [Boxes(top, top + 10, top * 0, top * 0 + 10)]
        for band in bands(new_section(da.from_zarr(on_disk)), boxes, rows=1, align=32)
        for i in band.boxes
    ]
    assert len(met) == 2 and all((box == 7).all() for box in met)
    assert list(store.reads.values()) == [1, 1]


def test_one_page_is_decoded_once(new_section: NewSection) -> None:
    """As `dask_image.imread` gives it: all chunks are cut from one page."""
    image, reads = make_image(), []

    def decode() -> np.ndarray:
        reads.append(1)
        return image[None]

    page = da.map_blocks(decode, chunks=((1,), *((size,) for size in image.shape)), dtype=np.uint8, meta=image[None])
    pixels = page[0].rechunk((3, 32, 32))
    reads.clear()
    boxes = make_boxes(50)
    (band,) = bands(new_section(pixels), boxes, rows=32)
    assert len(band.boxes) == 50
    assert len(reads) == 1


def test_chunks_that_only_neighbors_share_do_not_join_bands(new_section: NewSection) -> None:
    image = make_image()
    pixels = (da.from_array(image, chunks=(3, 50, 60)) * 1).rechunk((3, 64, 64))
    assert len(list(bands(new_section(pixels), make_boxes(100), rows=64))) > 3


def test_the_next_band_is_read_while_one_is_in_use(new_section: NewSection) -> None:
    second_read = threading.Event()

    def read(block: np.ndarray, block_info: Any = None) -> np.ndarray:
        if block_info and block_info[0]["chunk-location"][1] == 1:
            second_read.set()
        return block

    image = make_image()
    pixels = da.from_array(image, chunks=(3, 100, -1)).map_blocks(read, dtype=np.uint8)
    top = np.array([10, 110, 210])
    second_read.clear()
    found = bands(new_section(pixels), Boxes(top, top + 20, top, top + 20), rows=100)
    first = next(found)
    assert list(first.boxes) == [0]
    assert second_read.wait(timeout=20)
    del found
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bands")]


def test_memory_is_bounded_by_bands_not_by_the_image(new_section: NewSection) -> None:
    pixels = da.zeros((3, 20_000, 300), chunks=(3, 100, 300), dtype=np.uint8)
    top = np.arange(0, 19_900, 50)
    heights = [band.pixels.shape[0] for band in bands(new_section(pixels), Boxes(top, top + 90, top * 0, top * 0 + 90))]
    assert max(heights) <= 1100 + 90
    assert len(heights) == 19


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_other_pixels_become_uint8_rgb(dtype: str, new_section: NewSection) -> None:
    image, boxes = make_image(), make_boxes(20)
    stored = image[[2, 0, 1]]
    stored = stored.astype(np.uint16) * 257 if dtype == "uint16" else (stored / 255).astype(dtype)
    section = new_section(da.from_array(stored, chunks=(3, 64, 64)), channels=(1, 2, 0))
    for band in bands(section, boxes, rows=64):
        for i in band.boxes:
            np.testing.assert_array_equal(box_of(band, boxes, i), expected_box(image, boxes, i))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((3, 200, 100), 3000, dtype=np.uint16), "12-bit"),
        (np.full((3, 200, 100), 2.0, dtype=np.float32), "0 \\(black\\) to 1"),
        (np.zeros((3, 200, 100), dtype=np.int64), "dtype int64"),
    ],
)
def test_pixels_that_no_rule_converts(pixels: np.ndarray, message: str, new_section: NewSection) -> None:
    def all_bands() -> Iterator[Band]:
        return bands(new_section(da.from_array(pixels, chunks=(3, 50, 50))), make_boxes(20, 200, 100), rows=50)

    with pytest.raises(ValueError, match=message):
        list(all_bands())
