"""Part b: how fast the published network is, beside its formulas computed literally."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from m2ost_throughput import Literal
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import stpredict as stp
from _gpu import device as dev
from _gpu.data import dense_slide, small_network
from _gpu.gemms import ceilings
from _gpu.kernels import KERNELS as BACKENDS
from _gpu.kernels import graphs, only
from _gpu.part import Part
from _gpu.timing import profiled, race

GENES = 250
PRECISIONS = ("float32", "tf32", "bf16")


def run(part: Part) -> None:
    """Measure batches of 96 first, then what explains them, then the other sizes; torch.compile, which is slow, last."""
    genes = 8 if part.rehearse else GENES
    torch.manual_seed(0)
    network = stp.models.M2OSTModule.from_preset("small", genes, **small_network(rehearse=part.rehearse))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        size = network.config["image_size"]
        Literal(network)(torch.rand(1, 3, 3, size, size))
    flop = counter.get_total_flops()
    part.note("gflop_per_spot", flop / 1e9)
    network.to(part.device)
    precisions = [p for p in PRECISIONS if (p != "bf16" or part.bf16) and (p != "tf32" or part.cuda)]
    batches = (2, 3, 4) if part.rehearse else (16, 96, 384)
    middle = batches[1]

    def measure(batch: int, slice_s: float, rounds: int) -> dict[str, Any]:
        slice_s = 1e-3 if part.rehearse else slice_s
        return contest(part, network, flop, batch, precisions, slice_s=slice_s, rounds=rounds)

    if part.have:
        # What an earlier run has not, and whole fits, which other things have changed.
        part.attempt("fits", lambda: fits(part, genes, batches), seconds=15)
        for batch in (batches[0], batches[2]):
            if f"batch {batch}" not in part.have:
                part.attempt(f"batch {batch}", lambda batch=batch: measure(batch, 0.05, 3), seconds=10)
        if "compiled" not in part.have:
            part.attempt(
                "compiled",
                lambda: compiled(part, network, flop, middle, "bf16" if part.bf16 else "float32"),
                seconds=25,
            )
        return
    part.attempt(f"batch {middle}", lambda: measure(middle, 0.15, 1 if part.rehearse else 5))
    best = "bf16" if part.bf16 else "float32"
    one = steps(network, inputs(network, middle, part, floats=False), "training", best, part.device)
    part.attempt("ceilings", lambda: ceilings(one, part, best, middle))
    part.attempt("profile", lambda: profiled(one, part.device, calls=3))
    part.attempt("fits", lambda: fits(part, genes, batches), seconds=0 if part.rehearse else 20)
    for batch in (batches[2], batches[0]):
        part.attempt(f"batch {batch}", lambda batch=batch: measure(batch, 0.05, 1 if part.rehearse else 3), seconds=10)
    part.attempt("attention", lambda: attention(part, network, middle, best), seconds=5)
    part.attempt("compiled", lambda: compiled(part, network, flop, middle, best), seconds=0 if part.rehearse else 25)


def inputs(network: Any, batch: int, part: Part, *, floats: bool) -> list[Tensor]:
    """Two batches that take turns, so that none stays in a cache."""
    size = network.config["image_size"]
    images = torch.randint(0, 256, (2, batch, 3, 3, size, size), dtype=torch.uint8, device=part.device)
    return list(images / 255 if floats else images)


def steps(module: Any, images: list[Tensor], mode: str, precision: str, device: str) -> Callable[[], None]:
    """One batch, forward, and when training backward."""
    turn: Iterator[Tensor] = itertools.cycle(images)

    def step() -> None:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        with (
            torch.set_grad_enabled(mode == "training"),
            torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            output = module(next(turn))
        if mode == "training":
            output.float().square().mean().backward()
            module.zero_grad(set_to_none=True)

    return step


def contest(
    part: Part, network: Any, flop: float, batch: int, precisions: list[str], *, slice_s: float, rounds: int
) -> list[dict[str, Any]]:
    """The package and the literal formulas, in all precisions, training and not."""
    literal = Literal(network)
    pixels = {
        "literal": inputs(network, batch, part, floats=True),
        "package": inputs(network, batch, part, floats=False),
    }
    rows = []
    for mode in ("training", "inference"):
        contestants = {
            (who, precision): steps(module, pixels[who], mode, precision, part.device)
            for precision in precisions
            for who, module in (("package", network), ("literal", literal))
        }
        named = {" ".join(key): run for key, run in contestants.items()}
        seconds = race(named, part.device, slice_s=slice_s, rounds=rounds)
        for (who, precision), found in zip(contestants, seconds.values(), strict=True):
            rows.append({"mode": mode, "who": who, "precision": precision, **rates(found, flop, batch, mode)})
    torch.set_float32_matmul_precision("highest")
    return rows


def rates(found: dict[str, Any], flop: float, batch: int, mode: str) -> dict[str, Any]:
    """Spots and FLOP per second; a training step counts as three forward passes."""
    if "seconds" not in found:
        return found
    flop *= batch * (3 if mode == "training" else 1)
    return {**found, "spots_per_s": batch / found["seconds"], "tflops": flop / found["seconds"] / 1e12}


def attention(part: Part, network: Any, batch: int, precision: str) -> dict[str, Any]:
    """A training step with each of torch's kernels of attention."""
    images = inputs(network, batch, part, floats=False)
    found = {}
    for name, backend in BACKENDS.items():
        try:
            with only(backend):
                step = steps(network, images, "training", precision, part.device)
                found |= race({name: step}, part.device, slice_s=0.1, rounds=3)
        except RuntimeError as error:
            found[name] = {"left_out": str(error).splitlines()[0]}
    return found


