from __future__ import annotations

import io
import pickle
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from sklearn.model_selection import LeaveOneGroupOut
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Translation, set_transformation

import stpredict as stp
from stpredict._data.compat import layer_names

QUICK: dict[str, Any] = {"n_perms": 0, "n_bootstrap": 0}
MakeSData = Callable[..., SpatialData]


def nearest(sdata: SpatialData, *, train_key: str, key_added: str, genes: list[str]) -> None:
    """A model that cheats: it remembers the training spots, and gives each spot the expression of the nearest one."""
    table = sdata["table"]
    train = table.obs[train_key].to_numpy()
    place = table.obsm["spatial"]
    _, closest = cKDTree(place[train]).query(place)
    values = table[:, genes].X.toarray()[train]
    layer = np.full(table.shape, np.nan, dtype=np.float32)
    layer[:, table.var_names.get_indexer(genes)] = values[closest]
    table.layers[key_added] = layer


def mean(sdata: SpatialData, *, train_key: str, key_added: str, genes: list[str], layer: str | None) -> None:
    """The signature that is documented, all of it required."""
    assert layer is None
    table = sdata["table"]
    columns = table.var_names.get_indexer(genes)
    values = np.full(table.shape, np.nan, dtype=np.float32)
    values[:, columns] = table.X[table.obs[train_key].to_numpy()][:, columns].mean(axis=0)
    table.layers[key_added] = values


@pytest.fixture(scope="session")
def three(make_sdata: MakeSData) -> SpatialData:
    """Two sections of one patient and one of another, 24 spots each."""
    made = make_sdata(3, n_spots=24, n_genes=6, size=(200, 230))
    made["table"].obs["patient"] = made["table"].obs["section"].map({"A": "first", "B": "first", "C": "second"})
    return made


@pytest.fixture
def sdata(three: SpatialData) -> SpatialData:
    """With a table of one's own."""
    return SpatialData(images=dict(three.images), shapes=dict(three.shapes), tables={"table": three["table"].copy()})


def contents(sdata: SpatialData) -> dict[str, list[str]]:
    table = sdata["table"]
    parts: dict[str, Any] = {slot: getattr(table, slot) for slot in ("obs", "var", "uns", "obsm")}
    return {slot: sorted(names) for slot, names in {**parts, "layers": layer_names(table)}.items()}


def cross_validate(sdata: SpatialData, models: Any = None, **arguments: Any) -> pd.DataFrame:
    names = {"section_key": "section", "patient_key": "patient"} if "patient" in sdata["table"].obs else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The same patient")
        return stp.tl.cross_validate(sdata, models or {"nsl": stp.tl.fit_nsl}, **{**QUICK, **names, **arguments})


def test_predictions_are_those_of_a_model_that_was_fitted_to_the_others(sdata: SpatialData) -> None:
    table = sdata["table"]
    genes = ["gene0", "gene3"]
    cv = cross_validate(sdata, group_key="section", genes=genes, baselines=False)
    columns = table.var_names.get_indexer(genes)
    written = table.layers["nsl_cv"].copy()
    assert np.isnan(np.delete(written, columns, axis=1)).all()
    for section in ("A", "B", "C"):
        test = (table.obs["section"] == section).to_numpy()
        table.obs["train"] = ~test
        stp.tl.fit_nsl(sdata, genes=genes, train_key="train")
        np.testing.assert_allclose(written[test], table.layers["nsl"][test], rtol=1e-6)
        pairs = zip(table.X.toarray()[test][:, columns].T, written[test][:, columns].T, strict=True)
        rows = cv[(cv["section"] == section) & (cv["of"] == "gene")].set_index("name")
        np.testing.assert_allclose(rows["pcc"][genes], [np.corrcoef(*pair)[0, 1] for pair in pairs], rtol=1e-5)
    np.testing.assert_array_equal(table.obs["nsl_cv_fold"].astype(str), table.obs["section"].astype(str))
    assert list(table.var_names[table.var["nsl_cv_fitted"]]) == genes
    assert table.uns["nsl_cv"]["params"]["split"] == "sections left out in turn"


