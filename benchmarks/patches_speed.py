"""Speed and memory of multi-scale patches, as a table and JSON.

    OMP_NUM_THREADS=2 python benchmarks/patches_speed.py                       # everything, some minutes
    python benchmarks/patches_speed.py --only section slide --repeat 3         # some cases

Uses section C2 of the HER2+ set (downloaded when it is not in the cache). Each case runs in a process of its own, so
that its peak memory is its own; times are medians of ``--repeat`` runs after one warm-up. Shares are of the processor's
time, over all threads; what is neither pyramid, resizing nor writing counts as reading.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _slides import large_slide, zarr_section

BATCH = 96

Run = Callable[[], dict[str, Any]]


def cutting(make: Callable[[str], Any], **options: Any) -> Generator[Run, None, None]:
    """All patches at three levels of 224 pixels."""
    import stpredict.pp._patches as pp

    with tempfile.TemporaryDirectory() as folder:
        sdata = make(folder)

        def run() -> dict[str, Any]:
            with pp.patches(sdata, **options) as patches:
                return {"spots": len(patches), "gb": np.prod(patches.shape, dtype=float) / 1e9}

        yield run


def batches(make: Callable[[str], Any], n: int) -> Generator[Run, None, None]:
    """Random batches of patches that were cut before, into one array."""
    import stpredict.pp._patches as pp

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, pp.patches(make(folder)) as patches:
        out = patches[np.zeros(BATCH, dtype=int)]

        def run() -> dict[str, Any]:
            for _ in range(n):
                patches.take(rng.integers(len(patches), size=BATCH), out=out)
            return {"spots": n * BATCH, "gb": n * out.nbytes / 1e9}

        yield run


CASES: dict[str, Callable[[], Generator[Run, None, None]]] = {
    "section": lambda: cutting(zarr_section),
    "slide": lambda: cutting(large_slide),
    "slide_plain": lambda: cutting(large_slide, field=224 / 141.4),  # scales that need no resizing
    "slide_512": lambda: cutting(lambda folder: large_slide(folder, chunk=512)),
    "batches_memory": lambda: batches(zarr_section, 50),
    "batches_file": lambda: batches(large_slide, 50),
}


class Stages:
    """Processor seconds of all threads in some functions, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Replace a function by one that counts its time."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                with self._lock:
                    self.seconds[stage] += time.thread_time() - start

        setattr(owner, name, timed)


def run_case(name: str, repeat: int) -> dict[str, Any]:
    """Time one case in this process; the peak memory includes the interpreter and all imports."""
    import torch.nn.functional  # noqa: F401  (imported where it is used: keep it out of the first run)

    from stpredict.pp import _patches, _store, _windows

    setup = CASES[name]()
    run = next(setup)
    stages = Stages()
    stages.watch(_windows, "_halve", "pyramid")
    stages.watch(_patches, "cut_patch", "resizing")
    stages.watch(_store.OnDisk, "write", "writing")
    stages.watch(_store.InMemory, "write", "writing")
    run()
    stages.seconds.clear()
    before, cpu = _rss(), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the set-up
    seconds = []
    facts: dict[str, Any] = {}
    for _ in range(repeat):
        start = time.perf_counter()
        facts = run()
        seconds.append(time.perf_counter() - start)
    cpu = time.process_time() - cpu
    peak = _peak()
    setup.close()
    shares = {stage: spent / cpu for stage, spent in stages.seconds.items()}
    shares = {"reading": 1 - sum(shares.values()), **shares}
    return {
        "case": name,
        "seconds": median(seconds),
        "runs": seconds,
        "cpu_seconds": cpu / repeat,
        "rss_before_gb": before,
        "peak_gb": peak,
        "shares": shares,
        **facts,
    }


def _rss() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def _peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/patches_speed.json"))
    parser.add_argument("--in-process", metavar="CASE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(run_case(args.in_process, args.repeat)))
        return

    results = {}
    print("case            seconds     min     CPU  spots/s  GB/s     peak   above set-up")
    for name in args.only:
        command = [sys.executable, __file__, "--in-process", name, "--repeat", str(args.repeat)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = results[name] = json.loads(done.stdout.splitlines()[-1])
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in result["shares"].items())
        print(
            f"{name:15s} {result['seconds']:6.2f} s {min(result['runs']):5.2f} s {result['cpu_seconds']:5.2f} s "
            f"{result['spots'] / result['seconds']:8.0f} {result['gb'] / result['seconds']:5.2f} "
            f"{result['peak_gb']:5.2f} GB {result['peak_gb'] - result['rss_before_gb']:5.2f} GB   {shares}",
            flush=True,
        )
    args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
