"""M2OST, a transformer that predicts the expression of a spot from images of several fields of view at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from stpredict.models.m2ost import _authors
from stpredict.models.m2ost._blocks import BACKENDS, Block, PatchEmbedding

PRESETS: dict[str, dict[str, int]] = {
    "tiny": {
        "image_size": 112,
        "width": 96,
        "depth": 2,
        "heads": 3,
        "head_width": 32,
        "mlp_width": 64,
        "gate_width": 192,
    },
    "small": {"width": 192, "depth": 4, "heads": 3, "mlp_width": 128, "gate_width": 384},
    "base": {"width": 256, "depth": 8, "heads": 4, "mlp_width": 176, "gate_width": 512},
    "large": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 256, "gate_width": 768},
}

# Arguments of a network, as its ``config`` has them.
CONFIG = (
    *("n_genes", "levels", "image_size", "patch_size", "width", "depth", "heads", "cross_heads", "head_width"),
    *("mlp_width", "gate_width", "dropout", "mask_ratio"),
)


class M2OSTModule(nn.Module):
    """Many-to-one regression transformer: images of a spot at several levels to the expression of genes.

    Level l shows 2**l times the field of view of level 0, around the same centre, in the same number of pixels.

    * **Deformable patch embedding.** Embedder k turns patches of ``patch_size / 2**k`` pixels into tokens and is shared
      by the levels. Level l goes through the embedders l, ..., 0, and embedder k sees the central ``1 / 2**k`` of the
      image. So every level has its finest tokens on the field of view of level 0, and
      ``(l + 1) * (image_size / patch_size)**2`` tokens in all. A class token, shared by the levels, is put first, and
      learned positions are added.
    * **Blocks.** In each, the tokens of a level look at each other (ITMM) and go through a perceptron, then look at
      those of each other level (CTMM), then the means over the tokens of all levels raise each channel by up to its own
      size (CCMM).
    * **Head.** A linear map of the class tokens of all levels.

    Parameters
    ----------
    n_genes
        Number of outputs.
    levels
        Number of images of a spot. With one, the network has no CTMM.
    image_size
        Height and width of each image in pixels; a multiple of ``patch_size`` and, with several levels, of
        ``2**levels``, so that the central crops begin on a pixel.
    patch_size
        Side of the coarsest patches in pixels; a multiple of ``2**(levels - 1)``.
    width
        Channels of a token.
    depth
        Number of blocks.
    heads
        Attention heads in ITMM, each of ``head_width`` channels.
    cross_heads
        Attention heads in CTMM. ``None``: as many as ``heads``.
    head_width
        Channels of an attention head, in ITMM and CTMM.
    mlp_width
        Hidden channels of the perceptron.
    gate_width
        Hidden channels of CCMM.
    dropout
        Probability to drop attention weights, outputs of attention and hidden channels of perceptron and CCMM while
        training.
    mask_ratio
        Share of a level's tokens that ITMM hides while training. The paper speaks of a random mask in this
        self-attention, which the authors' code does not have. Our reading: in each block, level and spot a new random
        choice of this share of the tokens takes no part as keys and values, while all tokens go on asking; the class
        token is always visible. In evaluation mode nothing is hidden.

    Raises
    ------
    ValueError
        If a size is not positive, a share not in [0, 1), or the images cannot be cut as described.

    Notes
    -----
    Architecture and default sizes are those of Wang et al., *M2OST: Many-to-one Regression for Predicting Spatial
    Transcriptomics from Digital Pathology Images*, AAAI 2025, https://arxiv.org/abs/2409.15092. Initial values are
    normal(0, 1) for class token and positions and torch's defaults for the rest, as in the authors' code, whose weights
    :meth:`from_authors` takes over.

    Of the last block only the class tokens are read, so nothing else is computed of it: the result is the same.

    Examples
    --------
    >>> import torch
    >>> from stpredict.models import M2OSTModule
    >>> model = M2OSTModule.from_preset("tiny", n_genes=5)
    >>> spots = torch.randint(0, 256, (2, 3, 3, 112, 112), dtype=torch.uint8)
    >>> model(spots).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        n_genes: int,
        *,
        levels: int = 3,
        image_size: int = 224,
        patch_size: int = 16,
        width: int = 192,
        depth: int = 4,
        heads: int = 3,
        cross_heads: int | None = None,
        head_width: int = 64,
        mlp_width: int = 128,
        gate_width: int = 384,
        dropout: float = 0.0,
        mask_ratio: float = 0.0,
    ) -> None:
        super().__init__()
        block: dict[str, Any] = {
            "levels": levels,
            "width": width,
            "heads": heads,
            "cross_heads": heads if cross_heads is None else cross_heads,
            "head_width": head_width,
            "mlp_width": mlp_width,
            "gate_width": gate_width,
            "dropout": dropout,
            "mask_ratio": mask_ratio,
        }
        self._config = {"n_genes": n_genes, "image_size": image_size, "patch_size": patch_size, "depth": depth, **block}
        _check(self._config)
        n_patches = (image_size // patch_size) ** 2
        self.embedders = nn.ModuleList(
            PatchEmbedding(patch_size >> k, levels * width >> k, width) for k in range(levels)
        )
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.ParameterList(torch.randn(1, 1 + (level + 1) * n_patches, width) for level in range(levels))
        self.blocks = nn.ModuleList(Block(**block) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(levels * width, n_genes)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments, fit for JSON, with which ``M2OSTModule(**config)`` builds this network anew."""
        return dict(self._config)

    @classmethod
    def from_preset(cls, name: str, n_genes: int, **overrides: Any) -> Self:
        """Build a network of a named size.

        Parameters
        ----------
        name
            ``"tiny"`` (112-pixel images; trains in minutes on two CPU cores), ``"small"`` (the published network),
            ``"base"`` or ``"large"`` (wider and deeper ones, not in the paper).
        n_genes
            Number of outputs.
        overrides
            Any other parameter of :class:`M2OSTModule`.

        Raises
        ------
        ValueError
            If there is no such preset.

        Examples
        --------
        >>> from stpredict.models import M2OSTModule
        >>> sum(p.numel() for p in M2OSTModule.from_preset("small", 250).parameters())
        7038858
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r} of M2OST; choose one of {', '.join(map(repr, PRESETS))}.")
        return cls(n_genes, **{**PRESETS[name], **overrides})

    def forward(self, images: Tensor) -> Tensor:
        """Predict expression.

        Parameters
        ----------
        images
            (batch, levels, 3, image_size, image_size), finest level first; RGB as uint8, or as floating point in
            [0, 1]. uint8 is converted here, on the device of the images.

        Returns
        -------
        (batch, n_genes)

        Raises
        ------
        ValueError
            If the shape is another one.
        TypeError
            If the images are neither uint8 nor floating point.
        """
        with sdpa_kernel(BACKENDS) if images.is_cuda else nullcontext():
            x = self._tokens(self._pixels(images))
            for block in self.blocks[:-1]:
                x = block(x)
            classes = torch.cat(self.blocks[-1](x, class_only=True), dim=1)
            return self.head(self.norm(classes).flatten(1))

    def _pixels(self, images: Tensor) -> Tensor:
        """Checked images as (batch, levels, image_size, image_size, 3) of the parameters' type."""
        levels, size = self._config["levels"], self._config["image_size"]
        if images.ndim != 5 or images.shape[1:] != (levels, 3, size, size):
            raise ValueError(
                f"Images have shape {tuple(images.shape)}; this network takes (batch, {levels}, 3, {size}, {size}), "
                f"that is {levels} levels of {size} x {size} RGB pixels. Extract patches with levels={levels} and "
                f"image_size={size}, or build the network for the patches at hand."
            )
        if images.dtype == torch.uint8:
            # A number would make it float32 whatever the parameters are.
            images = images / torch.tensor(255.0, dtype=self.class_token.dtype)
        elif not images.is_floating_point():
            raise TypeError(f"Images are {images.dtype}; expected torch.uint8, or floating point in [0, 1].")
        pixels = images.flatten(0, 1).to(self.class_token.dtype, memory_format=torch.channels_last)
        return pixels.permute(0, 2, 3, 1).unflatten(0, images.shape[:2])

    def _tokens(self, pixels: Tensor) -> list[Tensor]:
        """Class token, then patches from the finest to the coarsest, with positions, of each level."""
        size = self._config["image_size"]
        embedded = []
        for k, embed in enumerate(self.embedders):
            side = size >> k
            center = slice((size - side) // 2, (size + side) // 2)
            # Embedder k serves level k and all coarser ones, in one call.
            embedded.append(embed(pixels[:, k:, center, center]).unbind(1))
        first = self.class_token.expand(len(pixels), -1, -1)
        return [
            torch.cat([first, *(embedded[k][level - k] for k in range(level, -1, -1))], dim=1) + positions
            for level, positions in enumerate(self.positions)
        ]

    @classmethod
    def from_authors(cls, state_dict: Mapping[str, Tensor], *, head_width: int = 64) -> Self:
        """Build the network from weights of the authors' own module.

        Their module is ``M2OST`` in ``model/M2OST.py`` of https://github.com/Dootmaan/M2OST. Sizes are inferred from
        the tensors. Normalisation layers that it holds and never calls are left out, and its crop of the central
        quarter, which ends at 3/4 of the image there, is read as the 3/8 to 5/8 that its own tables are made for.

        Parameters
        ----------
        state_dict
            What the authors' ``state_dict()`` gives, with or without the ``module.`` that ``DataParallel`` puts before
            each name.
        head_width
            Channels of an attention head (``dim_head`` there), which the tensors do not tell.

        Returns
        -------
        The network, in training mode as any new one.

        Raises
        ------
        ValueError
            If tensors are missing, unknown, of another shape or not finite.

        Examples
        --------
        >>> state_dict = torch.load("M2OST_small_best.pth", weights_only=True)  # doctest: +SKIP
        >>> model = M2OSTModule.from_authors(state_dict).eval()  # doctest: +SKIP
        """
        state = _authors.clean(state_dict)
        config = _authors.config(state, head_width)
        model = cls(**config)
        model.load_state_dict(_authors.translate(state, model.state_dict(), config["depth"]))
        return model


def _check(config: dict[str, Any]) -> None:
    """Raise a ValueError unless a network of this configuration can be built."""
    for name, value in config.items():
        if name in ("dropout", "mask_ratio"):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value!r}; expected a share in [0, 1).")
        elif value < 1:
            raise ValueError(f"{name}={value!r}; expected a positive integer.")
    levels, size, patch = config["levels"], config["image_size"], config["patch_size"]
    if patch % 2 ** (levels - 1):
        raise ValueError(
            f"patch_size={patch} with levels={levels}: the finest patches would have {patch / 2 ** (levels - 1):g} "
            f"pixels. Choose a multiple of {2 ** (levels - 1)}, or fewer levels."
        )
    step = math.lcm(patch, 2**levels if levels > 1 else 1)
    if size % step:
        near = [n for n in (size // step * step, (size // step + 1) * step) if n]
        raise ValueError(
            f"image_size={size} with patch_size={patch} and levels={levels}: the image and its central crops cannot be "
            f"cut into whole patches. Choose a multiple of {step}, such as {' or '.join(map(str, near))}."
        )
