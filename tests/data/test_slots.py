from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import TableModel

import stpredict as stp
from stpredict._data import slots
from stpredict._data.slide import read_sections
from stpredict.pp import _histogram as _histogram

MakeSData = Callable[..., SpatialData]


@pytest.fixture
def table() -> AnnData:
    return AnnData(np.ones((4, 3), dtype=np.float32), var=pd.DataFrame(index=["a", "b", "c"]))


# Keys


@pytest.mark.parametrize("key", ["nsl", "my-model.v2", "NSL_5", "größe", "_x"])
def test_keys_that_can_be_stored(table: AnnData, key: str, tmp_path: Path) -> None:
    slots.check_key(table, key)
    slots.write_predictions(table, key, ["a"], np.zeros((4, 1)), {"params": {"model": "nsl"}})
    slots.check_key(table, key)  # and written over
    table.obs["region"] = pd.Categorical(["spots"] * 4)
    table.obs["spot"] = range(4)
    parsed = TableModel.parse(table, region="spots", region_key="region", instance_key="spot")
    SpatialData(tables={"table": parsed}).write(tmp_path / "slide.zarr")
    assert key in sd.read_zarr(tmp_path / "slide.zarr")["table"].layers


@pytest.mark.parametrize("key", ["", ".", "..", "__nsl", "a/b", "a b", "a\\b", "nsl:1", "\n"])
def test_keys_that_cannot_be_stored(table: AnnData, key: str) -> None:
    with pytest.raises(ValueError, match="cannot be stored on disk: use letters, digits, '_', '-' and '.'"):
        slots.check_key(table, key)


@pytest.mark.parametrize("key", [None, 3, ["nsl"]])
def test_keys_that_are_no_strings(table: AnnData, key: Any) -> None:
    with pytest.raises(TypeError, match=r"`key_added` is .*; expected a string"):
        slots.check_key(table, key)


@pytest.mark.parametrize("slot", ["layers", "uns"])
def test_keys_that_differ_in_case_only(table: AnnData, slot: str) -> None:
    getattr(table, slot)["Nsl"] = np.zeros((4, 3))
    with pytest.raises(ValueError, match=rf"`key_added` 'nsl' .*`{slot}\['Nsl'\]` only in case"):
        slots.check_key(table, "nsl")


@pytest.mark.parametrize("slot", ["layers", "uns"])
@pytest.mark.parametrize(
    "content", [np.zeros((4, 3)), {"params": {"n": 3}}, {"note": "mine"}], ids=["array", "n", "note"]
)
def test_keys_that_belong_to_someone_else(table: AnnData, slot: str, content: Any) -> None:
    if slot == "layers":
        content = np.zeros((4, 3))
    getattr(table, slot)["nsl"] = content
    with pytest.raises(ValueError, match=rf"`{slot}\['nsl'\]` exists and holds no predictions of a model"):
        slots.check_key(table, "nsl")


@pytest.mark.parametrize("column", ["nsl_fitted", "NSL_Fitted"])
def test_columns_that_belong_to_someone_else(table: AnnData, column: str) -> None:
    # Overwritten without a word, or two columns that SpatialData refuses to write.
    table.var[column] = "mine"
    with pytest.raises(ValueError, match=column):
        slots.check_key(table, "nsl")


@pytest.mark.parametrize("key", ["color_histogram", "spatialdata_attrs"])
def test_keys_of_the_package_itself(make_sdata: MakeSData, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        slots.check_key(make_sdata()["table"], key)


# Predictions


def test_predictions_go_to_their_genes(table: AnnData) -> None:
    predicted = np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9], [np.nan] * 3])
    slots.write_predictions(table, "m", ["c", "stranger", "a"], predicted, {"loss": np.arange(3)})
    layer = table.layers["m"]
    assert layer.dtype == np.float32
    np.testing.assert_array_equal(layer, [[3, np.nan, 1], [6, np.nan, 4], [9, np.nan, 7], [np.nan] * 3])
    assert table.var["m_fitted"].tolist() == [True, False, True]
    assert table.uns["m"]["genes"].tolist() == ["c", "stranger", "a"]
    np.testing.assert_array_equal(table.uns["m"]["loss"], [0, 1, 2])


def test_overlap(table: AnnData, log: io.StringIO) -> None:
    slots.check_overlap(table, ["c", "b"])
    assert log.getvalue() == ""
    slots.check_overlap(table, ["a", "x", "y"])
    assert "The table lacks 2 of the model's 3 genes" in log.getvalue()
    with pytest.raises(ValueError, match=r"none of the model's 2 genes \(such as \['x', 'y'\]; .*\['a', 'b', 'c'\]\)"):
        slots.check_overlap(table, ["x", "y"])


# A table for spots that have none


@pytest.mark.parametrize("instances", ["int", "str"])
@pytest.mark.parametrize("n_sections", [1, 2])
def test_new_tables_annotate_their_spots(make_sdata: MakeSData, n_sections: int, instances: str) -> None:
    sdata = make_sdata(n_sections, table=False, instances=instances)
    names = list(sdata.shapes)
    sections = read_sections(sdata, None, shapes_key=names)
    table = slots.empty_table(sections, ["g1", "g2"])
    assert table.obs_names.is_unique
    assert table.X is None
    assert list(table.var_names) == ["g1", "g2"]
    sdata["table"] = table
    for section, again in zip(sections, read_sections(sdata, table), strict=True):
        np.testing.assert_array_equal(section.rows, again.rows)
        np.testing.assert_array_equal(section.centers, again.centers)


