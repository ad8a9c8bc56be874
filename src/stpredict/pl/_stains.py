"""What colours a gene has learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Rectangle
from spatialdata import SpatialData

from stpredict._data.compat import layer_names
from stpredict._data.elements import Elements
from stpredict._data.slide import Section, Slide, find_table, open_slide
from stpredict.pl._axes import take_axes
from stpredict.pl._gene import Genes, choose_genes, read_column
from stpredict.pl._sections import draw_scale_bar, micrometers_per_pixel
from stpredict.pl._style import plain
from stpredict.pp._histogram import optical_density
from stpredict.pp._tiles import to_uint8

_STAINS = ("hematoxylin", "eosin", "residual")
# Side of the patch in spot diameters.
_PATCH = 2.0
# Optical density by which the strip of the direction departs from its middle on either side.
_DEPARTURE = 0.5


def stains(
    sdata: SpatialData,
    genes: Genes,
    *,
    key: str = "nsl",
    spot: str | None = None,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | Sequence[str] | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    section_key: str | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Draw the stains that Neural Stain Learning has learned for genes.

    A row for each gene:

    - **Stain vectors.** The colour of each learned stain, at an optical density of 1, beside the reference that the fit
      started from, with the angle between the two. The strip below them shows the *effective direction*, the change of
      colour that raises the prediction most: from a tint that speaks against the gene to one that speaks for it, around
      an even mix of the reference's hematoxylin and eosin. Trust it first: it is what the data determine, whereas a
      stain vector that has not moved may only mean that none had to (see :class:`stpredict.models.NSL`).
    - **Weights** of the hematoxylin and eosin concentrations, on one axis for all genes of the picture.
    - **A patch of tissue**, two spot diameters wide, and what of it the gene takes for hematoxylin and for eosin: light
      that only this stain, as learned, has absorbed. The circle is the spot.

    Parameters
    ----------
    sdata
        Images, spots, and a table that :func:`stpredict.tl.fit_nsl` or :func:`stpredict.tl.predict` has written to;
        nothing is written to it.
    genes
        One or more of the modelled genes, a mask of the table's genes, or a boolean column of ``var``.
    key
        Where the results are in ``uns``.
    spot
        The patch's spot, one of ``obs_names``. `None` takes, for each gene, the spot with the highest prediction among
        those whose patch lies on the image.
    image_key, shapes_key, table_key, coordinate_system
        Which elements to use, as in :func:`stpredict.pp.color_histogram`. `None` finds them.
    section_key
        Column of ``obs`` that names sections. `None` means the table's region column.
    ax
        Axes to draw on: five for each gene, row by row. `None` makes a figure.

    Returns
    -------
    ``(n_genes, 5)`` axes: stain vectors, weights, patch, hematoxylin, eosin.

    Raises
    ------
    KeyError
        No such gene, key or spot.
    TypeError
        ``sdata`` is no SpatialData, or ``ax`` no axes.
    ValueError
        The gene was not modelled, ``uns[key]`` has no stains, elements do not fit together, there is no spot to draw, or
        ``ax`` has another number of axes.

    References
    ----------
    Dawood, Branson, Rajpoot & Minhas 2021, All You Need is Color, arXiv 2108.10446.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> model = stp.tl.fit_nsl(sdata)
    >>> axes = stp.pl.stains(sdata, model.genes[:2])
    >>> axes.shape
    (2, 5)
    """
    elements = Elements(
        image_key=image_key,
        shapes_key=shapes_key,
        table_key=table_key,
        coordinate_system=coordinate_system,
        section_key=section_key,
    )
    table = find_table(sdata, elements)
    learned = [_learned(table, key, gene) for gene in choose_genes(table, genes)]
    slide = open_slide(sdata, elements, images=True)
    sites = [_find_site(slide.sections, table, key, gene.name, spot) for gene in learned]
    axes = take_axes(
        ax,
        len(learned),
        5,
        figsize=(10.5, 2.1 * len(learned) + 0.3),
        layout="constrained",
        width_ratios=[1.55, 1.0, 1.1, 1.1, 1.1],
    )
    heaviest = max(float(np.abs(gene.weights).max()) for gene in learned)
    for gene, site, row in zip(learned, sites, axes, strict=True):
        _draw_vectors(row[0], gene)
        _draw_weights(row[1], gene, heaviest)
        _draw_patch(row[2:], gene, site, slide)
    return axes


