"""Label and confidence maps as OME-TIFF."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.errors import ImageReadError

__all__ = ["read_label_tiff", "read_map_tiff", "to_uint8", "write_ome_tiff"]

tifffile, _ = optional_import("tifffile")

SMALLEST_LEVEL = 512  # px; the pyramid ends where the longer side is no greater
NAMESPACE = "monai_vslp"  # of the annotation with the description


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Code values in [0, 1] as 0 … 255."""
    return np.round(np.clip(values, 0.0, 1.0) * 255.0).astype(np.uint8)


def _blocks(array: np.ndarray) -> np.ndarray:
    """2×2 blocks of ``[C, H, W]``, shape ``[4, C, H/2, W/2]``; odd sides are extended by their last pixels."""
    height, width = array.shape[1:]
    if height % 2 or width % 2:
        array = np.pad(array, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    return np.stack([array[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])


def _halve(array: np.ndarray, labels: bool) -> np.ndarray:
    """Next level of a pyramid, ``[C, H, W]``: majorities of 2×2 pixels of labels, means of anything else."""
    blocks = _blocks(array)
    if not labels:
        means = blocks.mean(axis=0, dtype=np.float32)
        return means if array.dtype == np.float32 else np.round(means).astype(array.dtype)
    a, b, c, d = blocks
    # Of four values the most frequent one, of equally frequent ones that which comes first: a unless b = c, b = d or c = d
    # and a occurs once.
    alone = (a != b) & (a != c) & (a != d)
    return np.where(alone & ((b == c) | (b == d)), b, np.where(alone & (c == d), c, a))


def _color(rgb: Sequence[int]) -> int:
    """OME colour of RGB 0 … 255: RGBA in a signed 32-bit number."""
    red, green, blue = (int(v) for v in rgb)
    return int.from_bytes(bytes([red, green, blue, 255]), "big", signed=True)


def write_ome_tiff(
    path: str | Path,
    array: np.ndarray,
    *,
    channels: Sequence[str],
    mpp: float | None = None,
    labels: bool = False,
    colors: Sequence[Sequence[int]] | None = None,
    description: Mapping[str, Any] | None = None,
    pyramid: bool = True,
    tile: int = 512,
    compression: str | None = "zlib",
) -> Path:
    """Write a map atomically, with its levels as SubIFDs where ``pyramid`` is set.

    Args:
        path: ends in ``.tif``.
        array: shape ``[C, H, W]`` or ``[H, W]``, uint8 or float32.
        channels: name of each channel.
        mpp: µm/px of ``array``, None where unknown.
        labels: class indices, uint8; lower levels then hold majorities of 2×2 pixels instead of means.
        colors: RGB 0 … 255 per channel, in which viewers show it.
        description: further values (names and colours of the classes of a label map, say), kept as a map annotation: text as
            it is, anything else as JSON.
        pyramid: add levels of half the size down to 512 px, everything in tiles.
        tile: side of the tiles in px, a multiple of 16.
        compression: as tifffile names it, None for none.

    Raises:
        OSError: the file cannot be written; one that was there stays.
        ValueError: shapes, types and names do not fit each other.
    """
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or array.dtype not in (np.uint8, np.float32) or 0 in array.shape:
        raise ValueError(f"expected uint8 or float32 of shape [C, H, W] or [H, W], got {array.dtype} of {list(array.shape)}.")
    if labels and array.dtype != np.uint8:
        raise ValueError(f"labels must be uint8, got {array.dtype}.")
    if len(channels) != len(array) or (colors is not None and len(colors) != len(array)):
        names = list(channels) if colors is None else (list(channels), list(colors))
        raise ValueError(f"{len(array)} channels need as many names and colours, got {names}.")
    channel: dict[str, Any] = {"Name": list(channels)}
    if colors is not None:
        channel["Color"] = [_color(rgb) for rgb in colors]
    # By the contents, so that the same map gives the same file.
    identity = uuid.uuid5(uuid.NAMESPACE_OID, hashlib.sha256(np.ascontiguousarray(array)).hexdigest())
    metadata: dict[str, Any] = {"axes": "CYX", "Channel": channel, "UUID": str(identity)}
    if mpp is not None:
        metadata |= {"PhysicalSizeX": mpp, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": mpp, "PhysicalSizeYUnit": "µm"}
    if description is not None:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}
        metadata["MapAnnotation"] = {"Namespace": NAMESPACE, **texts}
    levels = [array]
    while pyramid and max(levels[-1].shape[1:]) > SMALLEST_LEVEL:
        levels.append(_halve(levels[-1], labels))
    options: dict[str, Any] = {"compression": compression, "photometric": "minisblack", "maxworkers": 2}
    if pyramid:
        options["tile"] = (tile, tile)
    # Classic TIFF ends at 4 GB, compressed or not; what is more than half of that uncompressed gets 64-bit offsets.
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, ome=True, bigtiff=array.nbytes > 2**31) as writer:
        for index, level in enumerate(levels):
            resolution = None if mpp is None else (1e4 / (mpp * 2**index),) * 2
            extra = {"metadata": metadata, "subifds": len(levels) - 1} if index == 0 else {"subfiletype": 1, "metadata": None}
            writer.write(level, resolution=resolution, resolutionunit=None if mpp is None else "CENTIMETER", **options, **extra)
    return Path(path)


def read_map_tiff(path: str | Path, longest: int | None = None) -> np.ndarray:
    """Read a map written by :func:`write_ome_tiff`.

    Args:
        path: the file.
        longest: choose the coarsest level whose longer side is at least this many px; None for full resolution.

    Returns:
        Shape ``[H, W]`` for one channel, else ``[C, H, W]``, in the type of the file.

    Raises:
        ImageReadError: the file is missing or damaged.
    """
    try:
        with tifffile.TiffFile(path) as file:
            levels = file.series[0].levels
            chosen = levels[0]
            for level in levels[1:]:
                if longest is not None and max(level.shape[-2:]) >= longest:
                    chosen = level
            pages = [page for level in levels for page in level.pages]
            needed = max(page.dataoffsets[-1] + page.databytecounts[-1] for page in pages)
            if needed > Path(path).stat().st_size:  # tifffile would fill in zeros
                raise EOFError(f"it is cut short, it needs at least {needed} bytes")
            array = chosen.asarray()
    except Exception as error:  # tifffile and its codecs raise many kinds for damaged files
        raise ImageReadError(f"map {path} cannot be read: {error}") from error
    return array[0] if array.ndim == 3 and len(array) == 1 else array


def read_label_tiff(path: str | Path) -> np.ndarray:
    """Read a label map at full resolution, whoever wrote it.

    Returns:
        Class indices, shape ``[H, W]``, uint8.

    Raises:
        ImageReadError: the file is missing, damaged or no map of 8-bit labels.
    """
    array = read_map_tiff(path)
    if array.ndim != 2 or array.dtype != np.uint8:
        raise ImageReadError(f"{path} is no label map: it holds {array.dtype} of shape {list(array.shape)}, not uint8 [H, W].")
    return array
