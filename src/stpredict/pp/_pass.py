"""One pass over the pixels under spots, for any number of readers that count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import dask
import numpy as np
from tqdm.auto import tqdm
from tqdm.dask import TqdmCallback

from stpredict._data.slide import Section
from stpredict.pp._footprints import Footprints, check_reach, footprints, warn_of_tiny_spots, whole_pixels
from stpredict.pp._tiles import Tile, brightest_of, check_dtype, check_range, tiles, to_uint8


class PixelReads(Protocol):
    """Something that is counted, tile by tile, from the pixels of round fields around spots; hashable."""

    @property
    def spot_scales(self) -> tuple[float, ...]:
        """Diameters of the fields in spot diameters, ascending."""
        ...

    def count(self, rgb: np.ndarray, x0: int, y0: int, places: Sequence[Footprints]) -> Any:
        """Count one tile: ``(3, height, width)`` uint8 pixels from column ``x0`` and row ``y0`` on."""
        ...

    def of_section(self, section: Section, found: Sequence[Tile], parts: Sequence[Any]) -> Any:
        """Put the tiles of a section together."""
        ...

    def gather(self, sections: Sequence[Section], of_sections: Sequence[Any], n_obs: int) -> Any:
        """Make the result, with a row for each row of the table."""
        ...


def read_pixels(sections: Sequence[Section], wanted: Sequence[PixelReads], n_obs: int) -> dict[PixelReads, Any]:
    """Count all that is wanted; each chunk of an image is read at most once, on dask's current scheduler.

    Raises
    ------
    ValueError
        Pixels that no documented rule converts to uint8, or fields that reach absurdly far beyond an image.
    """
    wanted = list(dict.fromkeys(wanted))
    if not wanted:
        return {}
    for section in sections:
        check_dtype(section)
        check_reach(section, max(reads.spot_scales[-1] for reads in wanted))
    of_sections: dict[PixelReads, list[Any]] = {reads: [] for reads in wanted}
    for section in sections:  # one after another: counts take up to 18 kB a spot
        places = {reads: [footprints(section, scale) for scale in reads.spot_scales] for reads in wanted}
        widest = max((each[-1] for each in places.values()), key=lambda place: float(place.half_width.max()))
        found = tiles(section, widest.half_width, widest.half_height)
        jobs = [
            dask.delayed(_count_tile)(
                section.pixels[:, tile.y, tile.x],
                tile,
                {reads: [place.of(tile.spots) for place in each] for reads, each in places.items()},
                section.channels,
                section.image_key,
            )
            for tile in found
        ]
        progress = TqdmCallback(desc=f"colors of {section.name}", delay=2, leave=False)
        progress.pbar = tqdm(disable=True)  # which is closed when an interrupt arrives before there is another
        with progress:
            parts = dask.compute(*jobs)
        if found:
            check_range(section, max(brightest for _, brightest in parts))
        for reads in wanted:
            warn_of_tiny_spots(section, whole_pixels(section.centers, places[reads][0].conic))
            of_sections[reads].append(reads.of_section(section, found, [counted[reads] for counted, _ in parts]))
    return {reads: reads.gather(sections, of_sections[reads], n_obs) for reads in wanted}


def _count_tile(
    block: np.ndarray,
    tile: Tile,
    places: Mapping[PixelReads, Sequence[Footprints]],
    channels: tuple[int, ...],
    image_key: str,
) -> tuple[dict[PixelReads, Any], int]:
    block = np.asarray(block)
    rgb = to_uint8(block, channels, image_key)
    counted = {reads: reads.count(rgb, tile.x.start, tile.y.start, each) for reads, each in places.items()}
    return counted, brightest_of(block, channels)
