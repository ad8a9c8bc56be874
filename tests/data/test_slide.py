from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import BaseTransformation, Identity, Scale, Translation, set_transformation

from stpredict._data.slide import Section, read_sections, read_spots, read_table, section_name

Placements = dict[str, tuple[BaseTransformation, np.ndarray]]
MakeSData = Callable[..., SpatialData]


def read(sdata: SpatialData, **options: Any) -> list[Section]:
    return read_sections(sdata, read_table(sdata)[1], **options)


# Tables


def test_the_only_annotating_table_is_found(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    sdata["scores"] = AnnData(np.zeros((2, 2)))
    key, table = read_table(sdata)
    assert key == "table"
    assert table is sdata["table"]


def test_table_key_chooses(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    sdata["other"] = sdata["table"].copy()
    with pytest.raises(ValueError, match=r"found \['table', 'other'\].*Choose one with `table_key`"):
        read_table(sdata)
    assert read_table(sdata, "other")[1] is sdata["other"]


@pytest.mark.parametrize("what", [AnnData(np.ones((2, 2))), None, "slide.zarr"], ids=["AnnData", "None", "path"])
def test_what_is_no_spatialdata(what: object) -> None:
    with pytest.raises(TypeError, match=f"Expected a SpatialData, got {type(what).__name__}") as raised:
        read_table(what)  # type: ignore[arg-type]
    assert ("that holds this table" in str(raised.value)) == isinstance(what, AnnData)


def test_no_table(make_sdata: MakeSData) -> None:
    with pytest.raises(ValueError, match=r"no table in `sdata.tables`.*TableModel\.parse"):
        read_table(make_sdata(table=False))


def test_unknown_table(make_sdata: MakeSData) -> None:
    with pytest.raises(KeyError, match=r"No table 'tabel'.*\['table'\]"):
        read_table(make_sdata(), "tabel")


def test_table_without_annotation(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    del sdata["table"].uns["spatialdata_attrs"]
    with pytest.raises(ValueError, match=r"found \[\] among the tables \['table'\]"):
        read_table(sdata)
    with pytest.raises(ValueError, match=r"does not say which spots it annotates.*TableModel\.parse"):
        read_table(sdata, "table")


def test_repeated_gene_names(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    names = sdata["table"].var_names.to_numpy().astype(object)
    names[3] = names[7] = "ERBB2"
    sdata["table"].var_names = names
    with pytest.raises(ValueError, match=r"not unique \(\['ERBB2'\] occur more than once.*var_names_make_unique"):
        read_table(sdata)


# Geometry


@pytest.mark.parametrize("polygons", [False, True], ids=["circles", "polygons"])
@pytest.mark.parametrize("shapes_at", ["identity", "anisotropic", "shear", "sequence"])
@pytest.mark.parametrize("image_at", ["identity", "rotation", "flip", "anisotropic"])
def test_centers_and_diameters_in_pixels(
    make_sdata: MakeSData, placements: Placements, image_at: str, shapes_at: str, polygons: bool
) -> None:
    sdata = make_sdata(image_at=image_at, shapes_at=shapes_at, polygons=polygons)
    (section,) = read(sdata)
    to_pixels = np.linalg.inv(placements[image_at][1]) @ placements[shapes_at][1]
    spots = sdata["A_spots"].loc[section.instances]
    area = spots.geometry.area.to_numpy() if polygons else np.pi * spots["radius"].to_numpy() ** 2
    xy = np.column_stack([spots.geometry.centroid.x, spots.geometry.centroid.y, np.ones(len(spots))])

    np.testing.assert_allclose(section.centers, (xy @ to_pixels.T)[:, :2], atol=1e-8)
    in_pixels = area * abs(np.linalg.det(to_pixels))
    np.testing.assert_allclose(section.diameters, 2 * np.sqrt(in_pixels / np.pi))
    assert (section.height, section.width) == (290, 330)


def test_multiscale_images_are_read_at_full_resolution(make_sdata: MakeSData) -> None:
    flat, pyramid = make_sdata(), make_sdata(scale_factors=[2, 2])
    (a,), (b,) = read(flat), read(pyramid)
    np.testing.assert_allclose(a.centers, b.centers)
    np.testing.assert_array_equal(a.pixels.compute(), b.pixels.compute())


# Rows


@pytest.mark.parametrize("instances", ["int", "str"])
def test_rows_are_matched_by_instance_not_by_position(make_sdata: MakeSData, instances: str, log: io.StringIO) -> None:
    sdata = make_sdata(2, instances=instances, n_without_row=3, n_without_spot=2)
    table = sdata["table"]
    for name, section in zip("AB", read(sdata), strict=True):
        obs = table.obs.iloc[section.rows]
        assert (obs["region"] == f"{name}_spots").all()
        assert (obs["spot_id"].to_numpy() == section.instances).all()
        spots = sdata[f"{name}_spots"].loc[section.instances]
        np.testing.assert_allclose(section.centers, np.column_stack([spots.geometry.x, spots.geometry.y]))
        assert len(section.rows) == 27
        assert f"2 of 29 rows of '{name}_spots' have no spot" in log.getvalue()
        assert f"3 of 30 spots of '{name}_spots' have no row" in log.getvalue()


def test_strings_do_not_match_integers(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    sdata["A_spots"].index = sdata["A_spots"].index.astype(str)
    with pytest.raises(ValueError, match=r"'spot_id' \(int64, such as \[1\d\d.*\(object, such as \['1.*1 and '1'"):
        read(sdata)


def test_regions_that_have_lost_all_rows(make_sdata: MakeSData) -> None:
    # What a filter of scanpy's may leave; spatialdata itself would not take such a table.
    sdata = make_sdata(2)
    table = sdata["table"]
    table._inplace_subset_obs((table.obs["section"] == "B").to_numpy())
    with pytest.raises(ValueError, match="No row of the table belongs to a spot of 'A_spots'"):
        read(sdata)
    assert len(read(sdata, shapes_key="B_spots")[0].rows) == 30


def test_two_rows_for_one_spot(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    sdata["table"].obs["spot_id"] = sdata["table"].obs["spot_id"].to_numpy()[[0, 0, *range(2, 30)]]
    with pytest.raises(ValueError, match="Several rows of the table belong to the same spot of 'A_spots'"):
        read(sdata)


def test_repeated_index_of_spots(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    sdata["A_spots"].index = [0, 0, *range(2, 30)]
    with pytest.raises(ValueError, match="index of the spots 'A_spots' is not unique"):
        read(sdata)


def test_without_a_table_rows_count_through_the_sections(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2, table=False)
    with pytest.raises(ValueError, match=r"several spots elements, \['A_spots', 'B_spots'\].*`shapes_key`"):
        read_sections(sdata, None)
    sections = read_sections(sdata, None, shapes_key=["B_spots", "A_spots"])
    np.testing.assert_array_equal(np.concatenate([s.rows for s in sections]), np.arange(60))
    np.testing.assert_array_equal(sections[0].instances, sdata["B_spots"].index)
    (alone,) = read_sections(make_sdata(table=False), None)
    np.testing.assert_array_equal(alone.rows, np.arange(30))


# Which spots


def test_shapes_key_chooses_sections(make_sdata: MakeSData) -> None:
    sdata = make_sdata(3)
    assert [s.name for s in read(sdata)] == ["A_spots", "B_spots", "C_spots"]
    assert [s.name for s in read(sdata, shapes_key="B_spots")] == ["B_spots"]
    assert [s.name for s in read(sdata, shapes_key=["C_spots", "A_spots"])] == ["C_spots", "A_spots"]


def test_spots_named_twice_are_not_counted_twice(make_sdata: MakeSData) -> None:
    with pytest.raises(ValueError, match=r"`shapes_key` names \['A_spots'\] more than once"):
        read(make_sdata(), shapes_key=["A_spots", "A_spots"])


def test_unknown_spots(make_sdata: MakeSData) -> None:
    with pytest.raises(KeyError, match=r"No spots 'spots' in `sdata.shapes`; it has \['A_spots'\]"):
        read(make_sdata(), shapes_key="spots")


def test_spots_that_the_table_does_not_annotate(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    sdata["cells"] = sdata["A_spots"].copy()
    with pytest.raises(ValueError, match=r"annotates \['A_spots'\], not the spots \['cells'\].*`table_key`"):
        read(sdata, shapes_key="cells")


def test_table_that_annotates_something_else(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    labels = np.zeros((20, 20), dtype=np.int32)
    sdata["nuclei"] = Labels2DModel.parse(labels, dims=("y", "x"))
    table = AnnData(sparse.eye(3, format="csr"))
    table.obs = pd.DataFrame({"region": pd.Categorical(["nuclei"] * 3), "cell": [1, 2, 3]}, index=list("abc"))
    sdata["table"] = TableModel.parse(table, region="nuclei", region_key="region", instance_key="cell")
    with pytest.raises(ValueError, match=r"'nuclei' \(labels\), none of which are spots.*\['A_spots'\].*`table_key`"):
        read(sdata)


def test_regions_that_are_not_loaded_are_left_out(make_sdata: MakeSData, log: io.StringIO) -> None:
    sdata = make_sdata(2)
    del sdata.shapes["A_spots"]
    (section,) = read(sdata)
    assert section.name == "B_spots"
    assert (sdata["table"].obs["section"].iloc[section.rows] == "B").all()
    assert "also annotates ['A_spots'], which `sdata.shapes` lacks" in log.getvalue()


def test_no_spots(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    del sdata.shapes["A_spots"]
    with pytest.raises(ValueError, match="no spots in `sdata.shapes`"):
        read(sdata)


def test_empty_spots(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    sdata.shapes.data["A_spots"] = sdata["A_spots"].iloc[:0]
    with pytest.raises(ValueError, match="'A_spots' are empty"):
        read(sdata)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0])
def test_radii_must_be_finite_and_positive(make_sdata: MakeSData, bad: float) -> None:
    sdata = make_sdata()
    sdata["A_spots"].iloc[4, sdata["A_spots"].columns.get_loc("radius")] = bad
    with pytest.raises(ValueError, match="'A_spots' have centres or radii that are not finite and positive"):
        read(sdata)


# Which image


def test_no_image(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    del sdata.images["A_image"]
    with pytest.raises(ValueError, match="no image in `sdata.images`"):
        read(sdata)


def test_unknown_image(make_sdata: MakeSData) -> None:
    with pytest.raises(KeyError, match=r"No image 'HE' in `sdata.images`; it has \['A_image'\]"):
        read(make_sdata(), image_key="HE")


def _add_image(sdata: SpatialData, new_image: Callable[..., Any], key: str, scale: float, **options: Any) -> None:
    """A second image under section A, one pixel of which is ``scale`` pixels of the first."""
    size = [int(n / scale) for n in (290, 330)]
    pixels = np.full((3, *size), 200, dtype=np.uint8)
    sdata[key] = new_image(pixels, {"A": Scale([scale, scale], axes=("x", "y"))}, **options)


def test_the_finest_image_wins(make_sdata: MakeSData, new_image: Callable[..., Any], log: io.StringIO) -> None:
    sdata = make_sdata()
    _add_image(sdata, new_image, "lowres", 10)
    _add_image(sdata, new_image, "hires", 0.5)
    (section,) = read(sdata)
    assert section.image_key == "hires"
    assert section.pixels.shape == (3, 580, 660)
    assert "taking the finest image 'hires', not 'A_image' (0.5x), 'lowres' (0.05x)" in log.getvalue()
    (chosen,) = read(sdata, image_key="lowres")
    np.testing.assert_allclose(chosen.centers * 10, section.centers / 2)


def test_two_equal_images_must_be_chosen_from(make_sdata: MakeSData, new_image: Callable[..., Any]) -> None:
    sdata = make_sdata(2)
    _add_image(sdata, new_image, "again", 1)
    with pytest.raises(ValueError, match=r"\['A_image', 'again'\] have the same resolution.*'A_spots'.*`image_key`"):
        read(sdata)
    sections = read(sdata, image_key={"A_spots": "again"})  # B finds its own
    assert [section.image_key for section in sections] == ["again", "B_image"]
    with pytest.raises(KeyError, match=r"names the spots \['C_spots'\], but the spots to read are \['A_spots', 'B_sp"):
        read(sdata, image_key={"C_spots": "again"})


def test_images_beside_the_spots_do_not_count(make_sdata: MakeSData, new_image: Callable[..., Any]) -> None:
    sdata = make_sdata()
    aside = Translation([5000, 0], axes=("x", "y"))
    sdata["elsewhere"] = new_image(np.zeros((3, 50, 50), dtype=np.uint8), {"A": aside})
    assert read(sdata)[0].image_key == "A_image"


def test_a_finer_image_of_a_detail_does_not_count(make_sdata: MakeSData, new_image: Callable[..., Any]) -> None:
    # It lies under one spot; the predictions of all others would be NaN.
    sdata = make_sdata()
    pixels = np.full((3, 100, 100), 200, dtype=np.uint8)
    sdata["detail"] = new_image(pixels, {"A": Scale([0.5, 0.5], axes=("x", "y"))})
    assert read(sdata)[0].image_key == "A_image"
    assert read(sdata, image_key="detail")[0].image_key == "detail"


def test_volumes_do_not_count(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    volume = np.zeros((3, 2, 290, 330), dtype=np.uint8)
    sdata["stack"] = sd.models.Image3DModel.parse(volume, dims=("c", "z", "y", "x"), transformations={"A": Identity()})
    assert read(sdata)[0].image_key == "A_image"
    with pytest.raises(ValueError, match="'stack' is a volume; expected two dimensions and channels"):
        read(sdata, image_key="stack")


def test_fluorescence_images_do_not_count(make_sdata: MakeSData, new_image: Callable[..., Any]) -> None:
    sdata = make_sdata()
    sdata["dapi"] = sd.models.Image2DModel.parse(
        np.zeros((1, 580, 660), dtype=np.uint8),
        dims=("c", "y", "x"),
        transformations={"A": Scale([0.5, 0.5], axes=("x", "y"))},
    )
    assert read(sdata)[0].image_key == "A_image"


def test_image_with_one_channel(make_sdata: MakeSData) -> None:
    sdata = make_sdata(channels=["green"])
    with pytest.raises(ValueError, match=r"'A_image' has 1 channel\(s\) \['green'\]; expected 3.*or 4.*`image_key`"):
        read(sdata)


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (["b", "g", "r"], (2, 1, 0)),
        (["Red", "Green", "Blue"], (0, 1, 2)),
        (["alpha", "r", "g", "b"], (1, 2, 3)),
        (["r", "g", "b", "a"], (0, 1, 2)),
        (None, (0, 1, 2)),
    ],
    ids=str,
)
def test_channels_are_found_by_name(
    make_sdata: MakeSData, channels: list[str] | None, expected: tuple[int, ...], log: io.StringIO
) -> None:
    has_alpha = channels is not None and len(channels) == 4
    (section,) = read(make_sdata(channels=channels, alpha=has_alpha))
    assert section.channels == expected
    assert ("Dropping the alpha channel of the image 'A_image'" in log.getvalue()) == has_alpha


def test_unnamed_fourth_channel_is_alpha(make_sdata: MakeSData, log: io.StringIO) -> None:
    (section,) = read(make_sdata(alpha=True))
    assert section.channels == (0, 1, 2)
    assert "Dropping the alpha channel" in log.getvalue()


@pytest.mark.parametrize("names", [["DAPI", "CD3", "CD8"], ["r", "g", "alpha"], ["r", "r", "b"]], ids="-".join)
def test_channels_that_are_no_colors(make_sdata: MakeSData, names: list[str]) -> None:
    sdata = make_sdata()
    image = sdata["A_image"].assign_coords(c=names)
    sdata.images.data["A_image"] = image
    with pytest.raises(
        ValueError, match=f"'A_image' are named .*{names[1]}.*not red, green and blue.*name its channels"
    ):
        read(sdata)


# Where they meet


def test_no_shared_coordinate_system(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    set_transformation(sdata["A_image"], {"scanner": Identity()}, set_all=True)
    with pytest.raises(
        ValueError, match=r"'A_spots' \(in \['A'\]\) share no coordinate.*'A_image': \['scanner'\].*set_t"
    ):
        read(sdata)
    with pytest.raises(ValueError, match="share no coordinate system 'scanner' with an image"):
        read(sdata, coordinate_system="scanner")
    with pytest.raises(KeyError, match=r"No coordinate system 'global'; the elements know \[.*'scanner'"):
        read(sdata, coordinate_system="global")


def test_shared_coordinate_systems_that_agree_are_one(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    for element in (sdata["A_image"], sdata["A_spots"]):
        set_transformation(element, Scale([2, 3], axes=("x", "y")), "microns")
    assert read(sdata)[0].coordinate_system == "A"


def test_shared_coordinate_systems_that_differ_must_be_chosen_from(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    set_transformation(sdata["A_image"], Identity(), "moved")
    set_transformation(sdata["A_spots"], Translation([1, 0], axes=("x", "y")), "moved")
    with pytest.raises(
        ValueError, match=r"share the coordinate systems \['A', 'moved'\], which place.*`coordinate_sys"
    ):
        read(sdata)
    (first,), (moved,) = read(sdata, coordinate_system="A"), read(sdata, coordinate_system="moved")
    np.testing.assert_allclose(moved.centers, first.centers + [1, 0])


def test_all_spots_off_the_image(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    set_transformation(sdata["A_spots"], Translation([0, 4000], axes=("x", "y")), "A")
    with pytest.raises(
        ValueError, match=r"All spots of 'A_spots' lie off.*330 x 290 pixels.*x \d+ to \d+, y 4\d+ to 4"
    ):
        read(sdata)


def test_some_spots_off_the_image_are_counted(make_sdata: MakeSData, log: io.StringIO) -> None:
    sdata = make_sdata()
    set_transformation(sdata["A_spots"], Translation([100, 0], axes=("x", "y")), "A")
    (section,) = read(sdata)
    n_off = int((section.centers[:, 0] >= 330).sum())
    assert 0 < n_off < 30
    assert len(section.rows) == 30
    assert f"{n_off} of 30 spots of 'A_spots' lie off the image" in log.getvalue()


def test_several_sections_in_one_world(make_sdata: MakeSData) -> None:
    # Every image lies under every section's spots: only the user knows which belong together.
    sdata = make_sdata(2, world="global")
    with pytest.raises(ValueError, match=r"\['A_image', 'B_image'\] have the same resolution"):
        read(sdata)
    keys = {"A_spots": "A_image", "B_spots": "B_image"}
    assert [s.image_key for s in read(sdata, image_key=keys)] == ["A_image", "B_image"]


def test_elements_read_from_zarr_are_the_same(
    make_sdata: MakeSData, to_backed: Callable[[SpatialData, Path], SpatialData], tmp_path: Path
) -> None:
    sdata = make_sdata(2, image_at="sequence", shapes_at="shear", scale_factors=[2], instances="str")
    backed = to_backed(sdata, tmp_path / "slide.zarr")
    for ours, theirs in zip(read(sdata), read(backed), strict=True):
        for name in ("centers", "radii", "instances", "rows", "affine"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
        np.testing.assert_array_equal(ours.pixels.compute(), theirs.pixels.compute())


def test_long_lists_are_cut(make_sdata: MakeSData) -> None:
    sdata = make_sdata()
    for i in range(20):
        sdata[f"spots{i}"] = ShapesModel.parse(np.ones((1, 2)), geometry=0, radius=1.0)
    with pytest.raises(KeyError, match=r"'spots10', \.\.\. \(21 in all\)\]"):
        read(sdata, shapes_key="nothing")


def test_spots_need_no_image(make_sdata: Callable[..., SpatialData]) -> None:
    sdata = make_sdata(2, shapes_at="scale", n_without_row=3)
    sections = read_sections(sdata, sdata["table"])
    del sdata.images["A_image"], sdata.images["B_image"]

    spots = read_spots(sdata, sdata["table"])

    assert [found.name for found in spots] == ["A_spots", "B_spots"]
    for found, section in zip(spots, sections, strict=True):
        shapes = sdata.shapes[found.name].loc[found.instances]
        np.testing.assert_array_equal(found.rows, section.rows)
        np.testing.assert_array_equal(found.instances, section.instances)
        np.testing.assert_allclose(found.xy, np.column_stack([shapes.geometry.x, shapes.geometry.y]))
        np.testing.assert_allclose(found.radii, shapes["radius"])


def test_section_is_named_by_obs_where_its_rows_agree(make_sdata: Callable[..., SpatialData]) -> None:
    sdata = make_sdata(2)
    table = sdata["table"]
    first, second = read_spots(sdata, table)
    table.obs.loc[table.obs_names[second.rows[0]], "section"] = "A"

    assert section_name(first, table) == "A"
    assert section_name(second, table) == "B_spots"
