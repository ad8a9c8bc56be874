"""What matrix products alone would take: those of a training step one by one, and a large square one."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from _gpu.part import Part
from _gpu.timing import alone

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
# Bytes of operands to go round in: more than a GPU's cache holds.
_ROUND = 256e6

Layout = tuple[tuple[int, ...], tuple[int, ...]]


class Recorder(TorchDispatchMode):
    """Counts the products of a step by kind and layout of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple[str, tuple[Layout, ...], torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        operands: tuple[Tensor, ...] = ()
        if name in ("mm", "bmm"):
            operands = args[:2]
        elif name in ("addmm", "baddbmm"):
            name, operands = {"addmm": "mm", "baddbmm": "bmm"}[name], args[1:3]
        elif name.startswith("_scaled_dot_product") and "backward" not in name:
            name, operands = "attention", args[:3]
        if operands:
            layouts = tuple((tuple(t.shape), tuple(t.stride())) for t in operands)
            self.products[name, layouts, operands[0].dtype] += 1
        return func(*args, **(kwargs or {}))


def ceilings(step: Callable[[], None], part: Part, precision: str, batch: int) -> dict[str, Any]:
    """Time of all products of a training step alone, and FLOP per second of these and of a large square product.

    Attention counts forward and backward, by torch's fused kernels. FLOP are those that this step really has, fewer than the
    published formulas: of the last block only the class tokens are computed.
    """
    with Recorder() as recorder:
        step()
    rows = []
    for (kind, layouts, dtype), count in recorder.products.items():
        seconds = _alone(kind, layouts, dtype, part)
        shapes = [shape for shape, _ in layouts]
        rows.append(
            {
                "kind": kind,
                "shapes": shapes,
                "count": count,
                "ms": seconds * count * 1e3,
                "flop": flop(kind, shapes) * count,
            }
        )
    by_kind = {
        kind: {"ms": sum(r["ms"] for r in chosen), "flop": sum(r["flop"] for r in chosen)}
        for kind, chosen in (
            ("products", [r for r in rows if r["kind"] != "attention"]),
            ("attention", [r for r in rows if r["kind"] == "attention"]),
        )
    }
    total_ms, total_flop = (sum(found[key] for found in by_kind.values()) for key in ("ms", "flop"))
    dtypes = {p: d for p, d in _DTYPES.items() if p != "bf16" or part.bf16}
    n = 256 if part.rehearse else 8192
    square = {}
    for name, allowed in [("float32", "highest"), ("tf32", "high"), ("bf16", "highest")]:
        if name == "bf16" and not part.bf16:
            continue
        torch.set_float32_matmul_precision(allowed)
        seconds = _alone("mm", (((n, n), (n, 1)), ((n, n), (n, 1))), dtypes.get(name, torch.float32), part)
        square[name] = 2 * n**3 / seconds / 1e12
    torch.set_float32_matmul_precision("highest")
    return {
        "batch": batch,
        "precision": precision,
        "step_gflop": total_flop / 1e9,
        "alone_ms": total_ms,
        "own_shapes_tflops": total_flop / total_ms / 1e9 if total_ms else None,
        "by_kind": by_kind,
        "square_tflops": square,
        "slowest": sorted(rows, key=lambda row: -row["ms"])[:12],
    }


def flop(kind: str, shapes: list[tuple[int, ...]]) -> int:
    """FLOP of one product; of attention two forward and five backward, which computes the scores again."""
    if kind == "attention":
        b, heads, n, c = shapes[0]
        return 7 * 2 * b * heads * n * shapes[1][2] * c
    return 2 * math.prod(shapes[0]) * shapes[1][-1]


def _alone(kind: str, layouts: tuple[Layout, ...], dtype: torch.dtype, part: Part) -> float:
    n_bytes = sum(_extent(*layout) for layout in layouts) * dtype.itemsize
    copies = 2 if part.rehearse else max(1, min(16, round(_ROUND / n_bytes)))
    sets = [[_random(*layout, dtype, part.device) for layout in layouts] for _ in range(copies)]
    turn = itertools.cycle(sets)

    def attention() -> None:
        q, k, v = (t.requires_grad_() for t in next(turn))
        out = F.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(out, (q, k, v), out)

    def product() -> None:
        torch.matmul(*next(turn))

    with torch.set_grad_enabled(kind == "attention"):
        return alone(attention if kind == "attention" else product, part.device)


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def _random(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Random numbers in this layout, of which broadcast axes repeat."""
    return torch.randn(_extent(shape, stride), device=device).to(dtype).as_strided(shape, stride)