class _Gene(NamedTuple):
    """What was learned for one gene."""

    name: str
    stain_matrix: np.ndarray
    weights: np.ndarray
    reference: np.ndarray

    @property
    def unmixing(self) -> np.ndarray:
        """``(3, 2)`` optical densities to concentrations of hematoxylin and eosin."""
        return np.linalg.inv(self.stain_matrix)[:, :2]

    @property
    def direction(self) -> np.ndarray:
        """Unit vector along which the prediction grows fastest, where no concentration is clamped at 0."""
        direction = self.unmixing @ self.weights
        return direction / max(float(np.linalg.norm(direction)), np.finfo(float).tiny)

    @property
    def angles(self) -> np.ndarray:
        """Degrees between each learned vector and the reference's."""
        cosines = (self.stain_matrix * self.reference).sum(axis=1)
        norms = np.linalg.norm(self.stain_matrix, axis=1) * np.linalg.norm(self.reference, axis=1)
        return np.degrees(np.arccos(np.clip(cosines / norms, -1, 1)))


def _learned(table: AnnData, key: str, gene: str) -> _Gene:
    if key not in table.uns:
        raise KeyError(f"No results {key!r} in `uns`; it has {list(table.uns)[:12]}. Fit with `stp.tl.fit_nsl(sdata)`.")
    entry = table.uns[key]
    needed = ("genes", "stain_matrix", "weights", "reference")
    if not isinstance(entry, Mapping) or not all(name in entry for name in needed):
        raise ValueError(f"`uns[{key!r}]` has no stains; expected what `stp.tl.fit_nsl` writes there, with {needed}.")
    names = [str(name) for name in entry["genes"]]
    if gene not in names:
        modeled = f"`uns[{key!r}]` has {len(names)} genes, such as {names[:8]}."
        if gene in table.var_names:
            raise ValueError(f"The gene {gene!r} is in the table but was not modeled; {modeled}")
        raise KeyError(f"No gene {gene!r}; {modeled}")
    i = names.index(gene)
    return _Gene(
        gene,
        np.asarray(entry["stain_matrix"][i], dtype=np.float64),
        np.asarray(entry["weights"][i], dtype=np.float64),
        np.asarray(entry["reference"], dtype=np.float64),
    )


class _Site(NamedTuple):
    """A spot of a section; ``i`` is its position in the section."""

    section: Section
    i: int

    @property
    def window(self) -> tuple[slice, slice]:
        """Pixels of the patch, y and x; they may lie beyond the image."""
        x, y = self.section.centers[self.i]
        side = round(_PATCH * self.section.diameters[self.i])
        left, top = int(np.floor(x - side / 2 + 0.5)), int(np.floor(y - side / 2 + 0.5))
        return slice(top, top + side), slice(left, left + side)

    @property
    def is_on_image(self) -> bool:
        """Whether all of the patch is."""
        y, x = self.window
        return y.start >= 0 and x.start >= 0 and y.stop <= self.section.height and x.stop <= self.section.width


def _find_site(sections: Sequence[Section], table: AnnData, key: str, gene: str, spot: str | None) -> _Site:
    if spot is not None:
        if spot not in table.obs_names:
            raise KeyError(f"No spot {spot!r} in `obs_names`, which are such as {list(table.obs_names[:5])}.")
        row = table.obs_names.get_loc(spot)
        for section in sections:
            for i in np.flatnonzero(section.rows == row):
                if (site := _Site(section, int(i))).is_on_image:
                    return site
        raise ValueError(f"The patch around the spot {spot!r} is not wholly on an image; choose another `spot`.")

    if key not in layer_names(table) or gene not in table.var_names:
        raise ValueError(
            f"The table has no predictions `layers[{key!r}]` of {gene!r} to choose a spot by. Name one with `spot`."
        )
    predicted = read_column(table, gene, key)
    sites = [_Site(section, i) for section in sections for i in range(len(section.rows))]
    heights = np.array([predicted[site.section.rows[site.i]] for site in sites])
    for best in np.argsort(-np.where(np.isfinite(heights), heights, -np.inf)):
        if np.isfinite(heights[best]) and sites[best].is_on_image:
            return sites[best]
    raise ValueError(f"No spot with a prediction of {gene!r} has its whole patch on an image.")


