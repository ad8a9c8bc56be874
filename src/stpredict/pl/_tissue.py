"""The part of a section's image that lies behind its spots, as sharp as a picture needs it."""

from __future__ import annotations

from typing import NamedTuple

import dask.array as da
import numpy as np
import xarray as xr
from spatialdata.models import Image2DModel
from spatialdata.transformations import Affine

from stpredict._data.image import Level, apply_affine
from stpredict._data.slide import Section
from stpredict.pp._tiles import to_uint8

# Least number of pixels along the longer side: sharp at twice a notebook's resolution.
_SHARP_PX = 700
# Room around the spots, in spot diameters.
_MARGIN = 1.0


class View(NamedTuple):
    """A rectangle in a section's coordinate system, and how long a pixel of the full-resolution image is there."""

    x0: float
    x1: float
    y0: float
    y1: float
    units_per_pixel: float

    @property
    def width(self) -> float:
        """In units of the coordinate system, as is the height."""
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        """Images grow downwards: ``y0`` is the upper end."""
        return self.y1 - self.y0


def view_of_spots(section: Section, footer: float) -> View:
    """The spots with some room around them, and ``footer`` of the height free below."""
    to_world = section.levels[0].to_world
    units_per_pixel = float(np.sqrt(abs(np.linalg.det(to_world[:2, :2]))))
    centers = apply_affine(to_world, section.centers)
    margin = (0.5 + _MARGIN) * float(section.diameters.max()) * units_per_pixel
    (x0, y0), (x1, y1) = centers.min(axis=0) - margin, centers.max(axis=0) + margin
    return View(x0, x1, y0, y1 + footer * (y1 - y0), units_per_pixel)


def tissue_in_view(section: Section, view: View) -> xr.DataArray:
    """Cut the view out of the coarsest level that is sharp enough; 8-bit RGB, placed in the coordinate system.

    spatialdata-plot would choose a level for the whole image, which is too coarse for a section that covers a small
    part of a slide, and would read an image of a single scale in full.
    """
    for level in reversed(section.levels):
        x, y = _pixels_in_view(level, view)
        longer = max(x.stop - x.start, y.stop - y.start)
        if longer >= _SHARP_PX:
            break
    pixels = level.pixels[:, y, x]
    step = max(1, longer // _SHARP_PX)
    if step > 1:
        pixels = da.coarsen(np.mean, pixels, {1: step, 2: step}, trim_excess=True).astype(pixels.dtype)
    rgb = to_uint8(pixels.compute(), section.channels, section.image_key)
    from_crop = np.array([[step, 0, x.start], [0, step, y.start], [0, 0, 1]])
    placed = Affine(level.to_world @ from_crop, input_axes=("x", "y"), output_axes=("x", "y"))
    return Image2DModel.parse(
        rgb, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations={section.coordinate_system: placed}
    )


def _pixels_in_view(level: Level, view: View) -> tuple[slice, slice]:
    corners = np.array([[x, y, 1] for x in (view.x0, view.x1) for y in (view.y0, view.y1)])
    x, y = np.linalg.solve(level.to_world, corners.T)[:2]
    return _clipped(x, level.pixels.shape[2]), _clipped(y, level.pixels.shape[1])


def _clipped(positions: np.ndarray, size: int) -> slice:
    return slice(max(int(np.floor(positions.min())), 0), min(int(np.ceil(positions.max())), size))
