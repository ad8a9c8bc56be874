"""What M2OST sees beyond the spot: synthetic genes that depend on the surroundings, on a held-out section.

    OMP_NUM_THREADS=2 python benchmarks/m2ost_synthetic.py

Fits on all sections but the last of ``stp.datasets.synthetic`` and scores on that one. Prints, for each kind of gene,
the median over genes of the per-gene PCC of M2OST (tiny), NSL, NSL with a field of 4 spot diameters, ridge regression on
mean OD, and of the noise-free truth. Context genes follow the nuclei of tumour nests in a ring of 2 to 4 spot diameters
around the spot.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV

import stpredict as stp

MODELS = ["m2ost", "nsl", "nsl_field_4", "ridge", "truth"]


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of columns."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))


def evaluate(seed: int, n_sections: int, n_spots: int) -> pd.DataFrame:
    """Fit on all sections but the last, score on the last; a row for each gene."""
    sdata = stp.datasets.synthetic(n_sections, n_spots=n_spots, random_state=seed)
    table = sdata["table"]
    train = (table.obs["section"] != f"S{n_sections}").to_numpy()
    table.obs["train"] = train
    genes = list(table.var_names)
    stp.tl.fit_nsl(sdata, genes=genes, train_key="train", spot_scale=4.0, key_added="nsl_field_4")
    stp.tl.fit_nsl(sdata, genes=genes, train_key="train")
    start = time.perf_counter()
    stp.tl.fit_m2ost(sdata, genes=genes, train_key="train", preset="tiny", random_state=seed)
    seconds = time.perf_counter() - start
    expression, mean_od = table.X.toarray(), table.obsm["mean_od"]
    ridge = RidgeCV(np.logspace(-4, 2, 13)).fit(mean_od[train], expression[train])
    predicted = {
        "m2ost": table.layers["m2ost"][~train],
        "nsl": table.layers["nsl"][~train],
        "nsl_field_4": table.layers["nsl_field_4"][~train],
        "ridge": ridge.predict(mean_od[~train]),
        "truth": table.layers["truth"][~train],
    }
    scores = {name: pearson(values, expression[~train]) for name, values in predicted.items()}
    kinds = table.var["kind"].astype(str).to_numpy()
    return pd.DataFrame({"seed": seed, "kind": kinds, **scores, "seconds": seconds}, index=genes)


def main() -> None:
    """Print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sections", type=int, default=2)
    parser.add_argument("--spots", type=int, default=500)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()

    genes = pd.concat([evaluate(seed, args.sections, args.spots) for seed in args.seeds])
    by_kind = genes.groupby("kind", sort=False)
    summary = by_kind[MODELS].median()
    summary.insert(0, "genes", by_kind.size())
    print(summary.to_string(float_format="{:.3f}".format, na_rep="-"))
    result = {
        "sections": args.sections,
        "spots": args.spots,
        "seeds": args.seeds,
        "seconds": float(genes["seconds"].mean()),
        "medians": summary.to_dict(orient="index"),
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
