"""The M2OST network against golden numbers of the authors' module, and against what it promises.

The golden file holds no weights: `authors_weights` and `authors_batch` rebuild them from a seed and the shapes listed
there. Its numbers were computed in float64 by the authors' module (model/M2OST.py of Dootmaan/M2OST at 60fd90a) with
the crop of the central quarter ending at 5/8 of the image instead of 6/8.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, mse_loss, scaled_dot_product_attention

from stpredict.models.m2ost import _authors, _blocks, _cpu
from stpredict.models.m2ost._blocks import SelfAttention, attend, summarize
from stpredict.models.m2ost._module import PRESETS, M2OSTModule

GOLDEN = json.loads((Path(__file__).parent / "data" / "m2ost_golden.json").read_text())["networks"]

LITTLE: dict[str, Any] = {
    "image_size": 32,
    "width": 12,
    "depth": 2,
    "heads": 3,
    "head_width": 4,
    "mlp_width": 8,
    "gate_width": 10,
}


def authors_weights(shapes: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """Weights in the authors' names: normal, scaled by fan-in; normalisations around 1; everything else of size 0.1."""
    random = np.random.RandomState(seed)
    weights = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape)
        if len(shape) == 2:
            values *= shape[1] ** -0.5
        elif len(shape) == 1:
            values = 0.1 * values + name.endswith("weight")
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


def authors_batch(n_spots: int, image_size: int, n_genes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (n_spots, 3, 3, image_size, image_size), uint8, and targets (n_spots, n_genes) for a mean squared error."""
    random = np.random.RandomState(seed)
    images = random.randint(0, 256, (n_spots, 3, 3, image_size, image_size)).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(random.standard_normal((n_spots, n_genes)))


def summary(gradient: Tensor) -> list[float]:
    """Norm of a gradient, and its product with a fixed vector, which no permutation of the values leaves as it is."""
    values = gradient.double().flatten()
    return [values.norm().item(), (values @ torch.arange(1, values.numel() + 1).double().sin()).item()]


def little(seed: int = 0, **sizes: Any) -> M2OSTModule:
    torch.manual_seed(seed)
    return M2OSTModule(5, **LITTLE | sizes)


def spots(n: int = 3, levels: int = 3, size: int = 32) -> Tensor:
    return torch.randint(
        0, 256, (n, levels, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )


@cache
def drawn_weights(size: str, seed: str) -> dict[str, Tensor]:
    return authors_weights(GOLDEN[size]["shapes"], int(seed))


def golden_weights(size: str, seed: str = "0") -> dict[str, Tensor]:
    return dict(drawn_weights(size, seed))


def golden_case(size: str, seed: str) -> tuple[M2OSTModule, Tensor, Tensor, dict[str, Any]]:
    golden = GOLDEN[size]
    model = M2OSTModule.from_authors(golden_weights(size, seed), head_width=golden["head_width"])
    images, target = authors_batch(golden["n_spots"], golden["image_size"], golden["n_genes"], int(seed))
    return model, images, target, golden["seeds"][seed]


def compare_gradients(model: M2OSTModule, expected: dict[str, list[float]], tolerance: float) -> None:
    """Compare to within ``tolerance`` of each gradient's norm; what the authors keep in three tensors, part by part."""
    compared = set()
    for ours, theirs in _authors._names(model.config["depth"]).items():
        gradient = model.get_parameter(ours).grad
        assert gradient is not None, ours
        for name, part in zip(theirs, gradient.chunk(len(theirs)), strict=True):
            # Some gradients are next to nothing and drown in the rounding of others, whose total norm is about 10.
            scale = expected[name][0] + 0.05
            assert summary(part) == pytest.approx(expected[name], abs=tolerance * scale), name
            compared.add(name)
    assert compared == expected.keys()


# Parity with the authors' module


CASES = [("reduced", seed) for seed in "012"] + [("published", seed) for seed in "12"]  # for 0 see the gradients


@pytest.mark.parametrize(("size", "seed"), CASES)
def test_outputs_are_those_of_the_authors_module(size: str, seed: str) -> None:
    model, images, _, expected = golden_case(size, seed)
    with torch.no_grad():
        output = model(images)
    assert output.dtype == torch.float32
    np.testing.assert_allclose(output, expected["output"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_outputs_and_gradients_agree_in_float64(seed: str) -> None:
    model, images, target, expected = golden_case("reduced", seed)
    output = model.double()(images.double() / 255)
    mse_loss(output, target).backward()
    np.testing.assert_allclose(output.detach(), expected["output"], atol=1e-10, rtol=0)
    compare_gradients(model, expected["gradient"], tolerance=1e-9)


def test_gradients_of_the_published_network() -> None:
    model, images, target, expected = golden_case("published", "0")
    output = model(images)
    np.testing.assert_allclose(output.detach(), expected["output"], atol=1e-5, rtol=0)
    mse_loss(output, target.float()).backward()
    compare_gradients(model, expected["gradient"], tolerance=1e-4)


def test_published_size() -> None:
    with torch.device("meta"):
        published = M2OSTModule.from_preset("small", 250)
        assert published.config == M2OSTModule(250).config
    assert sum(p.numel() for p in published.parameters()) == 7_038_858
    assert _authors.config(golden_weights("published"), 64) == {
        name: value for name, value in published.config.items() if name not in ("dropout", "mask_ratio")
    }


def test_data_parallel_prefix_is_understood() -> None:
    weights = golden_weights("reduced")
    plain = M2OSTModule.from_authors(weights, head_width=8).state_dict()
    prefixed = M2OSTModule.from_authors({f"module.{k}": v for k, v in weights.items()}, head_width=8).state_dict()
    assert all(torch.equal(plain[name], prefixed[name]) for name in plain)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.clear(), "cls_token is missing.*and 3 more.*Dootmaan/M2OST"),
        (lambda w: w.pop("transformer.layers.1.2.to_k2.weight"), "layers.1.2.to_k2.weight is missing"),
        (lambda w: w.update(extra=torch.zeros(3)), "extra is unknown"),
        (lambda w: w.update({"mlp_head.bias": torch.zeros(8)}), r"mlp_head.bias has shape \(8,\) instead of \(7,\)"),
        (lambda w: w.update({"cls_token": torch.zeros(24)}), "cls_token has 1 dimensions instead of 3"),
        (
            lambda w: w.update(pos_embedding2=w["pos_embedding2"] * torch.nan),
            "pos_embedding2 has values that are not finite",
        ),
        (lambda w: w.update(epoch=3), "epoch is no tensor"),
    ],
)
def test_foreign_and_damaged_weights_are_refused(damage, message: str) -> None:
    weights = golden_weights("reduced")
    damage(weights)
    with pytest.raises(ValueError, match=message):
        M2OSTModule.from_authors(weights, head_width=8)


