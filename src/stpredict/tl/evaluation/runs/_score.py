"""Score predictions in a table against what was measured."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData

from stpredict._data.columns import read_mask
from stpredict._data.elements import Elements
from stpredict._data.matrix import read_matrix
from stpredict._data.messages import user_stacklevel
from stpredict._data.provenance import fold_of, measured_layer, read_predictions, training_rows
from stpredict._data.slide import Slide, open_slide
from stpredict._data.slots import SCORES, Slots, check_name
from stpredict.tl.evaluation.numbers._scores import Scores, score_predictions
from stpredict.tl.evaluation.runs._parts import known_halves, make_parts
from stpredict.tl.evaluation.runs._summarize import PREDICTABLE, summarize
from stpredict.tl.fitting._targets import Genes, select_genes


def score(
    sdata: SpatialData | AnnData,
    *,
    key: str = "nsl",
    layer: str | None = None,
    genes: Genes = None,
    spots: str | None = None,
    n_perms: int = 1000,
    n_bootstrap: int = 1000,
    random_state: int = 0,
    table_key: str | None = None,
    shapes_key: str | Sequence[str] | None = None,
    section_key: str | None = None,
    patient_key: str | None = None,
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
        Spots, and a table with predictions and measured expression; no image is needed. A table by itself will do, with places
        in ``obsm["spatial"]``.
    key
        Predictions, a key of ``layers``.
    layer
        Measured expression, a key of ``layers`` or ``"X"``. `None` takes what the model was fitted to, if the table has
        it, else ``X``.
    genes
        Names, one name, or a boolean column of ``var``. `None` means all genes that have predictions.
    spots
        Column of ``obs`` that is `True` for the spots to score, or ``"all"``. `None` takes those that the model was not fitted
        to, as ``obs[f"{key}_train"]`` tells, and all of a cross-validated layer. Spots beside the tissue (``obs["in_tissue"]``
        is 0) are left out, unless a column chooses them.
    n_perms
        Random maps of the same smoothness that a gene's PCC is compared with, on at most 3,000 spots of each section, see
        :doc:`/explanation/scores`; 0 leaves p-values out.
    n_bootstrap
        Draws of patients (or of sections, where the scored spots are of one patient) for the intervals; 0 leaves them out.
    random_state
        Seed of both.
    table_key, shapes_key
        Which elements to use, as in :func:`stpredict.pp.color_histogram`. `None` finds them.
    section_key, patient_key
        Columns of ``obs`` that name sections and patients. `None` means the table's region column, and that patients are not
        known.
    key_added
        What the names of the columns begin with. `None` means ``key``.
    inplace
        Write the scores into the table.

    Returns
    -------
    One row for each gene and section, each gene with ``section`` "mean of sections" and "pooled" (all spots at once), and each
    spot. Categorical columns: ``model`` (the layer), ``of`` ("gene" or "spot"), ``name``, ``section`` (as ``section_key`` names
    it), ``group`` (what the bootstrap resamples: patient or section; "" for the aggregates). Numbers, NaN where
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
        Layers, genes, spots or elements that do not fit, no gene or spot with a prediction, no section with 3 spots, or it is not
        known which spots the model was fitted to; the table is then unchanged.

    Warns
    -----
    UserWarning
        All spots were fitted to: such scores say nothing about new tissue.

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
    ['S2_spots', 'mean of sections', 'pooled']
    >>> best = sdata["table"].var["nsl_pcc"].idxmax()
    """
    for name, number in (("n_perms", n_perms), ("n_bootstrap", n_bootstrap)):
        if not (isinstance(number, int | np.integer) and number >= 0):
            raise ValueError(f"`{name}` is {number!r}; expected a whole number, at least 0.")
    elements = Elements(table_key=table_key, shapes_key=shapes_key, section_key=section_key, patient_key=patient_key)
    slide = open_slide(sdata, elements, images=False)
    table = slide.table
    added = key if key_added is None else key_added
    if inplace:
        check_name(added, "key_added")
        _slots(added, key, dict.fromkeys(SCORES["var"]), dict.fromkeys(SCORES["obs"]), {}).check(table)
    read_predictions(table, key)
    source = measured_layer(table, key, layer)
    if source is None:
        raise ValueError("The table has no `X` to hold predictions against. Name the measured layer: `layer`.")
    measured, predicted = read_matrix(table, source), read_matrix(table, key)
    known = np.ones(table.shape, dtype=bool) if sp.issparse(predicted) else np.isfinite(predicted)
    columns = _choose_genes(table, measured, known, genes, key)
    rows, which = _choose_spots(slide, key, np.asarray(known[:, columns].any(axis=1)), spots)
    of_folds = make_parts(slide, _folds(table, key, rows))
    parts = [part for of_fold in of_folds.values() for part in of_fold]
    scores = score_predictions(
        measured,
        {key: predicted},
        genes=table.var_names[columns],
        columns=columns,
        spots=table.obs_names,
        parts=parts,
        halves=known_halves(table, table.var_names[columns], parts),
        n_perms=n_perms,
        n_bootstrap=n_bootstrap,
        random_state=random_state,
    )[key]
    frame = scores.frame(key)
    if inplace:
        settings = {
            "key": key,
            "layer": source,
            "spots": which,
            "n_spots": len(scores.spots),
            "sections": [part.name for part in parts],
            "n_perms": int(n_perms),
            "n_bootstrap": int(n_bootstrap),
            "random_state": int(random_state),
            "summary": summarize(frame, n_bootstrap=n_bootstrap, random_state=random_state).iloc[0].to_dict(),
        }
        of_genes, of_spots = _of_genes(scores, columns, table.n_vars), _of_spots(scores, table.n_obs)
        _slots(added, key, of_genes, of_spots, settings).write(table)
    return frame


