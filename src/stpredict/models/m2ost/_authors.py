"""Weights of the authors' M2OST module, in the names and shapes of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

# What tells the sizes, and the number of its dimensions.
_TELLING = {
    "cls_token": 3,
    "pos_embedding1": 3,
    "to_patch_embedding1.1.weight": 1,
    "mlp_head.weight": 2,
    "transformer.layers.0.0.to_qkv1.weight": 2,
    "transformer.layers.0.1.split_mlp.1.weight": 2,
    "transformer.layers.0.2.to_q0.weight": 2,
    "transformer.layers.0.3.net.1.weight": 2,
}


def clean(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Drop the prefix of ``DataParallel``; raise a ValueError for anything but tensors."""
    if other := [f"{name} is no tensor" for name, value in state_dict.items() if not isinstance(value, Tensor)]:
        _refuse(other)
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


def config(state: Mapping[str, Tensor], head_width: int) -> dict[str, Any]:
    """Arguments of our network, read off the shapes of the authors' tensors."""
    wrong = [
        f"{name} is missing" if name not in state else f"{name} has {state[name].ndim} dimensions instead of {ndim}"
        for name, ndim in _TELLING.items()
        if name not in state or state[name].ndim != ndim
    ]
    if wrong:
        _refuse(wrong)
    token, positions, pixels, head, qkv, mlp, query, gate = (state[name].shape for name in _TELLING)
    if qkv[0] % (3 * head_width) or query[0] % head_width:
        raise ValueError(
            f"Attention of {qkv[0] // 3} and {query[0]} channels cannot be split into heads of head_width={head_width} "
            "channels. Pass the dim_head with which the authors' module was made."
        )
    patch_size = math.isqrt(pixels[0] // 3)
    return {
        "n_genes": head[0],
        "levels": 3,
        "image_size": patch_size * math.isqrt(positions[1] - 1),
        "patch_size": patch_size,
        "width": token[2],
        "depth": len({name.split(".")[2] for name in state if name.startswith("transformer.layers.")}),
        "heads": qkv[0] // (3 * head_width),
        "cross_heads": query[0] // head_width,
        "head_width": head_width,
        "mlp_width": mlp[0],
        "gate_width": gate[0],
    }


def translate(state: Mapping[str, Tensor], ours: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The authors' tensors in the names and shapes of ``ours``; raise a ValueError unless all fit, none left over."""
    names = _names(depth)
    shapes = {
        name: (ours[key].shape[0] // len(parts), *ours[key].shape[1:]) for key, parts in names.items() for name in parts
    }
    # Their intra-level attention holds a normalisation that it never calls.
    found = {name for name in state if ".0.norm." not in name}
    wrong = [f"{name} is missing" for name in shapes.keys() - found]
    wrong += [f"{name} is unknown" for name in found - shapes.keys()]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)} instead of {shapes[name]}"
        for name in found & shapes.keys()
        if state[name].shape != shapes[name]
    ]
    if wrong := wrong or [
        f"{name} has values that are not finite" for name in shapes if not state[name].isfinite().all()
    ]:
        _refuse(wrong)
    return {key: torch.cat([state[name] for name in parts]) for key, parts in names.items()}


def _names(depth: int) -> dict[str, tuple[str, ...]]:
    """For each tensor of ours those of the authors that, one below the other, make it up."""
    levels = range(3)
    layers = [("norm", "transformer.norm"), ("head", "mlp_head")]
    layers += [
        (f"embedders.{k}.{ours}", f"to_patch_embedding{k + 1}.{theirs}")
        for k in levels
        for ours, theirs in ((0, 1), (1, 2), (3, 4), (4, 5))
    ]
    names: dict[str, tuple[str, ...]] = {"class_token": ("cls_token",)}
    names |= {f"positions.{level}": (f"pos_embedding{level + 1}",) for level in levels}
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"transformer.layers.{i}"
        layers += [(f"{ours}.attention.{level}.out", f"{theirs}.0.to_out{level + 1}.0") for level in levels]
        layers += [(f"{ours}.mlp.{j}", f"{theirs}.1.split_mlp.{j}") for j in (0, 1, 4)]
        layers += [(f"{ours}.cross.norm", f"{theirs}.2.norm")]
        layers += [(f"{ours}.cross.out.{level}", f"{theirs}.2.to_out{level}.0") for level in levels]
        layers += [(f"{ours}.gate.net.{j}", f"{theirs}.3.net.{j}") for j in (0, 1, 4)]
        for level in levels:
            names[f"{ours}.attention.{level}.qkv.weight"] = (f"{theirs}.0.to_qkv{level + 1}.weight",)
            names[f"{ours}.cross.qkv.{level}.weight"] = tuple(f"{theirs}.2.to_{part}{level}.weight" for part in "qkv")
    return names | {f"{ours}.{end}": (f"{theirs}.{end}",) for ours, theirs in layers for end in ("weight", "bias")}


def _refuse(reasons: list[str]) -> NoReturn:
    reasons = sorted(reasons)
    shown = "; ".join(reasons[:5]) + (f"; and {len(reasons) - 5} more" if len(reasons) > 5 else "")
    raise ValueError(
        f"These are not weights of the authors' M2OST, or they are damaged: {shown}. Expected is the state_dict of the "
        "module in model/M2OST.py of https://github.com/Dootmaan/M2OST; stpredict.models.load reads the models that "
        "stpredict saves."
    )
