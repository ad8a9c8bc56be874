from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stpredict.tl.evaluation.runs._checkpoint import KeptFolds, check_settings


def test_settings_of_a_checkpoint_must_be_the_same(tmp_path: Path) -> None:
    check_settings(tmp_path / "run", {"a": 1, "b": [1, 2]})
    check_settings(tmp_path / "run", {"a": 1, "b": [1, 2]})
    with pytest.raises(ValueError, match=r"other settings \(a, c differ\)"):
        check_settings(tmp_path / "run", {"a": 2, "b": [1, 2], "c": 0})


def test_folds_are_kept(tmp_path: Path) -> None:
    kept = KeptFolds(tmp_path / "cv")
    kept.check("nsl", {"split": "sections"})
    assert kept.read("nsl", 1) is None
    kept.write("nsl", 1, np.array([[1.5, np.nan]], dtype=np.float32))
    again = KeptFolds(tmp_path / "cv")
    again.check("nsl", {"split": "sections"})
    np.testing.assert_array_equal(again.read("nsl", 1), np.array([[1.5, np.nan]], dtype=np.float32))
    assert again.read("m2ost", 1) is None
    with pytest.raises(ValueError, match=r"cv.nsl' holds a run with other settings \(split differ\)"):
        again.check("nsl", {"split": "blocks"})


def test_an_interrupted_write_leaves_no_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptFolds(tmp_path)
    kept.check("nsl", {})

    def killed(stream: object, *_: object, **__: object) -> None:
        stream.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        kept.write("nsl", 0, np.ones((2, 2)))
    assert kept.read("nsl", 0) is None


def test_nothing_is_kept_without_a_folder() -> None:
    kept = KeptFolds(None)
    kept.check("nsl", {})
    kept.write("nsl", 0, np.ones((2, 2)))
    assert kept.read("nsl", 0) is None
