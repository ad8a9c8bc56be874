from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from stpredict.models import NSL
from stpredict.models.nsl import _model, _solver
from stpredict.models.nsl._solver import ColorFractions, merge_rare_colors
from stpredict.models.nsl._stains import RUIFROK_JOHNSTON, stain_matrix

REFERENCE = stain_matrix(RUIFROK_JOHNSTON)
READS = {"kind": "histogram", "bits": 5, "spot_scale": 2.0}


class Problem(NamedTuple):
    """Spots of known colours and genes that follow the model: ``stains`` (G, 3, 3) and ``weights`` (G, 2)."""

    fractions: np.ndarray
    od: np.ndarray
    expression: np.ndarray
    stains: np.ndarray
    weights: np.ndarray

    def fit(self, **options: Any) -> NSL:
        genes = [f"gene{g}" for g in range(self.expression.shape[1])]
        options = {"reference": REFERENCE, "reads": READS, **options}
        return NSL.fit(sparse.csr_matrix(self.fractions), self.od, self.expression, genes, **options)


def features(stains: np.ndarray, fractions: np.ndarray, od: np.ndarray) -> np.ndarray:
    """``(n, 2)`` mean concentrations as the documentation defines them, in float64."""
    return fractions @ np.maximum(od @ np.linalg.inv(stains)[:, :2], 0)


def objective(
    stains: np.ndarray, fractions: np.ndarray, od: np.ndarray, expression: np.ndarray, pull: float
) -> np.ndarray:
    """``(G,)`` log of mean squared error over variance with the best weights, and the pull to the reference."""
    stains = stains.reshape(3, 3) / np.linalg.norm(stains.reshape(3, 3), axis=1, keepdims=True)
    design = np.column_stack([np.ones(len(fractions)), features(stains, fractions, od)])
    residual = expression - design @ np.linalg.lstsq(design, expression, rcond=None)[0]
    loss = (residual**2).mean(axis=0) / expression.var(axis=0)
    return np.log(loss + 1e-3) + pull * ((stains - REFERENCE) ** 2).sum()


