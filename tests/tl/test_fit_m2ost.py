from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spatialdata import SpatialData

import stpredict as stp
from stpredict.tl import _training

SMALL: dict[str, Any] = {
    "preset": "tiny",
    "network_kwargs": {"image_size": 32, "depth": 1, "width": 16, "levels": 2, "mlp_width": 16, "gate_width": 16},
    "max_epochs": 2,
    "device": "cpu",
    "trainer_kwargs": {"enable_progress_bar": False},
}


@pytest.fixture
def sdata() -> SpatialData:
    sdata = stp.datasets.synthetic(n_spots=30, n_genes=10)
    sdata["table"].obs["train"] = (sdata["table"].obs["section"] == "S1").to_numpy()
    return sdata


def contents(sdata: SpatialData) -> dict[str, list[str]]:
    table = sdata["table"]
    return {slot: sorted(getattr(table, slot)) for slot in ("obs", "var", "uns", "obsm", "layers")}


def test_what_is_written(sdata: SpatialData) -> None:
    model = stp.tl.fit_m2ost(sdata, train_key="train", **SMALL)
    table = sdata["table"]
    assert table.layers["m2ost"].shape == table.shape
    assert table.layers["m2ost"].dtype == np.float32
    assert np.isfinite(table.layers["m2ost"]).all()
    assert table.var["m2ost_fitted"].all()
    assert list(table.uns["m2ost"]["genes"]) == model.genes == list(table.var_names)
    assert set(table.uns["m2ost"]["history"]) == {"train_loss", "val_loss", "val_pcc", "learning_rate"}
    assert len(table.uns["m2ost"]["history"]["train_loss"]) == 2
    params = table.uns["m2ost"]["params"]
    assert params["model"] == "m2ost"
    assert (params["n_train"], params["n_validation"], params["validation_on"]) == (30, 0, "none")
    assert "2 levels of 32 x 32 pixels" in repr(model)
    assert f"2 epochs; training loss {model.history['train_loss'][1]:.4f} in the last" in repr(model)


def test_validation_spots_are_set_aside(sdata: SpatialData) -> None:
    model = stp.tl.fit_m2ost(sdata, validation=0.3, inplace=False, **SMALL)
    assert (model.params["n_train"], model.params["n_validation"]) == (30, 30)
    assert model.params["validation_on"] in ("patient A", "patient B")
    best = int(np.argmin(model.history["val_loss"]))
    assert f"lowest validation loss {model.history['val_loss'][best]:.4f} in epoch {best}" in repr(model)


