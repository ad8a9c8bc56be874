"""Models in rows: how their scores are distributed over genes or spots."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from itertools import cycle, pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation
from scipy.optimize import isotonic_regression
from scipy.stats import gaussian_kde

from stpredict.pl._score_values import ModelScores, sections_of
from stpredict.pl._style import BASELINE, CEILING, CEILING_MEDIAN, HALO, MARKERS, PALETTE, number, plain
from stpredict.tl.evaluation.numbers._labels import TRAINING_MEAN

# Fewer values make no density.
_DENSITY = 20
# A row is 1 high; its density lies above its line, its points below. Room where baselines end and models begin.
_DENSITY_HEIGHT, _POINTS, _GAP = 0.55, (0.1, 0.32), 0.3
_STYLES: tuple[Literal[":", "--"], ...] = (":", "--")
# Values farther from the quartiles than so many times their distance are only counted.
_FAR = 4.0


def colors(models: list[ModelScores]) -> list[str]:
    """Grey for baselines, colours in turn for models."""
    turn = cycle(PALETTE)
    return [BASELINE if model.is_baseline else next(turn) for model in models]


def draw_ceiling(ceiling: pd.Series, draw_band: Callable[..., Any], draw_line: Callable[..., Any]) -> list[Patch]:
    """Median and quartiles of the genes' noise ceilings across the axes; the legend."""
    if ceiling.empty:
        return []
    draw_band(*ceiling.quantile([0.25, 0.75]), color=CEILING, linewidth=0, zorder=0)
    draw_line(ceiling.median(), color=CEILING_MEDIAN, linewidth=1.2, zorder=0.5)
    label = f"noise ceiling {number(ceiling.median())} (median, quartiles)"
    return [Patch(facecolor=CEILING, edgecolor=CEILING_MEDIAN, label=label)]


def draw_rows(
    ax: Axes,
    models: list[ModelScores],
    *,
    references: list[ModelScores],
    ceiling: pd.Series,
    genes: list[str],
    undefined: str,
) -> None:
    """Draw, for each model from the top down, a density, the values below it, and their median with its interval.

    Parameters
    ----------
    ax
        To draw on.
    models
        In rows.
    references
        Models whose centres are drawn as lines across.
    ceiling
        Noise ceilings of genes; median and quartiles are drawn as a band across.
    genes
        To be named.
    undefined
        What is written where a model has no value.
    """
    changes = [b.is_baseline != a.is_baseline for a, b in pairwise(models)]
    y = np.arange(len(models)) + _GAP * np.cumsum([0, *changes])
    low, high = _limits(models, ceiling, genes)
    handles: list[Line2D | Patch] = [_center_handle(models), *_draw_references(ax, references)]
    handles += draw_ceiling(ceiling, ax.axvspan, ax.axvline)
    for at, model, color in zip(y, models, colors(models), strict=True):
        values, ink = model.of_each().to_numpy(), "0.4" if model.is_baseline else "black"
        _write(ax, -0.02, at, plain(textwrap.fill(model.name, 18, break_long_words=False)), "right", color=ink)
        if len(values):
            _draw_values(ax, at, values, low, high, color)
            _draw_center(ax, at, model, ink)
        else:
            _write(ax, 0.5, at, textwrap.fill(undefined, 24), "center", color="0.5", style="italic")
    if low < 0 < high:
        ax.axvline(0, color="0.85", linewidth=0.8, zorder=0.8)
    ax.set(xlim=(low, high), ylim=(y[-1] + 0.5, -0.7), yticks=[])
    ax.tick_params(axis="x", labelsize="small")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=ax.transAxes + ScaledTranslation(0, -44 / 72, ax.figure.dpi_scale_trans),
        frameon=False,
        fontsize="x-small",
        borderaxespad=0,
    )
    if genes:
        _name_genes(ax, y, models, genes)


def _write(ax: Axes, x: float, y: float, text: str, side: str, **style: Any) -> None:
    """Text in a row, readable across lines; ``x`` is a part of the axes' width."""
    if 0 <= x <= 1:
        style["path_effects"] = [HALO]
    where: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "ha": side, "multialignment": side, "va": "center"}
    ax.text(x, y, text, zorder=7, linespacing=1.1, fontsize="x-small", **where, **style)


def _limits(models: list[ModelScores], ceiling: pd.Series, genes: list[str]) -> tuple[float, float]:
    """As wide as all values need it, but for a few that lie far out."""
    ends = list(ceiling.quantile([0.25, 0.75])) if len(ceiling) else []
    for model in models:
        values = model.of_each()
        if len(values):
            lower, upper = values.quantile([0.25, 0.75])
            far = _FAR * (upper - lower)
            ends += [max(values.min(), lower - far), min(values.max(), upper + far), *model.interval()]
            ends += list(values.reindex(genes))
    low, high = np.nanmin(ends), np.nanmax(ends)
    margin = 0.03 * (high - low) or 0.5
    return low - margin, high + margin


