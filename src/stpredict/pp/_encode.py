"""Features that a network makes of patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from stpredict._data.slide import Slide
from stpredict.pp._patches import PatchReads

Encoder = Callable[[Any], Any]

_BATCH = 64


def encode(slide: Slide, reads: PatchReads, encoder: Encoder, *, device: str) -> np.ndarray:
    """Apply an encoder to a patch of each spot.

    Parameters
    ----------
    slide
        Images and spots.
    reads
        Which patches, of one level.
    encoder
        ``(b, 3, image_size, image_size)`` float in [0, 1] to ``(b, d)``. A module is moved to ``device``, and is in
        evaluation mode meanwhile.
    device
        Where to compute.

    Returns
    -------
    ``(n_obs, d)`` float32; NaN for rows without pixels.

    Raises
    ------
    TypeError, ValueError
        The encoder returned something else.
    """
    import torch

    module = encoder if isinstance(encoder, torch.nn.Module) else None
    was_training = module is not None and module.training
    parts = []
    try:
        if module is not None:
            module.to(device).eval()
        with torch.inference_mode(), reads.extract(slide) as patches:
            for start in tqdm(range(0, len(patches), _BATCH), desc="encoding", unit="batch", delay=2, leave=False):
                pixels = torch.from_numpy(patches[start : start + _BATCH][:, 0]).to(device)
                parts.append(_checked(encoder(pixels.float() / 255), len(pixels)))
            rows = patches.rows
    finally:
        if module is not None:
            module.train(was_training)
    encoded = np.concatenate(parts)
    features = np.full((slide.n_obs, encoded.shape[1]), np.nan, dtype=np.float32)
    features[rows] = encoded
    return features


def _checked(output: Any, n: int) -> np.ndarray:
    import torch

    if not isinstance(output, torch.Tensor):
        raise TypeError(
            f"The encoder returned {type(output).__name__}; expected a tensor (b, d). Wrap it so that it does."
        )
    if output.ndim != 2 or len(output) != n:
        raise ValueError(
            f"The encoder returned the shape {tuple(output.shape)} for {n} patches; expected ({n}, d). Wrap it so that it "
            "pools over tokens or pixels."
        )
    return output.float().cpu().numpy()
