"""How alike images are under the same spots: downsampled copies of one picture, and pictures of different sections.

    python benchmarks/same_picture.py

Prints, for sections C2 to C5 of the HER2+ set, the correlation of the spots' mean optical densities that decides whether two images
show the same picture: with copies at lower resolution, re-compressed and shifted by half a spot, and with the other sections.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Scale, Translation

import stpredict as stp
from stpredict._data import image as images

SECTIONS = ("C2", "C3", "C4", "C5")


def main() -> None:
    """Print the table and write it as JSON."""
    sdata = stp.datasets.her2st(list(SECTIONS))
    pictures = {name: images.full_resolution(sdata[f"{name}_image"]).values for name in SECTIONS}
    found: dict[str, list[float]] = {}
    for name in SECTIONS:
        circles = sdata[f"{name}_spots"]
        xy, radius = np.column_stack([circles.geometry.x, circles.geometry.y]), float(circles.radius.median())
        spots = ShapesModel.parse(xy, geometry=0, radius=radius)
        for factor in (4, 8, 16, 32):
            found.setdefault(f"reduced {factor} times, JPEG", []).append(
                alike(pictures[name], reduced(pictures[name], factor), factor, spots)
            )
        shift = Translation([radius, radius], axes=("x", "y"))
        found.setdefault("shifted by half a spot", []).append(alike(pictures[name], pictures[name], 1, spots, shift))
        for other in SECTIONS:
            if other != name:
                found.setdefault("another section", []).append(alike(pictures[name], pictures[other], 1, spots))
    for what, values in found.items():
        print(f"{what:28} {min(values):.3f} to {max(values):.3f}")
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1))


def reduced(pixels: np.ndarray, factor: int) -> np.ndarray:
    """A thumbnail as it comes out of a JPEG of quality 75."""
    size = (pixels.shape[2] // factor, pixels.shape[1] // factor)
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).resize(size, Image.Resampling.BOX).save(stream, "JPEG", quality=75)
    return np.asarray(Image.open(stream)).transpose(2, 0, 1)


def alike(fine: np.ndarray, other: np.ndarray, factor: int, spots: object, shift: object = None) -> float:
    """Correlation of the mean optical densities under the spots."""
    placed = {"global": Scale([factor, factor], axes=("x", "y")) if shift is None else shift}
    sdata = SpatialData(
        images={
            "fine": Image2DModel.parse(fine, c_coords=["r", "g", "b"]),
            "other": Image2DModel.parse(other, c_coords=["r", "g", "b"], transformations=placed),
        },
        shapes={"spots": spots},
    )
    xy = np.column_stack([sdata["spots"].geometry.x, sdata["spots"].geometry.y])
    colors = []
    for key in ("fine", "other"):
        _, affine = images._map_to_pixels(sdata, "spots", key, None)  # type: ignore[misc]
        per_unit = float(np.sqrt(abs(np.linalg.det(affine[:2, :2]))))
        candidate = images.Candidate(key, "global", affine, per_unit, len(xy))
        colors.append(images._mean_colors(sdata, candidate, xy, 2 * float(sdata["spots"].radius.median())))
    known = np.isfinite(colors[0]).all(axis=1) & np.isfinite(colors[1]).all(axis=1)
    return images.correlation_of_colors(colors[0][known], colors[1][known])


if __name__ == "__main__":
    main()
