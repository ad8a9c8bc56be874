"""What a model reads of a slide: declared by the model, made here for fitting, predicting and every fold alike."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np

from stpredict._data.identity import digest
from stpredict._data.slide import Slide
from stpredict.pp._encode import Encoder, encode
from stpredict.pp._features import FeatureReads, Features
from stpredict.pp._histogram import ColorHistogram, HistogramReads
from stpredict.pp._kept import find_kept
from stpredict.pp._pass import PixelReads, read_pixels
from stpredict.pp._patches import Patches, PatchReads
from stpredict.pp._statistics import StatisticsReads

Reads = HistogramReads | PatchReads | FeatureReads

# Results of reading that several calls share while the images cannot change, by what was read of which spots.
_shared: ContextVar[dict[Any, Any] | None] = ContextVar("shared reads", default=None)


class Inputs(Protocol):
    """What a model is fitted to or predicts from."""

    @property
    def rows(self) -> np.ndarray:
        """Rows of the table that have all that the model reads."""
        ...

    def arguments(self) -> tuple[Any, ...]:
        """What a model's ``predict`` is given, for :attr:`rows`."""
        ...

    def fingerprints(self) -> np.ndarray:
        """``(len(rows),)`` int64: the same for spots that show the same; 0 where nothing tells them apart."""
        ...


def reads_of(described: Mapping[str, Any], encoder: Encoder | None = None) -> Reads:
    """What a fitted model declares as its ``reads``.

    Raises
    ------
    ValueError
        An encoder for a model that reads none, or none for one that does.
    """
    kind = described["kind"]
    if kind == FeatureReads.kind:
        return FeatureReads(described["sources"], encoder)
    if encoder is not None:
        raise ValueError(f"`encoder` is given, but the model reads {kind}, no encoder's features.")
    if kind == HistogramReads.kind:
        return HistogramReads(described["bits"], described["spot_scale"])
    if kind == PatchReads.kind:
        return PatchReads(described["levels"], described["image_size"], described["spot_scale"])
    raise ValueError(f"The model reads {kind!r}, which this version of stpredict does not know.")


def needs_image(reads: Reads) -> bool:
    """Whether pixels are read."""
    return reads.needs_image if isinstance(reads, FeatureReads) else True


def field_of_view(reads: Reads) -> float | None:
    """Width of what a model sees around a spot, in spot diameters; `None` where that is not known."""
    return reads.spot_scales[-1] if isinstance(reads, HistogramReads) else reads.field_of_view


@contextmanager
def shared_reads(held: dict[Any, Any]) -> Iterator[None]:
    """Have everything that is read until the end kept in ``held``, and taken from there."""
    token = _shared.set(held)
    try:
        yield
    finally:
        _shared.reset(token)


def read_together(slide: Slide, wanted: Sequence[Reads]) -> None:
    """Read all pixels that several models count in a single pass; call within :func:`shared_reads`."""
    _count(slide, [reads for each in wanted for reads in _pixel_reads(each)])


@contextmanager
def read_inputs(
    slide: Slide,
    reads: Reads,
    *,
    device: str = "cpu",
    store: str | os.PathLike[str] | None = None,
    training: np.ndarray | None = None,
) -> Iterator[Inputs]:
    """Make what a model reads, and give it up at the end.

    Parameters
    ----------
    slide
        Images, spots and rows.
    reads
        What is read.
    device
        Where an encoder computes.
    store
        Folder that keeps patches, as in :func:`stpredict.pp.patches`.
    training
        Rows that a model is going to be fitted to; `None` makes what it was fitted to.

    Raises
    ------
    KeyError, TypeError, ValueError, OSError
        As the functions of ``pp``.
    """
    if isinstance(reads, HistogramReads):
        histogram: ColorHistogram = _count(slide, [reads])[reads]
        yield histogram
    elif isinstance(reads, FeatureReads):
        yield _features(slide, reads, device, training)
    else:
        patches = _patches(slide, reads, store)
        try:
            yield patches
        finally:
            if _shared.get() is None:
                patches.close()


def _pixel_reads(reads: Reads) -> list[PixelReads]:
    return (
        reads.pixel_reads if isinstance(reads, FeatureReads) else [reads] if isinstance(reads, HistogramReads) else []
    )


def _count(slide: Slide, wanted: Sequence[HistogramReads | StatisticsReads | PixelReads]) -> dict[PixelReads, Any]:
    """Take what is shared or what the table keeps, and count the rest in one pass."""
    if not wanted:
        return {}
    found: dict[PixelReads, Any] = {}
    shared, place = _shared.get(), _place(slide)
    if shared is not None:
        found |= {reads: shared[place, reads] for reads in wanted if (place, reads) in shared}
    found |= _stored(slide, [reads for reads in wanted if reads not in found])
    found |= read_pixels(slide.sections, [reads for reads in wanted if reads not in found], slide.n_obs)
    if shared is not None:
        shared.update({(place, reads): result for reads, result in found.items()})
    return found


def _stored(slide: Slide, wanted: Sequence[Any]) -> dict[PixelReads, Any]:
    """What the table keeps of the same images."""
    keeps = any(isinstance(entry, Mapping) and "reads" in entry for entry in slide.table.uns.values())
    made_of = slide.identity() if keeps and wanted else None  # which takes time
    found: dict[PixelReads, Any] = {}
    for reads in wanted:
        for key in find_kept(slide.table, reads.describe(), made_of):
            if reads not in found and (stored := reads.stored(slide, key)) is not None:
                found[reads] = stored
    return found


def _features(slide: Slide, reads: FeatureReads, device: str, training: np.ndarray | None) -> Features:
    reads.check(slide)
    encoded, patch_reads = None, reads.patch_reads
    if patch_reads is not None:
        assert reads.encoder is not None
        shared, key = _shared.get(), (_place(slide), patch_reads, id(reads.encoder))
        if shared is not None and key in shared:
            encoded = shared[key][0]
        else:
            encoded = encode(slide, patch_reads, reads.encoder, device=device)
            if shared is not None:
                shared[key] = encoded, reads.encoder  # which is kept, so that its id stays its own
    return reads.assemble(slide, _count(slide, reads.pixel_reads), encoded, training)


def _patches(slide: Slide, reads: PatchReads, store: str | os.PathLike[str] | None) -> Patches:
    shared, key = _shared.get(), (_place(slide), reads)
    if shared is None:
        return reads.extract(slide, store)
    if key not in shared:
        shared[key] = reads.extract(slide, store)
    patches: Patches = shared[key]
    return patches


def _place(slide: Slide) -> str:
    """Which spots of which images, while these cannot change."""
    return digest(
        slide.n_obs,
        [[each.pixels.name, each.channels, each.affine, each.xy, each.radii, each.rows] for each in slide.sections],
    )
