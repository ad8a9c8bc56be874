from __future__ import annotations

import errno
import gc
import io
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from stpredict.pp import _store
from stpredict.pp._store import InMemory, OnDisk, Store, kept_store, new_store

SHAPE = (7, 2, 5, 5, 3)
MADE_OF = {
    "levels": 2,
    "field": 1.54,
    "sections": {"spots": {"affine": np.eye(3) / 3, "image_shape": np.array([3, 9])}},
}
ITEMS = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def fill(store: Store) -> Store:
    for i in np.random.default_rng(1).permutation(len(ITEMS)):
        store.write(int(i), ITEMS[i])
    store.finish()
    return store


def content(store: Store, positions: Any = range(SHAPE[0])) -> np.ndarray:
    positions = np.array(positions, dtype=np.int64)
    out = np.empty((len(positions), *SHAPE[1:]), dtype=np.uint8)
    store.read(positions, out)
    return out


def make(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(_store, "MAX_IN_MEMORY", 10**9 if kind == "memory" else 0)
    store = new_store(SHAPE, tmp_path / "kept" / "here" if kind == "kept" else None, MADE_OF)
    assert isinstance(store, InMemory if kind == "memory" else OnDisk)
    return fill(store)


@pytest.mark.parametrize("kind", ["memory", "temporary", "kept"])
def test_random_access(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(kind, tmp_path, monkeypatch)
    np.testing.assert_array_equal(content(store), ITEMS)
    np.testing.assert_array_equal(content(store, [6, 0, 0, 3]), ITEMS[[6, 0, 0, 3]])
    assert content(store, []).shape == (0, *SHAPE[1:])
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(content(copy), ITEMS)
    copy.close()
    del copy
    gc.collect()
    np.testing.assert_array_equal(content(store), ITEMS, err_msg="a copy must not remove the file")
    store.close()
    assert store.closed


def test_temporary_files_are_removed(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make("temporary", tmp_path, monkeypatch)
    (path,) = temporary.iterdir()
    assert path.stat().st_mode & 0o077 == 0, "pixels of patients in a folder that all share"
    store.close()
    store.close()
    assert not list(temporary.iterdir())

    store = make("temporary", tmp_path, monkeypatch)
    assert list(temporary.iterdir())
    del store
    gc.collect()
    assert not list(temporary.iterdir())


def test_forked_processes_do_not_remove_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    _store._remove(path, os.getpid() + 1)
    assert path.exists()
    _store._remove(path, os.getpid())
    assert not path.exists()


def test_a_kept_file_is_an_ordinary_npy_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make("kept", tmp_path, monkeypatch)
    store.close()
    (path,) = tmp_path.rglob("*.npy")
    np.testing.assert_array_equal(np.load(path), ITEMS)
    header = json.loads(path.with_suffix(".json").read_text())
    assert header["made_of"]["sections"]["spots"]["affine"][0] == [1 / 3, 0, 0]
    assert len(list(path.parent.iterdir())) == 2


def test_a_kept_file_is_found_again(tmp_path: Path) -> None:
    assert kept_store(SHAPE, tmp_path / "nowhere", MADE_OF) is None
    fill(new_store(SHAPE, tmp_path, MADE_OF)).close()
    again = kept_store(SHAPE, tmp_path, MADE_OF)
    assert again is not None
    np.testing.assert_array_equal(content(again), ITEMS)
    again.close()
    del again
    gc.collect()
    assert kept_store(SHAPE, tmp_path, MADE_OF) is not None


def test_other_settings_are_kept_beside_it(tmp_path: Path) -> None:
    fill(new_store(SHAPE, tmp_path, MADE_OF))
    other = {**MADE_OF, "field": 1.540001}
    assert kept_store(SHAPE, tmp_path, other) is None
    fill(new_store(SHAPE, tmp_path, other))
    assert kept_store(SHAPE, tmp_path, other) is not None
    assert kept_store(SHAPE, tmp_path, MADE_OF) is not None


def test_an_unfinished_file_is_not_kept(tmp_path: Path) -> None:
    store = new_store(SHAPE, tmp_path, MADE_OF)
    store.write(0, ITEMS[0])
    assert kept_store(SHAPE, tmp_path, MADE_OF) is None
    store.close()
    assert not list(tmp_path.glob("patches*"))


@pytest.mark.parametrize(
    "damage", ["shorter", "longer", "no_header", "no_json", "half_json", "other_json", "other_version", "empty"]
)
def test_a_damaged_file_is_not_used_but_replaced(damage: str, tmp_path: Path, log: io.StringIO) -> None:
    fill(new_store(SHAPE, tmp_path, MADE_OF))
    (path,) = tmp_path.glob("*.npy")
    header, raw = path.with_suffix(".json"), path.read_bytes()
    text = header.read_text()
    if damage == "shorter":
        path.write_bytes(raw[:-1])
    elif damage == "longer":
        path.write_bytes(raw + b"x")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no_header":
        path.write_bytes(b"\0" * len(raw))
    elif damage == "no_json":
        header.unlink()
    elif damage == "half_json":
        header.write_text(text[: len(text) // 2])
    elif damage == "other_json":
        header.write_text(text.replace("1.54", "2.54"))
    else:
        header.write_text(text.replace('"format_version": 1', '"format_version": 2'))
    assert kept_store(SHAPE, tmp_path, MADE_OF) is None
    assert "making them anew" in log.getvalue()
    fill(new_store(SHAPE, tmp_path, MADE_OF))
    again = kept_store(SHAPE, tmp_path, MADE_OF)
    assert again is not None
    np.testing.assert_array_equal(content(again), ITEMS)
    assert len(list(tmp_path.glob("patches*"))) == 2


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    shape = (5000, 3, 224, 224, 3)
    with pytest.raises(
        OSError, match=r"5000 patches need 2\.26 GB, but 1\.00 GB are free in .*kept.*`store`"
    ) as caught:
        new_store(shape, tmp_path / "kept", MADE_OF)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="temporary"):
        new_store(shape, None, MADE_OF)
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full exists on Linux only")
def test_disk_full_while_writing(tmp_path: Path) -> None:
    store = OnDisk(Path("/dev/full"), SHAPE, 0, MADE_OF, owned=False)
    with pytest.raises(OSError, match="the disk became full in '/dev'"):
        store.write(0, ITEMS[0])


def test_the_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        new_store(SHAPE, tmp_path / "file", MADE_OF)


def test_file_cut_off_while_in_use(tmp_path: Path) -> None:
    store = fill(new_store(SHAPE, tmp_path, MADE_OF))
    (path,) = tmp_path.glob("*.npy")
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(OSError, match="cut off"):
        content(store)


def test_reading_a_file_does_not_fill_memory(tmp_path: Path) -> None:
    shape = (400, 3, 224, 224, 3)  # 181 MB
    store = new_store(shape, tmp_path, MADE_OF)
    item = np.random.default_rng(0).integers(0, 256, shape[1:], dtype=np.uint8)
    out = np.empty((16, *shape[1:]), dtype=np.uint8)
    process = psutil.Process()
    before = process.memory_info().rss
    for i in range(400):
        store.write(i, item)
    store.finish()
    for i in range(0, 400, 16):
        store.read(np.arange(i, i + 16), out)
    assert (out == item).all()
    assert process.memory_info().rss - before < 40e6
