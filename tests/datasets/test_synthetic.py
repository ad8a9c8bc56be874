from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import spatialdata as sd
import xarray as xr
from numpy.typing import NDArray
from sklearn.linear_model import LinearRegression
from spatialdata import SpatialData
from spatialdata.transformations import Identity, get_transformation

import stpredict as stp
from stpredict.datasets import _synthetic

RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
KINDS = ["stain", "mix", "context", "housekeeping", "noise"]


@pytest.fixture(scope="module")
def default() -> SpatialData:
    return stp.datasets.synthetic()


@pytest.fixture(scope="module")
def small() -> SpatialData:
    return stp.datasets.synthetic(n_sections=3, n_spots=20, n_genes=30, random_state=3)


def pixels(sdata: SpatialData, section: str) -> NDArray[np.uint8]:
    image = sdata[f"{section}_image"]
    # Read back from disk, an image of one scale is no longer a tree of scales.
    return (image["scale0"]["image"] if isinstance(image, xr.DataTree) else image).to_numpy()


def mean_od(sdata: SpatialData, section: str, diameters: float = 1) -> NDArray[np.float64]:
    """(n, 3) mean OD over a disk around each spot, read with code of its own."""
    od = -np.log((pixels(sdata, section) + 1.0) / 256)
    spots = sdata[f"{section}_spots"]
    y, x = np.ogrid[: od.shape[1], : od.shape[2]]
    means = []
    for point, radius in zip(spots.geometry, spots.radius * diameters, strict=True):
        window = (
            slice(max(int(point.y - radius) - 1, 0), int(point.y + radius) + 2),
            slice(max(int(point.x - radius) - 1, 0), int(point.x + radius) + 2),
        )
        inside = np.hypot(y[window[0]] + 0.5 - point.y, x[:, window[1]] + 0.5 - point.x) <= radius
        means.append(od[:, *window][:, inside].mean(1))
    return np.array(means)


