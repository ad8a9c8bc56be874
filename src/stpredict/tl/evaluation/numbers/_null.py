"""P-values of correlations between maps that are smooth, against maps of the same smoothness.

Neighbouring spots are alike. Shuffled spots are not, so correlations with them are smaller than those between two smooth maps
that have nothing to do with each other: against shuffled spots, every third pair of such maps is "significant". The null here is
spectral randomisation (Wagner & Dray 2015): a map is a sum of modes, from one end of the tissue to the other down to single
spots, and random maps are made by turning modes upside down. They have the map's mean, variance and share of each scale, the
tissue's outline, and no edges that were not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.spatial.distance import cdist
from tqdm.auto import tqdm

from stpredict.tl.evaluation.numbers._parts import Matrix, Part, by_gene, slices
from stpredict.tl.evaluation.numbers._sides import Measured, Side, exponents

# Modes cost the cube of the number of spots: some seconds and 0.3 GB here. A PCC of 0.05 is already told from chance.
_MAX_SPOTS = 3000
# Draws that repeat the observed arrangement do so up to rounding.
_ROUNDING = 1e-5


def permutation_p_values(
    measured: Matrix,
    predictions: Mapping[str, Matrix],
    columns: np.ndarray,
    parts: Sequence[Part],
    *,
    n_perms: int,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """How often the mean over sections of a gene's PCC is reached by chance, one-sided.

    A missing value counts as the gene's mean. Of a section of more than 3,000 spots so many are taken, at random.

    Parameters
    ----------
    measured
        ``(n_obs, n_vars)``.
    predictions
        By model, as ``measured``.
    columns
        ``G`` genes to test.
    parts
        Sections.
    n_perms
        Random maps; all genes and models share them.
    rng
        Randomness.

    Returns
    -------
    By model, ``(G,)`` (1 + draws that reach the observed mean) / (1 + draws); NaN where no section has a PCC.
    """
    total = {name: np.zeros((n_perms + 1, len(columns)), dtype=np.float32) for name in predictions}
    n_defined = {name: np.zeros(len(columns), dtype=np.int64) for name in predictions}
    for part in tqdm(parts, desc="Permutations", delay=2, leave=False):
        n_spots = min(len(part.rows), _MAX_SPOTS)
        taken = np.sort(rng.choice(len(part.rows), n_spots, replace=False))
        modes = spatial_modes(part.xy[taken])
        signs = rng.choice(np.array([-1.0, 1.0]), size=(n_perms + 1, n_spots))
        signs[0] = 1  # what was observed
        rows = part.rows[taken]
        x = by_gene(measured, rows, columns)
        readers = {name: by_gene(predicted, rows, columns) for name, predicted in predictions.items()}
        for genes in slices(len(columns), n_spots):
            of_genes = Measured(x(genes))
            kept: tuple[Side, _Modes] | None = None
            for name, y in readers.items():
                ((one, other),) = of_genes.beside(y(genes))
                defined = one.varies & other.varies
                if not defined.any():  # of constants, modes need not be looked for
                    continue
                if kept is None or kept[0] is not one:
                    kept = one, _Modes(one, modes)
                products = np.where(defined[:, None], kept[1].products(_Modes(other, modes)), 0)
                total[name][:, genes] += signs @ products.T
                n_defined[name][genes] += defined
    return {name: _p_values(total[name], n_defined[name]) for name in predictions}


def _p_values(total: np.ndarray, n_defined: np.ndarray) -> np.ndarray:
    mean = total / np.maximum(n_defined, 1)
    reached = (mean[1:] >= mean[0] - _ROUNDING).sum(axis=0)
    return np.where(n_defined > 0, (1 + reached) / len(mean), np.nan)


def spatial_modes(xy: np.ndarray) -> np.ndarray:
    """``(n, n)`` orthonormal maps as columns, from the constant and rough ones to smooth ones.

    They are the principal components of maps whose values differ the more, the farther apart two spots lie (a variogram that
    grows with distance). Nothing is to be chosen for them, neither neighbours nor a range.
    """
    distances = cdist(xy, xy)
    mean = distances.mean(axis=0)
    return np.linalg.eigh(mean + mean[:, None] - distances - mean.mean())[1].astype(np.float32)


class _Modes:
    """``(G, n)`` how much of each mode is in a side, about 1 together so that float32 can hold it, and ``(G,)`` its norm."""

    def __init__(self, side: Side, modes: np.ndarray) -> None:
        norm = np.sqrt(side.squares)
        unit = np.ldexp(1.0, -exponents(norm))
        self._norm = norm * unit
        self._shares = (side.centered * unit[:, None]).astype(np.float32) @ modes

    def products(self, other: _Modes) -> np.ndarray:
        """``(G, n)`` parts that modes have in the PCC, which is their sum."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._shares * other._shares / (self._norm * other._norm)[:, None]
