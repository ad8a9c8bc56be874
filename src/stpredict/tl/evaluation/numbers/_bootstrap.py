"""Intervals of means over sections, by resampling the patients or sections that they come from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_LEVELS = (0.025, 0.975)


def bootstrap_interval(
    values: np.ndarray, groups: Sequence[str], *, n_bootstrap: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals (percentiles) of means over sections.

    Whole groups are drawn, as many as there are, with all their sections: sections of one patient are no independent
    witnesses.

    Parameters
    ----------
    values
        ``(S, G)``; NaN does not count.
    groups
        ``S`` names.
    n_bootstrap
        Draws.
    rng
        Randomness.

    Returns
    -------
    Lower and upper ends, ``(G,)`` each; NaN with fewer than 2 groups that have a value.
    """
    kinds, of_section = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if len(kinds) < 2 or n_bootstrap < 1:
        return np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    weights = rng.multinomial(len(kinds), np.full(len(kinds), 1 / len(kinds)), size=n_bootstrap)[:, of_section].T
    there = np.isfinite(values)
    n = there.T.astype(np.float64) @ weights
    means = np.divide(np.where(there, values, 0.0).T @ weights, n, out=np.full(n.shape, np.nan), where=n > 0)
    n_groups = sum(there[of_section == kind].any(axis=0).astype(int) for kind in range(len(kinds)))
    several = n_groups >= 2
    low, high = np.full((2, values.shape[1]), np.nan)
    if several.any():  # constants have no correlation in any section
        low[several], high[several] = _quantiles(means[several])
    return low, high


def _quantiles(means: np.ndarray) -> np.ndarray:
    """Of each row, all rows at once; only those with a NaN are taken one by one."""
    found = np.quantile(means, _LEVELS, axis=1)
    if (missing := np.isnan(means).any(axis=1)).any():
        found[:, missing] = np.nanquantile(means[missing], _LEVELS, axis=1)
    return found
