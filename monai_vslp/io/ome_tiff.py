"""Label and confidence maps as OME-TIFF."""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.io.lazy_maps import Derived, MapLike, TileFile, read_window
from monai_vslp.io.map_blocks import aligned_windows
from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.errors import ImageReadError

__all__ = ["read_label_tiff", "read_map_tiff", "to_uint8", "write_ome_tiff"]

tifffile, _ = optional_import("tifffile")

SMALLEST_LEVEL = 512  # px; the pyramid ends where the longer side is no greater
NAMESPACE = "monai_vslp"  # of the annotation with the description
BUFFER_BYTES = 2**24  # of tiles that wait for their compression


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Code values in [0, 1] as 0 … 255."""
    return np.round(np.clip(values, 0.0, 1.0) * 255.0).astype(np.uint8)


def _color(rgb: Sequence[int]) -> int:
    """OME colour of RGB 0 … 255: RGBA in a signed 32-bit number."""
    red, green, blue = (int(v) for v in rgb)
    return int.from_bytes(bytes([red, green, blue, 255]), "big", signed=True)


def _scan(array: MapLike, tile: int, level: TileFile | None) -> str:
    """Digest of a map ``[C, H, W]``, taken tile by tile, so that it depends on nothing but the values; copies to ``level``."""
    digests = {}
    for window in aligned_windows(array, tile):
        rows, cols = window.core
        block = read_window(array, rows, cols)
        for top in range(0, block.shape[1], tile):
            for left in range(0, block.shape[2], tile):
                part = np.ascontiguousarray(block[:, top : top + tile, left : left + tile])
                place = ((rows.start + top) // tile, (cols.start + left) // tile)
                digests[place] = hashlib.sha256(part).digest()
                for channel, plane in enumerate(part if level is not None else ()):
                    level.write(channel, *place, plane)
    whole = hashlib.sha256(f"{list(array.shape)} {np.dtype(array.dtype)}".encode())
    for place in sorted(digests):
        whole.update(digests[place])
    return whole.hexdigest()


def write_ome_tiff(
    path: str | Path,
    array: MapLike,
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

    With a pyramid the map is read once, by blocks, and its levels wait uncompressed in nameless files beside ``path`` (4/3 of
    the map's bytes) until they are written, so that memory does not grow with the map. The same values give the same bytes,
    whatever kind of array holds them.

    Args:
        path: ends in ``.tif``.
        array: shape ``[C, H, W]`` or ``[H, W]``, uint8 or float32; a NumPy or Zarr array, or another with NumPy's slicing.
        channels: name of each channel.
        mpp: µm/px of ``array``, None where unknown.
        labels: class indices, uint8; lower levels then hold majorities of 2×2 pixels instead of means.
        colors: RGB 0 … 255 per channel, in which viewers show it.
        description: further values (names and colours of the classes of a label map, say), kept as a map annotation: text as
            it is, anything else as JSON.
        pyramid: add levels of half the size down to 512 px, everything in tiles; without, the map is read into memory.
        tile: side of the tiles in px, a multiple of 16.
        compression: as tifffile names it, None for none.

    Raises:
        OSError: the file cannot be written; one that was there stays.
        ValueError: shapes, types and names do not fit each other.
    """
    shape, dtype = tuple(int(side) for side in array.shape), np.dtype(array.dtype)
    if len(shape) == 2:
        array, shape = Derived(lambda plane: plane[None], array, dtype=dtype, leading=(1,)), (1, *shape)
    if len(shape) != 3 or dtype not in (np.uint8, np.float32) or 0 in shape:
        raise ValueError(f"expected uint8 or float32 of shape [C, H, W] or [H, W], got {dtype} of {list(shape)}.")
    if labels and dtype != np.uint8:
        raise ValueError(f"labels must be uint8, got {dtype}.")
    if len(channels) != shape[0] or (colors is not None and len(colors) != shape[0]):
        names = list(channels) if colors is None else (list(channels), list(colors))
        raise ValueError(f"{shape[0]} channels need as many names and colours, got {names}.")
    channel: dict[str, Any] = {"Name": list(channels)}
    if colors is not None:
        channel["Color"] = [_color(rgb) for rgb in colors]
    metadata: dict[str, Any] = {"axes": "CYX", "Channel": channel}
    if mpp is not None:
        metadata |= {"PhysicalSizeX": mpp, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": mpp, "PhysicalSizeYUnit": "µm"}
    if description is not None:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}
        metadata["MapAnnotation"] = {"Namespace": NAMESPACE, **texts}
    options: dict[str, Any] = {"compression": compression, "photometric": "minisblack", "maxworkers": 2}
    options |= {"dtype": dtype, "buffersize": BUFFER_BYTES}
    with atomic_path(path) as temporary, ExitStack() as files:
        levels: list[np.ndarray | TileFile] = []
        if pyramid:
            options["tile"] = (tile, tile)
            levels.append(files.enter_context(TileFile(temporary.parent, shape, dtype, tile)))
            digest = _scan(array, tile, levels[0])
            while max(levels[-1].shape[1:]) > SMALLEST_LEVEL:
                levels.append(files.enter_context(levels[-1].halved(temporary.parent, labels)))
        else:
            levels.append(read_window(array, slice(0, shape[1]), slice(0, shape[2])))
            digest = _scan(levels[0], tile, None)
        # By the contents, so that the same map gives the same file.
        metadata["UUID"] = str(uuid.uuid5(uuid.NAMESPACE_OID, digest))
        # Classic TIFF ends at 4 GB, compressed or not; what is more than half of that uncompressed gets 64-bit offsets.
        bigtiff = math.prod(shape) * dtype.itemsize > 2**31
        with tifffile.TiffWriter(temporary, ome=True, bigtiff=bigtiff) as writer:
            for index, level in enumerate(levels):
                data = level.tiles() if isinstance(level, TileFile) else iter(level)
                resolution = None if mpp is None else (1e4 / (mpp * 2**index),) * 2
                extra = (
                    {"metadata": metadata, "subifds": len(levels) - 1} if index == 0 else {"subfiletype": 1, "metadata": None}
                )
                unit = None if mpp is None else "CENTIMETER"
                writer.write(data, shape=level.shape, resolution=resolution, resolutionunit=unit, **options, **extra)
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
