"""Ctrl-C at any moment: KeyboardInterrupt, and a table that is as it was or complete."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from spatialdata import SpatialData

import stpredict as stp
from stpredict.models import NSL

MakeSData = Callable[..., SpatialData]


def is_interrupted(function: Callable[[], Any], after: float) -> bool:
    """Call a function while a timer is running; whether it came to its end is up to chance."""

    def ring(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, after)
    try:
        function()
    except KeyboardInterrupt:
        return True
    else:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def model(make_sdata: MakeSData) -> NSL:
    return stp.tl.fit_nsl(make_sdata(n_spots=16, n_genes=4), genes=["gene1"], inplace=False)


@pytest.mark.parametrize("what", ["nsl", "ridge", "predict"])
def test_any_moment(make_sdata: MakeSData, model: NSL, what: str) -> None:
    sdata = make_sdata(n_spots=16, n_genes=4)
    table = sdata["table"]
    old: dict[str, Callable[..., Any]] = {"nsl": stp.tl.fit_nsl, "ridge": stp.tl.fit_ridge, "predict": stp.tl.fit_nsl}
    options: dict[str, Any] = {"genes": ["gene1"], "key_added": "key"}
    calls: dict[str, Callable[[], Any]] = {
        "nsl": partial(stp.tl.fit_nsl, sdata, **options),
        "ridge": partial(stp.tl.fit_ridge, sdata, features=["mean_od", "position"], **options),
        "predict": partial(stp.tl.predict, sdata, model, key_added="key"),
    }
    new = calls[what]

    def state() -> tuple[Any, ...]:
        names = {place: sorted(map(str, getattr(table, place))) for place in ("obs", "var", "obsm", "layers", "uns")}
        fitted = table.var_names[table.var["key_fitted"]].tolist()
        return names, fitted, table.uns["key"]["genes"].tolist(), table.layers["key"].tobytes()

    new()  # which compiles what it needs
    started = time.perf_counter()
    new()
    lasts, complete = time.perf_counter() - started, state()
    reached = []
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        old[what](sdata, key_added="key")
        before = state()
        assert before != complete
        reached.append(is_interrupted(new, max(share * lasts, 1e-4)))
        assert state() in ((before, complete) if reached[-1] else (complete,))
    assert any(reached)
    np.testing.assert_array_equal(table.X.toarray(), make_sdata(n_spots=16, n_genes=4)["table"].X.toarray())


@pytest.mark.parametrize("what", ["radius", "spot_scale"])
def test_impossible_fields_are_refused_at_once(make_sdata: MakeSData, model: NSL, what: str) -> None:
    sdata = make_sdata(n_spots=16, n_genes=4)
    calls: list[Callable[[], Any]]
    if what == "radius":
        sdata["A_spots"]["radius"] = 2e7
        calls = [
            partial(stp.tl.fit_nsl, sdata),
            partial(stp.tl.fit_ridge, sdata),
            partial(stp.tl.predict, sdata, model),
        ]
        number = r"8e\+07|2\.4e\+08"
    else:
        calls = [
            partial(stp.tl.fit_nsl, sdata, spot_scale=1e9),
            partial(stp.tl.fit_ridge, sdata, features=lambda patches: patches.mean(dim=(2, 3)), spot_scale=1e9),
        ]
        number = r"2?e\+(09|10)"
    for call in calls:
        started = time.process_time()
        with pytest.raises(ValueError, match=number):
            call()
        assert time.process_time() - started < 2
