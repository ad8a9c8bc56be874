"""CPU time of cross-validation, of this checkout and another, and whether their results are the same.

    python benchmarks/cross_validate_speed.py --against 804c4f7                  # a revision, checked out in a temporary folder
    python benchmarks/cross_validate_speed.py --against ../other --repeats 5     # or another checkout

Neural Stain Learning, ridge regression on colours and all baselines, on sections C2 to C5 of the HER2+ set (found in the folder
that `STPREDICT_DATA_DIR` names), 250 genes, 1,000 random maps and draws. Each run is a process of its own, in turn, with one
thread: on a busy machine CPU seconds (of the user and the system) say more than seconds. Those of the call, which a small one
goes before, are told apart from those of importing and loading. Checkouts may name arguments and columns otherwise; what is known of that is translated.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HERE = Path(__file__).parents[1]
SECTIONS, N_GENES = ["C2", "C3", "C4", "C5"], 250
MODELS = {"nsl": "nsl", "ridge": "ridge"}
# Models whose results must not have changed; the position baseline was mended.
SAME = ["nsl", "ridge", "mean of training spots", "mean of held-out section (oracle)", "ridge on mean OD"]
SAME += ["ridge on color statistics"]
MENDED = ["position"]
SCORES_WITHIN, PREDICTIONS_WITHIN = 1e-9, 1e-6
# What other checkouts call things.
OLD_NAMES = {"p_value": "pvals", "q_value": "pvals_adj", "ridge on colour statistics": "ridge on color statistics"}


def cpu_seconds() -> float:
    """Of this process, all threads, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def run_once(out: Path, n_perms: int, n_bootstrap: int, profile: str | None) -> None:
    """In a process of its own: cross-validate, and write times and results."""
    import stpredict as stp

    sdata = stp.datasets.her2st(SECTIONS)
    fit: dict[str, Any] = {"nsl": stp.tl.fit_nsl, "ridge": partial(stp.tl.fit_ridge, features="color_statistics")}
    known = inspect.signature(stp.tl.cross_validate).parameters
    draws: dict[str, Any] = {"n_perms" if "n_perms" in known else "n_permutations": n_perms, "n_bootstrap": n_bootstrap}
    warnings.filterwarnings("ignore")
    # Checkouts import packages at different times: what the call imports is not to be counted as its own.
    small = stp.datasets.synthetic(n_spots=30, n_genes=8)
    stp.tl.cross_validate(small, fit, split="groups", **dict.fromkeys(draws, 9))
    profiler = None
    if profile:
        import cProfile

        profiler = cProfile.Profile()
        profiler.enable()
    before, start = cpu_seconds(), time.perf_counter()
    frame = stp.tl.cross_validate(sdata, fit, split="groups", genes=N_GENES, **draws)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
    if profiler is not None:
        profiler.disable()
        profiler.dump_stats(str(profile))
    table = sdata["table"]
    frame = frame.rename(columns=OLD_NAMES)
    for name in ("model", "section"):
        frame[name] = frame[name].astype(str).replace(OLD_NAMES).str.replace("_spots", "")
    frame.to_pickle(out.with_suffix(".pkl"))
    np.savez(out.with_suffix(".npz"), **{name: table.layers[f"{name}_cv"] for name in MODELS})
    found = {"cpu": cpu, "seconds": seconds, "whole_cpu": cpu_seconds(), "from": str(Path(stp.__file__).parents[2])}
    out.write_text(json.dumps(found))


