"""Matrix products and attention in float32 on a CPU with AVX-512, by way of oneDNN.

torch gives float32 products to MKL and convolutions to oneDNN. On AMD processors MKL keeps to half of the vector width,
and oneDNN takes about half of its time for the same product, written as a 1x1 convolution of channels-last pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

AVAILABLE = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")

# Attention weights computed at a time: 4 MB, which stay in the processor's cache.
WEIGHTS = 2**20


def usable(x: Tensor) -> bool:
    """Whether this module's functions are for this tensor."""
    return AVAILABLE and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear map (out, in) of tokens (batch, tokens, in)."""
    return _convolve(x.contiguous(), weight, bias)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries (batch, heads, n, c) to keys and values (batch, heads, m, c): (batch, n, heads, c).

    For inference: with gradients to come torch's fused attention is as fast and keeps less.
    """
    spots, heads, n, c = q.shape
    step = max(1, WEIGHTS // (heads * n * k.shape[2]))
    # oneDNN adds the terms of a sum one after the other. Weights have the sum 1, so the mean value may stay outside, and
    # what is left is small and loses no digits.
    mean = v.mean(2, keepdim=True)
    v = v - mean
    out = q.new_empty(spots, n, heads, c)
    for some in (slice(i, i + step) for i in range(0, spots, step)):
        queries = (q[some] * c**-0.5).permute(2, 0, 1, 3).flatten(1, 2)
        weights = torch.softmax(_products(queries, k[some].flatten(0, 1)), dim=2)
        seen = _products(weights, v[some].mT.flatten(0, 1))
        out[some] = seen.unflatten(1, (-1, heads)).transpose(0, 1)
    return out + mean.transpose(1, 2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    # The dilation, nothing to a 1x1 kernel, makes torch choose oneDNN for a small batch on one thread, too.
    pixels = x.unsqueeze(2).permute(0, 3, 1, 2)
    return F.conv2d(pixels, weight[..., None, None], bias, dilation=2, groups=groups).permute(0, 2, 3, 1).squeeze(2)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Products of rows, group by group: (n, groups, c) and (groups, m, c) to (n, groups, m)."""
    n, groups, _ = a.shape
    return _convolve(a.reshape(1, n, -1), b.reshape(-1, b.shape[2]), groups=groups).reshape(n, groups, -1)
