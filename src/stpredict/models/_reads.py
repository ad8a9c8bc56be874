"""What models read: the values that ``FittedModel.reads`` may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stpredict.models._fields import DamagedError, check_integer, check_mapping, check_number, get, short

# A field of 1,000 spot diameters is wider than any slide.
MAX_SPOT_SCALE = 1e3
_MAX_IMAGE_SIZE = 2**14
_SOURCES = ("obsm", "table", "histogram", "statistics", "position", "encoder")


def check_kind(reads: Mapping[str, Any], kind: str) -> None:
    """Raise a DamagedError unless a model reads this kind of input."""
    if (found := get(reads, "kind", within="reads.")) != kind:
        raise DamagedError("reads.kind", f"is {short(found)}; expected {kind!r}")


def check_histogram(reads: Mapping[str, Any]) -> None:
    """Raise a DamagedError unless these are colour histograms that can be made."""
    check_kind(reads, "histogram")
    for name in ("bits", "spot_scale"):
        get(reads, name, within="reads.")
    _check_settings("reads.", reads)


def check_patches(reads: Mapping[str, Any], *, levels: int, image_size: int) -> None:
    """Raise a DamagedError unless these are patches that can be cut, and those of the network."""
    check_kind(reads, "patches")
    get(reads, "spot_scale", within="reads.")
    for name, of_network in (("levels", levels), ("image_size", image_size)):
        value = get(reads, name, within="reads.")
        if type(value) is not int or value != of_network:
            raise DamagedError(f"reads.{name}", f"is {short(value)}, but the network takes {of_network}")
    _check_settings("reads.", reads)


def check_features(reads: Mapping[str, Any], *, n_features: int) -> None:
    """Raise a DamagedError unless these are features that can be made, as many as there are columns."""
    check_kind(reads, "features")
    sources = get(reads, "sources", within="reads.")
    check_mapping("reads.sources", sources)
    total = 0
    for name, source in sources.items():
        field = f"reads.sources.{name}"
        check_mapping(field, source)
        if (origin := get(source, "from", within=f"{field}.")) not in _SOURCES:
            raise DamagedError(f"{field}.from", f"is {short(origin)}; expected one of {', '.join(_SOURCES)}")
        check_integer(f"{field}.n_features", get(source, "n_features", within=f"{field}."), 1, n_features)
        _check_settings(f"{field}.", source)
        total += source["n_features"]
    if total != n_features:
        raise DamagedError("reads.sources", f"names {total} features, but the model has {n_features} columns")


def _check_settings(within: str, settings: Mapping[str, Any]) -> None:
    """Raise a DamagedError unless those of the settings that are given can be followed."""
    if "bits" in settings:
        check_integer(f"{within}bits", settings["bits"], 1, 8)
    if "spot_scale" in settings:
        check_number(f"{within}spot_scale", settings["spot_scale"], 0, MAX_SPOT_SCALE)
    if "image_size" in settings:
        check_integer(f"{within}image_size", settings["image_size"], 1, _MAX_IMAGE_SIZE)
    if "spot_scales" in settings:
        scales = settings["spot_scales"]
        if not isinstance(scales, list) or not scales:
            raise DamagedError(f"{within}spot_scales", f"is {short(scales)}; expected a list of numbers")
        for scale in scales:
            check_number(f"{within}spot_scales", scale, 0, MAX_SPOT_SCALE)
    if "frames" in settings:
        check_mapping(f"{within}frames", settings["frames"])
        for name, frame in settings["frames"].items():
            if not isinstance(frame, list) or len(frame) != 3:
                raise DamagedError(f"{within}frames.{name}", f"is {short(frame)}; expected x, y and half a side")
            for value, low in zip(frame, (-1e300, -1e300, 0), strict=True):
                check_number(f"{within}frames.{name}", value, low, 1e300)
