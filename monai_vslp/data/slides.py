"""Whole slides through cuCIM, with OpenSlide for what cuCIM does not read."""

from __future__ import annotations

import logging
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import look_up_option, optional_import

from monai_vslp.utils.errors import InputError, SlideError

__all__ = ["SLIDE_SUFFIXES", "Slide", "area_resample", "is_slide", "open_slide"]

openslide, has_openslide = optional_import("openslide")
tifffile, has_tifffile = optional_import("tifffile")

SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm")
LARGEST_IMAGE_SIDE = 4096  # px; a tiled TIFF that is longer is treated as a slide
PLAUSIBLE_MPP = (0.05, 20.0)  # µm/px
LARGEST_ANISOTROPY = 0.02
SNAP = 0.05  # a stored level this near to the wanted µm/px is taken as it is
PROBE_SECONDS = 60
STRIP_PIXELS = 2**24  # px read at once for thumbnails

# Tries cuCIM beside torch. Errors of the file itself are no reason not to use cuCIM: they come again, and are caught, later.
_PROBE = """
import sys, torch
from cucim import CuImage
try:
    CuImage(sys.argv[1]).read_region((0, 0), (16, 16), 0)
except Exception as error:
    print(error)
"""

_verdict: list[str | None] = []  # of _cucim_problem, for this process

logger = logging.getLogger(__name__)


def is_slide(path: str | Path) -> bool:
    """Whether a file is read tile by tile rather than as one image.

    Slides are the slide formats by suffix, and colour TIFFs that are tiled and have several pyramid levels or a side of
    more than 4,096 px. Files that are missing or damaged count as images unless their suffix is that of a slide.
    """
    path = Path(path)
    if path.suffix.lower() in SLIDE_SUFFIXES:
        return True
    if path.suffix.lower() not in (".tif", ".tiff") or not has_tifffile:
        return False
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            if not page.is_tiled or page.samplesperpixel < 3:
                return False
            reduced = len(file.series[0].levels) > 1 or any(other.is_reduced and other.is_tiled for other in file.pages[1:])
            return reduced or max(page.imagelength, page.imagewidth) > LARGEST_IMAGE_SIDE
    except Exception as error:  # damaged files raise many kinds; read as an image they get a clear error
        logger.debug("%s is no readable TIFF: %s", path, error)
        return False


def _area_means(array: np.ndarray, start: float, ratio: float, count: int) -> np.ndarray:
    """Means of ``array`` along axis 0 over ``[start + i ratio, start + (i + 1) ratio)`` for i < ``count``, float64."""
    edges = start + ratio * np.arange(count + 1)
    first = np.floor(edges[:-1]).astype(np.int64)
    result = np.zeros((count, *array.shape[1:]))
    for step in range(math.ceil(ratio) + 1):
        index = first + step
        share = np.clip(np.minimum(edges[1:], index + 1) - np.maximum(edges[:-1], index), 0, None) / ratio
        share[(index < 0) | (index >= len(array))] = 0
        if share.any():
            result += share.reshape(-1, *[1] * (array.ndim - 1)) * array[np.clip(index, 0, len(array) - 1)]
    return result


def _linear(array: np.ndarray, start: float, ratio: float, count: int) -> np.ndarray:
    """Linear interpolation of ``array`` along axis 0 at ``start + (i + ½) ratio`` for i < ``count``, float64."""
    centers = np.clip(start + ratio * (np.arange(count) + 0.5) - 0.5, 0, len(array) - 1)
    below = np.minimum(np.floor(centers).astype(np.int64), max(len(array) - 2, 0))
    part = (centers - below).reshape(-1, *[1] * (array.ndim - 1))
    return array[below] * (1 - part) + array[np.minimum(below + 1, len(array) - 1)] * part


