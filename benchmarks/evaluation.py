"""All models and baselines on real sections, none of which they have seen: the table of docs/explanation/evaluation.md.

    OMP_NUM_THREADS=2 python benchmarks/evaluation.py                  # NSL, ridge, M2OST tiny: about half an hour
    OMP_NUM_THREADS=2 python benchmarks/evaluation.py --m2ost small    # wants a GPU

Leave one of C2 to C5 of the HER2+ set out, fit on the three others, score on it: 250 genes of highest mean expression on the
training spots, noise ceilings beside them. Folds that are done are kept in a folder, so that a run that was killed goes on.
All four sections are of one patient: the scores tell about more tissue of a known patient.
"""

from __future__ import annotations

import argparse
import json
import warnings
from functools import partial
from pathlib import Path

import pandas as pd

import stpredict as stp

SECTIONS = ("C2", "C3", "C4", "C5")
N_GENES = 250


def main() -> None:
    """Cross-validate, print the summary, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m2ost", choices=["none", "tiny", "small", "base", "large"], default="tiny")
    parser.add_argument("--folder", type=Path, default=Path("build/evaluation"), help="keeps the folds that are done")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()

    sdata = stp.datasets.her2st(SECTIONS)
    stp.tl.noise_ceiling(sdata, section_key="section")
    models = {"nsl": stp.tl.fit_nsl}
    if args.m2ost != "none":
        models["m2ost"] = partial(stp.tl.fit_m2ost, preset=args.m2ost)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The same patient is on both sides")
        cv = stp.tl.cross_validate(
            sdata, models, section_key="section", group_key="section", genes=N_GENES, checkpoint_dir=args.folder
        )

    summary = stp.tl.summarize(cv)
    variable = stp.tl.summarize(cv, genes="highly_variable")
    summary["pcc of 50 variable genes"] = variable["pcc"]
    print(
        f"Held out in turn: {', '.join(SECTIONS)}; {N_GENES} genes\n{summary.T.to_string(float_format='{:.3f}'.format)}\n"
    )
    genes = cv[(cv["of"] == "gene") & cv["section"].isin(SECTIONS)]
    by_section = genes.pivot_table(
        index="model", columns="section", values="pcc", aggfunc="median", observed=True, sort=False, dropna=False
    )
    print(f"Median per-gene PCC of each section\n{by_section.to_string(float_format='{:.3f}'.format, na_rep='-')}\n")
    ceiling = sdata["table"].var.loc[genes["name"].unique(), "noise_ceiling"]
    args.json.write_text(
        json.dumps(
            {
                "sections": SECTIONS,
                "n_genes": N_GENES,
                "m2ost": args.m2ost,
                "median_noise_ceiling": float(ceiling.median()),
                "summary": _plain(summary),
                "median_pcc_by_section": _plain(by_section),
            },
            indent=1,
        )
        + "\n"
    )


def _plain(table: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    """Numbers by model; JSON has no NaN."""
    return {
        str(model): {str(name): None if pd.isna(value) else float(value) for name, value in row.items()}
        for model, row in table.iterrows()
    }


if __name__ == "__main__":
    main()
