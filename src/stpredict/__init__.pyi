from . import datasets, get, models, pl, pp, tl

__all__ = ["datasets", "get", "models", "pl", "pp", "tl"]

__version__: str
