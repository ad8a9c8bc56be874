from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import lightning as L
import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.stats import pearsonr
from shapely.affinity import translate
from spatialdata import SpatialData

import stpredict as stp
from stpredict.models import M2OST
from stpredict.models.m2ost import _training
from stpredict.pp import _store

MakeSData = Callable[..., SpatialData]
SMALL: dict[str, Any] = {
    "preset": "tiny",
    "network_kwargs": {"image_size": 32, "depth": 1, "width": 16, "levels": 1, "mlp_width": 16, "gate_width": 16},
    "max_epochs": 2,
    "device": "cpu",
    "trainer_kwargs": {"enable_progress_bar": False},
}


@pytest.fixture
def sdata(make_sdata: MakeSData) -> SpatialData:
    """Two sections, the first to train on."""
    sdata = make_sdata(2, n_spots=16, n_genes=4)
    sdata["table"].obs["train"] = (sdata["table"].obs["section"] == "A").to_numpy()
    sdata["table"].obs["patient"] = sdata["table"].obs["section"].map({"A": "P1", "B": "P2"})
    return sdata


def contents(sdata: SpatialData) -> dict[str, list[str]]:
    table = sdata["table"]
    return {slot: sorted(set(getattr(table, slot)) - {None}) for slot in ("obs", "var", "uns", "obsm", "layers")}


def weights(model: M2OST) -> torch.Tensor:
    return torch.cat([values.flatten() for values in model.network.state_dict().values()])


