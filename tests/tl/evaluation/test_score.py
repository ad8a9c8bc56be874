from __future__ import annotations

import io
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from spatialdata.models import TableModel

import stpredict as stp

MakeSData = Callable[..., SpatialData]
N = 40


@pytest.fixture(scope="session")
def predicted(make_sdata: MakeSData) -> SpatialData:
    """Three sections with predictions of all genes but the last two, of a model that was fitted to section A."""
    made = make_sdata(3, n_spots=N)
    table = made["table"]
    noise = np.random.default_rng(0).normal(0, 0.3, table.shape)
    layer = (0.5 * table.X.toarray() + noise).astype(np.float32)
    layer[:, -2:] = np.nan
    table.layers["nsl"] = layer
    table.obs["nsl_train"] = (table.obs["section"] == "A").to_numpy()
    written = {"layers": ["nsl"], "obs": ["nsl_train"]}
    table.uns["nsl"] = {"params": {"model": "nsl", "layer": "X"}, "written": written}
    centers = pd.concat(made.shapes[f"{s}_spots"].geometry for s in "ABC").loc[table.obs["spot_id"]]
    table.obsm["spatial"] = np.column_stack([centers.x, centers.y])
    return made


@pytest.fixture
def sdata(predicted: SpatialData) -> SpatialData:
    """Of one's own; scores need no image."""
    return SpatialData(shapes=dict(predicted.shapes), tables={"table": predicted["table"].copy()})


@pytest.fixture(scope="session")
def fitted(make_sdata: MakeSData) -> SpatialData:
    """Two sections and a model of the place that was fitted to every other spot, as ``obs["train"]`` told it."""
    made = make_sdata(2, n_spots=24, n_genes=4)
    table = made["table"]
    table.obs["train"] = np.arange(48) % 2 == 0
    stp.tl.fit_ridge(made, features="position", train_key="train", key_added="nsl")
    return SpatialData(shapes=dict(made.shapes), tables={"table": table})


