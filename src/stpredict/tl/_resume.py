"""Work that goes on after a kill: a folder belongs to one set of settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
