"""Unpack a folder of wheels, for a machine without network. Needs nothing but the standard library."""

from __future__ import annotations

import compileall
import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

MAX_MIB = 55


def folder_mib(folder: Path) -> float:
    """Size of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


def unsuitable(wheel: str, version: tuple[int, int] = sys.version_info[:2]) -> str | None:
    """Why a wheel cannot be used by a Python of this version, from its name; None if it can."""
    fields = wheel.removesuffix(".whl").split("-")
    if len(fields) < 5:
        return f"{wheel} is not the name of a wheel"
    python, abi, platform = fields[-3:]
    ours = f"cp{version[0]}{version[1]}"
    fits = any(_fits(tag, abi, ours) for tag in python.split("."))
    if fits and (platform == "any" or "linux" in platform and "x86_64" in platform):
        return None
    return f"{wheel} is for {python} on {platform}, and this is {ours} on Linux x86_64"


def _fits(tag: str, abi: str, ours: str) -> bool:
    """Whether a wheel of this tag and ABI runs on our CPython; wheels of abi3 also run on later ones."""
    if tag in ("py3", ours):
        return True
    match = re.fullmatch(r"cp3(\d+)", tag)
    return "abi3" in abi.split(".") and match is not None and int(match[1]) <= int(ours.removeprefix("cp3"))


def install(folder: Path, target: Path) -> list[str]:
    """Unpack all suitable wheels of a folder, and compile them. Returns a line for each thing that is wrong."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        return [f"{folder} holds no wheels: make wheelhouse gathers them. Going on with what is installed."]
    wrong = [reason for wheel in wheels if (reason := unsuitable(wheel.name))]
    if (size := folder_mib(folder)) > MAX_MIB:
        wrong.append(f"{folder} has {size:.1f} MiB, more than the {MAX_MIB} MiB that it should have")
    with ThreadPoolExecutor(8) as pool:
        for wheel, error in pool.map(
            lambda wheel: (wheel, _unpack(wheel, target)), [w for w in wheels if not unsuitable(w.name)]
        ):
            if error:
                wrong.append(f"{wheel.name} is damaged: {error}")
    # Processes that start side by side would all compile the same.
    compileall.compile_dir(target, quiet=2, workers=0)
    return wrong


def _unpack(wheel: Path, target: Path) -> str | None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                parts = PurePosixPath(member.filename).parts
                if parts[0].endswith(".data"):
                    # Of what lies beside the packages, only more of them is of use here.
                    if len(parts) < 3 or parts[1] not in ("purelib", "platlib"):
                        continue
                    member.filename = str(PurePosixPath(*parts[2:]))
                archive.extract(member, target)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return str(error)
    return None
