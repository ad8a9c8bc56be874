"""What the documentation shows is true: names exist on the API pages, and examples run."""

from __future__ import annotations

import doctest
import inspect
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from spatialdata import SpatialData

import stpredict as stp

ROOT = Path(__file__).parents[1]
MODULES: dict[str, ModuleType] = {name: getattr(stp, name) for name in stp.__all__}
PUBLIC = [f"{module}.{name}" for module, content in MODULES.items() for name in content.__all__]
SYNTHETIC = stp.datasets.synthetic
PAGES = ["README.md", "docs/index.md", "docs/explanation/data.md"]


def public_object(name: str) -> object:
    module, _, member = name.partition(".")
    return getattr(MODULES[module], member)


@pytest.mark.parametrize("module", MODULES)
def test_api_page_lists_every_public_name(module: str) -> None:
    page = (ROOT / "docs" / "api" / f"{module}.md").read_text()

    listed = re.findall(rf"^ +({module}\.\w+)$", page, flags=re.MULTILINE)

    assert sorted(listed) == sorted(name for name in PUBLIC if name.startswith(f"{module}."))


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "datasets.her2st"])  # which would download
def test_docstring_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documented = public_object(name)
    monkeypatch.chdir(tmp_path)
    if name != "datasets.synthetic":  # which shows the size of what it makes
        monkeypatch.setattr(stp.datasets, "synthetic", small_synthetic)
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(documented) or "", {}, name, None, None)
    assert example.examples or inspect.isclass(documented), f"stp.{name} has no example"

    report: list[str] = []
    result = doctest.DocTestRunner(ShownOutput()).run(example, out=report.append)

    plt.close("all")
    assert result.failed == 0, "".join(report)


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stp.datasets, "her2st", small_her2st)

    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)

    plt.close("all")


def test_field_page_has_the_measured_numbers() -> None:
    page = (ROOT / "docs" / "explanation" / "field.md").read_text()
    measured = json.loads((ROOT / "benchmarks" / "nsl_field.json").read_text())
    scores = pd.DataFrame(measured["scores"])
    nsl = scores["model"] == "NSL"

    means = scores[~nsl | (scores["pull"] == measured["pull"])].groupby(["field", "sections", "model"])["pcc"].mean()
    for field, of_field in means.groupby("field"):
        values = [of_field[field, *key] for key in [("choice", "NSL"), ("choice", "ridge on mean OD")]]
        assert f"| {field:g} | {values[0]:.3f} | {values[1]:.3f} |" in page

    at_field = scores[nsl & (scores["sections"] == "choice") & (scores["field"] == measured["field"])]
    for pull, of_pull in at_field.groupby("pull"):
        folds = " | ".join(f"{pcc:.3f}" for pcc in of_pull.sort_values("held_out")["pcc"])
        assert f"| {pull:g} | {folds} | {of_pull['pcc'].mean():.3f} |" in page


def test_cross_validation_page_has_the_measured_numbers() -> None:
    page = (ROOT / "docs" / "explanation" / "cross_validation.md").read_text()
    leakage = json.loads((ROOT / "benchmarks" / "leakage.json").read_text())["median_pcc"]
    evaluation = json.loads((ROOT / "benchmarks" / "evaluation.json").read_text())
    readme = (ROOT / "README.md").read_text()

    for of_split in leakage.values():
        assert "| " + " | ".join(f"{pcc:.3f}" for pcc in of_split.values()) + " |" in page
    for model, scores in evaluation["summary"].items():
        if scores["pcc"] is not None:
            row = f"| {scores['pcc']:.3f} [{scores['pcc_low']:.2f}, {scores['pcc_high']:.2f}] |"
            assert row in page and row in readme, model
            by_section = evaluation["median_pcc_by_section"][model]
            assert "| " + " | ".join(f"{pcc:.3f}" for pcc in by_section.values()) + " |" in page, model
        assert f"| {scores['spot_pcc']:.3f} |" in page and f"| {scores['spot_pcc']:.3f} |" in readme


