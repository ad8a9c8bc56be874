"""P-values of correlations between maps that are smooth, against maps of the same smoothness.

Neighbouring spots are alike. Shuffled spots are not, so correlations with them are smaller than those between two smooth maps
that have nothing to do with each other: against shuffled spots, every third pair of such maps is "significant". The null here
is Moran spectral randomisation (Wagner & Dray 2015): a map is a sum of the modes of the tissue's graph of neighbours, from
one end of the tissue to the other down to single spots, and random maps are made by turning modes upside down. They have
the map's mean, variance and Moran's I, the tissue's outline, and no edges that were not there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm.auto import tqdm

from stpredict.tl._metrics import Pairs, neighbour_graph
from stpredict.tl._parts import Matrix, Part, gene_chunks

# Modes cost the cube of the number of spots: a quarter of a minute and 0.5 GB here, eight times that for twice as many.
_MAX_SPOTS = 5000
# Draws that repeat the observed arrangement do so up to rounding.
_ROUNDING = 1e-5


def permutation_p_values(
    measured: Matrix,
    predicted: Matrix,
    columns: np.ndarray,
    parts: Sequence[Part],
    *,
    n_permutations: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """How often the mean over sections of a gene's PCC is reached by chance, one-sided.

    A missing value counts as the gene's mean. Of sections of more than 5,000 spots a grid of at most so many is taken.

    Parameters
    ----------
    measured, predicted
        ``(n_obs, n_vars)``.
    columns
        ``G`` genes to test.
    parts
        Sections.
    n_permutations
        Random maps; all genes share them.
    rng
        Randomness.

    Returns
    -------
    ``(G,)`` (1 + draws that reach the observed mean) / (1 + draws); NaN where no section has a PCC.
    """
    total = np.zeros((n_permutations + 1, len(columns)), dtype=np.float32)
    n_defined = np.zeros(len(columns), dtype=np.int64)
    for part in tqdm(parts, desc="Permutations", delay=2, leave=False):
        thinned = _thin(part.xy, _MAX_SPOTS)
        modes = spatial_modes(part.xy[thinned])
        signs = rng.choice(np.array([-1, 1], dtype=np.float32), size=(n_permutations + 1, len(modes)))
        signs[0] = 1  # what was observed
        chunks = zip(
            gene_chunks(measured, part.rows[thinned], columns),
            gene_chunks(predicted, part.rows[thinned], columns),
            strict=True,
        )
        for (genes, x), (_, y) in chunks:
            products = _mode_products(x, y, modes)
            defined = np.isfinite(products).all(axis=1)
            total[:, genes] += signs @ np.where(defined[:, None], products, 0).T
            n_defined[genes] += defined
    mean = total / np.maximum(n_defined, 1)
    reached = (mean[1:] >= mean[0] - _ROUNDING).sum(axis=0)
    return np.where(n_defined > 0, (1 + reached) / (1 + n_permutations), np.nan)


def spatial_modes(xy: np.ndarray) -> np.ndarray:
    """``(n, n)`` orthonormal maps as columns, from smooth to rough: eigenvectors of the neighbours' graph Laplacian."""
    graph = neighbour_graph(xy).toarray()
    return np.linalg.eigh(np.diag(graph.sum(axis=1)) - graph)[1].astype(np.float32)


def _mode_products(x: np.ndarray, y: np.ndarray, modes: np.ndarray) -> np.ndarray:
    """``(G, n)`` parts that modes have in the genes' PCC, which is their sum; NaN where it is not defined."""
    pairs = Pairs(x, y)
    products = (pairs.xc.astype(np.float32) @ modes) * (pairs.yc.astype(np.float32) @ modes)
    return products / pairs.scale()[:, None]


def _thin(xy: np.ndarray, n_max: int) -> np.ndarray:
    """Positions of all spots, or of one in each cell of the finest square grid of which at most ``n_max`` cells have any."""
    chosen = np.arange(len(xy))
    low, extent = xy.min(axis=0), np.ptp(xy, axis=0).max()
    n_cells = int(np.sqrt(len(xy)))
    while len(chosen) > n_max:
        n_cells = int(0.95 * n_cells)
        chosen = np.unique(((xy - low) / extent * n_cells).astype(np.int64), axis=0, return_index=True)[1]
    return np.sort(chosen)
