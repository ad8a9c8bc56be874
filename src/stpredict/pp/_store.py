"""Where patches are kept: in memory while they are few, else in a file that is read in batches."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import shutil
import tempfile
import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock
from numpy.lib import format as npy
from psutil import pid_exists
from scanpy import logging as logg

# Patches of 2,200 spots at three levels of 224 pixels: more would crowd out models and images on a laptop.
MAX_IN_MEMORY = 10**9

_FORMAT, _FORMAT_VERSION = "stpredict patches", 2


class Store(Protocol):
    """An array of uint8, ``shape``, whose items along the first axis are written once each and read in any order."""

    shape: tuple[int, ...]
    closed: bool

    def write(self, position: int, item: np.ndarray) -> None:
        """Write one C-contiguous item; threads may write at once."""
        ...

    def read(self, positions: np.ndarray, out: np.ndarray) -> None:
        """Read items into a C-contiguous array."""
        ...

    def finish(self) -> None:
        """Everything is written."""
        ...

    def close(self) -> None:
        """Give up memory and temporary files."""
        ...


class InMemory:
    """A plain array."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.closed = shape, False
        self._items = np.empty(shape, dtype=np.uint8)

    def __repr__(self) -> str:
        return "in memory"

    def write(self, position: int, item: np.ndarray) -> None:
        """Copy one item in."""
        self._items[position] = item

    def read(self, positions: np.ndarray, out: np.ndarray) -> None:
        """Copy items out."""
        np.take(self._items, positions, axis=0, out=out, mode="clip")  # other modes go through another copy

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Give up the array."""
        self.closed = True
        self._items = np.empty(0, dtype=np.uint8)


class OnDisk:
    """A ``.npy`` file, read and written in pieces.

    A memory map would do the same, but the pages that it has touched count as this process's memory. The file is opened
    for each batch (some 10 µs), so that threads, forked processes and pickled copies need not share a position in it.

    Parameters
    ----------
    path
        The file: a header, and the items from byte ``offset`` on.
    shape
        Items and their shape.
    made_of
        Keep the file once it is complete, and a JSON file beside it that says that it was made of this. `None` removes
        it when it is closed or forgotten.
    owned
        Remove the file if it is never finished.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], offset: int, made_of: str | None, *, owned: bool) -> None:
        self.path, self.shape, self.closed = path, shape, False
        self._offset, self._made_of = offset, made_of
        self._item_bytes = _n_bytes(shape[1:])
        # The kernel lets one thread at a time write to a file, and has the others spin: five times slower.
        self._turn = threading.Lock()
        # Forked workers inherit this object, but not the right to remove the file.
        self._remove = weakref.finalize(self, _remove, path, os.getpid()) if owned else None

    def __repr__(self) -> str:
        return f"in {str(self.path)!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_remove": None, "_turn": None}  # copies in other processes only read

    def write(self, position: int, item: np.ndarray) -> None:
        """Write one item to its place."""
        try:
            with self._turn, self.path.open("r+b") as file:
                file.seek(self._offset + position * self._item_bytes)
                file.write(item.data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_space(self.path.parent, self.shape, "the disk became full") from error
            raise

    def read(self, positions: np.ndarray, out: np.ndarray) -> None:
        """Read items from their places."""
        with self.path.open("rb", buffering=0) as file:
            for item, position in zip(out, positions, strict=True):
                file.seek(self._offset + int(position) * self._item_bytes)
                if file.readinto(item.data) != self._item_bytes:
                    raise OSError(f"The patches in {str(self.path)!r} were cut off while in use. Make them anew.")

    def finish(self) -> None:
        """Give a file that is to be kept its name."""
        if self._made_of is None or self._remove is None:
            return
        path = _kept_path(self.path.parent, self._made_of)
        header = path.with_suffix(".json")
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())  # or else a power cut could leave a whole name on half a file
        header.unlink(missing_ok=True)
        self.path.replace(path)
        self._remove.detach()
        self.path, self._remove = path, None
        unfinished = path.with_suffix(".json.part")
        unfinished.write_text(json.dumps(_header(self._made_of), indent=1))
        unfinished.replace(header)

    def close(self) -> None:
        """Remove the file unless it is to be kept and complete."""
        self.closed = True
        if self._remove is not None:
            self._remove()


