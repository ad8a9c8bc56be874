"""What is measured on: four sections of one breast cancer, or drawn ones for a rehearsal without them."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pooch
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity

import stpredict as stp

SECTIONS = ("C2", "C3", "C4", "C5")


def four_sections(*, drawn: bool) -> tuple[SpatialData, str]:
    """The sections, with ``obs["train"]`` False for the last, and the name of that one."""
    if drawn:
        sdata, held_out = stp.datasets.synthetic(4, n_spots=12, n_genes=20), "S4"
    else:
        sdata, held_out = stp.datasets.her2st(SECTIONS), SECTIONS[-1]
    obs = sdata["table"].obs
    obs["train"] = (obs["section"] != held_out).to_numpy()
    return sdata, held_out


def are_here() -> bool:
    """Whether the sections need no network."""
    folder = Path(os.environ.get("STPREDICT_DATA_DIR") or pooch.os_cache("stpredict")).expanduser()
    return (folder / "her2st/ST-cnts/C2.tsv.gz").exists()


def dense_slide(n_spots: int, n_genes: int, *, rehearse: bool) -> SpatialData:
    """Many spots on one section, and expression that is all chance: for speed, not for scores."""
    if rehearse:
        sdata = stp.datasets.synthetic(1, n_spots=50, n_genes=8)
        image, circles = sdata["S1_image"]["scale0"].image, sdata["S1_spots"]
    else:
        sdata = stp.datasets.her2st(SECTIONS[:1])
        image, circles = sdata["C2_image"]["scale0"].image, sdata["C2_spots"]
    radius = float(circles["radius"].iloc[0])
    pixels = image.data
    rng = np.random.default_rng(0)
    margin = 8 * radius if not rehearse else 2 * radius
    xy = rng.uniform(margin, np.array(pixels.shape[:0:-1]) - margin, (n_spots, 2))
    obs = pd.DataFrame({"region": pd.Categorical(["spots"] * n_spots), "spot": np.arange(n_spots)})
    obs.index = obs.index.astype(str)
    var = pd.DataFrame(index=[f"gene {i}" for i in range(n_genes)])
    table = ad.AnnData(rng.standard_normal((n_spots, n_genes), dtype=np.float32), obs=obs, var=var)
    to_slide = {"slide": Identity()}
    return SpatialData(
        images={"slide": Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations=to_slide)},
        shapes={"spots": ShapesModel.parse(xy, geometry=0, radius=radius, transformations=to_slide)},
        tables={"table": TableModel.parse(table, region="spots", region_key="region", instance_key="spot")},
    )


def small_network(*, rehearse: bool) -> dict[str, int]:
    """What a rehearsal makes of a preset."""
    return {"image_size": 32, "width": 32, "depth": 2, "heads": 1, "head_width": 32} if rehearse else {}
