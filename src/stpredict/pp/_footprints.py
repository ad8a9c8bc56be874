"""The pixels of round fields: circles around spots are ellipses in an image, and an ellipse is one chord in each row."""

from __future__ import annotations

from typing import NamedTuple, Self

import numba
import numpy as np
from scanpy import logging as logg

from stpredict._data.slide import Section

# Images that a field may be wide: it is glass almost everywhere then, and most likely in other units.
_MAX_IMAGES = 8
# Pixels whose center is on the edge of the field belong to it, whatever rounding says.
_ON_THE_EDGE = 1e-9


class Footprints(NamedTuple):
    """The ellipses P·u² + 2·Q·u·v + R·v² ≤ 1, in pixels around each center, that circles become."""

    centers: np.ndarray
    conic: np.ndarray
    half_width: np.ndarray
    half_height: np.ndarray

    def of(self, spots: np.ndarray) -> Self:
        """Those of some spots."""
        return self._replace(**{name: values[spots] for name, values in self._asdict().items()})


def footprints(section: Section, spot_scale: float) -> Footprints:
    """Ellipses of all spots of a section, ``spot_scale`` spot diameters across."""
    inverse = np.linalg.inv(section.affine[:2, :2])
    form = inverse.T @ inverse
    scale = (1 - _ON_THE_EDGE) / (spot_scale * section.radii) ** 2
    conic = scale[:, None] * np.array([form[0, 0], form[0, 1], form[1, 1]])
    determinant = conic[:, 0] * conic[:, 2] - conic[:, 1] ** 2
    return Footprints(section.centers, conic, np.sqrt(conic[:, 2] / determinant), np.sqrt(conic[:, 0] / determinant))


@numba.njit(nogil=True, cache=True)
def chord(v: float, conic: np.ndarray, center_x: float) -> tuple[int, int]:
    """First pixel, and the one after the last, of an ellipse in the row that lies ``v`` below its center."""
    p, q, r = conic
    discriminant = (q * v) ** 2 - p * (r * v * v - 1)
    if discriminant < 0:
        return 0, 0
    root = np.sqrt(discriminant)
    return int(np.ceil(center_x + (-q * v - root) / p - 0.5)), int(np.floor(center_x + (-q * v + root) / p - 0.5)) + 1


@numba.njit(nogil=True, cache=True)
def whole_pixels(centers: np.ndarray, conic: np.ndarray) -> np.ndarray:
    """Pixels of each ellipse, on the image or not."""
    whole = np.zeros(len(centers), dtype=np.int64)
    for i in range(len(centers)):
        p, q, r = conic[i]
        half_height = np.sqrt(p / (p * r - q * q))
        for y in range(int(np.floor(centers[i, 1] - half_height)), int(np.ceil(centers[i, 1] + half_height)) + 1):
            start, stop = chord(y + 0.5 - centers[i, 1], conic[i], centers[i, 0])
            whole[i] += max(stop - start, 0)
    return whole


def check_reach(section: Section, spot_scale: float) -> None:
    """Refuse fields that reach absurdly far beyond the image, before anything is counted.

    Raises
    ------
    ValueError
        The width of the widest field, and that of the image.
    """
    widest = spot_scale * float(section.diameters.max())
    if widest > _MAX_IMAGES * max(section.width, section.height):
        raise ValueError(
            f"A field of {spot_scale:g} spot diameters of {section.name!r} is {widest:.3g} pixels wide, on an image "
            f"{section.image_key!r} of {section.width} x {section.height}. Check the spots' radius, the transformations and "
            "`spot_scale`."
        )


def warn_of_tiny_spots(section: Section, whole: np.ndarray) -> None:
    """Name spots whose fields have no pixel; most likely they are in other units than the transformations say."""
    if n_tiny := int((whole == 0).sum()):
        logg.warning(
            f"{n_tiny} spots of {section.name!r} are smaller than a pixel of {section.image_key!r} and have no color. "
            "Check their radius and the transformations, or choose a larger `spot_scale`."
        )
