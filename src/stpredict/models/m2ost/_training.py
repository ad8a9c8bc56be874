"""Train an M2OST network with Lightning."""

from __future__ import annotations

import copy
import logging
import math
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.memory import is_oom_error

from stpredict.models._device import resolve_precision
from stpredict.models.m2ost import _checkpoint, _graphs
from stpredict.models.m2ost._batches import Batch, Batches
from stpredict.models.m2ost._model import HISTORY, PatchSource
from stpredict.models.m2ost._module import M2OSTModule

logger = logging.getLogger("stpredict")

# On a GPU the losses are looked at this rarely, because a look waits for the queue to drain.
_STEPS_BETWEEN_CHECKS = 10


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults were chosen on sections C2 to C4 of the HER2+ set, by benchmarks/m2ost_recipe.py."""

    max_epochs: int = 30
    batch_size: int = 8
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    warmup: float = 0.05
    schedule: str = "cosine"
    optimizer: str = "adamw"
    stain_jitter: float = 0.05
    patience: int | None = 10
    gradient_clip: float | None = 1.0


RECIPES = {
    "default": Recipe(),
    "paper": Recipe(
        max_epochs=100,
        batch_size=96,
        learning_rate=1e-4,
        weight_decay=0.0,
        warmup=0.0,
        schedule="constant",
        optimizer="adam",
        stain_jitter=0.0,
        patience=None,
        gradient_clip=None,
    ),
}


class Data(NamedTuple):
    """``targets`` ``(len(patches), G)`` standardised; ``train`` and ``validation`` are positions among the patches."""

    patches: PatchSource
    targets: np.ndarray
    train: np.ndarray
    validation: np.ndarray


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite."""


