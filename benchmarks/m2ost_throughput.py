"""How fast M2OST is, beside its formulas computed literally, in one process.

    python benchmarks/m2ost_throughput.py                        # CPU, two threads, batches of 16
    python benchmarks/m2ost_throughput.py --profile              # and where the time goes
    python benchmarks/m2ost_throughput.py --device cuda --batch 96 --runs 30
    python benchmarks/m2ost_throughput.py --device cuda --batch 96 --runs 30 --compile

The literal formulation has one product per projection and attention by einsum and softmax. It runs on the parameters of
the very network that it is compared to, so the results can be, too, and takes images as float32 already; the package's
takes uint8. Runs of all variants take turns, and medians are given. FLOP are those of the formulas for both, training
(forward and backward, without an optimiser's step) counted as three times the forward pass; the ceiling is what one
large product reaches here in the same precision.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from stpredict.models.m2ost._module import PRESETS, M2OSTModule

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Literal(nn.Module):
    """The published formulas, one by one, on the parameters of an M2OST network."""

    def __init__(self, network: M2OSTModule) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Predict expression (batch, genes) from images (batch, levels, 3, side, side) in [0, 1]."""
        net: Any = self.network
        config = self.network.config
        levels, size = config["levels"], config["image_size"]
        x = []
        for level in range(levels):
            parts = [net.class_token.expand(len(images), -1, -1)]
            for k in range(level, -1, -1):
                side = size >> k
                center = slice((size - side) // 2, (size + side) // 2)
                parts.append(self._embed(images[:, level, :, center, center], k))
            x.append(torch.cat(parts, dim=1) + net.positions[level])
        for block in net.blocks:
            x = [self._self_attention(layer, t) + t for layer, t in zip(block.attention, x, strict=True)]
            x = [self._perceptron(block.mlp, t) + t for t in x]
            x = self._cross_attention(block.cross, x)
            gates = block.gate.net(torch.cat([t.mean(dim=1) for t in x], dim=-1)).chunk(levels, dim=-1)
            x = [t * gate[:, None] + t for t, gate in zip(x, gates, strict=True)]
        return net.head(torch.cat([net.norm(t)[:, 0] for t in x], dim=-1))

    def _embed(self, image: Tensor, k: int) -> Tensor:
        embedder: Any = self.network.embedders[k]
        before, first, _, second, after = embedder
        patch = self.network.config["patch_size"] >> k
        b, c, side, _ = image.shape
        grid = image.reshape(b, c, side // patch, patch, side // patch, patch)
        pixels = grid.permute(0, 2, 4, 3, 5, 1).reshape(b, (side // patch) ** 2, patch * patch * c)
        hidden = F.gelu(F.linear(before(pixels), first.weight, first.bias))
        return after(F.linear(hidden, second.weight, second.bias))

    def _self_attention(self, layer: Any, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, weight) for weight in layer.qkv.weight.chunk(3))
        return F.linear(self._attention(q, k, v, layer.heads), layer.out.weight, layer.out.bias)

    def _perceptron(self, mlp: Any, x: Tensor) -> Tensor:
        norm, first, second = mlp[0], mlp[1], mlp[4]
        hidden = F.gelu(F.linear(norm(x), first.weight, first.bias))
        return F.gelu(F.linear(hidden, second.weight, second.bias))

    def _cross_attention(self, layer: Any, x: list[Tensor]) -> list[Tensor]:
        x = [layer.norm(t) for t in x]
        q, k, v = zip(
            *([F.linear(t, w) for w in qkv.weight.chunk(3)] for qkv, t in zip(layer.qkv, x, strict=True)), strict=True
        )
        mixed = []
        for i, out in enumerate(layer.out):
            seen = [self._attention(q[i], k[j], v[j], layer.heads) for j in range(len(x)) if j != i]
            mixed.append(F.linear(torch.cat(seen, dim=-1), out.weight, out.bias))
        return mixed

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        scores = torch.einsum("bnhc,bmhc->bhnm", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhnm,bmhc->bnhc", torch.softmax(scores, dim=-1), v).flatten(2)


def step(module: Any, images: Tensor, mode: str, precision: torch.dtype) -> Callable[[], None]:
    """One batch, forward, and when training backward."""

    def run() -> None:
        with (
            torch.set_grad_enabled(mode == "training"),
            torch.autocast(images.device.type, torch.bfloat16, enabled=precision == torch.bfloat16),
        ):
            output = module(images)
        if mode == "training":
            output.float().square().mean().backward()
            module.zero_grad(set_to_none=True)
        if images.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def race(contestants: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """Median seconds of each, the contestants taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(runs + 2):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def ceiling(device: str, precision: torch.dtype) -> float:
    """FLOP per second of a large product; in float32 on a CPU, of the better of torch's two ways to compute it."""
    n = 16384 if device == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=precision)
    ways: dict[str, Callable[[], object]] = {"matmul": lambda: a @ b}
    if device == "cpu":
        ways["convolution"] = lambda: F.conv2d(a[None, :, None].permute(0, 3, 2, 1), b[:, :, None, None])

    def synchronized(way: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            way()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    with torch.no_grad():
        return 2 * n**3 / min(race({name: synchronized(way) for name, way in ways.items()}, 7).values())


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--genes", type=int, default=250)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile the package's network")
    parser.add_argument("--profile", action="store_true", help="print where the package's network spends its time")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    device, batch = arguments.device, arguments.batch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    network = M2OSTModule.from_preset(arguments.preset, arguments.genes).to(device)
    size = network.config["image_size"]
    images = torch.randint(0, 256, (batch, 3, 3, size, size), dtype=torch.uint8, device=device)
    floats = images / 255
    literal = Literal(network)
    with torch.no_grad():
        difference = (network(images[:2]) - literal(floats[:2])).abs().max().item()
        with FlopCounterMode(display=False) as counter:
            literal(floats[:1])
    flop = counter.get_total_flops()
    shipped = torch.compile(network) if arguments.compile else network

    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, batches of {batch}")
    print(
        f"{arguments.preset}: {sum(p.numel() for p in network.parameters()):,} parameters, {flop / 1e9:.2f} GFLOP a spot "
        f"forward; outputs differ by {difference:.1e} at most"
    )
    ceilings = {key: ceiling(device, precision) for key, precision in PRECISIONS.items()}
    print("ceiling: " + ", ".join(f"{key} {rate / 1e12:.2f} TFLOP/s" for key, rate in ceilings.items()))
    print(f"\n{'':10}{'':10}{'literal':>20}{'package':>20}{'of ceiling':>12}{'faster':>10}{'than float32':>14}")
    print(f"{'':20}{'ms/spot (TFLOP/s)':>20}{'ms/spot (TFLOP/s)':>20}{'':12}{'':10}{'literal':>14}")

    rows = []
    for mode, passes in (("inference", 1), ("training", 3)):
        contestants = {
            f"{who} {key}": step(module, pixels, mode, precision)
            for key, precision in PRECISIONS.items()
            for who, module, pixels in (("literal", literal, floats), ("package", shipped, images))
        }
        seconds = race(contestants, arguments.runs)
        for key in PRECISIONS:
            row: dict[str, Any] = {"mode": mode, "precision": key}
            for who in ("literal", "package"):
                row[f"{who}_ms_per_spot"] = seconds[f"{who} {key}"] / batch * 1e3
                row[f"{who}_tflops"] = passes * flop * batch / seconds[f"{who} {key}"] / 1e12
            row["share_of_ceiling"] = row["package_tflops"] * 1e12 / ceilings[key]
            row["faster"] = seconds[f"literal {key}"] / seconds[f"package {key}"]
            row["faster_than_float32_literal"] = seconds["literal float32"] / seconds[f"package {key}"]
            rows.append(row)
            columns = [f"{row[f'{w}_ms_per_spot']:.2f} ({row[f'{w}_tflops']:.2f})" for w in ("literal", "package")]
            print(
                f"{mode:10}{key:>10}{columns[0]:>20}{columns[1]:>20}{row['share_of_ceiling']:>12.0%}"
                f"{row['faster']:>9.2f}x{row['faster_than_float32_literal']:>13.2f}x"
            )
            if arguments.profile:
                with profile() as profiled:
                    contestants[f"package {key}"]()
                order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
                print(profiled.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40))
    if arguments.json:
        result = {
            "device": name,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "preset": arguments.preset,
            "batch": batch,
            "compiled": arguments.compile,
            "gflop_per_spot": flop / 1e9,
            "ceiling_tflops": {key: rate / 1e12 for key, rate in ceilings.items()},
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
