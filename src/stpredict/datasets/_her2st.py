from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import xarray as xr
from geopandas import GeoDataFrame
from numpy.typing import NDArray
from scanpy import logging as logg
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Identity
from tqdm.auto import tqdm

from stpredict.datasets import _jpeg
from stpredict.datasets._image import multiscale_image
from stpredict.datasets._registry import RemoteFile, cache_folder, fetch, read_registry

BASE_URL = "https://raw.githubusercontent.com/almaan/her2st/85df7411b987a7dec3feff9718b869a7a82091ec/data/"
PITCH_UM, DIAMETER_UM = 200.0, 100.0  # the spots of the legacy Spatial Transcriptomics array


def her2st(sections: str | Sequence[str] | None = None, *, path: str | os.PathLike[str] | None = None) -> SpatialData:
    """
    HER2-positive breast cancer: H&E images and Spatial Transcriptomics of 36 sections from 8 patients.

    Legacy Spatial Transcriptomics arrays: spots of 100 µm diameter on a square grid of 200 µm pitch, 176 to 712 under
    the tissue of a section. Files that are not in the cache folder are downloaded, about 5 MB a section, and each is
    verified against its published content before it is used.

    Parameters
    ----------
    sections
        Names of sections, patient letter and number: A1 … A6, B1 … B6, C1 … C6, D1 … D6, E1 … E3, F1 … F3, G1 … G3,
        H1 … H3. None loads all 36; a section takes about 0.4 GB of memory, because its image is decoded.
    path
        Cache folder; the files lie in its subfolder ``her2st``. None takes the environment variable
        ``STPREDICT_DATA_DIR``, and without that the cache folder of the operating system. A folder that holds all
        files is only read.

    Returns
    -------
    One SpatialData. For each section, here C2, in a coordinate system of its own, ``"C2"`` (pixels of the image):

    - ``images["C2_image"]``: H&E, uint8, channels r, g, b; multiscale, each scale half the one before it.
    - ``shapes["C2_spots"]``: circles of 100 µm diameter; rows in the order of the table's.

    and one table for all sections, ``tables["table"]``, spots x genes:

    - ``X``: log1p of counts per 10,000 (float32, CSR); ``layers["counts"]``: the counts (float32, CSR). One spot,
      ``D5_18x20``, has no counts at all: its row is 0 in both.
    - ``obs``: ``section``, ``patient``, ``array_row`` and ``array_col`` (integer grid position along the image's y
      and x), ``region`` and ``spot_id`` (element and index of the spot's circle). A spot's name, in the table's index
      and in that of the circles alike, is unique over all sections: ``C2_10x13`` is at column 10 and row 13 of C2.
    - ``var``: genes are the union over the sections, in order of first appearance; ``n_sections`` says how many of the
      loaded sections list the gene. Where a section does not list a gene, its count is 0.
    - ``uns["her2st"]``: ``mpp``, micrometers per pixel of each spots element's image; ``spot_diameter_um``; ``spot_pitch_um``.

    Spots that are only in the list of spots under tissue, or only in the count matrix, are left out (their number is
    logged).

    Raises
    ------
    ValueError
        If a section is unknown or named twice, or if a download is not the published file.
    OSError
        If a file is neither in the cache folder nor to be had; a damaged or replaced file is named.

    Notes
    -----
    The pitch in pixels is the slope of the spots' pixel positions against their adjusted grid positions (``new_x``,
    ``new_y``), with an RMS residual of 0.003 pixels (0.6 in A6). Distances between nearest neighbours would give a
    pitch that is too small, by 7 % in C2, because adjusted positions scatter around the grid. Pitches along x and y
    differ by at most 1.1 %; circles and ``mpp`` follow their mean.

    References
    ----------
    Andersson et al. (2021), Spatial deconvolution of HER2-positive breast cancer delineates tumor-associated cell type
    interactions, Nature Communications 12, 6012, https://doi.org/10.1038/s41467-021-26271-2

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.her2st(["C2", "C3", "C4", "C5"])
    >>> sdata["table"].obs["train"] = sdata["table"].obs["section"] != "C5"
    """
    published = _published_sections()
    names = _check_names(sections, list(published))
    folder = cache_folder(path) / "her2st"
    files = {name: [fetch(file, base_url=BASE_URL, folder=folder) for file in published[name]] for name in names}
    parts = [_read_section(name, *files[name]) for name in tqdm(names, desc="HER2+ sections", delay=3, leave=False)]
    return SpatialData(
        images={f"{part.name}_image": part.image for part in parts},
        shapes={f"{part.name}_spots": _circles(part) for part in parts},
        tables={"table": _table(parts)},
    )


