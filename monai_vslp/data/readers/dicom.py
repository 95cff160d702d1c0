"""DICOM whole slides through wsidicom."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.data.readers.base import SlideReader
from monai_vslp.utils.errors import SlideError

__all__ = ["DicomReader", "is_dicom", "is_dicom_series"]

pydicom, _ = optional_import("pydicom")

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # SOP class
REQUIRED = ("ImageType", "SeriesInstanceUID", "TotalPixelMatrixColumns", "TotalPixelMatrixRows")  # in headers
LOOKED_AT = 4  # files of a folder, to know whether it is a series

logger = logging.getLogger(__name__)


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its first bytes, or named so."""
    if path.suffix.lower() == ".dcm":
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _instances(folder: Path) -> Iterator[Path]:
    """DICOM files directly in a folder."""
    return (p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".") and is_dicom(p))


def _header(path: Path) -> Any:
    return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID", "OpticalPathSequence", *REQUIRED])


def is_dicom_series(folder: Path) -> bool:
    """Whether a folder holds the instances of one whole slide, told by its first few DICOM files."""
    try:
        headers = [_header(path) for path in itertools.islice(_instances(folder), LOOKED_AT)]
        levels = [header for header in headers if header.SOPClassUID == WHOLE_SLIDE and "VOLUME" in header.ImageType]
        return len({header.SeriesInstanceUID for header in levels}) == 1
    except Exception as error:  # pydicom raises many kinds for damaged files
        logger.debug("%s is no DICOM series: %s", folder, error)
        return False


class DicomReader(SlideReader):
    """A DICOM whole slide: one instance (a ``.dcm`` file), or a folder with the instances of one series.

    Levels are the images of flavour VOLUME, the label and the overview (here ``macro``) are associated images. Threads may
    share it: wsidicom locks its streams.
    """

    name = "wsidicom"

    @classmethod
    def unsuited(cls, path: Path) -> str | None:
        if path.is_dir():
            return None if next(_instances(path), None) else "the folder holds no DICOM files"
        return None if is_dicom(path) else "it is no DICOM file"

    def __init__(self, path: Path) -> None:
        # Imported here and not above: it takes most of a second, and most slides are not DICOM.
        wsidicom, has_it = optional_import("wsidicom")
        if not has_it:
            raise SlideError("it is not installed (pip install wsidicom)")
        files = list(_instances(path)) if path.is_dir() else [path]
        headers = self._headers(files)
        profiles = (optics.get("ICCProfile") for h in headers for optics in h.get("OpticalPathSequence", ()))
        self.icc_profile = next((bytes(profile) for profile in profiles if profile), None)
        self._handle = wsidicom.WsiDicom.open(files)
        try:
            self._describe()
        except Exception:
            self.close()
            raise

    @staticmethod
    def _headers(files: list[Path]) -> list[Any]:
        """Headers of the levels, if they are those of one slide.

        wsidicom passes over files with gaps in their headers, and takes the widest image of a mixture; both are better told.
        """
        headers = {path: _header(path) for path in files}
        slides = {path: header for path, header in headers.items() if header.get("SOPClassUID") == WHOLE_SLIDE}
        for path, header in slides.items():
            missing = [name for name in REQUIRED if name not in header]
            if missing:
                raise SlideError(
                    f"the header of {path.name} lacks {', '.join(missing)}, without which its tiles cannot be placed; ask for "
                    "an export that conforms to DICOM"
                )
        levels = [header for header in slides.values() if "VOLUME" in header.ImageType]
        if not levels:
            raise SlideError(f"none of {len(files)} file(s) is a DICOM whole-slide image with levels")
        series = sorted({header.SeriesInstanceUID for header in levels})
        if len(series) > 1:
            raise SlideError(f"the folder holds {len(series)} slides (series {', '.join(series)}); give each its own folder")
        return levels

    def _describe(self) -> None:
        handle = self._handle
        levels = list(handle.pyramid)
        self._levels = [level.level for level in levels]  # exponents of 2; those between are not stored
        self.level_shapes = tuple((level.size.height, level.size.width) for level in levels)
        height, width = self.level_shapes[0]
        self.downsamples = tuple((height / rows + width / cols) / 2 for rows, cols in self.level_shapes)
        self.mpp = (float(handle.mpp.width), float(handle.mpp.height))
        instance = levels[0].default_instance
        if instance.image_data.samples_per_pixel != 3:
            raise SlideError(f"it has {instance.image_data.samples_per_pixel} sample(s) per pixel, not RGB")
        for level in levels:
            self._check_frames(level)
        self.associated = {}
        if handle.labels is not None and len(handle.labels):
            self.associated["label"] = partial(handle.read_label, as_array=True)
        if handle.overviews is not None and len(handle.overviews):
            self.associated["macro"] = partial(handle.read_overview, as_array=True)
        if handle.pyramid.thumbnails is not None and len(handle.pyramid.thumbnails):
            self.associated["thumbnail"] = partial(handle.read_thumbnail, as_array=True)
        self.read(0, 0, 0, 1, 1)

    def _check_frames(self, level: Any) -> None:
        """The last tile of a file that was cut short cannot be read."""
        rows, cols = level.size.height, level.size.width
        self._handle.read_region((cols - 1, rows - 1), level.level, (1, 1), as_array=True)

    def read(self, level: int, row: int, col: int, height: int, width: int) -> np.ndarray:
        return self._handle.read_region((col, row), self._levels[level], (width, height), as_array=True)[..., :3]

    def close(self) -> None:
        self._handle.close()
