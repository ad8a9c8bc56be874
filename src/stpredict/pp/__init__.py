"""From the pixels under spots to arrays."""

from stpredict.pp._histogram import ColorHistogram, color_histogram
from stpredict.pp._patches import Patches, patches
from stpredict.pp._statistics import color_statistics

__all__ = ["ColorHistogram", "Patches", "color_histogram", "color_statistics", "patches"]
