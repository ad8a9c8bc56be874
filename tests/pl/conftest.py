from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import xarray as xr
from anndata import AnnData
from geopandas.testing import assert_geodataframe_equal
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Scale, get_transformation

from stpredict._data.compat import layer_names

mpl.use("Agg")
import matplotlib.pyplot as plt

# Hematoxylin, eosin and the direction at right angles to both.
REFERENCE = np.array([[0.68, 0.70, 0.22], [0.10, 0.95, 0.30]])
REFERENCE = np.vstack([REFERENCE, np.cross(*REFERENCE)])
REFERENCE /= np.linalg.norm(REFERENCE, axis=1, keepdims=True)

DIAMETER, PITCH, HEIGHT, WIDTH = 20.0, 40.0, 300, 400


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def unchanged() -> Callable[[SpatialData], AbstractContextManager[None]]:
    """Fail if a SpatialData is not the same after a block of code as before."""

    @contextmanager
    def check(sdata: SpatialData) -> Iterator[None]:
        before = sd.deepcopy(sdata)
        attributes = set(vars(sdata))
        yield
        assert set(vars(sdata)) == attributes
        assert [name for _, name, _ in sdata.gen_elements()] == [name for _, name, _ in before.gen_elements()]
        for name, image in sdata.images.items():
            xr.testing.assert_identical(image, before.images[name])
        for name, shapes in sdata.shapes.items():
            assert_geodataframe_equal(shapes, before.shapes[name])
            assert get_transformation(shapes, get_all=True) == get_transformation(before.shapes[name], get_all=True)
        for name, table in sdata.tables.items():
            other = before.tables[name]
            for layer in (*([] if other.X is None else [None]), *layer_names(other)):
                pd.testing.assert_frame_equal(table.to_df(layer), other.to_df(layer))
            pd.testing.assert_frame_equal(table.obs, other.obs)
            pd.testing.assert_frame_equal(table.var, other.var)
            np.testing.assert_equal(dict(table.uns), dict(other.uns))
            assert layer_names(table) == layer_names(other)
            assert list(table.obsm) == list(other.obsm)

    return check


@pytest.fixture(scope="session")
def predicted_sdata() -> Callable[[], SpatialData]:
    """Make two sections, A (fitted to) and B (held out), with 48 spots each and predictions of three of four genes.

    Circles are in pixels; the coordinate systems, named like the sections, are in micrometers, half a one per pixel.
    Images are shared, everything else is of one's own.
    """
    made = _make()

    def copy() -> SpatialData:
        return SpatialData(
            images=dict(made.images),
            shapes={name: shapes.copy() for name, shapes in made.shapes.items()},
            tables={"table": made["table"].copy()},
        )

    return copy


@pytest.fixture
def make_scores() -> Callable[..., pd.DataFrame]:
    """Make a frame as cross-validation returns it: two models, five baselines, sections C2 to C5 of two patients."""
    return _make_scores


