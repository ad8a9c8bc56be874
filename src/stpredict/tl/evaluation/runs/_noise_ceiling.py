"""How well the assay itself would predict what it measured: the highest PCC that any predictor can reach."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stpredict._data import slots
from stpredict._data.slide import read_spots, read_table
from stpredict._data.slots import Halves
from stpredict.tl.evaluation.numbers._metrics import mean_of_known
from stpredict.tl.evaluation.runs._parts import MEAN, section_names
from stpredict.tl.fitting._targets import select_genes

_TARGET_SUM = 1e4
_MIN_SPOTS = 3
# A gene that is seen in fewer spots has a correlation that a single spot can make or break, and no error that tells so.
_MIN_SEEN = 10
# Counts that are worked on at a time.
_BLOCK = 2**19
# A ceiling is told from none where it is as high as this, and the halves' PCC above 0 at the level of 0.05, one-sided.
_MIN_CEILING, _MIN_ERRORS = 0.1, 1.645


class Ceiling(NamedTuple):
    """Highest PCC, its standard error, and whether it is told from none; the shape of the halves' PCC."""

    value: np.ndarray
    error: np.ndarray
    determined: np.ndarray


def noise_ceiling(
    sdata: SpatialData,
    *,
    layer: str = "counts",
    genes: str | Sequence[str] | None = None,
    n_draws: int = 20,
    min_count: int = 100,
    random_state: int = 0,
    table_key: str | None = None,
    shapes_key: str | Sequence[str] | None = None,
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
        Spots, and a table with counts; no image is needed.
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
    _, table = read_table(sdata, table_key)
    slots.check_noise_ceiling_key(table, key_added)
    counts = _read_counts(table, layer)
    columns = np.arange(table.n_vars) if genes is None else select_genes(table, counts, genes)
    if not len(columns):
        raise ValueError("No gene is chosen; name some with `genes`.")
    sections = read_spots(sdata, table, shapes_key=shapes_key)
    names = section_names(sections, table)
    rng = np.random.default_rng(random_state)
    pcc, error, kept, n_spots = [], [], [], []
    for section, name in zip(tqdm(sections, desc="Noise ceiling", delay=2, leave=False), names, strict=True):
        of_section = counts[section.rows]
        deep = np.asarray(of_section.sum(axis=1)).ravel() >= min_count
        if not deep.all():
            logg.info(
                f"{(~deep).sum()} of {len(deep)} spots in section {name!r} have fewer than {min_count} counts: left out."
            )
        if deep.sum() < _MIN_SPOTS:
            logg.warning(f"Section {name!r} has {deep.sum()} spots with {min_count} counts; it is left out.")
            continue
        halves = _correlate_halves(of_section[deep], columns, n_draws, rng)
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
        made_of = {
            "sections": np.array(kept, dtype=object),
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
        slots.write_noise_ceiling(table, key_added, found_genes, over_sections.value, over_sections.error, made_of)
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


def ceiling(halves: Halves) -> Ceiling:
    """What the halves' PCC means for the whole."""
    value = _ceiling(halves.pcc)
    error = (_ceiling(halves.pcc + halves.error) - _ceiling(halves.pcc - halves.error)) / 2
    return Ceiling(value, error, (value >= _MIN_CEILING) & (halves.pcc >= _MIN_ERRORS * halves.error))


def mean_halves(halves: Halves) -> Halves:
    """``(G,)`` mean over the sections where it is known.

    Ceilings are never below 0, so that their mean would be above 0 for noise: the halves' PCC, which averages out, is
    averaged in their place.
    """
    n = np.isfinite(halves.pcc).sum(axis=0)
    error = np.sqrt(mean_of_known(halves.error**2) / np.maximum(n, 1))
    return Halves(mean_of_known(halves.pcc), error)


def _read_counts(table: AnnData, layer: str) -> sp.csr_matrix:
    if layer != "X" and layer not in table.layers:
        raise KeyError(
            f"No layer {layer!r} in the table; it has {list(table.layers)}. The ceiling is estimated from counts: keep them with "
            "`adata.layers['counts'] = adata.X.copy()` before normalising."
        )
    matrix = table.X if layer == "X" else table.layers[layer]
    if matrix is None:
        raise ValueError(f"The table has no `X`. Name the layer that holds the counts; it has {list(table.layers)}.")
    counts = sp.csr_matrix(matrix)
    where = "`X`" if layer == "X" else f"`layers[{layer!r}]`"
    values = counts.data
    if not np.isfinite(values).all() or (values < 0).any() or not np.array_equal(values, np.rint(values)):
        example = values[~np.isfinite(values) | (values < 0) | (values != np.rint(values))][0]
        raise ValueError(
            f"{where} holds {example:g}, which is no count; expected whole numbers of at least 0. Name the layer that holds "
            "the counts with `layer`: once normalised, they cannot be divided."
        )
    return counts


def _correlate_halves(counts: sp.csr_matrix, columns: np.ndarray, n_draws: int, rng: np.random.Generator) -> Halves:
    """``(G,)`` PCC of the halves, averaged over draws, and its standard error; NaN for genes that are hardly ever seen.

    Both come from sums over the counts that are not 0: all zeros of a gene are alike.
    """
    n_spots, n_genes = counts.shape[0], len(columns)
    others = np.setdiff1d(np.arange(counts.shape[1]), columns)
    by_gene = sp.csc_matrix(counts)[:, np.concatenate([columns, others])]
    by_gene.eliminate_zeros()
    whole, spot, ends = by_gene.data.astype(np.int32), by_gene.indices, by_gene.indptr
    half = np.empty_like(whole)
    blocks = _blocks(ends, 0, n_genes)
    r, influence, influence_of_zero = np.zeros(n_genes), np.zeros(ends[n_genes], dtype=np.float32), np.zeros(n_genes)
    for _ in range(n_draws):
        total = np.zeros((2, n_spots))
        for _, stored in [*blocks, *_blocks(ends, n_genes, counts.shape[1])]:
            half[stored] = rng.binomial(whole[stored], 0.5)
            for of_half, values in zip(total, (half[stored], whole[stored] - half[stored]), strict=True):
                of_half += np.bincount(spot[stored], weights=values, minlength=n_spots)
        scale = _TARGET_SUM / np.maximum(total, 1)
        for genes, stored in blocks:
            x = np.log1p(scale[0, spot[stored]] * half[stored])
            y = np.log1p(scale[1, spot[stored]] * (whole[stored] - half[stored]))
            of_genes = _correlate(x, y, np.diff(ends[genes.start : genes.stop + 1]), n_spots)
            r[genes] += of_genes.r / n_draws
            influence[stored] += of_genes.influence
            influence_of_zero[genes] += of_genes.influence_of_zero
    n_seen = np.diff(ends)[:n_genes]
    squares = np.zeros(n_genes)
    for genes, stored in blocks:
        gene = np.repeat(np.arange(genes.stop - genes.start), n_seen[genes])
        squares[genes] = np.bincount(gene, weights=influence[stored] ** 2, minlength=genes.stop - genes.start)
    error = np.sqrt(squares + (n_spots - n_seen) * influence_of_zero**2) / n_draws / n_spots
    seen = n_seen >= _MIN_SEEN
    return Halves(np.where(seen, r, np.nan), np.where(seen, error, np.nan))


class _Correlations(NamedTuple):
    """``(G,)`` ``r``, and the influence on it of each value that is stored, and ``(G,)`` of each zero."""

    r: np.ndarray
    influence: np.ndarray
    influence_of_zero: np.ndarray


def _correlate(x: np.ndarray, y: np.ndarray, n_stored: np.ndarray, n_spots: int) -> _Correlations:
    """Of genes, from their stored values one gene after the other."""
    gene = np.repeat(np.arange(len(n_stored)), n_stored)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(gene, weights=values, minlength=len(n_stored)) / n_spots

    mean_x, mean_y = mean(x), mean(y)
    sd_x = np.sqrt(np.maximum(mean(x * x) - mean_x**2, 0))
    sd_y = np.sqrt(np.maximum(mean(y * y) - mean_y**2, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (mean(x * y) - mean_x * mean_y) / (sd_x * sd_y)
        stored = _influence((x - mean_x[gene]) / sd_x[gene], (y - mean_y[gene]) / sd_y[gene], r[gene])
        return _Correlations(r, stored, _influence(-mean_x / sd_x, -mean_y / sd_y, r))


def _blocks(ends: np.ndarray, first: int, last: int) -> list[tuple[slice, slice]]:
    """Cut genes so that each cut has about so many stored values: genes, and where their values are."""
    wanted = np.arange(ends[first], ends[last], _BLOCK)
    cuts = np.unique([first, *np.searchsorted(ends, wanted, side="right")[1:] - 1, last])
    return [(slice(a, b), slice(int(ends[a]), int(ends[b]))) for a, b in pairwise(cuts)]


def _influence(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Of one standardised pair on the correlation: what the jackknife of an infinitely small weight gives."""
    return x * y - r * (x * x + y * y) / 2


def _ceiling(r: np.ndarray) -> np.ndarray:
    """Root of Spearman and Brown's reliability of the whole, from the correlation of its halves."""
    r = np.clip(r, 0, 1)
    return np.sqrt(2 * r / (1 + r))
