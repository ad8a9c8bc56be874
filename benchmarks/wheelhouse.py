"""Gather what gpu.py needs on a machine without network: wheels for Python 3.12 on Linux, and four sections.

    python benchmarks/wheelhouse.py                    # into wheelhouse/; make wheelhouse does the same

Versions are those of requirements.lock. The sections are taken from the cache folder of stpredict.datasets, and downloaded
into it when they are not there. Wheels that the folder holds already are kept, so a second run downloads nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from _gpu.wheels import MAX_MIB, folder_mib, unsuitable

ROOT = Path(__file__).parents[1]
SECTIONS = ("C2", "C3", "C4", "C5")
PYTHON = (3, 12)
NO_WHEELS = {"docrep", "pims"}  # sources only
GLIBC = (28, 27, 24, 17, 12, 5)  # of the platforms that a system of 2018 or later can run
# Folders of packages that nobody imports; those of datashader alone have 10 MB.
NOT_NEEDED = {"examples", "tests"}


def main() -> None:
    """Fill the folder, check its size, and list it in a manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "wheelhouse")
    parser.add_argument("--without-data", action="store_true", help="leave the sections out")
    args = parser.parse_args()
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    wanted = locked((ROOT / "benchmarks/wheelhouse.txt").read_text(), (ROOT / "requirements.lock").read_text())
    gather(wanted, folder)
    if not args.without_data:
        copy_sections(folder / "data")
    (folder / "MANIFEST.tsv").write_text(manifest(folder))
    size = folder_mib(folder)
    if size > MAX_MIB:
        sys.exit(
            f"{folder} has {size:.1f} MiB, more than {MAX_MIB} MiB: leave packages out of benchmarks/wheelhouse.txt."
        )
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {size:.1f} MiB in all")


def locked(names: str, lock: str) -> dict[str, str]:
    """Versions of the named packages, by normalised name."""
    versions = {
        normalised(name): version
        for name, _, version in (line.strip().partition("==") for line in lock.splitlines())
        if version
    }
    wanted = [normalised(line) for line in names.splitlines() if line.strip() and not line.startswith("#")]
    if missing := [name for name in wanted if name not in versions]:
        sys.exit(
            f"requirements.lock has no version of {', '.join(missing)}: take them out of benchmarks/wheelhouse.txt."
        )
    return {name: versions[name] for name in wanted}


def normalised(name: str) -> str:
    """Name of a package as registries compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def gather(wanted: dict[str, str], folder: Path) -> None:
    """Have exactly the wanted wheels, and the project's own, in the folder."""
    there = {}
    for wheel in folder.glob("*.whl"):
        name, version = wheel.name.split("-")[:2]
        if wanted.get(normalised(name)) == version and not unsuitable(wheel.name, PYTHON):
            there[normalised(name)] = wheel
        else:
            wheel.unlink()
    lacking = {name: f"{name}=={version}" for name, version in wanted.items() if name not in there}
    download = [requirement for name, requirement in lacking.items() if name not in NO_WHEELS]
    make = [requirement for name, requirement in lacking.items() if name in NO_WHEELS]
    with tempfile.TemporaryDirectory() as raw:
        if download:
            platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
            platforms += [f"--platform=manylinux{year}_x86_64" for year in (2014, 2010, 1)]
            ours = ["--python-version", ".".join(map(str, PYTHON)), "--implementation", "cp", "--only-binary=:all:"]
            pip("download", "--dest", raw, *ours, *platforms, *download)
        if make:
            pip("wheel", "--wheel-dir", raw, *make)
        pip("wheel", "--wheel-dir", raw, "--no-build-isolation", str(ROOT))
        for wheel in Path(raw).glob("*.whl"):
            if reason := unsuitable(wheel.name, PYTHON):
                sys.exit(f"{reason}: benchmarks/wheelhouse.txt asks for it.")
            slim(wheel, folder / wheel.name)


def pip(command: str, *args: str) -> None:
    """Run pip; end with what it says where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *args], capture_output=True, text=True
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        sys.exit(f"The wheels could not be gathered: {said[-1]}")


def slim(wheel: Path, target: Path) -> None:
    """Copy a wheel without its tests and examples."""
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if needed(line.split(",")[0])).encode()
            if needed(member.filename):
                new.writestr(member.filename, content)


def needed(path: str) -> bool:
    """Whether a file of a wheel is more than a test or an example."""
    return not NOT_NEEDED & set(PurePosixPath(path).parts[1:-1])


def copy_sections(data: Path) -> None:
    """Copy verified files of the sections, laid out as in the cache folder."""
    import pooch

    import stpredict as stp

    try:
        stp.datasets.her2st(SECTIONS)
    except OSError as error:
        sys.exit(f"The sections are neither in the cache folder nor to be had: {error}")
    cache = Path(os.environ.get("STPREDICT_DATA_DIR") or pooch.os_cache("stpredict")).expanduser()
    shutil.rmtree(data, ignore_errors=True)
    for section in SECTIONS:
        for pattern in (f"ST-cnts/{section}.tsv.gz", f"ST-spotfiles/{section}_*.tsv", f"ST-imgs/C/{section}/*.jpg"):
            for file in (cache / "her2st").glob(pattern):
                copy = data / file.relative_to(cache)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


def manifest(folder: Path) -> str:
    """Size, SHA-256 and name of every file."""
    rows = ["bytes\tsha256\tfile"]
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "MANIFEST.tsv"):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        rows.append(f"{file.stat().st_size}\t{digest}\t{file.relative_to(folder).as_posix()}")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    main()
