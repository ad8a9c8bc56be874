from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import torch
from anndata import AnnData
from scipy.stats import pearsonr
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from spatialdata import SpatialData
from spatialdata.models import TableModel
from spatialdata.transformations import Translation, set_transformation

import stpredict as stp

MakeSData = Callable[..., SpatialData]


def keys(table: AnnData) -> dict[str, list[str]]:
    slots = ("obs", "var", "uns", "obsm", "varm", "layers", "obsp")
    return {slot: sorted(set(getattr(table, slot)) - {None}) for slot in slots}


def with_features(sdata: SpatialData, held_out: str = "B", d: int = 6) -> SpatialData:
    """Features that expression follows, and all but one section to train on."""
    table = sdata["table"]
    rng = np.random.default_rng(0)
    table.obsm["X_uni"] = (table.X[:, :3] @ rng.normal(size=(3, d)) + rng.normal(size=(table.n_obs, d))) * 10
    table.obs["train"] = (table.obs["section"] != held_out).to_numpy()
    return sdata


@pytest.fixture
def sdata(make_sdata: MakeSData) -> SpatialData:
    return with_features(make_sdata(2))


def means(patches: torch.Tensor) -> torch.Tensor:
    return patches.mean(dim=(2, 3))


# What is written


def test_slots(sdata: SpatialData) -> None:
    table = sdata["table"]
    genes = ["gene4", "gene0", "gene7"]
    model = stp.tl.fit_ridge(sdata, features="X_uni", genes=genes, train_key="train")
    layer = table.layers["ridge"]
    assert (layer.dtype, layer.shape) == (np.float32, table.shape)
    np.testing.assert_array_equal(np.isfinite(layer), np.tile(table.var_names.isin(genes), (60, 1)))
    np.testing.assert_array_equal(table.var["ridge_fitted"], table.var_names.isin(genes))
    about = table.uns["ridge"]
    assert about["genes"].tolist() == genes == model.genes
    np.testing.assert_array_equal(about["alpha"], model.alpha)
    np.testing.assert_array_equal(about["degrees_of_freedom"], model.degrees_of_freedom)
    assert model.reads == {"kind": "features", "sources": {"X_uni": {"from": "obsm", "n_features": 6}}}
    np.testing.assert_array_equal(table.obs["ridge_train"], table.obs["train"])
    params = {
        name: about["params"][name] for name in ("model", "n_components", "alpha", "layer", "train_key", "n_train")
    }
    assert params == {
        "model": "ridge",
        "n_components": 256,
        "alpha": "gcv",
        "layer": "X",
        "train_key": "train",
        "n_train": 30,
    }
    assert set(table.obsm) == {"X_uni"}


def test_equal_to_scikit_learn(sdata: SpatialData) -> None:
    table = sdata["table"]
    rows = table.obs["train"].to_numpy()
    genes = ["gene0", "gene1", "gene3"]
    expression = table[:, genes].X.toarray()
    pipeline = make_pipeline(StandardScaler(), PCA(4, random_state=0), SklearnRidge(100 / (4 * 3)))
    expected = pipeline.fit(table.obsm["X_uni"][rows], expression[rows]).predict(table.obsm["X_uni"])
    stp.tl.fit_ridge(sdata, features="X_uni", genes=genes, train_key="train", n_components=4, alpha="hest")
    np.testing.assert_allclose(table[:, genes].layers["ridge"], expected, rtol=1e-4)


