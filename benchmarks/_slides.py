"""Slides that benchmarks share."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from spatialdata import SpatialData


def zarr_section(folder: str | Path) -> SpatialData:
    """Section C2 of the HER2+ set (downloaded when it is not in the cache), backed by zarr."""
    import spatialdata as sd

    import stpredict as stp

    stp.datasets.her2st(["C2"]).write(f"{folder}/c2.zarr")
    return sd.read_zarr(f"{folder}/c2.zarr")


def large_slide(folder: str | Path, *, side: int = 20_000, n_spots: int = 5_000, chunk: int = 1024) -> SpatialData:
    """A large slide, backed by zarr: the colours of section C2 over and over, as hard to compress as real ones.

    The spots, of 141 pixels on a pitch of 280, have Visium's proportions at this density.
    """
    import anndata as ad
    import dask.array as da
    import pandas as pd
    import spatialdata as sd
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity

    import stpredict as stp

    pixels = stp.datasets.her2st(["C2"])["C2_image"]["scale0"].image.data[:, 3000:7000, 3000:7000].compute()
    n = -(-side // 4000)
    tiled = da.tile(da.from_array(pixels, chunks=(3, 1000, 1000)), (1, n, n))[:, :side, :side]
    slide = tiled.rechunk((3, chunk, chunk))
    columns = int(np.sqrt(n_spots))
    x, y = np.linspace(200, side - 200, columns), np.linspace(200, side - 200, n_spots // columns)
    xy = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    obs = pd.DataFrame({"region": "spots", "spot": np.arange(len(xy))}, index=[str(i) for i in range(len(xy))])
    obs["region"] = obs["region"].astype("category")
    table = TableModel.parse(ad.AnnData(obs=obs), region="spots", region_key="region", instance_key="spot")
    to_slide = {"slide": Identity()}
    sdata = SpatialData(
        images={"slide": Image2DModel.parse(slide, dims=("c", "y", "x"), transformations=to_slide)},
        shapes={"spots": ShapesModel.parse(xy, geometry=0, radius=70.7, transformations=to_slide)},
        tables={"table": table},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zarr about its own defaults
        sdata.write(f"{folder}/slide.zarr")
    return sd.read_zarr(f"{folder}/slide.zarr")