def area_resample(
    array: np.ndarray, start: tuple[float, float], ratio: float, size: tuple[int, int], smooth: bool = True
) -> np.ndarray:
    """Resample by exact area means.

    Args:
        array: shape ``[H, W, ...]``.
        start: ``(row, col)`` of the upper left corner of the result in px of ``array``.
        ratio: px of ``array`` per px of the result.
        size: ``(rows, cols)`` of the result in px.
        smooth: interpolate linearly where ``ratio`` < 1 instead of repeating pixels.

    Returns:
        Shape ``[rows, cols, ...]``, float64. What lies outside ``array`` counts as 0 for area means.
    """
    along = _linear if smooth and ratio < 1 else _area_means
    rows = along(array, start[0], ratio, size[0])
    return np.swapaxes(along(np.swapaxes(rows, 0, 1), start[1], ratio, size[1]), 0, 1)


class Slide:
    """A whole slide, opened by :func:`open_slide`. A context manager; pickled, it reopens its file.

    Attributes:
        path: the file.
        reader: ``cucim`` or ``openslide``.
        shape: level-0 ``(H, W)`` in px.
        level_shapes: ``(H, W)`` of each level in px.
        level_downsamples: level-0 px per px of each level; whole numbers where the shapes allow.
        mpp: µm per level-0 px.
    """

    def __init__(self, path: Path, reader: str, handle: Any, mpp: float) -> None:
        self.path, self.reader, self._handle, self.mpp = path, reader, handle, mpp
        if reader == "cucim":
            sizes, stated = handle.resolutions["level_dimensions"], handle.resolutions["level_downsamples"]
        else:
            sizes, stated = handle.level_dimensions, handle.level_downsamples
        self._stated_downsamples = [float(v) for v in stated]  # by which the reader finds its place
        self.level_shapes = tuple((int(height), int(width)) for width, height in sizes)
        self.shape = self.level_shapes[0]
        self.level_downsamples = tuple(self._whole(v, shape) for v, shape in zip(self._stated_downsamples, self.level_shapes))

    def _whole(self, stated: float, shape: tuple[int, int]) -> float:
        """Readers divide the sizes of the levels, which were rounded when the slide was written: 4.0015 means 4."""
        whole = max(round(stated), 1)
        fits = all(abs(full / whole - side) < 1 for full, side in zip(self.shape, shape))
        return float(whole) if fits else stated

    def __repr__(self) -> str:
        return (
            f"Slide({str(self.path)!r}, {self.reader}, {self.shape[1]} x {self.shape[0]} px, {self.mpp:g} µm/px, downsamples "
            f"{list(self.level_downsamples)})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return open_slide, (self.path, self.reader, self.mpp)

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._handle.close()

    def downsample_at(self, mpp: float) -> float:
        """Level-0 px per px at ``mpp`` µm/px.

        A stored level within 5 % of it is taken as it is, so that nothing is resampled for the sake of 0.499 against 0.5
        (as MONAI's ``WSIReader`` does); the true µm/px is then ``downsample * self.mpp``.

        Raises:
            InputError: ``mpp`` is not plausible.
        """
        if not PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1] * 10:
            raise InputError(f"cannot read {self.path.name} at {mpp:g} µm/px; expected {PLAUSIBLE_MPP[0]} to 200 µm/px.")
        wanted = mpp / self.mpp
        nearest = min(self.level_downsamples, key=lambda value: abs(wanted / value - 1))
        return nearest if abs(wanted / nearest - 1) <= SNAP else wanted

    def _read_level(self, level: int, row: int, col: int, height: int, width: int) -> np.ndarray:
        """Pixels of one level, everything in px of that level: ``[height, width, 3]``, uint8, white outside."""
        result = np.full((height, width, 3), 255, dtype=np.uint8)
        rows, cols = self.level_shapes[level]
        top, left = max(row, 0), max(col, 0)
        bottom, right = min(row + height, rows), min(col + width, cols)
        if bottom <= top or right <= left:
            return result
        down, size = self._stated_downsamples[level], (right - left, bottom - top)
        try:
            if self.reader == "cucim":
                # It rounds down when it converts to the level, so round up here to meet the pixel meant.
                pixels = np.asarray(self._handle.read_region((math.ceil(left * down), math.ceil(top * down)), size, level))[
                    ..., :3
                ]
            else:
                pixels = np.asarray(self._handle.read_region((round(left * down), round(top * down)), level, size))
                alpha = pixels[..., 3:]
                if alpha.min() < 255:
                    pixels = np.round(pixels[..., :3] * (alpha / 255.0) + (255.0 - alpha)).astype(np.uint8)
        except Exception as error:  # both libraries raise bare exceptions for damaged files
            raise SlideError(
                f"slide {self.path} cannot be read at level {level}, row {top}, column {left} (px of that level); it may be "
                f"damaged: {error}. Copy it again from its source."
            ) from error
        result[top - row : bottom - row, left - col : right - col] = pixels[..., :3]
        return result

    def read(self, level: int, row: int, col: int, height: int, width: int) -> np.ndarray:
        """Pixels of one stored level.

        Args:
            level: pyramid level.
            row, col: upper left corner in level-0 px, may be negative; taken to the nearest pixel of the level.
            height, width: size in px of the level.

        Returns:
            RGB ``[height, width, 3]``, uint8; white outside the slide.

        Raises:
            InputError: there is no such level.
            SlideError: the file is damaged there.
        """
        if not 0 <= level < len(self.level_shapes):
            raise InputError(f"slide {self.path.name} has levels 0 to {len(self.level_shapes) - 1}, got {level}.")
        down = self.level_downsamples[level]
        return self._read_level(level, round(row / down), round(col / down), height, width)

    def read_at(
        self, row: int, col: int, height: int, width: int, *, downsample: float | None = None, mpp: float | None = None
    ) -> np.ndarray:
        """Pixels at any resolution: exact area means of the next finer level (linear beyond level 0).

        The pixel ``(r, c)`` at downsample d covers level-0 px ``[r d, (r + 1) d)`` × ``[c d, (c + 1) d)``, whatever region
        it is read with.

        Args:
            row, col: upper left corner in px at that resolution, may be negative.
            height, width: size in px at that resolution.
            downsample: level-0 px per px.
            mpp: µm/px instead of ``downsample``; see :meth:`downsample_at`.

        Returns:
            RGB ``[height, width, 3]``, uint8; white outside the slide.

        Raises:
            InputError: not exactly one of ``downsample`` and ``mpp`` was given.
            SlideError: the file is damaged there.
        """
        if (downsample is None) == (mpp is None):
            raise InputError(f"give either downsample or mpp, got downsample={downsample}, mpp={mpp}.")
        d = self.downsample_at(mpp) if downsample is None else float(downsample)
        if not d > 0:
            raise InputError(f"downsample must be positive, got {d}.")
        level = max((i for i, value in enumerate(self.level_downsamples) if value <= d * (1 + 1e-6)), default=0)
        ratio = d / self.level_downsamples[level]
        if abs(ratio - 1) < 1e-6:
            return self._read_level(level, row, col, height, width)
        margin = 1 if ratio < 1 else 0  # linear interpolation looks at neighbours
        top, left = math.floor(row * ratio) - margin, math.floor(col * ratio) - margin
        rows = math.ceil((row + height) * ratio) + margin - top
        cols = math.ceil((col + width) * ratio) + margin - left
        fine = self._read_level(level, top, left, rows, cols)
        means = area_resample(fine, (row * ratio - top, col * ratio - left), ratio, (height, width))
        # Halves go up in spite of rounding errors, so that a pixel does not depend on the region it is read with.
        return np.clip(np.floor(means + (0.5 + 1e-6)), 0, 255).astype(np.uint8)

    def thumbnail(self, max_size: int | None = None, *, downsample: float | None = None) -> np.ndarray:
        """The whole slide, small.

        Args:
            max_size: longer side in px; a smaller slide is returned as it is.
            downsample: level-0 px per px instead of ``max_size``.

        Returns:
            RGB ``[ceil(H / downsample), ceil(W / downsample), 3]``, uint8.

        Raises:
            InputError: not exactly one of ``max_size`` and ``downsample`` was given.
        """
        if (max_size is None) == (downsample is None):
            raise InputError(f"give either max_size or downsample, got max_size={max_size}, downsample={downsample}.")
        d = max(1.0, max(self.shape) / max_size) if downsample is None else float(downsample)
        height, width = (max(1, math.ceil(side / d - 1e-6)) for side in self.shape)
        finer = max((value for value in self.level_downsamples if value <= d * (1 + 1e-6)), default=1.0)
        # Strips bound the memory where the slide has one level only; they are not thinner than a row of tiles.
        rows = max(1, math.ceil(256 * finer / d), int(STRIP_PIXELS / (width * (d / finer) ** 2)))
        strips = [self.read_at(top, 0, min(rows, height - top), width, downsample=d) for top in range(0, height, rows)]
        return np.concatenate(strips)


