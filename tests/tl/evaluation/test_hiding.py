from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from spatialdata import SpatialData

import stpredict as stp
from stpredict._data.elements import Elements
from stpredict._data.slide import open_slide
from stpredict.tl.evaluation.runs._folds import Fold
from stpredict.tl.evaluation.runs._hiding import FoldData, bare_copy, fold_data, free_key, visible_copy
from stpredict.tl.evaluation.runs._protocols import PROTOCOLS, read_counts

TRAIN = np.arange(60) < 40
TEST = np.arange(60) >= 45
FOLD = Fold("last", TRAIN, TEST)


@pytest.fixture
def counts() -> sp.csr_matrix:
    rng = np.random.default_rng(0)
    values = rng.negative_binomial(2, 2 / (2 + rng.uniform(1, 9, 80)), (60, 80)).astype(np.float32)
    values[:, 3] = 0
    values[~TRAIN, 3] = 1000  # constant, and nothing, where it may be looked at
    values[TRAIN, 7] = 50  # constant and highest
    return sp.csr_matrix(values)


@pytest.fixture
def table(counts: sp.csr_matrix) -> ad.AnnData:
    var = pd.DataFrame({"panel": np.arange(80) < 12}, index=[f"gene{j}" for j in range(80)])
    return ad.AnnData(counts.log1p(), var=var, layers={"counts": counts})


def make(table: ad.AnnData, genes: Any = None, protocol: str = "default") -> FoldData:
    plan = PROTOCOLS[protocol]
    counts = table.layers["counts"] if plan.needs_counts else None
    return fold_data(table, table.X, counts, FOLD, genes, plan)


def test_hidden_rows_are_nan_in_modeled_genes_and_empty_elsewhere(table: ad.AnnData) -> None:
    data = make(table, "panel")
    visible = data.visible.toarray()
    names = list(table.var_names[data.columns])
    assert names == [f"gene{j}" for j in range(12) if j not in (3, 7)]
    np.testing.assert_array_equal(visible[TRAIN], table.X.toarray()[TRAIN])
    assert np.isnan(visible[~TRAIN][:, data.columns]).all()
    assert not visible[~TRAIN][:, 12:].any()
    np.testing.assert_array_equal(data.measured, table.X.toarray()[TEST][:, data.columns])
    assert data.measured.dtype == np.float32


def test_genes_are_chosen_on_training_rows(table: ad.AnnData) -> None:
    mean = table.X.toarray()[TRAIN].mean(axis=0)
    highest = np.sort(np.argsort(-mean)[:6])
    np.testing.assert_array_equal(make(table, 6).columns, highest[highest != 7])
    detected = (table.X.toarray()[TRAIN] > 0).mean(axis=0) >= 0.1
    detected[7] = False
    np.testing.assert_array_equal(make(table).columns, np.flatnonzero(detected))


def test_variable_genes_are_those_of_training_rows(table: ad.AnnData) -> None:
    changed = table.copy()
    changed.X[~TRAIN] = changed.X[~TRAIN][:, ::-1]
    a, b = make(table), make(changed)
    assert a.variable.sum() == 50 < len(a.columns)
    np.testing.assert_array_equal(a.variable, b.variable)
    assert make(table, ["gene0", "gene5"]).variable.all()


def test_counts_per_million_of_the_panel(table: ad.AnnData, counts: sp.csr_matrix) -> None:
    data = make(table, 10, "m2ost")
    panel = counts.toarray()[:, data.columns]
    # The gene that is constant in counts is not when it is a share of the panel's.
    assert len(data.columns) == 10
    expected = np.log1p(panel / panel.sum(axis=1, keepdims=True) * 1e6)
    np.testing.assert_allclose(data.measured, expected[TEST], rtol=1e-6)
    np.testing.assert_allclose(data.visible[:40][:, data.columns].toarray(), expected[TRAIN], rtol=1e-6)


def test_panels_of_the_protocols(table: ad.AnnData, counts: sp.csr_matrix) -> None:
    assert len(make(table, None, "m2ost").columns) == 79  # of 250 at most, without the empty one
    hest = make(table, None, "hest")
    assert len(hest.columns) == 50
    np.testing.assert_allclose(hest.measured, np.log1p(counts.toarray()[TEST][:, hest.columns]), rtol=1e-6)


def test_protocols_that_need_counts(table: ad.AnnData) -> None:
    del table.layers["counts"]
    with pytest.raises(
        KeyError, match=r"'hest' starts from counts, but there is no layer 'counts'; the table has \[\]"
    ):
        read_counts(table, "counts", "hest")


def test_no_gene_is_left(table: ad.AnnData) -> None:
    with pytest.raises(ValueError, match="No gene is left to model in fold 'last': all of `genes` are constant"):
        make(table, ["gene3", "gene7"])


def test_what_a_model_gets_to_see(make_sdata: Callable[..., SpatialData]) -> None:
    sdata = make_sdata(2, n_spots=16, n_genes=4)
    sdata.attrs["made by"] = "hand"
    table = sdata["table"]
    train = (table.obs["section"] == "A").to_numpy()
    features = np.random.default_rng(0).normal(size=(table.n_obs, 4))
    table.obs["cv"], table.obsm["X_uni"], table.uns["mine"] = "theirs", features, {"a": 1}
    table.layers["pred"] = table.X.toarray()
    stp.tl.fit_ridge(sdata, features="X_uni", alpha=1.0)
    stp.tl.score(sdata, key="ridge", spots="all", n_perms=0, n_bootstrap=0)
    table.var["highly_variable"] = True
    before = table.copy()

    slide = open_slide(sdata, Elements(), images=False)
    bare = bare_copy(slide)
    key = free_key(bare["table"])
    data = fold_data(bare["table"], sp.csr_matrix(table.X), None, Fold("B", train, ~train), None, PROTOCOLS["default"])
    given = visible_copy(bare, "table", data, f"{key}_spots")
    seen = given["table"]

    assert bare["table"].X is None and not seen.layers
    assert list(seen.obs) == ["region", "spot_id", "section", "cv", f"{key}_spots"]
    assert list(seen.var) == []
    assert set(seen.uns) == {"spatialdata_attrs", "mine"}
    np.testing.assert_array_equal(seen.obs[f"{key}_spots"], train)
    np.testing.assert_array_equal(seen.obsm["X_uni"], features)
    assert np.isnan(seen.X[~train].toarray()).all()
    assert given["A_image"] is sdata["A_image"] and given.attrs == sdata.attrs
    # The user's own table stays as it was.
    pd.testing.assert_frame_equal(table.obs, before.obs)
    pd.testing.assert_frame_equal(table.var, before.var)
    assert set(table.uns) == set(before.uns) and set(table.layers) == set(before.layers)
    assert (table.X != before.X).nnz == 0


def test_the_key_meets_nothing_of_the_user() -> None:
    names = ["cv", "CV_fitted", "cv__features"]
    table = ad.AnnData(
        obs=pd.DataFrame({names[0]: [1]}, index=["a"]),
        var=pd.DataFrame({names[1]: [True]}, index=["g"]),
        obsm={names[2]: np.ones((1, 2))},
    )
    key = free_key(table)
    assert not any(name.casefold().startswith(key) for name in names)
