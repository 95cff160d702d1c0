"""Images of one level, held in memory."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from monai.utils import optional_import

from monai_vslp.data.images import IMAGE_SUFFIXES, image_size, read_image
from monai_vslp.data.readers.base import SlideReader
from monai_vslp.data.readers.tiff import TiffFacts, has_tifffile, inspect_tiff, tifffile
from monai_vslp.utils.errors import SlideError

__all__ = ["PlainReader"]

Image, has_pillow = optional_import("PIL.Image")

MANY_PIXELS = 100_000_000  # 0.3 GB; beyond it a warning
MOST_PIXELS = 400_000_000  # 1.2 GB

logger = logging.getLogger(__name__)


class PlainReader(SlideReader):
    """An image as a slide with one level, decoded as a whole by :func:`monai_vslp.data.read_image`.

    It takes 3 bytes of memory per px, twice that while it is read; from 100 million px on that is logged, from 400 million on
    refused. Images seldom say their µm/px: what is stated for print (72 dpi, say) is refused as implausible later.
    """

    name = "plain"

    @classmethod
    def unsuited(cls, path: Path) -> str | None:
        if path.is_dir():
            return "it reads no folders"
        return None if path.suffix.lower() in IMAGE_SUFFIXES else f"it reads {', '.join(IMAGE_SUFFIXES)}, not {path.suffix}"

    def __init__(self, path: Path) -> None:
        if not has_pillow:
            raise SlideError("Pillow is not installed (pip install pillow)")
        height, width = image_size(path)
        if height * width > MOST_PIXELS:
            raise SlideError(
                f"the image has {width} x {height} px and would be held in memory as a whole, which is done up to "
                f"{MOST_PIXELS:.0e} px. Convert it to a pyramidal tiled TIFF: vips tiffsave {path.name} {path.stem}_tiled.tif "
                "--tile --pyramid --compression jpeg"
            )
        if height * width > MANY_PIXELS:
            logger.warning(
                "%s has %d x %d px and is held in memory as a whole (%.1f GB); a pyramidal tiled TIFF would not be.",
                path.name, width, height, 3e-9 * height * width,
            )  # fmt: skip
        if path.suffix.lower() in (".tif", ".tiff") and has_tifffile:
            facts = self._inspect(path)
            self.mpp, self.icc_profile = facts.mpp, facts.icc_profile
        else:
            with Image.open(path) as image:
                dpi = image.info.get("dpi")
                self.mpp = None if dpi is None or not all(dpi) else (25400 / float(dpi[0]), 25400 / float(dpi[1]))
                # Pixels that are converted to RGB have left the space of their profile.
                self.icc_profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None
        self._pixels = read_image(path)
        self.level_shapes, self.downsamples = (self._pixels.shape[:2],), (1.0,)

    @staticmethod
    def _inspect(path: Path) -> TiffFacts:
        with tifffile.TiffFile(path) as file:
            if len(file.series[0].pages) > 1:
                raise SlideError("its first image has several pages (channels, depth or time), of which one would be read")
        return inspect_tiff(path)

    def read(self, level: int, row: int, col: int, height: int, width: int) -> np.ndarray:
        return self._pixels[row : row + height, col : col + width]

    def close(self) -> None:
        self._pixels = np.empty((0, 0, 3), dtype=np.uint8)
