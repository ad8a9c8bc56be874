from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from stpredict._data.columns import mask_or_none, read_labels, read_mask

TRUTH = [True, False, False, True]


def read(values: Any) -> np.ndarray:
    return read_mask(pd.DataFrame({"train": values}), "train", where="obs", expected="training spots")


@pytest.mark.parametrize(
    "values",
    [
        np.array(TRUTH),
        pd.array(TRUTH, dtype="boolean"),
        pd.Categorical(TRUTH),
        pd.Categorical([1, 0, 0, 1]),
        np.array(TRUTH, dtype=object),
        np.array([np.True_, 0, 0.0, 1], dtype=object),
        np.array([1, 0, 0, 1], dtype=np.uint8),
        pd.array([1, 0, 0, 1], dtype="Int64"),
        np.array([1.0, 0.0, -0.0, 1.0], dtype=np.float32),
        np.array([1.0, 0.0, 0.0, 1.0], dtype=">f8"),
        pd.arrays.SparseArray(TRUTH),
    ],
    ids=lambda values: f"{type(values).__name__}-{values.dtype}-{values[1]!r}",
)
def test_masks_of_any_dtype(values: Any) -> None:
    mask = read(values)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, TRUTH)


@pytest.mark.parametrize("values", [[True] * 4, [0.0] * 4], ids=["all", "none"])
def test_masks_of_one_value(values: list[Any]) -> None:
    np.testing.assert_array_equal(read(values), np.array(values, dtype=bool))
    assert read(np.zeros(0, dtype=bool)).shape == (0,)


@pytest.mark.parametrize(
    "values",
    [
        pd.array([True, None, False, True], dtype="boolean"),
        np.array([True, None, False, True], dtype=object),
        np.array([1, np.nan, 0, 1]),
        pd.array([1, None, 0, 1], dtype="Int64"),
        pd.Categorical([True, None, False, True]),
    ],
    ids=lambda values: f"{type(values).__name__}-{values.dtype}",
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # pandas warns of its own fillna
def test_gaps_are_refused_and_the_advice_fills_them(values: Any) -> None:
    obs = pd.DataFrame({"train": values})
    with pytest.raises(TypeError, match=r"`obs\['train'\]` has 1 missing values; expected training spots") as raised:
        read_mask(obs, "train", where="obs", expected="training spots")
    assert mask_or_none(obs, "train") is None
    _follow(str(raised.value), obs)
    np.testing.assert_array_equal(
        read_mask(obs, "train", where="obs", expected="training spots"), [True, False, False, True]
    )


@pytest.mark.parametrize(
    ("values", "true"),
    [
        (np.array(["no", "yes", "yes", "no"], dtype=object), "yes"),
        (np.array(["False", "True", "True", "False"], dtype=object), "True"),
        (np.array(["0", "1", "1", "0"], dtype=object), "1"),
        (pd.Categorical(["test", "train", "train", "test"]), "train"),
        (pd.array(["held-out", "TRAIN", "TRAIN", "held-out"], dtype="string"), "TRAIN"),
        (pd.Categorical(["tumor", "stroma", "stroma", "tumor"]), "tumor"),
        (np.array([2, 1, 1, 2]), 1),
        (np.array([2.5, 0.5, 0.5, 2.5]), 2.5),
    ],
    ids=lambda value: str(value) if isinstance(value, str | float | int) else str(value.dtype),
)
def test_other_values_are_refused_and_the_advice_makes_them_boolean(values: Any, true: Any) -> None:
    obs = pd.DataFrame({"train": values})
    with pytest.raises(TypeError, match=r"values such as \[.*expected training spots. Make it boolean") as raised:
        read_mask(obs, "train", where="obs", expected="training spots")
    assert mask_or_none(obs, "train") is None
    _follow(str(raised.value), obs)
    expected = [value == true for value in values]
    np.testing.assert_array_equal(read_mask(obs, "train", where="obs", expected="training spots"), expected)


def _follow(message: str, obs: pd.DataFrame) -> None:
    """Do what the message says, which is the last of what it quotes."""
    obs["train"] = eval(message.split("`")[-2], {"obs": obs})


@pytest.mark.parametrize(
    "odd", [np.array([{}, 1, 0, 1], dtype=object), np.array([1j, 0, 0, 1])], ids=["dict", "complex"]
)
def test_odd_values(odd: np.ndarray) -> None:
    obs = pd.DataFrame({"train": odd})
    with pytest.raises(TypeError):
        read_mask(obs, "train", where="obs", expected="training spots")
    assert mask_or_none(obs, "train") is None


def test_a_column_that_is_not_there() -> None:
    obs = pd.DataFrame({"a": [True], "b": pd.array([True], dtype="boolean"), "c": ["x"]})
    with pytest.raises(KeyError, match=r"No column 'train' in `obs`; its boolean columns are \['a', 'b'\]"):
        read_mask(obs, "train", where="obs", expected="")
    assert mask_or_none(obs, "train") is None


def test_labels() -> None:
    obs = pd.DataFrame({"patient": pd.Categorical(["p", None, "q"]), "number": [1, 2, 3]})
    assert list(read_labels(obs, "patient", np.array([0, 2]), "patient_key")) == ["p", "", "q"]
    assert list(read_labels(obs, "number", np.array([1]), "patient_key")) == ["", "2", ""]
    with pytest.raises(ValueError, match=r"`obs\['patient'\]` \(`patient_key`\) has 1 missing values"):
        read_labels(obs, "patient", np.arange(3), "patient_key")
    with pytest.raises(KeyError, match=r"`patient_key` is 'x', which `obs` lacks; it has \['patient', 'number'\]"):
        read_labels(obs, "x", np.arange(3), "patient_key")