def _draw_references(ax: Axes, references: list[ModelScores]) -> list[Line2D]:
    """Centres of baselines as lines across all rows; their legend."""
    handles = []
    for model, style in zip(references, _STYLES, strict=False):
        ax.axvline(model.center(), color="0.35", linewidth=1, linestyle=style, zorder=1.5)
        note = ": gene means alone" if model.name == TRAINING_MEAN else " (median)"
        handles.append(Line2D([], [], color="0.35", linewidth=1, linestyle=style, label=plain(model.name + note)))
    return handles


def _draw_values(ax: Axes, at: float, values: np.ndarray, low: float, high: float, color: str) -> None:
    near = values[(values >= low) & (values <= high)]
    if len(near) >= _DENSITY and np.ptp(near) > 0:
        grid = np.linspace(near.min(), near.max(), 200)
        density = gaussian_kde(near)(grid)
        ax.fill_between(
            grid, at, at - _DENSITY_HEIGHT * density / density.max(), color=color, alpha=0.35, linewidth=0, zorder=2
        )
    spread = np.random.default_rng(0).uniform(*_POINTS, len(near))
    ax.plot(
        near,
        at + spread,
        linestyle="",
        marker="o",
        markersize=np.clip(40 / np.sqrt(len(near)), 0.8, 4),
        markeredgewidth=0,
        color=color,
        alpha=np.clip(60 / np.sqrt(len(near)) / 5, 0.12, 0.8),
        rasterized=True,
        zorder=2,
    )
    middle = at + float(np.mean(_POINTS))
    if below := (values < low).sum():
        _write(ax, 0, middle, f"◂ {below}", "left")
    if above := (values > high).sum():
        _write(ax, 1, middle, f"{above} ▸", "right")


_CENTER: dict[str, Any] = {"marker": "o", "markerfacecolor": "white", "markersize": 4.5, "markeredgewidth": 1.4}


def _draw_center(ax: Axes, at: float, model: ModelScores, color: str) -> None:
    center, (low, high) = model.center(), model.interval()
    ax.plot([low, high], [at, at], color=color, linewidth=1.6, solid_capstyle="butt", zorder=4)
    ax.plot(center, at, color=color, zorder=5, **_CENTER)
    text = number(center) + (f"\n[{number(low)}, {number(high)}]" if np.isfinite(low) else "")
    _write(ax, 1.02, at, text, "left", color=color)


def _center_handle(models: list[ModelScores]) -> Line2D:
    groups, parts = set(models[0].groups), models[0].parts
    if len(groups) < 2:
        return Line2D([], [], color="black", linestyle="", label="median", **_CENTER)
    if groups <= sections_of(parts):
        resampled = "sections"
    else:
        resampled = "parts of sections" if groups <= set(parts) else "patients"
    label = f"median, 95 % bootstrap over {len(groups)} {resampled}"
    return Line2D([], [], color="black", linewidth=1.6, label=label, **_CENTER)


def _name_genes(ax: Axes, y: np.ndarray, models: list[ModelScores], genes: list[str]) -> None:
    """Mark genes in all rows, join their marks, and name them above the first."""
    middle = np.mean(_POINTS)
    each = [model.of_each() for model in models]
    tops = []
    for gene, marker in zip(genes, MARKERS * len(genes), strict=False):
        x = np.array([values.get(gene, np.nan) for values in each])
        there = np.isfinite(x)
        ax.plot(x[there], y[there] + middle, color="black", linewidth=0.6, alpha=0.45, zorder=3)
        ax.plot(x[there], y[there] + middle, marker, color="black", markersize=3.5, zorder=6)
        tops.append((gene, x[there][0], y[there][0] + middle))
    tops.sort(key=lambda top: top[1])

    # Side by side where there is room, else upright; as near to their marks as they can be without overlap.
    ax.figure.canvas.figure.draw_without_rendering()
    labels = [
        ax.text(0, 1, plain(gene), transform=ax.transAxes, fontsize="x-small", style="italic") for gene, *_ in tops
    ]
    boxes = [label.get_window_extent() for label in labels]
    widths = np.array([box.width for box in boxes]) + 1.5 * boxes[0].height
    upright = widths.sum() > ax.bbox.width
    if upright:
        widths[:] = 1.2 * boxes[0].height
    widths /= ax.bbox.width
    offsets = np.cumsum(widths) - widths / 2
    marks = ax.transAxes.inverted().transform(ax.transData.transform([top[1:] for top in tops]))
    places = np.clip(isotonic_regression(marks[:, 0] - offsets).x, 0, max(0, 1 - widths.sum())) + offsets
    for label, place, mark in zip(labels, places, marks, strict=True):
        label.set(position=(place, 1.01), rotation=90 if upright else 0, ha="center", va="bottom")
        ax.plot([place, mark[0]], [1, mark[1]], transform=ax.transAxes, color="black", linewidth=0.4, alpha=0.4)
