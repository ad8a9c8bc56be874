"""Scores of predictions in all parts of the data, and the tidy frame that they are told in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numba import get_num_threads
from tqdm.auto import tqdm

from stpredict._data.slots import Halves
from stpredict.tl.evaluation.numbers._bootstrap import bootstrap_interval
from stpredict.tl.evaluation.numbers._metrics import gene_metrics, mean_of_known, neighbor_graph, spot_metrics
from stpredict.tl.evaluation.numbers._null import permutation_p_values
from stpredict.tl.evaluation.runs._noise_ceiling import ceiling, mean_halves
from stpredict.tl.evaluation.runs._parts import MEAN, Matrix, Part, by_gene, by_spot, slices

POOLED = "pooled"
METRICS = (
    "n",
    "pcc",
    "rmse",
    "spearman",
    "mae",
    "r2",
    "variance_ratio",
    "moran_measured",
    "moran_predicted",
)
OF_SPOTS = ("n", "pcc", "rmse")
_COLUMNS = (*METRICS, "ceiling", "pcc_of_ceiling", "pcc_low", "pcc_high", "pvals", "pvals_adj")
_LABELS = ("model", "of", "name", "section", "group")


@dataclass(frozen=True)
class Scores:
    """Scores of one model.

    Attributes
    ----------
    genes
        ``G`` names.
    spots
        Names of all scored spots, one part after the other.
    parts
        ``S`` sections, or what folds hold of them.
    by_part, mean, pooled
        :data:`METRICS` and ``ceiling``, ``pcc_of_ceiling`` by name: ``(S, G)`` in each part, ``(G,)`` the mean over the parts
        where a score is defined (``n``: their sum), and ``(G,)`` across the spots of all parts at once. ``mean`` has
        ``pcc_low``, ``pcc_high``, ``pvals`` and ``pvals_adj`` beside them.
    of_spots
        ``n``, ``pcc``, ``rmse`` of the spots.
    """

    genes: np.ndarray
    spots: np.ndarray
    parts: Sequence[Part]
    by_part: dict[str, np.ndarray]
    mean: dict[str, np.ndarray]
    pooled: dict[str, np.ndarray]
    of_spots: dict[str, np.ndarray]

    def frame(self, model: str) -> pd.DataFrame:
        """One row for each gene and part, gene and aggregate, and spot; as :func:`stpredict.tl.score` returns them."""
        blocks = [
            *(
                ("gene", self.genes, part.name, part.group, {name: values[i] for name, values in self.by_part.items()})
                for i, part in enumerate(self.parts)
            ),
            ("gene", self.genes, MEAN, "", self.mean),
            ("gene", self.genes, POOLED, "", self.pooled),
        ]
        starts = np.cumsum([0, *(len(part.rows) for part in self.parts)])
        for part, start, stop in zip(self.parts, starts[:-1], starts[1:], strict=True):
            values = {name: column[start:stop] for name, column in self.of_spots.items()}
            blocks.append(("spot", self.spots[start:stop], part.name, part.group, values))
        frame = pd.concat(
            [
                pd.DataFrame({"of": of, "name": names, "section": section, "group": group} | values)
                for of, names, section, group, values in blocks
            ],
            ignore_index=True,
        )
        frame = frame.assign(model=model).reindex(columns=[*_LABELS, *_COLUMNS]).astype({"n": np.int64})
        for label in _LABELS:
            frame[label] = pd.Categorical(frame[label], categories=frame[label].unique())
        return frame


def score_predictions(
    measured: Matrix,
    predicted: Matrix,
    *,
    genes: Sequence[str],
    columns: np.ndarray,
    spots: Sequence[str],
    parts: Sequence[Part],
    halves: Halves | None = None,
    n_perms: int,
    n_bootstrap: int,
    random_state: int,
) -> Scores:
    """Score predictions against what was measured.

    Parameters
    ----------
    measured, predicted
        ``(n_obs, n_vars)``, dense or sparse; a pair with a NaN on either side does not count.
    genes, columns
        ``G`` names and their columns.
    spots
        ``n_obs`` names.
    parts
        Where to score.
    halves
        Of the counts in each part, from which the highest PCC follows. `None` if they are not known.
    n_perms, n_bootstrap
        0 leaves p-values or intervals out.
    random_state
        Seed.

    Returns
    -------
    The scores.
    """
    rng = np.random.default_rng(random_state)
    with tqdm(total=len(columns) * (len(parts) + (len(parts) > 1)), desc="Scores", delay=2, leave=False) as bar:
        each = [_score_genes(measured, predicted, columns, [part], bar) for part in parts]
        pooled = _score_genes(measured, predicted, columns, parts, bar) if len(parts) > 1 else dict(each[0])
    by_part = {name: np.stack([scores[name] for scores in each]) for name in METRICS}
    mean = {name: mean_of_known(values) for name, values in by_part.items()}
    mean["n"] = by_part["n"].sum(axis=0)
    if halves is not None:
        for scores, found in ((by_part, ceiling(halves)), (mean, ceiling(mean_halves(halves)))):
            scores["ceiling"] = found.value
            scores["pcc_of_ceiling"] = scores["pcc"] / np.where(found.determined, found.value, np.nan)
    mean["pcc_low"], mean["pcc_high"] = bootstrap_interval(
        by_part["pcc"], [part.group for part in parts], n_bootstrap=n_bootstrap, rng=rng
    )
    if n_perms:
        mean["pvals"] = permutation_p_values(measured, predicted, columns, parts, n_perms=n_perms, rng=rng)
        mean["pvals_adj"] = _q_values(mean["pvals"])
    return Scores(
        genes=np.asarray(genes, dtype=object),
        spots=np.asarray(spots, dtype=object)[np.concatenate([part.rows for part in parts])],
        parts=parts,
        by_part=by_part,
        mean=mean,
        pooled=pooled,
        of_spots=_score_spots(measured, predicted, columns, np.concatenate([part.rows for part in parts])),
    )


def _score_genes(
    measured: Matrix,
    predicted: Matrix,
    columns: np.ndarray,
    parts: Sequence[Part],
    bar: tqdm,
) -> dict[str, np.ndarray]:
    """Across the spots of all the parts."""
    rows = np.concatenate([part.rows for part in parts])
    graph = sp.csr_matrix(sp.block_diag([neighbor_graph(part.xy) for part in parts]))
    x, y = by_gene(measured, rows, columns), by_gene(predicted, rows, columns)
    scores = {name: np.empty(len(columns), dtype=np.int64 if name == "n" else np.float64) for name in METRICS}

    def run(genes: slice) -> None:
        for name, values in gene_metrics(x(genes), y(genes), graph).items():
            scores[name][genes] = values
        bar.update(genes.stop - genes.start)

    _run_in_threads(run, slices(len(columns), len(rows)))
    return scores


def _score_spots(measured: Matrix, predicted: Matrix, columns: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    x, y = by_spot(measured, rows, columns), by_spot(predicted, rows, columns)
    scores = {name: np.empty(len(rows), dtype=np.int64 if name == "n" else np.float64) for name in OF_SPOTS}

    def run(spots: slice) -> None:
        for name, values in spot_metrics(x(spots), y(spots)).items():
            scores[name][spots] = values

    _run_in_threads(run, slices(len(rows), len(columns)))
    return scores


def _run_in_threads(run: Callable[[slice], None], chunks: list[slice]) -> None:
    """Numpy and numba let go of Python's lock for most of the time."""
    with ThreadPoolExecutor(get_num_threads()) as pool:
        for _ in pool.map(run, chunks):
            pass


def _q_values(p_values: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's, among the genes that have a p-value."""
    from scipy.stats import false_discovery_control

    q_values = np.full(len(p_values), np.nan)
    if (tested := np.isfinite(p_values)).any():
        q_values[tested] = false_discovery_control(p_values[tested])
    return q_values
