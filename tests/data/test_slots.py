from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import spatialdata as sd
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import TableModel

from stpredict._data import slots
from stpredict._data.slots import Slots, check_layer_size, check_name, check_new_table, write_all, written_under

PLACES = ["layers", "obsm", "obs", "var", "uns"]


@pytest.fixture
def table() -> AnnData:
    table = AnnData(np.ones((4, 3), dtype=np.float32), var=pd.DataFrame(index=["a", "b", "c"]))
    table.obs["cell_type"] = pd.Categorical(["x", "y", "x", "y"])
    table.obsm["X_pca"], table.layers["counts"] = np.ones((4, 2)), sp.csr_matrix(np.eye(4, 3))
    table.uns["mine"] = {"deep": {"er": [1, 2]}}
    return table


def result(key: str, value: float = 1.0, **options: Any) -> Slots:
    """One name in every place."""
    return Slots(
        key,
        entry={"params": {"value": value, "names": ["u", "v"]}, "loss": np.arange(3) * value},
        layers={key: np.full((4, 3), value, dtype=np.float32)},
        obsm={f"{key}_features": np.full((4, 2), value)},
        obs={f"{key}_train": np.array([True, False, True, False])},
        var={f"{key}_fitted": np.array([True, True, False])},
        **options,
    )


def held(table: AnnData) -> dict[str, dict[str, Any]]:
    """Everything in a table; the very objects, where they are kept as such."""
    return {place: {name: getattr(table, place)[name] for name in getattr(table, place)} for place in PLACES}


