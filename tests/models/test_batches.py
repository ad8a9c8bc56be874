from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stpredict.models.m2ost._batches import Batches

N = 23
PATCHES = np.arange(N, dtype=np.uint8).reshape(N, 1, 1, 1, 1) * np.ones((1, 2, 3, 4, 4), dtype=np.uint8)
TARGETS = np.arange(N, dtype=np.float32)[:, None]


def make(epoch: int = 0, *, train: bool = True, rank: int = 0, world_size: int = 1, seed: int = 0) -> Batches:
    return Batches(
        PATCHES,
        TARGETS,
        np.arange(3, N),
        batch_size=8,
        epoch=lambda: epoch,
        seed=seed,
        train=train,
        rank=rank,
        world_size=world_size,
    )


def spots(batches: Batches) -> list[list[int]]:
    return [batch.targets[:, 0].int().tolist() for batch in batches]


def test_every_spot_once_per_epoch() -> None:
    seen = spots(make())
    assert sorted(sum(seen, [])) == list(range(3, N))
    assert [len(batch) for batch in seen] == [8, 8, 4]
    assert len(make()) == 3


def test_patches_belong_to_targets() -> None:
    for batch in make():
        assert torch.equal(batch.patches[:, 0, 0, 0, 0].float(), batch.targets[:, 0])


def test_order_and_symmetry_are_drawn_anew_in_every_epoch_and_are_repeatable() -> None:
    assert spots(make(0)) != spots(make(1))
    assert spots(make(1)) == spots(make(1))
    assert spots(make(0)) != spots(make(0, seed=1))
    first, second = next(iter(make(0))), next(iter(make(1)))
    assert not torch.equal(first.symmetry, second.symmetry)
    assert set(torch.cat([batch.symmetry for e in range(10) for batch in make(e)]).tolist()) == set(range(8))


def test_validation_is_in_order_and_not_augmented() -> None:
    assert sum(spots(make(train=False)), []) == list(range(3, N))
    assert all((batch.symmetry == 0).all() and (batch.jitter == 0).all() for batch in make(train=False))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_out_the_same_global_batches(world_size: int) -> None:
    parts = [list(make(rank=rank, world_size=world_size)) for rank in range(world_size)]
    for whole, *shares in zip(make(), *parts, strict=True):
        drawn = {int(t): int(s) for share in shares for t, s in zip(share.targets[:, 0], share.symmetry, strict=True)}
        assert drawn == dict(zip(whole.targets[:, 0].int().tolist(), whole.symmetry.tolist(), strict=True))
        assert all(share.n_global == whole.n_global == len(whole.targets) for share in shares)


def test_errors_of_the_reading_thread_are_raised() -> None:
    class Broken:
        def __len__(self) -> int:
            return N

        def __getitem__(self, indices: object) -> np.ndarray:
            raise OSError("the disk is gone")

    broken = Batches(Broken(), TARGETS, np.arange(4), batch_size=2, epoch=lambda: 0, seed=0, train=True)
    with pytest.raises(OSError, match="disk is gone"):
        list(broken)


def test_for_a_gpu_all_is_pinned_and_the_order_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.data_ptr())
        return tensor

    empty = torch.empty

    def pinned_empty(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        tensor = empty(*size, **options)
        if pin_memory:
            pinned.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch, "empty", pinned_empty)
    batches = make()
    monkeypatch.setattr(batches, "_pin", True)
    for batch, expected in zip(batches, make(), strict=True):
        for tensor, other in zip(batch[:4], expected[:4], strict=True):
            assert tensor.data_ptr() in pinned
            assert torch.equal(tensor, other)
