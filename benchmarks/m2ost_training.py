"""What training M2OST on a large slide costs beside the network itself: memory, disk, and waiting for data.

    OMP_NUM_THREADS=2 python benchmarks/m2ost_training.py

Fits the published network to 4,970 spots of a 20,000 x 20,000 slide in zarr (2.2 GB of patches, in the temporary file
that they are kept in by default) for a few batches, and, with the same batches, to 100 spots, whose patches take next to
nothing: what the first takes more is the price of the slide. Each fit runs in a process of its own. Memory is resident
memory at its peak, anonymous (of the process itself) and file-backed (mapped files, which are the system's page cache).
Waiting is the time between two steps in which the next batch was not there yet, by Lightning's profiler.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
from _slides import large_slide

SPOTS = {"slide": 5_000, "small": 100}
N_GENES = 250


def resident() -> dict[str, float]:
    """Resident memory now, in GB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1e6 for name in ("RssAnon", "RssFile")}


class Peak:
    """The highest resident memory while it is open."""

    def __init__(self) -> None:
        self.gb = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.gb = {name: max(self.gb[name], value) for name, value in resident().items()}

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure(case: str, preset: str, batch: int, steps: int) -> dict[str, Any]:
    """Fit for some steps."""
    from anndata import AnnData
    from lightning.pytorch.profilers import SimpleProfiler

    import stpredict as stp

    profiler = SimpleProfiler()
    with tempfile.TemporaryDirectory() as folder:
        side = 20_000 if case == "slide" else 4_000
        sdata = large_slide(folder, side=side, n_spots=SPOTS[case])
        table = sdata["table"]
        expression = np.random.default_rng(0).gamma(2, size=(table.n_obs, N_GENES)).astype(np.float32)
        sdata["table"] = AnnData(expression, obs=table.obs, uns=table.uns)
        before = resident()
        with Peak() as peak:
            stp.tl.fit_m2ost(
                sdata,
                preset=preset,
                batch_size=batch,
                max_epochs=1,
                inplace=False,
                trainer_kwargs={"limit_train_batches": steps, "profiler": profiler, "enable_progress_bar": False},
            )
    durations = profiler.recorded_durations
    waiting = sum(durations["[_TrainingEpochLoop].train_dataloader_next"])
    epoch = sum(durations["run_training_epoch"])
    return {
        "spots": table.n_obs,
        **{f"{name}_before_gb": value for name, value in before.items()},
        **{f"{name}_peak_gb": value for name, value in peak.gb.items()},
        "steps": len(durations["run_training_batch"]),
        "epoch_s": epoch,
        "waiting_s": waiting,
        "waiting": waiting / epoch,
    }


def main() -> None:
    """Print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--case", choices=SPOTS, help=argparse.SUPPRESS)  # what a child process is to measure
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.preset, args.batch, args.steps)))
        return

    options = [f"--{name}={value}" for name, value in vars(args).items() if name in ("preset", "batch", "steps")]
    found = {}
    for case in SPOTS:
        child = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, f"--case={case}", *options], check=True, stdout=subprocess.PIPE
        )
        found[case] = json.loads(child.stdout.splitlines()[-1])
    print(f"{'spots':>6}{'anonymous GB':>22}{'file-backed GB':>22}{'waiting for data':>20}")
    print(f"{'':6}{'before, peak':>22}{'before, peak':>22}{'ms a step':>11}{'share':>9}")
    for row in found.values():
        memory = [f"{row[f'{name}_before_gb']:.2f}, {row[f'{name}_peak_gb']:.2f}" for name in ("RssAnon", "RssFile")]
        wait = 1e3 * row["waiting_s"] / row["steps"]
        print(f"{row['spots']:>6}{memory[0]:>22}{memory[1]:>22}{wait:>11.1f}{row['waiting']:>9.2%}")
    beyond = found["slide"]["RssAnon_peak_gb"] - found["small"]["RssAnon_peak_gb"]
    print(f"beyond the batch: {beyond:.2f} GB")
    result = {"preset": args.preset, "batch": args.batch, "beyond_the_batch_gb": beyond, "cases": found}
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
