"""Models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, pairwise
from typing import Literal, get_args

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from stpredict.pl._axes import take_single_axes
from stpredict.pl._score_rows import colors, draw_ceiling, draw_rows
from stpredict.pl._score_values import (
    METRICS,
    POOLED,
    ModelScores,
    choose,
    noise_ceiling,
    read_scores,
    references,
    sections_of,
)
from stpredict.pl._style import MARKERS, number, plain

Kind = Literal["genes", "rank", "sections", "spots"]
_CORRELATIONS = ("pcc", "spearman", "pcc_of_ceiling")


def scores(
    scores: pd.DataFrame,
    *,
    kind: Kind = "genes",
    metric: str = "pcc",
    models: str | Sequence[str] | None = None,
    genes: str | Sequence[str] | None = None,
    sections: str | Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how well models predict, beside the baselines and the noise ceiling.

    The number of a model is the same in all pictures, and for the PCC that of :func:`stpredict.tl.summarize`: the median
    over genes (or spots) of each section, then the mean over sections; in brackets its 95 % bootstrap interval over
    patients, or over sections where all are of one patient.

    ``kind`` chooses the picture:

    ``"genes"``
        A row for each model: a point for each gene (mean over sections), their density, and the model's number with its
        interval. Baselines come first, in grey. Two lines go across: the best baseline that sees no image, and the best
        that sees one. A model that is not to the right of both has shown nothing. The band is the noise ceiling, where
        it is known: what a perfect predictor would reach against counts as noisy as these.
    ``"rank"``
        A line for each model, with its genes from the best to the worst.
    ``"sections"``
        Heat map of models and sections, with the mean over sections.
    ``"spots"``
        As ``"genes"``, with a point for each spot. A per-spot score says mostly how high genes are on average: the
        baseline *mean of training spots*, one value for each gene, shows how far that goes.

    Parameters
    ----------
    scores
        What :func:`stpredict.tl.score` or :func:`stpredict.tl.cross_validate` returned, or several of them together
        (:func:`pandas.concat`). Rows may have been left out: ``scores[scores["highly_variable"]]``.
    kind
        Which picture.
    metric
        A column of the frame: any for genes, ``"pcc"`` or ``"rmse"`` for spots.
    models
        Which models and baselines to draw, in this order. `None` draws all.
    genes
        Genes of interest, to be marked. With ``kind="genes"`` or ``"rank"``.
    sections
        Which sections, in this order; ``"pooled"`` is one of them. `None` takes all.
    ax
        Axes to draw on. `None` makes a figure.

    Returns
    -------
    The axes.

    Raises
    ------
    KeyError
        The frame lacks columns, or has no rows for a model, gene or section; the message lists those that it has.
    TypeError
        ``scores`` is no DataFrame, or ``ax`` no axes.
    ValueError
        ``kind`` or ``metric`` is unknown, the frame holds a gene of a model twice, there is nothing to draw, ``genes``
        are named where none are drawn, or ``ax`` holds several axes.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> sdata["table"].obs["train"] = (sdata["table"].obs["section"] == "S1").to_numpy()
    >>> model = stp.tl.fit_nsl(sdata, train_key="train")
    >>> ax = stp.pl.scores(stp.tl.score(sdata, layer="nsl"))
    >>> ax.get_xlabel().splitlines()
    ['per-gene PCC', '(section S2_spots)']
    """
    if kind not in get_args(Kind):
        raise ValueError(f"`kind` is {kind!r}; expected one of {list(get_args(Kind))}.")
    if genes is not None and kind not in ("genes", "rank"):
        raise ValueError(f"`genes` are marked in pictures of the kinds 'genes' and 'rank'; `kind` is {kind!r}.")
    of = "spot" if kind == "spots" else "gene"
    found = read_scores(scores, of=of, metric=metric, models=models, sections=sections)
    known = list(dict.fromkeys(name for model in found for name in model.of_each().index))
    marked = [] if genes is None else choose(genes, known, "genes")
    ceiling = noise_ceiling(scores, found) if kind in ("genes", "rank") and metric == "pcc" else pd.Series(dtype=float)
    what = METRICS[metric].of_spot if of == "spot" else METRICS[metric].of_gene
    if "baseline" in scores and scores["baseline"].notna().all():  # all are of cross-validation
        what += " on held-out spots"

    if kind == "rank":
        ax = take_single_axes(ax, 6.5, 3.4)
        _draw_ranks(ax, found, ceiling, marked)
        ax.set_ylabel(_label(what, found[0].parts, of), fontsize="small")
    elif kind == "sections":
        ax = take_single_axes(ax, max(2.8 + 0.48 * len(found[0].parts), 5), 0.9 + 0.34 * len(found))
        _draw_sections(ax, found, reverse=METRICS[metric].best == "min")
        ax.set_title(f"{what}\nmedian over {of}s", fontsize="medium")
    else:
        ax = take_single_axes(ax, 5.5, 1.3 + 0.5 * len(found))
        undefined = "constant: no correlation across spots" if metric in _CORRELATIONS else "not defined"
        draw_rows(
            ax,
            found,
            references=references(found, metric, of),
            ceiling=ceiling,
            genes=marked,
            undefined=undefined,
        )
        ax.set_xlabel(_label(what, found[0].parts, of), fontsize="small")
    return ax


