from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from anndata import AnnData
from geopandas import GeoDataFrame
from shapely import Point
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Identity, Translation, set_transformation

import stpredict as stp
from stpredict._data import slots
from stpredict.models import NSL

MakeSData = Callable[..., SpatialData]


@pytest.fixture(scope="module")
def model(make_sdata: MakeSData) -> NSL:
    """Genes 0 to 5 of one section."""
    return stp.tl.fit_nsl(make_sdata(n_spots=40), genes=[f"gene{j}" for j in range(6)], spot_scale=1.5, bits=4)


def keys(table: AnnData) -> dict[str, list[str]]:
    return {slot: sorted(set(getattr(table, slot)) - {None}) for slot in ("obs", "var", "uns", "obsm", "layers")}


def test_the_training_section_gets_the_same_predictions(make_sdata: MakeSData) -> None:
    sdata, again = make_sdata(), make_sdata()
    model = stp.tl.fit_nsl(sdata)
    assert stp.tl.predict(again, model) is None  # type: ignore[func-returns-value]
    np.testing.assert_array_equal(again["table"].layers["nsl"], sdata["table"].layers["nsl"])
    assert keys(again["table"]) == keys(sdata["table"])
    np.testing.assert_array_equal(again["table"].uns["nsl"]["weights"], model.weights)


def test_a_new_slide_is_predicted_well(make_sdata: MakeSData) -> None:
    model = stp.tl.fit_nsl(make_sdata(n_spots=60, size=(420, 420)))
    new = make_sdata(n_spots=60, size=(420, 420), seed=9, image_at="rotation", shapes_at="anisotropic")
    stp.tl.predict(new, model)
    table = new["table"]
    for j in (0, 1, 2):
        assert np.corrcoef(table.layers["nsl"][:, j], table.X[:, [j]].toarray().ravel())[0, 1] > 0.7


def test_a_table_of_several_regions(make_sdata: MakeSData, model: NSL) -> None:
    three = make_sdata(3, n_without_row=3)
    stp.tl.predict(three, model)
    table = three["table"]
    assert np.isfinite(table.layers["nsl"][:, :6]).all()
    assert np.isnan(table.layers["nsl"][:, 6:]).all()
    one = make_sdata(3, n_without_row=3)
    stp.tl.predict(one, model, shapes_key="B_spots")
    rows = (table.obs["section"] == "B").to_numpy()
    np.testing.assert_allclose(one["table"].layers["nsl"][rows], table.layers["nsl"][rows], atol=1e-4)
    assert np.isnan(one["table"].layers["nsl"][~rows]).all()


def test_fewer_and_other_genes(make_sdata: MakeSData, model: NSL, log: io.StringIO) -> None:
    whole, part = make_sdata(), make_sdata()
    stp.tl.predict(whole, model)
    part["table"] = part["table"][:, ["gene9", "gene4", "gene1"]].copy()
    stp.tl.predict(part, model)
    layer = part["table"].layers["nsl"]
    assert np.isnan(layer[:, 0]).all()
    np.testing.assert_array_equal(layer[:, 1:], whole["table"].layers["nsl"][:, [4, 1]])
    assert part["table"].var["nsl_fitted"].tolist() == [False, True, True]
    assert part["table"].uns["nsl"]["genes"].tolist() == model.genes
    assert "The table lacks 4 of the model's 6 genes" in log.getvalue()


def test_no_gene_in_common(make_sdata: MakeSData, model: NSL, log: io.StringIO) -> None:
    sdata = make_sdata()
    table = sdata["table"]
    table.var["symbol"] = table.var_names
    table.var_names = [f"ENSG0000000000{j}" for j in range(12)]
    before = keys(table)
    with pytest.raises(
        ValueError, match=r"none of the model's 6 genes \(such as \['gene0'.*'ENSG00000000000'.*`gene_key`"
    ):
        stp.tl.predict(sdata, model, table_key="table")
    stp.tl.predict(sdata, model)
    assert "None of the tables ['table'] has a gene of the model" in log.getvalue()
    assert "predictions go to a new table 'predictions'" in log.getvalue()
    assert sdata["predictions"].var_names.tolist() == model.genes
    assert keys(table) == before
    del sdata.tables["predictions"]
    stp.tl.predict(sdata, model, gene_key="symbol")
    expected = make_sdata()
    stp.tl.predict(expected, model)
    np.testing.assert_array_equal(table.layers["nsl"], expected["table"].layers["nsl"])
    assert list(sdata.tables) == ["table"]