def _probe_cucim(path: Path) -> str | None:
    """Try cuCIM on a slide in a process of its own; why it cannot be used, or None."""
    command = [sys.executable, "-c", _PROBE, str(path)]
    try:
        done = subprocess.run(command, timeout=PROBE_SECONDS, capture_output=True, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        return f"beside a CUDA build of torch without a GPU driver it hung for {PROBE_SECONDS} s"
    if done.returncode == 0:
        return None
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"beside a CUDA build of torch without a GPU driver it failed: {said}"


def _cucim_problem(path: Path) -> str | None:
    """Why cuCIM cannot be used in this process, or None; tried with the first slide only."""
    if not _verdict:
        # Beside a CUDA build of torch on a machine without GPU driver cuCIM can hang for good inside libcufile.
        risky = torch.version.cuda is not None and not torch.cuda.is_available()
        _verdict.append(_probe_cucim(path) if risky else None)
    return _verdict[0]


def _check_complete(path: Path) -> None:
    """cuCIM decodes what a truncated TIFF has lost as noise or black, without a word; so compare offsets with the size.

    Raises:
        SlideError: parts of the file are missing.
    """
    if not has_tifffile:
        return
    size = path.stat().st_size
    with tifffile.TiffFile(path) as file:
        pages = list(file.pages)
        end = max((offset + count for page in pages for offset, count in zip(page.dataoffsets, page.databytecounts)), default=0)
        # tifffile stops at a directory that lies beyond the end: look where the last one points.
        tiff, handle = file.tiff, file.filehandle
        handle.seek(pages[-1].offset)
        (tags,) = struct.unpack(tiff.tagnoformat, handle.read(tiff.tagnosize))
        handle.seek(pages[-1].offset + tiff.tagnosize + tags * tiff.tagsize)
        (following,) = struct.unpack(tiff.offsetformat, handle.read(tiff.offsetsize))
    needed = max(end, following)
    if needed > size:
        raise SlideError(f"the file is cut short: it has {size:,} bytes, its directory needs at least {needed:,}")


def _open_cucim(path: Path) -> tuple[Any, tuple[float, float] | None]:
    """Handle and µm/px (x, y), None where the file does not say."""
    reason = _cucim_problem(path)
    if reason is not None:
        raise SlideError(reason)
    # Imported here and not above, because already the import may hang.
    cu_image, has_cucim = optional_import("cucim", name="CuImage")
    if not has_cucim:
        raise SlideError("it is not installed (pip install cucim)")
    handle = cu_image(str(path))
    _check_complete(path)
    width, height = handle.resolutions["level_dimensions"][0]
    pixels = np.asarray(handle.read_region((0, 0), (min(64, width), min(64, height)), 0))  # some open but cannot be decoded
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] < 3:
        raise SlideError(f"pixels are {pixels.dtype} of shape {pixels.shape}, not 8-bit RGB")
    if "aperio" in handle.metadata:
        stated = handle.metadata["aperio"].get("MPP")
        return handle, None if stated is None else (float(stated), float(stated))
    # cuCIM gives a spacing of 1.0 where the file has none; only the units tell.
    spacing, units = handle.metadata["cucim"]["spacing"], handle.metadata["cucim"]["spacing_units"]
    return handle, (float(spacing[1]), float(spacing[0])) if units[0] == units[1] == "micrometer" else None