def _label(what: str, parts: list[str], of: str) -> str:
    """What an axis shows, and of which sections."""
    if parts == [POOLED]:
        return f"{what}\n(all sections pooled)"
    if len(parts) == 1:
        return plain(f"{what}\n(section {parts[0]})")
    n = f"{len(parts)} sections" if len(sections_of(parts)) == len(parts) else f"{len(parts)} parts of sections"
    return f"{what}\n({'mean of ' if of == 'gene' else ''}{n})"


def _draw_ranks(ax: Axes, models: list[ModelScores], ceiling: pd.Series, genes: list[str]) -> None:
    """A line for each model, its genes from the best to the worst."""
    handles: list[Line2D | Patch] = []
    styles = {color: cycle(("-", "--", ":", "-.")) for color in colors(models)}
    for model, color in zip(models, colors(models), strict=True):
        ranked = model.of_each().sort_values(ascending=False)
        if ranked.empty:
            handles.append(Line2D([], [], linestyle="", label=plain(f"{model.name} (no value)")))
            continue
        rank = np.arange(1, len(ranked) + 1)
        handles += ax.plot(
            rank, ranked, linestyle=next(styles[color]), color=color, label=plain(model.name), linewidth=1.4
        )
        for gene, marker in zip(genes, cycle(MARKERS), strict=False):
            at = ranked.index == gene
            ax.plot(rank[at], ranked[at], marker, color=color, markersize=5, markeredgecolor="black", zorder=3)
    handles += draw_ceiling(ceiling, ax.axhspan, ax.axhline)
    handles += [
        Line2D([], [], linestyle="", marker=marker, markerfacecolor="none", markeredgecolor="black", label=plain(gene))
        for gene, marker in zip(genes, cycle(MARKERS), strict=False)
    ]
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0.8)
    ax.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, fontsize="x-small"
    )
    ax.set_xlabel("genes, each model's best first", fontsize="small")
    ax.tick_params(labelsize="small")
    ax.margins(x=0.02)
    ax.spines[["top", "right"]].set_visible(False)


def _draw_sections(ax: Axes, models: list[ModelScores], *, reverse: bool) -> None:
    """Models in rows, sections in columns, and their mean in the last one."""
    table = pd.DataFrame({model.name: model.of_sections() for model in models}).T
    if len(table.columns) > 1:
        table["mean"] = table.mean(axis=1)
    cmap = plt.get_cmap("viridis_r" if reverse else "viridis").with_extremes(bad="0.93")
    image = ax.imshow(table, cmap=cmap, aspect="auto")
    for (i, j), value in np.ndenumerate(table.to_numpy()):
        red, green, blue, _ = image.to_rgba(value)
        dark = np.isfinite(value) and 0.3 * red + 0.59 * green + 0.11 * blue < 0.45
        text = number(value) if np.isfinite(value) else "–"
        ax.text(j, i, text, color="white" if dark else "black", ha="center", va="center", fontsize="small")
    long = max(map(len, table.columns)) > 6
    ax.set_xticks(
        np.arange(len(table.columns)), list(map(plain, table.columns)), fontsize="small", rotation=90 if long else 0
    )
    ax.set_yticks(np.arange(len(models)), list(map(plain, table.index)), fontsize="small")
    for label, model in zip(ax.get_yticklabels(), models, strict=True):
        label.set_color("0.45" if model.is_baseline else "black")
    ax.axvline(len(table.columns) - 1.5, color="white", linewidth=4)
    for i, (model, following) in enumerate(pairwise(models)):
        if model.is_baseline != following.is_baseline:
            ax.axhline(i + 0.5, color="white", linewidth=4)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
