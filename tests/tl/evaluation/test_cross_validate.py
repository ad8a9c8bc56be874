from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from sklearn.model_selection import LeaveOneGroupOut
from spatialdata import SpatialData

import stpredict as stp

QUICK: dict[str, Any] = {"n_perms": 0, "n_bootstrap": 0}


def nearest(sdata: SpatialData, *, train_key: str, key_added: str, genes: list[str]) -> None:
    """A model that cheats: it remembers the training spots, and gives each spot the expression of the nearest one."""
    table = sdata["table"]
    train = table.obs[train_key].to_numpy()
    place = np.column_stack([table.obs["x"], table.obs["y"], 1e6 * table.obs["section"].cat.codes])
    _, closest = cKDTree(place[train]).query(place)
    values = table[:, genes].X.toarray()[train]
    layer = np.full(table.shape, np.nan, dtype=np.float32)
    layer[:, table.var_names.get_indexer(genes)] = values[closest]
    table.layers[key_added] = layer


@pytest.fixture
def sdata(make_sdata: Callable[..., SpatialData]) -> SpatialData:
    """Two sections of one patient and one of another, 40 spots each."""
    sdata = make_sdata(3, n_spots=40)
    sdata["table"].obs["patient"] = sdata["table"].obs["section"].map({"A": "first", "B": "first", "C": "second"})
    return sdata


def contents(sdata: SpatialData) -> dict[str, list[str]]:
    table = sdata["table"]
    return {slot: sorted(getattr(table, slot)) for slot in ("obs", "var", "uns", "obsm", "layers")}


def cross_validate(sdata: SpatialData, models: Any = None, **arguments: Any) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The same patient")
        return stp.tl.cross_validate(sdata, models or {"nsl": stp.tl.fit_nsl}, **{**QUICK, **arguments})


def test_predictions_are_those_of_a_model_that_was_fitted_to_the_others(sdata: SpatialData) -> None:
    table = sdata["table"]
    cv = cross_validate(sdata, group_key="section", baselines=False)
    written = table.layers["nsl_cv"].copy()
    for section in ("A", "B", "C"):
        test = (table.obs["section"] == section).to_numpy()
        table.obs["train"] = ~test
        stp.tl.fit_nsl(sdata, genes=list(table.var_names), train_key="train")
        np.testing.assert_allclose(written[test], table.layers["nsl"][test], rtol=1e-6)
        expected = [np.corrcoef(*pair)[0, 1] for pair in zip(table.X.toarray()[test].T, written[test].T, strict=True)]
        rows = cv[(cv["section"] == section) & (cv["of"] == "gene")].set_index("name")
        np.testing.assert_allclose(rows["pcc"][table.var_names], expected, rtol=1e-5)
    np.testing.assert_array_equal(table.obs["cv_fold"].astype(str), table.obs["section"].astype(str))
    assert table.var["nsl_cv_fitted"].all()
    assert table.uns["nsl_cv"]["params"]["split"] == "sections left out in turn"


def test_folds_are_those_of_scikit_learn(sdata: SpatialData) -> None:
    seen: list[np.ndarray] = []

    def spy(sdata: SpatialData, *, train_key: str, key_added: str) -> None:
        seen.append(sdata["table"].obs[train_key].to_numpy())
        sdata["table"].layers[key_added] = np.zeros(sdata["table"].shape)

    cross_validate(sdata, {"spy": spy}, baselines=False)
    expected = LeaveOneGroupOut().split(seen[0], groups=sdata["table"].obs["patient"].astype(str))
    for mask, (train, _) in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(mask), train)


