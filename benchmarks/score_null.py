"""How often chance alone makes a gene "significant", for three kinds of random maps; prints a table and writes JSON.

    OMP_NUM_THREADS=1 python benchmarks/score_null.py

Pairs of smooth Gaussian maps that have nothing to do with each other are drawn on the spots of section C2 of the HER2+ set
(downloaded when it is not in the cache), of C2 to C5, and of a hexagonal grid of ragged outline. An honest test calls 5 % of
them significant at 0.05. The measured map has as much white noise as signal. What is compared:

- shuffled: the predicted values change places at random;
- moved: the predicted map is turned, mirrored and shifted in the bounding box of the section, whose opposite edges are joined,
  and each spot takes the value of the nearest spot;
- modes: what `stp.tl.score` does.

Power is the share of significant genes when the predicted map explains a tenth of the variance of the measured one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

import stpredict as stp
from stpredict._data.spots import spots_of_shapes
from stpredict.tl.evaluation.numbers._null import permutation_p_values
from stpredict.tl.evaluation.numbers._parts import Part

N_GENES, N_DRAWS, LEVEL = 1000, 199, 0.05
LENGTHS = (0, 1, 2, 4, 8)  # of correlation, in spots
EXPLAINED = 0.1


def places() -> dict[str, list[np.ndarray]]:
    """Sections as centres of spots, a pitch apart."""
    sdata = stp.datasets.her2st(["C2", "C3", "C4", "C5"])
    real = [spots.xy / pitch(spots.xy) for spots in spots_of_shapes(sdata, list(sdata.shapes), sdata["table"])]
    grid = np.indices((60, 60)).reshape(2, -1).T.astype(float)
    centered = np.column_stack([grid[:, 1] + 0.5 * (grid[:, 0] % 2), grid[:, 0] * np.sqrt(3) / 2]) - [30, 26]
    angle = np.arctan2(*centered.T)
    ragged = np.hypot(*centered.T) / (1 + 0.25 * np.sin(2 * angle) + 0.15 * np.cos(3 * angle + 1))
    return {"C2": real[:1], "C2 to C5": real, "hexagonal, 800 spots": [centered[np.argsort(ragged)[:800]]]}


def pitch(xy: np.ndarray) -> float:
    """Median distance to the nearest spot."""
    return float(np.median(np.asarray(cKDTree(xy).query(xy, k=2)[0])[:, 1]))


def smooth_maps(xy: np.ndarray, length: float, rng: np.random.Generator) -> np.ndarray:
    """``(n, N_GENES)`` Gaussian maps of variance 1."""
    white = rng.normal(size=(len(xy), N_GENES))
    if length == 0:
        return white
    distances = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    covariance = np.exp(-(distances**2) / (2 * length**2)) + 1e-6 * np.eye(len(xy))
    return np.linalg.cholesky(covariance) @ white


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of columns."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return (x * y).sum(axis=0) / np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))


def shuffled(xy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which spot each spot takes its prediction from."""
    return rng.permutation(len(xy))


def moved(xy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which spot each spot takes its prediction from."""
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * [rng.choice([-1, 1]), 1]
    low, high = xy.min(axis=0), xy.max(axis=0)
    span, center = high - low + 1, (low + high) / 2
    places = ((xy - center) @ turn.T + rng.uniform(0, span)) % span + low - 0.5
    return np.asarray(cKDTree(xy).query(places)[1])


def by_rearranging(
    rearrange: Callable[[np.ndarray, np.random.Generator], np.ndarray],
    sections: list[np.ndarray],
    x: list[np.ndarray],
    y: list[np.ndarray],
    rng: np.random.Generator,
) -> np.ndarray:
    """P-values of the mean over sections."""
    observed = np.mean([correlation(*pair) for pair in zip(x, y, strict=True)], axis=0)
    reached = np.zeros(N_GENES)
    for _ in range(N_DRAWS):
        null = [correlation(a, b[rearrange(xy, rng)]) for xy, a, b in zip(sections, x, y, strict=True)]
        reached += np.mean(null, axis=0) >= observed
    return (1 + reached) / (1 + N_DRAWS)


def by_modes(
    sections: list[np.ndarray], x: list[np.ndarray], y: list[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """P-values of `stp.tl.score`."""
    ends = np.cumsum([0, *(len(xy) for xy in sections)])
    parts = [Part("", "", np.arange(a, b), xy) for a, b, xy in zip(ends[:-1], ends[1:], sections, strict=True)]
    predictions = {"": np.concatenate(y)}
    return permutation_p_values(np.concatenate(x), predictions, np.arange(N_GENES), parts, n_perms=N_DRAWS, rng=rng)[""]


def main() -> None:
    """Compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/score_null.json"))
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    results = []
    for place, sections in places().items():
        for length in LENGTHS:
            y = [smooth_maps(xy, length, rng) for xy in sections]
            unrelated = [smooth_maps(xy, length, rng) + rng.normal(size=(len(xy), N_GENES)) for xy in sections]
            weight = np.sqrt(2 * EXPLAINED / (1 - EXPLAINED))
            related = [a + weight * b for a, b in zip(unrelated, y, strict=True)]
            row: dict[str, object] = {"spots of": place, "length": length}
            for kind, x in (("unrelated", unrelated), ("power", related)):
                found = {
                    "shuffled": by_rearranging(shuffled, sections, x, y, rng),
                    "moved": by_rearranging(moved, sections, x, y, rng),
                    "modes": by_modes(sections, x, y, rng),
                }
                row[kind] = {name: round(float(np.mean(p <= LEVEL)), 4) for name, p in found.items()}
            results.append(row)
            print(row, flush=True)
    args.json.write_text(json.dumps({"level": LEVEL, "draws": N_DRAWS, "genes": N_GENES, "results": results}, indent=1))


if __name__ == "__main__":
    main()