def test_held_out_rows_are_never_looked_at(sdata: SpatialData) -> None:
    options: dict[str, Any] = {"features": ["X_uni", "color_statistics"], "train_key": "train", "n_components": 5}
    model = stp.tl.fit_ridge(sdata, **options)
    table = sdata["table"]
    held_out = ~table.obs["train"].to_numpy()
    expression = table.X.toarray()
    expression[held_out] = np.nan
    table.X = expression
    table.obsm["X_uni"][held_out] *= 1000
    sdata["B_image"] = sdata["B_image"].copy(data=sdata["B_image"].data // 2)
    again = stp.tl.fit_ridge(sdata, **options)
    for name in ("mean", "scale", "components", "coef", "intercept", "alpha"):
        np.testing.assert_array_equal(getattr(again, name), getattr(model, name), err_msg=name)


@pytest.mark.parametrize("features", ["color_statistics", "mean_od", "color_histogram", ["mean_od", "position"]])
def test_what_follows_the_stains_is_predicted(make_sdata: MakeSData, features: Any) -> None:
    sdata = with_features(make_sdata(3, size=(420, 420), n_spots=64))
    stp.tl.fit_ridge(sdata, features=features, train_key="train")
    table = sdata["table"][sdata["table"].obs["section"] == "B"]
    pcc = [np.corrcoef(table.layers["ridge"][:, j], table.X[:, [j]].toarray().ravel())[0, 1] for j in range(12)]
    assert min(np.delete(pcc, [3, 7, 11])) > 0.7  # genes 3, 7 and 11 are noise
    assert np.nanmax(np.abs(np.array(pcc)[[3, 7, 11]])) < 0.5


def test_not_in_place_and_failures_leave_the_table_alone(sdata: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(sdata["table"])
    model = stp.tl.fit_ridge(sdata, inplace=False)
    assert keys(sdata["table"]) == before
    assert model.genes

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stp.models.Ridge, "fit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stp.tl.fit_ridge(sdata)
    assert keys(sdata["table"]) == before


def test_round_trip(sdata: SpatialData, tmp_path: Path) -> None:
    model = stp.tl.fit_ridge(sdata, features=["color_statistics", "position", means], image_size=8, key_added="r")
    table = sdata["table"]
    table.write_h5ad(tmp_path / "table.h5ad")
    again = ad.read_h5ad(tmp_path / "table.h5ad")
    np.testing.assert_array_equal(again.layers["r"], table.layers["r"])
    np.testing.assert_array_equal(again.obsm["r_features"], table.obsm["r_features"])
    np.testing.assert_array_equal(again.uns["r"]["alpha"], model.alpha)
    sources = stp.models.load(model.save(tmp_path / "model")).reads["sources"]
    assert sources["color_statistics"]["spot_scales"] == [0.5, 1, 2, 3, 4, 6]
    assert sources["position"]["frames"] == model.reads["sources"]["position"]["frames"]


# Features


def test_no_image_is_needed_for_what_is_in_the_table(sdata: SpatialData) -> None:
    expected = stp.tl.fit_ridge(sdata, features=["X_uni", "position"], inplace=False)
    blind = SpatialData(shapes=dict(sdata.shapes), tables={"table": sdata["table"]})
    model = stp.tl.fit_ridge(blind, features=["X_uni", "position"])
    np.testing.assert_array_equal(model.coef, expected.coef)
    stp.tl.predict(blind, model, key_added="again")
    np.testing.assert_array_equal(blind["table"].layers["again"], blind["table"].layers["ridge"])
    with pytest.raises(ValueError, match=r"There is no image in `sdata\.images`"):
        stp.tl.fit_ridge(blind, features=["X_uni", "mean_od"])
    by_place = stp.tl.fit_ridge(blind, features="position", key_added="place")
    bare = SpatialData(shapes={"A_spots": sdata["A_spots"]})
    stp.tl.predict(bare, by_place)
    assert np.isfinite(bare["table"].layers["ridge"]).all()


def test_training_spots_that_lack_features_are_left_out(sdata: SpatialData, log: io.StringIO) -> None:
    table = sdata["table"]
    train, held_out = np.flatnonzero(table.obs["train"]), np.flatnonzero(~table.obs["train"])
    lost = np.array([train[2], train[9], held_out[4]])
    table.obsm["X_uni"][lost, 1] = np.nan
    model = stp.tl.fit_ridge(sdata, features="X_uni", genes=["gene0", "gene1"], train_key="train")
    assert model.params["n_train"] == 28
    assert "2 training spots lack a spot, pixels or a feature" in log.getvalue()
    layer = np.asarray(table[:, ["gene0", "gene1"]].layers["ridge"])
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(layer).all(axis=1)), np.sort(lost))
    table.obs["train"] = table.obs["train"].to_numpy() & ~np.isin(np.arange(60), lost)
    again = stp.tl.fit_ridge(sdata, features="X_uni", genes=["gene0", "gene1"], train_key="train")
    np.testing.assert_array_equal(again.coef, model.coef)


