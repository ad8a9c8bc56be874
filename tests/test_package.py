from __future__ import annotations

import re
import subprocess
import sys

import pytest

import stpredict as stp


def test_version() -> None:
    assert re.match(r"\d+\.\d+\.\d+", stp.__version__)


def test_public_names() -> None:
    assert set(stp.__all__) == {"datasets", "models", "pl", "pp", "tl"}
    for module in (stp.datasets, stp.models, stp.pl, stp.pp, stp.tl):
        for name in module.__all__:
            assert getattr(module, name).__doc__, f"{module.__name__}.{name}"


def test_models_are_found_when_asked_for() -> None:
    assert "NSL" in dir(stp.models)
    assert "load" in dir(stp.models)
    with pytest.raises(AttributeError, match="module 'stpredict.models' has no attribute 'Ridge2'"):
        stp.models.Ridge2  # noqa: B018


def test_import_is_light() -> None:
    heavy = ["torch", "lightning", "squidpy", "distributed"]
    code = f"import sys, stpredict; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
