"""Ridge regression on features of spots, one penalty per gene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from stpredict.models._base import FittedModel
from stpredict.models._fields import (
    Arrays,
    DamagedError,
    Layout,
    as_seen,
    check_arrays,
    check_integer,
    check_positive,
    check_scale,
    get,
)
from stpredict.models._reads import check_features

# Penalties to choose from, as multiples of the largest eigenvalue: from next to none to all but a constant.
_PENALTIES = np.geomspace(1e-8, 1e2, 41)
# Genes and spots at a time, so that temporaries in float64 stay small.
_GENES, _SPOTS = 1024, 1024


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class Ridge(FittedModel):
    r"""A fitted ridge regression: standardise, optionally reduce to principal components, regress.

    For gene :math:`g` and features :math:`x` with the mean :math:`\mu` and scale :math:`\sigma` of the training spots,

    .. math:: \hat y_g = b_g + w_g^\top P \, (x - \mu) / \sigma,
        \qquad (b_g, w_g) = \arg\min \sum_i (y_{ig} - \hat y_{ig})^2 + \alpha_g \lVert w_g \rVert^2

    where the rows of :math:`P` are principal components, or :math:`P = I`.

    Attributes
    ----------
    genes
        Names of the ``G`` genes.
    mean, scale
        ``(d,)`` of the features; the mean is 0 for columns that are not centred.
    components
        ``(k, d)`` principal components, or `None` where the features are taken as they are.
    coef
        ``(G, k)`` or ``(G, d)``, in units of the expression per standard deviation of a feature.
    intercept
        ``(G,)`` mean expression of the training spots.
    alpha
        ``(G,)`` penalties, in scikit-learn's convention (they grow with the number of spots).
    degrees_of_freedom
        ``(G,)`` effective ones: 0 predicts a constant, ``k`` or ``d`` is no penalty at all.
    reads
        ``{"kind": "features", "sources": {name: {"from": ..., "n_features": ...}}}``, in the order of the columns.
    params, seen
        What the model was fitted with, and fingerprints of its training spots.
    """

    kind: ClassVar[str] = "ridge"

    mean: np.ndarray
    scale: np.ndarray
    components: np.ndarray | None
    coef: np.ndarray
    intercept: np.ndarray
    alpha: np.ndarray
    degrees_of_freedom: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        n_components = None if self.components is None else len(self.components)
        check_arrays(vars(self), self._layout(len(self.genes), np.size(self.mean), n_components))
        check_positive("scale", self.scale)
        if (self.alpha < 0).any():
            raise DamagedError("alpha", f"has {self.alpha.min():g}; expected at least 0", in_weights=True)
        check_features(self.reads, n_features=len(self.mean))

    @classmethod
    def fit(
        cls,
        features: ArrayLike,
        expression: np.ndarray,
        genes: Sequence[str],
        *,
        n_components: int | None = 256,
        alpha: float | Literal["gcv", "hest"] = "gcv",
        common_scale: Sequence[slice] = (),
        uncentered: Sequence[slice] = (),
        reads: dict[str, Any],
        seen: ArrayLike | None = None,
        params: dict[str, Any] | None = None,
    ) -> Self:
        """Fit all genes at once.

        Parameters
        ----------
        features
            ``(n, d)`` of the training spots, finite.
        expression
            ``(n, G)``, finite.
        genes
            ``G`` names.
        n_components
            Principal components to regress on when there are more features than that. `None` never reduces.
        alpha
            As in :func:`stpredict.tl.fit_ridge`.
        common_scale
            Columns that belong together, such as the values of one histogram: they are divided by one number (the root
            of their mean variance), so that their relative sizes are kept. All other columns are divided by their own
            standard deviation, constant ones by 1.
        uncentered
            Columns whose mean is left at 0, for features of which 0 means that nothing is known, such as bumps around the
            training spots: where they are all 0 (and the other features have their mean), the training mean is predicted.
        reads, seen, params
            Kept with the model; ``seen`` need be neither sorted nor unique.

        Raises
        ------
        ValueError
            All features are constant, or some are not finite or so large that their squares are not.
        """
        from sklearn.preprocessing import StandardScaler

        values = np.array(features, dtype=np.float64)
        check_scale(values, "features")
        check_scale(expression, "expression")
        spread = np.ptp(values, axis=0)
        if not (spread > np.maximum(4 * np.finfo(np.float64).eps * np.abs(values).max(axis=0), 1e-150)).any():
            raise ValueError(
                f"All {values.shape[1]} features have the same value on all {len(values)} training spots: there is "
                "nothing to learn from."
            )
        scaler = StandardScaler().fit(values)
        mean, scale = scaler.mean_, scaler.scale_
        for columns in common_scale:
            scale[columns] = np.sqrt(scaler.var_[columns].mean()) or 1.0
        for columns in uncentered:
            mean[columns] = 0
        values -= mean
        values /= scale
        components = None
        if n_components is not None and values.shape[1] > n_components:
            components = _components(values, min(n_components, len(values)), centered=not uncentered)
            values = values @ components.T
        if alpha == "hest":
            alpha = 100 / (values.shape[1] * len(genes))
        solution = _solve(values, expression, alpha, centered=not uncentered)
        return cls(
            genes=list(genes),
            mean=mean,
            scale=scale,
            components=components,
            reads=dict(reads),
            seen=as_seen(seen),
            params=dict(params or {}),
            **solution._asdict(),
        )

    def predict(self, features: ArrayLike, *, device: str = "auto") -> np.ndarray:
        """Predict from features.

        Parameters
        ----------
        features
            ``(n, d)``; a row with NaN is predicted as NaN.
        device
            Taken as by the other models; a product of two matrices needs no GPU.

        Returns
        -------
        ``(n, G)`` float32.

        Raises
        ------
        ValueError
            Another number of features than the model was fitted to.
        """
        values = np.asarray(features)
        if values.ndim != 2 or values.shape[1] != len(self.mean):
            raise ValueError(f"Got features of the shape {values.shape}; the model reads (n, {len(self.mean)}).")
        predicted = np.empty((len(values), len(self.genes)), dtype=np.float32)
        for start in range(0, len(values), _SPOTS):
            rows = slice(start, start + _SPOTS)
            standardized = (values[rows] - self.mean) / self.scale
            if self.components is not None:
                standardized = standardized @ self.components.T
            predicted[rows] = standardized @ self.coef.T + self.intercept
        return predicted

    def learned(self) -> dict[str, Any]:
        """The penalties, and what they left of the features."""
        return {"alpha": self.alpha, "degrees_of_freedom": self.degrees_of_freedom}

    def to_state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Header and arrays for :meth:`save`."""
        header, arrays = super().to_state()
        n_components = None if self.components is None else len(self.components)
        names = self._layout(len(self.genes), len(self.mean), n_components)
        return {**header, "n_components": n_components}, arrays | {name: getattr(self, name) for name in names}

    @classmethod
    def from_state(cls, header: dict[str, Any], arrays: Arrays) -> Self:
        """Rebuild what :meth:`to_state` took apart."""
        common = cls._common_state(header, arrays)
        if (n_components := get(header, "n_components")) is not None:
            check_integer("n_components", n_components, 1, 2**31)
        n_features = int(np.prod(arrays.shape("mean")[:1]))
        found = arrays.read(cls._layout(len(common["genes"]), n_features, n_components))
        return cls(**common, **{"components": None, **found})

    @staticmethod
    def _layout(n_genes: int, n_features: int, n_components: int | None) -> Layout:
        layout = {
            "mean": ((n_features,), "float64"),
            "scale": ((n_features,), "float64"),
            "coef": ((n_genes, n_features if n_components is None else n_components), "float64"),
            "intercept": ((n_genes,), "float64"),
            "alpha": ((n_genes,), "float64"),
            "degrees_of_freedom": ((n_genes,), "float64"),
        }
        return layout if n_components is None else {**layout, "components": ((n_components, n_features), "float64")}

    def __repr__(self) -> str:
        inputs = f"{len(self.mean)} features"
        if self.components is not None:
            inputs = f"{len(self.components)} principal components of {inputs}"
        low, median, high = np.quantile(self.alpha, [0, 0.5, 1])
        return (
            f"Ridge of {len(self.genes)} genes on {inputs} ({', '.join(self.reads['sources'])})\n"
            f"  fit: alpha {median:.3g} (median; {low:.3g} to {high:.3g}), "
            f"{np.median(self.degrees_of_freedom):.1f} effective degrees of freedom (median)"
        )