def test_folds_are_those_of_scikit_learn(sdata: SpatialData) -> None:
    seen: list[np.ndarray] = []

    def spy(sdata: SpatialData, *, train_key: str, key_added: str) -> None:
        seen.append(sdata["table"].obs[train_key].to_numpy())
        sdata["table"].layers[key_added] = np.zeros(sdata["table"].shape)

    cross_validate(sdata, {"spy": spy}, baselines=False)
    expected = LeaveOneGroupOut().split(seen[0], groups=sdata["table"].obs["patient"].astype(str))
    for mask, (train, _) in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(mask), train)


def test_baselines_come_first_and_constants_have_no_per_gene_correlation(sdata: SpatialData) -> None:
    mine = partial(stp.tl.fit_ridge, features="color_histogram")
    cv = cross_validate(sdata, {"mine": mine}, group_key="section")
    names = list(pd.unique(cv["model"]))
    assert names == [
        "mean of training spots", "mean of held-out section (oracle)", "position", "ridge on mean OD",
        "ridge on color statistics", "mine",
    ]  # fmt: skip
    assert list(pd.unique(cv.loc[cv["baseline"], "model"])) == names[:-1]
    per_section = cv[(cv["of"] == "gene") & cv["section"].isin(["A", "B", "C"])]
    by_model = per_section.groupby("model", observed=True)["pcc"]
    assert by_model.count()[names[:2]].eq(0).all()
    assert by_model.count()[names[2:]].gt(0).all()
    # They know nothing of the spot, and yet correlate with it across genes; the oracle has the smallest error.
    spots = cv[cv["of"] == "spot"].groupby("model", observed=True)
    assert spots["pcc"].median()[names[0]] > 0.5
    rmse = per_section.groupby("model", observed=True)["rmse"].mean()
    assert rmse[names[1]] < rmse[names[0]]
    measured = sdata["table"].to_df()
    of_a = (sdata["table"].obs["section"] == "A").to_numpy()
    error = np.sqrt(((measured[of_a] - measured[~of_a].mean()) ** 2).mean())
    found = per_section[(per_section["model"] == names[0]) & (per_section["section"] == "A")].set_index("name")["rmse"]
    np.testing.assert_allclose(found[error.index], error, rtol=1e-4)


def test_baselines_by_name(sdata: SpatialData) -> None:
    names = ["ridge on mean OD", "mean of training spots"]
    cv = cross_validate(sdata, {"mine": mean}, group_key="section", baselines=names)
    assert list(pd.unique(cv["model"])) == [*names[::-1], "mine"]
    with pytest.raises(ValueError, match=r"`baselines` names \['magic'\]; known are \['mean of training spots'"):
        cross_validate(sdata, baselines=["magic"])


def of_spots(xy: np.ndarray, values: np.ndarray, radius: float) -> SpatialData:
    """One section without an image."""
    obs = pd.DataFrame({"region": pd.Categorical(["spots"] * len(xy)), "spot": np.arange(len(xy))})
    table = AnnData(sparse.csr_matrix(values.astype(np.float32)), obs=obs.set_index(obs.index.astype(str)))
    table.obsm["spatial"] = xy
    table = TableModel.parse(table, region="spots", region_key="region", instance_key="spot")
    return SpatialData(shapes={"spots": ShapesModel.parse(xy, geometry=0, radius=radius)}, tables={"table": table})


def waves() -> SpatialData:
    """Genes that are smooth over some spots, and noise."""
    rng = np.random.default_rng(0)
    xy = np.indices((40, 20)).reshape(2, -1).T.astype(float)
    maps = np.cos(xy @ rng.normal(0, 0.3, (2, 40)) + rng.uniform(0, 6, 40)) @ rng.normal(size=(40, 4))
    return of_spots(xy, 50 + maps + rng.normal(size=maps.shape), 0.25)