def new_store(shape: tuple[int, ...], folder: str | os.PathLike[str] | None, made_of: str | None) -> Store:
    """Make room for items.

    Parameters
    ----------
    shape
        Items and their shape.
    folder
        Where to keep the file. `None` takes memory or, beyond `MAX_IN_MEMORY` bytes, a temporary file.
    made_of
        Identity of what the items are made of. `None` has no file kept.

    Raises
    ------
    OSError
        No space left; the message names the need and the folder.
    """
    if folder is None and _n_bytes(shape) <= MAX_IN_MEMORY:
        return InMemory(shape)
    place = Path(tempfile.gettempdir() if folder is None else folder)
    _make_folder(place)
    free = shutil.disk_usage(place).free
    if _n_bytes(shape) > free:
        raise _no_space(place, shape, f"{free / 1e9:.2f} GB are free")
    _remove_leftovers(place)
    handle, name = tempfile.mkstemp(".part", _owned_prefix(os.getpid()), place)
    path, file = Path(name), os.fdopen(handle, "wb")
    with file:
        npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        offset = file.tell()
        file.truncate(offset + _n_bytes(shape))
    return OnDisk(path, shape, offset, None if folder is None else made_of, owned=True)


def _owned_prefix(process: int) -> str:
    host = "".join(c for c in platform.node() if c.isalnum())
    return f"stpredict-patches-{host}-{process}-"


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs on this computer have left behind: files that carry the number of a process that is gone."""
    for path in folder.glob("stpredict-patches-*.part"):
        number = path.name.rsplit("-", 2)[-2]
        if number.isdigit() and path.name.startswith(_owned_prefix(int(number))) and not pid_exists(int(number)):
            logg.info(f"Removing {str(path)!r}, which a run that was killed has left behind.")
            path.unlink(missing_ok=True)


def kept_store(shape: tuple[int, ...], folder: str | os.PathLike[str], made_of: str) -> OnDisk | None:
    """Open what an earlier run kept in a folder, if it is whole and was made of the same."""
    path = _kept_path(Path(folder), made_of)
    if not path.exists():
        return None
    try:
        header = json.loads(path.with_suffix(".json").read_text())
        with path.open("rb") as file:
            npy.read_magic(file)
            content = npy.read_array_header_1_0(file)
            offset = file.tell()
    except (OSError, ValueError) as error:
        logg.warning(f"The patches in {str(path)!r} are unfinished or damaged ({error}): making them anew.")
        return None
    whole = path.stat().st_size == offset + _n_bytes(shape) and content == (shape, False, np.dtype(np.uint8))
    if header != _header(made_of) or not whole:
        logg.warning(f"The patches in {str(path)!r} are damaged: making them anew.")
        return None
    return OnDisk(path, shape, offset, made_of, owned=False)


def turn_in(folder: str | os.PathLike[str] | None) -> AbstractContextManager[Any]:
    """Have the processes that keep patches in a folder wait for each other, so that one makes them for all."""
    if folder is None:
        return nullcontext()
    _make_folder(Path(folder))
    # From a folder that cannot be written to, patches can still be taken.
    return FileLock(Path(folder) / "patches.lock") if os.access(folder, os.W_OK) else nullcontext()


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"`store` is {str(folder)!r}, which is a file; expected a folder.")
    folder.mkdir(parents=True, exist_ok=True)


def _n_bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _no_space(folder: Path, shape: tuple[int, ...], found: str) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"{shape[0]} patches need {_n_bytes(shape) / 1e9:.2f} GB, but {found} in {str(folder)!r}. Pass a folder on a "
        "larger disk as `store`, or use fewer `levels` or a smaller `image_size`",
    )


def _kept_path(folder: Path, made_of: str) -> Path:
    """Patches of different images or settings have different names, so that one folder can serve them all."""
    return folder / f"patches-{made_of[:16]}.npy"


def _header(made_of: str) -> dict[str, Any]:
    return {"format": _FORMAT, "format_version": _FORMAT_VERSION, "made_of": made_of}


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
