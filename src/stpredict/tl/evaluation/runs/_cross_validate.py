"""Cross-validation: every spot is predicted by models that have seen nothing of its group, and baselines beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from stpredict._data.elements import Elements
from stpredict._data.matrix import read_csr
from stpredict._data.slide import check_spatialdata, open_slide
from stpredict._data.slots import Slots, write_all
from stpredict.pp._reads import Reads, field_of_view
from stpredict.tl.evaluation.numbers._labels import MEAN, POOLED, SECTION_MEAN, TRAINING_MEAN
from stpredict.tl.evaluation.numbers._parts import Part
from stpredict.tl.evaluation.numbers._scores import score_predictions
from stpredict.tl.evaluation.runs._baselines import (
    BASELINES,
    FITTED,
    choose_baselines,
    section_mean,
    training_mean,
)
from stpredict.tl.evaluation.runs._folds import Split, make_folds
from stpredict.tl.evaluation.runs._hiding import FoldData, bare_copy, fold_data
from stpredict.tl.evaluation.runs._jobs import predict_folds
from stpredict.tl.evaluation.runs._once import said_once
from stpredict.tl.evaluation.runs._parts import known_halves, make_parts
from stpredict.tl.evaluation.runs._protocols import PROTOCOLS, read_counts
from stpredict.tl.fitting._declared import declared_reads
from stpredict.tl.fitting._targets import Genes

if TYPE_CHECKING:
    from distributed import Client

# Field of view of M2OST at three levels, the widest of this package's models, in spot diameters: what models that do not say
# how far they see are taken to see.
DEFAULT_MARGIN = 6.2


@said_once()
def cross_validate(
    sdata: SpatialData,
    models: Mapping[str, Callable[..., Any]],
    *,
    split: Split | None = None,
    group_key: str | None = None,
    n_folds: int | None = None,
    margin: float | None = None,
    genes: Genes = None,
    layer: str | None = None,
    counts_layer: str = "counts",
    protocol: str = "default",
    baselines: bool | str | Sequence[str] = True,
    n_perms: int = 1000,
    n_bootstrap: int = 1000,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    client: Client | None = None,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | Sequence[str] | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    section_key: str | None = None,
    patient_key: str | None = None,
    random_state: int = 0,
    inplace: bool = True,
) -> pd.DataFrame:
    """Hold out each group in turn, fit on the others, and score what was never seen, with baselines beside it.

    A model gets a copy of the data in which the expression of all held-out spots is NaN, so that nothing can be learned
    from it: not weights, not genes, not their mean and scale, not when to stop.

    Parameters
    ----------
    sdata
        Images, spots, and a table with log-normalised expression.
    models
        By name, what fits and predicts: ``fit_nsl``, ``fit_m2ost``, ``fit_ridge``, a :func:`functools.partial` of one, or any
        function ``(sdata, *, train_key, key_added, genes, layer)`` that fits on the spots that ``obs[train_key]`` marks,
        and writes predictions of all spots to ``layers[key_added]``. It is given those of ``genes`` (names), ``layer`` (`None`:
        the expression of the training spots is in ``X``) and the keys of elements below that it takes; where nothing was asked
        for, its own defaults hold.
    split
        ``"groups"`` holds out whole groups; ``"blocks"`` strips of tissue across each section, with a margin; ``"random"``
        random spots, which leaks and is there to show by how much. `None` holds out groups where there are several,
        else blocks.
    group_key
        Column of ``obs`` whose groups are held out. `None` means ``patient_key`` where there are several patients, else the
        sections.
    n_folds
        Number of folds. `None` leaves one group out at a time, and makes 5 blocks.
    margin
        Distance along x or y that training spots keep from the spots of a held-out block, in spot diameters, centre to
        centre. It should be no less than the models' field of view, so that no pixel is on both sides. `None` takes the widest
        field of the models and baselines, at least 6.2 (M2OST at three levels) where one does not say how far it sees.
    genes
        What to model: names; one name; a boolean column of ``var``; ``"highly_variable"``; a number, of the genes of highest
        mean; `None` for all genes detected in at least 10 % of the spots. All but names and columns are found anew in each
        fold, on its training spots.
    layer
        Expression, a key of ``layers``. `None` means ``X``.
    counts_layer
        Where counts are, for the protocols that start from them.
    protocol
        ``"default"``: expression as given, correlation over each section. ``"m2ost"`` (Wang et al. 2025): log1p of
        counts per million of the modelled genes (by default 250 of highest mean), whose usual score is the per-spot PCC.
        ``"hest"`` (HEST-bench): log1p of counts of 50 highly variable genes, correlation over all spots of a fold at once.
    baselines
        `True` for all, `False` for none, or names of them: ``"mean of training spots"``, ``"mean of held-out section
        (oracle)"``, ``"position"``, ``"ridge on mean OD"``, ``"ridge on color statistics"``.
    n_perms, n_bootstrap, random_state
        As in :func:`stpredict.tl.score`; ``random_state`` also says which groups share a fold.
    checkpoint_dir
        Folder that keeps the predictions of every finished fold, under the identity of all that they were made of: code and
        settings of the model, fold, expression, pixels, places, features. A run in which these are the same takes them from
        there; what cannot be identified is not kept, and the log says so. `None` writes nothing.
    client
        A :class:`dask.distributed.Client` whose workers fit the folds. `None` fits one after another, here.
    image_key, shapes_key, table_key, coordinate_system
        Which elements to use, as in :func:`stpredict.pp.color_histogram`. `None` finds them.
    section_key, patient_key
        Columns of ``obs`` that name sections and patients. `None` means the table's region column, and that patients are not
        known.
    inplace
        Write the out-of-fold predictions into the table.

    Returns
    -------
    One row for each model, gene or spot, and section, baselines first, as :func:`stpredict.tl.score` returns them, with two columns
    more: ``baseline``, and ``highly_variable``, the 50 most variable genes of the fold's training spots. Where a fold holds
    less than a section, each part is scored by itself (``section`` is then such as ``"C2 · block 1"``): predictions of
    different folds have different offsets, and are not to be correlated together. :func:`stpredict.tl.summarize` makes a short
    table of it, :func:`stpredict.pl.scores` a picture.

    With ``inplace=True``, written to the table (after everything has succeeded), for a model named ``"nsl"``:

    ``layers["nsl_cv"]``
        ``(n_obs, n_vars)`` float32, each spot predicted by the model that has not seen its fold.
    ``obs["nsl_cv_fold"]``
        The fold in which a spot was held out.
    ``var["nsl_cv_fitted"]``
        Genes that were modeled in any fold.
    ``uns["nsl_cv"]``
        ``genes`` and ``params``.

    A name that cannot be a key (it has spaces, say) has the other characters replaced by ``_``.

    Raises
    ------
    KeyError, TypeError, ValueError
        Arguments that do not fit; the table is then unchanged. What a model raises is passed on, with a note that says in
        which fold.

    Warns
    -----
    UserWarning
        The same patient is on both sides of a split by groups.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> cv = stp.tl.cross_validate(sdata, {"nsl": stp.tl.fit_nsl}, baselines=["position", "ridge on mean OD"])
    >>> list(stp.tl.summarize(cv).index)
    ['position', 'ridge on mean OD', 'nsl']
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"`protocol` is {protocol!r}; expected one of {list(PROTOCOLS)}.")
    elements = Elements(
        image_key=image_key,
        shapes_key=shapes_key,
        table_key=table_key,
        coordinate_system=coordinate_system,
        section_key=section_key,
        patient_key=patient_key,
    )
    check_spatialdata(sdata)
    slide = open_slide(sdata, elements, images=False)
    table = slide.table
    keys = _check_models(table, models, inplace)
    references = choose_baselines(baselines)
    expression = read_csr(table, layer)
    counts = read_counts(table, counts_layer, protocol) if PROTOCOLS[protocol].needs_counts else None
    fitted = {name: FITTED[name] for name in references if name in FITTED} | dict(models)
    reads = {name: declared_reads(fit, sdata, slide) for name, fit in fitted.items()}
    how, folds = make_folds(
        slide,
        split=split,
        group_key=group_key,
        n_folds=n_folds,
        margin=_widest(reads) if margin is None else margin,
        random_state=random_state,
    )
    bare = bare_copy(slide)
    data = [fold_data(bare[slide.table_key], expression, counts, fold, genes, PROTOCOLS[protocol]) for fold in folds]
    predicted = predict_folds(
        bare,
        slide,
        data,
        fitted,
        reads,
        settings={"protocol": protocol, "split": how, "version": version("stpredict-histology")},
        checkpoint_dir=checkpoint_dir,
        client=client,
    )
    if TRAINING_MEAN in references:
        predicted[TRAINING_MEAN] = [training_mean(part) for part in data]
    if SECTION_MEAN in references:
        predicted[SECTION_MEAN] = [section_mean(part, slide.section_of) for part in data]
    frame = _score(
        table,
        data,
        make_parts(slide, {fold.name: fold.test for fold in folds}, whole_folds=PROTOCOLS[protocol].pooled),
        {name: predicted[name] for name in (*references, *models)},
        n_perms=n_perms,
        n_bootstrap=n_bootstrap,
        random_state=random_state,
    )
    if inplace:
        params = {"layer": layer or "X", "protocol": protocol, "split": how}
        columns = np.unique(np.concatenate([part.columns for part in data]))
        fold_of = np.full(table.n_obs, None, dtype=object)
        for fold in folds:
            fold_of[fold.test] = fold.name
        results = []
        for name, key in keys.items():
            values = np.full(table.shape, np.nan, dtype=np.float32)
            values[:, columns] = _assemble(predicted[name], data, columns, table.n_obs)
            results.append(
                Slots(
                    key,
                    entry={"genes": list(table.var_names[columns]), "params": {"model": name, **params}},
                    layers={key: values},
                    var={f"{key}_fitted": np.isin(np.arange(table.n_vars), columns)},
                    obs={f"{key}_fold": pd.Categorical(fold_of, categories=[fold.name for fold in folds])},
                )
            )
        for result in results:
            result.check(table, "the model's name")
        write_all(table, results)
    return frame


