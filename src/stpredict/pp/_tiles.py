"""Chunk-aligned tiles of an image, so that each chunk of a backed image is read once and memory stays bounded."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stpredict._data.slide import Section

# Pixels a side at which neighbouring chunks stop being joined: 12 MB of uint8 RGB a tile.
_TILE_PX = 2048
# A uint16 image whose brightest pixel is no brighter than this looks like 12-bit (or 8-bit) data.
_MAX_12_BIT = 4095


class Tile(NamedTuple):
    """A rectangle of pixels and the spots whose footprints touch it."""

    y: slice
    x: slice
    spots: np.ndarray


def tiles(section: Section, half_width: np.ndarray, half_height: np.ndarray) -> list[Tile]:
    """Cut a section's image along its chunks; tiles that no spot touches are left out.

    Parameters
    ----------
    section
        The image and the centers of the spots.
    half_width, half_height
        ``(n,)`` half the size, in pixels, of the box around each spot whose pixels are wanted.
    """
    x, y = section.centers.T
    x0, x1 = _cell_range(section.pixels.chunks[2], x - half_width, x + half_width)
    y0, y1 = _cell_range(section.pixels.chunks[1], y - half_height, y + half_height)
    cells_x, cells_y = _cells(section.pixels.chunks[2]), _cells(section.pixels.chunks[1])
    found = []
    for row, rows in enumerate(cells_y):
        in_row = np.flatnonzero((y0 <= row) & (row < y1))
        for column in range(len(cells_x)):
            spots = in_row[(x0[in_row] <= column) & (column < x1[in_row])]
            if len(spots):
                found.append(Tile(rows, cells_x[column], spots))
    return found


def _cells(chunks: tuple[int, ...]) -> list[slice]:
    """Join chunks along one axis until they are wide enough."""
    cells, start, stop = [], 0, 0
    for size in chunks:
        stop += size
        if stop - start >= _TILE_PX:
            cells.append(slice(start, stop))
            start = stop
    if start < stop:
        cells.append(slice(start, stop))
    return cells


def _cell_range(chunks: tuple[int, ...], low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First cell that each interval touches, and the one after the last."""
    edges = np.array([0] + [cell.stop for cell in _cells(chunks)])
    first = np.searchsorted(edges, np.floor(low), side="right") - 1
    last = np.searchsorted(edges, np.ceil(high), side="left")
    return np.maximum(first, 0), np.minimum(last, len(edges) - 1)


def to_uint8(block: np.ndarray, channels: tuple[int, ...], image_key: str) -> np.ndarray:
    """Pixels of a block as C-contiguous uint8 RGB, by the rule that :func:`stpredict.pp.color_histogram` documents.

    Where there is a fourth channel, opacity, colors are laid over white: what can be seen through is glass.
    """
    if channels != tuple(range(block.shape[0])):
        block = block[list(channels)]
    if block.dtype == np.uint8:
        pixels = np.ascontiguousarray(block)
    elif block.dtype == np.uint16:
        pixels = ((block.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif np.isfinite(block).all() and block.min() >= 0 and block.max() <= 1:
        pixels = np.rint(block * 255).astype(np.uint8)
    else:
        raise ValueError(
            f"The float image {image_key!r} has values from {block.min():.4g} to {block.max():.4g}; expected 0 (black) "
            "to 1 (white). Rescale it, or convert it to uint8."
        )
    return pixels if len(channels) == 3 else _over_white(pixels)


def brightest_of(block: np.ndarray, channels: tuple[int, ...]) -> int:
    """Brightest color of a uint16 block, as uint8; what can be seen through does not make it brighter."""
    return max(int(block[c].max()) + 128 for c in channels[:3]) // 257 if block.dtype == np.uint16 else 0


def _over_white(pixels: np.ndarray) -> np.ndarray:
    """``(3, y, x)`` from ``(4, y, x)``; opaque pixels keep their values."""
    rgb, opacity = pixels[:3], pixels[3]
    if (opacity == 255).all():
        return np.ascontiguousarray(rgb)
    weighted = rgb.astype(np.uint16) * opacity + np.uint16(255) * (255 - opacity.astype(np.uint16))
    return ((weighted + np.uint16(127)) // np.uint16(255)).astype(np.uint8)


def check_dtype(section: Section) -> None:
    """Refuse pixels that no documented rule converts, before any is read."""
    dtype = section.pixels.dtype
    if dtype not in (np.uint8, np.uint16) and dtype.kind != "f":
        raise ValueError(
            f"The image {section.image_key!r} has dtype {dtype}; expected uint8 (0 to 255), uint16 (0 to 65535) or "
            "float (0 to 1)."
        )


def check_range(section: Section, brightest: int) -> None:
    """Refuse uint16 pixels that look like 12- or 8-bit data once the brightest, as uint8, is known."""
    if section.pixels.dtype == np.uint16 and brightest <= (_MAX_12_BIT + 128) // 257:
        raise ValueError(
            f"The uint16 image {section.image_key!r} is nowhere brighter than {(brightest + 1) * 257 - 129} of 65535: "
            "it looks like 8- or 12-bit data. Rescale it so that white is 65535, or convert it to uint8."
        )
