"""Another distribution of the same import name.

PyPI's ``stpredict`` is a project of its own that also installs a folder ``stpredict``. pip puts the files of both into
one folder without a word, and uninstalling either takes files of the other away.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

_OURS = "stpredict-histology"
_PACKAGE = "stpredict"


def warn_about_namesakes(folders: Iterable[str] | None = None) -> None:
    """Warn if another distribution has put its files into this package's folder.

    Only names of files are read, because ``importlib.metadata.packages_distributions`` opens every package's metadata.

    Parameters
    ----------
    folders
        Where packages are installed. `None` means ``sys.path``.

    Warns
    -----
    UserWarning
        There is one; the message says how to mend it.
    """
    if others := sorted({name for folder in folders or sys.path for name in _namesakes(folder or ".")}):
        names = " ".join(others)
        warnings.warn(
            f"Another distribution, {names}, installs a package {_PACKAGE!r} into the same folder as {_OURS}: their files "
            f"are mixed. Run `pip uninstall {names}` and then `pip install --force-reinstall --no-deps {_OURS}`.",
            stacklevel=2,
        )


def _namesakes(folder: str) -> list[str]:
    """Names of the distributions in a folder that holds ours as well, and that install a package of its name."""
    try:
        entries = [name for name in os.listdir(folder) if name.lower().startswith(_PACKAGE)]
    except OSError:  # an archive, or no folder at all
        return []
    metadata = {
        re.sub(r"[-_.]+", "-", entry.split("-")[0]).lower(): Path(folder, entry)
        for entry in entries
        if entry.endswith((".dist-info", ".egg-info"))
    }
    if _OURS not in metadata:
        return []
    return [name for name, path in metadata.items() if name != _OURS and _has_package(path)]


def _has_package(metadata: Path) -> bool:
    """Whether a distribution's list of files names the package; without such a list, whether its own name does."""
    lists = [path for name in ("RECORD", "top_level.txt") if (path := metadata / name).is_file()]
    if not lists:
        return metadata.name.split("-")[0].lower() == _PACKAGE
    return any(
        line.split("/")[0] == _PACKAGE for path in lists for line in path.read_text("utf-8", "replace").splitlines()
    )