class _Solution(NamedTuple):
    coef: np.ndarray
    intercept: np.ndarray
    alpha: np.ndarray
    degrees_of_freedom: np.ndarray


def _components(values: np.ndarray, n_components: int, *, centered: bool) -> np.ndarray:
    """Directions of the largest sums of squares."""
    if centered:
        from sklearn.decomposition import PCA

        return PCA(n_components, random_state=0).fit(values).components_
    from scipy.linalg import eigh

    # A mean that is not taken off is something to keep, too.
    d = values.shape[1]
    return np.ascontiguousarray(eigh(values.T @ values, subset_by_index=[d - n_components, d - 1])[1].T[::-1])


def _solve(inputs: np.ndarray, expression: np.ndarray, alpha: float | str, *, centered: bool) -> _Solution:
    """Ridge regression of all genes on inputs, by one singular value decomposition.

    Generalised cross-validation (Golub, Heath & Wahba 1979) chooses, for each gene, the alpha that minimises
    n · RSS / (n − df)², which needs nothing but the projections of the expression on the singular vectors. It is what
    makes 18,000 genes a matter of seconds; scikit-learn's leave-one-out forms all residuals for each alpha.
    """
    from scipy.linalg import LinAlgError, svd

    n = len(inputs)
    try:
        left, singular, right = svd(inputs, full_matrices=False)
    except LinAlgError as error:
        raise ValueError(f"The singular values of the standardised features cannot be found: {error}.") from error
    rank = int((singular > singular[0] * max(inputs.shape) * np.finfo(np.float64).eps).sum())
    left, eigenvalues, right = left[:, :rank], singular[:rank] ** 2, right[:rank]
    alphas = _PENALTIES * eigenvalues[0] if alpha == "gcv" else np.array([alpha], dtype=np.float64)
    kept = eigenvalues / (eigenvalues + alphas[:, None])  # of each projection, by each alpha
    lost = alphas[:, None] / (eigenvalues + alphas[:, None])
    # The intercept is the mean expression. Where inputs are not centred, they may express a part of it as well.
    shared = left.sum(axis=0) ** 2 / n if not centered else np.zeros(rank)
    residual_freedom = n - 1 - rank + shared.sum() + lost @ (1 - shared)
    n_free = n - 1 if centered else n

    n_genes = expression.shape[1]
    coef = np.empty((n_genes, inputs.shape[1]))
    chosen = np.zeros(n_genes, dtype=np.int64)
    intercept = expression.mean(axis=0, dtype=np.float64)
    for start in range(0, n_genes, _GENES):
        genes = slice(start, start + _GENES)
        deviation = expression[:, genes] - intercept[genes]
        projected = left.T @ deviation
        if alpha == "gcv":
            beyond = (deviation**2).sum(axis=0) - (projected**2).sum(axis=0)
            residual = lost**2 @ projected**2 + (np.maximum(beyond, 0) if rank < n_free else 0)
            chosen[genes] = np.argmin(residual / residual_freedom[:, None] ** 2, axis=0)
        weights = kept[chosen[genes]].T / singular[:rank, None] * projected
        coef[genes] = weights.T @ right
    return _Solution(coef, intercept, alphas[chosen], kept.sum(axis=1)[chosen])
