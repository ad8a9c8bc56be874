from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from spatialdata import SpatialData

import stpredict as stp
from stpredict._data.provenance import read_halves
from stpredict.tl.evaluation.numbers import _ceiling
from stpredict.tl.evaluation.numbers._ceiling import Halves, ceiling, correlate_halves, mean_halves

MakeSData = Callable[..., SpatialData]


noise_ceiling = partial(stp.tl.noise_ceiling, section_key="section")


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return (x * y).sum(axis=0) / np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))


def add_counts(sdata: SpatialData, *, depth: float, spread: float, seed: int = 0) -> np.ndarray:
    """Poisson counts of 40 genes beside an abundant one; returns log1p of the rates per 10,000."""
    rng = np.random.default_rng(seed)
    table = sdata["table"]
    rate = rng.lognormal(0, spread, table.shape) * np.geomspace(0.5, 2, table.n_vars)
    rate[:, 0] = 20 * table.n_vars  # takes up what the others leave
    rate /= rate.sum(axis=1, keepdims=True)
    total = depth * table.n_vars * 21
    counts = rng.poisson(total * rate)
    table.layers["counts"] = sp.csr_matrix(counts.astype(np.float32))
    table.X = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
    return np.log1p(1e4 * rate)


@pytest.fixture(scope="module")
def sections(make_sdata: MakeSData) -> SpatialData:
    sdata = make_sdata(2, n_spots=150, n_genes=41)
    add_counts(sdata, depth=20, spread=0.3)
    return sdata


@pytest.fixture
def sdata(sections: SpatialData) -> SpatialData:
    """Spots, and a table of one's own; no image is needed."""
    return SpatialData(shapes=dict(sections.shapes), tables={"table": sections["table"].copy()})


# What it estimates


@pytest.mark.parametrize(("depth", "spread"), [(20, 0.2), (20, 0.5), (80, 0.2)])
def test_a_predictor_that_knows_the_rates_reaches_it(make_sdata: MakeSData, depth: float, spread: float) -> None:
    sdata = make_sdata(n_spots=300, n_genes=41, size=(600, 600))
    truth = add_counts(sdata, depth=depth, spread=spread)
    found = noise_ceiling(sdata)
    found = found[(found["section"] == "A") & (found["gene"] != "gene0")]
    reached = correlation(np.asarray(sdata["table"].X), truth)[1:]
    distance = ((found["ceiling"] - reached) / found["error"]).to_numpy()
    assert abs(np.mean(found["ceiling"] - reached)) < 0.01
    assert np.mean(np.abs(distance) < 2) >= 0.85
    assert 0.7 < distance.std() < 1.4


def test_few_counts_make_it_somewhat_too_high(make_sdata: MakeSData) -> None:
    sdata = make_sdata(n_spots=300, n_genes=41, size=(600, 600))
    truth = add_counts(sdata, depth=4, spread=0.35)
    found = noise_ceiling(sdata, min_count=1)
    too_high = found["ceiling"].to_numpy()[1:41] - correlation(np.asarray(sdata["table"].X), truth)[1:]
    assert -0.05 < too_high.mean() < 0.08


def test_noise_alone_has_none(make_sdata: MakeSData) -> None:
    sdata = make_sdata(4, n_spots=150, n_genes=41)
    add_counts(sdata, depth=20, spread=0.0)
    found = noise_ceiling(sdata)
    mean = found[(found["section"] == "mean of sections") & (found["gene"] != "gene0")]
    assert mean["ceiling"].median() < 0.2
    stored = read_halves(sdata["table"], [f"gene{i}" for i in range(1, 41)], list("ABCD"))
    assert stored is not None
    assert ceiling(mean_halves(Halves(*stored))).determined.mean() <= 0.15
    assert ceiling(Halves(*stored)).determined.mean() <= 0.12


def test_the_error_is_the_scatter_over_other_spots(make_sdata: MakeSData) -> None:
    sdata = make_sdata(n_spots=150, n_genes=41)
    found = []
    for seed in range(12):
        add_counts(sdata, depth=20, spread=0.4, seed=seed)
        found.append(noise_ceiling(sdata, n_draws=5)[["ceiling", "error"]].to_numpy()[1:41])
    scatter, errors = np.std([f[:, 0] for f in found], axis=0).mean(), np.mean([f[:, 1] for f in found])
    assert 0.8 < errors / scatter < 1.3


