"""The part of a section's image that lies behind its spots, as sharp as a picture needs it."""

from __future__ import annotations

from typing import Any, NamedTuple

import dask.array as da
import numpy as np
import xarray as xr
from spatialdata.models import Image2DModel
from spatialdata.transformations import Affine, get_transformation

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


def view_of_spots(section: Section, image: xr.DataArray | xr.DataTree, footer: float) -> View:
    """The spots with some room around them.

    Parameters
    ----------
    section
        Its centres are in pixels of the full resolution.
    image
        The section's image.
    footer
        Room to keep free below, as part of the height.
    """
    to_world = _affine(_levels(image)[0], section.coordinate_system)
    units_per_pixel = float(np.sqrt(abs(np.linalg.det(to_world[:2, :2]))))
    centers = section.centers @ to_world[:2, :2].T + to_world[:2, 2]
    margin = (0.5 + _MARGIN) * float(section.diameters.max()) * units_per_pixel
    (x0, y0), (x1, y1) = centers.min(axis=0) - margin, centers.max(axis=0) + margin
    return View(x0, x1, y0, y1 + footer * (y1 - y0), units_per_pixel)


def tissue_in_view(section: Section, image: xr.DataArray | xr.DataTree, view: View) -> xr.DataArray:
    """Cut the view out of the coarsest level that is sharp enough; 8-bit RGB, placed in the coordinate system.

    spatialdata-plot would choose a level for the whole image, which is too coarse for a section that covers a small
    part of a slide, and would read an image of a single scale in full.
    """
    for level in reversed(_levels(image)):
        to_world = _affine(level, section.coordinate_system)
        x, y = _pixels_in_view(to_world, view, level)
        longer = max(x.stop - x.start, y.stop - y.start)
        if longer >= _SHARP_PX:
            break
    pixels = da.asarray(level.data)[:, y, x]
    step = max(1, longer // _SHARP_PX)
    if step > 1:
        pixels = da.coarsen(np.mean, pixels, {1: step, 2: step}, trim_excess=True).astype(pixels.dtype)
    rgb = to_uint8(pixels.compute(), section.channels, section.image_key)
    from_crop = np.array([[step, 0, x.start], [0, step, y.start], [0, 0, 1]])
    placed = Affine(to_world @ from_crop, input_axes=("x", "y"), output_axes=("x", "y"))
    return Image2DModel.parse(
        rgb, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations={section.coordinate_system: placed}
    )


def _levels(image: xr.DataArray | xr.DataTree) -> list[xr.DataArray]:
    """Finest first."""
    if isinstance(image, xr.DataTree):
        found = [next(iter(scale.ds.values())) for scale in image.children.values()]
    else:
        found = [image]
    return [level.transpose("c", "y", "x") for level in found]


def _affine(element: Any, coordinate_system: str) -> np.ndarray:
    return np.asarray(get_transformation(element, coordinate_system).to_affine_matrix(("x", "y"), ("x", "y")))


def _pixels_in_view(to_world: np.ndarray, view: View, level: xr.DataArray) -> tuple[slice, slice]:
    corners = np.array([[x, y, 1] for x in (view.x0, view.x1) for y in (view.y0, view.y1)])
    x, y = np.linalg.solve(to_world, corners.T)[:2]
    return _clipped(x, level.sizes["x"]), _clipped(y, level.sizes["y"])


def _clipped(positions: np.ndarray, size: int) -> slice:
    return slice(max(int(np.floor(positions.min())), 0), min(int(np.ceil(positions.max())), size))
