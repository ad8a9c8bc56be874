"""Positions of spots as features: what can be predicted without looking at the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stpredict._data.slide import Spots

# Bumps along each side of a section; each is as wide (standard deviation) as its distance to the next.
_KNOTS = 9


def frames(spots: Sequence[Spots]) -> dict[str, list[float]]:
    """Centre (x, y) and half the longer side of the box around each section's spots, in the spots' own coordinates."""
    found = {}
    for section in spots:
        low, high = section.xy.min(axis=0), section.xy.max(axis=0)
        x, y = (low + high) / 2
        found[section.name] = [float(x), float(y), float((high - low).max() / 2) or 1.0]
    return found


def position_basis(spots: Sequence[Spots], n_obs: int, known: Mapping[str, Sequence[float]]) -> np.ndarray:
    """A smooth basis of the place in a section: Gaussian bumps on a grid.

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
    n_bumps = _KNOTS**2
    basis = np.full((n_obs, n_bumps * (1 + len(known))), np.nan, dtype=np.float32)
    for section, frame in zip(spots, frames(spots).values(), strict=True):
        place = (section.xy - frame[:2]) / frame[2]
        x, y = np.exp(-(((place[:, :, None] - knots) / (knots[1] - knots[0])) ** 2) / 2).transpose(1, 0, 2)
        bumps = (y[:, :, None] * x[:, None, :]).reshape(len(place), n_bumps)
        basis[section.rows] = 0
        basis[section.rows, :n_bumps] = bumps
        for i, (name, known_frame) in enumerate(known.items(), start=1):
            if name == section.name and np.allclose(frame, known_frame, rtol=1e-6):
                basis[section.rows, i * n_bumps : (i + 1) * n_bumps] = bumps
    return basis
