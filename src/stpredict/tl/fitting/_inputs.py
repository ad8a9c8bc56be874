"""What every fit function does before and after its model is fitted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData

from stpredict._data.elements import Elements
from stpredict._data.genes import find_genes
from stpredict._data.identity import digest
from stpredict._data.slide import Slide, open_slide
from stpredict.pp._features import FeatureReads, Features
from stpredict.pp._reads import Inputs, Reads, needs_image, read_inputs
from stpredict.tl.fitting._finish import check_free, predict_rows, write_predictions
from stpredict.tl.fitting._targets import Genes, Targets, check_enough, read_targets, training_mask

if TYPE_CHECKING:
    from stpredict.models import FittedModel


@dataclass(frozen=True)
class Fit:
    """A fit that is under way: what was read, and what becomes of the model.

    Attributes
    ----------
    slide
        Table, spots and images.
    inputs
        What the model reads, of all rows.
    targets
        What it is fitted to, on the training rows that have inputs.
    device
        Where to compute.
    params
        What the model keeps of what it was fitted to.
    """

    slide: Slide
    reads: Reads
    inputs: Inputs
    targets: Targets
    device: str
    params: dict[str, Any]

    @property
    def positions(self) -> np.ndarray:
        """``(n,)`` where the training rows are among the rows of the inputs."""
        return np.searchsorted(self.inputs.rows, self.targets.rows)

    @cached_property
    def fingerprints(self) -> np.ndarray:
        """``(n,)`` what tells the inputs of the training rows from others."""
        return self.inputs.fingerprints()[self.positions]

    def kept(self, **settings: Any) -> dict[str, Any]:
        """What every model keeps beside what it learned: what it reads, has seen, and was fitted with."""
        params = {**settings, **self.params, "fit": self.identity(settings)}
        return {
            "reads": self.reads.describe(),
            "seen": np.unique(self.fingerprints[self.fingerprints != 0]),
            "params": params,
        }

    def identity(self, settings: Mapping[str, Any]) -> str:
        """What tells this fit from any other: all that the model is going to be made of."""
        return digest(settings, self.reads.describe(), self.fingerprints, self.targets.genes, self.targets.values)

    def finish(self, model: FittedModel, key: str, gene_key: str | None, table_added: str | None, **how: Any) -> None:
        """Predict all rows, and write everything that belongs to the model."""
        predicted = predict_rows(model, self.inputs, self.slide.n_obs, self.device, **how)
        encoded = self.inputs.encoded if isinstance(self.inputs, Features) else None
        write_predictions(
            self.slide,
            key,
            model,
            predicted,
            columns=find_genes(self.slide.table, model.genes, gene_key),
            train=self.slide.mask(self.targets.rows),
            encoded=encoded,
            afresh=True,
            table_added=table_added,
        )


@contextmanager
def start_fit(
    data: SpatialData | AnnData,
    elements: Elements,
    reads: Reads,
    *,
    genes: Genes,
    gene_key: str | None,
    train_key: str | None,
    layer: str | None,
    min_spots: int,
    key_added: str,
    table_added: str | None,
    inplace: bool,
    device: str,
    store: str | os.PathLike[str] | None = None,
) -> Iterator[Fit]:
    """Check and read the arguments that all fit functions share, as :func:`stpredict.tl.fit_nsl` documents them.

    Parameters
    ----------
    data, elements
        Where to read.
    reads
        What the model reads.
    genes, gene_key, train_key, layer
        What it is fitted to.
    min_spots
        Training spots that it needs.
    key_added, table_added, inplace
        Where results will go, and whether they will.
    device
        Where to compute.
    store
        Folder that keeps patches.
    """
    from stpredict.models._device import resolve_device

    device = resolve_device(device)
    slide = open_slide(data, elements, images=needs_image(reads))
    if inplace:
        check_free(slide, key_added, table_added, encodes=isinstance(reads, FeatureReads) and reads.encoder is not None)
    training = training_mask(slide.table, train_key)
    if n_beside := int((training & slide.mask(slide.rows) & ~slide.in_tissue).sum()):
        logg.info(f"{n_beside} training spots lie beside the tissue (`obs['in_tissue']`) and are left out.")
    usable = np.flatnonzero(training & slide.on_image & slide.in_tissue)
    targets = read_targets(slide.table, usable, genes=genes, gene_key=gene_key, layer=layer, min_spots=min_spots)
    with read_inputs(slide, reads, device=device, store=store, training=targets.rows) as inputs:
        if isinstance(inputs, Features):
            reads = FeatureReads(inputs.sources, reads.encoder)  # type: ignore[union-attr]
        known = np.isin(targets.rows, inputs.rows)
        if not known.all():
            _check_any_known(inputs, targets.rows, known)
            check_enough(int(known.sum()), min_spots)
            targets = read_targets(
                slide.table, targets.rows[known], genes=genes, gene_key=gene_key, layer=layer, min_spots=min_spots
            )
        if n_left_out := int(training.sum()) - len(targets.rows) - n_beside:
            logg.info(f"{n_left_out} training spots lack a spot, pixels or a feature and are left out.")
        yield Fit(slide, reads, inputs, targets, device, _fitted_to(slide, layer, train_key, len(targets.rows)))


def _fitted_to(slide: Slide, layer: str | None, train_key: str | None, n_train: int) -> dict[str, Any]:
    return {
        "layer": "X" if layer is None else layer,
        "transform": "log1p" if layer is None and "log1p" in slide.table.uns else "unknown",
        "train_key": "" if train_key is None else train_key,
        "n_train": n_train,
        "images": {section.name: section.image_key for section in slide.sections},
        "stpredict_version": version("stpredict-histology"),
        "torch_version": version("torch"),
    }


def _check_any_known(inputs: Inputs, rows: np.ndarray, known: np.ndarray) -> None:
    if known.any() or not isinstance(inputs, Features):
        return
    missing, first = [], 0
    for name, source in inputs.sources.items():
        block = inputs.values[rows, first : first + source["n_features"]]
        missing.append(f"{name!r} in {(~np.isfinite(block).all(axis=1)).sum()}")
        first += source["n_features"]
    raise ValueError(
        f"None of the {len(rows)} training spots has all features; missing (NaN) are {', '.join(missing)} of them. "
        "Leave such features or columns out."
    )
