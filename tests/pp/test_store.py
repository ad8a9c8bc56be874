from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from stpredict.pp import _store
from stpredict.pp._store import InMemory, OnDisk, Store, kept_store, new_store

SHAPE = (7, 2, 5, 5, 3)
MADE_OF = "0123456789abcdef" * 2
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
    assert header["made_of"] == MADE_OF
    assert path.name == f"patches-{MADE_OF[:16]}.npy"
    assert len(list(path.parent.iterdir())) == 2


def test_a_kept_file_is_found_again(tmp_path: Path) -> None:
    assert kept_store(SHAPE, tmp_path / "nowhere", MADE_OF) is None
    fill(new_store(SHAPE, tmp_path, MADE_OF)).close()
    again = kept_store(SHAPE, tmp_path, MADE_OF)
    assert again is not None
    np.testing.assert_array_equal(content(again), ITEMS)
    again.close()
    del again
    assert kept_store(SHAPE, tmp_path, MADE_OF) is not None


def test_other_settings_are_kept_beside_it(tmp_path: Path) -> None:
    fill(new_store(SHAPE, tmp_path, MADE_OF))
    other = MADE_OF[::-1]
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
    "damage",
    [
        *("shorter", "longer", "empty", "no_header", "other_shape"),
        *("no_json", "half_json", "a_list", "other_json", "other_version"),
    ],
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
        header.write_text(text.replace(MADE_OF, MADE_OF[:16] + MADE_OF[:16][::-1]))
    elif damage == "other_shape":
        path.write_bytes(raw.replace(b"(7, 2, 5, 5, 3)", b"(7, 2, 5, 3, 5)"))
    elif damage == "a_list":
        header.write_text("[]")
    else:
        header.write_text(text.replace('"format_version": 2', '"format_version": 3'))
    assert kept_store(SHAPE, tmp_path, MADE_OF) is None
    assert f"'{path}' are" in log.getvalue()
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
    shape = (200, 3, 224, 224, 3)  # 90 MB
    store = new_store(shape, tmp_path, MADE_OF)
    item = np.random.default_rng(0).integers(0, 256, shape[1:], dtype=np.uint8)
    out = np.empty((16, *shape[1:]), dtype=np.uint8)
    process = psutil.Process()
    before = process.memory_info().rss
    for i in range(0, 200, 4):
        store.write(i, item)
    store.finish()
    for i in range(0, 200, 64):
        store.read(np.arange(i, min(i + 64, 200), 4), out[: min(16, (200 - i + 3) // 4)])
    assert (out[0] == item).all()
    assert process.memory_info().rss - before < 20e6


# What killed runs leave behind


@pytest.mark.parametrize("kept", [False, True], ids=["temporary", "kept"])
def test_leftovers_of_killed_runs_are_removed(
    kept: bool, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: io.StringIO
) -> None:
    monkeypatch.setattr(_store, "MAX_IN_MEMORY", 0)
    folder = tmp_path if kept else temporary
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        with subprocess.Popen([sys.executable, "-c", ""]) as killed:
            killed.wait()
        mine = new_store(SHAPE, folder if kept else None, MADE_OF)
        assert isinstance(mine, OnDisk)

        def part(process: int | str, host: str | None = None) -> Path:
            name = mine.path.name.replace(str(os.getpid()), str(process))
            path = folder / (name if host is None else name.replace(_host(), host))
            path.write_bytes(b"pixels")
            return path

        gone = part(killed.pid)
        others = [part(running.pid), part(killed.pid, "elsewhere"), part("x"), folder / "stpredict-patches-mine.part"]
        others[-1].touch()
        fill(new_store(SHAPE, folder if kept else None, MADE_OF)).close()
        assert not gone.exists()
        assert all(path.exists() for path in others)
        assert log.getvalue().count("Removing") == 1
        assert f"Removing '{gone}', which a run that was killed has left behind" in log.getvalue()
        np.testing.assert_array_equal(content(fill(mine)), ITEMS, err_msg="and this run's own file is there")
        running.communicate(b"\n")


def _host() -> str:
    return _store._owned_prefix(1).split("-")[2]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_run_leaves_one_part_that_the_next_removes(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        store = new_store(SHAPE, tmp_path, MADE_OF)
        store.write(0, ITEMS[0])
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = tmp_path.glob("*.part")
    assert left.stat().st_size > ITEMS.nbytes
    assert kept_store(SHAPE, tmp_path, MADE_OF) is None
    fill(new_store(SHAPE, tmp_path, MADE_OF)).close()
    assert not left.exists()
    assert len(list(tmp_path.glob("patches*"))) == 2


def test_what_cannot_be_identified_is_not_kept(tmp_path: Path) -> None:
    store = fill(new_store(SHAPE, tmp_path, None))
    np.testing.assert_array_equal(content(store), ITEMS)
    store.close()
    assert not list(tmp_path.glob("*patches*"))
