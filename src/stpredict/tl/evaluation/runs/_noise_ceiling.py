"""How well the assay itself would predict what it measured: the highest PCC that any predictor can reach."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stpredict._data.compat import layer_names
from stpredict._data.elements import Elements
from stpredict._data.matrix import read_csr, where_is
from stpredict._data.messages import listed
from stpredict._data.slide import open_slide
from stpredict._data.slots import Slots
from stpredict.tl.evaluation.numbers._ceiling import MAX_COUNT, Halves, ceiling, correlate_halves, mean_halves
from stpredict.tl.evaluation.numbers._labels import MEAN
from stpredict.tl.fitting._targets import Genes, select_genes

_MIN_SPOTS = 3


def noise_ceiling(
    sdata: SpatialData | AnnData,
    *,
    layer: str = "counts",
    genes: Genes = None,
    n_draws: int = 20,
    min_count: int = 100,
    random_state: int = 0,
    table_key: str | None = None,
    shapes_key: str | Sequence[str] | None = None,
    section_key: str | None = None,
    key_added: str = "noise_ceiling",
    inplace: bool = True,
) -> pd.DataFrame:
    r"""Estimate, for each gene, the highest PCC that noise in its counts allows a predictor to reach.

    The counts are divided at random into two halves, each is normalised to log1p of counts per 10,000, and the halves are
    correlated across the spots of a section. Each half has half of the depth, which is allowed for: a correlation *r* of the
    halves means a reliability 2 *r* / (1 + *r*) of the whole (Spearman & Brown), and a predictor that knew the true expression
    would correlate with what was measured as √reliability. :func:`score` holds its PCC beside it once it is in the table.

    Parameters
    ----------
    sdata
        Spots, and a table with counts; no image is needed. A table by itself will do, with places in ``obsm["spatial"]``.
    layer
        Counts, a key of ``layers`` or ``"X"``.
    genes
        Names, one name, or a boolean column of ``var``. `None` means all. Totals are those of all genes in any case.
    n_draws
        Divisions to average over.
    min_count
        Spots with fewer counts are left out: next to nothing was caught there, and what their halves agree in is that each of
        few counts, normalised, weighs hundreds of 10,000. On sections C2 to C5 of the HER2+ set 5 of 732 spots have fewer than
        100, and lift the median of 250 genes from 0.64 to 0.67; leaving out more, up to 1,000 counts, hardly changes it.
    random_state
        Seed.
    table_key, shapes_key
        Which elements to use, as in :func:`stpredict.pp.color_histogram`. `None` finds them.
    section_key
        Column of ``obs`` that names sections. `None` means the table's region column.
    key_added
        Where the results go; :func:`score` looks under the default.
    inplace
        Write them into the table.

    Returns
    -------
    One row for each gene and section, and each gene with ``section`` "mean of sections" (for which *r* is averaged):
    ``gene``, ``section``, ``ceiling``, its standard ``error``, ``reliability`` and ``n`` (spots). NaN for genes of which too
    little was seen.

    With ``inplace=True``, written to the table (after everything has succeeded):

    ``var["noise_ceiling"]``, ``var["noise_ceiling_error"]``
        Of the mean over sections of the halves' PCC, and standard errors; NaN for genes that were not asked for.
    ``uns["noise_ceiling"]``
        ``genes`` (G) and ``sections`` (S); ``ceiling``, ``error``, ``halves_pcc`` and ``halves_error`` (S x G); ``n`` (S);
        ``layer``, ``n_draws``, ``min_count`` and ``random_state``.

    Raises
    ------
    KeyError, TypeError, ValueError
        Elements, genes or arguments that do not fit, values that are no counts, or no section with 3 spots; the table is
        then unchanged.

    Notes
    -----
    It is the ceiling that noise in counting sets: what differs between two sequencings of one library. What else differs from
    spot to spot for no reason in the tissue (capture, diffusion) counts as signal, so the ceiling may be higher than anything
    can reach. It holds for log1p of counts per 10,000 of all genes. Where totals differ much between spots, it comes out some
    0.05 too high for genes of few counts: the logarithm of few counts depends on the spot's total, which both halves share.

    The error is the infinitesimal jackknife over spots of the averaged *r*, each spot with its draws, and holds what the draws
    and what the choice of spots contribute. Genes seen in fewer than 10 spots get no ceiling: a single spot would make it. A
    ceiling below 0.1, or of an *r* that is not above 0 at the level of 0.05, is not told from none: :func:`score` gives no part
    of it.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> ceilings = stp.tl.noise_ceiling(sdata)
    >>> bool(sdata["table"].var["noise_ceiling"].max() <= 1)
    True
    """
    for name, number, least in (("n_draws", n_draws, 1), ("min_count", min_count, 1)):
        if not (isinstance(number, int | np.integer) and number >= least):
            raise ValueError(f"`{name}` is {number!r}; expected a whole number, at least {least}.")
    elements = Elements(table_key=table_key, shapes_key=shapes_key, section_key=section_key)
    slide = open_slide(sdata, elements, images=False)
    table = slide.table
    if inplace:
        Slots(key_added, var={key_added: None, f"{key_added}_error": None}).check(table)
    counts = _read_counts(table, layer)
    columns = np.arange(table.n_vars) if genes is None else select_genes(table, counts, genes)
    if not len(columns):
        raise ValueError("No gene is chosen; name some with `genes`.")
    section_of, in_tissue = slide.section_of, slide.in_tissue
    names = list(dict.fromkeys(name for spots in slide.spots for name in section_of[spots.rows]))
    rng = np.random.default_rng(random_state)
    pcc, error, kept, n_spots = [], [], [], []
    for name in tqdm(names, desc="Noise ceiling", delay=2, leave=False):
        of_section = counts[np.flatnonzero((section_of == name) & in_tissue)]
        deep = np.asarray(of_section.sum(axis=1)).ravel() >= min_count
        if not deep.all():
            logg.info(
                f"{(~deep).sum()} of {len(deep)} spots in section {name!r} have fewer than {min_count} counts: left out."
            )
        if deep.sum() < _MIN_SPOTS:
            logg.warning(f"Section {name!r} has {deep.sum()} spots with {min_count} counts; it is left out.")
            continue
        halves = correlate_halves(of_section[deep], columns, n_draws, rng)
        pcc.append(halves.pcc)
        error.append(halves.error)
        kept.append(name)
        n_spots.append(int(deep.sum()))
    if not kept:
        raise ValueError(
            f"No section has {_MIN_SPOTS} spots with at least {min_count} counts in `layers[{layer!r}]`. Are these the counts? "
            "Lower `min_count` if they are."
        )
    halves = Halves(np.stack(pcc), np.stack(error))
    of_sections, over_sections = ceiling(halves), ceiling(mean_halves(halves))
    found_genes = table.var_names[columns]
    if inplace:
        entry = {
            "genes": list(found_genes),
            "sections": kept,
            "ceiling": of_sections.value,
            "error": of_sections.error,
            "halves_pcc": halves.pcc,
            "halves_error": halves.error,
            "n": np.array(n_spots),
            "layer": layer,
            "n_draws": int(n_draws),
            "min_count": int(min_count),
            "random_state": int(random_state),
        }
        of_genes = {key_added: over_sections.value, f"{key_added}_error": over_sections.error}
        of_all = {name: np.full(table.n_vars, np.nan) for name in of_genes}
        for name, values in of_genes.items():
            of_all[name][columns] = values
        Slots(key_added, entry=entry, var=of_all).write(table)
    names = [*kept, MEAN]
    value = np.vstack([of_sections.value, over_sections.value])
    return pd.DataFrame(
        {
            "gene": pd.Categorical(np.tile(found_genes, len(names)), categories=found_genes),
            "section": pd.Categorical(np.repeat(names, len(columns)), categories=names),
            "ceiling": value.ravel(),
            "error": np.vstack([of_sections.error, over_sections.error]).ravel(),
            "reliability": (value**2).ravel(),
            "n": np.repeat([*n_spots, sum(n_spots)], len(columns)),
        }
    )


def _read_counts(table: AnnData, layer: str) -> sp.csr_matrix:
    if layer != "X" and layer not in layer_names(table):
        raise KeyError(
            f"No layer {layer!r} in the table; it has {listed(layer_names(table))}. The ceiling is estimated from counts: keep "
            "them with `adata.layers['counts'] = adata.X.copy()` before normalising."
        )
    counts = read_csr(table, layer)
    values = counts.data
    if not np.isfinite(values).all() or (values < 0).any() or not np.array_equal(values, np.rint(values)):
        example = values[~np.isfinite(values) | (values < 0) | (values != np.rint(values))][0]
        raise ValueError(
            f"{where_is(layer)} holds {example:g}, which is no count; expected whole numbers of at least 0. Name the layer that "
            "holds the counts with `layer`: once normalised, they cannot be divided."
        )
    if (largest := float(values.max(initial=0))) > MAX_COUNT:
        raise ValueError(
            f"{where_is(layer)} holds {largest:g}, which is too large for a count; expected whole numbers of at most {MAX_COUNT}. "
            "Name the layer that holds the counts with `layer`, or undo what these were multiplied by."
        )
    return counts
