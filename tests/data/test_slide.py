from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.transformations import Translation, set_transformation

from stpredict._data.elements import Elements
from stpredict._data.slide import Slide, open_slide, open_without_table, own_table, read_table, with_more_genes

MakeSData = Callable[..., SpatialData]
SMALL: dict[str, Any] = {"size": (110, 140), "n_spots": 12, "n_genes": 3}


def open_it(sdata: SpatialData, *, images: bool = True, **elements: Any) -> Slide:
    return open_slide(sdata, Elements(**elements), images=images)


# Arguments


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_key": 3}, r"`image_key` is 3; expected a string, \{shapes_key: image_key\} or None"),
        ({"shapes_key": 3}, "`shapes_key` is 3; expected a string, a list of strings or None"),
        ({"table_key": ["table"]}, r"`table_key` is \['table'\]; expected a string or None"),
        ({"coordinate_system": 3}, "`coordinate_system` is 3; expected a string or None"),
        ({"section_key": True}, "`section_key` is True; expected a string or None"),
        ({"patient_key": b"p"}, "`patient_key` is b'p'; expected a string or None"),
    ],
)
def test_elements_of_another_type(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Elements(**wrong)


def test_elements() -> None:
    assert Elements().chosen_spots is None
    assert Elements(shapes_key="A").chosen_spots == ("A",)
    assert Elements(shapes_key=["B", "A"]).chosen_spots == ("B", "A")
    assert (Elements(image_key="i").image_of("A"), Elements(image_key={"A": "i"}).image_of("B")) == ("i", None)


# Tables


def test_the_only_annotating_table_is_found(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    sdata["scores"] = AnnData(np.zeros((2, 2)))
    key, table = read_table(sdata, None)
    assert key == "table"
    assert table is sdata["table"]


def test_table_key_chooses(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    sdata["other"] = sdata["table"].copy()
    with pytest.raises(
        ValueError, match=r"Several tables annotate spots, \['table', 'other'\]. Choose one with `table_k"
    ):
        open_it(sdata)
    assert open_it(sdata, table_key="other").table is sdata["other"]
    with pytest.raises(KeyError, match=r"No table 'tabel'.*\['table', 'other'\]"):
        open_it(sdata, table_key="tabel")


@pytest.mark.parametrize("what", [AnnData(np.ones((2, 2))), None, "slide.zarr"], ids=["AnnData", "None", "path"])
def test_what_is_no_spatialdata(what: Any) -> None:
    with pytest.raises(TypeError, match=f"Expected a SpatialData, got {type(what).__name__}") as raised:
        open_it(what)
    assert ("that holds this table" in str(raised.value)) == isinstance(what, AnnData)


def test_no_table(make_sdata: MakeSData) -> None:
    with pytest.raises(ValueError, match=r"no table in `sdata.tables`.*TableModel\.parse"):
        open_it(make_sdata(table=False, **SMALL))


def test_table_without_annotation(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    del sdata["table"].uns["spatialdata_attrs"]
    for key in (None, "table"):
        with pytest.raises(
            ValueError, match=r"table 'table' does not say which spots.*as after `anndata.concat`.*parse"
        ):
            open_it(sdata, table_key=key)
    sdata["other"] = AnnData(np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"None of the tables \['table', 'other'\] says which spots it annotates"):
        open_it(sdata)


def test_repeated_gene_names(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    sdata["table"].var_names = ["ERBB2", "x", "ERBB2"]
    with pytest.raises(ValueError, match=r"'table' are not unique \(\['ERBB2'\] occur more than once.*make_unique"):
        open_it(sdata)


# What a slide tells


def test_rows_sections_and_patients(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2, n_without_spot=2, **SMALL)
    table = sdata["table"]
    table.obs["patient"] = np.where(table.obs["section"] == "A", 1, 2)
    slide = open_it(sdata, patient_key="patient")
    known = slide.mask(slide.rows)
    assert slide.rows.tolist() == sorted(slide.rows)
    assert (slide.n_obs, known.sum()) == (28, 24)
    np.testing.assert_array_equal(slide.section_of[known], table.obs["section"][known] + "_spots")
    assert (slide.section_of[~known] == "").all()
    assert slide.patient_of is not None
    np.testing.assert_array_equal(slide.patient_of[known], table.obs["patient"][known].astype(str))
    assert open_it(sdata).patient_of is None
    named = open_it(sdata, section_key="section")
    assert [named.title(spots) for spots in named.spots] == ["A", "B"]
    table.obs.loc[table.obs_names[named.spots[1].rows[0]], "section"] = "A"
    assert [named.title(spots) for spots in named.spots] == ["A", "B_spots"], "they have no name in common"
    with pytest.raises(KeyError, match=r"`patient_key` is 'Patient', which `obs` lacks; it has \[.*'patient'"):
        assert open_it(sdata, patient_key="Patient").patient_of


def test_rows_on_the_image(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2, **SMALL)
    set_transformation(sdata["A_spots"], Translation([60, 0], axes=("x", "y")), "A")
    slide = open_it(sdata)
    x = sdata["A_spots"].loc[slide.spots[0].instances].geometry.x.to_numpy() + 60
    expected = np.ones(24, dtype=bool)
    expected[slide.spots[0].rows] = x < 140
    assert 0 < (~expected).sum() < 12
    np.testing.assert_array_equal(slide.on_image, expected)
    assert open_it(sdata, images=False).on_image.all()


@pytest.mark.parametrize(
    "marks",
    [
        np.array([0, 1, 1] * 8),
        np.array([0.0, 1, 1] * 8, dtype=np.float32),
        np.array([False, True, True] * 8),
        pd.array([False, True, None] * 8, dtype="boolean"),
        pd.Categorical([0, 1, 1] * 8),
        np.array([0, 1, np.nan] * 8),
    ],
    ids=["int", "float", "bool", "nullable", "categorical", "gaps"],
)
def test_rows_beside_the_tissue(make_sdata: MakeSData, marks: Any) -> None:
    # A gap, as in another section after a concatenation, is no mark.
    sdata = make_sdata(2, **SMALL)
    assert open_it(sdata).in_tissue.all()
    sdata["table"].obs["in_tissue"] = marks
    np.testing.assert_array_equal(open_it(sdata).in_tissue, [False, True, True] * 8)


def test_spots_need_no_image(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2, shapes_at="scale", n_without_row=3, **SMALL)
    sections = open_it(sdata).sections
    del sdata.images["A_image"], sdata.images["B_image"]
    slide = open_it(sdata, images=False)
    assert slide.sections == []
    for spots, section in zip(slide.spots, sections, strict=True):
        for name in ("name", "rows", "instances", "xy", "radii"):
            np.testing.assert_array_equal(getattr(spots, name), getattr(section, name), err_msg=name)


def test_slides_without_some_spots(make_sdata: MakeSData) -> None:
    slide = open_it(make_sdata(3, **SMALL)).without(["B_spots"])
    assert (
        [spots.name for spots in slide.spots] == [section.name for section in slide.sections] == ["A_spots", "C_spots"]
    )
    assert set(slide.section_of) == {"A_spots", "", "C_spots"}


def test_elements_read_from_zarr_are_the_same(make_general: Callable[[], SpatialData], on_disk: Path) -> None:
    sdata, backed = make_general(), sd.read_zarr(on_disk)
    for ours, theirs in zip(open_it(sdata).sections, open_it(backed).sections, strict=True):
        for name in ("centers", "radii", "instances", "rows", "affine"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
        np.testing.assert_array_equal(ours.pixels.compute(), theirs.pixels.compute())


# New tables


@pytest.mark.parametrize("instances", ["int", "str"])
def test_new_tables_annotate_their_spots(make_sdata: MakeSData, instances: str) -> None:
    sdata = make_sdata(2, table=False, instances=instances, **SMALL)
    names = ["B_spots", "A_spots"]
    slide = open_without_table(sdata, Elements(shapes_key=names), "table", ["g1", "g2"])
    table = slide.table
    assert slide.is_new
    assert "table" not in sdata.tables
    assert table.obs_names.is_unique
    assert table.X is None
    assert list(table.var_names) == ["g1", "g2"]
    sdata["table"] = table
    again = {section.name: section for section in open_it(sdata).sections}
    np.testing.assert_array_equal(np.concatenate([section.rows for section in slide.sections]), np.arange(24))
    for section in slide.sections:
        np.testing.assert_array_equal(section.instances, sdata[section.name].index)
        for name in ("rows", "centers", "instances"):
            np.testing.assert_array_equal(getattr(section, name), getattr(again[section.name], name), err_msg=name)


def test_new_tables_for_some_of_several_spots(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2, table=False, **SMALL)
    with pytest.raises(ValueError, match=r"several spots elements, \['A_spots', 'B_spots'\].*`shapes_key`"):
        open_without_table(sdata, Elements(), "table", ["g"])
    for name in sdata.shapes:
        sdata[name].index = range(12)
    table = open_without_table(sdata, Elements(shapes_key=list(sdata.shapes)), "table", ["g"]).table
    assert {"A_spots_0", "B_spots_11"} <= set(table.obs_names), "equal names of spots are told apart"


def test_tables_of_some_genes_alone(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2, n_without_spot=2, **SMALL)
    slide = open_it(sdata, shapes_key=["B_spots"], section_key="section")
    own = own_table(slide, "predicted", ["x", "y"])
    assert (own.table_key, own.is_new, own.n_obs, list(own.table.var_names)) == ("predicted", True, 12, ["x", "y"])
    rows = slide.rows
    for before, after in ((slide.spots[0], own.spots[0]), (slide.sections[0], own.sections[0])):
        np.testing.assert_array_equal(rows[after.rows], before.rows)
    assert list(own.table.obs_names) == list(slide.table.obs_names[rows])
    assert (own.table.obs["section"] == "B").all()
    sdata["predicted"] = own.table
    again = open_it(sdata, table_key="predicted").sections[0]
    np.testing.assert_array_equal(again.centers, own.sections[0].centers)
    np.testing.assert_array_equal(again.rows, own.sections[0].rows)


def test_tables_for_predictions_take_more_genes(make_sdata: MakeSData) -> None:
    sdata = make_sdata(table=False, **SMALL)
    slide = open_without_table(sdata, Elements(), "table", ["g1", "g2"])
    table = slide.table
    table.layers["m"] = np.arange(24, dtype=np.float32).reshape(12, 2)
    table.var["m_fitted"] = [True, False]
    table.uns["m"], table.obsm["spatial"] = {"loss": np.arange(3)}, np.ones((12, 2))
    sdata["table"] = table
    slide = open_it(sdata)
    assert with_more_genes(slide, ["g2"]) is slide
    wider = with_more_genes(slide, ["g3", "g2"])
    assert (wider.is_new, list(wider.table.var_names)) == (True, ["g1", "g2", "g3"])
    np.testing.assert_array_equal(wider.table.layers["m"], np.column_stack([table.layers["m"], np.full(12, np.nan)]))
    assert wider.table.var["m_fitted"].tolist() == [True, False, False]
    assert wider.table.var["m_fitted"].dtype == bool
    assert wider.table.uns.keys() == table.uns.keys()
    assert list(sdata["table"].var_names) == ["g1", "g2"], "not yet"
    measured = open_it(make_sdata(**SMALL))
    assert with_more_genes(measured, ["new"]) is measured
