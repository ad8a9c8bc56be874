"""Measured against predicted expression, spot by spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from pandas.api.types import is_bool_dtype, is_numeric_dtype
from spatialdata import SpatialData

from stpredict._data.columns import read_mask
from stpredict._data.compat import layer_names
from stpredict._data.elements import Elements
from stpredict._data.messages import listed
from stpredict._data.provenance import training_rows
from stpredict._data.slide import Slide, open_slide
from stpredict.pl._axes import take_axes
from stpredict.pl._gene import Genes, choose_genes, pcc_note, read_measured, read_predicted, seen_in_training
from stpredict.pl._style import DENSITY, HALO, PALETTE, plain

# More points than that cover each other.
_MAX_POINTS = 5000


def scatter(
    sdata: SpatialData | AnnData,
    genes: Genes,
    *,
    key: str = "nsl",
    layer: str | None = None,
    spots: str | None = None,
    color: str | None = "section",
    table_key: str | None = None,
    section_key: str | None = None,
    ncols: int = 4,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Draw measured against predicted expression of genes, a panel for each.

    Both axes have the same scale, and a light line marks where the two are equal. Points along it mean that predictions
    are right on average; how widely they lie apart from left to right is how much the model tells spots apart. The title
    gives the PCC as scores do, a mean over sections (and folds of cross-validation) where there are several, beside the
    highest within reach of any predictor where :func:`stpredict.tl.noise_ceiling` has found it, and says whether the model was
    fitted to these spots, as in :func:`stpredict.pl.expression`.

    Parameters
    ----------
    sdata
        Spots, and a table with expression and predictions; nothing is written to it.
    genes
        One or more of ``var_names``, a mask of all genes, or a boolean column of ``var``.
    key
        Predictions, a key of ``layers``.
    layer
        Measured expression, a key of ``layers`` or ``"X"``. `None` takes what the model was fitted to, if the table has
        it, else ``X``.
    spots
        A column of ``obs`` that is `True` for the spots to draw, or ``"all"``. `None` leaves out the spots that the model was
        fitted to, where the table tells and there are others. Spots beside the tissue (``obs["in_tissue"]`` is 0) are left
        out, unless a column chooses them.
    color
        Column of ``obs`` that points are coloured by: names or numbers. ``"section"`` means the sections; `None` one
        colour. Of more than 5,000 spots the density is drawn instead.
    table_key
        Which table. `None` finds it.
    section_key
        Column of ``obs`` that names sections. `None` means the table's region column.
    ncols
        Panels side by side.
    ax
        Axes to draw on, one for each gene. `None` makes a figure.

    Returns
    -------
    ``(n_genes,)`` axes.

    Raises
    ------
    KeyError
        No such gene, layer or column.
    TypeError
        ``sdata`` is no SpatialData, ``ax`` no axes, or ``obs[spots]`` is not boolean.
    ValueError
        A gene was not modelled, there is no measured expression or no spot to draw, or ``ax`` has another number of
        axes.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> sdata["table"].obs["train"] = (sdata["table"].obs["section"] == "S1").to_numpy()
    >>> model = stp.tl.fit_nsl(sdata, train_key="train")
    >>> axes = stp.pl.scatter(sdata, model.genes[:3])
    >>> axes.shape
    (3,)
    """
    slide = open_slide(sdata, Elements(table_key=table_key, section_key=section_key), images=False)
    table = slide.table
    names = choose_genes(table, genes)
    if ncols < 1:
        raise ValueError(f"`ncols` is {ncols}; expected at least 1.")
    paint = _Paint.of(table, slide.section_of, color)
    panels = [_read_panel(slide, gene, key, layer, spots) for gene in names]
    ncols = min(ncols, len(panels)) if ax is None else len(panels)
    nrows = -(-len(panels) // ncols)
    axes = take_axes(
        ax, nrows, ncols, figsize=(2.3 * ncols + 0.9, 2.75 * nrows), layout=ConstrainedLayoutEngine(h_pad=0.1)
    ).ravel()
    for unused in axes[len(panels) :]:
        unused.remove()
    for panel, where in zip(panels, axes, strict=False):
        _draw(where, panel, paint)
    if any(not panel.is_dense for panel in panels):
        paint.explain(axes[ncols - 1], color or "", np.concatenate([panel.rows for panel in panels]))
    return axes[: len(panels)]


class _Panel(NamedTuple):
    """Spots ``rows`` that have both a measured and a predicted value of a gene."""

    gene: str
    rows: np.ndarray
    measured: np.ndarray
    predicted: np.ndarray
    note: str

    @property
    def is_dense(self) -> bool:
        return len(self.rows) > _MAX_POINTS


def _read_panel(slide: Slide, gene: str, key: str, layer: str | None, spots: str | None) -> _Panel:
    table, sections = slide.table, slide.section_of
    predicted = read_predicted(table, gene, key)
    measured = read_measured(table, gene, key, layer)
    if measured is None:
        raise ValueError(
            f"The table has no `X` to draw against; name one of {listed(layer_names(table))} with `layer`."
        )
    drawn = _choose_spots(slide, key, spots, np.isfinite(predicted))
    rows = np.flatnonzero(drawn & np.isfinite(measured) & (sections != ""))
    if not len(rows):
        which = "" if spots in (None, "all") else f" among those that `obs[{spots!r}]` chooses"
        raise ValueError(f"No spot{which} has both a measured and a predicted value of {gene!r}.")
    kind = seen_in_training(table, key, rows, predicted)
    text = pcc_note(table, gene, key, rows, list(sections[rows]), measured, predicted)
    note = f"{kind} · {text}" if kind else text
    return _Panel(gene, rows, measured[rows], predicted[rows], note)


def _choose_spots(slide: Slide, key: str, spots: str | None, predicted: np.ndarray) -> np.ndarray:
    """Rows with a prediction that are to be drawn."""
    if spots is not None and spots != "all":
        return predicted & read_mask(slide.table.obs, spots, where="obs", expected="True for spots to draw")
    predicted = predicted & slide.in_tissue
    training = None if spots == "all" else training_rows(slide.table, key)
    held_out = predicted if training is None else predicted & ~training
    return held_out if held_out.any() else predicted


class _Paint(NamedTuple):
    """Colours of all rows, and what explains them: each row's name and the names' colours, or a scale."""

    colors: np.ndarray
    names: np.ndarray | None = None
    palette: dict[str, Any] = {}
    scale: ScalarMappable | None = None

    @classmethod
    def of(cls, table: AnnData, sections: np.ndarray, color: str | None) -> _Paint:
        if color is None:
            return cls(np.tile(to_rgba(PALETTE[0]), (table.n_obs, 1)))
        if color == "section":
            column = pd.Series(sections)
        elif color in table.obs:
            column = table.obs[color]
        else:
            raise KeyError(f"No column {color!r} in `obs`; it has {listed(table.obs.columns)}.")
        if is_numeric_dtype(column) and not is_bool_dtype(column):
            scale = ScalarMappable(Normalize(column.min(), column.max()), "viridis")
            return cls(scale.to_rgba(column.to_numpy(dtype=float)), scale=scale)
        names = column.astype(str).to_numpy()
        kinds = list(dict.fromkeys(names))
        many = len(kinds) > len(PALETTE)
        palette = plt.get_cmap("viridis")(np.linspace(0, 1, len(kinds))) if many else map(to_rgba, PALETTE)
        of_kind = dict(zip(kinds, palette, strict=False))
        return cls(np.array([of_kind[name] for name in names]), names, of_kind)

    def explain(self, ax: Axes, label: str, rows: np.ndarray) -> None:
        """Legend of the rows' names, or the scale, to the right of a panel."""
        if self.scale is not None:
            bar = ax.figure.colorbar(self.scale, ax=ax, fraction=0.05, pad=0.03)
            bar.set_label(plain(label), fontsize="small")
            bar.ax.tick_params(labelsize="small")
        if self.names is not None:
            there = set(self.names[rows])
            shown = {name: color for name, color in self.palette.items() if name in there}
            handles = [
                Line2D([], [], linestyle="", marker="o", color=c, label=plain(name)) for name, c in shown.items()
            ]
            ax.legend(
                handles=handles,
                title=plain(label),
                loc="upper left",
                bbox_to_anchor=(1.01, 1),
                frameon=False,
                fontsize="x-small",
                title_fontsize="x-small",
                markerscale=0.7,
                handletextpad=0.2,
                borderaxespad=0,
                ncols=-(-len(handles) // 18),
            )


def _draw(ax: Axes, panel: _Panel, paint: _Paint) -> None:
    ends = np.concatenate([panel.measured, panel.predicted])
    margin = 0.04 * np.ptp(ends) or 0.5
    limits = (ends.min() - margin, ends.max() + margin)
    ax.plot(limits, limits, color="0.8", linewidth=1, zorder=0)
    n = f"{len(panel.rows):,} spots"
    if panel.is_dense:
        ax.hexbin(
            panel.predicted,
            panel.measured,
            gridsize=45,
            extent=(*limits, *limits),
            bins="log",
            mincnt=1,
            cmap=LinearSegmentedColormap.from_list("density", DENSITY),
            linewidths=0,
        )
        n += ", darker: more"
    else:
        order = np.random.default_rng(0).permutation(len(panel.rows))  # no section hides another
        size = np.clip(3000 / len(order), 3, 14)
        colors = paint.colors[panel.rows[order]]
        ax.scatter(
            panel.predicted[order], panel.measured[order], s=size, c=colors, alpha=0.6, linewidths=0, rasterized=True
        )
    ax.text(0.03, 0.97, n, transform=ax.transAxes, ha="left", va="top", fontsize="x-small", path_effects=[HALO])
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    ax.set_title(plain(panel.gene), fontsize="medium", style="italic", pad=17)
    ax.text(0.5, 1.02, panel.note, transform=ax.transAxes, ha="center", va="bottom", fontsize="x-small")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.set_xlabel("predicted", fontsize="small")
    ax.set_ylabel("measured", fontsize="small")
    ax.tick_params(labelsize="small")
    ax.spines[["top", "right"]].set_visible(False)
