"""Fit ridge regression on features of spots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData

from stpredict._data.elements import Elements
from stpredict._data.slide import find_table
from stpredict.pp._features import Feature, FeatureReads, Features, choose_sources
from stpredict.pp._patches import DEFAULT_SPOT_SCALE
from stpredict.tl.fitting._declared import reads_by
from stpredict.tl.fitting._inputs import start_fit
from stpredict.tl.fitting._targets import Genes

if TYPE_CHECKING:
    from stpredict.models import Ridge

_MIN_SPOTS = 12
# Effective degrees of freedom of a gene about which the features say nothing.
_NOTHING = 0.1


def _reads(
    sdata: SpatialData,
    table: AnnData,
    *,
    features: Feature | Sequence[Feature] = "color_statistics",
    image_size: int = 224,
    spot_scale: float = DEFAULT_SPOT_SCALE,
    **_: Any,
) -> FeatureReads:
    return choose_sources(sdata, table, features, image_size=image_size, spot_scale=spot_scale)


@reads_by(_reads)
def fit_ridge(
    sdata: SpatialData | AnnData,
    *,
    features: Feature | Sequence[Feature] = "color_statistics",
    genes: Genes = None,
    gene_key: str | None = None,
    train_key: str | None = None,
    layer: str | None = None,
    n_components: int | None = 256,
    alpha: float | Literal["gcv", "hest"] = "gcv",
    image_size: int = 224,
    spot_scale: float = DEFAULT_SPOT_SCALE,
    key_added: str = "ridge",
    table_added: str | None = None,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | Sequence[str] | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    device: str = "auto",
    inplace: bool = True,
) -> Ridge:
    """Predict expression by ridge regression on features of spots: colours, positions, or a foundation model's.

    Features are standardised, reduced to principal components where there are many, and regressed on, with a penalty
    for each gene (:class:`stpredict.models.Ridge`). It is fitted in seconds, and benchmarks find it hard to beat. Nothing
    but training spots enters mean, scale, components and penalties.

    Parameters
    ----------
    sdata
        Spots, a table with log-normalised expression, and images where features are made of them; a table by itself, with
        places in ``obsm["spatial"]``, where none are.
    features
        One or several of:

        - a key of ``obsm``: an array, sparse matrix or data frame, such as squidpy's image features. The columns of a data
          frame are matched by name when the model predicts;
        - ``(table_key, key)``: ``obsm[key]`` of another table of the same spots, or its ``X`` with a key of `None`, such as
          ``("uni_tiles", None)`` for the embedding of a pathology foundation model by LazySlide. Rows are joined by
          instance;
        - ``"color_statistics"`` (:func:`stpredict.pp.color_statistics`), ``"mean_od"`` or ``"color_histogram"``
          (:func:`stpredict.pp.color_histogram`; square roots of the shares of 512 colours): made with the settings of what
          these functions have written into the table, else with their defaults;
        - ``"position"``: a smooth basis of the place in a section, for each section and shared by all. It looks at no
          image, and says how much of a score is due to the place alone;
        - an encoder: a torch module, a torchscript module or any callable that maps a batch of patches, a float tensor
          ``(b, 3, image_size, image_size)`` with values in [0, 1], to features ``(b, d)``. Nothing is downloaded; put the
          normalisation that your checkpoint expects into it.
    genes, gene_key, train_key, layer
        What to fit, on which spots, as in :func:`stpredict.tl.fit_nsl`.
    n_components
        Principal components to regress on when there are more features than that. `None` never reduces.
    alpha
        The penalty. ``"gcv"`` chooses one for each gene by generalised cross-validation on the training spots, ``"hest"`` takes
        that of HEST-bench, 100 / (features after reduction x genes), which hardly penalises; a number is taken as it is.
    image_size, spot_scale
        Pixels of an encoder's patches and their field of view in spot diameters, as in :func:`stpredict.pp.patches`.
    key_added, table_added
        Where the results go, as in :func:`stpredict.tl.fit_nsl`.
    image_key, shapes_key, table_key, coordinate_system
        Which elements to use, as in :func:`stpredict.pp.color_histogram`. `None` finds them.
    device
        Where an encoder computes (a module is moved there): ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or
        ``"cuda:<number>"``.
    inplace
        Write predictions and parameters into the table.

    Returns
    -------
    The fitted model. With ``inplace=True``, written to the table (after everything has succeeded):

    ``layers["ridge"]``
        ``(n_obs, n_vars)`` float32 predictions for all spots, training spots included; NaN for genes that are not
        modeled and spots that lack a feature (such training spots are left out, and counted in the log).
    ``var["ridge_fitted"]``, ``obs["ridge_train"]``
        Genes that are modeled, and spots that the model was fitted to.
    ``uns["ridge"]``
        For the ``G`` modeled genes ``genes``, ``alpha``, ``degrees_of_freedom`` (effective ones) and ``params``.
    ``obsm["ridge_features"]``
        ``(n_obs, d)`` float32, what an encoder made. Name this key as ``features`` to fit again without encoding again.
    ``obsm["spatial"]``
        Centers of the spots in pixels of their image, where the table had none and an image was read.

    What a former call wrote under this key, scores included, is taken away.

    Raises
    ------
    KeyError, TypeError, ValueError
        Elements, genes, features, keys or values that do not fit; the table is then unchanged.

    References
    ----------
    Golub, Heath & Wahba 1979, Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter, Technometrics 21.
    Jaume et al. 2024, HEST-1k: A Dataset for Spatial Transcriptomics and Histology Image Analysis, arXiv 2406.16192.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> model = stp.tl.fit_ridge(sdata)
    >>> "ridge" in sdata["table"].layers
    True

    An encoder is anything that makes vectors of patches:

    >>> model = stp.tl.fit_ridge(sdata, features=["position", lambda patches: patches.mean(dim=(2, 3))], image_size=32)
    >>> sdata["table"].obsm["ridge_features"].shape[1]
    3
    """
    from stpredict.models import Ridge

    if n_components is not None and not (isinstance(n_components, int | np.integer) and n_components >= 1):
        raise ValueError(f"`n_components` is {n_components!r}; expected a positive integer or None.")
    is_number = isinstance(alpha, int | float | np.number) and not isinstance(alpha, bool)
    if not (alpha in ("gcv", "hest") if isinstance(alpha, str) else is_number and 0 <= alpha < np.inf):
        raise ValueError(f"`alpha` is {alpha!r}; expected 'gcv', 'hest' or a number that is not negative.")
    elements = Elements(
        image_key=image_key, shapes_key=shapes_key, table_key=table_key, coordinate_system=coordinate_system
    )
    reads = choose_sources(sdata, find_table(sdata, elements), features, image_size=image_size, spot_scale=spot_scale)
    with start_fit(
        sdata,
        elements,
        reads,
        genes=genes,
        gene_key=gene_key,
        train_key=train_key,
        layer=layer,
        min_spots=_MIN_SPOTS,
        key_added=key_added,
        table_added=table_added,
        inplace=inplace,
        device=device,
    ) as fit:
        read, targets = cast(Features, fit.inputs), fit.targets
        model = Ridge.fit(
            read.values[targets.rows],
            targets.values,
            targets.genes,
            n_components=n_components,
            alpha=alpha,
            common_scale=read.common_scale,
            uncentered=read.uncentered,
            **fit.kept(
                n_components="all" if n_components is None else int(n_components),
                alpha=alpha if isinstance(alpha, str) else float(alpha),
            ),
        )
        n_constant = int((model.degrees_of_freedom < _NOTHING).sum())
        if alpha == "gcv" and n_constant > len(model.genes) / 2:
            logg.warning(
                f"Cross-validation finds that the features say nothing about {n_constant} of {len(model.genes)} genes: they "
                "are predicted as all but constant."
            )
        if inplace:
            fit.finish(model, key_added, gene_key, table_added)
    return model
