from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from stpredict.models import _device
from stpredict.models._device import resolve_device, resolve_precision, working_bytes


@pytest.mark.parametrize(
    "device", [None, 0, True, ["cpu"], "", "CPU", "cpu:1", "cuda:x", "cuda:-1", "gpu", "meta"], ids=str
)
def test_what_is_no_device(device: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"`device` is {device!r}; expected 'auto', 'cpu', 'cuda' or")):
        resolve_device(device)


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
    assert resolve_device(torch.device("cuda:0")) == "cuda:0"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`device` is 'cuda:2', but there are 2 GPUs, numbered from 0"):
        resolve_device("cuda:2")


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "supports_bf16", lambda device: device == "cuda")
    assert [resolve_precision("auto", device) for device in ("cuda", "cpu")] == ["bf16", "32"]
    assert [resolve_precision(precision, "cpu") for precision in ("bf16", "32")] == ["bf16", "32"]
    with pytest.raises(ValueError, match="`precision` is '16'; expected 'auto', 'bf16' or '32'"):
        resolve_precision("16", "cpu")


def test_temporaries_take_what_a_gpu_has_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8e9, 80e9))
    assert [working_bytes(device) for device in ("cpu", "cuda:1")] == [2**29, 2e9]
