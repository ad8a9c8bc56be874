"""From the pixels under spots to arrays."""

from stpredict.pp._color_histogram import ColorHistogram, color_histogram
from stpredict.pp._color_statistics import color_statistics
from stpredict.pp._patches import Patches, patches

__all__ = ["ColorHistogram", "Patches", "color_histogram", "color_statistics", "patches"]