def test_baselines_come_first_and_constants_have_no_per_gene_correlation(sdata: SpatialData) -> None:
    cv = cross_validate(sdata, group_key="section")
    names = list(pd.unique(cv["model"]))
    assert names == [
        "mean of training spots", "mean of held-out section (oracle)", "position", "ridge on mean OD",
        "ridge on color statistics", "nsl",
    ]  # fmt: skip
    assert list(pd.unique(cv.loc[cv["baseline"], "model"])) == names[:-1]
    per_section = cv[(cv["of"] == "gene") & cv["section"].isin(["A", "B", "C"])]
    by_model = per_section.groupby("model", observed=True)["pcc"]
    assert by_model.count()[names[:2]].eq(0).all()
    assert by_model.count()[names[2:]].gt(0).all()
    # They know nothing of the spot, and yet correlate with it across genes; the oracle has the smallest error.
    spots = cv[cv["of"] == "spot"].groupby("model", observed=True)
    assert spots["pcc"].median()[names[0]] > 0.5
    rmse = per_section.groupby("model", observed=True)["rmse"].mean()
    assert rmse[names[1]] < rmse[names[0]]
    measured = sdata["table"].to_df()
    of_a = (sdata["table"].obs["section"] == "A").to_numpy()
    error = np.sqrt(((measured[of_a] - measured[~of_a].mean()) ** 2).mean())
    found = per_section[(per_section["model"] == names[0]) & (per_section["section"] == "A")].set_index("name")["rmse"]
    np.testing.assert_allclose(found[error.index], error, rtol=1e-4)


def test_baselines_by_name(sdata: SpatialData) -> None:
    cv = cross_validate(sdata, group_key="section", baselines=["ridge on mean OD", "mean of training spots"])
    assert list(pd.unique(cv["model"])) == ["mean of training spots", "ridge on mean OD", "nsl"]
    with pytest.raises(ValueError, match=r"`baselines` names \['magic'\]; known are \['mean of training spots'"):
        cross_validate(sdata, baselines=["magic"])


# What leaks


def with_smooth_noise(sdata: SpatialData, seed: int = 0) -> SpatialData:
    """Half of the genes are smooth maps, the others independent between spots; none has to do with the image."""
    rng = np.random.default_rng(seed)
    table = sdata["table"]
    places = []
    for name in table.obs["region"].cat.categories:
        rows = table.obs[table.obs["region"] == name]
        points = sdata.shapes[name].loc[rows["spot_id"]].geometry
        places.append(pd.DataFrame({"x": points.x.to_numpy(), "y": points.y.to_numpy()}, index=rows.index))
    table.obs[["x", "y"]] = pd.concat(places).loc[table.obs_names]
    xy = table.obs[["x", "y"]].to_numpy()
    covariance = np.exp(-((cdist(xy, xy) / 250) ** 2)) * np.equal.outer(
        table.obs["section"].to_numpy(), table.obs["section"].to_numpy()
    )
    values = rng.multivariate_normal(np.zeros(len(xy)), covariance + 0.02 * np.eye(len(xy)), table.n_vars).T
    values[:, ::2] = rng.normal(size=values[:, ::2].shape)
    table.X = sparse.csr_matrix((values - values.min() + 0.1).astype(np.float32))
    table.var["smooth"] = np.arange(table.n_vars) % 2 == 1
    return sdata


def test_a_model_that_memorises_is_found_out_by_blocks(log: io.StringIO) -> None:
    sdata = with_smooth_noise(stp.datasets.synthetic(1, n_spots=400, n_genes=40))

    def median_pcc(split: str) -> pd.Series:
        cv = cross_validate(sdata, {"nearest": nearest}, split=split, baselines=False, inplace=False)
        of_genes = cv[(cv["of"] == "gene") & (cv["section"] == "mean of sections")].set_index("name")
        return of_genes["pcc"].groupby(sdata["table"].var["smooth"]).median()

    random, blocks = median_pcc("random"), median_pcc("blocks")
    assert "Random spots leak" in log.getvalue()
    assert random[True] > 0.5  # neighbours tell, though there is nothing to be learned from the image
    assert abs(blocks[True]) < 0.15
    # What is independent between spots cannot leak from one to the other.
    assert abs(random[False]) < 0.1
    assert abs(blocks[False]) < 0.1


