"""Stain matrices: rows hematoxylin, eosin and residual, each a unit vector in optical-density space."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# Ruifrok & Johnston 2001, Anal Quant Cytol Histol 23:291-299, hematoxylin and eosin.
RUIFROK_JOHNSTON = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])


def stain_matrix(stains: Any) -> np.ndarray:
    """Make a stain matrix of two or three stain vectors.

    Parameters
    ----------
    stains
        ``(2, 3)`` or ``(3, 3)`` optical densities of hematoxylin, eosin (and the residual) in red, green and blue, of
        any positive length. A missing residual is the direction at right angles to both.

    Returns
    -------
    ``(3, 3)`` with unit rows.

    Raises
    ------
    ValueError
        Another shape, values that are not finite, or vectors that do not span three dimensions.
    """
    rows = np.asarray(stains, dtype=np.float64)
    if rows.shape not in ((2, 3), (3, 3)) or not np.isfinite(rows).all():
        raise ValueError(
            f"Stain vectors have the shape {rows.shape}; expected finite values of shape (2, 3) or (3, 3): "
            "hematoxylin, eosin (and a residual) by red, green, blue."
        )
    if len(rows) == 2:
        rows = np.vstack([rows, np.cross(rows[0], rows[1])])
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if (norms == 0).any() or abs(np.linalg.det(rows / norms)) < 1e-3:
        raise ValueError(f"The stain vectors\n{rows}\nlie in one plane or line, so they separate no stains.")
    return rows / norms


def inverse(stains: torch.Tensor) -> torch.Tensor:
    """Inverse of each stain matrix; not finite where one is singular, which no solver need survive.

    Parameters
    ----------
    stains
        ``(..., 3, 3)``.
    """
    first, second, third = stains.unbind(-2)
    columns = [torch.linalg.cross(a, b) for a, b in ((second, third), (third, first), (first, second))]
    determinant = (first * columns[0]).sum(-1)[..., None, None]
    return torch.stack(columns, dim=-1) / determinant


def unmixing(stains: torch.Tensor) -> torch.Tensor:
    """First two columns of the inverse of each stain matrix, ``(..., 3, 2)``: optical density to concentrations."""
    return inverse(stains)[..., :2]
