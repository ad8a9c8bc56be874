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
from spatialdata.transformations import Identity, Translation, set_transformation

import stpredict as stp
from stpredict.models import NSL, _nsl_solver
from stpredict.models.nsl._stains import RUIFROK_JOHNSTON, stain_matrix

MakeSData = Callable[..., SpatialData]
LEARNED = ["stain_matrix", "weights", "direction", "intercept", "loss", "n_iter", "converged", "reference"]


def keys(table: AnnData) -> dict[str, list[str]]:
    slots = ("obs", "var", "uns", "obsm", "varm", "layers", "obsp")
    return {slot: sorted(getattr(table, slot).keys()) for slot in slots}


def with_training(sdata: SpatialData, held_out: str = "B") -> SpatialData:
    sdata["table"].obs["train"] = (sdata["table"].obs["section"] != held_out).to_numpy()
    return sdata


def assert_same(a: NSL, b: NSL) -> None:
    assert a.genes == b.genes
    for name in LEARNED:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


# What is written


def test_slots(make_sdata: MakeSData) -> None:
    sdata = with_training(make_sdata(2, n_without_row=2))
    set_transformation(sdata["B_spots"], Translation([100, 0], axes=("x", "y")), "B")
    table = sdata["table"]
    genes = ["gene4", "gene0", "gene7"]
    model = stp.tl.fit_nsl(sdata, genes=genes, train_key="train", spot_scale=1.0)

    layer = table.layers["nsl"]
    assert layer.dtype == np.float32
    assert layer.shape == table.shape
    off = table.obs["n_pixels"].to_numpy() == 0
    assert 0 < off.sum() < 28
    fitted = table.var_names.isin(genes)
    np.testing.assert_array_equal(np.isnan(layer), off[:, None] | ~fitted)
    np.testing.assert_array_equal(table.var["nsl_fitted"], fitted)

    learned = table.uns["nsl"]
    assert learned["genes"].tolist() == genes == model.genes
    shapes = {"stain_matrix": (3, 3, 3), "weights": (3, 2), "direction": (3, 3), "reference": (3, 3)}
    for name in LEARNED:
        assert learned[name].shape == shapes.get(name, (3,))
        np.testing.assert_array_equal(learned[name], getattr(model, name))
    assert learned["params"] == {"model": "nsl", **model.params}
    assert model.params["train_key"] == "train"
    assert model.params["n_train"] == 28
    assert (model.params["field"], model.params["bits"], model.params["layer"]) == (1.0, 5, "X")

    assert set(keys(table)["obsm"]) == {"color_histogram", "mean_od", "color_field"}
    assert {"n_pixels", "coverage"} < set(table.obs)


