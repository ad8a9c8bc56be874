"""Scores of predictions in all parts of the data, and the tidy frame that they are told in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numba import get_num_threads
from tqdm.auto import tqdm

from stpredict.tl.evaluation.numbers._bootstrap import bootstrap_interval
from stpredict.tl.evaluation.numbers._ceiling import Halves, ceiling, mean_halves
from stpredict.tl.evaluation.numbers._labels import MEAN, POOLED
from stpredict.tl.evaluation.numbers._metrics import gene_metrics, mean_of_known, neighbor_graph, spot_metrics
from stpredict.tl.evaluation.numbers._null import permutation_p_values
from stpredict.tl.evaluation.numbers._parts import Matrix, Part, by_gene, by_spot, slices
from stpredict.tl.evaluation.numbers._sides import Measured, Span

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
    predictions: Mapping[str, Matrix],
    *,
    genes: Sequence[str],
    columns: np.ndarray,
    spots: Sequence[str],
    parts: Sequence[Part],
    halves: Halves | None = None,
    n_perms: int,
    n_bootstrap: int,
    random_state: int,
) -> dict[str, Scores]:
    """Score predictions of models against what was measured.

    Models are scored beside each other, so that what does not depend on them is read, sorted and drawn once.

    Parameters
    ----------
    measured
        ``(n_obs, n_vars)``, dense or sparse, in any unit; a pair with a NaN on either side does not count.
    predictions
        By model, as ``measured``.
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
        Seed; each model's scores are those that it would have alone.

    Returns
    -------
    The scores by model.
    """
    rows = np.concatenate([part.rows for part in parts])
    of_genes = _score_genes(measured, predictions, columns, parts, rows)
    of_spots = _score_spots(measured, predictions, columns, rows)
    names = np.asarray(genes, dtype=object), np.asarray(spots, dtype=object)[rows]
    scores = {}
    for model, found in of_genes.items():
        by_part = {name: values[: len(parts)] for name, values in found.items()}
        mean = {name: mean_of_known(values) for name, values in by_part.items()}
        mean["n"] = by_part["n"].sum(axis=0)
        if halves is not None:
            for of_some, highest in ((by_part, ceiling(halves)), (mean, ceiling(mean_halves(halves)))):
                of_some["ceiling"] = highest.value
                of_some["pcc_of_ceiling"] = of_some["pcc"] / np.where(highest.determined, highest.value, np.nan)
        rng = np.random.default_rng(random_state)
        mean["pcc_low"], mean["pcc_high"] = bootstrap_interval(
            by_part["pcc"], [part.group for part in parts], n_bootstrap=n_bootstrap, rng=rng
        )
        pooled = {name: values[-1] for name, values in found.items()}
        scores[model] = Scores(*names, parts, by_part, mean, pooled, of_spots[model])
    if n_perms and scores:
        p_values = permutation_p_values(measured, predictions, columns, parts, n_perms=n_perms, rng=rng)
        for model, values in p_values.items():
            scores[model].mean["pvals"] = values
            scores[model].mean["pvals_adj"] = _q_values(values)
    return scores


def _score_genes(
    measured: Matrix, predictions: Mapping[str, Matrix], columns: np.ndarray, parts: Sequence[Part], rows: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """By model, ``(S, G)`` in each part, and one row more for all of them together where there are several."""
    graphs = [neighbor_graph(part.xy) for part in parts]
    ends = np.cumsum([0, *(len(part.rows) for part in parts)])
    spans = [Span(slice(a, b), graph) for (a, b), graph in zip(pairwise(ends), graphs, strict=True)]
    if len(parts) > 1:
        spans.append(Span(slice(None), sp.csr_matrix(sp.block_diag(graphs))))
    x = by_gene(measured, rows, columns)
    readers = {model: by_gene(predicted, rows, columns) for model, predicted in predictions.items()}
    scores = {model: _empty(METRICS, (len(spans), len(columns))) for model in predictions}

    def run(genes: slice) -> None:
        of_genes = Measured(x(genes), spans)
        for model, y in readers.items():
            for i, sides in enumerate(of_genes.beside(y(genes))):
                for name, values in gene_metrics(*sides).items():
                    scores[model][name][i, genes] = values
            bar.update(genes.stop - genes.start)

    with tqdm(total=len(columns) * len(predictions), desc="Scores", delay=2, leave=False) as bar:
        _run_in_threads(run, slices(len(columns), len(rows)))
    return scores


def _score_spots(
    measured: Matrix, predictions: Mapping[str, Matrix], columns: np.ndarray, rows: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    x = by_spot(measured, rows, columns)
    readers = {model: by_spot(predicted, rows, columns) for model, predicted in predictions.items()}
    scores = {model: _empty(OF_SPOTS, (len(rows),)) for model in predictions}

    def run(spots: slice) -> None:
        of_spots = Measured(x(spots))
        for model, y in readers.items():
            (sides,) = of_spots.beside(y(spots))
            for name, values in spot_metrics(*sides).items():
                scores[model][name][spots] = values

    _run_in_threads(run, slices(len(rows), len(columns)))
    return scores


def _empty(names: Sequence[str], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.empty(shape, dtype=np.int64 if name == "n" else np.float64) for name in names}


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
