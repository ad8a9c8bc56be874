"""What a table keeps of pixels: taken up again while it is whole and what it was made of is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash
from scanpy import logging as logg

from stpredict._data.identity import identity


def kept_entry(described: Mapping[str, Any], made_of: str | None, content: Any) -> dict[str, Any]:
    """What ``uns`` notes beside something that is kept: how it was read, of what, and a checksum of what it holds.

    Parameters
    ----------
    described
        How it was read.
    made_of
        Identity of images, places and rows; `None` where they have none, so that it is never taken up again.
    content
        Arrays.
    """
    return {"reads": dict(described), "made_of": made_of or "", "checksum": identity(content) or ""}


def find_kept(table: Any, described: Mapping[str, Any], made_of: str | None) -> list[str]:
    """Keys of ``uns`` under which the same was kept before."""
    if made_of is None:
        return []
    wanted = identity(described)
    return [
        key
        for key, entry in table.uns.items()
        if isinstance(entry, Mapping)
        and isinstance(entry.get("reads"), Mapping)
        and str(entry.get("made_of", "")) == made_of
        and identity(_plain(entry["reads"])) == wanted
    ]


def still_valid(entry: Mapping[str, Any], content: Any, key: str) -> bool:
    """Whether what is kept under a key is what was written there."""
    if str(entry.get("checksum", "")) == identity(content):
        return True
    logg.warning(f"What the table keeps under {key!r} is damaged or was changed: it is made anew.")
    return False


def row_fingerprints(values: np.ndarray) -> np.ndarray:
    """``(n,)`` int64 hashes of the rows of an array; the same numbers give the same hash on any machine."""
    rows = np.ascontiguousarray(values)
    if not len(rows):
        return np.empty(0, dtype=np.int64)
    data = rows.reshape(len(rows), -1)
    return np.array([xxhash.xxh3_64_intdigest(row.data) for row in data], dtype=np.uint64).view(np.int64)


def _plain(value: Any) -> Any:
    """As it was before h5ad or zarr stored it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
