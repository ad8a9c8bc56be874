"""What all fitted models have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from stpredict.models import _files
from stpredict.models._fields import Arrays, as_seen, check_genes, check_mapping, check_seen, get

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class FittedModel(ABC):
    """A fitted model: arrays in, predictions out.

    What a model is made of is checked when it is made, by a fit or from a file, so that a model that exists can predict.
    Subclasses check their own values in ``__post_init__``, after those that all models have.

    Attributes
    ----------
    genes
        Names of the ``G`` genes.
    reads
        What it reads, for JSON; ``kind`` says which of the inputs the rest describes.
    params
        Settings and provenance, for JSON.
    seen
        ``(k,)`` int64, sorted, unique: fingerprints of the inputs of its training spots; empty when they are not known.
    """

    kind: ClassVar[str]

    genes: list[str]
    reads: dict[str, Any]
    params: dict[str, Any] = field(default_factory=dict)
    seen: np.ndarray = field(default_factory=lambda: as_seen(None))

    def __post_init__(self) -> None:
        check_genes(self.genes)
        check_mapping("reads", self.reads)
        check_mapping("params", self.params)
        check_seen(self.seen)

    @abstractmethod
    def predict(self, *inputs: Any, **options: Any) -> np.ndarray:
        """Predict; takes ``device=`` and what each kind of model documents, and returns ``(n, G)`` float32."""

    @abstractmethod
    def learned(self) -> dict[str, Any]:
        """Arrays, by name, that tell what was learned, besides genes and params."""

    def to_state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What JSON can hold, and arrays, for :meth:`save`."""
        return {"genes": self.genes, "reads": self.reads, "params": self.params}, {"seen": self.seen}

    @classmethod
    @abstractmethod
    def from_state(cls, header: dict[str, Any], arrays: Arrays) -> Self:
        """Rebuild what :meth:`to_state` took apart; raises a DamagedError where something is missing or cannot be."""

    @staticmethod
    def _common_state(header: dict[str, Any], arrays: Arrays) -> dict[str, Any]:
        """Attributes that all models have, out of what :meth:`to_state` took apart."""
        common = {name: get(header, name) for name in ("genes", "reads", "params")}
        check_genes(common["genes"])
        n_seen = arrays.shape("seen")[:1]
        return {**common, **arrays.read({"seen": (n_seen, "int64")})}

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the model into a folder of JSON and safetensors.

        Parameters
        ----------
        path
            Folder to make; ``~`` is the home folder.
        overwrite
            Replace a model that is there already. Whatever happens meanwhile, the old or the new one is there.

        Returns
        -------
        The folder; :func:`stpredict.models.load` reads it.

        Raises
        ------
        FileExistsError
            Something else is at ``path``, or a model and ``overwrite`` is `False`.
        TypeError
            ``params`` has values that JSON cannot hold.
        """
        header, arrays = self.to_state()
        return _files.write(path, {"kind": self.kind, **header}, arrays, overwrite=overwrite)
