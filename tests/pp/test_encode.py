from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from spatialdata import SpatialData
from spatialdata.transformations import Translation, set_transformation

import stpredict as stp
from stpredict._data.elements import Elements
from stpredict._data.slide import open_slide
from stpredict.pp import _encode
from stpredict.pp._encode import encode
from stpredict.pp._patches import PatchReads

MakeSData = Callable[..., SpatialData]
SMALL: dict[str, Any] = {"size": (150, 190), "n_spots": 12, "n_genes": 3}


class Means(torch.nn.Module):
    """Mean of each channel, times a weight; says how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.calls: list[tuple[tuple[int, ...], bool, bool]] = []

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        self.calls.append((tuple(patches.shape), self.training, torch.is_inference_mode_enabled()))
        return self.weight * patches.mean(dim=(2, 3))


def run(sdata: SpatialData, encoder: Any) -> np.ndarray:
    return encode(open_slide(sdata, Elements(), images=True), PatchReads(1, 16, 1.0), encoder, device="cpu")


def test_features_of_patches(make_sdata: MakeSData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_encode, "_BATCH", 8)
    sdata = make_sdata(2, n_without_row=2, **SMALL)
    encoder = Means()
    features = run(sdata, encoder)
    with stp.pp.patches(sdata, levels=1, image_size=16, spot_scale=1.0) as patches:
        expected = 2 * patches[:][:, 0].mean(axis=(2, 3)) / 255
        np.testing.assert_array_equal(patches.rows, np.arange(20))
    np.testing.assert_allclose(features, expected, rtol=1e-5)
    assert features.dtype == np.float32
    assert encoder.calls == [
        ((8, 3, 16, 16), False, True),
        ((8, 3, 16, 16), False, True),
        ((4, 3, 16, 16), False, True),
    ]
    assert encoder.training


def test_spots_off_the_image_are_nan(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    set_transformation(sdata["A_spots"], Translation([110, 0], axes=("x", "y")), "A")
    features = run(sdata, lambda patches: patches.flatten(1))
    off = np.isnan(features).all(axis=1)
    assert features.shape == (12, 3 * 16 * 16)
    assert 0 < off.sum() < 12
    assert np.isfinite(features[~off]).all()
    assert features[~off].max() <= 1


def test_torchscript(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    script = torch.jit.script(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
    np.testing.assert_allclose(run(sdata, script), run(sdata, Means()) / 2, rtol=1e-5)


def test_what_is_no_encoder(make_sdata: MakeSData) -> None:
    sdata = make_sdata(**SMALL)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (lambda patches: patches.numpy(), TypeError, "The encoder returned ndarray; expected a tensor"),
        (lambda patches: (patches,), TypeError, "The encoder returned tuple; expected a tensor"),
        (lambda patches: patches, ValueError, r"shape \(12, 3, 16, 16\) for 12 patches; expected \(12, d\).*pools"),
        (lambda patches: patches.flatten(), ValueError, r"shape \(9216,\) for 12 patches"),
        (lambda patches: patches[0, 0], ValueError, r"shape \(16, 16\) for 12 patches"),
    ]
    for encoder, error, message in wrong:
        with pytest.raises(error, match=message):
            run(sdata, encoder)


def test_the_mode_of_a_module_is_restored_after_a_failure(make_sdata: MakeSData) -> None:
    encoder = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        run(make_sdata(**SMALL), encoder)
    assert encoder.training
