"""The notebooks of ``tutorials/`` run, and are committed as they ran."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))

# What replaces the cell tagged "parameters": the same story on small synthetic sections.
PARAMETERS = {
    "evaluation_her2": """
sdata = stp.datasets.synthetic(n_spots=100, n_genes=10)
n_genes = 10
genes = ["stain_01", "noise_01"]
shown = ["S2"]
""",
    "nsl_her2": """
sdata = stp.datasets.synthetic(n_spots=30, n_genes=10)
held_out = "S2"
gene = "stain_01"
n_genes = 10
""",
}

# A notebook as large as this is slow to open and to clone.
MAX_BYTES = 3e6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_synthetic_data(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = PARAMETERS[path.stem]

    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]

    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "not run once, from top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    shown = [output.get("text", "") + "".join(map(str, _texts(output))) for output in outputs]
    assert not [text for text in shown if re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/|site-packages", text)]
    assert path.stat().st_size < MAX_BYTES


def _texts(output: nbformat.NotebookNode) -> list[str]:
    return [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
