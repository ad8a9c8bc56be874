"""Where models compute."""

from __future__ import annotations

import re

import torch


def resolve_device(device: str) -> str:
    """Turn ``"auto"`` into a GPU if there is one, and refuse a GPU that is not there."""
    if isinstance(device, torch.device):
        device = str(device)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise ValueError(f"`device` is {device!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:<number>'.")
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"`device` is {device!r}, but PyTorch finds no GPU here; use device='auto' or 'cpu'.")
    if (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(f"`device` is {device!r}, but there are {torch.cuda.device_count()} GPUs, numbered from 0.")
    return device


def resolve_precision(precision: str, device: str) -> str:
    """Turn ``"auto"`` into ``"bf16"`` where that is faster, else ``"32"``."""
    if not isinstance(precision, str) or precision not in ("auto", "bf16", "32"):
        raise ValueError(f"`precision` is {precision!r}; expected 'auto', 'bf16' or '32'.")
    if precision == "auto":
        return "bf16" if supports_bf16(device) else "32"
    return precision


def supports_bf16(device: str) -> bool:
    """Whether matrix products in bfloat16 are faster there than in float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def working_bytes(device: str) -> float:
    """Bytes that temporaries may take: on a CPU half a gigabyte, on a GPU a quarter of what is free.

    A GPU is idle between small pieces of work, and its memory serves nobody else.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 4
    return 2**29
