"""Macenko's stain vectors of spots, by squidpy, from histograms instead of a slide."""

from __future__ import annotations

import numpy as np
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel

from stpredict.pp._histogram import ColorHistogram

# Macenko et al. 2009: pixels fainter than this are background.
_MIN_OD = 0.15
_SIDE = 512


def macenko(histogram: ColorHistogram, rows: np.ndarray) -> np.ndarray:
    """Estimate hematoxylin and eosin from the colours of some spots.

    squidpy's estimator wants an image with a tissue mask; it gets one whose pixels have the spots' colours in the
    spots' proportions, so no pixel of a slide is read and no other spot is looked at.

    Returns
    -------
    ``(3, 3)`` rows hematoxylin, eosin and their complement.

    Raises
    ------
    ValueError
        squidpy finds no plausible stains.
    """
    import squidpy as sq

    weight = np.asarray(histogram.counts[rows].sum(axis=0)).ravel() * (histogram.od.max(axis=1) > _MIN_OD)
    if not weight.any():
        raise ValueError("The training spots have no pixel darker than background; give `reference` as an array.")
    # Equally spaced quantiles of the pooled histogram.
    quantiles = (np.arange(_SIDE**2) + 0.5) / _SIDE**2
    bins = np.searchsorted(np.cumsum(weight) / weight.sum(), quantiles)
    centers = histogram.codebook.astype(np.uint8) + 2 ** (8 - histogram.bits) // 2
    pixels = centers[np.minimum(bins, len(centers) - 1)].T.reshape(3, _SIDE, _SIDE).astype(np.uint8)
    colors = SpatialData(
        images={"colours": Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=["r", "g", "b"])},
        labels={"tissue": Labels2DModel.parse(np.ones((_SIDE, _SIDE), dtype=np.int32), dims=("y", "x"))},
    )
    try:
        found = sq.experimental.im.fit_stain_reference(colors, "colours", method="macenko", tissue_mask_key="tissue")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"Macenko's method finds no plausible hematoxylin and eosin in the training spots ({error}); use "
            "reference='ruifrok' or give stain vectors."
        ) from error
    return np.asarray(found.stain_matrix).T