def c2(her2st_dir: Path) -> SpatialData:
    """The 15 highest genes of a real section."""
    counts = pd.read_csv(her2st_dir / "her2st" / "ST-cnts" / "C2.tsv.gz", sep="\t", index_col=0)
    spots = pd.read_csv(her2st_dir / "her2st" / "ST-spotfiles" / "C2_selection.tsv", sep="\t")
    spots = spots.set_index(spots["x"].astype(str) + "x" + spots["y"].astype(str))
    counts = counts.loc[counts.index.intersection(spots.index)]
    values = np.log1p(1e4 * counts.to_numpy() / counts.to_numpy().sum(axis=1, keepdims=True))
    xy = spots.loc[counts.index, ["pixel_x", "pixel_y"]].to_numpy(dtype=float)
    pitch = float(np.median(np.asarray(cKDTree(xy).query(xy, k=2)[0])[:, 1]))
    return of_spots(xy, values[:, np.argsort(-values.mean(axis=0))[:15]], pitch / 4)


@pytest.mark.parametrize("make", [waves, c2])
def test_position_knows_nothing_of_places_that_it_has_not_seen(
    request: pytest.FixtureRequest, make: Callable[..., SpatialData]
) -> None:
    """Beside a block that is held out, it may know a little; beyond, it falls back to the mean of training spots."""
    sdata = make() if make is waves else make(request.getfixturevalue("her2st_dir"))

    def ratio(**options: Any) -> np.ndarray:
        names = ["mean of training spots", "position"]
        cv = cross_validate(sdata, {"mean": mean}, baselines=names, inplace=False, **options)
        rows = cv[(cv["of"] == "gene") & cv["section"].str.contains("spots")]
        squares = (rows["rmse"] ** 2).groupby([rows["section"], rows["model"]], observed=True).mean().unstack()
        return np.asarray(np.sqrt(squares["position"] / squares["mean of training spots"]))

    assert ratio(split="random").mean() < 0.99
    assert ratio(split="blocks", margin=0).max() < 1.1
    assert ratio(split="blocks", margin=6.2).max() < 1.1


# What leaks


def noise(seed: int = 0) -> SpatialData:
    """One section; half of the genes are smooth maps, the others independent between spots. There is no image."""
    rng = np.random.default_rng(seed)
    xy = np.indices((20, 20)).reshape(2, -1).T * 100.0
    covariance = np.exp(-((cdist(xy, xy) / 250) ** 2)) + 0.02 * np.eye(len(xy))
    values = rng.multivariate_normal(np.zeros(len(xy)), covariance, 40).T
    values[:, ::2] = rng.normal(size=values[:, ::2].shape)
    sdata = of_spots(xy, values - values.min() + 0.1, 30)
    sdata["table"].var["smooth"] = np.arange(40) % 2 == 1
    return sdata


def test_a_model_that_memorises_is_found_out_by_blocks(log: io.StringIO) -> None:
    sdata = noise()

    def median_pcc(split: str) -> pd.Series:
        cv = cross_validate(sdata, {"nearest": nearest}, split=split, baselines=False, inplace=False)
        of_genes = cv[(cv["of"] == "gene") & (cv["section"] == "mean of sections")].set_index("name")
        return of_genes["pcc"].groupby(sdata["table"].var["smooth"]).median()

    random, blocks = median_pcc("random"), median_pcc("blocks")
    assert "Random spots leak" in log.getvalue()
    assert random[True] > 0.5  # neighbours tell, though there is nothing to be learned from the image
    assert abs(blocks[True]) < 0.15
    # What is independent between spots cannot leak from one to the other.
    assert abs(random[False]) < 0.1
    assert abs(blocks[False]) < 0.1


def test_held_out_expression_cannot_be_read(sdata: SpatialData) -> None:
    def peeks(sdata: SpatialData, *, train_key: str, key_added: str, genes: list[str]) -> None:
        table = sdata["table"]
        table.layers[key_added] = table.X.toarray()

    with pytest.raises(ValueError, match="peeks") as caught:
        cross_validate(sdata, {"peeks": peeks}, group_key="section", baselines=False)
    assert "NaN" in str(caught.value) or "no predictions" in str(caught.value)


def test_genes_are_chosen_in_each_fold(sdata: SpatialData) -> None:
    seen: list[list[str]] = []

    def spy(sdata: SpatialData, *, train_key: str, key_added: str, genes: list[str]) -> None:
        seen.append(genes)
        values = np.full(sdata["table"].shape, np.nan)
        values[:, sdata["table"].var_names.get_indexer(genes)] = np.random.default_rng(0).normal(size=len(genes))
        sdata["table"].layers[key_added] = values

    table = sdata["table"]
    table.var["highly_variable"] = table.var_names == "gene1"
    values = table.X.toarray()
    values[(table.obs["section"] == "A").to_numpy(), 2] += 40  # of highest mean, but for A's sake alone
    table.X = sparse.csr_matrix(values)
    cross_validate(sdata, {"spy": spy}, group_key="section", genes=3, baselines=False, inplace=False)
    assert "gene2" not in seen[0]
    assert "gene2" in seen[1]


