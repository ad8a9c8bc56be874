"""Where each kind of model lives. A class is imported when a model of its kind is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stpredict.models._base import FittedModel

MODELS = {
    "nsl": "stpredict.models.nsl._model:NSL",
    "m2ost": "stpredict.models.m2ost._model:M2OST",
    "ridge": "stpredict.models._ridge:Ridge",
}


def model_class(kind: str) -> type[FittedModel]:
    """The class of a kind of model; raises a KeyError for kinds that there are not."""
    module, name = MODELS[kind].split(":")
    return getattr(import_module(module), name)
