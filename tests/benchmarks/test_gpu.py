"""The benchmark for a GPU, where there is none: its plumbing, bad input, and stubs of what only CUDA can do."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def make_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return folder / name


def make_part(load: Any, tmp_path: Path, device: str = "cpu", seconds: float = 100.0) -> Any:
    return load("_gpu.part").Part(device, True, tmp_path / "part.json", time.monotonic() + seconds)


@pytest.mark.parametrize(
    ("wheel", "fits"),
    [
        ("a-1.0-py3-none-any.whl", True),
        ("a-1.0-py2.py3-none-any.whl", True),
        ("a-1.0-cp312-cp312-manylinux_2_28_x86_64.whl", True),
        ("a-1.0-cp38-abi3-manylinux2014_x86_64.whl", True),
        ("a-1.0-cp313-abi3-manylinux2014_x86_64.whl", False),
        ("a-1.0-cp311-cp311-manylinux_2_28_x86_64.whl", False),
        ("a-1.0-cp312-cp312-win_amd64.whl", False),
        ("a-1.0-cp312-cp312-manylinux_2_28_aarch64.whl", False),
        ("a.whl", False),
    ],
)
def test_wheels_of_another_python_are_known(load: Any, wheel: str, fits: bool) -> None:
    assert (load("_gpu.wheels").unsuitable(wheel, (3, 12)) is None) == fits


def test_what_is_wrong_with_a_wheelhouse_is_said_and_the_rest_installed(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = load("_gpu.wheels")
    house, site = tmp_path / "house", tmp_path / "site"
    good = {"good/__init__.py": "x = 1", "good-1.0.data/purelib/more.py": "", "good-1.0.data/scripts/run": ""}
    make_wheel(house, "good-1.0-py3-none-any.whl", good)
    make_wheel(house, "other-1.0-cp27-cp27m-manylinux1_x86_64.whl", {"other.py": ""})
    (house / "broken-1.0-py3-none-any.whl").write_text("no zip")
    monkeypatch.setattr(wheels, "MAX_MIB", 1e-6)
    wrong = wheels.install(house, site)
    assert len(wrong) == 3
    assert any("other-1.0" in line and "is for cp27" in line for line in wrong)
    assert any("more than the 1e-06 MiB" in line for line in wrong)
    assert any("broken-1.0-py3-none-any.whl is damaged" in line for line in wrong)
    assert {path.name for path in site.rglob("*.py")} == {"__init__.py", "more.py"}
    assert not list(site.rglob("run"))
    assert "holds no wheels" in wheels.install(tmp_path / "nothing", site)[0]


def test_wheelhouse_wants_versions_of_the_lock_and_leaves_tests_out(load: Any, tmp_path: Path) -> None:
    wheelhouse = load("wheelhouse")
    assert wheelhouse.locked("# why\nA_b\n", "x==2\na-b==1.5\n") == {"a-b": "1.5"}
    with pytest.raises(SystemExit, match="no version of gone"):
        wheelhouse.locked("gone\n", "a==1\n")
    record = "p/__init__.py,,\np/tests/t.py,,\n"
    files = {"p/__init__.py": "", "p/tests/t.py": "", "p-1.dist-info/RECORD": record}
    old = make_wheel(tmp_path / "old", "p-1-py3-none-any.whl", files)
    wheelhouse.slim(old, tmp_path / "new.whl")
    with zipfile.ZipFile(tmp_path / "new.whl") as archive:
        assert archive.namelist() == ["p/__init__.py", "p-1.dist-info/RECORD"]
        assert archive.read("p-1.dist-info/RECORD") == b"p/__init__.py,,\n"
    names = (FOLDER / "wheelhouse.txt").read_text()
    assert len(wheelhouse.locked(names, (FOLDER.parent / "requirements.lock").read_text())) > 40


def test_a_folder_past_the_limit_is_refused(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheelhouse = load("wheelhouse")
    monkeypatch.setattr(wheelhouse, "gather", lambda wanted, folder: (folder / "large.whl").write_bytes(bytes(2**21)))
    monkeypatch.setattr(wheelhouse, "MAX_MIB", 1)
    monkeypatch.setattr(sys, "argv", ["wheelhouse.py", "--folder", str(tmp_path / "house"), "--without-data"])
    with pytest.raises(SystemExit, match=r"has 2.0 MiB, more than 1 MiB"):
        wheelhouse.main()


def stub_cuda(
    monkeypatch: pytest.MonkeyPatch, *, total: float = 80e9, free: float = 79e9, bf16: bool = True
) -> list[Any]:
    calls: list[Any] = []
    properties = SimpleNamespace(name="Stub 80", major=9, minor=0, multi_processor_count=132, total_memory=total)
    for name, value in {
        "is_available": True,
        "get_device_properties": properties,
        "mem_get_info": (free, total),
        "device_count": 1,
        "is_bf16_supported": bf16,
        "max_memory_allocated": 5e9,
        "memory_allocated": 10**9,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: calls.append((name, *args)))
    return calls


def test_a_card_is_described(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_cuda(monkeypatch)
    found, wrong = load("_gpu.device").describe("cuda")
    assert (found["name"], found["capability"], found["bf16"], wrong) == ("Stub 80", "9.0", True, [])


def test_a_small_card_without_bf16_is_complained_about(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_cuda(monkeypatch, free=4e9, bf16=False)
    _, wrong = load("_gpu.device").describe("cuda")
    assert len(wrong) == 2
    assert "Stub 80 has no bfloat16" in wrong[0]
    assert "4.0 GB of memory are free, less than 8" in wrong[1]


def test_a_driver_that_is_too_old_is_one_line(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nMore lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    found, wrong = load("_gpu.device").describe("cuda")
    assert "name" not in found
    (line,) = wrong
    assert line.endswith("The NVIDIA driver on your system is too old (found version 11040).")


def test_memory_is_made_small_and_large_again(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stub_cuda(monkeypatch)
    device = load("_gpu.device")
    with pytest.raises(KeyError), device.at_most(2e9, "cuda"):
        raise KeyError
    fractions = [call[1:] for call in calls if call[0] == "set_per_process_memory_fraction"]
    assert fractions == [(0.025, 0), (1.0, 0)]  # torch takes no device without a number here
    before = device.reset_peak("cuda")
    device.synchronize("cuda")
    assert device.peak_gb("cuda", above=before) == 4.0
    assert [call[0] for call in calls[-3:]] == ["empty_cache", "reset_peak_memory_stats", "synchronize"]


def test_the_checks_that_need_a_gpu(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_cuda(monkeypatch)
    correctness = load("_gpu.correctness")
    sizes: list[int] = []

    def fit_m2ost(sdata: Any, *, batch_size: int, **kwargs: Any) -> Any:
        sizes.append(batch_size)
        if batch_size > 4:
            raise MemoryError("Memory is full. Lower `batch_size`.")
        return SimpleNamespace(history={"train_loss": [1.0]})

    def fit_nsl(sdata: Any, *, device: str, **kwargs: Any) -> None:
        if device == "cuda:99":
            raise ValueError("there are 1 GPUs, numbered from 0")

    monkeypatch.setattr(correctness.stp.tl, "fit_m2ost", fit_m2ost)
    monkeypatch.setattr(correctness.stp.tl, "fit_nsl", fit_nsl)
    checks = correctness.Checks(make_part(load, tmp_path, "cuda"))
    correctness.check_memory(checks, {"table": range(200)})
    correctness.check_devices(checks, None)
    assert sizes == [200, 4]
    passed = {row["name"]: row["passed"] for row in checks.rows}
    # The stub's memory never changes, so that it is the last but one check that has to fail.
    assert [name for name, good in passed.items() if not good] == ["device='cpu' takes none"]


def test_a_check_can_fail(load: Any, tmp_path: Path) -> None:
    checks = load("_gpu.correctness").Checks(make_part(load, tmp_path))
    checks.run("far", lambda: 2.0, 1.0)
    checks.run("near", lambda: 0.5, 1.0)
    checks.run("unlike", lambda: 0.5, 0.999, least=True)
    checks.run("nothing", lambda: float("nan"), 1.0)
    checks.run("silent", lambda: "no error", "batch_size")
    checks.run("broken", lambda: 1 / 0, 1.0)
    assert [row["passed"] for row in checks.rows] == [False, True, False, False, False, False]
    assert checks.rows[-1]["error"] == "ZeroDivisionError: division by zero"
    assert "1 / 0" in checks.rows[-1]["traceback"]
    assert json.loads((tmp_path / "part.json").read_text())["checks"] == checks.rows
    assert checks.rows[3]["found"] == "nan"  # which JSON has not


def test_results_are_kept_as_they_come(load: Any, tmp_path: Path) -> None:
    part = make_part(load, tmp_path, seconds=5)
    assert part.attempt("first", lambda: 1) == 1
    assert part.attempt("late", lambda: 2, seconds=60) is None
    assert part.attempt("bad", lambda: [][0]) is None
    found = json.loads(part.file.read_text())
    assert found["first"] == 1
    assert "it takes about 60 s" in found["late"]["left_out"]
    assert found["bad"]["error"].startswith("IndexError")


def test_gaps_are_what_no_kernel_covers(load: Any) -> None:
    spans = [("a", 0.0, 10.0), ("b", 5.0, 12.0), ("a", 6.0, 8.0), ("c", 16.0, 20.0)]
    found = load("_gpu.timing").summarise(spans)
    assert found["busy_ms"] == pytest.approx(0.016)
    assert found["gaps"] == pytest.approx(0.2)
    assert [(row["name"], row["calls"]) for row in found["top"]] == [("a", 2), ("b", 1), ("c", 1)]
    assert load("_gpu.timing").summarise([])["kernels"] == 0


def test_what_does_not_fit_is_left_out_of_a_race(load: Any) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    found = load("_gpu.timing").race({"fits": lambda: time.sleep(1e-3), "full": full}, "cpu", slice_s=2e-3, rounds=3)
    assert 1e-3 <= found["fits"]["fastest"] <= found["fits"]["seconds"] <= found["fits"]["slowest"]
    assert found["full"] == {"left_out": "does not fit into the memory"}


def test_products_of_a_step_are_found_and_counted(load: Any, tmp_path: Path) -> None:
    gemms = load("_gpu.gemms")
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    layer, x = torch.nn.Linear(7, 4), torch.randn(6, 7, requires_grad=True)

    def step() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        layer(x).sum().backward()

    found = gemms.ceilings(step, make_part(load, tmp_path), "float32", 6)
    # The linear map, and the gradients of its weights and of its input; attention twice forward and five times backward.
    assert found["by_kind"]["products"]["flop"] == 3 * 2 * 6 * 7 * 4
    assert found["by_kind"]["attention"]["flop"] == 7 * 2 * 2 * 3 * 5 * 5 * 8
    assert found["alone_ms"] > 0
    assert found["square_tflops"].keys() == {"float32", "tf32", "bf16"}


def run(load: Any, tmp_path: Path, **options: Any) -> Any:
    gpu = load("gpu")
    args = {
        "device": "cpu",
        "rehearse": True,
        "minutes": 1e3,
        "wheelhouse": None,
        "out": tmp_path / "out",
        "part": None,
        "missing": False,
        "commit": "abc",
    }
    return gpu, gpu.Run(argparse.Namespace(**{**args, **options}), tmp_path)


def sleeper(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True, start_new_session=True)


def test_a_part_that_hangs_is_stopped_and_its_results_kept(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, runner = run(load, tmp_path)
    monkeypatch.setitem(gpu.LIMITS, "a", (0.2, 0.0))
    (tmp_path / "a.json").write_text('{"checks": []}')
    (tmp_path / "a.log").write_text("said\n")
    part = runner.finish("a", sleeper("import time; time.sleep(60)"))
    assert (part["status"], part["results"], part["log"]) == ("stopped", {"checks": []}, ["said"])


def test_a_part_that_dies_or_raises_is_told(load: Any, tmp_path: Path) -> None:
    _, runner = run(load, tmp_path)
    (tmp_path / "b.log").write_text("Segmentation fault\n")
    part = runner.finish("b", sleeper("input(); raise SystemExit(3)"))
    assert (part["status"], part["reason"], part["log"]) == ("failed", "exit status 3", ["Segmentation fault"])
    (tmp_path / "c.json").write_text(json.dumps({"spots": 3, "failure": {"error": "E: x", "traceback": "at"}}))
    part = runner.finish("c", sleeper("input()"))
    assert (part["status"], part["reason"], part["traceback"], part["results"]) == (
        "failed",
        "E: x",
        "at",
        {"spots": 3},
    )


def test_a_part_without_time_is_left_out(load: Any, tmp_path: Path) -> None:
    _, runner = run(load, tmp_path, minutes=0)
    part = runner.finish("d", sleeper("input()"))
    assert part["status"] == "left out"
    assert "it needs at least" in part["reason"]


def test_without_a_gpu_every_part_says_so(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, runner = run(load, tmp_path, device="cuda", part=["a", "c"])
    monkeypatch.setattr(runner, "start", lambda name: sleeper("input()"))
    (tmp_path / "machine.json").write_text(json.dumps({"machine": {}, "wrong": ["The driver is too old."]}))
    (tmp_path / "machine.log").write_text("")
    assert runner.all() == 1
    (found,) = json.loads((tmp_path / "out/gpu.json").read_text())["runs"]
    assert found["wrong"] == ["The driver is too old."]
    assert {part["status"] for part in found["parts"].values()} == {"left out"}
    assert "The driver is too old." in (tmp_path / "out/gpu.md").read_text()


def one_run(name: str, parts: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": name,
        "commit": f"c{name}",
        "date": "2000-01-01",
        "rehearsal": False,
        "machine": {"name": "Stub"},
        "wrong": [],
        "parts": parts,
    }


def test_runs_are_kept_apart_and_the_newest_number_says_of_which_it_is(load: Any, tmp_path: Path) -> None:
    def check(name: str, *, passed: bool) -> dict[str, Any]:
        return {"name": name, "limit": 1.0, "found": 0.5 if passed else 2.0, "passed": passed}

    first = {
        "a": {
            "status": "failed",
            "reason": "E",
            "results": {"checks": [check("one", passed=False), check("two", passed=True)]},
        },
        "c": {"status": "done", "results": {"genes all": {"seconds": 1.0}, "spots": 5}},
        "d": {"status": "stopped", "reason": "late", "results": {"small": {"pcc": 0.1, "seconds": 60.0}}},
    }
    again = [check("one", passed=True), {"name": "two", "left_out": "no time was left"}]
    second = {
        "a": {"status": "done", "results": {"checks": again}},
        "d": {
            "status": "done",
            "results": {"small": {"left_out": "3 s were left"}, "nsl": {"pcc": 0.2, "seconds": 6.0}},
        },
    }
    report, runs = load("_gpu.report"), [one_run("1", first), one_run("2", second)]
    report.write(tmp_path, runs)
    assert [run["parts"] for run in report.read(tmp_path / "gpu.json")] == [first, second]
    text = (tmp_path / "gpu.md").read_text()
    for line in (
        "Run 1, commit c1, on **Stub**, 2000-01-01",
        "Run 2, commit c2, on **Stub**, 2000-01-01",
        "| one | 0.5 | 1 | yes | 2 |",
        "| two | 0.5 | 1 | yes | 1 |",
        "- Of run 1: small.",
        "- Of run 2: nsl.",
        "| NSL, all detected genes | ≤ 2 s | 1.00 s | yes | 1 |",
    ):
        assert line in text
    assert load("gpu").known(runs, "a") == ["one", "two"]
    assert load("gpu").known(runs, "d") == ["small", "nsl"]


def test_graphs_that_compute_something_else_are_switched_off(load: Any, tmp_path: Path) -> None:
    _, runner = run(load, tmp_path)
    assert runner.graphs()
    checks = [{"name": "graphs: losses", "passed": False}]
    runner.found["parts"]["a"] = {"status": "done", "results": {"checks": checks}}
    assert not runner.graphs()


def test_the_report_tells_what_was_met(load: Any) -> None:
    def row(who: str, precision: str, speed: float) -> dict[str, Any]:
        return {"mode": "training", "who": who, "precision": precision, "spots_per_s": speed, "seconds": 96 / speed}

    b = {
        "batch 96": [row("package", "bf16", 900.0), row("literal", "bf16", 450.0), row("literal", "float32", 100.0)],
        "ceilings": {
            "alone_ms": 40.0,
            "batch": 96,
            "precision": "bf16",
            "own_shapes_tflops": 300.0,
            "square_tflops": {"bf16": 700.0},
        },
        "fits": [{"patches": "file", "batch": 96, "spots_per_s": 800.0, "waiting": 0.05}],
        "compiled": {"left_out": "4 s were left"},
    }
    checks = [{"name": "one", "limit": 1.0, "found": 2.0, "passed": False}]
    parts = {
        "a": {"status": "done", "results": {"checks": checks}},
        "b": {"status": "stopped", "reason": "at its limit of 120 s", "results": b},
        "c": {"status": "done", "results": {"genes all": {"error": "E"}}},
    }
    found = one_run("1", parts)
    report = load("_gpu.report")
    met = {row["name"]: row["met"] for row in report.targets(parts)}
    assert list(met.values()) == ["yes", "no", "no", "no"]
    text = report.markdown([found])
    for line in (
        "| one | 2 | 1 | **no** | 1 |",
        "Run 1: stopped: at its limit of 120 s",
        "compiled: left out, 4 s were left",
        "| ≥ 50 % | 38 % | no | 1 |",
    ):
        assert line in text
    assert "rehearsal" not in text
    assert load("gpu").unwell(parts["c"]) == ["genes all: E"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--device", "cpu"], "add --rehearse"), (["--device", "cpu", "--rehearse"], "give it another folder with --out")],
)
def test_a_rehearsal_is_never_taken_for_a_result(arguments: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, FOLDER / "gpu.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
