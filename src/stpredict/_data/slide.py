"""SpatialData -> sections: the only place that looks for images, shapes, transformations and row order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData
from spatialdata.models import TableModel

from stpredict._data.image import apply_affine, choose_image, full_resolution, listed, rgb_positions


@dataclass(frozen=True)
class Spots:
    """One spots element and its rows of the table.

    Attributes
    ----------
    name
        Key in ``sdata.shapes``.
    xy
        ``(n, 2)`` centres in the spots' own coordinates, x before y.
    radii
        ``(n,)`` radii in the spots' own units.
    instances
        ``(n,)`` the spots' index in ``sdata.shapes``.
    rows
        ``(n,)`` the spots' rows in the table; without a table, the rows that they have in one of all the elements.
    """

    name: str
    xy: np.ndarray = field(repr=False)
    radii: np.ndarray = field(repr=False)
    instances: np.ndarray = field(repr=False)
    rows: np.ndarray = field(repr=False)


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
            raise KeyError(f"No table {table_key!r} in `sdata.tables`; it has {listed(tables)}.")
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
                f"Expected one table that annotates spots, found {listed(annotating)} among the tables "
                f"{listed(tables)}. Choose one with `table_key`."
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
            f"`var_names` of the table {table_key!r} are not unique ({listed(twice)} occur more than once); "
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
    if not len(sdata.images):
        raise ValueError("There is no image in `sdata.images`. Add the H&E image with `Image2DModel.parse`.")
    if isinstance(image_key, Mapping) and (unknown := set(image_key) - set(names)):
        raise KeyError(f"`image_key` names the spots {listed(unknown)}, but the spots to read are {listed(names)}.")
    if coordinate_system is not None and coordinate_system not in sdata.coordinate_systems:
        raise KeyError(
            f"No coordinate system {coordinate_system!r}; the elements know {listed(sorted(sdata.coordinate_systems))}."
        )
    return [
        _read_section(
            sdata, spots, image_key.get(spots.name) if isinstance(image_key, Mapping) else image_key, coordinate_system
        )
        for spots in _read_spots(sdata, table, names)
    ]


def read_spots(sdata: SpatialData, table: AnnData, *, shapes_key: str | Sequence[str] | None = None) -> list[Spots]:
    """Pair spots with their rows of the table; no image is needed.

    Parameters
    ----------
    sdata
        Spots.
    table
        The table that annotates them.
    shapes_key
        Key or keys in ``sdata.shapes``. `None` takes all spots that the table annotates.

    Returns
    -------
    One per spots element, in the order of the table's regions.

    Raises
    ------
    KeyError
        An element does not exist.
    ValueError
        The table annotates no spots, or rows and spots do not fit.
    """
    return _read_spots(sdata, table, _shapes_keys(sdata, table, shapes_key))


def section_name(section: Section | Spots, table: AnnData) -> str:
    """``obs["section"]`` where all of the section's rows agree on it, else the key of its spots."""
    if "section" in table.obs:
        names = table.obs["section"].iloc[section.rows].unique()
        if len(names) == 1:
            return str(names[0])
    return section.name


def _shapes_keys(sdata: SpatialData, table: AnnData | None, shapes_key: str | Sequence[str] | None) -> list[str]:
    if not len(sdata.shapes):
        raise ValueError("There are no spots in `sdata.shapes`. Spots are circles made with `ShapesModel.parse`.")
    if shapes_key is not None:
        names = [shapes_key] if isinstance(shapes_key, str) else list(shapes_key)
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"`shapes_key` names {listed(twice)} more than once.")
        for name in names:
            if name not in sdata.shapes:
                raise KeyError(f"No spots {name!r} in `sdata.shapes`; it has {listed(sdata.shapes)}.")
    if table is None:
        names = names if shapes_key is not None else list(sdata.shapes)
        if len(names) > 1 and shapes_key is None:
            raise ValueError(f"There are several spots elements, {listed(names)}. Choose with `shapes_key`.")
        return names

    region, _, _ = _annotation(table)
    annotated = [region] if isinstance(region, str) else list(region)
    if shapes_key is not None:
        if strangers := [name for name in names if name not in annotated]:
            raise ValueError(
                f"The table annotates {listed(annotated)}, not the spots {listed(strangers)}. Choose the spots with "
                "`shapes_key` or the table with `table_key`."
            )
        return names
    names = [name for name in annotated if name in sdata.shapes]
    if not names:
        kinds = {name: element_type for element_type, name, _ in sdata.gen_elements()}
        found = ", ".join(f"{name!r} ({kinds.get(name, 'not in sdata')})" for name in annotated)
        raise ValueError(
            f"The table annotates {found}, none of which are spots; `sdata.shapes` has {listed(sdata.shapes)}. "
            "Choose another table with `table_key`, or mend its region with `sdata.set_table_annotates_spatialelement`."
        )
    if absent := [name for name in annotated if name not in names]:
        logg.warning(f"The table also annotates {listed(absent)}, which `sdata.shapes` lacks: those rows are left out.")
    return names


def _read_spots(sdata: SpatialData, table: AnnData | None, names: list[str]) -> list[Spots]:
    found: list[Spots] = []
    for name in names:
        shapes = sdata.shapes[name]
        xy, radii = _circles(shapes, name)
        if table is None:
            of_shape = np.arange(len(shapes))
            rows = sum(len(spots.rows) for spots in found) + of_shape
        else:
            rows, of_shape = _match_rows(shapes, table, name)
        found.append(Spots(name, xy[of_shape], radii[of_shape], shapes.index.to_numpy()[of_shape], rows))
    return found


def _read_section(sdata: SpatialData, spots: Spots, image_key: str | None, coordinate_system: str | None) -> Section:
    chosen = choose_image(sdata, spots.name, spots.xy, image_key, coordinate_system)
    image = full_resolution(sdata.images[chosen.image_key])
    centers = apply_affine(chosen.affine, spots.xy)
    if chosen.n_on_image < len(centers):
        logg.warning(f"{len(centers) - chosen.n_on_image} of {len(centers)} spots of {spots.name!r} lie off the image.")
    return Section(
        name=spots.name,
        image_key=chosen.image_key,
        coordinate_system=chosen.coordinate_system,
        pixels=da.asarray(image.data),
        channels=rgb_positions(image, chosen.image_key),
        affine=chosen.affine,
        centers=centers,
        radii=spots.radii,
        instances=spots.instances,
        rows=spots.rows,
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
            f"({instances.dtype}, such as {listed(instances[:3])}) and the spots' index ({shapes.index.dtype}, such "
            f"as {listed(shapes.index[:3])}) have nothing in common. Note that 1 and '1' are different."
        )
    if not found.all():
        logg.warning(f"{(~found).sum()} of {len(rows)} rows of {name!r} have no spot in `sdata.shapes`: left out.")
    instances_found = instances[found]
    if instances_found.duplicated().any():
        raise ValueError(f"Several rows of the table belong to the same spot of {name!r}; expected one row per spot.")
    if n_extra := len(shapes) - int(found.sum()):
        logg.info(f"{n_extra} of {len(shapes)} spots of {name!r} have no row in the table.")
    return rows[found].astype(np.int64), of_shape[found]
