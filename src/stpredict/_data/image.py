"""Which image lies under spots, where on it they are, and which of its channels are red, green and blue."""

from __future__ import annotations

from typing import Any, NamedTuple

import dask
import dask.array as da
import numpy as np
import xarray as xr
from scanpy import logging as logg
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stpredict._data.messages import listed

# Two images whose resolutions differ by less than this are "the same resolution".
_SAME_RESOLUTION = 1.01
# Two maps from spots to pixels that agree to this many pixels over the whole image are one map.
_SAME_MAP_PX = 0.01

# Spots at which images are compared, pixels that are looked at around each, and how alike their optical densities are in
# images of one picture: on HER2+ sections, copies reduced up to 32 times reach 0.95, other sections at most 0.35
# (benchmarks/same_picture.py).
_PROBES, _PROBE_PX = 48, 512
_SAME_PICTURE = 0.9
# Grey levels by which nearly blank images may differ, which have no correlation.
_SAME_GRAY = 4.0

_CHANNEL_NAMES = {"r": 0, "red": 0, "g": 1, "green": 1, "b": 2, "blue": 2, "a": 3, "alpha": 3}


class Candidate(NamedTuple):
    """An image, the map from the spots' coordinates to its pixels (3 x 3), and how many centres lie on it."""

    image_key: str
    coordinate_system: str
    affine: np.ndarray
    pixels_per_unit: float
    n_on_image: int


def choose_image(
    sdata: SpatialData,
    name: str,
    xy: np.ndarray,
    diameter: float,
    image_key: str | None,
    coordinate_system: str | None,
) -> Candidate:
    """Choose the image under some spots.

    Parameters
    ----------
    sdata
        Images and spots.
    name
        Key of the spots.
    xy
        ``(n, 2)`` their centers in their own coordinates.
    diameter
        Their usual diameter there.
    image_key
        The image. `None` takes the finest one with 3 or 4 channels that lies under most of the spots.
    coordinate_system
        Where spots and image meet. `None` takes any that they share.

    Raises
    ------
    KeyError, ValueError
        As :func:`stpredict._data.slide.open_slide`.
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
            f"{full_resolution(sdata.images[c.image_key]).sizes['y']} pixels, the spots' centers span "
            f"x {_span(apply_affine(c.affine, xy)[:, 0])}, y {_span(apply_affine(c.affine, xy)[:, 1])}"
            for c in candidates
        )
        raise ValueError(f"All spots of {name!r} lie off the image ({sizes}). Check the transformations.")
    if image_key is None:
        under = _fitting(sdata, name, candidates, len(xy))
    under.sort(key=lambda c: -c.pixels_per_unit)
    finest = [c for c in under if under[0].pixels_per_unit < _SAME_RESOLUTION * c.pixels_per_unit]
    if len(finest) > 1:
        raise ValueError(
            f"The images {listed(c.image_key for c in finest)} have the same resolution and lie both under the spots "
            f"{name!r}. Choose one with `image_key` (or `image_key={{{name!r}: ...}}` when there are several sections)."
        )
    if len(under) > 1:
        _check_same_picture(sdata, name, xy, diameter, under)
        coarser = ", ".join(f"{c.image_key!r} ({c.pixels_per_unit / under[0].pixels_per_unit:.3g}x)" for c in under[1:])
        logg.info(f"{name!r}: taking the finest image {under[0].image_key!r}, not {coarser}.")
    return under[0]


def _fitting(sdata: SpatialData, name: str, candidates: list[Candidate], n_spots: int) -> list[Candidate]:
    """Images with colors under most of the spots; a finer one that is passed over is named."""
    under = [c for c in candidates if c.n_on_image]
    no_color = {c.image_key: _why_no_color(full_resolution(sdata.images[c.image_key])) for c in candidates}
    colored = [c for c in under if not no_color[c.image_key]] or under
    most = max(c.n_on_image for c in colored)
    # A finer image of a detail would leave the other spots without pixels.
    kept = [c for c in colored if 2 * c.n_on_image > most]
    finest = max(c.pixels_per_unit for c in kept)
    for c in candidates:
        if c not in kept and c.pixels_per_unit > finest:
            few = f"only {c.n_on_image} of {n_spots} spots lie on it"
            why = few if 2 * c.n_on_image <= most else no_color[c.image_key]
            logg.warning(
                f"The finer image {c.image_key!r} is not taken for the spots {name!r}: {why}. Check its transformation, or "
                "choose with `image_key`."
            )
    return kept


def _check_same_picture(
    sdata: SpatialData, name: str, xy: np.ndarray, diameter: float, candidates: list[Candidate]
) -> None:
    """Refuse to choose between images that show different things under the same spots."""
    probes = np.unique(np.linspace(0, len(xy) - 1, _PROBES).astype(np.int64))
    diameter = min(diameter, _PROBE_PX / candidates[0].pixels_per_unit)
    seen = {c.image_key: _mean_colors(sdata, c, xy[probes], diameter) for c in candidates}
    finest = candidates[0].image_key
    for key, colors in seen.items():
        both = np.isfinite(colors).all(axis=1) & np.isfinite(seen[finest]).all(axis=1)
        if key != finest and not _alike(colors[both], seen[finest][both]):
            raise ValueError(
                f"The images {finest!r} and {key!r} both lie under the spots {name!r}, but show different pictures there. "
                f"Choose with `image_key`, for example `image_key={{{name!r}: {key!r}}}`."
            )


def _mean_colors(sdata: SpatialData, candidate: Candidate, xy: np.ndarray, diameter: float) -> np.ndarray:
    """``(n, 3)`` mean intensities, 0 to 255, in boxes as wide as a spot; NaN off the image."""
    image = full_resolution(sdata.images[candidate.image_key])
    channels = rgb_positions(image, candidate.image_key)
    half = max(diameter * candidate.pixels_per_unit / 2, 0.5)
    corners = [np.rint(apply_affine(candidate.affine, xy) + sign * half).astype(np.int64) for sign in (-1, 1)]
    (left, top), (right, bottom) = (np.maximum(corner, 0).T for corner in corners)
    pixels, white = da.asarray(image.data), _white(image.dtype)
    boxes = [
        pixels[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        for x0, x1, y0, y1 in zip(left, right, top, bottom, strict=True)
    ]
    found = np.full((len(xy), 3), np.nan)
    for i, box in enumerate(dask.compute(*boxes, scheduler="threads")):
        if box.size:
            found[i] = _on_white(box, channels, white).mean(axis=(1, 2))
    return found


def _on_white(box: np.ndarray, channels: tuple[int, ...], white: float) -> np.ndarray:
    rgb = 255 / white * box[list(channels[:3])].astype(np.float64)
    if len(channels) == 4:
        opacity = box[channels[3]] / white
        rgb = rgb * opacity + 255 * (1 - opacity)
    return rgb


def _white(dtype: np.dtype) -> float:
    return float(np.iinfo(dtype).max) if dtype.kind in "iu" else 1.0


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    few = len(a) < 3 or float(np.abs(a - b).mean()) < _SAME_GRAY
    return few or correlation_of_colors(a, b) >= _SAME_PICTURE


def correlation_of_colors(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the optical densities of two ``(n, 3)`` intensities, about the mean of each channel; 0 without variation."""
    od = [-np.log((np.clip(values, 0, 255) + 1) / 256) for values in (a, b)]
    x, y = ((values - values.mean(axis=0)).ravel() for values in od)
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm > 0 else 0.0


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
        for kind, key, matrix in (("image", image_key, to_world[0]), ("spots", shapes_key, to_world[1])):
            if not (np.isfinite(matrix).all() and abs(np.linalg.det(matrix[:2, :2])) > 0):
                raise ValueError(
                    f"The transformation of the {kind} {key!r} to {system!r} is singular:\n{matrix}\nIt maps everything to a "
                    "line or a point. Mend it with `spatialdata.transformations.set_transformation`."
                )
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


