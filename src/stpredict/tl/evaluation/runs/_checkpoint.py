"""Folds that are kept in a folder, each under the identity of all that it was made of."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
from psutil import pid_exists
from scanpy import logging as logg

from stpredict._data.identity import digest

# As long as any file system takes, with something to spare.
_MAX_NAME = 100


class KeptFolds:
    """Predictions of folds that are done, in a folder for each model; without a folder, nothing is kept."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._folder = None if folder is None else Path(folder).expanduser()
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()

    @property
    def keeps(self) -> bool:
        """Whether there is a folder."""
        return self._folder is not None

    def read(self, model: str, made_of: str | None, shape: tuple[int, int]) -> np.ndarray | None:
        """Predictions of a fold, if it is done and whole."""
        if self._folder is None or made_of is None or not (file := self._file(model, made_of)).is_file():
            return None
        try:
            with np.load(file, allow_pickle=False) as kept:
                predicted, noted = kept["predicted"], json.loads(str(kept["noted"]))
        except Exception as error:  # noqa: BLE001 (a single bit can make zipfile raise almost anything)
            logg.warning(f"The fold in {str(file)!r} is damaged ({error}): fitting it anew.")
            return None
        if noted != {"made_of": made_of, "checksum": digest(predicted)} or predicted.shape != shape:
            logg.warning(f"The fold in {str(file)!r} is not what was written there: fitting it anew.")
            return None
        return np.asarray(predicted)

    def write(self, model: str, made_of: str | None, predicted: np.ndarray) -> None:
        """Keep the predictions of a fold: moved into place when complete, so that a kill leaves a whole file or none."""
        if self._folder is None or made_of is None:
            return
        file = self._file(model, made_of)
        file.parent.mkdir(parents=True, exist_ok=True)
        noted = json.dumps({"made_of": made_of, "checksum": digest(predicted)})
        handle, unfinished = tempfile.mkstemp(prefix=f"{_unfinished_here()}{os.getpid()}-", dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                np.savez(stream, predicted=predicted, noted=np.array(noted))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(unfinished, file)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise

    def _remove_leftovers(self) -> None:
        """Remove what killed runs on this computer have left: files that carry the number of a process that is gone."""
        assert self._folder is not None
        for path in self._folder.glob(f"*/{_unfinished_here()}*"):
            number = path.name.rsplit("-", 2)[-2]
            if number.isdigit() and not pid_exists(int(number)):
                path.unlink(missing_ok=True)

    def _file(self, model: str, made_of: str) -> Path:
        assert self._folder is not None
        name = "".join(c if c.isalnum() or c in "_-" else "_" for c in model)[:_MAX_NAME]
        return self._folder / (name or "_") / f"fold-{made_of[:16]}.npz"


def _unfinished_here() -> str:
    """How names of unfinished files of this computer begin."""
    return f".unfinished-{''.join(c for c in platform.node() if c.isalnum())}-"
