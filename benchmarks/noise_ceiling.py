"""The noise ceiling on real sections, and how near it comes to what it estimates; prints tables and writes JSON.

    OMP_NUM_THREADS=1 python benchmarks/noise_ceiling.py

Real: sections C2 to C5 of the HER2+ set (downloaded when they are not in the cache), the 250 genes of highest mean expression.
Simulated: the totals of C2's spots, the abundances of these genes, and rates that vary between spots by a known amount (the
standard deviation of their logarithm); what can be reached is the PCC of the expression with its mean over many draws.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

import stpredict as stp
from stpredict.tl.evaluation.numbers._ceiling import ceiling, correlate_halves

SECTIONS, N_GENES, MIN_COUNTS, SPREADS, N_DRAWS, N_REPEATS = (
    ["C2", "C3", "C4", "C5"],
    250,
    (1, 100, 1000),
    (0.2, 0.4, 0.8),
    100,
    10,
)


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of columns."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return (x * y).sum(axis=0) / np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))


def real(sdata: Any, genes: list[str]) -> list[dict[str, Any]]:
    """Medians over genes, for several depths below which spots are left out."""
    rows = []
    for min_count in MIN_COUNTS:
        found = stp.tl.noise_ceiling(sdata, genes=genes, section_key="section", min_count=min_count, inplace=False)
        medians = found.groupby("section", observed=True)[["ceiling", "error"]].median()
        rows.append(
            {
                "min_count": min_count,
                "spots": int(found["n"].max()),
                "ceiling": {section: round(value, 3) for section, value in medians["ceiling"].items()},
                "error": {section: round(value, 3) for section, value in medians["error"].items()},
            }
        )
    return rows


def simulated(counts: sp.csr_matrix, panel: np.ndarray, spread: float) -> list[dict[str, Any]]:
    """What is estimated and what can be reached, by quarters of the genes from rare to abundant."""
    rng = np.random.default_rng(0)
    total = np.asarray(counts.sum(axis=1)).ravel().astype(np.int64)
    share = np.asarray(counts.sum(axis=0)).ravel() / counts.sum()
    varied = share * np.exp(spread * rng.normal(size=counts.shape))
    rate = total[:, None] * (varied / varied.sum(axis=1, keepdims=True))[:, panel]

    def expression(drawn: np.ndarray) -> np.ndarray:
        return np.log1p(1e4 * drawn / total[:, None])

    draws = [rng.poisson(rate) for _ in range(N_DRAWS)]
    expected = np.mean([expression(drawn) for drawn in draws], axis=0)
    reached = np.mean([correlation(expression(drawn), expected) for drawn in draws], axis=0)
    estimates = []
    for drawn in draws[:N_REPEATS]:
        rest = np.maximum(total - drawn.sum(axis=1), 0)
        halves = correlate_halves(sp.csr_matrix(np.column_stack([drawn, rest])), np.arange(len(panel)), 20, rng)
        found = ceiling(halves)
        estimates.append(np.stack([found.value, found.error]))
    value, error = np.mean(estimates, axis=0)
    quarter = pd.qcut(rate.mean(axis=0), 4, labels=False)
    return [
        {
            "spread": spread,
            "counts": round(float(rate.mean(axis=0)[quarter == i].mean()), 1),
            **{
                name: round(float(np.mean(values[quarter == i])), 3)
                for name, values in (("reached", reached), ("estimated", value), ("error", error))
            },
        }
        for i in range(4)
    ]


def main() -> None:
    """Run both and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/noise_ceiling.json"))
    args = parser.parse_args()
    sdata = stp.datasets.her2st(SECTIONS)
    table = sdata["table"]
    panel = np.argsort(-np.asarray(table.X.mean(axis=0)).ravel())[:N_GENES]
    on_sections = real(sdata, list(table.var_names[panel]))
    print(pd.DataFrame(on_sections).to_string())
    c2 = sp.csr_matrix(table.layers["counts"][(table.obs["section"] == "C2").to_numpy()])
    c2 = c2[np.asarray(c2.sum(axis=1)).ravel() >= 100]
    in_simulation = [row for spread in SPREADS for row in simulated(c2, panel, spread)]
    print(pd.DataFrame(in_simulation).to_string())
    args.json.write_text(json.dumps({"real": on_sections, "simulated": in_simulation}, indent=1))


if __name__ == "__main__":
    main()
