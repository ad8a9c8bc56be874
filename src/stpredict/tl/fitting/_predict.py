"""Apply a fitted model to any SpatialData."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData
from spatialdata.models import TableModel

from stpredict._data.elements import Elements
from stpredict._data.genes import find_genes, report_overlap
from stpredict._data.messages import listed
from stpredict._data.slide import (
    Slide,
    check_spatialdata,
    is_for_predictions,
    open_slide,
    open_without_table,
    with_more_genes,
)
from stpredict._data.slots import check_name, check_new_table
from stpredict.pp._encode import Encoder
from stpredict.pp._features import FeatureReads, Features
from stpredict.pp._reads import Inputs, needs_image, read_inputs, reads_of
from stpredict.tl.fitting._finish import check_free, predict_rows, write_predictions

if TYPE_CHECKING:
    from stpredict.models import FittedModel


def predict(
    sdata: SpatialData,
    model: FittedModel,
    *,
    encoder: Encoder | None = None,
    gene_key: str | None = None,
    key_added: str | None = None,
    table_added: str | None = None,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | Sequence[str] | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    device: str = "auto",
) -> None:
    """Predict expression with a fitted model.

    Where no table has the model's genes, the spots get one: a row for each spot and a column for each gene of the model,
    without ``X``. Such a table takes the genes of further models, too.

    Parameters
    ----------
    sdata
        Images and spots, as for the ``fit`` functions; expression is not looked at. For a model of
        :func:`stpredict.tl.fit_ridge` also the features that it was fitted to.
    model
        What a ``fit`` function returned or :func:`stpredict.models.load` read.
    encoder
        The encoder that :func:`stpredict.tl.fit_ridge` was given; it is not saved with the model. `None` for all other
        models.
    gene_key
        Column of ``var`` that names genes as the model does. `None` means ``var_names``. Versions of Ensembl ids do not
        matter.
    key_added
        What the results are named after. `None` means the kind of the model, such as ``"nsl"``.
    table_added
        Write a new table of the model's genes alone, under this key, instead of a layer of all genes; its ``X`` holds the
        predictions too. It has a row for each spot that the table has, or for each spot if there is no table.
    image_key, shapes_key, coordinate_system
        Which elements to use, as in :func:`stpredict.pp.color_histogram`. `None` finds them.
    table_key
        The table to write into; one that does not exist is made. `None` takes the only one that annotates the spots and has
        genes of the model, else makes ``"table"``, or ``"predictions"`` beside others.
    device
        ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:<number>"``.

    Returns
    -------
    `None`. Written to the table: the slots of the ``fit`` function that made the model. Rows of spots that were not asked for
    (``shapes_key``) keep the predictions that they have. ``obs[f"{key}_train"]`` marks spots that show what a training
    spot of the model shows. Genes of the model that the table lacks are left out, and counted in the log.

    Raises
    ------
    KeyError, TypeError, ValueError
        Elements that do not fit, or no gene in common; ``sdata`` is then unchanged.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> model = stp.tl.fit_nsl(sdata)
    >>> new = stp.datasets.synthetic(n_spots=50, random_state=1)
    >>> stp.tl.predict(new, model)
    >>> "nsl" in new["table"].layers
    True
    """
    from stpredict.models import FittedModel
    from stpredict.models._device import resolve_device

    if not isinstance(model, FittedModel):
        raise TypeError(f"Expected a fitted model, got {type(model).__name__}; load one with `stp.models.load(path)`.")
    reads = reads_of(model.reads, encoder)
    device = resolve_device(device)
    key = model.kind if key_added is None else key_added
    check_name(key, "key_added")
    elements = Elements(
        image_key=image_key, shapes_key=shapes_key, table_key=table_key, coordinate_system=coordinate_system
    )
    slide = _open(sdata, model, elements, gene_key, images=needs_image(reads))
    if table_added is None:
        slide = with_more_genes(slide, model.genes)
        columns = find_genes(slide.table, model.genes, gene_key)
        report_overlap(slide.table, model.genes, columns)
    else:
        columns = np.arange(len(model.genes))
    encodes = isinstance(reads, FeatureReads) and reads.encoder is not None
    check_free(slide, key, table_added, encodes=encodes)
    with read_inputs(slide, reads, device=device) as inputs:
        write_predictions(
            slide,
            key,
            model,
            predict_rows(model, inputs, slide.n_obs, device),
            columns=columns,
            train=_seen(slide, model, inputs),
            encoded=inputs.encoded if isinstance(inputs, Features) else None,
            afresh=False,
            table_added=table_added,
        )


def _open(sdata: SpatialData, model: FittedModel, elements: Elements, gene_key: str | None, *, images: bool) -> Slide:
    """The table to write into, or a new one."""
    check_spatialdata(sdata)
    wanted = elements.table_key
    if wanted is not None and wanted in sdata.tables:
        return open_slide(sdata, elements, images=images)
    if wanted is None:
        chosen = set(elements.chosen_spots or sdata.shapes)
        annotating = {
            key: table
            for key, table in sdata.tables.items()
            if TableModel.ATTRS_KEY in table.uns
            and chosen.intersection(np.atleast_1d(table.uns[TableModel.ATTRS_KEY][TableModel.REGION_KEY]))
        }
        usable = [
            key
            for key, table in annotating.items()
            if is_for_predictions(table) or (find_genes(table, model.genes, _column(table, gene_key)) >= 0).any()
        ]
        if len(usable) > 1:
            raise ValueError(f"Several tables have genes of the model, {listed(usable)}. Choose one with `table_key`.")
        if usable:
            return open_slide(sdata, replace(elements, table_key=usable[0]), images=images)
        wanted = "predictions" if len(sdata.tables) else "table"
        if annotating:
            logg.warning(
                f"None of the tables {listed(annotating)} has a gene of the model (such as {listed(model.genes[:3])}): "
                f"predictions go to a new table {wanted!r}. If they name genes otherwise, name a column of `var` with "
                "`gene_key`."
            )
        elif sdata.tables:
            logg.warning(
                f"None of the tables {listed(sdata.tables)} says that it annotates the spots (`uns['spatialdata_attrs']`): "
                f"predictions go to a new table {wanted!r}."
            )
    check_new_table(sdata, wanted, "table_key")
    return open_without_table(sdata, elements, wanted, model.genes, images=images)


def _column(table: AnnData, gene_key: str | None) -> str | None:
    return gene_key if gene_key in table.var else None


def _seen(slide: Slide, model: FittedModel, inputs: Inputs) -> np.ndarray | None:
    """``(n_obs,)`` rows that show what a training spot showed; `None` if the model does not know what it was fitted to."""
    if not len(model.seen):
        return None
    return slide.mask(inputs.rows[np.isin(inputs.fingerprints(), model.seen)])
