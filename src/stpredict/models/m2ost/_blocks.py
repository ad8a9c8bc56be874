"""The parts of M2OST: token operations chosen for speed, and the modules that a block is made of.

The levels of a spot go through as a list of tensors (batch, tokens, width), finest level first; the first token of
each is its class token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from stpredict.models.m2ost import _cpu

# Whether the CPU has AMX; older torch cannot tell.
AMX = bool(getattr(torch.cpu, "get_capabilities", dict[str, bool])().get("amx_bf16", False))

# Fused attention that may be used on a GPU. That of cuDNN is left out: it is no faster here, and on an H100 (torch 2.11, CUDA
# 13) gradients in bfloat16 that went through it were wrong.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class TokenLinear(nn.Linear):
    """Linear map of every token, (batch, tokens, in) to (batch, tokens, out), with the parameters of ``nn.Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return _cpu.linear(x, self.weight, self.bias) if _cpu.usable(x) else super().forward(x)


def split_heads(x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, each (batch, heads, tokens, channels), of (batch, tokens, 3 · heads · channels)."""
    x = x.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    # Products one by one would copy them, in CTMM several times; fused kernels read them as they are.
    return (x.contiguous() if _by_hand(x) else x).unbind(0)


def _by_hand(x: Tensor) -> bool:
    """Whether attention is faster as products and softmax one by one than fused.

    oneDNN's products are fast in bfloat16 on any CPU that has it. torch's fused kernel is with AMX only, and its backward
    pass never.
    """
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not (AMX and not torch.is_grad_enabled())


def attend(q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0, summary: bool = False) -> Tensor:
    """Attention of queries (batch, heads, n, c) to keys and values (batch, heads, m, c): (batch, n, heads, c).

    With ``summary`` the result has two tokens instead of n: what the first query sees, and the mean over all queries.
    """
    if _by_hand(q):
        # Autocast is off because it would take the weights, which are kept for the gradients, to float32.
        with torch.autocast("cpu", enabled=False):
            weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1)
            weights = F.dropout(weights, dropout, training=dropout > 0)
            if summary:
                # Products are associative: sum the weights first, and two rows of them times v are enough.
                n = weights.shape[2]
                rows = weights.new_ones(2, n)
                rows[0, 1:] = 0
                first, total = ((rows @ weights) @ v).unbind(2)
                return torch.stack([first, total / n], dim=1)
            return (weights @ v).transpose(1, 2)
    if _cpu.usable(q) and not torch.is_grad_enabled() and not dropout:
        out = _cpu.attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)
    return summarize(out) if summary else out


def summarize(x: Tensor) -> Tensor:
    """The first token of (batch, tokens, ...), and the mean of all."""
    return torch.stack([x[:, 0], x.mean(1)], dim=1)


class PatchEmbedding(nn.Sequential):
    """Pixels of a patch to a token: normalise, perceptron with one hidden layer, normalise."""

    def __init__(self, patch_size: int, hidden: int, width: int) -> None:
        pixels = 3 * patch_size**2
        super().__init__(
            nn.LayerNorm(pixels),
            TokenLinear(pixels, hidden),
            nn.GELU(),
            TokenLinear(hidden, width),
            nn.LayerNorm(width),
        )
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, levels, side, side, 3) to tokens (batch, levels, patches, width), row by row of patches."""
        b, levels, side = images.shape[:3]
        grid = (side // self.patch_size, self.patch_size)
        patches = images.unflatten(3, grid).unflatten(2, grid).transpose(3, 4)
        tokens = super().forward(patches.reshape(b * levels, grid[0] ** 2, 3 * self.patch_size**2))
        return tokens.unflatten(0, (b, levels))


class SelfAttention(nn.Module):
    """Intra-level token mixing (ITMM) of one level: its tokens look at each other."""

    def __init__(self, width: int, heads: int, head_width: int, *, dropout: float, mask_ratio: float) -> None:
        super().__init__()
        self.heads, self.dropout, self.mask_ratio = heads, dropout, mask_ratio
        self.qkv = TokenLinear(width, 3 * heads * head_width, bias=False)
        self.out = TokenLinear(heads * head_width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.heads)
        if self.training and self.mask_ratio:
            k, v = self._visible(k, v)
        mixed = attend(q, k, v, dropout=self.dropout * self.training)
        return x + F.dropout(self.out(mixed.flatten(2)), self.dropout, self.training)

    def _visible(self, *tensors: Tensor) -> list[Tensor]:
        """The class token and, spot by spot, a new random choice of the others."""
        b, _, n, _ = tensors[0].shape
        kept = n - 1 - round(self.mask_ratio * (n - 1))
        # A choice instead of a mask: fewer keys cost less, and the fused kernels stay usable.
        chosen = torch.rand(b, n - 1, device=tensors[0].device).topk(kept, dim=1).indices + 1
        index = F.pad(chosen, (1, 0))[:, None, :, None]
        return [t.take_along_dim(index, dim=2) for t in tensors]


class CrossAttention(nn.Module):
    """Cross-level token mixing (CTMM): each level's tokens look at those of each other level, one level at a time."""

    def __init__(self, levels: int, width: int, heads: int, head_width: int, *, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        inner = heads * head_width
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.ModuleList(TokenLinear(width, 3 * inner, bias=False) for _ in range(levels))
        self.out = nn.ModuleList(TokenLinear((levels - 1) * inner, width) for _ in range(levels))

    def forward(self, x: list[Tensor], *, summary: bool = False) -> list[Tensor]:
        """Tokens of all levels, mixed; with ``summary`` only the class token and the mean of all, of each level."""
        levels = range(len(x))
        dropout = self.dropout * self.training
        qkv = [split_heads(project(self.norm(t)), self.heads) for project, t in zip(self.qkv, x, strict=True)]
        seen = [
            torch.cat(
                [attend(qkv[i][0], *qkv[j][1:], dropout=dropout, summary=summary) for j in levels if j != i], dim=2
            ).flatten(2)
            for i in levels
        ]
        return [F.dropout(out(t), self.dropout, self.training) for out, t in zip(self.out, seen, strict=True)]


class ChannelGate(nn.Module):
    """Cross-level channel mixing (CCMM): the mean tokens of all levels decide how much each channel is raised."""

    def __init__(self, levels: int, width: int, hidden: int, *, dropout: float) -> None:
        super().__init__()
        channels = levels * width
        self.net = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: list[Tensor], means: list[Tensor]) -> list[Tensor]:
        """Raise tokens ``x`` of each level, given the mean (batch, 1, width) of all tokens of each level."""
        gates = self.net(torch.cat(means, dim=2)).chunk(len(x), dim=2)
        return [t * (1 + gate) for t, gate in zip(x, gates, strict=True)]


class Block(nn.Module):
    """ITMM and a perceptron, CTMM, CCMM; the parameters are those of :class:`stpredict.models.M2OSTModule`."""

    def __init__(
        self,
        *,
        levels: int,
        width: int,
        heads: int,
        cross_heads: int,
        head_width: int,
        mlp_width: int,
        gate_width: int,
        dropout: float,
        mask_ratio: float,
    ) -> None:
        super().__init__()
        self.attention = nn.ModuleList(
            SelfAttention(width, heads, head_width, dropout=dropout, mask_ratio=mask_ratio) for _ in range(levels)
        )
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            TokenLinear(width, mlp_width),
            nn.GELU(),
            nn.Dropout(dropout),
            TokenLinear(mlp_width, width),
            nn.GELU(),
        )
        # A single level has no other to look at.
        self.cross = CrossAttention(levels, width, cross_heads, head_width, dropout=dropout) if levels > 1 else None
        self.gate = ChannelGate(levels, width, gate_width, dropout=dropout)

    def forward(self, x: list[Tensor], *, class_only: bool = False) -> list[Tensor]:
        """Tokens of all levels to the same shapes, or, with ``class_only``, to the class tokens (batch, 1, width)."""
        x = [attention(t) for attention, t in zip(self.attention, x, strict=True)]
        x = [t + self.mlp(t) for t in x]
        # Of the last block's tokens only the first is read, and the gates need the mean: as a projection of a mean is
        # the mean of the projections, two tokens a level go on from here and the result is the same.
        if self.cross is not None:
            x = self.cross(x, summary=class_only)
        elif class_only:
            x = [summarize(t) for t in x]
        if class_only:
            return self.gate([t[:, :1] for t in x], [t[:, 1:] for t in x])
        return self.gate(x, [t.mean(1, keepdim=True) for t in x])