def test_our_own_weights_are_not_the_authors() -> None:
    with pytest.raises(ValueError, match=r"stpredict.models.load reads"):
        M2OSTModule.from_authors(little().state_dict())


def test_head_width_of_the_authors_weights_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"24 and 24 channels cannot be split into heads of head_width=64"):
        M2OSTModule.from_authors(golden_weights("reduced"))


# Input


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_any_number_of_levels(levels: int) -> None:
    model = little(levels=levels)
    output = model(spots(levels=levels))
    assert output.shape == (3, 5)
    output.square().sum().backward()
    # Distributed training fails on parameters that the output does not depend on.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not torch.allclose(output[0], output[1])


def test_uint8_and_float_images_give_the_same() -> None:
    model, images = little(), spots()
    assert torch.equal(model(images), model(images.float() / 255))


def test_pixels_keep_the_digits_of_the_weights() -> None:
    model, images = little().double().eval(), spots()
    assert torch.equal(model(images), model(images.double() / 255))


def test_a_spot_is_predicted_alike_in_any_batch() -> None:
    model, images = little(), spots(4)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]))
    assert model(images[:0]).shape == (0, 5)


def test_fine_tokens_lie_on_the_finest_field_of_view() -> None:
    model = little(levels=4)  # 32 pixels: at level 3 the field of view of level 0 is pixels 14 to 17
    images = spots(1, levels=4).float() / 255
    tokens = model._tokens(model._pixels(images))[3]
    n = (32 // 16) ** 2
    assert tokens.shape == (1, 1 + 4 * n, 12)
    for pixel, kinds in ((0, 1), (7, 1), (8, 2), (12, 3), (13, 3), (14, 4), (17, 4), (18, 3), (20, 2), (31, 1)):
        changed = images.clone()
        changed[0, 3, :, pixel, pixel] = 1 - changed[0, 3, :, pixel, pixel]
        moved = (model._tokens(model._pixels(changed))[3] != tokens).any(2)[0]
        # One token of each embedder whose crop holds the pixel; the coarsest embedder's come last.
        assert moved[1:].view(4, n).sum(1).tolist() == [0] * (4 - kinds) + [1] * kinds, pixel
        assert not moved[0]


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        ((2, 2, 3, 32, 32), torch.uint8, ValueError, r"\(2, 2, 3, 32, 32\).*3 levels.*levels=3"),
        ((2, 3, 3, 48, 48), torch.uint8, ValueError, r"image_size=32"),
        ((3, 3, 32, 32), torch.uint8, ValueError, r"takes \(batch, 3, 3, 32, 32\)"),
        ((2, 3, 3, 32, 32), torch.int64, TypeError, r"torch.int64; expected torch.uint8"),
    ],
)
def test_images_that_do_not_fit(
    shape: tuple[int, ...], dtype: torch.dtype, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        little()(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 220}, r"image_size=220.*multiple of 16, such as 208 or 224"),
        ({"image_size": 36, "patch_size": 12}, r"multiple of 24, such as 24 or 48"),
        ({"image_size": 8}, r"such as 16\."),
        ({"patch_size": 2, "levels": 3}, r"patch_size=2 with levels=3.*0.5 pixels.*multiple of 4"),
        ({"levels": 0}, r"levels=0; expected a positive integer"),
        ({"dropout": 1.0}, r"dropout=1.0; expected a share"),
        ({"mask_ratio": -0.1}, r"mask_ratio=-0.1; expected a share"),
    ],
)
def test_sizes_that_cannot_be_built(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        little(**sizes)


# Sizes and storage


def test_presets() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in M2OSTModule.from_preset(name, 250).parameters()) for name in PRESETS]
    assert sizes == sorted(sizes)
    assert M2OSTModule.from_preset("tiny", 4, levels=2, dropout=0.1).config["levels"] == 2
    with pytest.raises(ValueError, match="no preset 'huge'.*'tiny', 'small', 'base', 'large'"):
        M2OSTModule.from_preset("huge", 4)


