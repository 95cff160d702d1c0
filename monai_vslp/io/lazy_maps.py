"""Maps that are computed when they are read, or wait on disk, while outputs larger than memory are written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from monai_vslp.io.map_blocks import aligned_windows, halve_block

__all__ = ["Derived", "MapLike", "TileFile", "halve_labels", "read_window"]


class MapLike(Protocol):
    """What the writers take: ``[..., H, W]`` with NumPy's slicing. NumPy and Zarr arrays are such, and :class:`Derived`."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, key: Any) -> Any: ...


def read_window(array: MapLike, rows: slice, cols: slice) -> np.ndarray:
    """All of the leading axes in a window, shape ``[..., h, w]``."""
    return np.asarray(array[(*[slice(None)] * (len(array.shape) - 2), rows, cols)])


class Derived:
    """A map that is computed from others, window by window, when it is read.

    Args:
        function: takes the windows of ``sources`` as NumPy arrays, gives shape ``[..., h, w]``; pixel by pixel, so that the
            result does not depend on the window.
        sources: maps of the same last two axes; those that are None are passed as None.
        dtype: of the result.
        leading: the result's axes before the last two.
    """

    def __init__(
        self, function: Callable[..., np.ndarray], *sources: MapLike | None, dtype: Any, leading: tuple[int, ...] = ()
    ) -> None:
        self._function, self._sources = function, sources
        first = next(source for source in sources if source is not None)
        self.shape, self.dtype = (*leading, *(int(n) for n in first.shape[-2:])), np.dtype(dtype)
        self.ndim = len(self.shape)
        chunks = getattr(first, "chunks", None)
        if chunks:
            self.chunks = (*leading, *chunks[-2:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        key = list(key) if isinstance(key, tuple) else [key]
        if not any(part is Ellipsis for part in key):
            key.append(Ellipsis)
        at = next(number for number, part in enumerate(key) if part is Ellipsis)
        key[at : at + 1] = [slice(None)] * (self.ndim - len(key) + 1)
        if len(key) != self.ndim:
            raise IndexError(f"{len(key)} indices are too many for shape {self.shape}.")
        read, kept = [], []
        for part, length in zip(key[-2:], self.shape[-2:]):
            if isinstance(part, slice):
                found = range(*part.indices(length))
                read.append(slice(min(found), max(found) + 1) if len(found) else slice(0, 0))
                kept.append(slice(None, None, found.step))
            else:
                found = range(length)[part]
                read.append(slice(found, found + 1))
                kept.append(0)
        values = self._function(*(None if source is None else read_window(source, *read) for source in self._sources))
        return values.astype(self.dtype, copy=False)[(*key[:-2], *kept)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[...], dtype=dtype)


def halve_labels(labels: MapLike, times: int) -> np.ndarray:
    """Labels halved ``times`` times by majorities, as the levels of a pyramid are; read by blocks.

    Args:
        labels: class indices, shape ``[H, W]``.
        times: 0 for a copy of the labels.

    Returns:
        Shape ``[ceil(H / 2**times), ceil(W / 2**times)]``.
    """
    scale = 2**times
    result = np.empty([-(-side // scale) for side in labels.shape], dtype=labels.dtype)
    # Blocks begin at multiples of the scale, so that the odd sides are those of the map.
    for window in aligned_windows(labels, -(-1024 // scale) * scale):
        block = read_window(labels, *window.core)[None]
        for _ in range(times):
            block = halve_block(block, labels=True)
        top, left = (part.start // scale for part in window.core)
        result[top : top + block.shape[1], left : left + block.shape[2]] = block[0]
    return result


class TileFile:
    """An array on disk, tile after tile in the order of a TIFF, in a file without a name: nothing is left of it, even if the
    process is killed.

    Args:
        folder: on the disk to use.
        shape: ``[C, H, W]``.
        dtype: of the values.
        tile: side of the tiles, px; those at the end are smaller.

    Raises:
        OSError: the disk is full, say.
    """

    def __init__(self, folder: Path, shape: Sequence[int], dtype: Any, tile: int) -> None:
        self.shape, self.dtype, self.tile = tuple(shape), np.dtype(dtype), tile
        self.rows, self.cols = (-(-side // tile) for side in self.shape[1:])
        self._bytes = tile * tile * self.dtype.itemsize
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as the object

    def __enter__(self) -> TileFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _seek(self, channel: int, row: int, col: int) -> tuple[int, int]:
        """Go to a tile; its height and width."""
        self._file.seek(((channel * self.rows + row) * self.cols + col) * self._bytes)
        height, width = (min(self.tile, side - at * self.tile) for side, at in zip(self.shape[1:], (row, col)))
        return height, width

    def write(self, channel: int, row: int, col: int, block: np.ndarray) -> None:
        """Write the tile in a row and column of tiles, ``[h, w]``."""
        if block.shape != self._seek(channel, row, col):
            raise ValueError(f"tile {row}, {col} of {self.shape} in tiles of {self.tile} px cannot be {block.shape}.")
        self._file.write(np.ascontiguousarray(block, dtype=self.dtype))

    def read(self, channel: int, row: int, col: int) -> np.ndarray:
        """The tile in a row and column of tiles, ``[h, w]``."""
        height, width = self._seek(channel, row, col)
        found = self._file.read(height * width * self.dtype.itemsize)
        return np.frombuffer(found, dtype=self.dtype).reshape(height, width)

    def tiles(self) -> Iterator[np.ndarray]:
        """All tiles, channel by channel and row by row."""
        for channel in range(self.shape[0]):
            for row in range(self.rows):
                for col in range(self.cols):
                    yield self.read(channel, row, col)

    def halved(self, folder: Path, labels: bool) -> TileFile:
        """The next level of the pyramid: majorities of 2×2 pixels of labels, means of anything else."""
        level = TileFile(folder, (self.shape[0], *(-(-side // 2) for side in self.shape[1:])), self.dtype, self.tile)
        for channel in range(level.shape[0]):
            for row in range(level.rows):
                for col in range(level.cols):
                    fine = [
                        [self.read(channel, r, c) for c in range(2 * col, min(2 * col + 2, self.cols))]
                        for r in range(2 * row, min(2 * row + 2, self.rows))
                    ]
                    level.write(channel, row, col, halve_block(np.block(fine)[None], labels)[0])
        return level
