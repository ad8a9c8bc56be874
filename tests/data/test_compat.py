from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData

from stpredict._data.compat import layer_names


@pytest.mark.parametrize("with_x", [True, False])
def test_x_is_no_layer(with_x: bool) -> None:
    table = AnnData(np.ones((3, 2), dtype=np.float32)) if with_x else AnnData(shape=(3, 2))
    assert layer_names(table) == []

    table.layers["counts"] = np.ones((3, 2))
    table.layers["Log"] = np.ones((3, 2))

    assert layer_names(table) == ["counts", "Log"]
    assert layer_names(table[:2]) == ["counts", "Log"]
    assert layer_names(table.copy()) == ["counts", "Log"]
