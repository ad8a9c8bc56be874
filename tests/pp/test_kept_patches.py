"""Patches in a folder: taken while what they were made of is the same, else made anew."""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
from spatialdata import SpatialData
from spatialdata.transformations import Translation, set_transformation

from stpredict.pp import _patches, _store
from stpredict.pp._patches import Patches, patches

MakeSData = Callable[..., SpatialData]
SMALL: dict[str, Any] = {"size": (150, 190), "n_spots": 12, "n_genes": 3}


def everything(made: Patches) -> np.ndarray:
    return np.array(made[:])


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many patches each extraction cut."""
    drawn = []
    draw = _patches._draw

    def count(target: Any, job: Any, *rest: Any) -> None:
        drawn.append(len(job.positions))
        draw(target, job, *rest)

    monkeypatch.setattr(_patches, "_draw", count)
    return drawn


def test_kept_patches_are_taken_again(
    make_sdata: MakeSData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: io.StringIO
) -> None:
    drawn = counted(monkeypatch)
    with patches(make_sdata(2, **SMALL), image_size=16, store=tmp_path) as first:
        expected = everything(first)
    assert drawn == [12, 12]
    drawn.clear()
    with patches(make_sdata(2, **SMALL), image_size=16, store=tmp_path) as second:
        np.testing.assert_array_equal(everything(second), expected)
        np.testing.assert_array_equal(second.rows, first.rows)
        np.testing.assert_array_equal(second.coverage, first.coverage)
    assert drawn == []
    assert f"Taking the patches of 24 spots in '{tmp_path}" in log.getvalue()


def test_kept_patches_of_images_on_disk_are_taken_without_reading_them(
    on_disk: Path, chunk_reads: Counter[str], tmp_path: Path
) -> None:
    expected = everything(patches(sd.read_zarr(on_disk), image_size=16, store=tmp_path))
    assert chunk_reads
    chunk_reads.clear()
    np.testing.assert_array_equal(everything(patches(sd.read_zarr(on_disk), image_size=16, store=tmp_path)), expected)
    assert not chunk_reads


def test_those_who_keep_patches_at_once_make_them_once(
    make_sdata: MakeSData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = counted(monkeypatch)
    sdatas = [make_sdata(1, **SMALL) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda sdata: patches(sdata, image_size=16, store=tmp_path), sdatas))
    assert drawn == [12]
    for other in made[1:]:
        np.testing.assert_array_equal(everything(other), everything(made[0]))


def change_scale(sdata: SpatialData, options: dict[str, Any]) -> None:
    options["spot_scale"] = 1.6


def change_levels(sdata: SpatialData, options: dict[str, Any]) -> None:
    options["levels"] = 3


def change_size(sdata: SpatialData, options: dict[str, Any]) -> None:
    options["image_size"] = 17


def change_radius(sdata: SpatialData, options: dict[str, Any]) -> None:
    sdata.shapes["A_spots"]["radius"] *= 1.001


def move(sdata: SpatialData, options: dict[str, Any]) -> None:
    sdata.shapes["A_spots"]["geometry"] = sdata.shapes["A_spots"].translate(0.3, 0)


def move_image(sdata: SpatialData, options: dict[str, Any]) -> None:
    set_transformation(sdata["A_image"], Translation([0.3, 0], axes=("x", "y")), "A")


def reorder(sdata: SpatialData, options: dict[str, Any]) -> None:
    table = sdata["table"][np.roll(np.arange(12), 5)].copy()
    del sdata.tables["table"]
    sdata["table"] = table


def replace_image(sdata: SpatialData, options: dict[str, Any]) -> None:
    # Under one spot that is neither the first nor the last.
    pixels = sdata["A_image"].data.compute().copy()
    x, y = sdata["A_spots"].geometry.iloc[5].coords[0]
    pixels[:, int(y), int(x)] ^= 1
    sdata.images["A_image"] = sdata["A_image"].copy(data=da.from_array(pixels, chunks=(3, 128, 128)))


def rename_channels(sdata: SpatialData, options: dict[str, Any]) -> None:
    sdata.images["A_image"] = sdata["A_image"].assign_coords(c=["b", "g", "r"])


def choose_another_image(sdata: SpatialData, options: dict[str, Any]) -> None:
    sdata["other"] = sdata["A_image"].copy(data=255 - sdata["A_image"].data)
    options["image_key"] = "other"


CHANGES = [
    *(change_scale, change_levels, change_size, change_radius, move, move_image, reorder),
    *(replace_image, rename_channels, choose_another_image),
]


def test_patches_of_anything_else_are_not_taken(
    make_sdata: MakeSData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = counted(monkeypatch)
    options: dict[str, Any] = {"image_size": 16, "levels": 2, "spot_scale": 1.5}
    patches(make_sdata(**SMALL), store=tmp_path, **options)
    for n_kept, change in enumerate(CHANGES, start=1):
        sdata, changed = make_sdata(**SMALL), dict(options)
        change(sdata, changed)
        drawn.clear()
        made = patches(sdata, store=tmp_path, **changed)
        assert drawn == [12], change.__name__
        np.testing.assert_array_equal(everything(made), everything(patches(sdata, **changed)))
        assert len(list(tmp_path.glob("*.npy"))) == n_kept + 1, "what was there serves others"
    drawn.clear()
    patches(make_sdata(**SMALL), store=tmp_path, **options)
    assert drawn == []


def test_patches_of_images_that_cannot_be_identified_are_not_kept(
    make_sdata: MakeSData, tmp_path: Path, log: io.StringIO
) -> None:
    sdata = make_sdata(**SMALL)
    image = sdata["A_image"]
    expected = everything(patches(sdata, image_size=16))
    pixels = image.data.compute()
    lazy = da.from_delayed(dask.delayed(lambda: pixels)(), pixels.shape, dtype=np.uint8)
    sdata.images["A_image"] = image.copy(data=lazy)
    made = patches(sdata, image_size=16, store=tmp_path)
    np.testing.assert_array_equal(everything(made), expected)
    assert log.getvalue().count("What is made of the image 'A_image' cannot be kept for another call") == 1
    made.close()
    assert {file.name for file in tmp_path.iterdir()} <= {"patches.lock"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("keep", [True, False])
def test_failures_leave_nothing_behind(
    keep: bool, error: type[BaseException], make_sdata: MakeSData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(_store, "MAX_IN_MEMORY", 0)
    cut_patch, done = _patches.cut_patch, []

    def fail(*args: Any) -> np.ndarray:
        done.append(1)
        if len(done) > 10:
            raise error
        return cut_patch(*args)

    monkeypatch.setattr(_patches, "cut_patch", fail)
    with pytest.raises(error):
        patches(make_sdata(**SMALL), image_size=16, store=tmp_path if keep else None)
    assert {file.name for file in tmp_path.iterdir()} <= {"patches.lock"}


def test_forgotten_patches_leave_no_file(
    make_sdata: MakeSData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(_store, "MAX_IN_MEMORY", 0)
    made = patches(make_sdata(**SMALL), image_size=16)
    assert len(list(tmp_path.iterdir())) == 1
    del made
    assert not list(tmp_path.iterdir())