def _open_openslide(path: Path) -> tuple[Any, tuple[float, float] | None]:
    """Handle and µm/px (x, y), None where the file does not say."""
    if not has_openslide:
        raise SlideError("it is not installed (pip install openslide-python openslide-bin)")
    handle = openslide.OpenSlide(str(path))
    handle.read_region((0, 0), 0, (16, 16))
    x, y = (handle.properties.get(key) for key in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y))
    return handle, None if x is None or y is None else (float(x), float(y))


_OPENERS = {"cucim": _open_cucim, "openslide": _open_openslide}


def _resolve_mpp(path: Path, stated: tuple[float, float] | None, given: float | None) -> float:
    low, high = PLAUSIBLE_MPP
    if given is not None:
        if not low <= given <= high:
            raise InputError(f"slide {path.name}: {given:g} µm/px was given by hand; expected {low} to {high:g} µm/px.")
        if stated is not None and abs(sum(stated) / 2 / given - 1) > SNAP:
            logger.warning("%s: the file says %g µm/px, %g given by hand is used.", path.name, sum(stated) / 2, given)
        return float(given)
    remedy = "If you know it, pass it by hand: --mpp 0.5 (mpp=0.5 in Python) for 0.5 µm per pixel (20x is about 0.5, 40x 0.25)."
    if stated is None:
        raise SlideError(f"slide {path} does not say how large its pixels are (µm/px). {remedy}")
    x, y = stated
    if not (low <= x <= high and low <= y <= high):
        raise SlideError(f"slide {path} says {x:g} x {y:g} µm/px, which is not plausible ({low} to {high:g}). {remedy}")
    if abs(x - y) > LARGEST_ANISOTROPY * min(x, y):
        raise SlideError(
            f"slide {path} says that its pixels are {x:g} µm wide and {y:g} µm high; only square pixels are supported (up to "
            f"{LARGEST_ANISOTROPY:.0%}). Resample it, or if that is wrong: {remedy}"
        )
    return (x + y) / 2


