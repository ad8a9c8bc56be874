from __future__ import annotations

import os
import shutil
import signal
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stpredict.models.m2ost import _checkpoint, _graphs, _training
from stpredict.models.m2ost._batches import Batches
from stpredict.models.m2ost._module import M2OSTModule
from stpredict.models.m2ost._training import RECIPES, Data, NonFiniteLoss, Recipe, augment, train

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
    recipe = replace(RECIPE, max_epochs=16, learning_rate=2.5e-3, stain_jitter=0.0)
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


class Raise(_training.L.Callback):
    """Raise an error in the middle of an epoch, from one of Lightning's hooks."""

    def __init__(self, hook: str, error: Callable[[], object]) -> None:
        def call(trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step >= 2:
                error()

        setattr(self, hook, call)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def raise_interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("error", [press_ctrl_c, raise_interrupt])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_start"])
def test_ctrl_c_is_a_keyboard_interrupt_within_a_step(hook: str, error: Callable[[], object]) -> None:
    handler, steps = signal.getsignal(signal.SIGINT), []

    class Count(_training.L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            steps.append(trainer.global_step)

    with pytest.raises(KeyboardInterrupt):
        fit(make_data(16), trainer_kwargs={**QUIET, "callbacks": [Count(), Raise(hook, error)]})
    assert len(steps) == 2
    assert signal.getsignal(signal.SIGINT) is handler  # the next Ctrl-C is heard as well


def test_ctrl_c_in_the_reading_thread() -> None:
    class Interrupted:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, indices: object) -> np.ndarray:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make_data()._replace(patches=Interrupted()))


def test_an_error_after_an_interrupt_is_not_taken_for_one() -> None:
    def fail() -> None:
        raise OSError("the disk is gone")

    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(OSError, match="disk is gone"):
            fit(make_data(), trainer_kwargs={**QUIET, "callbacks": [Raise("on_train_batch_end", fail)]})


# Checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run of two epochs."""
    folder = tmp_path_factory.mktemp("checkpoints")
    fit(make_data(16), replace(RECIPE, max_epochs=2), checkpoint_dir=folder)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    content[largest.header_offset + largest.file_size // 2 + 200] ^= 4
    path.write_bytes(content)


def lack_optimizer(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in content.items() if name != "optimizer_states"}, path)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut, "BadZipFile"),
        (flip, "the checksum of .* is wrong"),
        (lambda path: path.write_bytes(b""), "BadZipFile"),
        (lambda path: torch.save({"state_dict": {}}, path), "it lacks epoch, global_step"),
        (lambda path: torch.save([1], path), "it lacks epoch|TypeError"),
        (lambda path: torch.save(Recipe(), path), "UnpicklingError"),
        (lack_optimizer, "it lacks optimizer_states"),
    ],
    ids=["cut", "bit", "empty", "little", "list", "pickle", "optimizer"],
)
def test_a_damaged_checkpoint_is_named_and_not_gone_on_from(
    damage: Callable[[Path], object], problem: str, finished: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(finished / "last.ckpt", tmp_path))
    expected = torch.load(path, weights_only=True)["state_dict"]
    assert _checkpoint.find(tmp_path, expected) == path
    damage(path)
    with pytest.warns(UserWarning, match=rf"checkpoint '{path}' is damaged \(.*({problem}).*training begins anew"):
        assert _checkpoint.find(tmp_path, expected) is None


