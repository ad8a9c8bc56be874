from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import scanpy as sc
import squidpy as sq
from spatialdata import SpatialData
from spatialdata.transformations import Translation, set_transformation

import stpredict as stp

MakeSData = Callable[..., SpatialData]
GENES = ["gene1", "gene4", "gene6"]


@pytest.fixture
def sdata(make_sdata: MakeSData) -> SpatialData:
    """Two sections with predictions of three genes, some spots of the second off the image."""
    sdata = make_sdata(2, n_spots=16, n_genes=8)
    set_transformation(sdata["B_spots"], Translation([150, 0], axes=("x", "y")), "B")
    sdata["table"].var["symbol"] = [f"G{j}" for j in range(8)]
    stp.tl.fit_nsl(sdata, genes=GENES)
    return sdata


def test_modeled_genes_of_predicted_spots(sdata: SpatialData, log: io.StringIO) -> None:
    table = sdata["table"]
    predicted = stp.get.predictions(sdata)
    known = np.isfinite(table.layers["nsl"]).any(axis=1)
    assert 16 < known.sum() < 32
    assert f"{(~known).sum()} of 32 spots have no prediction" in log.getvalue()
    assert predicted.var_names.tolist() == GENES
    np.testing.assert_array_equal(predicted.X, table[known, GENES].layers["nsl"])
    assert predicted.X.dtype == np.float32
    assert predicted.obs.equals(table.obs[known])
    assert predicted.var.equals(table.var.loc[GENES])
    np.testing.assert_array_equal(predicted.obsm["spatial"], table.obsm["spatial"][known])
    assert predicted.uns["nsl"]["genes"].tolist() == GENES
    np.testing.assert_array_equal(stp.get.predictions(table, "nsl").X, predicted.X)

    predicted.X[:] = 0
    predicted.obs["section"] = "other"
    assert (table.layers["nsl"][known] != 0).any()  # it is a copy
    assert set(table.obs["section"]) == {"A", "B"}


def test_ready_for_scanpy_and_squidpy(sdata: SpatialData) -> None:
    predicted = stp.get.predictions(sdata)
    sc.pp.pca(predicted, n_comps=2)
    sq.gr.spatial_neighbors(predicted, coord_type="generic", n_neighs=4)
    assert predicted.obsm["X_pca"].shape == (predicted.n_obs, 2)
    assert predicted.obsp["spatial_connectivities"].sum() > 0


def test_genes_of_some_sections_only(sdata: SpatialData, log: io.StringIO) -> None:
    model = stp.tl.fit_nsl(sdata, genes=["gene4", "gene7"], inplace=False)
    stp.tl.predict(sdata, model, shapes_key="A_spots")
    predicted = stp.get.predictions(sdata)
    assert predicted.var_names.tolist() == ["gene4"]
    assert "3 genes are predicted for some of the spots only" in log.getvalue()


def test_a_table_of_its_own(make_sdata: MakeSData) -> None:
    sdata = make_sdata(n_spots=16, n_genes=8)
    stp.tl.fit_nsl(sdata, genes=GENES, table_added="predicted")
    with pytest.raises(ValueError, match="`table_key`"):
        stp.get.predictions(sdata)
    taken = stp.get.predictions(sdata, table_key="predicted")
    np.testing.assert_array_equal(taken.X, sdata["predicted"].X)


def test_what_is_not_there(sdata: SpatialData) -> None:
    with pytest.raises(KeyError, match=r"No predictions 'ridge' in `layers`; it has \['nsl'\]. Predict first"):
        stp.get.predictions(sdata, "ridge")
    with pytest.raises(KeyError, match="No table 'other'"):
        stp.get.predictions(sdata, table_key="other")
    sdata["table"].layers["nsl"][:] = np.nan
    with pytest.raises(ValueError, match=r"`layers\['nsl'\]` is NaN everywhere"):
        stp.get.predictions(sdata)
