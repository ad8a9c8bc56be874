"""Features of spots: taken from the table, or made of pixels and positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from spatialdata import SpatialData

from stpredict._data import slots
from stpredict._data.slide import Section, read_spots
from stpredict.pp._encode import encode
from stpredict.pp._histogram import DEFAULT_BITS, DEFAULT_SPOT_SCALE, ColorHistogram, cached_color_histogram
from stpredict.pp._position import frames, position_basis
from stpredict.pp._statistics import DEFAULT_SPOT_SCALES, cached_color_statistics

Encoder = Callable[[Any], Any]

# What this package makes itself, each with the entry of `uns` that tells its own from what others have put into `obsm`.
_MADE = {
    "mean_od": "color_histogram",
    "color_histogram": "color_histogram",
    "color_statistics": "color_statistics",
    "position": "",
}
# Colours are counted in cubes of 8 x 8 x 8 per image: the same columns on every slide.
_CUBE_BITS = 3


class Features(NamedTuple):
    """Features of all rows of a table.

    Attributes
    ----------
    values
        ``(n_obs, d)``; NaN where a row has none.
    common_scale
        Blocks of columns whose relative sizes mean something.
    sources
        For each feature by name how it was made and how many columns it has: all that making it again needs.
    made
        What was made of pixels, for :func:`write_made`.
    """

    values: np.ndarray
    common_scale: list[slice]
    sources: dict[str, dict[str, Any]]
    made: dict[str, Any]

    @property
    def known(self) -> np.ndarray:
        """``(n_obs,)`` rows that have all features."""
        return np.isfinite(self.values).all(axis=1)


def choose_sources(
    table: AnnData, features: str | Encoder | Sequence[str | Encoder], *, image_size: int, spot_scale: float
) -> tuple[dict[str, dict[str, Any]], Encoder | None]:
    """Decide where each feature comes from, before anything is read.

    Parameters
    ----------
    table
        Whose ``obsm`` may hold features.
    features
        As in :func:`stpredict.tl.fit_ridge`.
    image_size, spot_scale
        Patches of an encoder.

    Returns
    -------
    The sources by name, for :func:`read_features`, and the encoder if there is one.

    Raises
    ------
    KeyError
        Neither in ``obsm`` nor made here.
    TypeError, ValueError
        No features, the same twice, or what is neither a name nor callable.
    """
    wanted = list(features) if isinstance(features, Sequence) and not isinstance(features, str) else [features]
    if not wanted:
        raise ValueError(f"`features` is empty; name keys of `obsm`, or some of {list(_MADE)}.")
    encoder = None
    sources: dict[str, dict[str, Any]] = {}
    for feature in wanted:
        if isinstance(feature, str):
            name, source = feature, _source(table, feature)
        elif callable(feature):
            name, encoder = "encoder", feature
            source = {"from": "encoder", "image_size": int(image_size), "spot_scale": float(spot_scale)}
        else:
            raise TypeError(f"`features` has {feature!r}; expected keys of `obsm`, names or a callable.")
        if name in sources:
            raise ValueError(f"`features` has {name!r} more than once.")
        sources[name] = source
    return sources, encoder


def needs_image(sources: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether any of the features is made of pixels."""
    return any(source["from"] in ("color", "encoder") for source in sources.values())


def read_features(
    sdata: SpatialData,
    table: AnnData,
    sections: Sequence[Section],
    sources: Mapping[str, Mapping[str, Any]],
    *,
    encoder: Encoder | None,
    shapes_key: str | Sequence[str] | None,
    device: str,
) -> Features:
    """Take or make features of all rows; writes nothing.

    Parameters
    ----------
    sdata
        Spots.
    table
        Rows, and features in ``obsm``.
    sections
        Images; empty when no feature needs one.
    sources
        Of :func:`choose_sources`, or of a fitted model.
    encoder
        Makes features of patches.
    shapes_key
        Rows of which spots, as in :func:`stpredict.pp.color_histogram`.
    device
        Where the encoder computes.

    Raises
    ------
    KeyError
        ``obsm`` lacks a feature.
    TypeError, ValueError
        Features that are not numbers, or another number of them than the model was fitted to.
    """
    _check_given(table, sources, encoder)
    spots = read_spots(sdata, table, shapes_key=shapes_key)
    made: dict[str, Any] = {}

    def histogram(source: Mapping[str, Any]) -> ColorHistogram:
        if "color_histogram" not in made:
            made["color_histogram"] = cached_color_histogram(
                sections, table, bits=source["bits"], spot_scale=source["spot_scale"]
            )
        return made["color_histogram"]

    def statistics(source: Mapping[str, Any]) -> np.ndarray:
        made["color_statistics"] = cached_color_statistics(sections, table, spot_scales=source["fields"])
        return made["color_statistics"].values

    def position(source: dict[str, Any]) -> np.ndarray:
        return position_basis(spots, table.n_obs, source.setdefault("frames", frames(spots)))

    def encoded(source: Mapping[str, Any]) -> np.ndarray:
        assert encoder is not None
        made["encoder"] = encode(
            sections,
            table.n_obs,
            encoder,
            image_size=source["image_size"],
            spot_scale=source["spot_scale"],
            device=device,
        )
        return made["encoder"]

    makers: dict[str, Callable[[dict[str, Any]], np.ndarray]] = {
        "mean_od": lambda source: histogram(source).mean_od,
        "color_histogram": lambda source: color_cubes(histogram(source)),
        "color_statistics": statistics,
        "position": position,
        "encoder": encoded,
    }
    copies = {name: dict(source) for name, source in sources.items()}
    blocks, common_scale, n_columns = [], [], 0
    for name, source in copies.items():
        is_made = source["from"] != "obsm"
        block = makers[name](source) if is_made else _from_obsm(table, name)
        if block.shape[1] != source.setdefault("n_features", block.shape[1]):
            where = "The encoder makes" if is_made else f"`obsm[{name!r}]` has"
            raise ValueError(f"{where} {block.shape[1]} features; the model was fitted to {source['n_features']}.")
        if is_made and name in ("color_histogram", "position"):
            common_scale.append(slice(n_columns, n_columns + block.shape[1]))
        blocks.append(block)
        n_columns += block.shape[1]
    values = np.hstack(blocks)
    elsewhere = np.ones(table.n_obs, dtype=bool)
    elsewhere[np.concatenate([section.rows for section in spots])] = False
    values[elsewhere] = np.nan
    return Features(values, common_scale, copies, made)


