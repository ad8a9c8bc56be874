from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats

from stpredict.tl.evaluation.numbers import _parts
from stpredict.tl.evaluation.numbers import _scores as _scoring
from stpredict.tl.evaluation.numbers._ceiling import Halves
from stpredict.tl.evaluation.numbers._metrics import neighbor_graph
from stpredict.tl.evaluation.numbers._parts import Part
from stpredict.tl.evaluation.numbers._scores import Scores, score_predictions
from stpredict.tl.evaluation.numbers._sides import Side

GENES = ["ACTB", "ERBB2", "KRT8", "CD3D"]
# Rows are not in the order of sections, and row 40 is scored nowhere.
ROWS = {"A": np.arange(0, 40, 2), "B": np.arange(1, 40, 2)}


def grid(n: int) -> np.ndarray:
    return np.column_stack([np.arange(n) % 5, np.arange(n) // 5]).astype(float)


PARTS = [Part(name, name, rows, grid(len(rows))) for name, rows in ROWS.items()]


@pytest.fixture
def measured() -> np.ndarray:
    values = np.random.default_rng(0).gamma(1, 1, (41, 4)).astype(np.float32)
    values[values < 0.4] = 0
    values[ROWS["A"], 3] = 0  # not detected in A
    return values


@pytest.fixture
def predicted(measured: np.ndarray) -> np.ndarray:
    values = (0.5 * measured + np.random.default_rng(1).normal(1, 0.4, measured.shape)).astype(np.float32)
    values[ROWS["B"][3:6], 0] = np.nan
    values[ROWS["A"], 2] = 1.5
    return values


def run(measured: Any, predicted: Any, **changed: Any) -> Scores:
    arguments: dict[str, Any] = {
        "genes": GENES,
        "columns": np.arange(4),
        "spots": [f"s{i}" for i in range(41)],
        "parts": PARTS,
        "n_perms": 99,
        "n_bootstrap": 200,
        "random_state": 0,
    }
    return score_predictions(measured, {"m": predicted}, **(arguments | changed))["m"]


def pick(frame: pd.DataFrame, gene: str, section: str) -> pd.Series:
    return frame[(frame["of"] == "gene") & (frame["name"] == gene) & (frame["section"] == section)].iloc[0]


# Values


def test_sections_pooled_and_their_mean(measured: np.ndarray, predicted: np.ndarray) -> None:
    frame = run(measured, predicted).frame("m")
    each = {}
    for name, rows in ROWS.items():
        row = pick(frame, "ERBB2", name)
        x, y = measured[rows, 1].astype(float), predicted[rows, 1].astype(float)
        each[name] = row
        assert row["n"] == 20
        assert row["pcc"] == pytest.approx(stats.pearsonr(x, y).statistic)
        assert row["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
        assert row["rmse"] == pytest.approx(np.sqrt(np.mean((x - y) ** 2)))
        assert row["moran_measured"] == pytest.approx(Side(x[None], graph=neighbor_graph(grid(20))).morans_i[0])
    mean, pooled = pick(frame, "ERBB2", "mean of sections"), pick(frame, "ERBB2", "pooled")
    for metric in ("pcc", "rmse", "spearman", "mae", "r2", "variance_ratio", "moran_measured", "moran_predicted"):
        assert mean[metric] == pytest.approx((each["A"][metric] + each["B"][metric]) / 2)
    rows = np.concatenate(list(ROWS.values()))
    assert pooled["pcc"] == pytest.approx(stats.pearsonr(measured[rows, 1], predicted[rows, 1]).statistic, rel=1e-5)
    assert pooled["spearman"] == pytest.approx(stats.spearmanr(measured[rows, 1], predicted[rows, 1]).statistic)
    assert mean["n"] == pooled["n"] == 40
    # Neighbours are within sections.
    graph = sp.csr_matrix(sp.block_diag([neighbor_graph(grid(20))] * 2))
    assert pooled["moran_predicted"] == pytest.approx(
        Side(predicted[rows, 1][None].astype(float), graph=graph).morans_i[0]
    )


def test_missing_and_constant_values(measured: np.ndarray, predicted: np.ndarray) -> None:
    frame = run(measured, predicted).frame("m")
    assert pick(frame, "ACTB", "B")["n"] == 17
    assert pick(frame, "ACTB", "mean of sections")["n"] == 37
    for gene in ("KRT8", "CD3D"):  # constant prediction, constant measurement in A
        assert np.isnan(pick(frame, gene, "A")["pcc"])
        assert pick(frame, gene, "mean of sections")["pcc"] == pick(frame, gene, "B")["pcc"]
    assert np.isnan(pick(frame, "CD3D", "A")["r2"]) and np.isfinite(pick(frame, "KRT8", "A")["r2"])


def test_spots(measured: np.ndarray, predicted: np.ndarray) -> None:
    frame = run(measured, predicted).frame("m")
    spots = frame[frame["of"] == "spot"].set_index("name")
    assert len(spots) == 40 and "s40" not in spots.index
    assert spots.loc["s0", "section"] == "A" and spots.loc["s1", "section"] == "B"
    for row in (1, 7, 12):
        known = np.isfinite(predicted[row])
        x, y = measured[row, known].astype(float), predicted[row, known].astype(float)
        assert spots.loc[f"s{row}", "n"] == known.sum()
        assert spots.loc[f"s{row}", "pcc"] == pytest.approx(stats.pearsonr(x, y).statistic)
        assert spots.loc[f"s{row}", "rmse"] == pytest.approx(np.sqrt(np.mean((x - y) ** 2)))
    assert spots[["spearman", "mae", "r2", "pvals"]].isna().all(axis=None)


def test_some_genes(measured: np.ndarray, predicted: np.ndarray) -> None:
    some = run(measured, predicted, genes=["KRT8", "ERBB2"], columns=np.array([2, 1])).frame("m")
    every = run(measured, predicted).frame("m")
    assert pick(some, "ERBB2", "A")["pcc"] == pick(every, "ERBB2", "A")["pcc"]
    assert some.loc[some["of"] == "gene", "name"].unique().tolist() == ["KRT8", "ERBB2"]
    assert (some.loc[some["of"] == "spot", "n"] == 2).all()


@pytest.mark.parametrize("to", [sp.csr_matrix, sp.csc_matrix, sp.csr_array], ids=["csr", "csc", "array"])
@pytest.mark.parametrize("chunk", [1, 50, 2**19])
def test_sparse_is_like_dense_whatever_the_chunks(
    measured: np.ndarray, predicted: np.ndarray, to: Callable[[Any], Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(measured, predicted).frame("m")
    monkeypatch.setattr(_parts, "_CHUNK", chunk)
    pd.testing.assert_frame_equal(run(to(measured), predicted).frame("m"), expected)
    pd.testing.assert_frame_equal(run(measured, to(predicted)).frame("m"), expected)


def test_models_beside_each_other_have_the_scores_of_each_alone(measured: np.ndarray, predicted: np.ndarray) -> None:
    predictions = {"a": predicted, "constant": np.ones_like(predicted), "b": predicted[::-1], "a again": predicted}
    arguments: dict[str, Any] = {"genes": GENES, "columns": np.arange(4), "spots": np.arange(41), "parts": PARTS}
    found = score_predictions(measured, predictions, n_perms=99, n_bootstrap=99, random_state=0, **arguments)
    for name, values in predictions.items():
        alone = score_predictions(measured, {"m": values}, n_perms=99, n_bootstrap=99, random_state=0, **arguments)
        pd.testing.assert_frame_equal(found[name].frame("m"), alone["m"].frame("m"))
    assert found["constant"].frame("m")[["pvals", "pcc"]].dropna(how="all").empty


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float16, ">f4"])
def test_values_of_any_type(predicted: np.ndarray, dtype: Any) -> None:
    counts = np.random.default_rng(2).poisson(3, (41, 4))
    expected = run(counts.astype(np.float64), predicted).frame("m")
    pd.testing.assert_frame_equal(run(counts.astype(dtype), predicted).frame("m"), expected)


# P-values, intervals, ceilings


def test_p_and_q_values_are_of_the_mean(measured: np.ndarray, predicted: np.ndarray) -> None:
    frame = run(measured, predicted).frame("m")
    genes = frame[frame["of"] == "gene"]
    mean = genes[genes["section"] == "mean of sections"]
    assert genes["pvals"].notna().sum() == 4 == mean["pvals"].notna().sum()
    np.testing.assert_allclose(mean["pvals_adj"], stats.false_discovery_control(mean["pvals"]))
    assert pick(frame, "ERBB2", "mean of sections")["pvals"] == 0.01
    none = run(measured, predicted, n_perms=0).frame("m")
    assert none[["pvals", "pvals_adj"]].isna().all(axis=None)


def test_genes_without_a_correlation_have_no_q_value() -> None:
    q = _scoring._q_values(np.array([0.01, np.nan, 0.04]))
    np.testing.assert_allclose(q, [0.02, np.nan, 0.04])
    assert np.isnan(_scoring._q_values(np.array([np.nan]))).all()


def test_intervals_are_of_the_mean(measured: np.ndarray, predicted: np.ndarray) -> None:
    frame = run(measured, predicted).frame("m")
    mean = pick(frame, "ERBB2", "mean of sections")
    ends = sorted([pick(frame, "ERBB2", "A")["pcc"], pick(frame, "ERBB2", "B")["pcc"]])
    np.testing.assert_allclose([mean["pcc_low"], mean["pcc_high"]], ends)
    assert np.isnan(pick(frame, "KRT8", "mean of sections")["pcc_low"])  # defined in one section
    one_patient = [Part(part.name, "P", part.rows, part.xy) for part in PARTS]
    assert run(measured, predicted, parts=one_patient).frame("m")["pcc_low"].isna().all()
    assert run(measured, predicted, n_bootstrap=0).frame("m")["pcc_low"].isna().all()


def test_ceilings(measured: np.ndarray, predicted: np.ndarray) -> None:
    assert run(measured, predicted).frame("m")[["ceiling", "pcc_of_ceiling"]].isna().all(axis=None)
    pcc = np.array([[0.4, 0.4, 0.1, np.nan], [0.2, 0.4, 0.0, 0.3]])
    halves = Halves(pcc, np.full((2, 4), 0.1))
    frame = run(measured, predicted, halves=halves).frame("m")
    row = pick(frame, "ACTB", "A")
    assert row["ceiling"] == pytest.approx(np.sqrt(0.8 / 1.4))
    assert row["pcc_of_ceiling"] == pytest.approx(row["pcc"] / row["ceiling"])
    mean = pick(frame, "ACTB", "mean of sections")
    assert mean["ceiling"] == pytest.approx(np.sqrt(0.6 / 1.3))
    assert mean["pcc_of_ceiling"] == pytest.approx(mean["pcc"] / mean["ceiling"])
    noise = pick(frame, "KRT8", "B")
    assert noise["ceiling"] == 0 and np.isnan(noise["pcc_of_ceiling"])
    assert np.isnan(pick(frame, "CD3D", "A")["ceiling"])
    assert np.isnan(pick(frame, "ACTB", "pooled")["ceiling"])


# The frame


def test_frame(measured: np.ndarray, predicted: np.ndarray) -> None:
    frame = run(measured, predicted).frame("my model")
    assert list(frame) == [
        *("model", "of", "name", "section", "group", "n", "pcc", "rmse", "spearman", "mae", "r2", "variance_ratio"),
        *(
            "moran_measured",
            "moran_predicted",
            "ceiling",
            "pcc_of_ceiling",
            "pcc_low",
            "pcc_high",
            "pvals",
            "pvals_adj",
        ),
    ]
    assert len(frame) == 4 * 4 + 40
    assert (frame[["model", "of", "name", "section", "group"]].dtypes == "category").all()
    assert frame["n"].dtype == np.int64
    assert not frame.duplicated(["model", "of", "name", "section"]).any()
    assert frame["model"].unique().tolist() == ["my model"]
    assert frame["section"].cat.categories.tolist() == ["A", "B", "mean of sections", "pooled"]
    aggregate = frame["section"].isin(["mean of sections", "pooled"])
    assert (frame.loc[aggregate, "group"] == "").all()
    assert (frame.loc[~aggregate, "group"] == frame.loc[~aggregate, "section"].astype(str)).all()


def test_a_single_section_is_its_own_mean_and_pool(measured: np.ndarray, predicted: np.ndarray) -> None:
    frame = run(measured, predicted, parts=PARTS[:1]).frame("m")
    metrics = ["n", "pcc", "rmse", "spearman", "moran_predicted"]
    for section in ("mean of sections", "pooled"):
        pd.testing.assert_series_equal(
            pick(frame, "ERBB2", section)[metrics], pick(frame, "ERBB2", "A")[metrics], check_names=False
        )


def test_the_seed_decides(measured: np.ndarray, predicted: np.ndarray) -> None:
    unrelated = predicted[::-1]
    first = run(measured, unrelated).frame("m")
    pd.testing.assert_frame_equal(run(measured, unrelated).frame("m"), first)
    assert not run(measured, unrelated, random_state=1).frame("m").equals(first)
