from __future__ import annotations

from pathlib import Path

import pytest
from spatialdata import SpatialData

import stpredict as stp


@pytest.fixture(scope="session")
def sections_of_her2st(her2st_dir: Path) -> SpatialData:
    """Sections C3 and C4, which take seconds to decode."""
    return stp.datasets.her2st(["C3", "C4"], path=her2st_dir)


@pytest.fixture
def her2st(sections_of_her2st: SpatialData) -> SpatialData:
    """The same with a table of its own."""
    tables = {"table": sections_of_her2st["table"].copy()}
    return SpatialData(dict(sections_of_her2st.images), shapes=dict(sections_of_her2st.shapes), tables=tables)
