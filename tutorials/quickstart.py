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

import stpredict as stp


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

    start = time.perf_counter()
    model = stp.tl.fit_nsl(sdata, genes=args.n_genes, train_key="train")
    print(f"{model}\n  histograms, fit and predictions took {time.perf_counter() - start:.1f} s\n")

    # What NSL has to be compared with: linear models of colours, and one that never looks at the image.
    fit_to = {"genes": model.genes, "train_key": "train"}
    stp.tl.fit_ridge(sdata, features="mean_od", key_added="ridge_mean_od", **fit_to)
    stp.tl.fit_ridge(sdata, features="color_statistics", key_added="ridge_color_statistics", **fit_to)
    mean = np.where(table.var["nsl_fitted"], np.asarray(table.X[train].mean(axis=0)).ravel(), np.nan)
    table.layers["training_mean"] = np.tile(mean.astype(np.float32), (table.n_obs, 1))
    table.obs["held_out"] = ~train
    stp.tl.noise_ceiling(sdata, genes=model.genes)
    layers = ["training_mean", "ridge_mean_od", "ridge_color_statistics", "nsl"]
    scores = pd.concat([stp.tl.score(sdata, key=layer, spots="held_out") for layer in layers])
    print(f"Held-out section {held_out}: {len(model.genes)} genes, {(~train).sum()} spots")
    columns = ["pcc", "above_0.3", "predictable", "pcc_of_ceiling", "spot_pcc"]
    print(stp.tl.summarize(scores)[columns].to_string(float_format="{:.3f}".format, na_rep="-"), "\n")

    if args.genes:
        shown = args.genes
    elif args.data == "her2st":
        shown = ["ERBB2"]
    else:
        kinds = table.var.loc[model.genes, "kind"]
        shown = [kinds.index[kinds == kind][0] for kind in ("stain", "mix", "context", "noise")]
    args.out.mkdir(parents=True, exist_ok=True)
    pictures = [args.out / f"expression_{gene}.png" for gene in shown[:2]]
    for gene, picture in zip(shown, pictures, strict=False):
        stp.pl.expression(sdata, gene)
        save(picture)
    stp.pl.stains(sdata, shown)
    pictures.append(args.out / "stains.png")
    save(pictures[-1])
    stp.pl.scores(scores, genes=shown)
    pictures.append(args.out / "scores.png")
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
