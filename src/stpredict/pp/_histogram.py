"""Color histograms of spots: all that Neural Stain Learning sees of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numba
import numpy as np
import scipy.sparse as sp
from spatialdata import SpatialData

from stpredict._data.elements import Elements
from stpredict._data.slide import Section, Slide, open_slide
from stpredict._data.slots import Slots
from stpredict.pp._footprints import Footprints, chord, footprints, whole_pixels
from stpredict.pp._kept import kept_entry, row_fingerprints, still_valid
from stpredict.pp._pass import read_pixels
from stpredict.pp._tiles import Tile

# Diameter of the field in spot diameters; docs/explanation/field.md has the cross-validation that chose it.
DEFAULT_SPOT_SCALE = 2.0
DEFAULT_BITS = 5

# Optical densities are summed as integers of this unit: the sum is then exact, whatever the order of the pixels.
_OD_UNIT = 2.0**-32


def optical_density(intensity: np.ndarray) -> np.ndarray:
    """Optical density, −ln((I + 1) / 256), of 8-bit intensities."""
    return -np.log((np.asarray(intensity, dtype=np.float64) + 1) / 256)


def codebook_od(codebook: np.ndarray, bits: int) -> np.ndarray:
    """Optical densities of the colors of a codebook, ``(n_bins, 3)``, at the centers of its bins."""
    return optical_density(codebook.astype(np.float64) + (2 ** (8 - bits) - 1) / 2)


@dataclass(frozen=True)
class ColorHistogram:
    """Colors under spots.

    Attributes
    ----------
    counts
        ``(n_spots, n_bins)`` CSR, pixels of each color, int32.
    codebook
        ``(n_bins, 3)`` lowest 8-bit intensities of each bin (red, green, blue).
    mean_od
        ``(n_spots, 3)`` exact mean optical density; NaN for a spot without pixels.
    coverage
        ``(n_spots,)`` share of the field that lies on the image.
    bits
        Bits per channel.
    """

    counts: sp.csr_matrix
    codebook: np.ndarray
    mean_od: np.ndarray
    coverage: np.ndarray
    bits: int

    @property
    def n_pixels(self) -> np.ndarray:
        """``(n_spots,)`` pixels of each spot."""
        return np.asarray(self.counts.sum(axis=1)).ravel()

    @property
    def od(self) -> np.ndarray:
        """``(n_bins, 3)`` optical densities of the codebook."""
        return codebook_od(self.codebook, self.bits)

    @property
    def rows(self) -> np.ndarray:
        """Spots that have pixels."""
        return np.flatnonzero(self.n_pixels > 0)

    def fractions(self, rows: np.ndarray) -> sp.csr_matrix:
        """Shares of the colors in some spots; each row sums to 1 (to 0 for spots without pixels)."""
        counts = self.counts[rows]
        return sp.csr_matrix(sp.diags(1 / np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)) @ counts)

    def arguments(self) -> tuple[sp.csr_matrix, np.ndarray]:
        """What a model predicts :attr:`rows` from."""
        return self.fractions(self.rows), self.od

    def fingerprints(self) -> np.ndarray:
        """``(len(rows),)`` fingerprints of the spots' colors; 0 where a spot has a single one, as on glass."""
        rows = self.rows
        found = row_fingerprints(np.column_stack([self.mean_od[rows], self.n_pixels[rows]]))
        return np.where(self.counts[rows].getnnz(axis=1) > 1, found, 0)


