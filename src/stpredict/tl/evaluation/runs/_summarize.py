"""One row for each model, from scores of genes and spots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from stpredict.tl.evaluation.numbers._bootstrap import bootstrap_interval
from stpredict.tl.evaluation.numbers._labels import MEAN, POOLED

# Highest false discovery rate of the genes that are called predictable.
PREDICTABLE = 0.05
_GOOD_PCC = 0.3


def summarize(
    scores: pd.DataFrame, *, genes: str | Sequence[str] | None = None, n_bootstrap: int = 1000, random_state: int = 0
) -> pd.DataFrame:
    """Make a table of scores, a row for each model.

    Parameters
    ----------
    scores
        What :func:`score` or :func:`cross_validate` returned, or several of them concatenated.
    genes
        Names, or a boolean column of ``scores`` such as ``"highly_variable"``: which genes the per-gene columns are of.
        `None` means all.
    n_bootstrap
        Draws of groups (patients or sections) for the interval; 0 leaves it out.
    random_state
        Seed.

    Returns
    -------
    Indexed by ``model``, in order of appearance, with the columns

    - ``n_sections``, ``n_groups`` (patients, or sections) and ``n_genes``: what was scored;
    - ``n_defined``: genes that have a PCC in any section;
    - ``pcc``, ``pcc_low``, ``pcc_high``: per-gene PCC, the median over genes in each section and its mean over the sections, with
      a 95 % interval (NaN with fewer than 2 groups);
    - ``above_0.3``: share of the genes with a PCC, mean of sections, above 0.3;
    - ``predictable``: share of the genes whose ``pvals_adj`` is at most 0.05, NaN without p-values;
    - ``pcc_of_ceiling``: median over genes of the part of the highest possible PCC, NaN where it is not known;
    - ``spot_pcc``, ``spot_rmse``: medians over the spots of each section, and their mean over the sections.

    Raises
    ------
    KeyError
        Unknown genes or column, or a frame that is no scores.
    TypeError
        The column is not boolean.
    ValueError
        No gene is chosen.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> model = stp.tl.fit_nsl(sdata)
    >>> scores = stp.tl.score(sdata, spots="all", n_perms=0)
    >>> list(stp.tl.summarize(scores).index)
    ['nsl']
    """
    if lacking := [name for name in ("model", "of", "name", "section", "group", "pcc") if name not in scores]:
        raise KeyError(
            f"`scores` has no columns {lacking}; pass what `stp.tl.score` or `stp.tl.cross_validate` returned."
        )
    of_genes = _choose(scores[scores["of"] == "gene"], genes)
    of_spots = scores[scores["of"] == "spot"]
    rows = {
        model: _summary(
            of_genes[of_genes["model"] == model], of_spots[of_spots["model"] == model], n_bootstrap, random_state
        )
        for model in scores["model"].unique()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def _choose(scores: pd.DataFrame, genes: str | Sequence[str] | None) -> pd.DataFrame:
    if genes is None:
        return scores
    if isinstance(genes, str) and genes in scores:
        column = scores[genes]
        if not pd.api.types.is_bool_dtype(column):
            raise TypeError(
                f"`scores[{genes!r}]` has dtype {column.dtype}; expected a boolean column that selects genes."
            )
        chosen = scores[column.to_numpy(dtype=bool)]
        if not len(chosen):
            raise ValueError(f"`scores[{genes!r}]` marks no gene.")
        return chosen
    wanted = [genes] if isinstance(genes, str) else list(genes)
    if not wanted:
        raise ValueError("`genes` is empty; expected names, or a boolean column of `scores`.")
    known = list(scores["name"].unique())
    if unknown := sorted(set(wanted).difference(known)):
        raise KeyError(
            f"{len(unknown)} of `genes` have no scores, such as {unknown[:5]}; `scores` has genes such as {known[:5]}."
        )
    return scores[scores["name"].isin(wanted)]


def _summary(genes: pd.DataFrame, spots: pd.DataFrame, n_bootstrap: int, random_state: int) -> dict[str, float]:
    mean = genes[genes["section"] == MEAN]
    parts = genes[~genes["section"].isin([MEAN, POOLED])]
    medians = parts.groupby(["section", "group"], observed=True, sort=False)["pcc"].median()
    groups = [str(group) for group in medians.index.get_level_values("group")]
    low, high = bootstrap_interval(
        medians.to_numpy()[:, None], groups, n_bootstrap=n_bootstrap, rng=np.random.default_rng(random_state)
    )
    defined = mean["pcc"].notna()
    per_spot = spots.groupby("section", observed=True)[["pcc", "rmse"]].median().mean()
    tested = mean["pvals_adj"].notna()
    predictable = (mean["pvals_adj"] <= PREDICTABLE) & (mean["pcc"] > 0)
    return {
        "n_sections": parts["section"].nunique(),
        "n_groups": len(set(groups)),
        "n_genes": mean["name"].nunique(),
        "n_defined": int(defined.sum()),
        "pcc": float(medians.mean()),
        "pcc_low": float(low[0]),
        "pcc_high": float(high[0]),
        "above_0.3": float((mean["pcc"] > _GOOD_PCC).sum() / defined.sum()) if defined.any() else np.nan,
        "predictable": float(predictable.sum() / tested.sum()) if tested.any() else np.nan,
        "pcc_of_ceiling": float(mean["pcc_of_ceiling"].dropna().median()),
        "spot_pcc": float(per_spot["pcc"]),
        "spot_rmse": float(per_spot["rmse"]),
    }
