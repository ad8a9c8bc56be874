"""Work that goes on after a kill: a folder belongs to one set of settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def check_settings(checkpoint_dir: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of a run with other settings; note them down for the next one."""
    file = checkpoint_dir / "settings.json"
    text = json.dumps(settings, indent=1, sort_keys=True)
    if file.is_file():
        before = json.loads(file.read_text())
        now = json.loads(text)
        if changed := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
            raise ValueError(
                f"{str(checkpoint_dir)!r} holds a run with other settings ({', '.join(changed)} differ); choose another "
                "`checkpoint_dir`, or delete it to begin anew."
            )
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


class KeptFolds:
    """Predictions of folds that are done, in a folder for each model; without a folder, nothing is kept."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._folder = None if folder is None else Path(folder)

    def check(self, model: str, settings: Mapping[str, Any]) -> None:
        """Refuse folds that were made with other settings."""
        if self._folder is not None:
            check_settings(self._folder / model, settings)

    def read(self, model: str, fold: int) -> np.ndarray | None:
        """Predictions of a fold, if it is done."""
        if self._folder is None or not (file := self._file(self._folder, model, fold)).is_file():
            return None
        return np.asarray(np.load(file, allow_pickle=False))

    def write(self, model: str, fold: int, predicted: np.ndarray) -> None:
        """Keep the predictions of a fold."""
        if self._folder is None:
            return
        file = self._file(self._folder, model, fold)
        # Moved into place when complete: a kill leaves a whole file or none.
        unfinished = file.with_suffix(".unfinished")
        with unfinished.open("wb") as stream:
            np.save(stream, predicted, allow_pickle=False)
        unfinished.replace(file)

    @staticmethod
    def _file(folder: Path, model: str, fold: int) -> Path:
        return folder / model / f"fold-{fold}.npy"
