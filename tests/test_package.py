from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import stpredict as stp


def test_version() -> None:
    assert re.match(r"\d+\.\d+\.\d+", stp.__version__)


def test_public_names() -> None:
    assert set(stp.__all__) == {"datasets", "get", "models", "pl", "pp", "tl"}
    for module in (stp.datasets, stp.get, stp.models, stp.pl, stp.pp, stp.tl):
        for name in module.__all__:
            assert getattr(module, name).__doc__, f"{module.__name__}.{name}"


def test_models_are_found_when_asked_for() -> None:
    assert "NSL" in dir(stp.models)
    assert "load" in dir(stp.models)
    with pytest.raises(AttributeError, match="No stpredict.models attribute Ridge2"):
        getattr(stp.models, "Ridge2")  # noqa: B009


def test_import_is_light() -> None:
    heavy = ["torch", "lightning", "scanpy", "spatialdata", "squidpy", "distributed", "matplotlib"]
    code = f"import sys, stpredict; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_models_need_no_scverse_package(tmp_path: Path) -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(["anndata", "scanpy", "spatialdata", "squidpy", "dask", "geopandas"]))
import numpy as np, stpredict as stp
features = np.random.default_rng(0).normal(size=(30, 3))
model = stp.models.Ridge.fit(features, features[:, :2], ["a", "b"], reads={"kind": "features", "sources": {
    "x": {"from": "obsm", "n_features": 3}}}, seen=np.arange(1, 31))
again = stp.models.load(model.save(sys.argv[1]))
print(np.abs(again.predict(features) - features[:, :2]).max() < 0.1, stp.models.NSL.kind, stp.models.M2OST.kind)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "nsl", "m2ost"]
