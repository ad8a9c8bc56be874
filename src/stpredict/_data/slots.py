"""Results -> table: the only place that writes layers, uns, obs, obsm and var."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData
from spatialdata.models import TableModel

if TYPE_CHECKING:
    from stpredict._data.slide import Section
    from stpredict.pp._histogram import ColorHistogram
    from stpredict.pp._statistics import ColorStatistics

_HISTOGRAM, _STATISTICS = "color_histogram", "color_statistics"


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
    if key in (_HISTOGRAM, _STATISTICS, TableModel.ATTRS_KEY):
        raise ValueError(f"`key_added` is {key!r}, which is taken; choose another.")
    ours = _is_model(table, key)
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


def _is_model(table: AnnData, key: str) -> bool:
    """Whether a model of this package wrote under a key."""
    return isinstance(table.uns.get(key), Mapping) and "model" in table.uns[key].get("params", {})


def check_features_key(table: AnnData, key: str) -> None:
    """Refuse a key under which an encoder's features would replace something that no model of this package wrote."""
    if f"{key}_features" in table.obsm and not _is_model(table, key):
        raise ValueError(
            f"`obsm['{key}_features']` exists and holds no features of a model; choose another `key_added`, or delete it."
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


def write_features(table: AnnData, key: str, features: np.ndarray) -> None:
    """Store the features that an encoder made for a model, ``(n_obs, d)``."""
    table.obsm[f"{key}_features"] = features


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


def write_color_statistics(table: AnnData, statistics: ColorStatistics) -> None:
    """Store statistics of all rows, and what they were made of."""
    table.obsm[_STATISTICS] = statistics.values
    table.uns[_STATISTICS] = {"names": np.array(statistics.names, dtype=object), **statistics.made_of}


def read_color_statistics(table: AnnData, made_of: dict[str, Any]) -> np.ndarray | None:
    """The stored statistics, if they were made of the very same images and places."""
    stored = table.uns.get(_STATISTICS)
    if stored is None or _STATISTICS not in table.obsm:
        return None
    if not _same({key: value for key, value in stored.items() if key != "names"}, made_of):
        return None
    return table.obsm[_STATISTICS]


def _same(a: Any, b: Any) -> bool:
    """Equality of nested dicts of arrays, as they come back from h5ad and zarr."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(np.array_equal(a, b))


_OF_GENES = (
    "pcc",
    "pcc_pooled",
    "pcc_low",
    "pcc_high",
    "spearman",
    "rmse",
    "mae",
    "r2",
    "variance_ratio",
    "moran_measured",
    "moran_predicted",
    "pvals",
    "pvals_adj",
    "predictable",
    "pcc_of_ceiling",
)
_OF_SPOTS = ("pcc", "rmse")


def check_scores_key(table: AnnData, key: str) -> None:
    """Refuse a key under which scores could not be written, or would hide something else.

    Raises
    ------
    TypeError
        Not a string.
    ValueError
        AnnData or SpatialData could not store it, or columns of that name are no scores of this package.
    """
    if not isinstance(key, str):
        raise TypeError(f"`key_added` is {key!r}; expected a string.")
    if not _storable(key):
        raise ValueError(f"`key_added` is {key!r}, which cannot be stored on disk: {_STORABLE}")
    if f"{key}_score" in table.uns:
        return
    for slot, frame, names in (("var", table.var, _OF_GENES), ("obs", table.obs, _OF_SPOTS)):
        if taken := [f"{key}_{name}" for name in names if f"{key}_{name}" in frame]:
            raise ValueError(
                f"`{slot}[{taken[0]!r}]` exists and is no score that was written here; choose another `key_added`, or "
                "delete it."
            )


def write_scores(
    table: AnnData,
    key: str,
    of_genes: Mapping[str, np.ndarray],
    of_spots: Mapping[str, np.ndarray],
    made_of: dict[str, Any],
) -> None:
    """Write scores to columns of ``var`` and ``obs`` instead of those that are there, and how they were made to ``uns``.

    Parameters
    ----------
    table
        Receives ``var[f"{key}_{name}"]``, ``obs[f"{key}_{name}"]`` and ``uns[f"{key}_score"]``.
    key
        Checked with :func:`check_scores_key`.
    of_genes, of_spots
        Columns by name, ``(n_vars,)`` and ``(n_obs,)``.
    made_of
        Settings and summary.
    """
    for frame, names, columns in ((table.var, _OF_GENES, of_genes), (table.obs, _OF_SPOTS, of_spots)):
        frame.drop(columns=[f"{key}_{name}" for name in names], errors="ignore", inplace=True)
        for name, values in columns.items():
            frame[f"{key}_{name}"] = values
    table.uns[f"{key}_score"] = made_of


_CEILING = "noise_ceiling"


class Halves(NamedTuple):
    """PCC of the halves of the counts of genes in sections, and its standard error; ``(S, G)`` each, NaN where not known."""

    pcc: np.ndarray
    error: np.ndarray


def write_noise_ceiling(
    table: AnnData, key: str, genes: Sequence[str], ceiling: np.ndarray, error: np.ndarray, made_of: dict[str, Any]
) -> None:
    """Write ceilings of genes over all sections, and what they were made of.

    Parameters
    ----------
    table
        Receives ``var[key]``, ``var[f"{key}_error"]`` and ``uns[key]``.
    key
        Checked with :func:`check_noise_ceiling_key`.
    genes
        ``G`` names.
    ceiling, error
        ``(G,)`` each.
    made_of
        Goes into ``uns[key]`` beside ``genes``: ``sections`` (S names), ``halves_pcc`` and ``halves_error`` (S x G), and more.
    """
    columns = table.var_names.get_indexer(list(genes))
    for name, values in ((key, ceiling), (f"{key}_error", error)):
        column = np.full(table.n_vars, np.nan)
        column[columns] = values
        table.var[name] = column
    table.uns[key] = {"genes": np.array(genes, dtype=object), **made_of}


def check_noise_ceiling_key(table: AnnData, key: str) -> None:
    """Refuse a key under which ceilings could not be written, or would hide something else."""
    if not isinstance(key, str):
        raise TypeError(f"`key_added` is {key!r}; expected a string.")
    if not _storable(key):
        raise ValueError(f"`key_added` is {key!r}, which cannot be stored on disk: {_STORABLE}")
    ours = isinstance(table.uns.get(key), Mapping) and "halves_pcc" in table.uns[key]
    for slot, content, name in (
        ("uns", table.uns, key),
        ("var", table.var, key),
        ("var", table.var, f"{key}_error"),
    ):
        if name in content and not ours:
            raise ValueError(
                f"`{slot}[{name!r}]` exists and is no noise ceiling; choose another `key_added`, or delete it."
            )


def read_noise_ceiling(table: AnnData, genes: Sequence[str], sections: Sequence[str]) -> Halves | None:
    """What is stored of genes in sections, if there is anything; :func:`stpredict.tl.evaluation.runs._noise_ceiling.ceiling` makes ceilings of it."""
    stored = table.uns.get(_CEILING)
    if not isinstance(stored, Mapping) or "halves_pcc" not in stored:
        return None
    rows = pd.Index(stored["sections"]).get_indexer(pd.Index(sections))
    columns = pd.Index(stored["genes"]).get_indexer(pd.Index(genes))
    known = (rows[:, None] >= 0) & (columns >= 0)
    if not known.any():
        return None
    pcc, error = (
        np.where(known, np.asarray(stored[name])[np.ix_(rows, columns)], np.nan)
        for name in ("halves_pcc", "halves_error")
    )
    return Halves(pcc, error)


def write_folds(table: AnnData, key: str, folds: Mapping[str, np.ndarray]) -> None:
    """Write into ``obs[key]`` the name of the fold, ``(n_obs,)`` masks, that holds a row out."""
    names = np.full(table.n_obs, None, dtype=object)
    for name, held_out in folds.items():
        names[held_out] = name
    table.obs[key] = pd.Categorical(names, categories=list(folds))
