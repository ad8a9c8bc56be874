from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from stpredict.datasets import _jpeg


def test_pillow_gives_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    pixels = coarse.repeat(5, axis=0).repeat(5, axis=1)
    file = _jpeg.encode(pixels, quality=90)
    decoded = _jpeg.decode(file)

    monkeypatch.setitem(sys.modules, "imagecodecs", None)

    np.testing.assert_array_equal(_jpeg.decode(file), decoded)
    np.testing.assert_array_equal(_jpeg.decode(_jpeg.encode(pixels, quality=90)), decoded)
    assert np.abs(decoded.astype(int) - pixels).mean() < 10


def test_pillow_gives_the_same_pixels_of_a_section(her2st_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = next((her2st_dir / "her2st/ST-imgs/C/C2").glob("*.jpg")).read_bytes()
    decoded = _jpeg.decode(file)

    monkeypatch.setitem(sys.modules, "imagecodecs", None)

    np.testing.assert_array_equal(_jpeg.decode(file), decoded)
