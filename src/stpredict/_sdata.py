"""SpatialData -> sections: the only place that looks for images, shapes, transformations and row order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import xarray as xr
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData
from spatialdata.models import TableModel
from spatialdata.transformations import get_transformation

# Two images whose resolutions differ by less than this are "the same resolution".
_SAME_RESOLUTION = 1.01
# Two maps from spots to pixels that agree to this many pixels over the whole image are one map.
_SAME_MAP_PX = 0.01

_CHANNEL_NAMES = {"r": 0, "red": 0, "g": 1, "green": 1, "b": 2, "blue": 2, "a": 3, "alpha": 3}


@dataclass(frozen=True)
class Section:
    """One spots element, the image that it lies on, and its rows of the table.

    Attributes
    ----------
    name
        Key of the spots in ``sdata.shapes``.
    image_key
        Key of the image in ``sdata.images``.
    coordinate_system
        Where spots and image meet.
    pixels
        Full-resolution image, ``(channel, y, x)``, lazy.
    channels
        Positions of red, green and blue among the channels.
    affine
        3 x 3, from the spots' own coordinates to pixels of ``pixels``.
        Pixel *i* covers *[i, i + 1)*.
    centers
        ``(n, 2)`` centres of the spots in pixels, x before y.
    radii
        ``(n,)`` radii in the spots' own units.
    instances
        ``(n,)`` the spots' index in ``sdata.shapes``.
    rows
        ``(n,)`` the spots' rows in the table; without a table, the rows that they have in one of all the sections.
    """

    name: str
    image_key: str
    coordinate_system: str
    pixels: da.Array = field(repr=False)
    channels: tuple[int, int, int]
    affine: np.ndarray = field(repr=False)
    centers: np.ndarray = field(repr=False)
    radii: np.ndarray = field(repr=False)
    instances: np.ndarray = field(repr=False)
    rows: np.ndarray = field(repr=False)

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return int(self.pixels.shape[1])

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return int(self.pixels.shape[2])

    @property
    def diameters(self) -> np.ndarray:
        """``(n,)`` diameters in pixels of the circles with the spots' area."""
        return 2 * self.radii * np.sqrt(abs(np.linalg.det(self.affine[:2, :2])))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the image, without reading it."""
        return {
            "image_key": self.image_key,
            "image_shape": np.array(self.pixels.shape),
            "affine": self.affine,
        }

    @property
    def on_image(self) -> np.ndarray:
        """``(n,)`` spots whose centre lies on the image."""
        x, y = self.centers.T
        return (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height)


class _Candidate(NamedTuple):
    image_key: str
    coordinate_system: str
    affine: np.ndarray
    pixels_per_unit: float
    n_on_image: int


def read_table(sdata: SpatialData, table_key: str | None = None) -> tuple[str, AnnData]:
    """Find the table that annotates spots.

    Parameters
    ----------
    sdata
        Where to look.
    table_key
        Key in ``sdata.tables``. `None` takes the only table that annotates anything.

    Returns
    -------
    The key and the table itself (no copy).

    Raises
    ------
    TypeError
        ``sdata`` is no SpatialData.
    KeyError
        There is no such table.
    ValueError
        There is no table or several, the table annotates nothing, or its genes' names are not unique.
    """
    if not isinstance(sdata, SpatialData):
        hint = " Pass the SpatialData that holds this table and its image." if isinstance(sdata, AnnData) else ""
        raise TypeError(f"Expected a SpatialData, got {type(sdata).__name__}.{hint}")
    tables = sdata.tables
    if table_key is not None:
        if table_key not in tables:
            raise KeyError(f"No table {table_key!r} in `sdata.tables`; it has {_names(tables)}.")
    else:
        if len(tables) == 0:
            raise ValueError(
                "There is no table in `sdata.tables`. Expression and predictions live in a table that annotates "
                "the spots: make one with `spatialdata.models.TableModel.parse(adata, region=..., "
                "region_key=..., instance_key=...)`."
            )
        annotating = [key for key, table in tables.items() if TableModel.ATTRS_KEY in table.uns]
        if len(annotating) != 1:
            raise ValueError(
                f"Expected one table that annotates spots, found {_names(annotating)} among the tables "
                f"{_names(tables)}. Choose one with `table_key`."
            )
        table_key = annotating[0]
    table = tables[table_key]
    if TableModel.ATTRS_KEY not in table.uns:
        raise ValueError(
            f"The table {table_key!r} does not say which spots it annotates (`uns['spatialdata_attrs']` is missing). "
            "Set it with `spatialdata.models.TableModel.parse(adata, region=..., region_key=..., instance_key=...)`."
        )
    if not table.var_names.is_unique:
        twice = table.var_names[table.var_names.duplicated()].unique()
        raise ValueError(
            f"`var_names` of the table {table_key!r} are not unique ({_names(twice)} occur more than once); "
            "genes are found by name, so call `adata.var_names_make_unique()` first."
        )
    return table_key, table


def read_sections(
    sdata: SpatialData,
    table: AnnData | None,
    *,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | Sequence[str] | None = None,
    coordinate_system: str | None = None,
) -> list[Section]:
    """Pair spots with the image that they lie on and with their rows of the table.

    Parameters
    ----------
    sdata
        Images and spots.
    table
        The table that annotates the spots. `None` reads spots that no table annotates.
    image_key
        Key in ``sdata.images``, or one for each spots element, ``{shapes_key: image_key}``. `None` takes, for
        each spots element, the finest 3- or 4-channel image under its spots.
    shapes_key
        Key or keys in ``sdata.shapes``. `None` takes all spots that the table annotates (or, without a table,
        the only element).
    coordinate_system
        Where spots and images meet. `None` takes any that they share, provided that all shared ones agree.

    Returns
    -------
    One section per spots element, in the order of the table's regions.

    Raises
    ------
    KeyError
        An element or coordinate system does not exist.
    ValueError
        Nothing fits or several things do; the message lists them and says which argument chooses.
    """
    names = _shapes_keys(sdata, table, shapes_key)
    if isinstance(image_key, Mapping) and (unknown := set(image_key) - set(names)):
        raise KeyError(f"`image_key` names the spots {_names(unknown)}, but the spots to read are {_names(names)}.")
    if coordinate_system is not None and coordinate_system not in sdata.coordinate_systems:
        raise KeyError(
            f"No coordinate system {coordinate_system!r}; the elements know {_names(sorted(sdata.coordinate_systems))}."
        )
    sections: list[Section] = []
    for name in names:
        key = image_key.get(name) if isinstance(image_key, Mapping) else image_key
        first_row = sum(len(section.rows) for section in sections)
        sections.append(_read_section(sdata, table, name, key, coordinate_system, first_row))
    return sections


def _shapes_keys(sdata: SpatialData, table: AnnData | None, shapes_key: str | Sequence[str] | None) -> list[str]:
    if not len(sdata.shapes):
        raise ValueError("There are no spots in `sdata.shapes`. Spots are circles made with `ShapesModel.parse`.")
    if not len(sdata.images):
        raise ValueError("There is no image in `sdata.images`. Add the H&E image with `Image2DModel.parse`.")
    if shapes_key is not None:
        names = [shapes_key] if isinstance(shapes_key, str) else list(shapes_key)
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"`shapes_key` names {_names(twice)} more than once.")
        for name in names:
            if name not in sdata.shapes:
                raise KeyError(f"No spots {name!r} in `sdata.shapes`; it has {_names(sdata.shapes)}.")
    if table is None:
        names = names if shapes_key is not None else list(sdata.shapes)
        if len(names) > 1 and shapes_key is None:
            raise ValueError(f"There are several spots elements, {_names(names)}. Choose with `shapes_key`.")
        return names

    region, _, _ = _annotation(table)
    annotated = [region] if isinstance(region, str) else list(region)
    if shapes_key is not None:
        if strangers := [name for name in names if name not in annotated]:
            raise ValueError(
                f"The table annotates {_names(annotated)}, not the spots {_names(strangers)}. Choose the spots with "
                "`shapes_key` or the table with `table_key`."
            )
        return names
    names = [name for name in annotated if name in sdata.shapes]
    if not names:
        kinds = {name: element_type for element_type, name, _ in sdata.gen_elements()}
        found = ", ".join(f"{name!r} ({kinds.get(name, 'not in sdata')})" for name in annotated)
        raise ValueError(
            f"The table annotates {found}, none of which are spots; `sdata.shapes` has {_names(sdata.shapes)}. "
            "Choose another table with `table_key`, or mend its region with `sdata.set_table_annotates_spatialelement`."
        )
    if absent := [name for name in annotated if name not in names]:
        logg.warning(f"The table also annotates {_names(absent)}, which `sdata.shapes` lacks: those rows are left out.")
    return names


def _read_section(
    sdata: SpatialData,
    table: AnnData | None,
    name: str,
    image_key: str | None,
    coordinate_system: str | None,
    first_row: int,
) -> Section:
    shapes = sdata.shapes[name]
    xy, radii = _circles(shapes, name)
    if table is None:
        of_shape = np.arange(len(shapes))
        rows = first_row + of_shape
    else:
        rows, of_shape = _match_rows(shapes, table, name)
    xy, radii = xy[of_shape], radii[of_shape]

    chosen = _choose_image(sdata, name, xy, image_key, coordinate_system)
    image = _full_resolution(sdata.images[chosen.image_key])
    centers = _apply(chosen.affine, xy)
    if chosen.n_on_image < len(centers):
        logg.warning(f"{len(centers) - chosen.n_on_image} of {len(centers)} spots of {name!r} lie off the image.")
    return Section(
        name=name,
        image_key=chosen.image_key,
        coordinate_system=chosen.coordinate_system,
        pixels=da.asarray(image.data),
        channels=_rgb_positions(image, chosen.image_key),
        affine=chosen.affine,
        centers=centers,
        radii=radii,
        instances=shapes.index.to_numpy()[of_shape],
        rows=rows,
    )


def _circles(shapes: gpd.GeoDataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Centres and radii; a polygon counts as the circle with its centroid and area."""
    if len(shapes) == 0:
        raise ValueError(f"The spots {name!r} are empty.")
    points = shapes.geometry.centroid
    xy = np.column_stack([points.x, points.y]).astype(np.float64)
    if "radius" in shapes.columns:
        radii = shapes["radius"].to_numpy(dtype=np.float64)
    else:
        logg.info(f"{name!r} holds polygons; each counts as the circle with its centroid and area.")
        radii = np.sqrt(shapes.geometry.area.to_numpy() / np.pi)
    if not (np.isfinite(xy).all() and np.isfinite(radii).all() and (radii > 0).all()):
        raise ValueError(f"The spots {name!r} have centres or radii that are not finite and positive.")
    return xy, radii


