"""Predictions as a table of their own."""

from __future__ import annotations

import numpy as np
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData

from stpredict._data.elements import Elements
from stpredict._data.provenance import read_predictions
from stpredict._data.slide import find_table


def predictions(sdata: SpatialData | AnnData, key: str = "nsl", *, table_key: str | None = None) -> AnnData:
    """Take predictions out of a table, ready for scanpy and squidpy.

    Parameters
    ----------
    sdata
        A SpatialData, or its table.
    key
        Predictions, a key of ``layers``.
    table_key
        Key in ``sdata.tables``. `None` takes the only one that annotates spots.

    Returns
    -------
    A copy: the spots that have predictions, the genes that have predictions on all of them, ``X`` the predictions (float32, no
    NaN). It has the ``obs`` and ``var`` of the table, ``obsm["spatial"]`` where there is one, and what ``uns[key]`` tells of the
    model.

    Raises
    ------
    KeyError
        There are no such predictions or no such table.
    ValueError
        All predictions are NaN.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> model = stp.tl.fit_nsl(sdata, genes=5)
    >>> predicted = stp.get.predictions(sdata, "nsl")
    >>> predicted.n_vars
    5
    """
    table = find_table(sdata, Elements(table_key=table_key))
    values = np.asarray(read_predictions(table, key))
    known = np.isfinite(values)
    rows = np.flatnonzero(known.any(axis=1))
    if not len(rows):
        raise ValueError(f"`layers[{key!r}]` is NaN everywhere: there is no prediction.")
    columns = np.flatnonzero(known[rows].all(axis=0))
    if n_partial := int(known.any(axis=0).sum()) - len(columns):
        logg.warning(f"{n_partial} genes are predicted for some of the spots only, and are left out.")
    if n_without := table.n_obs - len(rows):
        logg.info(f"{n_without} of {table.n_obs} spots have no prediction and are left out.")
    return AnnData(
        X=values[np.ix_(rows, columns)].astype(np.float32),
        obs=table.obs.iloc[rows].copy(),
        var=table.var.iloc[columns].copy(),
        obsm={name: np.asarray(table.obsm[name])[rows] for name in ("spatial",) if name in table.obsm},
        uns={name: table.uns[name] for name in (key, "log1p") if name in table.uns},
    )
