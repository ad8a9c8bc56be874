"""Folders of saved models: what is saved is what is loaded, at any moment there is one whole model, and no damage passes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import stpredict as stp
from stpredict.models import M2OST, NSL, FittedModel, M2OSTModule, Ridge, _files
from stpredict.models._registry import MODELS
from stpredict.models.nsl._stains import RUIFROK_JOHNSTON, stain_matrix

GENES = ["ERBB2", "HLA-DRA", "Ünïcode gene/1"]
ARRAYS = ["stain_matrix", "weights", "intercept", "loss", "n_iter", "converged", "reference"]


def make_nsl() -> NSL:
    """A model of three genes with awkward names."""
    rng = np.random.default_rng(0)
    stains = rng.normal(size=(3, 3, 3))
    return NSL(
        genes=GENES,
        stain_matrix=stains / np.linalg.norm(stains, axis=2, keepdims=True),
        weights=rng.normal(size=(3, 2)),
        intercept=rng.normal(size=3),
        loss=rng.uniform(size=3),
        n_iter=np.array([3, 7, 100]),
        converged=np.array([True, True, False]),
        reference=stain_matrix(RUIFROK_JOHNSTON),
        reads={"kind": "histogram", "bits": 5, "spot_scale": 2.0},
        params={"stains": "per_gene", "n_train": 42},
        seen=np.array([-7, 12, 2**62]),
    )


def make_ridge() -> Ridge:
    rng = np.random.default_rng(0)
    sources = {
        "X": {"from": "obsm", "n_features": 2},
        "color_statistics": {"from": "statistics", "n_features": 3, "spot_scales": [1.0, 3.0]},
    }
    features, expression = rng.normal(size=(20, 5)), rng.normal(size=(20, 3))
    return Ridge.fit(
        features, expression, GENES, n_components=3, reads={"kind": "features", "sources": sources}, seen=[4, 4, 1]
    )


def make_m2ost() -> M2OST:
    torch.manual_seed(0)
    sizes = {"levels": 2, "image_size": 16, "patch_size": 8, "width": 4, "depth": 1, "heads": 1, "head_width": 4}
    return M2OST(
        genes=GENES,
        network=M2OSTModule(3, **sizes, mlp_width=4, gate_width=4),
        mean=np.arange(3.0),
        scale=np.ones(3),
        history={name: np.array([0.5, np.nan]) for name in ("train_loss", "val_loss", "val_pcc", "learning_rate")},
        reads={"kind": "patches", "levels": 2, "image_size": 16, "spot_scale": 1.5},
    )


MAKE: dict[str, Callable[[], FittedModel]] = {"nsl": make_nsl, "ridge": make_ridge, "m2ost": make_m2ost}


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else is at these folders."""
    monkeypatch.setattr(_files, "_PATIENCE", 0.0)
    monkeypatch.setattr(_files, "_PAUSE", 0.0)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model of each kind, to be copied."""
    return {kind: make().save(tmp_path_factory.mktemp("saved") / kind) for kind, make in MAKE.items()}


@pytest.fixture
def model() -> NSL:
    return make_nsl()


@pytest.fixture
def saved(model: NSL, tmp_path: Path) -> Path:
    return model.save(tmp_path / "model")


def other_model() -> NSL:
    return NSL(**{**vars(make_nsl()), "genes": ["A", "B", "C"], "intercept": np.arange(3.0)})


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("weights-*.safetensors")
    return path


def header_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.json").read_text())


def sign(folder: Path, header: dict[str, Any]) -> None:
    """Write a header with the checksums of what is there, as somebody would who tampers with care."""
    content = weights_of(folder).read_bytes()
    if isinstance(header.get("arrays"), dict):
        header["arrays"] |= {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (folder / "model.json").write_text(json.dumps({**header, "sha256": _files._checksum(header)}))


def edit_arrays(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    arrays = load_file(weights_of(folder))
    change(arrays)
    save_file(arrays, weights_of(folder))
    sign(folder, header_of(folder))


def put(container: Any, path: str, value: Any) -> None:
    """Set a nested entry, or remove it if the value is ..."""
    *outer, last = path.split(".")
    for name in outer:
        container = container[name]
    if value is ...:
        del container[last]
    else:
        container[last] = value


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_saved_is_what_is_loaded(kind: str, originals: dict[str, Path]) -> None:
    model, again = MAKE[kind](), stp.models.load(originals[kind])
    assert type(again) is type(model)
    (header, arrays), (header_again, arrays_again) = model.to_state(), again.to_state()
    assert header_again == header
    assert arrays_again.keys() == arrays.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(arrays_again[name], values, err_msg=name)
        assert arrays_again[name].dtype == values.dtype
    assert repr(again) == repr(model)
    for name, value in model.learned().items():
        np.testing.assert_equal(again.learned()[name], value, err_msg=name)


def test_the_folder_holds_json_and_safetensors_only(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["model.json", weights_of(saved).name]
    header = header_of(saved)
    assert (header["kind"], header["format_version"]) == ("nsl", 2)
    assert header["arrays"]["file"] == weights_of(saved).name
    assert set(load_file(weights_of(saved))) == {*ARRAYS, "seen"}


def test_arrays_of_any_layout_keep_their_values(model: NSL, tmp_path: Path) -> None:
    turned = NSL(
        **{**vars(model), "stain_matrix": np.asfortranarray(model.stain_matrix), "weights": model.weights[::-1]}
    )
    again = stp.models.load(turned.save(tmp_path / "model"))
    np.testing.assert_array_equal(again.stain_matrix, model.stain_matrix)
    np.testing.assert_array_equal(again.weights, model.weights[::-1])


def test_nothing_is_unpickled(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for where, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (np, "load")]:
        monkeypatch.setattr(where, name, refuse)
    for folder in originals.values():
        assert stp.models.load(folder).genes[0] == "ERBB2"


def test_models_need_nothing_of_scverse(originals: dict[str, Path]) -> None:
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"scanpy", "anndata", "spatialdata", "squidpy", "dask", "lightning", "pandas"}}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np, scipy.sparse as sp
import stpredict.models
nsl, ridge = (stpredict.models.load(path) for path in {[str(originals["nsl"]), str(originals["ridge"])]})
print(nsl.predict(sp.csr_matrix(np.eye(2)), np.ones((2, 3)), device="cpu").shape, ridge.predict(np.ones((4, 5))).shape)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "(2, 3) (4, 3)", found.stderr


# Places that are taken


def test_a_model_is_only_replaced_when_asked(model: NSL, saved: Path) -> None:
    with pytest.raises(FileExistsError, match=r"something at '.*model' already.*overwrite=True"):
        model.save(saved)
    assert other_model().save(saved, overwrite=True) == saved
    assert stp.models.load(saved).genes == ["A", "B", "C"]
    assert len(list(saved.iterdir())) == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_peoples_things_are_left_alone(model: NSL, tmp_path: Path, overwrite: bool) -> None:
    for path, content in {
        "thesis/chapter1.txt": b"In the beginning",
        "foreign/model.json": b'{"format": "another package"}',
        "binary/model.json": b"\xff\xfe\x00",
        "torch/weights.safetensors": b"",
        "file": b"x",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    model.save(tmp_path / "ours")
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("thesis", "foreign", "binary", "torch", "file", "ours"):
        with pytest.raises(FileExistsError, match="no saved model, so it is left alone"):
            model.save(tmp_path / name, overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_empty_folder_is_filled_and_parents_are_made(model: NSL, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert stp.models.load(model.save(tmp_path / "empty")).genes == model.genes
    assert stp.models.load(model.save(tmp_path / "a" / "b" / "c")).genes == model.genes


def test_a_tilde_is_the_home_folder(model: NSL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert model.save("~/models/x") == tmp_path / "home" / "models" / "x"
    assert stp.models.load("~/models/x").genes == model.genes
    assert not (tmp_path / "~").exists()


def test_a_link_stays_and_what_it_points_to_is_replaced(saved: Path) -> None:
    link, dangling = saved.parent / "link", saved.parent / "dangling"
    link.symlink_to(saved)
    dangling.symlink_to(saved.parent / "new")
    for path in (link, dangling):
        assert other_model().save(path, overwrite=True) == path
        assert path.is_symlink()
    for path in (saved, saved.parent / "new"):
        assert stp.models.load(path).genes == ["A", "B", "C"]


def test_a_folder_that_cannot_be_renamed_is_filled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:  # as the system does for a mount point
        if Path(source).is_dir() or Path(target).is_dir() or Path(source).parent != Path(target).parent:
            raise OSError(16, "Device or resource busy")
        replace(source, target)

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, refuse)
    other_model().save(saved, overwrite=True)
    assert stp.models.load(saved).genes == ["A", "B", "C"]


def test_what_json_cannot_hold_leaves_nothing_behind(model: NSL, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`params` of the model cannot be saved as JSON"):
        NSL(**{**vars(model), "params": {"bits": object()}}).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Interrupts

STEPS = [(os, "replace"), (os, "fsync"), (os, "close"), (Path, "unlink"), (Path, "mkdir"), (Path, "iterdir")]


def interrupt(patch: pytest.MonkeyPatch, at: int, error: BaseException, *, after: bool) -> list[str]:
    """Raise before or after one of the calls that deal with files; returns what will have been called."""
    calls: list[str] = []

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            is_it = len(calls) == at
            if is_it and not after:
                raise error
            result = function(*arguments, **options)
            if is_it:
                raise error
            return result

        return call

    for where, name in STEPS:
        patch.setattr(where, name, wrap(name, getattr(where, name)))
    return calls


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left")], ids=["ctrl-c", "disk full"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_an_interrupted_save_leaves_one_whole_model(
    model: NSL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: bool, first: bool
) -> None:
    outcomes = set()
    for step in itertools.count(1):
        folder = tmp_path / str(step)
        if not first:
            model.save(folder)
        with monkeypatch.context() as patch, contextlib.suppress(type(error)):
            calls = interrupt(patch, step, error, after=after)
            other_model().save(folder, overwrite=True)
        if len(calls) < step:
            break
        outcomes.add(stp.models.load(folder).genes[0] if not first or (folder / "model.json").exists() else "none")
        # Whatever has stayed behind does not stand in the way, and goes.
        model.save(folder, overwrite=True)
        assert stp.models.load(folder).genes == GENES
        assert len(list(folder.iterdir())) == 2
    assert step > 10
    assert outcomes == {"none" if first else GENES[0], "A"}


def test_a_killed_save_leaves_one_whole_model(model: NSL, saved: Path) -> None:
    for at in (1, 2, 3, 4, 5):  # before the arrays are whole, before they have their name, and so on
        if (child := os.fork()) == 0:
            calls: list[object] = []

            def kill(function: Callable[..., Any], calls: list[object] = calls, at: int = at) -> Callable[..., Any]:
                def call(*arguments: Any) -> Any:
                    calls.append(arguments)
                    return os._exit(9) if len(calls) == at else function(*arguments)

                return call

            os.replace, os.fsync = kill(os.replace), kill(os.fsync)
            other_model().save(saved, overwrite=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert stp.models.load(saved).genes == GENES
    assert len(list(saved.iterdir())) > 2
    model.save(saved, overwrite=True)
    assert len(list(saved.iterdir())) == 2


def test_two_processes_save_one_after_the_other(model: NSL, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "_PATIENCE", 10.0)
    children = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                for i in range(10):
                    (other_model() if i % 2 else model).save(saved, overwrite=True)
                os._exit(0)
            os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert stp.models.load(saved).genes in (GENES, ["A", "B", "C"])
    assert len(list(saved.iterdir())) == 2


# Damage


def test_no_such_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("nowhere", "file", "."):
        with pytest.raises(FileNotFoundError, match=r"no saved model at '.*': it lacks model\.json"):
            stp.models.load(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [b'{"format": "stpre', b"", b"\xff\xfe\x00\x80", b"[" * 100_000, b'{"a":' * 100_000],
    ids=lambda t: str(t[:9]),
)
def test_damaged_json(saved: Path, text: bytes) -> None:
    (saved / "model.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"'.*model' is damaged: model\.json is not JSON"):
        stp.models.load(saved)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "other"}', "3", '{"format": ["stpredict"]}'])
def test_foreign_json(saved: Path, text: str) -> None:
    (saved / "model.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.json' was not written by stpredict, or its `format` is damaged"):
        stp.models.load(saved)


@pytest.mark.parametrize("number", [1, 3, 0, "2", 2.0, True, [2], None])
def test_other_format_versions(saved: Path, number: object) -> None:
    sign(saved, header_of(saved) | {"format_version": number})
    with pytest.raises(ValueError, match=rf"`format_version` {re.escape(repr(number))} in model.json.*reads 2"):
        stp.models.load(saved)


def test_a_header_of_absurd_size(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "_MAX_JSON", 100)
    with pytest.raises(ValueError, match=r"model\.json has \d+ bytes, which no header has"):
        stp.models.load(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(saved: Path, keep: int) -> None:
    path = weights_of(saved)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"in model.json, `arrays.size` is \d+, but weights-.* has \d+ bytes"):
        stp.models.load(saved)
    sign(saved, header_of(saved))
    with pytest.raises(ValueError, match=r"in weights-.*, `arrays` cannot be read"):
        stp.models.load(saved)


def test_weights_that_are_not_there_or_somebody_elses(saved: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, weights_of(saved))  # a pickle
    sign(saved, header_of(saved))
    with pytest.raises(ValueError, match=r"in weights-.*, `arrays` cannot be read"):
        stp.models.load(saved)
    weights_of(saved).unlink()
    with pytest.raises(ValueError, match=r"in model.json, `arrays.file` names weights-.*, which is not there"):
        stp.models.load(saved)


@pytest.mark.parametrize("name", ["../weights-0123456789abcdef.safetensors", "/etc/passwd", "", None, ["x"], 3])
def test_weights_elsewhere_are_not_read(saved: Path, name: object) -> None:
    header = header_of(saved)
    header["arrays"]["file"] = name
    sign(saved, header)
    with pytest.raises(ValueError, match=r"in model.json, `arrays.file` is "):
        stp.models.load(saved)


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("nsl", "kind", ["nsl"], "`kind` is .'nsl'.; known are"),
        ("nsl", "kind", "ridge", "`n_components` is missing"),
        ("nsl", "genes", "abc", "`genes` is 'abc'; expected a list of names"),
        ("nsl", "genes", ["g", "g", "h"], "`genes` has 'g' more than once"),
        ("nsl", "genes", ["g", 3, "h"], "`genes` has 3; expected names"),
        ("nsl", "genes", ["g", "h"], "`stain_matrix` has the shape .3, 3, 3., expected .2, 3, 3."),
        ("nsl", "params", [], "`params` is"),
        ("nsl", "reads.kind", "patches", "`reads.kind` is 'patches'; expected 'histogram'"),
        ("nsl", "reads.bits", "x", "`reads.bits` is 'x'; expected an integer from 1 to 8"),
        ("nsl", "reads.bits", 9, "`reads.bits` is 9"),
        ("nsl", "reads.bits", True, "`reads.bits` is True"),
        ("nsl", "reads.spot_scale", 1e9, "`reads.spot_scale` is 1000000000.0; expected a number above 0"),
        ("nsl", "reads.spot_scale", math.nan, "`reads.spot_scale` is nan"),
        ("nsl", "reads.spot_scale", ..., "`reads.spot_scale` is missing"),
        ("ridge", "reads.sources", {}, "`reads.sources` names 0 features, but the model has 5"),
        ("ridge", "reads.sources", [], "`reads.sources` is"),
        ("ridge", "reads.sources.X", {}, "`reads.sources.X.from` is missing"),
        ("ridge", "reads.sources.X.from", "web", "`reads.sources.X.from` is 'web'"),
        ("ridge", "reads.sources.X.n_features", 3, "`reads.sources` names 6 features"),
        ("ridge", "reads.sources.X.n_features", -1, "`reads.sources.X.n_features` is -1"),
        ("ridge", "reads.sources.color_statistics.spot_scales", [0], "`reads.sources.color_statistics.spot_scales` is 0"),
        ("ridge", "reads.sources.X.frames", {"A": [0, 0, 0]}, "`reads.sources.X.frames.A` is 0"),
        ("ridge", "n_components", 10**12, "`n_components` is 10+; expected an integer"),
        ("m2ost", "history", [], "`history` is"),
        ("m2ost", "history", {"train_loss": [1]}, "`history.val_loss` is missing"),
        ("m2ost", "history.val_loss", [1], "`history.val_loss` is .*expected 2 numbers"),
        ("m2ost", "history.val_loss", [10**400, 1], "`history` has numbers that are too large"),
        ("m2ost", "history.val_loss", "ab", "`history.val_loss` is 'ab'"),
        ("m2ost", "reads.levels", 3, "`reads.levels` is 3, but the network takes 2"),
        ("m2ost", "reads.image_size", 32, "`reads.image_size` is 32, but the network takes 16"),
        ("m2ost", "network.width", 2**20, "has the shape .*, expected .*1048576"),
        ("m2ost", "network.width", 10**30, "`network.width` is 10+; expected an integer"),
        ("m2ost", "network.depth", 10**9, "`network.depth` is 1000000000"),
        ("m2ost", "network.depth", 2, "`network.blocks.1.* is missing"),
        ("m2ost", "network.levels", "2", "`network.levels` is '2'"),
        ("m2ost", "network.image_size", 33, "`network` cannot be built: image_size=33"),
        ("m2ost", "network.dropout", 1.5, "`network` cannot be built: dropout=1.5"),
        ("m2ost", "network.dropout", None, "`network.dropout` is None"),
        ("m2ost", "network.color", 1, "`network.color` is unknown"),
    ],
)  # fmt: skip
def test_headers_that_cannot_be(
    kind: str, path: str, value: Any, message: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(originals[kind], tmp_path / "model")
    header = header_of(folder)
    put(header, path, value)
    sign(folder, header)
    with pytest.raises(ValueError, match=rf"'.*model' is damaged: in (model\.json|weights-.*), .*{message}"):
        stp.models.load(folder)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("nsl", lambda a: a["weights"].fill(np.nan), "`weights` has values that are not finite"),
        ("nsl", lambda a: a["stain_matrix"].fill(0), "`stain_matrix` has rows that are not of unit length"),
        ("nsl", lambda a: a["reference"].__setitem__(1, a["reference"][0]), "`reference` is singular"),
        ("nsl", lambda a: a.update(converged=a["converged"].astype(float)), "`converged` has numbers of type float64"),
        ("nsl", lambda a: a.update(weights=np.zeros((3, 5))), r"`weights` has the shape \(3, 5\), expected \(3, 2\)"),
        ("nsl", lambda a: a.pop("loss"), "`loss` is missing"),
        ("nsl", lambda a: a.update(more=np.zeros(3)), "`more` is unknown"),
        ("nsl", lambda a: a.update(seen=np.array([3, 1])), "`seen` is not sorted"),
        ("nsl", lambda a: a.update(seen=np.zeros((0, 2), np.int64)), "`seen` has the shape"),
        ("ridge", lambda a: a["scale"].fill(0), "`scale` has 0; expected values above 0"),
        ("ridge", lambda a: a["alpha"].fill(-1), "`alpha` has -1; expected at least 0"),
        ("ridge", lambda a: a.pop("components"), "`components` is missing"),
        (
            "ridge",
            lambda a: a.update(coef=a["coef"][:, :2].copy()),
            r"`coef` has the shape \(3, 2\), expected \(3, 3\)",
        ),
        ("ridge", lambda a: a.update(mean=np.zeros(())), r"`mean` has the shape \(\)"),
        ("m2ost", lambda a: [v.fill(np.nan) for k, v in a.items() if "head" in k], "`network.head.*not finite"),
        ("m2ost", lambda a: a["scale"].fill(-1), "`scale` has -1"),
        ("m2ost", lambda a: a.update(mean=a["mean"].astype(np.float32)), "`mean` has numbers of type float32"),
        ("m2ost", lambda a: a.pop("network.norm.bias"), "`network.norm.bias` is missing"),
    ],
)
def test_arrays_that_cannot_be(
    kind: str, change: Callable[[Any], object], message: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(originals[kind], tmp_path / "model")
    edit_arrays(folder, change)
    with pytest.raises(ValueError, match=rf"'.*model' is damaged: in weights-\w+.safetensors, {message}"):
        stp.models.load(folder)


def test_arrays_of_another_size_are_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_arrays(saved, lambda arrays: arrays.update(weights=np.zeros((3, 10**6))))
    monkeypatch.setattr("stpredict.models._fields.check_arrays", None)
    with pytest.raises(ValueError, match=r"`weights` has the shape \(3, 1000000\)"):
        stp.models.load(saved)


JSON_VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    math.nan,
    math.inf,
    10**40,
    "",
    "x",
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
    [[[]]],
]


def fields(value: Any, path: str = "") -> Iterator[str]:
    """All entries of a header, outer ones included."""
    for name, inner in value.items():
        yield path + name
        if isinstance(inner, dict):
            yield from fields(inner, f"{path}{name}.")


@pytest.mark.parametrize("kind", MODELS)
def test_any_damage_is_an_error_that_names_file_and_field(
    kind: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    original = originals[kind]
    expected = (original / "model.json").read_text()
    arrays, header = load_file(weights_of(original)), header_of(original)

    def flip(folder: Path, name: str) -> str:
        content = bytearray((folder / name).read_bytes())
        position = int(rng.integers(len(content)))
        content[position] ^= 1 << int(rng.integers(8))
        (folder / name).write_bytes(content)
        return f"byte {position} of {name}"

    def field(folder: Path, path: str) -> str:
        changed, value = json.loads(expected), [*JSON_VALUES, ...][rng.integers(len(JSON_VALUES) + 1)]
        put(changed, path, value)
        if rng.integers(2):
            sign(folder, changed)
        else:
            (folder / "model.json").write_text(json.dumps(changed))
        return f"{path} = {value!r}"

    def array(folder: Path, name: str) -> str:
        value = arrays[name]
        others: list[Any] = [
            np.zeros(value.shape, np.float16),
            np.zeros(value.shape, np.int32),
            value[None],
            value[:0],
            np.eye(2),
        ]
        changed: dict[str, Any] = {key: old for key, old in arrays.items() if key != name}
        if (which := rng.integers(len(others) + 1)) < len(others):
            changed[name] = others[which]
        save_file(changed, weights_of(folder))
        sign(folder, header_of(folder))
        return f"{name}: {which}"

    names = rng.permutation(list(arrays))[:12]
    tasks: list[tuple[Callable[[Path, str], str], str]] = [(field, path) for path in fields(header) for _ in range(3)]
    tasks += [(array, name) for name in names for _ in range(2)]
    tasks += [(flip, name) for name in ("model.json", weights_of(original).name) for _ in range(25)]
    for number, (damage, where) in enumerate(tasks):
        folder = shutil.copytree(original, tmp_path / str(number))
        what = damage(folder, where)
        try:
            loaded = stp.models.load(folder)
        except ValueError as error:
            message = str(error)
            assert re.search(r"model\.json|weights-\w+\.safetensors", message), (what, message)
            assert "`" in message or "is not JSON" in message, (what, message)
            assert "of which this is no model" not in message, (what, message)  # caught by a check of its own
        except FileNotFoundError as error:
            raise AssertionError(what) from error
        else:
            # What is not used may be anything, if somebody has signed it.
            state, state_expected = loaded.to_state(), stp.models.load(original).to_state()
            assert what.startswith("params") or state[0] == state_expected[0], what
            assert all(np.array_equal(state[1][name], value) for name, value in state_expected[1].items()), what
