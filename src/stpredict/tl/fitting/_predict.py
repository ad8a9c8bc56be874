"""Apply a fitted model to any SpatialData."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from stpredict._data import slots
from stpredict._data.slide import Section, read_sections, read_table
from stpredict.pp._features import Encoder, needs_image, read_features, write_made
from stpredict.pp._histogram import cached_color_histogram
from stpredict.pp._patches import extract
from stpredict.tl.fitting._fit_m2ost import write_m2ost
from stpredict.tl.fitting._fit_nsl import color_fractions, write_nsl
from stpredict.tl.fitting._fit_ridge import write_ridge

if TYPE_CHECKING:
    from stpredict.models import M2OST, NSL, Ridge


def predict(
    sdata: SpatialData,
    model: NSL | M2OST | Ridge,
    *,
    encoder: Encoder | None = None,
    key_added: str | None = None,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | Sequence[str] | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    device: str = "auto",
) -> None:
    """Predict expression with a fitted model.

    A slide without any table gets one: ``sdata["table"]`` (or ``table_key``), a row for each spot and a column for each
    gene of the model, without ``X``.

    Parameters
    ----------
    sdata
        Images and spots, as for the ``fit`` functions; expression is not looked at. For a model of
        :func:`stpredict.tl.fit_ridge` also the features of ``obsm`` that it was fitted to.
    model
        What a ``fit`` function returned or :func:`stpredict.models.load` read.
    encoder
        The encoder that :func:`stpredict.tl.fit_ridge` was given; it is not saved with the model. `None` for all other
        models.
    key_added
        Where the results go. `None` means the kind of the model, such as ``"nsl"``.
    image_key, shapes_key, table_key, coordinate_system
        Which elements to use, as in :func:`stpredict.pp.color_histogram`. `None` finds them.
    device
        ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:<number>"``.

    Returns
    -------
    `None`. Written to the table: the slots of the ``fit`` function that made the model. Genes of the model that the table lacks are
    left out, and counted in the log.

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
    from stpredict.models import M2OST, NSL, Ridge
    from stpredict.models._device import resolve_device

    if not isinstance(model, NSL | M2OST | Ridge):
        raise TypeError(f"Expected a fitted model, got {type(model).__name__}; load one with `stp.models.load(path)`.")
    if encoder is not None and not isinstance(model, Ridge):
        raise ValueError(f"`encoder` is given, but a model of kind {model.kind!r} reads no encoder's features.")
    device = resolve_device(device)
    key = model.kind if key_added is None else key_added
    new_table = isinstance(sdata, SpatialData) and not len(sdata.tables)
    if new_table:
        table_key = table_key or "table"
        slots.check_new_table(sdata, table_key)
        sections = read_sections(
            sdata, None, image_key=image_key, shapes_key=shapes_key, coordinate_system=coordinate_system
        )
        table = slots.empty_table(sections, model.genes)
    else:
        _, table = read_table(sdata, table_key)
        sections = []
        if not isinstance(model, Ridge) or needs_image(model.params["features"]):
            sections = read_sections(
                sdata, table, image_key=image_key, shapes_key=shapes_key, coordinate_system=coordinate_system
            )
    slots.check_key(table, key)
    slots.check_overlap(table, model.genes)
    if isinstance(model, NSL):
        _predict_nsl(sections, table, key, model, device)
    elif isinstance(model, M2OST):
        _predict_m2ost(sections, table, key, model, device)
    else:
        if encoder is not None:
            slots.check_features_key(table, key)
        read = read_features(
            sdata,
            table,
            sections,
            model.params["features"],
            encoder=encoder,
            shapes_key=shapes_key,
            device=device,
        )
        predicted = model.predict(read.values)
        write_made(table, key, read.made)
        write_ridge(table, key, model, predicted, read.known)
    if new_table:
        sdata[table_key] = table


def _predict_nsl(sections: Sequence[Section], table: AnnData, key: str, model: NSL, device: str) -> None:
    bits, spot_scale = int(model.params["bits"]), float(model.params["spot_scale"])
    histogram = cached_color_histogram(sections, table, bits=bits, spot_scale=spot_scale)
    predicted = model.predict(color_fractions(histogram), histogram.od, device=device)
    slots.write_color_histogram(table, histogram)
    write_nsl(table, key, model, predicted, histogram.n_pixels > 0)


def _predict_m2ost(sections: Sequence[Section], table: AnnData, key: str, model: M2OST, device: str) -> None:
    config = model.network.config
    predicted = np.full((table.n_obs, len(model.genes)), np.nan, dtype=np.float32)
    with extract(
        sections, levels=config["levels"], image_size=config["image_size"], spot_scale=float(model.params["spot_scale"])
    ) as patches:
        predicted[patches.rows] = model.predict(patches, device=device)
    write_m2ost(table, key, model, predicted)
