"""Clocks that wait for the device, and summaries of what torch's profiler saw."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from _gpu import device as dev

TOP = 12


def race(contestants: dict[str, Callable[[], object]], device: str, *, slice_s: float, rounds: int) -> dict[str, Any]:
    """Median seconds of one call, and the memory that it takes beyond what was there, of each; or why it has none.

    Contestants take turns, so that a clock that changes hits all alike. The calls of a turn follow each other without
    waiting for the device, as the steps of a training do.
    """
    found: dict[str, Any] = {}
    calls: dict[str, int] = {}
    for name, run in contestants.items():
        before = dev.reset_peak(device)
        try:
            run()  # allocates, compiles, picks algorithms
            calls[name] = max(1, min(200, int(slice_s / max(_seconds(run, device, 1), 1e-6))))
            found[name] = {"working_gb": dev.peak_gb(device, above=before)}
        except torch.OutOfMemoryError:
            found[name] = {"left_out": "does not fit into the memory"}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, n in calls.items():
            seconds[name].append(_seconds(contestants[name], device, n))
    for name, values in seconds.items():
        found[name] |= {"seconds": statistics.median(values), "fastest": min(values), "slowest": max(values)}
    return found


def alone(run: Callable[[], object], device: str, *, slice_s: float = 0.005, rounds: int = 3) -> float:
    """Median seconds of one call of something small."""
    for _ in range(3):
        run()
    n = max(1, min(200, int(slice_s / max(_seconds(run, device, 3), 1e-6))))
    return statistics.median(_seconds(run, device, n) for _ in range(rounds))


def _seconds(run: Callable[[], object], device: str, n: int) -> float:
    dev.synchronize(device)
    start = time.perf_counter()
    for _ in range(n):
        run()
    dev.synchronize(device)
    return (time.perf_counter() - start) / n


def profiled(run: Callable[[], object], device: str, *, calls: int = 1) -> dict[str, Any]:
    """Which kernels the device was busy with, and for which share of the time with none."""
    run()
    dev.synchronize(device)
    cuda = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        dev.synchronize(device)
        wall = time.perf_counter() - start
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in seen.events() if e.device_type == kind]
    return {"wall_ms": wall * 1e3 / calls, **summarise(spans, calls=calls)}


def summarise(spans: Iterable[tuple[str, float, float]], *, calls: int = 1) -> dict[str, Any]:
    """Top of the named spans (name, start, end in microseconds), and the share of the time that none covers."""
    by_name: dict[str, list[float]] = defaultdict(list)
    covered, last = 0.0, -math.inf
    spans = sorted(spans, key=lambda span: span[1])
    for name, start, end in spans:
        by_name[name].append(end - start)
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    if not spans:
        return {"kernels": 0, "top": []}
    whole = last - spans[0][1]
    total = sum(map(sum, by_name.values()))
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:TOP]
    return {
        "kernels": len(spans) / calls,
        "busy_ms": covered / 1e3 / calls,
        "gaps": 1 - covered / whole if whole else 0.0,
        "top": [
            {
                "name": name[:120],
                "ms": sum(values) / 1e3 / calls,
                "share": sum(values) / total if total else 0.0,
                "calls": len(values) / calls,
            }
            for name, values in top
        ],
    }
