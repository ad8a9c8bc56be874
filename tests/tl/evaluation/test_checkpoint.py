from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd
import torch
import zarr
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, TableModel
from spatialdata.transformations import Translation, get_transformation, set_transformation

import stpredict as stp
from stpredict.tl.evaluation.runs import _jobs
from stpredict.tl.evaluation.runs._checkpoint import KeptFolds

VALUES = np.array([[1.5, np.nan, -2.0]], dtype=np.float32)
MADE_OF = "0123456789abcdef" * 2


def only_file(folder: Path) -> Path:
    (file,) = (path for path in folder.rglob("*") if path.is_file())
    return file


def test_folds_are_kept_by_what_they_were_made_of(tmp_path: Path) -> None:
    kept = KeptFolds(tmp_path / "cv")
    assert kept.keeps and kept.read("nsl", MADE_OF, (1, 3)) is None
    kept.write("nsl", MADE_OF, VALUES)
    kept.write("nsl", "f" * 32, VALUES + 1)
    again = KeptFolds(tmp_path / "cv")
    for made_of, values in ((MADE_OF, VALUES), ("f" * 32, VALUES + 1)):
        found = again.read("nsl", made_of, (1, 3))
        assert found is not None and found.dtype == np.float32
        np.testing.assert_array_equal(found, values)
    assert again.read("m2ost", MADE_OF, (1, 3)) is None
    assert again.read("nsl", "0" * 32, (1, 3)) is None


def test_what_cannot_be_identified_is_not_kept(tmp_path: Path) -> None:
    kept = KeptFolds(tmp_path)
    kept.write("nsl", None, VALUES)
    assert kept.read("nsl", None, (1, 3)) is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_nothing_is_kept_without_a_folder() -> None:
    kept = KeptFolds(None)
    kept.write("nsl", MADE_OF, VALUES)
    assert not kept.keeps and kept.read("nsl", MADE_OF, (1, 3)) is None


@pytest.mark.parametrize("name", ["..", "a/b", "", "x" * 400, "ridge on mean OD"])
def test_names_of_models_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    kept = KeptFolds(tmp_path / "inside")
    kept.write(name, MADE_OF, VALUES)
    assert (tmp_path / "inside") in only_file(tmp_path).parents
    np.testing.assert_array_equal(kept.read(name, MADE_OF, (1, 3)), VALUES)


