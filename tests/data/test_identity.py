from __future__ import annotations

import io
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import dask
import dask.array as da
import h5py  # type: ignore[import-untyped]
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from anndata import AnnData

from stpredict._data.identity import Unidentified, digest, identity, pixels_identity
from stpredict._data.slide import Section

DENSE = np.array([[0.0, 2.0, 0.0], [3.0, 0.0, 4.0]])
FRAME = pd.DataFrame({"a": [1.0, np.nan], "b": ["x", "y"]}, index=["i", "j"])

# Each pair is the same value, kept in two ways.
SAME: dict[str, tuple[Any, Any]] = {
    "order of keys": ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}),
    "kind of mapping": ({"a": 1}, OrderedDict(a=1)),
    "kind of sequence": ([1, "a", None], (1, "a", None)),
    "numbers of numpy": ([1, 1.5, True, "s"], [np.int16(1), np.float64(1.5), np.True_, np.str_("s")]),
    "not a number": ([np.nan, {"x": float("nan")}], [float("nan"), {"x": np.float64("nan")}]),
    "steps": (np.arange(12.0)[::3], np.array([0.0, 3, 6, 9])),
    "fortran order": (np.asfortranarray(DENSE), DENSE),
    "empty": (np.empty((0, 3)), np.zeros((2, 3))[:0]),
    "csr and csc": (sp.csr_matrix(DENSE), sp.csc_matrix(DENSE)),
    "csr and coo": (sp.csr_array(DENSE), sp.coo_matrix(DENSE)),
    "order of entries": (
        sp.csr_matrix(DENSE),
        sp.csr_matrix((np.array([2.0, 4, 3]), np.array([1, 2, 0]), np.array([0, 1, 3])), (2, 3)),
    ),
    "width of indices": (
        sp.csr_matrix(DENSE),
        sp.csr_matrix((np.array([2.0, 3, 4]), np.array([1, 0, 2], np.int64), np.array([0, 1, 3], np.int64)), (2, 3)),
    ),
    "strings": (np.array(["a", "bcd"]), np.array(["a", "bcd"], dtype=object)),
    "categories": (FRAME, FRAME.astype({"b": "category"})),
    "sets": ({"a", "b", "c"}, frozenset(["c", "b", "a"])),
    "paths": (Path("a/b"), "a/b"),
}

# No two of these are the same.
DIFFERENT: list[Any] = [
    *(None, 0, 1, 1.0, "1", b"1", True, 1j, -0.0, 0.0, float("nan"), "nan", "", "None", pd.NA, pd.Timestamp(0)),
    *([], [[]], [1], [[1]], [1, 2], [2, 1], [1, [2]], ["1", "2"], ["1,2"], ["1;", "2"], ["a", "b"], {"a", "b"}),
    *({}, {"a": 1}, {"a": 2}, {"b": 1}, {"a": {}}, {"a": None}, [["a", 1]]),
    *(np.array(1), np.array([1]), np.array([[1]]), np.array([1, 2]), np.array([2, 1]), np.array([1.0, 2.0])),
    *(np.array([1, 2], dtype=np.int32), np.array([0.0]), np.array([-0.0]), np.array([np.nan]), np.array([True])),
    *(np.empty(0), np.empty((0, 3)), np.empty((3, 0)), np.empty(0, dtype=int), np.zeros((2, 3)), np.zeros((3, 2))),
    *(np.array(["a", "b"]), np.array(["ab"]), np.array(["a", None], dtype=object), np.array([1, "a"], dtype=object)),
    *(DENSE, sp.csr_matrix(DENSE), sp.csr_matrix(DENSE.T), sp.csr_matrix(2 * DENSE), sp.csr_matrix((2, 3))),
    *(sp.csr_matrix(DENSE.astype(np.float32)), sp.csr_matrix(DENSE[:, ::-1])),
    *(FRAME, FRAME[["b", "a"]], FRAME.rename(columns={"a": "c"}), FRAME.set_axis(["i", "k"]), FRAME[["a"]], FRAME["a"]),
    *(slice_ for slice_ in (DENSE[:1], DENSE[1:], np.longdouble(1) / 3)),
]


