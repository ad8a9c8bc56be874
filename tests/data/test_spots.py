from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import BaseTransformation

from stpredict._data.elements import Elements
from stpredict._data.slide import Slide, open_slide
from stpredict._data.spots import Spots

Placements = dict[str, tuple[BaseTransformation, np.ndarray]]
MakeSData = Callable[..., SpatialData]
SMALL: dict[str, Any] = {"size": (110, 140), "n_spots": 12, "n_genes": 3}


def read(data: SpatialData | AnnData, **elements: Any) -> list[Spots]:
    return list(open_slide(data, Elements(**elements), images=False).spots)


# Which rows


@pytest.mark.parametrize("instances", ["int", "str"])
def test_rows_are_matched_by_instance_not_by_position(make_sdata: MakeSData, instances: str, log: io.StringIO) -> None:
    sdata = make_sdata(2, instances=instances, n_without_row=3, n_without_spot=2, **SMALL)
    table = sdata["table"]
    for name, spots in zip("AB", read(sdata), strict=True):
        obs = table.obs.iloc[spots.rows]
        assert (obs["region"] == f"{name}_spots").all()
        assert (obs["spot_id"].to_numpy() == spots.instances).all()
        shapes = sdata[f"{name}_spots"].loc[spots.instances]
        np.testing.assert_array_equal(spots.xy, np.column_stack([shapes.geometry.x, shapes.geometry.y]))
        np.testing.assert_array_equal(spots.radii, shapes["radius"])
        assert len(spots.rows) == 9
        assert f"2 of 11 rows of '{name}_spots' have no spot" in log.getvalue()
        assert f"3 of 12 spots of '{name}_spots' have no row" in log.getvalue()


