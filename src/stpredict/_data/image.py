"""Which image lies under spots, where on it they are, and which of its channels are red, green and blue."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from scanpy import logging as logg
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

# Two images whose resolutions differ by less than this are "the same resolution".
_SAME_RESOLUTION = 1.01
# Two maps from spots to pixels that agree to this many pixels over the whole image are one map.
_SAME_MAP_PX = 0.01

_CHANNEL_NAMES = {"r": 0, "red": 0, "g": 1, "green": 1, "b": 2, "blue": 2, "a": 3, "alpha": 3}


class Candidate(NamedTuple):
    """An image, the map from the spots' coordinates to its pixels (3 x 3), and how many centres lie on it."""

    image_key: str
    coordinate_system: str
    affine: np.ndarray
    pixels_per_unit: float
    n_on_image: int


def choose_image(
    sdata: SpatialData, name: str, xy: np.ndarray, image_key: str | None, coordinate_system: str | None
) -> Candidate:
    """Choose the image under some spots.

    Parameters
    ----------
    sdata
        Images and spots.
    name
        Key of the spots.
    xy
        ``(n, 2)`` their centres in their own coordinates.
    image_key
        The image. `None` takes the finest one with 3 or 4 channels that lies under most of the spots.
    coordinate_system
        Where spots and image meet. `None` takes any that they share.

    Raises
    ------
    KeyError, ValueError
        As :func:`stpredict._data.slide.read_sections`.
    """
    if image_key is not None and image_key not in sdata.images:
        raise KeyError(f"No image {image_key!r} in `sdata.images`; it has {listed(sdata.images)}.")
    if image_key is not None and _is_volume(sdata.images[image_key]):
        raise ValueError(f"The image {image_key!r} is a volume; expected two dimensions and channels.")
    keys = [image_key] if image_key is not None else [key for key in sdata.images if not _is_volume(sdata.images[key])]
    maps = {key: _map_to_pixels(sdata, name, key, coordinate_system) for key in keys}
    shared = {key: found for key, found in maps.items() if found is not None}
    if not shared:
        systems = {key: _systems(sdata.images[key]) for key in keys}
        known = "; ".join(f"image {key!r}: {listed(found)}" for key, found in systems.items())
        wanted = "" if coordinate_system is None else f" {coordinate_system!r}"
        raise ValueError(
            f"The spots {name!r} (in {listed(_systems(sdata.shapes[name]))}) share no coordinate system{wanted} with "
            f"an image ({known}). Relate them with `spatialdata.transformations.set_transformation`."
        )

    candidates = []
    for key, (system, affine) in shared.items():
        image = full_resolution(sdata.images[key])
        x, y = apply_affine(affine, xy).T
        on_image = (x >= 0) & (x < image.sizes["x"]) & (y >= 0) & (y < image.sizes["y"])
        per_unit = float(np.sqrt(abs(np.linalg.det(affine[:2, :2]))))
        candidates.append(Candidate(key, system, affine, per_unit, int(on_image.sum())))
    under = [c for c in candidates if c.n_on_image]
    if not under:
        sizes = "; ".join(
            f"{c.image_key!r} is {full_resolution(sdata.images[c.image_key]).sizes['x']} x "
            f"{full_resolution(sdata.images[c.image_key]).sizes['y']} pixels, the spots' centres span "
            f"x {_span(apply_affine(c.affine, xy)[:, 0])}, y {_span(apply_affine(c.affine, xy)[:, 1])}"
            for c in candidates
        )
        raise ValueError(f"All spots of {name!r} lie off the image ({sizes}). Check the transformations.")
    if image_key is None:
        colored = [c for c in under if full_resolution(sdata.images[c.image_key]).sizes["c"] in (3, 4)]
        under = colored or under
        # A finer image of a detail would leave the other spots without pixels.
        under = [c for c in under if 2 * c.n_on_image > max(other.n_on_image for other in under)]
    under.sort(key=lambda c: -c.pixels_per_unit)
    finest = [c for c in under if under[0].pixels_per_unit < _SAME_RESOLUTION * c.pixels_per_unit]
    if len(finest) > 1:
        raise ValueError(
            f"The images {listed(c.image_key for c in finest)} have the same resolution and lie both under the spots "
            f"{name!r}. Choose one with `image_key` (or `image_key={{{name!r}: ...}}` when there are several sections)."
        )
    if len(under) > 1:
        coarser = ", ".join(f"{c.image_key!r} ({c.pixels_per_unit / under[0].pixels_per_unit:.3g}x)" for c in under[1:])
        logg.info(f"{name!r}: taking the finest image {under[0].image_key!r}, not {coarser}.")
    return under[0]


