r"""Least-squares solver of Neural Stain Learning, for many genes at once.

The data term needs the pixels only through six numbers per spot and gene. With :math:`a_s` the column of
:math:`S^{-1}` that unmixes stain :math:`s`, the mean concentration of a spot is :math:`\bar c_s = D_s a_s`, where
:math:`D_s` is the spot's mean optical density over the pixels that the clamp lets through. The second moments of
:math:`D = [D_H, D_E]` and of :math:`D` with the expression, a 6 x 6 matrix and a vector of 6 per gene, give the loss,
its gradient and the Gauss-Newton matrix. One matrix product makes them; everything else is algebra on matrices of at most
6 x 6. (In float64: in float32, rounding decides near the optimum whether a step is taken, and genes would depend on which
others they are fitted with.) A step moves few colors to the other side of the clamp, so that from the second step on a CPU
adds and takes away those alone.

The objective of a gene is the logarithm of its mean squared error plus the pull to the reference: that of a normal
likelihood with unknown noise, so a gene with a clear signal is pulled less than a noisy one.

Variable projection: for given stains the two weights and the intercept are solved exactly; Levenberg-Marquardt steps
move each stain vector in its tangent plane (2 x 3 coordinates) and every gene has a damping of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.spatial import cKDTree
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from stpredict.models.nsl._stains import inverse, unmixing

# Keeps the two weights defined when a stain is nowhere (relative to the larger one's variance).
_RIDGE = 1e-8
_MAX_DAMPING = 1e6
# Share of a gene's variance that no fit explains: no gene is measured better, and float32 moments are not exact either.
_NO_NOISE = 1e-3
# On HER2+ sections the 2,048 most frequent of 4,825 colours hold 99.9 % of the pixels.
MAX_COLOURS = 2048
# Part of the colors up to which it is cheaper to add and take away those that changed sides than to multiply all.
_FEW_CHANGES = 0.4


class ColorFractions:
    """Colour fractions of spots, handed out as dense blocks of rows that fit into memory.

    Parameters
    ----------
    fractions
        ``(n_spots, n_bins)``, each row summing to 1.
    od
        ``(n_bins, 3)`` optical density of each bin.
    device
        Where the blocks go.
    max_bytes
        Largest dense block.
    """

    def __init__(self, fractions: sp.csr_matrix, od: np.ndarray, device: str, *, max_bytes: float = 2**29) -> None:
        self.od = torch.tensor(od, dtype=torch.float64, device=device)
        self.shape = fractions.shape
        self._fractions = fractions.astype(np.float64)
        self._device = device
        self._rows = int(np.clip(max_bytes // (8 * max(fractions.shape[1], 1)), 1, max(fractions.shape[0], 1)))
        self._only: torch.Tensor | None = None

    @property
    def rows_per_block(self) -> int:
        """Rows of all blocks but the last."""
        return self._rows

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        if self._rows >= self.shape[0]:
            if self._only is None:
                self._only = self._dense(slice(0, self.shape[0]))
            yield slice(0, self.shape[0]), self._only
            return
        for start in range(0, self.shape[0], self._rows):
            rows = slice(start, min(start + self._rows, self.shape[0]))
            yield rows, self._dense(rows)

    @cached_property
    def transposed(self) -> torch.Tensor | None:
        """All fractions, ``(n_bins, n_spots)``, on a CPU and if they are a single block."""
        is_small = self._rows >= self.shape[0] and torch.device(self._device).type == "cpu"
        return torch.from_numpy(np.ascontiguousarray(self._fractions.T.toarray())) if is_small else None

    def _dense(self, rows: slice) -> torch.Tensor:
        return torch.from_numpy(self._fractions[rows].toarray()).to(self._device)


def merge_rare_colors(
    fractions: sp.csr_matrix, od: np.ndarray, *, at_most: int = MAX_COLOURS
) -> tuple[sp.csr_matrix, np.ndarray]:
    """Count the rarest colours as the nearest of the others; a fit costs by the number of colours.

    Parameters
    ----------
    fractions
        ``(n_spots, n_bins)``, each row summing to 1.
    od
        ``(n_bins, 3)`` optical density of each bin.
    at_most
        Colours to keep: those with the most pixels.

    Returns
    -------
    The same for at most ``at_most`` colours; rows still sum to 1.
    """
    if len(od) <= at_most:
        return fractions, od
    kept = np.argsort(-np.asarray(fractions.sum(axis=0)).ravel(), kind="stable")[:at_most]
    nearest = np.asarray(cKDTree(od[kept]).query(od)[1])
    nearest[kept] = np.arange(at_most)
    merge = sp.coo_matrix((np.ones(len(od)), (np.arange(len(od)), nearest)), shape=(len(od), at_most)).tocsr()
    return sp.csr_matrix(fractions @ merge), od[kept]


class Solution(NamedTuple):
    """Fitted parameters; ``n_genes`` stain matrices, or one when they are shared.

    ``stains`` ``(S, 3, 3)``; ``weights`` ``(G, 2)`` and ``intercept`` ``(G,)`` for standardised expression; ``loss``
    ``(G,)`` mean squared error over variance; ``n_iter`` and ``converged`` ``(S,)``.
    """

    stains: torch.Tensor
    weights: torch.Tensor
    intercept: torch.Tensor
    loss: torch.Tensor
    n_iter: torch.Tensor
    converged: torch.Tensor


@dataclass
class _State:
    """Where each gene stands: its stains, the moments at these stains, and what follows from them."""

    stains: torch.Tensor  # (S, 3, 3)
    gram: torch.Tensor  # (S, 6, 6) second central moments of D
    cross: torch.Tensor  # (G, 6) moments of D with the expression
    mean: torch.Tensor  # (S, 6)
    basis: torch.Tensor  # (S, 6, 2) D @ basis = the two features
    weights: torch.Tensor  # (G, 2)
    loss: torch.Tensor  # (G,)
    objective: torch.Tensor  # (S,)
    passes: torch.Tensor  # (S, 2, n_bins) colors that the clamp lets through
    design: torch.Tensor  # (S, 6, n_spots) D; without spots where it is not kept

    def take(self, index: torch.Tensor, *, shared: bool) -> _State:
        if shared:
            return self
        return _State(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def put(self, index: torch.Tensor, other: _State, chosen: torch.Tensor, *, shared: bool) -> None:
        for name in self.__dataclass_fields__:
            if shared:
                setattr(self, name, getattr(other, name))
            else:
                getattr(self, name)[index[chosen]] = getattr(other, name)[chosen]


def solve(
    spots: ColorFractions,
    expression: torch.Tensor,
    reference: torch.Tensor,
    *,
    shared: bool,
    pull: float,
    tol: float,
    max_iter: int,
    max_bytes: float = 2**29,
) -> Solution:
    """Fit all genes, in chunks that bound memory.

    Parameters
    ----------
    spots
        The training spots.
    expression
        ``(n_spots, n_genes)`` float64, mean 0 and variance 1 per gene, on the device of ``spots``.
    reference
        ``(3, 3)`` float64 stain matrix: start, and what ``pull`` pulls to.
    shared
        One stain matrix for all genes.
    pull
        Weight of the squared distance to ``reference`` beside the logarithm of the mean squared error.
    tol
        A gene has converged when two accepted steps in a row lower its objective by less than this.
    max_iter
        Steps per gene.
    max_bytes
        Bounds the working memory.
    """
    n_genes = expression.shape[1]
    per_gene = 3 * 6 * 8 * (spots.shape[1] + spots.rows_per_block)
    chunk = 1 if shared else int(np.clip(max_bytes // per_gene, 1, n_genes))
    parts = []
    with tqdm(total=n_genes, desc="fitting NSL", unit="gene", delay=2, leave=False) as progress:
        for start in range(0, 1 if shared else n_genes, chunk):
            targets = expression if shared else expression[:, start : start + chunk]
            parts.append(_solve_chunk(spots, targets, reference, shared, pull, tol, max_iter, progress))
    return Solution(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _solve_chunk(
    spots: ColorFractions,
    expression: torch.Tensor,
    reference: torch.Tensor,
    shared: bool,
    pull: float,
    tol: float,
    max_iter: int,
    progress: tqdm,
) -> Solution:
    n_stains = 1 if shared else expression.shape[1]
    state = _evaluate(spots, expression, reference.expand(n_stains, 3, 3).clone(), reference, pull)
    damping = torch.full((n_stains,), 1e-2, dtype=torch.float64, device=reference.device)
    n_iter = torch.zeros(n_stains, dtype=torch.int64, device=reference.device)
    converged = torch.zeros(n_stains, dtype=torch.bool, device=reference.device)
    active = torch.arange(n_stains, device=reference.device)
    n_small = torch.zeros(n_stains, dtype=torch.int64, device=reference.device)
    for _ in range(max_iter):
        current = state.take(active, shared=shared)
        stains = _step(current, damping[active], reference, pull, shared)
        trial = _evaluate(spots, expression if shared else expression[:, active], stains, reference, pull, current)
        better = trial.objective < current.objective  # False for what is not finite
        gain = current.objective - trial.objective
        # One small gain may have been an unlucky step; two in a row are an end.
        n_small[active] = torch.where(better, torch.where(gain < tol, n_small[active] + 1, 0), n_small[active])
        done = (n_small[active] >= 2) | (~better & (damping[active] > _MAX_DAMPING))
        if not shared or better:
            state.put(active, trial, better, shared=shared)
        damping[active] *= torch.where(better, 0.2, 4.0)
        n_iter[active] += 1
        converged[active[done]] = True
        if not shared:
            progress.update(int(done.sum()))
        active = active[~done]
        if not len(active):
            break
    feature_means = (state.basis.transpose(1, 2) @ state.mean[..., None])[..., 0]
    intercept = -(state.weights * feature_means).sum(-1)
    return Solution(state.stains, state.weights, intercept, state.loss, n_iter, converged)


def _evaluate(
    spots: ColorFractions,
    expression: torch.Tensor,
    stains: torch.Tensor,
    reference: torch.Tensor,
    pull: float,
    before: _State | None = None,
) -> _State:
    """Moments at these stains, the weights that are optimal there, and the objective."""
    unmix = unmixing(stains)
    passes = torch.einsum("kc,gcs->gsk", spots.od, unmix) > 0
    if spots.transposed is None:
        design = unmix.new_empty(len(stains), 6, 0)
        gram, cross, mean = _moments_of_blocks(spots, expression, passes)
    else:
        design = _design(spots.transposed, spots.od, passes, before)
        gram, cross, mean = _moments(design, expression)
    basis = unmix.new_zeros(len(stains), 6, 2)
    basis[:, :3, 0], basis[:, 3:, 1] = unmix[..., 0], unmix[..., 1]
    features = basis.transpose(1, 2) @ gram @ basis
    target = (cross[:, None, :] @ basis)[:, 0]
    weights = (torch.linalg.inv(_regularized(features)) @ target[..., None])[..., 0]
    explained = 2 * (weights * target).sum(-1) - (weights[:, None] @ features @ weights[..., None])[:, 0, 0]
    loss = 1 - explained
    data_term = (loss + _NO_NOISE).log()
    objective = (data_term if len(stains) == len(loss) else data_term.mean()[None]) + pull * (
        stains - reference
    ).square().sum((1, 2))
    return _State(stains, gram, cross, mean, basis, weights, loss, objective, passes, design)


def _design(fractions: torch.Tensor, od: torch.Tensor, passes: torch.Tensor, before: _State | None) -> torch.Tensor:
    """``(S, 6, n_spots)`` mean optical density of the colors that pass, from that of the step before where few changed."""
    if before is None and bool((passes == passes[:1]).all()):  # at the start, all genes have the same stains
        return _whole_design(fractions, od, passes[:1]).repeat(len(passes), 1, 1)
    if before is None:
        return _whole_design(fractions, od, passes)
    changed = passes ^ before.passes
    few = changed.sum((1, 2)) <= _FEW_CHANGES * len(od)
    design = before.design.clone()
    if not few.all():
        design[~few] = _whole_design(fractions, od, passes[~few])
    genes, stains, colors = changed[few].nonzero().T.numpy()
    sign = np.where(passes[few][genes, stains, colors].numpy(), 1.0, -1.0)
    # Three rows, red, green and blue, for each gene and stain.
    rows = ((2 * genes + stains)[:, None] * 3 + np.arange(3)).ravel()
    values = (sign[:, None] * od.numpy()[colors]).ravel()
    changes = sp.csr_matrix((values, (rows, np.repeat(colors, 3))), shape=(6 * int(few.sum()), len(od)))
    design[few] += torch.from_numpy(changes @ fractions.numpy()).view(-1, 6, fractions.shape[1])
    return design


def _whole_design(fractions: torch.Tensor, od: torch.Tensor, passes: torch.Tensor) -> torch.Tensor:
    clamped = (passes[:, :, None, :] * od.T).reshape(-1, len(od))
    return (clamped @ fractions).view(len(passes), 6, -1)


def _moments(design: torch.Tensor, expression: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Second central moments of D and of D with the expression, and the mean of D."""
    n = design.shape[2]
    mean = design.mean(2)
    centered = design - mean[..., None]
    cross = centered @ expression.T[..., None] if len(design) > 1 else (centered[0] @ expression).T[..., None]
    return centered @ centered.mT / n, cross[..., 0] / n, mean


