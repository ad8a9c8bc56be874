"""Features of spots: taken from the table or one beside it, or made of pixels and positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import TableModel

from stpredict._data.matrix import read_matrix
from stpredict._data.messages import listed
from stpredict._data.slide import Slide
from stpredict._data.spots import annotation
from stpredict.pp._encode import Encoder
from stpredict.pp._histogram import ColorHistogram, HistogramReads
from stpredict.pp._kept import row_fingerprints
from stpredict.pp._pass import PixelReads
from stpredict.pp._patches import PatchReads
from stpredict.pp._position import frames, position_basis, reached
from stpredict.pp._statistics import StatisticsReads

Source = dict[str, Any]
Feature = str | tuple[str, str | None] | Encoder

# What this package makes itself unless `obsm` holds something of that name, with where it comes from.
_MADE = {
    "mean_od": "histogram",
    "color_histogram": "histogram",
    "color_statistics": "statistics",
    "position": "position",
}
# Colors are counted in cubes of 8 x 8 x 8 per image: the same columns on every slide.
_CUBE_BITS = 3


@dataclass(frozen=True)
class Features:
    """Features of all rows of a table.

    Attributes
    ----------
    values
        ``(n_obs, d)``; NaN where a row has none.
    sources
        For each feature by name how it was made and how many columns it has: all that making it again needs.
    common_scale
        Blocks of columns whose relative sizes mean something.
    uncentered
        Blocks of columns whose zero means that nothing is known.
    encoded
        ``(n_obs, d)`` what an encoder made, if there was one.
    """

    values: np.ndarray
    sources: dict[str, Source]
    common_scale: list[slice]
    uncentered: list[slice]
    encoded: np.ndarray | None = None

    @property
    def rows(self) -> np.ndarray:
        """Rows that have all features."""
        return np.flatnonzero(np.isfinite(self.values).all(axis=1))

    def arguments(self) -> tuple[np.ndarray]:
        """What a model predicts :attr:`rows` from."""
        return (self.values[self.rows],)

    def fingerprints(self) -> np.ndarray:
        """``(len(rows),)`` fingerprints of the rows' features."""
        return row_fingerprints(self.values[self.rows].astype(np.float64))


