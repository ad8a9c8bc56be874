from __future__ import annotations

import io
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import zarr
from anndata import AnnData
from geopandas import GeoDataFrame
from scanpy import settings
from scipy import sparse
from shapely import Point
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, BaseTransformation, Identity, Scale, Translation
from spatialdata.transformations import Sequence as Chain

from stpredict._data.image import Level
from stpredict._data.slide import Section

# Expression of gene j: weights of hematoxylin and eosin, both, or neither (noise).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
RESPONSES = np.array([[2.0, 0.0], [0.0, 2.0], [1.5, -1.0], [0.0, 0.0]])


@pytest.fixture(scope="session")
def her2st_dir() -> Path:
    """Cache folder that holds sections C2 to C5 of the HER2-positive set."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("STPREDICT_DATA_DIR", beside))
    if not (folder / "her2st" / "ST-cnts" / "C2.tsv.gz").is_file():
        pytest.skip(f"real sections are not in {folder}: set STPREDICT_DATA_DIR to a cache folder with her2st C2 to C5")
    return folder


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What scanpy's logger writes during the test, information included."""
    verbosity, logfile = settings.verbosity, settings.logfile
    settings.verbosity, settings.logfile = "info", io.StringIO()
    yield settings.logfile
    settings.verbosity, settings.logfile = verbosity, logfile


@pytest.fixture(scope="session")
def placements() -> dict[str, tuple[BaseTransformation, np.ndarray]]:
    """Transformations to a world, each with its 3 x 3 matrix (x before y) written out by hand."""
    turn = np.array([[np.cos(0.6), -np.sin(0.6), 40.0], [np.sin(0.6), np.cos(0.6), -25.0], [0, 0, 1]])
    flip = np.array([[-1.0, 0, 500.0], [0, 1, 12.0], [0, 0, 1]])
    shear = np.array([[1.0, 0.35, -8.0], [0.1, 1.2, 5.0], [0, 0, 1]])

    def affine(matrix: np.ndarray) -> Affine:
        return Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))

    return {
        "identity": (Identity(), np.eye(3)),
        "scale": (Scale([2.5, 2.5], axes=("x", "y")), np.diag([2.5, 2.5, 1])),
        "anisotropic": (Scale([0.5, 0.8], axes=("y", "x")), np.diag([0.8, 0.5, 1])),
        "translation": (Translation([30, -70.5], axes=("x", "y")), np.array([[1, 0, 30], [0, 1, -70.5], [0, 0, 1]])),
        "rotation": (affine(turn), turn),
        "flip": (affine(flip), flip),
        "shear": (affine(shear), shear),
        "sequence": (
            Chain([Scale([0.5, 0.5], axes=("x", "y")), Translation([3, 4], axes=("x", "y")), affine(turn)]),
            turn @ np.array([[1, 0, 3], [0, 1, 4], [0, 0, 1]]) @ np.diag([0.5, 0.5, 1]),
        ),
    }


@pytest.fixture(scope="session")
def make_sdata(placements: dict[str, tuple[BaseTransformation, np.ndarray]]) -> Callable[..., SpatialData]:
    """Build small sections: tissue of two stains, circles that cross chunks and borders, expression that follows."""

    def make(
        n_sections: int = 1,
        *,
        size: tuple[int, int] = (290, 330),
        n_spots: int = 30,
        n_genes: int = 12,
        seed: int = 0,
        world: str | None = None,
        image_at: str = "identity",
        shapes_at: str = "identity",
        instances: str = "int",
        shuffle: bool = True,
        n_without_row: int = 0,
        n_without_spot: int = 0,
        polygons: bool = False,
        table: bool = True,
        **image_options: Any,
    ) -> SpatialData:
        images, shapes, parts = {}, {}, []
        for i in range(n_sections):
            rng = np.random.default_rng([seed, i])
            name = "ABCDEFGH"[i]
            system = world or name
            loads = _loads(rng, size)
            (to_world, image_matrix), (from_shapes, shapes_matrix) = placements[image_at], placements[shapes_at]
            images[f"{name}_image"] = make_image(photograph(loads), {system: to_world}, **image_options)

            centers = _grid(rng, size, n_spots)
            to_shapes = np.linalg.inv(shapes_matrix) @ image_matrix
            xy = centers @ to_shapes[:2, :2].T + to_shapes[:2, 2]
            radii = rng.uniform(9, 12, n_spots) * np.sqrt(abs(np.linalg.det(to_shapes)))
            numbers = 100 * (i + 1) + rng.permutation(n_spots)
            index = pd.Index(numbers if instances == "int" else [f"{name}_{number}" for number in numbers])
            shapes[f"{name}_spots"] = make_shapes(xy, radii, index, {system: from_shapes}, polygons=polygons)
            parts.append(_rows(rng, name, loads, centers, index, n_genes, shuffle, n_without_row, n_without_spot))
        tables = {"table": _table(parts)} if table else {}
        return SpatialData(images=images, shapes=shapes, tables=tables)

    return make


