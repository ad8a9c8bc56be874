"""A step of training captured as CUDA graphs: a small batch is bound by the launches of some 1,700 kernels, not by them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("stpredict")

# Whether to try at all, and on which kind of device.
ENABLED = True
DEVICE = "cuda"

# Kernels are the same, so that graphs differ by what atomic additions round.
_TOLERANCE = 1e-2


class _Captured(nn.Module):
    """A computation with the parameters that get gradients by it."""

    def __init__(self, network: nn.Module, compute: Callable[..., Tensor], *, bf16: bool) -> None:
        super().__init__()
        self.network, self._compute, self._bf16 = network, compute, bf16

    def forward(self, *inputs: Tensor) -> Tensor:
        # A cached copy of a weight would be that of the capture. Around the capture autocast is off: the backward pass
        # would add up in float32, by way of copies.
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=self._bf16, cache_enabled=False):
            return self._compute(*inputs)


def capture(
    network: nn.Module, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], *, bf16: bool, draws: bool
) -> Callable[..., Tensor] | None:
    """The same computation with its forward and backward pass as graphs.

    No other thread may ask CUDA for anything meanwhile.

    Parameters
    ----------
    network
        Holds the parameters.
    compute
        What is captured: inputs to a loss. It may not wait for the GPU.
    inputs
        Of the shapes that the graphs are for.
    bf16
        Whether to compute under autocast.
    draws
        Whether the computation draws random numbers; if not, graphs are compared to what they were made of.

    Returns
    -------
    What takes such inputs, or `None` where capturing failed. Gradients are then in memory that the next call overwrites, so
    they cannot be accumulated. Weights, gradients and the random state are as before.
    """
    device = inputs[0].device
    stream, generator = torch.cuda.current_stream(device), torch.cuda.default_generators[device.index or 0]
    before, spare = generator.get_state(), generator.clone_state()
    try:
        module = _Captured(network, compute, bf16=bf16)
        static = tuple(torch.empty_like(t).copy_(t) for t in inputs)
        torch.cuda.empty_cache()
        taken = torch.cuda.memory_reserved(device)
        torch.cuda.graph.default_capture_stream = None  # it may be of another GPU
        with torch.autocast(device.type, enabled=False), torch.enable_grad():
            expected = [] if draws else _outcome(module, inputs)
            graphed: Any = torch.cuda.make_graphed_callables(module, static, allow_unused_input=True)
            torch.cuda.empty_cache()
            taken = torch.cuda.memory_reserved(device) - taken
            if torch.cuda.mem_get_info(device)[0] < taken:
                # What a graph takes serves nothing else, and the last batch of an epoch needs as much.
                raise RuntimeError("graphs would fill the memory")
            if not draws:
                _compare(_outcome(graphed, inputs), expected)
        generator.set_state(before)
        logger.debug("Steps of full batches are captured as CUDA graphs.")
        return graphed.forward  # not the module, which whoever keeps it would take for a part of his own
    # Drivers and kernels refuse in many ways, and training works without.
    except Exception as error:  # noqa: BLE001
        # A capture that broke off leaves its stream current, and the generator as if it still went on.
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(spare)
        logger.debug(f"Training goes on without CUDA graphs: {type(error).__name__}: {error}")
        return None


def _outcome(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Loss and gradients."""
    loss = module(*inputs)
    parameters = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [loss.detach().clone(), *(g.clone() for g in gradients if g is not None)]


def _compare(found: list[Tensor], expected: list[Tensor]) -> None:
    """Raise an ArithmeticError unless loss and gradients agree."""
    for name, chosen in (("loss", slice(0, 1)), ("gradient", slice(1, None))):
        a, b = (torch.cat([t.flatten() for t in tensors[chosen]]) for tensors in (found, expected))
        apart = float((a - b).norm() / b.norm().clamp_min(1e-12))
        if not apart <= _TOLERANCE:
            raise ArithmeticError(f"the {name} is {apart:.2g} away from what it is without graphs")
