from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

import stpredict as stp

GENES = ["ACTB", "ERBB2", "KRT8"]
PCC = {"A": [0.1, 0.4, 0.3], "B": [0.5, 0.6, np.nan], "C": [0.2, 0.0, 0.7]}
SPOT_PCC = {"A": [0.8, 0.9], "B": [0.6, np.nan, 0.7], "C": [0.5]}
PATIENTS = {"A": "P", "B": "P", "C": "Q"}


def scores(model: str = "nsl", shift: float = 0.0) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for section, values in PCC.items():
        for gene, pcc in zip(GENES, values, strict=True):
            rows.append(
                {"of": "gene", "name": gene, "section": section, "group": PATIENTS[section], "pcc": pcc + shift}
            )
        for i, pcc in enumerate(SPOT_PCC[section]):
            spot = {"of": "spot", "name": f"{section}{i}", "section": section, "group": PATIENTS[section]}
            rows.append(spot | {"pcc": pcc, "rmse": 2 * i + 1.0})
    for section in ("mean of sections", "pooled"):
        for gene, mean in zip(GENES, np.nanmean(list(PCC.values()), axis=0), strict=True):
            rows.append({"of": "gene", "name": gene, "section": section, "group": "", "pcc": mean + shift})
    frame = pd.DataFrame(rows).assign(model=model)
    of_mean = frame["section"] == "mean of sections"
    frame.loc[of_mean, "pvals_adj"] = [0.2, 0.05, 0.01]
    frame.loc[of_mean, "pcc_of_ceiling"] = [0.3, 0.8, np.nan]
    for label in ("model", "of", "name", "section", "group"):
        frame[label] = frame[label].astype("category")
    return frame


def test_by_hand() -> None:
    found = stp.tl.summarize(scores())
    assert found.index.tolist() == ["nsl"] and found.index.name == "model"
    row = found.loc["nsl"]
    assert (row["n_sections"], row["n_groups"], row["n_genes"], row["n_defined"]) == (3, 2, 3, 3)
    medians = [0.3, 0.55, 0.2]
    assert row["pcc"] == pytest.approx(np.mean(medians))
    assert row["pcc_low"] == pytest.approx(0.2) and row["pcc_high"] == pytest.approx((0.3 + 0.55) / 2)
    assert row["above_0.3"] == pytest.approx(2 / 3)  # means are 0.27, 0.33 and 0.5
    assert row["predictable"] == pytest.approx(2 / 3)
    assert row["pcc_of_ceiling"] == pytest.approx(0.55)
    assert row["spot_pcc"] == pytest.approx(np.mean([0.85, 0.65, 0.5]))
    assert row["spot_rmse"] == pytest.approx(np.mean([2, 3, 1]))


def test_models_in_order_of_appearance() -> None:
    both = pd.concat([scores("ridge", 0.1), scores("nsl")], ignore_index=True)
    found = stp.tl.summarize(both)
    assert found.index.tolist() == ["ridge", "nsl"]
    assert found["pcc"]["ridge"] == pytest.approx(found["pcc"]["nsl"] + 0.1)
    pd.testing.assert_frame_equal(found.loc[["nsl"]], stp.tl.summarize(scores()))


def test_some_genes() -> None:
    frame = scores()
    found = stp.tl.summarize(frame, genes=["KRT8", "ERBB2"])
    assert found["n_genes"].item() == 2
    assert found["pcc"].item() == pytest.approx(np.mean([0.35, 0.6, 0.35]))
    assert found["spot_pcc"].item() == stp.tl.summarize(frame)["spot_pcc"].item()  # spots are across all genes
    assert stp.tl.summarize(frame, genes="ERBB2")["n_genes"].item() == 1
    frame["highly_variable"] = frame["name"].isin(["KRT8", "ERBB2"]) & (frame["of"] == "gene")
    pd.testing.assert_frame_equal(stp.tl.summarize(frame, genes="highly_variable"), found)


def test_constant_predictions() -> None:
    frame = scores()
    frame.loc[frame["of"] == "gene", ["pcc", "pvals_adj", "pcc_of_ceiling"]] = np.nan
    found = stp.tl.summarize(frame).loc["nsl"]
    assert found["n_genes"] == 3 and found["n_defined"] == 0
    unknown = ["pcc", "pcc_low", "pcc_high", "above_0.3", "predictable", "pcc_of_ceiling"]
    assert found[unknown].isna().all()
    assert np.isfinite(found["spot_pcc"])


def test_negative_correlations_are_not_predictable() -> None:
    frame = scores(shift=-1.0)
    assert stp.tl.summarize(frame).loc["nsl", "predictable"] == 0


def test_intervals() -> None:
    frame = scores()
    assert np.isnan(stp.tl.summarize(frame, n_bootstrap=0)["pcc_low"].item())
    frame["group"] = "P"
    assert np.isnan(stp.tl.summarize(frame)["pcc_low"].item())
    frame["group"] = frame["section"]
    found = [stp.tl.summarize(frame, random_state=seed, n_bootstrap=20) for seed in (0, 0, 1)]
    pd.testing.assert_frame_equal(found[0], found[1])
    assert not found[2].equals(found[0])


def test_frames_that_are_no_scores() -> None:
    with pytest.raises(KeyError, match=r"`scores` has no columns \['group', 'pcc'\]; pass what `stp.tl.score`"):
        stp.tl.summarize(scores().drop(columns=["pcc", "group"]))


def test_genes_that_are_not_there() -> None:
    frame = scores()
    with pytest.raises(
        KeyError, match=r"1 of `genes` have no scores, such as \['HER2'\]; `scores` has genes such as \['ACTB'"
    ):
        stp.tl.summarize(frame, genes=["ACTB", "HER2"])
    with pytest.raises(KeyError, match="1 of `genes` have no scores"):
        stp.tl.summarize(frame, genes="HER2")
    with pytest.raises(ValueError, match="`genes` is empty"):
        stp.tl.summarize(frame, genes=[])
    with pytest.raises(TypeError, match=r"`scores\['pcc'\]` has dtype float64; expected a boolean column"):
        stp.tl.summarize(frame, genes="pcc")
    frame["none"] = False
    with pytest.raises(ValueError, match=r"`scores\['none'\]` marks no gene"):
        stp.tl.summarize(frame, genes="none")