@dataclass(frozen=True)
class HistogramReads:
    """Reads histograms: ``bits`` per channel, of fields ``spot_scale`` spot diameters wide."""

    kind: ClassVar[str] = "histogram"

    bits: int = DEFAULT_BITS
    spot_scale: float = DEFAULT_SPOT_SCALE

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, int | np.integer) and 1 <= self.bits <= 8):
            raise ValueError(f"`bits` is {self.bits!r}; expected an integer from 1 to 8.")
        check_spot_scale(self.spot_scale)

    def describe(self) -> dict[str, Any]:
        """What a model keeps of it."""
        return {"kind": self.kind, "bits": int(self.bits), "spot_scale": float(self.spot_scale)}

    @property
    def spot_scales(self) -> tuple[float, ...]:
        """Diameters of the fields in spot diameters."""
        return (float(self.spot_scale),)

    def count(self, rgb: np.ndarray, x0: int, y0: int, places: Sequence[Footprints]) -> _Counts:
        """Count the colors of each field in one tile."""
        (place,) = places
        od_units = np.rint(optical_density(np.arange(256)) / _OD_UNIT).astype(np.int64)
        return _Counts(*_count(rgb, x0, y0, place.centers, place.conic, place.half_height, self.bits, od_units))

    def of_section(self, section: Section, found: Sequence[Tile], parts: Sequence[_Counts]) -> _OfSection:
        """Put the tiles of a section together."""
        od_sum = np.zeros((len(section.rows), 3), dtype=np.int64)
        for tile, part in zip(found, parts, strict=True):
            od_sum[tile.spots] += part.od_sum
        rows = [
            np.repeat(section.rows[tile.spots], np.diff(part.indptr)) for tile, part in zip(found, parts, strict=True)
        ]
        return _OfSection(
            np.concatenate([np.empty(0, dtype=np.int64), *rows]),
            np.concatenate([np.empty(0, dtype=np.int32), *(part.bins for part in parts)]),
            np.concatenate([np.empty(0, dtype=np.int32), *(part.counts for part in parts)]),
            od_sum,
            whole_pixels(section.centers, footprints(section, self.spot_scale).conic),
        )

    def gather(self, sections: Sequence[Section], of_sections: Sequence[_OfSection], n_obs: int) -> ColorHistogram:
        """One row for each row of the table; those of no section have no pixels."""
        bins = np.concatenate([each.bins for each in of_sections])
        used = np.zeros(2 ** (3 * self.bits), dtype=bool)
        used[bins] = True
        column = np.cumsum(used) - 1
        counts = sp.coo_matrix(
            (
                np.concatenate([each.counts for each in of_sections]),
                (np.concatenate([each.rows for each in of_sections]), column[bins]),
            ),
            shape=(n_obs, int(used.sum())),
            dtype=np.int32,
        ).tocsr()  # adds up what several tiles saw of one spot
        counts.sort_indices()
        n_pixels = np.asarray(counts.sum(axis=1)).ravel()
        od_sum, whole = np.zeros((n_obs, 3), dtype=np.int64), np.zeros(n_obs)
        for section, each in zip(sections, of_sections, strict=True):
            od_sum[section.rows], whole[section.rows] = each.od_sum, each.whole
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_od = od_sum * _OD_UNIT / n_pixels[:, None]
            coverage = np.where(whole > 0, n_pixels / whole, 0.0)
        return ColorHistogram(counts, _codebook(np.flatnonzero(used), self.bits), mean_od, coverage, int(self.bits))

    def slots(self, key: str, histogram: ColorHistogram, made_of: str | None) -> Slots:
        """What :func:`color_histogram` writes."""
        content = (histogram.counts, histogram.codebook, histogram.mean_od, histogram.coverage)
        return Slots(
            key,
            entry={"codebook": histogram.codebook, **kept_entry(self.describe(), made_of, content)},
            obsm={key: histogram.counts, f"{key}_mean_od": histogram.mean_od},
            obs={f"{key}_n_pixels": histogram.n_pixels, f"{key}_coverage": histogram.coverage},
        )

    def stored(self, slide: Slide, key: str) -> ColorHistogram | None:
        """What a table keeps under a key, if it is whole."""
        table = slide.table
        try:
            counts = sp.csr_matrix(table.obsm[key])
            mean_od, coverage = np.asarray(table.obsm[f"{key}_mean_od"]), table.obs[f"{key}_coverage"].to_numpy()
            codebook = np.asarray(table.uns[key]["codebook"])
        except (KeyError, TypeError, ValueError):
            return None
        if not still_valid(table.uns[key], (counts, codebook, mean_od, coverage), key):
            return None
        return ColorHistogram(counts, codebook, mean_od, coverage, int(self.bits))


def check_spot_scale(spot_scale: float) -> None:
    """Refuse what is no width of a field in spot diameters."""
    if not (isinstance(spot_scale, int | float | np.number) and np.isfinite(spot_scale) and spot_scale > 0):
        raise ValueError(f"`spot_scale` is {spot_scale!r}; expected a positive number of spot diameters.")