def _widest(reads: Mapping[str, Reads | None]) -> float:
    """The widest field of view among models, in spot diameters."""
    widths = {name: None if each is None else field_of_view(each) for name, each in reads.items()}
    known = [width for width in widths.values() if width is not None]
    unknown = [name for name, width in widths.items() if width is None]
    return max([*known, *([DEFAULT_MARGIN] if unknown else [])])


def _score(
    table: AnnData,
    data: Sequence[FoldData],
    parts: Mapping[str, Sequence[Part]],
    predicted: Mapping[str, Sequence[np.ndarray]],
    **settings: int,
) -> pd.DataFrame:
    """Scores of all models, one below the other."""
    columns = np.unique(np.concatenate([part.columns for part in data]))
    genes = table.var_names[columns]
    measured = _assemble([part.measured for part in data], data, columns, table.n_obs)
    flat = [part for of_fold in parts.values() for part in of_fold]
    for name, values in predicted.items():
        if all(np.isnan(of_fold).all() for of_fold in values):
            raise ValueError(
                f"The model {name!r} made no predictions: all values of held-out spots are NaN. It may have looked at their "
                "expression, which is NaN in the table that it gets."
            )
    scores = score_predictions(
        measured,
        {name: _assemble(values, data, columns, table.n_obs) for name, values in predicted.items()},
        genes=genes,
        columns=np.arange(len(columns)),
        spots=table.obs_names,
        parts=flat,
        halves=known_halves(table, genes, flat),
        **settings,
    )
    frames = [of_model.frame(name).assign(baseline=name in BASELINES) for name, of_model in scores.items()]
    frame = pd.concat(frames, ignore_index=True)
    for label in ("model", "section", "group", "of", "name"):
        frame[label] = pd.Categorical(frame[label], categories=frame[label].unique())
    return frame.assign(highly_variable=_is_variable(frame, table, data, parts))


