"""A trained M2OST network with what it needs to be applied: genes, their scale, and its inputs' geometry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from tqdm.auto import tqdm

from stpredict.models._base import FittedModel
from stpredict.models._device import resolve_device, resolve_precision
from stpredict.models._fields import (
    Arrays,
    DamagedError,
    check_arrays,
    check_integer,
    check_mapping,
    check_positive,
    get,
    short,
)
from stpredict.models._reads import check_patches
from stpredict.models.m2ost._module import CONFIG, M2OSTModule

# What is recorded of every epoch.
HISTORY = ("train_loss", "val_loss", "val_pcc", "learning_rate")
_PREFIX = "network."
# Symmetries to compute at a time: with the spots of one batch alone a GPU waits for the next kernel.
_VIEWS_AT_A_TIME = {"cpu": 1, "cuda": 4}


class PatchSource(Protocol):
    """Patches by batches, such as :class:`stpredict.pp.Patches`."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Any, /) -> np.ndarray: ...


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class M2OST(FittedModel):
    """A fitted M2OST model (Wang et al., AAAI 2025, arXiv 2409.15092).

    Attributes
    ----------
    network
        The network, on the CPU and in evaluation mode.
    genes
        Names of the ``G`` genes.
    mean, scale
        ``(G,)`` of the expression on the training spots; the network predicts ``(expression - mean) / scale``.
    history
        One value per epoch, by name: training loss, validation loss, validation per-gene PCC, learning rate. Empty for a
        network that was trained elsewhere.
    reads
        ``{"kind": "patches", "levels": ..., "image_size": ..., "spot_scale": ...}``, ``spot_scale`` in spot diameters.
    params, seen
        What the model was fitted with, and fingerprints of its training spots.
    """

    kind: ClassVar[str] = "m2ost"

    network: M2OSTModule
    mean: np.ndarray
    scale: np.ndarray
    history: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.network.config
        n_genes = len(self.genes)
        if config["n_genes"] != n_genes:
            raise DamagedError("genes", f"has {n_genes} names, but the network predicts {config['n_genes']}")
        check_arrays(vars(self), dict.fromkeys(("mean", "scale"), ((n_genes,), "float64")))
        check_positive("scale", self.scale)
        for name, parameter in self.network.named_parameters():
            if not parameter.isfinite().all():
                raise DamagedError(_PREFIX + name, "has values that are not finite", in_weights=True)
        _check_history(self.history)
        check_patches(self.reads, levels=config["levels"], image_size=config["image_size"])

    def predict(
        self,
        patches: PatchSource,
        *,
        symmetries: bool = True,
        batch_size: int = 64,
        device: str = "auto",
        precision: str = "auto",
    ) -> np.ndarray:
        """Predict from patches.

        Parameters
        ----------
        patches
            ``(n, levels, 3, size, size)`` uint8, an array or anything that is indexed like one.
        symmetries
            Average the predictions from the eight ways to turn and mirror a spot's images. It takes eight times as long
            and predicts better, and no prediction depends on how the slide lay under the scanner.
        batch_size
            Spots at a time.
        device
            Where to compute.
        precision
            ``"bf16"``, ``"32"``, or ``"auto"``: bf16 where the hardware is faster with it.

        Returns
        -------
        ``(n, G)`` float32, in units of the expression that the model was fitted to.
        """
        device = resolve_device(device)
        kind = torch.device(device).type
        use_bf16 = resolve_precision(precision, device) == "bf16"
        network = self.network.to(device)
        network.eval()
        predicted = np.empty((len(patches), len(self.genes)), dtype=np.float32)
        try:
            with torch.inference_mode(), torch.autocast(kind, torch.bfloat16) if use_bf16 else nullcontext():
                for rows, batch in _read_ahead(patches, batch_size, device):
                    views = list(_symmetric(batch)) if symmetries else [batch]
                    at_a_time = _VIEWS_AT_A_TIME[kind]
                    outputs = [
                        network(torch.cat(some) if len(some) > 1 else some[0]).float().unflatten(0, (len(some), -1))
                        for some in (views[i : i + at_a_time] for i in range(0, len(views), at_a_time))
                    ]
                    predicted[rows] = torch.cat(outputs).mean(0).cpu().numpy()
        finally:
            self.network.to("cpu")
        return predicted * self.scale.astype(np.float32) + self.mean.astype(np.float32)

    def learned(self) -> dict[str, Any]:
        """How the training went; the weights stay with the model."""
        return {"history": self.history}

    def to_state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Header and arrays for :meth:`save`."""
        header, arrays = super().to_state()
        history = {
            name: [float(value) if np.isfinite(value) else None for value in values]
            for name, values in self.history.items()
        }
        weights = {_PREFIX + name: value.numpy(force=True) for name, value in self.network.state_dict().items()}
        return (
            {**header, "network": self.network.config, "history": history},
            {**arrays, **weights, "mean": self.mean, "scale": self.scale},
        )

    @classmethod
    def from_state(cls, header: dict[str, Any], arrays: Arrays) -> Self:
        """Rebuild what :meth:`to_state` took apart."""
        common = cls._common_state(header, arrays)
        n_genes = len(common["genes"])
        return cls(
            **common,
            **arrays.read(dict.fromkeys(("mean", "scale"), ((n_genes,), "float64"))),
            network=_read_network(get(header, "network"), arrays).eval(),
            history=_read_history(get(header, "history")),
        )

    @classmethod
    def from_authors(
        cls, state_dict: dict[str, torch.Tensor], genes: Sequence[str], *, spot_scale: float = 1.54
    ) -> Self:
        """Wrap a checkpoint of the authors' network, so that it can predict on any SpatialData.

        Parameters
        ----------
        state_dict
            Their parameters, as for :meth:`stpredict.models.M2OSTModule.from_authors`.
        genes
            Names of the outputs, in order.
        spot_scale
            Field of view of level 0 in spot diameters; the default is about their 224 pixels on the HER2+ set.
        """
        network = M2OSTModule.from_authors(state_dict)
        n_genes = network.config["n_genes"]
        if len(genes) != n_genes:
            raise ValueError(f"The checkpoint predicts {n_genes} genes, but `genes` has {len(genes)} names.")
        return cls(
            network=network.eval(),
            genes=list(genes),
            mean=np.zeros(n_genes),
            scale=np.ones(n_genes),
            reads={
                "kind": "patches",
                "levels": network.config["levels"],
                "image_size": network.config["image_size"],
                "spot_scale": float(spot_scale),
            },
        )

    def __repr__(self) -> str:
        config = self.network.config
        n_parameters = sum(p.numel() for p in self.network.parameters())
        text = (
            f"M2OST of {len(self.genes)} genes ({config['levels']} levels of {config['image_size']} x "
            f"{config['image_size']} pixels, {n_parameters:,} parameters)"
        )
        if self.history:
            losses, validated = self.history["train_loss"], self.history["val_loss"]
            text += f"\n  fit: {len(losses)} epochs; "
            if np.isfinite(validated).any():
                best = int(np.nanargmin(validated))
                text += f"lowest validation loss {validated[best]:.4f} in epoch {best}"
            else:
                text += f"training loss {losses[-1]:.4f} in the last"
        return text


def _check_history(history: Any) -> None:
    """Raise a DamagedError unless there is nothing, or one number per epoch under each name."""
    check_mapping("history", history)
    n_epochs = len(next(iter(history.values()), ()))
    for name in HISTORY if history else ():
        values = get(history, name, within="history.")
        if (
            not isinstance(values, np.ndarray)
            or values.dtype.kind != "f"
            or values.shape != (n_epochs,)
            or not n_epochs
        ):
            raise DamagedError(f"history.{name}", f"is {short(values)}; expected {n_epochs or 'some'} numbers")


def _read_history(saved: Any) -> dict[str, np.ndarray]:
    """Lists of a file as arrays; what was not finite is `None` there."""
    check_mapping("history", saved)
    for name, values in saved.items():
        if not isinstance(values, list) or not all(value is None or type(value) in (int, float) for value in values):
            raise DamagedError(f"history.{name}", f"is {short(values)}; expected a list of numbers")
    try:
        return {name: np.array([np.nan if v is None else float(v) for v in values]) for name, values in saved.items()}
    except OverflowError as error:
        raise DamagedError("history", f"has numbers that are too large: {error}") from error


def _read_network(config: Any, arrays: Arrays) -> M2OSTModule:
    """Build a network with arrays of a file as its weights; nothing is allocated before all their shapes fit."""
    check_mapping("network", config)
    for name in CONFIG:
        value = get(config, name, within="network.")
        if name in ("dropout", "mask_ratio"):
            if type(value) not in (int, float):
                raise DamagedError(f"network.{name}", f"is {short(value)}; expected a share")
        else:
            # As many blocks as a file has arrays, and as many levels as halve its images, take no time to build.
            check_integer(f"network.{name}", value, 1, {"depth": len(arrays.names), "levels": 16}.get(name, 2**24))
    if unknown := config.keys() - set(CONFIG):
        raise DamagedError(f"network.{min(unknown)}", "is unknown")
    try:
        with torch.device("meta"):
            network = M2OSTModule(**config)
    except (ValueError, RuntimeError) as error:
        raise DamagedError("network", f"cannot be built: {error}") from error
    layout = {_PREFIX + name: (tuple(value.shape), "float32") for name, value in network.state_dict().items()}
    state = {name.removeprefix(_PREFIX): torch.from_numpy(value) for name, value in arrays.read(layout).items()}
    network.load_state_dict(state, assign=True)
    return network


def _read_ahead(patches: PatchSource, batch_size: int, device: str) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows and patches of batch after batch on the device; a GPU computes while the next batch is read."""
    rows = [slice(i, min(i + batch_size, len(patches))) for i in range(0, len(patches), batch_size)]

    def read(some: slice) -> torch.Tensor:
        return torch.from_numpy(patches[np.arange(some.start, some.stop)])

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, rows[0]) if rows else None
        for some, after in zip(
            tqdm(rows, desc="predicting", unit="batch", delay=2, leave=False), [*rows[1:], None], strict=True
        ):
            assert ahead is not None
            batch = ahead.result()
            ahead = None if after is None else reader.submit(read, after)
            yield some, batch.to(device)


def _symmetric(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """Images in the eight ways in which a square can lie."""
    for turned in (images, images.mT):
        for axes in ((), (-1,), (-2,), (-2, -1)):
            yield turned.flip(axes)