@dataclass(frozen=True)
class FeatureReads:
    """Reads features from their sources; :func:`choose_sources` decides which."""

    kind: ClassVar[str] = "features"

    sources: Mapping[str, Source]
    encoder: Encoder | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if any(source["from"] == "encoder" for source in self.sources.values()):
            if self.encoder is None:
                raise ValueError(
                    "The model was fitted to the features of an encoder, which is not saved with it: pass it as `encoder`."
                )
        elif self.encoder is not None:
            raise ValueError("`encoder` is given, but the model was not fitted to the features of an encoder.")

    @property
    def pixel_reads(self) -> list[PixelReads]:
        """What has to be counted of the pixels."""
        return [reads for source in self.sources.values() if (reads := _pixel_reads(source)) is not None]

    @property
    def patch_reads(self) -> PatchReads | None:
        """The patches that the encoder is given."""
        of_encoder = [source for source in self.sources.values() if source["from"] == "encoder"]
        return PatchReads(1, of_encoder[0]["image_size"], of_encoder[0]["spot_scale"]) if of_encoder else None

    @property
    def needs_image(self) -> bool:
        """Whether any of the features is made of pixels."""
        return any(source["from"] in ("histogram", "statistics", "encoder") for source in self.sources.values())

    @property
    def field_of_view(self) -> float | None:
        """Width of the widest field in spot diameters; `None` where features came from elsewhere."""
        if any(source["from"] in ("obsm", "table") for source in self.sources.values()):
            return None
        widths = [reads.spot_scales[-1] for reads in self.pixel_reads]
        return max([*widths, *([self.patch_reads.field_of_view] if self.patch_reads else [])], default=0.0)

    def describe(self) -> dict[str, Any]:
        """What a model keeps of it."""
        return {"kind": self.kind, "sources": {name: dict(source) for name, source in self.sources.items()}}

    def check(self, slide: Slide) -> None:
        """Refuse what lacks something that cannot be made, before a pixel is read."""
        lost = [
            name for name, source in self.sources.items() if source["from"] == "obsm" and name not in slide.table.obsm
        ]
        if lost:
            raise KeyError(
                f"The model reads {lost} in `obsm`, which has {listed(slide.table.obsm)}. Compute these features as they were "
                "computed for the slide that it was fitted to."
            )

    def assemble(
        self, slide: Slide, counted: Mapping[PixelReads, Any], encoded: np.ndarray | None, training: np.ndarray | None
    ) -> Features:
        """Put the features of all rows together.

        Parameters
        ----------
        slide
            Rows, and features in ``obsm``.
        counted
            Of :attr:`pixel_reads`.
        encoded
            What the encoder made.
        training
            Rows that a model is going to be fitted to; `None` makes the features that it was fitted to.

        Raises
        ------
        KeyError, TypeError, ValueError
            Features that are not there, no numbers, or others than the model was fitted to.
        """
        blocks: dict[str, np.ndarray] = {}
        sources = {name: dict(source) for name, source in self.sources.items()}
        for name, source in sources.items():
            if source["from"] == "obsm":
                blocks[name] = _matched(slide.table.obsm[name], source, f"obsm[{name!r}]")
            elif source["from"] == "table":
                blocks[name] = _from_table(slide, source)
            elif source["from"] == "position":
                basis = position_basis(slide.spots, slide.n_obs, source.setdefault("frames", frames(slide.spots)))
                if training is not None:
                    source["columns"] = reached(basis, training).tolist()
                blocks[name] = basis[:, source["columns"]]
            elif source["from"] == "encoder":
                assert encoded is not None
                blocks[name] = encoded
            elif source["from"] == "histogram":
                histogram = counted[_pixel_reads(source)]  # type: ignore[index]
                blocks[name] = histogram.mean_od if source["of"] == "mean_od" else color_cubes(histogram)
            else:
                blocks[name] = counted[_pixel_reads(source)].values  # type: ignore[index]
        ends = np.cumsum([block.shape[1] for block in blocks.values()])
        columns = {
            name: slice(int(end) - block.shape[1], int(end))
            for (name, block), end in zip(blocks.items(), ends, strict=True)
        }
        for name, block in blocks.items():
            if block.shape[1] != sources[name].setdefault("n_features", block.shape[1]):
                where = "The encoder makes" if sources[name]["from"] == "encoder" else f"{name!r} has"
                raise ValueError(
                    f"{where} {block.shape[1]} features; the model was fitted to {sources[name]['n_features']}."
                )
        values = np.hstack(list(blocks.values()))
        values[~slide.mask(slide.rows)] = np.nan
        uncentered = [columns[name] for name, source in sources.items() if source["from"] == "position"]
        shares = [columns[name] for name, source in sources.items() if source.get("of") == "color_histogram"]
        return Features(values, sources, [*uncentered, *shares], uncentered, encoded)