def assert_same(found: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    for place in PLACES:
        assert set(found[place]) == set(expected[place]), place
        for name, value in expected[place].items():
            if isinstance(value, pd.Series):
                pd.testing.assert_series_equal(found[place][name], value)
            else:
                assert found[place][name] is value, (place, name)


# Names


def test_names_that_can_be_stored(table: AnnData, tmp_path: Path) -> None:
    keys = ["nsl", "my-model.v2", "NSL_5", "größe", "_x"]
    for key in keys:
        written = Slots(key, entry={"names": ["u", "v"]}, layers={key: np.ones((4, 3))})
        written.check(table)
        written.write(table)
        written.check(table)  # and written over
    table.obs["region"], table.obs["spot"] = pd.Categorical(["spots"] * 4), range(4)
    parsed = TableModel.parse(table, region="spots", region_key="region", instance_key="spot")
    SpatialData(tables={"table": parsed}).write(tmp_path / "slide.zarr")
    back = sd.read_zarr(tmp_path / "slide.zarr")["table"]
    for key in keys:
        np.testing.assert_array_equal(back.layers[key], np.ones((4, 3)))
        assert list(back.uns[key]["names"]) == ["u", "v"]
        assert written_under(back, key) == written_under(table, key)


@pytest.mark.parametrize("key", ["", ".", "..", "__nsl", "a/b", "a b", "a\\b", "nsl:1", "\n"])
def test_names_that_cannot_be_stored(table: AnnData, key: str) -> None:
    with pytest.raises(ValueError, match="cannot be stored on disk: use letters, digits, '_', '-' and '.'"):
        Slots(key).check(table)


@pytest.mark.parametrize("key", [None, 3, ["nsl"]])
def test_names_that_are_no_strings(table: AnnData, key: Any) -> None:
    with pytest.raises(TypeError, match=r"`key_added` is .*; expected a string"):
        Slots(key).check(table)
    with pytest.raises(TypeError, match=r"`table_added` is .*; expected a string"):
        check_name(key, "table_added")


def test_names_of_new_tables(table: AnnData) -> None:
    sdata = SpatialData(tables={"Table": table})
    check_new_table(sdata, "predictions", "table_added")
    for name in ("Table", "table"):
        with pytest.raises(ValueError, match=f"`table_added` is '{name}', but there is an element 'Table' already"):
            check_new_table(sdata, name, "table_added")


@pytest.mark.parametrize("place", PLACES)
def test_names_that_differ_in_case_only(table: AnnData, place: str) -> None:
    # Two columns that SpatialData refuses to write.
    name = "Nsl" + {"obsm": "_Features", "obs": "_Train", "var": "_Fitted"}.get(place, "")
    n: Any = {"layers": (4, 3), "obsm": (4, 2), "obs": 4, "var": 3, "uns": 1}[place]
    getattr(table, place)[name] = np.zeros(n)
    with pytest.raises(ValueError, match=rf"`key_added` 'nsl' .*`{place}\['{name}'\]` only in case; choose another"):
        result("nsl").check(table)


@pytest.mark.parametrize("place", PLACES)
def test_what_belongs_to_someone_else_survives(table: AnnData, place: str) -> None:
    name = "nsl" + {"obsm": "_features", "obs": "_train", "var": "_fitted"}.get(place, "")
    mine: dict[str, list[Any]] = {
        "layers": [np.zeros((4, 3))],
        "obsm": [np.zeros((4, 2)), pd.DataFrame({"a": range(4)}, index=table.obs_names)],
        "obs": ["mine", [True, False, True, False]],
        "var": ["mine", [True, False, True]],
        "uns": [np.zeros(3), {"params": {"n": 3}}, {"note": "mine"}, "text", {"written": "by me"}],
    }
    for value in mine[place]:
        getattr(table, place)[name] = value
        before = held(table)
        for check in (result("nsl").check, result("nsl").write):
            with pytest.raises(
                ValueError, match=rf"`{place}\['{name}'\]` exists and holds no result of stpredict under"
            ):
                check(table)
        assert_same(held(table), before)


def test_keys_of_spatialdata(table: AnnData) -> None:
    with pytest.raises(ValueError, match="`key_added` is 'spatialdata_attrs', which is taken"):
        Slots("spatialdata_attrs").check(table)


def test_layers_that_would_be_far_larger_than_what_they_hold(monkeypatch: pytest.MonkeyPatch, table: AnnData) -> None:
    check_layer_size(table)
    monkeypatch.setattr(slots, "MAX_LAYER_BYTES", 47)
    with pytest.raises(ValueError, match=r"A layer of 4 spots x 3 genes takes 0.0 GB.*Pass `table_added`"):
        check_layer_size(table)


# Values


def test_what_is_written_is_a_copy_that_can_be_stored(table: AnnData) -> None:
    given = result("nsl")
    given.entry |= {"gone": None, "text": "t", "list": [1, 2.5], "words": np.array(["a", "bc"]), "empty": []}
    given.write(table)
    entry = table.uns["nsl"]
    assert "gone" not in entry
    assert entry["list"].tolist() == [1, 2.5]
    assert (entry["words"].dtype, entry["params"]["names"].dtype) == (object, object)
    assert entry["empty"].shape == (0,)
    given.entry["params"]["value"], given.entry["loss"][:] = 99, 99
    assert entry["params"]["value"] == 1
    np.testing.assert_array_equal(entry["loss"], np.arange(3))


@pytest.mark.parametrize("place", ["layers", "obsm", "obs", "var"])
def test_what_does_not_fit_is_refused_before_anything_is_written(table: AnnData, place: str) -> None:
    before = held(table)
    given = result("nsl")
    getattr(given, place)[f"nsl_{place}"] = np.zeros(5)
    with pytest.raises(ValueError, match=rf"`{place}\['nsl_{place}'\]` would have 5 rows; the table has [34]"):
        given.write(table)
    assert_same(held(table), before)


def test_places_are_written_where_they_are_absent(table: AnnData) -> None:
    places = np.arange(8.0).reshape(4, 2)
    write_all(table, [result("nsl")], spatial=places)
    np.testing.assert_array_equal(table.obsm["spatial"], places)
    write_all(table, [result("nsl")], spatial=places + 1)
    np.testing.assert_array_equal(table.obsm["spatial"], places)
    result("nsl").write(table)
    assert "spatial" in table.obsm, "it is the ecosystem's, not that of a result"
    del table.obsm["spatial"]
    table.obsm["Spatial"] = places
    write_all(table, [result("nsl")], spatial=places)
    assert "spatial" not in table.obsm


# Replacing


def test_everything_under_a_key_and_nothing_else_is_replaced(table: AnnData) -> None:
    untouched = held(table)
    result("other").write(table)
    result("nsl").write(table)
    result("nsl_scores", of="nsl").write(table)
    result("other_scores", of="other").write(table)
    others = {
        place: {name: value for name, value in names.items() if not name.startswith("nsl")}
        for place, names in held(table).items()
    }
    assert set(untouched["obs"]) < set(others["obs"])

    again = Slots("nsl", layers={"nsl": np.zeros((4, 3))}, obs={"nsl_fold": np.array(["a", "b", "a", "b"])})
    again.check(table)
    again.write(table)
    found = held(table)
    ours = {place: {name for name in names if name.startswith("nsl")} for place, names in found.items()}
    assert ours == {"layers": {"nsl"}, "obsm": set(), "obs": {"nsl_fold"}, "var": set(), "uns": {"nsl"}}
    assert (table.layers["nsl"] == 0).all()
    assert_same(
        {place: {name: v for name, v in names.items() if name not in ours[place]} for place, names in found.items()},
        others,
    )


def test_several_results_are_written_together(table: AnnData) -> None:
    write_all(table, [result("nsl"), result("nsl_scores", 2.0, of="nsl")])
    assert {"nsl", "nsl_scores"} <= set(table.uns)
    assert (table.layers["nsl_scores"] == 2).all()
    result("nsl").write(table)
    assert not [name for names in held(table).values() for name in names if name.startswith("nsl_scores")]


@pytest.mark.parametrize("way", ["h5ad", "zarr"])
def test_results_that_were_stored_are_replaced(table: AnnData, tmp_path: Path, way: str) -> None:
    scores = Slots("nsl_scores", var={"nsl_pcc": np.ones(3)}, of="nsl")
    write_all(table, [result("nsl"), scores, Slots("small", obs={"small_x": np.ones(4)})])
    getattr(table, f"write_{way}")(tmp_path / "table")
    back = getattr(ad, f"read_{way}")(tmp_path / "table")
    for key in ("nsl", "nsl_scores", "small"):
        assert written_under(back, key) == written_under(table, key)
    write_all(back, [Slots("nsl"), Slots("small")])
    assert {
        place: {name for name in names if name.startswith(("nsl", "small"))} for place, names in held(back).items()
    } == {
        **{place: set() for place in PLACES[:-1]},
        "uns": {"nsl", "small"},
    }


@pytest.mark.parametrize("merge", [None, "same", "unique", "first", "only"])
def test_predictions_of_concatenated_tables_are_replaced(table: AnnData, merge: Any) -> None:
    other = table.copy()
    for value, each in enumerate((table, other)):
        result("nsl", float(value)).write(each)
    joined = ad.concat([table, other], uns_merge=merge, index_unique="-")
    again = Slots("nsl", layers={"nsl": np.zeros((8, 3))}, obs={"nsl_train": np.ones(8, dtype=bool)})
    again.check(joined)
    again.write(joined)
    assert (joined.layers["nsl"] == 0).all()
    assert joined.obs["nsl_train"].all()


def test_leftovers_of_predictions_are_known_by_their_masks(table: AnnData) -> None:
    result("nsl").write(table)
    table.obs["nsl_fold"] = "a"
    del table.uns["nsl"]
    found = {place: names for place, names in written_under(table, "nsl").items() if names}
    assert found == {
        "layers": {"nsl"},
        "obs": {"nsl_train", "nsl_fold"},
        "var": {"nsl_fitted"},
        "obsm": {"nsl_features"},
    }
    table.obs["nsl_train"], table.var["nsl_fitted"] = "mine", "mine"
    assert not any(written_under(table, "nsl").values())
    table.obs["nsl_train"] = True
    del table.layers["nsl"]
    assert not any(written_under(table, "nsl").values()), "a mask alone may be that of someone else"


# Whole or not at all


class Failing:
    """A part of a table of which one change, counted over all parts, fails before or after it is done."""

    def __init__(self, content: Any, count: list[int], fail_at: int, *, after: bool) -> None:
        self.__dict__.update(content=content, count=count, fail_at=fail_at, after=after)

    def change(self, do: Callable[[], None]) -> None:
        self.count[0] += 1
        if self.count[0] != self.fail_at:
            return do()
        if self.after:
            do()
        raise MemoryError("no room")

    def __setitem__(self, name: Any, value: Any) -> None:
        self.change(lambda: self.content.__setitem__(name, value))

    def __delitem__(self, name: Any) -> None:
        self.change(lambda: self.content.__delitem__(name))

    def __getitem__(self, name: Any) -> Any:
        return self.content[name]

    def __contains__(self, name: Any) -> bool:
        return name in self.content

    def __iter__(self) -> Any:
        return iter(self.content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.content, name)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_change_that_fails_undoes_all_others(monkeypatch: pytest.MonkeyPatch, table: AnnData, after: bool) -> None:
    write_all(table, [result("nsl"), result("nsl_scores", of="nsl")])
    before, content = held(table), slots._content
    count, fail_at = [0], 1

    def failing(table: AnnData, place: str) -> Failing:
        return Failing(content(table, place), count, fail_at, after=after)

    while True:
        monkeypatch.setattr(slots, "_content", failing)
        try:
            write_all(table, [result("nsl", 2.0), result("more", 3.0)], spatial=np.zeros((4, 2)))
        except MemoryError:
            monkeypatch.setattr(slots, "_content", content)
            assert_same(held(table), before)
            assert table.obs["cell_type"].dtype == "category"
        else:
            break
        count[0], fail_at = 0, fail_at + 1
    assert fail_at == 22, "what there is to delete and to write"
    assert (table.layers["nsl"] == 2).all()
    assert "nsl_scores" not in table.uns


def test_a_table_that_cannot_be_put_into_its_home_stays_as_it_is(table: AnnData) -> None:
    class Home:
        tables: Any = {}

    home = Home()
    write_all(table, [result("nsl")], home=(home, "new"))  # type: ignore[arg-type]
    assert home.tables["new"] is table
    before = held(table)

    class Full(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            raise MemoryError

    other = AnnData(np.ones((1, 1)))
    for there in ({}, {"new": other}):
        home.tables = Full(there)
        with pytest.raises(MemoryError):
            write_all(table, [result("nsl", 2.0)], home=(home, "new"))  # type: ignore[arg-type]
        assert_same(held(table), before)
        assert home.tables == there


def test_views_of_tables_become_tables(table: AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    larger = ad.concat([table, table], index_unique="-", uns_merge="same")
    view = larger[[1, 3, 5, 7]]
    assert view.is_view
    with pytest.warns(ad.ImplicitModificationWarning):
        result("nsl").write(view)
    assert not view.is_view
    assert written_under(view, "nsl")["var"] == {"nsl_fitted"}
    assert written_under(view, "nsl")["layers"] == {"nsl"}
    assert "nsl" not in larger.uns
    assert "nsl_train" not in larger.obs