def measure(checkout: Path, out: Path, options: list[str]) -> dict[str, Any]:
    """Start a run of a checkout and wait for it."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    environment = {**os.environ, **one_thread, "PYTHONPATH": str(checkout / "src"), "MPLBACKEND": "agg"}
    command = [sys.executable, str(Path(__file__).resolve()), "--run", str(out), *options]
    subprocess.run(command, env=environment, check=True, stderr=subprocess.PIPE)
    found: dict[str, Any] = json.loads(out.read_text())
    imported = found.pop("from")
    if Path(imported).resolve() != checkout.resolve():
        raise SystemExit(f"Asked for {checkout}, but {imported} was imported.")
    return found


@contextlib.contextmanager
def checked_out(what: str) -> Iterator[Path]:
    """A folder as it is, or a revision in a temporary one."""
    if Path(what, "src").is_dir():
        yield Path(what).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkout"
        subprocess.run(["git", "-C", str(HERE), "worktree", "add", "--detach", str(place), what], check=True)
        try:
            yield place
        finally:
            subprocess.run(["git", "-C", str(HERE), "worktree", "remove", "--force", str(place)], check=True)


def compare(ours: Path, theirs: Path) -> dict[str, Any]:
    """Largest differences of scores and predictions by model, relative to 1 or, beyond, to the value."""
    labels = ["model", "of", "name", "section"]
    frames = [pd.read_pickle(path.with_suffix(".pkl")).astype(dict.fromkeys(labels, str)) for path in (ours, theirs)]
    frames = [frame.set_index(labels).sort_index() for frame in frames]
    found: dict[str, Any] = {"scores": {}, "predictions": {}, "columns_only_in_one": []}
    columns = [name for name in frames[0].select_dtypes("number") if name in frames[1]]
    found["columns_only_in_one"] = sorted(set(frames[0].columns) ^ set(frames[1].columns))
    for model in [*SAME, *MENDED]:
        here, there = (frame.loc[model] for frame in frames)
        if not here.index.equals(there.index):
            found["scores"][model] = {"rows": len(here.index.symmetric_difference(there.index))}
            continue
        found["scores"][model] = {
            name: _apart(here[name].to_numpy(dtype=float), there[name].to_numpy(dtype=float)) for name in columns
        }
    layers = [np.load(path.with_suffix(".npz")) for path in (ours, theirs)]
    for name in MODELS:
        found["predictions"][name] = _apart(layers[0][name], layers[1][name])
    return found


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    if not np.array_equal(np.isnan(one), np.isnan(other)):
        return float("inf")
    both = np.isfinite(one)
    return float((np.abs(one[both] - other[both]) / np.maximum(1, np.abs(other[both]))).max(initial=0))


def report(times: dict[str, list[dict[str, Any]]], found: dict[str, Any] | None) -> dict[str, Any]:
    """Print tables; what goes into the JSON."""
    medians = {
        name: {what: float(np.median([run[what] for run in runs])) for what in ("cpu", "seconds", "whole_cpu")}
        for name, runs in times.items()
    }
    print(f"{'':12}{'CPU s':>8}{'s':>8}{'CPU s, import and loading included':>38}")
    for name, values in medians.items():
        print(f"{name:12}{values['cpu']:8.2f}{values['seconds']:8.2f}{values['whole_cpu']:38.2f}")
    summary: dict[str, Any] = {"medians": medians, "runs": times}
    if found is None:
        return summary
    ratio = medians["this"]["cpu"] / medians["other"]["cpu"]
    print(f"\nthis / other: {ratio:.2f} of the CPU time of the call")
    for model, columns in found["scores"].items():
        worst = {name: value for name, value in columns.items() if value > SCORES_WITHIN}
        note = (
            "the same within 1e-9" if not worst else ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
        )
        print(f"scores of {model}: {note}")
    for name, value in found["predictions"].items():
        print(f"predictions of {name}: apart by {value:.1e}")
    same = all(value <= SCORES_WITHIN for model in SAME for value in found["scores"][model].values())
    same = same and all(value <= PREDICTIONS_WITHIN for value in found["predictions"].values())
    print("All results are the same, but for the position baseline." if same else "SOME RESULTS DIFFER.")
    return {**summary, "ratio": ratio, "differences": found, "same": same}


def main() -> None:
    """Parse arguments, measure in turn, compare and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="another checkout, or a revision of this one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n-perms", type=int, default=1000)
    parser.add_argument("--n-bootstrap", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument(
        "--profile", help="run this checkout once under cProfile, and write its statistics to this file"
    )
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        run_once(arguments.run, arguments.n_perms, arguments.n_bootstrap, arguments.profile)
        return
    options = ["--n-perms", str(arguments.n_perms), "--n-bootstrap", str(arguments.n_bootstrap)]
    if arguments.profile:
        with tempfile.TemporaryDirectory() as folder:
            measure(HERE, Path(folder) / "profiled", [*options, "--profile", arguments.profile])
        return
    times: dict[str, list[dict[str, Any]]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkouts = {"this": HERE}
        if arguments.against:
            checkouts["other"] = stack.enter_context(checked_out(arguments.against))
        for i in range(arguments.repeats + 1):  # the first warms caches of compiled code, and is not counted
            for name, checkout in checkouts.items():
                run = measure(checkout, folder / name, options)
                if i:
                    times.setdefault(name, []).append(run)
                    print(f"{name}: {run['cpu']:.2f} CPU s", file=sys.stderr, flush=True)
        found = compare(folder / "this", folder / "other") if arguments.against else None
    what = {
        "against": arguments.against,
        "sections": SECTIONS,
        "genes": N_GENES,
        "n_perms": arguments.n_perms,
        "n_bootstrap": arguments.n_bootstrap,
    }
    arguments.out.write_text(json.dumps({**what, **report(times, found)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
