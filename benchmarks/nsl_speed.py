"""Speed and memory of Neural Stain Learning, as a table and JSON.

    OMP_NUM_THREADS=2 python benchmarks/nsl_speed.py                     # everything, some minutes
    python benchmarks/nsl_speed.py --only hist_section hist_slide        # some cases
    python benchmarks/nsl_speed.py --device cuda --only fit_250 fit_all  # on a GPU

Uses the sections C2-C5 of the HER2+ set (downloaded when they are not in the cache). Each case runs in a process of
its own, so that its peak memory is its own; times are medians of ``--repeat`` runs after one warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _slides import large_slide, zarr_section

PIXELS_PER_SPOT = 16_000  # a 100 um spot at 0.7 um per pixel


def her2st_arrays() -> tuple[Any, np.ndarray, np.ndarray]:
    """Colour fractions, optical densities and expression of the four sections."""
    import stpredict as stp

    sdata = stp.datasets.her2st(["C2", "C3", "C4", "C5"])
    histogram = stp.pp.color_histogram(sdata, inplace=False)
    expression = sdata["table"].X.toarray()
    order = np.argsort(-expression.mean(axis=0))
    return histogram.fractions(np.arange(len(expression))), histogram.od, expression[:, order]


def fit(n_genes: int | None, device: str) -> Generator[Callable[[], dict[str, Any]], None, None]:
    """Fit the genes of highest mean expression, or all that are detected in any spot."""
    from stpredict.models import NSL
    from stpredict.models.nsl._solver import MAX_COLOURS
    from stpredict.models.nsl._stains import RUIFROK_JOHNSTON, stain_matrix

    fractions, od, expression = her2st_arrays()
    expression = expression[:, (expression > 0).any(axis=0)]
    expression = np.ascontiguousarray(expression[:, :n_genes])
    genes = [str(i) for i in range(expression.shape[1])]

    def run() -> dict[str, Any]:
        reference = stain_matrix(RUIFROK_JOHNSTON)
        model = NSL.fit(fractions, od, expression, genes, reference=reference, reads={}, device=device)
        evaluations = float(model.n_iter.sum() + len(genes))
        return {
            "genes": len(genes),
            "spots": fractions.shape[0],
            "colours": fractions.shape[1],
            "steps": int(model.n_iter.sum()),
            "converged": float(model.converged.mean()),
            "gflop": 2e-9 * evaluations * fractions.shape[0] * min(fractions.shape[1], MAX_COLOURS) * 6,
        }

    yield run


def histograms(make: Callable[[str], Any]) -> Generator[Callable[[], dict[str, Any]], None, None]:
    """Histograms of all spots of a slide."""
    import stpredict as stp

    with tempfile.TemporaryDirectory() as folder:
        sdata = make(folder)

        def run() -> dict[str, Any]:
            found = stp.pp.color_histogram(sdata, inplace=False)
            return {"spots": found.counts.shape[0], "megapixels": float(found.n_pixels.sum()) / 1e6}

        yield run


def adam(n_genes: int, device: str, steps: int = 20) -> Generator[Callable[[], dict[str, Any]], None, None]:
    """One full-batch gradient step of the same model on every pixel, by Adam.

    The pixels of a spot are drawn from its histogram, which is all that they share with the real ones as far as the
    cost of a step goes. Too slow to run to the end: the time to the optimum is the time of a step, extrapolated in
    the number of spots and genes, times the steps that Adam takes on the histograms, where it can be run (``adam_steps``).
    """
    import torch

    fractions, od, expression = her2st_arrays()
    n_spots = 8
    rng = np.random.default_rng(0)
    pixels = np.stack(
        [od[rng.choice(len(od), PIXELS_PER_SPOT, p=fractions[i].toarray().ravel())] for i in range(n_spots)]
    )
    pixels = torch.tensor(pixels, dtype=torch.float32, device=device)
    target = torch.tensor(expression[:n_spots, :n_genes], dtype=torch.float32, device=device)
    parameters = _nsl_parameters(n_genes, device)
    optimiser = torch.optim.Adam(parameters, lr=1e-2)

    def run() -> dict[str, Any]:
        for _ in range(steps):
            optimiser.zero_grad()
            stains, weights, bias = parameters
            unmix = torch.linalg.inv(torch.nn.functional.normalize(stains, dim=-1))[..., :2]
            features = torch.einsum("npc,gcs->npgs", pixels, unmix).clamp_min(0).mean(1)
            ((features * weights).sum(-1) + bias - target).square().mean().backward()
            optimiser.step()
        return {"spots": n_spots, "genes": n_genes, "steps": steps, "pixels_per_spot": PIXELS_PER_SPOT}

    yield run


def adam_steps(n_genes: int, device: str) -> Generator[Callable[[], dict[str, Any]], None, None]:
    """Steps that Adam takes, on the histograms, to come within 1e-3 of the objective that our solver reaches."""
    import torch

    from stpredict.models import NSL
    from stpredict.models.nsl._stains import RUIFROK_JOHNSTON, stain_matrix

    fractions, od, expression = her2st_arrays()
    expression = expression[:, :n_genes]
    reference = stain_matrix(RUIFROK_JOHNSTON)
    names = list(map(str, range(n_genes)))
    model = NSL.fit(fractions, od, expression, names, reference=reference, reads={}, device=device)
    pull = ((model.stain_matrix - reference) ** 2).sum(axis=(1, 2))
    goal = float(np.mean(np.log(model.loss) + 0.1 * pull)) + 1e-3
    y = torch.tensor((expression - expression.mean(0)) / expression.std(0), dtype=torch.float32, device=device)
    p = torch.tensor(fractions.toarray(), dtype=torch.float32, device=device)
    colors = torch.tensor(od, dtype=torch.float32, device=device)
    target_stains = torch.tensor(reference, dtype=torch.float32, device=device)

    def run() -> dict[str, Any]:
        best = {}
        for rate in (3e-2, 1e-2, 3e-3):
            parameters = _nsl_parameters(n_genes, device)
            optimiser = torch.optim.Adam(parameters, lr=rate)
            step = 0
            while step < 3000:
                step += 1
                optimiser.zero_grad()
                stains, weights, bias = parameters
                unit = torch.nn.functional.normalize(stains, dim=-1)
                unmix = torch.linalg.inv(unit)[..., :2]
                concentrations = torch.einsum("kc,gcs->kgs", colors, unmix).clamp_min(0)
                predicted = p @ (concentrations * weights).sum(-1) + bias
                loss = (predicted - y).square().mean(0).log() + 0.1 * (unit - target_stains).square().sum((1, 2))
                if loss.mean().item() <= goal:
                    break
                loss.sum().backward()
                optimiser.step()
            best[rate] = step if loss.mean().item() <= goal else None
        reached = [steps for steps in best.values() if steps]
        return {
            "goal": goal,
            "steps": min(reached, default=None),
            "steps_by_rate": {str(k): v for k, v in best.items()},
        }

    yield run


def _nsl_parameters(n_genes: int, device: str) -> list[Any]:
    import torch

    from stpredict.models.nsl._stains import RUIFROK_JOHNSTON, stain_matrix

    start = torch.tensor(stain_matrix(RUIFROK_JOHNSTON), dtype=torch.float32, device=device)
    values = [start.expand(n_genes, 3, 3).clone(), torch.zeros(n_genes, 2), torch.zeros(n_genes)]
    return [value.to(device).requires_grad_() for value in values]


CASES: dict[str, Callable[[str], Generator[Callable[[], dict[str, Any]], None, None]]] = {
    "fit_250": lambda device: fit(250, device),
    "fit_all": lambda device: fit(None, device),
    "hist_section": lambda device: histograms(zarr_section),
    "hist_slide": lambda device: histograms(large_slide),
    "adam_pixels": lambda device: adam(50, device),
    "adam_steps": lambda device: adam_steps(250, device),
}
ONCE = {"adam_steps"}


def run_case(name: str, repeat: int, device: str) -> dict[str, Any]:
    """Time one case in this process; the peak memory includes the interpreter and all imports."""
    setup = CASES[name](device)
    run = next(setup)
    before = _rss()
    seconds = []
    facts: dict[str, Any] = {}
    for i in range(1 if name in ONCE else repeat + 1):
        start = time.perf_counter()
        facts = run()
        _synchronize(device)
        if i or name in ONCE:
            seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    setup.close()
    return {
        "case": name,
        "seconds": median(seconds),
        "runs": seconds,
        "rss_before_gb": before,
        "peak_gb": peak,
        **facts,
    }


def _rss() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/nsl_speed.json"))
    parser.add_argument("--in-process", metavar="CASE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(run_case(args.in_process, args.repeat, args.device)))
        return

    results = {}
    for name in args.only:
        command = [
            sys.executable,
            __file__,
            "--in-process",
            name,
            "--repeat",
            str(args.repeat),
            "--device",
            args.device,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        result = results[name]
        known = {"case", "seconds", "runs", "rss_before_gb", "peak_gb"}
        facts = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items() if k not in known
        )
        print(
            f"{name:14s} {result['seconds']:8.3f} s   (min {min(result['runs']):.3f}, max {max(result['runs']):.3f})   "
            f"peak {result['peak_gb']:.2f} GB, {result['peak_gb'] - result['rss_before_gb']:.2f} above set-up   {facts}",
            flush=True,
        )
    if {"fit_250", "adam_pixels", "adam_steps"} <= results.keys():
        pixels, steps, ours = results["adam_pixels"], results["adam_steps"], results["fit_250"]
        per_step = pixels["seconds"] / pixels["steps"]
        scale = ours["spots"] * ours["genes"] / (pixels["spots"] * pixels["genes"])
        ratio = per_step * scale * steps["steps"] / ours["seconds"]
        print(f"Adam on every pixel, extrapolated: {per_step * scale * steps['steps']:.0f} s, {ratio:.0f} times ours")
        results["adam_pixels"]["ratio"] = ratio
    args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