def _is_dicom(path: Path) -> bool:
    with open(path, "rb") as file:
        return path.suffix.lower() == ".dcm" or file.read(132)[128:] == b"DICM"


def open_slide(path: str | Path, reader: str = "auto", mpp: float | None = None) -> Slide:
    """Open a whole slide.

    Args:
        path: the file.
        reader: ``cucim``, ``openslide``, or ``auto``: cuCIM, and OpenSlide where cuCIM cannot (the reason is logged).
        mpp: µm per level-0 px said by hand; overrides what the file says.

    Raises:
        InputError: ``mpp`` is not plausible.
        SlideError: the file is missing, no reader can read it (tells what each reader said), or its pixel size is
            missing, implausible, or differs between x and y by more than 2 %.
    """
    path = Path(path)
    look_up_option(reader, ("auto", *_OPENERS))
    if not path.is_file():
        raise SlideError(f"slide {path} does not exist or is no file.")
    reasons = []
    for name in _OPENERS if reader == "auto" else (reader,):
        try:
            handle, stated = _OPENERS[name](path)
        except Exception as error:  # the libraries raise bare exceptions for files that they do not read
            reasons.append(f"{name}: {error}")
            continue
        if reasons:
            logger.warning("%s is read by OpenSlide, which is slower: %s", path.name, "; ".join(reasons))
        return Slide(path, name, handle, _resolve_mpp(path, stated, mpp))
    said = "; ".join(reasons)
    if _is_dicom(path):
        raise SlideError(
            f"slide {path} is DICOM, which is not supported yet. Convert it to a tiled TIFF, with Bio-Formats for instance: "
            f"bfconvert -series 0 -tilex 512 -tiley 512 -compression JPEG {path.name} {path.stem}.tif, and pass --mpp. ({said})"
        )
    raise SlideError(
        f"slide {path} cannot be read; it is damaged, cut short or of an unsupported kind. Copy it again from its source, or "
        f"convert it to a pyramidal tiled TIFF (JPEG). ({said})"
    )
