from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import BaseTransformation, Identity, Scale, Translation, set_transformation

import stpredict as stp
from stpredict._data.elements import Elements
from stpredict._data.slide import Section, open_slide

Placements = dict[str, tuple[BaseTransformation, np.ndarray]]
MakeSData = Callable[..., SpatialData]
NewImage = Callable[..., Any]
SIZE = (120, 160)
SMALL: dict[str, Any] = {"size": SIZE, "n_spots": 12, "n_genes": 3}


def read(sdata: SpatialData, **elements: Any) -> list[Section]:
    return list(open_slide(sdata, Elements(**elements), images=True).sections)


# Where they meet


def test_centers_and_diameters_in_pixels(make_sdata: MakeSData, placements: Placements) -> None:
    pairs = zip(placements, [*list(placements)[3:], *list(placements)[:3]], strict=True)
    for k, (image_at, shapes_at) in enumerate(pairs):
        polygons = bool(k % 2)
        sdata = make_sdata(image_at=image_at, shapes_at=shapes_at, polygons=polygons, **SMALL)
        (section,) = read(sdata)
        to_pixels = np.linalg.inv(placements[image_at][1]) @ placements[shapes_at][1]
        spots = sdata["A_spots"].loc[section.instances]
        area = spots.geometry.area.to_numpy() if polygons else np.pi * spots["radius"].to_numpy() ** 2
        xy = np.column_stack([spots.geometry.centroid.x, spots.geometry.centroid.y, np.ones(len(spots))])

        np.testing.assert_allclose(section.centers, (xy @ to_pixels.T)[:, :2], atol=1e-8)
        in_pixels = area * abs(np.linalg.det(to_pixels))
        np.testing.assert_allclose(section.diameters, 2 * np.sqrt(in_pixels / np.pi))
        assert (section.height, section.width) == SIZE


def test_all_scales_of_an_image_finest_first(make_sdata: MakeSData) -> None:
    flat, pyramid = make_sdata(**SMALL), make_sdata(scale_factors=[2, 2], image_at="scale", shapes_at="scale", **SMALL)
    (a,), (b,) = read(flat), read(pyramid)
    np.testing.assert_allclose(a.centers, b.centers)
    np.testing.assert_array_equal(a.pixels.compute(), b.pixels.compute())
    assert [level.pixels.shape for level in b.levels] == [(3, 120, 160), (3, 60, 80), (3, 30, 40)]
    for k, level in enumerate(b.levels):
        np.testing.assert_allclose(np.diag(level.to_world), [2.5 * 2**k, 2.5 * 2**k, 1])