def test_held_out_expression_cannot_be_read(sdata: SpatialData) -> None:
    def peeks(sdata: SpatialData, *, train_key: str, key_added: str, genes: list[str]) -> None:
        table = sdata["table"]
        table.layers[key_added] = table.X.toarray()

    with pytest.raises(ValueError, match="peeks") as caught:
        cross_validate(sdata, {"peeks": peeks}, group_key="section", baselines=False)
    assert "NaN" in str(caught.value) or "no predictions" in str(caught.value)


def test_genes_are_chosen_in_each_fold(sdata: SpatialData) -> None:
    seen: list[list[str]] = []

    def spy(sdata: SpatialData, *, train_key: str, key_added: str, genes: list[str]) -> None:
        seen.append(genes)
        values = np.full(sdata["table"].shape, np.nan)
        values[:, sdata["table"].var_names.get_indexer(genes)] = np.random.default_rng(0).normal(size=len(genes))
        sdata["table"].layers[key_added] = values

    table = sdata["table"]
    table.var["highly_variable"] = table.var_names == "gene1"
    values = table.X.toarray()
    values[(table.obs["section"] == "A").to_numpy(), 2] += 40  # of highest mean, but for A's sake alone
    table.X = sparse.csr_matrix(values)
    cross_validate(sdata, {"spy": spy}, group_key="section", genes=3, baselines=False, inplace=False)
    assert "gene2" not in seen[0]
    assert "gene2" in seen[1]


def test_highly_variable_genes_are_found_anew(make_sdata: Callable[..., SpatialData]) -> None:
    seen: list[set[str]] = []

    def spy(sdata: SpatialData, *, train_key: str, key_added: str, genes: list[str]) -> None:
        seen.append(set(genes))
        sdata["table"].layers[key_added] = np.zeros(sdata["table"].shape)

    sdata = make_sdata(2, n_genes=200)
    table = sdata["table"]
    table.X = sparse.csr_matrix(np.random.default_rng(0).gamma(1, 0.5, table.shape).astype(np.float32))
    table.var["highly_variable"] = table.var_names == "gene5"  # found with all spots: of no use to a fold

    cross_validate(sdata, {"spy": spy}, group_key="section", genes="highly_variable", baselines=False, inplace=False)

    for genes, held_out in zip(seen, ("A", "B"), strict=True):
        training = ad.AnnData(table.X[(table.obs["section"] != held_out).to_numpy()], var=table.var[[]])
        sc.pp.highly_variable_genes(training)
        assert genes == set(training.var_names[training.var["highly_variable"]])
    assert seen[0] != seen[1]


@pytest.mark.parametrize("split", ["groups", "blocks"])
def test_the_layer_scores_as_the_frame_does(sdata: SpatialData, split: str) -> None:
    cv = cross_validate(sdata, split=split, n_folds=2, margin=0, baselines=False)
    scores = stp.tl.score(sdata, key="nsl_cv", **QUICK)
    keys = ["of", "name", "section"]
    both = scores.merge(cv, on=keys, suffixes=("", "_cv"))
    assert len(both) == len(scores) == len(cv)
    np.testing.assert_allclose(both["pcc"], both["pcc_cv"], rtol=1e-6)
    assert ("A · block 1" in set(scores["section"])) == (split == "blocks")


# Protocols


def test_pooled_protocol_correlates_over_the_fold(sdata: SpatialData) -> None:
    table = sdata["table"]
    rng = np.random.default_rng(0)
    table.layers["counts"] = sparse.csr_matrix(rng.poisson(20 * table.X.toarray()).astype(np.float32))
    cv = cross_validate(sdata, protocol="hest", baselines=False)
    of_gene = cv[(cv["of"] == "gene") & (cv["section"] == "first")].set_index("name")["pcc"]
    test = (table.obs["patient"] == "first").to_numpy()
    measured = np.log1p(table.layers["counts"].toarray()[test])
    expected = [np.corrcoef(*pair)[0, 1] for pair in zip(measured.T, table.layers["nsl_cv"][test].T, strict=True)]
    np.testing.assert_allclose(of_gene[table.var_names], expected, rtol=1e-4)