def _make_scores(n_genes: int = 30, *, models: Sequence[str] = ("nsl", "m2ost")) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    level = {"mean of training spots": np.nan, "mean of held-out section (oracle)": np.nan, "position": 0.1}
    level |= {"ridge on mean OD": 0.15, "ridge on color statistics": 0.19}
    baselines = list(level)
    level |= {model: 0.2 + 0.03 * i for i, model in enumerate(models)}
    genes = [f"gene{i}" for i in range(n_genes)]
    parts = []
    for model, pcc in level.items():
        for section, patient in {"C2": "C", "C3": "C", "D1": "D", "D2": "D"}.items():
            labels = {"model": model, "section": section, "group": patient, "baseline": model in baselines}
            values = {"pcc": pcc + 0.1 * rng.normal(size=n_genes), "ceiling": 0.6 + 0.05 * rng.normal(size=n_genes)}
            values["rmse"] = rng.gamma(20, 0.05, n_genes)
            parts.append(pd.DataFrame({"of": "gene", "name": genes} | values | labels))
            spots = [f"{section}_{i}" for i in range(40)]
            values = {"pcc": 0.7 + np.nan_to_num(pcc) + 0.03 * rng.normal(size=40), "rmse": rng.gamma(20, 0.05, 40)}
            parts.append(pd.DataFrame({"of": "spot", "name": spots} | values | labels))
    each = pd.concat(parts, ignore_index=True)
    each["pcc_of_ceiling"] = each["pcc"] / each["ceiling"]
    numbers = ["pcc", "rmse", "ceiling", "pcc_of_ceiling"]
    mean = each[each["of"] == "gene"].groupby(["model", "of", "name", "baseline"], sort=False)[numbers].mean()
    aggregates = [mean.reset_index().assign(section=name, group="") for name in ("mean of sections", "pooled")]
    frame = pd.concat([each, *aggregates], ignore_index=True)
    # Models first: pictures have to put baselines before them.
    frame = frame.sort_values("baseline", kind="stable", ignore_index=True)
    for label in ("model", "of", "name", "section", "group"):
        frame[label] = pd.Categorical(frame[label], categories=frame[label].unique())
    return frame


def _make() -> SpatialData:
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(60 + PITCH * np.arange(8), 50 + PITCH * np.arange(6))
    centers = np.column_stack([x.ravel(), y.ravel()])
    n = len(centers)
    images, shapes, obs = {}, {}, []
    for name in "AB":
        transformations = {name: Scale([0.5, 0.5], axes=("x", "y"))}
        images[f"{name}_image"] = Image2DModel.parse(
            rng.integers(120, 250, (3, HEIGHT, WIDTH), dtype=np.uint8),
            dims=("c", "y", "x"),
            c_coords=["r", "g", "b"],
            transformations=transformations,
            scale_factors=[2],
        )
        ids = [f"{name}{i}" for i in range(n)]
        shapes[f"{name}_spots"] = ShapesModel.parse(
            centers, geometry=0, radius=DIAMETER / 2, index=pd.Index(ids), transformations=transformations
        )
        obs.append(pd.DataFrame({"section": name, "region": f"{name}_spots", "spot_id": ids}, index=ids))
    # Rows in another order than the circles.
    frame = pd.concat(obs).sample(frac=1, random_state=1)
    frame["region"] = frame["region"].astype("category")
    frame["section"] = frame["section"].astype("category")
    frame["nsl_train"] = (frame["section"] == "A").to_numpy()

    genes = ["ACTB", "ERBB2", "KRT19", "other"]
    measured = rng.gamma(2, 1, (2 * n, 4)).astype(np.float32)
    predicted = (0.4 * measured + rng.normal(1, 0.3, measured.shape)).astype(np.float32)
    predicted[:, 3] = np.nan
    table = AnnData(measured, obs=frame, var=pd.DataFrame({"nsl_fitted": [True, True, True, False]}, index=genes))
    table.layers["nsl"] = predicted
    table.uns["nsl"] = {
        "genes": np.array(genes[:3], dtype=object),
        "stain_matrix": np.array([REFERENCE, _turned(20), _turned(45)]),
        "weights": np.array([[1.0, -2.0], [3.0, 0.5], [-0.5, 0.25]]),
        "reference": REFERENCE,
        "params": {"model": "nsl", "layer": "X"},
        "written": {"layers": ["nsl"], "obs": ["nsl_train"], "var": ["nsl_fitted"]},
    }
    table.uns["stage"] = {"mpp": {"A_spots": 0.5, "B_spots": 0.5}}
    parsed = TableModel.parse(table, region=list(shapes), region_key="region", instance_key="spot_id")
    return SpatialData(images=images, shapes=shapes, tables={"table": parsed})


def _turned(degrees: float) -> np.ndarray:
    """The reference, with hematoxylin turned towards the residual."""
    turned = REFERENCE.copy()
    angle = np.radians(degrees)
    turned[0] = np.cos(angle) * REFERENCE[0] + np.sin(angle) * REFERENCE[2]
    return turned
