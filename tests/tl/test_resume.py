from __future__ import annotations

from pathlib import Path

import pytest

from stpredict.tl._resume import check_settings


def test_settings_of_a_checkpoint_must_be_the_same(tmp_path: Path) -> None:
    check_settings(tmp_path / "run", {"a": 1, "b": [1, 2]})
    check_settings(tmp_path / "run", {"a": 1, "b": [1, 2]})
    with pytest.raises(ValueError, match=r"other settings \(a, c differ\)"):
        check_settings(tmp_path / "run", {"a": 2, "b": [1, 2], "c": 0})
