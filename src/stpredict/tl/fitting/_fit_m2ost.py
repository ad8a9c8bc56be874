"""Fit M2OST to a SpatialData."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from anndata import AnnData
from scanpy import logging as logg
from spatialdata import SpatialData

from stpredict._data.elements import Elements
from stpredict.pp._patches import DEFAULT_SPOT_SCALE, Patches, PatchReads
from stpredict.tl.fitting._declared import reads_by
from stpredict.tl.fitting._inputs import start_fit
from stpredict.tl.fitting._targets import Genes
from stpredict.tl.fitting._validation import validation_mask

if TYPE_CHECKING:
    from stpredict.models import M2OST

_MIN_SPOTS = 16
# Arguments of Lightning's trainer that say what is shown and noted.
_SHOWN = ("callbacks", "enable_model_summary", "enable_progress_bar", "log_every_n_steps", "logger", "profiler")


def _reads(
    _sdata: SpatialData,
    _table: AnnData | None,
    *,
    preset: str = "small",
    network_kwargs: Mapping[str, Any] | None = None,
    spot_scale: float = DEFAULT_SPOT_SCALE,
    **_: Any,
) -> PatchReads:
    from stpredict.models import M2OSTModule

    config = M2OSTModule.from_preset(preset, 1, **(network_kwargs or {})).config
    return PatchReads(config["levels"], config["image_size"], spot_scale)


@reads_by(_reads)
def fit_m2ost(
    sdata: SpatialData,
    *,
    genes: Genes = None,
    gene_key: str | None = None,
    train_key: str | None = None,
    layer: str | None = None,
    preset: str = "small",
    network_kwargs: Mapping[str, Any] | None = None,
    spot_scale: float = DEFAULT_SPOT_SCALE,
    recipe: str = "default",
    max_epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    stain_jitter: float | None = None,
    patience: int | None = None,
    validation: float = 0.0,
    key_added: str = "m2ost",
    table_added: str | None = None,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | Sequence[str] | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    store: str | PathLike[str] | None = None,
    checkpoint_dir: str | PathLike[str] | None = None,
    device: str = "auto",
    precision: str = "auto",
    section_key: str | None = None,
    patient_key: str | None = None,
    trainer_kwargs: Mapping[str, Any] | None = None,
    random_state: int = 0,
    inplace: bool = True,
) -> M2OST:
    """Train M2OST, a transformer that looks at each spot at several scales at once.

    Parameters
    ----------
    sdata
        Images, spots, and a table with log-normalised expression.
    genes, gene_key, train_key, layer
        What to fit, on which spots, as in :func:`stpredict.tl.fit_nsl`. Expression is standardised per gene on the
        training spots.
    preset
        Size of the network: ``"tiny"`` (minutes on a laptop), ``"small"`` (the published one), ``"base"``, ``"large"``.
    network_kwargs
        Other parameters of :class:`stpredict.models.M2OSTModule`, such as ``levels``, ``depth``, ``dropout``, ``mask_ratio``.
    spot_scale
        Field of view of level 0 in spot diameters; level l sees 2^l times as much.
    recipe
        ``"default"`` (AdamW, warm-up, cosine, 30 epochs, batches of 8; measured in the documentation's page on M2OST) or
        ``"paper"`` (Adam, 1e-4, 100 epochs, batches of 96).
    max_epochs, batch_size, learning_rate, weight_decay, stain_jitter, patience
        Override the recipe. ``stain_jitter`` is the standard deviation of random factors and offsets of each channel's
        optical density; ``patience`` the epochs without a lower validation loss after which training stops.
    validation
        Share of the training spots that is set aside to choose the best epoch and stop early: whole patients if there
        are several, else whole sections, else a strip of the section; held-out rows are never used. The default, 0,
        trains on all training spots to the last epoch, which predicts better when there are few sections: one of three
        that is set aside is a third of what there is to learn from.
    key_added, table_added
        Where the results go, as in :func:`stpredict.tl.fit_nsl`.
    image_key, shapes_key, table_key, coordinate_system
        Which elements to use, as in :func:`stpredict.pp.color_histogram`. `None` finds them.
    store
        Folder that keeps the patches for the next fit, as in :func:`stpredict.pp.patches`. `None` keeps them in memory,
        or in a temporary file when they are large.
    checkpoint_dir
        Folder for a checkpoint after every epoch and a CSV log. Runs that differ in what they are fitted to (pixels, spots,
        expression, settings) have folders of their own in it; a killed run goes on from its own. `None` writes nothing.
    device
        ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:<number>"``.
    precision
        ``"auto"`` (bf16 where the hardware is faster with it), ``"bf16"`` or ``"32"``.
    section_key, patient_key
        Columns of ``obs`` that name sections and patients, for the choice of validation spots. `None` means the table's
        region column, and that patients are not known.
    trainer_kwargs
        For :class:`lightning.pytorch.Trainer`, such as ``{"devices": 4, "num_nodes": 2, "strategy": "ddp"}``,
        ``{"accumulate_grad_batches": 2}`` or ``{"enable_progress_bar": False}``.
    random_state
        Seed of the initial weights, the split, the order and the augmentation.
    inplace
        Write predictions and parameters into the table.

    Returns
    -------
    The fitted model. With ``inplace=True``, written to the table (after everything has succeeded):

    ``layers["m2ost"]``
        ``(n_obs, n_vars)`` float32 predictions for all spots, training spots included; NaN for genes that are not
        modeled and spots without pixels.
    ``var["m2ost_fitted"]``, ``obs["m2ost_train"]``
        Genes that are modeled, and spots that the model was fitted to or chosen by (validation).
    ``uns["m2ost"]``
        ``genes``, ``history`` (per epoch ``train_loss``, ``val_loss``, ``val_pcc``, ``learning_rate``) and ``params``.
    ``obsm["spatial"]``
        Centers of the spots in pixels of their image, where the table had none.

    What a former call wrote under this key, scores included, is taken away.

    Raises
    ------
    KeyError, TypeError, ValueError
        Elements, genes, keys or values that do not fit; the table is then unchanged.
    ArithmeticError
        The loss is not finite in the first epoch; if that happens later, the last good weights are kept, with a warning.
    MemoryError
        The memory of the GPU or the computer is full.

    References
    ----------
    Wang et al. 2025, M2OST: Many-to-one Regression for Predicting Spatial Transcriptomics from Digital Pathology
    Images, AAAI, arXiv 2409.15092.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> model = stp.tl.fit_m2ost(sdata, preset="tiny", max_epochs=1)
    >>> "m2ost" in sdata["table"].layers
    True
    """
    import torch

    from stpredict.models import M2OST, M2OSTModule
    from stpredict.models._device import resolve_device, resolve_precision
    from stpredict.models.m2ost._training import RECIPES, Data, train

    if recipe not in RECIPES:
        raise ValueError(f"`recipe` is {recipe!r}; expected one of {list(RECIPES)}.")
    changed: dict[str, Any] = {
        "max_epochs": max_epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "stain_jitter": stain_jitter,
        "patience": patience,
    }
    plan = replace(RECIPES[recipe], **{name: value for name, value in changed.items() if value is not None})
    if plan.max_epochs < 1 or plan.batch_size < 1 or not plan.learning_rate > 0:
        raise ValueError(f"Expected positive `max_epochs`, `batch_size` and `learning_rate`, got {plan}.")
    if not 0 <= validation < 1:
        raise ValueError(f"`validation` is {validation!r}; expected a share from 0 (none) to below 1.")
    precision = resolve_precision(precision, resolve_device(device))
    elements = Elements(
        image_key=image_key,
        shapes_key=shapes_key,
        table_key=table_key,
        coordinate_system=coordinate_system,
        section_key=section_key,
        patient_key=patient_key,
    )
    with start_fit(
        sdata,
        elements,
        _reads(sdata, None, preset=preset, network_kwargs=network_kwargs, spot_scale=spot_scale),
        genes=genes,
        gene_key=gene_key,
        train_key=train_key,
        layer=layer,
        min_spots=_MIN_SPOTS,
        key_added=key_added,
        table_added=table_added,
        inplace=inplace,
        device=device,
        store=store,
    ) as fit:
        patches, targets = cast(Patches, fit.inputs), fit.targets
        is_validation, how = np.zeros(len(targets.rows), dtype=bool), "none"
        if validation > 0:
            is_validation, how = validation_mask(
                fit.slide, targets.rows, fraction=validation, random_state=random_state
            )
            logg.info(f"Validating on {is_validation.sum()} of {len(targets.rows)} training spots: {how}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_state)
            network = M2OSTModule.from_preset(preset, len(targets.genes), **(network_kwargs or {}))
        learning = targets.values[~is_validation].astype(np.float64)
        mean, scale = learning.mean(axis=0), learning.std(axis=0)
        scale[scale == 0] = 1.0  # constant outside the validation spots
        standardized = np.zeros((len(patches), len(targets.genes)), dtype=np.float32)
        standardized[fit.positions] = (targets.values - mean) / scale
        settings = {
            **asdict(plan),
            "recipe": recipe,
            "preset": preset,
            "n_validation": int(is_validation.sum()),
            "validation_on": how,
            "random_state": int(random_state),
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        identity = fit.identity(
            {
                **settings,
                "network": network.config,
                "validation": is_validation,
                "on": precision,
                "trainer": _that_train(trainer_kwargs or {}),
            }
        )
        network, history = train(
            network,
            Data(patches, standardized, fit.positions[~is_validation], fit.positions[is_validation]),
            plan,
            random_state=random_state,
            device=fit.device,
            precision=precision,
            checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir).expanduser() / identity[:16],
            trainer_kwargs=trainer_kwargs,
        )
        model = M2OST(
            genes=targets.genes,
            network=network,
            mean=mean,
            scale=scale,
            history=history,
            **fit.kept(**settings),
        )
        if inplace:
            fit.finish(model, key_added, gene_key, table_added, precision=precision)
    return model


def _that_train(trainer_kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Arguments of the trainer that bear upon what the network becomes."""
    plain = (bool, int, float, str, list, tuple, type(None))
    return {
        name: repr(value) if isinstance(value, plain) else type(value).__qualname__
        for name, value in trainer_kwargs.items()
        if name not in _SHOWN
    }
