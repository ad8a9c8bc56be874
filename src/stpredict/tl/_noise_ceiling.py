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

from stpredict import _results
from stpredict._results import Ceiling
from stpredict._sdata import read_spots, read_table
from stpredict.tl._metrics import mean_of_known
from stpredict.tl._parts import MEAN, section_names
from stpredict.tl._targets import select_genes

_TARGET_SUM = 1e4
_MIN_SPOTS = 3
# A gene that is seen in fewer spots has a correlation that a single spot can make or break, and no error that tells so.
_MIN_SEEN = 10
# A ceiling below these is not told from none: three errors are where the halves' PCC is above 0 at the level of 0.05.
_MIN_CEILING, _MIN_ERRORS = 0.1, 3.0


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
        Spots with fewer counts are left out: normalised, each of their counts would be worth more than a hundred of
        10,000, and their halves agree in little but that.
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
    One row for each gene and section, and each gene with ``section`` "mean of sections": ``gene``, ``section``, ``ceiling``,
    its standard ``error``, ``reliability`` and ``n`` (spots). NaN for genes that have no count in a section.

    With ``inplace=True``, written to the table (after everything has succeeded):

    ``var["noise_ceiling"]``, ``var["noise_ceiling_error"]``
        Means over sections, and their standard errors; NaN for genes that were not asked for.
    ``uns["noise_ceiling"]``
        ``genes`` (G) and ``sections`` (S), ``ceiling``, ``error`` and ``reliability`` (S x G), ``n`` (S), ``layer``,
        ``n_draws``, ``min_count`` and ``random_state``.

    Raises
    ------
    KeyError, TypeError, ValueError
        Elements, genes or arguments that do not fit, values that are no counts, or no section with 3 spots; the table is
        then unchanged.

    Notes
    -----
    It is the ceiling of noise in counting: what differs between two sequencings of the same library. Differences between spots
    that are neither in the tissue's image nor in its biology (capture, diffusion) count as signal, so no predictor has to
    reach it. It holds for the log-normalised expression of counts per 10,000.

    The error is the infinitesimal jackknife over spots of the averaged *r*, each spot with its draws; it holds what the draws
    and what the choice of spots contribute. A ceiling that is less than 0.1 or than three errors is not told from none, and
    :func:`score` gives no part of it.

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
    _results.check_noise_ceiling_key(table, key_added)
    counts = _read_counts(table, layer)
    columns = np.arange(table.n_vars) if genes is None else select_genes(table, counts, genes)
    if not len(columns):
        raise ValueError("No gene is chosen; name some with `genes`.")
    sections = read_spots(sdata, table, shapes_key=shapes_key)
    names = section_names(sections, table)
    rng = np.random.default_rng(random_state)
    found, kept, n_spots = [], [], []
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
        found.append(_halves_correlation(of_section[deep], columns, n_draws, rng))
        kept.append(name)
        n_spots.append(int(deep.sum()))
    if not found:
        raise ValueError(
            f"No section has {_MIN_SPOTS} spots with at least {min_count} counts in `layers[{layer!r}]`. Are these the counts? "
            "Lower `min_count` if they are."
        )
    r, r_error = np.stack([pcc for pcc, _ in found]), np.stack([error for _, error in found])
    ceiling = Ceiling(_ceiling(r), (_ceiling(r + r_error) - _ceiling(r - r_error)) / 2)
    mean = mean_ceiling(ceiling)
    reliability = _reliability(r)
    names_of_genes = table.var_names[columns]
    if inplace:
        made_of = {
            "ceiling": ceiling.value,
            "error": ceiling.error,
            "reliability": reliability,
            "n": np.array(n_spots),
            "layer": layer,
            "n_draws": int(n_draws),
            "min_count": int(min_count),
            "random_state": int(random_state),
        }
        _results.write_noise_ceiling(table, key_added, names_of_genes, kept, mean, made_of)
    rows = [
        *zip(kept, ceiling.value, ceiling.error, reliability, n_spots, strict=True),
        (MEAN, *mean, mean_of_known(reliability), sum(n_spots)),
    ]
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "gene": names_of_genes,
                    "section": section,
                    "ceiling": value,
                    "error": error,
                    "reliability": rel,
                    "n": n,
                }
            )
            for section, value, error, rel, n in rows
        ],
        ignore_index=True,
    ).astype({"gene": "category", "section": "category"})