class Steps(L.Callback):
    """Counts steps of training, and presses Ctrl-C after one of them."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.n, self.interrupt_after = 0, interrupt_after

    def on_train_batch_end(self, *_: Any) -> None:
        self.n += 1
        if self.n == self.interrupt_after:
            os.kill(os.getpid(), signal.SIGINT)


def fit_counted(sdata: SpatialData, *, interrupt_after: int | None = None, **options: Any) -> tuple[M2OST, int]:
    steps = Steps(interrupt_after)
    quiet = {"enable_progress_bar": False, **options.pop("trainer_kwargs", {}), "callbacks": [steps]}
    model = stp.tl.fit_m2ost(sdata, inplace=False, **{**SMALL, "trainer_kwargs": quiet, **options})
    return model, steps.n


# What is written


def test_slots(sdata: SpatialData, tmp_path: Path) -> None:
    before = contents(sdata)
    table = sdata["table"]
    model = stp.tl.fit_m2ost(sdata, train_key="train", **SMALL)
    assert table.layers["m2ost"].shape == table.shape
    assert table.layers["m2ost"].dtype == np.float32
    assert np.isfinite(table.layers["m2ost"]).all()
    assert table.var["m2ost_fitted"].all()
    np.testing.assert_array_equal(table.obs["m2ost_train"], table.obs["train"])
    assert {slot: set(names) - set(before[slot]) for slot, names in contents(sdata).items()} == {
        "layers": {"m2ost"},
        "var": {"m2ost_fitted"},
        "obs": {"m2ost_train"},
        "uns": {"m2ost"},
        "obsm": {"spatial"},
    }
    assert list(table.uns["m2ost"]["genes"]) == model.genes == list(table.var_names)
    assert set(table.uns["m2ost"]["history"]) == {"train_loss", "val_loss", "val_pcc", "learning_rate"}
    assert len(table.uns["m2ost"]["history"]["train_loss"]) == 2
    expected = {"model": "m2ost", "n_train": 16, "n_validation": 0, "validation_on": "none", "batch_size": 8}
    assert expected.items() <= table.uns["m2ost"]["params"].items()
    assert model.reads == {"kind": "patches", "levels": 1, "image_size": 32, "spot_scale": 1.54}
    assert "1 levels of 32 x 32 pixels" in repr(model)
    assert f"2 epochs; training loss {model.history['train_loss'][1]:.4f} in the last" in repr(model)

    loaded = stp.models.load(model.save(tmp_path / "model"))
    assert (loaded.genes, loaded.params, loaded.reads) == (model.genes, model.params, model.reads)
    np.testing.assert_array_equal(loaded.history["train_loss"], model.history["train_loss"])
    predicted = table.layers["m2ost"].copy()
    stp.tl.predict(sdata, loaded, key_added="again", device="cpu")
    np.testing.assert_allclose(table.layers["again"], predicted, rtol=1e-2, atol=1e-2)
    np.testing.assert_array_equal(table.obs["again_train"], table.obs["train"])
    table.write_h5ad(tmp_path / "table.h5ad")
    back = ad.read_h5ad(tmp_path / "table.h5ad")
    np.testing.assert_array_equal(back.layers["m2ost"], predicted)
    np.testing.assert_array_equal(back.uns["m2ost"]["history"]["train_loss"], model.history["train_loss"])

    slide = SpatialData(images={"B_image": sdata["B_image"]}, shapes={"B_spots": sdata["B_spots"]})
    stp.tl.predict(slide, loaded, device="cpu")
    rows = slide["table"].obs.set_index("instance_id").index.get_indexer(table.obs["spot_id"][16:])
    np.testing.assert_allclose(slide["table"].layers["m2ost"][rows], predicted[16:], rtol=1e-2, atol=1e-2)
    assert not slide["table"].obs["m2ost_train"].any()


@pytest.mark.parametrize(
    ("keys", "groups"),
    [
        ({}, ("section A_spots", "section B_spots")),
        ({"section_key": "section"}, ("section A", "section B")),
        ({"patient_key": "patient"}, ("patient P1", "patient P2")),
    ],
    ids=["spots", "sections", "patients"],
)
def test_validation_spots_are_set_aside(sdata: SpatialData, keys: dict[str, Any], groups: tuple[str, ...]) -> None:
    model = stp.tl.fit_m2ost(sdata, validation=0.3, **keys, **SMALL)
    assert (model.params["n_train"], model.params["n_validation"]) == (32, 16)
    assert model.params["validation_on"] in groups
    assert sdata["table"].obs["m2ost_train"].all()  # those that it was chosen by have been seen, too
    best = int(np.argmin(model.history["val_loss"]))
    assert f"lowest validation loss {model.history['val_loss'][best]:.4f} in epoch {best}" in repr(model)


def test_held_out_rows_are_never_looked_at(sdata: SpatialData) -> None:
    options: dict[str, Any] = {"train_key": "train", "genes": list(sdata["table"].var_names), "inplace": False, **SMALL}
    model = stp.tl.fit_m2ost(sdata, **options)
    table = sdata["table"]
    expression = table.X.toarray()
    expression[~table.obs["train"].to_numpy()] = np.nan
    table.X = expression
    sdata["B_image"] = sdata["B_image"].copy(data=sdata["B_image"].data // 2)
    again = stp.tl.fit_m2ost(sdata, **options)
    assert torch.equal(weights(model), weights(again))
    np.testing.assert_array_equal(model.mean, again.mean)


def test_spots_off_the_image_are_nan(sdata: SpatialData) -> None:
    spots = sdata["B_spots"]
    name = spots.index[0]
    spots.loc[name, "geometry"] = translate(spots.loc[name, "geometry"], xoff=1e5)
    stp.tl.fit_m2ost(sdata, train_key="train", **SMALL)
    table = sdata["table"]
    lost = (table.obs["spot_id"] == name).to_numpy()
    assert lost.sum() == 1
    np.testing.assert_array_equal(np.isnan(table.layers["m2ost"]).all(axis=1), lost)
    assert np.isfinite(table.layers["m2ost"][~lost]).all()


def test_genes_of_the_surroundings_are_predicted_and_noise_is_not() -> None:
    sdata = stp.datasets.synthetic(n_spots=200, n_genes=12)
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
        network_kwargs={"image_size": 16, "width": 32, "depth": 1, "heads": 2, "head_width": 16, "mlp_width": 32},
        max_epochs=8,
        learning_rate=4e-3,
        stain_jitter=0.0,
        device="cpu",
        precision="32",
        trainer_kwargs={"enable_progress_bar": False},
    )

    def score(layer: str, kind: str) -> float:
        of_kind = table[held_out, table.var["kind"] == kind]
        return float(np.median(pearsonr(of_kind.X.toarray(), of_kind.layers[layer]).statistic))

    # Measured: 0.55 and 0.20.
    assert score("m2ost", "context") > score("nsl", "context") + 0.2
    assert score("m2ost", "stain") > 0.5
    assert abs(score("m2ost", "noise")) < 0.2


# Interrupts and checkpoints


def test_not_in_place_and_failures_leave_the_table_alone(sdata: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(sdata)
    _, n_steps = fit_counted(sdata)
    assert contents(sdata) == before
    handler = signal.getsignal(signal.SIGINT)
    for after in (1, n_steps):
        with pytest.raises(KeyboardInterrupt):
            stp.tl.fit_m2ost(
                sdata, **{**SMALL, "trainer_kwargs": {"enable_progress_bar": False, "callbacks": [Steps(after)]}}
            )
        assert contents(sdata) == before
        assert signal.getsignal(signal.SIGINT) is handler

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_training, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stp.tl.fit_m2ost(sdata, **SMALL)
    assert contents(sdata) == before


def change_spots(sdata: SpatialData) -> None:
    sdata["table"].obs["train"] = ~sdata["table"].obs["train"]


def change_expression(sdata: SpatialData) -> None:
    sdata["table"].X = sdata["table"].X[::-1].copy()


def change_pixels(sdata: SpatialData) -> None:
    sdata["A_image"] = sdata["A_image"].copy(data=sdata["A_image"].data // 2)


def change_channels(sdata: SpatialData) -> None:
    sdata["A_image"] = sdata["A_image"].assign_coords(c=["b", "g", "r"])


def change_names_of_genes(sdata: SpatialData) -> None:
    sdata["table"].var_names = [f"other{j}" for j in range(4)]


def change_nothing_that_matters(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.obs_names = [f"spot {i}" for i in range(table.n_obs)]
    table.X = np.where(table.obs["train"].to_numpy()[:, None], table.X.toarray(), 7)
    table.layers["m2ost"] = np.zeros(table.shape)
    sdata["B_image"] = sdata["B_image"].copy(data=sdata["B_image"].data // 2)


@pytest.fixture(scope="module")
def kept(make_sdata: MakeSData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, M2OST, int]:
    """A folder with the checkpoint of a fit to section A."""
    folder = tmp_path_factory.mktemp("runs")
    sdata = make_sdata(2, n_spots=16, n_genes=4)
    sdata["table"].obs["train"] = (sdata["table"].obs["section"] == "A").to_numpy()
    return (folder, *fit_counted(sdata, train_key="train", checkpoint_dir=folder))


@pytest.mark.parametrize(
    "change",
    [
        change_spots,
        change_expression,
        change_pixels,
        change_channels,
        change_names_of_genes,
        {"genes": ["gene0", "gene1", "gene2"]},
        {"batch_size": 4},
        {"random_state": 1},
        {"network_kwargs": {**SMALL["network_kwargs"], "depth": 2}},
        {"spot_scale": 2.0},
        {"trainer_kwargs": {"accumulate_grad_batches": 2}},
    ],
    ids=lambda change: getattr(change, "__name__", None) or next(iter(change)),
)
def test_a_checkpoint_of_another_fit_is_not_taken(
    sdata: SpatialData, kept: tuple[Path, M2OST, int], change: Callable[[SpatialData], None] | dict[str, Any]
) -> None:
    folder, _, _ = kept
    options = change if isinstance(change, dict) else {}
    if not isinstance(change, dict):
        change(sdata)
    before = {path.parent.name for path in folder.glob("*/last.ckpt")}
    model, n_steps = fit_counted(sdata, train_key="train", checkpoint_dir=folder, **options)
    assert n_steps == 2 * 16 / options.get("batch_size", 8), "batches of two epochs"
    assert len({path.parent.name for path in folder.glob("*/last.ckpt")} - before) == 1
    expected, _ = fit_counted(sdata, train_key="train", **options)
    assert torch.equal(weights(model), weights(expected))


@pytest.mark.parametrize(
    "change", [change_nothing_that_matters, lambda sdata: None], ids=["what it does not see", "none"]
)
def test_a_checkpoint_of_the_same_fit_is_taken(
    sdata: SpatialData, kept: tuple[Path, M2OST, int], change: Callable[[SpatialData], None]
) -> None:
    folder, model, n_steps = kept
    change(sdata)
    again, n_again = fit_counted(sdata, train_key="train", checkpoint_dir=folder)
    assert (n_steps, n_again) == (4, 0)
    assert torch.equal(weights(again), weights(model))
    np.testing.assert_array_equal(again.history["train_loss"], model.history["train_loss"])


def test_an_interrupted_fit_goes_on(sdata: SpatialData, tmp_path: Path, kept: tuple[Path, M2OST, int]) -> None:
    options: dict[str, Any] = {"train_key": "train", "checkpoint_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        fit_counted(sdata, interrupt_after=3, **options)  # in the second epoch
    model, n_steps = fit_counted(sdata, **options)
    assert n_steps == 2
    assert torch.equal(weights(model), weights(kept[1]))


def test_folds_do_not_share_a_checkpoint(sdata: SpatialData, tmp_path: Path) -> None:
    found: dict[bool, set[bytes]] = {True: set(), False: set()}

    def m2ost(sdata: SpatialData, *, kept: bool, **options: Any) -> None:
        folder = tmp_path / "runs" if kept else None
        model = stp.tl.fit_m2ost(sdata, checkpoint_dir=folder, **options, **SMALL)
        found[kept].add(weights(model).numpy().tobytes())

    for kept in (False, True):
        models = {"m2ost": partial(m2ost, kept=kept)}
        stp.tl.cross_validate(sdata, models, baselines=False, n_perms=0, n_bootstrap=0)
    assert len(found[False]) == 2
    assert found[True] == found[False]
    assert len(list((tmp_path / "runs").glob("*/last.ckpt"))) == 2


# Bad arguments: each is refused before anything is written


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
        ({"precision": "16"}, ValueError, "`precision` is '16'; expected 'auto', 'bf16' or '32'"),
        ({"section_key": "no", "validation": 0.3}, KeyError, "`section_key` is 'no', which `obs` lacks"),
        ({"train_key": "section"}, TypeError, r"`obs\['section'\]` has dtype .*; expected True for spots to fit on"),
        ({"train_key": "few"}, ValueError, "There are 10 training spots .*; the model needs 16"),
        ({"genes": ["constant"]}, ValueError, r"same value on all training spots, such as \['constant'\]"),
        ({"spot_scale": 0}, ValueError, "`spot_scale` is 0"),
        ({"spot_scale": 1e6}, ValueError, r"1\.5e\+06|[0-9.e+]+ pixels"),
    ],
    ids=str,
)
def test_bad_arguments(sdata: SpatialData, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    if kwargs.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    table = sdata["table"]
    table.obs["few"] = np.arange(table.n_obs) < 10
    table.X = sparse.csr_matrix(np.column_stack([table.X.toarray()[:, :-1], np.full(table.n_obs, 2.5)]))
    table.var_names = [*table.var_names[:-1], "constant"]
    before = contents(sdata)
    with pytest.raises(error, match=message):
        stp.tl.fit_m2ost(sdata, **{**SMALL, **kwargs})
    assert contents(sdata) == before


def test_no_space_left_for_the_patches(sdata: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_store.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    before = contents(sdata)
    with pytest.raises(OSError, match=r"32 patches need .* GB, but 0.00 GB are free in .*larger disk as `store`"):
        stp.tl.fit_m2ost(sdata, store=tmp_path, **SMALL)
    assert contents(sdata) == before
