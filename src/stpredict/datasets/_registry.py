"""Files of a public data set: a pinned list, a cache folder, and no file that is used before it was verified."""

from __future__ import annotations

import csv
import hashlib
import os
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import pooch
from scanpy import logging as logg
from tqdm.auto import tqdm


@dataclass(frozen=True)
class RemoteFile:
    """A file as it was published: where it lies below the base address, and what its content must be."""

    path: str
    size: int | None
    sha256: str | None
    git_blob: str

    def mismatch(self, file: Path) -> str | None:
        """What is wrong with the content of ``file``, or None if it is the published one."""
        content = file.read_bytes()
        if self.size is not None and len(content) != self.size:
            return f"it has {len(content)} bytes, expected {self.size}"
        if self.sha256:
            kind, expected, got = "SHA-256", self.sha256, hashlib.sha256(content).hexdigest()
        else:  # git names a blob by the SHA-1 of a header and the content
            blob = b"blob %d\0" % len(content) + content
            kind, expected, got = "git blob id", self.git_blob, hashlib.sha1(blob, usedforsecurity=False).hexdigest()
        return None if got == expected else f"its {kind} is {got}, expected {expected}"


def read_registry(name: str) -> list[RemoteFile]:
    """The files listed in ``name``, a table in this package with the columns path, bytes, sha256, git_blob_sha1."""
    text = (resources.files(__package__) / name).read_text(encoding="utf-8")
    rows = csv.reader((line for line in text.splitlines() if not line.startswith("#")), delimiter="\t")
    return [
        RemoteFile(path, int(size) if size else None, sha256 or None, git_blob) for path, size, sha256, git_blob in rows
    ]


def cache_folder(path: str | os.PathLike[str] | None) -> Path:
    """``path``, else the environment variable ``STPREDICT_DATA_DIR``, else the cache folder of the operating system."""
    return Path(path or os.environ.get("STPREDICT_DATA_DIR") or pooch.os_cache("stpredict")).expanduser()


def fetch(file: RemoteFile, *, base_url: str, folder: Path) -> Path:
    """
    Path of the verified file below ``folder``; it is downloaded if it is missing, damaged or replaced.

    A cache that holds all files is never written to. A download is verified before it enters the cache, so that
    neither an interrupt nor a wrong answer leaves anything there.
    """
    target, url = folder / file.path, base_url + file.path
    damage = ""
    if target.exists():
        mismatch = file.mismatch(target)
        if mismatch is None:
            return target
        damage = f" The file at {target} is damaged or was replaced ({mismatch}), so it cannot be used."
        logg.warning(f"{target} is damaged or was replaced ({mismatch}): it is downloaded again.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as part_of:
            part = Path(part_of) / target.name
            with tqdm(desc=target.name, total=file.size or 1, unit="B", unit_scale=True, leave=False) as progress:
                pooch.HTTPDownloader(progressbar=progress, chunk_size=2**16)(url, str(part), None)
            mismatch = file.mismatch(part)
            if mismatch is None:
                part.replace(target)  # atomic: the temporary folder is on the same file system
                return target
    except OSError as error:  # also everything that requests raises
        raise OSError(
            f"Could not download {url} to {target}: {error}.{damage} Check the connection and the permissions, or put "
            "the file there yourself; the argument `path` and the environment variable STPREDICT_DATA_DIR choose the "
            "folder."
        ) from error
    raise ValueError(
        f"{url} did not deliver the expected file: {mismatch}. Nothing was kept.{damage} Try again; if that does not "
        f"help, a proxy may be changing downloads: get the file another way and put it at {target}."
    )
