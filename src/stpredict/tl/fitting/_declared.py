"""What fit functions are going to read, known before they are called: shared reading and margins need it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from spatialdata import SpatialData

from stpredict._data.slide import Slide
from stpredict.pp._reads import Reads

Fit = TypeVar("Fit", bound=Callable[..., Any])

_DECLARED: dict[Callable[..., Any], Callable[..., Reads]] = {}


def reads_by(declare: Callable[..., Reads]) -> Callable[[Fit], Fit]:
    """Say what a fit function reads: ``declare`` is given the slide's SpatialData and table, and the function's arguments."""

    def register(fit: Fit) -> Fit:
        _DECLARED[fit] = declare
        return fit

    return register


def declared_reads(fit: Callable[..., Any], sdata: SpatialData, slide: Slide) -> Reads | None:
    """What a fit function, or a partial of one, reads; `None` for functions that do not say so."""
    settings: dict[str, Any] = {}
    while isinstance(fit, partial):
        settings = {**fit.keywords, **settings}
        fit = fit.func
    return _DECLARED[fit](sdata, slide.table, **settings) if fit in _DECLARED else None
