"""Predict spatial gene expression from H&E images."""

from importlib.metadata import version

import lazy_loader

from stpredict._distribution import warn_about_namesakes

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = version("stpredict-histology")

warn_about_namesakes()
