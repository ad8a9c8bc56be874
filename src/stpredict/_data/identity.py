"""What identifies the images and spots that something was made of, so that it is made anew when they changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from stpredict._data.slide import Section


def fingerprints(sections: Sequence[Section]) -> dict[str, dict[str, Any]]:
    """For each section by name its image, without reading it, and a digest of its spots."""
    return {section.name: {**section.fingerprint, "spots": _digest(section)} for section in sections}


def _digest(section: Section) -> str:
    """What identifies the spots: rows of the table, centres and sizes."""
    digest = hashlib.sha256()
    for values in (section.rows, section.centers, section.radii):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