def test_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    KeptFolds("~/cv").write("nsl", MADE_OF, VALUES)
    assert only_file(tmp_path).is_relative_to(tmp_path / "cv")


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "text", "other shape", "other fold"])
def test_damaged_files_are_named(tmp_path: Path, log: io.StringIO, damage: str) -> None:
    kept = KeptFolds(tmp_path)
    kept.write("nsl", MADE_OF, VALUES)
    file = only_file(tmp_path)
    whole, shape = bytearray(file.read_bytes()), (1, 3)
    if damage == "bit":
        whole[whole.find(VALUES.tobytes()) + 1] ^= 4
    elif damage == "other shape":
        shape = (2, 3)
    elif damage == "other fold":
        KeptFolds(tmp_path / "other").write("nsl", MADE_OF[::-1], VALUES)
        whole = bytearray(next((tmp_path / "other").rglob("*.npz")).read_bytes())
    instead = {"empty": b"", "cut": bytes(whole[: len(whole) // 2]), "text": b"no zip"}
    file.write_bytes(instead.get(damage, bytes(whole)))
    assert kept.read("nsl", MADE_OF, shape) is None
    assert repr(str(file)) in log.getvalue() and "fitting it anew" in log.getvalue()
    kept.write("nsl", MADE_OF, VALUES)
    np.testing.assert_array_equal(kept.read("nsl", MADE_OF, (1, 3)), VALUES)


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    kept = KeptFolds(tmp_path)
    kept.write("nsl", MADE_OF, VALUES)
    file = only_file(tmp_path)
    whole = file.read_bytes()
    for place in np.random.default_rng(0).choice(len(whole), 60, replace=False):
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        file.write_bytes(flipped)
        found = kept.read("nsl", MADE_OF, (1, 3))
        if found is not None:  # bytes that say when the file was made, say
            np.testing.assert_array_equal(found, VALUES)


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptFolds(tmp_path)
    kept.write("nsl", MADE_OF, VALUES)

    def killed(stream: io.BytesIO, **_: object) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", killed)
    with pytest.raises(KeyboardInterrupt):
        kept.write("nsl", MADE_OF, VALUES + 1)
    only_file(tmp_path)
    np.testing.assert_array_equal(kept.read("nsl", MADE_OF, (1, 3)), VALUES)


def test_what_killed_runs_have_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = int(subprocess.check_output([sys.executable, "-Ic", "import os; print(os.getpid())"]))
    left: list[Path] = []
    for process in (gone, os.getpid()):
        with monkeypatch.context() as during, pytest.raises(OSError, match="killed"):
            during.setattr(os, "getpid", lambda process=process: process)
            during.setattr(os, "replace", lambda *_: _raise(OSError("killed")))
            kept = KeptFolds(tmp_path / str(process))
            during.setattr(Path, "unlink", lambda path, **_: left.append(path))
            kept.write("nsl", MADE_OF, VALUES)
    assert all(path.stat().st_size > 0 for path in left) and len(left) == 2
    assert [KeptFolds(path.parents[1]).read("nsl", MADE_OF, (1, 3)) for path in left] == [None, None]
    assert [path.exists() for path in left] == [False, True]  # the other one's run may go on


def _raise(error: Exception) -> None:
    raise error


# What folds of cross-validation are made of


class Scaled:
    """A model with a state."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, sdata: SpatialData, *, train_key: str, key_added: str) -> None:
        write(sdata, train_key, key_added, self.factor)


def write(sdata: SpatialData, train_key: str, key_added: str, factor: Any) -> None:
    table = sdata["table"]
    mean = table.X[table.obs[train_key].to_numpy()].mean(axis=0)
    table.layers[key_added] = factor * np.repeat(np.asarray(mean), table.n_obs, axis=0)


def closure(factor: float) -> Callable[..., None]:
    return lambda sdata, *, train_key, key_added: write(sdata, train_key, key_added, factor)


def default(factor: float) -> Callable[..., None]:
    def model(sdata: SpatialData, *, train_key: str, key_added: str, factor: float = factor) -> None:
        write(sdata, train_key, key_added, factor)

    return model


def of_uns(sdata: SpatialData, *, train_key: str, key_added: str) -> None:
    write(sdata, train_key, key_added, sdata["table"].uns["factor"])


def of_obs(sdata: SpatialData, *, train_key: str, key_added: str) -> None:
    write(sdata, train_key, key_added, sdata["table"].obs["factor"].to_numpy()[:, None])


def of_another_image(sdata: SpatialData, *, train_key: str, key_added: str) -> None:
    write(sdata, train_key, key_added, float(sdata["A_other"].mean()))


def of_shapes(sdata: SpatialData, *, train_key: str, key_added: str) -> None:
    write(sdata, train_key, key_added, sdata["A_spots"]["radius"].mean())


def encoder(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 8, 8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )


RIDGE = partial(stp.tl.fit_ridge, alpha=1.0)
OTHER = {f"{name}_spots": f"{name}_other" for name in "AB"}
OURS = {f"{name}_spots": f"{name}_image" for name in "AB"}


@pytest.fixture(scope="session")
def two(make_sdata: Callable[..., SpatialData]) -> SpatialData:
    """Two small sections with another picture beside each, and a table of features."""
    made, other = (make_sdata(2, n_spots=15, n_genes=3, size=(150, 170), seed=seed) for seed in (0, 1))
    table = made["table"]
    table.obsm["uni"] = np.random.default_rng(0).normal(size=(30, 5))
    table.obs["factor"], table.uns["factor"] = 2.0, 2.0
    beside = AnnData(np.random.default_rng(2).normal(size=(30, 4)), obs=table.obs[["region", "spot_id"]])
    beside = TableModel.parse(beside, region=list(OURS), region_key="region", instance_key="spot_id")
    images = {**made.images, **{f"{name}_other": other[f"{name}_image"] for name in "AB"}}
    return SpatialData(images=images, shapes=dict(made.shapes), tables={"table": table, "tiles": beside})


def copied(two: SpatialData) -> SpatialData:
    tables = {name: table.copy() for name, table in two.tables.items()}
    shapes = {name: each.copy() for name, each in two.shapes.items()}
    return SpatialData(images=dict(two.images), shapes=shapes, tables=tables)


def predictions(sdata: SpatialData, model: Any, folder: Path | None, **options: Any) -> np.ndarray:
    images = {"image_key": OURS} if "image_key" not in options else {}
    quick = {"baselines": False, "n_perms": 0, "n_bootstrap": 0, "table_key": "table"}
    settings: dict[str, Any] = {**quick, **images, **options}
    stp.tl.cross_validate(sdata, {"m": model}, checkpoint_dir=folder, **settings)
    return np.asarray(sdata["table"].layers["m_cv"])


def other_pixels(sdata: SpatialData, key: str = "A_image") -> None:
    pixels = sdata[key].data.compute()
    changed = Image2DModel.parse(
        255 - pixels, dims=("c", "y", "x"), transformations=get_transformation(sdata[key], get_all=True)
    )
    del sdata.images[key]
    sdata[key] = changed


def swapped_channels(sdata: SpatialData) -> None:
    for key in ("A_image", "B_image"):
        image = sdata[key]
        sdata.images.data.pop(key)
        sdata[key] = image.assign_coords(c=["b", "g", "r"])


def moved(sdata: SpatialData) -> None:
    set_transformation(sdata["A_spots"], Translation([7, -5], axes=("x", "y")), "A")


def larger(sdata: SpatialData) -> None:
    sdata["A_spots"]["radius"] *= 1.5


def assign(place: str, name: str, values: Any, table: str = "table") -> Callable[[SpatialData], None]:
    def change(sdata: SpatialData) -> None:
        getattr(sdata[table], place)[name] = values

    return change


def other_expression(sdata: SpatialData) -> None:
    sdata["table"].X = sdata["table"].X * 2


def other_tiles(sdata: SpatialData) -> None:
    sdata["tiles"].X = sdata["tiles"].X[:, ::-1] ** 2


NEW_FEATURES = np.random.default_rng(1).normal(size=(30, 5))
MEAN_OD = partial(RIDGE, features="mean_od")
# A model, what is done to the data, and another model or other arguments: the second run must not take the first one's folds.
CHANGES: dict[str, tuple[Any, Callable[[SpatialData], None] | None, Any, dict[str, Any]]] = {
    "image_key": (MEAN_OD, None, MEAN_OD, {"image_key": OTHER}),
    "image_key of the model": (partial(MEAN_OD, image_key=OURS), None, partial(MEAN_OD, image_key=OTHER), {"image_key": None}),
    "pixels": (MEAN_OD, other_pixels, MEAN_OD, {}),
    "order of channels": (stp.tl.fit_nsl, swapped_channels, stp.tl.fit_nsl, {}),
    "places": (MEAN_OD, moved, MEAN_OD, {}),
    "radii": (MEAN_OD, larger, MEAN_OD, {}),
    "spot_scale": (partial(RIDGE, features="mean_od"), None, partial(RIDGE, features="color_statistics"), {}),
    "obsm": (partial(RIDGE, features="uni"), assign("obsm", "uni", NEW_FEATURES), partial(RIDGE, features="uni"), {}),
    "another table": (partial(RIDGE, features=("tiles", None)), other_tiles, partial(RIDGE, features=("tiles", None)), {}),
    "weights of an encoder": (partial(RIDGE, features=encoder(0), image_size=16), None, partial(RIDGE, features=encoder(1), image_size=16), {}),
    "state of a callable": (Scaled(1.0), None, Scaled(2.0), {}),
    "closure": (closure(1.0), None, closure(2.0), {}),
    "default": (default(1.0), None, default(2.0), {}),
    "another lambda": (lambda sdata, **k: MEAN_OD(sdata, **k), None, lambda sdata, **k: RIDGE(sdata, features="position", **k), {}),
    "expression": (MEAN_OD, other_expression, MEAN_OD, {}),
    "layer": (MEAN_OD, None, MEAN_OD, {"layer": "other"}),
    "genes": (MEAN_OD, None, MEAN_OD, {"genes": ["gene0", "gene2"]}),
    "folds": (MEAN_OD, None, MEAN_OD, {"split": "blocks", "n_folds": 2, "margin": 0}),
    "uns": (of_uns, assign("uns", "factor", 3.0), of_uns, {}),
    "obs": (of_obs, assign("obs", "factor", 3.0), of_obs, {}),
    "an image that only the model knows of": (of_another_image, lambda sdata: other_pixels(sdata, "A_other"), of_another_image, {}),
    "shapes": (of_shapes, larger, of_shapes, {}),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_folds_of_something_else_are_not_taken(two: SpatialData, tmp_path: Path, change: str) -> None:
    model, mutate, another, options = CHANGES[change]
    sdata = copied(two)
    sdata["table"].layers["other"] = sdata["table"].X[:, ::-1] * 1.5
    first = predictions(sdata, model, tmp_path, **({"image_key": None} if "image_key of" in change else {}))
    if mutate is not None:
        mutate(sdata)
    second = predictions(sdata, another, tmp_path, **options)
    expected = predictions(sdata, another, None, **options)
    np.testing.assert_array_equal(second, expected)
    assert not np.allclose(first, second, equal_nan=True)


def same_lambda() -> Callable[..., Any]:
    return lambda sdata, **k: MEAN_OD(sdata, **k) if k["key_added"] in {"a", "b", "cv"} else None


@pytest.mark.parametrize(
    "make",
    [
        lambda: MEAN_OD,
        lambda: partial(RIDGE, features=encoder(3), image_size=16),
        lambda: partial(RIDGE, features=["uni", ("tiles", None), "position"]),
        lambda: Scaled(2.0),
        lambda: closure(2.0),
        same_lambda,
        lambda: of_shapes,
    ],
    ids=["partial", "encoder", "features", "state", "closure", "lambda", "function"],
)
def test_folds_of_the_same_are_taken(
    two: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    first = predictions(copied(two), make(), tmp_path)
    monkeypatch.setattr(_jobs, "_fit_fold", lambda *_: pytest.fail("fitted again"))
    np.testing.assert_array_equal(predictions(copied(two), make(), tmp_path), first)


def test_folds_of_pictures_on_disk(
    two: SpatialData, tmp_path: Path, to_backed: Callable[..., SpatialData], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = predictions(to_backed(copied(two), tmp_path / "a.zarr"), MEAN_OD, tmp_path / "cv")
    with monkeypatch.context() as during:
        during.setattr(_jobs, "_fit_fold", lambda *_: pytest.fail("fitted again"))
        again = sd.read_zarr(tmp_path / "a.zarr")
        np.testing.assert_array_equal(predictions(again, MEAN_OD, tmp_path / "cv"), first)
    _, image = next(zarr.open_group(tmp_path / "a.zarr" / "images" / "A_image").arrays())
    image[:] = 255 - np.asarray(image[:])
    replaced = sd.read_zarr(tmp_path / "a.zarr")
    second = predictions(replaced, MEAN_OD, tmp_path / "cv")
    assert not np.allclose(second, first)
    np.testing.assert_array_equal(second, predictions(replaced, MEAN_OD, None))


def test_what_does_not_matter_changes_nothing(
    two: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = predictions(copied(two), MEAN_OD, tmp_path)
    monkeypatch.setattr(_jobs, "_fit_fold", lambda *_: pytest.fail("fitted again"))
    sdata = copied(two)
    table = sdata["table"]
    table.obs["clusters"], table.uns["note"], table.obsm["uni"] = "a", "mine", NEW_FEATURES
    other_pixels(sdata, "A_other")
    np.testing.assert_array_equal(predictions(sdata, MEAN_OD, tmp_path, n_perms=2), first)


def test_what_cannot_be_identified_is_said_once(two: SpatialData, tmp_path: Path, log: io.StringIO) -> None:
    held = object()
    strange = partial(lambda sdata, what, **k: MEAN_OD(sdata, **k), what=held)
    for _ in range(2):
        predictions(copied(two), strange, tmp_path)
    assert log.getvalue().count("The folds of ['m'] are not kept: the code or the state of the function") == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_killed_run_goes_on(
    two: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: io.StringIO
) -> None:
    whole = predictions(copied(two), MEAN_OD, None)
    original, n_fits = _jobs._fit_fold, 0

    def dies(*arguments: Any) -> np.ndarray:
        nonlocal n_fits
        n_fits += 1
        if n_fits == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(_jobs, "_fit_fold", dies)
    sdata = copied(two)
    with pytest.raises(KeyboardInterrupt):
        predictions(sdata, MEAN_OD, tmp_path)
    assert "m_cv" not in sdata["table"].layers
    np.testing.assert_array_equal(predictions(sdata, MEAN_OD, tmp_path), whole)
    assert n_fits == 3  # the one that was missing
    damaged = next(path for path in tmp_path.rglob("*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:-40])
    np.testing.assert_array_equal(predictions(sdata, MEAN_OD, tmp_path), whole)
    assert n_fits == 4 and repr(str(damaged)) in log.getvalue()