def make_problem(
    seed: int = 0,
    *,
    n_spots: int = 100,
    n_colors: int = 1500,
    n_genes: int = 4,
    n_kinds: int = 12,
    turn: float = 0.15,
    noise: float = 0.3,
) -> Problem:
    """Spots that mix some kinds of tissue, each of which spreads over neighbouring colours."""
    rng = np.random.default_rng(seed)
    loads = rng.gamma(1.5, 0.3, (n_colors, 2))
    od = np.maximum(loads @ REFERENCE[:2] + rng.normal(0, 0.12, (n_colors, 3)), 0)
    kinds = od[rng.choice(n_colors, n_kinds)]
    share = np.exp(-((od[:, None] - kinds) ** 2).sum(-1) / 0.125) * rng.uniform(0, 1, (n_colors, n_kinds))
    fractions = rng.dirichlet(np.full(n_kinds, 6 / n_kinds), n_spots) @ (share / share.sum(axis=0)).T
    stains = REFERENCE + rng.normal(0, turn, (n_genes, 3, 3))
    stains /= np.linalg.norm(stains, axis=2, keepdims=True)
    weights = rng.normal(0, 1, (n_genes, 2))
    expression = np.column_stack([features(s, fractions, od) @ w for s, w in zip(stains, weights, strict=True)])
    scale = expression.std(axis=0)
    expression = 3 + expression / scale + rng.normal(0, noise, expression.shape)
    return Problem(fractions, od, expression, stains, weights / scale[:, None])


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees between rows."""
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


# The optimum


@pytest.mark.parametrize("pull", [0.03, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_worse_than_an_independent_optimiser(seed: int, pull: float) -> None:
    problem = make_problem(seed)
    model = problem.fit(pull=pull)
    assert model.converged.all()
    for g, stains in enumerate(model.stain_matrix):
        ours = (problem.fractions, problem.od, problem.expression[:, g], pull)
        best = minimize(objective, REFERENCE.ravel(), args=ours, method="BFGS")  # type: ignore[call-overload]
        found = objective(stains, *ours)
        assert found <= best.fun + 1e-4
        assert found < objective(REFERENCE, *ours)


@pytest.mark.parametrize("seed", [0, 1])
def test_shared_stains_are_no_worse_than_an_independent_optimiser(seed: int) -> None:
    problem = make_problem(seed, n_colors=500)
    model = problem.fit(stains="shared", pull=0.03)
    assert (model.stain_matrix == model.stain_matrix[0]).all()

    def mean_objective(stains: np.ndarray) -> float:
        return float(objective(stains, problem.fractions, problem.od, problem.expression, 0.03).mean())

    best = minimize(mean_objective, REFERENCE.ravel(), method="BFGS")
    assert mean_objective(model.stain_matrix[0]) <= best.fun + 1e-4


def test_weights_intercept_and_loss_are_those_of_least_squares() -> None:
    problem = make_problem()
    model = problem.fit()
    for g, stains in enumerate(model.stain_matrix):
        design = np.column_stack([np.ones(100), features(stains, problem.fractions, problem.od)])
        y = problem.expression[:, g]
        solution = np.linalg.lstsq(design, y, rcond=None)[0]
        np.testing.assert_allclose([model.intercept[g], *model.weights[g]], solution, rtol=2e-3)
        np.testing.assert_allclose(model.loss[g], np.var(y - design @ solution) / y.var(), rtol=1e-3)
        predicted = model.predict(sparse.csr_matrix(problem.fractions), problem.od)[:, g]
        np.testing.assert_allclose(predicted, design @ solution, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(model.stain_matrix, axis=2), 1)


@pytest.mark.parametrize("shared", [False, True])
def test_gradient_agrees_with_finite_differences(shared: bool) -> None:
    # With a damping that drowns everything else, a step is the negative half gradient, divided by the damping.
    problem = make_problem(5, n_spots=40, n_colors=300)
    pull, damping, h = 0.1, 1e7, 1e-5
    rng = np.random.default_rng(1)
    start = REFERENCE + rng.normal(0, 0.1, (1 if shared else 4, 3, 3))
    start /= np.linalg.norm(start, axis=2, keepdims=True)
    expression = (problem.expression - problem.expression.mean(0)) / problem.expression.std(0)
    spots = ColorFractions(sparse.csr_matrix(problem.fractions), problem.od, "cpu")
    targets = torch.tensor(expression, dtype=spots.od.dtype)
    state = _solver._evaluate(spots, targets, torch.tensor(start), torch.tensor(REFERENCE), pull)
    moved = _solver._step(
        state, torch.full((len(start),), damping, dtype=torch.float64), torch.tensor(REFERENCE), pull, shared
    )
    for k, stains in enumerate(start):
        genes = expression if shared else expression[:, [k]]

        def value(x: np.ndarray, genes: np.ndarray = genes) -> float:
            return float(objective(x, problem.fractions, problem.od, genes, pull).mean())

        np.testing.assert_allclose(state.objective[k], value(stains), rtol=1e-5)
        numeric = np.array(
            [(value(stains + h * e) - value(stains - h * e)) / (2 * h) for e in np.eye(9).reshape(9, 3, 3)]
        )
        analytic = -2 * damping * (moved[k].numpy() - stains)
        np.testing.assert_allclose(analytic, numeric.reshape(3, 3), atol=2e-3 * np.abs(numeric).max())


# What is recovered


@pytest.mark.parametrize("stains", ["per_gene", "shared"])
def test_planted_directions_are_recovered(stains: str) -> None:
    problem = make_problem(0, n_spots=400, n_kinds=100, turn=0.12, noise=0.05)
    if stains == "shared":
        same = features(problem.stains[0], problem.fractions, problem.od)
        expression = same @ problem.weights.T
        expression = expression + np.random.default_rng(0).normal(0, 0.05, expression.shape) * expression.std(0)
        problem = problem._replace(expression=expression, stains=np.repeat(problem.stains[:1], 4, axis=0))
    model = problem.fit(pull=1e-3, stains=stains)
    truth = np.einsum("gcs,gs->gc", np.linalg.inv(problem.stains)[:, :, :2], problem.weights)
    start = np.einsum("cs,gs->gc", np.linalg.inv(REFERENCE)[:, :2], problem.weights)
    assert angles(start, truth).max() > 5
    assert angles(model.direction, truth).max() < 3
    assert model.loss.max() < 0.01


def test_clamping_finds_what_the_mean_optical_density_does_not_know() -> None:
    # Half of a spot's pixels lie on either side of a plane, equally far from it: their mean says nothing of how far.
    rng = np.random.default_rng(0)
    n_spots, n_steps = 150, 30
    side = np.cross(REFERENCE[1], REFERENCE[2])
    side /= np.linalg.norm(side)
    steps = np.linspace(0.01, 0.3, n_steps)
    base = 0.5 * REFERENCE[1] + 0.6 * np.cross(side, REFERENCE[1])
    od = np.vstack([base + steps[:, None] * side, base - steps[:, None] * side])
    one_side = rng.dirichlet(np.full(n_steps, 0.15), n_spots)
    fractions = np.hstack([one_side, one_side]) / 2
    fractions = 0.98 * fractions + 0.02 * rng.dirichlet(np.ones(2 * n_steps), n_spots)
    expression = 1 + 4 * (fractions[:, :n_steps] @ steps)[:, None] + rng.normal(0, 0.01, (n_spots, 1))

    mean_od = np.column_stack([np.ones(n_spots), fractions @ od])
    residual = expression - mean_od @ np.linalg.lstsq(mean_od, expression, rcond=None)[0]
    assert residual.var() > 0.8 * expression.var()

    problem = Problem(fractions, od, expression, REFERENCE[None], np.zeros((1, 2)))
    turned = REFERENCE.copy()  # a start from which the plane must be found
    turned[1] += 0.1 * side
    model = problem.fit(reference=stain_matrix(turned), pull=1e-3)
    assert model.loss[0] < 0.05


def test_without_clamping_only_the_direction_is_determined() -> None:
    # Colours inside of the cone of both stains: linear in mean OD, and any pull keeps the stains at the reference.
    rng = np.random.default_rng(0)
    od = rng.uniform(0.4, 0.6, (50, 2)) @ REFERENCE[:2]
    fractions = rng.dirichlet(np.ones(50), 60)
    expression = (fractions @ od @ np.linalg.inv(REFERENCE)[:, :2]) @ np.array([[2.0], [-1.0]])
    residual = rng.normal(0, 0.3 * expression.std(), expression.shape)
    linear = np.column_stack([np.ones(60), fractions @ od])
    # Noise that leaves the least-squares solution where it is.
    expression += residual - linear @ np.linalg.lstsq(linear, residual, rcond=None)[0]
    model = Problem(fractions, od, expression, REFERENCE[None], np.zeros((1, 2))).fit(pull=0.03)
    np.testing.assert_allclose(model.stain_matrix[0], REFERENCE, atol=1e-3)
    np.testing.assert_allclose(model.weights[0], [2, -1], rtol=0.01)


def test_pull_keeps_stains_near_the_reference() -> None:
    problem = make_problem(3)
    distance = [np.square(problem.fit(pull=pull).stain_matrix - REFERENCE).sum() for pull in (1e-3, 1e-1, 10, 1e6)]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 1e-10


# What must not matter


def same(a: NSL, b: NSL) -> None:
    for name in NSL._layout(0):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize("stains", ["per_gene", "shared"])
def test_fits_are_bit_identical(stains: str) -> None:
    same(make_problem().fit(stains=stains), make_problem().fit(stains=stains))


@pytest.mark.parametrize("stains", ["per_gene", "shared"])
def test_two_threads_give_the_model_of_one(stains: str) -> None:
    problem = make_problem(6, n_spots=200, n_colors=2000, n_genes=6)
    n_threads, models = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            with threadpool_limits(n):
                models.append(problem.fit(stains=stains, max_iter=4))
    finally:
        torch.set_num_threads(n_threads)
    same(*models)


def solve_with(problem: Problem, monkeypatch: pytest.MonkeyPatch, *, genes: float, rows: float, **options: Any) -> NSL:
    """Fit with that many bytes for the chunks of genes and for the blocks of rows."""
    original: Callable[..., Any] = _solver.solve

    def limited(*arguments: Any, **keywords: Any) -> Any:
        return original(*arguments, **{**keywords, "max_bytes": genes})

    monkeypatch.setattr(_model, "solve", limited)
    monkeypatch.setattr(_model, "ColorFractions", lambda *arguments: ColorFractions(*arguments, max_bytes=rows))
    monkeypatch.setattr(_model, "_MAX_ELEMENTS", int(genes))
    return problem.fit(**options)


@pytest.mark.parametrize("stains", ["per_gene", "shared"])
@pytest.mark.parametrize("limits", [(1, 1e9), (1e9, 4 * 1500 * 7), (1, 1), (3e5, 4 * 1500 * 33)], ids=str)
def test_chunks_of_genes_and_blocks_of_rows_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[float, float], stains: str
) -> None:
    problem = make_problem(2)
    # A fixed number of steps: rounding could move the step at which a gene stops.
    options = {"stains": stains, "max_iter": 4, "tol": 0.0}
    whole = problem.fit(**options)
    parts = solve_with(problem, monkeypatch, genes=limits[0], rows=limits[1], **options)
    # Rounding moves stains where the objective is flat; what the data determine stays.
    np.testing.assert_allclose(parts.stain_matrix, whole.stain_matrix, atol=1e-5)
    np.testing.assert_allclose(parts.loss, whole.loss, atol=1e-5)
    fractions = sparse.csr_matrix(problem.fractions)
    np.testing.assert_allclose(parts.predict(fractions, problem.od), whole.predict(fractions, problem.od), atol=1e-4)


def test_other_genes_do_not_matter() -> None:
    problem = make_problem(2)
    together = problem.fit()
    for g in range(4):
        alone = problem._replace(expression=problem.expression[:, [g]]).fit()
        np.testing.assert_allclose(alone.stain_matrix[0], together.stain_matrix[g], atol=1e-5)
        np.testing.assert_allclose(alone.loss[0], together.loss[g], atol=1e-5)


def test_scale_and_offset_of_expression_do_not_matter() -> None:
    problem = make_problem(2)
    a, b = problem.fit(), problem._replace(expression=1000 + 50 * problem.expression).fit()
    np.testing.assert_allclose(a.loss, b.loss, atol=1e-5)
    np.testing.assert_allclose(50 * a.weights, b.weights, rtol=1e-2)
    np.testing.assert_allclose(1000 + 50 * a.intercept, b.intercept, rtol=1e-3)


# Ends


def test_what_does_not_converge_is_told() -> None:
    problem = make_problem(2)
    model = problem.fit(max_iter=1, tol=0.0)
    assert not model.converged.any()
    assert (model.n_iter == 1).all()
    assert "4 not converged" in repr(model)
    assert "all converged" in repr(problem.fit())
    assert "4 genes" in repr(model)


def test_a_color_that_never_varies_gives_the_mean() -> None:
    fractions = np.tile([[0.5, 0.5]], (20, 1))
    od = np.array([[0.1, 0.2, 0.1], [0.5, 0.6, 0.2]])
    expression = np.random.default_rng(0).normal(2, 1, (20, 1))
    for stains in ("per_gene", "shared"):
        model = Problem(fractions, od, expression, REFERENCE[None], np.zeros((1, 2))).fit(stains=stains)
        assert np.isfinite(model.stain_matrix).all()
        assert np.isfinite(model.weights).all()
        assert model.converged.all()
        np.testing.assert_allclose(model.loss, 1, atol=1e-5)
        np.testing.assert_allclose(model.predict(sparse.csr_matrix(fractions), od)[:, 0], expression.mean(), rtol=1e-4)


def test_a_stain_that_is_nowhere_is_survived() -> None:
    rng = np.random.default_rng(0)
    fractions = rng.dirichlet(np.ones(8), 30)
    od = np.linspace(0.1, 1, 8)[:, None] * np.array([0, 1.0, 0])  # neither hematoxylin nor residual
    expression = (fractions @ od)[:, [1]] + rng.normal(0, 0.001, (30, 1))
    model = Problem(fractions, od, expression, REFERENCE[None], np.zeros((1, 2))).fit(pull=0.1)
    assert all(np.isfinite(getattr(model, name)).all() for name in ("stain_matrix", "weights", "intercept", "loss"))
    assert model.loss[0] < 0.05


# The fitted model


def test_predictions_are_those_of_the_documented_formula() -> None:
    problem = make_problem(0, turn=0.3)
    model = problem.fit(pull=1e-3)
    expected = [
        model.intercept[g] + features(stains, problem.fractions, problem.od) @ model.weights[g]
        for g, stains in enumerate(model.stain_matrix)
    ]
    predicted = model.predict(sparse.csr_matrix(problem.fractions), problem.od, device="cpu")
    assert predicted.dtype == np.float32
    np.testing.assert_allclose(predicted, np.array(expected).T, atol=1e-4)


def test_predictions_from_any_codebook() -> None:
    # The same pixels, each colour twice: nothing may change.
    problem = make_problem(0)
    model = problem.fit()
    twice = sparse.csr_matrix(np.hstack([0.3 * problem.fractions, 0.7 * problem.fractions]))
    np.testing.assert_allclose(
        model.predict(twice, np.vstack([problem.od, problem.od])),
        model.predict(sparse.csr_matrix(problem.fractions), problem.od),
        atol=1e-4,
    )


def test_direction_is_the_change_per_optical_density() -> None:
    model = make_problem(0, turn=0.3).fit()
    inside = 0.5 * model.stain_matrix.sum(axis=1)  # all three concentrations 0.5, far from the clamp
    for g, gene in enumerate(model.genes):
        at, further = (model.concentrations(inside[g] + step, gene) @ model.weights[g] for step in (0, [0.01, 0, 0]))
        np.testing.assert_allclose((further - at) / 0.01, model.direction[g, 0], rtol=1e-6)


def test_concentrations_are_never_negative() -> None:
    model = make_problem(0).fit()
    od = np.random.default_rng(0).uniform(0, 2, (5, 7, 3))
    found = model.concentrations(od, "gene2")
    assert found.shape == (5, 7, 2)
    assert found.min() == 0
    np.testing.assert_allclose(found, np.maximum(od @ np.linalg.inv(model.stain_matrix[2])[:, :2], 0))


def test_rare_colors_count_as_their_neighbors() -> None:
    problem = make_problem(4, n_colors=1500)
    fractions, od = merge_rare_colors(sparse.csr_matrix(problem.fractions), problem.od, at_most=400)
    assert fractions.shape == (100, 400)
    np.testing.assert_allclose(fractions.sum(axis=1), 1)
    kept = {tuple(color) for color in od}
    heaviest = np.argsort(-problem.fractions.sum(axis=0))[:400]
    assert kept == {tuple(color) for color in problem.od[heaviest]}
    # No colour moves farther than to the nearest of those that were kept.
    moved = np.abs(fractions @ od - problem.fractions @ problem.od).max()
    distance = np.linalg.norm(problem.od[:, None] - od, axis=2).min(axis=1)
    assert moved <= (problem.fractions @ distance).max()
    same_fractions, same_od = merge_rare_colors(sparse.csr_matrix(problem.fractions), problem.od, at_most=1500)
    assert same_od is problem.od
    assert same_fractions.shape == (100, 1500)
