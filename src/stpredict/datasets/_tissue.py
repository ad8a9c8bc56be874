"""Draw a tissue section: maps of what absorbs light in it, hematoxylin, eosin and the hemoglobin of erythrocytes.

Nothing here knows of genes, stain matrices or colours. The architecture (outline, tumour nests, fat, ...) is a set of
random fields drawn on a coarse grid; its level sets, enlarged, are the borders between tissues; fibres follow a field
of directions; cells are soft ellipses strewn at densities that the architecture gives. Points are (y, x) in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy import fft
from scipy.spatial import KDTree

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Map = NDArray[np.floating]  # (y, x)
    Points = NDArray[np.floating]  # (n, 2), y and x in pixels

MPP = 2.0  # micrometres per pixel: coarse enough to be quick, fine enough that a nucleus is four to six pixels wide
_COARSE = 4  # pixels per step of the coarse grid: the architecture is smooth
_TILE = 768  # textures repeat after this many pixels; what bends and cuts them does not, which hides it
_DIRECTIONS = 12  # fibres are drawn in this many directions, and blended between two of them


@dataclass(frozen=True)
class Tissue:
    """A section before it meets any light."""

    concentration: NDArray[
        np.float32
    ]  # (3, y, x) hematoxylin, eosin, hemoglobin; one unit absorbs an optical density of one
    nests: Map  # (y, x) 1 inside a tumour nest, 0 outside
    covered: NDArray[np.bool_]  # which of the candidate spots lie on the tissue


def draw_tissue(rng: np.random.Generator, shape: tuple[int, int], candidates: Points, n_spots: int) -> Tissue:
    """Draw a section of `shape` pixels whose outline holds exactly `n_spots` of the candidate spot centres."""
    plan = _Plan(rng, shape)
    depth = plan.depth[_at(candidates / _COARSE)]
    deepest = np.argsort(-depth)
    covered = np.isin(np.arange(len(depth)), deepest[:n_spots])
    inside = _edge(plan.enlarge(plan.depth - depth[deepest[n_spots - 1 : n_spots + 1]].mean()), 0.004)

    nest_field = plan.enlarge(plan.nest)
    nests = _edge(nest_field, 0.15)
    fat, wall = _fat(rng, plan, nests)
    collagen, rift = _stroma(rng, plan, nest_field)
    grain = _tiled(_field(rng, (_TILE, _TILE), 0.8), shape)

    solid = inside * (1 - _edge(nest_field - 1.75, 0.12))  # nests are hollow where they are thickest: glands
    solid *= 1 - fat * (1 - 0.75 * wall)
    nuclei = _nuclei(rng, plan, nests, solid, fat, rift)
    blood = _erythrocytes(rng, plan, nests, solid * (1 - fat), rift)

    cytoplasm = nests * (1 + 0.2 * grain)
    hematoxylin = solid * (0.14 * cytoplasm + 0.05 * (1 - nests) * rift) + inside * nuclei * (1 + 0.18 * grain)
    eosin = solid * (0.26 * cytoplasm + (1 - nests) * collagen) * (1 - 0.5 * np.minimum(nuclei, 1)) + 0.2 * blood
    return Tissue(np.maximum(np.stack([hematoxylin, eosin, blood]), 0, dtype=np.float32), nests, covered)


class _Plan:
    """The architecture of one section: coarse random fields, each positive where its tissue is."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int]) -> None:
        self.shape = shape
        coarse = (-(-shape[0] // _COARSE), -(-shape[1] // _COARSE))

        def field(micrometers: float, *, banded: bool = False) -> Map:
            return _field(rng, coarse, micrometers / MPP / _COARSE, banded=banded)

        y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in coarse)
        squircle = (np.abs(y[:, None]) ** 3 + np.abs(x[None, :]) ** 3) ** (4 / 3)
        self.depth = 1 - squircle + 0.12 * field(500) + 0.015 * field(30)
        # At this wavelength, a spot says little about how many nests lie around it.
        self.nest = field(330, banded=True) + 0.35 * field(25) + 0.4 * field(500) - 0.45
        self.fat = field(180) + 0.15 * field(25) - 1.6
        self.lymphoid = field(60) - 1.25
        self.blood = field(150) - 0.5
        self.collagen = field(200)
        self.loose = field(200)
        self.crowding = field(150)
        # Fibres run along a wavy course through the section and bend round the nests.
        course = field(700)
        slope_y, slope_x = np.gradient(self.nest)
        bend = np.exp(2j * (np.arctan2(slope_y, slope_x) + np.pi / 2)) * np.hypot(slope_y, slope_x)
        self.direction = np.exp(2j * 1.2 * course) + 6 * bend

    def enlarge(self, field: Map) -> Map:
        """A coarse field at full resolution."""
        return np.asarray(Image.fromarray(field).resize(self.shape[::-1], Image.Resampling.BICUBIC))


def _fat(rng: np.random.Generator, plan: _Plan, nests: Map) -> tuple[Map, Map]:
    """Where fat is, and the thin walls between its cells of 65 µm."""
    fat = _edge(plan.enlarge(plan.fat), 0.06) * (1 - nests)
    wall = np.zeros_like(fat)
    where = np.nonzero(fat)
    cells = _strewn(rng, plan.shape, 65 / MPP)
    nearest, second = np.transpose(KDTree(cells).query(np.stack(where, -1) + 0.5, k=2)[0])
    wall[where] = np.exp(-(((second - nearest) / 2.2) ** 2))
    return fat, wall


def _stroma(rng: np.random.Generator, plan: _Plan, nest_field: Map) -> tuple[Map, Map]:
    """Eosin of the collagen, and where it is whole (1) or has come apart (0): in rifts and around the nests."""
    angle = 0.5 * np.arctan2(plan.enlarge(plan.direction.imag), plan.enlarge(plan.direction.real))
    fine, bundles = _fibers(rng, angle, 28, 1.8), _fibers(rng, angle, 90, 8)
    loose = plan.enlarge(plan.loose)
    rift = _edge(bundles + 0.35 * fine + 1.6 - 0.75 * loose, 0.35)
    rift *= 1 - np.exp(-(((nest_field + 0.22) / 0.12) ** 2)) * np.clip(0.3 + 0.4 * loose, 0, 0.8)
    eosin = np.maximum(0.42 + 0.12 * plan.enlarge(plan.collagen), 0.15)
    return eosin * (1 + 0.22 * fine + 0.22 * bundles) * rift, rift


def _nuclei(rng: np.random.Generator, plan: _Plan, nests: Map, solid: Map, fat: Map, rift: Map) -> Map:
    """Hematoxylin of the nuclei: large pale ones in nests, small dark lymphocytes, spindles along the fibres."""
    center = _strewn(rng, plan.shape, 10.5 / MPP)
    here, coarse, n = _at(center), _at(center / _COARSE), len(center)
    crowding = plan.crowding[coarse]
    stroma = (1 - nests[here]) * solid[here]
    tumour = nests[here] * solid[here] * 0.62 * np.exp(0.2 * crowding)
    lymphocyte = stroma * (1 - fat[here]) * (0.03 + 0.75 * _edge(plan.lymphoid[coarse], 0.5))
    spindle = stroma * 0.13 * np.exp(0.35 * crowding) * (0.3 + 0.7 * rift[here])

    draw = rng.random(n)
    size = rng.lognormal(0, 0.15, n)
    amount = rng.lognormal(0, 0.2, n) * np.exp(0.12 * crowding)
    turned = rng.uniform(-np.pi / 2, np.pi / 2, n)
    along = 0.5 * np.angle(plan.direction[coarse]) + 0.13 * turned
    total = np.zeros(plan.shape, np.float32)
    taken = np.zeros(n)
    for density, long, short, dye, angle in (
        (tumour, 2.9 * size, 2.1 * size, 0.75, turned),
        (lymphocyte, 1.9 * size, 1.8 * size, 1.15, turned),
        (spindle, 4.0 * size, 1.2 * size, 0.8, along),
    ):
        cell = (taken <= draw) & (draw < taken + density)
        taken += density
        total += _ellipses(plan.shape, center[cell], long[cell], short[cell], angle[cell], dye * amount[cell])
    return total


def _erythrocytes(rng: np.random.Generator, plan: _Plan, nests: Map, free: Map, rift: Map) -> Map:
    """Hemoglobin: discs of 7 µm strewn over patches of bleeding, and what has leaked from them into the collagen."""
    bleeding = _edge(plan.enlarge(plan.blood), 1.0) * free * (1 - 0.85 * nests)
    center = _strewn(rng, plan.shape, 6.8 / MPP)
    here = _at(center)
    center = center[rng.random(len(center)) < 0.45 * bleeding[here] * (0.4 + 0.6 * rift[here])]
    n = len(center)
    radius = np.full(n, 1.7)
    discs = _ellipses(plan.shape, center, radius, radius, np.zeros(n), rng.lognormal(np.log(0.5), 0.15, n))
    return discs + 0.08 * bleeding * rift


def _at(points: Points) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The index of the pixels that hold the points."""
    y, x = points.astype(np.int64).T
    return y, x


def _edge(field: Map, softness: float) -> Map:
    """1 where `field` is positive, 0 where it is negative, a ramp of `softness` to either side of zero."""
    return np.clip(0.5 + field / (2 * softness), 0, 1)


def _tiled(tile: Map, shape: tuple[int, int]) -> Map:
    return np.pad(tile, [(0, max(n - _TILE, 0)) for n in shape], mode="wrap")[: shape[0], : shape[1]]


def _field(rng: np.random.Generator, shape: tuple[int, int], length: float, *, banded: bool = False) -> Map:
    """Gaussian random field of unit variance: of correlation length `length`, or (banded) of that wavelength."""
    size = [fft.next_fast_len(n, real=True) for n in shape]
    frequency = length * np.hypot(fft.fftfreq(size[0])[:, None], fft.rfftfreq(size[1])[None, :])
    power = np.exp(-(((frequency - 1) / 0.3) ** 2) / 2) if banded else np.exp(-((2 * np.pi * frequency) ** 2) / 2)
    white = fft.rfft2(rng.standard_normal(size, dtype=np.float32))
    field = fft.irfft2(white * power.astype(np.float32), s=size)[: shape[0], : shape[1]]
    return (field - field.mean()) / field.std()


def _fibers(rng: np.random.Generator, angle: Map, length: float, width: float) -> Map:
    """Noise of unit variance, drawn out along `angle` (radians from x to y, modulo pi) over `length` by `width`."""
    tile = min(_TILE, max(angle.shape))
    y, x = fft.fftfreq(tile).astype(np.float32)[:, None], fft.rfftfreq(tile).astype(np.float32)[None, :]
    white = fft.rfft2(rng.standard_normal((tile, tile), dtype=np.float32))
    bank = np.empty((tile, tile, _DIRECTIONS), np.float32)
    for i in range(_DIRECTIONS):
        cos, sin = np.float32(np.cos(i * np.pi / _DIRECTIONS)), np.float32(np.sin(i * np.pi / _DIRECTIONS))
        power = np.exp(-0.5 * np.pi**2 * ((length * (x * cos + y * sin)) ** 2 + (width * (y * cos - x * sin)) ** 2))
        texture = fft.irfft2(white * power, s=(tile, tile))
        bank[:, :, i] = texture / texture.std()
    turn = angle * np.float32(_DIRECTIONS / np.pi)
    below = np.floor(turn)
    row, column = np.ogrid[: angle.shape[0], : angle.shape[1]]
    texel = ((row % tile * tile + column % tile) * _DIRECTIONS).astype(np.int32)
    direction = below.astype(np.int32) % _DIRECTIONS
    first = bank.ravel()[texel + direction]
    second = bank.ravel()[texel + (direction + 1) % _DIRECTIONS]
    return first + (turn - below) * (second - first)


def _strewn(rng: np.random.Generator, shape: tuple[int, int], spacing: float) -> Points:
    """Points that keep a distance of about `spacing` to each other, as cells do."""
    lattice = np.indices([int(n / spacing) + 1 for n in shape]).reshape(2, -1).T
    shift = np.stack([np.zeros(len(lattice)), lattice[:, 0] % 2 / 2], -1)  # every second row by half a step
    points = (lattice + shift + rng.uniform(0.05, 0.95, lattice.shape)) * spacing
    return points[(points < shape).all(1)]


def _ellipses(
    shape: tuple[int, int],
    center: Points,
    long: NDArray[np.float64],
    short: NDArray[np.float64],
    angle: NDArray[np.float64],
    amount: NDArray[np.float64],
) -> Map:
    """The sum of soft-edged ellipses of semi-axes `long` and `short`, in their middle `amount` high."""
    window = int(np.ceil(long.max(initial=0) + 1))
    reach = np.arange(-window, window + 1)
    total = np.zeros(shape[0] * shape[1])
    for part in np.array_split(np.arange(len(center)), len(center) // 10_000 + 1):
        pixel = np.floor(center[part]).astype(np.int64)[:, :, None] + reach
        dy, dx = np.moveaxis((pixel + 0.5 - center[part, :, None]).astype(np.float32), 1, 0)
        cos, sin, a, b, height = (
            v[part].astype(np.float32)[:, None, None] for v in (np.cos(angle), np.sin(angle), long, short, amount)
        )
        u = dx[:, None, :] * cos + dy[:, :, None] * sin
        v = dy[:, :, None] * cos - dx[:, None, :] * sin
        value = height * np.clip(0.5 + (1 - np.sqrt((u / a) ** 2 + (v / b) ** 2)) * b, 0, 1)
        row, column = pixel[:, 0, :, None], pixel[:, 1, None, :]
        value *= (row >= 0) & (row < shape[0]) & (column >= 0) & (column < shape[1])
        flat = np.clip(row * shape[1] + column, 0, len(total) - 1)
        total += np.bincount(flat.ravel(), value.ravel(), len(total))
    return total.reshape(shape).astype(np.float32)
