from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import TableModel

import stpredict as stp
from stpredict._data.elements import Elements
from stpredict._data.slide import open_slide
from stpredict.pp._features import FeatureReads, Features, choose_sources, color_cubes
from stpredict.pp._reads import read_inputs

MakeSData = Callable[..., SpatialData]
N = 24


def choose(sdata: SpatialData, features: Any) -> FeatureReads:
    return choose_sources(sdata, sdata["table"], features, image_size=8, spot_scale=1.0)


def sources_of(sdata: SpatialData, features: Any) -> dict[str, dict[str, Any]]:
    return dict(choose(sdata, features).sources)


def read(sdata: SpatialData, features: Any, *, training: Any = "all", **elements: Any) -> Features:
    """Choose and read; what is chosen already is taken as it is."""
    reads = features if isinstance(features, FeatureReads) else choose(sdata, features)
    slide = open_slide(sdata, Elements(table_key="table", **elements), images=reads.needs_image)
    with read_inputs(slide, reads, training=slide.rows if isinstance(training, str) else training) as found:
        assert isinstance(found, Features)
        return found


def known(features: Features) -> list[int]:
    return list(features.rows)


@pytest.fixture
def sdata(make_sdata: MakeSData) -> SpatialData:
    sdata = make_sdata(2, size=(150, 190), n_spots=12, n_genes=3)
    table = sdata["table"]
    rng = np.random.default_rng(0)
    table.obsm["X_uni"] = rng.normal(size=(N, 4)).astype(np.float32)
    table.obsm["counts"] = sparse.csr_matrix(rng.poisson(1, (N, 5)))
    table.obsm["frame"] = pd.DataFrame({"a": rng.normal(size=N), "b": np.arange(N)}, index=table.obs_names)
    return sdata


def means(patches: Any) -> Any:
    return patches.mean(dim=(2, 3))


# Where features come from


def test_sources(sdata: SpatialData) -> None:
    assert sources_of(sdata, "X_uni") == {"X_uni": {"from": "obsm"}}
    assert list(sources_of(sdata, ["frame", "position", "X_uni"])) == ["frame", "position", "X_uni"]
    assert sources_of(sdata, "color_statistics") == {
        "color_statistics": {"from": "statistics", "spot_scales": [0.5, 1.0, 2.0, 3.0, 4.0, 6.0]}
    }
    of_histogram = {"from": "histogram", "bits": 5, "spot_scale": 2.0}
    assert sources_of(sdata, ("mean_od",)) == {"mean_od": {**of_histogram, "of": "mean_od"}}
    assert sources_of(sdata, ("mean_od", "color_histogram")) == {
        "mean_od": {**of_histogram, "of": "mean_od"},
        "color_histogram": {**of_histogram, "of": "color_histogram"},
    }
    reads = choose_sources(sdata, sdata["table"], ["X_uni", len], image_size=8, spot_scale=1.5)
    assert reads.sources["encoder"] == {"from": "encoder", "image_size": 8, "spot_scale": 1.5}
    assert reads.encoder is len
    assert reads.describe() == {"kind": "features", "sources": reads.sources}


def test_settings_of_what_the_table_holds_are_kept(sdata: SpatialData) -> None:
    stp.pp.color_statistics(sdata, spot_scale=(1, 2))
    stp.pp.color_histogram(sdata, bits=4, spot_scale=1.5)
    assert sources_of(sdata, "color_statistics")["color_statistics"]["spot_scales"] == [1, 2]
    for name in ("mean_od", "color_histogram"):
        assert sources_of(sdata, name) == {name: {"from": "histogram", "bits": 4, "spot_scale": 1.5, "of": name}}
    stp.pp.color_statistics(sdata, key_added="color_histogram")
    assert sources_of(sdata, "mean_od")["mean_od"]["bits"] == 5, "of another kind"
    assert sources_of(sdata, "color_histogram") == {"color_histogram": {"from": "obsm"}}


