"""Whole slides at any resolution, through any of the readers in :mod:`monai_vslp.data.readers`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from monai.utils import look_up_option, optional_import

from monai_vslp.data.icc import to_srgb
from monai_vslp.data.readers import SLIDE_READERS, SlideReader, is_dicom, is_dicom_series
from monai_vslp.data.readers.tiff import channel_axis
from monai_vslp.utils.errors import InputError, SlideError

__all__ = ["SLIDE_SUFFIXES", "Slide", "area_resample", "is_slide", "open_slide"]

tifffile, has_tifffile = optional_import("tifffile")

SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".zarr")
LARGEST_IMAGE_SIDE = 4096  # px; a tiled TIFF that is longer is treated as a slide
PLAUSIBLE_MPP = (0.05, 20.0)  # µm/px
LARGEST_ANISOTROPY = 0.02
SNAP = 0.05  # a stored level this near to the wanted µm/px is taken as it is
STRIP_PIXELS = 2**24  # px read at once for thumbnails
COLORS = ("stored", "srgb")

logger = logging.getLogger(__name__)


def is_slide(path: str | Path) -> bool:
    """Whether a file or folder is read tile by tile rather than as one image.

    Slides are the slide formats by suffix (OME-Zarr folders ``*.zarr`` among them), DICOM files without a suffix, folders
    whose DICOM files are of one whole slide, and colour TIFFs that are tiled and have several pyramid levels or a side of
    more than 4,096 px. Only names and headers are looked at. Files that are missing or damaged count as images unless
    their suffix is that of a slide.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in SLIDE_SUFFIXES:
        return True
    if path.is_dir():
        return is_dicom_series(path)
    if suffix == "":
        return is_dicom(path)
    if suffix not in (".tif", ".tiff") or not has_tifffile:
        return False
    try:
        with tifffile.TiffFile(path) as file:
            page, series = file.pages[0], file.series[0]
            if not page.is_tiled:
                return False
            channel_axis(series.axes, series.shape)
            reduced = len(series.levels) > 1 or any(other.is_reduced and other.is_tiled for other in file.pages[1:])
            return reduced or max(page.imagelength, page.imagewidth) > LARGEST_IMAGE_SIDE
    except Exception as error:  # damaged files raise many kinds; read as an image they get a clear error
        logger.debug("%s is no TIFF of a slide: %s", path, error)
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
    """A whole slide, opened by :func:`open_slide`. A context manager; pickled, it reopens its file. Threads may share it.

    Attributes:
        path: the file or folder.
        reader: name of the reader in ``SLIDE_READERS``.
        shape: level-0 ``(H, W)`` in px.
        level_shapes: ``(H, W)`` of each level in px.
        level_downsamples: level-0 px per px of each level; whole numbers where the shapes allow.
        mpp: µm per level-0 px.
        bounds: level-0 ``(row, col, height, width)`` in px of the part that was scanned, None where the file does not say;
            there is no tissue outside of it.
        icc_profile: ICC profile of the stored pixels, None where there is none.
        color: ``stored`` or ``srgb``, see :func:`open_slide`.
        associated: name (``label``, ``macro``, ``thumbnail`` …) to a function without arguments that reads that image: RGB
            ``[H, W, 3]``, uint8, in stored colours. Labels, and macros that show them, can hold names and numbers of
            patients: the pipeline never reads them into its outputs, and neither should you.
    """

    def __init__(self, path: Path, reader: SlideReader, mpp: float, color: str = "stored") -> None:
        self.path, self.reader, self._reader, self.mpp, self.color = path, reader.name, reader, mpp, color
        self.level_shapes = tuple(reader.level_shapes)
        self.shape = self.level_shapes[0]
        self.level_downsamples = tuple(self._whole(v, shape) for v, shape in zip(reader.downsamples, self.level_shapes))
        self.icc_profile, self.bounds = reader.icc_profile, self._clip(reader.bounds)
        self.associated: Mapping[str, Callable[[], np.ndarray]] = MappingProxyType(
            {name: partial(self._read_associated, name) for name in reader.associated}
        )
        self._convert = None
        if color == "srgb" and self.icc_profile is not None:
            try:
                self._convert = to_srgb(self.icc_profile)
            except ValueError as error:
                raise SlideError(
                    f"slide {path}: its colours cannot be converted to sRGB: {error}. Open it with color='stored'."
                ) from error
        elif color == "srgb":
            logger.info("%s has no ICC profile; its pixels are taken to be sRGB.", path.name)

    def _clip(self, bounds: tuple[int, int, int, int] | None) -> tuple[int, int, int, int] | None:
        if bounds is None:
            return None
        top, left = max(bounds[0], 0), max(bounds[1], 0)
        bottom, right = min(bounds[0] + bounds[2], self.shape[0]), min(bounds[1] + bounds[3], self.shape[1])
        return (top, left, bottom - top, right - left) if top < bottom and left < right else None

    def _read_associated(self, name: str) -> np.ndarray:
        try:
            return self._reader.associated[name]()
        except Exception as error:  # the libraries raise bare exceptions for damaged files
            raise SlideError(f"the {name} image of slide {self.path} cannot be read: {error}.") from error

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
        return open_slide, (self.path, self.reader, self.mpp, self.color)

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

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
        try:
            pixels = self._reader.read(level, top, left, bottom - top, right - left)
            if self._convert is not None:
                pixels = self._convert(pixels)
        except Exception as error:  # the libraries raise bare exceptions for damaged files
            raise self._damaged(level, top, left, error) from error
        result[top - row : bottom - row, left - col : right - col] = pixels
        return result

    def _damaged(self, level: int, row: int, col: int, error: Exception) -> SlideError:
        return SlideError(
            f"slide {self.path} cannot be read at level {level}, row {row}, column {col} (px of that level); it may be "
            f"damaged: {error}. Copy it again from its source."
        )

    def _finer(self, downsample: float) -> tuple[int, float]:
        """The coarsest level that is no coarser than ``downsample``, and px of it per px at ``downsample``."""
        if not downsample > 0:
            raise InputError(f"downsample must be positive, got {downsample}.")
        level = max((i for i, value in enumerate(self.level_downsamples) if value <= downsample * (1 + 1e-6)), default=0)
        ratio = downsample / self.level_downsamples[level]
        return level, 1.0 if abs(ratio - 1) < 1e-6 else ratio

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
        level, ratio = self._finer(d)
        if ratio == 1:
            return self._read_level(level, row, col, height, width)
        margin = 1 if ratio < 1 else 0  # linear interpolation looks at neighbours
        top, left = math.floor(row * ratio) - margin, math.floor(col * ratio) - margin
        rows = math.ceil((row + height) * ratio) + margin - top
        cols = math.ceil((col + width) * ratio) + margin - left
        fine = self._read_level(level, top, left, rows, cols)
        means = area_resample(fine, (row * ratio - top, col * ratio - left), ratio, (height, width))
        # Halves go up in spite of rounding errors, so that a pixel does not depend on the region it is read with.
        return np.clip(np.floor(means + (0.5 + 1e-6)), 0, 255).astype(np.uint8)

    def read_many(
        self, corners: Sequence[tuple[int, int]], height: int, width: int, *, downsample: float, workers: int = 2
    ) -> np.ndarray:
        """Pixels of many places at once, the same as :meth:`read_at` gives for each.

        Where nothing is resampled, the places that lie within the level go through the reader's own batches if it has them
        (cuCIM); all others through threads.

        Args:
            corners: ``(row, col)`` of each upper left corner in px at that resolution, may be negative.
            height, width: size of each in px at that resolution.
            downsample: level-0 px per px.
            workers: threads.

        Returns:
            RGB ``[N, height, width, 3]``, uint8; white outside the slide.

        Raises:
            InputError: ``downsample`` or ``workers`` is not positive.
            SlideError: the file is damaged at one of them.
        """
        if workers < 1:
            raise InputError(f"workers must be at least 1, got {workers}.")
        corners = [(int(row), int(col)) for row, col in corners]
        level, ratio = self._finer(float(downsample))
        rows, cols = self.level_shapes[level]
        within = [i for i, (row, col) in enumerate(corners) if 0 <= row <= rows - height and 0 <= col <= cols - width]
        batch = self._read_batch(level, [corners[i] for i in within], height, width, workers) if ratio == 1 else None
        if batch is not None and len(batch) == len(corners):
            return batch
        result = np.empty((len(corners), height, width, 3), dtype=np.uint8)
        rest = list(range(len(corners)))
        if batch is not None:
            result[within] = batch
            rest = sorted({*rest} - {*within})

        def read(index: int) -> None:
            result[index] = self.read_at(*corners[index], height, width, downsample=downsample)

        if workers == 1 or len(rest) < 2:
            for index in rest:
                read(index)
        else:
            with ThreadPoolExecutor(min(workers, len(rest)), thread_name_prefix="slide-reader") as pool:
                list(pool.map(read, rest))
        return result

    def _read_batch(
        self, level: int, corners: list[tuple[int, int]], height: int, width: int, workers: int
    ) -> np.ndarray | None:
        """What the reader's own batches give, ``[N, height, width, 3]``; None where it has none."""
        if not corners:
            return None
        try:
            pixels = self._reader.read_batch(level, corners, height, width, workers)
            return pixels if pixels is None or self._convert is None else np.stack([self._convert(one) for one in pixels])
        except Exception as error:  # as in _read_level
            raise self._damaged(level, *corners[0], error) from error

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


