"""Fitted models (plain torch: they know no SpatialData)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stpredict.models._io import load
    from stpredict.models._ridge import Ridge
    from stpredict.models.m2ost._model import M2OST
    from stpredict.models.m2ost._module import M2OSTModule
    from stpredict.models.nsl._model import NSL

__all__ = ["M2OST", "NSL", "M2OST", "Ridge", "load"]

# torch is imported when a model is first asked for, not with the package.
_HOMES = {
    "M2OST": "stpredict.models.m2ost._model",
    "M2OSTModule": "stpredict.models.m2ost._module",
    "NSL": "stpredict.models.nsl._model",
    "Ridge": "stpredict.models._ridge",
    "load": "stpredict.models._io",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
