"""The one door in: a SpatialData or a table becomes a slide, with all that can go wrong said here, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData
from spatialdata.models import TableModel

from stpredict._data.columns import mask_or_none, read_labels
from stpredict._data.compat import layer_names
from stpredict._data.elements import Elements
from stpredict._data.genes import find_genes
from stpredict._data.identity import identity, pixels_identity
from stpredict._data.image import Level, apply_affine, choose_image, full_resolution, levels_of, rgb_positions
from stpredict._data.messages import listed
from stpredict._data.spots import Spots, annotation, chosen_shapes, spots_of_shapes, spots_of_table

# Marks, in `uns`, a table without expression that was made for predictions.
_PREDICTIONS = "stpredict_predictions"
# Where Space Ranger says whether a spot lies under tissue.
_IN_TISSUE = "in_tissue"


@dataclass(frozen=True)
class Section(Spots):
    """One spots element, its rows of the table, and the image that it lies on.

    Attributes
    ----------
    image_key
        Key of the image in ``sdata.images``.
    coordinate_system
        Where spots and image meet.
    levels
        Scales of the image, finest first, lazy.
    channels
        Positions of red, green, blue and, where there is one, alpha among the channels.
    affine
        3 x 3, from the spots' own coordinates to pixels of the finest level. Pixel *i* covers *[i, i + 1)*.
    """

    image_key: str
    coordinate_system: str
    levels: tuple[Level, ...] = field(repr=False)
    channels: tuple[int, ...]
    affine: np.ndarray = field(repr=False)

    @property
    def pixels(self) -> da.Array:
        """Full-resolution image, ``(channel, y, x)``, lazy."""
        return self.levels[0].pixels

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return int(self.pixels.shape[1])

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return int(self.pixels.shape[2])

    @property
    def centers(self) -> np.ndarray:
        """``(n, 2)`` centers of the spots in pixels, x before y."""
        return apply_affine(self.affine, self.xy)

    @property
    def diameters(self) -> np.ndarray:
        """``(n,)`` diameters in pixels of the circles with the spots' area."""
        return 2 * self.radii * np.sqrt(abs(np.linalg.det(self.affine[:2, :2])))

    @property
    def on_image(self) -> np.ndarray:
        """``(n,)`` spots whose center lies on the image."""
        x, y = self.centers.T
        return (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height)

    @property
    def identity(self) -> str | None:
        """What identifies pixels, places and rows; `None` where the pixels have no identity."""
        return identity(
            pixels_identity(self.pixels, self.image_key), self.channels, self.affine, self.xy, self.radii, self.rows
        )


@dataclass(frozen=True)
class Slide:
    """Everything that a call is about, read once.

    Attributes
    ----------
    table
        Expression and results, a row for each spot.
    table_key
        Where it is in ``sdata.tables``; "" for a table by itself.
    spots
        The spots elements, in the order of the table's regions.
    sections
        The same with their images; empty where no image was asked for.
    elements
        What was asked for.
    home
        The SpatialData; `None` for a table by itself.
    is_new
        Whether the table is still to be put into ``home``.
    """

    table: AnnData = field(repr=False)
    table_key: str
    spots: Sequence[Spots]
    sections: Sequence[Section]
    elements: Elements
    home: SpatialData | None = field(repr=False, default=None)
    is_new: bool = False

    @property
    def n_obs(self) -> int:
        """Rows of the table."""
        return int(self.table.n_obs)

    @property
    def rows(self) -> np.ndarray:
        """Rows that have a spot, ascending."""
        return np.sort(np.concatenate([spots.rows for spots in self.spots]))

    def mask(self, rows: np.ndarray) -> np.ndarray:
        """``(n_obs,)`` which rows these are."""
        found = np.zeros(self.n_obs, dtype=bool)
        found[rows] = True
        return found

    @property
    def on_image(self) -> np.ndarray:
        """``(n_obs,)`` rows whose spot's center lies on an image (has a spot, where no image was asked for)."""
        if not self.sections:
            return self.mask(self.rows)
        return self.mask(np.concatenate([section.rows[section.on_image] for section in self.sections]))

    @property
    def in_tissue(self) -> np.ndarray:
        """``(n_obs,)`` rows that are not marked as lying beside the tissue (``obs["in_tissue"]``, as Space Ranger has it)."""
        found = np.ones(self.n_obs, dtype=bool)
        if _IN_TISSUE in self.table.obs:
            known = self.table.obs[_IN_TISSUE].notna().to_numpy()  # sections of other makers have no such marks
            if (marks := mask_or_none(self.table.obs[known], _IN_TISSUE)) is not None:
                found[known] = marks
        return found

    @property
    def section_of(self) -> np.ndarray:
        """``(n_obs,)`` name of each row's section; "" for rows without a spot."""
        key = self.elements.section_key
        if key is not None:
            return read_labels(self.table.obs, key, self.rows, "section_key")
        names = np.full(self.n_obs, "", dtype=object)
        for spots in self.spots:
            names[spots.rows] = spots.name
        return names

    @property
    def patient_of(self) -> np.ndarray | None:
        """``(n_obs,)`` name of each row's patient; `None` where patients are not known."""
        key = self.elements.patient_key
        return None if key is None else read_labels(self.table.obs, key, self.rows, "patient_key")

    def title(self, spots: Spots) -> str:
        """What to call the rows of a spots element: their section's name where they have one in common."""
        names = pd.unique(self.section_of[spots.rows])
        return str(names[0]) if len(names) == 1 else spots.name

    def identity(self) -> str | None:
        """What identifies all sections and how many rows there are."""
        return identity(self.n_obs, *(section.identity for section in self.sections))

    def without(self, left_out: Sequence[str]) -> Slide:
        """The same without some spots elements."""
        return replace(
            self,
            spots=[spots for spots in self.spots if spots.name not in left_out],
            sections=[section for section in self.sections if section.name not in left_out],
        )