def test_by_hand(sdata: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    class Drawn:
        """Gives the first of the two halves that were drawn."""

        def __init__(self) -> None:
            self.rng = np.random.default_rng(5)
            self.halves = [self.rng.binomial(counts, 0.5) for _ in range(3)]

        def binomial(self, whole: np.ndarray, p: float) -> np.ndarray:
            assert p == 0.5
            by_gene = sp.csc_matrix(counts)
            np.testing.assert_array_equal(whole, by_gene.data)
            return np.asarray(self.halves.pop(0))[by_gene.indices, np.repeat(np.arange(41), np.diff(by_gene.indptr))]

    table = sdata["table"]
    rows = np.flatnonzero(table.obs["section"] == "A")
    counts = table.layers["counts"][rows].toarray().astype(int)
    counts[np.random.default_rng(1).random(counts.shape) < 0.3] = 0
    drawn = Drawn()

    def log(half: np.ndarray) -> np.ndarray:
        return np.log1p(1e4 * half / half.sum(axis=1, keepdims=True))

    expected = np.mean([correlation(log(half), log(counts - half)) for half in drawn.halves], axis=0)

    def influence(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = (x - x.mean(axis=0)) / x.std(axis=0), (y - y.mean(axis=0)) / y.std(axis=0)
        return x * y - (x * y).mean(axis=0) * (x * x + y * y) / 2

    of_spots = np.mean([influence(log(half), log(counts - half)) for half in drawn.halves], axis=0)
    error = np.sqrt((of_spots**2).sum(axis=0)) / len(counts)
    monkeypatch.setattr(_ceiling, "_BLOCK", 10**9)  # one block, so that the halves can be dealt out
    r, r_error = correlate_halves(sp.csr_matrix(counts), np.arange(41), 3, drawn)  # type: ignore[arg-type]
    np.testing.assert_allclose(r, expected, rtol=1e-6)
    np.testing.assert_allclose(r_error, error, rtol=1e-4)

    reliability = 2 * expected / (1 + expected)
    np.testing.assert_allclose(_ceiling._ceiling(r), np.sqrt(reliability), rtol=1e-6)
    assert _ceiling._ceiling(np.array([-0.4, 0.0, 1.0])).tolist() == [0, 0, 1]


@pytest.mark.parametrize("block", [1, 50, 10**9])
def test_blocks_hold_every_gene_once(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(_ceiling, "_BLOCK", block)
    ends = np.array([0, 0, 40, 41, 41, 200, 210, 210])
    for first, last in ((0, 7), (0, 4), (4, 7), (3, 3)):
        blocks = _ceiling._blocks(ends, first, last)
        genes = [gene for genes, _ in blocks for gene in range(genes.start, genes.stop)]
        stored = [value for _, stored in blocks for value in range(stored.start, stored.stop)]
        assert genes == list(range(first, last))
        assert stored == list(range(ends[first], ends[last]))


def test_results_do_not_depend_on_the_size_of_blocks_much(sdata: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = noise_ceiling(sdata, inplace=False)
    monkeypatch.setattr(_ceiling, "_BLOCK", 300)
    np.testing.assert_allclose(noise_ceiling(sdata, inplace=False)["ceiling"], whole["ceiling"], atol=0.08)


# What is written


def test_frame_and_table(sdata: SpatialData) -> None:
    table = sdata["table"]
    frame = noise_ceiling(sdata, genes=["gene5", "gene2"])
    assert list(frame) == ["gene", "section", "ceiling", "error", "reliability", "n"]
    assert frame["gene"].tolist() == ["gene5", "gene2"] * 3
    assert frame["section"].cat.categories.tolist() == ["A", "B", "mean of sections"]
    assert frame["n"].tolist() == [150, 150, 150, 150, 300, 300]
    np.testing.assert_allclose(frame["ceiling"] ** 2, frame["reliability"])

    of_gene = frame[frame["gene"] == "gene5"].set_index("section")
    assert table.var["noise_ceiling"].notna().sum() == 2
    assert table.var.loc["gene5", "noise_ceiling"] == of_gene.loc["mean of sections", "ceiling"]
    assert table.var.loc["gene5", "noise_ceiling_error"] == of_gene.loc["mean of sections", "error"]
    stored = table.uns["noise_ceiling"]
    assert stored["genes"].tolist() == ["gene5", "gene2"]
    assert stored["sections"].tolist() == ["A", "B"]
    np.testing.assert_array_equal(stored["ceiling"].ravel(), frame["ceiling"].iloc[:4])
    np.testing.assert_array_equal(stored["error"].ravel(), frame["error"].iloc[:4])
    assert stored["n"].tolist() == [150, 150]
    assert (stored["layer"], stored["n_draws"], stored["min_count"], stored["random_state"]) == ("counts", 20, 100, 0)


def test_totals_are_those_of_all_genes(sdata: SpatialData) -> None:
    all_genes = noise_ceiling(sdata, inplace=False, n_draws=50).set_index(["section", "gene"])["ceiling"]
    some = noise_ceiling(sdata, genes=["gene3", "gene7"], n_draws=50).set_index(["section", "gene"])["ceiling"]
    np.testing.assert_allclose(some, all_genes.loc[some.index], atol=0.03)


def test_not_in_place(sdata: SpatialData) -> None:
    frame = noise_ceiling(sdata, inplace=False)
    assert "noise_ceiling" not in sdata["table"].var
    assert "noise_ceiling" not in sdata["table"].uns
    pd.testing.assert_frame_equal(noise_ceiling(sdata), frame)  # the seed decides
    assert not noise_ceiling(sdata, random_state=1).equals(frame)  # and it may be written over


@pytest.mark.parametrize("layer", ["counts", "X"])
@pytest.mark.parametrize("to", [np.asarray, sp.csc_matrix, sp.csr_array], ids=["dense", "csc", "array"])
def test_layers_dense_and_sparse(sdata: SpatialData, layer: str, to: Callable[[Any], Any]) -> None:
    expected = noise_ceiling(sdata, inplace=False)
    table = sdata["table"]
    counts = table.layers.pop("counts").toarray()
    if layer == "X":
        table.X = to(counts)
    else:
        table.layers["counts"] = to(counts)
    pd.testing.assert_frame_equal(noise_ceiling(sdata, layer=layer), expected)


def test_stored_ceilings_round_trip(sdata: SpatialData, tmp_path: Path) -> None:
    noise_ceiling(sdata)
    table = sdata["table"]
    table.write_h5ad(tmp_path / "table.h5ad")
    table.write_zarr(tmp_path / "table.zarr")
    for read in (ad.read_h5ad(tmp_path / "table.h5ad"), ad.read_zarr(tmp_path / "table.zarr")):
        found = Halves(*read_halves(read, ["gene3", "stranger", "gene1"], ["B", "C"]))  # type: ignore[misc]
        assert found is not None
        np.testing.assert_array_equal(found.pcc[0, [0, 2]], table.uns["noise_ceiling"]["halves_pcc"][1, [3, 1]])
        np.testing.assert_array_equal(found.error[0, [0, 2]], table.uns["noise_ceiling"]["halves_error"][1, [3, 1]])
        assert np.isnan(found.pcc[0, 1]) and np.isnan(found.pcc[1]).all()
        assert read_halves(read, ["stranger"], ["B"]) is None


def test_no_stored_ceiling(sdata: SpatialData) -> None:
    assert read_halves(sdata["table"], ["gene1"], ["A"]) is None
    sdata["table"].uns["noise_ceiling"] = {"note": "mine"}
    assert read_halves(sdata["table"], ["gene1"], ["A"]) is None


# Spots and genes of which too little is known


def test_spots_of_few_counts_are_left_out(sdata: SpatialData, log: io.StringIO) -> None:
    table = sdata["table"]
    counts = table.layers["counts"].tolil()
    rows = np.flatnonzero(table.obs["section"] == "A")[:5]
    for row in rows:
        counts[row] = 0
        counts[row, 3] = 99
    table.layers["counts"] = counts.tocsr()
    found = noise_ceiling(sdata, inplace=False)
    assert found["n"].iloc[[0, 41, 82]].tolist() == [145, 150, 295]
    assert "5 of 150 spots in section 'A' have fewer than 100 counts: left out" in log.getvalue()
    assert noise_ceiling(sdata, min_count=99, inplace=False)["n"].iloc[0] == 150


def test_genes_that_are_hardly_seen_have_no_ceiling(sdata: SpatialData) -> None:
    table = sdata["table"]
    counts = table.layers["counts"].toarray()
    counts[:, 1:4] = 0
    rows = np.flatnonzero(table.obs["section"] == "A")
    counts[rows[:9], 2] = 50
    counts[rows[:10], 3] = 50
    table.layers["counts"] = sp.csr_matrix(counts)
    found = noise_ceiling(sdata).set_index(["section", "gene"])["ceiling"]
    assert np.isnan(found["A", "gene1"]) and np.isnan(found["A", "gene2"])
    assert found["A", "gene3"] > 0.9
    assert np.isnan(found["B", "gene3"])
    assert found["mean of sections", "gene3"] == found["A", "gene3"]


def test_a_section_without_counts_is_left_out(sdata: SpatialData, log: io.StringIO) -> None:
    table = sdata["table"]
    counts = table.layers["counts"].tolil()
    counts[np.flatnonzero(table.obs["section"] == "A")[2:]] = 0
    table.layers["counts"] = counts.tocsr()
    assert noise_ceiling(sdata)["section"].unique().tolist() == ["B", "mean of sections"]
    assert "Section 'A' has 2 spots with 100 counts; it is left out" in log.getvalue()


def test_ceilings_of_halves() -> None:
    found = ceiling(Halves(np.array([0.2, 0.2, 0.004, -0.1, np.nan]), np.array([0.12, 0.13, 0.001, 0.02, np.nan])))
    np.testing.assert_allclose(found.value, [np.sqrt(0.4 / 1.2)] * 2 + [np.sqrt(0.008 / 1.004), 0, np.nan])
    assert found.determined.tolist() == [True, False, False, False, False]
    small = ceiling(Halves(np.array([0.2]), np.array([1e-5])))  # as the derivative of the root has it
    np.testing.assert_allclose(small.error, 1e-5 * 2 / 1.2**2 / (2 * small.value), rtol=1e-6)


def test_mean_of_the_sections_where_it_is_known() -> None:
    found = mean_halves(Halves(np.array([[0.5, np.nan], [-0.1, np.nan]]), np.array([[0.03, np.nan], [0.04, np.nan]])))
    np.testing.assert_allclose(found.pcc, [0.2, np.nan])
    np.testing.assert_allclose(found.error, [0.025, np.nan])


# Bad input


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.5, "0.5"), (-3.0, "-3"), (np.nan, "nan"), (np.inf, "inf")],
    ids=["half", "negative", "nan", "inf"],
)
def test_values_that_are_no_counts(sdata: SpatialData, value: float, shown: str) -> None:
    sdata["table"].layers["counts"].data[7] = value
    with pytest.raises(
        ValueError, match=rf"`layers\['counts'\]` holds {shown}, which is no count; expected whole numbers"
    ):
        noise_ceiling(sdata)
    with pytest.raises(ValueError, match="`X` holds .*, which is no count"):
        noise_ceiling(sdata, layer="X")
    assert "noise_ceiling" not in sdata["table"].uns


@pytest.mark.parametrize("value", [2.0**31, 1e19])
def test_values_too_large_for_counts(sdata: SpatialData, value: float) -> None:
    sdata["table"].layers["counts"].data[7] = value
    with pytest.raises(
        ValueError, match="which is too large for a count; expected whole numbers of at most 2147483647"
    ):
        noise_ceiling(sdata)
    assert "noise_ceiling" not in sdata["table"].uns


def test_unknown_layer(sdata: SpatialData) -> None:
    with pytest.raises(KeyError, match=r"No layer 'raw' in the table; it has \['counts'\].*adata\.X\.copy\(\)"):
        noise_ceiling(sdata, layer="raw")
    del sdata["table"].X
    with pytest.raises(ValueError, match=r"The table has no `X`.*\['counts'\]"):
        noise_ceiling(sdata, layer="X")


@pytest.mark.parametrize("name", ["n_draws", "min_count"])
@pytest.mark.parametrize("number", [0, -1, 2.5])
def test_numbers_that_do_not_fit(sdata: SpatialData, name: str, number: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` is {number}; expected a whole number, at least 1"):
        noise_ceiling(sdata, **{name: number})


def test_no_gene_and_unknown_genes(sdata: SpatialData) -> None:
    with pytest.raises(ValueError, match="No gene is chosen"):
        noise_ceiling(sdata, genes=[])
    with pytest.raises(KeyError, match="1 of `genes` are not in `var_names`"):
        noise_ceiling(sdata, genes=["gene1", "HER2"])


def test_no_spot_with_counts(sdata: SpatialData) -> None:
    with pytest.raises(
        ValueError, match=r"No section has 3 spots with at least 1000000 counts in `layers\['counts'\]`"
    ):
        noise_ceiling(sdata, min_count=1_000_000)


@pytest.mark.parametrize("slot", ["var", "uns"])
def test_keys_that_belong_to_someone_else(sdata: SpatialData, slot: str) -> None:
    getattr(sdata["table"], slot)["noise_ceiling"] = np.zeros(41)
    with pytest.raises(
        ValueError,
        match=rf"`{slot}\['noise_ceiling'\]` exists and holds no result of stpredict under the key .*; choose another",
    ):
        noise_ceiling(sdata)
    noise_ceiling(sdata, key_added="other")
    assert "other_error" in sdata["table"].var


@pytest.mark.parametrize(("key", "error"), [("a/b", ValueError), (3, TypeError)])
def test_keys_that_cannot_be_written(sdata: SpatialData, key: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`key_added` is"):
        noise_ceiling(sdata, key_added=key)


# Real sections


def test_her2st(her2st_dir: Path) -> None:
    of_spots = pd.read_csv(her2st_dir / "her2st" / "ST-cnts" / "C2.tsv.gz", sep="\t", index_col=0).to_numpy()
    counts = of_spots[of_spots.sum(axis=1) >= 100]
    genes = np.argsort(-np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).mean(axis=0))[:250]
    found = ceiling(correlate_halves(sp.csr_matrix(counts), genes, 5, np.random.default_rng(0)))
    assert 0.58 < np.median(found.value) < 0.70
    assert 0.03 < np.median(found.error) < 0.12
