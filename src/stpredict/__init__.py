"""Predict spatial gene expression from H&E images."""

from importlib.metadata import version

from stpredict import datasets, models, pl, pp, tl

__all__ = ["datasets", "models", "pl", "pp", "tl"]

__version__ = version("stpredict-histology")
