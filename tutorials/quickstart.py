"""Where are the genes? Fit Neural Stain Learning, score it on a held-out section, draw what it sees.

python tutorials/quickstart.py                 # the embedded synthetic sections
python tutorials/quickstart.py --data her2st   # HER2+ breast cancer, C2-C4 -> C5 (downloads 18 MB once)
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import stpredict as stp


def correlate(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    """Pearson correlation along an axis; NaN where one side is constant."""
    varies = (np.ptp(a, axis=axis) > 0) & (np.ptp(b, axis=axis) > 0)
    a, b = a - a.mean(axis=axis, keepdims=True), b - b.mean(axis=axis, keepdims=True)
    norm = np.sqrt((a**2).sum(axis=axis) * (b**2).sum(axis=axis))
    return np.divide((a * b).sum(axis=axis), norm, out=np.full(norm.shape, np.nan), where=varies)


def score(measured: np.ndarray, predictions: dict[str, np.ndarray]) -> pd.DataFrame:
    """Median per-gene and per-spot PCC of each prediction."""
    rows = {}
    for name, predicted in predictions.items():
        per_gene, per_spot = correlate(predicted, measured, axis=0), correlate(predicted, measured, axis=1)
        rows[name] = {
            # A prediction without variance has no correlation across spots, only across genes.
            "per-gene PCC": np.nan if np.isnan(per_gene).all() else np.nanmedian(per_gene),
            "genes above 0.3": f"{(per_gene > 0.3).sum()}",
            "per-spot PCC": np.nanmedian(per_spot),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def main() -> None:
    """Run the quickstart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["synthetic", "her2st"], default="synthetic")
    parser.add_argument("--n-genes", type=int, default=250, help="genes of highest mean expression on training spots")
    parser.add_argument("--genes", nargs="+", help="genes to draw (default: ERBB2, or the best ones of synthetic data)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures")
    args = parser.parse_args()

    if args.data == "her2st":
        sdata = stp.datasets.her2st(["C2", "C3", "C4", "C5"])
    else:
        sdata = stp.datasets.synthetic()
    table = sdata["table"]
    held_out = table.obs["section"].cat.categories[-1]
    table.obs["train"] = (table.obs["section"] != held_out).to_numpy()
    train = table.obs["train"].to_numpy()

    mean_expression = np.asarray(table.X[train].mean(axis=0)).ravel()
    genes = table.var_names[np.argsort(-mean_expression)[: args.n_genes]]

    start = time.perf_counter()
    model = stp.tl.fit_nsl(sdata, genes=genes, train_key="train")
    print(f"{model}\n  histograms, fit and predictions took {time.perf_counter() - start:.1f} s\n")

    # Two yardsticks: a linear model of the mean colour, and one that never looks at the image.
    expression, mean_od = table[:, genes].X.toarray(), table.obsm["mean_od"]
    ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 13))).fit(mean_od[train], expression[train])
    predictions = {
        "NSL": table[~train, genes].layers["nsl"],
        "ridge on mean OD": ridge.predict(mean_od[~train]),
        "mean of training spots": np.broadcast_to(expression[train].mean(axis=0), expression[~train].shape),
    }
    measured = expression[~train]
    print(f"Held-out section {held_out}: medians over {len(genes)} genes and {len(measured)} spots")
    print(score(measured, predictions).to_string(float_format="{:.3f}".format, na_rep="-"), "\n")

    if args.genes:
        shown = args.genes
    elif args.data == "her2st":
        shown = ["ERBB2"]
    else:
        kinds = table.var.loc[genes, "kind"]
        shown = [kinds.index[kinds == kind][0] for kind in ("stain", "mix", "context", "noise")]
    args.out.mkdir(parents=True, exist_ok=True)
    pictures = [args.out / f"expression_{gene}.png" for gene in shown[:2]]
    for gene, picture in zip(shown, pictures, strict=False):
        stp.pl.expression(sdata, gene)
        save(picture)
    stp.pl.stains(sdata, shown)
    pictures.append(args.out / "stains.png")
    save(pictures[-1])
    model.save(args.out / "model", overwrite=True)
    print("Pictures:", *pictures, sep="\n  ")
    print(f"Model: {args.out / 'model'} (read it with stp.models.load)")


def save(path: Path) -> None:
    """Write the current figure."""
    plt.gcf().savefig(path, dpi=150, bbox_inches="tight")
    plt.close("all")


if __name__ == "__main__":
    main()
