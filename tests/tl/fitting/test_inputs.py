from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.transformations import Translation, set_transformation

from stpredict.tl.fitting._inputs import Inputs, read_inputs

MakeSData = Callable[..., SpatialData]


def read(sdata: SpatialData, **changed: Any) -> Inputs:
    arguments = {
        "genes": None,
        "train_key": None,
        "layer": None,
        "min_spots": 12,
        "key_added": "key",
        "image_key": None,
        "shapes_key": None,
        "table_key": None,
        "coordinate_system": None,
        "device": "cpu",
    }
    return read_inputs(sdata, **{**arguments, **changed})


def test_targets_are_training_spots_on_an_image(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2, n_without_row=2)
    set_transformation(sdata["A_spots"], Translation([150, 0], axes=("x", "y")), "A")
    table = sdata["table"]
    table.obs["train"] = np.arange(table.n_obs) % 3 > 0
    inputs = read(sdata, train_key="train")
    assert inputs.table is table
    assert inputs.device == "cpu"
    assert [section.name for section in inputs.sections] == ["A_spots", "B_spots"]
    np.testing.assert_array_equal(inputs.training, table.obs["train"])
    on_image = np.concatenate([section.rows[section.on_image] for section in inputs.sections])
    np.testing.assert_array_equal(inputs.targets.rows, np.intersect1d(np.flatnonzero(inputs.training), on_image))
    assert 0 < len(inputs.targets.rows) < inputs.training.sum()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"device": "tpu"}, ValueError, "`device` is 'tpu'"),
        ({"table_key": "no"}, KeyError, "No table 'no'"),
        ({"key_added": "a/b"}, ValueError, "cannot be stored"),
        ({"train_key": "no"}, KeyError, "No column 'no'"),
        ({"image_key": "no"}, KeyError, "'no'"),
        ({"genes": "no"}, KeyError, "not in `var_names`"),
        ({"layer": "no"}, KeyError, "No layer 'no'"),
        ({"min_spots": 31}, ValueError, "30 training spots .*; the model needs 31"),
    ],
)
def test_wrong_arguments_cost_no_pixel(
    make_sdata: MakeSData, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    sdata = make_sdata()

    def fail(block: np.ndarray) -> np.ndarray:
        raise AssertionError("a pixel was read")

    sdata["A_image"] = sdata["A_image"].copy(
        data=sdata["A_image"].data.map_blocks(fail, meta=np.empty((0, 0, 0), np.uint8))
    )
    with pytest.raises(error, match=message):
        read(sdata, **changed)


def test_without_an_image_all_spots_count(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2, n_without_spot=3)
    blind = SpatialData(shapes=dict(sdata.shapes), tables={"table": sdata["table"]})
    with pytest.raises(ValueError, match=r"There is no image in `sdata\.images`"):
        read(blind)
    inputs = read(blind, needs_image=False)
    assert inputs.sections == []
    assert len(inputs.targets.rows) == 60
    in_b = np.flatnonzero(blind["table"].obs["section"] == "B")[:30]
    np.testing.assert_array_equal(read(blind, needs_image=False, shapes_key="B_spots").targets.rows, in_b)