def color_histogram(
    sdata: SpatialData,
    *,
    bits: int = DEFAULT_BITS,
    spot_scale: float = DEFAULT_SPOT_SCALE,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | Sequence[str] | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    key_added: str = "color_histogram",
    inplace: bool = True,
) -> ColorHistogram | None:
    """Count the colors under each spot.

    Colors are quantized to ``bits`` bits per channel. Every chunk of a backed image is read at most once; the work is
    spread over dask's current scheduler (threads by default, machines when a :class:`dask.distributed.Client` is
    open), with bit-identical results.

    Images must have the channels red, green and blue; where there is an alpha channel, colors are laid over white, since
    what can be seen through is glass. ``uint8`` pixels are taken as they are; ``uint16`` pixels are divided by 257, so
    that 65535 is white (an image nowhere brighter than 12 bits is an error); ``float`` pixels are multiplied by 255 and
    must lie in [0, 1].

    Parameters
    ----------
    sdata
        Images, spots and a table that annotates the spots.
    bits
        Bits per channel, 1 to 8. With 5 the mean optical density of a spot is off by 0.0006 (root mean square).
    spot_scale
        Diameter of the round field around each spot's center, in spot diameters.
    image_key
        Key in ``sdata.images``, or ``{shapes_key: image_key}``. `None` takes the finest image under each spots element.
    shapes_key
        Key or keys in ``sdata.shapes``. `None` takes all spots that the table annotates.
    table_key
        Key in ``sdata.tables``. `None` takes the only one that annotates spots.
    coordinate_system
        Where spots and images meet. `None` takes any that they share.
    key_added
        What the results are named after.
    inplace
        Write to the table, or return the histogram.

    Returns
    -------
    `None`, or with ``inplace=False`` the histogram of all rows of the table. Written to the table:

    ``obsm["color_histogram"]``
        ``(n_obs, n_bins)`` CSR int32, pixels of each color that occurs.
    ``obsm["color_histogram_mean_od"]``
        ``(n_obs, 3)`` exact mean optical density, −ln((I + 1) / 256), of red, green and blue; NaN where a spot has no
        pixel on the image.
    ``obs["color_histogram_n_pixels"]``, ``obs["color_histogram_coverage"]``
        Pixels counted, and their share of the field.
    ``uns["color_histogram"]``
        ``codebook`` (``(n_bins, 3)`` lowest intensities of each bin), and what it was made of. A model that reads the same
        colors takes them from here while images, places and rows are the same.

    Raises
    ------
    KeyError, TypeError, ValueError
        Elements that are missing or ambiguous, pixels that cannot be read as RGB, or a key that is taken; the table is then
        unchanged.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> stp.pp.color_histogram(sdata)
    >>> sdata["table"].obsm["color_histogram"].shape[0] == sdata["table"].n_obs
    True
    """
    reads = HistogramReads(bits, spot_scale)
    elements = Elements(
        image_key=image_key, shapes_key=shapes_key, table_key=table_key, coordinate_system=coordinate_system
    )
    slide = open_slide(sdata, elements, images=True)
    names = dict.fromkeys([key_added, f"{key_added}_mean_od"]), dict.fromkeys(["n_pixels", "coverage"])
    if inplace:
        Slots(key_added, obsm=names[0], obs={f"{key_added}_{name}": None for name in names[1]}).check(slide.table)
    histogram: ColorHistogram = read_pixels(slide.sections, [reads], slide.n_obs)[reads]
    if not inplace:
        return histogram
    reads.slots(key_added, histogram, slide.identity()).write(slide.table)
    return None


class _Counts(NamedTuple):
    """Of one tile: a CSR matrix of spots by bins, and sums of optical densities."""

    indptr: np.ndarray
    bins: np.ndarray
    counts: np.ndarray
    od_sum: np.ndarray


class _OfSection(NamedTuple):
    """Entries of the matrix by row of the table, sums of optical densities, and pixels of the whole fields."""

    rows: np.ndarray
    bins: np.ndarray
    counts: np.ndarray
    od_sum: np.ndarray
    whole: np.ndarray


def _codebook(bins: np.ndarray, bits: int) -> np.ndarray:
    mask = 2**bits - 1
    levels = np.column_stack([(bins >> (2 * bits)) & mask, (bins >> bits) & mask, bins & mask])
    return (levels << (8 - bits)).astype(np.uint8)


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
