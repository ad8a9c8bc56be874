"""One identity for whatever is kept: what it was made of, so that it is made anew when any of that changed.

What cannot be identified has no identity (`None`), and nothing that was made of it is ever taken up again.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import scipy.sparse as sp
import xxhash
import zarr
from dask._task_spec import DataNode, GraphNode
from scanpy import logging as logg


class Unidentified(Exception):
    """Something has no identity."""


def digest(*values: Any) -> str:
    """Hash values: numbers, strings, arrays, sparse matrices, frames, and nested mappings and sequences of them.

    Raises
    ------
    Unidentified
        A value of another kind.
    """
    state = xxhash.xxh3_128()
    for value in values:
        _feed(state, value)
    return str(state.hexdigest())


def _feed(state: Any, value: Any) -> None:
    kind = type(value)
    if value is None or kind in (bool, int, float, str, bytes, complex):
        state.update(f"{kind.__name__}:{value!r};".encode())
    elif isinstance(value, np.generic) and not isinstance(value, np.longdouble | np.clongdouble):
        _feed(state, value.item())
    elif isinstance(value, np.ndarray):
        if value.dtype.hasobject or value.dtype.kind == "U":  # strings come back from files as objects
            _feed(state, ["object", value.shape, *value.ravel().tolist()])
        else:
            state.update(f"array:{value.dtype.str}:{value.shape};".encode())
            state.update(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data if value.size else b"")
    elif sp.issparse(value):
        csr = sp.csr_matrix(value)  # type: ignore[call-overload]
        if not csr.has_canonical_format:
            csr = csr.copy()
            csr.sum_duplicates()
        _feed(state, ["sparse", csr.shape])
        for part in (csr.indptr.astype(np.int64), csr.indices.astype(np.int64), csr.data):
            _feed(state, part)
    elif isinstance(value, pd.DataFrame):
        _feed(state, ["frame", list(map(str, value.columns)), value.index.to_numpy()])
        for i in range(value.shape[1]):
            _feed(state, value.iloc[:, i])
    elif isinstance(value, pd.Series | pd.Index):
        _feed(state, np.asarray(value.astype(object) if isinstance(value.dtype, pd.CategoricalDtype) else value))
    elif isinstance(value, Mapping):
        state.update(f"mapping:{len(value)};".encode())
        for key in sorted(value, key=str):
            _feed(state, str(key))
            _feed(state, value[key])
    elif isinstance(value, set | frozenset):
        _feed(state, ["set", *sorted(map(repr, value))])
    elif isinstance(value, Sequence):
        state.update(f"sequence:{len(value)};".encode())
        for item in value:
            _feed(state, item)
    elif isinstance(value, Path):
        _feed(state, str(value))
    elif pd.api.types.is_scalar(value):  # missing values, times
        state.update(f"{kind.__name__}:{value!r};".encode())
    else:
        raise Unidentified(f"a {kind.__module__}.{kind.__qualname__}")


def identity(*values: Any) -> str | None:
    """The digest of values, `None` where one of them has none."""
    if any(value is None for value in values):
        return None
    try:
        return digest(*values)
    except Unidentified:
        return None


# --- pixels -------------------------------------------------------------------------------------------------------------


def pixels_identity(pixels: da.Array, name: str) -> str | None:
    """Identify an image: arrays in memory by what they hold, files by size and time of change of each chunk.

    Parameters
    ----------
    pixels
        The image.
    name
        For the message that it has no identity.
    """
    try:
        return digest(pixels.shape, str(pixels.dtype), pixels.name, _sources(pixels))
    except Unidentified as error:
        logg.warning(
            f"What is made of the image {name!r} cannot be kept for another call: its pixels come from {error}, which tells "
            "nothing of whether they changed."
        )
        return None


def _sources(pixels: da.Array) -> dict[str, str]:
    """What each thing is that the graph reads from, by its key: the order of a graph means nothing."""
    found: dict[str, str] = {}
    arrays: dict[str, np.ndarray] = {}
    for key, node in dict(pixels.dask).items():
        value = node.value if isinstance(node, DataNode) else node
        if isinstance(value, GraphNode):
            if not value.dependencies:
                found[str(key)] = _task_source(value)
        elif isinstance(value, tuple) and value and callable(value[0]):
            raise Unidentified(f"the function {_name_of(value[0])}")
        elif isinstance(value, np.ndarray):
            arrays[str(key)] = value
        elif (source := _source(value)) is not None:
            found[str(key)] = source
        elif not (callable(value) or isinstance(value, slice | np.dtype)):
            digest(value)  # plain values are part of the name; what is none may change
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of Python's lock
        return found | dict(zip(arrays, pool.map(digest, arrays.values()), strict=True))


def _source(value: Any) -> str | None:
    """What identifies something that pixels are read from; `None` for all else."""
    if isinstance(value, zarr.Array):
        return _zarr_identity(value)
    if isinstance(value, np.ndarray) and value.size:
        return digest(value)
    return str(value.stpredict_identity) if hasattr(value, "stpredict_identity") else None


def _task_source(task: Any) -> str:
    """A task that depends on no other must have all it reads among its arguments; a string may name a file."""
    arguments = [
        argument.value if isinstance(argument, DataNode) else argument
        for argument in (*getattr(task, "args", ()), *getattr(task, "kwargs", {}).values())
    ]
    found = [source for argument in arguments if (source := _source(argument)) is not None]
    if not found or any(isinstance(argument, str | Path) for argument in arguments):
        raise Unidentified(f"the function {_name_of(getattr(task, 'func', task))}")
    return digest(found)


def _name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _zarr_identity(array: zarr.Array) -> str:
    root = getattr(array.store, "root", None)
    if "file" in getattr(getattr(array.store, "fs", None), "protocol", ()):
        root = array.store.path  # type: ignore[attr-defined]
    if root is None:
        raise Unidentified(f"a {type(array.store).__name__}")
    folder = Path(root) / array.path
    files = sorted(
        (str(file.relative_to(folder)), status.st_size, status.st_mtime_ns) for file, status in _walk(folder)
    )
    if not files:
        raise Unidentified(f"the store {str(folder)!r}, which is not there")
    return digest("zarr", str(folder.resolve()), files)


def _walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if entry.is_dir():
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path), entry.stat()


# --- code ---------------------------------------------------------------------------------------------------------------


def code_identity(function: Any) -> str | None:
    """Identify what a callable would do: its code, settings and state, and those of what it calls of the user's own."""
    try:
        return digest(_code(function, set()))
    except (Unidentified, RecursionError, RuntimeError, ValueError):  # the last two: odd tensors, variables not yet set
        return None


