from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stpredict as stp
from stpredict.models import M2OST, M2OSTModule
from stpredict.models.m2ost import _model

SIZES: dict[str, Any] = {"levels": 2, "image_size": 32, "width": 16, "depth": 1, "heads": 2, "head_width": 8}
GENES = ["a", "b", "c"]


def fitted(**sizes: Any) -> M2OST:
    torch.manual_seed(0)
    network = M2OSTModule(len(GENES), **{**SIZES, "mlp_width": 16, "gate_width": 16, **sizes})
    history = {
        "train_loss": [1.0, 0.5],
        "val_loss": [np.nan] * 2,
        "val_pcc": [np.nan] * 2,
        "learning_rate": [0.1, 0.01],
    }
    return M2OST(
        network=network,
        genes=GENES,
        mean=np.array([1.0, 2, 3]),
        scale=np.array([0.5, 1, 2]),
        history={name: np.array(values) for name, values in history.items()},
        reads={"kind": "patches", "levels": network.config["levels"], "image_size": 32, "spot_scale": 1.5},
        params={"preset": "tiny"},
        seen=np.array([-5, 8]),
    )


def spots(n: int = 7, levels: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, levels, 3, 32, 32), dtype=np.uint8)


def test_predictions_are_in_units_of_the_expression() -> None:
    model = fitted()
    predicted = model.predict(spots(), symmetries=False, batch_size=3, device="cpu", precision="32")
    with torch.inference_mode():
        standardized = model.network(torch.from_numpy(spots())).numpy()
    np.testing.assert_allclose(predicted, standardized * model.scale + model.mean, rtol=1e-4, atol=1e-5)
    assert predicted.dtype == np.float32
    assert not model.network.training
    bf16 = model.predict(spots(), symmetries=False, device="cpu", precision="bf16")
    np.testing.assert_allclose(bf16, predicted, atol=0.1)
    assert not np.array_equal(bf16, predicted)


def test_predictions_do_not_depend_on_how_the_slide_lay() -> None:
    model = fitted()
    lying = {
        (k, mirrored): np.ascontiguousarray(np.rot90(spots()[..., ::-1] if mirrored else spots(), k, (-2, -1)))
        for k in range(4)
        for mirrored in (False, True)
    }
    single = [model.predict(turned, symmetries=False, device="cpu", precision="32") for turned in lying.values()]
    assert np.std(single, axis=0).min() > 1e-4
    for turned in lying.values():
        predicted = model.predict(turned, device="cpu", precision="32")
        np.testing.assert_allclose(predicted, np.mean(single, axis=0), rtol=1e-4, atol=1e-5)


def test_symmetries_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, patches = fitted(), spots()
    expected = model.predict(patches, device="cpu", precision="32", batch_size=3)
    monkeypatch.setitem(_model._VIEWS_AT_A_TIME, "cpu", 4)
    np.testing.assert_allclose(model.predict(patches, device="cpu", precision="32"), expected, rtol=1e-5, atol=1e-6)


def test_round_trip(tmp_path: Path) -> None:
    model = fitted()
    loaded = stp.models.load(model.save(tmp_path / "model"))
    np.testing.assert_array_equal(loaded.predict(spots(), device="cpu"), model.predict(spots(), device="cpu"))
    for name in ("genes", "reads", "params"):
        assert getattr(loaded, name) == getattr(model, name)
    assert loaded.network.config == model.network.config
    assert not loaded.network.training
    np.testing.assert_array_equal(loaded.seen, [-5, 8])
    for name, values in model.history.items():
        np.testing.assert_array_equal(loaded.history[name], values)


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    folder = fitted().save(tmp_path / "model")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    stp.models.load(folder)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("levels", [1, 3])
def test_patches_of_fewer_or_more_levels(levels: int) -> None:
    with pytest.raises(ValueError, match=rf"shape \(7, {levels}, 3, 32, 32\); this network takes.*levels=2"):
        fitted().predict(spots(levels=levels), device="cpu")


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="`precision` is '16'"):
        fitted().predict(spots(), device="cpu", precision="16")


def test_checkpoint_of_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    network = fitted().network
    monkeypatch.setattr(M2OSTModule, "from_authors", lambda state_dict: network)  # tested with the network
    model = M2OST.from_authors({}, GENES)
    with torch.inference_mode():
        expected = network(torch.from_numpy(spots())).numpy()
    predicted = model.predict(spots(), symmetries=False, device="cpu", precision="32")
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-5)
    assert model.reads == {"kind": "patches", "levels": 2, "image_size": 32, "spot_scale": 1.54}
    with pytest.raises(ValueError, match="predicts 3 genes, but `genes` has 2 names"):
        M2OST.from_authors({}, GENES[:2])


def test_what_it_says_of_itself() -> None:
    model = fitted()
    assert repr(model).endswith("2 epochs; training loss 0.5000 in the last")
    model.history["val_loss"] = np.array([0.7, 0.9])
    assert repr(model).endswith("2 epochs; lowest validation loss 0.7000 in epoch 0")
    model.history.clear()
    assert repr(model).startswith("M2OST of 3 genes (2 levels of 32 x 32 pixels, ")
    assert "fit:" not in repr(model)