def test_training_spots_that_all_lack_features(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.obsm["X_uni"][table.obs["train"].to_numpy(), 0] = np.nan
    table.obsm["Y"] = np.where(np.arange(60) < 3, np.nan, 1.0)[:, None]
    before = keys(table)
    with pytest.raises(
        ValueError, match=r"None of the 30 training spots has all features; missing \(NaN\) are 'Y' in .*'X_uni' in 30"
    ):
        stp.tl.fit_ridge(sdata, features=["Y", "X_uni"], train_key="train")
    table.obsm["X_uni"][:5] = 1
    with pytest.raises(ValueError, match="training spots .*; the model needs 12"):
        stp.tl.fit_ridge(sdata, features="X_uni", train_key="train")
    assert keys(table) == before


def test_spots_off_the_image_are_nan(sdata: SpatialData) -> None:
    set_transformation(sdata["B_spots"], Translation([150, 0], axes=("x", "y")), "B")
    stp.pp.color_statistics(sdata)
    stp.tl.fit_ridge(sdata, features="color_statistics")
    lost = np.isnan(sdata["table"].obsm["color_statistics"]).any(axis=1)
    assert 0 < lost.sum() < 30
    np.testing.assert_array_equal(np.isnan(sdata["table"].layers["ridge"]).all(axis=1), lost)


def test_features_that_say_nothing_are_warned_of(sdata: SpatialData, log: io.StringIO) -> None:
    noise = np.random.default_rng(3).normal(size=(60, 13))
    independent = np.linalg.qr(noise - noise.mean(axis=0))[0]
    sdata["table"].obsm["noise"] = independent[:, :1]
    sdata["table"].X = 3 + independent[:, 1:].astype(np.float32)
    stp.tl.fit_ridge(sdata, features="noise")
    assert "Cross-validation finds that the features say nothing about" in log.getvalue()


def test_what_an_encoder_made_is_used_again(sdata: SpatialData) -> None:
    calls = []

    def encoder(patches: torch.Tensor) -> torch.Tensor:
        calls.append(len(patches))
        return means(patches)

    first = stp.tl.fit_ridge(sdata, features=["mean_od", encoder], image_size=8)
    table = sdata["table"]
    assert set(table.obsm) == {"X_uni", "ridge_features", "spatial"}
    assert sum(calls) == 60
    again = stp.tl.fit_ridge(sdata, features=["mean_od", "ridge_features"], key_added="again")
    assert sum(calls) == 60
    np.testing.assert_array_equal(again.coef, first.coef)
    stp.tl.fit_ridge(sdata, features=encoder, image_size=8)  # overwrites its own
    table.obsm["other_features"] = np.zeros((60, 2))
    with pytest.raises(ValueError, match=r"`obsm\['other_features'\]` exists and holds no result"):
        stp.tl.fit_ridge(sdata, features=encoder, image_size=8, key_added="other")
    stp.tl.fit_ridge(sdata, features="X_uni", key_added="other")
    assert not table.obsm["other_features"].any()
    stp.tl.fit_ridge(sdata, features="X_uni")  # replaces all of the first
    assert "ridge_features" not in table.obsm


def test_features_of_an_encoder_section_by_section(sdata: SpatialData) -> None:
    table = sdata["table"]
    in_b = (table.obs["section"] == "B").to_numpy()
    model = stp.tl.fit_ridge(sdata, features=means, image_size=8)
    of_both = table.obsm["ridge_features"].copy()
    stp.tl.predict(sdata, model, encoder=lambda patches: means(patches) / 2, shapes_key="B_spots")
    np.testing.assert_allclose(table.obsm["ridge_features"], np.where(in_b[:, None], of_both / 2, of_both))
    both = sd.concatenate({"x": sdata}, concatenate_tables=True)  # which drops `uns`
    (name,) = both.tables
    stp.tl.fit_ridge(both, features=means, image_size=8)
    np.testing.assert_allclose(both[name].obsm["ridge_features"], of_both)


def tables_of_features(sdata: SpatialData) -> SpatialData:
    """The features in a table of their own, of other spots too, in another order, as LazySlide and squidpy have them."""
    table = sdata["table"]
    order = np.random.default_rng(1).permutation(60)
    features = AnnData(table.obsm["X_uni"][order].astype(np.float32), layers={"raw": np.zeros((60, 6))})
    features.obs = pd.DataFrame(
        {"slide": pd.Categorical(table.obs["region"].astype(str).iloc[order]), "tile": table.obs["spot_id"].iloc[order]}
    ).set_axis([f"tile {i}" for i in range(60)])
    features.obsm["X_pca"] = features.X[:, :3]
    sdata["uni_tiles"] = TableModel.parse(
        features, region=["A_spots", "B_spots"], region_key="slide", instance_key="tile"
    )
    return sdata


@pytest.mark.parametrize("key", [None, "X_pca"])
def test_features_in_another_table(make_sdata: MakeSData, sdata: SpatialData, key: str | None, tmp_path: Path) -> None:
    sdata["table"].obsm["X_uni"] = sdata["table"].obsm["X_uni"].astype(np.float32)
    sdata["table"].obsm["X_pca"] = sdata["table"].obsm["X_uni"][:, :3]
    expected = stp.tl.fit_ridge(sdata, features=key or "X_uni", train_key="train", inplace=False)
    sdata = tables_of_features(sdata)
    model = stp.tl.fit_ridge(sdata, features=[("uni_tiles", key)], train_key="train", table_key="table")
    np.testing.assert_allclose(model.coef, expected.coef, rtol=1e-9)
    again = stp.models.load(model.save(tmp_path / "model"))
    other = tables_of_features(with_features(make_sdata(2)))
    other["uni_tiles"] = other["uni_tiles"][3:, ::-1].copy()  # columns are known by name
    stp.tl.predict(other, again)
    lost = np.isnan(other["table"].layers["ridge"]).all(axis=1)
    assert lost.sum() == 3
    np.testing.assert_allclose(other["table"].layers["ridge"][~lost], sdata["table"].layers["ridge"][~lost], rtol=1e-5)
    np.testing.assert_array_equal(other["table"].obs["ridge_train"], sdata["table"].obs["train"].to_numpy() & ~lost)


def test_features_in_a_table_that_does_not_fit(sdata: SpatialData) -> None:
    sdata = tables_of_features(sdata)
    options: dict[str, Any] = {"features": ("uni_tiles", None), "table_key": "table"}
    features = sdata["uni_tiles"]
    before = keys(sdata["table"])
    with pytest.raises(KeyError, match=r"`features` names the table 'conch'; there is \['table', 'uni_tiles'\]"):
        stp.tl.fit_ridge(sdata, features=("conch", None), table_key="table")
    with pytest.raises(KeyError, match=r"The table 'uni_tiles' has no `obsm\['X_umap'\]`, only \['X_pca'\]"):
        stp.tl.fit_ridge(sdata, features=("uni_tiles", "X_umap"), table_key="table")
    with pytest.raises(ValueError, match="Several tables annotate spots.*`table_key`"):
        stp.tl.fit_ridge(sdata, features=("uni_tiles", None))
    tiles = features.obs["tile"].to_numpy()
    features.obs["tile"] = np.where(np.arange(60) == 7, tiles[8], tiles)
    features.obs["slide"] = features.obs["slide"].where(np.arange(60) != 7, features.obs["slide"].iloc[8])
    with pytest.raises(
        ValueError, match=r"Several rows of the table 'uni_tiles' belong to the same spot.*expected one"
    ):
        stp.tl.fit_ridge(sdata, **options)
    features.obs["tile"] = [str(tile) for tile in tiles]
    with pytest.raises(ValueError, match="The table 'uni_tiles' has features for none of the spots"):
        stp.tl.fit_ridge(sdata, **options)
    assert keys(sdata["table"]) == before


def test_columns_of_a_data_frame_are_known_by_name(make_sdata: MakeSData, tmp_path: Path) -> None:
    names = [f"summary_{i}" for i in range(6)]
    sdata, other = with_features(make_sdata(2)), with_features(make_sdata(2))
    for slide in (sdata, other):
        slide["table"].obsm["img"] = pd.DataFrame(slide["table"].obsm["X_uni"], slide["table"].obs_names, names)
    model = stp.models.load(stp.tl.fit_ridge(sdata, features="img", genes=["gene0"]).save(tmp_path / "model"))
    frame = other["table"].obsm["img"]
    other["table"].obsm["img"] = pd.concat([frame, frame[["summary_2"]]], axis=1)
    with pytest.raises(ValueError, match=r"`obsm\['img'\]` has columns of the same name, \['summary_2'\]"):
        stp.tl.predict(other, model)
    other["table"].obsm["img"] = frame[names[::-1]].assign(more=1.0)
    stp.tl.predict(other, model)
    np.testing.assert_array_equal(other["table"].layers["ridge"], sdata["table"].layers["ridge"])
    other["table"].obsm["img"] = frame.rename(columns=lambda name: name.replace("summary", "texture"))
    with pytest.raises(KeyError, match=r"`obsm\['img'\]` lacks 6 columns that the model reads, such as \['summary_0'"):
        stp.tl.predict(other, model)
    other["table"].obsm["img"] = frame.to_numpy()
    with pytest.raises(
        ValueError, match=r"`obsm\['img'\]` is no data frame, but the model .*by name.*Pass a data frame"
    ):
        stp.tl.predict(other, model)


def test_a_table_by_itself(sdata: SpatialData) -> None:
    expected = stp.tl.fit_ridge(sdata, features=["X_uni", "position"], train_key="train")
    table = sdata["table"].copy()
    xy = [
        sdata[region].geometry.loc[spot] for region, spot in zip(table.obs["region"], table.obs["spot_id"], strict=True)
    ]
    table.obsm["spatial"] = np.array([(point.x, point.y) for point in xy])
    model = stp.tl.fit_ridge(table, features=["X_uni", "position"], train_key="train", key_added="alone")
    np.testing.assert_allclose(model.coef, expected.coef, rtol=1e-6)
    np.testing.assert_allclose(table.layers["alone"], sdata["table"].layers["ridge"], rtol=1e-4)
    with pytest.raises(
        TypeError, match="Expected a SpatialData, got AnnData. Pass the SpatialData that holds this table"
    ):
        stp.tl.fit_ridge(table, features="mean_od")
    with pytest.raises(ValueError, match="`table_added` needs a SpatialData"):
        stp.tl.fit_ridge(table, features="X_uni", table_added="own")


# Prediction elsewhere


@pytest.mark.parametrize(
    "features", ["color_statistics", "mean_od", "color_histogram", "X_uni", ["X_uni", "position"]], ids=str
)
def test_predictions_on_another_slide(make_sdata: MakeSData, tmp_path: Path, features: Any) -> None:
    sdata = with_features(make_sdata(3))
    model = stp.tl.fit_ridge(sdata, features=features, n_components=20)
    again = stp.models.load(model.save(tmp_path / "model"))
    other = with_features(make_sdata(3))
    assert stp.tl.predict(other, again) is None  # type: ignore[func-returns-value]
    np.testing.assert_array_equal(other["table"].layers["ridge"], sdata["table"].layers["ridge"])
    np.testing.assert_array_equal(other["table"].uns["ridge"]["alpha"], model.alpha)
    assert other["table"].obs["ridge_train"].all()
    assert keys(other["table"]) == keys(sdata["table"])


def test_settings_of_the_model_are_used_elsewhere(make_sdata: MakeSData) -> None:
    sdata, other = make_sdata(), make_sdata()
    stp.pp.color_statistics(sdata, spot_scale=(1, 2))
    model = stp.tl.fit_ridge(sdata)
    assert len(model.mean) == 66
    stp.pp.color_statistics(other, spot_scale=(3,))
    kept = other["table"].obsm["color_statistics"].copy()
    stp.tl.predict(other, model)
    np.testing.assert_array_equal(other["table"].layers["ridge"], sdata["table"].layers["ridge"])
    np.testing.assert_array_equal(other["table"].obsm["color_statistics"], kept)


def test_a_slide_without_a_table(make_sdata: MakeSData) -> None:
    model = stp.tl.fit_ridge(make_sdata(), features=["mean_od", "position"])
    slide = make_sdata(table=False)
    stp.tl.predict(slide, model)
    assert np.isfinite(slide["table"].layers["ridge"]).all()
    needy = stp.tl.fit_ridge(with_features(make_sdata()), features="X_uni")
    slide = make_sdata(table=False)
    with pytest.raises(KeyError, match=r"The model reads \['X_uni'\] in `obsm`, which has \[\]"):
        stp.tl.predict(slide, needy)
    assert not slide.tables


def test_an_encoder_is_given_again(make_sdata: MakeSData, tmp_path: Path) -> None:
    sdata, other = make_sdata(), make_sdata()
    model = stp.tl.fit_ridge(sdata, features=means, image_size=8, spot_scale=1.0)
    again = stp.models.load(model.save(tmp_path / "model"))
    before = keys(other["table"])
    with pytest.raises(ValueError, match="pass it as `encoder`"):
        stp.tl.predict(other, again)
    with pytest.raises(ValueError, match="The encoder makes 192 features; the model was fitted to 3"):
        stp.tl.predict(other, again, encoder=lambda patches: patches.flatten(1))
    assert keys(other["table"]) == before
    stp.tl.predict(other, again, encoder=means)
    np.testing.assert_array_equal(other["table"].layers["ridge"], sdata["table"].layers["ridge"])
    nsl = stp.tl.fit_nsl(sdata, genes=["gene0"])
    with pytest.raises(ValueError, match="`encoder` is given, but the model reads histogram, no encoder's features"):
        stp.tl.predict(other, nsl, encoder=means)


# What cannot be fitted


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_components": 0}, ValueError, "`n_components` is 0; expected a positive integer or None"),
        ({"n_components": 2.5}, ValueError, "`n_components` is 2.5"),
        ({"alpha": -1}, ValueError, "`alpha` is -1; expected 'gcv', 'hest' or a number that is not negative"),
        ({"alpha": "loo"}, ValueError, "`alpha` is 'loo'"),
        ({"alpha": np.nan}, ValueError, "`alpha` is nan"),
        ({"alpha": True}, ValueError, "`alpha` is True"),
        ({"features": "huge"}, ValueError, "Expected finite numbers of at most"),
        ({"features": "words"}, TypeError, r"`obsm\['words'\]` has values that are no numbers"),
        ({"features": "imaginary"}, TypeError, r"`obsm\['imaginary'\]` has values that are no numbers \(complex"),
        ({"features": "flat"}, ValueError, r"`obsm\['flat'\]` has the shape \(60, 2, 2\); expected \(n_obs, d\)"),
        ({"features": "X_conch"}, KeyError, "No features 'X_conch' in `obsm`"),
        ({"features": means, "image_size": 0}, ValueError, "`image_size` is 0"),
        ({"genes": "nothing"}, KeyError, "not in `var_names`"),
        ({"train_key": "no"}, KeyError, "No column 'no'"),
        ({"train_key": "few"}, ValueError, "10 training spots .*; the model needs 12"),
        ({"key_added": "mine"}, ValueError, r"`layers\['mine'\]` exists and holds no result"),
        ({"device": "tpu"}, ValueError, "`device` is 'tpu'"),
        ({"features": "constant"}, ValueError, "All 2 features have the same value on all 60 training spots"),
    ],
)
def test_bad_arguments(sdata: SpatialData, options: dict[str, Any], error: type[Exception], message: str) -> None:
    table = sdata["table"]
    table.obs["few"] = np.arange(60) < 10
    table.obsm["constant"], table.layers["mine"] = np.ones((60, 2)), np.zeros(table.shape)
    table.obsm["huge"] = np.random.default_rng(0).normal(size=(60, 2)) * 1e300
    table.obsm["words"] = pd.DataFrame({"a": ["x", "y"] * 30}, index=table.obs_names)
    table.obsm["imaginary"], table.obsm["flat"] = np.ones((60, 2), complex), np.ones((60, 2, 2))
    before = keys(table)
    with pytest.raises(error, match=message):
        stp.tl.fit_ridge(sdata, **options)
    assert keys(table) == before


# Real sections


def test_color_statistics_beat_mean_od_on_a_held_out_section(her2st: SpatialData) -> None:
    table = her2st["table"]
    table.obs["train"] = (table.obs["section"] != "C4").to_numpy()
    rows = ~table.obs["train"].to_numpy()
    median = {}
    for features in ("mean_od", "color_statistics"):
        model = stp.tl.fit_ridge(her2st, features=features, genes=250, train_key="train")
        tested = table[rows, model.genes]
        measured, predicted = tested.X.toarray(), np.asarray(tested.layers["ridge"])
        median[features] = np.nanmedian(pearsonr(measured, predicted).statistic)
    # Measured: 0.252 and 0.222.
    assert median["color_statistics"] > 0.22
    assert median["color_statistics"] > median["mean_od"] + 0.015 > 0.2
