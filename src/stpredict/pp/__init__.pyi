from ._histogram import ColorHistogram, color_histogram
from ._patches import Patches, patches
from ._statistics import color_statistics

__all__ = ["ColorHistogram", "Patches", "color_histogram", "color_statistics", "patches"]
