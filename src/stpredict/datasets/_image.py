"""A multiscale image from pixels in memory."""

from __future__ import annotations

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from spatialdata.models import Image2DModel
from spatialdata.transformations import Identity

_CHUNK = 1024
_BAND = 64  # rows averaged at a time: small enough to stay in the processor's cache


def multiscale_image(pixels: NDArray[np.uint8], coordinate_system: str) -> xr.DataTree:
    """
    RGB pixels (3 x height x width, uint8) as a multiscale image of spatialdata, all scales in memory.

    Every scale halves the one before it until the longer side has at most 1,024 pixels; chunks have 1,024² pixels.
    """
    levels = [pixels]
    while max(levels[-1].shape[1:]) > _CHUNK:
        levels.append(_halve(levels[-1]))
    # Random names: dask would otherwise hash all pixels to make one.
    chunked = [da.from_array(level, chunks=(3, _CHUNK, _CHUNK), name=False) for level in levels]
    # The model lays out scales, coordinates and transformations. Its own averages are lazy: they would be computed
    # from the full image whenever one of them is drawn.
    tree = Image2DModel.parse(
        chunked[0],
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        transformations={coordinate_system: Identity()},
        scale_factors=[2] * (len(levels) - 1),
        chunks=(3, _CHUNK, _CHUNK),
    )
    for scale, level in zip(tree.children.values(), chunked, strict=True):
        scale["image"] = scale["image"].copy(data=level)
    return tree


def _halve(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Means of 2 x 2 pixels, rounded (not floored, which would darken scale after scale); an odd last line is left out."""
    height, width = pixels.shape[1] // 2, pixels.shape[2] // 2
    halved = np.empty((pixels.shape[0], height, width), np.uint8)
    for y in range(0, height, _BAND):
        band = pixels[:, 2 * y : 2 * min(y + _BAND, height), : 2 * width]
        rows = np.add(band[:, ::2], band[:, 1::2], dtype=np.uint16)
        halved[:, y : y + _BAND] = (rows[:, :, ::2] + rows[:, :, 1::2] + 2) >> 2
    return halved
