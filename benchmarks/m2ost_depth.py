"""How alike the tokens of a level become from block to block in an M2OST network that was not trained yet.

    python benchmarks/m2ost_depth.py

Reads the patches of two spots of HER2+ section C2, with every preset: how far tokens lie from the mean of their level
relative to their length, and how far the class tokens of the two spots lie from each other relative to theirs; means over
levels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import stpredict as stp
from stpredict.models.m2ost._module import PRESETS

SPOTS = [20, 90]


def spread(levels: list[Tensor]) -> float:
    """Distance of tokens from the mean of their level, relative to their length."""
    far = [x.var(dim=1).sum(dim=-1).sqrt() / x.square().sum(dim=-1).mean(dim=1).sqrt() for x in levels]
    return float(torch.stack(far).mean())


def difference(levels: list[Tensor]) -> float:
    """Distance between the class tokens of two spots, relative to their length."""
    return float(np.mean([(x[0, 0] - x[1, 0]).norm() / x[:, 0].norm(dim=1).mean() for x in levels]))


def main() -> None:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()

    sdata = stp.datasets.her2st(["C2"])
    found: dict[str, dict[str, list[float]]] = {}
    for preset in PRESETS:
        torch.manual_seed(0)
        network = stp.models.M2OSTModule.from_preset(preset, 250).eval()
        entering: list[list[Tensor]] = []

        def remember(block: nn.Module, inputs: tuple[list[Tensor]], seen: list[list[Tensor]] = entering) -> None:
            seen.append([x.clone() for x in inputs[0]])

        for block in network.blocks:
            block.register_forward_pre_hook(remember)
        with stp.pp.patches(sdata, image_size=network.config["image_size"]) as patches, torch.no_grad():
            network(torch.from_numpy(patches[SPOTS]))
        found[preset] = {
            "spread": [spread(levels) for levels in entering],
            "between_spots": [difference(levels) for levels in entering],
        }
        for name, values in found[preset].items():
            print(f"{preset:6} {name:14}" + " ".join(f"{value:10.2g}" for value in values))
    args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