@pytest.mark.parametrize("kind", SAME)
def test_the_same_values_have_one_digest(kind: str) -> None:
    one, other = SAME[kind]
    assert digest(one) == digest(other)
    assert digest({"x": [one]}) == digest({"x": (other,)})


def test_different_values_have_different_digests() -> None:
    digests: dict[str, Any] = {}
    for value in DIFFERENT:
        found = digest(value)
        assert found not in digests, (value, digests[found])
        digests[found] = value
    assert digest(1, 2) != digest(12) != digest([1, 2])


def test_what_has_no_digest() -> None:
    for value in (object(), len, [1, {"a": object()}], np.array([object()]), {1: test_what_has_no_digest}):
        with pytest.raises(Unidentified, match="^a "):
            digest(value)
        assert identity(value) is None
    assert identity(1, None) is None
    assert identity(1, [None]) == digest(1, [None]), "a value may well be None within another"


def test_values_do_not_change_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = AnnData(
        sp.random(8, 5, 0.4, "csr", rng=rng),
        obs=pd.DataFrame(
            {"n": rng.random(8), "word": list("aabbccdd"), "ok": [True, False] * 4}, index=list("stuvwxyz")
        ),
    )
    table.obs["maybe"] = pd.array([True, None] * 4, dtype="boolean")
    table.obsm["sparse"], table.obsm["dense"] = sp.csc_matrix(table.X), rng.random((8, 2)).astype(np.float32)
    table.obsm["dense"][0] = np.nan
    table.obsm["frame"] = pd.DataFrame({"a": rng.random(8), "b": np.arange(8)}, index=table.obs_names)
    table.uns["entry"] = {"names": np.array(["x", "yy"], dtype=object), "n": 3, "scale": 1.5, "deep": {"word": "w"}}
    table.write_h5ad(tmp_path / "table.h5ad")
    table.write_zarr(tmp_path / "table.zarr")
    for back in (ad.read_h5ad(tmp_path / "table.h5ad"), ad.read_zarr(tmp_path / "table.zarr")):
        for name in ("obs", "obsm", "uns", "X"):
            ours, theirs = (getattr(each, name) for each in (table, back))
            ours, theirs = (dict(each) if name in ("obsm", "uns") else each for each in (ours, theirs))
            assert digest(ours) == digest(theirs), name


# Pixels


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, 40, 50), dtype=np.uint8)


def of(pixels: da.Array) -> str | None:
    return pixels_identity(pixels, "HE")


def test_pixels_in_memory() -> None:
    pixels = image()
    before = of(da.from_array(pixels, chunks=(3, 20, 20)))
    assert before is not None
    assert of(da.from_array(pixels.copy(), chunks=(3, 20, 20))) == before
    pixels[1, 39, 49] ^= 1
    assert of(da.from_array(pixels, chunks=(3, 20, 20))) != before
    assert of(da.from_array(image().astype(np.uint16), chunks=(3, 20, 20))) != before
    assert of(da.from_array(image()[::-1], chunks=(3, 20, 20))) != before


@pytest.mark.parametrize("derived", [False, True])
def test_pixels_that_change_in_place(derived: bool) -> None:
    # The name of an array tells what it held when dask was given it; `image.values` may be the very array.
    pieces = [image(seed) for seed in range(2)]
    graph: Any = {("pieces", 0, 0, i): piece for i, piece in enumerate(pieces)}
    lazy = da.Array(graph, "pieces", chunks=((3,), (40,), (50, 50)), dtype=np.uint8)
    if derived:
        lazy = lazy[:, ::-1].rechunk((1, 40, 25))
    first = of(lazy)
    assert first is not None
    pieces[0][0, 0, 0] ^= 1
    assert of(lazy) != first
    pieces[0][0, 0, 0] ^= 1
    assert of(lazy) == first
    pieces[0][:], pieces[1][:] = pieces[1].copy(), pieces[0].copy()
    assert of(lazy) != first, "the same pieces at other places"


