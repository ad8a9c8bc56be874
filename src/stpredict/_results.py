"""Results -> table: the only place that writes layers, uns, obs, obsm and var."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData
from spatialdata.models import TableModel

if TYPE_CHECKING:
    from stpredict._sdata import Section
    from stpredict.pp._color_histogram import ColorHistogram

_HISTOGRAM = "color_histogram"


_STORABLE = "use letters, digits, '_', '-' and '.', not beginning with '__'."


def _storable(key: str) -> bool:
    """Whether SpatialData takes a name, and AnnData can write it."""
    return (
        bool(key)
        and key not in (".", "..")
        and not key.startswith("__")
        and all(c.isalnum() or c in "_-." for c in key)
    )


def check_key(table: AnnData, key: str) -> None:
    """Refuse a key under which results could not be written, or would hide something else.

    Raises
    ------
    TypeError
        Not a string.
    ValueError
        AnnData or SpatialData could not store it, or it belongs to something that no model of this package wrote.
    """
    if not isinstance(key, str):
        raise TypeError(f"`key_added` is {key!r}; expected a string.")
    if not _storable(key):
        raise ValueError(f"`key_added` is {key!r}, which cannot be stored on disk: {_STORABLE}")
    if key in (_HISTOGRAM, TableModel.ATTRS_KEY):
        raise ValueError(f"`key_added` is {key!r}, which is taken; choose another.")
    ours = isinstance(table.uns.get(key), Mapping) and "model" in table.uns[key].get("params", {})
    slots = (("layers", table.layers, key), ("uns", table.uns, key), ("var", table.var, f"{key}_fitted"))
    for slot, content, name in slots:
        if twins := [other for other in content if other != name and other.casefold() == name.casefold()]:
            raise ValueError(
                f"`key_added` {key!r} would make `{slot}[{name!r}]`, which differs from `{slot}[{twins[0]!r}]` only in "
                "case; choose another."
            )
        if name in content and not ours:
            raise ValueError(
                f"`{slot}[{name!r}]` exists and holds no predictions of a model; choose another `key_added`, or delete it."
            )


def check_overlap(table: AnnData, genes: Sequence[str]) -> None:
    """Refuse a table that has none of a model's genes, and log when some are missing."""
    found = table.var_names.isin(genes).sum()
    if found == 0:
        raise ValueError(
            f"The table has none of the model's {len(genes)} genes (such as {list(genes[:5])}; the table has genes "
            f"such as {list(table.var_names[:5])}). Are these the same kind of gene names?"
        )
    if found < len(genes):
        logg.warning(f"The table lacks {len(genes) - found} of the model's {len(genes)} genes: not predicted.")


def check_new_table(sdata: SpatialData, key: str) -> None:
    """Refuse a name that SpatialData would not take for a table."""
    names = [name for _, name, _ in sdata.gen_elements()]
    if twins := [name for name in names if name.casefold() == key.casefold()]:
        raise ValueError(f"`table_key` is {key!r}, but there is an element {twins[0]!r} already; choose another.")
    if not _storable(key):
        raise ValueError(f"`table_key` is {key!r}, which cannot be stored on disk: {_STORABLE}")


def empty_table(sections: Sequence[Section], genes: Sequence[str]) -> AnnData:
    """A table without expression for spots that no table annotates; fills in the sections' rows."""
    obs = pd.concat(
        [
            pd.DataFrame(
                {"region": section.name, "instance_id": section.instances}, index=section.instances.astype(str)
            )
            for section in sections
        ]
    )
    if not obs.index.is_unique:
        obs.index = obs["region"].astype(str) + "_" + obs.index
    obs["region"] = obs["region"].astype("category")
    table = AnnData(obs=obs, var=pd.DataFrame(index=list(genes)))
    return TableModel.parse(
        table, region=[section.name for section in sections], region_key="region", instance_key="instance_id"
    )


def write_predictions(
    table: AnnData, key: str, genes: Sequence[str], predicted: np.ndarray, learned: dict[str, Any]
) -> None:
    """Write predictions of a model's genes for all rows, and what the model learned.

    Parameters
    ----------
    table
        Receives ``layers[key]``, ``var[f"{key}_fitted"]`` and ``uns[key]``.
    key
        Checked with :func:`check_key`.
    genes
        ``G`` names; those that the table lacks are left out.
    predicted
        ``(n_obs, G)``, NaN where nothing was predicted.
    learned
        Goes into ``uns[key]`` beside ``genes``.
    """
    columns = table.var_names.get_indexer(list(genes))
    layer = np.full(table.shape, np.nan, dtype=np.float32)
    layer[:, columns[columns >= 0]] = predicted[:, columns >= 0]
    table.layers[key] = layer
    table.var[f"{key}_fitted"] = table.var_names.isin(genes)
    # Copies: editing the table must not edit the model.
    table.uns[key] = {"genes": np.array(genes, dtype=object), **copy.deepcopy(learned)}


def write_color_histogram(table: AnnData, histogram: ColorHistogram) -> None:
    """Store a histogram of all rows, and what it was made of."""
    table.obsm[_HISTOGRAM] = histogram.counts
    table.obsm["mean_od"] = histogram.mean_od
    table.obsm["color_field"] = histogram.fields
    table.obs["n_pixels"] = histogram.n_pixels
    table.obs["coverage"] = histogram.coverage
    table.uns[_HISTOGRAM] = {"codebook": histogram.codebook, **histogram.made_of}


def read_color_histogram(table: AnnData, fields: np.ndarray, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """The stored histogram, if it was made of the very same images and places."""
    stored = table.uns.get(_HISTOGRAM)
    parts = (_HISTOGRAM, "mean_od", "color_field")
    if stored is None or "coverage" not in table.obs or not all(key in table.obsm for key in parts):
        return None
    if not np.array_equal(table.obsm["color_field"], fields, equal_nan=True):
        return None
    if not _same({key: value for key, value in stored.items() if key != "codebook"}, made_of):
        return None
    return {
        "counts": table.obsm[_HISTOGRAM],
        "codebook": stored["codebook"],
        "mean_od": table.obsm["mean_od"],
        "coverage": table.obs["coverage"].to_numpy(),
        "fields": fields,
        "made_of": made_of,
    }


def _same(a: Any, b: Any) -> bool:
    """Equality of nested dicts of arrays, as they come back from h5ad and zarr."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(np.array_equal(a, b))