def test_versions_of_ensembl_ids(make_sdata: MakeSData, model: NSL) -> None:
    sdata, expected = make_sdata(), make_sdata()
    ids = {gene: f"ENSG0000012345{j}" for j, gene in enumerate(model.genes)}
    versions = replace(model, genes=[f"{ids[gene]}.{j + 1}" for j, gene in enumerate(model.genes)])
    sdata["table"].var_names = [f"{ids[gene]}.99" if gene in ids else gene for gene in sdata["table"].var_names]
    stp.tl.predict(sdata, versions)
    stp.tl.predict(expected, model)
    np.testing.assert_array_equal(sdata["table"].layers["nsl"], expected["table"].layers["nsl"])
    assert sdata["table"].uns["nsl"]["genes"].tolist() == versions.genes


def test_expression_is_not_looked_at(make_sdata: MakeSData, model: NSL) -> None:
    expected, sdata = make_sdata(), make_sdata()
    stp.tl.predict(expected, model)
    sdata["table"].X = np.full(sdata["table"].shape, np.nan)
    stp.tl.predict(sdata, model)
    np.testing.assert_array_equal(sdata["table"].layers["nsl"], expected["table"].layers["nsl"])


def test_spots_off_the_image_are_nan(make_sdata: MakeSData, model: NSL) -> None:
    sdata = make_sdata()
    set_transformation(sdata["A_spots"], Translation([150, 0], axes=("x", "y")), "A")
    stp.tl.predict(sdata, model)
    histogram = stp.pp.color_histogram(sdata, spot_scale=1.5, inplace=False)
    assert histogram is not None
    off = histogram.n_pixels == 0
    assert 0 < off.sum() < 30
    np.testing.assert_array_equal(np.isnan(sdata["table"].layers["nsl"][:, :6]), off[:, None].repeat(6, axis=1))


@pytest.mark.parametrize("instances", ["int", "str"])
def test_a_slide_without_a_table_gets_one(make_sdata: MakeSData, model: NSL, tmp_path: Path, instances: str) -> None:
    sdata = make_sdata(table=False, instances=instances)
    stp.tl.predict(sdata, model)
    table = sdata["table"]
    assert list(table.var_names) == model.genes
    assert table.X is None
    assert np.isfinite(table.layers["nsl"]).all()
    with_table = make_sdata(instances=instances)
    stp.tl.predict(with_table, model)
    expected = with_table["table"]
    order = table.obs.set_index("instance_id").index.get_indexer(expected.obs["spot_id"])
    np.testing.assert_allclose(table.layers["nsl"][order], expected.layers["nsl"][:, :6], atol=1e-4)

    if instances == "int":
        return
    sdata.write(tmp_path / "slide.zarr")
    again = sd.read_zarr(tmp_path / "slide.zarr")
    np.testing.assert_array_equal(again["table"].layers["nsl"], table.layers["nsl"])
    stp.tl.predict(again, model, key_added="once_more")
    np.testing.assert_array_equal(again["table"].layers["once_more"], table.layers["nsl"])


def test_several_sections_without_a_table(make_sdata: MakeSData, model: NSL) -> None:
    sdata = make_sdata(2, table=False)
    with pytest.raises(ValueError, match="several spots elements.*`shapes_key`"):
        stp.tl.predict(sdata, model)
    assert not sdata.tables
    stp.tl.predict(sdata, model, shapes_key=["A_spots", "B_spots"], table_key="predicted")
    assert sdata["predicted"].shape == (60, 6)
    assert list(sdata.tables) == ["predicted"]