def _annotation(table: AnnData) -> tuple[str | list[str], str, str]:
    attrs = table.uns[TableModel.ATTRS_KEY]
    return attrs[TableModel.REGION_KEY], attrs[TableModel.REGION_KEY_KEY], attrs[TableModel.INSTANCE_KEY]


def _match_rows(shapes: gpd.GeoDataFrame, table: AnnData, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the table that annotate these shapes, and the position of each row's shape."""
    _, region_key, instance_key = _annotation(table)
    if not shapes.index.is_unique:
        raise ValueError(f"The index of the spots {name!r} is not unique, so rows cannot be matched to spots.")
    rows = np.flatnonzero((table.obs[region_key] == name).to_numpy())
    instances = table.obs[instance_key].iloc[rows]
    of_shape = shapes.index.get_indexer(pd.Index(instances))
    found = of_shape >= 0
    if not found.any():
        raise ValueError(
            f"No row of the table belongs to a spot of {name!r}: the table's {instance_key!r} "
            f"({instances.dtype}, such as {_names(instances[:3])}) and the spots' index ({shapes.index.dtype}, such "
            f"as {_names(shapes.index[:3])}) have nothing in common. Note that 1 and '1' are different."
        )
    if not found.all():
        logg.warning(f"{(~found).sum()} of {len(rows)} rows of {name!r} have no spot in `sdata.shapes`: left out.")
    instances_found = instances[found]
    if instances_found.duplicated().any():
        raise ValueError(f"Several rows of the table belong to the same spot of {name!r}; expected one row per spot.")
    if n_extra := len(shapes) - int(found.sum()):
        logg.info(f"{n_extra} of {len(shapes)} spots of {name!r} have no row in the table.")
    return rows[found].astype(np.int64), of_shape[found]


def _choose_image(
    sdata: SpatialData, name: str, xy: np.ndarray, image_key: str | None, coordinate_system: str | None
) -> _Candidate:
    if image_key is not None and image_key not in sdata.images:
        raise KeyError(f"No image {image_key!r} in `sdata.images`; it has {_names(sdata.images)}.")
    if image_key is not None and _is_volume(sdata.images[image_key]):
        raise ValueError(f"The image {image_key!r} is a volume; expected two dimensions and channels.")
    keys = [image_key] if image_key is not None else [key for key in sdata.images if not _is_volume(sdata.images[key])]
    maps = {key: _map_to_pixels(sdata, name, key, coordinate_system) for key in keys}
    shared = {key: found for key, found in maps.items() if found is not None}
    if not shared:
        systems = {key: _systems(sdata.images[key]) for key in keys}
        known = "; ".join(f"image {key!r}: {_names(found)}" for key, found in systems.items())
        wanted = "" if coordinate_system is None else f" {coordinate_system!r}"
        raise ValueError(
            f"The spots {name!r} (in {_names(_systems(sdata.shapes[name]))}) share no coordinate system{wanted} with "
            f"an image ({known}). Relate them with `spatialdata.transformations.set_transformation`."
        )

    candidates = []
    for key, (system, affine) in shared.items():
        image = _full_resolution(sdata.images[key])
        x, y = _apply(affine, xy).T
        on_image = (x >= 0) & (x < image.sizes["x"]) & (y >= 0) & (y < image.sizes["y"])
        per_unit = float(np.sqrt(abs(np.linalg.det(affine[:2, :2]))))
        candidates.append(_Candidate(key, system, affine, per_unit, int(on_image.sum())))
    under = [c for c in candidates if c.n_on_image]
    if not under:
        sizes = "; ".join(
            f"{c.image_key!r} is {_full_resolution(sdata.images[c.image_key]).sizes['x']} x "
            f"{_full_resolution(sdata.images[c.image_key]).sizes['y']} pixels, the spots' centres span "
            f"x {_span(_apply(c.affine, xy)[:, 0])}, y {_span(_apply(c.affine, xy)[:, 1])}"
            for c in candidates
        )
        raise ValueError(f"All spots of {name!r} lie off the image ({sizes}). Check the transformations.")
    if image_key is None:
        coloured = [c for c in under if _full_resolution(sdata.images[c.image_key]).sizes["c"] in (3, 4)]
        under = coloured or under
        # A finer image of a detail would leave the other spots without pixels.
        under = [c for c in under if 2 * c.n_on_image > max(other.n_on_image for other in under)]
    under.sort(key=lambda c: -c.pixels_per_unit)
    finest = [c for c in under if under[0].pixels_per_unit < _SAME_RESOLUTION * c.pixels_per_unit]
    if len(finest) > 1:
        raise ValueError(
            f"The images {_names(c.image_key for c in finest)} have the same resolution and lie both under the spots "
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
        if np.abs(_apply(maps[system], corners) - _apply(maps[first], corners)).max() > _SAME_MAP_PX:
            raise ValueError(
                f"The spots {shapes_key!r} and the image {image_key!r} share the coordinate systems {_names(common)}, "
                "which place the spots differently on the image. Choose one with `coordinate_system`."
            )
    return first, maps[first]


def _full_resolution(image: xr.DataArray | xr.DataTree) -> xr.DataArray:
    """Level 0 of a single- or multi-scale image, as ``(c, y, x)``."""
    if isinstance(image, xr.DataTree):
        image = next(iter(image["scale0"].ds.values()))
    return image.transpose("c", "y", "x")


def _is_volume(image: xr.DataArray | xr.DataTree) -> bool:
    return "z" in (image["scale0"].dims if isinstance(image, xr.DataTree) else image.dims)


def _rgb_positions(image: xr.DataArray, image_key: str) -> tuple[int, int, int]:
    names = [str(c) for c in image.coords["c"].values] if "c" in image.coords else []
    n = image.sizes["c"]
    if n not in (3, 4):
        raise ValueError(
            f"The image {image_key!r} has {n} channel(s) {_names(names)}; expected 3 (red, green, blue) or 4 (with "
            "alpha). Choose the H&E image with `image_key`."
        )
    if names in ([], [str(i) for i in range(n)]):
        order = list(range(n))  # unnamed channels come as red, green, blue(, alpha)
    else:
        order = [_CHANNEL_NAMES.get(c.lower(), -1) for c in names]
        if sorted(order) != list(range(n)):
            raise ValueError(
                f"The channels of the image {image_key!r} are named {_names(names)}, which are not red, green and "
                "blue. Choose the H&E image with `image_key`, or name its channels 'r', 'g', 'b'."
            )
    if n == 4:
        logg.info(f"Dropping the alpha channel of the image {image_key!r}.")
    return order.index(0), order.index(1), order.index(2)


def _systems(element: Any) -> list[str]:
    return list(get_transformation(element, get_all=True))


def _apply(affine: np.ndarray, xy: np.ndarray) -> np.ndarray:
    return xy @ affine[:2, :2].T + affine[:2, 2]


def _span(values: np.ndarray) -> str:
    return f"{values.min():.0f} to {values.max():.0f}"


def _names(keys: Any) -> str:
    shown = [f"{key!r}" if isinstance(key, str) else str(key) for key in keys]
    if len(shown) > 12:
        shown = [*shown[:12], f"... ({len(shown)} in all)"]
    return "[" + ", ".join(shown) + "]"
