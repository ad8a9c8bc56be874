"""What a part of the benchmark knows: where to compute, how much time is left, and where its results go."""

from __future__ import annotations

import gc
import json
import os
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Part:
    """One part while it runs.

    Attributes
    ----------
    device
        ``"cpu"`` or ``"cuda"``.
    rehearse
        Tiny sizes: nothing that is measured means anything.
    file
        Where the results go, each as soon as it is there.
    deadline
        On the clock of ``time.monotonic``.
    bf16
        Whether the card multiplies in bfloat16.
    have
        Names of results that an earlier run has and that need not be found again.
    """

    device: str
    rehearse: bool
    file: Path
    deadline: float
    bf16: bool = True
    have: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.startswith("cuda")

    def left(self) -> float:
        """Seconds until the limit."""
        return self.deadline - time.monotonic()

    def note(self, name: str, value: Any) -> None:
        """Keep a result."""
        self.results[name] = value
        write_json(self.file, self.results)

    def attempt(self, name: str, run: Callable[[], Any], *, seconds: float = 0.0) -> Any:
        """Keep what ``run`` returns, or why it failed; leave it out with less than ``seconds`` to go."""
        if self.left() < seconds:
            self.note(name, {"left_out": f"{self.left():.0f} s were left, and it takes about {seconds:.0f} s"})
            return None
        try:
            found = run()
        except Exception as error:  # noqa: BLE001  (what follows can still be measured)
            found = failure(error)
        self.note(name, found)
        gc.collect()  # a traceback holds on to the tensors of its frames
        return None if isinstance(found, dict) and "error" in found else found


def failure(error: Exception) -> dict[str, str]:
    """What is written of an exception; files by their path in the checkout or their package, wherever these lie."""
    lines = str(error).strip().splitlines()
    told = traceback.format_exc().replace(f"{Path(__file__).parents[2]}{os.sep}", "")
    told = re.sub(r'File "[^"]*?(site-packages|lib/python[0-9.]+)/', 'File "', told)
    return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}", "traceback": told}


def write_json(file: Path, content: Any) -> None:
    """Write a file that is whole at any time."""
    aside = file.with_name(f"{file.name}.part")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, file)