def score(sdata: SpatialData | AnnData, **options: Any) -> pd.DataFrame:
    """Without a warning, and few draws."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        few: dict[str, Any] = {"n_perms": 19, "n_bootstrap": 50, "section_key": "section"}
        return stp.tl.score(sdata, **{**few, **options})


def sections(frame: pd.DataFrame) -> list[str]:
    return [name for name in frame["section"].cat.categories if name not in ("mean of sections", "pooled")]


def scored(frame: pd.DataFrame) -> set[str]:
    return set(frame.loc[frame["of"] == "spot", "name"])


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


def test_a_column_chooses_spots(sdata: SpatialData) -> None:
    assert sections(score(sdata, spots="nsl_train")) == ["A"]
    assert sdata["table"].uns["nsl_score"]["spots"] == "nsl_train"


def test_all_spots(sdata: SpatialData) -> None:
    assert sections(score(sdata, spots="all")) == ["A", "B", "C"]


def test_a_training_fit_is_warned_of(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.obs["nsl_train"] = True
    with pytest.warns(UserWarning, match="fitted to all spots that it has predictions for.*nothing about new tissue"):
        frame = stp.tl.score(sdata, n_perms=0)
    assert sections(frame) == ["A_spots", "B_spots", "C_spots"]
    assert table.uns["nsl_score"]["spots"] == "training fit"
    assert sections(score(sdata, spots="all")) == ["A", "B", "C"]  # who says so knows


def test_predictions_of_training_spots_alone(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["nsl"][~table.obs["nsl_train"].to_numpy()] = np.nan
    with pytest.warns(UserWarning, match="nothing about new tissue"):
        assert sections(stp.tl.score(sdata, n_perms=0)) == ["A_spots"]


@pytest.mark.parametrize("dtype", [bool, "boolean", "category", np.int8, "Int64", np.float32, object])
def test_what_the_fit_wrote_is_read_in_any_dtype(sdata: SpatialData, dtype: Any) -> None:
    table = sdata["table"]
    table.obs["nsl_train"] = table.obs["nsl_train"].astype(dtype)
    assert sections(score(sdata, n_perms=0)) == ["B", "C"]


@pytest.mark.parametrize("gap", ["missing", "nullable", "object", "float", "strings"])
def test_where_it_is_not_known_it_is_asked_for(sdata: SpatialData, gap: str) -> None:
    table = sdata["table"]
    held_in = table.obs["nsl_train"]
    if gap == "missing":
        del table.obs["nsl_train"]
    elif gap == "strings":
        table.obs["nsl_train"] = held_in.map({True: "yes", False: "no"})
    else:
        holes = held_in.astype({"nullable": "boolean", "object": object, "float": float}[gap])
        table.obs["nsl_train"] = holes.where(np.arange(table.n_obs) > 0)
    match = r"Which spots the model 'nsl' was fitted to is not known.*Say which spots to score with `spots`"
    fails(sdata, ValueError, match)
    table.obs["mine"] = table.obs["section"] == "B"
    assert sections(score(sdata, spots="mine")) == ["B"]
    assert sections(score(sdata, spots="all")) == ["A", "B", "C"]


def test_a_layer_that_no_model_wrote(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["mine"] = table.layers["nsl"]
    fails(sdata, ValueError, "fitted to is not known: `obs\\['mine_train'\\]` is missing", key="mine")
    assert sections(score(sdata, key="mine", spots="all")) == ["A", "B", "C"]


def test_what_became_of_the_train_column_does_not_matter(fitted: SpatialData) -> None:
    sdata = SpatialData(shapes=dict(fitted.shapes), tables={"table": fitted["table"].copy()})
    obs = sdata["table"].obs
    train = obs["train"].to_numpy().copy()
    held_out = set(obs.index[~train])
    changes: dict[str, Any] = {
        "inverted": ~train,
        "permuted": np.random.default_rng(0).permutation(train),
        "strings": np.where(train, "True", "False"),
        "with gaps": pd.array([None, *train[1:]], dtype="boolean"),
        "of another kind": np.arange(len(train)),
        "dropped": None,
    }
    for change, values in changes.items():
        if values is None:
            del obs["train"]
        else:
            obs["train"] = values
        assert scored(score(sdata, n_perms=0, n_bootstrap=0)) == held_out, change


@pytest.mark.parametrize("uns_merge", [None, "first", "same", "unique"])
def test_after_a_concatenation(fitted: SpatialData, uns_merge: Any) -> None:
    a = fitted["table"]
    b = a.copy()
    b.obs_names = [f"other {name}" for name in b.obs_names]
    b.obs["section"] = b.obs["section"].astype(str) + " of another"
    b.obs["region"] = pd.Categorical(["C_spots"] * 24 + ["D_spots"] * 24)
    b.obs["nsl_train"] = False  # as predicted by a model that was not fitted to them
    del b.obs["train"]
    shapes = fitted.shapes
    parts = {**shapes, "C_spots": shapes["A_spots"], "D_spots": shapes["B_spots"]}
    held_out = {*a.obs_names[~a.obs["nsl_train"]], *b.obs_names}
    for join in ("inner", "outer"):
        for other in (b, b[:, ::-1].copy()):
            table = ad.concat([a, other], uns_merge=uns_merge, join=join)
            table.uns.pop("spatialdata_attrs", None)
            table = TableModel.parse(table, region=list(parts), region_key="region", instance_key="spot_id")
            whole = SpatialData(shapes=parts, tables={"table": table})
            assert scored(score(whole, n_perms=0, n_bootstrap=0)) == held_out
        del other.obs["nsl_train"]
        table = ad.concat([a, other], uns_merge=uns_merge, join=join)
        table.uns.pop("spatialdata_attrs", None)
        table = TableModel.parse(table, region=list(parts), region_key="region", instance_key="spot_id")
        fails(SpatialData(shapes=parts, tables={"table": table}), ValueError, "is missing or has gaps")


def test_cross_validated_predictions_are_all_out_of_fold(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["nsl_cv"] = table.layers["nsl"]
    table.obs["nsl_cv_fold"] = pd.Categorical(table.obs["section"])
    assert sections(score(sdata, key="nsl_cv")) == ["A", "B", "C"]
    table.obs["nsl_fold"] = "the user's own"
    assert sections(score(sdata)) == ["B", "C"]


def test_folds_within_a_section_are_scored_apart(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["nsl_cv"] = table.layers["nsl"]
    left = np.arange(table.n_obs) % 2 == 0
    table.obs["nsl_cv_fold"] = pd.Categorical(np.where(left, "block 1", "block 2"))
    found = sections(score(sdata, key="nsl_cv"))
    assert found == [f"{section} · block {fold}" for fold in (1, 2) for section in "ABC"]


def test_spots_beside_the_tissue(sdata: SpatialData, log: io.StringIO) -> None:
    table = sdata["table"]
    table.obs["in_tissue"] = (np.arange(table.n_obs) % 4 > 0).astype(int)
    beside = set(table.obs_names[table.obs["in_tissue"] == 0])
    assert not scored(score(sdata)) & beside
    assert "20 spots lie beside the tissue" in log.getvalue()  # of the 80 that are held out
    assert not scored(score(sdata, spots="all")) & beside
    table.obs["mine"] = True
    assert scored(score(sdata, spots="mine")) == set(table.obs_names)


# Which expression and which genes


def test_measured_is_what_the_model_was_fitted_to(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["other"] = sp.csr_matrix(np.random.default_rng(3).normal(size=table.shape))
    expected = score(sdata, layer="other")
    table.uns["nsl"]["params"]["layer"] = "other"
    pd.testing.assert_frame_equal(score(sdata), expected)
    assert table.uns["nsl_score"]["layer"] == "other"
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
    table.obs["dense_train"] = table.obs["sparse_train"] = table.obs["nsl_train"]
    dense, sparse = (score(sdata, key=key).drop(columns="model") for key in ("dense", "sparse"))
    pd.testing.assert_frame_equal(sparse, dense)


# Sections and groups


def test_groups_are_patients_where_there_are_several(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.obs["patient"] = table.obs["section"].map({"A": "P", "B": "P", "C": "Q"}).to_numpy()

    def groups(**options: Any) -> dict[str, str]:
        frame = score(sdata, n_perms=0, n_bootstrap=0, **options)
        rows = frame[frame["of"] == "spot"].drop_duplicates("section")
        return dict(zip(rows["section"], rows["group"], strict=True))

    assert groups(spots="all", patient_key="patient") == {"A": "P", "B": "P", "C": "Q"}
    assert groups(patient_key="patient") == {"B": "P", "C": "Q"}
    assert groups(spots="all") == {"A": "A", "B": "B", "C": "C"}
    assert groups(spots="all", section_key=None) == {f"{name}_spots": f"{name}_spots" for name in "ABC"}
    table.obs["donor"] = "P"
    assert groups(patient_key="donor") == {"B": "B", "C": "C"}
    fails(sdata, KeyError, "`patient_key` is 'animal', which `obs` lacks", patient_key="animal")


def test_sections_of_few_spots_are_left_out(sdata: SpatialData, log: io.StringIO) -> None:
    table = sdata["table"]
    table.layers["nsl"][np.flatnonzero(table.obs["section"] == "B")[2:]] = np.nan
    assert sections(score(sdata)) == ["C"]
    assert "Only 2 spots to score in 'B', which is left out" in log.getvalue()


def test_sections_are_regions_or_named_by_a_column(sdata: SpatialData) -> None:
    assert sections(score(sdata, section_key=None)) == ["B_spots", "C_spots"]
    assert sections(score(sdata, shapes_key="C_spots")) == ["C"]
    sdata["table"].obs["slide"] = "same"
    fails(sdata, ValueError, "'same' .*lies on several spots elements", section_key="slide")


def test_rows_are_matched_to_places_by_name(sdata: SpatialData) -> None:
    table = sdata["table"]
    centers = pd.concat(sdata.shapes[f"{s}_spots"].geometry for s in "ABC")
    table.layers["x"] = np.tile(centers.x.loc[table.obs["spot_id"]].to_numpy()[:, None], (1, table.n_vars))
    table.obs["x_train"] = False
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
    for name in names[:-1]:
        expected = pooled["pcc"] if name == "pcc_pooled" else mean[name]
        np.testing.assert_array_equal(table.var.loc[expected.index, f"nsl_{name}"], expected)
        assert table.var[f"nsl_{name}"].iloc[-2:].isna().all()
    assert table.var["nsl_predictable"].dtype == bool
    expected = (mean["pvals_adj"] <= 0.05) & (mean["pcc"] > 0)
    np.testing.assert_array_equal(table.var.loc[expected.index, "nsl_predictable"], expected)
    assert not table.var["nsl_predictable"].iloc[-2:].any()

    spots = frame[frame["of"] == "spot"].set_index("name")
    np.testing.assert_array_equal(table.obs.loc[spots.index, "nsl_pcc"], spots["pcc"])
    np.testing.assert_array_equal(table.obs.loc[spots.index, "nsl_rmse"], spots["rmse"])
    assert table.obs.loc[table.obs["nsl_train"], ["nsl_pcc", "nsl_rmse"]].isna().all(axis=None)

    stored = table.uns["nsl_score"]
    assert stored["sections"].tolist() == ["B", "C"]
    assert (stored["key"], stored["layer"], stored["n_spots"], stored["of"]) == ("nsl", "X", 2 * N, "nsl")
    assert (stored["n_perms"], stored["n_bootstrap"], stored["random_state"]) == (19, 50, 0)
    summary = stp.tl.summarize(frame, n_bootstrap=50).iloc[0]
    pd.testing.assert_series_equal(pd.Series(stored["summary"]), summary, check_names=False, check_dtype=False)


def test_ceilings_are_taken_up(sdata: SpatialData, log: io.StringIO) -> None:
    table = sdata["table"]
    table.layers["counts"] = sp.csr_matrix(np.random.default_rng(0).poisson(50 * np.expm1(table.X.toarray())))
    stp.tl.noise_ceiling(sdata, n_draws=3, section_key="section")
    frame = score(sdata)
    stored = table.uns["noise_ceiling"]
    found = frame[(frame["name"] == "gene1") & (frame["section"] == "B")].iloc[0]
    assert found["ceiling"] == stored["ceiling"][1, 1]
    assert found["pcc_of_ceiling"] == pytest.approx(found["pcc"] / found["ceiling"])
    mean = frame[(frame["name"] == "gene1") & (frame["section"] == "mean of sections")].iloc[0]
    r = stored["halves_pcc"][1:, 1].mean()  # of the sections that are scored
    assert mean["ceiling"] == pytest.approx(np.sqrt(2 * r / (1 + r)))
    assert table.var.loc["gene1", "nsl_pcc_of_ceiling"] == mean["pcc_of_ceiling"]
    assert "noise ceiling" not in log.getvalue()
    assert score(sdata, section_key=None)["ceiling"].isna().all()
    assert "known of the sections ['A', 'B', 'C'], not of ['B_spots', 'C_spots']" in log.getvalue()


def test_scores_are_written_over(sdata: SpatialData) -> None:
    table = sdata["table"]
    score(sdata)
    columns = snapshot(table)
    score(sdata, genes=["gene1"], spots="nsl_train")
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


def test_scores_go_when_what_they_describe_is_made_anew(fitted: SpatialData) -> None:
    sdata = SpatialData(shapes=dict(fitted.shapes), tables={"table": fitted["table"].copy()})
    table = sdata["table"]
    before = snapshot(table)
    table.obs["mine_pcc"], table.var["nsl_note"] = 1.0, "mine"
    score(sdata, n_perms=0)
    score(sdata, n_perms=0, key_added="other")
    assert {"nsl_pcc", "other_pcc"} <= set(table.var) & set(table.obs)
    stp.tl.fit_ridge(sdata, features="position", genes=["gene0"], train_key="train", key_added="nsl")
    assert set(table.var) == {*before[0], "nsl_note"}
    assert set(table.obs) == {*before[1], "mine_pcc"}
    assert set(table.uns) == set(before[2])


# A table by itself


def test_a_table_by_itself_is_scored_like_its_spatialdata(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["counts"] = sp.csr_matrix(np.random.default_rng(0).poisson(50 * np.expm1(table.X.toarray())))
    alone = table.copy()
    here, there = (stp.tl.noise_ceiling(each, n_draws=2) for each in (sdata, alone))
    pd.testing.assert_frame_equal(here, there)
    here, there = (score(each, section_key=None) for each in (sdata, alone))
    assert sections(here) == ["B_spots", "C_spots"]
    pd.testing.assert_frame_equal(here, there)
    here, there = (stp.tl.summarize(frame, n_bootstrap=20) for frame in (here, there))
    pd.testing.assert_frame_equal(here, there)
    pd.testing.assert_frame_equal(table.var, alone.var)
    pd.testing.assert_frame_equal(table.obs, alone.obs)
    assert score(alone, spots="all", n_perms=0)["section"].cat.categories.tolist()[:3] == ["A", "B", "C"]
    backwards = table[::-1].copy()  # sections in the order of their regions, not of their rows
    del sdata.tables["table"]
    sdata["table"] = backwards
    alone = backwards.copy()
    for section_key in (None, "section"):
        here, there = (score(each, section_key=section_key) for each in (sdata, alone))
        pd.testing.assert_frame_equal(here, there)
    here, there = (stp.tl.noise_ceiling(each, n_draws=2) for each in (sdata, alone))
    pd.testing.assert_frame_equal(here, there)


def test_a_table_without_places_or_annotation(sdata: SpatialData) -> None:
    alone = sdata["table"].copy()
    del alone.uns["spatialdata_attrs"]
    assert sections(score(alone, section_key=None, n_perms=0)) == ["section"]
    assert sections(score(alone, section_key="region", n_perms=0)) == ["B_spots", "C_spots"]
    del alone.obsm["spatial"]
    fails(alone, KeyError, r"The table has no `obsm\['spatial'\]`")


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_backed_tables(sdata: SpatialData, tmp_path: Path, form: Callable[[np.ndarray], Any]) -> None:
    expected = score(sdata)
    table = sdata["table"]
    table.X = form(table.X.toarray())
    del table.var, table.uns["nsl_score"], table.obs["nsl_pcc"], table.obs["nsl_rmse"]
    table.write_h5ad(tmp_path / "table.h5ad")
    backed = ad.read_h5ad(tmp_path / "table.h5ad", backed="r")
    pd.testing.assert_frame_equal(score(backed), expected)
    backed.file.close()


# Whole or not at all


@contextmanager
def interrupted_at(moment: int) -> Iterator[None]:
    """Ctrl-C when the main thread enters or leaves a function for the n-th time."""
    events = 0

    def count(*_: Any) -> None:
        nonlocal events
        events += 1
        if events == moment:
            signal.raise_signal(signal.SIGINT)

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


def test_an_interrupt_leaves_all_or_nothing(fitted: SpatialData) -> None:
    table = fitted["table"].copy()
    sdata = SpatialData(shapes=dict(fitted.shapes), tables={"table": table})
    options = {"n_perms": 3, "n_bootstrap": 3}
    whole_events, before = 0, table.copy()

    def count(*_: Any) -> None:
        nonlocal whole_events
        whole_events += 1

    sys.setprofile(count)
    score(sdata, **options)
    sys.setprofile(None)
    after = snapshot(table)
    n_interrupts = 0
    moments = [*np.linspace(0.02, 0.8, 5), *np.linspace(0.88, 1, 19)]
    for moment in moments:
        del sdata.tables["table"]
        sdata["table"] = table = before.copy()
        try:
            with interrupted_at(int(moment * whole_events)):
                score(sdata, **options)
        except KeyboardInterrupt:
            n_interrupts += 1
        found = snapshot(table)
        assert found in (snapshot(before), after)
        if found == snapshot(before):
            score(sdata, **options)
    assert n_interrupts > len(moments) / 2
    assert snapshot(table) == after


# Bad input


def fails(sdata: SpatialData | AnnData, error: type[Exception], match: str, **options: Any) -> None:
    """Raises, and leaves the table as it was."""
    table = sdata if isinstance(sdata, AnnData) else sdata["table"]
    before = snapshot(table)
    with pytest.raises(error, match=match):
        score(sdata, **options)
    assert snapshot(table) == before


def test_no_such_layer(sdata: SpatialData) -> None:
    fails(sdata, KeyError, r"No predictions 'm2ost' in `layers`; it has \['nsl'\].*fit_nsl", key="m2ost")
    fails(sdata, KeyError, r"No measured expression 'log'; the table has \['X', 'nsl'\]", layer="log")
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
    fails(sdata, KeyError, r"No column 'test' in `obs`; its boolean columns are \['nsl_train'\]", spots="test")
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
    fails(
        sdata, ValueError, rf"`{slot}\['{column}'\]` exists and holds no result of stpredict under the key 'nsl_score'"
    )
