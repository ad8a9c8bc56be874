"""Color statistics of spots: mean, spread and deciles of optical density over fields of several sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numba
import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stpredict._data.elements import Elements
from stpredict._data.slide import Section, Slide, open_slide
from stpredict._data.slots import Slots
from stpredict.pp._footprints import Footprints, chord
from stpredict.pp._histogram import optical_density
from stpredict.pp._kept import kept_entry, still_valid
from stpredict.pp._pass import read_pixels
from stpredict.pp._tiles import Tile

# From half a spot to beyond the neighbors, in spot diameters.
DEFAULT_SPOT_SCALES = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
_STATISTICS = ("mean", "sd", *(f"decile{k}" for k in range(1, 10)))


class ColorStatistics(NamedTuple):
    """``values`` ``(n_obs, d)`` float32, and the ``names`` of their columns."""

    values: np.ndarray
    names: list[str]


@dataclass(frozen=True)
class StatisticsReads:
    """Reads statistics of fields ``spot_scale`` spot diameters wide, ascending."""

    kind: ClassVar[str] = "statistics"

    spot_scale: tuple[float, ...] = DEFAULT_SPOT_SCALES

    def __post_init__(self) -> None:
        values = np.atleast_1d(np.asarray(self.spot_scale))
        positive = values.ndim == 1 and len(values) and values.dtype.kind in "iuf" and np.isfinite(values).all()
        if not (positive and values[0] > 0 and (np.diff(values) > 0).all()):
            raise ValueError(
                f"`spot_scale` is {self.spot_scale!r}; expected ascending positive numbers of spot diameters, such as (1, 2)."
            )
        object.__setattr__(self, "spot_scale", tuple(float(value) for value in values))

    def describe(self) -> dict[str, Any]:
        """What a model keeps of it."""
        return {"kind": self.kind, "spot_scales": list(self.spot_scale)}

    @property
    def spot_scales(self) -> tuple[float, ...]:
        """Diameters of the fields in spot diameters."""
        return self.spot_scale

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return [
            f"{channel}_{statistic}_{scale:g}"
            for scale in self.spot_scale
            for channel in ("red", "green", "blue")
            for statistic in _STATISTICS
        ]

    def count(self, rgb: np.ndarray, x0: int, y0: int, places: Sequence[Footprints]) -> np.ndarray:
        """Count the intensities of each ring in one tile."""
        conics = np.array([place.conic for place in places])
        return np.asarray(_count(rgb, x0, y0, places[0].centers, conics, places[-1].half_height))

    def of_section(self, section: Section, found: Sequence[Tile], parts: Sequence[np.ndarray]) -> np.ndarray:
        """Put the tiles of a section together."""
        counts = np.zeros((len(section.rows), len(self.spot_scale), 3, 256), dtype=np.int32)
        for tile, part in zip(found, parts, strict=True):
            counts[tile.spots] += part
        summary = _summarize(counts, optical_density(np.arange(256)))
        return np.asarray(summary.reshape(len(counts), -1), dtype=np.float32)

    def gather(self, sections: Sequence[Section], of_sections: Sequence[np.ndarray], n_obs: int) -> ColorStatistics:
        """One row for each row of the table; NaN for rows that belong to none of the sections."""
        values = np.full((n_obs, len(self.names)), np.nan, dtype=np.float32)
        for section, of_section in zip(sections, of_sections, strict=True):
            values[section.rows] = of_section
        return ColorStatistics(values, self.names)

    def slots(self, key: str, statistics: ColorStatistics, made_of: str | None) -> Slots:
        """What :func:`color_statistics` writes."""
        entry = {"names": statistics.names, **kept_entry(self.describe(), made_of, [statistics.values])}
        return Slots(key, entry=entry, obsm={key: statistics.values})

    def stored(self, slide: Slide, key: str) -> ColorStatistics | None:
        """What a table keeps under a key, if it is whole."""
        if key not in slide.table.obsm:
            return None
        values = np.asarray(slide.table.obsm[key])
        return ColorStatistics(values, self.names) if still_valid(slide.table.uns[key], [values], key) else None


def color_statistics(
    sdata: SpatialData,
    *,
    spot_scale: Sequence[float] = DEFAULT_SPOT_SCALES,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | Sequence[str] | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    key_added: str = "color_statistics",
    inplace: bool = True,
) -> pd.DataFrame | None:
    """Describe the colors around each spot by mean, spread and deciles, over fields of several sizes.

    For each of red, green and blue, of the optical densities −ln((I + 1) / 256) of all 8-bit pixels in a round field:
    33 numbers for each field, from half a spot to what surrounds it. They are the features of the baseline that a model
    which calls itself better has to beat (:func:`stpredict.tl.fit_ridge`).

    Pixels are read as by :func:`color_histogram`: each chunk at most once, any dtype by the same rule, bit-identical
    results on any scheduler.

    Parameters
    ----------
    sdata
        Images, spots and a table that annotates the spots.
    spot_scale
        Diameters of the fields in spot diameters, ascending.
    image_key, shapes_key, table_key, coordinate_system
        Which elements to use, as in :func:`color_histogram`. `None` finds them.
    key_added
        What the results are named after.
    inplace
        Write to the table, or return the statistics.

    Returns
    -------
    `None`, or with ``inplace=False`` a data frame of all rows of the table with named columns. Written to the table:

    ``obsm["color_statistics"]``
        ``(n_obs, 33 * len(spot_scale))`` float32: field by field, and in each red, green and blue, the mean, the standard
        deviation and nine deciles (the smallest optical density that a tenth, two tenths, … of the pixels do not
        exceed). NaN where a field has no pixel on the image.
    ``uns["color_statistics"]``
        ``names`` of the columns, such as ``"red_mean_0.5"`` and ``"blue_decile9_6"``, and what they were made of. A model
        that reads the same statistics takes them from here while images, places and rows are the same.

    Raises
    ------
    KeyError, TypeError, ValueError
        Elements that are missing or ambiguous, pixels that cannot be read as RGB, or a key that is taken; the table is then
        unchanged.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> stp.pp.color_statistics(sdata, spot_scale=(1, 2))
    >>> sdata["table"].obsm["color_statistics"].shape[1]
    66
    """
    reads = StatisticsReads(spot_scale)  # type: ignore[arg-type]
    elements = Elements(
        image_key=image_key, shapes_key=shapes_key, table_key=table_key, coordinate_system=coordinate_system
    )
    slide = open_slide(sdata, elements, images=True)
    if inplace:
        Slots(key_added, obsm={key_added: None}).check(slide.table)
    statistics: ColorStatistics = read_pixels(slide.sections, [reads], slide.n_obs)[reads]
    if not inplace:
        return pd.DataFrame(statistics.values, index=slide.table.obs_names, columns=statistics.names)
    reads.slots(key_added, statistics, slide.identity()).write(slide.table)
    return None


@numba.njit(nogil=True, cache=True)
def _count(rgb, x0, y0, centers, conics, half_height):  # type: ignore[no-untyped-def]
    """Intensities of each spot's rings in one tile; ``conics`` from the smallest field to the largest."""
    _, height, width = rgb.shape
    n_fields, n, _ = conics.shape
    counts = np.zeros((n, n_fields, 3, 256), dtype=np.int32)
    # Pixels side by side are alike. Counted by turns in two places, one does not wait for the other: that takes half the time.
    turns = np.empty((n_fields, 2, 3, 256), dtype=np.int32)
    for i in range(n):
        turns[:] = 0
        first = max(int(np.floor(centers[i, 1] - half_height[i])) - y0, 0)
        last = min(int(np.ceil(centers[i, 1] + half_height[i])) + 1 - y0, height)
        for y in range(first, last):
            red, green, blue = rgb[0, y], rgb[1, y], rgb[2, y]
            inner_start, inner_stop = width, width
            for f in range(n_fields):
                start, stop = chord(y + y0 + 0.5 - centers[i, 1], conics[f, i], centers[i, 0])
                start, stop = max(start - x0, 0), min(stop - x0, width)
                if start >= stop:
                    continue
                if inner_start >= inner_stop:
                    inner_start, inner_stop = stop, stop
                one, other = turns[f, 0], turns[f, 1]
                for left, right in ((start, inner_start), (inner_stop, stop)):
                    even = left + (right - left) // 2 * 2
                    for x in range(left, even, 2):
                        one[0, red[x]] += 1
                        one[1, green[x]] += 1
                        one[2, blue[x]] += 1
                        other[0, red[x + 1]] += 1
                        other[1, green[x + 1]] += 1
                        other[2, blue[x + 1]] += 1
                    if even < right:
                        one[0, red[even]] += 1
                        one[1, green[even]] += 1
                        one[2, blue[even]] += 1
                inner_start, inner_stop = start, stop
        counts[i] = turns[:, 0] + turns[:, 1]
    return counts


@numba.njit(nogil=True, cache=True)
def _summarize(rings, od):  # type: ignore[no-untyped-def]
    """``(n, n_fields, 3, 11)`` statistics of the nested fields; ``od`` falls as the intensity rises."""
    n, n_fields, _, n_levels = rings.shape
    found = np.full((n, n_fields, 3, 11), np.nan)
    for i in range(n):
        for c in range(3):
            count = np.zeros(n_levels, dtype=np.int64)
            for f in range(n_fields):
                count += rings[i, f, c]
                total = count.sum()
                if total == 0:
                    continue
                darkest = od[np.flatnonzero(count)[0]]
                mean = (count * (od - darkest)).sum() / total  # exact where all pixels are the same
                found[i, f, c, 0] = darkest + mean
                found[i, f, c, 1] = np.sqrt((count * (od - darkest - mean) ** 2).sum() / total)
                below, decile = 0, 1
                for level in range(n_levels - 1, -1, -1):
                    below += count[level]
                    while decile < 10 and 10 * below >= decile * total:
                        found[i, f, c, 1 + decile] = od[level]
                        decile += 1
    return found