def _code(value: Any, seen: set[int]) -> Any:
    """The same as plain values."""
    if id(value) in seen:
        return "seen"
    if (name := _installed_name(value)) is not None:
        return name
    if isinstance(value, partial):
        return ["partial", *(_code(part, seen) for part in (value.func, *value.args)), _mapping(value.keywords, seen)]
    if isinstance(value, types.MethodType):
        return ["method", _code(value.__func__, seen), _code(value.__self__, seen)]
    if isinstance(value, types.BuiltinFunctionType):
        return ["builtin", value.__qualname__, _code(value.__self__, seen)]
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, type):
        return _class_code(value, seen)
    if isinstance(value, types.FunctionType):
        return _function_code(value, seen | {id(value)})
    if isinstance(value, Mapping):
        return _mapping(value, seen)
    if isinstance(value, list | tuple):
        return [_code(item, seen) for item in value]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        held = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [str(value.dtype), list(value.shape), held]
    if torch is not None and isinstance(value, torch.jit.ScriptModule):
        return [str(getattr(value, "inlined_graph", "")), _mapping(value.state_dict(), seen)]
    is_module = torch is not None and isinstance(value, torch.nn.Module)
    try:
        digest(value)
    except Unidentified:
        state, cls = _state(value), type(value)
        its_own = is_module or dataclasses.is_dataclass(value) or not _is_installed(cls.__module__)
        is_mark = state == {} and cls.__bases__ == (object,)  # such as the one for "no default"
        if state is None or not (its_own or is_mark):
            raise
        return [_class_code(cls, seen), _mapping(state, seen | {id(value)})]
    return value


