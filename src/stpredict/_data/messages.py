"""How messages name things."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

_SHOWN = 12


def listed(names: Iterable[Any]) -> str:
    """Names for a message, a dozen at most."""
    shown = [f"{name!r}" if isinstance(name, str) else str(name) for name in names]
    if len(shown) > _SHOWN:
        shown = [*shown[:_SHOWN], f"... ({len(shown)} in all)"]
    return "[" + ", ".join(shown) + "]"


def user_stacklevel() -> int:
    """Stack level, for :func:`warnings.warn`, of the first caller outside this package."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("stpredict", "contextlib"):
        frame, level = frame.f_back, level + 1
    return level
