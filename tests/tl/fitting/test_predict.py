from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.transformations import Translation, set_transformation

import stpredict as stp
from stpredict.models import NSL

MakeSData = Callable[..., SpatialData]


@pytest.fixture(scope="module")
def model(make_sdata: MakeSData) -> NSL:
    """Genes 0 to 5 of one section."""
    return stp.tl.fit_nsl(make_sdata(n_spots=40), genes=[f"gene{j}" for j in range(6)], spot_scale=1.5, bits=4)


def keys(table: AnnData) -> dict[str, list[str]]:
    return {slot: sorted(getattr(table, slot).keys()) for slot in ("obs", "var", "uns", "obsm", "layers")}


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
    assert table.uns["color_histogram"]["field"] == 1.5
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


def test_no_gene_in_common(make_sdata: MakeSData, model: NSL) -> None:
    sdata = make_sdata()
    sdata["table"].var_names = [f"ENSG{j}" for j in range(12)]
    before = keys(sdata["table"])
    with pytest.raises(
        ValueError, match=r"none of the model's 6 genes \(such as \['gene0'.*'ENSG0'.*same kind of gene"
    ):
        stp.tl.predict(sdata, model)
    assert keys(sdata["table"]) == before


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
    off = sdata["table"].obs["n_pixels"].to_numpy() == 0
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


def test_results_are_written_over_but_not_those_of_others(make_sdata: MakeSData, model: NSL) -> None:
    sdata = make_sdata()
    stp.tl.predict(sdata, model)
    stp.tl.predict(sdata, model)
    sdata["table"].layers["mine"] = np.zeros((30, 12))
    with pytest.raises(ValueError, match=r"`layers\['mine'\]` exists and holds no predictions"):
        stp.tl.predict(sdata, model, key_added="mine")
    with pytest.raises(ValueError, match="`key_added` 'NSL' .* only in case"):
        stp.tl.predict(sdata, model, key_added="NSL")


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
