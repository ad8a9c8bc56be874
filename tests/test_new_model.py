"""A new model is one class, one line of the registry and one fit function: those that the documentation shows."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from spatialdata import SpatialData

import stpredict as stp
from stpredict.models import _registry

PAGE = Path(__file__).parents[1] / "docs" / "contributing" / "architecture.md"


@pytest.fixture
def fit_darkness(monkeypatch: pytest.MonkeyPatch) -> Callable[..., stp.models.FittedModel]:
    """What the page adds, as if its files lay in the package."""
    model, line, fit = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    registry = dict(_registry.MODELS)
    exec(line, {"MODELS": registry})
    (kind,) = registry.keys() - _registry.MODELS.keys()
    monkeypatch.setitem(_registry.MODELS, kind, registry[kind])  # in place: modules hold this very object
    for name, code in (("stpredict.models._darkness", model), ("stpredict.tl.fitting._fit_darkness", fit)):
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(code, name, "exec"), module.__dict__)
    return sys.modules["stpredict.tl.fitting._fit_darkness"].fit_darkness  # type: ignore[no-any-return]


def test_all_that_models_can_do(
    fit_darkness: Callable[..., stp.models.FittedModel], make_sdata: Callable[..., SpatialData], tmp_path: Path
) -> None:
    sdata, other = make_sdata(2), make_sdata(seed=1)
    sdata["table"].obs["train"] = (sdata["table"].obs["section"] == "A").to_numpy()

    model = fit_darkness(sdata, train_key="train")
    table = sdata["table"]
    assert table.obs["darkness_train"].sum() == 30
    assert np.isfinite(table.layers["darkness"]).all()

    loaded = stp.models.load(model.save(tmp_path / "model"))
    stp.tl.predict(other, loaded)
    assert np.isfinite(other["table"].layers["darkness"]).all()
    assert not other["table"].obs["darkness_train"].any()

    scores = stp.tl.score(sdata, key="darkness", n_perms=0, n_bootstrap=0)
    assert list(scores["section"].cat.categories) == ["B_spots", "mean of sections", "pooled"]
    of_genes = scores[(scores["of"] == "gene") & (scores["section"] == "mean of sections")].set_index("name")["pcc"]
    assert of_genes["gene0"] > 0.5  # it follows a stain

    frame = stp.tl.cross_validate(sdata, {"darkness": fit_darkness}, baselines=["ridge on mean OD"], n_perms=0)
    assert set(frame["model"]) == {"ridge on mean OD", "darkness"}
    np.testing.assert_allclose(
        sdata["table"].layers["darkness_cv"][~table.obs["train"]],
        table.layers["darkness"][~table.obs["train"]],
        atol=1e-4,
    )
