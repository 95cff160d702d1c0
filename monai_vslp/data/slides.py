"""Whole slides through cuCIM, with OpenSlide for what cuCIM does not read."""

from __future__ import annotations

import functools
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import look_up_option, optional_import

from monai_vslp.utils.errors import SlideError

__all__ = ["SLIDE_SUFFIXES", "Slide", "is_slide", "open_slide"]

CuImage, has_cucim = optional_import("cucim", name="CuImage")
openslide, has_openslide = optional_import("openslide")
tifffile, has_tifffile = optional_import("tifffile")

SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm")
LARGEST_IMAGE_SIDE = 8192  # px; a longer TIFF is treated as a slide
PLAUSIBLE_MPP = (0.05, 20.0)  # µm/px
PROBE_SECONDS = 60

logger = logging.getLogger(__name__)


def is_slide(path: str | Path) -> bool:
    """Whether a file is read tile by tile: a slide format, or a TIFF that is tiled with several levels or very large."""
    path = Path(path)
    if path.suffix.lower() in SLIDE_SUFFIXES:
        return True
    if path.suffix.lower() not in (".tif", ".tiff") or not has_tifffile:
        return False
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            if max(page.shape[:2]) > LARGEST_IMAGE_SIDE:
                return True
            return page.is_tiled and (len(file.series[0].levels) > 1 or len(file.pages) > 2) and page.dtype == np.uint8
    except Exception as error:  # damaged files raise many kinds; as an image they get a clear error
        logger.debug("%s is no readable TIFF: %s", path, error)
        return False


@functools.cache
def _cucim_hangs() -> str | None:
    """Why cuCIM cannot be used in this process, or None.

    Beside a CUDA build of torch on a machine without GPU driver cuCIM can hang for good while it loads libcufile, so it
    is tried in a process of its own first.
    """
    if torch.version.cuda is None or torch.cuda.is_available():
        return None
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import torch, cucim; cucim.CuImage"], timeout=PROBE_SECONDS, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return f"it hung for {PROBE_SECONDS} s beside a CUDA build of torch without a GPU driver"
    return None if done.returncode == 0 else f"it failed to start: {done.stderr.strip().splitlines()[-1:]}"