def test_held_out_rows_are_never_looked_at(sdata: SpatialData) -> None:
    model = stp.tl.fit_m2ost(sdata, train_key="train", genes=list(sdata["table"].var_names), **SMALL)
    table = sdata["table"]
    expression = table.X.toarray()
    expression[~table.obs["train"].to_numpy()] = np.nan
    table.X = expression
    again = stp.tl.fit_m2ost(sdata, train_key="train", genes=list(table.var_names), **SMALL)
    for a, b in zip(model.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(a, b)
    np.testing.assert_array_equal(model.mean, again.mean)


def test_round_trip_and_prediction_elsewhere(sdata: SpatialData, tmp_path: Path) -> None:
    model = stp.tl.fit_m2ost(sdata, train_key="train", **SMALL)
    folder = model.save(tmp_path / "model")
    loaded = stp.models.load(folder)
    assert loaded.genes == model.genes
    assert loaded.params == model.params
    np.testing.assert_array_equal(loaded.history["train_loss"], model.history["train_loss"])
    before = sdata["table"].layers["m2ost"].copy()
    stp.tl.predict(sdata, loaded, key_added="again", device="cpu")
    np.testing.assert_allclose(sdata["table"].layers["again"], before, rtol=1e-2, atol=1e-2)
    sdata.write(tmp_path / "sdata.zarr")
    back = SpatialData.read(tmp_path / "sdata.zarr")
    np.testing.assert_array_equal(back["table"].layers["m2ost"], before)
    assert set(back["table"].uns["m2ost"]["history"]) == set(model.history)


def test_slide_without_table(sdata: SpatialData) -> None:
    model = stp.tl.fit_m2ost(sdata, train_key="train", **SMALL)
    slide = SpatialData(images={"S2_image": sdata["S2_image"]}, shapes={"S2_spots": sdata["S2_spots"]})
    stp.tl.predict(slide, model, device="cpu")
    rows = (sdata["table"].obs["section"] == "S2").to_numpy()
    expected = np.asarray(sdata["table"].layers["m2ost"])[rows]
    np.testing.assert_allclose(np.asarray(slide["table"].layers["m2ost"]), expected, rtol=1e-2, atol=1e-2)


def test_spots_off_the_image_are_nan(sdata: SpatialData) -> None:
    from shapely.affinity import translate

    spots = sdata["S2_spots"]
    name = spots.index[0]
    spots.loc[name, "geometry"] = translate(spots.loc[name, "geometry"], xoff=1e5)
    sdata.shapes["S2_spots"] = spots
    stp.tl.fit_m2ost(sdata, train_key="train", **SMALL)
    table = sdata["table"]
    lost = ((table.obs["region"] == "S2_spots") & (table.obs["spot_id"] == name)).to_numpy()
    assert lost.sum() == 1
    predicted = np.asarray(table.layers["m2ost"])
    assert np.isnan(predicted[lost]).all()
    assert np.isfinite(predicted[~lost]).all()


def test_not_in_place_and_failures_leave_the_table_alone(sdata: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(sdata)
    stp.tl.fit_m2ost(sdata, inplace=False, **SMALL)
    assert contents(sdata) == before

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_training, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stp.tl.fit_m2ost(sdata, **SMALL)
    assert contents(sdata) == before


def test_checkpoint_folder_of_other_settings(sdata: SpatialData, tmp_path: Path) -> None:
    stp.tl.fit_m2ost(sdata, checkpoint_dir=tmp_path / "run", **SMALL)
    assert (tmp_path / "run" / "last.ckpt").is_file()
    with pytest.raises(ValueError, match="other settings.*batch_size"):
        stp.tl.fit_m2ost(sdata, checkpoint_dir=tmp_path / "run", batch_size=4, **SMALL)


def test_history_picture(sdata: SpatialData) -> None:
    model = stp.tl.fit_m2ost(sdata, validation=0.3, **SMALL)
    ax = stp.pl.history(model)
    labels = [line.get_label() for line in ax.lines]
    assert "training" in labels
    assert "validation" in labels
    np.testing.assert_allclose(np.asarray(ax.lines[1].get_ydata()), model.history["train_loss"])
    with pytest.raises(ValueError, match="no training history"):
        stp.pl.history(stp.tl.fit_nsl(sdata, field=1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"recipe": "fast"}, ValueError, "`recipe` is 'fast'; expected one of"),
        ({"preset": "huge"}, ValueError, "no preset 'huge'"),
        ({"max_epochs": 0}, ValueError, "positive `max_epochs`"),
        ({"validation": 1.0}, ValueError, "`validation` is 1.0"),
        ({"network_kwargs": {"image_size": 33}}, ValueError, "33"),
        ({"device": "cuda"}, ValueError, "finds no GPU"),
        ({"train_key": "no"}, KeyError, "No column 'no'"),
        ({"genes": ["nothing"]}, KeyError, "not in `var_names`"),
        ({"key_added": "a/b"}, ValueError, "cannot be stored"),
        ({"key_added": "counts"}, ValueError, "holds no predictions"),
        ({"field": 0}, ValueError, "`field` is 0"),
    ],
)
def test_bad_arguments(sdata: SpatialData, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    if kwargs.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    before = contents(sdata)
    with pytest.raises(error, match=message):
        stp.tl.fit_m2ost(sdata, **{**SMALL, **kwargs})
    assert contents(sdata) == before


def test_too_few_spots(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.obs["few"] = np.arange(table.n_obs) < 10
    with pytest.raises(ValueError, match="10 training spots"):
        stp.tl.fit_m2ost(sdata, train_key="few", **SMALL)
