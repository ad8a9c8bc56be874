"""What a picture of scores shows: for each model its values by gene or spot and section, out of the tidy frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from stpredict._data.messages import listed
from stpredict.tl.evaluation.numbers._bootstrap import bootstrap_interval
from stpredict.tl.evaluation.numbers._labels import MEAN, POOLED, POSITION, SECTION_MEAN, TRAINING_MEAN

_N_BOOTSTRAP = 1000
_COLUMNS = ("model", "of", "name", "section", "group")


class Metric(NamedTuple):
    """Its name in words, for genes (and for spots, where it has one), and whether a higher or a lower value is better."""

    of_gene: str
    of_spot: str = ""
    best: str = ""


METRICS = {
    "pcc": Metric("per-gene PCC", "per-spot PCC", "max"),
    "spearman": Metric("per-gene Spearman correlation", best="max"),
    "rmse": Metric("per-gene RMSE", "per-spot RMSE", "min"),
    "mae": Metric("per-gene mean absolute error", best="min"),
    "r2": Metric("per-gene R²", best="max"),
    "variance_ratio": Metric("variance of predictions / of measurements"),
    "moran_measured": Metric("Moran's I of measurements"),
    "moran_predicted": Metric("Moran's I of predictions"),
    "ceiling": Metric("noise ceiling of the per-gene PCC"),
    "pcc_of_ceiling": Metric("per-gene PCC / its noise ceiling", best="max"),
}


class ModelScores(NamedTuple):
    """Scores of a model.

    Attributes
    ----------
    name
        Of the model.
    is_baseline
        Whether cross-validation added it.
    values
        A row for each gene or spot, a column for each section.
    groups
        For each section what the bootstrap resamples.
    """

    name: str
    is_baseline: bool
    values: pd.DataFrame
    groups: list[str]

    @property
    def parts(self) -> list[str]:
        """Sections, or what folds hold of them."""
        return list(self.values.columns)

    def of_each(self) -> pd.Series:
        """Mean over sections of the genes or spots that have a value."""
        return self.values.mean(axis=1).dropna()

    def of_sections(self) -> pd.Series:
        """Median over genes or spots in each section."""
        return self.values.median(axis=0)

    def center(self) -> float:
        """Median over genes or spots in each section, then mean over sections; NaN without any value."""
        return float(self.of_sections().mean())

    def interval(self) -> tuple[float, float]:
        """95 % bootstrap of the centre over groups; NaN with fewer than two groups."""
        medians = self.of_sections().to_numpy()[:, None]
        low, high = bootstrap_interval(medians, self.groups, n_bootstrap=_N_BOOTSTRAP, rng=np.random.default_rng(0))
        return float(low[0]), float(high[0])


def read_scores(
    scores: pd.DataFrame,
    *,
    of: str,
    metric: str,
    models: str | Sequence[str] | None,
    sections: str | Sequence[str] | None,
) -> list[ModelScores]:
    """Take the values to draw out of a scores frame, baselines first.

    Parameters
    ----------
    scores
        What :func:`stpredict.tl.score` or :func:`stpredict.tl.cross_validate` returned.
    of
        ``"gene"`` or ``"spot"``.
    metric
        A column.
    models, sections
        Which, in this order. `None` takes all; of sections, those that are no summary of others.

    Raises
    ------
    KeyError
        The frame lacks columns, or has no rows for a model or section.
    TypeError
        No DataFrame.
    ValueError
        The frame has a gene or spot twice, ``metric`` is unknown, or there is no value to draw.
    """
    if not isinstance(scores, pd.DataFrame):
        raise TypeError(f"`scores` is a {type(scores).__name__}; {_EXPECTED}")
    if lacking := [column for column in _COLUMNS if column not in scores]:
        raise KeyError(f"`scores` has no columns {lacking}; {_EXPECTED}")
    known = [name for name, words in METRICS.items() if (words.of_gene if of == "gene" else words.of_spot)]
    if metric not in known or metric not in scores:
        raise ValueError(f"`metric` is {metric!r}; of {of}s there are {[name for name in known if name in scores]}.")
    rows = scores[(scores["of"] == of).to_numpy()]
    if not len(rows):
        raise ValueError(f"`scores` has no rows of {of}s; {_EXPECTED}")

    baselines = {str(name) for name in rows["model"][rows["baseline"].eq(True)]} if "baseline" in rows else set()
    there = [str(name) for name in rows["model"].unique()]
    chosen = choose(models, sorted(there, key=lambda name: name not in baselines), "models")
    names = [str(name) for name in rows["section"].unique()]
    columns = choose(sections, [name for name in names if name not in (MEAN, POOLED)] or names, "sections", names)
    rows = rows[rows["model"].isin(chosen).to_numpy() & rows["section"].isin(columns).to_numpy()]
    if (twice := rows.duplicated(["model", "name", "section"])).any():
        row = rows[twice].iloc[0]
        raise ValueError(
            f"`scores` has {row['name']!r} in section {row['section']!r} more than once for the model {row['model']!r}. "
            "Where frames were put together, give each model a name of its own."
        )
    group = rows.drop_duplicates("section").set_index("section")["group"].astype(str)
    found = []
    for name in chosen:
        values = rows[(rows["model"] == name).to_numpy()].pivot(index="name", columns="section", values=metric)
        found.append(ModelScores(name, name in baselines, values.reindex(columns=columns), list(group[columns])))
    if not any(model.values.notna().any(axis=None) for model in found):
        hint = " Measure the ceiling with `stp.tl.noise_ceiling` before scoring." if "ceiling" in metric else ""
        raise ValueError(f"`{metric}` is NaN for all {of}s of {chosen}: there is nothing to draw.{hint}")
    return found


_EXPECTED = "pass what `stp.tl.score` or `stp.tl.cross_validate` returned."


def choose(
    wanted: str | Sequence[str] | None, default: list[str], argument: str, there: list[str] | None = None
) -> list[str]:
    """What was asked for, or the default; an error lists what there is."""
    there = there or default
    if wanted is None:
        return default
    asked = [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in asked if name not in there]
    if unknown or not asked:
        raise KeyError(f"`{argument}` is {asked}; expected one or more of {listed(there)}.")
    return asked


def sections_of(parts: list[str]) -> set[str]:
    """Sections that parts are of: where a fold holds less than a section, a part is called such as "C2 · block 1"."""
    return {part.split(" · ")[0] for part in parts}


def noise_ceiling(scores: pd.DataFrame, models: list[ModelScores]) -> pd.Series:
    """Noise ceiling of the genes that have one, mean over the sections drawn."""
    if "ceiling" not in scores:
        return pd.Series(dtype=float)
    rows = scores[((scores["of"] == "gene") & scores["section"].isin(models[0].values.columns)).to_numpy()]
    return rows.groupby("name", observed=True)["ceiling"].mean().dropna()


def references(models: list[ModelScores], metric: str, of: str) -> list[ModelScores]:
    """What a model has to beat: the best baseline that sees no image, and the best of those that do.

    For spots the former is what gene means alone reach. None for metrics of which neither end is the better one. An
    oracle is out of competition.
    """
    if not (best := METRICS[metric].best):
        return []
    sign = 1 if best == "max" else -1
    known = [model for model in models if model.is_baseline and np.isfinite(model.center())]
    blind = [model for model in known if model.name == TRAINING_MEAN or (of == "gene" and model.name == POSITION)]
    seeing = [model for model in known if model.name not in (TRAINING_MEAN, SECTION_MEAN, POSITION)]
    return [max(part, key=lambda model: sign * model.center()) for part in (blind, seeing) if part]