def test_weights_and_config_survive_storage(tmp_path: Path) -> None:
    model = little(cross_heads=2, dropout=0.1, mask_ratio=0.25).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    again = M2OSTModule(**json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert again.config == model.config
    assert torch.equal(again(spots()), model(spots()))


# Training


def test_same_seed_same_gradients() -> None:
    gradients = []
    for _ in range(2):
        model = little(dropout=0.2, mask_ratio=0.5)
        model(spots()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("option", ["dropout", "mask_ratio"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_options_act_in_training_only(option: str, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocks, "AMX", False)
    options: dict[str, Any] = {option: 0.5}
    plain, model = little(), little(**options)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16), torch.no_grad():
        trained = model(spots())
        assert not torch.equal(trained, model(spots()))
        assert not torch.equal(trained, plain(spots()))
        assert torch.equal(model.eval()(spots()), plain.eval()(spots()))


def test_masking_hides_a_share_of_the_keys_but_never_the_class_token() -> None:
    layer = SelfAttention(8, heads=2, head_width=4, dropout=0.0, mask_ratio=0.3)
    numbers = torch.arange(21.0).expand(50, 2, 1, 21).mT
    keys, values = layer._visible(numbers, numbers + 100)
    assert keys.shape == (50, 2, 1 + 14, 1)
    assert torch.equal(values, keys + 100)
    assert (keys[:, :, 0] == 0).all()
    assert torch.equal(keys[:, 0], keys[:, 1])  # all heads miss the same tokens
    assert all(spot.unique().numel() == 15 for spot in keys[:, 0])
    hidden = 1 - torch.bincount(keys[:, 0].long().flatten(), minlength=21) / 50
    assert 0.05 < hidden[1:].min() < hidden[1:].max() < 0.6


# What is done for speed changes nothing


def test_last_block_computes_the_class_tokens_of_the_whole_block() -> None:
    model, images = little().double(), spots().double() / 255
    x = model.blocks[0](model._tokens(model._pixels(images)))
    for short, whole in zip(model.blocks[1](x, class_only=True), model.blocks[1](x), strict=True):
        torch.testing.assert_close(short, whole[:, :1])


@pytest.mark.parametrize("short", [False, True])
def test_attention_is_torchs(short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 4, 2, 7, 8, generator=torch.Generator().manual_seed(0))
    k, v = k[:, :, :5], v[:, :, :5]
    fused = scaled_dot_product_attention(q, k, v).transpose(1, 2)
    expected = summarize(fused) if short else fused
    torch.testing.assert_close(attend(q, k, v, summary=short), expected)
    monkeypatch.setattr(_blocks, "AMX", False)
    by_hand = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), summary=short)
    torch.testing.assert_close(by_hand.float(), expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("at_a_time", [1, 100, 2**20])
def test_onednn_attention_and_its_gradients_are_torchs(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "WEIGHTS", at_a_time)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, 3, n, 4, generator=random, requires_grad=True) for n in (7, 6, 6))
    ours = _cpu.attention(q, k, v)
    fused = scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(ours, fused)
    gradient = torch.randn(ours.shape, generator=random)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), gradient) for out in (ours, fused)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_onednn_attention_loses_no_digits_where_tokens_are_alike() -> None:
    # As CTMM has no residual, the tokens of a level do become alike.
    q, k, v = (torch.randn(2, 3, 600, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    v = 10 + 1e-3 * v
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2)
    assert (_cpu.attention(q, k, v) - expected).abs().max() < 2e-6


def test_onednn_linear_map_is_torchs() -> None:
    x, weight, bias = torch.randn(2, 5, 7), torch.randn(3, 7), torch.randn(3)
    torch.testing.assert_close(_cpu.linear(x, weight, bias), linear(x, weight, bias))
    torch.testing.assert_close(_cpu.linear(x.mT.contiguous().mT, weight, None), linear(x, weight))


@pytest.mark.parametrize("fused", [False, True])
def test_bfloat16_stays_close_to_float32(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocks, "AMX", fused)
    model = M2OSTModule.from_authors(golden_weights("reduced"), head_width=8).eval()
    images, _ = authors_batch(3, 64, 7, 0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    np.testing.assert_allclose(output.float(), GOLDEN["reduced"]["seeds"]["0"]["output"], atol=0.06)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same() -> None:
    model, images = little().eval(), spots()
    expected = model(images)
    torch.testing.assert_close(model.cuda()(images.cuda()).cpu(), expected, atol=1e-4, rtol=1e-4)