def _moments_of_blocks(
    spots: ColorFractions, expression: torch.Tensor, passes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same from blocks of spots, where D is not kept."""
    n_stains = len(passes)
    clamped = (passes[:, :, None, :] * spots.od.T).reshape(-1, len(spots.od)).T.contiguous()
    shift = None
    first = clamped.new_zeros(n_stains, 6)
    second = clamped.new_zeros(n_stains, 6, 6)
    cross = clamped.new_zeros(expression.shape[1], 6)
    for rows, fractions in spots:
        design = (fractions @ clamped).view(-1, n_stains, 6)
        if shift is None:
            shift = design.mean(0)  # moments about a nearby point do not cancel
        design = (design - shift).permute(1, 0, 2)
        first += design.sum(1)
        second += design.transpose(1, 2) @ design
        cross += (expression[rows].T[:, None, :] @ design)[:, 0]
    n = spots.shape[0]
    offset = first / n
    # The expression has mean 0, so its moments need no correction for the shift.
    return second / n - offset[:, :, None] * offset[:, None, :], cross / n, offset + shift  # type: ignore[operator]


def _step(state: _State, damping: torch.Tensor, reference: torch.Tensor, pull: float, shared: bool) -> torch.Tensor:
    """Damped Gauss-Newton step of the stains, the weights being eliminated."""
    to_concentration = inverse(state.stains)
    tangent = _tangent(state.stains)
    # da_s = -S^-1 dS a_s with dS made of one tangent vector (i, d) at a time.
    along = torch.einsum("gicd,gcs->gisd", tangent, to_concentration[..., :2])
    d_unmix = -torch.einsum("gji,gisd->gsjid", to_concentration, along).reshape(len(state.stains), 2, 3, 6)
    jacobian = (state.weights[:, :, None, None] * d_unmix).reshape(len(state.weights), 6, 6)

    residual = state.cross - (state.gram @ (state.basis @ state.weights[..., None]))[..., 0]
    gradient = (residual[:, None] @ jacobian)[:, 0]
    gram_jacobian = state.gram @ jacobian
    coupling = state.basis.transpose(1, 2) @ gram_jacobian
    features = _regularized(state.basis.transpose(1, 2) @ state.gram @ state.basis)
    hessian = jacobian.transpose(1, 2) @ gram_jacobian - coupling.transpose(1, 2) @ torch.linalg.solve(
        features, coupling
    )
    # The objective has the logarithm of the loss.
    noise = (state.loss + _NO_NOISE)[:, None]
    gradient, hessian = gradient / noise, hessian / noise[..., None]
    if shared:
        gradient, hessian = gradient.mean(0, keepdim=True), hessian.mean(0, keepdim=True)
    gradient = gradient + pull * torch.einsum("gicd,gic->gid", tangent, reference - state.stains).reshape(-1, 6)
    eye = torch.eye(6, dtype=hessian.dtype, device=hessian.device)
    move = torch.linalg.solve(hessian + (pull + damping)[:, None, None] * eye, gradient).view(-1, 3, 2)
    return normalize(state.stains + torch.einsum("gicd,gid->gic", tangent, move), dim=-1)


def _tangent(stains: torch.Tensor) -> torch.Tensor:
    """Two unit vectors at right angles to each stain vector and to each other, ``(..., 3, 3, 2)``."""
    farthest_axis = torch.eye(3, dtype=stains.dtype, device=stains.device)[stains.abs().argmin(-1)]
    first = normalize(torch.linalg.cross(stains, farthest_axis), dim=-1)
    return torch.stack([first, torch.linalg.cross(stains, first)], dim=-1)


def _regularized(features: torch.Tensor) -> torch.Tensor:
    scale = features.diagonal(dim1=1, dim2=2).amax(-1)
    eye = torch.eye(2, dtype=features.dtype, device=features.device)
    return features + (_RIDGE * scale + 1e-12)[:, None, None] * eye