def test_what_others_put_into_the_table_is_taken_as_it_is(sdata: SpatialData) -> None:
    stp.pp.color_histogram(sdata, key_added="colors")
    for name in ("mean_od", "color_histogram", "color_statistics", "position"):
        assert choose(sdata, name).needs_image == (name != "position")
        sdata["table"].obsm[name] = np.ones((N, 2))
        assert sources_of(sdata, name) == {name: {"from": "obsm"}}
        assert not choose(sdata, name).needs_image
    del sdata["table"].obsm["color_histogram"]
    stp.pp.color_histogram(sdata)
    assert sources_of(sdata, "mean_od") == {"mean_od": {"from": "obsm"}}, "beside a histogram that was made here"


def test_needs_image_and_field_of_view(sdata: SpatialData) -> None:
    for features, needs_image, field_of_view in (
        (["X_uni", "position"], False, None),
        (["X_uni", "mean_od"], True, None),
        ("position", False, 0.0),
        (["position", "mean_od", "color_statistics"], True, 6.0),
        ([means, "position"], True, 1.0),
        ([means, "mean_od"], True, 2.0),
    ):
        reads = choose(sdata, features)
        assert (reads.needs_image, reads.field_of_view) == (needs_image, field_of_view), features


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ("X_conch", KeyError, r"No features 'X_conch' in `obsm`; it has \['X_uni', .*'mean_od', 'color_histogram'"),
        ([], ValueError, "`features` is empty"),
        (["X_uni", "X_uni"], ValueError, "`features` has 'X_uni' more than once"),
        ([len, max], ValueError, "`features` has 'encoder' more than once"),
        (5, TypeError, "`features` has 5; expected keys"),
        (["X_uni", None], TypeError, "`features` has None"),
        (("tiles", None), KeyError, r"`features` names the table 'tiles'; there is \['table'\]"),
    ],
)
def test_features_that_are_none(sdata: SpatialData, features: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose(sdata, features)


# Reading


def test_arrays_sparse_matrices_and_data_frames(sdata: SpatialData) -> None:
    table = sdata["table"]
    found = read(sdata, ["counts", "X_uni", "frame"])
    expected = np.hstack([table.obsm["counts"].toarray(), table.obsm["X_uni"], table.obsm["frame"].to_numpy()])
    np.testing.assert_array_equal(found.values, expected)
    assert known(found) == list(range(N))
    assert (found.common_scale, found.uncentered) == ([], [])
    n_features = {name: source["n_features"] for name, source in found.sources.items()}
    assert n_features == {"counts": 5, "X_uni": 4, "frame": 2}
    np.testing.assert_array_equal(found.arguments()[0], expected)
    found.values[:] = 0  # a copy
    assert table.obsm["X_uni"].any()


@pytest.mark.parametrize("dtype", ["float16", ">f4", ">f8", "float32", "int8", "bool", "uint64"])
def test_numbers_of_any_dtype(sdata: SpatialData, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 2, (N, 3)).astype(dtype)
    sdata["table"].obsm["X"] = values
    found = read(sdata, "X").values
    assert found.dtype.isnative
    assert found.dtype in (np.float32, np.float64)
    np.testing.assert_array_equal(found, values.astype(float))


def test_columns_are_matched_by_name(sdata: SpatialData) -> None:
    table = sdata["table"]
    first = read(sdata, "frame")
    assert first.sources["frame"]["columns"] == ["a", "b"]
    again = FeatureReads(first.sources)
    table.obsm["frame"] = table.obsm["frame"].assign(c=7.0)[["c", "b", "a"]]
    np.testing.assert_array_equal(read(sdata, again).values, first.values)
    table.obsm["frame"] = table.obsm["frame"][["c", "b"]]
    with pytest.raises(KeyError, match=r"`obsm\['frame'\]` lacks 1 columns that the model reads, such as \['a'\]"):
        read(sdata, again)
    table.obsm["frame"] = np.ones((N, 2))
    with pytest.raises(ValueError, match=r"is no data frame, but the model was fitted to one .*, such as \['a', 'b'\]"):
        read(sdata, again)
    of_array = FeatureReads(read(sdata, "X_uni").sources)
    table.obsm["X_uni"] = pd.DataFrame(table.obsm["X_uni"], index=table.obs_names)
    with pytest.raises(ValueError, match=r"is a data frame, but the model was fitted to an array.*`.to_numpy\(\)`"):
        read(sdata, of_array)


def test_colors(sdata: SpatialData) -> None:
    statistics = stp.pp.color_statistics(sdata, inplace=False)
    histogram = stp.pp.color_histogram(sdata, inplace=False)
    assert statistics is not None
    assert histogram is not None
    found = read(sdata, ["mean_od", "color_statistics", "color_histogram"])
    np.testing.assert_array_equal(found.values[:, :3], histogram.mean_od)
    np.testing.assert_array_equal(found.values[:, 3:201], statistics)
    np.testing.assert_array_equal(found.values[:, 201:], color_cubes(histogram))
    assert found.common_scale == [slice(201, 713)]
    assert not {"mean_od", "color_histogram", "color_statistics"} & {*sdata["table"].obsm, *sdata["table"].uns}


def test_color_cubes_by_hand(sdata: SpatialData) -> None:
    for bits in (7, 5, 3):
        histogram = stp.pp.color_histogram(sdata, bits=bits, inplace=False)
        assert histogram is not None
        cubes = color_cubes(histogram)
        assert cubes.shape == (N, 512)
        np.testing.assert_allclose((cubes**2).sum(axis=1), 1, rtol=1e-5)
        of_row = histogram.counts[7].toarray()[0]
        r, g, b = (histogram.codebook // 32).T
        for cube in np.argsort(cubes[7])[-3:]:
            inside = 64 * r.astype(int) + 8 * g + b == cube
            np.testing.assert_allclose(cubes[7, cube], np.sqrt(of_row[inside].sum() / of_row.sum()), rtol=1e-5)


def test_rows_that_lack_something_are_not_known(sdata: SpatialData) -> None:
    sdata["table"].obsm["X_uni"][[3, 5], 1] = np.nan
    sdata["table"].obsm["X_uni"][9] = np.inf
    found = read(sdata, ["frame", "X_uni"])
    assert known(found) == [i for i in range(N) if i not in (3, 5, 9)]
    assert len(found.fingerprints()) == N - 3
    assert len(set(found.fingerprints())) == N - 3


def test_only_chosen_spots_have_features(sdata: SpatialData) -> None:
    in_b = np.flatnonzero(sdata["table"].obs["section"] == "B")
    assert known(read(sdata, ["X_uni", "position"], shapes_key="B_spots")) == list(in_b)


def test_the_same_features_are_made_again_from_their_sources(sdata: SpatialData) -> None:
    first = read(sdata, ["X_uni", "color_statistics", "position", means], training=np.arange(6))
    assert first.encoded is not None
    assert first.encoded.shape == (N, 3)
    again = read(sdata, FeatureReads(first.sources, means), training=None)
    np.testing.assert_array_equal(again.values, first.values)
    assert again.sources == first.sources
    assert set(first.sources["position"]["frames"]) == {"A_spots", "B_spots"}
    assert first.uncentered == [slice(202, 202 + len(first.sources["position"]["columns"]))]


# Features in a table of their own


@pytest.fixture
def tiles(sdata: SpatialData) -> AnnData:
    """Features of the same spots, in another order, without one spot and with one that is no spot."""
    obs = sdata["table"].obs[["region", "spot_id"]].iloc[np.random.default_rng(0).permutation(N)[1:]].copy()
    obs.iloc[3, 1] = 9999
    obs.index = [f"tile{i}" for i in range(N - 1)]
    rng = np.random.default_rng(1)
    table = AnnData(sparse.csr_matrix(rng.normal(size=(N - 1, 3))), obs=obs, var=pd.DataFrame(index=["f0", "f1", "f2"]))
    table.obsm["X_uni"] = rng.normal(size=(N - 1, 4)).astype(np.float16)
    return TableModel.parse(table, region=["A_spots", "B_spots"], region_key="region", instance_key="spot_id")


def test_features_of_another_table_are_joined_by_instance(sdata: SpatialData, tiles: AnnData) -> None:
    sdata["uni_tiles"] = tiles
    reads = choose(sdata, [("uni_tiles", None), ("uni_tiles", "X_uni"), "X_uni"])
    assert list(reads.sources) == ["uni_tiles", "uni_tiles/X_uni", "X_uni"]
    found = read(sdata, reads)
    table = sdata["table"]
    expected = np.full((N, 7), np.nan)
    for row, (region, spot) in enumerate(zip(table.obs["region"], table.obs["spot_id"], strict=True)):
        there = np.flatnonzero((tiles.obs["region"] == region) & (tiles.obs["spot_id"] == spot))
        if len(there):
            expected[row] = np.hstack([tiles.X[there[0]].toarray()[0], tiles.obsm["X_uni"][there[0]]])
    np.testing.assert_array_equal(found.values[:, :7], expected)
    np.testing.assert_array_equal(found.values[:, 7:], table.obsm["X_uni"])
    assert len(known(found)) == N - 2
    assert found.sources["uni_tiles"]["columns"] == ["f0", "f1", "f2"]

    sdata["uni_tiles"] = tiles[:, ["f2", "f0", "f1"]].copy()
    np.testing.assert_array_equal(read(sdata, FeatureReads(found.sources)).values, found.values)


def test_tables_without_the_features(sdata: SpatialData, tiles: AnnData) -> None:
    sdata["uni_tiles"] = tiles
    reads = choose(sdata, ("uni_tiles", "X_uni"))
    with pytest.raises(KeyError, match=r"The table 'uni_tiles' has no `obsm\['X_conch'\]`, only \['X_uni'\]"):
        read(sdata, ("uni_tiles", "X_conch"))
    tiles.obs["spot_id"] += 100_000
    with pytest.raises(ValueError, match=r"'uni_tiles' has features for none of the spots \['A_spots', 'B_spots'\]"):
        read(sdata, reads)
    del tiles.uns["spatialdata_attrs"]
    with pytest.raises(ValueError, match="'uni_tiles' does not say which spots it annotates"):
        read(sdata, reads)
    del sdata.tables["uni_tiles"]
    with pytest.raises(KeyError, match="The model reads features in the table 'uni_tiles', which is not there"):
        read(sdata, reads)


# What cannot be read


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.zeros((N, 2, 2)), ValueError, r"`obsm\['bad'\]` has the shape \(24, 2, 2\); expected \(n_obs, d\)"),
        (np.zeros((N, 0)), ValueError, r"`obsm\['bad'\]` has the shape \(24, 0\)"),
        (np.zeros((N, 2), dtype=complex), TypeError, r"`obsm\['bad'\]` has values that are no numbers \(complex"),
        ("words", TypeError, r"`obsm\['bad'\]` has values that are no numbers \(.*'tumor'"),
    ],
)
def test_values_that_are_no_features(sdata: SpatialData, value: Any, error: type[Exception], message: str) -> None:
    table = sdata["table"]
    words = pd.DataFrame({"region": ["tumor"] * N, "x": 1.0}, index=table.obs_names)
    table.obsm["bad"] = words if isinstance(value, str) else value
    with pytest.raises(error, match=message):
        read(sdata, "bad")