def test_predictions_are_those_of_the_model(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    model = stp.tl.fit_nsl(sdata, genes=["gene0", "gene5"])
    table = sdata["table"]
    counts = table.obsm["color_histogram"]
    od = stp.pp._histogram.codebook_od(table.uns["color_histogram"]["codebook"], 5)
    expected = model.predict(sparse.csr_matrix(counts / counts.sum(axis=1)), od)
    np.testing.assert_allclose(table[:, ["gene0", "gene5"]].layers["nsl"], expected, atol=1e-4)


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
    assert {"nsl", "nsl_2", "double"} == set(table.layers)
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
        for garbage in (np.nan, np.inf, -1e30, 1e6):
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
    n_off = int((sdata["table"].obs["n_pixels"] == 0).sum())
    assert n_off > 0
    assert f"{n_off} training spots have no pixels on an image and are left out" in log.getvalue()
    assert model.params["n_train"] == 60 - n_off


def test_spots_that_hold_no_pixel_are_left_out_of_the_fit(make_sdata: MakeSData) -> None:
    sdata = make_sdata(n_spots=48)
    sdata["A_spots"].iloc[:10, sdata["A_spots"].columns.get_loc("radius")] = 0.01
    model = stp.tl.fit_nsl(sdata, spot_scale=1.0)
    empty = sdata["table"].obs["n_pixels"].to_numpy() == 0
    assert 0 < empty.sum() <= 10
    assert model.params["n_train"] == 48 - empty.sum()
    np.testing.assert_array_equal(np.isnan(sdata["table"].layers["nsl"]).all(axis=1), empty)


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


def test_refitting_reads_no_pixel(make_sdata: MakeSData) -> None:
    sdata = with_training(make_sdata(2))
    first = stp.tl.fit_nsl(sdata)
    sdata = without_pixels(sdata)
    assert_same(stp.tl.fit_nsl(sdata), first)
    stp.tl.fit_nsl(sdata, train_key="train", stains="shared", pull=0.5, genes=["gene1"], key_added="other")
    stp.tl.predict(sdata, first)
    with pytest.raises(AssertionError, match="pixels were read"):
        stp.tl.fit_nsl(sdata, spot_scale=1.0)


# Round trips


def check_slots(table: AnnData, model: NSL, expected: AnnData) -> None:
    learned = table.uns["nsl"]
    assert list(learned["genes"]) == model.genes
    for name in LEARNED:
        np.testing.assert_array_equal(learned[name], getattr(model, name), err_msg=name)
    assert {key: str(value) for key, value in learned["params"].items()} == {
        key: str(value) for key, value in expected.uns["nsl"]["params"].items()
    }
    np.testing.assert_array_equal(table.layers["nsl"], expected.layers["nsl"])
    np.testing.assert_array_equal(table.var["nsl_fitted"], expected.var["nsl_fitted"])
    assert (table.obsm["color_histogram"] != expected.obsm["color_histogram"]).nnz == 0
    np.testing.assert_array_equal(table.obsm["mean_od"], expected.obsm["mean_od"])
    for column in ("n_pixels", "coverage", "region", "train"):
        np.testing.assert_array_equal(table.obs[column].to_numpy(), expected.obs[column].to_numpy())


def test_zarr_round_trip(make_sdata: MakeSData, tmp_path: Path) -> None:
    sdata = with_training(make_sdata(2, image_at="rotation", shapes_at="scale"))
    model = stp.tl.fit_nsl(sdata, train_key="train")
    sdata.write(tmp_path / "slide.zarr")
    again = sd.read_zarr(tmp_path / "slide.zarr")
    check_slots(again["table"], model, sdata["table"])
    assert_same(stp.tl.fit_nsl(without_pixels(again), train_key="train"), model)


def test_h5ad_round_trip(make_sdata: MakeSData, tmp_path: Path) -> None:
    sdata = with_training(make_sdata(2))
    model = stp.tl.fit_nsl(sdata, train_key="train")
    sdata["table"].write_h5ad(tmp_path / "table.h5ad")
    table = ad.read_h5ad(tmp_path / "table.h5ad")
    check_slots(table, model, sdata["table"])
    table.uns["spatialdata_attrs"]["region"] = list(table.uns["spatialdata_attrs"]["region"])
    sdata["table"] = table
    assert_same(stp.tl.fit_nsl(without_pixels(sdata), train_key="train"), model)


# Interrupts and failures


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_fit_leaves_the_table_unchanged(
    make_sdata: MakeSData, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    sdata = make_sdata()
    before = sdata["table"].copy()
    original = _nsl_solver._evaluate
    calls = iter(range(10))

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == after:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(_nsl_solver, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stp.tl.fit_nsl(sdata)
    assert keys(sdata["table"]) == keys(before)
    pd.testing.assert_frame_equal(sdata["table"].obs, before.obs)
    pd.testing.assert_frame_equal(sdata["table"].var, before.var)
    assert (sdata["table"].X != before.X).nnz == 0


def test_an_interrupted_prediction_leaves_earlier_results(
    make_sdata: MakeSData, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdata = make_sdata()
    stp.tl.fit_nsl(sdata, genes=["gene0"])
    before = sdata["table"].copy()

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(NSL, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stp.tl.fit_nsl(sdata, genes=["gene1"], spot_scale=1.0)
    assert keys(sdata["table"]) == keys(before)
    np.testing.assert_array_equal(sdata["table"].layers["nsl"], before.layers["nsl"])
    np.testing.assert_array_equal(sdata["table"].obs["n_pixels"], before.obs["n_pixels"])


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
        ("NaN", {}, ValueError, r"`X` has NaN or infinite values on training spots.*\['gene2'\]"),
        ("infinite", {}, ValueError, r"`X` has NaN or infinite values on training spots.*\['gene2'\]"),
        ("duplicate names", {}, ValueError, r"not unique \(\['gene0'\].*var_names_make_unique"),
        ("off the image", {}, ValueError, "All spots of 'A_spots' lie off the image.*Check the transformations"),
        ("no image", {}, ValueError, "no image in `sdata.images`.*Image2DModel.parse"),
        ("no spots", {}, ValueError, "no spots in `sdata.shapes`.*ShapesModel.parse"),
        ("no table", {}, ValueError, "no table in `sdata.tables`.*TableModel.parse"),
        ("no shared system", {}, ValueError, "share no coordinate system with an image.*set_transformation"),
        ("two images", {}, ValueError, r"\['A_image', 'again'\] have the same resolution.*`image_key`"),
        ("foreign layer", {}, ValueError, r"`layers\['nsl'\]` exists and holds no predictions.*another `key_added`"),
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
        ("", {"field": 0}, ValueError, "`field` is 0; expected a positive number"),
        ("", {"device": "tpu"}, ValueError, "`device` is 'tpu'; expected 'auto', 'cpu', 'cuda'"),
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


@pytest.fixture(scope="module")
def c2(her2st_dir: Path) -> SpatialData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STPREDICT_DATA_DIR", str(her2st_dir))
        return stp.datasets.her2st(["C2"])


def test_histograms_stand_for_pixels_on_a_real_section(c2: SpatialData) -> None:
    table = c2["table"]
    genes = list(table.var_names[np.asarray(table.X.mean(axis=0)).ravel().argsort()[[-1, -5, -30, -100, -250]]])
    model = stp.tl.fit_nsl(c2, genes=[*genes, "ERBB2"])
    centers, radii = spots_in_pixels(c2, "C2_spots", table.obs["spot_id"])
    image = next(iter(c2["C2_image"]["scale0"].ds.values())).to_numpy()
    expected = per_pixel(model, image, centers, model.params["field"] * radii)
    predicted = table[:, model.genes].layers["nsl"]
    assert correlations(predicted, expected).min() > 0.999
