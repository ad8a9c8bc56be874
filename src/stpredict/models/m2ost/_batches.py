"""Batches of patches for training: deterministic, shared out over processes, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from stpredict.models.m2ost._model import PatchSource

# A thread reads some 2 GB/s, and a GPU takes several times that: so many share each batch, which shortens the wait for the
# first of an epoch, too. Pieces of fewer spots would cost more than they save.
_READERS = 4
_LEAST = 8
# Batches that are read ahead for a GPU.
_AHEAD_OF_A_GPU = 3


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
        Read into pinned memory, by several threads and several batches ahead, for a GPU.
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

        def small(whole: np.ndarray) -> tuple[np.ndarray, list[torch.Tensor]]:
            mine = whole[self._rank :: self._world_size]
            spots = self._indices[mine]
            arrays = self._targets[spots], symmetry[mine], jitter[mine].astype(np.float32)
            return spots, [torch.from_numpy(array) for array in arrays]

        def begin(start: int) -> Callable[[], Batch]:
            """Have a batch read; what is returned waits for it."""
            whole = order[start : start + self._batch_size]
            spots, others = small(whole)
            patches: Callable[[], torch.Tensor]
            if self._pin:
                # All of them: a copy from memory that is not pinned waits for what the GPU has still to do. Memory is asked
                # for here and not by the readers, because no other thread may call CUDA while a step is captured.
                others = [tensor.pin_memory() for tensor in others]
                patches = self._into_pinned(spots, readers)
            else:
                future = readers.submit(lambda: torch.from_numpy(self._patches[spots]))
                patches = future.result
            target, turned, jittered = others
            return lambda: Batch(patches(), target, turned, jittered, len(whole))

        n_ahead = _AHEAD_OF_A_GPU if self._pin else 1
        with ThreadPoolExecutor(_READERS if self._pin else 1) as readers:
            starts = iter(range(0, n, self._batch_size))
            ahead = deque(begin(start) for start in islice(starts, n_ahead))
            while ahead:
                batch = ahead.popleft()()
                ahead.extend(begin(start) for start in islice(starts, 1))
                yield batch

    def _into_pinned(self, spots: np.ndarray, readers: ThreadPoolExecutor) -> Callable[[], torch.Tensor]:
        """Have patches read by all readers; what is returned waits for them."""
        # Channels last, as sources of patches keep them.
        shape = getattr(self._patches, "shape", None) or self._patches[:1].shape
        levels, channels, height, width = shape[1:]
        pixels = torch.empty((len(spots), levels, height, width, channels), dtype=torch.uint8, pin_memory=True)
        patches = pixels.movedim(-1, 2)
        array = patches.numpy()
        step = max(_LEAST, -(-len(spots) // _READERS))
        parts: list[Future[None]] = [
            readers.submit(read_into, self._patches, spots[i : i + step], array[i : i + step])
            for i in range(0, len(spots), step)
        ]

        def wait() -> torch.Tensor:
            for part in parts:
                part.result()
            return patches

        return wait


def read_into(source: PatchSource, spots: np.ndarray, out: np.ndarray) -> None:
    """Read patches into an array, without another copy where the source can."""
    if isinstance(source, np.ndarray) or not hasattr(source, "take"):
        out[:] = source[spots]
    else:
        source.take(spots, out=out)
