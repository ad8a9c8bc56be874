"""Columns of ``obs`` and ``var``: masks of any dtype, and labels."""

from __future__ import annotations

import numpy as np
import pandas as pd

from stpredict._data.messages import listed

# Words that stand for true where the advice is to compare with a value.
_YES = ("true", "yes", "t", "y", "1", "train", "training")


def read_mask(frame: pd.DataFrame, key: str, *, where: str, expected: str) -> np.ndarray:
    """Read a column of truth values, however it is stored.

    Parameters
    ----------
    frame
        ``obs`` or ``var``.
    key
        Column: boolean, nullable boolean, categorical of booleans, or 0 and 1 in any numeric dtype.
    where
        ``"obs"`` or ``"var"``, for messages.
    expected
        What its values mean, for messages.

    Returns
    -------
    ``(n,)`` bool.

    Raises
    ------
    KeyError
        No such column.
    TypeError
        Other values, or gaps.
    """
    if key not in frame:
        boolean = [name for name in frame if str(frame[name].dtype) in ("bool", "boolean")]
        raise KeyError(f"No column {key!r} in `{where}`; its boolean columns are {listed(boolean)}.")
    column = frame[key].astype(object)
    if n_gaps := int(column.isna().sum()):
        raise TypeError(
            f"`{where}[{key!r}]` has {n_gaps} missing values; expected {expected}. Fill them first, for example with "
            f"`{where}[{key!r}].astype(float).fillna(0)`."
        )
    values = column.unique()
    if not all(
        isinstance(value, bool | np.bool_ | int | np.integer | float | np.floating) and value in (0, 1)
        for value in values
    ):
        true = [value for value in values if str(value).casefold() in _YES] or values
        raise TypeError(
            f"`{where}[{key!r}]` has dtype {frame[key].dtype} and values such as {listed(values[:3])}; expected {expected}. "
            f"Make it boolean, for example with `{where}[{key!r}] == {listed(true[:1])[1:-1]}`."
        )
    return (column == 1).to_numpy(dtype=bool)  # which True is, too


def mask_or_none(frame: pd.DataFrame, key: str) -> np.ndarray | None:
    """A mask that must be there and whole to mean anything; `None` otherwise."""
    try:
        return read_mask(frame, key, where="", expected="")
    except (KeyError, TypeError):
        return None


def read_labels(obs: pd.DataFrame, key: str, rows: np.ndarray, argument: str) -> np.ndarray:
    """Labels of some rows, ``(n_obs,)`` strings; "" for all others.

    Raises
    ------
    KeyError
        No such column.
    ValueError
        Missing values in these rows.
    """
    if key not in obs:
        raise KeyError(f"`{argument}` is {key!r}, which `obs` lacks; it has {listed(obs.columns)}.")
    of_rows = obs[key].iloc[rows]
    if of_rows.isna().any():
        raise ValueError(f"`obs[{key!r}]` (`{argument}`) has {int(of_rows.isna().sum())} missing values.")
    labels = np.full(len(obs), "", dtype=object)
    labels[rows] = of_rows.astype(str).to_numpy()
    return labels
