"""The few calls that differ between a GPU and a CPU."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

MIN_GB = 8


def synchronize(device: str) -> None:
    """Wait until everything that was asked for is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def reset_peak(device: str) -> int:
    """Give up what is cached, start to look for the peak anew, and say how many bytes are in use."""
    gc.collect()
    if not device.startswith("cuda"):
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_gb(device: str, *, above: int = 0) -> float | None:
    """Most memory that tensors have taken since the last reset, above so many bytes."""
    return (torch.cuda.max_memory_allocated(device) - above) / 1e9 if device.startswith("cuda") else None


@contextmanager
def at_most(n_bytes: float, device: str) -> Iterator[None]:
    """A device that has no more memory than this: what does not fit then fails as on a full one."""
    total = torch.cuda.get_device_properties(device).total_memory
    index = torch.device(device).index or 0  # this one call takes no device without a number
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, n_bytes / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
        torch.cuda.empty_cache()


def describe(device: str) -> tuple[dict[str, Any], list[str]]:
    """What there is, and a line for everything that is wrong with it."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
    if device == "cpu":
        return {**found, "name": "CPU", "bf16": True, "memory_gb": None, "devices": 0}, []
    if driver := _driver():
        found["driver"] = driver
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
            reason = "no reason given"
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
        return found, [f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}) cannot use a GPU here: {reason}"]
    properties = torch.cuda.get_device_properties(0)
    found |= {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": properties.total_memory / 1e9,
        "free_gb": torch.cuda.mem_get_info()[0] / 1e9,
        "devices": torch.cuda.device_count(),
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
    }
    wrong = []
    if not found["bf16"]:
        wrong.append(f"{properties.name} has no bfloat16: what needs it is left out")
    if found["free_gb"] < MIN_GB:
        wrong.append(f"{found['free_gb']:.1f} GB of memory are free, less than {MIN_GB}: large batches are left out")
    return found, wrong


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
