"""Fitted models on disk: a folder with ``model.json`` and ``weights.safetensors``; nothing is ever unpickled."""

from __future__ import annotations

import json
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from os import PathLike

_JSON, _WEIGHTS = "model.json", "weights.safetensors"
_FORMAT = "stpredict"
_FORMAT_VERSION = 1


class Saveable(ABC):
    """A fitted model that can be saved and loaded."""

    kind: ClassVar[str]

    @abstractmethod
    def to_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """JSON-able header and tensors."""

    @classmethod
    @abstractmethod
    def from_state(cls, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Self:
        """Rebuild the model; raises KeyError or ValueError when header and tensors do not fit."""

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the model into a folder of JSON and safetensors.

        Parameters
        ----------
        path
            Folder to make.
        overwrite
            Replace a model that is there already.

        Returns
        -------
        The folder; :func:`stpredict.models.load` reads it.

        Raises
        ------
        FileExistsError
            Something else is at ``path``, or a model and ``overwrite`` is `False`.
        """
        return save(self, path, overwrite=overwrite)


def save(model: Saveable, path: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a fitted model into a folder.

    Parameters
    ----------
    model
        What to save.
    path
        Folder to make.
    overwrite
        Replace a model that is there already.

    Returns
    -------
    The folder.

    Raises
    ------
    FileExistsError
        Something is at ``path``, and it is not a model or ``overwrite`` is `False`.
    """
    folder = Path(path)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        ours = _is_model(folder)
        if not (ours and overwrite):
            hint = "Pass `overwrite=True` to replace it." if ours else "It is no saved model, so it is left alone."
            raise FileExistsError(f"There is something at {str(folder)!r} already. {hint}")
    header, tensors = model.to_state()
    header = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "kind": model.kind,
        **header,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written elsewhere and then moved: an interrupt leaves the old model or none, never a mixture of two.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as aside:
        new = Path(aside) / "new"
        new.mkdir()
        (new / _JSON).write_text(json.dumps(header, indent=1))
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new / _WEIGHTS)
        if folder.exists():
            folder.rename(Path(aside) / "old")
        new.rename(folder)
    return folder


def _is_model(folder: Path) -> bool:
    """Whether a folder holds nothing but a model that this package saved."""
    if not folder.is_dir() or {file.name for file in folder.iterdir()} - {_JSON, _WEIGHTS}:
        return False
    try:
        header = json.loads((folder / _JSON).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(header, dict) and header.get("format") == _FORMAT


def load(path: str | PathLike[str]) -> Any:
    """Read a fitted model that was saved with its ``save`` method.

    Only JSON and safetensors are read; nothing is unpickled, so a file from a stranger cannot run code.

    Parameters
    ----------
    path
        The folder.

    Returns
    -------
    The fitted model, of the class that was saved.

    Raises
    ------
    FileNotFoundError
        There is no saved model at ``path``.
    ValueError
        The folder is damaged, or was not written by this package, or by a later version of it.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> model = stp.tl.fit_nsl(sdata)
    >>> folder = model.save("nsl-synthetic")
    >>> stp.models.load("nsl-synthetic").genes == model.genes
    True
    """
    folder = Path(path)
    if missing := [name for name in (_JSON, _WEIGHTS) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"There is no saved model at {str(folder)!r}: it lacks {' and '.join(missing)}.")
    try:
        header = json.loads((folder / _JSON).read_text())
    except ValueError as error:
        raise ValueError(f"The model at {str(folder)!r} is damaged: {_JSON} is not JSON ({error}).") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(f"{str(folder / _JSON)!r} was not written by stpredict; load models made by `model.save`.")
    if header.get("format_version") != _FORMAT_VERSION:
        raise ValueError(
            f"The model at {str(folder)!r} has format version {header.get('format_version')}; this version of "
            f"stpredict-histology reads {_FORMAT_VERSION}. Update the package, or save the model again."
        )
    classes = _classes()
    if header.get("kind") not in classes:
        raise ValueError(f"The model at {str(folder)!r} is of kind {header.get('kind')!r}; known are {list(classes)}.")
    try:
        tensors = load_file(folder / _WEIGHTS)
        return classes[header["kind"]].from_state(header, tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"The model at {str(folder)!r} is damaged or incomplete: {error!r}.") from error


def _classes() -> dict[str, type[Saveable]]:
    from stpredict.models._ridge import Ridge
    from stpredict.models.m2ost._model import M2OST
    from stpredict.models.nsl._model import NSL

    return {NSL.kind: NSL, M2OST.kind: M2OST, Ridge.kind: Ridge}