def _is_variable(
    frame: pd.DataFrame, table: AnnData, data: Sequence[FoldData], parts: Mapping[str, Sequence[Part]]
) -> pd.Series:
    """Rows of genes that are highly variable in the fold of their section; of aggregates, in any fold."""
    found = [
        pd.DataFrame({"name": table.var_names[of_fold.columns[of_fold.variable]], "section": section})
        for of_fold in data
        for section in (*(part.name for part in parts[of_fold.fold.name]), MEAN, POOLED)
    ]
    variable = pd.MultiIndex.from_frame(pd.concat(found).drop_duplicates())
    rows = pd.MultiIndex.from_arrays([frame["name"].astype(str), frame["section"].astype(str)])
    return pd.Series(rows.isin(variable), index=frame.index) & (frame["of"] == "gene")


def _assemble(values: Sequence[np.ndarray], data: Sequence[FoldData], columns: np.ndarray, n_obs: int) -> np.ndarray:
    """``(n_obs, len(columns))`` from ``(n_test, G)`` of each fold; NaN where there is nothing."""
    whole = np.full((n_obs, len(columns)), np.nan, dtype=np.float32)
    for of_fold, part in zip(values, data, strict=True):
        whole[np.ix_(part.fold.test, np.searchsorted(columns, part.columns))] = of_fold
    return whole


def _check_models(table: AnnData, models: Mapping[str, Callable[..., Any]], inplace: bool) -> dict[str, str]:
    """Keys of the models' predictions."""
    if not isinstance(models, Mapping) or not models:
        raise TypeError(f"`models` is {models!r}; expected functions by name, such as {{'nsl': stp.tl.fit_nsl}}.")
    keys: dict[str, str] = {}
    for name, fit in models.items():
        if not isinstance(name, str):
            raise TypeError(f"`models` names a model {name!r}; expected a string.")
        if not callable(fit):
            raise TypeError(
                f"The model {name!r} is {type(fit).__name__}, not a function (sdata, *, train_key, key_added, ...), "
                "such as `stp.tl.fit_nsl`: it is fitted anew in each fold."
            )
        if isinstance(fit, partial) and fit.keywords.get("layer") is not None:
            raise ValueError(
                f"The model {name!r} sets `layer` to {fit.keywords['layer']!r}. Models get the expression of training spots in "
                "`X`: name the layer that it is taken from with `layer` of `cross_validate`."
            )
        if name in BASELINES:
            raise ValueError(f"{name!r} is the name of a baseline; call the model something else.")
        key = "".join(c if c.isalnum() or c in "_-." else "_" for c in f"{name}_cv")
        if key.casefold() in (other.casefold() for other in keys.values()):
            raise ValueError(
                f"Two models would write to the key {key!r}; give them names that differ in letters or digits."
            )
        keys[name] = key
        if inplace:
            Slots(key, layers={key: None}, var={f"{key}_fitted": None}, obs={f"{key}_fold": None}).check(
                table, "the model's name"
            )
    return keys