class Level(NamedTuple):
    """One scale of an image, ``(c, y, x)``, and the 3 x 3 affine from its pixels to a coordinate system."""

    pixels: da.Array
    to_world: np.ndarray


def levels_of(image: xr.DataArray | xr.DataTree, coordinate_system: str) -> tuple[Level, ...]:
    """All scales of an image, finest first."""
    if isinstance(image, xr.DataTree):
        arrays = [next(iter(scale.ds.values())) for scale in image.children.values()]
    else:
        arrays = [image]
    return tuple(
        Level(
            da.asarray(array.transpose("c", "y", "x").data),
            get_transformation(array, coordinate_system).to_affine_matrix(("x", "y"), ("x", "y")),
        )
        for array in arrays
    )


def full_resolution(image: xr.DataArray | xr.DataTree) -> xr.DataArray:
    """Level 0 of a single- or multi-scale image, as ``(c, y, x)``."""
    if isinstance(image, xr.DataTree):
        image = next(iter(image["scale0"].ds.values()))
    return image.transpose("c", "y", "x")


def _is_volume(image: xr.DataArray | xr.DataTree) -> bool:
    return "z" in (image["scale0"].dims if isinstance(image, xr.DataTree) else image.dims)


def rgb_positions(image: xr.DataArray, image_key: str) -> tuple[int, ...]:
    """Positions of red, green, blue and, where there is one, alpha among the channels; raises when there are no such."""
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
    return tuple(order.index(i) for i in range(n))


def _why_no_color(image: xr.DataArray) -> str:
    """Why an image is no picture in red, green and blue; "" where it is one."""
    try:
        rgb_positions(image, "")
    except ValueError:
        n = image.sizes["c"]
        names = [str(c) for c in image.coords["c"].values] if "c" in image.coords else []
        return f"it has {n} channel(s)" if n not in (3, 4) else f"its channels are {listed(names)}"
    return ""


def _systems(element: Any) -> list[str]:
    return list(get_transformation(element, get_all=True))


def apply_affine(affine: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """``(n, 2)`` points, moved by a 3 x 3 affine."""
    return xy @ affine[:2, :2].T + affine[:2, 2]


def _span(values: np.ndarray) -> str:
    return f"{values.min():.0f} to {values.max():.0f}"