@pytest.fixture(scope="session")
def to_backed() -> Callable[[SpatialData, Path], SpatialData]:
    """Write to zarr and read back."""

    def write_and_read(sdata: SpatialData, path: Path) -> SpatialData:
        sdata.write(path)
        return sd.read_zarr(path)

    return write_and_read


@pytest.fixture(scope="session")
def make_general(make_sdata: Callable[..., SpatialData]) -> Callable[[], SpatialData]:
    """Two small sections that are as general as their files can tell: turned, sheared, with scales and names of spots."""
    return lambda: make_sdata(
        2,
        size=(150, 190),
        n_spots=12,
        n_genes=3,
        chunks=(3, 64, 100),
        image_at="sequence",
        shapes_at="shear",
        scale_factors=[2, 2],
        instances="str",
    )


@pytest.fixture(scope="session")
def on_disk(make_general: Callable[[], SpatialData], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in a zarr store, which no test may write to."""
    path: Path = tmp_path_factory.mktemp("on_disk") / "slide.zarr"
    make_general().write(path)
    return path


@pytest.fixture(scope="session")
def other_process() -> Iterator[ProcessPoolExecutor]:
    """A fresh interpreter, in which sets have another order."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONHASHSEED", "123")
            pool.submit(int).result()
        yield pool


@pytest.fixture(scope="session")
def new_image() -> Callable[..., Any]:
    """Image of spatialdata from ``(3, y, x)`` uint8 pixels: other dtypes, scales, chunks, an alpha channel."""
    return make_image


