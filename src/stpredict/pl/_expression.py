"""Measured beside predicted expression, over the tissue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import spatialdata_plot  # noqa: F401  (registers `sdata.pl`)
import xarray as xr
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.lines import Line2D
from scipy.spatial import cKDTree
from spatialdata import SpatialData

from stpredict._data.elements import Elements
from stpredict._data.slide import Section, Slide, find_table, open_slide
from stpredict.pl._axes import take_axes
from stpredict.pl._gene import Genes, choose_genes, pcc_note, read_measured, read_predicted, seen_in_training
from stpredict.pl._sections import draw_scale_bar, micrometers_per_pixel
from stpredict.pl._style import plain
from stpredict.pl._tissue import View, tissue_in_view, view_of_spots

# Values beyond these percentiles are off the colour scale: in legacy arrays some 3 % of the spots miss an abundant gene
# altogether, and would otherwise set the lower end for all.
_PERCENTILES = (5, 95)
# How far spots grow to be seen: part of the distance between neighbours.
_GROWN = 0.75
# Part of a panel's height that is kept free for a scale bar and a legend.
_FOOTER = 0.1
_MISSING = "dimgray"


def expression(
    sdata: SpatialData,
    genes: Genes,
    *,
    key: str = "nsl",
    layer: str | None = None,
    sections: str | Sequence[str] | None = None,
    shared_scale: bool = True,
    cmap: str | Colormap = "viridis",
    vmin: float | None = None,
    vmax: float | None = None,
    size: float | None = None,
    alpha: float = 1.0,
    img_alpha: float = 0.5,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | Sequence[str] | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    section_key: str | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Draw measured beside predicted expression of genes, over the H&E image.

    A row for each gene and section, with the columns measured and predicted; only predicted where the table has no expression.
    The title of a predicted panel gives the gene's PCC over the section's spots, beside the highest within reach of any
    predictor where :func:`stpredict.tl.noise_ceiling` has found it, and says what kind of prediction it is:
    *training fit* when the model was fitted to these very spots (such a picture says little about the model),
    *held out* when it has seen none of them, *partly training* for a mixture, and nothing where the table does not tell.
    Spots without a value are drawn as empty circles.

    Parameters
    ----------
    sdata
        Images, spots, and a table with predictions; nothing is written to it.
    genes
        One or more of ``var_names``, a mask of all genes, or a boolean column of ``var``.
    key
        Predictions, a key of ``layers``.
    layer
        Measured expression, a key of ``layers`` or ``"X"``. `None` takes what the model was fitted to, if the table has
        it, else ``X``.
    sections
        Which sections to draw, in this order: names of sections or keys of ``sdata.shapes``. `None` draws
        all.
    shared_scale
        One color scale for all panels of a gene. A regression's predictions vary less than what was measured, and one scale
        shows it; `False` gives each panel its own scale and colour bar, to compare patterns alone.
    cmap
        Colour map.
    vmin, vmax
        Ends of the colour scale. `None` means the 5th and 95th percentile: of measured or of predicted values, whichever
        reaches farther. Colour bars have pointed ends where values lie beyond.
    size
        Diameter of the drawn spots over their true one. `None` lets them grow, where they are smaller, to three quarters
        of the distance between neighbours.
    alpha
        Opacity of the spots.
    img_alpha
        Opacity of the image: below 1 it steps back behind the spots.
    image_key, shapes_key, table_key, coordinate_system
        Which elements to use, as in :func:`stpredict.pp.color_histogram`. `None` finds them.
    section_key
        Column of ``obs`` that names sections. `None` means the table's region column.
    ax
        Axes to draw on: as many as there are panels, row by row. `None` makes a figure.

    Returns
    -------
    ``(n_genes * n_sections, 2)`` axes, gene by gene; a single column without measured expression. Their data coordinates are
    those of the section's coordinate system.

    Raises
    ------
    KeyError
        No such gene, layer or section.
    TypeError
        ``sdata`` is no SpatialData, or ``ax`` no axes.
    ValueError
        The gene was not modelled, elements do not fit together, or ``ax`` has another number of axes.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> model = stp.tl.fit_nsl(sdata)
    >>> axes = stp.pl.expression(sdata, model.genes[0])
    >>> axes.shape
    (2, 2)
    """
    elements = Elements(
        image_key=image_key,
        shapes_key=shapes_key,
        table_key=table_key,
        coordinate_system=coordinate_system,
        section_key=section_key,
    )
    table = find_table(sdata, elements)
    names = choose_genes(table, genes)
    values = {gene: _read(table, gene, key, layer) for gene in names}
    slide = open_slide(sdata, elements, images=True)
    chosen = _choose_sections(slide, sections)
    kinds = list(next(iter(values.values())))
    views = [view_of_spots(section, _FOOTER) for section in chosen]
    axes = take_axes(
        ax,
        len(names) * len(chosen),
        len(kinds),
        figsize=_figsize(views * len(names), len(kinds), shared_scale),
        layout="compressed",
        height_ratios=[view.height / view.width for view in views] * len(names),
    )
    backgrounds = [tissue_in_view(section, view) for section, view in zip(chosen, views, strict=True)]
    rows = np.concatenate([section.rows for section in chosen])
    for gene, of_gene in zip(names, axes.reshape(len(names), len(chosen), -1), strict=True):
        shared = _scale([each[rows] for each in values[gene].values()], vmin, vmax) if shared_scale else None
        for section, view, tissue, panels in zip(chosen, views, backgrounds, of_gene, strict=True):
            style = _Style(cmap, _growth(section) if size is None else size, alpha, img_alpha)
            for (kind, shown), panel in zip(values[gene].items(), panels, strict=True):
                scale = shared or _scale([shown[section.rows]], vmin, vmax)
                _draw(panel, sdata, section, view, tissue, shown[section.rows], scale.norm, style)
                if kind == "measured":
                    note = f"{len(section.rows)} spots"
                else:
                    note = " · ".join(_notes(slide, gene, key, section, shown, values[gene].get("measured")))
                panel.set_title(plain(f"{slide.title(section)} · {gene} {kind}\n{note}"), fontsize="medium")
                if shared is None:
                    scale.draw_bar([panel], cmap, gene, fraction=0.05, pad=0.03)
            if (mpp := micrometers_per_pixel(section, table)) is not None:
                draw_scale_bar(panels[0], mpp / view.units_per_pixel)
        if shared is not None:
            shrink = max(0.85 / len(chosen), 0.25)
            shared.draw_bar(list(of_gene.flat), cmap, gene, shrink=shrink, aspect=18, pad=0.03)
    return axes


