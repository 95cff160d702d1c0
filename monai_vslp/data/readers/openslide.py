"""NDPI, MRXS, SCN, BIF and others through OpenSlide."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.data.readers.base import SlideReader
from monai_vslp.data.readers.tiff import has_tifffile, inspect_tiff
from monai_vslp.utils.errors import SlideError

__all__ = ["OpenSlideReader"]

openslide, has_openslide = optional_import("openslide")


def _on_white(rgba: np.ndarray) -> np.ndarray:
    """Transparent means nothing was scanned there: white, like glass."""
    alpha = rgba[..., 3:]
    if alpha.min(initial=255) == 255:
        return rgba[..., :3]
    return np.round(rgba[..., :3] * (alpha / 255.0) + (255.0 - alpha)).astype(np.uint8)


class OpenSlideReader(SlideReader):
    """A slide through OpenSlide; threads may share it."""

    name = "openslide"

    @classmethod
    def unsuited(cls, path: Path) -> str | None:
        return "it reads no folders" if path.is_dir() else None

    def __init__(self, path: Path) -> None:
        if not has_openslide:
            raise SlideError("it is not installed (pip install openslide-python openslide-bin)")
        self._handle = handle = openslide.OpenSlide(str(path))
        self.level_shapes = tuple((int(height), int(width)) for width, height in handle.level_dimensions)
        self.downsamples = tuple(float(value) for value in handle.level_downsamples)
        self.mpp = self._numbers(openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
        vendor = handle.properties.get(openslide.PROPERTY_NAME_VENDOR)
        if vendor == "generic-tiff" and has_tifffile:
            self._check_tiff(path)
        handle.read_region((0, 0), 0, (16, 16))
        if vendor == "dicom":  # of a file that was cut short the last tile cannot be read
            for level, (height, width) in enumerate(self.level_shapes):
                self.read(level, height - 1, width - 1, 1, 1)
        profile = handle.color_profile
        self.icc_profile = None if profile is None else profile.tobytes()
        self.bounds = self._bounds()
        self.associated = {name: partial(self._associated, name) for name in sorted(handle.associated_images)}

    def _check_tiff(self, path: Path) -> None:
        """OpenSlide opens TIFFs of which it sees one channel or one level only."""
        facts = inspect_tiff(path)
        if facts.samples < 3:
            raise SlideError("its pages hold one channel each, of which OpenSlide reads the first as grey")
        if facts.levels > len(self.level_shapes):
            raise SlideError(f"it sees {len(self.level_shapes)} of {facts.levels} levels; the others are in SubIFDs")
        if self.mpp is None:
            self.mpp = facts.mpp

    def _numbers(self, *names: str) -> Any:
        found = [self._handle.properties.get(name) for name in names]
        return None if None in found else tuple(float(value) for value in found)

    def _bounds(self) -> tuple[int, int, int, int] | None:
        found = self._numbers(
            openslide.PROPERTY_NAME_BOUNDS_Y,
            openslide.PROPERTY_NAME_BOUNDS_X,
            openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
            openslide.PROPERTY_NAME_BOUNDS_WIDTH,
        )
        return None if found is None else tuple(int(value) for value in found)

    def _associated(self, name: str) -> np.ndarray:
        return _on_white(np.asarray(self._handle.associated_images[name]))

    def read(self, level: int, row: int, col: int, height: int, width: int) -> np.ndarray:
        down = self.downsamples[level]
        return _on_white(np.asarray(self._handle.read_region((round(col * down), round(row * down)), level, (width, height))))

    def close(self) -> None:
        self._handle.close()
