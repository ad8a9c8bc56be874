from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.transformations import Translation, set_transformation

from stpredict._data.elements import Elements
from stpredict.pp._features import FeatureReads
from stpredict.pp._histogram import HistogramReads
from stpredict.tl.fitting._inputs import Fit, start_fit

MakeSData = Callable[..., SpatialData]
ELEMENTS = ("image_key", "shapes_key", "table_key", "coordinate_system", "section_key")


def start(sdata: SpatialData, reads: Any = None, **changed: Any) -> AbstractContextManager[Fit]:
    arguments = {
        "genes": None,
        "gene_key": None,
        "train_key": None,
        "layer": None,
        "min_spots": 12,
        "key_added": "key",
        "table_added": None,
        "inplace": True,
        "device": "cpu",
        **{name: value for name, value in changed.items() if name not in ELEMENTS},
    }
    elements = Elements(**{name: value for name, value in changed.items() if name in ELEMENTS})
    return start_fit(sdata, elements, reads or HistogramReads(), **arguments)


def test_targets_are_training_spots_on_tissue_on_an_image(make_sdata: MakeSData, log: io.StringIO) -> None:
    sdata = make_sdata(2, n_without_row=2)
    set_transformation(sdata["A_spots"], Translation([150, 0], axes=("x", "y")), "A")
    table = sdata["table"]
    table.obs["train"] = np.arange(table.n_obs) % 3 > 0
    table.obs["in_tissue"] = (np.arange(table.n_obs) % 5 > 0).astype(int)  # as Space Ranger has it
    with start(sdata, train_key="train") as fit:
        assert fit.slide.table is table
        assert fit.device == "cpu"
        sections = fit.slide.sections
        assert [section.name for section in sections] == ["A_spots", "B_spots"]
        on_image = np.concatenate([section.rows[section.on_image] for section in sections])
        wanted = table.obs["train"].to_numpy() & (table.obs["in_tissue"] == 1).to_numpy()
        np.testing.assert_array_equal(fit.targets.rows, np.intersect1d(np.flatnonzero(wanted), on_image))
        assert fit.params["n_train"] == len(fit.targets.rows) < wanted.sum()
        np.testing.assert_array_equal(fit.inputs.rows[fit.positions], fit.targets.rows)
        n_off = int(wanted.sum()) - len(fit.targets.rows)
    n_beside = int((table.obs["train"] & (table.obs["in_tissue"] == 0)).sum())
    assert f"{n_beside} training spots lie beside the tissue (`obs['in_tissue']`)" in log.getvalue()
    assert f"{n_off} training spots lack a spot, pixels or a feature and are left out" in log.getvalue()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"device": "tpu"}, ValueError, "`device` is 'tpu'"),
        ({"table_key": "no"}, KeyError, "No table 'no'"),
        ({"table_key": 1}, TypeError, "`table_key` is 1; expected a string or None"),
        ({"key_added": "a/b"}, ValueError, "cannot be stored"),
        ({"key_added": None}, TypeError, "`key_added` is None; expected a string"),
        ({"key_added": "genes"}, ValueError, r"`layers\['genes'\]` exists and holds no result"),
        ({"table_added": "Table"}, ValueError, "there is an element 'table' already"),
        ({"table_added": "a/b"}, ValueError, "`table_added` is 'a/b', which cannot be stored"),
        ({"train_key": "no"}, KeyError, "No column 'no'"),
        ({"image_key": "no"}, KeyError, "'no'"),
        ({"image_key": {"B_spots": "A_image"}}, KeyError, "`image_key` names the spots"),
        ({"shapes_key": ["A_spots", "A_spots"]}, ValueError, r"`shapes_key` names \['A_spots'\] more than once"),
        ({"genes": "no"}, KeyError, "not in `var_names`"),
        ({"gene_key": "no"}, KeyError, "`gene_key` is 'no'"),
        ({"layer": "no"}, KeyError, "No layer 'no'"),
        ({"min_spots": 31}, ValueError, "30 training spots .*; the model needs 31"),
    ],
    ids=str,
)
def test_wrong_arguments_cost_no_pixel(
    make_sdata: MakeSData, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    sdata = make_sdata()
    sdata["table"].layers["genes"] = np.zeros(sdata["table"].shape)

    def fail(block: np.ndarray) -> np.ndarray:
        raise AssertionError("a pixel was read")

    sdata["A_image"] = sdata["A_image"].copy(
        data=sdata["A_image"].data.map_blocks(fail, meta=np.empty((0, 0, 0), np.uint8))
    )
    with pytest.raises(error, match=message):
        start(sdata, **changed).__enter__()


def test_without_an_image_all_spots_count(make_sdata: MakeSData) -> None:
    sdata = make_sdata(2, n_without_spot=3)
    blind = SpatialData(shapes=dict(sdata.shapes), tables={"table": sdata["table"]})
    with pytest.raises(ValueError, match=r"There is no image in `sdata\.images`"):
        start(blind).__enter__()
    reads = FeatureReads({"position": {"from": "position"}})
    with start(blind, reads) as fit:
        assert fit.slide.sections == []
        assert len(fit.targets.rows) == 60
    in_b = np.flatnonzero(blind["table"].obs["section"] == "B")[:30]
    with start(blind, reads, shapes_key="B_spots") as fit:
        np.testing.assert_array_equal(fit.targets.rows, in_b)


def test_what_identifies_a_fit(make_sdata: MakeSData) -> None:
    def identify(sdata: SpatialData, **settings: Any) -> tuple[str, np.ndarray]:
        with start(sdata) as fit:
            return fit.identity(settings), fit.kept(**settings)["seen"]

    sdata = make_sdata(n_spots=16, n_genes=4)
    first, seen = identify(sdata, pull=0.1)
    assert identify(sdata, pull=0.1)[0] == first
    assert identify(sdata, pull=0.2)[0] != first
    assert len(seen) == 16
    renamed = make_sdata(n_spots=16, n_genes=4)
    renamed["table"].obs_names = [f"spot {i}" for i in range(16)]
    assert identify(renamed, pull=0.1)[0] == first
    for change in ("expression", "genes", "pixels", "places"):
        other = make_sdata(n_spots=16, n_genes=4)
        if change == "expression":
            other["table"].X = other["table"].X * np.float32(1.5)
        elif change == "genes":
            other["table"].var_names = [f"other{j}" for j in range(4)]
        elif change == "pixels":
            other["A_image"] = other["A_image"].copy(data=255 - other["A_image"].data)
        else:
            set_transformation(other["A_spots"], Translation([1, 0], axes=("x", "y")), "A")
        assert identify(other, pull=0.1)[0] != first, change
        is_seen = np.isin(identify(other, pull=0.1)[1], seen)
        assert is_seen.all() if change in ("expression", "genes") else not is_seen.any()
