from ._base import FittedModel
from ._io import load
from ._ridge import Ridge
from .m2ost._model import M2OST
from .m2ost._module import M2OSTModule
from .nsl._model import NSL

__all__ = ["M2OST", "NSL", "FittedModel", "M2OSTModule", "Ridge", "load"]