def _passed_over(name: str, path: Path) -> str | None:
    """Why a reader need not be tried on a slide, or None; readers of others may lack the question."""
    unsuited = getattr(SLIDE_READERS[name], "unsuited", None)
    return None if unsuited is None else unsuited(path)


def open_slide(path: str | Path, reader: str = "auto", mpp: float | None = None, color: str = "stored") -> Slide:
    """Open a whole slide.

    Args:
        path: the file, or the folder of a DICOM series or an OME-Zarr image.
        reader: a name in ``SLIDE_READERS`` (``cucim``, ``wsidicom``, ``openslide``, ``ome``, ``plain``), or ``auto``: each in
            that order until one can (why others were passed over is logged).
        mpp: µm per level-0 px said by hand; overrides what the file says.
        color: ``stored`` leaves pixels as they are in the file; ``srgb`` converts them by the file's ICC profile where there
            is one. Stored is the default because networks are trained on stored pixels, most slides have no profile, and
            mixing both in one cohort adds a difference between scanners instead of taking one away.

    Raises:
        InputError: ``mpp`` is not plausible.
        SlideError: the file is missing, no reader can read it (tells what each reader said), its pixel size is missing,
            implausible, or differs between x and y by more than 2 %, or its ICC profile cannot be used.
        ValueError: there is no such reader or colour.
    """
    path = Path(path)
    if reader != "auto":
        SLIDE_READERS.find(reader)
    look_up_option(color, COLORS)
    if not path.exists():
        raise SlideError(f"slide {path} does not exist.")
    failed, unsuited = [], []
    for name in SLIDE_READERS.names if reader == "auto" else (reader,):
        reason = _passed_over(name, path) if reader == "auto" else None
        if reason is not None:
            unsuited.append(f"{name}: {reason}")
            continue
        try:
            opened = SLIDE_READERS[name](path)
        except Exception as error:  # the libraries raise bare exceptions for files that they do not read
            failed.append(f"{name}: {error}")
            continue
        if failed or unsuited:
            level = logging.WARNING if failed else logging.INFO
            logger.log(level, "%s is read by %s; passed over: %s", path.name, name, "; ".join([*failed, *unsuited]))
        try:
            return Slide(path, opened, _resolve_mpp(path, opened.mpp, mpp), color)
        except Exception:
            opened.close()
            raise
    raise SlideError(
        f"slide {path} cannot be read; it is damaged, cut short or of an unsupported kind. Copy it again from its source, or "
        f"convert it to a pyramidal tiled TIFF (JPEG). ({'; '.join([*failed, *unsuited])})"
    )