class Slide:
    """A whole slide.

    Attributes:
        path: the file.
        reader: ``cucim`` or ``openslide``.
        shape: level-0 ``(H, W)`` in px.
        level_shapes: ``(H, W)`` of each level.
        level_downsamples: level-0 px per px of each level.
        mpp: µm per level-0 px, None where the file does not say.
    """

    def __init__(self, path: Path, reader: str, handle: Any, mpp: float | None) -> None:
        self.path, self.reader, self._handle, self.mpp = path, reader, handle, mpp
        if reader == "cucim":
            resolutions = handle.resolutions
            sizes = resolutions["level_dimensions"]
            self.level_downsamples = tuple(float(v) for v in resolutions["level_downsamples"])
        else:
            sizes = handle.level_dimensions
            self.level_downsamples = tuple(float(v) for v in handle.level_downsamples)
        self.level_shapes = tuple((int(height), int(width)) for width, height in sizes)
        self.shape = self.level_shapes[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_slide, (self.path, self.reader, self.mpp)

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self.reader == "openslide":
            self._handle.close()

    def read(self, level: int, row: int, column: int, height: int, width: int) -> np.ndarray:
        """Pixels of one level.

        Args:
            level: pyramid level.
            row, column: upper left corner in px of that level, may be negative.
            height, width: size in px of that level.

        Returns:
            RGB ``[height, width, 3]``, uint8; white outside the slide.

        Raises:
            SlideError: the file is damaged there.
        """
        result = np.full((height, width, 3), 255, dtype=np.uint8)
        rows, columns = self.level_shapes[level]
        top, left = max(row, 0), max(column, 0)
        bottom, right = min(row + height, rows), min(column + width, columns)
        if bottom <= top or right <= left:
            return result
        down = self.level_downsamples[level]
        location, size = (round(left * down), round(top * down)), (right - left, bottom - top)
        try:
            if self.reader == "cucim":
                pixels = np.asarray(self._handle.read_region(location, size, level))[..., :3]
            else:
                rgba = np.asarray(self._handle.read_region(location, level, size)).astype(np.float32)
                alpha = rgba[..., 3:] / 255.0
                pixels = np.round(rgba[..., :3] * alpha + 255.0 * (1 - alpha)).astype(np.uint8)
        except Exception as error:  # both libraries raise bare exceptions for damaged files
            raise SlideError(f"slide {self.path} cannot be read at level {level}, row {top}, column {left}: {error}") from error
        result[top - row : bottom - row, left - column : right - column] = pixels
        return result

    def read_at(self, downsample: float, row: int, column: int, height: int, width: int) -> np.ndarray:
        """Pixels at any resolution, from the next finer level, resampled with antialiasing.

        Args:
            downsample: level-0 px per px wanted, at least 1.
            row, column: upper left corner in px at that resolution.
            height, width: size in px at that resolution.

        Returns:
            RGB ``[height, width, 3]``, uint8.
        """
        finer = [i for i, d in enumerate(self.level_downsamples) if d <= downsample * 1.01]
        level = finer[-1] if finer else 0
        ratio = downsample / self.level_downsamples[level]
        if abs(ratio - 1) < 0.01:
            return self.read(level, row, column, height, width)
        # A margin keeps the antialiasing filter away from the border of what was read.
        margin = 2
        top, left = math.floor((row - margin) * ratio), math.floor((column - margin) * ratio)
        rows, columns = math.ceil((height + 2 * margin) * ratio), math.ceil((width + 2 * margin) * ratio)
        fine = torch.from_numpy(self.read(level, top, left, rows, columns)).permute(2, 0, 1)[None].float()
        # Area means first, so that interpolation meets no finer detail than it can show.
        factor = max(1, int(ratio))
        fine = torch.nn.functional.avg_pool2d(fine, factor) if factor > 1 else fine
        ys = ((torch.arange(height) + row + 0.5) * ratio - top) / factor
        xs = ((torch.arange(width) + column + 0.5) * ratio - left) / factor
        grid_y = 2 * ys / fine.shape[-2] - 1
        grid_x = 2 * xs / fine.shape[-1] - 1
        grid = torch.stack(torch.meshgrid(grid_y, grid_x, indexing="ij")[::-1], dim=-1)[None]
        sampled = torch.nn.functional.grid_sample(
            fine, grid.float(), mode="bilinear", padding_mode="border", align_corners=False
        )
        return sampled[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()

    def thumbnail(self, downsample: float) -> np.ndarray:
        """The whole slide at ``downsample``, RGB ``[ceil(H / downsample), ceil(W / downsample), 3]``, uint8."""
        height, width = (math.ceil(side / downsample) for side in self.shape)
        rows = max(1, 2**22 // max(width, 1))  # in strips, so that a slide with one level only fits in memory
        strips = [self.read_at(downsample, top, 0, min(rows, height - top), width) for top in range(0, height, rows)]
        return np.concatenate(strips)


def _tiff_mpp(path: Path) -> float | None:
    """µm/px from the resolution tags of a TIFF, None where they are missing or in no unit."""
    if not has_tifffile:
        return None
    try:
        with tifffile.TiffFile(path) as file:
            tags = file.pages[0].tags
            unit = {2: 25_400.0, 3: 10_000.0}.get(int(tags["ResolutionUnit"].value)) if "ResolutionUnit" in tags else None
            if unit is None or "XResolution" not in tags:
                return None
            numerator, denominator = tags["XResolution"].value
            return unit * denominator / numerator if numerator else None
    except Exception as error:  # not a TIFF, or a damaged one: then it does not say
        logger.debug("%s has no readable TIFF tags: %s", path, error)
        return None


def _plausible(mpp: float | None) -> float | None:
    return mpp if mpp is not None and PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1] else None


def _open_cucim(path: Path) -> tuple[Any, float | None]:
    reason = "it is not installed" if not has_cucim else _cucim_hangs()
    if reason:
        raise SlideError(f"cuCIM cannot be used: {reason}")
    handle = CuImage(str(path))
    shape = handle.resolutions["level_dimensions"]
    handle.read_region((0, 0), (min(64, shape[0][0]), min(64, shape[0][1])), 0)  # some files open but cannot be decoded
    vendor = handle.metadata.get("aperio", {}) if isinstance(handle.metadata, dict) else {}
    try:
        mpp = float(vendor["MPP"])
    except (KeyError, TypeError, ValueError):
        # cuCIM says 1.0 where a file says nothing, so the tags are asked themselves.
        mpp = None if path.suffix.lower() == ".svs" else _tiff_mpp(path)
    return handle, mpp


def _open_openslide(path: Path) -> tuple[Any, float | None]:
    if not has_openslide:
        raise SlideError("OpenSlide is not installed")
    handle = openslide.OpenSlide(str(path))
    handle.read_region((0, 0), 0, (16, 16))
    values = [handle.properties.get(key) for key in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)]
    if any(value is None for value in values):
        return handle, None if path.suffix.lower() == ".svs" else _tiff_mpp(path)
    return handle, sum(float(value) for value in values) / 2


_OPENERS = {"cucim": _open_cucim, "openslide": _open_openslide}


def open_slide(path: str | Path, reader: str = "auto", mpp: float | None = None) -> Slide:
    """Open a whole slide.

    Args:
        path: the file.
        reader: ``cucim``, ``openslide``, or ``auto``: cuCIM, and OpenSlide where cuCIM cannot (the reason is logged).
        mpp: µm per level-0 px said by hand; overrides what the file says.

    Raises:
        SlideError: the file is missing or no reader can read it; tells what each reader said.
    """
    path = Path(path)
    look_up_option(reader, ("auto", *_OPENERS))
    if not path.is_file():
        raise SlideError(f"slide {path} does not exist.")
    reasons = []
    for name in _OPENERS if reader == "auto" else (reader,):
        try:
            handle, stated = _OPENERS[name](path)
        except Exception as error:  # the libraries raise bare exceptions for files that they do not read
            reasons.append(f"{name}: {error}")
            logger.info("%s: %s cannot read it: %s", path.name, name, error)
            continue
        return Slide(path, name, handle, mpp if mpp is not None else _plausible(stated))
    hint = ""
    if path.suffix.lower() == ".dcm":
        hint = " DICOM slides are not read yet: convert to OME-TIFF or SVS-like TIFF first (wsidicomizer, bfconvert)."
    raise SlideError(
        f"slide {path} cannot be read, it may be damaged or of an unsupported kind. " + "; ".join(reasons) + "." + hint
    )
