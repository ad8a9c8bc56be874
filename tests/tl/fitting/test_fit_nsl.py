from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import TableModel
from spatialdata.transformations import Identity, Scale, Translation, set_transformation

import stpredict as stp
from stpredict._data import slots
from stpredict._data.compat import layer_names
from stpredict.models import NSL
from stpredict.models.nsl import _solver
from stpredict.models.nsl._stains import RUIFROK_JOHNSTON, stain_matrix
from stpredict.pp import _reads

MakeSData = Callable[..., SpatialData]
LEARNED = ["stain_matrix", "weights", "direction", "intercept", "loss", "n_iter", "converged", "reference"]


def keys(table: AnnData) -> dict[str, list[str]]:
    slots = ("obs", "var", "uns", "obsm", "varm", "layers", "obsp")
    return {slot: sorted(set(getattr(table, slot)) - {None}) for slot in slots}


def with_training(sdata: SpatialData, held_out: str = "B") -> SpatialData:
    sdata["table"].obs["train"] = (sdata["table"].obs["section"] != held_out).to_numpy()
    return sdata


def assert_same(a: NSL, b: NSL) -> None:
    assert a.genes == b.genes
    for name in LEARNED:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def histogram_of(sdata: SpatialData, **options: Any) -> stp.pp.ColorHistogram:
    histogram = stp.pp.color_histogram(sdata, inplace=False, **options)
    assert histogram is not None
    return histogram


# What is written


def test_slots(make_sdata: MakeSData) -> None:
    sdata = with_training(make_sdata(2, n_without_row=2))
    set_transformation(sdata["B_spots"], Translation([100, 0], axes=("x", "y")), "B")
    table = sdata["table"]
    genes = ["gene4", "gene0", "gene7"]
    before = keys(table)
    model = stp.tl.fit_nsl(sdata, genes=genes, train_key="train", spot_scale=1.0)

    layer = table.layers["nsl"]
    assert layer.dtype == np.float32
    assert layer.shape == table.shape
    off = histogram_of(sdata, spot_scale=1.0).n_pixels == 0
    assert 0 < off.sum() < 28
    fitted = table.var_names.isin(genes)
    np.testing.assert_array_equal(np.isnan(layer), off[:, None] | ~fitted)
    np.testing.assert_array_equal(table.var["nsl_fitted"], fitted)
    np.testing.assert_array_equal(table.obs["nsl_train"], table.obs["train"])

    learned = table.uns["nsl"]
    assert learned["genes"].tolist() == genes == model.genes
    shapes = {"stain_matrix": (3, 3, 3), "weights": (3, 2), "direction": (3, 3), "reference": (3, 3)}
    for name in LEARNED:
        assert learned[name].shape == shapes.get(name, (3,))
        np.testing.assert_array_equal(learned[name], getattr(model, name))
    assert {"model": "nsl", "train_key": "train", "n_train": 28, "layer": "X"}.items() <= learned["params"].items()
    assert model.reads == {"kind": "histogram", "bits": 5, "spot_scale": 1.0}
    assert len(model.seen) == 28

    pixels = sdata["A_spots"].loc[table.obs["spot_id"][:28]].geometry
    np.testing.assert_allclose(table.obsm["spatial"][:28], np.column_stack([pixels.x, pixels.y]))
    added = {slot: set(names) - set(before[slot]) for slot, names in keys(table).items()}
    assert added == {
        "layers": {"nsl"},
        "var": {"nsl_fitted"},
        "obs": {"nsl_train"},
        "uns": {"nsl"},
        "obsm": {"spatial"},
        "varm": set(),
        "obsp": set(),
    }


def test_columns_of_the_user_stay(make_sdata: MakeSData) -> None:
    sdata = make_sdata(n_spots=16, n_genes=4)
    table = sdata["table"]
    table.obs = table.obs.assign(coverage="mine", n_pixels=-1, nsl_fold=np.arange(16) % 3, in_tissue=1)
    table.obsm = {"spatial": np.zeros((16, 2)), "mean_od": np.ones((16, 2)), "color_histogram": np.ones((16, 1))}
    before = table.copy()
    stp.tl.fit_nsl(sdata)
    pd.testing.assert_frame_equal(table.obs.drop(columns="nsl_train"), before.obs)
    for name in before.obsm:
        np.testing.assert_array_equal(table.obsm[name], before.obsm[name])
    with pytest.warns(UserWarning, match="was fitted to all spots"):  # the user's nsl_fold tells nothing of it
        stp.tl.score(sdata, n_perms=0, n_bootstrap=0)


