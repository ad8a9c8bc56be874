from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stpredict._data.identity import code_identity

MINE = """
import functools
import helper
import numpy as np
from dataclasses import dataclass, field

FACTOR = {factor}
TABLE = {{"a": [1, np.arange(3.0)]}}

def scaled(x, shift={default}):
    return shift + FACTOR * x

def nested(x):
    return [scaled(y) for y in x if y in {{"e", "d", "c", "b", "a"}}], TABLE

def make(n):
    def inner(x):
        return n * x if n else inner(x)
    return inner

class Base:
    limit = {limit}
    def __init__(self, weight):
        self.weight = weight
    def __call__(self, x):
        return self.finish(x)
    def finish(self, x):
        return self.weight * x + {in_base}
    @property
    def half(self):
        return self.weight / {in_property}
    @staticmethod
    def third(x):
        return x // {in_static}

class Derived(Base):
    def __call__(self, x):
        return super().__call__(x)

@dataclass
class Settings:
    width: int = 3
    names: list = field(default_factory=list)
    def __call__(self, x):
        return self.width * x

class Slim:
    __slots__ = ("a", "b")
    def __init__(self, a):
        self.a = a
    def __call__(self, x):
        return self.a * x

def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper

def functions():
    return {{
        "lambda": lambda x: x + {constant},
        "function": scaled,
        "nested": nested,
        "closure": make({closure}),
        "partial": functools.partial(scaled, shift={keyword}),
        "partial of a position": functools.partial(max, {keyword}),
        "object": Base({state}),
        "inherited": Derived(1),
        "method": Base({state}).finish,
        "class": Base,
        "dataclass": Settings({state}, names=["a"]),
        "slots": Slim({state}),
        "method of a list": [1, {state}].index,
        "decorated": decorated(lambda x: x - {constant}),
        "by module": lambda x: helper.double(x),
        "of numpy": lambda x: np.linalg.norm(x) + np.pi,
        "builtin": len,
        "ufunc": np.sqrt,
        "method of a class": dict.fromkeys,
    }}
"""
HELPER = "def double(x):\n    return {helper} * x\n"
PLAIN: dict[str, Any] = {
    **{"factor": 2, "default": 0, "constant": 7, "closure": 3, "keyword": 4, "state": 5, "limit": 6},
    **{"in_base": 0, "in_property": 2, "in_static": 3, "helper": 2},
}
# What each change reaches.
REACHED = {
    "factor": {"function", "nested", "partial"},
    "default": {"function", "nested", "partial"},
    "constant": {"lambda", "decorated"},
    "closure": {"closure"},
    "keyword": {"partial", "partial of a position"},
    "state": {"object", "method", "dataclass", "slots", "method of a list"},
    "limit": {"object", "inherited", "method", "class"},
    "in_base": {"object", "inherited", "method", "class"},
    "in_property": {"object", "inherited", "method", "class"},
    "in_static": {"object", "inherited", "method", "class"},
    "helper": {"by module"},
}
IDENTIFY = """
import sys
sys.path.insert(0, {folder!r})
import mine
from stpredict._data.identity import code_identity
found = {{name: code_identity(function) for name, function in mine.functions().items()}}
"""


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str | None]]:
    """Identities of the functions of a module that is written with some numbers changed, in this process."""

    def identify(**changes: Any) -> dict[str, str | None]:
        folder = tmp_path_factory.mktemp("code")
        numbers = {**PLAIN, **changes}
        (folder / "mine.py").write_text(MINE.format(**numbers))
        (folder / "helper.py").write_text(HELPER.format(**numbers))
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(folder))
            for name in ("mine", "helper"):
                sys.modules.pop(name, None)
            import mine  # type: ignore[import-not-found]

            functions = mine.functions()
            return {name: code_identity(function) for name, function in functions.items()}

    return identify


@pytest.fixture(scope="module")
def plain(codes: Callable[..., dict[str, str | None]]) -> dict[str, str | None]:
    return codes()


