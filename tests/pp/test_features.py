from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from spatialdata import SpatialData

import stpredict as stp
from stpredict._data.slide import read_sections
from stpredict.pp._features import Features, choose_sources, color_cubes, needs_image, read_features, write_made

MakeSData = Callable[..., SpatialData]


def choose(sdata: SpatialData, features: Any) -> dict[str, dict[str, Any]]:
    return choose_sources(sdata["table"], features, image_size=8, spot_scale=1.0)[0]


def read(sdata: SpatialData, features: Any, **options: Any) -> Features:
    """Choose and read; a mapping is taken as chosen."""
    table = sdata["table"]
    sources, encoder = (features, None)
    if not isinstance(features, dict):
        sources, encoder = choose_sources(table, features, image_size=8, spot_scale=1.0)
    sections = read_sections(sdata, table) if needs_image(sources) else []
    return read_features(
        sdata, table, sections, sources, **{"encoder": encoder, "shapes_key": None, "device": "cpu", **options}
    )


@pytest.fixture
def sdata(make_sdata: MakeSData) -> SpatialData:
    sdata = make_sdata(2)
    table = sdata["table"]
    rng = np.random.default_rng(0)
    table.obsm["X_uni"] = rng.normal(size=(60, 4)).astype(np.float32)
    table.obsm["counts"] = sparse.csr_matrix(rng.poisson(1, (60, 5)))
    table.obsm["frame"] = pd.DataFrame({"a": rng.normal(size=60), "b": np.arange(60)}, index=table.obs_names)
    return sdata


# Where features come from


def test_sources(sdata: SpatialData) -> None:
    assert choose(sdata, "X_uni") == {"X_uni": {"from": "obsm"}}
    assert list(choose(sdata, ["frame", "position", "X_uni"])) == ["frame", "position", "X_uni"]
    assert choose(sdata, "color_statistics") == {
        "color_statistics": {"from": "color", "fields": [0.5, 1.0, 2.0, 3.0, 4.0, 6.0]}
    }
    assert choose(sdata, ("mean_od",)) == {"mean_od": {"from": "color", "bits": 5, "field": 2.0}}
    sources, encoder = choose_sources(sdata["table"], ["X_uni", len], image_size=8, spot_scale=1.5)
    assert sources["encoder"] == {"from": "encoder", "image_size": 8, "field": 1.5}
    assert encoder is len


def test_settings_of_what_the_table_holds_are_kept(sdata: SpatialData) -> None:
    stp.pp.color_statistics(sdata, spot_scale=(1, 2))
    stp.pp.color_histogram(sdata, bits=4, spot_scale=1.5)
    assert choose(sdata, "color_statistics")["color_statistics"]["fields"] == [1, 2]
    for name in ("mean_od", "color_histogram"):
        assert choose(sdata, name) == {name: {"from": "color", "bits": 4, "field": 1.5}}


@pytest.mark.parametrize("name", ["mean_od", "color_histogram", "color_statistics", "position"])
def test_what_others_put_into_the_table_is_taken_as_it_is(sdata: SpatialData, name: str) -> None:
    assert needs_image(choose(sdata, name)) == (name != "position")
    sdata["table"].obsm[name] = np.ones((60, 2))
    assert choose(sdata, name) == {name: {"from": "obsm"}}
    assert not needs_image(choose(sdata, name))


def test_needs_image(sdata: SpatialData) -> None:
    assert not needs_image(choose(sdata, ["X_uni", "position"]))
    assert needs_image(choose(sdata, ["X_uni", "mean_od"]))
    assert needs_image(choose(sdata, lambda patches: patches))


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ("X_conch", KeyError, r"No features 'X_conch' in `obsm`; it has \['X_uni', .*'mean_od', 'color_histogram'"),
        ([], ValueError, "`features` is empty"),
        (["X_uni", "X_uni"], ValueError, "`features` has 'X_uni' more than once"),
        ([len, max], ValueError, "`features` has 'encoder' more than once"),
        (5, TypeError, "`features` has 5; expected keys"),
        (["X_uni", None], TypeError, "`features` has None"),
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
    assert found.known.all()
    assert found.common_scale == []
    assert {name: source["n_features"] for name, source in found.sources.items()} == {
        "counts": 5,
        "X_uni": 4,
        "frame": 2,
    }
    found.values[:] = 0  # a copy
    assert table.obsm["X_uni"].any()


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
    assert set(found.made) == {"color_histogram", "color_statistics"}


