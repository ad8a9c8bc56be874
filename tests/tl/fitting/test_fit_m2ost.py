from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.stats import pearsonr
from spatialdata import SpatialData
from spatialdata.transformations import Identity, Translation, set_transformation

import stpredict as stp
from stpredict.models.m2ost import _training
from stpredict.pp import _store

SMALL: dict[str, Any] = {
    "preset": "tiny",
    "network_kwargs": {"image_size": 32, "depth": 1, "width": 16, "levels": 2, "mlp_width": 16, "gate_width": 16},
    "max_epochs": 2,
    "device": "cpu",
    "trainer_kwargs": {"enable_progress_bar": False},
}


@pytest.fixture(scope="module")
def sections() -> SpatialData:
    sections = stp.datasets.synthetic(n_spots=30, n_genes=10)
    sections["table"].obs["train"] = (sections["table"].obs["section"] == "S1").to_numpy()
    return sections


@pytest.fixture
def sdata(sections: SpatialData) -> SpatialData:
    shapes = {name: spots.copy() for name, spots in sections.shapes.items()}
    return SpatialData(images=dict(sections.images), shapes=shapes, tables={"table": sections["table"].copy()})


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
    deeper = {**SMALL, "network_kwargs": {**SMALL["network_kwargs"], "depth": 2}}
    with pytest.raises(ValueError, match=r"other settings \(network differ\).*another `checkpoint_dir`, or delete it"):
        stp.tl.fit_m2ost(sdata, checkpoint_dir=tmp_path / "run", **deeper)


def test_history_picture(sdata: SpatialData) -> None:
    model = stp.tl.fit_m2ost(sdata, validation=0.3, **SMALL)
    ax = stp.pl.history(model)
    labels = [line.get_label() for line in ax.lines]
    assert "training" in labels
    assert "validation" in labels
    np.testing.assert_allclose(np.asarray(ax.lines[1].get_ydata()), model.history["train_loss"])
    with pytest.raises(ValueError, match="no training history"):
        stp.pl.history(stp.tl.fit_nsl(sdata, spot_scale=1.0))  # type: ignore[arg-type]


def test_genes_of_the_surroundings_are_predicted_and_noise_is_not() -> None:
    sdata = stp.datasets.synthetic(n_spots=200, n_genes=20)
    table = sdata["table"]
    held_out = (table.obs["section"] == "S2").to_numpy()
    table.obs["train"] = ~held_out
    genes = list(table.var_names)
    stp.tl.fit_nsl(sdata, genes=genes, train_key="train")
    stp.tl.fit_m2ost(
        sdata,
        genes=genes,
        train_key="train",
        preset="tiny",
        network_kwargs={"image_size": 32, "width": 32, "depth": 1},
        max_epochs=12,
        learning_rate=2e-3,
        stain_jitter=0.0,
        device="cpu",
        trainer_kwargs={"enable_progress_bar": False},
    )

    def score(layer: str, kind: str) -> float:
        of_kind = table[held_out, table.var["kind"] == kind]
        return float(np.median(pearsonr(of_kind.X.toarray(), of_kind.layers[layer]).statistic))

    # Measured: 0.55 and 0.18.
    assert score("m2ost", "context") > score("nsl", "context") + 0.2
    assert score("m2ost", "stain") > 0.6
    assert abs(score("m2ost", "noise")) < 0.15


# Bad input: each is refused before anything is written


def bad_values(value: float) -> Callable[[SpatialData], None]:
    def damage(sdata: SpatialData) -> None:
        values = sdata["table"].X.toarray()
        values[3, 2] = value
        sdata["table"].X = sparse.csr_matrix(values)

    return damage


def repeat_a_name(sdata: SpatialData) -> None:
    sdata["table"].var_names = ["gene0", *sdata["table"].var_names[:-1]]


def move_off(sdata: SpatialData) -> None:
    set_transformation(sdata["A_spots"], Translation([0, 1e5], axes=("x", "y")), "A")


def move_elsewhere(sdata: SpatialData) -> None:
    set_transformation(sdata["A_spots"], {"elsewhere": Identity()}, set_all=True)


