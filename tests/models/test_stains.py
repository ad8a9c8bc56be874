from __future__ import annotations

import numpy as np
import pytest
import torch

from stpredict.models.nsl._stains import RUIFROK_JOHNSTON, inverse, stain_matrix, unmixing


def test_two_vectors_get_a_residual_at_right_angles() -> None:
    matrix = stain_matrix(RUIFROK_JOHNSTON)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1)
    np.testing.assert_allclose(matrix[2] @ matrix[:2].T, 0, atol=1e-12)
    np.testing.assert_allclose(matrix[:2] / matrix[:2, :1], RUIFROK_JOHNSTON / RUIFROK_JOHNSTON[:, :1])


def test_three_vectors_are_scaled_to_unit_length() -> None:
    rows = np.array([[2.0, 0, 0], [0, 0.1, 0], [0, 3, 4]])
    expected = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0.6, 0.8]])
    np.testing.assert_allclose(stain_matrix(rows.tolist()), expected)


@pytest.mark.parametrize(
    "stains", [np.ones(3), np.ones((3, 2)), np.ones((4, 3)), [[1, 0, 0], [0, np.nan, 1]], [[np.inf, 0, 0], [0, 1, 0]]]
)
def test_other_shapes_and_values(stains: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"have the shape .*; expected finite values of shape \(2, 3\) or \(3, 3\)"):
        stain_matrix(stains)


@pytest.mark.parametrize(
    "stains",
    [
        [[1, 2, 3], [2, 4, 6]],
        [[0, 0, 0], [1, 0, 0]],
        [[1, 0, 0], [0, 1, 0], [1, 1, 0]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 0]],
    ],
)
def test_vectors_that_separate_nothing(stains: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="separate no stains"):
        stain_matrix(stains)


def test_inverse_and_unmixing() -> None:
    matrices = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 5, 3, 3)))
    torch.testing.assert_close(inverse(matrices), torch.linalg.inv(matrices))
    torch.testing.assert_close(unmixing(matrices), torch.linalg.inv(matrices)[..., :2])


def test_a_singular_matrix_is_survived() -> None:
    assert not inverse(torch.ones(2, 3, 3)).isfinite().any()
