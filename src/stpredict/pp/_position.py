"""Positions of spots as features: what can be predicted without looking at the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stpredict._data.spots import Spots

# Tents along each side of a section; each falls to 0 at the peaks of the next.
_KNOTS = 9
# A tent that reaches no training spot with this part of its height is left out: nothing would hold its weight.
_REACHED = 0.7


def frames(spots: Sequence[Spots]) -> dict[str, list[float]]:
    """Center (x, y) and half the longer side of the box around each section's spots, in the spots' own coordinates."""
    found = {}
    for section in spots:
        low, high = section.xy.min(axis=0), section.xy.max(axis=0)
        x, y = (low + high) / 2
        found[section.name] = [float(x), float(y), float((high - low).max() / 2) or 1.0]
    return found


def position_basis(spots: Sequence[Spots], n_obs: int, known: Mapping[str, Sequence[float]]) -> np.ndarray:
    """A basis of the place in a section: tents on a grid, between whose peaks a weighted sum of them interpolates.

    Tents end where the next begin, and overlap little. So what is fitted to training spots goes back to their mean within the
    distance of two peaks from them; bumps that overlap more (Gaussian ones) cancel each other's weights where they were
    fitted, and nowhere else.

    The first 81 columns are shared by all sections. For each of the ``known`` sections the same columns follow once more
    and are zero everywhere else, so that a regression smooths within a section that it has seen, and for any other
    section falls back to what its sections share.

    Parameters
    ----------
    spots
        Places.
    n_obs
        Rows of the table.
    known
        The :func:`frames` that tell sections apart: one of the same name elsewhere is another one.

    Returns
    -------
    ``(n_obs, 81 * (1 + len(known)))`` float32; NaN for rows without a spot.
    """
    knots = np.linspace(-1, 1, _KNOTS)
    n_tents = _KNOTS**2
    basis = np.full((n_obs, n_tents * (1 + len(known))), np.nan, dtype=np.float32)
    for section, frame in zip(spots, frames(spots).values(), strict=True):
        place = (section.xy - frame[:2]) / frame[2]
        x, y = np.maximum(1 - np.abs(place[:, :, None] - knots) / (knots[1] - knots[0]), 0).transpose(1, 0, 2)
        tents = (y[:, :, None] * x[:, None, :]).reshape(len(place), n_tents)
        basis[section.rows] = 0
        basis[section.rows, :n_tents] = tents
        for i, (name, known_frame) in enumerate(known.items(), start=1):
            if name == section.name and np.allclose(frame, known_frame, rtol=1e-6):
                basis[section.rows, i * n_tents : (i + 1) * n_tents] = tents
    return basis


def reached(basis: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Columns of the tents that training spots reach, one at least; away from them, all of these are zero."""
    heights = basis[rows].max(axis=0)
    return np.flatnonzero(heights >= min(_REACHED, heights.max()))
