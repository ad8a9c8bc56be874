from __future__ import annotations

import pytest
import torch

from stpredict.models import _device
from stpredict.models._device import resolve_device, resolve_precision


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "`device` is 'tpu'; expected 'auto', 'cpu', 'cuda' or 'cuda:<number>'"),
        ("mps", "`device` is 'mps'; expected 'auto'"),
        ("cuda", "`device` is 'cuda', but PyTorch finds no GPU here; use device='auto' or 'cpu'"),
    ],
)
def test_unknown_devices(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        resolve_device(device)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve_device(device) for device in ("auto", "cpu", "cuda:1")] == ["cuda", "cpu", "cuda:1"]
    with pytest.raises(ValueError, match="`device` is 'cuda:2', but there are 2 GPUs, numbered from 0"):
        resolve_device("cuda:2")


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "supports_bf16", lambda device: device == "cuda")
    assert [resolve_precision("auto", device) for device in ("cuda", "cpu")] == ["bf16", "32"]
    assert [resolve_precision(precision, "cpu") for precision in ("bf16", "32")] == ["bf16", "32"]
    with pytest.raises(ValueError, match="`precision` is '16'; expected 'auto', 'bf16' or '32'"):
        resolve_precision("16", "cpu")
