"""Part e: two GPUs, which have to learn what one learns."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

import stpredict as stp
from _gpu.data import small_network
from _gpu.part import Part

# The second process runs this file, too, from the start to its own half of the fit.
RANK = int(os.environ.get("LOCAL_RANK", 0))


def run(part: Part) -> None:
    """Fit on one and on two."""
    if part.cuda and torch.cuda.device_count() < 2:
        part.note("left_out", "strategy='ddp' needs two GPUs, and one is visible")
        return
    sdata = stp.datasets.synthetic(1, n_spots=20 if part.rehearse else 400, n_genes=20)

    def fit(**trainer_kwargs: Any) -> tuple[float, Any]:
        start = time.perf_counter()
        model = stp.tl.fit_m2ost(
            sdata,
            preset="tiny",
            network_kwargs=small_network(rehearse=part.rehearse),
            max_epochs=2,
            device=part.device,
            precision="32",
            inplace=False,
            trainer_kwargs={"enable_progress_bar": False, **trainer_kwargs},
        )
        return time.perf_counter() - start, model

    one_s, one = fit()
    two_s, two = fit(devices=2, strategy="ddp")
    if RANK:
        return
    a, b = (model.history["train_loss"] for model in (one, two))
    part.note("one_s", one_s)
    part.note("two_s", two_s)
    part.note("loss_apart", float(np.abs(a - b).max() / np.abs(a).max()))
    part.note("passed", part.results["loss_apart"] <= 1e-2)
