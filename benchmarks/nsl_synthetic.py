"""What Neural Stain Learning recovers of a known truth: directions and predictions on a held-out synthetic section.

    python benchmarks/nsl_synthetic.py

The rates of synthetic genes depend on the spot's own pixels, so the field is one spot diameter here (``--field``).
Prints, for each kind of gene, medians over genes: the angle between learned and true effective OD direction (on the
training section), the held-out per-gene PCC of NSL, of ridge regression on mean OD, and of the noise-free truth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV

import stpredict as stp


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of columns."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))


def evaluate(seed: int, field: float) -> pd.DataFrame:
    """One synthetic pair of sections: fit on S1, score on S2."""
    sdata = stp.datasets.synthetic(random_state=seed)
    table = sdata["table"]
    table.obs["train"] = (table.obs["section"] == "S1").to_numpy()
    train = table.obs["train"].to_numpy()
    genes = list(table.var_names)
    model = stp.tl.fit_nsl(sdata, genes=genes, train_key="train", spot_scale=field)
    expression, truth = table.X.toarray(), table.layers["truth"]
    mean_od = table.obsm["mean_od"]
    ridge = RidgeCV(np.logspace(-4, 2, 13)).fit(mean_od[train], expression[train]).predict(mean_od[~train])

    true_direction = table.uns["synthetic"]["direction"]["S1"]
    learned = model.direction / np.linalg.norm(model.direction, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        angle = np.degrees(np.arccos(np.clip((learned * true_direction).sum(axis=1), -1, 1)))
    return pd.DataFrame(
        {
            "seed": seed,
            "kind": table.var["kind"].astype(str).to_numpy(),
            "angle": angle,
            "nsl": pearson(table.layers["nsl"][~train], expression[~train]),
            "ridge": pearson(ridge, expression[~train]),
            "truth": pearson(truth[~train], expression[~train]),
        },
        index=genes,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--field", type=float, default=1.0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/nsl_synthetic.json"))
    args = parser.parse_args()

    genes = pd.concat([evaluate(seed, args.field) for seed in args.seeds])
    genes["ratio"] = genes["nsl"] / genes["truth"]
    genes["|nsl|"] = genes["nsl"].abs()
    by_kind = genes.groupby("kind", sort=False)
    summary = by_kind[["angle", "nsl", "ridge", "truth", "ratio"]].median()
    summary.insert(0, "genes", by_kind.size())
    summary["mean |PCC|"] = by_kind["|nsl|"].mean()
    colored = genes[genes["kind"].isin(["stain", "mix"])]
    summary.loc["stain and mix"] = [
        len(colored),
        *colored[["angle", "nsl", "ridge", "truth", "ratio"]].median(),
        colored["|nsl|"].mean(),
    ]
    print(summary.to_string(float_format="{:.3f}".format, na_rep="-"))
    args.json.write_text(json.dumps({"field": args.field, "medians": summary.to_dict()}, indent=1))


if __name__ == "__main__":
    main()