def _color(od: np.ndarray) -> np.ndarray:
    """Light that is left, as RGB; where a stain would add light, it adds none."""
    return np.exp(-np.maximum(od, 0))


def _draw_vectors(ax: Axes, gene: _Gene) -> None:
    for y, (name, learned, reference, angle) in enumerate(
        zip(_STAINS, gene.stain_matrix, gene.reference, gene.angles, strict=True)
    ):
        ax.text(-0.08, y + 0.5, name, ha="right", va="center", fontsize="small")
        for x, vector in enumerate((learned, reference)):
            ax.add_patch(Rectangle((x, y + 0.08), 0.94, 0.84, facecolor=_color(vector), edgecolor="0.6", linewidth=0.5))
        ax.text(2.05, y + 0.5, f"{angle:.0f}°", ha="left", va="center", fontsize="small")
    for x, heading in enumerate(("learned", "reference")):
        ax.text(x + 0.47, -0.08, heading, ha="center", va="bottom", fontsize="small")
    middle = gene.reference[:2].mean(axis=0)
    steps = np.linspace(-_DEPARTURE, _DEPARTURE, 64)[:, None]
    ax.imshow(_color(middle + steps * gene.direction)[None], extent=(0, 1.94, 3.85, 3.25), interpolation="bilinear")
    ax.text(-0.08, 3.55, "direction", ha="right", va="center", fontsize="small")
    ax.text(0, 3.9, "less", ha="left", va="top", fontsize="x-small")
    ax.text(1.94, 3.9, "more", ha="right", va="top", fontsize="x-small")
    ax.set(xlim=(-1.2, 2.45), ylim=(4.3, -0.5), aspect="auto")
    ax.set_title(plain(gene.name), fontweight="bold", fontsize="medium")
    ax.axis("off")


def _draw_weights(ax: Axes, gene: _Gene, heaviest: float) -> None:
    ax.barh([0, 1], gene.weights, color=_color(gene.stain_matrix[:2]), edgecolor="0.3", linewidth=0.6, height=0.6)
    ax.axvline(0, color="0.3", linewidth=0.8)
    limit = 1.1 * heaviest or 1.0
    for y, weight in enumerate(gene.weights):  # on the free side of the axis
        side = "right" if weight > 0 else "left"
        ax.text(
            -np.copysign(0.06 * limit, weight),
            y,
            (f"{weight:.0f}" if abs(weight) >= 10 else f"{weight:.2g}").replace("-", "−"),
            ha=side,
            va="center",
            fontsize="small",
        )
    ax.set(xlim=(-limit, limit), ylim=(1.6, -0.6), yticks=[0, 1], yticklabels=["H", "E"])
    ax.set_xlabel("per unit of concentration", fontsize="small")
    ax.set_title("weights", fontsize="medium")
    ax.tick_params(labelsize="small", length=2)
    ax.tick_params(axis="y", length=0)
    for side in ("left", "right", "top"):
        ax.spines[side].set_visible(False)


def _draw_patch(axes: np.ndarray, gene: _Gene, site: _Site, slide: Slide) -> None:
    section, (y, x) = site.section, site.window
    rgb = to_uint8(section.pixels[:, y, x].compute(), section.channels, section.image_key).transpose(1, 2, 0)
    concentrations = np.maximum(optical_density(rgb) @ gene.unmixing, 0)
    name, spot = slide.title(section), str(slide.table.obs_names[section.rows[site.i]])
    name = spot if spot.startswith(name) else f"{name} · {spot}"
    split = [_color(concentrations[..., [s]] * gene.stain_matrix[s]) for s in range(2)]
    for ax, picture, title in zip(axes, [rgb, *split], [name, *_STAINS[:2]], strict=True):
        ax.imshow(picture)
        ax.set_title(plain(title), fontsize="medium")
        ax.axis("off")
    center = section.centers[site.i] - (x.start, y.start) - 0.5  # imshow puts a pixel's centre at a whole number
    axes[0].add_patch(Circle(center, section.diameters[site.i] / 2, facecolor="none", edgecolor="white", linewidth=1.2))
    if (mpp := micrometers_per_pixel(section, slide.table)) is not None:
        draw_scale_bar(axes[0], mpp)
