"""The one door out: results are prepared, checked, and put into a table in one step that is whole or undone."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import TableModel

from stpredict._data.columns import mask_or_none
from stpredict._data.compat import layer_names

# The parts of a table that results go to.
_PLACES = ("layers", "obsm", "obs", "var", "uns")
# Where the entry of a result in `uns` notes what else belongs to it, and what it describes.
_WRITTEN, _OF = "written", "of"
# Columns of predictions, and of their scores, by what follows their key.
_AFTER_KEY = {"obs": ("train", "fold"), "var": ("fitted",)}
SCORES = {
    "obs": ("pcc", "rmse"),
    "var": (
        "pcc",
        "pcc_pooled",
        "pcc_low",
        "pcc_high",
        "spearman",
        "rmse",
        "mae",
        "r2",
        "variance_ratio",
        "moran_measured",
        "moran_predicted",
        "pvals",
        "pvals_adj",
        "predictable",
        "pcc_of_ceiling",
    ),
}
_STORABLE = "use letters, digits, '_', '-' and '.', not beginning with '__'."
# A dense layer of spots by all genes beyond this is a mistake more often than it is meant.
MAX_LAYER_BYTES = 10**9


@dataclass
class Slots:
    """What one result writes: names and values for each part of a table, under one key.

    Attributes
    ----------
    key
        What everything is named after; ``uns[key]`` tells what was written.
    entry
        ``uns[key]``: arrays, numbers, strings and nested dicts of them.
    layers, obsm, obs, var
        Arrays and columns by name; `None` as a value, in a check before the work, is a name that is going to be written.
    of
        Key of the predictions that this describes (a score); it is taken away together with them.
    """

    key: str
    entry: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    obsm: dict[str, Any] = field(default_factory=dict)
    obs: dict[str, Any] = field(default_factory=dict)
    var: dict[str, Any] = field(default_factory=dict)
    of: str = ""

    def names(self, place: str) -> list[str]:
        """Names that go to a part of the table."""
        return [self.key] if place == "uns" else list(getattr(self, place))

    def check(self, table: AnnData, argument: str = "key_added") -> None:
        """Refuse names that could not be stored, or that hold something else.

        Called before the work, so that a wrong key costs no time, and again before writing.

        Raises
        ------
        TypeError
            The key is no string.
        ValueError
            AnnData or SpatialData could not store a name, or the user has something there.
        """
        check_name(self.key, argument)
        if self.key == TableModel.ATTRS_KEY:
            raise ValueError(f"`{argument}` is {self.key!r}, which is taken; choose another.")
        ours = written_under(table, self.key)
        for place in _PLACES:
            content = _content(table, place)
            for name in self.names(place):
                if twins := [other for other in content if other != name and str(other).casefold() == name.casefold()]:
                    raise ValueError(
                        f"`{argument}` {self.key!r} would make `{place}[{name!r}]`, which differs from "
                        f"`{place}[{twins[0]!r}]` only in case; choose another."
                    )
                if name in content and name not in ours[place]:
                    raise ValueError(
                        f"`{place}[{name!r}]` exists and holds no result of stpredict under the key {self.key!r}; choose "
                        f"another `{argument}`, or delete it."
                    )

    def write(self, table: AnnData) -> None:
        """Put everything in place instead of what was written under the key before.

        Raises
        ------
        ValueError
            As :meth:`check`.
        """
        self.check(table)
        write_all(table, [self])


def write_all(
    table: AnnData,
    results: Sequence[Slots],
    *,
    home: tuple[SpatialData, str] | None = None,
    spatial: np.ndarray | None = None,
) -> None:
    """Write several results: all of them or, if anything raises, nothing.

    Signals wait meanwhile. What Ctrl-C raises then undoes everything, as any other exception.

    Parameters
    ----------
    table
        Where to.
    results
        Whose names were checked.
    home
        The SpatialData to put the table into, and the key.
    spatial
        ``(n_obs, 2)`` for ``obsm["spatial"]``, which is the ecosystem's and written only where it is absent.
    """
    prepared: list[dict[str, dict[str, Any]]] = [_prepare(table, slots) for slots in results]
    if spatial is not None and "spatial" not in map(str.casefold, table.obsm):
        prepared.append({"obsm": {"spatial": spatial}})
    old: dict[str, set[str]] = {place: set() for place in _PLACES}
    for slots in results:
        for key in (slots.key, *_dependents(table, slots.key)):
            for place, names in written_under(table, key).items():
                old[place] |= names
    with _held_signals() as deliver:
        before = {place: dict(_content(table, place).items()) for place in ("layers", "obsm", "uns")}
        frames = {place: _content(table, place).copy(deep=False) for place in ("obs", "var")}
        replaced = None if home is None else home[0].tables.get(home[1])
        try:
            for place, names in old.items():
                content = _content(table, place)
                for name in names:
                    if name in content:
                        del content[name]
            for new in prepared:
                for place, values in new.items():
                    content = _content(table, place)
                    for name, value in values.items():
                        content[name] = value
            if home is not None:
                home[0].tables[home[1]] = table
            deliver()
        except BaseException:
            for place, values in before.items():
                _restore(_content(table, place), values)
            for place, frame in frames.items():
                _restore(_content(table, place), {name: frame[name] for name in frame})
            if home is not None and home[0].tables.get(home[1]) is not replaced:
                if replaced is None:
                    del home[0].tables[home[1]]
                else:
                    home[0].tables[home[1]] = replaced
            raise


def written_under(table: AnnData, key: str) -> dict[str, set[str]]:
    """Names in each part of a table that a result under a key has written, and that are there.

    ``uns[key]`` notes them. Concatenation drops it, or keeps it without what it describes: what is left of predictions and
    of their scores is then known by its names, beside a layer and a mask of training spots or genes.
    """
    entry = table.uns.get(key)
    noted = entry.get(_WRITTEN) if isinstance(entry, Mapping) else None
    names: dict[str, set[str]] = {place: set() for place in _PLACES}
    described = key.removesuffix("_score")
    if isinstance(noted, Mapping):
        names |= {place: {str(name) for name in np.atleast_1d(noted.get(place, []))} for place in _PLACES}
        names["uns"] = {key}
    elif _is_bereft(table, key):
        names |= {
            place: {f"{key}_{name}" for name in (*of_key, *SCORES[place])} for place, of_key in _AFTER_KEY.items()
        }
        names |= {"layers": {key}, "obsm": {f"{key}_features"}, "uns": {key} if isinstance(entry, Mapping) else set()}
    elif described != key and _is_bereft(table, described):
        names |= {place: {f"{described}_{name}" for name in of_scores} for place, of_scores in SCORES.items()}
    return {place: {name for name in names[place] if name in _content(table, place)} for place in _PLACES}


def _is_bereft(table: AnnData, key: str) -> bool:
    """Whether there are predictions under a key whose entry in ``uns`` tells nothing of what belongs to them."""
    entry = table.uns.get(key)
    if key not in layer_names(table) or isinstance(entry, Mapping) and isinstance(entry.get(_WRITTEN), Mapping):
        return False
    return any(_is_mask(table, place, f"{key}_{name}") for place, name in (("obs", "train"), ("var", "fitted")))


def _is_mask(table: AnnData, place: str, name: str) -> bool:
    return mask_or_none(_content(table, place), name) is not None


def _dependents(table: AnnData, key: str) -> list[str]:
    """Keys of results that describe those under a key."""
    return [
        other
        for other, entry in table.uns.items()
        if other != key and isinstance(entry, Mapping) and _WRITTEN in entry and str(entry.get(_OF, "")) == key
    ]


def check_name(name: object, argument: str) -> None:
    """Refuse a name that SpatialData does not take, or AnnData cannot write.

    Raises
    ------
    TypeError
        It is no string.
    ValueError
        It cannot be stored.
    """
    if not isinstance(name, str):
        raise TypeError(f"`{argument}` is {name!r}; expected a string.")
    storable = name not in ("", ".", "..") and not name.startswith("__")
    if not (storable and all(c.isalnum() or c in "_-." for c in name)):
        raise ValueError(f"`{argument}` is {name!r}, which cannot be stored on disk: {_STORABLE}")


def check_new_table(sdata: SpatialData, key: str, argument: str) -> None:
    """Refuse a name that SpatialData would not take for a new table."""
    check_name(key, argument)
    names = [name for _, name, _ in sdata.gen_elements()]
    if twins := [name for name in names if name.casefold() == key.casefold()]:
        raise ValueError(f"`{argument}` is {key!r}, but there is an element {twins[0]!r} already; choose another.")


def check_layer_size(table: AnnData) -> None:
    """Refuse a dense layer that would be far larger than what it holds."""
    needed = 4 * table.n_obs * table.n_vars
    if needed > MAX_LAYER_BYTES:
        raise ValueError(
            f"A layer of {table.n_obs} spots x {table.n_vars} genes takes {needed / 1e9:.1f} GB, predicted or "
            "not. Pass `table_added` to write a table of the predicted genes alone instead."
        )


def _content(table: AnnData, place: str) -> Any:
    return getattr(table, place)


def _prepare(table: AnnData, slots: Slots) -> dict[str, dict[str, Any]]:
    """Everything in its final form; copies, so that editing the table edits nothing else."""
    written = {place: np.array(sorted(slots.names(place)), dtype=object) for place in ("layers", "obsm", "obs", "var")}
    entry = {
        **_storable(copy.deepcopy(slots.entry)),
        _WRITTEN: {place: names for place, names in written.items() if len(names)},
    }
    if slots.of:
        entry[_OF] = slots.of
    prepared = {
        "layers": slots.layers,
        "obsm": slots.obsm,
        "obs": slots.obs,
        "var": slots.var,
        "uns": {slots.key: entry},
    }
    for place, n in (("layers", table.n_obs), ("obsm", table.n_obs), ("obs", table.n_obs), ("var", table.n_vars)):
        for name, values in prepared[place].items():
            length = values.shape[0] if hasattr(values, "shape") else len(values)
            if length != n:
                raise ValueError(f"`{place}[{name!r}]` would have {length} rows; the table has {n}.")
    return prepared


def _storable(value: Any) -> Any:
    """Lists as arrays, and no empty or missing values, which h5ad and zarr do not store."""
    if isinstance(value, Mapping):
        return {str(name): _storable(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        array = np.array(value, dtype=object if any(isinstance(item, str) for item in value) else None)
        return array
    if isinstance(value, np.ndarray) and value.dtype.kind == "U":
        return value.astype(object)
    return value


def _restore(content: MutableMapping[str, Any], values: Mapping[str, Any]) -> None:
    for name in [name for name in content if name not in values and name is not None]:
        del content[name]
    for name, value in values.items():
        if name is not None and (name not in content or content[name] is not value):
            content[name] = value


@contextmanager
def _held_signals() -> Iterator[Callable[[], None]]:
    """Have signals, such as that of Ctrl-C, wait until they are delivered: Python handles them in its main thread alone."""
    arrived: list[tuple[int, Any]] = []
    held: dict[int, Any] = {}

    def deliver() -> None:
        while arrived:
            number, frame = arrived.pop(0)
            held[number](number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield deliver
        return
    handlers = {
        int(number): signal.getsignal(number) for number in signal.valid_signals() if number not in _UNBLOCKABLE
    }
    held |= {number: handler for number, handler in handlers.items() if callable(handler)}
    waiting = list(held)
    try:
        for number in waiting:
            signal.signal(number, lambda *received: arrived.append(received))
        yield deliver
    finally:
        raised: BaseException | None = None
        while waiting or arrived:
            try:  # a handler that is back may raise while others are still waiting
                while waiting:
                    signal.signal(waiting[-1], held[waiting[-1]])
                    waiting.pop()
                deliver()
            except BaseException as error:  # noqa: BLE001
                raised = raised or error
        if raised is not None:
            raise raised


_UNBLOCKABLE = {getattr(signal, name) for name in ("SIGKILL", "SIGSTOP") if hasattr(signal, name)}