def test_new_tables_tell_equal_spot_names_apart(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2, table=False)
    for name in sdata.shapes:
        sdata[name].index = range(30)
    table = slots.empty_table(read_sections(sdata, None, shapes_key=list(sdata.shapes)), ["g"])
    assert table.obs_names.is_unique
    assert {"A_spots_0", "B_spots_29"} <= set(table.obs_names)


# Histograms


def use(sdata: SpatialData, **options: Any) -> _histogram.ColorHistogram:
    """What a model would work with."""
    options = {"bits": 5, "field": 2.0, **options}
    return _histogram.cached_color_histogram(read_sections(sdata, sdata["table"]), sdata["table"], **options)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever pixels are counted."""
    calls: list[int] = []
    original = _histogram.histogram_of_rows

    def spy(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return original(*arguments, **keywords)

    monkeypatch.setattr(_histogram, "histogram_of_rows", spy)
    return calls


def test_a_stored_histogram_is_used(make_sdata: MakeSData, counted: list[int]) -> None:
    sdata = make_sdata(2)
    stp.pp.color_histogram(sdata, bits=5, spot_scale=2.0)
    expected = stp.pp.color_histogram(sdata, bits=5, spot_scale=2.0, inplace=False)
    assert expected is not None
    counted.clear()
    found = use(sdata)
    assert not counted
    np.testing.assert_array_equal(found.counts.toarray(), expected.counts.toarray())
    for name in ("codebook", "mean_od", "coverage", "n_pixels", "od"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("way", ["zarr", "h5ad"])
def test_a_stored_histogram_survives_the_disk(
    make_sdata: MakeSData, counted: list[int], tmp_path: Path, way: str
) -> None:
    sdata = make_sdata(2, image_at="sequence", shapes_at="shear", scale_factors=[2], instances="str")
    stp.pp.color_histogram(sdata, bits=5, spot_scale=2.0)
    if way == "zarr":
        sdata.write(tmp_path / "slide.zarr")
        sdata = sd.read_zarr(tmp_path / "slide.zarr")
    else:
        sdata["table"].write_h5ad(tmp_path / "table.h5ad")
        table = ad.read_h5ad(tmp_path / "table.h5ad")
        # h5ad makes an array of the list of regions, which spatialdata does not take.
        table.uns["spatialdata_attrs"]["region"] = list(table.uns["spatialdata_attrs"]["region"])
        sdata["table"] = table
    counted.clear()
    use(sdata)
    assert not counted


@pytest.mark.parametrize("part", ["obsm/color_histogram", "obsm/mean_od", "obs/coverage", "uns/color_histogram"])
def test_an_incomplete_histogram_is_counted_anew(make_sdata: MakeSData, counted: list[int], part: str) -> None:
    sdata = make_sdata()
    stp.pp.color_histogram(sdata, bits=5, spot_scale=2.0)
    slot, key = part.split("/")
    del getattr(sdata["table"], slot)[key]
    counted.clear()
    use(sdata)
    assert counted


def test_a_histogram_of_something_else_is_not_used(
    make_sdata: MakeSData, new_image: Callable[..., Any], counted: list[int]
) -> None:
    sdata = make_sdata(2)
    table = sdata["table"]

    def is_counted(**options: Any) -> bool:
        stp.pp.color_histogram(make_sdata(2), bits=5, spot_scale=2.0)
        counted.clear()
        use(sdata, **options)
        return bool(counted)

    stp.pp.color_histogram(sdata, bits=5, spot_scale=2.0)
    assert not is_counted()
    assert is_counted(bits=4)
    assert is_counted(field=1.5)

    image, spots = sdata["A_image"], sdata["A_spots"].copy()
    sdata["A_image"] = new_image(
        image.data[:, :-1].compute(), sd.transformations.get_transformation(image, get_all=True)
    )
    assert is_counted()
    sdata["A_image"] = image
    assert not is_counted()

    sdata["A_spots"]["radius"] *= 1.5
    assert is_counted(), "other radii"
    sdata["A_spots"] = spots.copy()
    assert not is_counted()
    sdata["A_spots"]["geometry"] = sdata["A_spots"].geometry.translate(5, 0)
    assert is_counted(), "other places"
    sdata["A_spots"] = spots
    assert not is_counted()

    stp.pp.color_histogram(sdata, bits=5, spot_scale=2.0, shapes_key="A_spots")
    assert is_counted(), "of one section only"
    assert table is sdata["table"]


def test_rows_keep_their_histogram_when_the_table_is_cut(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2)
    stp.pp.color_histogram(sdata, bits=5, spot_scale=2.0)
    rows = np.random.default_rng(0).permutation(60)[:40]
    sdata["table"] = sdata["table"][rows].copy()
    found, expected = use(sdata), stp.pp.color_histogram(sdata, bits=5, spot_scale=2.0, inplace=False)
    assert expected is not None
    np.testing.assert_array_equal(found.mean_od, expected.mean_od)
    np.testing.assert_array_equal(found.n_pixels, expected.n_pixels)
