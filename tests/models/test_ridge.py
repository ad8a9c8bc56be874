from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import stpredict as stp
from stpredict.models import Ridge
from stpredict.models._ridge import _PENALTIES

GENES = [f"g{j}" for j in range(8)]


def data(n: int = 60, d: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of different scales, and genes that follow them from closely (g0) to not at all (g7)."""
    rng = np.random.default_rng(seed)
    features = rng.normal(3, 1, (n, d)) @ rng.normal(size=(d, d)) * rng.uniform(0.01, 100, d)
    standardized = (features - features.mean(axis=0)) / features.std(axis=0)
    signal = standardized @ rng.normal(size=(d, len(GENES))) * np.linspace(1, 0, len(GENES))
    return features, (5 + signal + rng.normal(size=signal.shape)).astype(np.float32)


def reads(n_features: int) -> dict[str, Any]:
    return {"kind": "features", "sources": {"X": {"from": "obsm", "n_features": n_features}}}


def fit(features: np.ndarray, expression: np.ndarray, **options: Any) -> Ridge:
    return Ridge.fit(features, expression, GENES, reads=reads(features.shape[1]), **options)


# Regression


@pytest.mark.parametrize("alpha", [0, 0.3, 50.0])
@pytest.mark.parametrize("n_components", [None, 7, 20])
def test_equal_to_scikit_learn(alpha: float, n_components: int | None) -> None:
    features, expression = data()
    steps: list[Any] = [StandardScaler()]
    if n_components == 7:
        steps.append(PCA(7, random_state=0))
    expected = make_pipeline(*steps, SklearnRidge(alpha)).fit(features, expression)
    model = fit(features, expression, alpha=alpha, n_components=n_components)
    new = data(seed=1)[0]
    np.testing.assert_allclose(model.predict(new), expected.predict(new), rtol=1e-4)
    assert model.predict(new).dtype == np.float32
    assert (model.components is not None) == (n_components == 7)
    np.testing.assert_array_equal(model.alpha, alpha)


def test_more_features_than_spots() -> None:
    features, expression = data(n=15, d=40)
    expected = make_pipeline(StandardScaler(), SklearnRidge(2.0)).fit(features, expression).predict(features)
    np.testing.assert_allclose(fit(features, expression, alpha=2.0).predict(features), expected, rtol=1e-4)
    reduced = fit(features, expression, alpha=2.0, n_components=30)  # of which 14 say something
    np.testing.assert_allclose(reduced.predict(features), expected, rtol=1e-4)


def test_degrees_of_freedom_are_the_trace_of_the_hat_matrix() -> None:
    features, expression = data()
    x = StandardScaler().fit_transform(features)
    for alpha in (0.0, 1.0, 100.0):
        hat = x @ np.linalg.solve(x.T @ x + alpha * np.eye(20), x.T)
        np.testing.assert_allclose(fit(features, expression, alpha=alpha).degrees_of_freedom, np.trace(hat))


@pytest.mark.parametrize(("n", "d"), [(60, 20), (15, 40)])
def test_generalized_cross_validation_by_hand(n: int, d: int) -> None:
    features, expression = data(n, d)
    x = StandardScaler().fit_transform(features)
    alphas = _PENALTIES * np.linalg.svd(x, compute_uv=False)[0] ** 2
    centered = expression - expression.mean(axis=0, dtype=np.float64)
    scores = []
    for alpha in alphas:
        left = alpha * np.linalg.inv(x @ x.T + alpha * np.eye(n))  # 1 - hat matrix
        scores.append(n * ((left @ centered) ** 2).sum(axis=0) / (np.trace(left) - 1) ** 2)
    found = fit(features, expression).alpha
    position = np.argmin(np.abs(alphas[:, None] - found), axis=0)
    np.testing.assert_allclose(found, alphas[position])
    chosen = np.array(scores)[position, np.arange(len(found))]
    np.testing.assert_allclose(chosen, np.min(scores, axis=0), rtol=0.01)
    assert len(np.unique(position)) > 2


def test_penalties_are_near_those_of_leave_one_out() -> None:
    features, expression = data(n=200)
    model = fit(features, expression)
    x = StandardScaler().fit_transform(features)
    alphas = _PENALTIES * np.linalg.svd(x, compute_uv=False)[0] ** 2
    expected = RidgeCV(alphas, alpha_per_target=True).fit(x, expression)
    closeness = np.abs(np.log10(model.alpha) - np.log10(expected.alpha_))
    assert np.median(closeness) < 0.3
    assert np.corrcoef(model.predict(features).ravel(), expected.predict(x).ravel())[0, 1] > 0.999


def test_a_gene_of_noise_is_shrunk_more_than_one_of_signal() -> None:
    model = fit(*data(n=400))
    assert model.alpha[-1] > 10 * model.alpha[0]
    assert model.degrees_of_freedom[-1] < 5 < 19 < model.degrees_of_freedom[0]


def test_hest_penalty() -> None:
    features, expression = data()
    np.testing.assert_allclose(fit(features, expression, alpha="hest").alpha, 100 / (20 * 8))
    np.testing.assert_allclose(fit(features, expression, alpha="hest", n_components=5).alpha, 100 / (5 * 8))


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    features, expression = data()
    expected = fit(features, expression)
    monkeypatch.setattr("stpredict.models._ridge._GENES", 3)
    monkeypatch.setattr("stpredict.models._ridge._SPOTS", 7)
    model = fit(features, expression)
    np.testing.assert_allclose(model.coef, expected.coef, atol=1e-12)
    np.testing.assert_allclose(model.predict(features), expected.predict(features), rtol=1e-6)


# Features


def test_constant_features_say_nothing() -> None:
    features, expression = data()
    expected = fit(features, expression, alpha=1.0)
    model = fit(np.column_stack([features, np.full(60, 0.1), np.zeros(60)]), expression, alpha=1.0)
    np.testing.assert_array_equal(model.scale[-2:], 1)
    elsewhere = np.column_stack([features, np.full(60, 70.0), np.ones(60)])
    np.testing.assert_allclose(model.predict(elsewhere), expected.predict(features), rtol=1e-5)


def test_features_that_are_all_constant() -> None:
    with pytest.raises(ValueError, match="All 3 features have the same value on all 60 training spots"):
        fit(np.tile([0.1, 2, 0], (60, 1)), data()[1])


def test_columns_of_a_common_scale_keep_their_sizes() -> None:
    features, expression = data(d=6)
    features[:, 5] = 1.5
    model = fit(features, expression, common_scale=[slice(1, 3), slice(5, 6)])
    spread = features.std(axis=0)
    assert model.scale[1] == model.scale[2]
    np.testing.assert_allclose(model.scale[1:3], np.sqrt((spread[1] ** 2 + spread[2] ** 2) / 2))
    np.testing.assert_allclose(model.scale[[0, 3, 4]], spread[[0, 3, 4]])
    assert model.scale[5] == 1


def test_where_uncentered_columns_are_0_the_training_mean_is_predicted() -> None:
    # Bumps around training spots: away from these nothing is known.
    rng = np.random.default_rng(0)
    place, knots = rng.uniform(0, 1, 80), np.linspace(0, 1, 9)
    bumps = np.exp(-(((place[:, None] - knots) / 0.1) ** 2))
    expression = np.column_stack([np.sin(5 * place) + 3, 7 + rng.normal(0, 1, 80)])
    options: dict[str, Any] = {"common_scale": [slice(0, 9)], "uncentered": [slice(0, 9)]}
    features = np.column_stack([bumps, rng.normal(4, 1, 80)])
    for n_components in (None, 5):
        model = Ridge.fit(features, expression, ["g", "h"], reads=reads(10), n_components=n_components, **options)
        away = np.append(np.zeros(9), features[:, 9].mean())
        np.testing.assert_allclose(model.predict(away[None])[0], expression.mean(axis=0), rtol=1e-6)
        np.testing.assert_array_equal(model.mean[:9], 0)
        predicted = model.predict(features)
        assert np.corrcoef(predicted[:, 0], expression[:, 0])[0, 1] > 0.99
        assert np.abs(predicted - expression).max() < 3.5


def test_uncentered_penalties_are_those_of_generalized_cross_validation() -> None:
    rng = np.random.default_rng(1)
    x, n = np.abs(rng.normal(1, 1, (40, 6))), 40
    expression = 2 + x @ rng.normal(size=(6, 8)) * np.linspace(2, 0, 8) + rng.normal(size=(40, 8))
    model = fit(x, expression, uncentered=[slice(0, 6)])
    values = x / x.std(axis=0)
    constant = np.full((n, n), 1 / n)
    scores = []
    alphas = _PENALTIES * np.linalg.svd(values, compute_uv=False)[0] ** 2
    for alpha in alphas:
        hat = values @ np.linalg.solve(values.T @ values + alpha * np.eye(6), values.T)
        left = (np.eye(n) - hat) @ (np.eye(n) - constant)
        scores.append(((left @ expression) ** 2).sum(axis=0) / np.trace(left) ** 2)
    np.testing.assert_allclose(model.alpha, alphas[np.argmin(scores, axis=0)])
    assert len(np.unique(model.alpha)) > 2


@pytest.mark.parametrize("value", [1e300, -1e200, np.inf, np.nan])
def test_features_beyond_the_scale_of_numbers_are_named(value: float) -> None:
    features, expression = data()
    features[7, [3, 11]] = value
    with pytest.raises(
        ValueError, match=r"features of 2 of 20 columns, such as \[3, 11\], are on a scale of up to .*1e\+150"
    ):
        fit(features, expression)
    with pytest.raises(ValueError, match=r"expression of 2 of 20 columns, such as \[3, 11\]"):
        Ridge.fit(data()[0], features, [f"g{j}" for j in range(20)], reads=reads(20))


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_units_do_not_matter(unit: float) -> None:
    features, expression = data()
    model, other = fit(features, expression), fit(features * unit, expression.astype(np.float64) * unit)
    np.testing.assert_allclose(other.predict(features * unit), unit * model.predict(features), rtol=1e-5)


def test_two_threads_give_the_model_of_one() -> None:
    # Twelve components of 40 features, so that all of its products and decompositions are taken.
    features, expression = data(n=300, d=40)
    models = []
    for n_threads in (1, 2):
        with threadpool_limits(n_threads):
            models.append(fit(features, expression, n_components=12))
    one, two = (model.coef @ model.components / model.scale for model in models)  # type: ignore[operator]
    np.testing.assert_allclose(two * features.std(axis=0), one * features.std(axis=0), atol=1e-10)
    np.testing.assert_allclose(models[1].intercept, models[0].intercept, rtol=1e-12)


def test_inputs_are_not_changed() -> None:
    features, expression = data()
    before = features.copy()
    fit(features, expression)
    np.testing.assert_array_equal(features, before)


def test_rows_with_nan_are_predicted_as_nan() -> None:
    features, expression = data()
    model = fit(features, expression, n_components=5)
    features[[3, 50], 4] = np.nan
    np.testing.assert_array_equal(np.isnan(model.predict(features)).all(axis=1), np.isin(np.arange(60), [3, 50]))
    assert np.isnan(model.predict(features)).any(axis=1).sum() == 2


@pytest.mark.parametrize("shape", [(5, 19), (5, 21), (20,)])
def test_another_number_of_features(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"features of the shape \(.*\); the model reads \(n, 20\)"):
        fit(*data()).predict(np.zeros(shape))


# Saving


@pytest.mark.parametrize("n_components", [None, 5])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, n_components: int | None) -> None:
    features, expression = data()
    model = fit(features, expression, n_components=n_components)
    again = stp.models.load(model.save(tmp_path / "model"))
    assert isinstance(again, Ridge)
    assert (again.genes, again.reads, again.params) == (model.genes, model.reads, model.params)
    np.testing.assert_array_equal(again.predict(features), model.predict(features))
    np.testing.assert_array_equal(again.alpha, model.alpha)
    assert repr(again) == repr(model)


def test_repr() -> None:
    features, expression = data()
    assert "Ridge of 8 genes on 20 features (X)" in repr(fit(features, expression))
    reduced = repr(fit(features, expression, n_components=5, alpha=2.0))
    assert "on 5 principal components of 20 features (X)" in reduced
    assert "alpha 2 (median; 2 to 2)" in reduced
