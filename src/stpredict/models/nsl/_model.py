"""Neural Stain Learning: one learned stain matrix and two weights per gene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike

from stpredict.models._base import FittedModel
from stpredict.models._device import resolve_device, working_bytes
from stpredict.models._fields import Arrays, DamagedError, Layout, as_seen, check_arrays, check_scale
from stpredict.models._reads import check_histogram
from stpredict.models.nsl._solver import ColorFractions, merge_rare_colors, solve
from stpredict.models.nsl._stains import unmixing

# Numbers in the largest temporary of a prediction: 256 MB.
_MAX_ELEMENTS = 2**25
# Volume spanned by three unit vectors below which they separate no stains.
_MIN_VOLUME = 1e-9


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class NSL(FittedModel):
    r"""A fitted Neural Stain Learning model (Dawood et al. 2021, arXiv 2108.10446).

    For gene :math:`g` with stain matrix :math:`S_g` (rows hematoxylin, eosin, residual; unit vectors in the space of
    optical densities), a pixel of optical density :math:`o` has the concentrations

    .. math:: c = \max(o \, S_g^{-1}, 0)

    and a spot with mean hematoxylin and eosin concentrations :math:`\bar c_H, \bar c_E` over its field the expression
    :math:`b_g + w_{g,H} \bar c_H + w_{g,E} \bar c_E`: 9 + 2 = 11 trainable weights, the intercept following in closed
    form. The authors published no code; this is our reading of the paper.

    **What is identifiable.** Where no pixel meets the clamp, the prediction is linear in the mean optical density and
    the data determine only the effective direction :math:`v_g = S_g^{-1}[:, :2] \, w_g` (attribute ``direction``), not
    :math:`S_g` itself. Even with the clamp only the planes spanned by eosin and residual, and by hematoxylin and
    residual, matter: 4 of the 6 angles of :math:`S_g`. A weak pull to ``reference`` defines the rest, so read a learned
    stain vector as "the reference, moved as far as this gene asks for", and trust ``direction`` first. Where the clamp
    silences a stain in most pixels, ``direction`` is the slope of the few others and does not describe the gene either:
    look at the predictions then, and at what the stain marks (:func:`stpredict.pl.stains`).

    Attributes
    ----------
    genes
        Names of the ``G`` genes.
    stain_matrix
        ``(G, 3, 3)``.
    weights
        ``(G, 2)`` for hematoxylin and eosin, in units of the expression per unit of concentration.
    intercept
        ``(G,)``.
    loss
        ``(G,)`` mean squared error on the training spots over the variance there.
    n_iter, converged
        ``(G,)`` steps taken, and whether they ended by the tolerance.
    reference
        ``(3, 3)`` the stain matrix that the fit started from and was pulled to.
    reads
        ``{"kind": "histogram", "bits": ..., "spot_scale": ...}``: which colour histograms.
    params, seen
        What the model was fitted with, and fingerprints of its training spots.
    """

    kind: ClassVar[str] = "nsl"

    stain_matrix: np.ndarray
    weights: np.ndarray
    intercept: np.ndarray
    loss: np.ndarray
    n_iter: np.ndarray
    converged: np.ndarray
    reference: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        check_histogram(self.reads)
        check_arrays(vars(self), self._layout(len(self.genes)))
        for name in ("stain_matrix", "reference"):
            stains = getattr(self, name)
            with np.errstate(over="ignore"):
                norms = np.linalg.norm(stains, axis=-1)
            if not np.allclose(norms, 1, atol=1e-6):
                raise DamagedError(name, "has rows that are not of unit length", in_weights=True)
            if not (np.abs(np.linalg.det(stains)) > _MIN_VOLUME).all():
                raise DamagedError(name, "is singular: its rows lie in one plane", in_weights=True)

    @classmethod
    def fit(
        cls,
        fractions: sp.csr_matrix,
        od: np.ndarray,
        expression: np.ndarray,
        genes: Sequence[str],
        *,
        reference: np.ndarray,
        stains: Literal["per_gene", "shared"] = "per_gene",
        pull: float = 0.1,
        tol: float = 1e-5,
        max_iter: int = 100,
        device: str = "auto",
        reads: dict[str, Any],
        seen: ArrayLike | None = None,
        params: dict[str, Any] | None = None,
    ) -> Self:
        """Fit all genes at once; see :func:`stpredict.tl.fit_nsl` for the parameters.

        Parameters
        ----------
        fractions
            ``(n, n_bins)`` colour fractions of the training spots, each row summing to 1.
        od
            ``(n_bins, 3)`` optical densities of the colours.
        expression
            ``(n, G)``, finite, no gene constant.
        genes
            ``G`` names.
        reference
            ``(3, 3)`` unit rows.
        stains, pull, tol, max_iter, device
            As in :func:`stpredict.tl.fit_nsl`.
        reads, seen, params
            Kept with the model; ``seen`` need be neither sorted nor unique.
        """
        device = resolve_device(device)
        check_scale(expression, "expression")
        mean = expression.mean(axis=0, dtype=np.float64)
        scale = expression.std(axis=0, dtype=np.float64)
        standardized = torch.from_numpy((expression - mean) / scale).to(device)
        solution = solve(
            ColorFractions(*merge_rare_colors(fractions, od), device),
            standardized,
            torch.tensor(reference, dtype=torch.float64, device=device),
            shared=stains == "shared",
            pull=pull,
            tol=tol,
            max_iter=max_iter,
            max_bytes=working_bytes(device),
        )
        found = {name: value.cpu().numpy() for name, value in solution._asdict().items()}

        def for_all(values: np.ndarray) -> np.ndarray:
            return np.broadcast_to(values, (len(genes), *values.shape[1:])).copy()

        return cls(
            genes=list(genes),
            stain_matrix=for_all(found["stains"]),
            weights=found["weights"] * scale[:, None],
            intercept=mean + found["intercept"] * scale,
            loss=found["loss"],
            n_iter=for_all(found["n_iter"]),
            converged=for_all(found["converged"]),
            reference=np.asarray(reference, dtype=np.float64),
            reads=dict(reads),
            seen=as_seen(seen),
            params=dict(params or {}),
        )

    @property
    def direction(self) -> np.ndarray:
        """``(G, 3)`` effective direction :math:`v_g`: change of expression per unit of optical density."""
        return np.einsum("gcs,gs->gc", self._unmixing(), self.weights)

    def concentrations(self, od: np.ndarray, gene: str) -> np.ndarray:
        """Hematoxylin and eosin as one gene sees them.

        Parameters
        ----------
        od
            ``(..., 3)`` optical densities.
        gene
            One of ``genes``.

        Returns
        -------
        ``(..., 2)`` concentrations, none below 0.
        """
        return np.maximum(od @ self._unmixing()[self.genes.index(gene)], 0)

    def predict(self, fractions: sp.csr_matrix, od: np.ndarray, *, device: str = "auto") -> np.ndarray:
        """Predict from colour fractions.

        Parameters
        ----------
        fractions
            ``(n, n_bins)``, each row summing to 1.
        od
            ``(n_bins, 3)`` optical densities of the colours, from any codebook.
        device
            Where to compute.

        Returns
        -------
        ``(n, G)`` float32.
        """
        device = resolve_device(device)
        spots = ColorFractions(fractions, od, device)
        unmix = torch.from_numpy(self._unmixing()).to(device)
        weights = torch.from_numpy(self.weights).to(device)
        intercept = torch.from_numpy(self.intercept).to(device)
        predicted = np.empty((fractions.shape[0], len(self.genes)), dtype=np.float32)
        chunk = max(1, _MAX_ELEMENTS // (2 * max(len(od), 1)))
        for start in range(0, len(self.genes), chunk):
            genes = slice(start, start + chunk)
            concentrations = torch.einsum("kc,gcs->kgs", spots.od, unmix[genes]).clamp_min_(0)
            # The weights act before the sum over colours: one matrix product for both stains.
            contributions = (concentrations * weights[genes]).sum(-1)
            for rows, block in spots:
                predicted[rows, genes] = (block @ contributions + intercept[genes]).cpu().numpy()
        return predicted

    def learned(self) -> dict[str, Any]:
        """Everything that was learned, and the reference."""
        names = ("stain_matrix", "weights", "direction", "intercept", "loss", "n_iter", "converged", "reference")
        return {name: getattr(self, name) for name in names}

    def to_state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Header and arrays for :meth:`save`."""
        header, arrays = super().to_state()
        return header, arrays | {name: getattr(self, name) for name in self._layout(0)}

    @classmethod
    def from_state(cls, header: dict[str, Any], arrays: Arrays) -> Self:
        """Rebuild what :meth:`to_state` took apart."""
        common = cls._common_state(header, arrays)
        return cls(**common, **arrays.read(cls._layout(len(common["genes"]))))

    @staticmethod
    def _layout(n_genes: int) -> Layout:
        return {
            "stain_matrix": ((n_genes, 3, 3), "float64"),
            "weights": ((n_genes, 2), "float64"),
            "intercept": ((n_genes,), "float64"),
            "loss": ((n_genes,), "float64"),
            "n_iter": ((n_genes,), "int64"),
            "converged": ((n_genes,), "bool"),
            "reference": ((3, 3), "float64"),
        }

    def _unmixing(self) -> np.ndarray:
        return unmixing(torch.from_numpy(self.stain_matrix)).numpy()

    def __repr__(self) -> str:
        n_stuck = int((~self.converged).sum())
        ended = "all converged" if n_stuck == 0 else f"{n_stuck} not converged"
        return (
            f"NSL of {len(self.genes)} genes ({self.params.get('stains', 'per_gene')} stains, field of "
            f"{self.reads['spot_scale']} spot diameters)\n"
            f"  fit: {ended}, median of {int(np.median(self.n_iter))} steps; "
            f"explains {100 * (1 - np.median(self.loss)):.1f} % of a gene's variance on training spots (median)"
        )
