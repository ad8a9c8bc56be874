"""Part d: what a user does: fit the default recipe to three sections, and score it on the fourth."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import stpredict as stp
from _gpu import device as dev
from _gpu.data import four_sections, small_network
from _gpu.part import Part


def run(part: Part) -> None:
    """The published network first; what it is compared to is fast."""
    sdata, held_out = four_sections(drawn=part.rehearse)
    part.note("held_out", held_out)
    n_genes = 10 if part.rehearse else 250
    m2ost: dict[str, Any] = {"trainer_kwargs": {"enable_progress_bar": False}}
    if part.rehearse:
        m2ost |= {"max_epochs": 1, "network_kwargs": small_network(rehearse=True)}
    models: dict[str, tuple[Callable[..., Any], float]] = {
        "small": (partial(stp.tl.fit_m2ost, preset="small", device=part.device, **m2ost), 30),
        "nsl": (partial(stp.tl.fit_nsl, device=part.device), 5),
        "ridge": (partial(stp.tl.fit_ridge, device=part.device), 5),
        "tiny": (partial(stp.tl.fit_m2ost, preset="tiny", device=part.device, **m2ost), 20),
    }
    for name, (fit, needs) in models.items():

        def measure(name: str = name, fit: Callable[..., Any] = fit) -> dict[str, Any]:
            dev.reset_peak(part.device)
            start = time.perf_counter()
            model = fit(sdata, genes=n_genes, train_key="train", key_added=name)
            seconds = time.perf_counter() - start
            scores = stp.tl.score(sdata, key=name, n_perms=0, n_bootstrap=0, section_key="section")
            genes = scores[(scores["of"] == "gene") & (scores["section"] == held_out)]
            if not genes["pcc"].notna().any():
                raise ValueError(f"no gene of {name} has a score on {held_out}")
            found = {
                "seconds": seconds,
                "genes": len(model.genes),
                "pcc": float(genes["pcc"].median()),
                "peak_gb": dev.peak_gb(part.device),
            }
            history = getattr(model, "history", None)
            return found | ({"epochs": len(history["train_loss"])} if history else {})

        part.attempt(name, measure, seconds=0 if part.rehearse else needs)
