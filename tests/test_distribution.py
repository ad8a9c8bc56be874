from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest

from stpredict._distribution import warn_about_namesakes


def _install(folder: Path, metadata: str, **lists: str) -> None:
    (folder / metadata).mkdir(parents=True)
    for name, text in lists.items():
        (folder / metadata / name.replace("_txt", ".txt")).write_text(text)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    _install(tmp_path, "stpredict_histology-0.1.0.dist-info", RECORD="stpredict/__init__.py,,\n")
    return tmp_path


@pytest.mark.parametrize(
    ("metadata", "lists"),
    [
        ("stpredict-0.0.12.dist-info", {"RECORD": "stpredict/__init__.py,sha256=0,5\n"}),
        ("stpredict-0.0.12.dist-info", {}),
        ("stpredict-0.0.12-py3.11.egg-info", {"top_level_txt": "stpredict\n"}),
    ],
)
def test_another_distribution_beside_ours(site: Path, metadata: str, lists: dict[str, str]) -> None:
    _install(site, metadata, **lists)
    with pytest.warns(UserWarning, match=r"pip uninstall stpredict`.*--force-reinstall --no-deps stpredict-histology`"):
        warn_about_namesakes(["/no/such/folder", str(site)])


def test_distributions_that_do_not_mix(site: Path) -> None:
    """One with a package of another name, and one in a folder where ours is not."""
    _install(site, "stpredict_extras-1.0.dist-info", RECORD="stpredict_extras/__init__.py,,\n")
    _install(site / "elsewhere", "stpredict-0.0.12.dist-info", RECORD="stpredict/__init__.py,,\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_namesakes([str(site), str(site / "elsewhere")])


def test_looking_takes_no_time() -> None:
    """Less than 5 ms of the processor, in the best of several runs, over the packages that are installed here."""
    took = []
    for _ in range(7):
        start = time.process_time()
        warn_about_namesakes()
        took.append(time.process_time() - start)
    assert min(took) < 0.005