def _slots(
    added: str, key: str, of_genes: Mapping[str, Any], of_spots: Mapping[str, Any], entry: dict[str, Any]
) -> Slots:
    """Where scores go; they are taken away when the predictions that they describe are made anew."""
    return Slots(
        f"{added}_score",
        entry=entry,
        var={f"{added}_{name}": values for name, values in of_genes.items()},
        obs={f"{added}_{name}": values for name, values in of_spots.items()},
        of=key,
    )


def _choose_genes(table: AnnData, measured: Any, known: np.ndarray, genes: Genes, key: str) -> np.ndarray:
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


def _choose_spots(slide: Slide, key: str, predicted: np.ndarray, spots: str | None) -> tuple[np.ndarray, str]:
    """Rows to score, and what they are."""
    table = slide.table
    predicted = predicted & slide.mask(slide.rows)
    if spots is not None and spots != "all":
        rows = predicted & read_mask(table.obs, spots, where="obs", expected="True for spots to score")
        if not rows.any():
            raise ValueError(f"None of the spots that `obs[{spots!r}]` marks has a prediction in `layers[{key!r}]`.")
        return rows, spots
    in_tissue, which = slide.in_tissue, "all"
    if spots is None:
        training = training_rows(table, key)
        if training is None:
            raise ValueError(
                f"Which spots the model {key!r} was fitted to is not known: `obs['{key}_train']` is missing or has gaps, as after "
                "a concatenation with a table that lacks it. Say which spots to score with `spots`: a column of `obs`, or 'all' "
                "if the model has seen none of them."
            )
        if (predicted & in_tissue & ~training).any():
            predicted, which = predicted & ~training, "held out"
        else:
            which = "training fit"
            warnings.warn(
                f"The model {key!r} was fitted to all spots that it has predictions for. These scores tell how well it fits "
                "them, and nothing about new tissue: fit with `train_key`, or use `stp.tl.cross_validate`.",
                UserWarning,
                stacklevel=user_stacklevel(),
            )
    if n_beside := int((predicted & ~in_tissue).sum()):
        logg.info(f"{n_beside} spots lie beside the tissue (`obs['in_tissue']`) and are not scored.")
    return predicted & in_tissue, which


def _folds(table: AnnData, key: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows to score, by the fold that held them out where the layer was cross-validated."""
    names = fold_of(table, key)
    if names is None:
        return {"": rows}
    column = table.obs[f"{key}_fold"]
    order = column.cat.categories if hasattr(column, "cat") else np.unique(names)
    return {str(name): rows & (names == str(name)) for name in order if str(name)}


def _of_genes(scores: Scores, columns: np.ndarray, n_vars: int) -> dict[str, np.ndarray]:
    mean = scores.mean
    values = {name: column for name, column in mean.items() if name not in ("n", "ceiling")}
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
