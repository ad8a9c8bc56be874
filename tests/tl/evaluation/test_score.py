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
import scipy.sparse as sp
from anndata import AnnData
from scipy import stats
from spatialdata import SpatialData

import stpredict as stp

MakeSData = Callable[..., SpatialData]
N = 40


@pytest.fixture
def make_predicted(make_sdata: MakeSData) -> MakeSData:
    """Sections with predictions of all genes but the last two, of a model that was fitted to section A."""

    def make(n_sections: int = 3, **options: Any) -> SpatialData:
        sdata = make_sdata(n_sections, n_spots=N, **options)
        table = sdata["table"]
        noise = np.random.default_rng(0).normal(0, 0.3, table.shape)
        layer = (0.5 * table.X.toarray() + noise).astype(np.float32)
        layer[:, -2:] = np.nan
        table.layers["nsl"] = layer
        table.obs["train"] = (table.obs["section"] == "A").to_numpy()
        table.uns["nsl"] = {
            "params": {"model": "nsl", "layer": "X", "train_key": "train", "n_train": int(table.obs["train"].sum())}
        }
        return sdata

    return make


@pytest.fixture
def sdata(make_predicted: MakeSData) -> SpatialData:
    return make_predicted()


def score(sdata: SpatialData, **options: Any) -> pd.DataFrame:
    """Without a warning, and few draws."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return stp.tl.score(sdata, **({"n_perms": 19, "n_bootstrap": 50} | options))


def sections(frame: pd.DataFrame) -> list[str]:
    return [name for name in frame["section"].cat.categories if name not in ("mean of sections", "pooled")]


def snapshot(table: AnnData) -> tuple[list[str], list[str], list[str]]:
    return list(table.var), list(table.obs), list(table.uns)


# Which spots


def test_spots_that_were_not_fitted_to(sdata: SpatialData) -> None:
    frame = score(sdata)
    assert sections(frame) == ["B", "C"]
    table = sdata["table"]
    rows = np.flatnonzero(table.obs["section"] == "B")
    found = frame[(frame["name"] == "gene1") & (frame["section"] == "B")].iloc[0]
    x, y = table.X[rows, 1].toarray().ravel(), table.layers["nsl"][rows, 1]
    assert found["pcc"] == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-5)
    assert table.uns["nsl_score"]["spots"] == "held out"


def test_validation_spots_were_looked_at_too(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.uns["nsl"]["params"] |= {"n_train": N - 10, "n_validation": 10}
    assert sections(score(sdata)) == ["B", "C"]


def test_a_column_chooses_spots(sdata: SpatialData) -> None:
    assert sections(score(sdata, spots="train")) == ["A"]
    assert sdata["table"].uns["nsl_score"]["spots"] == "train"


def test_all_spots(sdata: SpatialData) -> None:
    assert sections(score(sdata, spots="all")) == ["A", "B", "C"]


def test_a_training_fit_is_warned_of(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.uns["nsl"]["params"] |= {"train_key": "", "n_train": 3 * N}
    with pytest.warns(UserWarning, match="fitted to all spots that it has predictions for.*nothing about new tissue"):
        frame = stp.tl.score(sdata, n_perms=0)
    assert sections(frame) == ["A", "B", "C"]
    assert table.uns["nsl_score"]["spots"] == "training fit"
    assert sections(score(sdata, spots="all")) == ["A", "B", "C"]  # who says so knows


def test_predictions_of_training_spots_alone(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["nsl"][~table.obs["train"].to_numpy()] = np.nan
    with pytest.warns(UserWarning, match="nothing about new tissue"):
        assert sections(stp.tl.score(sdata, n_perms=0)) == ["A"]


def test_a_model_of_other_data(sdata: SpatialData, log: io.StringIO) -> None:
    sdata["table"].uns["nsl"]["params"] |= {"train_key": "", "n_train": 999}
    assert sections(score(sdata)) == ["A", "B", "C"]
    assert "The table does not hold the spots that 'nsl' was fitted to, so all are scored" in log.getvalue()


def test_a_layer_that_no_model_wrote(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["mine"] = table.layers["nsl"]
    assert sections(score(sdata, key="mine")) == ["A", "B", "C"]


def test_a_column_that_has_changed_since(sdata: SpatialData) -> None:
    sdata["table"].uns["nsl"]["params"]["n_train"] = 77
    with pytest.warns(UserWarning, match=r"`obs\['train'\]` marks 40 spots, but the model 'nsl' was fitted to 77"):
        frame = stp.tl.score(sdata, n_perms=0)
    assert sections(frame) == ["B", "C"]
    assert sdata["table"].uns["nsl_score"]["spots"] == "not known"


def test_cross_validated_predictions_are_all_out_of_fold(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["nsl_cv"] = table.layers["nsl"]
    table.obs["cv_fold"] = pd.Categorical(table.obs["section"])
    table.uns["nsl_cv"] = {"params": {"model": "nsl", "layer": "X", "cv": "cv_fold"}}
    assert sections(score(sdata, key="nsl_cv")) == ["A", "B", "C"]


def test_folds_within_a_section_are_scored_apart(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["nsl_cv"] = table.layers["nsl"]
    left = np.arange(table.n_obs) % 2 == 0
    table.obs["cv_fold"] = pd.Categorical(np.where(left, "block 1", "block 2"))
    table.uns["nsl_cv"] = {"params": {"model": "nsl", "layer": "X", "cv": "cv_fold"}}
    found = sections(score(sdata, key="nsl_cv"))
    assert found == [f"{section} · block {fold}" for fold in (1, 2) for section in "ABC"]


def test_a_real_fit_is_scored_on_what_it_has_not_seen(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2, n_spots=40)
    sdata["table"].obs["train"] = (sdata["table"].obs["section"] == "A").to_numpy()
    stp.tl.fit_nsl(sdata, train_key="train")
    assert sections(score(sdata)) == ["B"]
    stp.tl.fit_nsl(sdata)
    with pytest.warns(UserWarning, match="nothing about new tissue"):
        stp.tl.score(sdata, n_perms=0)


# Which expression and which genes


def test_measured_is_what_the_model_was_fitted_to(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["other"] = sp.csr_matrix(np.random.default_rng(3).normal(size=table.shape))
    expected = score(sdata, layer="other")
    table.uns["nsl"]["params"]["layer"] = "other"
    pd.testing.assert_frame_equal(score(sdata), expected)
    assert table.uns["nsl_score"]["measured_layer"] == "other"
    assert not score(sdata, layer="X").equals(expected)


def test_counts_against_logarithms_are_no_error(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["counts"] = table.X.copy()
    table.layers["counts"].data = np.round(np.expm1(table.layers["counts"].data))
    assert score(sdata, layer="counts")["pcc"].notna().any()


def test_genes(sdata: SpatialData, log: io.StringIO) -> None:
    table = sdata["table"]
    every = score(sdata)
    genes = every.loc[every["of"] == "gene", "name"].unique().tolist()
    assert genes == [f"gene{i}" for i in range(10)]
    frame = score(sdata, genes=["gene4", "gene11", "gene1"])
    assert frame.loc[frame["of"] == "gene", "name"].unique().tolist() == ["gene4", "gene1"]
    assert "1 of 3 genes have no prediction in `layers['nsl']`: not scored" in log.getvalue()
    table.var["panel"] = [True, True, *[False] * 10]
    frame = score(sdata, genes="panel")
    assert frame.loc[frame["of"] == "gene", "name"].unique().tolist() == ["gene0", "gene1"]
    assert score(sdata, genes="gene3")["name"].isin(["gene3"]).sum() == 4


def test_sparse_predictions(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["dense"] = np.nan_to_num(table.layers["nsl"])
    table.layers["sparse"] = sp.csr_matrix(table.layers["dense"])
    dense, sparse = (score(sdata, key=layer).drop(columns="model") for layer in ("dense", "sparse"))
    pd.testing.assert_frame_equal(sparse, dense)


# Sections and groups


def test_groups_are_patients_where_there_are_several(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.obs["patient"] = table.obs["section"].map({"A": "P", "B": "P", "C": "Q"}).to_numpy()

    def groups(frame: pd.DataFrame) -> dict[str, str]:
        rows = frame[frame["of"] == "spot"].drop_duplicates("section")
        return dict(zip(rows["section"], rows["group"], strict=True))

    assert groups(score(sdata, spots="all")) == {"A": "P", "B": "P", "C": "Q"}
    assert groups(score(sdata)) == {"B": "P", "C": "Q"}
    table.obs["patient"] = "P"
    assert groups(score(sdata)) == {"B": "B", "C": "C"}


def test_sections_of_few_spots_are_left_out(sdata: SpatialData, log: io.StringIO) -> None:
    table = sdata["table"]
    table.layers["nsl"][np.flatnonzero(table.obs["section"] == "B")[2:]] = np.nan
    assert sections(score(sdata)) == ["C"]
    assert "Only 2 spots to score in 'B', which is left out" in log.getvalue()


def test_sections_without_a_name_of_their_own(sdata: SpatialData) -> None:
    sdata["table"].obs["section"] = "same"
    assert sections(score(sdata)) == ["B_spots", "C_spots"]
    assert sections(score(sdata, shapes_key="C_spots")) == ["same"]


def test_rows_are_matched_to_places_by_name(sdata: SpatialData) -> None:
    table = sdata["table"]
    centers = pd.concat(sdata.shapes[f"{s}_spots"].geometry for s in "ABC")
    table.layers["x"] = np.tile(centers.x.loc[table.obs["spot_id"]].to_numpy()[:, None], (1, table.n_vars))
    assert score(sdata, key="x")["moran_predicted"].min() > 0.6  # rows are shuffled, neighbours are not


# Slots


def test_what_is_written(sdata: SpatialData) -> None:
    table = sdata["table"]
    before = snapshot(table)
    frame = score(sdata)
    names = ["pcc", "pcc_pooled", "pcc_low", "pcc_high", "spearman", "rmse", "mae", "r2", "variance_ratio"]
    names += ["moran_measured", "moran_predicted", "pvals", "pvals_adj", "predictable"]
    assert set(table.var) - set(before[0]) == {f"nsl_{name}" for name in names}
    assert set(table.obs) - set(before[1]) == {"nsl_pcc", "nsl_rmse"}
    assert set(table.uns) - set(before[2]) == {"nsl_score"}

    genes = frame[frame["of"] == "gene"].set_index("name")
    mean, pooled = (genes[genes["section"] == section] for section in ("mean of sections", "pooled"))
    renamed = {"pvals": "pvals", "pvals_adj": "pvals_adj"}
    for name in names[:-1]:
        expected = pooled["pcc"] if name == "pcc_pooled" else mean[renamed.get(name, name)]
        np.testing.assert_array_equal(table.var.loc[expected.index, f"nsl_{name}"], expected)
        assert table.var[f"nsl_{name}"].iloc[-2:].isna().all()
    assert table.var["nsl_predictable"].dtype == bool
    expected = (mean["pvals_adj"] <= 0.05) & (mean["pcc"] > 0)
    np.testing.assert_array_equal(table.var.loc[expected.index, "nsl_predictable"], expected)
    assert not table.var["nsl_predictable"].iloc[-2:].any()

    spots = frame[frame["of"] == "spot"].set_index("name")
    np.testing.assert_array_equal(table.obs.loc[spots.index, "nsl_pcc"], spots["pcc"])
    np.testing.assert_array_equal(table.obs.loc[spots.index, "nsl_rmse"], spots["rmse"])
    assert table.obs.loc[table.obs["train"], ["nsl_pcc", "nsl_rmse"]].isna().all(axis=None)

    stored = table.uns["nsl_score"]
    assert stored["sections"].tolist() == ["B", "C"]
    assert (stored["layer"], stored["measured_layer"], stored["n_spots"]) == ("nsl", "X", 2 * N)
    assert (stored["n_perms"], stored["n_bootstrap"], stored["random_state"]) == (19, 50, 0)
    summary = stp.tl.summarize(frame, n_bootstrap=50).iloc[0]
    pd.testing.assert_series_equal(pd.Series(stored["summary"]), summary, check_names=False, check_dtype=False)


def test_ceilings_are_taken_up(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["counts"] = sp.csr_matrix(np.random.default_rng(0).poisson(50 * np.expm1(table.X.toarray())))
    stp.tl.noise_ceiling(sdata, n_draws=3)
    frame = score(sdata)
    stored = table.uns["noise_ceiling"]
    found = frame[(frame["name"] == "gene1") & (frame["section"] == "B")].iloc[0]
    assert found["ceiling"] == stored["ceiling"][1, 1]
    assert found["pcc_of_ceiling"] == pytest.approx(found["pcc"] / found["ceiling"])
    mean = frame[(frame["name"] == "gene1") & (frame["section"] == "mean of sections")].iloc[0]
    r = stored["halves_pcc"][1:, 1].mean()  # of the sections that are scored
    assert mean["ceiling"] == pytest.approx(np.sqrt(2 * r / (1 + r)))
    assert table.var.loc["gene1", "nsl_pcc_of_ceiling"] == mean["pcc_of_ceiling"]


def test_scores_are_written_over(sdata: SpatialData) -> None:
    table = sdata["table"]
    score(sdata)
    columns = snapshot(table)
    score(sdata, genes=["gene1"], spots="train")
    assert snapshot(table) == columns
    assert table.var["nsl_pcc"].notna().sum() == 1
    assert table.obs["nsl_pcc"].notna().sum() == 0  # a single gene has no correlation across genes
    score(sdata, n_perms=0)
    assert "nsl_predictable" not in table.var and "nsl_pvals" not in table.var  # and no old ones


def test_key_added_and_not_in_place(sdata: SpatialData) -> None:
    table = sdata["table"]
    before = snapshot(table)
    frame = score(sdata, inplace=False)
    assert snapshot(table) == before
    pd.testing.assert_frame_equal(score(sdata, key_added="other"), frame)
    assert "other_pcc" in table.var and "nsl_pcc" not in table.var and "other_score" in table.uns
    assert frame["model"].unique().tolist() == ["nsl"]


def test_scores_round_trip(sdata: SpatialData, tmp_path: Path, to_backed: Callable[..., SpatialData]) -> None:
    score(sdata)
    table = sdata["table"]
    table.write_h5ad(tmp_path / "table.h5ad")
    for read in (ad.read_h5ad(tmp_path / "table.h5ad"), to_backed(sdata, tmp_path / "slide.zarr")["table"]):
        pd.testing.assert_frame_equal(read.var, table.var, check_names=False)
        np.testing.assert_array_equal(read.obs["nsl_pcc"], table.obs["nsl_pcc"])
        stored = read.uns["nsl_score"]
        assert stored["sections"].tolist() == ["B", "C"]
        assert stored["spots"] == "held out"
        assert stored["summary"]["pcc"] == table.uns["nsl_score"]["summary"]["pcc"]
        assert np.isnan(stored["summary"]["pcc_of_ceiling"])


# Bad input


def fails(sdata: SpatialData, error: type[Exception], match: str, **options: Any) -> None:
    """Raises, and leaves the table as it was."""
    before = snapshot(sdata["table"])
    with pytest.raises(error, match=match):
        score(sdata, **options)
    assert snapshot(sdata["table"]) == before


def test_no_such_layer(sdata: SpatialData) -> None:
    fails(sdata, KeyError, r"No predictions 'm2ost' in `layers`; it has \['nsl'\].*fit_nsl", layer="m2ost")
    fails(sdata, KeyError, r"No measured expression 'log'; the table has \['X', 'nsl'\]", measured_layer="log")
    del sdata["table"].X
    fails(sdata, ValueError, "The table has no `X` to hold predictions against")


def test_no_gene_in_common(sdata: SpatialData) -> None:
    match = r"None of the 2 genes that are asked for \(such as \['gene10', 'gene11'\]\) has a prediction.*10, such as \['gene0'"
    fails(sdata, ValueError, match, genes=["gene10", "gene11"])
    fails(sdata, KeyError, r"1 of `genes` are not in `var_names`, such as \['HER2'\]", genes=["gene0", "HER2"])
    sdata["table"].var["panel"] = "yes"
    fails(sdata, TypeError, r"`var\['panel'\]` has dtype", genes="panel")


def test_predictions_that_are_all_missing(sdata: SpatialData) -> None:
    sdata["table"].layers["nsl"][:] = np.nan
    fails(sdata, ValueError, r"`layers\['nsl'\]` is NaN everywhere: there is no prediction to score")


def test_unknown_and_unfit_columns_of_spots(sdata: SpatialData) -> None:
    table = sdata["table"]
    fails(sdata, KeyError, r"No column 'test' in `obs`; its boolean columns are \['train'\]", spots="test")
    match = r"`obs\['section'\]` has dtype .*; expected True for spots to score"
    fails(sdata, TypeError, match, spots="section")
    table.obs["none"] = False
    fails(sdata, ValueError, r"None of the spots that `obs\['none'\]` marks has a prediction", spots="none")


def test_too_few_spots(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.obs["few"] = False
    for section in "BC":
        table.obs.loc[table.obs_names[np.flatnonzero(table.obs["section"] == section)[:2]], "few"] = True
    fails(sdata, ValueError, r"No section has at least 3 spots to score: there are 4 in the sections", spots="few")


@pytest.mark.parametrize("name", ["n_perms", "n_bootstrap"])
@pytest.mark.parametrize("number", [-1, 2.5])
def test_numbers_that_do_not_fit(sdata: SpatialData, name: str, number: Any) -> None:
    fails(sdata, ValueError, rf"`{name}` is {number}; expected a whole number, at least 0", **{name: number})


@pytest.mark.parametrize(("key", "error"), [("a/b", ValueError), ("", ValueError), (3, TypeError)])
def test_keys_that_cannot_be_written(sdata: SpatialData, key: Any, error: type[Exception]) -> None:
    fails(sdata, error, "`key_added` is", key_added=key)


@pytest.mark.parametrize(("slot", "column"), [("var", "nsl_r2"), ("obs", "nsl_pcc")])
def test_columns_that_belong_to_someone_else(sdata: SpatialData, slot: str, column: str) -> None:
    getattr(sdata["table"], slot)[column] = 1.0
    fails(sdata, ValueError, rf"`{slot}\['{column}'\]` exists and is no score that was written here; choose another")