def repeat_the_image(sdata: SpatialData) -> None:
    sdata["again"] = sdata["A_image"].copy()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (bad_values(np.nan), ValueError, r"`X` has NaN or infinite values on training spots.*\['gene2'\]"),
        (bad_values(np.inf), ValueError, r"`X` has NaN or infinite values on training spots.*\['gene2'\]"),
        (repeat_a_name, ValueError, r"not unique \(\['gene0'\].*var_names_make_unique"),
        (move_off, ValueError, "All spots of 'A_spots' lie off the image.*Check the transformations"),
        (move_elsewhere, ValueError, "share no coordinate system with an image.*set_transformation"),
        (repeat_the_image, ValueError, r"\['A_image', 'again'\] have the same resolution.*`image_key`"),
        (lambda sdata: sdata.images.pop("A_image"), ValueError, "no image in `sdata.images`.*Image2DModel.parse"),
        (lambda sdata: sdata.shapes.pop("A_spots"), ValueError, "no spots in `sdata.shapes`.*ShapesModel.parse"),
        (lambda sdata: sdata.tables.pop("table"), ValueError, "no table in `sdata.tables`.*TableModel.parse"),
    ],
    ids=["NaN", "infinite", "names", "off", "elsewhere", "two images", "no image", "no spots", "no table"],
)
def test_bad_data(
    make_sdata: Callable[..., SpatialData],
    damage: Callable[[SpatialData], None],
    error: type[Exception],
    message: str,
) -> None:
    sdata = make_sdata()
    damage(sdata)
    with pytest.raises(error, match=message):
        stp.tl.fit_m2ost(sdata, **SMALL)
    assert "table" not in sdata.tables or "m2ost" not in sdata["table"].layers


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"recipe": "fast"}, ValueError, "`recipe` is 'fast'; expected one of"),
        ({"preset": "huge"}, ValueError, "no preset 'huge'"),
        ({"max_epochs": 0}, ValueError, "positive `max_epochs`"),
        ({"validation": 1.0}, ValueError, "`validation` is 1.0"),
        ({"network_kwargs": {"image_size": 33}}, ValueError, "image_size=33.*such as 32 or 48"),
        ({"network_kwargs": {"image_size": 32, "wide": 3}}, TypeError, "wide"),
        ({"device": "cuda"}, ValueError, "`device` is 'cuda', but PyTorch finds no GPU here; use device='auto'"),
        ({"device": "tpu"}, ValueError, "`device` is 'tpu'; expected 'auto', 'cpu', 'cuda'"),
        ({"precision": "16"}, ValueError, "`precision` is '16'; expected 'auto', 'bf16' or '32'"),
        ({"train_key": "no"}, KeyError, "No column 'no'"),
        (
            {"train_key": "section"},
            TypeError,
            r"`obs\['section'\]` has dtype category; expected True for spots to fit on",
        ),
        ({"train_key": "none"}, ValueError, r"`obs\['none'\]` is False for all 60 spots"),
        ({"train_key": "few"}, ValueError, "There are 10 training spots .*; the model needs 16"),
        ({"genes": ["nothing"]}, KeyError, "not in `var_names`"),
        ({"genes": ["constant"]}, ValueError, r"same value on all training spots, such as \['constant'\]"),
        ({"layer": "no"}, KeyError, "No layer 'no' in the table"),
        ({"image_key": "no"}, KeyError, "No image 'no'"),
        ({"shapes_key": "no"}, KeyError, "No spots 'no'"),
        ({"table_key": "no"}, KeyError, "No table 'no'"),
        ({"coordinate_system": "no"}, KeyError, "No coordinate system 'no'"),
        ({"key_added": "a/b"}, ValueError, "cannot be stored"),
        ({"key_added": "counts"}, ValueError, "holds no predictions"),
        ({"field": 0}, ValueError, "`field` is 0"),
    ],
)
def test_bad_arguments(sdata: SpatialData, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    if kwargs.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    table = sdata["table"]
    table.obs["none"], table.obs["few"] = False, np.arange(table.n_obs) < 10
    table.X = sparse.csr_matrix(np.column_stack([table.X.toarray()[:, :-1], np.full(table.n_obs, 2.5)]))
    table.var_names = [*table.var_names[:-1], "constant"]
    before = contents(sdata)
    with pytest.raises(error, match=message):
        stp.tl.fit_m2ost(sdata, **{**SMALL, **kwargs})
    assert contents(sdata) == before


def test_no_space_left_for_the_patches(sdata: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_store.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    before = contents(sdata)
    with pytest.raises(OSError, match=r"60 patches need .* GB, but 0.00 GB are free in .*larger disk as `store`"):
        stp.tl.fit_m2ost(sdata, store=tmp_path, **SMALL)
    assert contents(sdata) == before


def test_counts_are_warned_of(sdata: SpatialData) -> None:
    with pytest.warns(UserWarning, match="looks like counts.*normalize_total.*log1p"):
        stp.tl.fit_m2ost(sdata, layer="counts", inplace=False, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stp.tl.fit_m2ost(sdata, inplace=False, **SMALL)
