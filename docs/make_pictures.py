"""Draw the pictures of README and documentation from real sections, into docs/_static.

    python docs/make_pictures.py

Downloads the HER2+ sections C2 to C5 (18 MB) when they are not in the cache. The curves come from
benchmarks/nsl_field.json, which benchmarks/nsl_field.py writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Circle, Rectangle

import stpredict as stp
from stpredict._data.spots import spots_of_shapes
from stpredict.pp._patches import DEFAULT_SPOT_SCALE
from stpredict.tl.evaluation.numbers._null import spatial_modes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from spatialdata import SpatialData

    from stpredict.models import NSL

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "docs" / "_static"
HELD_OUT, N_GENES = "C5", 250
GENE = "BGN"  # biglycan, of the collagen-rich stroma: a gene that colour predicts well
SPOT = "C5_10x13"
FIELDS = (1.0, 2.0, 4.0)
LEVEL_COLOURS = ("#f2f2f2", "#f5c518", "#00b8d4")  # tokens of 16, 8 and 4 pixels


def main() -> None:
    """Draw all pictures."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    sdata = stp.datasets.her2st(["C2", "C3", "C4", HELD_OUT])
    table = sdata["table"]
    train = (table.obs["section"] != HELD_OUT).to_numpy()
    table.obs["train"] = train
    genes = table.var_names[np.argsort(-np.asarray(table.X[train].mean(axis=0)).ravel())[:N_GENES]]
    model = stp.tl.fit_nsl(sdata, genes=genes, train_key="train")

    stp.pl.expression(sdata, GENE, section_key="section", sections=[HELD_OUT])
    save("expression", dpi=110)
    draw_model(sdata, model, "EPCAM")
    save("nsl", dpi=110)
    draw_random_maps(sdata)
    save("random_maps", dpi=100)
    draw_field(sdata)
    save("field", dpi=120)
    draw_levels(sdata)
    save("m2ost", dpi=90)


def save(name: str, *, dpi: int) -> None:
    """Write the current figure, small enough for a page."""
    path = STATIC / f"{name}.png"
    plt.gcf().savefig(path, dpi=dpi, bbox_inches="tight", facecolor="white", pil_kwargs={"optimize": True})
    plt.close("all")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


def patch(sdata: SpatialData, spot: str, fields: float) -> tuple[np.ndarray, float]:
    """Pixels ``(y, x, 3)`` around a spot, as wide as ``fields`` spot diameters, and the spot's radius in pixels."""
    section = spot.split("_")[0]
    circle = sdata[f"{section}_spots"].loc[spot]
    half = round(fields * circle.radius)
    x, y = round(circle.geometry.x), round(circle.geometry.y)
    pixels = sdata[f"{section}_image"]["scale0"]["image"][:, y - half : y + half, x - half : x + half]
    return np.moveaxis(pixels.to_numpy(), 0, -1), circle.radius


def draw_model(sdata: SpatialData, model: NSL, gene: str) -> None:
    """A spot, its colours, what a gene takes for hematoxylin and eosin in them, and the sum."""
    row = sdata["table"].obs_names.get_loc(SPOT)
    histogram = stp.pp.color_histogram(sdata, inplace=False)
    share = histogram.counts[row].toarray().ravel() / histogram.n_pixels[row]
    pixels, radius = patch(sdata, SPOT, 2.2)
    od = -np.log((pixels + 1.0) / 256)
    g = model.genes.index(gene)
    concentrations = model.concentrations(od, gene)
    means = share @ model.concentrations(histogram.od, gene)

    figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
    show(axes[0], pixels, "pixels of a spot's field")
    axes[0].add_patch(Circle(2 * [len(pixels) / 2], 2 * radius, fill=False, color="white", linewidth=1.5))
    draw_palette(axes[1], histogram.codebook + 4, share)
    for s, (name, ax) in enumerate(zip(("hematoxylin", "eosin"), axes[2:], strict=True)):
        absorbed = concentrations[..., s, None] * model.stain_matrix[g, s]
        show(ax, np.exp(-absorbed).clip(0, 1), f"{name} for {gene}")
        ax.add_patch(Circle(2 * [len(pixels) / 2], 2 * radius, fill=False, color="0.4", linewidth=1.5))
        label = rf"mean $\bar c_{name[0].upper()}$ = {means[s]:.2f}"
        ax.text(0.5, -0.04, label, transform=ax.transAxes, ha="center", va="top")
    terms = [f"{'−' if w < 0 else '+'} {abs(w):.2f} · {c:.2f}" for w, c in zip(model.weights[g], means, strict=True)]
    predicted = model.intercept[g] + means @ model.weights[g]
    formula = f"{gene} = {model.intercept[g]:.2f} {terms[0]} {terms[1]} = {predicted:.2f}"
    figure.supxlabel("\n" + formula.replace("-", "−"), fontsize=11)


def show(ax: Axes, pixels: np.ndarray, title: str) -> None:
    """An image without axes."""
    ax.imshow(pixels)
    ax.set_title(title, fontsize=10)
    ax.axis("off")