def test_predictions_are_those_of_the_model(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    model = stp.tl.fit_nsl(sdata, genes=["gene0", "gene5"])
    histogram = histogram_of(sdata)
    shares = sparse.csr_matrix(histogram.counts / histogram.n_pixels[:, None])
    expected = model.predict(shares, histogram.od)
    np.testing.assert_allclose(sdata["table"][:, ["gene0", "gene5"]].layers["nsl"], expected, atol=1e-4)


def test_what_follows_the_stains_is_predicted(make_sdata: MakeSData) -> None:
    sdata = with_training(make_sdata(3, size=(420, 420), n_spots=64))
    stp.tl.fit_nsl(sdata, train_key="train")
    table = sdata["table"][sdata["table"].obs["section"] == "B"]
    pcc = [np.corrcoef(table.layers["nsl"][:, j], table.X[:, [j]].toarray().ravel())[0, 1] for j in range(12)]
    assert min(np.delete(pcc, [3, 7, 11])) > 0.75  # genes 3, 7 and 11 are noise
    assert np.abs(np.array(pcc)[[3, 7, 11]]).max() < 0.5


def test_own_key_and_layer(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    table = sdata["table"]
    table.layers["double"] = 2 * table.X
    once, twice = stp.tl.fit_nsl(sdata), stp.tl.fit_nsl(sdata, layer="double", key_added="nsl_2")
    assert {"nsl", "nsl_2", "double"} == set(table.layers) - {None}
    np.testing.assert_allclose(table.layers["nsl_2"], 2 * table.layers["nsl"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(twice.loss, once.loss, atol=1e-5)
    assert twice.params["layer"] == "double"


def test_not_in_place_leaves_the_table_alone(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    before = keys(sdata["table"])
    model = stp.tl.fit_nsl(sdata, inplace=False)
    assert keys(sdata["table"]) == before
    assert_same(model, stp.tl.fit_nsl(sdata))


def test_shared_stains(make_sdata: MakeSData) -> None:
    model = stp.tl.fit_nsl(make_sdata(), stains="shared")
    assert (model.stain_matrix == model.stain_matrix[0]).all()
    assert model.params["stains"] == "shared"
    assert "shared" in repr(model)


# Held-out rows


def test_held_out_expression_is_never_looked_at(make_sdata: MakeSData) -> None:
    options: dict[str, Any] = {"train_key": "train", "genes": None}
    for options["genes"] in (None, "highly_variable"):
        clean = with_training(make_sdata(2, n_genes=40))
        expected = stp.tl.fit_nsl(clean, **options)
        for garbage in (np.nan, -1e30):
            sdata = with_training(make_sdata(2, n_genes=40))
            table = sdata["table"]
            values = table.X.toarray()
            values[~table.obs["train"].to_numpy()] = garbage
            table.X = sparse.csr_matrix(values)
            assert_same(stp.tl.fit_nsl(sdata, **options), expected)
            np.testing.assert_array_equal(table.layers["nsl"], clean["table"].layers["nsl"])
            assert np.isfinite(table[~table.obs["train"]].layers["nsl"][:, table.var["nsl_fitted"]]).all()


def test_held_out_pixels_are_not_looked_at_either(make_sdata: MakeSData) -> None:
    two = with_training(make_sdata(2))
    alone = make_sdata(1)
    a, b = stp.tl.fit_nsl(two, train_key="train", reference="macenko"), stp.tl.fit_nsl(alone, reference="macenko")
    np.testing.assert_allclose(a.reference, b.reference)
    np.testing.assert_allclose(a.stain_matrix, b.stain_matrix, atol=1e-2)
    np.testing.assert_allclose(a.loss, b.loss, atol=1e-4)
    np.testing.assert_allclose(
        two["table"][two["table"].obs["train"]].layers["nsl"], alone["table"].layers["nsl"], atol=1e-2
    )


def test_row_order_does_not_matter(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    model = stp.tl.fit_nsl(sdata)
    again = make_sdata()
    again["table"] = again["table"][np.random.default_rng(5).permutation(30)].copy()
    other = stp.tl.fit_nsl(again)
    np.testing.assert_allclose(other.loss, model.loss, atol=1e-5)
    np.testing.assert_allclose(
        again["table"].layers["nsl"], sdata["table"][again["table"].obs_names].layers["nsl"], atol=2e-3
    )


def test_spots_off_the_image_are_left_out_of_the_fit(make_sdata: MakeSData, log: io.StringIO) -> None:
    sdata = make_sdata(n_spots=60)
    set_transformation(sdata["A_spots"], Translation([120, 0], axes=("x", "y")), "A")
    model = stp.tl.fit_nsl(sdata)
    table = sdata["table"]
    beyond = table.obsm["spatial"][:, 0] >= 330
    assert 0 < beyond.sum() < 30
    np.testing.assert_array_equal(table.obs["nsl_train"], ~beyond)
    assert model.params["n_train"] == 60 - beyond.sum()
    assert f"{beyond.sum()} training spots lack a spot, pixels or a feature and are left out" in log.getvalue()


def test_spots_that_hold_no_pixel_are_left_out_of_the_fit(make_sdata: MakeSData) -> None:
    sdata = make_sdata(n_spots=48)
    sdata["A_spots"].iloc[:10, sdata["A_spots"].columns.get_loc("radius")] = 0.01
    model = stp.tl.fit_nsl(sdata, spot_scale=1.0)
    empty = histogram_of(sdata, spot_scale=1.0).n_pixels == 0
    assert 0 < empty.sum() <= 10
    assert model.params["n_train"] == 48 - empty.sum()
    np.testing.assert_array_equal(np.isnan(sdata["table"].layers["nsl"]).all(axis=1), empty)


def test_spots_beside_the_tissue_are_predicted_but_not_fitted_to(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    table = sdata["table"]
    clean = stp.tl.fit_nsl(make_sdata(), genes=["gene0"], inplace=False)
    table.obs["in_tissue"] = (np.arange(30) >= 5).astype(int)
    table.X = sparse.csr_matrix(np.where(np.arange(30)[:, None] < 5, 1e6, table.X.toarray()))
    model = stp.tl.fit_nsl(sdata, genes=["gene0"])
    assert (model.params["n_train"], clean.params["n_train"]) == (25, 30)
    np.testing.assert_array_equal(table.obs["nsl_train"], table.obs["in_tissue"] == 1)
    assert np.isfinite(table.layers["nsl"][:, 0]).all()
    assert table.layers["nsl"][:, 0].max() < 100


@pytest.mark.parametrize(("color", "bits"), [(255, 5), (0, 5), (128, 4)])
def test_blank_pictures(make_sdata: MakeSData, new_image: Callable[..., Any], color: int, bits: int) -> None:
    sdata = make_sdata(n_spots=16, n_genes=4)
    sdata["A_image"] = new_image(np.full((3, 290, 330), color, np.uint8), {"A": Identity()})
    before = keys(sdata["table"])
    with pytest.raises(ValueError, match="All 16 training spots have the same colors.*`image_key`"):
        stp.tl.fit_nsl(sdata, bits=bits)
    assert keys(sdata["table"]) == before


def test_training_spots_on_glass(make_sdata: MakeSData) -> None:
    sdata = with_training(make_sdata(2, n_spots=16, n_genes=4))
    sdata["A_image"] = sdata["A_image"].copy(data=sdata["A_image"].data * 0 + 255)
    with pytest.raises(ValueError, match="All 16 training spots have the same colors"):
        stp.tl.fit_nsl(sdata, train_key="train")
    stp.tl.fit_nsl(sdata)  # where half of them lie on tissue


# References


def test_references(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    ruifrok = stp.tl.fit_nsl(sdata, inplace=False)
    np.testing.assert_array_equal(ruifrok.reference, stain_matrix(RUIFROK_JOHNSTON))
    assert ruifrok.params["reference"] == "ruifrok"
    own = np.array([[0.6, 0.7, 0.4], [0.1, 0.9, 0.2]])
    given = stp.tl.fit_nsl(sdata, reference=own, inplace=False)
    np.testing.assert_allclose(given.reference, stain_matrix(own))
    assert given.params["reference"] == "given"
    macenko = stp.tl.fit_nsl(sdata, reference="macenko", inplace=False)
    assert macenko.params["reference"] == "macenko"
    cosine = (macenko.reference[:2] * stain_matrix(RUIFROK_JOHNSTON)[:2]).sum(axis=1)
    assert np.degrees(np.arccos(cosine)).max() < 20  # the sections are stained with these


def test_macenko_of_unstained_tissue(make_sdata: MakeSData, new_image: Callable[..., Any]) -> None:
    sdata = make_sdata()
    noise = np.random.default_rng(0).integers(240, 256, (3, 290, 330), dtype=np.uint8)
    sdata["A_image"] = new_image(noise, {"A": Identity()})
    with pytest.raises(ValueError, match="no pixel darker than background; give `reference` as an array"):
        stp.tl.fit_nsl(sdata, reference="macenko")


def test_macenko_of_what_is_no_he(make_sdata: MakeSData, new_image: Callable[..., Any]) -> None:
    sdata = make_sdata()
    gray = np.random.default_rng(0).integers(20, 200, (1, 290, 330), dtype=np.uint8).repeat(3, axis=0)
    sdata["A_image"] = new_image(gray, {"A": Identity()})
    with pytest.raises(ValueError, match=r"Macenko's method finds no plausible .* use reference='ruifrok' or give"):
        stp.tl.fit_nsl(sdata, reference="macenko")


def test_unknown_reference(make_sdata: MakeSData) -> None:
    with pytest.raises(ValueError, match="`reference` is 'vahadane'; expected 'ruifrok', 'macenko' or an array"):
        stp.tl.fit_nsl(make_sdata(), reference="vahadane")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected finite values of shape \(2, 3\) or \(3, 3\)"):
        stp.tl.fit_nsl(make_sdata(), reference=np.eye(2))


# Refitting


def without_pixels(sdata: SpatialData) -> SpatialData:
    """The same elements, whose pixels cannot be read any more."""

    def refuse(block: np.ndarray) -> np.ndarray:
        raise AssertionError("pixels were read")

    for key, image in list(sdata.images.items()):
        sdata.images[key] = image.copy(data=image.data.map_blocks(refuse, meta=np.empty((0, 0, 0), np.uint8)))
    return sdata


def test_colors_that_the_table_keeps_are_not_counted_again(make_sdata: MakeSData, tmp_path: Path) -> None:
    sdata = with_training(make_sdata(2))
    first = stp.tl.fit_nsl(sdata)
    stp.pp.color_histogram(sdata, key_added="colors")
    sdata["table"].write_h5ad(tmp_path / "table.h5ad")
    sdata["table"] = reparsed(ad.read_h5ad(tmp_path / "table.h5ad"), ["A_spots", "B_spots"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_reads, "read_pixels", count_nothing)
        assert_same(stp.tl.fit_nsl(sdata), first)
        stp.tl.fit_nsl(sdata, train_key="train", stains="shared", pull=0.5, genes=["gene1"], key_added="other")
        stp.tl.predict(sdata, first)
        for other in ({"spot_scale": 1.0}, {"bits": 4}, {"shapes_key": "A_spots"}):
            with pytest.raises(AssertionError, match="pixels were counted"):
                stp.tl.fit_nsl(sdata, **other)


def count_nothing(sections: Any, wanted: Any, n_obs: int) -> dict[Any, Any]:
    assert not wanted, "pixels were counted"
    return {}


@pytest.mark.parametrize("change", ["pixels", "channels", "places", "rows", "columns of it", "no codebook"])
def test_colors_that_the_table_keeps_of_something_else(make_sdata: MakeSData, change: str) -> None:
    def make(*, keep: bool) -> SpatialData:
        sdata = make_sdata(n_spots=16, n_genes=4)
        if keep:
            stp.pp.color_histogram(sdata)
        table = sdata["table"]
        if change == "pixels":
            sdata.images["A_image"] = sdata["A_image"].copy(data=sdata["A_image"].data // 2)
        elif change == "channels":
            sdata.images["A_image"] = sdata["A_image"].assign_coords(c=["b", "g", "r"])
        elif change == "places":
            set_transformation(sdata["A_spots"], Translation([9, 0], axes=("x", "y")), "A")
        elif change == "rows":
            sdata["table"] = table[np.arange(16)[::-1]].copy()
        elif change == "columns of it" and keep:
            table.obsm["color_histogram"] = table.obsm["color_histogram"][:, :-3]
        elif keep:
            del table.uns["color_histogram"]["codebook"]
        return sdata

    kept, fresh = make(keep=True), make(keep=False)
    assert_same(stp.tl.fit_nsl(kept), stp.tl.fit_nsl(fresh))
    np.testing.assert_array_equal(kept["table"].layers["nsl"], fresh["table"].layers["nsl"])


def test_a_replaced_picture_gives_new_predictions(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    model = stp.tl.fit_nsl(sdata)
    stp.pp.color_histogram(sdata)
    before = sdata["table"].layers["nsl"].copy()
    fresh = make_sdata()
    for slide in (sdata, fresh):
        slide.images["A_image"] = slide["A_image"].copy(data=(slide["A_image"].data * 0.6).astype(np.uint8))
        stp.tl.predict(slide, model)
    assert np.abs(sdata["table"].layers["nsl"] - before).max() > 0.1
    np.testing.assert_array_equal(sdata["table"].layers["nsl"], fresh["table"].layers["nsl"])


def test_refitting_replaces_all_that_was_written_under_the_key(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    table = sdata["table"]
    table.var["nsl_note"], table.obs["nsl_note"] = "mine", "mine"
    stp.tl.fit_nsl(sdata)
    stp.tl.fit_nsl(sdata, genes=["gene1", "gene2"], key_added="other")
    other = table.layers["other"].copy()
    stp.tl.score(sdata, key="nsl", spots="all", n_perms=20)
    stp.tl.score(sdata, key="other", spots="all", n_perms=0)
    assert "nsl_pvals" in table.var
    stp.tl.fit_nsl(sdata, genes=["gene0"])
    assert [name for name in table.var if name.startswith("nsl")] == ["nsl_note", "nsl_fitted"]
    assert [name for name in table.obs if name.startswith("nsl")] == ["nsl_note", "nsl_train"]
    assert "nsl_score" not in table.uns
    assert table.var_names[table.var["nsl_fitted"]].tolist() == ["gene0"]
    np.testing.assert_array_equal(np.isfinite(table.layers["nsl"]).any(axis=0), table.var["nsl_fitted"])
    np.testing.assert_array_equal(table.layers["other"], other)
    assert table.var["other_pcc"].notna().sum() == 2
    stp.tl.score(sdata, key="nsl", spots="all", n_perms=0)


@pytest.mark.parametrize(
    ("uns_merge", "merge"),
    [(None, None), ("same", "first"), ("unique", None), ("first", "first"), ("only", "first"), ("same", None)],
)
def test_refitting_after_concatenation(make_sdata: MakeSData, uns_merge: Any, merge: Any) -> None:
    sections = {name: section(make_sdata(2, n_spots=16, n_genes=4), name) for name in "AB"}
    for sdata in sections.values():
        stp.tl.fit_nsl(sdata)
        stp.tl.score(sdata, spots="all", n_perms=0)
    table = ad.concat([sdata["table"] for sdata in sections.values()], merge=merge, uns_merge=uns_merge)
    both = SpatialData(
        images={name: image for sdata in sections.values() for name, image in sdata.images.items()},
        shapes={name: spots for sdata in sections.values() for name, spots in sdata.shapes.items()},
    )
    both["table"] = reparsed(table, ["A_spots", "B_spots"])
    before = both["table"].copy()
    model = stp.tl.fit_nsl(both, genes=["gene1"])
    table = both["table"]
    assert model.params["n_train"] == 32
    assert table.obs["nsl_train"].all()
    np.testing.assert_array_equal(np.isfinite(table.layers["nsl"]).all(axis=0), table.var_names == "gene1")
    np.testing.assert_array_equal(table.uns["nsl"]["weights"], model.weights)
    expected = stp.tl.fit_nsl(make_sdata(2, n_spots=16, n_genes=4), genes=["gene1"])
    np.testing.assert_allclose(model.loss, expected.loss, atol=1e-5)
    assert (table.X != before.X).nnz == 0


def test_scores_and_fits_after_spatialdata_concatenate(make_sdata: MakeSData) -> None:
    a, b = (section(make_sdata(2, n_spots=16, n_genes=4), name) for name in "AB")
    model = stp.tl.fit_nsl(a)
    stp.tl.predict(b, model)
    for sdata in (a, b):
        stp.tl.score(sdata, spots="all", n_perms=0)
    both = sd.concatenate([a, b], concatenate_tables=True)
    table = both["table"]
    in_a = (table.obs["section"] == "A").to_numpy()
    np.testing.assert_array_equal(table.obs["nsl_train"], in_a)  # what the fit has written goes where the table goes
    scores = stp.tl.score(both, n_perms=0, n_bootstrap=0)
    assert set(scores["section"]) == {"B_spots", "mean of sections", "pooled"}
    np.testing.assert_array_equal(table.obs["nsl_pcc"].isna(), in_a)
    both = sd.concatenate([a, b], concatenate_tables=True)
    table = both["table"]
    stp.tl.predict(both, model)
    np.testing.assert_array_equal(table.obs["nsl_train"], in_a)
    assert "nsl_pcc" not in table.obs  # of the predictions that were there
    stp.tl.fit_nsl(both)
    assert table.obs["nsl_train"].all()


def section(sdata: SpatialData, name: str) -> SpatialData:
    """One of several sections, with its rows."""
    table = sdata["table"][(sdata["table"].obs["section"] == name).to_numpy()].copy()
    return SpatialData(
        images={f"{name}_image": sdata[f"{name}_image"]},
        shapes={f"{name}_spots": sdata[f"{name}_spots"]},
        tables={"table": reparsed(table, [f"{name}_spots"])},
    )


def reparsed(table: AnnData, region: list[str]) -> AnnData:
    table.uns.pop("spatialdata_attrs", None)
    table.obs["region"] = pd.Categorical(table.obs["region"].astype(str))
    return TableModel.parse(table, region=region, region_key="region", instance_key="spot_id")


# A table of the modeled genes alone


def test_a_table_of_its_own(make_sdata: MakeSData) -> None:
    sdata, expected = (with_training(make_sdata(2, n_without_row=2)) for _ in range(2))
    before = sdata["table"].copy()
    genes = ["gene4", "gene0"]
    model = stp.tl.fit_nsl(sdata, genes=genes, train_key="train", table_added="predicted")
    assert_same(stp.tl.fit_nsl(expected, genes=genes, train_key="train"), model)
    own, wide = sdata["predicted"], expected["table"]
    assert keys(sdata["table"]) == keys(before)
    assert own.var_names.tolist() == genes
    np.testing.assert_array_equal(own.X, wide[:, genes].layers["nsl"])
    np.testing.assert_array_equal(own.layers["nsl"], own.X)
    np.testing.assert_array_equal(own.obs["nsl_train"], wide.obs["nsl_train"])
    np.testing.assert_array_equal(own.obs[["region", "spot_id"]].to_numpy(), wide.obs[["region", "spot_id"]].to_numpy())
    np.testing.assert_allclose(own.obsm["spatial"], wide.obsm["spatial"])
    assert own.var["nsl_fitted"].all()
    with pytest.raises(ValueError, match="`table_added` is 'predicted', but there is an element 'predicted' already"):
        stp.tl.fit_nsl(sdata, table_key="table", table_added="predicted")


def test_layers_that_would_be_huge(make_sdata: MakeSData, monkeypatch: pytest.MonkeyPatch) -> None:
    sdata = make_sdata(n_spots=16, n_genes=8)
    monkeypatch.setattr(slots, "MAX_LAYER_BYTES", 4 * 16 * 8 - 1)
    monkeypatch.setattr(_reads, "read_pixels", None)
    with pytest.raises(ValueError, match=r"A layer of 16 spots x 8 genes takes .* GB.*Pass `table_added`"):
        stp.tl.fit_nsl(sdata, genes=["gene0"])
    monkeypatch.undo()
    monkeypatch.setattr(slots, "MAX_LAYER_BYTES", 4 * 16 * 8 - 1)
    stp.tl.fit_nsl(sdata, genes=["gene0"], table_added="predicted")
    assert sdata["predicted"].shape == (16, 1)


# Round trips


def check_slots(table: AnnData, model: NSL, expected: AnnData) -> None:
    learned = table.uns["nsl"]
    assert list(learned["genes"]) == model.genes
    for name in LEARNED:
        np.testing.assert_array_equal(learned[name], getattr(model, name), err_msg=name)
    assert dict(learned["params"]) == expected.uns["nsl"]["params"]
    np.testing.assert_array_equal(table.layers["nsl"], expected.layers["nsl"])
    np.testing.assert_array_equal(table.var["nsl_fitted"], expected.var["nsl_fitted"])
    np.testing.assert_array_equal(table.obsm["spatial"], expected.obsm["spatial"])
    for column in ("nsl_train", "region", "train"):
        np.testing.assert_array_equal(table.obs[column].to_numpy(), expected.obs[column].to_numpy())


def test_round_trips(make_sdata: MakeSData, tmp_path: Path) -> None:
    sdata = with_training(make_sdata(2, image_at="rotation", shapes_at="scale"))
    model = stp.tl.fit_nsl(sdata, train_key="train")
    sdata["table"].write_h5ad(tmp_path / "table.h5ad")
    from_h5ad = ad.read_h5ad(tmp_path / "table.h5ad")
    check_slots(from_h5ad, model, sdata["table"])
    sdata.write(tmp_path / "slide.zarr")
    again = sd.read_zarr(tmp_path / "slide.zarr")
    check_slots(again["table"], model, sdata["table"])
    assert_same(stp.tl.fit_nsl(again, train_key="train"), model)


@pytest.mark.parametrize("kind", ["float16", ">f4", "backed", "csc", "view"])
def test_tables_of_all_kinds(make_sdata: MakeSData, tmp_path: Path, kind: str) -> None:
    sdata = make_sdata(n_spots=16, n_genes=4)
    expected = stp.tl.fit_nsl(make_sdata(n_spots=16, n_genes=4))
    table = sdata["table"]
    if kind == "backed":
        table.write_h5ad(tmp_path / "table.h5ad")
        table = ad.read_h5ad(tmp_path / "table.h5ad", backed="r")
        table.uns["spatialdata_attrs"]["region"] = "A_spots"
    elif kind == "csc":
        table.X = sparse.csc_matrix(table.X)
    elif kind == "view":
        table = table[:, table.var_names]
    else:
        table.X = table.X.toarray().astype(kind)
    del sdata.tables["table"]
    sdata["table"] = table
    model = stp.tl.fit_nsl(sdata)
    np.testing.assert_allclose(model.loss, expected.loss, atol=0.05 if kind == "float16" else 1e-6)
    assert np.isfinite(sdata["table"].layers["nsl"]).all()


# Interrupts and failures


def assert_unchanged(table: AnnData, before: AnnData) -> None:
    assert keys(table) == keys(before)
    pd.testing.assert_frame_equal(table.obs, before.obs)
    pd.testing.assert_frame_equal(table.var, before.var)
    assert (table.X != before.X).nnz == 0
    for name in layer_names(before):
        np.testing.assert_array_equal(table.layers[name], before.layers[name])


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_fit_leaves_the_table_unchanged(
    make_sdata: MakeSData, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    sdata = make_sdata()
    before = sdata["table"].copy()
    original = _solver._evaluate
    calls = iter(range(10))

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == after:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(_solver, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stp.tl.fit_nsl(sdata)
    assert_unchanged(sdata["table"], before)


@pytest.mark.parametrize("at", ["prediction", "preparation", "placing"])
def test_an_interrupt_near_the_end_leaves_earlier_results(
    make_sdata: MakeSData, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    sdata = make_sdata()
    stp.tl.fit_nsl(sdata, genes=["gene0"])
    stp.tl.score(sdata, spots="all", n_perms=0)
    before = sdata["table"].copy()

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def content(table: AnnData, place: str) -> Any:
        found = getattr(table, place)
        if place == "var" and "nsl_fitted" not in found:  # when the first half of the writing is done
            monkeypatch.undo()
            raise KeyboardInterrupt
        return found

    if at == "prediction":
        monkeypatch.setattr(NSL, "predict", interrupted)
    elif at == "preparation":
        monkeypatch.setattr(slots.copy, "deepcopy", interrupted)
    else:
        monkeypatch.setattr(slots, "_content", content)
    with pytest.raises(KeyboardInterrupt):
        stp.tl.fit_nsl(sdata, genes=["gene1"], spot_scale=1.0)
    monkeypatch.undo()
    after = sdata["table"]
    assert keys(after) == keys(before)
    pd.testing.assert_frame_equal(after.var, before.var, check_like=True)
    pd.testing.assert_frame_equal(after.obs, before.obs, check_like=True)
    np.testing.assert_array_equal(after.layers["nsl"], before.layers["nsl"])
    stp.tl.fit_nsl(sdata, genes=["gene1"])


def test_genes_that_do_not_converge_are_named(make_sdata: MakeSData, log: io.StringIO) -> None:
    model = stp.tl.fit_nsl(make_sdata(), max_iter=1, tol=0.0)
    assert not model.converged.all()
    n_stuck = int((~model.converged).sum())
    assert f"{n_stuck} of 12 genes did not converge in 1 steps" in log.getvalue()
    assert "Raise `max_iter` or `tol`" in log.getvalue()


# Bad input: each is refused before anything is written


def broken(sdata: SpatialData, how: str) -> SpatialData:
    """A section with one thing wrong."""
    table = sdata["table"]
    values = table.X.toarray()
    if how == "NaN":
        values[3, 2] = np.nan
    if how == "infinite":
        values[3, 2] = np.inf
    table.X = sparse.csr_matrix(values)
    table.obs["letters"] = "x"
    table.obs["none"] = False
    table.obs["few"] = np.arange(30) < 11
    table.obs["enough"] = np.arange(30) < 12
    if how == "duplicate names":
        table.var_names = ["gene0", *table.var_names[:-1]]
    if how == "off the image":
        set_transformation(sdata["A_spots"], Translation([0, 1e5], axes=("x", "y")), "A")
    if how == "flat":
        set_transformation(sdata["A_spots"], Scale([0.0, 0.0], axes=("x", "y")), "A")
    if how == "no image":
        del sdata.images["A_image"]
    if how == "no spots":
        del sdata.shapes["A_spots"]
    if how == "no table":
        del sdata.tables["table"]
    if how == "no shared system":
        set_transformation(sdata["A_spots"], {"elsewhere": Identity()}, set_all=True)
    if how == "two images":
        sdata["again"] = sdata["A_image"].copy()
    if how == "foreign layer":
        table.layers["nsl"] = np.zeros(table.shape)
    return sdata


@pytest.mark.parametrize(
    ("how", "options", "error", "message"),
    [
        ("NaN", {}, ValueError, r"`X` has NaN or infinite values in 1 training spot"),
        ("infinite", {}, ValueError, r"`X` has NaN or infinite values in 1 training spot"),
        ("duplicate names", {}, ValueError, r"not unique \(\['gene0'\].*var_names_make_unique"),
        ("off the image", {}, ValueError, "All spots of 'A_spots' lie off the image.*Check the transformations"),
        ("no image", {}, ValueError, "no image in `sdata.images`.*Image2DModel.parse"),
        ("no spots", {}, ValueError, "no spots in `sdata.shapes`.*ShapesModel.parse"),
        ("no table", {}, ValueError, "no table in `sdata.tables`.*TableModel.parse"),
        ("no shared system", {}, ValueError, "share no coordinate system with an image.*set_transformation"),
        ("two images", {}, ValueError, r"\['A_image', 'again'\] have the same resolution.*`image_key`"),
        ("foreign layer", {}, ValueError, r"`layers\['nsl'\]` exists and holds no result.*another `key_added`"),
        ("", {"genes": ["gene0", "ERBB2"]}, KeyError, r"1 of `genes` are not in `var_names`, such as \['ERBB2'\]"),
        ("", {"layer": "counts"}, KeyError, r"No layer 'counts' in the table; it has \[\]"),
        ("", {"train_key": "training"}, KeyError, r"No column 'training' in `obs`; its boolean columns are"),
        (
            "",
            {"train_key": "letters"},
            TypeError,
            r"`obs\['letters'\]` has dtype .*; expected True for spots to fit on",
        ),
        ("", {"train_key": "none"}, ValueError, r"`obs\['none'\]` is False for all 30 spots"),
        ("", {"train_key": "few"}, ValueError, "There are 11 training spots .*; the model needs 12"),
        ("", {"key_added": "a/b"}, ValueError, "cannot be stored on disk"),
        ("", {"key_added": 3}, TypeError, "`key_added` is 3; expected a string"),
        ("", {"stains": "own"}, ValueError, "`stains` is 'own'; expected 'per_gene' or 'shared'"),
        ("", {"pull": -1}, ValueError, "`pull` is -1; expected at least 0"),
        ("", {"pull": float("nan")}, ValueError, "`pull` is nan; expected at least 0"),
        ("", {"tol": -1e-5}, ValueError, "`tol` is -1e-05; expected at least 0"),
        ("", {"max_iter": 0}, ValueError, "`max_iter` is 0; expected at least 1"),
        ("", {"bits": 12}, ValueError, "`bits` is 12; expected an integer from 1 to 8"),
        ("", {"spot_scale": 0}, ValueError, "`spot_scale` is 0; expected a positive number"),
        ("", {"device": "tpu"}, ValueError, "`device` is 'tpu'; expected 'auto', 'cpu', 'cuda'"),
        ("", {"device": None}, ValueError, "`device` is None; expected 'auto', 'cpu', 'cuda'"),
        ("", {"genes": 5.0}, TypeError, "`genes` is 5.0; expected names"),
        ("", {"pull": "0.1"}, ValueError, "`pull` is '0.1'; expected at least 0"),
        ("flat", {}, ValueError, "The transformation of the spots 'A_spots' to 'A' is singular"),
        ("", {"image_key": "HE"}, KeyError, r"No image 'HE' in `sdata.images`; it has \['A_image'\]"),
        ("", {"shapes_key": "dots"}, KeyError, r"No spots 'dots' in `sdata.shapes`; it has \['A_spots'\]"),
        ("", {"table_key": "adata"}, KeyError, r"No table 'adata' in `sdata.tables`; it has \['table'\]"),
        ("", {"coordinate_system": "um"}, KeyError, r"No coordinate system 'um'; the elements know \['A'\]"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) and len(value) < 20 else str(value) if isinstance(value, dict) else ""
    ),
)
def test_bad_input(
    make_sdata: MakeSData, how: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    sdata = broken(make_sdata(), how)
    before = {key: keys(table) for key, table in sdata.tables.items()}
    with pytest.raises(error, match=message):
        stp.tl.fit_nsl(sdata, **options)
    assert {key: keys(table) for key, table in sdata.tables.items()} == before


def test_the_advice_for_a_table_that_annotates_nothing_leads_to_success(make_sdata: MakeSData) -> None:
    sdata = make_sdata(n_spots=16, n_genes=4)
    bare = SpatialData(
        images=dict(sdata.images), shapes=dict(sdata.shapes), tables={"table": ad.concat([sdata["table"]])}
    )
    with pytest.raises(
        ValueError, match=r"does not say which spots it annotates \(.*anndata.concat.*`sdata\[table_key\] = "
    ):
        stp.tl.fit_nsl(bare)
    bare["table"] = TableModel.parse(bare["table"], region=["A_spots"], region_key="region", instance_key="spot_id")
    assert_same(stp.tl.fit_nsl(bare), stp.tl.fit_nsl(sdata))


@pytest.mark.parametrize(("lost", "what"), [("region", "region"), ("spot_id", "instance")])
def test_the_advice_for_a_lost_column_leads_to_success(make_sdata: MakeSData, lost: str, what: str) -> None:
    sdata = make_sdata(n_spots=16, n_genes=4)
    obs = sdata["table"].obs
    column = obs.pop(lost)
    with pytest.raises(KeyError, match=rf"its {what} column is '{lost}' .*which `obs` lacks.*Restore the column"):
        stp.tl.fit_nsl(sdata)
    obs[lost] = column
    stp.tl.fit_nsl(sdata)


@pytest.mark.parametrize(
    "options", [{"genes": "ERBB2"}, {"layer": "no"}, {"reference": "no"}, {"max_iter": 2.5}], ids=str
)
def test_arguments_are_checked_before_pixels_are_read(make_sdata: MakeSData, options: dict[str, Any]) -> None:
    sdata = without_pixels(make_sdata())
    with pytest.raises((KeyError, ValueError, TypeError)):
        stp.tl.fit_nsl(sdata, **options)


def test_constant_genes(make_sdata: MakeSData, log: io.StringIO) -> None:
    sdata = make_sdata()
    values = sdata["table"].X.toarray()
    values[:, 5] = 2.5
    sdata["table"].X = sparse.csr_matrix(values)
    with pytest.raises(ValueError, match=r"same value on all training spots, such as \['gene5'\].*Leave them out"):
        stp.tl.fit_nsl(sdata, genes=["gene5", "gene6"])
    model = stp.tl.fit_nsl(sdata)
    assert "gene5" not in model.genes
    assert not sdata["table"].var["nsl_fitted"]["gene5"]
    assert "Leaving out 1 genes that are constant" in log.getvalue()


def test_counts_are_warned_of_where_the_user_is(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    sdata["table"].X = sparse.csr_matrix(np.rint(sdata["table"].X.toarray()))
    with pytest.warns(UserWarning, match="looks like counts.*normalize_total.*log1p") as caught:
        stp.tl.fit_nsl(sdata)
    assert caught[0].filename == __file__


def test_twelve_spots_are_enough(make_sdata: MakeSData) -> None:
    sdata = broken(make_sdata(), "")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = stp.tl.fit_nsl(sdata, train_key="enough")
    assert np.isfinite(sdata["table"].layers["nsl"]).all()
    assert model.params["n_train"] == 12


# Against every pixel


def per_pixel(model: NSL, image: np.ndarray, centers: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """``(n, G)`` the model evaluated on each pixel of each spot, without any histogram."""
    od = -np.log((np.arange(256) + 1) / 256)
    predicted = np.empty((len(centers), len(model.genes)))
    unmix = np.linalg.inv(model.stain_matrix)[:, :, :2]
    for i, ((x, y), r) in enumerate(zip(centers, radius, strict=True)):
        x0, x1 = max(int(x - r) - 1, 0), min(int(x + r) + 2, image.shape[2])
        y0, y1 = max(int(y - r) - 1, 0), min(int(y + r) + 2, image.shape[1])
        near = np.hypot(np.arange(x0, x1) + 0.5 - x, (np.arange(y0, y1) + 0.5 - y)[:, None]) <= r
        pixels = od[image[:, y0:y1, x0:x1][:, near]].T
        for g in range(len(model.genes)):
            mean = np.maximum(pixels @ unmix[g], 0).mean(axis=0)
            predicted[i, g] = model.intercept[g] + mean @ model.weights[g]
    return predicted


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a.T, b.T, strict=True)])


def spots_in_pixels(sdata: SpatialData, name: str, ids: Any) -> tuple[np.ndarray, np.ndarray]:
    spots = sdata[name].loc[ids]
    return np.column_stack([spots.geometry.x, spots.geometry.y]), spots["radius"].to_numpy()


def test_histograms_stand_for_pixels(make_sdata: MakeSData) -> None:
    sdata = make_sdata(n_spots=48)
    model = stp.tl.fit_nsl(sdata, spot_scale=1.5)
    centers, radii = spots_in_pixels(sdata, "A_spots", sdata["table"].obs["spot_id"])
    expected = per_pixel(model, sdata["A_image"].data.compute(), centers, 1.5 * radii)
    predicted = sdata["table"].layers["nsl"]
    assert correlations(predicted, expected).min() > 0.999


def test_histograms_stand_for_pixels_on_a_real_section(her2st: SpatialData) -> None:
    table = her2st["table"]
    genes = list(table.var_names[np.asarray(table.X.mean(axis=0)).ravel().argsort()[[-1, -30, -250]]])
    model = stp.tl.fit_nsl(her2st, genes=[*genes, "ERBB2"], shapes_key="C4_spots")
    some = np.flatnonzero(table.obs["section"] == "C4")[::5]
    centers, radii = spots_in_pixels(her2st, "C4_spots", table.obs["spot_id"].iloc[some])
    image = next(iter(her2st["C4_image"]["scale0"].ds.values())).to_numpy()
    expected = per_pixel(model, image, centers, model.reads["spot_scale"] * radii)
    predicted = table[some, model.genes].layers["nsl"]
    assert correlations(predicted, expected).min() > 0.999
