from __future__ import annotations

from collections.abc import Callable

import pytest
from spatialdata import SpatialData
from spatialdata.transformations import Scale, set_transformation

from stpredict._data.identity import fingerprints
from stpredict._data.slide import read_sections
from stpredict._data.slots import _same

MakeSData = Callable[..., SpatialData]


def taken(sdata: SpatialData) -> dict[str, dict[str, object]]:
    return fingerprints(read_sections(sdata, sdata["table"]))


def test_the_same_data_have_the_same_fingerprints(make_sdata: MakeSData) -> None:
    found = taken(make_sdata(2))
    assert set(found) == {"A_spots", "B_spots"}
    assert found["A_spots"]["image_key"] == "A_image"
    assert _same(found, taken(make_sdata(2)))


def wider(sdata: SpatialData) -> None:
    sdata["A_spots"]["radius"] *= 1.1


def fewer(sdata: SpatialData) -> None:
    sdata["table"] = sdata["table"][1:].copy()


def moved(sdata: SpatialData) -> None:
    set_transformation(sdata["A_spots"], Scale([1.01, 1.01], axes=("x", "y")), "A")


def cropped(sdata: SpatialData) -> None:
    sdata["A_image"] = sdata["A_image"].isel(x=slice(0, 320))


@pytest.mark.parametrize("change", [wider, fewer, moved, cropped])
def test_other_spots_or_images_have_others(make_sdata: MakeSData, change: Callable[[SpatialData], None]) -> None:
    sdata = make_sdata()
    before = taken(sdata)
    change(sdata)
    assert not _same(before, taken(sdata))