def open_slide(data: SpatialData | AnnData, elements: Elements, *, images: bool) -> Slide:
    """Read which spots, images and rows a call is about.

    Parameters
    ----------
    data
        A SpatialData; where no image is needed, a table by itself will do.
    elements
        What is asked for.
    images
        Whether images are needed.

    Raises
    ------
    TypeError
        ``data`` is of another type.
    KeyError, ValueError
        An element does not exist, nothing fits or several things do; the message lists them and says which argument chooses.
    """
    if isinstance(data, AnnData) and not images:
        check_gene_names(data, "")
        return Slide(data, "", spots_of_table(data, elements.section_key), [], elements)
    table_key, table = read_table(data, elements.table_key)
    spots = spots_of_shapes(data, chosen_shapes(data, table, elements.chosen_spots), table)
    sections = read_sections(data, spots, elements) if images else []
    return Slide(table, table_key, spots, sections, elements, data)


def open_without_table(
    sdata: SpatialData, elements: Elements, table_key: str, genes: Sequence[str], *, images: bool = True
) -> Slide:
    """Read spots and images for a new table, which is not yet put into ``sdata``: a row for each spot, a column for each gene.

    Raises
    ------
    KeyError, ValueError
        As :func:`open_slide`.
    """
    spots = spots_of_shapes(sdata, chosen_shapes(sdata, None, elements.chosen_spots), None)
    sections = read_sections(sdata, spots, elements) if images else []
    return Slide(_empty_table(spots, genes), table_key, spots, sections, elements, sdata, is_new=True)


def with_more_genes(slide: Slide, genes: Sequence[str]) -> Slide:
    """A table that was made for predictions alone takes the genes of another model, too; any other stays as it is."""
    table = slide.table
    if slide.is_new or not is_for_predictions(table):
        return slide
    more = [gene for gene, column in zip(genes, find_genes(table, genes), strict=True) if column < 0]
    if not more:
        return slide

    def widened(values: Any) -> np.ndarray:
        known = values.toarray() if hasattr(values, "toarray") else np.asarray(values)
        return np.hstack([known, np.full((table.n_obs, len(more)), np.nan, dtype=np.float32)])

    wider = AnnData(
        X=None if table.X is None else widened(table.X),
        obs=table.obs,
        var=table.var.reindex([*table.var_names, *more]),
        obsm=dict(table.obsm),
        obsp=dict(table.obsp),
        uns=dict(table.uns),
        layers={name: widened(table.layers[name]) for name in layer_names(table)},
    )
    for name in table.var:
        if table.var[name].dtype == bool:
            wider.var[name] = wider.var[name].astype("boolean").fillna(False).astype(bool)
    return replace(slide, table=wider, is_new=True)


def is_for_predictions(table: AnnData) -> bool:
    """Whether a table was made here, without expression, so that columns may be added."""
    return _PREDICTIONS in table.uns


def find_table(data: SpatialData | AnnData, elements: Elements) -> AnnData:
    """The table of a call, before spots and images are looked at."""
    return data if isinstance(data, AnnData) else read_table(data, elements.table_key)[1]


def own_table(slide: Slide, table_key: str, genes: Sequence[str]) -> Slide:
    """The same spots and images with a new table of some genes, which is not yet put into the SpatialData."""
    rows = slide.rows
    _, region_key, instance_key = annotation(slide.table)
    columns = [region_key, instance_key, slide.elements.section_key, slide.elements.patient_key]
    obs = slide.table.obs.iloc[rows][list(dict.fromkeys(name for name in columns if name is not None))].copy()
    obs[region_key] = pd.Categorical(obs[region_key].astype(str))
    table = TableModel.parse(
        AnnData(obs=obs, var=pd.DataFrame(index=list(genes))),
        region=[spots.name for spots in slide.spots],
        region_key=region_key,
        instance_key=instance_key,
    )
    return replace(
        slide,
        table=table,
        table_key=table_key,
        spots=[replace(each, rows=np.searchsorted(rows, each.rows)) for each in slide.spots],
        sections=[replace(each, rows=np.searchsorted(rows, each.rows)) for each in slide.sections],
        is_new=True,
    )


