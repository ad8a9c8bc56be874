"""Sections whose truth is known: drawn tissue, stained and photographed, and counts that depend on what was drawn."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from numpy.typing import NDArray
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Identity

from stpredict.datasets import _jpeg
from stpredict.datasets._image import multiscale_image
from stpredict.datasets._tissue import MPP, draw_tissue

DIAMETER_UM, PITCH_UM, MARGIN_UM = 100.0, 200.0, 320.0
_DIAMETER, _PITCH, _MARGIN = DIAMETER_UM / MPP, PITCH_UM / MPP, MARGIN_UM / MPP
_COVERED = 0.8  # part of the grid of spots that lies on tissue
_SURROUNDINGS = (2.0, 4.0)  # diameters of the ring that context genes respond to, in spot diameters
_BLOCK = 4  # the ring is large: means of blocks of this many pixels stand for its pixels

_STAINS = ("hematoxylin", "eosin", "hemoglobin")
# Optical density of red, green and blue: two stains near Ruifrok & Johnston's, and one that no two-stain matrix knows.
_STAIN_MATRIX = np.array([[0.65, 0.70, 0.29], [0.10, 0.95, 0.28], [0.06, 0.57, 0.82]])

# Mean and standard deviation over spots of what genes respond to: three concentrations and the surroundings.
_TYPICAL_LOAD = np.array([0.265, 0.30, 0.05, 0.15])
_LOAD_SPREAD = np.array([0.15, 0.125, 0.065, 0.075])
_PARTS = {"stain": 0.3, "mix": 0.2, "context": 0.2, "housekeeping": 0.05}  # of the genes; the others are noise
_HOUSEKEEPING = 0.4  # share of the transcripts
_EFFECT = 0.35  # standard deviation over spots of the log rate of a gene that depends on tissue
_COUNTS = 120  # per spot, of a typical gene
_DEPTH_SPREAD, _DISPERSION = 0.25, 0.015


def synthetic(n_sections: int = 2, *, n_spots: int = 500, n_genes: int = 80, random_state: int = 0) -> SpatialData:
    """
    Synthetic H&E sections with spots and counts, made by physics, of which the truth is known.

    Tissue is drawn as maps of concentrations: nuclei of tumour nests, lymphocytes and fibroblasts, fibrous stroma, fat
    and glands, and erythrocytes, whose hemoglobin absorbs light as well. Light is absorbed as Beer and Lambert found,
    with a stain matrix for each section; a camera adds white balance, shot and read noise, and stores 8 bits as JPEG
    (quality 90, no chroma subsampling). Counts are drawn from negative binomial distributions whose rates depend on
    what was drawn, never on the picture.

    Parameters
    ----------
    n_sections
        Number of sections, from two patients in turn. A section does not depend on how many others are made.
    n_spots
        Spots of each section. The default leaves PCCs of unrelated vectors below about 0.1.
    n_genes
        Genes, at least 8: 30 % respond to a stain, 20 % to a mix, 20 % to the context, 5 % are housekeeping genes, the
        others are noise (see Notes).
    random_state
        Seed. The same seed gives the same sections.

    Returns
    -------
    One SpatialData, laid out as :func:`her2st` lays out its sections. For each section, here S1, in a coordinate
    system of its own, ``"S1"`` (pixels of the image, 2 µm each):

    - ``images["S1_image"]``: H&E, uint8, channels r, g, b; multiscale, each scale half the one before it.
    - ``shapes["S1_spots"]``: circles of 100 µm diameter on a square grid of 200 µm pitch; rows in the order of the
      table's.

    and one table for all sections, ``tables["table"]``, spots x genes:

    - ``X``: log1p of counts per 10,000 (float32, CSR); ``layers["counts"]``: the counts (float32, CSR).
    - ``layers["truth"]``: what ``X`` would be without noise (float32). The PCC of ``X`` and ``truth`` is the best that
      any prediction can be expected to reach.
    - ``obs``: ``section``, ``patient``, ``array_row`` and ``array_col`` (integer grid position along the image's y
      and x), ``region`` and ``spot_id`` (element and index of the spot's circle).
    - ``obsm["true_load"]`` (n x 4, float32): mean concentrations of hematoxylin, eosin and hemoglobin over the spot's
      pixels, and the surroundings, which is the mean hematoxylin of tumour nests over a ring around the spot, of 2
      and 4 spot diameters.
    - ``var["kind"]``: "stain", "mix", "context", "housekeeping" or "noise".
    - ``uns["synthetic"]``, the truth about genes and sections:

      - ``genes`` and ``kind`` (G): names and kinds of the G genes, the order of the arrays that follow.
      - ``weights`` (G x 3) and ``context_weight`` (G): change of the gene's log rate per unit of each load.
      - ``stains`` (3): names of the stain matrices' rows.
      - ``stain_matrix``, ``white_balance``, ``direction``: for each section the stain matrix (3 x 3, unit OD vectors),
        the gain of each channel (3), and for each gene the effective OD direction (G x 3): the unit vector v for which
        v · (mean OD of the spot) is, up to scale and a constant, the gene's log rate; NaN for genes that do not
        depend on the spot's own colour.
      - ``mpp``: micrometers per pixel of each spots element's image; ``spot_diameter_um``, ``spot_pitch_um``, ``dispersion`` (of
        the counts: variance = mean + dispersion · mean²), ``random_state``.

    Raises
    ------
    TypeError
        If an argument is not a whole number.
    ValueError
        If an argument is too small.

    Notes
    -----
    The log rate of a gene is linear in one or more loads:

    - *stain*: the concentration of hematoxylin or of eosin;
    - *mix*: hemoglobin together with hematoxylin and eosin of either sign, which a matrix of two stains cannot tell
      apart from more or less of these two;
    - *context*: the surroundings, which the spot's own pixels say little about;
    - *noise*: nothing.

    Genes that depend on tissue come in pairs of equal abundance and opposite weights, and abundant housekeeping genes
    make up what is then missing from a constant total: normalisation to the total does not make noise genes depend on
    tissue. The mean OD over pixels is the mean concentration times the stain matrix (plus a constant, the white
    balance), so that the direction of a gene with weights w is that of inv(stain matrix) · w.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> sdata["table"].shape
    (100, 80)
    >>> sdata["table"].obs["train"] = sdata["table"].obs["section"] != "S2"
    """
    _check_whole("n_sections", n_sections, at_least=1)
    _check_whole("n_spots", n_spots, at_least=1)
    _check_whole("n_genes", n_genes, at_least=8)
    _check_whole("random_state", random_state, at_least=0)
    genes = _make_genes(np.random.default_rng([random_state, 0]), n_genes)

    def make(i: int) -> _Section:
        return _make_section(np.random.default_rng([random_state, i]), f"S{i}", n_spots, genes)

    with ThreadPoolExecutor(2) as pool:  # most of the drawing runs outside of Python's lock
        sections = list(pool.map(make, range(1, n_sections + 1)))
    return SpatialData(
        images={f"{s.name}_image": multiscale_image(s.pixels, s.name) for s in sections},
        shapes={
            f"{s.name}_spots": ShapesModel.parse(
                s.centers[:, ::-1], geometry=0, radius=_DIAMETER / 2, transformations={s.name: Identity()}
            )
            for s in sections
        },
        tables={"table": _table(sections, genes, int(random_state))},
    )


@dataclass(frozen=True)
class _Genes:
    name: NDArray[np.str_]
    kind: NDArray[np.str_]
    abundance: NDArray[np.float64]  # (G,) share of the transcripts of typical tissue
    weights: NDArray[np.float64]  # (G, 4) change of the log rate per unit of load


@dataclass(frozen=True)
class _Section:
    name: str
    pixels: NDArray[np.uint8]
    grid: NDArray[np.int64]  # (n, 2) row and column of each spot
    centers: NDArray[np.floating]  # (n, 2) y and x in pixels
    load: NDArray[np.float64]  # (n, 4)
    rate: NDArray[np.float64]  # (n, G) share of each gene among a spot's transcripts
    counts: NDArray[np.int64]  # (n, G)
    stain_matrix: NDArray[np.float64]
    white_balance: NDArray[np.float64]


def _check_whole(name: str, value: int, *, at_least: int) -> None:
    message = f"`{name}` is {value!r}; expected a whole number of at least {at_least}."
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(message)
    if value < at_least:
        raise ValueError(message)


def _make_genes(rng: np.random.Generator, n_genes: int) -> _Genes:
    pairs = {kind: max(round(_PARTS[kind] * n_genes / 2), 1) for kind in ("stain", "mix", "context")}
    n_housekeeping = max(round(_PARTS["housekeeping"] * n_genes), 1)
    n_tissue = 2 * sum(pairs.values())
    sizes = {kind: 2 * n for kind, n in pairs.items()} | {"housekeeping": n_housekeeping}
    sizes["noise"] = n_genes - sum(sizes.values())

    turn = rng.uniform(0, 2 * np.pi, pairs["mix"])
    unit = np.eye(4)
    response = np.concatenate(
        [
            unit[np.arange(pairs["stain"]) % 2],
            np.stack([np.cos(turn), np.sin(turn), np.ones_like(turn), np.zeros_like(turn)], -1) / np.sqrt(2),
            unit[np.full(pairs["context"], 3)],
        ]
    )
    weights = np.zeros((n_genes, 4))
    weights[:n_tissue:2] = _EFFECT * response / _LOAD_SPREAD
    weights[1:n_tissue:2] = -weights[:n_tissue:2]

    kind = np.repeat(list(sizes), list(sizes.values()))
    name = np.array([f"{k}_{i:02d}" for k, size in sizes.items() for i in range(1, size + 1)])
    abundance = rng.lognormal(0, 0.4, n_genes)
    abundance[1:n_tissue:2] = abundance[:n_tissue:2]
    housekeeping = kind == "housekeeping"
    for these, share in ((housekeeping, _HOUSEKEEPING), (~housekeeping, 1 - _HOUSEKEEPING)):
        abundance[these] *= share / abundance[these].sum()
    return _Genes(name, kind, abundance, weights)


def _make_section(rng: np.random.Generator, name: str, n_spots: int, genes: _Genes) -> _Section:
    side = int(np.ceil(np.sqrt(n_spots / _COVERED)))
    grid = np.indices((side, side)).reshape(2, -1).T
    centers = _MARGIN + _PITCH * grid
    n_pixels = int(2 * _MARGIN + _PITCH * (side - 1))
    tissue = draw_tissue(rng, (n_pixels, n_pixels), centers, n_spots)
    grid, centers = grid[tissue.covered], centers[tissue.covered]

    tumour = tissue.concentration[:1] * tissue.nests
    blocks = tumour.reshape(1, n_pixels // _BLOCK, _BLOCK, n_pixels // _BLOCK, _BLOCK).mean((2, 4))
    ring = [d * _DIAMETER / 2 / _BLOCK for d in _SURROUNDINGS]
    spot = _mean_around(tissue.concentration, centers, 0, _DIAMETER / 2)
    load = np.hstack([spot, _mean_around(blocks, centers / _BLOCK, *ring)])
    rate = _rate(load, genes)

    stain_matrix = _STAIN_MATRIX + rng.normal(0, 0.015, (3, 3))
    stain_matrix /= np.linalg.norm(stain_matrix, axis=1, keepdims=True)
    white_balance = rng.uniform(0.94, 0.975, 3)
    intensity = _transmit(tissue.concentration, stain_matrix, white_balance)
    return _Section(
        name=name,
        pixels=_photograph(rng, intensity),
        grid=grid,
        centers=centers,
        load=load,
        rate=rate,
        counts=_count(rng, rate),
        stain_matrix=stain_matrix,
        white_balance=white_balance,
    )


def _mean_around(
    maps: NDArray[np.float32], centers: NDArray[np.floating], inner: float, outer: float
) -> NDArray[np.float64]:
    """(n, channels) mean over the pixels whose centres are `inner` to `outer` away from each of the (y, x) centres."""
    reach = np.arange(-int(outer) - 1, int(outer) + 1)
    distance = np.hypot(reach[:, None] + 0.5, reach[None, :] + 0.5)
    dy, dx = reach[np.stack(np.nonzero((inner <= distance) & (distance <= outer)))]
    y, x = centers.astype(np.int64).T
    pixel = (y[:, None] + dy) * maps.shape[2] + x[:, None] + dx
    return np.stack([channel.ravel()[pixel].mean(1, dtype=float) for channel in maps], -1)


def _rate(load: NDArray[np.float64], genes: _Genes) -> NDArray[np.float64]:
    """(n, G) share of each gene among a spot's transcripts."""
    rate = genes.abundance * np.exp((load - _TYPICAL_LOAD) @ genes.weights.T)
    housekeeping = genes.kind == "housekeeping"
    # Pairs of genes change the total in second order only; this takes it up.
    left = np.maximum(1 - rate[:, ~housekeeping].sum(1, keepdims=True), 0.02)
    rate[:, housekeeping] *= left / _HOUSEKEEPING
    return rate / rate.sum(1, keepdims=True)


