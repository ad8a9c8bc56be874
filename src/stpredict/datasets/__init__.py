"""Sections to work with: public ones, downloaded and verified, and synthetic ones."""

from stpredict.datasets._her2st import her2st
from stpredict.datasets._synthetic import synthetic

__all__ = ["her2st", "synthetic"]