def test_features_that_the_table_lacks_or_has_in_another_width(sdata: SpatialData) -> None:
    reads = FeatureReads(read(sdata, ["X_uni", "frame"]).sources)
    table = sdata["table"]
    table.obsm["X_uni"] = np.zeros((N, 3))
    with pytest.raises(ValueError, match=r"'X_uni' has 3 features; the model was fitted to 4"):
        read(sdata, reads)
    del table.obsm["X_uni"]
    with pytest.raises(
        KeyError, match=r"The model reads \['X_uni'\] in `obsm`, which has \['counts', 'frame'\]. Compute"
    ):
        read(sdata, reads)


def test_encoders_that_lack_or_differ_or_are_too_many(sdata: SpatialData) -> None:
    sources = read(sdata, ["X_uni", means]).sources
    with pytest.raises(ValueError, match="features of an encoder, which is not saved with it: pass it as `encoder`"):
        FeatureReads(sources)
    with pytest.raises(ValueError, match="The encoder makes 192 features; the model was fitted to 3"):
        read(sdata, FeatureReads(sources, lambda patches: patches.flatten(1)))
    with pytest.raises(
        ValueError, match="`encoder` is given, but the model was not fitted to the features of an encoder"
    ):
        FeatureReads(sources_of(sdata, "X_uni"), means)
