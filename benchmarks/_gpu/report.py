"""JSON and a table of what was found, written anew whenever there is more."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from _gpu.part import write_json

TITLES = {
    "a": "The GPU computes what the CPU computes",
    "b": "M2OST `small`: speed",
    "c": "Neural Stain Learning: speed",
    "d": "The default recipe on real sections",
    "e": "Two GPUs",
}


def read(file: Path) -> list[dict[str, Any]]:
    """The runs of a ``gpu.json``, oldest first."""
    return json.loads(file.read_text())["runs"] if file.exists() else []


def write(folder: Path, runs: list[dict[str, Any]]) -> None:
    """``gpu.json``, all runs one after the other, and ``gpu.md``, which has the newest number of each kind."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "gpu.json", {"runs": [{**run, "targets": targets(run["parts"])} for run in runs]})
    aside = folder / "gpu.md.part"
    aside.write_text(markdown(runs))
    os.replace(aside, folder / "gpu.md")


def found_of(result: Any) -> bool:
    """Whether there is something in a result, be it a failure."""
    return not (isinstance(result, dict) and "left_out" in result)


def newest(runs: list[dict[str, Any]], name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The newest results of a part, by name, and of which run each is; checks of part a one by one."""
    results: dict[str, Any] = {}
    of: dict[str, str] = {}
    for run in runs:
        for key, value in run["parts"].get(name, {}).get("results", {}).items():
            if key == "checks":
                by_name = {row["name"]: row for row in results.get("checks", [])}
                by_name |= {
                    row["name"]: {**row, "run": run["run"]}
                    for row in value
                    if found_of(row) or row["name"] not in by_name
                }
                results["checks"] = list(by_name.values())
            elif found_of(value) or key not in results:
                results[key], of[key] = value, run["run"]
    return results, of


def newest_targets(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What should be, and the newest run's number; each number is of one run."""
    rows = {row["name"]: {**row, "run": run["run"]} for run in runs for row in targets(run["parts"])}
    return list(rows.values())


def _head(found: dict[str, Any]) -> list[str]:
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [
        f"Run {found['run']}, commit {found['commit']}, on **{machine.get('name', 'no device')}**, {found['date']}: "
        + ", ".join(f"{name} {machine[name]}" for name in ("driver", "cuda") if machine.get(name))
        + (f"; {versions}." if versions else "."),
        "",
    ]
    if found["rehearsal"]:
        lines += ["This was a rehearsal with tiny sizes: no number here means anything.", ""]
    lines += [f"- {line}" for line in found["wrong"]] + [""] * bool(found["wrong"])
    return lines


def markdown(runs: list[dict[str, Any]]) -> str:
    """The tables."""
    lines = [line for run in runs for line in _head(run)]
    lines += table(
        ["target", "wanted", "found", "met", "run"],
        [[t["name"], t["wanted"], t["found"], t["met"], t["run"]] for t in newest_targets(runs)],
    )
    for name, title in TITLES.items():
        tried = [run for run in runs if name in run["parts"]]
        if not tried:
            continue
        lines += [f"## {title}", ""]
        for run in tried:
            part = run["parts"][name]
            reason = f": {part['reason']}" if part.get("reason") else ""
            lines += [f"- Run {run['run']}: {part['status']}{reason}."]
        results, of = newest(tried, name)
        if len(tried) > 1:
            for run in tried:
                if named := [key for key, where in of.items() if where == run["run"]]:
                    lines += [f"- Of run {run['run']}: {', '.join(named)}."]
        lines += [""]
        if "left_out" in results:
            lines += [f"Left out: {results['left_out']}.", ""]
        lines += {"a": _checks, "b": _throughput, "c": _nsl, "d": _recipe, "e": _two}[name](results)
    return "\n".join(lines).rstrip() + "\n"


def targets(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """What the numbers should be, and what they are; only those that were measured."""
    rows: list[dict[str, Any]] = []

    def add(name: str, wanted: str, value: float | None, met: bool | None, text: str = "{:.2f}") -> None:
        if value is not None:
            rows.append(
                {
                    "name": name,
                    "wanted": wanted,
                    "value": value,
                    "found": text.format(value),
                    "met": "yes" if met else "no",
                }
            )

    b = parts.get("b", {}).get("results", {})
    for key in [key for key in b if key.startswith("batch ")]:
        speed = _speeds(b[key])
        for mode in ("training", "inference"):
            ours, same = speed.get((mode, "package", "bf16")), speed.get((mode, "literal", "bf16"))
            plain = speed.get((mode, "literal", "float32"))
            where = f"M2OST `small`, {mode}, {key}"
            if ours and plain:
                add(f"{where}, over the literal formulas in float32", "≥ 8", ours / plain, ours / plain >= 8)
            if ours and same:
                add(f"{where}, over them in bf16", "≥ 3", ours / same, ours / same >= 3)
    ceiling = b.get("ceilings") or {}
    if ceiling.get("alone_ms"):
        row = _row(b.get(f"batch {ceiling['batch']}"), "training", "package", ceiling["precision"])
        if row and "seconds" in row:
            share = ceiling["alone_ms"] / 1e3 / row["seconds"]
            add("matrix products alone, of a training step's time", "≥ 50 %", 100 * share, share >= 0.5, "{:.0f} %")
    for row in b.get("fits") if isinstance(b.get("fits"), list) else []:
        if "waiting" in row and row.get("graphs", "no") != "switched off":
            name = f"waiting for data from {row['patches']}, batches of {row['batch']}"
            add(name, "< 3 %", 100 * row["waiting"], row["waiting"] < 0.03, "{:.1f} %")
    everything = parts.get("c", {}).get("results", {}).get("genes all") or {}
    seconds = everything.get("seconds")
    add("NSL, all detected genes", "≤ 2 s", seconds, seconds is not None and seconds <= 2, "{:.2f} s")
    seconds = (parts.get("d", {}).get("results", {}).get("small") or {}).get("seconds")
    add("M2OST `small`, default recipe", "≤ 90 s", seconds, seconds is not None and seconds <= 90, "{:.0f} s")
    return rows


def _row(rows: Any, mode: str, who: str, precision: str) -> dict[str, Any] | None:
    rows = rows if isinstance(rows, list) else []
    return next((r for r in rows if (r["mode"], r["who"], r["precision"]) == (mode, who, precision)), None)


def _speeds(rows: Any) -> dict[tuple[str, str, str], float]:
    rows = rows if isinstance(rows, list) else []
    return {(r["mode"], r["who"], r["precision"]): r["spots_per_s"] for r in rows if "spots_per_s" in r}


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table, or nothing."""
    if not rows:
        return []
    cells = [[_text(cell) for cell in row] for row in rows]
    aligned = [
        "---:" if i and all(row[i][:1].isdigit() or row[i] == "–" for row in cells) else "---" for i in range(len(head))
    ]
    return [f"| {' | '.join(row)} |" for row in [head, aligned, *cells]] + [""]


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def _checks(results: dict[str, Any]) -> list[str]:
    rows = []
    for check in results.get("checks", []):
        why = check.get("left_out") or check.get("error")
        verdict = "left out" if "left_out" in check else "yes" if check["passed"] else "**no**"
        rows.append([check["name"], why or check.get("found"), check.get("limit"), verdict, check.get("run")])
    lines = table(["check", "found", "limit", "passed", "run"], rows)
    steps = results.get("steps")
    if isinstance(steps, list):
        names = ("batch", "graphs ms", "eager ms", "graphs spots/s", "eager spots/s", "said")
        lines += ["A whole step of the default recipe, as CUDA graphs and kernel by kernel.", ""]
        lines += table(list(names), [[row.get(name) for name in names] for row in steps])
    attention = results.get("attention kernels")
    if isinstance(attention, list):
        lines += [
            "Kernels of attention in bfloat16 against double precision (the network: against float32), relative errors; the last rows are of the whole network.",
            "",
        ]
        names = ("backend", "queries", "keys", "gradient from", "output", "dq", "dk", "dv")
        lines += table(
            list(names),
            [
                [
                    row.get(name)
                    if "left_out" not in row or name == "backend"
                    else row["left_out"]
                    if name == "queries"
                    else None
                    for name in names
                ]
                for row in attention
            ],
        )
    return lines


def _throughput(results: dict[str, Any]) -> list[str]:
    rows, notes = [], []
    for key, values in results.items():
        if isinstance(values, dict) and ("error" in values or "left_out" in values):
            notes += [f"{key}: {values.get('error') or 'left out, ' + values['left_out']}.", ""]
        if key.startswith("batch ") and isinstance(values, list):
            for r in values:
                why = r.get("left_out")
                rows.append(
                    [
                        key[6:],
                        r["mode"],
                        r["who"],
                        r["precision"],
                        why or r["spots_per_s"],
                        r.get("tflops"),
                        r.get("working_gb"),
                    ]
                )
        if key == "compiled" and isinstance(values, list):
            batch = (results.get("ceilings") or {}).get("batch")
            for r in values:
                rows.append(
                    [
                        batch,
                        r["mode"],
                        "package, compiled",
                        r.get("precision"),
                        r.get("left_out") or r["spots_per_s"],
                        r.get("tflops"),
                        r.get("working_gb"),
                    ]
                )
    lines = table(["batch", "mode", "who", "precision", "spots/s", "TFLOP/s", "GB above weights and inputs"], rows)
    ceiling = results.get("ceilings") or {}
    if "square_tflops" in ceiling:
        squares = ", ".join(f"{name} {value:.0f}" for name, value in ceiling["square_tflops"].items())
        lines += [
            f"Matrix products of a training step alone ({ceiling['precision']}, batch of {ceiling['batch']}): "
            f"{ceiling['alone_ms']:.2f} ms, {_text(ceiling['own_shapes_tflops'])} TFLOP/s; of a large square one, TFLOP/s: {squares}.",
            "",
        ]
    fits = results.get("fits")
    lines += table(
        ["patches", "batch", "graphs", "spots/s of a whole fit", "waiting for data", "peak GB"],
        [
            [
                r["patches"],
                r["batch"],
                r.get("graphs", "no"),
                r.get("left_out") or r["spots_per_s"],
                f"{100 * r['waiting']:.1f} %" if "waiting" in r else None,
                r.get("peak_gb"),
            ]
            for r in (fits if isinstance(fits, list) else [])
        ],
    )
    kernels = results.get("attention") or {}
    lines += table(
        ["attention", "ms of a training step"],
        [
            [name, 1e3 * r["seconds"] if "seconds" in r else r.get("left_out")]
            for name, r in kernels.items()
            if isinstance(r, dict)
        ],
    )
    return lines + _profile(results, "A training step") + notes


def _profile(results: dict[str, Any], what: str) -> list[str]:
    profile = results.get("profile") or {}
    if not profile.get("top"):
        return []
    lines = [
        f"{what}: {profile['kernels']:.0f} kernels, {profile['busy_ms']:.2f} ms busy, gaps {100 * profile['gaps']:.0f} %.",
        "",
    ]
    return lines + table(
        ["kernel", "ms", "of the busy time", "calls"],
        [[f"`{k['name'][:70]}`", k["ms"], f"{100 * k['share']:.0f} %", k["calls"]] for k in profile["top"]],
    )


def _nsl(results: dict[str, Any]) -> list[str]:
    rows = [
        [r["genes"], r["seconds"], r["fit_nsl_seconds"], r["steps"], r["peak_gb"]]
        for key, r in results.items()
        if key.startswith("genes ") and "genes" in r
    ]
    lines = table(["genes", "s of the solver", "s of `fit_nsl`", "steps", "peak GB"], rows)
    if isinstance(results.get("transfer_s"), float):
        lines += [
            f"The histogram of {results['spots']} spots and {results['colours']} colours reaches the device in {1e3 * results['transfer_s']:.1f} ms.",
            "",
        ]
    return lines + _profile(results, "All genes")


def _recipe(results: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            r.get("error") or r.get("left_out") or r["pcc"],
            r["seconds"] / 60 if "seconds" in r else None,
            r.get("peak_gb"),
        ]
        for name, r in results.items()
        if isinstance(r, dict)
    ]
    return table(["model", "median per-gene PCC", "minutes", "peak GB"], rows)


def _two(results: dict[str, Any]) -> list[str]:
    if "one_s" not in results:
        return []
    return table(
        ["one, s", "two, s", "training losses apart"], [[results["one_s"], results["two_s"], results["loss_apart"]]]
    )