def test_code_has_one_identity_in_all_processes(
    plain: dict[str, str | None], other_process: ProcessPoolExecutor, tmp_path: Path
) -> None:
    assert None not in plain.values()
    assert len(set(plain.values())) == len(plain)
    (tmp_path / "mine.py").write_text("# moved by a line\n" + MINE.format(**PLAIN))
    (tmp_path / "helper.py").write_text(HELPER.format(**PLAIN))
    (tmp_path / "identify.py").write_text(IDENTIFY.format(folder=str(tmp_path)))
    run = f"__import__('runpy').run_path({str(tmp_path / 'identify.py')!r})['found']"
    assert other_process.submit(eval, run).result() == plain


@pytest.mark.parametrize("change", REACHED)
def test_code_that_differs_has_another_identity(
    codes: Callable[..., dict[str, str | None]], plain: dict[str, str | None], change: str
) -> None:
    found = codes(**{change: 11})
    assert {name for name in plain if found[name] != plain[name]} == REACHED[change]


# Networks


class Scale(torch.nn.Module):
    """A parameter, two buffers, one of which is not saved, and a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.power = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x) ** self.power


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.GELU(), torch.nn.Dropout(0.1), Scale()
    ).eval()


def weight(module: Any) -> None:
    module[0].weight.data[0, 0, 0, 0] += 1e-6


def running_mean(module: Any) -> None:
    module[1].running_mean[0] += 1


def counter(module: Any) -> None:
    module[1].num_batches_tracked += 1


def rate(module: Any) -> None:
    module[3].p = 0.2


def scalar(module: Any) -> None:
    module[4].weight.data += 1


def buffer(module: Any) -> None:
    module[4].mean[0] = 1


def hidden_buffer(module: Any) -> None:
    module[4].hidden[0] = 1


def plain_number(module: Any) -> None:
    module[4].power = 3


def width_of_numbers(module: Any) -> None:
    module[4].double()


def layer(module: Any) -> None:
    module[2] = torch.nn.ReLU()


def hook(module: Any) -> None:
    module.register_forward_hook(lambda _, inputs, output: output + 1)


def mode(module: Any) -> None:
    module.train()


CHANGES = [weight, running_mean, counter, rate, scalar, buffer, hidden_buffer, plain_number, width_of_numbers, layer]


def test_networks_are_told_apart_by_all_that_they_hold() -> None:
    first = code_identity(network())
    assert first is not None
    assert code_identity(network()) == first
    found: list[str | None] = [first]
    for change in [*CHANGES, hook, mode]:
        changed = network()
        change(changed)
        found.append(code_identity(changed))
        assert found[-1] not in found[:-1], change.__name__
        assert found[-1] is not None
    encoder = network()
    assert code_identity(lambda x: encoder(x)) not in (None, first)
    before = code_identity(lambda x: encoder(x))
    weight(encoder)
    assert code_identity(lambda x: encoder(x)) != before


def test_scripted_networks() -> None:
    first, again, other = (torch.jit.script(Scale()) for _ in range(3))
    other.weight.data += 1
    assert code_identity(first) == code_identity(again) is not None
    assert code_identity(first) != code_identity(other)


# What cannot be told


class Locked:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self) -> None:
        with self.lock:
            pass


class Unset:
    __slots__ = ("a",)

    def __call__(self) -> None: ...


def unfinished() -> Callable[[], Any]:
    def inner() -> Any:
        return later

    if len(sys.argv) < 0:
        later = 1
    return inner


def test_callables_without_identity() -> None:
    generator = np.random.default_rng(0)
    scores = iter([1, 2])
    unknown = {
        "lock": Locked(),
        "generator": lambda: generator.random(),
        "iterator": functools.partial(next, scores),
        "method of a generator": generator.random,
        "variable that is not set": unfinished(),
        "sparse weights": functools.partial(max, torch.eye(3).to_sparse()),
    }
    for name, function in unknown.items():
        assert code_identity(function) is None, name
    assert code_identity(Unset()) is not None


def test_what_refers_to_itself_has_an_identity() -> None:
    def first(n: int) -> Any:
        return second(n - 1) if n else first

    def second(n: int) -> Any:
        return first(n)

    assert code_identity(first) is not None
    assert code_identity(first) == code_identity(first)
    assert code_identity(first) != code_identity(second)
    table: dict[str, Any] = {}
    table["self"] = table
    assert code_identity(functools.partial(max, table)) is None, "endless"
