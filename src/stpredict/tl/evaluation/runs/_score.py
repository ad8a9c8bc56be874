"""Score predictions in a table against what was measured."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData

from stpredict._data import provenance, slots
from stpredict._data.slide import read_spots, read_table
from stpredict.tl.evaluation.numbers._scores import Scores, score_predictions
from stpredict.tl.evaluation.runs._parts import make_parts
from stpredict.tl.evaluation.runs._summarize import PREDICTABLE, summarize
from stpredict.tl.fitting._targets import row_mask, select_genes


def score(
    sdata: SpatialData,
    *,
    key: str = "nsl",
    layer: str | None = None,
    genes: str | Sequence[str] | None = None,
    spots: str | None = None,
    n_perms: int = 1000,
    n_bootstrap: int = 1000,
    random_state: int = 0,
    table_key: str | None = None,
    shapes_key: str | Sequence[str] | None = None,
    key_added: str | None = None,
    inplace: bool = True,
) -> pd.DataFrame:
    """Score predictions against measured expression, gene by gene and spot by spot.

    Genes are scored across the spots of each section, and the scores then averaged over the sections: a section's own level of
    a gene, which says nothing about the picture, does not help. Only spots that the model was not fitted to are scored,
    unless ``spots`` says otherwise. See :doc:`/explanation/scores` for what each number rewards and what it hides.

    Parameters
    ----------
    sdata
        Spots, and a table with predictions and measured expression; no image is needed.
    key
        Predictions, a key of ``layers``.
    layer
        Measured expression, a key of ``layers`` or ``"X"``. `None` takes what the model was fitted to, if the table has
        it, else ``X``.
    genes
        Names, one name, or a boolean column of ``var``. `None` means all genes that have predictions.
    spots
        Boolean column of ``obs`` that chooses spots, or ``"all"``. `None` takes those that the model was not fitted to, as
        ``uns[key]["params"]`` tells; all of a cross-validated layer; and all of a model that was fitted to other data.
    n_perms
        Random maps of the same smoothness that a gene's PCC is compared with, on at most 3,000 spots of each section, see
        :doc:`/explanation/scores`; 0 leaves p-values out.
    n_bootstrap
        Draws of patients (or of sections, where the scored spots are of one patient) for the intervals; 0 leaves them out.
    random_state
        Seed of both.
    table_key, shapes_key
        Which elements to use, as in :func:`stpredict.pp.color_histogram`. `None` finds them.
    key_added
        What the names of the columns begin with. `None` means ``key``.
    inplace
        Write the scores into the table.

    Returns
    -------
    One row for each gene and section, each gene with ``section`` "mean of sections" and "pooled" (all spots at once), and each
    spot. Categorical columns: ``model`` (the layer), ``of`` ("gene" or "spot"), ``name``, ``section`` (``obs["section"]``, else
    the key of the spots), ``group`` (what the bootstrap resamples: patient or section; "" for the aggregates). Numbers, NaN where
    they are not defined:

    - ``n``: spots (or genes) that have both values.
    - ``pcc``, ``rmse``: of genes across spots, of spots across genes; ``spearman``, ``mae``, ``r2``, ``variance_ratio`` (predicted
      over measured), ``moran_measured`` and ``moran_predicted`` (Moran's I): of genes.
    - ``ceiling``, ``pcc_of_ceiling``: highest PCC that noise allows, where :func:`noise_ceiling` has found it, and the PCC's part
      of it.
    - ``pcc_low``, ``pcc_high`` (95 % interval; NaN with a single patient or section), ``pvals``, ``pvals_adj`` (Benjamini &
      Hochberg): of a gene's mean of sections.

    With ``inplace=True``, written to the table (after everything has succeeded), here with the key ``"nsl"``:

    ``var["nsl_pcc"]``, ``var["nsl_spearman"]``, ``var["nsl_rmse"]``, ``var["nsl_mae"]``, ``var["nsl_r2"]``, ``var["nsl_variance_ratio"]``, ``var["nsl_moran_measured"]``, ``var["nsl_moran_predicted"]``
        Means over sections, NaN for genes that were not scored.
    ``var["nsl_pcc_pooled"]``, ``var["nsl_pcc_low"]``, ``var["nsl_pcc_high"]``
        PCC of all spots at once, and the interval of the mean.
    ``var["nsl_pvals"]``, ``var["nsl_pvals_adj"]``, ``var["nsl_predictable"]``
        Unless ``n_perms=0``; predictable are genes of q up to 0.05.
    ``var["nsl_pcc_of_ceiling"]``
        Where the ceiling is known.
    ``obs["nsl_pcc"]``, ``obs["nsl_rmse"]``
        Of spots, NaN where they were not scored.
    ``uns["nsl_score"]``
        Settings, ``sections``, ``n_spots`` and the ``summary`` of :func:`summarize`.

    Raises
    ------
    KeyError, TypeError, ValueError
        Layers, genes, spots or elements that do not fit, no gene or spot with a prediction, or no section with 3 spots; the table
        is then unchanged.

    Warns
    -----
    UserWarning
        All spots were fitted to: such scores say nothing about new tissue. Or the table contradicts what the model says that
        it was fitted to.

    References
    ----------
    Wagner & Dray 2015, Generating spatially constrained null models for irregularly spaced data using Moran spectral
    randomization methods, Methods in Ecology and Evolution 6, 1169.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> sdata["table"].obs["train"] = sdata["table"].obs["section"] == "S1"
    >>> model = stp.tl.fit_nsl(sdata, train_key="train")
    >>> scores = stp.tl.score(sdata, key="nsl")
    >>> list(scores["section"].cat.categories)
    ['S2', 'mean of sections', 'pooled']
    >>> best = sdata["table"].var["nsl_pcc"].idxmax()
    """
    for name, number in (("n_perms", n_perms), ("n_bootstrap", n_bootstrap)):
        if not (isinstance(number, int | np.integer) and number >= 0):
            raise ValueError(f"`{name}` is {number!r}; expected a whole number, at least 0.")
    _, table = read_table(sdata, table_key)
    added = key if key_added is None else key_added
    slots.check_scores_key(table, added)
    if key not in table.layers:
        raise KeyError(
            f"No predictions {key!r} in `layers`; it has {list(table.layers)}. Predict first, with "
            "`stp.tl.fit_nsl(sdata)` or `stp.tl.predict(sdata, model)`."
        )
    source = provenance.measured_layer(table, key, layer)
    if source is None:
        raise ValueError("The table has no `X` to hold predictions against. Name the measured layer: `layer`.")
    measured = table.X if source == "X" else table.layers[source]
    predicted = table.layers[key]
    known = np.ones(table.shape, dtype=bool) if sp.issparse(predicted) else np.isfinite(np.asarray(predicted))
    columns = _choose_genes(table, measured, known, genes, key)
    rows, which = _choose_spots(table, key, known.sum(axis=1) > 0, spots)
    folds = _folds(table, key, rows & known[:, columns].any(axis=1))
    of_folds = make_parts(table, read_spots(sdata, table, shapes_key=shapes_key), folds)
    parts = [part for of_fold in of_folds.values() for part in of_fold]
    scores = score_predictions(
        measured,
        predicted,
        genes=table.var_names[columns],
        columns=columns,
        spots=table.obs_names,
        parts=parts,
        halves=slots.read_noise_ceiling(table, table.var_names[columns], [part.name for part in parts]),
        n_perms=n_perms,
        n_bootstrap=n_bootstrap,
        random_state=random_state,
    )
    frame = scores.frame(key)
    if inplace:
        settings = {
            "key": key,
            "layer": source,
            "spots": which,
            "n_spots": len(scores.spots),
            "sections": np.array([part.name for part in parts], dtype=object),
            "n_perms": int(n_perms),
            "n_bootstrap": int(n_bootstrap),
            "random_state": int(random_state),
            "summary": summarize(frame, n_bootstrap=n_bootstrap, random_state=random_state).iloc[0].to_dict(),
        }
        slots.write_scores(
            table, added, _of_genes(scores, columns, table.n_vars), _of_spots(scores, table.n_obs), settings
        )
    return frame


def _choose_genes(
    table: AnnData, measured: Any, known: np.ndarray, genes: str | Sequence[str] | None, key: str
) -> np.ndarray:
    """Columns of the genes to score."""
    fitted = np.flatnonzero(known.any(axis=0))
    if not len(fitted):
        raise ValueError(f"`layers[{key!r}]` is NaN everywhere: there is no prediction to score.")
    if genes is None:
        return fitted
    asked = select_genes(table, sp.csr_matrix(measured), genes)
    columns = asked[np.isin(asked, fitted)]
    if not len(columns):
        raise ValueError(
            f"None of the {len(asked)} genes that are asked for (such as {list(table.var_names[asked[:5]])}) has a prediction "
            f"in `layers[{key!r}]`, which has {len(fitted)}, such as {list(table.var_names[fitted[:5]])}."
        )
    if n_unknown := len(asked) - len(columns):
        logg.warning(f"{n_unknown} of {len(asked)} genes have no prediction in `layers[{key!r}]`: not scored.")
    return columns


def _choose_spots(table: AnnData, key: str, predicted: np.ndarray, spots: str | None) -> tuple[np.ndarray, str]:
    """Rows to score, and what they are."""
    if spots == "all":
        return predicted, "all"
    if spots is not None:
        rows = predicted & row_mask(table, spots, "True for spots to score")
        if not rows.any():
            raise ValueError(f"None of the spots that `obs[{spots!r}]` marks has a prediction in `layers[{key!r}]`.")
        return rows, spots
    training = provenance.training_rows(table, key, predicted)
    if training is None:
        logg.info(f"The table does not hold the spots that {key!r} was fitted to, so all are scored.")
        return predicted, "all"
    held_out = predicted & ~training.rows
    if not held_out.any():
        warnings.warn(
            f"The model {key!r} was fitted to all spots that it has predictions for. These scores tell how well it fits "
            "them, and nothing about new tissue: fit with `train_key`, or use `stp.tl.cross_validate`.",
            UserWarning,
            stacklevel=3,
        )
        return predicted, "training fit"
    if not training.as_fitted:
        params = provenance.model_params(table, key)
        warnings.warn(
            f"`obs[{params['train_key']!r}]` marks {training.rows.sum()} spots, but the model {key!r} was fitted to "
            f"{params['n_train']}: it has changed since, or the model is of other data. The spots that it does not mark are "
            "scored; whether the model has seen them is not known. Choose with `spots`.",
            UserWarning,
            stacklevel=3,
        )
        return held_out, "not known"
    return held_out, "held out"


def _folds(table: AnnData, key: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows to score, by the fold that held them out where the layer was cross-validated."""
    added = provenance.model_params(table, key).get("cv")
    if added is None or added not in table.obs:
        return {"": rows}
    fold_of = table.obs[added].astype(str).to_numpy()
    return {str(fold): rows & (fold_of == str(fold)) for fold in table.obs[added].cat.categories}


def _of_genes(scores: Scores, columns: np.ndarray, n_vars: int) -> dict[str, np.ndarray]:
    mean = scores.mean
    renamed = {"pvals": "pvals", "pvals_adj": "pvals_adj"}
    values = {renamed.get(name, name): column for name, column in mean.items() if name not in ("n", "ceiling")}
    values["pcc_pooled"] = scores.pooled["pcc"]
    written = {name: np.full(n_vars, np.nan) for name in values}
    for name, column in values.items():
        written[name][columns] = column
    if "pvals_adj" in mean:
        written["predictable"] = np.zeros(n_vars, dtype=bool)
        written["predictable"][columns] = (mean["pvals_adj"] <= PREDICTABLE) & (mean["pcc"] > 0)
    return written


def _of_spots(scores: Scores, n_obs: int) -> dict[str, np.ndarray]:
    rows = np.concatenate([part.rows for part in scores.parts])
    written = {name: np.full(n_obs, np.nan) for name in ("pcc", "rmse")}
    for name, column in written.items():
        column[rows] = scores.of_spots[name]
    return written
