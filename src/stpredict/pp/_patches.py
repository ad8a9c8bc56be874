"""Patches: what M2OST sees of an image, one square at several scales around each spot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from dask.system import CPU_COUNT
from scanpy import logging as logg
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stpredict._data.elements import Elements
from stpredict._data.identity import identity
from stpredict._data.slide import Section, Slide, open_slide
from stpredict.pp._bands import Band, bands, check_memory
from stpredict.pp._footprints import check_reach
from stpredict.pp._histogram import check_spot_scale
from stpredict.pp._kept import row_fingerprints
from stpredict.pp._store import Store, kept_store, new_store, turn_in
from stpredict.pp._windows import Windows, box_pyramid, cut_patch, place_windows

# Field of view of the authors of M2OST: 224 pixels on HER2+ sections, where a spot of 100 µm has 145.
DEFAULT_SPOT_SCALE = 1.54
_MAX_LEVELS = 8

# An image that has to be enlarged by more blurs level 0 visibly.
_ENLARGED = 1.1
# Beyond this many threads, Python itself is the bottleneck.
_MAX_THREADS = 8
# Patches that are read at a time to be told from others.
_FINGERPRINTED = 256


@dataclass(frozen=True, repr=False, eq=False)
class Patches:
    """Multi-scale patches of spots, in memory or in a file; index them to get batches.

    ``patches[i]`` is an array, ``patches[[3, 1, 2]]``, ``patches[:10]`` and ``patches[mask]`` are batches. The channels
    come before rows and columns, but lie next to each other in memory (PyTorch's *channels last*).

    Attributes
    ----------
    rows
        ``(n,)`` rows of the table, ascending; spots that have no pixel of level 0 on the image are left out.
    coverage
        ``(n,)`` share of the field of level 0 that lies on the image.
    """

    rows: np.ndarray
    coverage: np.ndarray
    _store: Store

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        n, levels, _, size, _ = self.shape
        where = "closed" if self._store.closed else self._store
        return f"Patches of {n} spots, {levels} levels of {size} x {size} pixels, {where}"

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """``(n, levels, 3, image_size, image_size)``."""
        n, levels, height, width, channels = self._store.shape
        return n, levels, channels, height, width

    def __getitem__(self, indices: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        return self.take(indices)

    def take(self, indices: int | slice | Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Read a batch, into an array that exists already if there is one.

        Parameters
        ----------
        indices
            Which patches, in any order: whatever selects from an array of length ``len(patches)``.
        out
            A batch of the same size that may be overwritten. It saves the time to ask the system for memory.

        Returns
        -------
        ``(b, levels, 3, image_size, image_size)`` uint8, without *b* for a single index.

        Raises
        ------
        IndexError
            There is no such patch.
        ValueError
            The patches are closed, or ``out`` is no such batch.
        """
        if self._store.closed:
            raise ValueError("These patches are closed. Make them anew with `stp.pp.patches`.")
        positions = np.asarray(np.arange(len(self))[indices])
        if out is None:
            pixels = np.empty(positions.shape + self._store.shape[1:], dtype=np.uint8)
        else:
            pixels = np.moveaxis(out, -3, -1)
            fits = pixels.shape == positions.shape + self._store.shape[1:] and pixels.flags.c_contiguous
            if not fits or out.dtype != np.uint8:
                raise ValueError(
                    f"`out` has the shape {out.shape} and dtype {out.dtype}; expected a batch that `take` returned "
                    f"for {positions.shape} indices."
                )
        self._store.read(positions.ravel(), pixels.reshape(-1, *self._store.shape[1:]))
        return np.moveaxis(pixels, -1, -3)

    def arguments(self) -> tuple[Patches]:
        """What a model predicts :attr:`rows` from."""
        return (self,)

    def fingerprints(self) -> np.ndarray:
        """``(len(rows),)`` fingerprints of the spots' patches; 0 where a patch has a single color, as on glass."""
        found = [np.empty(0, dtype=np.int64)]
        for start in range(0, len(self), _FINGERPRINTED):
            batch = self[start : start + _FINGERPRINTED]
            colorful = (batch != batch[..., :1, :1]).any(axis=(1, 2, 3, 4))
            found.append(np.where(colorful, row_fingerprints(np.moveaxis(batch, -3, -1)), 0))
        return np.concatenate(found)

    def close(self) -> None:
        """Give up memory, or the temporary file; a file in a folder of your own is kept."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def patches(
    sdata: SpatialData,
    *,
    levels: int = 3,
    image_size: int = 224,
    spot_scale: float = DEFAULT_SPOT_SCALE,
    store: str | os.PathLike[str] | None = None,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | Sequence[str] | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
) -> Patches:
    """Cut squares of several sizes out of the image around each spot.

    All levels of a spot have the same centre and the same number of pixels; each shows twice the width of the one
    before it. Squares lie along the rows and columns of the image. Beyond the image they are white.

    Scales are made from the full resolution, by averaging blocks of 2 x 2 pixels as often as it goes and then resizing
    by less than two (bilinear with antialiasing); every structure is where it belongs to half a pixel of the patch.
    Each chunk of a backed image is read at most once, in bands of rows, so that the image need not fit into memory.

    Parameters
    ----------
    sdata
        Images (uint8, uint16 or float, as for :func:`color_histogram`), spots and a table that annotates the spots.
    levels
        Number of scales, 1 to 8.
    image_size
        Rows and columns of a patch in pixels.
    spot_scale
        Field of view (side of the square) of level 0 in spot diameters. The default reproduces the 224 pixels of the
        authors of M2OST on HER2+ sections.
    store
        Folder in which to keep the patches, and from which to take them when they were made there before of the same
        images, spots and settings. Of several processes with the same folder one makes them while the others wait.
        `None` keeps up to 1 GB in memory and more in a temporary file, which is removed when the patches are closed or
        no longer used (environment variable ``TMPDIR`` says where).
    image_key
        Key in ``sdata.images``, or ``{shapes_key: image_key}``. `None` takes the finest image under each spots element.
    shapes_key
        Key or keys in ``sdata.shapes``. `None` takes all spots that the table annotates.
    table_key
        Key in ``sdata.tables``. `None` takes the only one.
    coordinate_system
        Where spots and images meet. `None` takes any that they share.

    Returns
    -------
    The patches of all spots that lie on the image. Nothing is written to ``sdata``.

    Raises
    ------
    KeyError, TypeError, ValueError
        Elements that are missing or ambiguous, or pixels that cannot be read as RGB.
    OSError
        No space left for the patches.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> with stp.pp.patches(sdata, image_size=64) as patches:
    ...     print(patches[[0, 5]].shape)
    (2, 3, 3, 64, 64)
    """
    reads = PatchReads(levels, image_size, spot_scale)
    elements = Elements(
        image_key=image_key, shapes_key=shapes_key, table_key=table_key, coordinate_system=coordinate_system
    )
    return reads.extract(open_slide(sdata, elements, images=True), store)


@dataclass(frozen=True)
class PatchReads:
    """Reads patches: ``levels`` of ``image_size`` pixels, the first ``spot_scale`` spot diameters wide."""

    kind: ClassVar[str] = "patches"

    levels: int
    image_size: int
    spot_scale: float = DEFAULT_SPOT_SCALE

    def __post_init__(self) -> None:
        if not (isinstance(self.levels, int | np.integer) and 1 <= self.levels <= _MAX_LEVELS):
            raise ValueError(f"`levels` is {self.levels!r}; expected an integer from 1 to {_MAX_LEVELS}.")
        if not (isinstance(self.image_size, int | np.integer) and self.image_size >= 1):
            raise ValueError(f"`image_size` is {self.image_size!r}; expected a positive number of pixels.")
        check_spot_scale(self.spot_scale)

    def describe(self) -> dict[str, Any]:
        """What a model keeps of it."""
        return {
            "kind": self.kind,
            "levels": int(self.levels),
            "image_size": int(self.image_size),
            "spot_scale": float(self.spot_scale),
        }

    @property
    def field_of_view(self) -> float:
        """Width of the widest level in spot diameters."""
        return float(self.spot_scale) * 2 ** (self.levels - 1)

    def extract(self, slide: Slide, store: str | os.PathLike[str] | None = None) -> Patches:
        """Cut the patches of all spots of a slide, or take them from a folder that kept them."""
        sections = slide.sections
        for section in sections:
            check_reach(section, self.field_of_view)
        coverage = [_coverage(section, self.spot_scale) for section in sections]
        on_image = [np.flatnonzero(share > 0) for share in coverage]
        rows = np.concatenate([section.rows[spots] for section, spots in zip(sections, on_image, strict=True)])
        shares = np.concatenate([share[spots] for share, spots in zip(coverage, on_image, strict=True)])
        order = np.argsort(rows)
        positions = np.split(np.argsort(order), np.cumsum([len(spots) for spots in on_image])[:-1])
        jobs = [
            _Job(section, place_windows(section, self.levels, self.image_size, self.spot_scale).of(spots), of_section)
            for section, spots, of_section in zip(sections, on_image, positions, strict=True)
            if len(spots)
        ]
        for job in jobs:
            check_memory(job.section, job.windows.boxes(), align=2**job.windows.depth)
        shape = (len(rows), self.levels, self.image_size, self.image_size, 3)
        made_of = None if store is None else identity(self.describe(), slide.identity())
        with turn_in(store):
            return Patches(rows[order], shares[order], _kept_or_drawn(jobs, shape, store, made_of))


def _coverage(section: Section, spot_scale: float) -> np.ndarray:
    """Share of each spot's level-0 field that lies on the image, counted in pixels."""
    half = (spot_scale * section.diameters / 2)[:, None]
    first, last = np.ceil(section.centers - half - 0.5), np.ceil(section.centers + half - 0.5)
    whole = (last - first).prod(axis=1)
    size = np.array([section.width, section.height])
    inside = np.maximum(np.minimum(last, size) - np.maximum(first, 0), 0).prod(axis=1)
    return np.divide(inside, whole, out=np.zeros(len(whole)), where=whole > 0)


class _Job(NamedTuple):
    """Spots of one section: their windows, and the positions of their patches in the store."""

    section: Section
    windows: Windows
    positions: np.ndarray


def _kept_or_drawn(
    jobs: Sequence[_Job], shape: tuple[int, ...], folder: str | os.PathLike[str] | None, made_of: str | None
) -> Store:
    if folder is not None and made_of is not None and (kept := kept_store(shape, folder, made_of)) is not None:
        logg.info(f"Taking the patches of {shape[0]} spots {kept}.")
        return kept
    for job in jobs:
        _warn_of_blur(job)
    target = new_store(shape, folder, made_of)
    try:
        with tqdm(total=shape[0], desc="patches", unit="spot", delay=2, leave=False) as progress:
            for job in jobs:
                _draw(target, job, progress)
        target.finish()
    except BaseException:
        target.close()
        raise
    return target


def _warn_of_blur(job: _Job) -> None:
    enlarged = 1 / float(np.median(job.windows.scale[:, 0]))
    if enlarged > _ENLARGED:
        logg.warning(
            f"The image {job.section.image_key!r} is too coarse: level 0 is enlarged {enlarged:.2g} times and blurred. "
            "Use a finer image, a smaller `image_size` or a larger `spot_scale`."
        )


def _draw(target: Store, job: _Job, progress: tqdm) -> None:
    """Write the patches of a job."""
    section, windows, positions = job
    with ThreadPoolExecutor(min(CPU_COUNT, _MAX_THREADS), thread_name_prefix="patches") as pool:
        for band in bands(section, windows.boxes(), align=2**windows.depth):
            pyramid = box_pyramid(band.pixels, windows.depth, pool)

            def put(spot: int, band: Band = band, pyramid: list[np.ndarray] = pyramid) -> None:
                target.write(int(positions[spot]), cut_patch(pyramid, band, windows, spot))

            for _ in pool.map(put, band.boxes):
                progress.update()
