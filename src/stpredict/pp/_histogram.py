"""Colour histograms of spots: all that Neural Stain Learning sees of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import dask
import numba
import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from spatialdata import SpatialData
from tqdm.dask import TqdmCallback

from stpredict._data import slots
from stpredict._data.slide import Section, read_sections, read_table
from stpredict.pp._footprints import Footprints, chord, footprints, warn_of_tiny_spots, whole_pixels
from stpredict.pp._tiles import Tile, check_dtype, check_range, tiles, to_uint8

# Diameter of the field in spot diameters; docs/explanation/field.md has the cross-validation that chose it.
DEFAULT_SPOT_SCALE = 2.0
DEFAULT_BITS = 5

# Optical densities are summed as integers of this unit: the sum is then exact, whatever the order of the pixels.
_OD_UNIT = 2.0**-32


def optical_density(intensity: np.ndarray) -> np.ndarray:
    """Optical density, −ln((I + 1) / 256), of 8-bit intensities."""
    return -np.log((np.asarray(intensity, dtype=np.float64) + 1) / 256)


def codebook_od(codebook: np.ndarray, bits: int) -> np.ndarray:
    """Optical densities of the colours of a codebook, ``(n_bins, 3)``, at the centres of its bins."""
    return optical_density(codebook.astype(np.float64) + (2 ** (8 - bits) - 1) / 2)


@dataclass(frozen=True)
class ColorHistogram:
    """Colours under spots.

    Attributes
    ----------
    counts
        ``(n_spots, n_bins)`` CSR, pixels of each colour, int32.
    codebook
        ``(n_bins, 3)`` lowest 8-bit intensities of each bin (red, green, blue).
    mean_od
        ``(n_spots, 3)`` exact mean optical density; NaN for a spot without pixels.
    coverage
        ``(n_spots,)`` share of the field that lies on the image.
    fields
        ``(n_spots, 3)`` centre (x, y) and diameter of each spot's field in pixels of the image.
    made_of
        ``bits``, ``spot_scale`` and, for each section, which image was read.
    """

    counts: sp.csr_matrix
    codebook: np.ndarray
    mean_od: np.ndarray
    coverage: np.ndarray
    fields: np.ndarray
    made_of: dict[str, Any]

    @property
    def bits(self) -> int:
        """Bits per channel."""
        return int(self.made_of["bits"])

    @property
    def n_pixels(self) -> np.ndarray:
        """``(n_spots,)`` pixels of each spot."""
        return np.asarray(self.counts.sum(axis=1)).ravel()

    @property
    def od(self) -> np.ndarray:
        """``(n_bins, 3)`` optical densities of the codebook."""
        return codebook_od(self.codebook, self.bits)


def color_histogram(
    sdata: SpatialData,
    *,
    bits: int = DEFAULT_BITS,
    spot_scale: float = DEFAULT_SPOT_SCALE,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | Sequence[str] | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    inplace: bool = True,
) -> ColorHistogram | None:
    """Count the colours under each spot.

    Colours are quantised to ``bits`` bits per channel. Every chunk of a backed image is read at most once; the work is
    spread over dask's current scheduler (threads by default, machines when a :class:`dask.distributed.Client` is
    open), with bit-identical results.

    Images must have the channels red, green and blue (an alpha channel is dropped). ``uint8`` pixels are taken as they
    are; ``uint16`` pixels are divided by 257, so that 65535 is white (an image nowhere brighter than 12 bits is an
    error); ``float`` pixels are multiplied by 255 and must lie in [0, 1].

    Parameters
    ----------
    sdata
        Images, spots and a table that annotates the spots.
    bits
        Bits per channel, 1 to 8. With 5 the mean optical density of a spot is off by 0.0006 (root mean square).
    spot_scale
        Diameter of the round field around each spot's centre, in spot diameters.
    image_key
        Key in ``sdata.images``, or ``{shapes_key: image_key}``. `None` takes the finest image under each spots element.
    shapes_key
        Key or keys in ``sdata.shapes``. `None` takes all spots that the table annotates.
    table_key
        Key in ``sdata.tables``. `None` takes the only one.
    coordinate_system
        Where spots and images meet. `None` takes any that they share.
    inplace
        Write to the table, or return the histogram.

    Returns
    -------
    `None`, or with ``inplace=False`` the histogram of all rows of the table. Written to the table:

    ``obsm["color_histogram"]``
        ``(n_obs, n_bins)`` CSR int32, pixels of each colour that occurs.
    ``obsm["mean_od"]``
        ``(n_obs, 3)`` exact mean optical density, −ln((I + 1) / 256), of red, green and blue; NaN where a spot has no
        pixel on the image.
    ``obsm["color_field"]``
        ``(n_obs, 3)`` centre (x, y) and diameter of each spot's field in pixels of its image.
    ``obs["n_pixels"]``, ``obs["coverage"]``
        Pixels counted, and their share of the field.
    ``uns["color_histogram"]``
        ``codebook`` (``(n_bins, 3)`` lowest intensities of each bin), ``bits``, ``spot_scale`` and, for each section, the
        image that was read.

    Raises
    ------
    KeyError, ValueError
        Elements that are missing or ambiguous, or pixels that cannot be read as RGB; the table is then unchanged.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> stp.pp.color_histogram(sdata)
    >>> sdata["table"].obsm["color_histogram"].shape[0] == sdata["table"].n_obs
    True
    """
    _check_arguments(bits, spot_scale)
    _, table = read_table(sdata, table_key)
    sections = read_sections(
        sdata, table, image_key=image_key, shapes_key=shapes_key, coordinate_system=coordinate_system
    )
    histogram = histogram_of_rows(sections, n_obs=table.n_obs, bits=bits, spot_scale=spot_scale)
    if not inplace:
        return histogram
    slots.write_color_histogram(table, histogram)
    return None


def cached_color_histogram(
    sections: Sequence[Section], table: AnnData, *, bits: int, spot_scale: float
) -> ColorHistogram:
    """Take the histogram from the table when it was made of the same images, else count; writes nothing."""
    _check_arguments(bits, spot_scale)
    fields = _fields(sections, table.n_obs, spot_scale)
    cached = slots.read_color_histogram(table, fields, _describe(sections, bits, spot_scale))
    if cached is not None:
        return ColorHistogram(**cached)
    return histogram_of_rows(sections, n_obs=table.n_obs, bits=bits, spot_scale=spot_scale)


def histogram_of_rows(sections: Sequence[Section], *, n_obs: int, bits: int, spot_scale: float) -> ColorHistogram:
    """Histograms of several sections, one row for each row of the table that they share.

    Rows that belong to none of the sections have no pixels.
    """
    for section in sections:
        check_dtype(section)
    places = [footprints(section, spot_scale) for section in sections]
    jobs = [
        (i, tile, dask.delayed(_count_tile)(section.pixels[:, tile.y, tile.x], tile, places[i].of(tile.spots),
                                            section.channels, section.image_key, bits))
        for i, section in enumerate(sections)
        for tile in tiles(section, places[i].half_width, places[i].half_height)
    ]  # fmt: skip
    with TqdmCallback(desc="colour histograms", delay=2, leave=False):
        parts = dask.compute(*[job for _, _, job in jobs])

    n_bins = 2 ** (3 * bits)
    rows, bins, counts = [], [], []
    od_sum = np.zeros((n_obs, 3), dtype=np.int64)
    brightest = np.zeros(len(sections), dtype=np.int64)
    for (i, tile, _), part in zip(jobs, parts, strict=True):
        of_table = sections[i].rows[tile.spots]
        rows.append(np.repeat(of_table, np.diff(part.indptr)))
        bins.append(part.bins)
        counts.append(part.counts)
        np.add.at(od_sum, of_table, part.od_sum)
        brightest[i] = max(brightest[i], part.brightest)
    for section, value in zip(sections, brightest, strict=True):
        check_range(section, int(value))

    all_bins = np.concatenate(bins) if bins else np.empty(0, dtype=np.int32)
    used = np.zeros(n_bins, dtype=bool)
    used[all_bins] = True
    column = np.cumsum(used) - 1
    matrix = sp.coo_matrix(
        (
            np.concatenate(counts) if counts else np.empty(0, dtype=np.int32),
            (np.concatenate(rows) if rows else np.empty(0, dtype=np.int64), column[all_bins]),
        ),
        shape=(n_obs, int(used.sum())),
        dtype=np.int32,
    ).tocsr()  # adds up what several tiles saw of one spot
    matrix.sort_indices()

    n_pixels = np.asarray(matrix.sum(axis=1)).ravel()
    whole = np.zeros(n_obs)
    for section, place in zip(sections, places, strict=True):
        whole[section.rows] = whole_pixels(section.centers, place.conic)
        warn_of_tiny_spots(section, whole[section.rows], "spot_scale")
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_od = od_sum * _OD_UNIT / n_pixels[:, None]
        coverage = np.where(whole > 0, n_pixels / whole, 0.0)
    return ColorHistogram(
        counts=matrix,
        codebook=_codebook(np.flatnonzero(used), bits),
        mean_od=mean_od,
        coverage=coverage,
        fields=_fields(sections, n_obs, spot_scale),
        made_of=_describe(sections, bits, spot_scale),
    )


def _check_arguments(bits: int, spot_scale: float) -> None:
    if not (isinstance(bits, int | np.integer) and 1 <= bits <= 8):
        raise ValueError(f"`bits` is {bits!r}; expected an integer from 1 to 8.")
    if not (np.isfinite(spot_scale) and spot_scale > 0):
        raise ValueError(f"`spot_scale` is {spot_scale!r}; expected a positive number of spot diameters.")


def _fields(sections: Sequence[Section], n_obs: int, spot_scale: float) -> np.ndarray:
    fields = np.full((n_obs, 3), np.nan)
    for section in sections:
        fields[section.rows] = np.column_stack([section.centers, spot_scale * section.diameters])
    return fields


def _describe(sections: Sequence[Section], bits: int, spot_scale: float) -> dict[str, Any]:
    return {
        "bits": int(bits),
        "spot_scale": float(spot_scale),
        "sections": {section.name: section.fingerprint for section in sections},
    }


def _codebook(bins: np.ndarray, bits: int) -> np.ndarray:
    mask = 2**bits - 1
    levels = np.column_stack([(bins >> (2 * bits)) & mask, (bins >> bits) & mask, bins & mask])
    return (levels << (8 - bits)).astype(np.uint8)


class _Counts(NamedTuple):
    indptr: np.ndarray
    bins: np.ndarray
    counts: np.ndarray
    od_sum: np.ndarray
    brightest: int


def _count_tile(
    block: np.ndarray, tile: Tile, spots: Footprints, channels: tuple[int, int, int], image_key: str, bits: int
) -> _Counts:
    rgb = to_uint8(np.asarray(block), channels, image_key)
    od_units = np.rint(optical_density(np.arange(256)) / _OD_UNIT).astype(np.int64)
    indptr, bins, counts, od_sum = _count(
        rgb, tile.x.start, tile.y.start, spots.centers, spots.conic, spots.half_height, bits, od_units
    )
    return _Counts(indptr, bins, counts, od_sum, int(rgb.max()))


@numba.njit(nogil=True, cache=True)
def _count(rgb, x0, y0, centers, conic, half_height, bits, od_units):  # type: ignore[no-untyped-def]
    """Histogram and sum of optical densities of each ellipse's pixels in one tile, as rows of a CSR matrix."""
    _, height, width = rgb.shape
    n = len(centers)
    shift = 8 - bits
    counter = np.zeros(1 << (3 * bits), dtype=np.int32)
    touched = np.empty(1 << (3 * bits), dtype=np.int32)
    indptr = np.zeros(n + 1, dtype=np.int64)
    bins = np.empty(1024 * n, dtype=np.int32)
    counts = np.empty(1024 * n, dtype=np.int32)
    od_sum = np.zeros((n, 3), dtype=np.int64)
    used = 0
    for i in range(n):
        n_touched = 0
        first = max(int(np.floor(centers[i, 1] - half_height[i])) - y0, 0)
        last = min(int(np.ceil(centers[i, 1] + half_height[i])) + 1 - y0, height)
        for y in range(first, last):
            start, stop = chord(y + y0 + 0.5 - centers[i, 1], conic[i], centers[i, 0])
            for x in range(max(start - x0, 0), min(stop - x0, width)):
                r, g, b = rgb[0, y, x], rgb[1, y, x], rgb[2, y, x]
                code = (
                    ((np.int32(r) >> shift) << (2 * bits)) | ((np.int32(g) >> shift) << bits) | (np.int32(b) >> shift)
                )
                if counter[code] == 0:
                    touched[n_touched] = code
                    n_touched += 1
                counter[code] += 1
                od_sum[i, 0] += od_units[r]
                od_sum[i, 1] += od_units[g]
                od_sum[i, 2] += od_units[b]
        if used + n_touched > len(bins):
            bins = np.concatenate((bins, np.empty(len(bins) + n_touched, dtype=np.int32)))
            counts = np.concatenate((counts, np.empty(len(counts) + n_touched, dtype=np.int32)))
        for k in range(n_touched):
            code = touched[k]
            bins[used] = code
            counts[used] = counter[code]
            counter[code] = 0
            used += 1
        indptr[i + 1] = used
    return indptr, bins[:used].copy(), counts[:used].copy(), od_sum
