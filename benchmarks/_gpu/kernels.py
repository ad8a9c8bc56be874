"""What part a says of the kernels of attention, and of steps captured as CUDA graphs."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import stpredict as stp
from _gpu import device as dev
from _gpu.data import small_network
from _gpu.part import Part
from stpredict.models.m2ost import _blocks, _graphs, _training

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# Tokens of queries and of keys: of a level among themselves, and of two levels.
TOKENS = ((197, 197), (589, 589), (197, 589), (589, 393))


@contextmanager
def only(backend: SDPBackend) -> Iterator[None]:
    """Have networks use this kernel alone."""
    before = list(_blocks.BACKENDS)
    _blocks.BACKENDS[:] = [backend]
    try:
        yield
    finally:
        _blocks.BACKENDS[:] = before


def apart(a: Tensor, b: Tensor) -> float | str:
    """Distance of two tensors over the size of the second; JSON has no NaN."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    found = float((a - b).norm() / b.norm())
    return found if math.isfinite(found) else str(found)


def attention(part: Part, note: Any) -> list[dict[str, Any]]:
    """Errors of each kernel in bfloat16: alone in the network's own layouts, and in the whole network."""
    rows: list[dict[str, Any]] = []
    heads, c = (2, 16) if part.rehearse else (3, 64)
    tokens = ((5, 5), (5, 9)) if part.rehearse else TOKENS
    torch.manual_seed(0)
    for n, m in tokens:
        # As the network has them: thirds of one projection, seen as heads.
        fused = [torch.randn(3, t, 3 * heads * c, device=part.device).to(torch.bfloat16) for t in (n, m)]
        whole = torch.randn(3, n, 2 * heads, c, device=part.device).to(torch.bfloat16)
        cotangents = {
            "whole": whole[:, :, :heads].contiguous(),
            "half of a concatenation": whole[:, :, heads:],
            "one row for all": whole[:, :1, :heads].expand(-1, n, -1, -1),
        }
        for name, cotangent in cotangents.items():

            def outcome(dtype: torch.dtype, fused: Any = fused, cotangent: Any = cotangent) -> list[Tensor]:
                q, *_ = _blocks_heads(fused[0].to(dtype), heads)
                _, k, v = _blocks_heads(fused[1].to(dtype), heads)
                q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
                out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
                return [out, *torch.autograd.grad(out, (q, k, v), cotangent.to(dtype))]

            with sdpa_kernel([SDPBackend.MATH]):
                expected = outcome(torch.float64)
            for backend, kernel in KERNELS.items():
                row: dict[str, Any] = {"backend": backend, "queries": n, "keys": m, "gradient from": name}
                try:
                    with sdpa_kernel([kernel]):
                        found = outcome(torch.bfloat16)
                    row |= {
                        what: apart(a, b)
                        for what, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True)
                    }
                except RuntimeError as error:
                    row["left_out"] = str(error).splitlines()[0]
                rows.append(row)
        note(rows)
    return rows + _networks(part)


def _blocks_heads(x: Tensor, heads: int) -> tuple[Tensor, ...]:
    return x.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _networks(part: Part) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    network = stp.models.M2OSTModule.from_preset("small", 20, **small_network(rehearse=part.rehearse)).to(part.device)
    size = network.config["image_size"]
    images = torch.randint(0, 256, (3, 3, 3, size, size), dtype=torch.uint8, device=part.device)
    target = torch.randn(3, 20, device=part.device)

    def outcome(*, bf16: bool) -> list[Tensor]:
        with torch.autocast(torch.device(part.device).type, torch.bfloat16, enabled=bf16):
            predicted = network(images)
        gradients = torch.autograd.grad((predicted.float() - target).square().mean(), list(network.parameters()))
        return [predicted, torch.cat([g.flatten() for g in gradients])]

    with only(SDPBackend.MATH):
        expected = outcome(bf16=False)
    rows = []
    for backend, kernel in KERNELS.items():
        row: dict[str, Any] = {"backend": backend, "queries": "network", "keys": "–", "gradient from": "loss"}
        try:
            with only(kernel):
                found = outcome(bf16=True)
            row |= {"output": apart(found[0], expected[0]), "dq": None, "dk": None, "all": apart(found[1], expected[1])}
            row["gradient from"] = f"loss: all weights {row['all']}"
        except RuntimeError as error:
            row["left_out"] = str(error).splitlines()[0]
        rows.append(row)
    return rows