@pytest.fixture
def chunk_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each chunk of an image on disk is read during the test."""
    reads: Counter[str] = Counter()
    original = zarr.storage.LocalStore.get

    async def get(self: Any, key: str, *arguments: Any, **keywords: Any) -> Any:
        if "/c/" in f"/{key}" and "/images/" in (path := f"{self.root}/{key}"):
            reads[path] += 1
        return await original(self, key, *arguments, **keywords)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", get)
    return reads


@pytest.fixture(scope="session")
def new_section() -> Callable[..., Section]:
    """Round spots on an image, put together by hand, in pixels unless there is an ``affine``."""

    def make(
        pixels: Any,
        xy: Any = (),
        radii: Any = 1.0,
        *,
        affine: np.ndarray | None = None,
        channels: tuple[int, ...] = (0, 1, 2),
    ) -> Section:
        xy = np.asarray(xy, dtype=float).reshape(-1, 2)
        n = len(xy)
        return Section(
            name="spots",
            xy=xy,
            radii=np.full(n, radii, dtype=float),
            instances=np.arange(n),
            rows=np.arange(n),
            image_key="HE",
            coordinate_system="global",
            levels=(Level(da.asarray(pixels), np.eye(3)),),
            channels=channels,
            affine=np.eye(3) if affine is None else affine,
        )

    return make


def make_image(
    pixels: np.ndarray,
    transformations: dict[str, BaseTransformation],
    *,
    dtype: str = "uint8",
    alpha: bool = False,
    channels: Sequence[str] | None = None,
    chunks: tuple[int, int, int] = (3, 128, 128),
    scale_factors: list[int] | None = None,
) -> Any:
    if alpha:
        pixels = np.concatenate([pixels, np.full_like(pixels[:1], 255)])
    if channels is not None:
        pixels = pixels[["rgba".index(name[0].lower()) for name in channels]]
    if dtype == "uint16":
        pixels = pixels.astype(np.uint16) * 257
    elif dtype.startswith("float"):
        pixels = (pixels / 255).astype(dtype)
    return Image2DModel.parse(
        pixels,
        dims=("c", "y", "x"),
        c_coords=channels,
        transformations=transformations,
        scale_factors=scale_factors,
        chunks=(len(pixels), *chunks[1:]),
    )


def make_shapes(
    xy: np.ndarray,
    radii: np.ndarray,
    index: pd.Index,
    transformations: dict[str, BaseTransformation],
    *,
    polygons: bool,
) -> GeoDataFrame:
    if not polygons:
        return ShapesModel.parse(xy, geometry=0, radius=radii, index=index, transformations=transformations)
    outlines = [Point(center).buffer(radius, quad_segs=90) for center, radius in zip(xy, radii, strict=True)]
    return ShapesModel.parse(GeoDataFrame({"geometry": outlines}, index=index), transformations=transformations)


def photograph(loads: np.ndarray) -> np.ndarray:
    """Beer-Lambert: ``(2, y, x)`` hematoxylin and eosin to ``(3, y, x)`` uint8."""
    od = np.tensordot(STAINS.T, loads, 1)
    return np.clip(np.rint(256 * np.exp(-od) - 1), 0, 255).astype(np.uint8)


def _loads(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Blocks of 30 pixels that differ in both stains, and grains in them."""
    blocks = rng.gamma(2, 0.25, (2, size[0] // 30 + 1, size[1] // 30 + 1))
    smooth = np.kron(blocks, np.ones((1, 30, 30)))[:, : size[0], : size[1]]
    return smooth * rng.uniform(0.6, 1.4, smooth.shape)


def _grid(rng: np.random.Generator, size: tuple[int, int], n_spots: int) -> np.ndarray:
    """``(n, 2)`` centres (x, y) all over the image, some so close to its border that their fields are cut."""
    columns = int(np.ceil(np.sqrt(n_spots * size[1] / size[0])))
    rows = int(np.ceil(n_spots / columns))
    x, y = np.meshgrid((np.arange(columns) + 0.5) * size[1] / columns, (np.arange(rows) + 0.5) * size[0] / rows)
    return np.column_stack([x.ravel(), y.ravel()])[:n_spots] + rng.uniform(-6, 6, (n_spots, 2))


def _rows(
    rng: np.random.Generator,
    name: str,
    loads: np.ndarray,
    centers: np.ndarray,
    index: pd.Index,
    n_genes: int,
    shuffle: bool,
    n_without_row: int,
    n_without_spot: int,
) -> AnnData:
    column, row = centers.astype(int).T
    near = [
        loads[:, max(y - 10, 0) : y + 10, max(x - 10, 0) : x + 10].mean((1, 2))
        for x, y in zip(column, row, strict=True)
    ]
    weights = RESPONSES[np.arange(n_genes) % len(RESPONSES)]
    expression = 3 + np.array(near) @ weights.T + rng.normal(0, 0.1, (len(centers), n_genes))
    order = (rng.permutation(len(index)) if shuffle else np.arange(len(index)))[n_without_row:]
    spot_ids = index[order]
    if n_without_spot:
        strangers = [f"stranger_{k}" if isinstance(index[0], str) else 9000 + k for k in range(n_without_spot)]
        spot_ids = spot_ids.append(pd.Index(strangers))
        expression = np.vstack([expression[order], rng.normal(3, 1, (n_without_spot, n_genes))])
    else:
        expression = expression[order]
    obs = pd.DataFrame(
        {"region": f"{name}_spots", "spot_id": spot_ids, "section": name}, index=[f"{name}-{k}" for k in spot_ids]
    )
    var = pd.DataFrame(index=[f"gene{j}" for j in range(n_genes)])
    return AnnData(sparse.csr_matrix(np.maximum(expression, 0).astype(np.float32)), obs=obs, var=var)


def _table(parts: list[AnnData]) -> AnnData:
    obs = pd.concat([part.obs for part in parts])
    obs["region"] = obs["region"].astype("category")
    table = AnnData(sparse.vstack([part.X for part in parts], "csr"), obs=obs, var=parts[0].var)
    return TableModel.parse(
        table, region=list(obs["region"].cat.categories), region_key="region", instance_key="spot_id"
    )