def _read(table: AnnData, gene: str, key: str, layer: str | None) -> dict[str, np.ndarray]:
    """``(n_obs,)`` values by the title of their column."""
    predicted = read_predicted(table, gene, key)
    measured = read_measured(table, gene, key, layer)
    return {"predicted": predicted} if measured is None else {"measured": measured, "predicted": predicted}


def _choose_sections(slide: Slide, wanted: str | Sequence[str] | None) -> list[Section]:
    found = list(slide.sections)
    if wanted is None:
        return found
    names = [slide.title(section) for section in found]
    by_name = {section.name: section for section in found} | dict(zip(names, found, strict=True))
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in wanted if name not in by_name]
    if unknown or not wanted:
        raise KeyError(f"`sections` is {wanted}; expected one or more of {names}.")
    return [by_name[name] for name in wanted]


def _notes(
    slide: Slide, gene: str, key: str, section: Section, predicted: np.ndarray, measured: np.ndarray | None
) -> Iterator[str]:
    """What the title says about the predictions of a section."""
    rows = section.rows[slide.in_tissue[section.rows]]
    if kind := seen_in_training(slide.table, key, rows, predicted):
        yield kind
    if measured is not None:
        yield pcc_note(slide.table, gene, key, rows, [slide.title(section)] * len(rows), measured, predicted)