class Heard(logging.Handler):
    """What the package said about graphs."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        if "graphs" in record.getMessage():
            self.said.append(record.getMessage())


@contextmanager
def graphs(enabled: bool) -> Iterator[list[str]]:
    """Train with graphs or without; what is given holds the reason where they could not be had."""
    before, logger, heard = _graphs.ENABLED, logging.getLogger("stpredict"), Heard()
    level = logger.level
    logger.addHandler(heard)
    logger.setLevel(logging.DEBUG)
    _graphs.ENABLED = enabled and before
    try:
        yield heard.said
    finally:
        _graphs.ENABLED = before
        logger.removeHandler(heard)
        logger.setLevel(level)


class Steps(_training.L.Callback):
    """Losses, and seconds of a step."""

    def __init__(self, device: str, warm: int) -> None:
        self.device, self.warm = device, warm
        self.losses: list[Tensor] = []
        self.start, self.seconds = 0.0, 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Start the clock after some steps."""
        self.losses.append(outputs["loss"].detach().clone())
        if len(self.losses) == self.warm:
            dev.synchronize(self.device)
            self.start = time.perf_counter()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Stop it."""
        dev.synchronize(self.device)
        self.seconds = (time.perf_counter() - self.start) / max(1, len(self.losses) - self.warm)


def train_steps(part: Part, batch: int, n_steps: int, precision: str, *, enabled: bool) -> dict[str, Any]:
    """So many steps of the default recipe, on chance."""
    torch.manual_seed(0)
    n_genes = 8 if part.rehearse else 250
    network = stp.models.M2OSTModule.from_preset("small", n_genes, **small_network(rehearse=part.rehearse))
    size, n = network.config["image_size"], batch * min(n_steps, 3)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 3, 3, size, size), dtype=np.uint8)
    data = _training.Data(
        pixels,
        rng.standard_normal((n, n_genes)).astype(np.float32),
        np.tile(np.arange(n), -(-n_steps * batch // n))[: n_steps * batch],
        np.arange(0),
    )
    recipe = replace(_training.RECIPES["default"], max_epochs=1, batch_size=batch)
    seen = Steps(part.device, min(5, n_steps - 1))
    with graphs(enabled) as said:
        trained, _ = _training.train(
            copy.deepcopy(network),
            data,
            recipe,
            random_state=0,
            device=part.device,
            precision=precision,
            trainer_kwargs={"enable_progress_bar": False, "callbacks": [seen]},
        )
    return {
        "losses": torch.stack(seen.losses).cpu(),
        "weights": torch.cat([p.detach().flatten() for p in trained.parameters()]),
        "ms": 1e3 * seen.seconds,
        "said": said,
    }


def speeds(part: Part, note: Any) -> list[dict[str, Any]]:
    """Milliseconds of a whole step, with graphs and without."""
    rows: list[dict[str, Any]] = []
    precision = "bf16" if part.bf16 else "32"
    for batch, n_steps in ((2, 3),) if part.rehearse else ((8, 45), (16, 35), (96, 20)):
        row: dict[str, Any] = {"batch": batch, "precision": precision}
        for name, enabled in (("graphs", True), ("eager", False)):
            found = train_steps(part, batch, n_steps, precision, enabled=enabled)
            row |= {f"{name} ms": found["ms"], f"{name} spots/s": 1e3 * batch / found["ms"]}
            if enabled:
                row["said"] = "; ".join(found["said"]) or "not tried"
        rows.append(row)
        note(rows)
    return rows
