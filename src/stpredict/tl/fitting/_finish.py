"""One tail for all models: predict the rows that have inputs, and write everything in one step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData

from stpredict._data.columns import mask_or_none
from stpredict._data.compat import layer_names
from stpredict._data.provenance import model_params
from stpredict._data.slide import Slide, own_table
from stpredict._data.slots import Slots, check_layer_size, check_name, check_new_table, write_all, written_under
from stpredict.pp._reads import Inputs

if TYPE_CHECKING:
    from stpredict.models import FittedModel


def slots_of(key: str, *, encodes: bool = False) -> Slots:
    """Names of all that predictions under a key may write."""
    return Slots(
        key,
        layers={key: None},
        obs={f"{key}_train": None},
        var={f"{key}_fitted": None},
        obsm={f"{key}_features": None} if encodes else {},
    )


def check_free(slide: Slide, key: str, table_added: str | None, *, encodes: bool) -> None:
    """Refuse names that are taken, and a layer that would be too large, before the work."""
    if table_added is None:
        slots_of(key, encodes=encodes).check(slide.table)
        check_layer_size(slide.table)
        return
    check_name(key, "key_added")
    if slide.home is None:
        raise ValueError("`table_added` needs a SpatialData to put the table into.")
    check_new_table(slide.home, table_added, "table_added")


def predict_rows(model: FittedModel, inputs: Inputs, n_obs: int, device: str, **how: Any) -> np.ndarray:
    """``(n_obs, G)`` float32 predictions; NaN for rows without inputs. ``how`` are arguments of the model's ``predict``."""
    predicted = np.full((n_obs, len(model.genes)), np.nan, dtype=np.float32)
    if len(inputs.rows):
        predicted[inputs.rows] = model.predict(*inputs.arguments(), device=device, **how)
    return predicted


def write_predictions(
    slide: Slide,
    key: str,
    model: FittedModel,
    predicted: np.ndarray,
    *,
    columns: np.ndarray,
    train: np.ndarray | None,
    encoded: np.ndarray | None,
    afresh: bool,
    table_added: str | None = None,
) -> None:
    """Write predictions, what the model learned, and which rows it was fitted to.

    Parameters
    ----------
    slide
        Whose table receives ``layers[key]``, ``var[f"{key}_fitted"]``, ``obs[f"{key}_train"]``, ``uns[key]``,
        ``obsm[f"{key}_features"]`` and, where it is absent, ``obsm["spatial"]``.
    key
        Where to.
    model
        What predicted.
    predicted
        ``(n_obs, G)``, NaN where nothing was predicted.
    columns
        ``(G,)`` columns of the model's genes, -1 for genes that the table lacks.
    train
        ``(n_obs,)`` rows that the model was fitted to; `None` if that is not known.
    encoded
        What an encoder made.
    afresh
        Forget what was there. Otherwise rows of spots that were not asked for keep their predictions.
    table_added
        Write a table of the model's genes alone, with the predictions as ``X`` too, under this key.
    """
    if table_added is not None:
        rows = slide.rows
        own = own_table(slide, table_added, model.genes)
        predicted, columns = predicted[rows], np.arange(len(model.genes))
        train, encoded = (None if values is None else values[rows] for values in (train, encoded))
        own.table.X = predicted.copy()
        slide = own
    table, found = slide.table, columns >= 0
    layer = np.full(table.shape, np.nan, dtype=np.float32)
    fitted = _chosen(columns[found], table.n_vars)
    here = slide.mask(slide.rows)
    ours = written_under(table, key)
    if not afresh and not here.all() and key in layer_names(table) and key in ours["layers"]:
        layer[~here] = np.asarray(table.layers[key])[~here]
        fitted |= np.isfinite(layer[~here]).any(axis=0)
        encoded = _kept_features(table, key, encoded, here)
    is_kept = np.isfinite(layer[~here]).any()
    layer[np.ix_(here, columns[found])] = predicted[here][:, found]
    train = train if afresh else _kept_training(slide, key, model, train, is_kept=bool(is_kept))
    slots = Slots(
        key,
        entry={"genes": list(model.genes), **model.learned(), "params": {"model": model.kind, **model.params}},
        layers={key: layer},
        var={f"{key}_fitted": fitted},
        obs={} if train is None else {f"{key}_train": train},
        obsm={} if encoded is None else {f"{key}_features": encoded},
    )
    slots.check(table)
    home = (slide.home, slide.table_key) if slide.is_new and slide.home is not None else None
    write_all(table, [slots], home=home, spatial=_places(slide))


def _kept_training(
    slide: Slide, key: str, model: FittedModel, train: np.ndarray | None, *, is_kept: bool
) -> np.ndarray | None:
    """Rows that were fitted to, with those that the table knows of already; `None` where that is not known of all."""
    before = mask_or_none(slide.table.obs, f"{key}_train")
    if train is None or before is None:
        return None if is_kept else train
    params = model_params(slide.table, key)
    if not params or params.get("fit") == model.params.get("fit"):
        return train | before
    return np.where(slide.mask(slide.rows), train, train | before)


def _kept_features(table: AnnData, key: str, encoded: np.ndarray | None, here: np.ndarray) -> np.ndarray | None:
    """What an encoder made, with what it made before of the other rows."""
    before = table.obsm.get(f"{key}_features")
    if encoded is None or before is None or before.shape != encoded.shape:
        return encoded
    return np.where(here[:, None], encoded, np.asarray(before))


def _places(slide: Slide) -> np.ndarray | None:
    """``(n_obs, 2)`` centers in pixels of the finest level of each row's image, as Space Ranger and squidpy have them."""
    if not slide.sections:
        return None
    places = np.full((slide.n_obs, 2), np.nan)
    for section in slide.sections:
        places[section.rows] = section.centers
    return places


def _chosen(columns: np.ndarray, n: int) -> np.ndarray:
    """``(n,)`` which columns these are."""
    found = np.zeros(n, dtype=bool)
    found[columns] = True
    return found
