"""JPEG by imagecodecs, or by Pillow where that is missing. Both use libjpeg-turbo, and give the same pixels."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray


def decode(content: bytes) -> NDArray[np.uint8]:
    """Pixels (height, width, channels) of a file."""
    try:
        import imagecodecs
    except ImportError:
        from PIL import Image

        with warnings.catch_warnings():
            # A microscope's image is large, and its content was verified.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                return np.asarray(image)
    return imagecodecs.jpeg8_decode(content)


def encode(pixels: NDArray[np.uint8], *, quality: int) -> bytes:
    """A file of pixels (height, width, 3), colours at full resolution."""
    try:
        import imagecodecs
    except ImportError:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "jpeg", quality=quality, subsampling=0)
        return file.getvalue()
    return bytes(imagecodecs.jpeg8_encode(pixels, level=quality, subsampling="444"))