def test_highly_variable_genes_are_found_anew(make_sdata: MakeSData) -> None:
    seen: list[set[str]] = []

    def spy(sdata: SpatialData, *, train_key: str, key_added: str, genes: list[str]) -> None:
        seen.append(set(genes))
        sdata["table"].layers[key_added] = np.zeros(sdata["table"].shape)

    sdata = make_sdata(2, n_spots=20, n_genes=200)
    table = sdata["table"]
    table.X = sparse.csr_matrix(np.random.default_rng(0).gamma(1, 0.5, table.shape).astype(np.float32))
    table.var["highly_variable"] = table.var_names == "gene5"  # found with all spots: of no use to a fold

    cross_validate(sdata, {"spy": spy}, group_key="section", genes="highly_variable", baselines=False, inplace=False)

    for genes, held_out in zip(seen, ("A", "B"), strict=True):
        training = ad.AnnData(table.X[(table.obs["section"] != held_out).to_numpy()], var=table.var[[]])
        sc.pp.highly_variable_genes(training)
        assert genes == set(training.var_names[training.var["highly_variable"]])
    assert seen[0] != seen[1]


def test_spots_beside_the_tissue_are_not_seen(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.obs["in_tissue"] = (np.arange(table.n_obs) % 3 > 0).astype(int)
    beside = table.obs["in_tissue"].to_numpy() == 0
    seen: list[np.ndarray] = []

    def spy(sdata: SpatialData, *, train_key: str, **arguments: Any) -> None:
        seen.append(sdata["table"].obs[train_key].to_numpy())
        mean(sdata, train_key=train_key, layer=None, **{k: arguments[k] for k in ("key_added", "genes")})

    cv = cross_validate(sdata, {"spy": spy}, baselines=["mean of training spots"])
    assert not np.any(seen, axis=0)[beside].any()
    assert np.isnan(table.layers["spy_cv"][beside]).all()
    assert set(cv.loc[cv["of"] == "spot", "name"]) == set(table.obs_names[~beside])


@pytest.mark.parametrize("split", ["groups", "blocks"])
def test_the_layer_scores_as_the_frame_does(sdata: SpatialData, split: str) -> None:
    models = {"ridge": partial(stp.tl.fit_ridge, features="mean_od")}
    cv = cross_validate(sdata, models, split=split, n_folds=2, margin=0, baselines=False)
    scores = stp.tl.score(sdata, key="ridge_cv", section_key="section", **QUICK)
    keys = ["of", "name", "section"]
    both = scores.merge(cv, on=keys, suffixes=("", "_cv"))
    assert len(both) == len(scores) == len(cv)
    np.testing.assert_allclose(both["pcc"], both["pcc_cv"], rtol=1e-6)
    assert ("A · block 1" in set(scores["section"])) == (split == "blocks")


# Protocols


def test_pooled_protocol_correlates_over_the_fold(sdata: SpatialData) -> None:
    table = sdata["table"]
    rng = np.random.default_rng(0)
    table.layers["counts"] = sparse.csr_matrix(rng.poisson(20 * table.X.toarray()).astype(np.float32))
    cv = cross_validate(sdata, protocol="hest", baselines=False)
    of_gene = cv[(cv["of"] == "gene") & (cv["section"] == "first")].set_index("name")["pcc"]
    test = (table.obs["patient"] == "first").to_numpy()
    measured = np.log1p(table.layers["counts"].toarray()[test])
    expected = [np.corrcoef(*pair)[0, 1] for pair in zip(measured.T, table.layers["nsl_cv"][test].T, strict=True)]
    np.testing.assert_allclose(of_gene[table.var_names], expected, rtol=1e-4)


def test_unknown_protocol(sdata: SpatialData) -> None:
    with pytest.raises(ValueError, match=r"`protocol` is 'mine'; expected one of \['default', 'm2ost', 'hest'\]"):
        cross_validate(sdata, protocol="mine")


# What models are given, and what they are called


def test_models_are_given_what_is_documented(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.layers["logged"] = table.X * 2
    expected = cross_validate(sdata, {"mean": mean}, baselines=False, inplace=False)
    doubled = cross_validate(sdata, {"mean": mean}, baselines=False, layer="logged")
    np.testing.assert_allclose(doubled["rmse"], 2 * expected["rmse"], rtol=1e-5)
    assert table.uns["mean_cv"]["params"]["layer"] == "logged"


def test_elements_are_passed_on_where_they_are_asked_for(sdata: SpatialData) -> None:
    images = {f"{name}_spots": f"{name}_image" for name in "AB"}
    asked = {"image_key": images, "shapes_key": ["A_spots", "B_spots"], "coordinate_system": None}
    seen: dict[str, Any] = {}

    def named(sdata: SpatialData, *, image_key: Any, coordinate_system: Any, patient_key: Any, **rest: Any) -> None:
        seen.update(rest, image_key=image_key, coordinate_system=coordinate_system, patient_key=patient_key)
        mean(sdata, layer=None, **{key: rest[key] for key in ("train_key", "key_added", "genes")})

    def with_defaults(
        sdata: SpatialData, *, train_key: str, key_added: str, genes: list[str], layer: str = "counts", table_key: str = "?",
        coordinate_system: str = "mine",
    ) -> None:  # fmt: skip
        seen["defaults"] = layer, table_key, coordinate_system
        mean(sdata, train_key=train_key, key_added=key_added, genes=genes, layer=layer)

    cross_validate(sdata, {"named": named, "defaults": with_defaults}, baselines=False, **asked)
    assert seen["image_key"] == images and seen["shapes_key"] == ("A_spots", "B_spots")
    assert (seen["coordinate_system"], seen["patient_key"], seen["table_key"]) == (None, "patient", "table")
    assert "layer" not in seen and "section_key" not in seen
    assert seen["defaults"] == (None, "table", "mine")


def test_partials_keep_their_own_elements(sdata: SpatialData, new_image: Callable[..., Any]) -> None:
    blank = np.tile(np.arange(230, dtype=np.uint8), (3, 200, 1))
    for name in "ABC":
        sdata[f"{name}_other"] = new_image(blank, {name: sdata["A_image"].attrs["transform"]["A"]})
    ours, others = ({f"{name}_spots": f"{name}_{kind}" for name in "ABC"} for kind in ("image", "other"))
    fit = partial(stp.tl.fit_ridge, features="mean_od", alpha=1.0)
    models = {"ours": partial(fit, image_key=ours), "others": partial(fit, image_key=others)}
    cross_validate(sdata, models, baselines=False, image_key=None)
    table = sdata["table"]
    assert not np.allclose(table.layers["ours_cv"], table.layers["others_cv"])
    cross_validate(sdata, {"ours": fit}, baselines=False, image_key=others)
    np.testing.assert_array_equal(table.layers["ours_cv"], table.layers["others_cv"])


def test_any_name_that_has_a_key_of_its_own(sdata: SpatialData) -> None:
    names = {"my model: β=1": "my_model__β_1_cv", "a/b": "a_b_cv", "CNN (v2.1)": "CNN__v2.1__cv"}
    cv = cross_validate(sdata, dict.fromkeys(names, mean), baselines=False)
    assert list(pd.unique(cv["model"])) == list(names)
    table = sdata["table"]
    for name, key in names.items():
        assert key in table.layers and f"{key}_fold" in table.obs and f"{key}_fitted" in table.var
        assert table.uns[key]["params"]["model"] == name
    for same in ("a b", "A/B"):
        with pytest.raises(ValueError, match="Two models would write to the key"):
            cross_validate(sdata, {"a/b": mean, same: mean}, baselines=False)


def test_the_margin_follows_from_what_models_read(sdata: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    from stpredict.tl.evaluation.runs import _cross_validate

    sdata["table"].obsm["uni"] = np.random.default_rng(0).normal(size=(72, 3))

    def told(_: Any, *, margin: float, **options: Any) -> None:
        raise RuntimeError(margin)

    monkeypatch.setattr(_cross_validate, "make_folds", told)

    def apart(baselines: Any = False, margin: float | None = None, **models: Any) -> float:
        with pytest.raises(RuntimeError) as caught:
            cross_validate(sdata, models, split="blocks", baselines=baselines, margin=margin)
        return float(caught.value.args[0])

    ridge = partial(stp.tl.fit_ridge, alpha=1.0)
    m2ost = partial(stp.tl.fit_m2ost, preset="tiny", network_kwargs={"levels": 2})
    assert apart(nsl=stp.tl.fit_nsl) == 2
    assert apart(nsl=stp.tl.fit_nsl, margin=0.5) == 0.5
    assert apart(nsl=partial(partial(stp.tl.fit_nsl, spot_scale=1.0, genes=["gene0"]), spot_scale=1.5)) == 1.5
    assert apart(ridge=partial(ridge, features="position")) == 0
    assert apart(nsl=stp.tl.fit_nsl, baselines="ridge on color statistics") == 6
    assert apart(m2ost=m2ost) == pytest.approx(3.08)
    assert apart(m2ost=partial(m2ost, network_kwargs={"levels": 3})) == pytest.approx(6.16)
    assert apart(ridge=partial(ridge, features="uni")) == 6.2  # nobody knows what it was made of
    assert apart(mine=mean, nsl=stp.tl.fit_nsl) == 6.2
    assert apart(mine=mean, nsl=partial(stp.tl.fit_nsl, spot_scale=8)) == 8


def test_each_thing_is_said_once(make_sdata: MakeSData, log: io.StringIO) -> None:
    sdata = make_sdata(1, n_spots=40, n_genes=3, size=(150, 170), n_without_spot=2)
    set_transformation(sdata["A_spots"], Translation([30, 0], axes=("x", "y")), "A")
    models = {"nsl": stp.tl.fit_nsl, "ridge": partial(stp.tl.fit_ridge, features="mean_od")}
    cross_validate(sdata, models, n_folds=2, margin=0, baselines="ridge on mean OD")
    said = log.getvalue().splitlines()
    assert [line for line, n in Counter(said).items() if n > 1] == []
    assert sum("lie off the image" in line for line in said) == 1
    assert sum("have no spot in `sdata.shapes`" in line for line in said) == 1
    stp.tl.fit_nsl(sdata)
    assert any("lie off the image" in line for line in log.getvalue().splitlines()[len(said) :])


def test_pixels_are_read_once(
    three: SpatialData, tmp_path: Path, to_backed: Callable[..., SpatialData], chunk_reads: Counter[str]
) -> None:
    sdata = to_backed(
        SpatialData(images=dict(three.images), shapes=dict(three.shapes), tables=dict(three.tables)),
        tmp_path / "a.zarr",
    )
    chunk_reads.clear()
    ridge = partial(stp.tl.fit_ridge, features="color_histogram")
    models = {"nsl": stp.tl.fit_nsl, "wide": partial(stp.tl.fit_nsl, spot_scale=3.0), "ridge": ridge}
    cross_validate(sdata, models, genes=["gene0"])
    of_images = {key: n for key, n in chunk_reads.items() if "/images/" in key}
    assert len(of_images) == 3 * 2 * 2  # chunks of 128 pixels
    assert set(of_images.values()) == {1}


def test_the_same_model_is_fitted_once(sdata: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = count_fits(monkeypatch)
    same = partial(stp.tl.fit_ridge, features="mean_od")
    cross_validate(sdata, {"same": same, "other": partial(same, alpha=3.0)}, baselines=["ridge on mean OD"])
    assert fitted == Counter({"ridge on mean OD": 2, "other": 2})
    table = sdata["table"]
    assert np.isfinite(table.layers["same_cv"]).all() and not np.allclose(
        table.layers["same_cv"], table.layers["other_cv"]
    )


def count_fits(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each model is fitted from now on."""
    from stpredict.tl.evaluation.runs import _jobs

    fits: Counter[str] = Counter()
    original = _jobs._fit_fold

    def counted(*arguments: Any) -> np.ndarray:
        fits[arguments[2]] += 1
        return original(*arguments)

    monkeypatch.setattr(_jobs, "_fit_fold", counted)
    return fits


def test_folds_on_a_cluster_give_the_same(sdata: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are threads here, and what goes to them is pickled as for other machines."""
    distributed = pytest.importorskip("distributed")
    cloudpickle = pytest.importorskip("cloudpickle")
    options: dict[str, Any] = {"group_key": "section", "baselines": ["ridge on mean OD"], "inplace": False}
    models = {"mine": lambda sdata, **rest: stp.tl.fit_ridge(sdata, features="color_histogram", **rest), "mean": mean}
    here = cross_validate(sdata, models, **options)
    scatter, submit = distributed.Client.scatter, distributed.Client.submit

    def travelled(value: Any) -> Any:
        return value if isinstance(value, distributed.Future) else pickle.loads(cloudpickle.dumps(value))

    monkeypatch.setattr(
        distributed.Client, "scatter", lambda self, value, **how: scatter(self, travelled(value), **how)
    )
    monkeypatch.setattr(
        distributed.Client, "submit", lambda self, *values, **how: submit(self, *map(travelled, values), **how)
    )
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        there = cross_validate(sdata, models, client=client, **options)
    pd.testing.assert_frame_equal(here, there)


# What is written


def test_columns_of_the_user_stay(sdata: SpatialData) -> None:
    table = sdata["table"]
    n = table.n_obs
    table.obs = table.obs.assign(cv_fold=np.arange(n), cv_train="mine", cv=1.5, fold="b", cv_spots=True, nsl_fold=2)
    table.var = table.var.assign(cv_fitted="mine", nsl_fitted=np.arange(6))
    table.obsm["cv_features"], table.uns["cv"], table.layers["cv"] = np.ones((n, 2)), {"mine": 1}, np.ones(table.shape)
    before = table.copy()
    cross_validate(sdata, {"nsl": partial(stp.tl.fit_ridge, features="position"), "mean": mean}, baselines="position")
    added = {f"{name}_cv_{kind}" for name in ("nsl", "mean") for kind in ("fold", "fitted")}
    pd.testing.assert_frame_equal(table.obs.drop(columns=added, errors="ignore"), before.obs)
    pd.testing.assert_frame_equal(table.var.drop(columns=added, errors="ignore"), before.var)
    assert set(table.uns) - set(before.uns) == set(table.layers) - set(before.layers) == {"nsl_cv", "mean_cv"}
    assert set(table.obsm) == set(before.obsm)
    np.testing.assert_array_equal(table.layers["cv"], 1)
    for place in ("obs", "var"):
        name = {"obs": "mean_cv_fold", "var": "mean_cv_fitted"}[place]
        theirs = before.copy()
        getattr(theirs, place)[name] = "mine"
        other = SpatialData(images=dict(sdata.images), shapes=dict(sdata.shapes), tables={"table": theirs})
        with pytest.raises(ValueError, match=rf"`{place}\['{name}'\]` exists and holds no result of stpredict"):
            cross_validate(other, {"mean": fails}, baselines=False)
        assert (getattr(theirs, place)[name] == "mine").all()


def test_a_second_run_does_not_change_how_the_first_is_scored(sdata: SpatialData) -> None:
    table = sdata["table"]
    options: dict[str, Any] = {"section_key": "section", **QUICK}
    cross_validate(sdata, {"first": mean}, group_key="section", baselines=False)
    folds, before = table.obs["first_cv_fold"].copy(), stp.tl.score(sdata, key="first_cv", **options)
    cross_validate(sdata, {"second": mean}, split="blocks", n_folds=3, margin=0, baselines=False)
    pd.testing.assert_series_equal(table.obs["first_cv_fold"], folds)
    pd.testing.assert_frame_equal(stp.tl.score(sdata, key="first_cv", **options), before)
    assert "A · block 1" in set(stp.tl.score(sdata, key="second_cv", **options)["section"])
    cross_validate(sdata, {"first": mean}, split="blocks", n_folds=3, margin=0, baselines=False)
    assert "first_cv_pcc" not in table.var and "second_cv_pcc" in table.var  # scores of what is no longer there


def test_results_survive_the_disk(sdata: SpatialData, tmp_path: Path) -> None:
    cross_validate(sdata, {"my model": mean}, baselines=False)
    table = sdata["table"]
    table.write_h5ad(tmp_path / "table.h5ad")
    read = ad.read_h5ad(tmp_path / "table.h5ad")
    read.obsm["spatial"] = np.random.default_rng(0).normal(size=(table.n_obs, 2))
    frames = [stp.tl.score(each, key="my_model_cv", **QUICK) for each in (sdata, read)]
    pd.testing.assert_series_equal(frames[0]["rmse"], frames[1]["rmse"])


@pytest.mark.parametrize("moment", ["fit", "second fit", "score", "write"])
def test_ctrl_c_leaves_the_table_as_it_was(sdata: SpatialData, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    from stpredict.tl.evaluation.runs import _cross_validate

    table = sdata["table"]
    cross_validate(sdata, {"mean": mean}, baselines=False)
    layer, before = table.layers["mean_cv"].copy(), contents(sdata)
    calls = 0

    def pressed(sdata: SpatialData, **arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if moment == ("fit" if calls == 1 else "second fit"):
            signal.raise_signal(signal.SIGINT)
        mean(sdata, **{key: arguments[key] for key in ("train_key", "key_added", "genes")}, layer=None)

    def during(name: str) -> None:
        original = getattr(_cross_validate, name)

        def interrupted(*arguments: Any, **options: Any) -> Any:
            with interrupted_at(40):
                return original(*arguments, **options)

        monkeypatch.setattr(_cross_validate, name, interrupted)

    if moment in ("score", "write"):
        during({"score": "score_predictions", "write": "write_all"}[moment])
    table.X = table.X * 3
    with pytest.raises(KeyboardInterrupt):
        cross_validate(sdata, {"mean": pressed, "another": pressed}, baselines=False)
    assert contents(sdata) == before
    np.testing.assert_array_equal(table.layers["mean_cv"], layer)


def interrupted_at(moment: int) -> Any:
    """Ctrl-C when the main thread enters or leaves a function for the n-th time."""
    events = 0

    def count(*_: Any) -> None:
        nonlocal events
        events += 1
        if events == moment:
            signal.raise_signal(signal.SIGINT)

    @contextmanager
    def profiled() -> Iterator[None]:
        sys.setprofile(count)
        try:
            yield
        finally:
            sys.setprofile(None)

    return profiled()


# What goes wrong


def fails(sdata: SpatialData, *, train_key: str, key_added: str) -> None:
    raise OSError("the disk is full")


def test_errors_name_model_and_fold_and_write_nothing(sdata: SpatialData) -> None:
    before = contents(sdata)
    with pytest.raises(OSError, match="the disk is full") as caught:
        cross_validate(sdata, {"fails": fails}, group_key="section", baselines=False)
    assert caught.value.__notes__ == ["This happened to 'fails' in the fold that holds out 'A'."]
    assert contents(sdata) == before


def test_models_that_write_nothing(sdata: SpatialData) -> None:
    with pytest.raises(ValueError, match=r"The model 'idle' wrote no `layers\[key_added\]`"):
        cross_validate(sdata, {"idle": lambda sdata, **_: None}, group_key="section", baselines=False)


@pytest.mark.parametrize(
    ("models", "error", "message"),
    [
        ({}, TypeError, r"`models` is \{\}; expected functions by name"),
        (stp.tl.fit_nsl, TypeError, "expected functions by name, such as"),
        ({"nsl": "fit_nsl"}, TypeError, "The model 'nsl' is str, not a function"),
        ({"position": stp.tl.fit_nsl}, ValueError, "'position' is the name of a baseline"),
        ({1: stp.tl.fit_nsl}, TypeError, "`models` names a model 1; expected a string"),
        ({"nsl": partial(stp.tl.fit_nsl, layer="counts")}, ValueError, "'nsl' sets `layer` to 'counts'.*`layer` of `cross_validate`"),
    ],
)  # fmt: skip
def test_models_that_are_none(sdata: SpatialData, models: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stp.tl.cross_validate(sdata, models)


def test_unknown_layer(sdata: SpatialData) -> None:
    with pytest.raises(KeyError, match="No layer 'tpm' in the table"):
        cross_validate(sdata, layer="tpm")