def test_training_begins_anew_after_damage(finished: Path, tmp_path: Path) -> None:
    data, recipe = make_data(16), replace(RECIPE, max_epochs=2)
    cut(Path(shutil.copy(finished / "last.ckpt", tmp_path)))
    (tmp_path / "last.ckpt.part").write_bytes(b"of a killed run")
    with pytest.warns(UserWarning, match="training begins anew"):
        network, _ = fit(data, recipe, checkpoint_dir=tmp_path)
    assert torch.equal(weights(network), weights(fit(data, recipe, checkpoint_dir=finished)[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "log"]


def test_a_checkpoint_of_another_network_is_not_gone_on_from(finished: Path) -> None:
    with pytest.warns(UserWarning, match="another network or another number of epochs"):
        assert _checkpoint.find(finished, make_network(5).state_dict()) is None


def test_an_interrupted_checkpoint_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "last.ckpt"
    io = _checkpoint.AtomicCheckpointIO()
    io.save_checkpoint({"epoch": 1}, path)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, name, full)
            io.save_checkpoint({"epoch": 2}, path)
        assert io.load_checkpoint(path, weights_only=True) == {"epoch": 1}
        assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_two_processes_give_the_losses_of_one() -> None:
    data, recipe = make_data(), replace(RECIPE, max_epochs=2)
    one, history = fit(data, recipe)
    options = {**QUIET, "devices": 2, "strategy": "ddp_fork"}
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
    with pytest.warns(UserWarning, match="step 1 of epoch 2.*Training stopped; the last good weights are kept"):
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
    with pytest.warns(UserWarning, match="The weights are not finite after epoch 1"):
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


# CUDA graphs, with a stub of the calls that need a GPU


class StubGenerator:
    """A generator that remembers how it was put back."""

    def __init__(self) -> None:
        self.put_back: list[str] = []

    def get_state(self) -> str:
        return "state"

    def clone_state(self) -> str:
        return "clone"

    def set_state(self, state: str) -> None:
        self.put_back.append(state)

    graphsafe_set_state = set_state


def stub_graphed(module: torch.nn.Module, static: tuple[torch.Tensor, ...], **_: Any) -> torch.nn.Module:
    """What torch makes of a module: one node, fixed inputs, and gradients in memory that the next call overwrites."""
    compute, parameters = module.forward, list(module.parameters())
    gradients = [torch.empty_like(parameter) for parameter in parameters]

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
            for fixed, given in zip(static, inputs, strict=False):
                assert fixed.shape == given.shape
                fixed.copy_(given)
            with torch.enable_grad():
                loss = compute(*static)
            for memory, gradient in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
                memory.copy_(gradient)
            return loss.detach()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            return (*[None] * len(static), *(memory.mul_(gradient).detach() for memory in gradients))

    module.forward = lambda *inputs: Graphed.apply(*inputs, *parameters)
    return module


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the CPU taken for a GPU that captures; counts captures."""
    stub = SimpleNamespace(generator=StubGenerator(), captures=0, streams=[], free=100, make=stub_graphed)

    def make(*args: Any, **kwargs: Any) -> Any:
        stub.captures += 1
        return stub.make(*args, **kwargs)

    monkeypatch.setattr(_graphs, "DEVICE", "cpu")
    for name, value in {
        "default_generators": [stub.generator],
        "current_stream": lambda device: "stream",
        "set_stream": stub.streams.append,
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: 7,
        "mem_get_info": lambda device: (stub.free, 100),
        "make_graphed_callables": make,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return stub


def test_captured_steps_learn_what_others_do(graphs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data()  # of 30 spots the last six are a smaller batch
    captured, history = fit(data, checkpoint_dir=tmp_path)
    assert graphs.captures == 1
    assert graphs.generator.put_back == ["state"]
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"network", "best", "history", "best_loss"}
    monkeypatch.setattr(_graphs, "ENABLED", False)
    plain, expected = fit(data)
    assert graphs.captures == 1
    torch.testing.assert_close(weights(captured), weights(plain), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(history["train_loss"], expected["train_loss"], rtol=1e-5)


def refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError("operation not permitted when stream is capturing")


def skew(module: torch.nn.Module, static: tuple[torch.Tensor, ...], **_: Any) -> torch.nn.Module:
    compute = module.forward
    module.forward = lambda *inputs: 1.1 * compute(*inputs)
    return module


@pytest.mark.parametrize(
    ("make", "free", "reason"),
    [(refuse, 100, "not permitted"), (skew, 100, "the loss is 0.1 away"), (stub_graphed, -1, "fill the memory")],
)
def test_without_graphs_training_goes_on_as_if_they_had_not_been_tried(
    graphs: Any, make: Any, free: int, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graphs.make, graphs.free = make, free
    data = make_data()
    with caplog.at_level("DEBUG", logger="stpredict"):
        network, _ = fit(data)
    assert graphs.captures == 1
    assert "goes on without CUDA graphs" in caplog.text
    assert reason in caplog.text
    assert (graphs.generator.put_back, graphs.streams) == (["clone"], ["stream"])
    monkeypatch.setattr(_graphs, "ENABLED", False)
    assert torch.equal(weights(network), weights(fit(data)[0]))


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"precision": "64-true"}])
def test_steps_that_graphs_do_not_suit_are_not_captured(graphs: Any, options: dict[str, Any]) -> None:
    fit(make_data(16), replace(RECIPE, max_epochs=1), trainer_kwargs={**QUIET, **options})
    assert graphs.captures == 0


def test_weights_in_another_place_end_the_graphs(graphs: Any) -> None:
    class Move(_training.L.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            head = module.network.head.weight
            head.data = head.data.clone()

    class Look(_training.L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            graphed.append(bool(module._graphed))

    graphed: list[bool] = []
    fit(make_data(26), replace(RECIPE, max_epochs=2), trainer_kwargs={**QUIET, "callbacks": [Move(), Look()]})
    assert graphed == [True, True, False, False]


class Source:
    """Patches as the package keeps them: read into memory that is there, channels last."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.shape = pixels, pixels.shape

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, indices: Any) -> np.ndarray:
        raise AssertionError("a copy too many")

    def take(self, indices: np.ndarray, out: np.ndarray) -> None:
        assert np.moveaxis(out, -3, -1).flags.c_contiguous
        out[:] = self.pixels[indices]


@pytest.mark.parametrize("source", [Source, lambda pixels: pixels])
def test_readers_share_a_batch_for_a_gpu(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, empty = make_data(60), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    options: dict[str, Any] = {"batch_size": 40, "epoch": lambda: 1, "seed": 0, "train": True}
    plain = list(Batches(data.patches, data.targets, data.train, **options))
    pinned = list(Batches(source(data.patches), data.targets, data.train, pin=True, **options))
    assert [len(batch.patches) for batch in pinned] == [40, 10]
    for one, other in zip(plain, pinned, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))
