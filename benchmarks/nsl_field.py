"""Choose field and pull of Neural Stain Learning by cross-validation between sections, as tables and JSON.

    OMP_NUM_THREADS=2 python benchmarks/nsl_field.py

Leave one section out, fit on the others, score on it: the median over 250 genes (of highest mean expression on the
training spots) of the per-gene PCC, averaged over the folds. The choice is made on C2, C3 and C4 of the HER2+ set; C5
is what tutorials and quickstart hold out, so the same numbers over all four sections are for information only. Beside
NSL stands ridge regression on the mean optical density of the same field. Takes several minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

import stpredict as stp
from stpredict.models import NSL
from stpredict.models.nsl._stains import RUIFROK_JOHNSTON, stain_matrix

SECTIONS = ("C2", "C3", "C4", "C5")
CHOICE = SECTIONS[:3]
FIELDS = (0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
PULLS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FIELD, PULL = 2.0, 0.1  # the defaults: each is varied with the other at its default
N_GENES = 250


def median_pcc(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Median over genes of Pearson's correlation across spots; genes without variance are left out."""
    a, b = predicted - predicted.mean(axis=0), measured - measured.mean(axis=0)
    norm = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return float(np.median((a * b).sum(axis=0)[norm > 0] / norm[norm > 0]))


def main() -> None:
    """Run the cross-validation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()

    sdata = stp.datasets.her2st(SECTIONS)
    table = sdata["table"]
    expression = table.X.toarray()
    of_spot = table.obs["section"].to_numpy()
    reference = stain_matrix(RUIFROK_JOHNSTON)
    folds = [("choice", CHOICE, held_out) for held_out in CHOICE] + [("all", SECTIONS, name) for name in SECTIONS]
    scores: list[dict[str, Any]] = []
    with tqdm(total=len(folds) * len(FIELDS) + len(CHOICE) * (len(PULLS) - 1)) as progress:
        for field in FIELDS:
            histogram = stp.pp.color_histogram(sdata, spot_scale=field, inplace=False)
            fractions, mean_od = histogram.fractions(np.arange(table.n_obs)), histogram.mean_od
            for sections, used, held_out in folds:
                train = np.isin(of_spot, used) & (of_spot != held_out)
                test = of_spot == held_out
                genes = np.argsort(-expression[train].mean(axis=0))[:N_GENES]
                target, measured = expression[np.ix_(train, genes)], expression[np.ix_(test, genes)]
                fold = {"sections": sections, "held_out": held_out, "field": field}

                ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 13))).fit(mean_od[train], target)
                score = median_pcc(ridge.predict(mean_od[test]), measured)
                scores.append({**fold, "model": "ridge on mean OD", "pcc": score})
                for pull in PULLS if (sections, field) == ("choice", FIELD) else (PULL,):
                    model = NSL.fit(
                        fractions[train], histogram.od, target, list(table.var_names[genes]),
                        reference=reference, reads={}, pull=pull,
                    )  # fmt: skip
                    score = median_pcc(model.predict(fractions[test], histogram.od), measured)
                    scores.append({**fold, "model": "NSL", "pull": pull, "pcc": score})
                    progress.update()

    found = pd.DataFrame(scores)
    nsl, choice = found["model"] == "NSL", found["sections"] == "choice"
    usual = found[~nsl | (found["pull"] == PULL)]
    tables = {
        f"By field (spot diameters); NSL at pull {PULL}": usual.pivot_table(
            index="field", columns=["sections", "model"], values="pcc"
        ),
        f"NSL by field, the single folds of C2-C4, at pull {PULL}": found[
            nsl & choice & (found["pull"] == PULL)
        ].pivot_table(index="field", columns="held_out", values="pcc"),
        f"NSL by pull, C2-C4, at field {FIELD}": found[nsl & choice & (found["field"] == FIELD)].pivot_table(
            index="pull", columns="held_out", values="pcc", margins=True, margins_name="mean"
        ),
    }
    for title, scored in tables.items():
        print(f"{title}\n{scored.to_string(float_format='{:.3f}'.format)}\n")
    args.json.write_text(
        json.dumps({"n_genes": N_GENES, "field": FIELD, "pull": PULL, "scores": scores}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