def test_unknown_protocol(sdata: SpatialData) -> None:
    with pytest.raises(ValueError, match=r"`protocol` is 'mine'; expected one of \['default', 'm2ost', 'hest'\]"):
        cross_validate(sdata, protocol="mine")


# Going on after a kill, and on other machines


def test_a_killed_run_goes_on(sdata: SpatialData, tmp_path: Path) -> None:
    whole = cross_validate(sdata, {"nsl": stp.tl.fit_nsl}, group_key="section", baselines=False, inplace=False)
    calls: list[str] = []

    def dies(sdata: SpatialData, *, train_key: str, key_added: str, genes: list[str]) -> None:
        calls.append(key_added)
        if len(calls) == 3:
            raise KeyboardInterrupt
        stp.tl.fit_nsl(sdata, train_key=train_key, key_added=key_added, genes=genes)

    before = contents(sdata)
    settings: dict[str, Any] = {"group_key": "section", "baselines": False, "checkpoint_dir": tmp_path / "cv"}
    with pytest.raises(KeyboardInterrupt):
        cross_validate(sdata, {"nsl": dies}, **settings)
    assert contents(sdata) == before
    again = cross_validate(sdata, {"nsl": dies}, **settings)
    assert len(calls) == 4  # the one fold that was missing
    pd.testing.assert_frame_equal(again, whole)
    with pytest.raises(ValueError, match=r"nsl' holds a run with other settings \(data differ\)"):
        cross_validate(sdata, {"nsl": dies}, **{**settings, "genes": 4})


def test_folds_on_a_cluster_give_the_same(sdata: SpatialData) -> None:
    distributed = pytest.importorskip("distributed")
    here = cross_validate(sdata, group_key="section", baselines=["ridge on mean OD"], inplace=False)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        there = cross_validate(sdata, group_key="section", baselines=["ridge on mean OD"], client=client, inplace=False)
    pd.testing.assert_frame_equal(here, there)


# What goes wrong


def test_errors_name_model_and_fold_and_write_nothing(sdata: SpatialData) -> None:
    def fails(sdata: SpatialData, *, train_key: str, key_added: str) -> None:
        raise OSError("the disk is full")

    before = contents(sdata)
    with pytest.raises(OSError, match="the disk is full") as caught:
        cross_validate(sdata, {"fails": fails}, group_key="section", baselines=False)
    assert caught.value.__notes__ == ["This happened to 'fails' in the fold that holds out 'A'."]
    assert contents(sdata) == before


def test_models_that_write_nothing(sdata: SpatialData) -> None:
    with pytest.raises(ValueError, match=r"The model 'idle' wrote no `layers\[key_added\]`"):
        cross_validate(sdata, {"idle": lambda sdata, **_: None}, group_key="section", baselines=False)


@pytest.mark.parametrize(
    ("models", "error", "message"),
    [
        ({}, TypeError, r"`models` is \{\}; expected functions by name"),
        (stp.tl.fit_nsl, TypeError, "expected functions by name, such as"),
        ({"nsl": "fit_nsl"}, TypeError, "The model 'nsl' is str, not a function"),
        ({"position": stp.tl.fit_nsl}, ValueError, "'position' is the name of a baseline"),
        ({"a/b": stp.tl.fit_nsl}, ValueError, "cannot be stored on disk"),
    ],
)
def test_models_that_are_none(
    make_sdata: Callable[..., SpatialData], models: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        stp.tl.cross_validate(make_sdata(2), models)


def test_unknown_layer(sdata: SpatialData) -> None:
    with pytest.raises(KeyError, match="No layer 'tpm' in the table"):
        cross_validate(sdata, layer="tpm")