def test_no_shared_coordinate_system(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
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
    sdata = make_sdata(**SMALL)
    for element in (sdata["A_image"], sdata["A_spots"]):
        set_transformation(element, Scale([2, 3], axes=("x", "y")), "microns")
    assert read(sdata)[0].coordinate_system == "A"


def test_shared_coordinate_systems_that_differ_must_be_chosen_from(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    set_transformation(sdata["A_image"], Identity(), "moved")
    set_transformation(sdata["A_spots"], Translation([1, 0], axes=("x", "y")), "moved")
    with pytest.raises(
        ValueError, match=r"share the coordinate systems \['A', 'moved'\], which place.*`coordinate_sys"
    ):
        read(sdata)
    (first,), (moved,) = read(sdata, coordinate_system="A"), read(sdata, coordinate_system="moved")
    np.testing.assert_allclose(moved.centers, first.centers + [1, 0])


def test_spots_off_the_image(make_sdata: MakeSData, log: io.StringIO) -> None:
    sdata = make_sdata(**SMALL)
    set_transformation(sdata["A_spots"], Translation([50, 0], axes=("x", "y")), "A")
    (section,) = read(sdata)
    n_off = int((section.centers[:, 0] >= 160).sum())
    assert 0 < n_off < 12
    assert len(section.rows) == 12
    np.testing.assert_array_equal(section.on_image, section.centers[:, 0] < 160)
    assert f"{n_off} of 12 spots of 'A_spots' lie off the image" in log.getvalue()
    set_transformation(sdata["A_spots"], Translation([0, 4000], axes=("x", "y")), "A")
    with pytest.raises(
        ValueError, match=r"All spots of 'A_spots' lie off.*160 x 120 pixels.*x \d+ to \d+, y 4\d+ to 4"
    ):
        read(sdata)


@pytest.mark.parametrize("element", ["A_image", "A_spots"])
@pytest.mark.parametrize("scale", [[0.0, 0.0], [1.0, 0.0], [np.nan, 1.0]])
def test_transformations_that_cannot_be_undone(make_sdata: MakeSData, element: str, scale: list[float]) -> None:
    sdata = make_sdata(**SMALL)
    set_transformation(sdata[element], Scale(scale, axes=("x", "y")), "A")
    kind = "image" if element == "A_image" else "spots"
    with pytest.raises(ValueError, match=rf"transformation of the {kind} '{element}' to 'A' is singular:.*(?s:.)*Mend"):
        read(sdata)


# Which image


def add_image(
    sdata: SpatialData, new_image: NewImage, key: str, factor: int, pixels: Any = None, **options: Any
) -> None:
    """A second image under section A, ``factor`` times as coarse; negative: as fine."""
    if pixels is None:
        pixels = sdata["A_image"].data.compute()
    if factor > 1:
        pixels = pixels.reshape(3, SIZE[0] // factor, factor, SIZE[1] // factor, factor).mean((2, 4)).astype(np.uint8)
    elif factor < 0:
        pixels = pixels.repeat(-factor, 1).repeat(-factor, 2)
    scale = float(factor) if factor > 0 else -1 / factor
    sdata[key] = new_image(pixels, {"A": Scale([scale, scale], axes=("x", "y"))}, **options)


def test_no_image(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    with pytest.raises(KeyError, match=r"No image 'HE' in `sdata.images`; it has \['A_image'\]"):
        read(sdata, image_key="HE")
    del sdata.images["A_image"]
    with pytest.raises(ValueError, match="no image in `sdata.images`"):
        read(sdata)


def test_the_finest_of_one_picture_wins(make_sdata: MakeSData, new_image: NewImage, log: io.StringIO) -> None:
    sdata = make_sdata(**SMALL)
    add_image(sdata, new_image, "lowres", 10)
    add_image(sdata, new_image, "hires", -2, dtype="uint16", alpha=True)  # however it is stored
    (section,) = read(sdata)
    assert section.image_key == "hires"
    assert section.pixels.shape == (4, 240, 320)
    assert "taking the finest image 'hires', not 'A_image' (0.5x), 'lowres' (0.05x)" in log.getvalue()
    (chosen,) = read(sdata, image_key="lowres")
    np.testing.assert_allclose(chosen.centers * 10, section.centers / 2)


def test_other_pictures_under_the_same_spots_must_be_chosen_from(make_sdata: MakeSData, new_image: NewImage) -> None:
    # Two slides placed in one coordinate system, the second scanned at half the resolution.
    sdata, other = make_sdata(2, world="um", **SMALL), make_sdata(seed=7, **SMALL)
    del sdata.images["B_image"]
    add_image(sdata, new_image, "B_image", 2, other["A_image"].data.compute())
    set_transformation(sdata["B_image"], Scale([2, 2], axes=("x", "y")), "um")
    with pytest.raises(
        ValueError, match=r"'A_image' and 'B_image' both lie under the spots 'A_spots', but show different pictures"
    ) as raised:
        read(sdata)
    assert "`image_key={'A_spots': 'B_image'}`" in str(raised.value)
    with pytest.raises(ValueError, match="'B_spots', but show different pictures"):
        read(sdata, image_key={"A_spots": "A_image"})
    sections = read(sdata, image_key={"A_spots": "A_image", "B_spots": "B_image"})
    assert [section.image_key for section in sections] == ["A_image", "B_image"]
    assert [section.width for section in sections] == [160, 80]


def test_other_pictures_that_are_blank_or_shifted(make_sdata: MakeSData, new_image: NewImage) -> None:
    sdata = make_sdata(**SMALL)
    pixels = sdata["A_image"].data.compute()
    for other in (np.full_like(pixels, 200), np.roll(pixels, 60, axis=2), 255 - pixels):
        add_image(sdata, new_image, "other", 2, other)
        with pytest.raises(ValueError, match="show different pictures"):
            read(sdata)
        del sdata.images["other"]
    add_image(sdata, new_image, "darker", 2, pixels // 2)  # of another camera
    assert read(sdata)[0].image_key == "A_image"


def test_two_equal_images_must_be_chosen_from(make_sdata: MakeSData, new_image: NewImage) -> None:
    sdata = make_sdata(2, **SMALL)
    add_image(sdata, new_image, "again", 1)
    with pytest.raises(ValueError, match=r"\['A_image', 'again'\] have the same resolution.*'A_spots'.*`image_key`"):
        read(sdata)
    sections = read(sdata, image_key={"A_spots": "again"})  # B finds its own
    assert [section.image_key for section in sections] == ["again", "B_image"]
    with pytest.raises(KeyError, match=r"names the spots \['C_spots'\], but the spots to read are \['A_spots', 'B_sp"):
        read(sdata, image_key={"C_spots": "again"})


def test_images_beside_the_spots_do_not_count(make_sdata: MakeSData, new_image: NewImage, log: io.StringIO) -> None:
    sdata = make_sdata(**SMALL)
    aside = Translation([5000, 0], axes=("x", "y"))
    sdata["elsewhere"] = new_image(np.zeros((3, 50, 50), dtype=np.uint8), {"A": aside})
    assert read(sdata)[0].image_key == "A_image"
    assert log.getvalue() == ""


def test_a_finer_image_of_a_detail_is_passed_over_by_name(
    make_sdata: MakeSData, new_image: NewImage, log: io.StringIO
) -> None:
    # It lies under one spot; the predictions of all others would be NaN.
    sdata = make_sdata(**SMALL)
    sdata["detail"] = new_image(np.full((3, 80, 80), 200, dtype=np.uint8), {"A": Scale([0.5, 0.5], axes=("x", "y"))})
    assert read(sdata)[0].image_key == "A_image"
    said = (
        "The finer image 'detail' is not taken for the spots 'A_spots': only 1 of 12 spots lie on it. Check its transf"
    )
    assert said in log.getvalue()
    assert read(sdata, image_key="detail")[0].image_key == "detail"


@pytest.mark.parametrize(
    ("channels", "why"),
    [(["DAPI"], r"it has 1 channel(s)"), (["DAPI", "CD3", "CD8"], "its channels are ['DAPI', 'CD3', 'CD8']")],
)
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_fluorescence_images_do_not_count(
    make_sdata: MakeSData, log: io.StringIO, channels: list[str], why: str, scale: float
) -> None:
    sdata = make_sdata(**SMALL)
    sdata["fluorescence"] = Image2DModel.parse(
        np.zeros((len(channels), int(120 / scale), int(160 / scale)), dtype=np.uint8),
        dims=("c", "y", "x"),
        c_coords=channels,
        transformations={"A": Scale([scale, scale], axes=("x", "y"))},
    )
    assert read(sdata)[0].image_key == "A_image"
    assert (f"The finer image 'fluorescence' is not taken for the spots 'A_spots': {why}." in log.getvalue()) == (
        scale < 1
    )


def test_volumes_do_not_count(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    volume = np.zeros((3, 2, *SIZE), dtype=np.uint8)
    sdata["stack"] = sd.models.Image3DModel.parse(volume, dims=("c", "z", "y", "x"), transformations={"A": Identity()})
    assert read(sdata)[0].image_key == "A_image"
    with pytest.raises(ValueError, match="'stack' is a volume; expected two dimensions and channels"):
        read(sdata, image_key="stack")


def test_absurd_spots_on_large_images_are_refused_at_once() -> None:
    # Two scales of one picture are compared at the spots, which must not read it all.
    shape = 3, 16_384, 16_384
    fine = da.full(shape, 200, dtype=np.uint8, chunks=(3, 512, 512))
    scale = Scale([2, 2], axes=("x", "y"))
    xy = np.random.default_rng(0).uniform(1000, 15_000, (60, 2))
    sdata = SpatialData(
        images={
            "fine": Image2DModel.parse(fine, dims=("c", "y", "x"), transformations={"A": Identity()}),
            "coarse": Image2DModel.parse(fine[:, ::2, ::2], dims=("c", "y", "x"), transformations={"A": scale}),
        },
        shapes={"spots": sd.models.ShapesModel.parse(xy, geometry=0, radius=1e7, transformations={"A": Identity()})},
    )
    sdata["table"] = _table_of(60)
    for call in (stp.pp.color_histogram, stp.pp.color_statistics, stp.pp.patches):
        began = time.process_time()
        with pytest.raises(
            ValueError, match=r"field of .* spot diameters of 'spots' is \d.*e\+0\d pixels wide, on an im"
        ):
            call(sdata)
        assert time.process_time() - began < 1


def _table_of(n: int) -> Any:
    from anndata import AnnData

    table = AnnData(np.ones((n, 1), dtype=np.float32))
    table.obs["region"], table.obs["spot"] = "spots", np.arange(n)
    return sd.models.TableModel.parse(table, region="spots", region_key="region", instance_key="spot")


# Which channels


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (["b", "g", "r"], (2, 1, 0)),
        (["Red", "Green", "Blue"], (0, 1, 2)),
        (["alpha", "r", "g", "b"], (1, 2, 3, 0)),
        (["r", "g", "b", "a"], (0, 1, 2, 3)),
        (None, (0, 1, 2)),
    ],
    ids=str,
)
def test_channels_are_found_by_name(
    make_sdata: MakeSData, channels: list[str] | None, expected: tuple[int, ...]
) -> None:
    (section,) = read(make_sdata(channels=channels, alpha=len(expected) == 4, **SMALL))
    assert section.channels == expected


def test_channels_that_are_no_colors(make_sdata: MakeSData) -> None:
    (section,) = read(make_sdata(alpha=True, **SMALL))
    assert section.channels == (0, 1, 2, 3), "an unnamed fourth channel is alpha"
    sdata = make_sdata(**SMALL)
    image = sdata["A_image"]
    for names in (["DAPI", "CD3", "CD8"], ["r", "g", "alpha"], ["r", "r", "b"]):
        sdata.images.data["A_image"] = image.assign_coords(c=names)
        with pytest.raises(
            ValueError, match=f"'A_image' are named .*{names[1]}.*not red, green and blue.*name its channels"
        ):
            read(sdata)
    sdata = make_sdata(channels=["green"], **SMALL)
    with pytest.raises(ValueError, match=r"'A_image' has 1 channel\(s\) \['green'\]; expected 3.*or 4.*`image_key`"):
        read(sdata)
