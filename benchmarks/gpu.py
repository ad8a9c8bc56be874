"""Prove and measure everything on a GPU, in minutes, with no network: what comes out is benchmarks/gpu.json and gpu.md.

    make wheelhouse                                                   # where there is a network
    python3 benchmarks/gpu.py --wheelhouse wheelhouse                 # where the GPU is
    python benchmarks/gpu.py --device cpu --rehearse --out build/gpu  # tiny sizes, every part, no GPU
    python benchmarks/gpu.py --part a                                 # one part
    python benchmarks/gpu.py --part a d b --missing --minutes 3.8     # in this order; what an earlier run has is not found again

gpu.json keeps all runs, one after the other; gpu.md has of each number the newest, and says of which run it is.

Each part runs in a process of its own, so that a crash or a hang costs that part alone, and writes what it finds as it goes.
The next part's process imports what it needs while the one before it computes, and waits for its turn.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _gpu.report import found_of, newest, read, write

START = time.monotonic()
ROOT = Path(__file__).parents[1]
MODULES = {"machine": "device", "a": "correctness", "b": "throughput", "c": "nsl", "d": "recipe", "e": "ddp"}
# Seconds that a part may take, and with how few it is not worth starting.
LIMITS = {"machine": (60, 5), "a": (80, 20), "b": (135, 30), "c": (50, 15), "d": (150, 40), "e": (60, 20)}
# With --missing the parts are shorter, and the first have to leave time for the last.
SHORT = {"machine": (40, 5), "a": (70, 20), "b": (80, 18), "c": (50, 15), "d": (110, 40), "e": (60, 20)}
KEPT = ROOT / "benchmarks/gpu.json"
VERSIONS = ("torch", "lightning", "triton", "numpy", "pandas", "anndata", "spatialdata", "stpredict-histology")


def main() -> int:
    """Install, run part after part, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes: to see that everything runs")
    parser.add_argument("--part", nargs="+", choices=[name for name in MODULES if name != "machine"], help="only these")
    parser.add_argument("--missing", action="store_true", help="not again what benchmarks/gpu.json has; shorter limits")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--minutes", type=float, default=7.0, help="for everything, from the start")
    parser.add_argument("--wheelhouse", type=Path, help="folder of make wheelhouse, where packages are missing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of gpu.json and gpu.md")
    parser.add_argument("--in-process", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu" and not args.rehearse:
        parser.error("on a CPU this is a rehearsal: add --rehearse")
    if args.rehearse and args.out.resolve() == ROOT / "benchmarks":
        parser.error("a rehearsal measures nothing: give it another folder with --out")
    if args.in_process:
        in_process(*args.in_process, device=args.device, rehearse=args.rehearse)
        return 0
    with tempfile.TemporaryDirectory(prefix="stpredict-gpu-") as scratch:
        return Run(args, Path(scratch)).all()


class Run:
    """All parts, and the report of them."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.end = START + 60 * args.minutes
        self.environment = dict(os.environ)
        self.runs = [] if args.rehearse else read(KEPT)
        self.have = {name: known(self.runs, name) if args.missing else [] for name in MODULES}
        self.found: dict[str, Any] = {
            "run": str(len(self.runs) + 1),
            "commit": args.commit or commit(),
            "date": datetime.date.today().isoformat(),
            "rehearsal": args.rehearse,
            "machine": {},
            "wrong": [],
            "parts": {},
        }

    def all(self) -> int:
        """Returns 0 if every part is done and every check passed."""
        self.install()
        names = ["machine", *(self.args.part or [name for name in MODULES if name != "machine"])]
        waiting = self.start(names[0])
        for i, name in enumerate(names):
            process, waiting = waiting, self.start(names[i + 1]) if i + 1 < len(names) else None
            if name == "machine":
                machine = self.finish(name, process)
                self.found["machine"] = machine.get("results", {}).get("machine", {})
                self.wrong(
                    machine.get("results", {}).get("wrong", [machine.get("reason", "The machine told nothing.")])
                )
            elif self.args.device == "cuda" and "name" not in self.found["machine"]:
                stop(process)
                self.found["parts"][name] = {"status": "left out", "reason": "there is no GPU that PyTorch can use"}
            else:
                self.found["parts"][name] = self.finish(name, process)
            if name != "machine":
                self.say(name)
            self.write()
        failed = [name for name, part in self.found["parts"].items() if not succeeded(part)]
        print(
            f"{time.monotonic() - START:.0f} s in all; " + (f"not well: {', '.join(failed)}" if failed else "all well")
        )
        return int(bool(failed))

    def install(self) -> None:
        """Unpack the wheels, and have the parts find them before anything else but the checkout."""
        # The checkout's own modules come from src; the project's wheel is there for its version.
        paths = [str(ROOT / "src")]
        if self.args.wheelhouse:
            from _gpu.wheels import install

            site = self.scratch / "site"
            self.wrong(install(self.args.wheelhouse, site))
            paths.append(str(site))
            if (self.args.wheelhouse / "data").is_dir():
                self.environment["STPREDICT_DATA_DIR"] = str((self.args.wheelhouse / "data").resolve())
            print(f"{time.monotonic() - START:.0f} s: wheels are unpacked", flush=True)
        if self.args.rehearse:
            # On a busy machine threads wait for each other longer than they compute; numba would set torch's number, too.
            for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
                self.environment.setdefault(name, "1")
        if inherited := os.environ.get("PYTHONPATH"):
            paths.append(inherited)
        self.environment |= {
            "PYTHONPATH": os.pathsep.join(paths),
            "MPLBACKEND": "agg",
            "NUMBA_CACHE_DIR": str(self.scratch / "numba"),
            # Deterministic products have to be asked for before the first one.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }

    def start(self, name: str) -> subprocess.Popen[str]:
        """A process that imports, and then waits for its turn."""
        command = [sys.executable, str(Path(__file__).resolve()), "--device", self.args.device]
        command += ["--rehearse"] * self.args.rehearse + ["--out", str(self.args.out)]
        command += ["--in-process", name, str(self.scratch / f"{name}.json")]
        environment = dict(self.environment)
        if name != "a":
            environment.pop("CUBLAS_WORKSPACE_CONFIG")
        log = (self.scratch / f"{name}.log").open("w")
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,  # so that it can be stopped with all that it has started
        )

    def finish(self, name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Let a part have its turn; results so far are kept whatever happens."""
        limit, least = (SHORT if self.args.missing else LIMITS)[name]
        left = self.end - time.monotonic() - 3
        if left < least:
            stop(process)
            return {"status": "left out", "reason": f"{left:.0f} s were left, and it needs at least {least} s"}
        limit = min(5 * limit if self.args.rehearse else limit, left)  # a machine to rehearse on may be busy
        begun = time.monotonic()
        turn = {"limit": limit, "machine": self.found["machine"], "have": self.have[name], "graphs": self.graphs()}
        try:
            process.communicate(json.dumps(turn) + "\n", timeout=limit)
            status, reason = (
                ("done", None) if process.returncode == 0 else ("failed", f"exit status {process.returncode}")
            )
        except subprocess.TimeoutExpired:
            status, reason = "stopped", f"at its limit of {limit:.0f} s"
        except BrokenPipeError:
            status, reason = "failed", "it ended before its turn"
        stop(process)
        part: dict[str, Any] = {"status": status, "seconds": time.monotonic() - begun}
        file = self.scratch / f"{name}.json"
        part["results"] = json.loads(file.read_text()) if file.exists() else {}
        if failure := part["results"].pop("failure", None):
            part |= {"status": "failed", "reason": failure["error"], "traceback": failure["traceback"]}
        elif reason:
            said = (self.scratch / f"{name}.log").read_text(errors="replace").strip().splitlines()
            part |= {"reason": reason, "log": said[-15:]}
        return part

    def wrong(self, lines: list[str]) -> None:
        """Say what is wrong, and keep it."""
        for line in lines:
            print(f"! {line}", flush=True)
        self.found["wrong"] += lines

    def say(self, name: str) -> None:
        """A line for a part."""
        part = self.found["parts"][name]
        print(
            f"{time.monotonic() - START:.0f} s: part {name} {part['status']}"
            + (f", {part['seconds']:.0f} s" if "seconds" in part else "")
            + (f": {part['reason']}" if "reason" in part else ""),
            flush=True,
        )
        for line in unwell(part):
            print(f"    {line}", flush=True)

    def graphs(self) -> bool:
        """Whether no check has found CUDA graphs to compute something else."""
        checks = self.found["parts"].get("a", {}).get("results", {}).get("checks", [])
        return all(check.get("passed", True) for check in checks if check["name"].startswith("graphs: "))

    def write(self) -> None:
        """Write the report."""
        write(self.args.out, [*self.runs, self.found])


def known(runs: list[dict[str, Any]], name: str) -> list[str]:
    """Names of results that need not be found again: those that did not fail."""
    results, _ = newest(runs, name)
    names = [row["name"] for row in results.pop("checks", []) if row.get("passed")]
    return names + [
        key for key, value in results.items() if found_of(value) and not (isinstance(value, dict) and "error" in value)
    ]


def commit() -> str:
    """The checkout's commit."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def stop(process: subprocess.Popen[str]) -> None:
    """End a part and whatever it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def unwell(part: dict[str, Any]) -> list[str]:
    """A line for everything in a part that failed, though the part went on."""
    results = part.get("results", {})
    lines = [
        f"{key}: {value['error']}" for key, value in results.items() if isinstance(value, dict) and "error" in value
    ]
    for check in results.get("checks", []):
        if not check.get("passed", True):
            lines.append(f"{check['name']}: {check.get('error') or check.get('found')}, limit {check['limit']}")
    if results.get("passed") is False:
        lines.append("two GPUs do not learn what one learns")
    return lines


def succeeded(part: dict[str, Any]) -> bool:
    """Whether a part ran to its end, and nothing in it failed."""
    return part["status"] == "done" and not unwell(part)


def in_process(name: str, file: str, *, device: str, rehearse: bool) -> None:
    """Import, wait for the turn, and run one part."""
    from _gpu.part import Part, failure, write_json

    results: dict[str, Any] = {}
    try:
        module = importlib.import_module(f"_gpu.{MODULES[name]}")
        gc.collect()
        gc.freeze()  # what was imported stays: no collection need look at it
        # The second process of two GPUs is started by the first, and has its turn at once.
        turn: dict[str, Any] = (
            {"limit": 60, "machine": {}} if "LOCAL_RANK" in os.environ else json.loads(sys.stdin.readline())
        )
        if name == "machine":
            machine, wrong = module.describe(device)
            machine["versions"] = versions()
            write_json(Path(file), {"machine": machine, "wrong": wrong})
            return
        machine = turn["machine"]
        part = Part(
            device,
            rehearse,
            Path(file),
            time.monotonic() + turn["limit"] - 2,
            machine.get("bf16", True),
            turn.get("have", []),
        )
        results = part.results
        if not turn.get("graphs", True):
            from stpredict.models.m2ost import _graphs

            _graphs.ENABLED = False
        module.run(part)
    except Exception as error:  # noqa: BLE001  (reported by the parent)
        write_json(Path(file), {**results, "failure": failure(error)})


def versions() -> dict[str, str]:
    """Versions of what matters, and of Python."""
    from importlib import metadata

    found = {"Python": ".".join(map(str, sys.version_info[:3]))}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
