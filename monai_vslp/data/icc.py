"""Colours by ICC profiles."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from monai.utils import optional_import

__all__ = ["to_srgb"]

Image, _ = optional_import("PIL.Image")
ImageCms, _ = optional_import("PIL.ImageCms")


def to_srgb(profile: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """A function from pixels in the colours of a profile to sRGB, RGB ``[H, W, 3]``, uint8, in both; threads may share it.

    Raises:
        ValueError: ``profile`` is no ICC profile of RGB pixels.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space != "RGB":
            raise ValueError(f"it is made for {space}")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    except (OSError, ValueError, ImageCms.PyCMSError) as error:
        raise ValueError(f"no ICC profile of RGB pixels: {error}") from error

    def convert(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(ImageCms.applyTransform(Image.fromarray(np.ascontiguousarray(pixels)), transform))

    return convert
