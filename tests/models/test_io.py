from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stpredict as stp
from stpredict.models import NSL
from stpredict.models.nsl._stains import RUIFROK_JOHNSTON, stain_matrix

ARRAYS = ["stain_matrix", "weights", "intercept", "loss", "n_iter", "converged", "reference"]


@pytest.fixture
def model() -> NSL:
    """A model of three genes with awkward names."""
    rng = np.random.default_rng(0)
    stains = rng.normal(size=(3, 3, 3))
    return NSL(
        genes=["ERBB2", "HLA-DRA", "Ünïcode gene/1"],
        stain_matrix=stains / np.linalg.norm(stains, axis=2, keepdims=True),
        weights=rng.normal(size=(3, 2)),
        intercept=rng.normal(size=3),
        loss=rng.uniform(size=3),
        n_iter=np.array([3, 7, 100]),
        converged=np.array([True, True, False]),
        reference=stain_matrix(RUIFROK_JOHNSTON),
        params={"bits": 5, "field": 2.0, "stains": "per_gene", "n_train": 42},
    )


@pytest.fixture
def saved(model: NSL, tmp_path: Path) -> Path:
    return model.save(tmp_path / "model")


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of the header; `None` removes one."""
    header = json.loads((folder / "model.json").read_text()) | changes
    (folder / "model.json").write_text(json.dumps({key: value for key, value in header.items() if value is not None}))


def test_what_is_saved_is_what_is_loaded(model: NSL, saved: Path) -> None:
    again = stp.models.load(saved)
    assert isinstance(again, NSL)
    assert again.genes == model.genes
    assert again.params == model.params
    for name in ARRAYS:
        ours, theirs = getattr(model, name), getattr(again, name)
        np.testing.assert_array_equal(theirs, ours, err_msg=name)
        assert theirs.dtype == ours.dtype
    assert repr(again) == repr(model)
    np.testing.assert_array_equal(again.direction, model.direction)


def test_a_loaded_model_can_be_saved_and_used(saved: Path, tmp_path: Path) -> None:
    again = stp.models.load(str(saved))
    assert again.concentrations(np.ones(3), "ERBB2").shape == (2,)
    once_more = stp.models.load(again.save(tmp_path / "copy"))
    np.testing.assert_array_equal(once_more.weights, again.weights)


def test_the_folder_holds_json_and_safetensors_only(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["model.json", "weights.safetensors"]
    header = json.loads((saved / "model.json").read_text())
    assert header["kind"] == "nsl"
    assert header["format_version"] == 1
    assert set(load_file(saved / "weights.safetensors")) == set(ARRAYS)


def test_nothing_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for where, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (np, "load")]:
        monkeypatch.setattr(where, name, refuse)
    assert stp.models.load(saved).genes[0] == "ERBB2"


# Places that are taken


def test_a_model_is_only_replaced_when_asked(model: NSL, saved: Path) -> None:
    with pytest.raises(FileExistsError, match=r"something at '.*model' already.*overwrite=True"):
        model.save(saved)
    other = NSL(**{**model.__dict__, "intercept": model.intercept + 1})
    assert other.save(saved, overwrite=True) == saved
    np.testing.assert_array_equal(stp.models.load(saved).intercept, model.intercept + 1)


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_peoples_things_are_left_alone(model: NSL, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("In the beginning")
    (tmp_path / "file").write_text("x")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.json").write_text('{"format": "another package"}')
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "model.json").write_bytes(b"\xff\xfe\x00")
    for path in ("thesis", "file", "foreign", "binary"):
        with pytest.raises(FileExistsError, match="no saved model, so it is left alone"):
            model.save(tmp_path / path, overwrite=overwrite)
    assert [path.name for path in foreign.iterdir()] == ["model.json"]


def test_an_empty_folder_is_filled_and_parents_are_made(model: NSL, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert stp.models.load(model.save(tmp_path / "empty")).genes == model.genes
    assert stp.models.load(model.save(tmp_path / "a" / "b" / "c")).genes == model.genes


def test_what_json_cannot_hold_leaves_nothing_behind(model: NSL, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        NSL(**{**model.__dict__, "params": {"bits": object()}}).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Damage


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no saved model at '.*nowhere': it lacks model\.json and weights\.saf"
    ):
        stp.models.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"it lacks {name}"):
        stp.models.load(saved)


@pytest.mark.parametrize("text", [b'{"format": "stpre', b"", b"\xff\xfe\x00\x80"], ids=["cut", "empty", "binary"])
def test_damaged_json(saved: Path, text: bytes) -> None:
    (saved / "model.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"'.*model' is damaged: model\.json is not JSON"):
        stp.models.load(saved)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "other"}', "3"])
def test_foreign_json(saved: Path, text: str) -> None:
    (saved / "model.json").write_text(text)
    with pytest.raises(ValueError, match="was not written by stpredict; load models made by `model.save`"):
        stp.models.load(saved)


@pytest.mark.parametrize("number", [2, 0, "1", None])
def test_other_format_versions(saved: Path, number: object) -> None:
    edit(saved, format_version=number)
    with pytest.raises(ValueError, match=f"format version {number}; this version of stpredict-histology reads 1"):
        stp.models.load(saved)


@pytest.mark.parametrize("kind", ["transformer", None])
def test_unknown_kind(saved: Path, kind: object) -> None:
    edit(saved, kind=kind)
    with pytest.raises(ValueError, match=rf"of kind {kind!r}; known are \['nsl'"):
        stp.models.load(saved)


@pytest.mark.parametrize(
    "changes",
    [{"genes": None}, {"params": None}, {"genes": ["one", "two"]}, {"genes": 5}, {"params": 7}],
    ids=["no genes", "no params", "fewer genes", "genes are a number", "params are a number"],
)
def test_incomplete_header(saved: Path, changes: dict[str, Any]) -> None:
    edit(saved, **changes)
    with pytest.raises(ValueError, match=r"'.*model' is damaged or incomplete"):
        stp.models.load(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(saved: Path, keep: int) -> None:
    path = saved / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"'.*model' is damaged or incomplete: .+"):
        stp.models.load(saved)


def test_missing_and_misshapen_tensors(saved: Path) -> None:
    path = saved / "weights.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "weights": torch.zeros(3, 5)}, path)
    with pytest.raises(ValueError, match=r"damaged or incomplete.*weights has the shape \(3, 5\), expected \(3, 2\)"):
        stp.models.load(saved)
    save_file({name: tensor for name, tensor in tensors.items() if name != "loss"}, path)
    with pytest.raises(ValueError, match="damaged or incomplete.*loss"):
        stp.models.load(saved)


def test_weights_of_another_model(saved: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, saved / "weights.safetensors")  # a pickle
    with pytest.raises(ValueError, match="damaged or incomplete"):
        stp.models.load(saved)


def test_an_interrupted_overwrite_never_mixes_two_models(
    model: NSL, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    other = NSL(**{**model.__dict__, "genes": ["A", "B", "C"], "intercept": model.intercept + 1})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", stop)
        with pytest.raises(KeyboardInterrupt):
            other.save(saved, overwrite=True)
    try:
        left = stp.models.load(saved)
    except (FileNotFoundError, ValueError):
        return  # nothing, or an error that says so, is fine as well
    assert (left.genes == model.genes) == (left.intercept == model.intercept).all()