def _map_to_pixels(
    sdata: SpatialData, shapes_key: str, image_key: str, coordinate_system: str | None
) -> tuple[str, np.ndarray] | None:
    """A coordinate system that both elements know, and the 3 x 3 affine from the spots' coordinates to pixels."""
    shapes, image = sdata.shapes[shapes_key], sdata.images[image_key]
    common = [system for system in _systems(shapes) if system in _systems(image)]
    if coordinate_system is not None:
        common = [system for system in common if system == coordinate_system]
    if not common:
        return None
    maps = {}
    for system in common:
        to_world = [
            get_transformation(element, system).to_affine_matrix(("x", "y"), ("x", "y")) for element in (image, shapes)
        ]
        maps[system] = np.linalg.solve(to_world[0], to_world[1])
    first = common[0]
    x0, y0, x1, y1 = shapes.total_bounds
    corners = np.array([[x0, y0], [x0, y1], [x1, y0], [x1, y1]])
    for system in common[1:]:
        if np.abs(apply_affine(maps[system], corners) - apply_affine(maps[first], corners)).max() > _SAME_MAP_PX:
            raise ValueError(
                f"The spots {shapes_key!r} and the image {image_key!r} share the coordinate systems {listed(common)}, "
                "which place the spots differently on the image. Choose one with `coordinate_system`."
            )
    return first, maps[first]


def full_resolution(image: xr.DataArray | xr.DataTree) -> xr.DataArray:
    """Level 0 of a single- or multi-scale image, as ``(c, y, x)``."""
    if isinstance(image, xr.DataTree):
        image = next(iter(image["scale0"].ds.values()))
    return image.transpose("c", "y", "x")


def _is_volume(image: xr.DataArray | xr.DataTree) -> bool:
    return "z" in (image["scale0"].dims if isinstance(image, xr.DataTree) else image.dims)


def rgb_positions(image: xr.DataArray, image_key: str) -> tuple[int, int, int]:
    """Positions of red, green and blue among the channels; raises when there are no such channels."""
    names = [str(c) for c in image.coords["c"].values] if "c" in image.coords else []
    n = image.sizes["c"]
    if n not in (3, 4):
        raise ValueError(
            f"The image {image_key!r} has {n} channel(s) {listed(names)}; expected 3 (red, green, blue) or 4 (with "
            "alpha). Choose the H&E image with `image_key`."
        )
    if names in ([], [str(i) for i in range(n)]):
        order = list(range(n))  # unnamed channels come as red, green, blue(, alpha)
    else:
        order = [_CHANNEL_NAMES.get(c.lower(), -1) for c in names]
        if sorted(order) != list(range(n)):
            raise ValueError(
                f"The channels of the image {image_key!r} are named {listed(names)}, which are not red, green and "
                "blue. Choose the H&E image with `image_key`, or name its channels 'r', 'g', 'b'."
            )
    if n == 4:
        logg.info(f"Dropping the alpha channel of the image {image_key!r}.")
    return order.index(0), order.index(1), order.index(2)


def _systems(element: Any) -> list[str]:
    return list(get_transformation(element, get_all=True))


def apply_affine(affine: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """``(n, 2)`` points, moved by a 3 x 3 affine."""
    return xy @ affine[:2, :2].T + affine[:2, 2]


def _span(values: np.ndarray) -> str:
    return f"{values.min():.0f} to {values.max():.0f}"


def listed(keys: Any) -> str:
    """Names for a message, a dozen at most."""
    shown = [f"{key!r}" if isinstance(key, str) else str(key) for key in keys]
    if len(shown) > 12:
        shown = [*shown[:12], f"... ({len(shown)} in all)"]
    return "[" + ", ".join(shown) + "]"
