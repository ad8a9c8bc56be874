"""Spots and their rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import geopandas as gpd
import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData
from spatialdata.models import TableModel

from stpredict._data.columns import read_labels
from stpredict._data.messages import listed


@dataclass(frozen=True)
class Spots:
    """One spots element and its rows of the table.

    Attributes
    ----------
    name
        Key in ``sdata.shapes``.
    xy
        ``(n, 2)`` centers in the spots' own coordinates, x before y.
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


def spots_of_shapes(sdata: SpatialData, names: Sequence[str], table: AnnData | None) -> list[Spots]:
    """Pair spots with their rows; without a table, all spots of the elements, one element after the other.

    Raises
    ------
    ValueError
        Spots that are no circles, or rows and spots that do not fit.
    """
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


def spots_of_table(table: AnnData, section_key: str | None) -> list[Spots]:
    """Spots of a table without its SpatialData: places from ``obsm["spatial"]``, sections from a column of ``obs``.

    Raises
    ------
    KeyError
        The column, or ``obsm["spatial"]``, is not there.
    ValueError
        Places that are no pairs of numbers.
    """
    if "spatial" not in table.obsm:
        raise KeyError(
            f"The table has no `obsm['spatial']`, only {listed(table.obsm)}. Pass the SpatialData that holds it, or write the "
            "spots' centers there, (n_obs, 2)."
        )
    xy = np.asarray(table.obsm["spatial"])
    if xy.ndim != 2 or xy.shape[1] != 2 or xy.dtype.kind not in "fiu":
        raise ValueError(
            f"`obsm['spatial']` has the shape {xy.shape} and dtype {xy.dtype}; expected (n_obs, 2) numbers."
        )
    xy = xy.astype(np.float64)
    rows = np.flatnonzero(np.isfinite(xy).all(axis=1))
    rank = np.zeros(len(rows))
    if TableModel.ATTRS_KEY in table.uns:  # sections in the order in which a SpatialData with this table has them
        attrs = table.uns[TableModel.ATTRS_KEY]
        regions, region_key = list(np.atleast_1d(attrs[TableModel.REGION_KEY])), attrs[TableModel.REGION_KEY_KEY]
        section_key = region_key if section_key is None else section_key
        if region_key in table.obs:
            found_at = pd.Index(regions).get_indexer(pd.Index(table.obs[region_key].iloc[rows]))
            rank = np.where(found_at < 0, len(regions), found_at)
    if section_key is None:
        labels = np.full(table.n_obs, "section", dtype=object)
    else:
        labels = read_labels(table.obs, section_key, rows, "section_key")
    found = []
    for name in pd.unique(labels[rows[np.argsort(rank, kind="stable")]]):
        chosen = rows[labels[rows] == name]
        found.append(Spots(name, xy[chosen], np.ones(len(chosen)), table.obs_names[chosen].to_numpy(), chosen))
    if not found:
        raise ValueError("`obsm['spatial']` has no finite row, so there are no spots.")
    return found


def chosen_shapes(sdata: SpatialData, table: AnnData | None, wanted: Sequence[str] | None) -> list[str]:
    """Names of the spots elements to read.

    Raises
    ------
    KeyError
        An element does not exist.
    ValueError
        There are no spots, several without a table, or the table annotates others.
    """
    if not len(sdata.shapes):
        raise ValueError("There are no spots in `sdata.shapes`. Spots are circles made with `ShapesModel.parse`.")
    if wanted is not None:
        if len(set(wanted)) < len(wanted):
            twice = sorted({name for name in wanted if list(wanted).count(name) > 1})
            raise ValueError(f"`shapes_key` names {listed(twice)} more than once.")
        for name in wanted:
            if name not in sdata.shapes:
                raise KeyError(f"No spots {name!r} in `sdata.shapes`; it has {listed(sdata.shapes)}.")
    if table is None:
        names = list(sdata.shapes if wanted is None else wanted)
        if len(names) > 1 and wanted is None:
            raise ValueError(f"There are several spots elements, {listed(names)}. Choose with `shapes_key`.")
        return names

    region = annotation(table)[0]
    annotated = [region] if isinstance(region, str) else list(region)
    if wanted is not None:
        if strangers := [name for name in wanted if name not in annotated]:
            raise ValueError(
                f"The table annotates {listed(annotated)}, not the spots {listed(strangers)}. Choose the spots with "
                "`shapes_key` or the table with `table_key`."
            )
        return list(wanted)
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


def annotation(table: AnnData) -> tuple[str | list[str], str, str]:
    """Regions, region column and instance column of a table.

    Raises
    ------
    KeyError
        ``obs`` lacks one of the columns.
    """
    attrs = table.uns[TableModel.ATTRS_KEY]
    region_key, instance_key = attrs[TableModel.REGION_KEY_KEY], attrs[TableModel.INSTANCE_KEY]
    for name, what in ((region_key, "region"), (instance_key, "instance")):
        if name not in table.obs:
            raise KeyError(
                f"The table says that its {what} column is {name!r} (`uns['spatialdata_attrs']`), which `obs` lacks; it has "
                f"{listed(table.obs.columns)}. Restore the column, or parse the table anew with `TableModel.parse`."
            )
    return attrs[TableModel.REGION_KEY], region_key, instance_key


def _circles(shapes: gpd.GeoDataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Centers and radii; a polygon counts as the circle with its centroid and area."""
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
        raise ValueError(f"The spots {name!r} have centers or radii that are not finite and positive.")
    return xy, radii


def _match_rows(shapes: gpd.GeoDataFrame, table: AnnData, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the table that annotate these shapes, and the position of each row's shape."""
    _, region_key, instance_key = annotation(table)
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
    if instances[found].duplicated().any():
        raise ValueError(f"Several rows of the table belong to the same spot of {name!r}; expected one row per spot.")
    if n_extra := len(shapes) - int(found.sum()):
        logg.info(f"{n_extra} of {len(shapes)} spots of {name!r} have no row in the table.")
    return rows[found].astype(np.int64), of_shape[found]