def pcc(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """One value per column."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))


class TestLayout:
    def test_elements(self, small: SpatialData) -> None:
        assert sorted(small.images) == ["S1_image", "S2_image", "S3_image"]
        assert sorted(small.shapes) == ["S1_spots", "S2_spots", "S3_spots"]
        assert list(small.tables) == ["table"]
        assert sorted(small.coordinate_systems) == ["S1", "S2", "S3"]
        for element in ("S2_image", "S2_spots"):
            transformations = get_transformation(small[element], get_all=True)
            assert list(transformations) == ["S2"]
            assert isinstance(transformations["S2"], Identity)

    def test_image(self, default: SpatialData) -> None:
        scales = [scale["image"] for scale in default["S1_image"].children.values()]
        assert len(scales) > 1
        for image, next_image in zip(scales, scales[1:], strict=False):
            assert next_image.shape[1:] == tuple(n // 2 for n in image.shape[1:])
        for image in scales:
            assert image.dims == ("c", "y", "x")
            assert list(image.coords["c"].values) == ["r", "g", "b"]
            assert image.dtype == np.uint8
            assert max(max(sizes) for sizes in image.data.chunks) <= 1024

    def test_spots(self, small: SpatialData) -> None:
        mpp = small["table"].uns["synthetic"]["mpp"]["S1_spots"]
        spots = small["S1_spots"]
        assert len(spots) == 20
        np.testing.assert_allclose(2 * spots.radius * mpp, 100)
        xy = np.stack([spots.geometry.x, spots.geometry.y], -1)
        distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1) + 1e9 * np.eye(20)
        np.testing.assert_allclose(distance.min(1) * mpp, 200)
        assert (xy > 0).all() and (xy < pixels(small, "S1").shape[:0:-1]).all()

    def test_table(self, small: SpatialData) -> None:
        table = small["table"]
        assert table.shape == (60, 30)
        assert list(table.obs.columns) == ["section", "patient", "array_row", "array_col", "region", "spot_id"]
        assert table.obs_names.is_unique and table.var_names.is_unique
        assert list(table.obs.groupby("section", observed=True)["patient"].first()) == ["A", "B", "A"]
        first = table[(table.obs["region"] == "S2_spots").to_numpy()].obs.iloc[0]
        circle = small["S2_spots"].loc[first["spot_id"]].geometry
        other = table[(table.obs["region"] == "S2_spots").to_numpy()].obs.iloc[-1]
        last = small["S2_spots"].loc[other["spot_id"]].geometry
        assert last.y - circle.y == 100 * (other["array_row"] - first["array_row"])
        assert last.x - circle.x == 100 * (other["array_col"] - first["array_col"])

    def test_expression(self, small: SpatialData) -> None:
        table = small["table"]
        counts = table.layers["counts"].toarray()
        assert table.X.dtype == counts.dtype == np.float32
        assert (counts >= 0).all() and (counts == counts.round()).all()
        expected = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
        np.testing.assert_allclose(table.X.toarray(), expected, rtol=1e-4)

    def test_every_kind_for_every_number_of_genes(self) -> None:
        for n_genes in range(8, 120):
            genes = _synthetic._make_genes(np.random.default_rng(0), n_genes)
            assert len(set(genes.name)) == n_genes
            assert set(genes.kind) == set(KINDS)
            assert genes.abundance.sum() == pytest.approx(1)

    def test_one_spot(self) -> None:
        sdata = stp.datasets.synthetic(1, n_spots=1, n_genes=8)
        assert sdata["table"].shape == (1, 8)


class TestDeterminism:
    def test_same_seed(self, small: SpatialData) -> None:
        again = stp.datasets.synthetic(n_sections=3, n_spots=20, n_genes=30, random_state=3)
        np.testing.assert_array_equal(pixels(again, "S3"), pixels(small, "S3"))
        assert (again["table"].layers["counts"] != small["table"].layers["counts"]).nnz == 0
        np.testing.assert_array_equal(again["table"].layers["truth"], small["table"].layers["truth"])

    def test_other_seed(self, small: SpatialData) -> None:
        other = stp.datasets.synthetic(1, n_spots=20, n_genes=30, random_state=4)
        assert not np.array_equal(pixels(other, "S1"), pixels(small, "S1"))

    def test_sections_do_not_depend_on_their_number(self, small: SpatialData) -> None:
        one = stp.datasets.synthetic(1, n_spots=20, n_genes=30, random_state=3)
        np.testing.assert_array_equal(pixels(one, "S1"), pixels(small, "S1"))
        assert (one["table"].layers["counts"] != small["table"].layers["counts"][:20]).nnz == 0

    def test_sections_differ(self, small: SpatialData) -> None:
        assert not np.array_equal(pixels(small, "S1"), pixels(small, "S2"))


class TestRoundTrip:
    def check(self, found: ad.AnnData, table: ad.AnnData) -> None:
        np.testing.assert_array_equal(found.layers["truth"], table.layers["truth"])
        np.testing.assert_array_equal(found.obsm["true_load"], table.obsm["true_load"])
        assert list(found.var["kind"]) == list(table.var["kind"])

        def same(a: Any, b: Any) -> None:
            if isinstance(b, dict):
                assert a.keys() == b.keys()
                for key in b:
                    same(a[key], b[key])
            elif np.asarray(b).dtype.kind in "OUT":
                assert list(a) == list(b)
            else:
                np.testing.assert_array_equal(a, b)

        same(found.uns["synthetic"], table.uns["synthetic"])

    def test_zarr(self, small: SpatialData, tmp_path: Path) -> None:
        small.write(tmp_path / "small.zarr")
        read = sd.read_zarr(tmp_path / "small.zarr")
        self.check(read["table"], small["table"])
        np.testing.assert_array_equal(pixels(read, "S2"), pixels(small, "S2"))

    def test_h5ad(self, small: SpatialData, tmp_path: Path) -> None:
        small["table"].write_h5ad(tmp_path / "small.h5ad")
        self.check(ad.read_h5ad(tmp_path / "small.h5ad"), small["table"])


class TestPhysics:
    def test_beer_lambert_within_rounding(self) -> None:
        rng = np.random.default_rng(0)
        concentration = rng.uniform(0, 1, (3, 20, 30)).astype(np.float32)
        stain_matrix = RUIFROK / np.linalg.norm(RUIFROK, axis=1, keepdims=True)
        white_balance = np.array([0.95, 0.97, 0.94])
        intensity = _synthetic._transmit(concentration, stain_matrix, white_balance)
        rounded = np.rint(intensity).astype(np.uint8)
        od = -np.log((rounded + 1.0) / 256) + np.log(white_balance)[:, None, None]
        error = np.abs(od - sum(stain_matrix[i, :, None, None] * concentration[i] for i in range(3)))
        assert (error <= 0.51 / (rounded + 0.5)).all()

    def test_photograph_keeps_the_mean_od(self, default: SpatialData) -> None:
        # Noise, rounding and JPEG average out over the 1,963 pixels of a spot.
        truth = default["table"].uns["synthetic"]
        for section in ("S1", "S2"):
            rows = (default["table"].obs["section"] == section).to_numpy()
            load = default["table"].obsm["true_load"][rows, :3]
            expected = load @ truth["stain_matrix"][section] - np.log(truth["white_balance"][section])
            np.testing.assert_allclose(mean_od(default, section), expected, atol=0.02)

    def test_stains(self, small: SpatialData) -> None:
        truth = small["table"].uns["synthetic"]
        reference = RUIFROK / np.linalg.norm(RUIFROK, axis=1, keepdims=True)
        for matrix in truth["stain_matrix"].values():
            np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1)
            assert (np.degrees(np.arccos((matrix * reference).sum(1)))[:2] < 15).all()
        assert not np.allclose(truth["stain_matrix"]["S1"], truth["stain_matrix"]["S2"])
        for gain in truth["white_balance"].values():
            assert (0.9 < gain).all() and (gain < 1).all()

    def test_spots_lie_on_tissue_and_the_corners_do_not(self, default: SpatialData) -> None:
        gain = default["table"].uns["synthetic"]["white_balance"]["S1"]
        corner = pixels(default, "S1")[:, :50, :50].mean((1, 2))
        np.testing.assert_allclose(corner, 256 * gain - 1, atol=0.5)
        absorbed = mean_od(default, "S1") + np.log(gain)
        assert np.mean(absorbed[:, 1] > 0.05) > 0.97

    def test_direction(self, small: SpatialData) -> None:
        truth = small["table"].uns["synthetic"]
        own_color = np.isin(truth["kind"], ["stain", "mix"])
        for section, direction in truth["direction"].items():
            assert np.isnan(direction[~own_color]).all()
            np.testing.assert_allclose(np.linalg.norm(direction[own_color], axis=1), 1)
            # Light through one unit of each stain in turn: the direction sees the gene's weights, up to scale.
            seen = direction[own_color] @ truth["stain_matrix"][section].T
            weights = truth["weights"][own_color]
            scale = np.linalg.norm(weights, axis=1, keepdims=True) / np.linalg.norm(seen, axis=1, keepdims=True)
            np.testing.assert_allclose(seen * scale, weights, atol=1e-9)


@pytest.fixture(scope="module")
def held_out(default: SpatialData) -> dict[str, Any]:
    """What a linear regression on the mean OD of one section's spots says of the other's, gene by gene."""
    table = default["table"]
    train, test = ((table.obs["section"] == s).to_numpy() for s in ("S1", "S2"))
    expression, truth = table.X.toarray(), table.layers["truth"]
    own = {section: mean_od(default, section) for section in ("S1", "S2")}
    wide = {section: np.hstack([own[section], mean_od(default, section, 4)]) for section in own}
    two_stains = {section: own[section] @ np.linalg.inv(RUIFROK)[:, :2] for section in own}

    def score(features: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        fitted = LinearRegression().fit(features["S1"], expression[train])
        return pcc(expression[test], fitted.predict(features["S2"]))

    with np.errstate(invalid="ignore"):  # the truth of noise genes is constant
        ceiling = pcc(expression[test], truth[test])
    slope = LinearRegression().fit(own["S1"], expression[train]).coef_
    direction = table.uns["synthetic"]["direction"]["S1"]
    cosine = (slope * direction).sum(1) / np.linalg.norm(slope, axis=1)
    return {
        "kind": table.var["kind"].to_numpy(),
        "own": score(own),
        "wide": score(wide),
        "two_stains": score(two_stains),
        "ceiling": ceiling,
        "angle": np.degrees(np.arccos(cosine)),
    }


class TestGenes:
    @pytest.mark.parametrize("kind", ["stain", "mix"])
    def test_color_decides(self, held_out: dict[str, Any], kind: str) -> None:
        these = held_out["kind"] == kind
        assert np.median(held_out["angle"][these]) < 5
        assert np.median(held_out["own"][these] / held_out["ceiling"][these]) > 0.97
        assert 0.7 < np.median(held_out["ceiling"][these]) < 0.95

    def test_mix_needs_more_than_two_stains(self, held_out: dict[str, Any]) -> None:
        mix, stain = (held_out["kind"] == kind for kind in ("mix", "stain"))
        assert np.median((held_out["own"] - held_out["two_stains"])[mix]) > 0.1
        assert np.median((held_out["own"] - held_out["two_stains"])[stain]) < 0.03

    def test_context_lies_around_the_spot(self, held_out: dict[str, Any]) -> None:
        these = held_out["kind"] == "context"
        assert np.abs(held_out["own"][these]).mean() < 0.3
        assert np.median(held_out["wide"][these]) > 0.6
        assert np.median(held_out["ceiling"][these]) > 0.8

    def test_noise_is_flat(self, held_out: dict[str, Any], default: SpatialData) -> None:
        these = held_out["kind"] == "noise"
        assert np.abs(held_out["own"][these]).mean() < 0.05
        assert np.abs(held_out["wide"][these]).mean() < 0.06
        # They do not follow from normalisation either: their share of the transcripts is the same in every tissue.
        assert np.ptp(default["table"].layers["truth"][:, these], axis=0).max() < 1e-3

    def test_counts_scatter_as_said(self, default: SpatialData) -> None:
        table = default["table"]
        dispersion = table.uns["synthetic"]["dispersion"]
        counts = table.layers["counts"].toarray()
        depth = counts.sum(1, keepdims=True)
        mean = np.expm1(table.layers["truth"]) / 1e4 * depth
        assert ((counts - mean) ** 2).mean() / (mean + dispersion * mean**2).mean() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_sections": 0}, ValueError, r"`n_sections` is 0; expected a whole number of at least 1"),
        ({"n_spots": -5}, ValueError, r"`n_spots` is -5; expected a whole number of at least 1"),
        ({"n_genes": 7}, ValueError, r"`n_genes` is 7; expected a whole number of at least 8"),
        ({"random_state": -1}, ValueError, r"`random_state` is -1; expected a whole number of at least 0"),
        ({"n_spots": 10.5}, TypeError, r"`n_spots` is 10\.5; expected a whole number"),
        ({"n_genes": "many"}, TypeError, r"`n_genes` is 'many'; expected a whole number"),
        ({"n_sections": True}, TypeError, r"`n_sections` is True; expected a whole number"),
        ({"random_state": None}, TypeError, r"`random_state` is None; expected a whole number"),
    ],
)
def test_nonsense(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stp.datasets.synthetic(**arguments)


def test_numpy_integers_are_whole_numbers() -> None:
    arguments: dict[str, Any] = {"n_spots": np.int32(4), "n_genes": np.uint8(8), "random_state": np.int64(1)}
    sdata = stp.datasets.synthetic(1, **arguments)
    assert sdata["table"].shape == (4, 8)
