"""How much a split flatters: the same models scored on random spots, on blocks of tissue, and on whole sections.

    OMP_NUM_THREADS=2 python benchmarks/leakage.py

Neighbouring spots share pixels and tissue. Beside NSL and ridge regressions stands a model that never looks at the image: it
gives each spot the expression of the nearest training spot. The median over 250 genes (of highest mean expression on the
training spots) of the per-gene PCC, on C2 to C5 of the HER2+ set.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from spatialdata import SpatialData

import stpredict as stp

SECTIONS = ("C2", "C3", "C4", "C5")
N_GENES = 250
SPLITS = {"random spots": "random", "blocks of tissue": "blocks", "whole sections": "groups"}


def nearest_spot(sdata: SpatialData, *, train_key: str, key_added: str, genes: list[str]) -> None:
    """Remember the training spots; any other gets the expression of the nearest one of its section."""
    table = sdata["table"]
    section = table.obs["section"].cat.codes.to_numpy()
    # Sections lie far apart: the nearest spot is of the same one where it has any.
    place = np.column_stack([table.obs[["array_row", "array_col"]].to_numpy(), 1000.0 * section])
    train = table.obs[train_key].to_numpy()
    closest = cKDTree(place[train]).query(place)[1]
    columns = table.var_names.get_indexer(genes)
    predicted = np.full(table.shape, np.nan, dtype=np.float32)
    predicted[:, columns] = table.X[train][:, columns].toarray()[closest]
    table.layers[key_added] = predicted


def main() -> None:
    """Cross-validate in three ways, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()

    sdata = stp.datasets.her2st(SECTIONS)
    scores: dict[str, pd.Series] = {}
    for title, split in SPLITS.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The same patient is on both sides")
            cv = stp.tl.cross_validate(
                sdata,
                {"nearest_spot": nearest_spot, "nsl": stp.tl.fit_nsl},
                split=split,
                genes=N_GENES,
                baselines=["position", "ridge on mean OD", "ridge on color statistics"],
                n_perms=0,
                n_bootstrap=0,
                inplace=False,
            )
        scores[title] = stp.tl.summarize(cv)["pcc"]
    table = pd.DataFrame(scores)
    print(f"Median per-gene PCC of {N_GENES} genes\n{table.to_string(float_format='{:.3f}'.format)}")
    args.json.write_text(json.dumps({"n_genes": N_GENES, "median_pcc": table.T.to_dict()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
