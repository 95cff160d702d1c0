"""Label and confidence maps as OME-TIFF."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.errors import ImageReadError

__all__ = ["read_map_tiff", "to_uint8", "write_ome_tiff"]

tifffile, _ = optional_import("tifffile")

TILE = 512  # px
SMALLEST_LEVEL = 512  # px; the pyramid ends where the longer side is no greater


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Code values in [0, 1] as 0 … 255."""
    return np.round(np.clip(values, 0.0, 1.0) * 255.0).astype(np.uint8)


def _halve(array: np.ndarray, labels: bool) -> np.ndarray:
    """Next level of a pyramid, ``[C, H, W]``: every second pixel of labels, means of 2×2 pixels of anything else."""
    if labels:
        return np.ascontiguousarray(array[:, ::2, ::2])
    height, width = (side + side % 2 for side in array.shape[1:])
    padded = np.pad(array, ((0, 0), (0, height - array.shape[1]), (0, width - array.shape[2])), mode="edge")
    blocks = padded.reshape(len(array), height // 2, 2, width // 2, 2).astype(np.float32)
    return np.round(blocks.mean(axis=(2, 4))).astype(array.dtype)


def write_ome_tiff(
    path: str | Path,
    array: np.ndarray,
    *,
    channels: Sequence[str],
    labels: bool = False,
    mpp: float | None = None,
    description: dict[str, Any] | None = None,
    pyramid: bool = False,
) -> Path:
    """Write a map atomically.

    Args:
        path: ends in ``.tif``.
        array: shape ``[C, H, W]`` or ``[H, W]``, uint8.
        channels: name of each channel.
        labels: class indices; lower levels then take every second pixel instead of means.
        mpp: µm/px of ``array``, None where unknown.
        description: further values, kept as JSON in the OME annotation ``Description``.
        pyramid: add levels of half the size (SubIFDs) down to about 512 px, in tiles of 512 px.
    """
    array = array[None] if array.ndim == 2 else array
    if len(channels) != len(array):
        raise ValueError(f"{len(array)} channels need as many names, got {list(channels)}.")
    metadata: dict[str, Any] = {"axes": "CYX", "Channel": {"Name": list(channels)}}
    if mpp is not None:
        metadata |= {"PhysicalSizeX": mpp, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": mpp, "PhysicalSizeYUnit": "µm"}
    if description is not None:
        metadata["Description"] = json.dumps(description)
    levels = [array]
    while pyramid and max(levels[-1].shape[1:]) > SMALLEST_LEVEL:
        levels.append(_halve(levels[-1], labels))
    options: dict[str, Any] = {"compression": "zlib", "photometric": "minisblack", "maxworkers": 2}
    if pyramid:
        options["tile"] = (TILE, TILE)
    with atomic_path(path) as temporary:
        # tifffile writes OME only to names that end in .ome.tif unless told to
        with tifffile.TiffWriter(temporary, ome=True, bigtiff=array.nbytes > 2**31) as writer:
            for index, level in enumerate(levels):
                resolution = None if mpp is None else (1e4 / (mpp * 2**index),) * 2
                extra = (
                    {"metadata": metadata, "subifds": len(levels) - 1} if index == 0 else {"subfiletype": 1, "metadata": None}
                )
                writer.write(
                    level,
                    resolution=resolution,
                    resolutionunit="CENTIMETER" if mpp is not None else None,
                    **options,
                    **extra,
                )
    return Path(path)


def read_map_tiff(path: str | Path, longest: int | None = None) -> np.ndarray:
    """Read a map written by :func:`write_ome_tiff`.

    Args:
        path: the file.
        longest: choose the coarsest level whose longer side is at least this many px; None for full resolution.

    Returns:
        Shape ``[H, W]`` for one channel, else ``[C, H, W]``, uint8.

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
            array = chosen.asarray()
    except Exception as error:  # tifffile and its codecs raise many kinds for damaged files
        raise ImageReadError(f"map {path} cannot be read: {error}") from error
    return array[0] if array.ndim == 3 and len(array) == 1 else array