def train(
    network: M2OSTModule,
    data: Data,
    recipe: Recipe,
    *,
    random_state: int,
    device: str,
    precision: str = "auto",
    checkpoint_dir: Path | None = None,
    trainer_kwargs: Mapping[str, Any] | None = None,
) -> tuple[M2OSTModule, dict[str, np.ndarray]]:
    """Train a network.

    Parameters
    ----------
    network
        What to train; left as it is.
    data
        Patches, targets and the split.
    recipe
        How.
    random_state
        Seed of order, augmentation and dropout.
    device
        ``"cpu"``, ``"cuda"`` or ``"cuda:<number>"``.
    precision
        ``"bf16"``, ``"32"``, or ``"auto"``.
    checkpoint_dir
        Folder for a checkpoint after every epoch, to go on from after a kill, and a CSV log. It must belong to these data,
        this recipe and this seed alone: that is not compared. A damaged checkpoint is named in a warning, and training
        begins anew. `None` writes nothing.
    trainer_kwargs
        For :class:`lightning.pytorch.Trainer`.

    Returns
    -------
    The network with the weights of the epoch of lowest validation loss (of the last epoch without validation), and the
    history by name, one value per epoch.

    Raises
    ------
    NonFiniteLoss
        In the first epoch; later the last good weights are returned, with a warning.
    MemoryError
        The memory of the GPU or the computer is full.
    KeyboardInterrupt
        Ctrl-C.
    """
    module = _Training(network, data, recipe, random_state)
    kind = torch.device(device)
    callbacks: list[L.Callback] = []
    if recipe.patience is not None and len(data.validation):
        callbacks.append(EarlyStopping("val_loss", patience=recipe.patience, check_finite=False))
    resume_from: Path | None = None
    if checkpoint_dir is not None:
        name = _checkpoint.FILE.removesuffix(ModelCheckpoint.FILE_EXTENSION)
        callbacks.append(ModelCheckpoint(checkpoint_dir, filename=name, save_top_k=1, enable_version_counter=False))
        if (resume_from := _checkpoint.find(checkpoint_dir, module.state_dict())) is not None:
            logger.info(f"Going on from {resume_from}.")
    arguments: dict[str, Any] = {
        "max_epochs": recipe.max_epochs,
        "accelerator": "gpu" if kind.type == "cuda" else "cpu",
        "devices": 1 if kind.index is None else [kind.index],
        "precision": "bf16-mixed" if resolve_precision(precision, device) == "bf16" else "32-true",
        "gradient_clip_val": recipe.gradient_clip,
        "logger": CSVLogger(checkpoint_dir, name="log") if checkpoint_dir is not None else False,
        "log_every_n_steps": 1,
        "callbacks": callbacks,
        "enable_checkpointing": checkpoint_dir is not None,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    arguments.update(trainer_kwargs or {})
    if trainer_kwargs and "callbacks" in trainer_kwargs:
        arguments["callbacks"] = [*callbacks, *trainer_kwargs["callbacks"]]
    plugins = _as_list(arguments.get("plugins"))
    if checkpoint_dir is not None and not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        arguments["plugins"] = [*plugins, _checkpoint.AtomicCheckpointIO()]
    try:
        with _quiet(), _interruptible(), torch.random.fork_rng(devices=[kind] if kind.type == "cuda" else []):
            L.Trainer(**arguments).fit(module, ckpt_path=resume_from, weights_only=True)
    except NonFiniteLoss as error:
        if not np.isfinite(module.history.numpy(force=True)[:, 0]).any():
            raise
        warnings.warn(f"{error} Training stopped; the last good weights are kept.", UserWarning, stacklevel=3)
    except RuntimeError as error:
        if not is_oom_error(error):
            raise
        raise MemoryError(
            f"Memory is full at a batch of {recipe.batch_size} spots on {device!r}. Lower `batch_size`, and keep the global "
            "batch with `trainer_kwargs={'accumulate_grad_batches': 2}`; or choose a smaller `preset`."
        ) from error
    history = module.history.numpy(force=True)
    history = history[: int(np.isfinite(history[:, 0]).sum())]
    return module.best.cpu().eval(), dict(zip(HISTORY, history.T.astype(np.float64), strict=True))


class _Training(L.LightningModule):
    """The network, the best one so far, and the history: all in the state, so that a resumed run has them too."""

    history: torch.Tensor
    best_loss: torch.Tensor

    def __init__(self, network: M2OSTModule, data: Data, recipe: Recipe, seed: int) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        self.best = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("history", torch.full((recipe.max_epochs, len(HISTORY)), math.nan))
        self.register_buffer("best_loss", torch.tensor(math.inf))
        self._data, self._recipe, self._seed = data, recipe, seed
        self._losses: list[torch.Tensor] = []
        self._weights: list[float] = []
        self._moments: torch.Tensor | None = None
        # None: not tried yet; False: not to be had.
        self._graphed: Callable[..., torch.Tensor] | Literal[False] | None = None
        self._graphed_at: list[int] = []

    def train_dataloader(self) -> Batches:
        return self._batches(self._data.train, train=True)

    def val_dataloader(self) -> Batches | list[Any]:
        return self._batches(self._data.validation, train=False) if len(self._data.validation) else []

    def _batches(self, indices: np.ndarray, *, train: bool) -> Batches:
        return Batches(
            self._data.patches,
            self._data.targets,
            indices,
            batch_size=self._recipe.batch_size,
            epoch=lambda: self.current_epoch,
            seed=self._seed,
            train=train,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            pin=self.device.type == "cuda",
        )

    def on_train_epoch_start(self) -> None:
        # Dropout and masking depend on the epoch alone, so a resumed run draws what an unbroken one would.
        torch.manual_seed(hash((self._seed, self.current_epoch, self.global_rank)) % 2**63)
        self._losses, self._weights = [], []
        if self._graphed and self._graphed_at != self._addresses():
            self._graphed = False  # someone has put other tensors into the place of the weights

    def on_train_end(self) -> None:
        self._graphed = None  # its memory is needed for what follows

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        inputs = batch.patches, batch.targets, batch.symmetry, batch.jitter
        if len(batch.patches) == self._recipe.batch_size and self._may_be_graphed():
            if self._graphed is None:
                self._graphed = self._capture(inputs)
            squared = (self._graphed or self._squared)(*inputs)
        else:
            squared = self._squared(*inputs)
        # Processes average their gradients; this makes the average that of the global batch.
        loss = squared * self.trainer.world_size / batch.n_global
        self._losses.append(loss.detach())
        self._weights.append(batch.n_global)
        if self.device.type == "cpu" or len(self._losses) % _STEPS_BETWEEN_CHECKS == 0:
            self._check_losses()
        return loss

    def _squared(
        self, patches: torch.Tensor, targets: torch.Tensor, symmetry: torch.Tensor, jitter: torch.Tensor
    ) -> torch.Tensor:
        """Sum over the spots of a batch of the mean squared error of the genes."""
        images = augment(patches, symmetry, jitter, self._recipe.stain_jitter)
        return (self.network(images).float() - targets).square().mean(1).sum()

    def _may_be_graphed(self) -> bool:
        """Whether a step is one forward and one backward pass on one GPU, with nothing in between that is not ours."""
        if self.device.type != _graphs.DEVICE or self._graphed is False or not _graphs.ENABLED:
            return False
        if self.trainer.accumulate_grad_batches != 1 or torch.is_anomaly_enabled():
            return False
        if self._graphed:
            return True
        # Hooks of modules would not run.
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return (
            type(self.trainer.strategy) is SingleDeviceStrategy
            and type(self.trainer.precision_plugin) in (Precision, MixedPrecision)
            and self.trainer.precision in ("32-true", "bf16-mixed")
            and not any(getattr(module, name) for module in self.network.modules() for name in hooks)
        )

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> Callable[..., torch.Tensor] | Literal[False]:
        config = self.network.config
        self._graphed_at = self._addresses()
        return (
            _graphs.capture(
                self.network,
                self._squared,
                inputs,
                bf16=self.trainer.precision == "bf16-mixed",
                draws=bool(config["dropout"] or config["mask_ratio"]),
            )
            or False
        )

    def _addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.network.parameters()]

    def _check_losses(self) -> None:
        bad = (~torch.isfinite(torch.stack(self._losses))).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteLoss(
                f"The loss is not finite at step {bad[0]} of epoch {self.current_epoch}: lower `learning_rate`, or "
                "check the expression for extreme values."
            )

    def on_train_epoch_end(self) -> None:
        # Lightning validates before this hook, so the history of the epoch is complete here.
        self._check_losses()
        if not all(parameter.isfinite().all() for parameter in self.network.parameters()):
            raise NonFiniteLoss(
                f"The weights are not finite after epoch {self.current_epoch}: lower `learning_rate`, or check the "
                "expression for extreme values."
            )
        losses = torch.stack(self._losses)
        weights = torch.tensor(self._weights, device=losses.device)
        mean = self.trainer.strategy.reduce((losses * weights).sum() / weights.sum(), reduce_op="mean")
        assert isinstance(mean, torch.Tensor)
        self.history[self.current_epoch, 0] = mean
        self.history[self.current_epoch, 3] = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        self.log("train_loss", mean, prog_bar=True)
        val_loss = self.history[self.current_epoch, 1]
        if not len(self._data.validation) or val_loss < self.best_loss:
            self.best_loss.copy_(val_loss)
            self.best.load_state_dict(self.network.state_dict())

    def validation_step(self, batch: Batch, index: int) -> None:
        predicted, target = self.network(batch.patches).double(), batch.targets.double()
        moments = torch.stack(
            [
                torch.ones_like(target).sum(0),
                predicted.sum(0),
                target.sum(0),
                predicted.square().sum(0),
                target.square().sum(0),
                (predicted * target).sum(0),
            ]
        )
        self._moments = moments if self._moments is None else self._moments + moments

    def on_validation_epoch_end(self) -> None:
        if self._moments is None:
            return
        moments = self.trainer.strategy.reduce(self._moments, reduce_op="sum")
        assert isinstance(moments, torch.Tensor)
        n, p, t, pp, tt, pt = moments
        loss = ((pp - 2 * pt + tt) / n).mean()
        pcc = (pt - p * t / n) / ((pp - p * p / n) * (tt - t * t / n)).clamp_min(1e-12).sqrt()
        self._moments = None
        self.history[self.current_epoch, 1] = loss
        self.history[self.current_epoch, 2] = pcc.median()
        self.log("val_loss", loss, prog_bar=True)
        self.log("val_pcc", pcc.median(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        recipe = self._recipe
        # As usual for transformers, weights of matrices decay; biases, norms, tokens and positions do not.
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim == 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
        ]
        kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
        # One kernel instead of dozens; one that also unscales gradients would not go with clipping.
        fused = self.device.type == "cuda" and getattr(self.trainer.precision_plugin, "scaler", None) is None
        optimizer = kind(groups, lr=recipe.learning_rate, fused=fused or None)
        if fused:
            # Lightning takes any fused optimizer for one that unscales, and refuses to clip for it. Here nothing is scaled.
            optimizer._step_supports_amp_scaling = False  # type: ignore[union-attr]
        total = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = round(recipe.warmup * total)

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if recipe.schedule == "constant":
                return 1.0
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def augment(patches: torch.Tensor, symmetry: torch.Tensor, jitter: torch.Tensor, stain_jitter: float) -> torch.Tensor:
    """Turn and flip, and jitter stains, alike for all levels of a spot.

    Parameters
    ----------
    patches
        ``(b, L, 3, S, S)`` uint8.
    symmetry
        ``(b,)`` 0 to 7: which flips and quarter turns.
    jitter
        ``(b, 6)`` standard normal.
    stain_jitter
        Standard deviation of the channels' factors (log scale) and offsets in optical density. 0 leaves colours alone.

    Returns
    -------
    ``(b, L, 3, S, S)``, uint8, or float in [0, 1] after stain jitter.
    """
    bits = symmetry[:, None, None, None, None]
    # Two flips and a transposition make all eight symmetries of the square.
    patches = torch.where((bits & 1).bool(), patches.flip(-1), patches)
    patches = torch.where((bits & 2).bool(), patches.flip(-2), patches)
    patches = torch.where((bits & 4).bool(), patches.transpose(-1, -2), patches)
    if stain_jitter == 0:
        return patches
    factor, offset = (stain_jitter * jitter).view(-1, 2, 1, 3, 1, 1).unbind(1)
    od = -torch.log((patches.float() + 1) / 256)
    return ((256 * torch.exp(-(od * factor.exp() + offset)) - 1) / 255).clamp(0, 1)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt, and the next one too.

    Lightning ignores the signal from the first one on, and ends the interpreter.
    """
    handler = signal.getsignal(signal.SIGINT)
    before = sys.exception()  # what the caller is handling is not of now
    try:
        yield
    except BaseException as error:
        reason = error.__context__
        while reason is not None and reason is not before:
            if isinstance(reason, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            reason = reason.__context__
        raise
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks on hardware and on loaders out of a notebook."""
    remarks = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = remarks.level
    remarks.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        remarks.setLevel(level)
