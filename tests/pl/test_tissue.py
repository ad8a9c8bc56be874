from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Affine, get_transformation

from stpredict._data.elements import Elements
from stpredict._data.slide import Section, open_without_table
from stpredict.pl._tissue import tissue_in_view, view_of_spots

# A quarter of a turn and a bit, half the size, moved.
TO_WORLD = np.array([[0.1, -0.5, 900.0], [0.5, 0.1, -40.0], [0, 0, 1]])
SIZE = 2048


def _coordinates_as_colors(dtype: str = "uint8") -> np.ndarray:
    """Red grows with x, green with y, in steps of 8 pixels."""
    x = np.broadcast_to(np.arange(SIZE) // 8, (SIZE, SIZE))
    rgb = np.stack([x, x.T, np.full_like(x, 7)]).astype(np.uint8)
    if dtype == "uint8":
        return rgb
    return rgb.astype(np.uint16) * 257 if dtype == "uint16" else rgb.astype(np.float32) / 255


def _sdata(pixels: da.Array | np.ndarray, **image: object) -> SpatialData:
    world = Affine(TO_WORLD, ("x", "y"), ("x", "y"))
    centers = np.array([[300.0, 500], [300, 1700], [1200, 700]])
    return SpatialData(
        images={"image": Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations={"w": world}, **image)},
        shapes={"spots": ShapesModel.parse(centers, geometry=0, radius=30, transformations={"w": world})},
    )


def _section(sdata: SpatialData) -> Section:
    (section,) = open_without_table(sdata, Elements(), "table", ["g"]).sections
    return section


def _color_at(tissue: xr.DataArray, world: np.ndarray) -> np.ndarray:
    to_world = get_transformation(tissue, "w").to_affine_matrix(("x", "y"), ("x", "y"))
    x, y, _ = np.linalg.solve(to_world, [*world, 1])
    return tissue.to_numpy()[:, int(y), int(x)]


@pytest.mark.parametrize(
    ("dtype", "image"),
    [
        ("uint8", {"c_coords": ["r", "g", "b"]}),
        ("uint8", {"c_coords": ["r", "g", "b"], "scale_factors": [2, 2, 2]}),
        ("uint16", {}),
        ("float32", {}),
    ],
)
def test_every_spot_lies_on_its_pixels(dtype: str, image: dict[str, object]) -> None:
    sdata = _sdata(_coordinates_as_colors(dtype), **image)
    section = _section(sdata)
    view = view_of_spots(section, 0.1)
    tissue = tissue_in_view(section, view)
    assert tissue.dtype == np.uint8
    assert 500 < max(tissue.shape) < SIZE
    for x, y in section.centers:
        color = _color_at(tissue, TO_WORLD[:2, :2] @ (x, y) + TO_WORLD[:2, 2])
        np.testing.assert_allclose(color, [x // 8, y // 8, 7], atol=1)


def test_channels_are_put_in_order() -> None:
    sdata = _sdata(_coordinates_as_colors()[::-1], c_coords=["b", "g", "r"])
    section = _section(sdata)
    tissue = tissue_in_view(section, view_of_spots(section, 0))
    assert (tissue.sel(c="b") == 7).all()


def test_view_holds_the_spots_some_room_and_a_footer() -> None:
    sdata = _sdata(_coordinates_as_colors())
    section = _section(sdata)
    scale = np.sqrt(np.linalg.det(TO_WORLD[:2, :2]))
    bare = view_of_spots(section, 0)
    world = section.centers @ TO_WORLD[:2, :2].T + TO_WORLD[:2, 2]
    room = 1.5 * 60 * scale
    np.testing.assert_allclose(bare[:4], [*_ends(world[:, 0], room), *_ends(world[:, 1], room)])
    footed = view_of_spots(section, 0.25)
    assert footed.y0 == bare.y0
    assert footed.height == pytest.approx(1.25 * bare.height)
    assert bare.units_per_pixel == pytest.approx(scale)


def _ends(values: np.ndarray, room: float) -> tuple[float, float]:
    return values.min() - room, values.max() + room


def test_the_coarsest_level_that_is_sharp_enough_is_read() -> None:
    sdata = _sdata(_coordinates_as_colors(), scale_factors=[2, 2])
    image = sdata.images["image"]
    for scale in ("scale0", "scale2"):  # of 2048 and 512 pixels; the view is most of the image
        image[scale]["image"] = image[scale]["image"].copy(data=da.zeros_like(image[scale]["image"].data))
    section = _section(sdata)
    tissue = tissue_in_view(section, view_of_spots(section, 0))
    assert tissue.to_numpy().max() > 100


def test_only_the_view_is_read() -> None:
    read = []

    def note(block: np.ndarray, block_info: dict[int, dict[str, tuple[int, ...]]]) -> np.ndarray:
        read.append(block_info[0]["chunk-location"])
        return block

    pixels = da.from_array(_coordinates_as_colors(), chunks=(3, 256, 256)).map_blocks(note, dtype=np.uint8)
    sdata = _sdata(pixels)
    sdata.shapes["spots"] = ShapesModel.parse(
        np.array([[700.0, 900.0], [720, 900]]),
        geometry=0,
        radius=20,
        transformations={"w": Affine(TO_WORLD, ("x", "y"), ("x", "y"))},
    )
    section = _section(sdata)
    read.clear()
    tissue_in_view(section, view_of_spots(section, 0))
    assert set(read) <= {(0, 3, 2), (0, 3, 3), (0, 2, 2), (0, 2, 3)}
