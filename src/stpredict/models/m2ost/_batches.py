"""Batches of patches for training: deterministic, shared out over processes, read ahead by a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from stpredict.models.m2ost._model import PatchSource


class Batch(NamedTuple):
    """One process's share of a global batch.

    ``patches`` ``(b, L, 3, S, S)`` uint8; ``targets`` ``(b, G)``; ``symmetry`` ``(b,)`` 0 to 7; ``jitter`` ``(b, 6)``
    standard normal numbers for stain jitter; ``n_global`` spots in the whole batch.
    """

    patches: torch.Tensor
    targets: torch.Tensor
    symmetry: torch.Tensor
    jitter: torch.Tensor
    n_global: int


class Batches:
    """Batches of some spots, anew each time it is iterated over.

    Everything random depends on the seed, the epoch and the spot alone: neither on how many processes share the work
    nor on where an interrupted run was taken up again.

    Parameters
    ----------
    patches
        Source of all spots' patches.
    targets
        ``(len(patches), G)`` float32.
    indices
        Spots to go through.
    batch_size
        Spots in a global batch.
    epoch
        Tells the epoch.
    seed
        Of order and augmentation.
    train
        Shuffle and augment.
    rank, world_size
        This process among all.
    pin
        Copy into pinned memory, for a GPU.
    """

    def __init__(
        self,
        patches: PatchSource,
        targets: np.ndarray,
        indices: np.ndarray,
        *,
        batch_size: int,
        epoch: Callable[[], int],
        seed: int,
        train: bool,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
    ) -> None:
        self._patches, self._targets, self._indices = patches, targets, indices
        self._batch_size, self._epoch, self._seed, self._train = batch_size, epoch, seed, train
        self._rank, self._world_size, self._pin = rank, world_size, pin

    def __len__(self) -> int:
        return -(-len(self._indices) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng((self._seed, self._epoch()))
        n = len(self._indices)
        order = rng.permutation(n) if self._train else np.arange(n)
        symmetry = rng.integers(8, size=n) if self._train else np.zeros(n, dtype=np.int64)
        jitter = rng.standard_normal((n, 6)) if self._train else np.zeros((n, 6))

        def read(start: int) -> Batch:
            whole = order[start : start + self._batch_size]
            mine = whole[self._rank :: self._world_size]
            spots = self._indices[mine]
            patches = torch.from_numpy(self._patches[spots])
            return Batch(
                patches.pin_memory() if self._pin else patches,
                torch.from_numpy(self._targets[spots]),
                torch.from_numpy(symmetry[mine]),
                torch.from_numpy(jitter[mine].astype(np.float32)),
                len(whole),
            )

        with ThreadPoolExecutor(1) as reader:
            starts = range(0, n, self._batch_size)
            ahead = reader.submit(read, 0)
            for start in starts:
                batch = ahead.result()
                if start + self._batch_size < n:
                    ahead = reader.submit(read, start + self._batch_size)
                yield batch
