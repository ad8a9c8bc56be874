"""A table is whole whenever an interrupt is noticed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from stpredict._data import slots
from stpredict._data.slots import Slots, write_all


class Alarm(Exception):
    """The timer went off."""


def ring(*_: Any) -> None:
    raise Alarm


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The test's own handlers; those of before come back, and none of this package stay."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, ring)
    expected = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    found = {number: signal.getsignal(number) for number in signal.valid_signals()}
    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, before[number])
    assert found == expected


N_OBS = 200


@pytest.fixture
def table() -> AnnData:
    table = AnnData(np.ones((N_OBS, 20), dtype=np.float32))
    table.obs["mine"] = pd.Categorical(["a", "b"] * (N_OBS // 2))
    write_all(table, results(0))
    return table


def results(value: int, n: int = 5) -> list[Slots]:
    """Two results, one of which describes the other, and everything in them is one number."""
    made = []
    for key, of in (("nsl", ""), ("nsl_scores", "nsl")):
        rows, columns = np.full(N_OBS, value), np.full(20, value)
        made.append(
            Slots(
                key,
                entry={"deep": {"value": value}, "loss": np.full(3, value)},
                layers={key: np.full((N_OBS, 20), value, dtype=np.float32)},
                obsm={f"{key}_{i}": np.full((N_OBS, 2), value) for i in range(n)},
                obs={f"{key}_{i}": rows for i in range(n)},
                var={f"{key}_{i}": columns for i in range(n)},
                of=of,
            )
        )
    return made


def value_of(table: AnnData, n: int = 5) -> int:
    """The one number; fails where there are several, or anything is missing."""
    held: dict[str, Any] = {}
    for place in ("layers", "obsm", "obs", "var"):
        content = getattr(table, place)
        held |= {f"{place}/{name}": np.asarray(content[name]).ravel() for name in content if name != "mine"}
    for key in ("nsl", "nsl_scores"):
        held[key], held[f"{key}/value"] = table.uns[key]["loss"], np.atleast_1d(table.uns[key]["deep"]["value"])
    assert len(held) == 2 * (1 + 3 * n + 2)
    values = np.unique(np.concatenate(list(held.values())))
    assert len(values) == 1
    assert list(table.obs["mine"]) == ["a", "b"] * (N_OBS // 2)
    return int(values[0])


def duration(table: AnnData) -> float:
    began = time.perf_counter()
    for _ in range(3):
        write_all(table, results(0))
    return (time.perf_counter() - began) / 3


def send_interrupt(delay: float) -> None:
    """As Ctrl-C would, from elsewhere, after some seconds."""

    def send() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()


def set_timer(delay: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))


@pytest.mark.parametrize(
    ("start", "error"), [(send_interrupt, KeyboardInterrupt), (set_timer, Alarm)], ids=["SIGINT", "SIGALRM"]
)
def test_interrupts_at_any_moment_leave_a_whole_table(
    table: AnnData, start: Callable[[float], None], error: type[BaseException]
) -> None:
    needed, last, outcomes = duration(table), 0, []
    for i, delay in enumerate(np.linspace(0, 1.2 * needed, 60), start=1):
        wrote = False
        with pytest.raises(error):
            start(delay)
            write_all(table, results(i))
            wrote = True
            for _ in range(2000):  # until it comes
                time.sleep(0.001)
        found = value_of(table)
        assert found in (last, i)
        assert not wrote or found == i
        last = found
        outcomes.append((wrote, found == i))
    assert (False, False) in outcomes, "what comes meanwhile undoes everything"


def test_signals_that_come_meanwhile_are_all_handled_when_the_table_is_whole(
    table: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: list[tuple[int, int]] = []
    raising: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        handled.append((number, value_of(table)))
        if number in raising:
            raise Alarm

    numbers = (signal.SIGUSR1, signal.SIGALRM, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    content = slots._content

    def interrupted(table: AnnData, place: str) -> Any:
        if place == "obsm" and sys._getframe(1).f_code is write_all.__code__:
            for number in numbers:
                signal.raise_signal(number)
        return content(table, place)

    monkeypatch.setattr(slots, "_content", interrupted)
    write_all(table, results(1))
    assert set(handled) == {(number, 1) for number in numbers}
    assert value_of(table) == 1, "handlers that raise nothing change nothing"

    handled.clear()
    raising += numbers
    with pytest.raises(Alarm):
        write_all(table, results(2))
    assert {number for number, _ in handled} == set(numbers)
    assert value_of(table) == 1
    for number, handler in before.items():
        assert signal.signal(number, handler) is note


def test_an_interrupt_takes_the_table_out_of_its_home_again(table: AnnData) -> None:
    class Tables(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            super().__setitem__(key, value)
            if value is table:
                signal.raise_signal(signal.SIGINT)

    class Home:
        tables: Any

    home, other = Home(), AnnData(np.ones((1, 1)))
    for there in ({}, {"new": other}, {"a": other, "new": other, "z": other}):
        home.tables = Tables(there)
        with pytest.raises(KeyboardInterrupt):
            write_all(table, results(1), home=(home, "new"))  # type: ignore[arg-type]
        assert list(home.tables.items()) == list(there.items())
        assert value_of(table) == 0


def test_an_interrupt_of_a_write_that_fails(table: AnnData) -> None:
    class Full(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            raise MemoryError

    class Home:
        tables: Any = Full()

    with pytest.raises(KeyboardInterrupt) as raised:
        write_all(table, results(1), home=(Home(), "new"))  # type: ignore[arg-type]
    assert isinstance(raised.value.__context__, MemoryError)
    assert value_of(table) == 0


def test_an_error_at_any_line_leaves_a_whole_table(table: AnnData) -> None:
    # What signals cannot do: an exception between any two lines.
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code is not write_all.__code__:
            return None
        lines -= event == "line"
        if lines == 0:
            raise Alarm
        return trace

    write_all(table, [Slots("nsl"), *results(0, 1)])
    outcomes = []
    for fail_at in range(1, 1000):
        lines, before = fail_at, sys.gettrace()
        sys.settrace(trace)
        try:
            write_all(table, results(fail_at, 1))
        except Alarm:
            outcomes.append(value_of(table, 1))
            assert outcomes[-1] in (0, fail_at)
        else:
            break
        finally:
            sys.settrace(before)
        if outcomes[-1]:
            write_all(table, results(0, 1))
    assert outcomes.count(0) > 50
    assert value_of(table, 1) == fail_at


def test_other_threads_write_too(table: AnnData) -> None:
    raised: list[BaseException] = []

    def write() -> None:
        try:
            write_all(table, results(1))
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert raised == []
    assert value_of(table) == 1