def read_table(sdata: SpatialData, table_key: str | None) -> tuple[str, AnnData]:
    """Find the table that annotates spots, and its key (no copy).

    Raises
    ------
    TypeError
        ``sdata`` is no SpatialData.
    KeyError
        There is no such table.
    ValueError
        There is no table or several, the table annotates nothing, or its genes' names are not unique.
    """
    check_spatialdata(sdata)
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
        if len(annotating) > 1:
            raise ValueError(f"Several tables annotate spots, {listed(annotating)}. Choose one with `table_key`.")
        table_key = annotating[0] if annotating else next(iter(tables)) if len(tables) == 1 else None
        if table_key is None:
            raise ValueError(
                f"None of the tables {listed(tables)} says which spots it annotates (`uns['spatialdata_attrs']` is missing, as "
                f"after `anndata.concat`). {_PARSE}"
            )
    table = tables[table_key]
    if TableModel.ATTRS_KEY not in table.uns:
        raise ValueError(
            f"The table {table_key!r} does not say which spots it annotates (`uns['spatialdata_attrs']` is missing, as after "
            f"`anndata.concat`). {_PARSE}"
        )
    check_gene_names(table, table_key)
    return table_key, table


_PARSE = (
    "Tell it with `sdata[table_key] = spatialdata.models.TableModel.parse(adata, region=[...], region_key=..., "
    "instance_key=...)`, where `region` are names of spots elements."
)


def check_spatialdata(sdata: Any) -> None:
    """Refuse anything but a SpatialData."""
    if not isinstance(sdata, SpatialData):
        hint = " Pass the SpatialData that holds this table and its image." if isinstance(sdata, AnnData) else ""
        raise TypeError(f"Expected a SpatialData, got {type(sdata).__name__}.{hint}")


def check_gene_names(table: AnnData, table_key: str) -> None:
    """Refuse a table in which a gene cannot be found by its name."""
    if not table.var_names.is_unique:
        twice = table.var_names[table.var_names.duplicated()].unique()
        raise ValueError(
            f"`var_names` of the table{f' {table_key!r}' if table_key else ''} are not unique ({listed(twice)} occur more than "
            "once); genes are found by name, so call `adata.var_names_make_unique()` first."
        )


def read_sections(sdata: SpatialData, spots: Sequence[Spots], elements: Elements) -> list[Section]:
    """Find the image that each spots element lies on."""
    if not len(sdata.images):
        raise ValueError("There is no image in `sdata.images`. Add the H&E image with `Image2DModel.parse`.")
    names = [each.name for each in spots]
    if not isinstance(elements.image_key, str | None) and (unknown := set(elements.image_key) - set(names)):
        raise KeyError(f"`image_key` names the spots {listed(unknown)}, but the spots to read are {listed(names)}.")
    system = elements.coordinate_system
    if system is not None and system not in sdata.coordinate_systems:
        raise KeyError(
            f"No coordinate system {system!r}; the elements know {listed(sorted(sdata.coordinate_systems))}."
        )
    return [_read_section(sdata, each, elements.image_of(each.name), system) for each in spots]


def _read_section(sdata: SpatialData, spots: Spots, image_key: str | None, coordinate_system: str | None) -> Section:
    chosen = choose_image(sdata, spots.name, spots.xy, 2 * float(np.median(spots.radii)), image_key, coordinate_system)
    image = sdata.images[chosen.image_key]
    section = Section(
        name=spots.name,
        xy=spots.xy,
        radii=spots.radii,
        instances=spots.instances,
        rows=spots.rows,
        image_key=chosen.image_key,
        coordinate_system=chosen.coordinate_system,
        levels=levels_of(image, chosen.coordinate_system),
        channels=rgb_positions(full_resolution(image), chosen.image_key),
        affine=chosen.affine,
    )
    if n_off := int((~section.on_image).sum()):
        logg.warning(f"{n_off} of {len(spots.rows)} spots of {spots.name!r} lie off the image {chosen.image_key!r}.")
    return section


def _empty_table(spots: Sequence[Spots], genes: Sequence[str]) -> AnnData:
    """A table without expression; ``rows`` of the spots are its rows."""
    obs = pd.concat(
        [
            pd.DataFrame({"region": each.name, "instance_id": each.instances}, index=each.instances.astype(str))
            for each in spots
        ]
    )
    if not obs.index.is_unique:
        obs.index = obs["region"].astype(str) + "_" + obs.index
    obs["region"] = obs["region"].astype("category")
    table = AnnData(obs=obs, var=pd.DataFrame(index=list(genes)), uns={_PREDICTIONS: "made by stpredict.tl.predict"})
    return TableModel.parse(
        table, region=[each.name for each in spots], region_key="region", instance_key="instance_id"
    )


__all__ = ["Section", "Slide", "annotation", "open_slide", "open_without_table", "read_table"]