def write_made(table: AnnData, key: str, made: Mapping[str, Any]) -> None:
    """Keep what was made of pixels in the table; an encoder's features under a key of the model."""
    if "color_histogram" in made:
        slots.write_color_histogram(table, made["color_histogram"])
    if "color_statistics" in made:
        slots.write_color_statistics(table, made["color_statistics"])
    if "encoder" in made:
        slots.write_features(table, key, made["encoder"])


def color_cubes(histogram: ColorHistogram) -> np.ndarray:
    """Square roots of the shares of colours, ``(n, 512)``; NaN for spots without pixels.

    Square roots, because distances between histograms are then Hellinger's: a share that doubles from 1 % matters no less
    than one that grows from 49 to 50 %.
    """
    levels = histogram.codebook.astype(np.int64) >> (8 - _CUBE_BITS)
    cube = (levels[:, 0] << 2 * _CUBE_BITS) | (levels[:, 1] << _CUBE_BITS) | levels[:, 2]
    of_bin = sp.csr_matrix((np.ones(len(cube)), (np.arange(len(cube)), cube)), shape=(len(cube), 8**_CUBE_BITS))
    with np.errstate(invalid="ignore"):
        shares = (histogram.counts @ of_bin).toarray() / histogram.n_pixels[:, None]
    return np.sqrt(shares, dtype=np.float32)


def _check_given(table: AnnData, sources: Mapping[str, Mapping[str, Any]], encoder: Encoder | None) -> None:
    """Refuse what lacks something that cannot be made, before a pixel is read."""
    if lost := [name for name, source in sources.items() if source["from"] == "obsm" and name not in table.obsm]:
        raise KeyError(
            f"The model reads {lost} in `obsm`, which has {list(table.obsm)}. Compute these features as they were computed "
            "for the slide that it was fitted to."
        )
    if any(source["from"] == "encoder" for source in sources.values()):
        if encoder is None:
            raise ValueError(
                "The model was fitted to the features of an encoder, which is not saved with it: pass it as `encoder`."
            )
    elif encoder is not None:
        raise ValueError("`encoder` is given, but the model was not fitted to the features of an encoder.")


def _source(table: AnnData, name: str) -> dict[str, Any]:
    if name in _MADE and (name not in table.obsm or _MADE[name] in table.uns):
        stored = table.uns.get(_MADE[name], {})
        if name == "position":
            return {"from": "position"}
        if name == "color_statistics":
            return {"from": "color", "fields": [float(value) for value in stored.get("fields", DEFAULT_SPOT_SCALES)]}
        bits, spot_scale = stored.get("bits", DEFAULT_BITS), stored.get("spot_scale", DEFAULT_SPOT_SCALE)
        return {"from": "color", "bits": int(bits), "spot_scale": float(spot_scale)}
    if name not in table.obsm:
        raise KeyError(
            f"No features {name!r} in `obsm`; it has {list(table.obsm)}. Features that are made when asked for are "
            f"{list(_MADE)}."
        )
    return {"from": "obsm"}


def _from_obsm(table: AnnData, key: str) -> np.ndarray:
    values: Any = table.obsm[key]
    if isinstance(values, pd.DataFrame):
        values = values.to_numpy()
    values = np.asarray(values.toarray() if hasattr(values, "toarray") else values)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"`obsm[{key!r}]` has the shape {values.shape}; expected (n_obs, d).")
    if values.dtype.kind == "f":
        return values
    try:
        return values.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`obsm[{key!r}]` has values that are no numbers ({error}).") from error