def choose_sources(
    data: SpatialData | AnnData,
    table: AnnData,
    features: Feature | Sequence[Feature],
    *,
    image_size: int,
    spot_scale: float,
) -> FeatureReads:
    """Decide where each feature comes from, before anything is read.

    Parameters
    ----------
    data
        Whose tables may hold features.
    table
        Whose ``obsm`` may hold features.
    features
        As in :func:`stpredict.tl.fit_ridge`.
    image_size, spot_scale
        Patches of an encoder.

    Raises
    ------
    KeyError
        Neither in ``obsm`` nor made here.
    TypeError, ValueError
        No features, the same twice, or what is neither a name nor callable.
    """
    is_one = isinstance(features, str) or callable(features) or _is_table_key(features)
    wanted: list[Any] = list(features) if isinstance(features, Iterable) and not is_one else [features]
    if not wanted:
        raise ValueError(f"`features` is empty; name keys of `obsm`, or some of {list(_MADE)}.")
    encoder = None
    sources: dict[str, Source] = {}
    for feature in wanted:
        if isinstance(feature, str):
            name, source = feature, _source(table, feature)
        elif _is_table_key(feature):
            if not isinstance(data, SpatialData) or feature[0] not in data.tables:
                has = listed(data.tables) if isinstance(data, SpatialData) else "no other table"
                raise KeyError(f"`features` names the table {feature[0]!r}; there is {has}.")
            name = feature[0] if feature[1] is None else f"{feature[0]}/{feature[1]}"
            source = {"from": "table", "table_key": feature[0], "key": "" if feature[1] is None else feature[1]}
        elif callable(feature):
            name, encoder = "encoder", feature
            PatchReads(1, image_size, spot_scale)  # refuses impossible patches
            source = {"from": "encoder", "image_size": int(image_size), "spot_scale": float(spot_scale)}
        else:
            raise TypeError(
                f"`features` has {feature!r}; expected keys of `obsm`, names, (table_key, key of its `obsm` or None) or a "
                "callable."
            )
        if name in sources:
            raise ValueError(f"`features` has {name!r} more than once.")
        sources[name] = source
    return FeatureReads(sources, encoder)


def color_cubes(histogram: ColorHistogram) -> np.ndarray:
    """Square roots of the shares of colors, ``(n, 512)``; NaN for spots without pixels.

    Square roots, because distances between histograms are then Hellinger's: a share that doubles from 1 % matters no less
    than one that grows from 49 to 50 %.
    """
    levels = histogram.codebook.astype(np.int64) >> (8 - _CUBE_BITS)
    cube = (levels[:, 0] << 2 * _CUBE_BITS) | (levels[:, 1] << _CUBE_BITS) | levels[:, 2]
    of_bin = sp.csr_matrix((np.ones(len(cube)), (np.arange(len(cube)), cube)), shape=(len(cube), 8**_CUBE_BITS))
    with np.errstate(invalid="ignore"):
        shares = (histogram.counts @ of_bin).toarray() / histogram.n_pixels[:, None]
    return np.sqrt(shares, dtype=np.float32)


def _is_table_key(feature: Any) -> bool:
    return (
        isinstance(feature, tuple)
        and len(feature) == 2
        and isinstance(feature[0], str)
        and (feature[1] is None or isinstance(feature[1], str))
        and feature[0] not in _MADE
        and (feature[1] is None or feature[1] not in _MADE)
    )


def _source(table: AnnData, name: str) -> Source:
    origin = _MADE.get(name)
    if origin is not None and (name not in table.obsm or _kept_settings(table, name, origin)):
        kept = _kept_settings(table, "color_histogram" if name == "mean_od" else name, origin)
        if origin == "position":
            return {"from": "position"}
        if origin == "statistics":
            statistics = StatisticsReads(*([tuple(np.atleast_1d(kept["spot_scales"]))] if kept else []))
            return {"from": "statistics", "spot_scales": list(statistics.spot_scale)}
        histogram = HistogramReads(int(kept["bits"]), float(kept["spot_scale"])) if kept else HistogramReads()
        return {"from": "histogram", "of": name, "bits": histogram.bits, "spot_scale": histogram.spot_scale}
    if name not in table.obsm:
        raise KeyError(
            f"No features {name!r} in `obsm`; it has {listed(table.obsm)}. Features that are made when asked for are "
            f"{list(_MADE)}."
        )
    return {"from": "obsm"}


def _kept_settings(table: AnnData, key: str, kind: str) -> Mapping[str, Any]:
    """How what is kept under a key was read; empty where it is not of this kind."""
    entry = table.uns.get(key)
    reads = entry.get("reads") if isinstance(entry, Mapping) else None
    return reads if isinstance(reads, Mapping) and reads.get("kind") == kind else {}


