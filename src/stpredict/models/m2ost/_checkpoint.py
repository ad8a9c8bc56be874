"""Checkpoints of training that a kill, a full disk or a flipped bit cannot turn into something else."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

FILE = "last.ckpt"
_PART = ".part"
# What Lightning needs to go on from.
_NEEDED = ("epoch", "global_step", "loops", "state_dict", "optimizer_states", "lr_schedulers")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside the old one and then put it in its place, in one step on any file system.

    Lightning writes to the folder for temporary files and moves from there: between file systems that is a copy over the
    old checkpoint, and a kill meanwhile leaves neither.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save what Lightning hands over."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + _PART)
        try:
            with open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise


def find(folder: Path, expected: Mapping[str, torch.Tensor]) -> Path | None:
    """The checkpoint to go on from, if there is one that is whole; removes parts that killed runs have left.

    Parameters
    ----------
    folder
        Where checkpoints are kept.
    expected
        State of the module that is to be trained, for names and shapes.

    Warns
    -----
    UserWarning
        There is a checkpoint, and it is damaged: it is named, and training begins anew.
    """
    for part in folder.glob(f"*.ckpt{_PART}"):
        with suppress(OSError):
            part.unlink()
    path = folder / FILE
    if not path.is_file():
        return None
    if (problem := _problem(path, expected)) is not None:
        warnings.warn(
            f"The checkpoint {str(path)!r} is damaged ({problem}); training begins anew.", UserWarning, stacklevel=4
        )
        return None
    return path


def _problem(path: Path, expected: Mapping[str, torch.Tensor]) -> str | None:
    """Why one cannot go on from a checkpoint; `None` if one can."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (record := archive.testzip()) is not None:
                return f"the checksum of {record} is wrong"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if missing := [name for name in _NEEDED if name not in content]:
            return f"it lacks {', '.join(missing)}"
        shapes = {name: value.shape for name, value in content["state_dict"].items()}
        if shapes != {name: value.shape for name, value in expected.items()}:
            return "it is of another network or another number of epochs"
    # Zip files and unpicklers fail in many ways, and all of them mean the same.
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None