def draw_random_maps(sdata: SpatialData) -> None:
    """A predicted map, shuffled, and as spectral randomisation rearranges it."""
    table = sdata["table"]
    (section,) = spots_of_shapes(sdata, [f"{HELD_OUT}_spots"], table)
    predicted = table[section.rows, GENE].layers["nsl"].ravel()
    modes = spatial_modes(section.xy)
    rng = np.random.default_rng(3)
    signs = rng.choice([-1, 1], size=(2, len(predicted)))
    signs[:, 0] = 1  # the mean
    random = [modes @ (of_modes * (modes.T @ predicted)) for of_modes in signs]
    maps = {f"{GENE}, predicted": predicted, "its spots shuffled": rng.permutation(predicted)} | {
        f"{which} random map, as smooth": values for which, values in zip(("one", "another"), random, strict=True)
    }
    _, axes = plt.subplots(1, 4, figsize=(10.5, 2.9), layout="constrained")
    low, high = np.percentile(predicted, [2, 98])
    for (title, values), ax in zip(maps.items(), axes, strict=True):
        ax.scatter(*section.xy.T, c=values, s=44, vmin=low, vmax=high, linewidths=0)
        ax.set_title(title, fontsize=10)
        ax.set_aspect("equal")
        ax.invert_yaxis()
        ax.axis("off")


def draw_palette(ax: Axes, colors: np.ndarray, share: np.ndarray) -> None:
    """Colours as a square of cells, each as frequent as the colour, from bright to dark."""
    side = 48
    order = np.argsort(-colors @ [0.3, 0.6, 0.1], kind="stable")
    bins = order[np.searchsorted(np.cumsum(share[order]), (np.arange(side**2) + 0.5) / side**2)]
    show(ax, colors[bins].reshape(side, side, 3), "their colours, counted")
    n = int((share > 0).sum())
    ax.text(0.5, -0.04, f"{n:,} colours: all that the model sees", transform=ax.transAxes, ha="center", va="top")


def draw_field(sdata: SpatialData) -> None:
    """Fields of several diameters on the tissue, and how well they predict."""
    found = json.loads((ROOT / "benchmarks" / "nsl_field.json").read_text())
    scores = pd.DataFrame(found["scores"])
    scores = scores[(scores["sections"] == "choice") & ((scores["model"] != "NSL") | (scores["pull"] == found["pull"]))]
    mean = scores.pivot_table(index="field", columns="model", values="pcc")
    _, (tissue, curve) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=[1, 1.7])
    pixels, radius = patch(sdata, SPOT, 6)
    show(tissue, pixels, "fields of 1, 2 and 4 spot diameters")
    neighbors = sdata[f"{HELD_OUT}_spots"]
    center = neighbors.loc[SPOT].geometry
    for spot in neighbors.geometry:
        shifted = (spot.x - center.x + len(pixels) / 2, spot.y - center.y + len(pixels) / 2)
        if all(0 < value < len(pixels) for value in shifted):
            tissue.add_patch(Circle(shifted, radius, color="white", alpha=0.35, linewidth=0))
    for field in FIELDS:
        tissue.add_patch(Circle(2 * [len(pixels) / 2], field * radius, fill=False, color="white", linewidth=1.5))
    for name, color in (("NSL", "#54367f"), ("ridge on mean OD", "#c9689f")):
        curve.plot(mean.index, mean[name], "o-", color=color, label=name)
    curve.axvline(found["field"], color="0.7", linewidth=1, zorder=0)
    curve.set_xscale("log", base=2)
    curve.set_xticks(list(mean.index), [f"{field:g}" for field in mean.index])
    curve.set(xlabel="field (spot diameters)", ylabel="median per-gene PCC\n(held-out section, mean of 3)")
    curve.legend(frameon=False)


def draw_levels(sdata: SpatialData) -> None:
    """What M2OST sees of a spot: its three levels, each cut into tokens that are finer towards the centre."""
    row = sdata["table"].obs_names.get_loc(SPOT)
    field = DEFAULT_SPOT_SCALE
    with stp.pp.patches(sdata, spot_scale=field) as patches:
        levels = np.moveaxis(patches[int(np.searchsorted(patches.rows, row))], 1, -1)
        size = patches.shape[-1]
    _, axes = plt.subplots(1, len(levels), figsize=(10.5, 3.9), layout="constrained")
    for level, (pixels, ax) in enumerate(zip(levels, axes, strict=True)):
        width = field * 2**level
        show(ax, pixels, f"level {level}: {width:.2g} spot diameters, {(level + 1) * (size // 16) ** 2} tokens")
        ax.add_patch(Circle(2 * [size / 2], size / width / 2, fill=False, color="black", linewidth=1.5))
        for k in range(level + 1):
            side, token = size >> k, 16 >> k
            lines = (size - side) / 2 + np.arange(0, side + 1, token)
            style = {"color": LEVEL_COLOURS[k], "linewidth": 0.6, "alpha": 0.8}
            ax.vlines(lines, lines[0], lines[-1], **style)
            ax.hlines(lines, lines[0], lines[-1], **style)
            ax.add_patch(Rectangle(2 * [lines[0]], side, side, fill=False, color=LEVEL_COLOURS[k], linewidth=2))


if __name__ == "__main__":
    main()
