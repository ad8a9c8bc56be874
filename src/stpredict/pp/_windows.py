"""Where patches lie on a pyramid of averages, and how they are cut from a band of rows."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import NamedTuple

import numba
import numpy as np

from stpredict._data.slide import Section
from stpredict.pp._bands import Band, Boxes

# A window whose scale is off by less is not resized: it is out of place by a tenth of a pixel at its edges.
_SAME_SCALE = 1e-3
# Pixels around a window that is resized, so that its edges see what lies beyond them: the filter's reach is below 2.
_MARGIN = 2
# Pieces of a band that threads halve.
_PIECES = 8


class Windows(NamedTuple):
    """Where the patches lie on the pyramid of box averages, ``(n_spots, levels)`` and, per axis, ``(…, 2)`` (x, y).

    Attributes
    ----------
    halvings
        Step of the pyramid: how often 2 x 2 pixels are averaged.
    scale
        Pixels of the pyramid for one of the patch; 1 is not resized.
    first, stop
        Pixels of the pyramid to take.
    cut
        Where, after resizing, the patch begins.
    size
        Pixels of a patch along each side.
    """

    halvings: np.ndarray
    scale: np.ndarray
    first: np.ndarray
    stop: np.ndarray
    cut: np.ndarray
    size: int

    @property
    def depth(self) -> int:
        """Steps of the pyramid after the first."""
        return int(self.halvings.max())

    def of(self, spots: np.ndarray) -> Windows:
        """Those of some spots."""
        return self._replace(**{name: getattr(self, name)[spots] for name in self._fields if name != "size"})

    def boxes(self) -> Boxes:
        """Pixels of the image that a spot's levels need together."""
        unit = 2 ** self.halvings[..., None]
        left, top = (self.first * unit).min(axis=1).T
        right, bottom = (self.stop * unit).max(axis=1).T
        return Boxes(top, bottom, left, right)


def place_windows(section: Section, levels: int, image_size: int, spot_scale: float) -> Windows:
    """Find the windows of a section's spots.

    Box averages come first, as many as fit, and leave a scale from 1 to below 2 (below 1 where the image is coarser
    than the patch). A window whose scale is 1 is placed to half a pixel of the pyramid; any other is resized by exactly
    its scale together with its surroundings, and the patch cut from the result to half a pixel of its own.

    Parameters
    ----------
    section
        The image and the spots.
    levels, image_size, spot_scale
        As in :func:`stpredict.pp.patches`.
    """
    scale = spot_scale * section.diameters[:, None] * 2.0 ** np.arange(levels) / image_size
    halvings = np.maximum(np.floor(np.log2(scale * (1 + _SAME_SCALE))), 0).astype(np.int64)
    scale = scale / 2.0**halvings
    plain = np.abs(scale - 1) <= _SAME_SCALE
    scale[plain] = 1
    side, plain = (scale * image_size)[..., None], plain[..., None]
    corner = section.centers[:, None] / 2.0 ** halvings[..., None] - side / 2
    first = np.where(plain, np.floor(corner + 0.5), np.floor(corner) - _MARGIN)
    stop = np.where(plain, first + image_size, np.ceil(corner + side) + _MARGIN)
    cut = np.where(plain, 0, np.floor((corner - first) / scale[..., None] + 0.5))
    first, stop, cut = (values.astype(np.int64) for values in (first, stop, cut))
    return Windows(halvings, scale, first, stop, cut, image_size)


def box_pyramid(pixels: np.ndarray, depth: int, pool: Executor) -> list[np.ndarray]:
    """Averages of blocks of 1, 2 x 2, 4 x 4, … pixels, each rounded (half to even: up would brighten step after step).

    Parameters
    ----------
    pixels
        ``(height, width, 3)`` uint8.
    depth
        Steps after the first. Odd last rows and columns are left out.
    pool
        Threads to use.
    """
    pyramid = [pixels]
    for _ in range(depth):
        height, width, _ = pyramid[-1].shape
        halved = np.empty((height // 2, width // 2, 3), dtype=np.uint8)
        cuts = np.linspace(0, len(halved), _PIECES + 1).astype(np.int64)
        list(pool.map(_halve, [pyramid[-1]] * _PIECES, [halved] * _PIECES, cuts[:-1], cuts[1:]))
        pyramid.append(halved)
    return pyramid


@numba.njit(nogil=True, cache=True)
def _halve(pixels, halved, start, stop):  # type: ignore[no-untyped-def]
    """Average 2 x 2 pixels for some rows of the result."""
    for y in range(start, stop):
        upper, lower, row = pixels[2 * y], pixels[2 * y + 1], halved[y]
        for x in range(halved.shape[1]):
            for c in range(3):
                total = (
                    np.uint16(upper[2 * x, c])
                    + np.uint16(upper[2 * x + 1, c])
                    + np.uint16(lower[2 * x, c])
                    + np.uint16(lower[2 * x + 1, c])
                )
                row[x, c] = (total + np.uint16(1) + ((total >> np.uint16(2)) & np.uint16(1))) >> np.uint16(2)


def cut_patch(pyramid: list[np.ndarray], band: Band, windows: Windows, spot: int) -> np.ndarray:
    """All levels of one spot, ``(levels, size, size, 3)``."""
    levels, size = windows.scale.shape[1], windows.size
    patch = np.empty((levels, size, size, 3), dtype=np.uint8)
    for level in range(levels):
        halvings, scale = int(windows.halvings[spot, level]), float(windows.scale[spot, level])
        origin = np.array([band.x, band.y]) >> halvings
        (left, top), (right, bottom) = windows.first[spot, level] - origin, windows.stop[spot, level] - origin
        window = pyramid[halvings][top:bottom, left:right]
        if scale != 1:
            x, y = windows.cut[spot, level]
            window = _resize(window, 1 / scale)[y : y + size, x : x + size]
        patch[level] = window
    return patch


def _resize(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Scale by exactly ``factor`` from the upper left corner, bilinear with antialiasing."""
    import torch
    from torch.nn.functional import interpolate

    # Twice as fast on channels that lie next to each other, which torch recognises only if the batch has a true stride.
    image = torch.from_numpy(np.ascontiguousarray(pixels).reshape(1, *pixels.shape)).permute(0, 3, 1, 2)
    return interpolate(image, scale_factor=factor, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
