from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stpredict.models.m2ost import _training
from stpredict.models.m2ost._module import M2OSTModule
from stpredict.models.m2ost._training import RECIPES, Data, NonFiniteLoss, augment, train

QUIET = {"enable_progress_bar": False}
RECIPE = replace(RECIPES["default"], max_epochs=3, batch_size=8, patience=None)


def make_network(n_genes: int = 4, **overrides: Any) -> M2OSTModule:
    torch.manual_seed(0)
    sizes = {"levels": 2, "image_size": 32, "width": 16, "depth": 1, "heads": 2, "head_width": 8}
    return M2OSTModule(n_genes, **{**sizes, "mlp_width": 16, "gate_width": 16, **overrides})


def make_data(n: int = 40, n_genes: int = 4) -> Data:
    """Expression that follows how red a patch is (not how dark: the network normalises each token's pixels)."""
    rng = np.random.default_rng(0)
    red = rng.uniform(-60, 60, n)
    color = 128 + red[:, None] * np.array([1, 0, -1])
    noise = rng.normal(0, 10, (n, 2, 3, 32, 32))
    patches = np.clip(color[:, None, :, None, None] + noise, 0, 255).astype(np.uint8)
    targets = np.repeat(((red - red.mean()) / red.std())[:, None], n_genes, axis=1).astype(np.float32)
    return Data(patches, targets, np.arange(n - 10), np.arange(n - 10, n))


def weights(network: M2OSTModule) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def fit(data: Data, recipe: _training.Recipe = RECIPE, **kwargs: Any) -> tuple[M2OSTModule, dict[str, np.ndarray]]:
    options: dict[str, Any] = {"random_state": 0, "device": "cpu", "precision": "32", "trainer_kwargs": QUIET}
    return train(make_network(), data, recipe, **{**options, **kwargs})


def test_it_learns() -> None:
    recipe = replace(RECIPE, max_epochs=25, learning_rate=2e-3, stain_jitter=0.0)
    network, history = fit(make_data(), recipe)
    assert history["val_loss"].min() < 0.3
    assert history["val_pcc"][-1] > 0.9
    assert history["train_loss"][-1] < history["train_loss"][0]
    assert not network.training


def test_the_epoch_of_lowest_validation_loss_is_kept() -> None:
    data = make_data()
    network, history = fit(data, replace(RECIPE, max_epochs=8, learning_rate=2e-2, schedule="constant"))
    best = int(np.argmin(history["val_loss"]))
    assert best < 7  # at this learning rate the last epoch is not the best one; otherwise this tests nothing
    with torch.inference_mode():
        predicted = network(torch.from_numpy(data.patches[data.validation])).numpy()
    loss = np.mean((predicted - data.targets[data.validation]) ** 2)
    assert loss == pytest.approx(history["val_loss"][best], rel=1e-4)


def test_without_validation_the_last_epoch_is_kept() -> None:
    data = make_data()._replace(validation=np.array([], dtype=int))
    network, history = fit(data)
    assert np.isnan(history["val_loss"]).all()
    assert len(history["train_loss"]) == 3
    again, _ = fit(data)
    assert torch.equal(weights(network), weights(again))


def test_validation_spots_are_not_learned_from() -> None:
    data = make_data()
    garbage = data.targets.copy()
    garbage[data.validation] = 1e3
    _, history = fit(data)
    _, other = fit(data._replace(targets=garbage))
    np.testing.assert_array_equal(history["train_loss"], other["train_loss"])


def test_early_stopping() -> None:
    data = make_data()
    garbage = data.targets.copy()
    garbage[data.validation] = 0 - garbage[data.validation]
    recipe = replace(RECIPE, max_epochs=40, patience=2, learning_rate=5e-3)
    _, history = fit(data._replace(targets=garbage), recipe)
    best = int(np.argmin(history["val_loss"]))
    assert len(history["val_loss"]) == best + 1 + 2 < 40


