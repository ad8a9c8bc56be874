"""The scale of a section in pictures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar  # type: ignore[import-untyped]

from stpredict._data.slide import Section


def micrometers_per_pixel(section: Section, table: AnnData) -> float | None:
    """Micrometers per pixel of the section's image, where a data set has left them in ``uns[...]["mpp"]``."""
    for entry in table.uns.values():
        known = entry.get("mpp") if isinstance(entry, Mapping) else None
        if isinstance(known, Mapping) and section.name in known:
            return float(known[section.name])
    return None


def draw_scale_bar(ax: Axes, micrometers_per_unit: float) -> None:
    """Draw a bar of a round length, about a fifth of the panel's width, in its lower left corner.

    Parameters
    ----------
    ax
        Its limits are final.
    micrometers_per_unit
        Of the data coordinates.
    """
    x0, x1 = ax.get_xlim()
    longest = 0.3 * abs(x1 - x0) * micrometers_per_unit
    power = 10.0 ** np.floor(np.log10(longest))
    length = power * max(digit for digit in (1, 2, 5) if digit * power <= longest)
    bar = AnchoredSizeBar(
        ax.transData,
        length / micrometers_per_unit,
        f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm",
        "lower left",
        pad=0.4,
        borderpad=0.5,
        sep=3,
        size_vertical=0.005 * abs(x1 - x0),
        label_top=True,
        fontproperties=FontProperties(size="x-small"),
    )
    bar.patch.set(facecolor="white", edgecolor="none", alpha=0.7)  # for dark tissue
    ax.add_artist(bar)