def test_color_cubes_by_hand(sdata: SpatialData) -> None:
    for bits in (8, 5, 3):
        histogram = stp.pp.color_histogram(sdata, bits=bits, inplace=False)
        assert histogram is not None
        cubes = color_cubes(histogram)
        assert cubes.shape == (60, 512)
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
    np.testing.assert_array_equal(np.flatnonzero(~found.known), [3, 5, 9])


def test_only_chosen_spots_have_features(sdata: SpatialData) -> None:
    in_b = (sdata["table"].obs["section"] == "B").to_numpy()
    np.testing.assert_array_equal(read(sdata, ["X_uni", "position"], shapes_key="B_spots").known, in_b)


def test_what_was_made_is_written(sdata: SpatialData) -> None:
    found = read(sdata, ["mean_od", "color_statistics", lambda patches: patches.mean(dim=(2, 3)), "position"])
    table = sdata["table"]
    assert not {"mean_od", "color_statistics"} & set(table.obsm)
    write_made(table, "key", found.made)
    np.testing.assert_array_equal(table.obsm["mean_od"], found.values[:, :3])
    np.testing.assert_array_equal(table.obsm["color_statistics"], found.values[:, 3:201])
    np.testing.assert_array_equal(table.obsm["key_features"], found.values[:, 201:204])
    assert {"color_histogram", "color_statistics"} <= set(table.uns)


def test_the_same_features_are_made_again_from_their_sources(sdata: SpatialData) -> None:
    encoder: Any = lambda patches: patches.mean(dim=(2, 3))
    first = read(sdata, ["X_uni", "color_statistics", "position", encoder])
    again = read(sdata, first.sources, encoder=encoder)
    np.testing.assert_array_equal(again.values, first.values)
    assert again.sources == first.sources
    assert set(first.sources["position"]["frames"]) == {"A_spots", "B_spots"}


# What cannot be read


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.zeros((60, 2, 2)), ValueError, r"`obsm\['bad'\]` has the shape \(60, 2, 2\); expected \(n_obs, d\)"),
        (np.zeros((60, 0)), ValueError, r"`obsm\['bad'\]` has the shape \(60, 0\)"),
        ("words", TypeError, r"`obsm\['bad'\]` has values that are no numbers \(.*'tumour'"),
    ],
)
def test_values_that_are_no_features(sdata: SpatialData, value: Any, error: type[Exception], message: str) -> None:
    table = sdata["table"]
    words = pd.DataFrame({"region": ["tumour"] * 60, "x": 1.0}, index=table.obs_names)
    table.obsm["bad"] = words if isinstance(value, str) else value
    with pytest.raises(error, match=message):
        read(sdata, "bad")


def test_features_that_the_table_lacks_or_has_in_another_width(sdata: SpatialData) -> None:
    sources = read(sdata, ["X_uni", "frame"]).sources
    table = sdata["table"]
    table.obsm["X_uni"] = np.zeros((60, 3))
    with pytest.raises(ValueError, match=r"`obsm\['X_uni'\]` has 3 features; the model was fitted to 4"):
        read(sdata, sources)
    del table.obsm["X_uni"]
    with pytest.raises(
        KeyError, match=r"The model reads \['X_uni'\] in `obsm`, which has \['counts', 'frame'\]. Compute"
    ):
        read(sdata, sources)


def test_encoders_that_lack_or_differ_or_are_too_many(sdata: SpatialData) -> None:
    sources = read(sdata, ["X_uni", lambda patches: patches.mean(dim=(2, 3))]).sources
    with pytest.raises(ValueError, match="features of an encoder, which is not saved with it: pass it as `encoder`"):
        read(sdata, sources)
    with pytest.raises(ValueError, match="The encoder makes 192 features; the model was fitted to 3"):
        read(sdata, sources, encoder=lambda patches: patches.flatten(1))
    with pytest.raises(
        ValueError, match="`encoder` is given, but the model was not fitted to the features of an encoder"
    ):
        read(sdata, "X_uni", encoder=lambda patches: patches.flatten(1))