def _pixel_reads(source: Mapping[str, Any]) -> PixelReads | None:
    if source["from"] == "histogram":
        return HistogramReads(int(source["bits"]), float(source["spot_scale"]))
    if source["from"] == "statistics":
        return StatisticsReads(tuple(source["spot_scales"]))
    return None


def _matched(values: Any, source: Source, where: str) -> np.ndarray:
    """Numbers of a feature, the columns of a data frame in the order in which the model knows them."""
    if isinstance(values, pd.DataFrame):
        names = [str(name) for name in values.columns]
        if len(twice := pd.Index(names)[pd.Index(names).duplicated()].unique()):
            raise ValueError(f"`{where}` has columns of the same name, {listed(twice)}; columns are matched by name.")
        if "n_features" in source and "columns" not in source:
            raise ValueError(
                f"`{where}` is a data frame, but the model was fitted to an array without names. Pass `.to_numpy()` if the "
                "columns are the same, in the same order."
            )
        wanted = source.setdefault("columns", names)
        if lacking := [name for name in wanted if name not in names]:
            raise KeyError(
                f"`{where}` lacks {len(lacking)} columns that the model reads, such as {listed(lacking[:5])}."
            )
        values = values.set_axis(names, axis=1)[list(wanted)].to_numpy()
    elif "columns" in source:
        raise ValueError(
            f"`{where}` is no data frame, but the model was fitted to one and matches columns by name, such as "
            f"{listed(source['columns'][:5])}. Pass a data frame."
        )
    values = np.asarray(values.toarray() if hasattr(values, "toarray") else values)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"`{where}` has the shape {values.shape}; expected (n_obs, d).")
    if values.dtype.kind == "f" and values.dtype != np.float16:
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    try:
        if values.dtype.kind == "c":
            raise TypeError("complex numbers")
        return values.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{where}` has values that are no numbers ({error}).") from error


def _from_table(slide: Slide, source: Source) -> np.ndarray:
    """Features that another table holds for the same spots, joined by instance; NaN for spots that it lacks."""
    key, name = source["table_key"], source["key"]
    if slide.home is None or key not in slide.home.tables:
        raise KeyError(f"The model reads features in the table {key!r}, which is not there.")
    other = slide.home.tables[key]
    if TableModel.ATTRS_KEY not in other.uns:
        raise ValueError(f"The table {key!r} does not say which spots it annotates, so its features cannot be joined.")
    if name and name not in other.obsm:
        raise KeyError(f"The table {key!r} has no `obsm[{name!r}]`, only {listed(other.obsm)}.")
    held: Any = other.obsm[name] if name else pd.DataFrame(_dense(read_matrix(other, None)), columns=other.var_names)
    values = _matched(held, source, f"{key}.obsm[{name!r}]" if name else f"{key}.X")
    joined = np.full((slide.n_obs, values.shape[1]), np.nan)
    _, region_key, instance_key = annotation(other)
    for spots in slide.spots:
        rows = np.flatnonzero((other.obs[region_key] == spots.name).to_numpy())
        instances = pd.Index(other.obs[instance_key].iloc[rows])
        if not instances.is_unique:
            raise ValueError(
                f"Several rows of the table {key!r} belong to the same spot of {spots.name!r}, such as "
                f"{listed(instances[instances.duplicated()].unique()[:3])}; expected one row of features per spot."
            )
        place = instances.get_indexer(pd.Index(spots.instances))
        joined[spots.rows[place >= 0]] = values[rows[place[place >= 0]]]
    if not np.isfinite(joined).any():
        raise ValueError(
            f"The table {key!r} has features for none of the spots {listed(spots.name for spots in slide.spots)}."
        )
    return joined


def _dense(matrix: Any) -> np.ndarray:
    return np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix)