def _state(value: Any) -> dict[str, Any] | None:
    """Attributes of an object; `None` where Python does not hold them."""
    slots = [name for cls in type(value).__mro__ for name in np.atleast_1d(vars(cls).get("__slots__", []))]
    if not slots and not hasattr(value, "__dict__"):
        return None
    return {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **getattr(value, "__dict__", {})}


def _function_code(function: types.FunctionType, seen: set[int]) -> Any:
    """A function's code, the variables that it sees, and what it calls of modules of the user's own."""
    cells = [_code(cell.cell_contents, seen) for cell in function.__closure__ or ()]
    settings = [_code(part, seen) for part in (function.__defaults__, function.__kwdefaults__, vars(function))]
    if _is_installed(function.__module__):
        return [f"{function.__module__}.{function.__qualname__}", cells, settings]
    names = _names(function.__code__)
    used = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, item in used.items():
        if isinstance(item, types.ModuleType) and not _is_installed(item.__name__):
            used[name] = {each: getattr(item, each) for each in names if hasattr(item, each)}
    return ["function", *_instructions(function.__code__), settings, cells, _mapping(used, seen)]


def _class_code(cls: type, seen: set[int]) -> Any:
    """Methods and settings of a class of the user's own, and of those that it is made from."""
    seen = seen | {id(cls)}
    return [
        f"{each.__module__}.{each.__qualname__}"
        if _is_installed(each.__module__)
        else [each.__qualname__, _mapping(dict(_members(each)), seen)]
        for each in cls.__mro__
    ]


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    for name, item in vars(cls).items():
        if isinstance(item, staticmethod | classmethod):
            item = item.__func__
        elif isinstance(item, property):
            item = item.fget
        elif isinstance(item, cached_property):
            item = item.func
        of_language = name.startswith("__") or name == "_abc_impl" or hasattr(item, "__get__")
        if isinstance(item, types.FunctionType) or not of_language:
            yield name, item


def _installed_name(value: Any) -> str | None:
    """The name under which a package holds something; `None` where none does."""
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if not (isinstance(module, str) and isinstance(name, str) and _is_installed(module)):
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}.{name}" if found is value else None


def _mapping(values: Mapping[str, Any], seen: set[int]) -> dict[str, Any]:
    return {str(key): _code(value, seen) for key, value in values.items()}


def _instructions(code: types.CodeType) -> list[Any]:
    constants = [
        _instructions(item) if isinstance(item, types.CodeType) else _constant(item) for item in code.co_consts
    ]
    return [code.co_code, constants, list(code.co_names), list(code.co_varnames)]


def _constant(item: Any) -> Any:
    """A constant; those of sets have no order."""
    if isinstance(item, tuple | frozenset):
        parts = [_constant(part) for part in item]
        return parts if isinstance(item, tuple) else ["set", *sorted(map(repr, parts))]
    return f"{type(item).__name__}:{item!r}"


def _names(code: types.CodeType) -> set[str]:
    inner = (item for item in code.co_consts if isinstance(item, types.CodeType))
    return set(code.co_names).union(*(_names(item) for item in inner))


def _is_installed(module: str | None) -> bool:
    """Whether a module is part of Python or of a package: its version says what it does."""
    root = (module or "").partition(".")[0]
    if root == "stpredict" or root in sys.stdlib_module_names and root != "__main__":
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is not None and "site-packages" in Path(file).parts
