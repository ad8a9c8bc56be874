"""What differs between the supported versions of the libraries below, each met here and nowhere else."""

from __future__ import annotations

from anndata import AnnData


def layer_names(table: AnnData) -> list[str]:
    """Keys of ``layers``. anndata 0.13 lists ``X`` among them, under the key `None`, which is no name to show or sort."""
    return [name for name in table.layers if name is not None]
