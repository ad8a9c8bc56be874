"""What every fit function reads before it looks at a pixel, so that a wrong argument costs no time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from stpredict._data import slots
from stpredict._data.slide import Section, read_sections, read_spots, read_table
from stpredict.tl.fitting._targets import Targets, read_targets, training_mask


class Inputs(NamedTuple):
    """Where to read pixels, what to fit, and where to compute.

    ``training`` (n_obs,) are the rows that may be looked at; ``targets.rows`` those of them that have a spot on
    an image.
    """

    table: AnnData
    sections: list[Section]
    training: np.ndarray
    targets: Targets
    device: str


def read_inputs(
    sdata: SpatialData,
    *,
    genes: int | str | Sequence[str] | None,
    train_key: str | None,
    layer: str | None,
    min_spots: int,
    key_added: str,
    image_key: str | Mapping[str, str] | None,
    shapes_key: str | Sequence[str] | None,
    table_key: str | None,
    coordinate_system: str | None,
    device: str,
    needs_image: bool = True,
) -> Inputs:
    """Check and read the arguments that all fit functions share, as :func:`stpredict.tl.fit_nsl` documents them.

    ``min_spots`` is the number of training spots that the model needs. Without ``needs_image`` no image is looked for, and
    all spots count.
    """
    from stpredict.models._device import resolve_device

    device = resolve_device(device)
    _, table = read_table(sdata, table_key)
    slots.check_key(table, key_added)
    training = training_mask(table, train_key)
    sections: list[Section] = []
    usable = np.zeros(table.n_obs, dtype=bool)
    if needs_image:
        sections = read_sections(
            sdata, table, image_key=image_key, shapes_key=shapes_key, coordinate_system=coordinate_system
        )
        for section in sections:
            usable[section.rows] = section.on_image
    else:
        for spots in read_spots(sdata, table, shapes_key=shapes_key):
            usable[spots.rows] = True
    targets = read_targets(table, np.flatnonzero(training & usable), genes=genes, layer=layer, min_spots=min_spots)
    return Inputs(table, sections, training, targets, device)