def test_the_users_random_state_is_left_alone() -> None:
    network, data = make_network(), make_data()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(network, data, replace(RECIPE, max_epochs=1), random_state=0, device="cpu", trainer_kwargs=QUIET)
    assert torch.equal(torch.rand(3), expected)


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    class Killed(RuntimeError):
        pass

    class Kill(_training.L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if trainer.current_epoch == 2 and index == 1:
                raise Killed

    data, recipe = make_data(), replace(RECIPE, max_epochs=4, patience=10)
    unbroken, history = fit(data, recipe)
    with pytest.raises(Killed):
        fit(data, recipe, checkpoint_dir=tmp_path, trainer_kwargs={**QUIET, "callbacks": [Kill()]})
    assert (tmp_path / "last.ckpt").is_file()
    resumed, history_resumed = fit(data, recipe, checkpoint_dir=tmp_path)
    assert torch.equal(weights(resumed), weights(unbroken))
    for name, values in history.items():
        np.testing.assert_array_equal(history_resumed[name], values)
    assert list((tmp_path / "log").rglob("metrics.csv"))


def test_two_processes_give_the_losses_of_one() -> None:
    data, recipe = make_data(), replace(RECIPE, max_epochs=2)
    one, history = fit(data, recipe)
    options = {**QUIET, "devices": 2, "strategy": "ddp_spawn"}
    two, history_two = fit(data, recipe, trainer_kwargs=options)
    for name in ("train_loss", "val_loss", "val_pcc"):
        np.testing.assert_allclose(history_two[name], history[name], rtol=2e-3)
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-2, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights() -> None:
    data = make_data()

    class Explode(_training.L.Callback):
        def __init__(self, epoch: int) -> None:
            self.epoch = epoch

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if trainer.current_epoch == self.epoch and index == 1:
                with torch.no_grad():
                    module.network.head.weight.fill_(float("nan"))

    with pytest.raises(NonFiniteLoss, match="step 1 of epoch 0.*learning_rate"):
        fit(data, trainer_kwargs={**QUIET, "callbacks": [Explode(0)]})
    network, history = fit(data, trainer_kwargs={**QUIET, "callbacks": [Explode(2)]})
    assert len(history["train_loss"]) == 2
    assert torch.isfinite(weights(network)).all()


def test_weights_that_are_not_finite_are_not_kept() -> None:
    class Explode(_training.L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            # As a gradient would that overflows in the last step of an epoch: no loss shows it.
            if trainer.current_epoch == 1 and trainer.is_last_batch:
                with torch.no_grad():
                    module.network.head.weight[0, 0] = float("nan")

    data = make_data()._replace(validation=np.array([], dtype=int))
    network, history = fit(data, trainer_kwargs={**QUIET, "callbacks": [Explode()]})
    assert len(history["train_loss"]) == 1
    assert torch.isfinite(weights(network)).all()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."),
    ],
)
def test_out_of_memory_names_the_knobs(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(_training.L.Trainer, "fit", full)
    with pytest.raises(MemoryError, match="batch of 8 spots on 'cpu'. Lower `batch_size`.*accumulate_grad.*`preset`"):
        fit(make_data())


def test_other_errors_are_not_taken_for_a_full_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(_training.L.Trainer, "fit", fail)
    with pytest.raises(RuntimeError, match="something else"):
        fit(make_data())


def test_paper_recipe() -> None:
    recipe = RECIPES["paper"]
    assert (recipe.optimizer, recipe.learning_rate, recipe.max_epochs, recipe.batch_size) == ("adam", 1e-4, 100, 96)
    _, history = fit(make_data(), replace(recipe, max_epochs=2))
    np.testing.assert_allclose(history["learning_rate"], 1e-4)


def test_symmetries_are_the_eight_of_the_square_and_alike_for_all_levels() -> None:
    image = torch.arange(48, dtype=torch.uint8).reshape(1, 1, 3, 4, 4).expand(8, 2, 3, 4, 4)
    turned = augment(image, torch.arange(8), torch.zeros(8, 6), 0.0)
    assert turned.dtype == torch.uint8
    assert torch.equal(turned[:, 0], turned[:, 1])
    square = image[0, 0]
    expected = {
        tuple(torch.rot90(flipped, k, (-2, -1)).flatten().tolist())
        for k in range(4)
        for flipped in (square, square.flip(-1))
    }
    assert {tuple(t.flatten().tolist()) for t in turned[:, 0]} == expected
    assert len(expected) == 8


def test_stain_jitter_changes_optical_density_linearly_and_alike_for_all_levels() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(60, 200, (3, 2, 3, 4, 4), generator=rng, dtype=torch.uint8)
    jitter = torch.randn(3, 6, generator=rng)
    jittered = augment(images, torch.zeros(3, dtype=torch.int64), jitter, 0.1)
    od = -torch.log((images.float() + 1) / 256)
    od_jittered = -torch.log((jittered * 255 + 1) / 256)
    factor, offset = torch.exp(0.1 * jitter[:, :3]), 0.1 * jitter[:, 3:]
    expected = od * factor[:, None, :, None, None] + offset[:, None, :, None, None]
    torch.testing.assert_close(od_jittered, expected.clamp_min(0), rtol=1e-3, atol=1e-4)
    none = augment(images, torch.zeros(3, dtype=torch.int64), torch.zeros(3, 6), 0.1)
    torch.testing.assert_close(none, images / 255, atol=1e-5, rtol=0)