@pytest.mark.parametrize("way", ["array", "address", "inline"])
def test_pixels_in_files(tmp_path: Path, way: str) -> None:
    def open_it(folder: Path) -> da.Array:
        if way == "address":
            return da.from_zarr(str(folder))
        return da.from_zarr(zarr.open_array(folder), inline_array=way == "inline")

    def write(folder: Path, pixels: np.ndarray, **options: Any) -> None:
        zarr.create_array(folder, data=pixels, chunks=(3, 20, 20), overwrite=True, **options)

    write(tmp_path / "a.zarr", image(), compressors=None)
    lazy = open_it(tmp_path / "a.zarr")
    first = of(lazy)
    assert first is not None
    assert of(open_it(tmp_path / "a.zarr")) == first

    shutil.copytree(tmp_path / "a.zarr", tmp_path / "b.zarr")
    assert of(open_it(tmp_path / "b.zarr")) != first

    time.sleep(0.02)  # file systems tell times apart to some milliseconds
    chunk = next(path for path in (tmp_path / "a.zarr").rglob("*") if path.is_file() and path.name != "zarr.json")
    chunk.write_bytes(chunk.read_bytes()[::-1])
    changed = of(lazy)
    assert changed not in (first, None)
    time.sleep(0.02)
    write(tmp_path / "a.zarr", image(1), compressors=None)
    assert of(lazy) not in (first, changed, None)

    shutil.rmtree(tmp_path / "a.zarr")
    assert of(lazy) is None


def test_pixels_that_tell_nothing_of_themselves(tmp_path: Path, log: io.StringIO) -> None:
    def read(*_: Any) -> np.ndarray:
        return image()

    shape: Any = (3, 40, 50)
    with h5py.File(tmp_path / "image.h5", "w") as file:
        unknown = {
            "read": da.from_delayed(dask.delayed(read)(), shape, dtype=np.uint8),
            "a function of a path": da.from_delayed(dask.delayed(read)("HE.tif", np.arange(3)), shape, dtype=np.uint8),
            "blocks": da.map_blocks(read, chunks=((3,), (40,), (50,)), dtype=np.uint8),
            "h5py": da.from_array(file.create_dataset("image", data=image()), chunks=(3, 20, 20)),
            "MemoryStore": da.from_zarr(zarr.create_array(zarr.storage.MemoryStore(), data=image())),
        }
        for name, pixels in unknown.items():
            log.seek(0)
            log.truncate()
            assert of(pixels) is None, name
            assert of(da.concatenate([da.from_array(image()), pixels], axis=2)) is None, "nor in part"
            assert log.getvalue().count("What is made of the image 'HE' cannot be kept for another call") == 2, name


def test_readers_may_say_what_they_read() -> None:
    class File:
        ndim, shape, dtype = 3, (3, 40, 50), np.dtype(np.uint8)

        def __init__(self, stpredict_identity: str) -> None:
            self.stpredict_identity = stpredict_identity

        def __getitem__(self, where: Any) -> np.ndarray:
            return image()[where]

    one, other = (of(da.from_array(File(name), chunks=(3, 20, 20), name="file")) for name in ("one", "other"))
    assert one is not None
    assert other is not None
    assert one != other
    assert of(da.from_array(File("one"), chunks=(3, 20, 20), name="file")) == one


# Sections


def test_sections(new_section: Callable[..., Section]) -> None:
    def section(**changes: Any) -> Section:
        made = new_section(da.from_array(image()), [[10, 10], [20, 30.0]], 4.0)
        return replace(made, **changes)

    first = section().identity
    assert first is not None
    assert section().identity == first
    turned = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    changes: list[dict[str, Any]] = [
        {"channels": (2, 1, 0)},
        {"affine": turned},
        {"xy": np.array([[10, 10], [20, 30.001]])},
        {"xy": np.array([[20, 30.0], [10, 10]])},
        {"radii": np.array([4.0, 4.001])},
        {"rows": np.array([1, 0])},
        {"levels": new_section(da.from_array(image(1))).levels},
        {"levels": new_section(da.from_array(image()[:, :-1])).levels},
    ]
    found = [section(**change).identity for change in changes]
    assert None not in found
    assert len({first, *found}) == len(changes) + 1
    unknown = da.map_blocks(image, chunks=((3,), (40,), (50,)), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    assert section(levels=new_section(unknown).levels).identity is None