def test_scores_page_has_the_measured_numbers() -> None:
    page = (ROOT / "docs" / "explanation" / "scores.md").read_text()
    null, ceilings, speed = (
        json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
        for name in ("score_null", "noise_ceiling", "score_speed")
    )

    for row in null["results"]:
        if row["spots of"] in ("C2", "C2 to C5"):
            chance, power = row["unrelated"], row["power"]
            shares = [chance["shuffled"], chance["moved"], chance["modes"], power["moved"], power["modes"]]
            shown = " | ".join(f"{share:.2f}" for share in shares)
            assert f"| {row['spots of']} | {row['length']} | {shown} |" in page
    for row in ceilings["simulated"]:
        shown = " | ".join(f"{row[name]:.3f}" for name in ("reached", "estimated", "error"))
        assert f"| {row['spread']:g} | {row['counts']:g} | {shown} |" in page
    (real,) = (row for row in ceilings["real"] if row["min_count"] == 100)
    value, error = (real[name]["mean of sections"] for name in ("ceiling", "error"))
    assert f"is {value:.2f}, with a standard error of\n{error:.2f}" in page
    for case in ("genes", "genes_4_sections", "permutations", "noise_ceiling"):
        beyond = speed[case]["peak_gb"] - speed[case]["before_gb"]
        assert f"| {speed[case]['cpu_seconds']:.0f} | {beyond:.1f} |" in page


def test_m2ost_page_has_the_measured_numbers() -> None:
    page = (ROOT / "docs" / "explanation" / "m2ost.md").read_text()
    runs = json.loads((ROOT / "benchmarks" / "m2ost_recipe.json").read_text())["runs"]

    found = pd.DataFrame(runs).set_index("variant")
    for variant, of_variant in found.groupby("variant"):
        row = next(line for line in page.splitlines() if line.startswith(f"| {variant} |"))
        for pcc in of_variant["pcc"]:
            assert f" {pcc:.3f} |" in row, variant
    synthetic = json.loads((ROOT / "benchmarks" / "m2ost_synthetic.json").read_text())["medians"]
    for kind in ("stain", "mix", "context", "noise"):
        scores = [value for name, value in synthetic[kind].items() if name != "genes"]
        assert "| " + " | ".join(f"{pcc:z.2f}" for pcc in scores) + " |" in page, kind

    slide = json.loads((ROOT / "benchmarks" / "m2ost_training.json").read_text())["cases"]["slide"]
    assert f"Patches of {slide['spots']:,} spots" in page
    assert f"peaks at {slide['RssAnon_peak_gb']:.1f} GB of anonymous and {slide['RssFile_peak_gb']:.1f} GB" in page
    assert f"waits for data {slide['waiting']:.2%}".replace("%", " %") in page


class ShownOutput(doctest.OutputChecker):
    """Compares what an example shows; what it does not show, such as a progress bar, may be anything."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@cache
def made(n_sections: int, n_spots: int, random_state: int) -> SpatialData:
    return SYNTHETIC(n_sections, n_spots=n_spots, n_genes=8, random_state=random_state)


def small_synthetic(n_sections: int = 2, *, n_spots: int, random_state: int = 0) -> SpatialData:
    """Examples are about what is called, not about the data."""
    sdata = made(n_sections, min(n_spots, 20), random_state)
    return SpatialData(dict(sdata.images), shapes=dict(sdata.shapes), tables={"table": sdata["table"].copy()})


def small_her2st(sections: Sequence[str]) -> SpatialData:
    """Synthetic sections under the names of real ones."""
    sdata = small_synthetic(len(sections), n_spots=20)
    table = sdata["table"]
    table.obs["section"] = table.obs["section"].cat.rename_categories(list(sections))
    table.var_names = ["ERBB2", *table.var_names[1:]]
    return sdata