def mean_ceiling(ceiling: Ceiling) -> Ceiling:
    """``(G,)`` mean over the sections where it is known, and its standard error."""
    n = np.isfinite(ceiling.value).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(mean_of_known(ceiling.error**2) / n)
    return Ceiling(mean_of_known(ceiling.value), error)


def is_determined(ceiling: Ceiling) -> np.ndarray:
    """Where a ceiling is told from none, so that a part of it means something."""
    return (ceiling.value >= _MIN_CEILING) & (ceiling.value >= _MIN_ERRORS * ceiling.error)


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


def _halves_correlation(
    counts: sp.csr_matrix, columns: np.ndarray, n_draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """``(G,)`` PCC of the halves, averaged over draws, and its standard error; NaN for genes that are hardly ever seen.

    Both come from sums over the counts that are not 0: all zeros of a gene are alike.
    """
    n_spots, n_genes = counts.shape[0], len(columns)
    position = np.full(counts.shape[1], -1)
    position[columns] = np.arange(n_genes)
    kept = position[counts.indices] >= 0
    gene = position[counts.indices][kept]
    whole = counts.data.astype(np.int64)
    spot = np.repeat(np.arange(n_spots), np.diff(counts.indptr))

    def over_genes(values: np.ndarray) -> np.ndarray:
        return np.bincount(gene, weights=values, minlength=n_genes)

    n_seen = np.bincount(gene, minlength=n_genes)
    r, influence, influence_of_zero = np.zeros(n_genes), np.zeros(len(gene)), np.zeros(n_genes)
    for _ in range(n_draws):
        half = rng.binomial(whole, 0.5)
        x, y = (_normalised(part, spot, n_spots)[kept] for part in (half, whole - half))
        mean_x, mean_y = over_genes(x) / n_spots, over_genes(y) / n_spots
        sd_x = np.sqrt(np.maximum(over_genes(x * x) / n_spots - mean_x**2, 0))
        sd_y = np.sqrt(np.maximum(over_genes(y * y) / n_spots - mean_y**2, 0))
        with np.errstate(divide="ignore", invalid="ignore"):
            of_draw = (over_genes(x * y) / n_spots - mean_x * mean_y) / (sd_x * sd_y)
            r += of_draw / n_draws
            influence += _influence((x - mean_x[gene]) / sd_x[gene], (y - mean_y[gene]) / sd_y[gene], of_draw[gene])
            influence_of_zero += _influence(-mean_x / sd_x, -mean_y / sd_y, of_draw)
    squares = over_genes(influence**2) + (n_spots - n_seen) * influence_of_zero**2
    error = np.sqrt(squares) / n_draws / n_spots
    seen = n_seen >= _MIN_SEEN
    return np.where(seen, r, np.nan), np.where(seen, error, np.nan)


def _influence(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Of one standardised pair on the correlation: what the jackknife of an infinitely small weight gives."""
    return x * y - r * (x * x + y * y) / 2


def _normalised(counts: np.ndarray, spot: np.ndarray, n_spots: int) -> np.ndarray:
    total = np.bincount(spot, weights=counts, minlength=n_spots)
    return np.log1p(_TARGET_SUM * counts / np.maximum(total, 1)[spot])


def _reliability(r: np.ndarray) -> np.ndarray:
    """Spearman and Brown's: of the whole, from the correlation of its halves."""
    r = np.clip(r, 0, 1)
    return 2 * r / (1 + r)


def _ceiling(r: np.ndarray) -> np.ndarray:
    return np.sqrt(_reliability(r))
