"""Colour statistics of spots: mean, spread and deciles of optical density over fields of several sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import dask
import numba
import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData
from tqdm.dask import TqdmCallback

from stpredict._data import slots
from stpredict._data.identity import fingerprints
from stpredict._data.slide import Section, read_sections, read_table
from stpredict.pp._footprints import Footprints, chord, footprints, warn_of_tiny_spots, whole_pixels
from stpredict.pp._histogram import optical_density
from stpredict.pp._tiles import Tile, check_dtype, check_range, tiles, to_uint8

# From half a spot to beyond the neighbours, in spot diameters.
DEFAULT_SPOT_SCALES = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
_STATISTICS = ("mean", "sd", *(f"decile{k}" for k in range(1, 10)))


class ColorStatistics(NamedTuple):
    """``values`` ``(n_obs, d)`` float32, the ``names`` of their columns, and the fields and images behind them."""

    values: np.ndarray
    names: list[str]
    made_of: dict[str, Any]


def color_statistics(
    sdata: SpatialData,
    *,
    spot_scale: Sequence[float] = DEFAULT_SPOT_SCALES,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | Sequence[str] | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    inplace: bool = True,
) -> pd.DataFrame | None:
    """Describe the colours around each spot by mean, spread and deciles, over fields of several sizes.

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
        ``spot_scale``, ``names`` of the columns, such as ``"red_mean_0.5"`` and ``"blue_decile9_6"``, and, for each
        section, the image and the spots that were read.

    Raises
    ------
    KeyError, ValueError
        Elements that are missing or ambiguous, or pixels that cannot be read as RGB; the table is then unchanged.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> stp.pp.color_statistics(sdata, spot_scale=(1, 2))
    >>> sdata["table"].obsm["color_statistics"].shape[1]
    66
    """
    _check_spot_scale(spot_scale)
    _, table = read_table(sdata, table_key)
    sections = read_sections(
        sdata, table, image_key=image_key, shapes_key=shapes_key, coordinate_system=coordinate_system
    )
    statistics = _statistics_of_rows(sections, table.n_obs, spot_scale)
    if not inplace:
        return pd.DataFrame(statistics.values, index=table.obs_names, columns=statistics.names)
    slots.write_color_statistics(table, statistics)
    return None


def cached_color_statistics(
    sections: Sequence[Section], table: AnnData, *, spot_scales: Sequence[float]
) -> ColorStatistics:
    """Take the statistics from the table when they were made of the same images, else count; writes nothing."""
    _check_spot_scale(spot_scales)
    made_of = _describe(sections, spot_scales)
    cached = slots.read_color_statistics(table, made_of)
    if cached is not None:
        return ColorStatistics(cached, _names(spot_scales), made_of)
    return _statistics_of_rows(sections, table.n_obs, spot_scales)


def _check_spot_scale(spot_scales: Sequence[float]) -> None:
    values = np.asarray(spot_scales)
    positive = values.ndim == 1 and len(values) and values.dtype.kind in "iuf" and np.isfinite(values).all()
    if not (positive and values[0] > 0 and (np.diff(values) > 0).all()):
        raise ValueError(
            f"`spot_scale` is {spot_scales!r}; expected ascending positive numbers of spot diameters, such as (1, 2)."
        )


def _describe(sections: Sequence[Section], spot_scales: Sequence[float]) -> dict[str, Any]:
    return {"spot_scale": np.asarray(spot_scales, dtype=np.float64), "sections": fingerprints(sections)}


def _names(spot_scales: Sequence[float]) -> list[str]:
    return [
        f"{channel}_{statistic}_{spot_scale:g}"
        for spot_scale in spot_scales
        for channel in ("red", "green", "blue")
        for statistic in _STATISTICS
    ]


def _statistics_of_rows(sections: Sequence[Section], n_obs: int, spot_scales: Sequence[float]) -> ColorStatistics:
    """One row for each row of the table; NaN for rows that belong to none of the sections."""
    for section in sections:
        check_dtype(section)
    values = np.full((n_obs, len(spot_scales) * 3 * len(_STATISTICS)), np.nan, dtype=np.float32)
    for section in sections:
        # One section after another: the counts take 18 kB a spot.
        counts = _count_section(section, spot_scales)
        values[section.rows] = _summarize(counts, optical_density(np.arange(256))).reshape(len(counts), -1)
    return ColorStatistics(values, _names(spot_scales), _describe(sections, spot_scales))


def _count_section(section: Section, spot_scales: Sequence[float]) -> np.ndarray:
    """``(n_spots, n_fields, 3, 256)`` pixels of each intensity in the ring between each field and the one inside it."""
    places = [footprints(section, spot_scale) for spot_scale in spot_scales]
    warn_of_tiny_spots(section, whole_pixels(section.centers, places[0].conic), "spot_scale")
    found = tiles(section, places[-1].half_width, places[-1].half_height)
    jobs = [
        dask.delayed(_count_tile)(
            section.pixels[:, tile.y, tile.x],
            tile,
            [place.of(tile.spots) for place in places],
            section.channels,
            section.image_key,
        )
        for tile in found
    ]
    with TqdmCallback(desc=f"colour statistics of {section.name}", delay=2, leave=False):
        parts = dask.compute(*jobs)
    counts = np.zeros((len(section.rows), len(spot_scales), 3, 256), dtype=np.int32)
    for tile, (of_tile, _) in zip(found, parts, strict=True):
        counts[tile.spots] += of_tile
    check_range(section, max((brightest for _, brightest in parts), default=0))
    return counts


def _count_tile(
    block: np.ndarray, tile: Tile, places: list[Footprints], channels: tuple[int, int, int], image_key: str
) -> tuple[np.ndarray, int]:
    rgb = to_uint8(np.asarray(block), channels, image_key)
    conics = np.array([place.conic for place in places])
    return _count(rgb, tile.x.start, tile.y.start, places[0].centers, conics, places[-1].half_height), int(rgb.max())


@numba.njit(nogil=True, cache=True)
def _count(rgb, x0, y0, centers, conics, half_height):  # type: ignore[no-untyped-def]
    """Intensities of each spot's rings in one tile; ``conics`` from the smallest field to the largest."""
    _, height, width = rgb.shape
    n_fields, n, _ = conics.shape
    counts = np.zeros((n, n_fields, 3, 256), dtype=np.int32)
    for i in range(n):
        first = max(int(np.floor(centers[i, 1] - half_height[i])) - y0, 0)
        last = min(int(np.ceil(centers[i, 1] + half_height[i])) + 1 - y0, height)
        for y in range(first, last):
            inner_start, inner_stop = width, width
            for f in range(n_fields):
                start, stop = chord(y + y0 + 0.5 - centers[i, 1], conics[f, i], centers[i, 0])
                start, stop = max(start - x0, 0), min(stop - x0, width)
                if start >= stop:
                    continue
                if inner_start >= inner_stop:
                    inner_start, inner_stop = stop, stop
                for c in range(3):
                    for x in range(start, inner_start):
                        counts[i, f, c, rgb[c, y, x]] += 1
                    for x in range(inner_stop, stop):
                        counts[i, f, c, rgb[c, y, x]] += 1
                inner_start, inner_stop = start, stop
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
