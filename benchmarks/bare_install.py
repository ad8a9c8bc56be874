"""Rehearse the installation of a wheelhouse: a bare Python 3.12 with neither torch nor stpredict, and what imports there.

    python benchmarks/bare_install.py                  # after make wheelhouse; python3.12 is looked for

The packages that a machine with torch has anyway come from the registry, in their newest versions, into build/bare; those of
the wheelhouse are unpacked as gpu.py does it. Every module of stpredict that needs neither torch nor lightning has to import,
and colours have to be counted on a synthetic section.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRESENT = [
    *("aiohttp", "click", "cloudpickle", "filelock", "formulaic", "fsspec", "h5py", "imageio", "jinja2", "joblib"),
    *("lazy-loader", "lxml", "matplotlib", "msgpack", "multipledispatch", "narwhals", "networkx", "numba"),
    *("numpy", "pandas", "pillow", "platformdirs", "psutil", "pyarrow", "pyyaml", "requests", "rich", "safetensors"),
    *(
        "scikit-image",
        "scikit-learn",
        "scipy",
        "seaborn",
        "six",
        "sortedcontainers",
        "statsmodels",
        "tifffile",
        "toolz",
    ),
    *("tqdm", "typer", "wrapt", "xarray", "xxhash"),
]
CHECK = """
import importlib, importlib.util, pkgutil, warnings
warnings.simplefilter("ignore")
without = {"torch", "lightning"}
assert not any(map(importlib.util.find_spec, without)), "torch or lightning is installed: nothing would be shown"
import geopandas, scanpy, spatialdata, spatialdata_io, spatialdata_plot, squidpy
import stpredict as stp
imported = []
for module in pkgutil.walk_packages(stp.__path__, "stpredict."):
    try:
        importlib.import_module(module.name)
        imported.append(module.name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in without:
            raise
sdata = stp.datasets.synthetic(1, n_spots=50, n_genes=8)
counted = stp.pp.color_histogram(sdata, inplace=False)
assert counted.counts.sum() == counted.n_pixels.sum() > 0
print(f"stpredict {stp.__version__}: {len(imported)} modules import without torch and lightning")
"""


def main() -> None:
    """Install, import, and end with a line that says what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheelhouse", type=Path, default=ROOT / "wheelhouse")
    parser.add_argument("--python", default="python3.12")
    args = parser.parse_args()
    python = find_python(args.python)
    if python is None:
        print(f"Left out: {args.python} is no Python 3.12 here.")
        return
    bare, site = ROOT / "build/bare", ROOT / "build/bare-site"
    if not (bare / "done").exists():
        subprocess.run([python, "-m", "venv", "--clear", bare], check=True)
        subprocess.run([bare / "bin/python", "-m", "pip", "install", "--quiet", *PRESENT], check=True)
        (bare / "done").touch()
    shutil.rmtree(site, ignore_errors=True)
    # Unpacked by the Python that will use it: wheels are compiled for one.
    code = "import sys; from pathlib import Path; from _gpu.wheels import install; print(*install(*map(Path, sys.argv[1:])), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    subprocess.run([bare / "bin/python", "-c", code, args.wheelhouse, site], env=environment, check=True)
    environment["PYTHONPATH"] = str(site)
    done = subprocess.run([bare / "bin/python", "-c", CHECK], env=environment, cwd=bare, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"The wheelhouse does not do on a bare Python 3.12: {done.stderr.strip().splitlines()[-1]}")
    print(done.stdout.strip())


def find_python(name: str) -> str | None:
    """A Python 3.12 of this name, or one that pyenv keeps."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.12*/bin/python")
    code = "import sys; sys.exit(sys.version_info[:2] != (3, 12))"
    for python in [shutil.which(name), *map(str, kept)]:
        if python and subprocess.run([python, "-c", code], capture_output=True).returncode == 0:
            return python
    return None


if __name__ == "__main__":
    main()