@dataclass(frozen=True)
class _Section:
    name: str
    image: xr.DataTree
    spots: pd.DataFrame  # rows as those of counts
    counts: sparse.csr_matrix
    genes: pd.Index
    pitch: float  # pixels between neighbouring spots


def _published_sections() -> dict[str, tuple[RemoteFile, RemoteFile, RemoteFile]]:
    """Counts, spots and image of each section."""
    files = {file.path: file for file in read_registry("her2st_files.tsv")}
    images = {path.split("/")[2]: file for path, file in files.items() if path.startswith("ST-imgs/")}
    return {
        name: (files[f"ST-cnts/{name}.tsv.gz"], files[f"ST-spotfiles/{name}_selection.tsv"], image)
        for name, image in images.items()
    }


def _check_names(sections: str | Sequence[str] | None, known: list[str]) -> list[str]:
    if sections is None:
        return known
    names = [sections] if isinstance(sections, str) else list(sections)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"`sections` is {sections!r}; expected one or more of {', '.join(known)} (None for all).")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"`sections` names {', '.join(twice)} more than once; name every section once.")
    return names


def _read_section(name: str, counts_file: Path, spots_file: Path, image_file: Path) -> _Section:
    counts = pd.read_csv(counts_file, sep="\t", index_col=0)
    spots = pd.read_csv(spots_file, sep="\t")
    # Both pitches are measured on all spots under tissue, sequenced or not.
    pitch = (_slope(spots["new_x"], spots["pixel_x"]) + _slope(spots["new_y"], spots["pixel_y"])) / 2

    spots.index = pd.Index(spots["x"].astype(str) + "x" + spots["y"].astype(str))
    sequenced = spots.index.isin(counts.index)
    if not sequenced.all() or len(counts) > sequenced.sum():
        logg.info(
            f"{name}: {sequenced.sum()} spots; left out {(~sequenced).sum()} under tissue without counts and "
            f"{len(counts) - sequenced.sum()} with counts that are not under tissue"
        )
    spots = spots[sequenced]
    matrix = sparse.csr_matrix(counts.loc[spots.index].to_numpy(np.float32))
    # Names that repeat in another section would let joins by name mix sections up.
    spots.index = f"{name}_" + spots.index

    pixels = _jpeg.decode(image_file.read_bytes())
    image = multiscale_image(np.ascontiguousarray(pixels.transpose(2, 0, 1)), name)
    return _Section(name, image, spots, matrix, counts.columns, pitch)


def _slope(grid: pd.Series, pixel: pd.Series) -> float:
    return float(np.polyfit(grid, pixel, 1)[0])


def _circles(part: _Section) -> GeoDataFrame:
    return ShapesModel.parse(
        part.spots[["pixel_x", "pixel_y"]].to_numpy(float),
        geometry=0,
        radius=part.pitch * DIAMETER_UM / PITCH_UM / 2,
        index=part.spots.index,
        transformations={part.name: Identity()},
    )


def _table(parts: list[_Section]) -> ad.AnnData:
    genes = parts[0].genes
    for part in parts[1:]:
        genes = genes.union(part.genes, sort=False)
    counts = sparse.vstack([_spread(part.counts, genes.get_indexer(part.genes), len(genes)) for part in parts], "csr")

    obs = pd.concat([_observations(part) for part in parts])
    for column in ("section", "patient", "region"):
        obs[column] = pd.Categorical(obs[column], categories=obs[column].unique())
    var = pd.DataFrame({"n_sections": sum(genes.isin(part.genes).astype(int) for part in parts)}, index=genes)
    table = ad.AnnData(counts.copy(), obs=obs, var=var, layers={"counts": counts})
    sc.pp.normalize_total(table, target_sum=1e4)
    sc.pp.log1p(table)
    table.uns["her2st"] = {
        "mpp": {f"{part.name}_spots": PITCH_UM / part.pitch for part in parts},
        "spot_diameter_um": DIAMETER_UM,
        "spot_pitch_um": PITCH_UM,
    }
    regions = list(obs["region"].cat.categories)
    return TableModel.parse(table, region=regions, region_key="region", instance_key="spot_id")


def _spread(counts: sparse.csr_matrix, columns: NDArray[np.intp], n_genes: int) -> sparse.csr_matrix:
    """The same counts, with gene j of the section in column ``columns[j]`` of the union."""
    spread = sparse.csr_matrix((counts.data, columns[counts.indices], counts.indptr), (counts.shape[0], n_genes))
    spread.sort_indices()
    return spread


def _observations(part: _Section) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "section": part.name,
            "patient": part.name[0],
            "array_row": part.spots["y"].to_numpy(),
            "array_col": part.spots["x"].to_numpy(),
            "region": f"{part.name}_spots",
            "spot_id": part.spots.index,
        },
        index=part.spots.index,
    )