def _count(rng: np.random.Generator, rate: NDArray[np.float64]) -> NDArray[np.int64]:
    typical = _COUNTS * rate.shape[1] / (1 - _HOUSEKEEPING)
    depth = typical * rng.lognormal(0, _DEPTH_SPREAD, (len(rate), 1))
    return rng.poisson(rng.gamma(1 / _DISPERSION, _DISPERSION * depth * rate))


def _transmit(
    concentration: NDArray[np.float32], stain_matrix: NDArray[np.float64], white_balance: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Beer-Lambert: intensities (3, y, x), on the scale of 8 bits, of the light that passes through."""
    od = np.tensordot(stain_matrix.T.astype(np.float32), concentration, 1)
    # The inverse of how the package defines optical density, -log((I + 1) / 256).
    return 256 * white_balance.astype(np.float32)[:, None, None] * np.exp(-od) - 1


def _photograph(rng: np.random.Generator, intensity: NDArray[np.float32]) -> NDArray[np.uint8]:
    noise = rng.standard_normal(intensity.shape, dtype=np.float32)
    noise *= np.sqrt(1 + 0.01 * np.maximum(intensity, 0))  # of reading the sensor, and of counting photons
    pixels = np.clip(np.rint(intensity + noise), 0, 255).astype(np.uint8)
    jpeg = _jpeg.encode(np.ascontiguousarray(pixels.transpose(1, 2, 0)), quality=90)
    return np.ascontiguousarray(_jpeg.decode(jpeg).transpose(2, 0, 1))


def _table(sections: list[_Section], genes: _Genes, random_state: int) -> ad.AnnData:
    obs = pd.concat([_observations(i, s) for i, s in enumerate(sections)])
    for column in ("section", "patient", "region"):
        obs[column] = pd.Categorical(obs[column], categories=obs[column].unique())
    var = pd.DataFrame({"kind": pd.Categorical(genes.kind, categories=[*_PARTS, "noise"])}, index=genes.name)
    counts = sparse.csr_matrix(np.concatenate([s.counts for s in sections]).astype(np.float32))
    table = ad.AnnData(counts.copy(), obs=obs, var=var, layers={"counts": counts})
    sc.pp.normalize_total(table, target_sum=1e4)
    sc.pp.log1p(table)
    table.layers["truth"] = np.log1p(1e4 * np.concatenate([s.rate for s in sections])).astype(np.float32)
    table.obsm["true_load"] = np.concatenate([s.load for s in sections]).astype(np.float32)
    table.uns["synthetic"] = {
        "genes": genes.name,
        "kind": genes.kind,
        "weights": genes.weights[:, :3],
        "context_weight": genes.weights[:, 3],
        "stains": np.array(_STAINS),
        "stain_matrix": {s.name: s.stain_matrix for s in sections},
        "white_balance": {s.name: s.white_balance for s in sections},
        "direction": {s.name: _direction(genes.weights[:, :3], s.stain_matrix) for s in sections},
        "mpp": {f"{s.name}_spots": MPP for s in sections},
        "spot_diameter_um": DIAMETER_UM,
        "spot_pitch_um": PITCH_UM,
        "dispersion": _DISPERSION,
        "random_state": random_state,
    }
    regions = list(obs["region"].cat.categories)
    return TableModel.parse(table, region=regions, region_key="region", instance_key="spot_id")


def _observations(i: int, section: _Section) -> pd.DataFrame:
    row, column = section.grid.T
    return pd.DataFrame(
        {
            "section": section.name,
            "patient": "AB"[i % 2],
            "array_row": row,
            "array_col": column,
            "region": f"{section.name}_spots",
            "spot_id": np.arange(len(row)),
        },
        index=[f"{section.name}_{x}x{y}" for y, x in section.grid],
    )


def _direction(weights: NDArray[np.float64], stain_matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """(G, 3) unit vectors v with v · (concentrations @ stain_matrix) proportional to weights · concentrations."""
    direction = weights @ np.linalg.inv(stain_matrix).T
    length = np.linalg.norm(direction, axis=1, keepdims=True)
    return np.divide(direction, length, out=np.full_like(direction, np.nan), where=length > 0)