def test_strings_do_not_match_integers(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    sdata["A_spots"].index = sdata["A_spots"].index.astype(str)
    with pytest.raises(ValueError, match=r"'spot_id' \(int64, such as \[1\d\d.*such as \['1.*1 and '1'"):
        read(sdata)


def test_regions_that_have_lost_all_rows(make_sdata: MakeSData) -> None:
    # What a filter of scanpy's may leave; spatialdata itself would not take such a table.
    sdata = make_sdata(2, **SMALL)
    table = sdata["table"]
    table._inplace_subset_obs((table.obs["section"] == "B").to_numpy())
    with pytest.raises(ValueError, match="No row of the table belongs to a spot of 'A_spots'"):
        read(sdata)
    assert len(read(sdata, shapes_key="B_spots")[0].rows) == 12


def test_rows_and_spots_that_are_not_one_to_one(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    index = sdata["A_spots"].index
    sdata["A_spots"].index = [0, 0, *range(2, 12)]
    with pytest.raises(ValueError, match="index of the spots 'A_spots' is not unique"):
        read(sdata)
    sdata["A_spots"].index = index
    sdata["table"].obs["spot_id"] = sdata["table"].obs["spot_id"].to_numpy()[[0, 0, *range(2, 12)]]
    with pytest.raises(ValueError, match="Several rows of the table belong to the same spot of 'A_spots'"):
        read(sdata)


@pytest.mark.parametrize(("column", "what"), [("region", "region"), ("spot_id", "instance")])
def test_columns_that_the_table_has_lost(make_sdata: MakeSData, column: str, what: str) -> None:
    sdata = make_sdata(**SMALL)
    del sdata["table"].obs[column]
    with pytest.raises(KeyError, match=rf"says that its {what} column is '{column}'.*which `obs` lacks; it has \["):
        read(sdata)


# Which spots


def test_shapes_key_chooses_spots(make_sdata: MakeSData) -> None:
    sdata = make_sdata(3, **SMALL)
    assert [s.name for s in read(sdata)] == ["A_spots", "B_spots", "C_spots"]
    assert [s.name for s in read(sdata, shapes_key="B_spots")] == ["B_spots"]
    assert [s.name for s in read(sdata, shapes_key=["C_spots", "A_spots"])] == ["C_spots", "A_spots"]
    with pytest.raises(ValueError, match=r"`shapes_key` names \['A_spots'\] more than once"):
        read(sdata, shapes_key=["A_spots", "A_spots"])
    with pytest.raises(KeyError, match=r"No spots 'spots' in `sdata.shapes`; it has \['A_spots', 'B_spots', 'C_spots'"):
        read(sdata, shapes_key="spots")


def test_spots_that_the_table_does_not_annotate(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    sdata["cells"] = sdata["A_spots"].copy()
    with pytest.raises(ValueError, match=r"annotates \['A_spots'\], not the spots \['cells'\].*`table_key`"):
        read(sdata, shapes_key="cells")


def test_table_that_annotates_something_else(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    sdata["nuclei"] = Labels2DModel.parse(np.zeros((20, 20), dtype=np.int32), dims=("y", "x"))
    table = AnnData(sparse.eye(3, format="csr"))
    table.obs = pd.DataFrame({"region": pd.Categorical(["nuclei"] * 3), "cell": [1, 2, 3]}, index=list("abc"))
    sdata["table"] = TableModel.parse(table, region="nuclei", region_key="region", instance_key="cell")
    with pytest.raises(ValueError, match=r"'nuclei' \(labels\), none of which are spots.*\['A_spots'\].*`table_key`"):
        read(sdata)


def test_regions_that_are_not_loaded_are_left_out(make_sdata: MakeSData, log: io.StringIO) -> None:
    sdata = make_sdata(2, **SMALL)
    del sdata.shapes["A_spots"]
    (spots,) = read(sdata)
    assert spots.name == "B_spots"
    assert (sdata["table"].obs["section"].iloc[spots.rows] == "B").all()
    assert "also annotates ['A_spots'], which `sdata.shapes` lacks" in log.getvalue()


def test_no_spots(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    spots = sdata.shapes["A_spots"]
    sdata.shapes.data["A_spots"] = spots.iloc[:0]
    with pytest.raises(ValueError, match="'A_spots' are empty"):
        read(sdata)
    del sdata.shapes["A_spots"]
    with pytest.raises(ValueError, match="no spots in `sdata.shapes`"):
        read(sdata)


def test_radii_must_be_finite_and_positive(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    for bad in (np.nan, np.inf, 0.0, -1.0):
        sdata["A_spots"].iloc[4, sdata["A_spots"].columns.get_loc("radius")] = bad
        with pytest.raises(ValueError, match="'A_spots' have centers or radii that are not finite and positive"):
            read(sdata)


def test_polygons_count_as_circles_of_their_area(make_sdata: MakeSData, log: io.StringIO) -> None:
    circles, polygons = (make_sdata(polygons=polygons, **SMALL) for polygons in (False, True))
    (a,), (b,) = read(circles), read(polygons)
    np.testing.assert_allclose(a.xy, b.xy)
    np.testing.assert_allclose(a.radii, b.radii, rtol=1e-4)
    assert "'A_spots' holds polygons" in log.getvalue()


def test_long_lists_are_cut(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    for i in range(20):
        sdata[f"spots{i}"] = ShapesModel.parse(np.ones((1, 2)), geometry=0, radius=1.0)
    with pytest.raises(KeyError, match=r"'spots10', \.\.\. \(21 in all\)\]"):
        read(sdata, shapes_key="nothing")


# A table by itself


@pytest.fixture
def table(make_sdata: MakeSData) -> AnnData:
    sdata = make_sdata(2, **SMALL)
    table: AnnData = sdata["table"]
    table.obsm["spatial"] = np.random.default_rng(0).uniform(0, 100, (24, 2))
    return table


def open_table(table: AnnData, **elements: Any) -> Slide:
    return open_slide(table, Elements(**elements), images=False)


def test_a_table_by_itself_has_places_and_sections(table: AnnData) -> None:
    slide = open_table(table)
    assert (slide.table is table, slide.table_key, slide.home, slide.sections) == (True, "", None, [])
    assert [spots.name for spots in slide.spots] == ["A_spots", "B_spots"]
    for name, spots in zip("AB", slide.spots, strict=True):
        np.testing.assert_array_equal(spots.rows, np.flatnonzero(table.obs["section"] == name))
        np.testing.assert_array_equal(spots.xy, table.obsm["spatial"][spots.rows])
        assert list(spots.instances) == list(table.obs_names[spots.rows])
    assert slide.on_image.all()


def test_sections_of_a_table_by_itself(table: AnnData) -> None:
    table.obs["core"] = [f"core{i % 3}" for i in range(24)]
    assert [spots.name for spots in open_table(table, section_key="core").spots] == ["core0", "core1", "core2"]
    del table.uns["spatialdata_attrs"]
    assert [spots.name for spots in open_table(table).spots] == ["section"]
    with pytest.raises(KeyError, match=r"`section_key` is 'cor', which `obs` lacks; it has \[.*'core'"):
        open_table(table, section_key="cor")
    table.obs["core"] = table.obs["core"].where(table.obs["core"] != "core1")
    with pytest.raises(ValueError, match=r"`obs\['core'\]` \(`section_key`\) has 8 missing values"):
        open_table(table, section_key="core")


def test_rows_without_a_place_have_no_spot(table: AnnData) -> None:
    table.obsm["spatial"][[3, 7]] = [[np.nan, 1], [2, np.inf]]
    slide = open_table(table)
    np.testing.assert_array_equal(slide.rows, np.delete(np.arange(24), [3, 7]))
    assert not slide.on_image[[3, 7]].any()
    assert list(slide.section_of[[3, 7]]) == ["", ""]
    table.obsm["spatial"][:] = np.nan
    with pytest.raises(ValueError, match="no finite row"):
        open_table(table)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (np.zeros((24, 3)), r"shape \(24, 3\)"),
        (np.zeros(24)[:, None], r"shape \(24, 1\)"),
        (np.full((24, 2), "a", dtype=object), "dtype object"),
    ],
)
def test_places_that_are_none(table: AnnData, places: np.ndarray, message: str) -> None:
    table.obsm["spatial"] = places
    with pytest.raises(ValueError, match=rf"`obsm\['spatial'\]` has the .*{message}.*expected \(n_obs, 2\) numbers"):
        open_table(table)


def test_a_table_without_places(table: AnnData) -> None:
    del table.obsm["spatial"]
    with pytest.raises(KeyError, match=r"no `obsm\['spatial'\]`, only \[\]. Pass the SpatialData that holds it, or wr"):
        open_table(table)


@pytest.mark.parametrize("dtype", ["int32", "float16", ">f8"])
def test_places_of_any_numbers(table: AnnData, dtype: str) -> None:
    table.obsm["spatial"] = np.arange(48).reshape(24, 2).astype(dtype)
    first = open_table(table).spots[0]
    assert first.xy.dtype == np.float64
    np.testing.assert_array_equal(first.xy, np.arange(48).reshape(24, 2)[first.rows])
