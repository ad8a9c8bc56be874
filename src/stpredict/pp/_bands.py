"""Rolling bands of rows of a section: boxes of pixels of any size from an image that never has to fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import dask
import dask.array as da
import numba
import numpy as np

from stpredict._data.slide import Section
from stpredict.pp._tiles import brightest_of, check_dtype, check_range, to_uint8

# Rows at which neighbouring rows of chunks stop being joined. Fewer cost more calls and more copies of what two bands
# share, more cost memory: 6 kB for each row and thousand columns.
BAND_ROWS = 1024
# Columns that one reading thread takes at a time.
_PIECE_COLUMNS = 2048
_WHITE = 255
# Two bands together; more than most computers have to spare.
_MAX_BYTES = 16 * 10**9


class Boxes(NamedTuple):
    """Rectangles ``[top, bottom) x [left, right)`` of pixels, each ``(n,)`` integers; they may reach off the image."""

    top: np.ndarray
    bottom: np.ndarray
    left: np.ndarray
    right: np.ndarray


class Band(NamedTuple):
    """Rows of pixels and the boxes that lie wholly within them.

    Attributes
    ----------
    pixels
        ``(height, width, 3)`` uint8 red, green, blue; white beyond the image. What no box touches is undefined. Valid
        until the next band is asked for.
    y, x
        Row and column of the image at which ``pixels`` begins, multiples of ``align``.
    boxes
        Positions of the boxes.
    """

    pixels: np.ndarray
    y: int
    x: int
    boxes: np.ndarray


class _Step(NamedTuple):
    """Band ``[start, stop)``, to be read from the row ``fresh`` on; the band before has the others."""

    start: int
    fresh: int
    stop: int
    touching: np.ndarray
    complete: np.ndarray


def bands(section: Section, boxes: Boxes, *, align: int = 1, rows: int = BAND_ROWS) -> Iterator[Band]:
    """Go down a section so that every box is met once, whole.

    Each chunk is read at most once, and only if a box is near. (Where dask assembles the image's chunks from others, a
    chunk of the source may be read for two neighbouring bands.) While one band is in use, a thread reads the next: two
    bands are in memory, each as high as ``rows`` (or as one row of chunks, whichever is more) and the highest box
    together and as wide as the area that holds boxes.

    Parameters
    ----------
    section
        The image.
    boxes
        What is wanted.
    align
        Bands begin at rows and columns that are multiples of this.
    rows
        New rows of a band, at least.

    Raises
    ------
    ValueError
        Pixels that no documented rule converts to uint8; see :func:`stpredict.pp.color_histogram`.
    """
    check_dtype(section)
    steps = _steps(section, boxes, align, rows)
    if not steps:
        return
    left = int(boxes.left.min()) // align * align
    right = -(int(boxes.right.max()) // -align) * align
    height = max(step.stop - step.start for step in steps)
    buffers = [np.full((height, right - left, 3), _WHITE, dtype=np.uint8) for _ in steps[:2]]
    brightest = 0
    with ThreadPoolExecutor(1, thread_name_prefix="bands") as reader:
        reading = reader.submit(_read, section, boxes, steps[0], buffers[0], left)
        for i, step in enumerate(steps):
            brightest = max(brightest, reading.result())
            here, other = buffers[i % 2], buffers[(i + 1) % len(buffers)]
            if i and (shared := steps[i - 1].stop - step.start) > 0:
                first = step.start - steps[i - 1].start
                here[:shared] = other[first : first + shared]
            if i + 1 < len(steps):
                reading = reader.submit(_read, section, boxes, steps[i + 1], other, left)
            yield Band(here[: step.stop - step.start], step.start, left, step.complete)
    check_range(section, brightest)


def check_memory(section: Section, boxes: Boxes, *, align: int) -> None:
    """Refuse boxes so large that their bands would not fit into memory, before anything is read.

    Raises
    ------
    ValueError
        What is needed.
    """
    if not (steps := _steps(section, boxes, align, BAND_ROWS)):
        return
    width = int(boxes.right.max()) - int(boxes.left.min()) + align
    needed = 2 * 3 * width * max(step.stop - step.start for step in steps)
    if needed > _MAX_BYTES:
        raise ValueError(
            f"The patches of {section.name!r} need {needed / 1e9:.0f} GB of memory for bands of pixels as wide as their widest "
            f"level ({int((boxes.right - boxes.left).max()):,} pixels). Use fewer `levels` or a smaller `spot_scale`, and check "
            "the spots' radius."
        )


def _steps(section: Section, boxes: Boxes, align: int, rows: int) -> list[_Step]:
    """One step for each group of rows of chunks that a box touches."""
    groups = _row_groups(section.pixels, rows)
    steps: list[_Step] = []
    for i, (low, high) in enumerate(groups):
        # What lies above or below the image belongs to its first or last rows.
        first, last = i == 0, i == len(groups) - 1
        touching = np.flatnonzero(((boxes.bottom > low) | first) & ((boxes.top < high) | last))
        if len(touching) == 0:
            continue
        start = int(boxes.top[touching].min()) // align * align
        bottom = int(boxes.bottom[touching].max())
        stop = bottom if last else min(bottom, high)
        fresh = start if first else max(start, low)
        steps.append(_Step(start, fresh, stop, touching, touching[boxes.bottom[touching] <= stop]))
    return steps


def _row_groups(pixels: da.Array, rows: int) -> list[tuple[int, int]]:
    """Join rows of chunks until they are high enough and share no work with any but their neighbours.

    Chunks that dask cuts from one page of a TIFF, say, would each decode all of it.
    """
    edges = np.cumsum((0, *pixels.chunks[1]))
    first = [0]  # the first row of chunks of each group
    for i in range(1, len(edges) - 1):
        if edges[i] - edges[first[-1]] >= rows:
            first.append(i)
    group = np.searchsorted(first, np.arange(len(edges) - 1), side="right") - 1
    joined = np.zeros(len(first), dtype=bool)  # to the group before
    for low, high in _work_ranges(pixels, group):
        if high - low > 1:
            joined[low + 1 : high + 1] = True
    starts = [int(edges[i]) for i, to_previous in zip(first, joined, strict=True) if not to_previous]
    return list(zip(starts, [*starts[1:], int(edges[-1])], strict=True))


def _work_ranges(pixels: da.Array, group: np.ndarray) -> list[tuple[int, int]]:
    """First and last group of rows of chunks for which each task that several chunks share is needed."""
    graph = pixels.dask
    if len(graph) <= pixels.npartitions + 1:  # a task for each chunk, and perhaps the array on disk
        return []
    needs = graph.get_all_dependencies()
    ranges: dict[Any, tuple[int, int]] = {}
    for block in sorted(np.ndindex(pixels.numblocks), key=lambda block: block[1]):
        row = int(group[block[1]])
        todo: list[Any] = [(pixels.name, *block)]
        while todo:
            key = todo.pop()
            low, high = ranges.get(key, (row, -1))
            if high < row:
                ranges[key] = low, row
                todo.extend(needs[key])
    # What is not callable is data, which costs nothing to share.
    return [(low, high) for key, (low, high) in ranges.items() if high > low and callable(graph[key])]


def _read(section: Section, boxes: Boxes, step: _Step, buffer: np.ndarray, left: int) -> int:
    """Fill a band's fresh rows; return the brightest intensity (uint16 images only: others need no check)."""
    top, bottom = max(step.fresh, 0), min(step.stop, section.height)
    buffer[max(bottom, step.fresh) - step.start : step.stop - step.start] = _WHITE
    near = step.touching[(boxes.bottom[step.touching] > top) & (boxes.top[step.touching] < bottom)]
    jobs = []
    for start, stop in _pieces(section.pixels.chunks[2]):
        low, high = max(start, left), min(stop, left + buffer.shape[1])
        if top < bottom and ((boxes.right[near] > low) & (boxes.left[near] < high) & (low < high)).any():
            put = partial(
                _put,
                buffer=buffer,
                y=top - step.start,
                x=low - left,
                channels=section.channels,
                image_key=section.image_key,
            )
            jobs.append(dask.delayed(put)(section.pixels[:, top:bottom, low:high]))
    # Pixels are needed here: a cluster that is open elsewhere would only send them back.
    return max(dask.compute(*jobs, scheduler="threads"), default=0)


def _pieces(chunks: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Runs of chunks, wide enough to be worth a task."""
    start = stop = 0
    for size in chunks:
        stop += size
        if stop - start >= _PIECE_COLUMNS:
            yield start, stop
            start = stop
    if start < stop:
        yield start, stop


def _put(block: np.ndarray, *, buffer: np.ndarray, y: int, x: int, channels: tuple[int, ...], image_key: str) -> int:
    block = np.asarray(block)
    _interleave(to_uint8(block, channels, image_key), buffer, y, x)
    return brightest_of(block, channels)


@numba.njit(nogil=True, cache=True)
def _interleave(planes, pixels, top, left):  # type: ignore[no-untyped-def]
    """Copy planes of red, green and blue into a rectangle of pixels."""
    _, height, width = planes.shape
    for y in range(height):
        red, green, blue, row = planes[0, y], planes[1, y], planes[2, y], pixels[top + y]
        for x in range(width):
            row[left + x, 0] = red[x]
            row[left + x, 1] = green[x]
            row[left + x, 2] = blue[x]