class _Scale(NamedTuple):
    """Ends of a colour scale, and at which of them values lie beyond."""

    norm: Normalize
    extend: str

    def draw_bar(self, axes: list[Axes], cmap: str | Colormap, gene: str, **where: Any) -> None:
        bar = axes[0].figure.colorbar(ScalarMappable(self.norm, cmap), ax=axes, extend=self.extend, **where)
        bar.set_label(plain(f"{gene} expression"))
        bar.outline.set_linewidth(0)


def _scale(panels: list[np.ndarray], vmin: float | None, vmax: float | None) -> _Scale:
    """A scale for several panels, as wide as the widest of them needs it."""
    finite = [values[np.isfinite(values)] for values in panels]
    ends = np.array([np.percentile(values, _PERCENTILES) for values in finite if len(values)] or [[0.0, 1.0]])
    low = float(ends[:, 0].min()) if vmin is None else vmin
    high = float(ends[:, 1].max()) if vmax is None else vmax
    if not low < high:  # all values are the same
        high = low + 1
    below, above = (bool(side.any()) for side in (np.concatenate(finite) < low, np.concatenate(finite) > high))
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    return _Scale(Normalize(low, high), extend)


class _Style(NamedTuple):
    """How spots and image are drawn."""

    cmap: str | Colormap
    size: float
    alpha: float
    img_alpha: float


def _growth(section: Section) -> float:
    """Factor by which spots may grow without touching each other."""
    if len(section.centers) < 2:
        return 1.0
    distances = np.asarray(cKDTree(section.centers).query(section.centers, k=2)[0])
    return max(1.0, _GROWN * float(np.median(distances[:, 1])) / float(np.median(section.diameters)))


def _draw(
    ax: Axes,
    sdata: SpatialData,
    section: Section,
    view: View,
    tissue: xr.DataArray,
    values: np.ndarray,
    norm: Normalize,
    style: _Style,
) -> None:
    """One panel, composed in a SpatialData of its own: the caller's stays as it is."""
    shapes = sdata.shapes[section.name]
    geometry = [column for column in ("geometry", "radius") if column in shapes]
    spots = shapes.loc[section.instances, geometry].assign(expression=values)
    known = np.isfinite(values)
    parts = {"known": spots[known], "missing": spots[~known]}
    panel = SpatialData(images={"tissue": tissue}, shapes={name: part for name, part in parts.items() if len(part)})
    panel = panel.pl.render_images("tissue", scale="full", alpha=style.img_alpha)
    if known.any():
        panel = panel.pl.render_shapes(
            "known",
            color="expression",
            cmap=style.cmap,
            norm=norm,
            scale=style.size,
            fill_alpha=style.alpha,
            method="matplotlib",  # datashader, from 10,000 spots on, forgets the coordinate system
        )
    if not known.all():
        panel = panel.pl.render_shapes(
            "missing", fill_alpha=0, outline_color=_MISSING, outline_width=0.8, scale=style.size, method="matplotlib"
        )
    panel.pl.show(coordinate_systems=section.coordinate_system, ax=ax, frameon=False, colorbar=False)
    ax.set(xlim=(view.x0, view.x1), ylim=(view.y1, view.y0))
    if not known.all():
        circle = Line2D([], [], linestyle="", marker="o", markerfacecolor="none", markeredgecolor=_MISSING)
        ax.legend(
            [circle],
            [f"no value ({(~known).sum()} spots)"],
            loc="lower right",
            frameon=False,
            fontsize="x-small",
            handletextpad=0.1,
            borderaxespad=0,
        )


def _figsize(views: list[View], n_columns: int, shared_scale: bool) -> tuple[float, float]:
    width = 3.8 if len(views) == 1 else 3.2
    height = sum(width * min(view.height / view.width, 2) + 0.65 for view in views)
    return n_columns * width + (0.9 if shared_scale else 0.9 * n_columns), height
