"""P-values of correlations between maps that are smooth, against maps of the same smoothness.

Neighbouring spots are alike. Shuffled spots are not, so correlations with them are smaller than those between two smooth maps
that have nothing to do with each other: against shuffled spots, every third pair of such maps is "significant". The null here is
spectral randomisation (Wagner & Dray 2015): a map is a sum of modes, from one end of the tissue to the other down to single
spots, and random maps are made by turning modes upside down. They have the map's mean, variance and share of each scale, the
tissue's outline, and no edges that were not there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import cdist
from tqdm.auto import tqdm

from stpredict.tl.evaluation.numbers._metrics import Pairs
from stpredict.tl.evaluation.runs._parts import Matrix, Part, by_gene, slices

# Modes cost the cube of the number of spots: some seconds and 0.3 GB here. A PCC of 0.05 is already told from chance.
_MAX_SPOTS = 3000
# Draws that repeat the observed arrangement do so up to rounding.
_ROUNDING = 1e-5


def permutation_p_values(
    measured: Matrix,
    predicted: Matrix,
    columns: np.ndarray,
    parts: Sequence[Part],
    *,
    n_perms: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """How often the mean over sections of a gene's PCC is reached by chance, one-sided.

    A missing value counts as the gene's mean. Of a section of more than 3,000 spots so many are taken, at random.

    Parameters
    ----------
    measured, predicted
        ``(n_obs, n_vars)``.
    columns
        ``G`` genes to test.
    parts
        Sections.
    n_perms
        Random maps; all genes share them.
    rng
        Randomness.

    Returns
    -------
    ``(G,)`` (1 + draws that reach the observed mean) / (1 + draws); NaN where no section has a PCC.
    """
    total = np.zeros((n_perms + 1, len(columns)), dtype=np.float32)
    n_defined = np.zeros(len(columns), dtype=np.int64)
    for part in tqdm(parts, desc="Permutations", delay=2, leave=False):
        n_spots = min(len(part.rows), _MAX_SPOTS)
        taken = np.sort(rng.choice(len(part.rows), n_spots, replace=False))
        modes = spatial_modes(part.xy[taken])
        signs = rng.choice(np.array([-1, 1], dtype=np.float32), size=(n_perms + 1, n_spots))
        signs[0] = 1  # what was observed
        rows = part.rows[taken]
        x, y = by_gene(measured, rows, columns), by_gene(predicted, rows, columns)
        for genes in slices(len(columns), n_spots):
            products = _mode_products(x(genes), y(genes), modes)
            defined = np.isfinite(products).all(axis=1)
            total[:, genes] += signs @ np.where(defined[:, None], products, 0).T
            n_defined[genes] += defined
    mean = total / np.maximum(n_defined, 1)
    reached = (mean[1:] >= mean[0] - _ROUNDING).sum(axis=0)
    return np.where(n_defined > 0, (1 + reached) / (1 + n_perms), np.nan)


def spatial_modes(xy: np.ndarray) -> np.ndarray:
    """``(n, n)`` orthonormal maps as columns, from the constant and rough ones to smooth ones.

    They are the principal components of maps whose values differ the more, the farther apart two spots lie (a variogram that
    grows with distance). Nothing is to be chosen for them, neither neighbours nor a range.
    """
    distances = cdist(xy, xy)
    mean = distances.mean(axis=0)
    return np.linalg.eigh(mean + mean[:, None] - distances - mean.mean())[1].astype(np.float32)


def _mode_products(x: np.ndarray, y: np.ndarray, modes: np.ndarray) -> np.ndarray:
    """``(G, n)`` parts that modes have in the genes' PCC, which is their sum; NaN where it is not defined."""
    pairs = Pairs(x, y)
    products = (pairs.xc.astype(np.float32) @ modes) * (pairs.yc.astype(np.float32) @ modes)
    return products / pairs.scale()[:, None]
