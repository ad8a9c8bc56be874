"""A model's folder: ``model.json``, and arrays as safetensors under the name of their contents.

``model.json`` names the file with the arrays, its size and its checksum. A model is replaced by writing the new arrays
beside the old ones and then putting a new ``model.json`` in place of the old one: at every instant there is one whole
model. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from stpredict.models._fields import Arrays, DamagedError, check_integer, check_mapping, get, short

JSON = "model.json"
FORMAT = "stpredict"
FORMAT_VERSION = 2
# Names of 10,000,000 genes and cells fit into this; more is no header.
_MAX_JSON = 2**26
_WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
_OLD_WEIGHTS = "weights.safetensors"  # of format version 1
_PART = ".part"
# Seconds between two tries of what another process is at, and how many there are.
_PAUSE, _TRIES = 0.05, 5
_PATIENCE = 10.0  # seconds that a save waits for another one


class Entry(NamedTuple):
    """What ``model.json`` says of the file with the arrays."""

    file: str
    size: int
    sha256: str


def write(
    path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], *, overwrite: bool
) -> Path:
    """Write a model into a folder, so that at every instant the folder holds the old or the new one.

    Parameters
    ----------
    path
        Folder to make or fill; ``~`` is the home folder, and a link to a folder stays a link.
    header
        What JSON can hold.
    arrays
        By name.
    overwrite
        Replace a model that is there already.

    Raises
    ------
    FileExistsError
        Something is at ``path``, and it is not a model or ``overwrite`` is `False`.
    TypeError
        JSON cannot hold a field of the header.
    """
    given = Path(os.path.expanduser(path))
    folder = Path(os.path.realpath(given))
    # Values that do not lie one after the other, or in another byte order, would be written as other numbers.
    weights = to_bytes({name: np.array(a, a.dtype.newbyteorder("="), order="C") for name, a in arrays.items()})
    digest = hashlib.sha256(weights).hexdigest()
    file = f"weights-{digest[:16]}.safetensors"
    entry = {"file": file, "sha256": digest, "size": len(weights)}
    whole: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, **header, "arrays": entry}
    for name, value in whole.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"`{name}` of the model cannot be saved as JSON: {error}.") from error
    text = json.dumps({**whole, "sha256": _checksum(json.loads(json.dumps(whole)))}, indent=1).encode()
    _refuse_other_things(folder, given, overwrite=overwrite)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _alone(folder):
            try:
                _put(folder / file, weights)
                _put(folder / JSON, text)
            finally:
                _sweep(folder)
    except BaseException:
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # which only works when nothing is in it
        raise
    return given


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], Arrays]]:
    """Open a model's folder: what ``model.json`` has, and arrays, which are read when they are asked for.

    On the way out checksums are compared, so that no flipped bit goes unnoticed. That comes last because an error that
    names the value that cannot be says more.

    Raises
    ------
    FileNotFoundError
        There is no model.
    ValueError
        The folder is damaged, or of another format; a DamagedError of any field, and so are those raised meanwhile.
    """
    folder = Path(os.path.expanduser(path))
    file, entry = JSON, Entry("", 0, "")
    with ExitStack() as stack:
        try:
            for last in (False,) * _TRIES + (True,):
                header = _read_header(folder)
                entry = _entry(header)
                try:
                    weights = stack.enter_context(open(folder / entry.file, "rb"))
                    file = entry.file
                    if (found := os.fstat(weights.fileno()).st_size) != entry.size:
                        problem = f"is {entry.size}, but {file} has {found} bytes: it was cut off or changed"
                        raise DamagedError("arrays.size", problem)
                    arrays = Arrays(stack.enter_context(safe_open(folder / file, framework="numpy")))
                    break
                except FileNotFoundError as error:
                    # A model that is being replaced takes its old arrays away between two reads.
                    if last:
                        raise DamagedError("arrays.file", f"names {entry.file}, which is not there") from error
                    time.sleep(_PAUSE)
            yield header, arrays
            arrays.check_all_read()
            if hashlib.file_digest(weights, "sha256").hexdigest() != entry.sha256:
                raise DamagedError("arrays.sha256", f"is not the checksum of {file}: one of them was changed")
            if header.get("sha256") != _checksum(header):
                raise DamagedError("sha256", f"is not the checksum of the rest of {JSON}, which was changed")
        except DamagedError as error:
            raise _damaged(folder, file if error.in_weights else JSON, error) from error
        except SafetensorError as error:
            raise _damaged(folder, file, DamagedError("arrays", f"cannot be read: {error}")) from error


def _damaged(folder: Path, file: str, error: DamagedError) -> ValueError:
    return ValueError(f"The model at {str(folder)!r} is damaged: in {file}, {error}.")


def _checksum(header: Mapping[str, Any]) -> str:
    """Of everything but itself, however it is laid out."""
    rest = {name: value for name, value in header.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / JSON
    if not path.is_file():
        raise FileNotFoundError(f"There is no saved model at {str(folder)!r}: it lacks {JSON}.")
    if (size := path.stat().st_size) > _MAX_JSON:
        raise ValueError(f"The model at {str(folder)!r} is damaged: {JSON} has {size} bytes, which no header has.")
    try:
        header = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The model at {str(folder)!r} is damaged: {JSON} is not JSON ({error}).") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} was not written by stpredict, or its `format` is damaged; load models made by `model.save`."
        )
    version = header.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"The model at {str(folder)!r} has `format_version` {version!r} in {JSON}; this version of "
            f"stpredict-histology reads {FORMAT_VERSION}. Update the package, or save the model again."
        )
    return header


def _entry(header: Mapping[str, Any]) -> Entry:
    entry = get(header, "arrays")
    check_mapping("arrays", entry)
    file, size, digest = (get(entry, name, within="arrays.") for name in ("file", "size", "sha256"))
    if not isinstance(file, str) or not _WEIGHTS.fullmatch(file):
        raise DamagedError("arrays.file", f"is {short(file)}; expected weights-<16 digits>.safetensors")
    check_integer("arrays.size", size, 0, 2**62)
    return Entry(file, size, digest)


def _refuse_other_things(folder: Path, given: Path, *, overwrite: bool) -> None:
    if not folder.exists():
        return
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else {""}
    if not names or all(_WEIGHTS.fullmatch(name.removesuffix(_PART)) or name == JSON + _PART for name in names):
        return  # empty, or what a first save left that was killed
    ours = all(_is_ours(name) for name in names) and _named_weights(folder) is not None
    if not (ours and overwrite):
        hint = "Pass `overwrite=True` to replace it." if ours else "It is no saved model, so it is left alone."
        raise FileExistsError(f"There is something at {str(given)!r} already. {hint}")


def _is_ours(name: str) -> bool:
    name = name.removesuffix(_PART)
    return name in (JSON, _OLD_WEIGHTS) or _WEIGHTS.fullmatch(name) is not None


def _named_weights(folder: Path) -> str | None:
    """The file that ``model.json`` names; `None` when it is no header of ours."""
    try:
        header = json.loads((folder / JSON).read_bytes().decode("utf-8"))
        if header["format"] != FORMAT:
            return None
        return str(header["arrays"]["file"]) if "arrays" in header else _OLD_WEIGHTS
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None


def _put(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, on any file system."""
    part = path.with_name(path.name + _PART)
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    with suppress(OSError):  # not every system lets a folder be flushed
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove arrays that ``model.json`` does not name, and parts of files, of this save or of one that was killed."""
    for file in list(folder.iterdir()):
        if not _is_ours(file.name) or file.name == JSON:
            continue
        named = _named_weights(folder)
        is_known = named is not None or not (folder / JSON).exists()
        if file.name.endswith(_PART) or (is_known and file.name != named):
            with suppress(OSError):
                file.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time save into a folder, where the system can; no longer than a save should take."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_PAUSE)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(handle)