def compiled(part: Part, network: Any, flop: float, batch: int, precision: str) -> list[dict[str, Any]]:
    """The package's network through torch.compile; a rehearsal only traces it."""
    rows: list[dict[str, Any]] = []
    for mode in ("training", "inference"):
        if part.left() < 20 and not part.rehearse:
            rows.append({"mode": mode, "left_out": "no time was left"})
            continue
        torch._dynamo.reset()
        module = torch.compile(network, backend="aot_eager" if part.rehearse else "inductor", dynamic=False)
        step = steps(module, inputs(network, batch, part, floats=False), mode, precision, part.device)
        start = time.perf_counter()
        step()
        dev.synchronize(part.device)
        compiling = time.perf_counter() - start
        found = race({mode: step}, part.device, slice_s=0.1, rounds=3)[mode]
        rows.append({"mode": mode, "precision": precision, "compile_s": compiling, **rates(found, flop, batch, mode)})
        part.note("compiled so far", rows)
    part.results.pop("compiled so far", None)
    return rows


class Epochs(Profiler):
    """Seconds of each epoch, and those of them in which training waited for the next batch."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[dict[str, float]] = []
        self._starts: dict[str, float] = {}
        self._waited = 0.0

    def start(self, action_name: str) -> None:
        self._starts[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        seconds = time.perf_counter() - self._starts.pop(action_name)
        if action_name.endswith("train_dataloader_next"):
            self._waited += seconds
        elif action_name == "run_training_epoch":
            self.epochs.append({"seconds": seconds, "waited": self._waited})
            self._waited = 0.0


class Wait(L.Callback):
    """Let an epoch end when the device has."""

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Wait."""
        dev.synchronize(str(module.device))


def fits(part: Part, genes: int, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """Whole fits, of two epochs after a first that warms up: patches in memory and in a file, share of waiting."""
    n_spots = 16 if part.rehearse else 2000
    slide = dense_slide(n_spots, genes, rehearse=part.rehearse)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        sizes = batches[1:2] if part.rehearse else (8, *batches)
        plan = [("memory", b, "yes") for b in sizes] + [("file", b, "yes") for b in sizes[:3:2]]
        for where, batch, graphed in [*plan, ("memory", sizes[0], "switched off")]:
            if part.left() < 12 and rows and not part.rehearse:
                rows.append({"patches": where, "batch": batch, "graphs": graphed, "left_out": "no time was left"})
                continue
            dev.reset_peak(part.device)
            epochs = Epochs()
            with graphs(graphed == "yes") as said:
                stp.tl.fit_m2ost(
                    slide,
                    preset="small",
                    network_kwargs=small_network(rehearse=part.rehearse),
                    max_epochs=3 if batch > 8 else 2,
                    batch_size=batch,
                    store=folder if where == "file" else None,
                    device=part.device,
                    inplace=False,
                    trainer_kwargs={"enable_progress_bar": False, "profiler": epochs, "callbacks": [Wait()]},
                )
            if graphed == "yes" and not any("are captured" in line for line in said):
                graphed = "; ".join(said) or "no"
            warm = epochs.epochs[1:]
            seconds = sum(epoch["seconds"] for epoch in warm)
            rows.append(
                {
                    "patches": where,
                    "batch": batch,
                    "graphs": graphed,
                    "spots_per_s": n_spots * len(warm) / seconds,
                    "waiting": sum(epoch["waited"] for epoch in warm) / seconds,
                    "peak_gb": dev.peak_gb(part.device),
                }
            )
            part.note("fits so far", rows)
    part.results.pop("fits so far", None)
    return rows
