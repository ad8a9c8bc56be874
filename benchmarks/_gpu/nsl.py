"""Part c: Neural Stain Learning, fitted to 250 genes and to all that are detected."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import stpredict as stp
from _gpu import device as dev
from _gpu.correctness import READS
from _gpu.data import are_here, four_sections
from _gpu.part import Part
from _gpu.timing import profiled

RUNS = 3


def run(part: Part) -> None:
    """Count colours once, then fit; the move of the histogram to the device is timed apart."""
    sdata, _ = four_sections(drawn=part.rehearse and not are_here())
    table = sdata["table"]
    start = time.perf_counter()
    stp.pp.color_histogram(sdata)
    part.note("histogram_s", time.perf_counter() - start)
    histogram = stp.pp.color_histogram(sdata, inplace=False)
    fractions = histogram.counts.multiply(1 / np.maximum(histogram.n_pixels, 1)[:, None]).tocsr()
    part.note("spots", int(fractions.shape[0]))
    part.note("colours", int(fractions.shape[1]))
    part.attempt("transfer_s", lambda: _median(lambda: torch.from_numpy(fractions.toarray()).to(part.device), part)[0])

    expression = table.X.toarray()
    detected = np.flatnonzero((expression > 0).any(axis=0) & (expression.std(axis=0) > 0))
    by_mean = detected[np.argsort(-expression[:, detected].mean(axis=0))]
    reference = stp.tl.fit_nsl(sdata, genes=2, inplace=False, device="cpu").reference
    for name, chosen in (
        {"250": by_mean[:10], "all": by_mean[:20]} if part.rehearse else {"250": by_mean[:250], "all": by_mean}
    ).items():
        genes = table.var_names[chosen].tolist()
        values = np.ascontiguousarray(expression[:, chosen])

        def fit(genes: list[str] = genes, values: np.ndarray = values) -> Any:
            return stp.models.NSL.fit(
                fractions, histogram.od, values, genes, reference=reference, reads=READS, device=part.device
            )

        def whole(genes: list[str] = genes) -> Any:
            return stp.tl.fit_nsl(sdata, genes=genes, device=part.device, inplace=False)

        def measure(fit: Callable[[], Any] = fit, whole: Callable[[], Any] = whole) -> dict[str, Any]:
            dev.reset_peak(part.device)
            seconds, model = _median(fit, part)
            return {
                "genes": len(model.genes),
                "seconds": seconds,
                "peak_gb": dev.peak_gb(part.device),
                "fit_nsl_seconds": _median(whole, part)[0],
                "steps": int(model.n_iter.sum()),
                "converged": float(model.converged.mean()),
                "loss": float(np.median(model.loss)),
            }

        part.attempt(f"genes {name}", measure, seconds=5)
    part.attempt("profile", lambda: profiled(fit, part.device), seconds=8)


def _median(run: Callable[[], Any], part: Part) -> tuple[float, Any]:
    """Median seconds after a first call, and what the last returned."""
    found, seconds = run(), []
    for _ in range(1 if part.rehearse else RUNS):
        dev.synchronize(part.device)
        start = time.perf_counter()
        found = run()
        dev.synchronize(part.device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), found