@pytest.mark.parametrize("table_key", ["A_image", "a/b", "a_SPOTS"])
def test_names_for_new_tables_are_checked_before_the_work(
    make_sdata: MakeSData, model: NSL, monkeypatch: pytest.MonkeyPatch, table_key: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("predicted before the key was checked")

    monkeypatch.setattr(NSL, "predict", refuse)
    with pytest.raises((KeyError, ValueError), match="table_key|" + table_key):
        stp.tl.predict(make_sdata(table=False), model, table_key=table_key)


# What was there before


def test_another_section_keeps_what_the_first_has(make_sdata: MakeSData, model: NSL) -> None:
    sdata, other = make_sdata(2, n_spots=16), make_sdata(2, n_spots=16)
    table = sdata["table"]
    in_b = (table.obs["section"] == "B").to_numpy()
    on_b = stp.tl.fit_nsl(sdata, genes=["gene1", "gene8"], shapes_key="B_spots", inplace=False)
    stp.tl.predict(sdata, model, shapes_key="A_spots")
    of_a = table.layers["nsl"][~in_b].copy()
    assert not table.obs["nsl_train"].any()
    stp.tl.predict(sdata, on_b, shapes_key="B_spots")
    stp.tl.predict(other, on_b)
    np.testing.assert_array_equal(table.layers["nsl"][~in_b], of_a)
    np.testing.assert_array_equal(table.layers["nsl"][in_b], other["table"].layers["nsl"][in_b])
    assert table.var_names[table.var["nsl_fitted"]].tolist() == [*model.genes, "gene8"]
    np.testing.assert_array_equal(table.obs["nsl_train"], in_b)
    assert table.uns["nsl"]["genes"].tolist() == on_b.genes
    stp.tl.predict(sdata, on_b, shapes_key="A_spots")  # replaces what another model said of A
    np.testing.assert_array_equal(np.isfinite(table.layers["nsl"]).any(axis=0), table.var["nsl_fitted"])
    assert table.var_names[table.var["nsl_fitted"]].tolist() == on_b.genes
    np.testing.assert_array_equal(table.layers["nsl"], other["table"].layers["nsl"])


def test_all_that_was_written_is_replaced(make_sdata: MakeSData, model: NSL) -> None:
    sdata = make_sdata()
    table = sdata["table"]
    stp.tl.fit_nsl(sdata)
    stp.tl.score(sdata, spots="all", n_perms=0)
    stp.tl.predict(sdata, replace(model, genes=["gene11", *model.genes[1:]]))
    assert table.var_names[table.var["nsl_fitted"]].tolist() == [*model.genes[1:], "gene11"]
    np.testing.assert_array_equal(np.isfinite(table.layers["nsl"]).all(axis=0), table.var["nsl_fitted"])
    assert [name for name in (*table.var, *table.obs, *table.uns) if "pcc" in name or "score" in name] == []


def test_other_genes_are_added_to_a_table_that_was_made_for_predictions(make_sdata: MakeSData, model: NSL) -> None:
    sdata = make_sdata(table=False)
    stp.tl.predict(sdata, model)
    before = sdata["table"].copy()
    sdata["table"].obs["cluster"] = "mine"
    sdata["table"].obsp["connectivities"] = np.eye(30)
    other = replace(model, genes=[f"gene{j}" for j in range(4, 10)])
    stp.tl.predict(sdata, other, key_added="other")
    table = sdata["table"]
    assert list(sdata.tables) == ["table"]
    assert table.var_names.tolist() == [f"gene{j}" for j in range(10)]
    np.testing.assert_array_equal(table.layers["nsl"][:, :6], before.layers["nsl"])
    np.testing.assert_array_equal(table.layers["other"][:, 4:], before.layers["nsl"])
    assert np.isnan(table.layers["nsl"][:, 6:]).all() and np.isnan(table.layers["other"][:, :4]).all()
    assert table.var["nsl_fitted"].tolist() == [True] * 6 + [False] * 4
    assert table.var["other_fitted"].tolist() == [False] * 4 + [True] * 6
    assert (table.obs["cluster"] == "mine").all()
    assert table.obsp["connectivities"].sum() == 30
    stp.tl.predict(sdata, other)  # under the key of the first
    assert sdata["table"].var["nsl_fitted"].tolist() == [False] * 4 + [True] * 6


def test_spots_that_a_model_was_fitted_to_are_known_by_what_they_show(make_sdata: MakeSData, tmp_path: Path) -> None:
    sdata = make_sdata(2, n_spots=16, n_genes=4)
    sdata["table"].obs["train"] = np.arange(32) % 2 == 0
    model = stp.models.load(stp.tl.fit_nsl(sdata, train_key="train").save(tmp_path / "model"))
    assert len(model.seen) == 16

    same = make_sdata(2, n_spots=16, n_genes=4)
    same["table"].obs_names = [f"spot {i}" for i in range(32)]
    stp.tl.predict(same, model)
    np.testing.assert_array_equal(same["table"].obs["nsl_train"], sdata["table"].obs["train"])

    third = make_sdata(3, n_spots=16, n_genes=4)
    alone = SpatialData(images={"C_image": third["C_image"]}, shapes={"C_spots": third["C_spots"]})
    reordered = make_sdata(2, n_spots=16, n_genes=4)
    reordered["table"] = reordered["table"][::-1].copy()
    reordered["table"].obs = reordered["table"].obs.assign(train=sdata["table"].obs["train"][::-1].to_numpy())
    both = sd.concatenate([reordered, alone])
    stp.tl.predict(both, model)
    np.testing.assert_array_equal(both["table"].obs["nsl_train"], both["table"].obs["train"])
    stp.tl.predict(alone, model)  # another slide
    assert not alone["table"].obs["nsl_train"].any()

    stained = make_sdata(2, n_spots=16, n_genes=4)
    stained["A_image"] = stained["A_image"].copy(data=stained["A_image"].data // 2)
    stp.tl.predict(stained, model)
    in_b = (stained["table"].obs["section"] == "B").to_numpy()
    np.testing.assert_array_equal(stained["table"].obs["nsl_train"], in_b & (np.arange(32) % 2 == 0))


def test_models_that_do_not_know_what_they_were_fitted_to(make_sdata: MakeSData, model: NSL) -> None:
    sdata = make_sdata(2, n_spots=16)
    unknown = replace(model, seen=np.empty(0, np.int64))
    stp.tl.predict(sdata, unknown)
    assert "nsl_train" not in sdata["table"].obs
    with pytest.raises(ValueError, match="Which spots the model 'nsl' was fitted to is not known.*`spots`"):
        stp.tl.score(sdata, n_perms=0)
    stp.tl.score(sdata, spots="all", n_perms=0, n_bootstrap=0)
    stp.tl.predict(sdata, model, shapes_key="B_spots")  # which tells nothing of those of A
    assert "nsl_train" not in sdata["table"].obs
    stp.tl.predict(sdata, model)
    assert not sdata["table"].obs["nsl_train"].any()


def test_results_are_written_over_but_not_those_of_others(make_sdata: MakeSData, model: NSL) -> None:
    sdata = make_sdata()
    stp.tl.predict(sdata, model)
    stp.tl.predict(sdata, model)
    sdata["table"].layers["mine"] = np.zeros((30, 12))
    with pytest.raises(ValueError, match=r"`layers\['mine'\]` exists and holds no result"):
        stp.tl.predict(sdata, model, key_added="mine")
    with pytest.raises(ValueError, match="`key_added` 'NSL' .* only in case"):
        stp.tl.predict(sdata, model, key_added="NSL")


# Beside other tables


def with_tiles(sdata: SpatialData) -> SpatialData:
    """A slide as LazySlide leaves it: tiles, and a table of their features, but no expression."""
    spots = sdata["A_spots"]
    squares = [
        Point(p.x, p.y).buffer(r, cap_style="square") for p, r in zip(spots.geometry, spots["radius"], strict=True)
    ]
    tiles = ShapesModel.parse(GeoDataFrame({"geometry": squares}), transformations={"A": Identity()})
    features = AnnData(np.random.default_rng(0).normal(size=(len(tiles), 4)).astype(np.float32))
    features.obs["tile_id"], features.obs["library_id"] = np.arange(len(tiles)), pd.Categorical(["tiles"] * len(tiles))
    table = TableModel.parse(features, region="tiles", region_key="library_id", instance_key="tile_id")
    return SpatialData(images={"A_image": sdata["A_image"]}, shapes={"tiles": tiles}, tables={"uni_tiles": table})


@pytest.mark.parametrize(
    ("options", "made"),
    [
        ({}, "predictions"),
        ({"table_key": "expression"}, "expression"),
        ({"table_key": "expression", "shapes_key": "tiles"}, "expression"),
    ],
    ids=["", "table", "table and tiles"],
)
def test_beside_a_table_of_features(make_sdata: MakeSData, model: NSL, options: dict[str, Any], made: str) -> None:
    sdata = with_tiles(make_sdata())
    before = keys(sdata["uni_tiles"])
    stp.tl.predict(sdata, model, **options)
    assert list(sdata.tables) == ["uni_tiles", made]
    assert sdata[made].shape == (30, 6)
    assert np.isfinite(sdata[made].layers["nsl"]).all()
    assert keys(sdata["uni_tiles"]) == before
    stp.tl.predict(sdata, replace(model, genes=[f"other{j}" for j in range(6)]), key_added="other")
    assert sdata[made].shape == (30, 12)


@pytest.mark.parametrize("table_key", [None, "expression"])
def test_beside_a_sample_sheet(make_sdata: MakeSData, model: NSL, log: io.StringIO, table_key: str | None) -> None:
    sdata = make_sdata(table=False)
    sdata["clinical"] = TableModel.parse(AnnData(obs=pd.DataFrame({"age": [61]}, index=["p1"])))
    stp.tl.predict(sdata, model, table_key=table_key)
    assert np.isfinite(sdata[table_key or "predictions"].layers["nsl"]).all()
    assert ("None of the tables ['clinical'] says that it annotates" in log.getvalue()) == (table_key is None)
    with pytest.raises(ValueError, match="'clinical' does not say which spots it annotates"):
        stp.tl.predict(sdata, model, table_key="clinical")


def test_several_tables_with_genes_of_the_model(make_sdata: MakeSData, model: NSL) -> None:
    sdata = make_sdata()
    sdata["again"] = sdata["table"].copy()
    with pytest.raises(ValueError, match=r"Several tables have genes of the model, \['table', 'again'\].*`table_key`"):
        stp.tl.predict(sdata, model)
    stp.tl.predict(sdata, model, table_key="again")
    assert "nsl" in sdata["again"].layers
    assert "nsl" not in sdata["table"].layers


def test_spots_without_a_row(make_sdata: MakeSData, model: NSL) -> None:
    sdata, whole = make_sdata(n_without_row=9), make_sdata()
    stp.tl.predict(whole, model)
    stp.tl.predict(sdata, model, table_added="of_rows")
    stp.tl.predict(sdata, model, table_key="of_spots")
    assert sdata["of_rows"].shape == (21, 6)
    assert sdata["of_spots"].shape == (30, 6)
    assert not sdata["table"].layers
    expected = pd.DataFrame(whole["table"].layers["nsl"][:, :6], index=whole["table"].obs["spot_id"])
    for name, instance_key in (("of_rows", "spot_id"), ("of_spots", "instance_id")):
        table = sdata[name]
        np.testing.assert_array_equal(table.layers["nsl"], expected.loc[table.obs[instance_key]])
    np.testing.assert_array_equal(sdata["of_rows"].X, sdata["of_rows"].layers["nsl"])


def test_layers_that_would_be_huge(make_sdata: MakeSData, model: NSL, monkeypatch: pytest.MonkeyPatch) -> None:
    sdata = make_sdata(n_spots=16)
    monkeypatch.setattr(slots, "MAX_LAYER_BYTES", 4 * 16 * 12 - 1)
    with pytest.raises(ValueError, match="16 spots x 12 genes takes .* GB.*Pass `table_added`"):
        stp.tl.predict(sdata, model)
    stp.tl.predict(sdata, model, table_added="predicted")
    assert sdata["predicted"].shape == (16, 6)


def test_places_for_squidpy(make_sdata: MakeSData, model: NSL) -> None:
    sdata = make_sdata(table=False, shapes_at="anisotropic")
    stp.tl.predict(sdata, model)
    table = sdata["table"]
    expected = make_sdata()
    spots = expected["A_spots"].loc[table.obs["instance_id"]].geometry
    np.testing.assert_allclose(table.obsm["spatial"], np.column_stack([spots.x, spots.y]))  # pixels, as Space Ranger's
    own = make_sdata()
    own["table"].obsm["spatial"] = np.ones((30, 2))
    stp.tl.predict(own, model)
    assert (own["table"].obsm["spatial"] == 1).all()


@pytest.mark.parametrize("what", ["nsl-her2", {"genes": []}, None, NSL], ids=["path", "dict", "None", "class"])
def test_what_is_no_model(make_sdata: MakeSData, what: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected a fitted model, got .*stp\.models\.load\(path\)"):
        stp.tl.predict(make_sdata(), what)


def test_what_is_no_spatialdata(make_sdata: MakeSData, model: NSL) -> None:
    with pytest.raises(TypeError, match="Expected a SpatialData, got AnnData.*that holds this table"):
        stp.tl.predict(make_sdata()["table"], model)  # type: ignore[arg-type]


def test_devices_are_checked(make_sdata: MakeSData, model: NSL) -> None:
    with pytest.raises(ValueError, match="`device` is 'tpu'"):
        stp.tl.predict(make_sdata(), model, device="tpu")


def test_saved_models_predict_the_same(make_sdata: MakeSData, model: NSL, tmp_path: Path) -> None:
    a, b = make_sdata(), make_sdata()
    stp.tl.predict(a, model)
    stp.tl.predict(b, stp.models.load(model.save(tmp_path / "model")))
    np.testing.assert_array_equal(a["table"].layers["nsl"], b["table"].layers["nsl"])
