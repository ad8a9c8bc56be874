"""Checks of what a model is made of: the same whether it was just fitted or is read from a file of anybody's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from reprlib import Repr
from typing import Any, Protocol

import numpy as np

# Shape and type of an array.
Layout = Mapping[str, tuple[tuple[int, ...], str]]
# The squares of larger numbers are not finite.
LARGEST = 1e150

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SAFETENSORS = {"F64": "float64", "F32": "float32", "I64": "int64", "BOOL": "bool"}
_NUMBERS = (int, float, np.integer, np.floating)


class DamagedError(ValueError):
    """A value that a model cannot have.

    Parameters
    ----------
    field
        Its name, such as ``"reads.bits"`` or that of an array.
    problem
        What is wrong: the end of a sentence that begins with the field.
    in_weights
        The field is an array.
    """

    def __init__(self, field: str, problem: str, in_weights: bool = False) -> None:
        super().__init__(field, problem, in_weights)
        self.field, self.problem, self.in_weights = field, problem, in_weights

    def __str__(self) -> str:
        return f"`{self.field}` {self.problem}"


def short(value: Any) -> str:
    """A value, however long or deep, as a message can hold it."""
    return _SHORT.repr(value)


def get(container: Mapping[str, Any], name: str, *, within: str = "") -> Any:
    """An entry, or a DamagedError that says which one is missing."""
    if name not in container:
        raise DamagedError(within + name, "is missing")
    return container[name]


def check_genes(genes: Any) -> None:
    """Raise a DamagedError unless these are names, each once."""
    if not isinstance(genes, list) or not genes:
        raise DamagedError("genes", f"is {short(genes)}; expected a list of names")
    met: set[str] = set()
    for gene in genes:
        if not isinstance(gene, str) or not gene:
            raise DamagedError("genes", f"has {short(gene)}; expected names only")
        if gene in met:
            raise DamagedError("genes", f"has {short(gene)} more than once")
        met.add(gene)


def check_mapping(field: str, value: Any) -> None:
    """Raise a DamagedError unless this is a dict with names as keys."""
    if not isinstance(value, dict):
        raise DamagedError(field, f"is {short(value)}; expected entries by name")
    for key in value:
        if not isinstance(key, str):
            raise DamagedError(field, f"has the key {short(key)}; expected names")


def check_integer(field: str, value: Any, low: int, high: int) -> None:
    """Raise a DamagedError unless this is an integer within bounds."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value <= high:
        raise DamagedError(field, f"is {short(value)}; expected an integer from {low} to {high}")


def check_number(field: str, value: Any, low: float, high: float) -> None:
    """Raise a DamagedError unless this is a number above ``low`` and at most ``high``."""
    if not isinstance(value, _NUMBERS) or isinstance(value, bool) or not low < value <= high:
        raise DamagedError(field, f"is {short(value)}; expected a number above {low:g} and at most {high:g}")


def check_arrays(arrays: Mapping[str, Any], layout: Layout) -> None:
    """Raise a DamagedError unless all have this shape and type and finite values."""
    for name, (shape, dtype) in layout.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray):
            raise DamagedError(name, f"is {short(array)}; expected an array", in_weights=True)
        _check_layout(name, array.shape, str(array.dtype), (shape, dtype))
        if not np.isfinite(array).all():
            raise DamagedError(name, "has values that are not finite", in_weights=True)


def check_positive(name: str, array: np.ndarray) -> None:
    """Raise a DamagedError unless all values of an array are above 0."""
    if not (array > 0).all():
        raise DamagedError(name, f"has {array.min():g}; expected values above 0", in_weights=True)


def check_scale(values: np.ndarray, what: str) -> None:
    """Raise a ValueError for numbers whose variance is not finite, and name the columns."""
    largest = np.maximum(values.max(axis=0, initial=0), -values.min(axis=0, initial=0)).astype(np.float64)
    if (bad := np.flatnonzero(~(largest <= LARGEST))).size:
        raise ValueError(
            f"The {what} of {bad.size} of {len(largest)} columns, such as {bad[:5].tolist()}, are on a scale of up to "
            f"{largest[bad].max():.3g}. Expected finite numbers of at most {LARGEST:g}: divide these columns by a constant."
        )


def _check_layout(name: str, shape: tuple[int, ...], dtype: str, expected: tuple[tuple[int, ...], str]) -> None:
    if shape != expected[0]:
        raise DamagedError(name, f"has the shape {shape}, expected {expected[0]}", in_weights=True)
    if dtype != expected[1]:
        raise DamagedError(name, f"has numbers of type {dtype}, expected {expected[1]}", in_weights=True)


class _File(Protocol):
    """What :func:`safetensors.safe_open` gives."""

    def keys(self) -> Iterable[str]: ...
    def get_slice(self, name: str) -> Any: ...
    def get_tensor(self, name: str) -> Any: ...


class Arrays:
    """Arrays of a file, of which nothing is read before its shape and type are those that are expected."""

    def __init__(self, file: _File) -> None:
        self._file = file
        self._left = set(file.keys())
        self.names = frozenset(self._left)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of the arrays, without reading it."""
        if name not in self.names:
            raise DamagedError(name, "is missing", in_weights=True)
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, layout: Layout) -> dict[str, Any]:
        """Read arrays; raise a DamagedError unless they are there and as the layout says."""
        for name, expected in layout.items():
            shape = self.shape(name)
            dtype = str(self._file.get_slice(name).get_dtype())
            _check_layout(name, shape, _SAFETENSORS.get(dtype, dtype), expected)
        self._left -= layout.keys()
        return {name: self._file.get_tensor(name) for name in layout}

    def check_all_read(self) -> None:
        """Raise a DamagedError if there are arrays that the model did not ask for."""
        if self._left:
            raise DamagedError(min(self._left), "is unknown: the model has no such array", in_weights=True)


def as_seen(fingerprints: Any) -> np.ndarray:
    """Fingerprints as a model keeps them: sorted, each once; none of `None`."""
    return np.unique(np.asarray([] if fingerprints is None else fingerprints, dtype=np.int64))


def check_seen(seen: Any) -> None:
    """Raise a DamagedError unless these are fingerprints as :func:`as_seen` makes them."""
    check_arrays({"seen": seen}, {"seen": ((np.size(seen),), "int64")})
    if (seen[1:] <= seen[:-1]).any():  # a difference could overflow
        raise DamagedError("seen", "is not sorted, or has a value more than once", in_weights=True)
