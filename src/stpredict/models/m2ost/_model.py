"""A trained M2OST network with what it needs to be applied: genes, their scale, and its inputs' geometry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from tqdm.auto import tqdm

from stpredict.models import _io
from stpredict.models._device import resolve_device, resolve_precision
from stpredict.models.m2ost._module import M2OSTModule


class PatchSource(Protocol):
    """Patches by batches, such as :class:`stpredict.pp.Patches`."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Any, /) -> np.ndarray: ...


@dataclass(frozen=True, repr=False, eq=False)
class M2OST(_io.Saveable):
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
        One value per epoch, by name: training loss, validation loss, validation per-gene PCC, learning rate.
    params
        What the model was fitted with; ``spot_scale`` (spot diameters) says which patches it reads.
    """

    kind: ClassVar[str] = "m2ost"

    network: M2OSTModule
    genes: list[str]
    mean: np.ndarray
    scale: np.ndarray
    history: dict[str, np.ndarray] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)

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
        starts = range(0, len(patches), batch_size)
        try:
            with torch.inference_mode(), torch.autocast(kind, torch.bfloat16) if use_bf16 else nullcontext():
                for start in tqdm(starts, desc="predicting", unit="batch", delay=2, leave=False):
                    rows = np.arange(start, min(start + batch_size, len(patches)))
                    batch = torch.from_numpy(patches[rows]).to(device)
                    views = [network(view).float() for view in (_symmetric(batch) if symmetries else [batch])]
                    predicted[rows] = torch.stack(views).mean(0).cpu().numpy()
        finally:
            self.network.to("cpu")
        return predicted * self.scale.astype(np.float32) + self.mean.astype(np.float32)

    def to_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Header and tensors for :meth:`save`."""
        header = {
            "genes": self.genes,
            "params": self.params,
            "network": self.network.config,
            "history": {name: [float(value) for value in values] for name, values in self.history.items()},
        }
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        return header, {**tensors, "mean": torch.from_numpy(self.mean), "scale": torch.from_numpy(self.scale)}

    @classmethod
    def from_state(cls, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Self:
        """Rebuild what :meth:`to_state` took apart."""
        network = M2OSTModule(**header["network"])
        prefix = "network."
        network.load_state_dict(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )
        genes = list(header["genes"])
        if tuple(tensors["mean"].shape) != (len(genes),) or tuple(tensors["scale"].shape) != (len(genes),):
            raise ValueError(f"mean and scale do not have the {len(genes)} values of the genes")
        return cls(
            network=network.eval(),
            genes=genes,
            mean=tensors["mean"].numpy(),
            scale=tensors["scale"].numpy(),
            history={name: np.array(values) for name, values in header["history"].items()},
            params=dict(header["params"]),
        )

    @classmethod
    def from_authors(cls, state_dict: dict[str, torch.Tensor], genes: Sequence[str], *, field: float = 1.54) -> Self:
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
            params={"spot_scale": field},
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


def _symmetric(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """Images in the eight ways in which a square can lie."""
    for turned in (images, images.mT):
        for axes in ((), (-1,), (-2,), (-2, -1)):
            yield turned.flip(axes)
