"""Windows over a map: the unit in which passes over pixels are made, in memory or from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch

from monai_vslp.utils.errors import InputError

__all__ = ["DiskArray", "MapArray", "Window", "split_windows", "whole_window"]


class MapArray(Protocol):
    """What passes over pixels read and write: slices of the last two axes (rows, columns) as tensors.

    A ``torch.Tensor`` is one; so are :class:`DiskArray` and adapters of chunked stores.
    """

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, key: tuple) -> torch.Tensor: ...

    def __setitem__(self, key: tuple, value: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class Window:
    """A rectangle of a map (``core``) and the margin around it that its computation reads (``outer``), in ``(row, col)``.

    Attributes:
        core: rows and columns that the window stands for.
        outer: the same with the margin, cut at the borders of the map.
        inner: ``core`` in the coordinates of ``outer``.
    """

    core: tuple[slice, slice]
    outer: tuple[slice, slice]

    @property
    def inner(self) -> tuple[slice, slice]:
        return tuple(slice(c.start - o.start, c.stop - o.start) for c, o in zip(self.core, self.outer))

    @property
    def key(self) -> tuple[int, ...]:
        """The window as numbers, to look it up by."""
        return tuple(n for part in (*self.core, *self.outer) for n in (part.start, part.stop))


def split_windows(shape: tuple[int, int], size: tuple[int, int], halo: int = 0, multiple: int = 1) -> list[Window]:
    """Cut a map into windows, row by row.

    Args:
        shape: ``(H, W)`` of the map.
        size: ``(rows, columns)`` of a core; those at the end are smaller.
        halo: margin around the core, px.
        multiple: starts of the outer rectangles are multiples of it (for networks that halve the resolution).

    Raises:
        InputError: a size or margin that cannot be.
    """
    if min(size) < 1 or halo < 0 or multiple < 1:
        raise InputError(f"windows need a size of at least 1 x 1 px and a margin of at least 0, got {tuple(size)}, {halo}.")

    def spans(length: int, step: int) -> list[tuple[slice, slice]]:
        found = []
        for start in range(0, length, step):
            stop = min(start + step, length)
            first = max(0, start - halo)
            found.append((slice(start, stop), slice(first - first % multiple, min(length, stop + halo))))
        return found

    rows, columns = spans(shape[0], size[0]), spans(shape[1], size[1])
    return [Window((r[0], c[0]), (r[1], c[1])) for r in rows for c in columns]


def whole_window(shape: tuple[int, int]) -> Window:
    """The window that is the whole map."""
    both = (slice(0, shape[0]), slice(0, shape[1]))
    return Window(both, both)


class DiskArray:
    """Array of float32 in a file of its own, read and written by slices of the last two axes.

    The file holds the map block by block, each with all its leading axes, so that a window of a block's size is one read
    or write however wide the map is. A process holds no more of the file than the slices it asked for.

    The array is pickled as its path. A write touches the bytes of its rectangle and no others, and every access opens the
    file, so that processes can write rectangles that do not overlap at the same time, and read what others wrote before. On
    network file systems that cache by pages (NFS) this holds for whole blocks only.

    Args:
        path: the file; made with zeros (sparse) if it does not exist.
        shape: ``[..., H, W]``.
        block: rows and columns of a block.

    Raises:
        InputError: a file of another size.
        OSError: the file cannot be read or written (a full disk, say).
    """

    def __init__(self, path: str | Path, shape: Sequence[int], block: tuple[int, int] = (256, 256)) -> None:
        self.path, self.shape = Path(path).absolute(), tuple(int(n) for n in shape)
        self.block = tuple(max(1, min(want, have)) for want, have in zip(block, self.shape[-2:]))
        self._leading = int(np.prod(self.shape[:-2]))
        self._across = -(-self.shape[-1] // self.block[1])
        self._bytes = 4 * self._leading * self.block[0] * self.block[1]
        size = -(-self.shape[-2] // self.block[0]) * self._across * self._bytes
        if not self.path.exists():
            with open(self.path, "wb") as file:
                file.truncate(size)
        elif self.path.stat().st_size != size:
            raise InputError(f"{self.path} holds {self.path.stat().st_size} bytes, {size} are needed for {self.shape}.")

    def __getitem__(self, key: tuple) -> torch.Tensor:
        rows, columns = self._rectangle(key)
        out = np.empty((self._leading, rows.stop - rows.start, columns.stop - columns.start), np.float32)
        with open(self.path, "rb", buffering=0) as file:
            for run in self._runs(rows, columns):
                target = out[(slice(None), *run.place)]
                if run.whole_rows and target.flags.c_contiguous:
                    self._transfer(file, file.readinto, run.pieces(target))
                else:  # columns beside those asked for come along: one read is faster than one per row
                    wide = replace(run, columns=slice(0, run.shape[1]))
                    data = np.empty((self._leading, target.shape[1], run.shape[1]), np.float32)
                    self._transfer(file, file.readinto, wide.pieces(data))
                    target[...] = data[:, :, run.columns]
        return torch.from_numpy(out.reshape(*self.shape[:-2], *out.shape[1:]))

    def __setitem__(self, key: tuple, value: torch.Tensor) -> None:
        rows, columns = self._rectangle(key)
        source = value.detach().to("cpu", torch.float32).numpy()
        source = source.reshape(self._leading, rows.stop - rows.start, columns.stop - columns.start)
        with open(self.path, "r+b", buffering=0) as file:
            for run in self._runs(rows, columns):
                data = np.ascontiguousarray(source[(slice(None), *run.place)])
                self._transfer(file, file.write, run.pieces(data))

    def _rectangle(self, key: tuple) -> tuple[slice, slice]:
        if len(key) != len(self.shape) or any(part != slice(None) for part in key[:-2]):
            raise InputError(f"a DiskArray is sliced in its last two axes only, got {key} for the shape {self.shape}.")
        spans = [part.indices(length) for part, length in zip(key[-2:], self.shape[-2:])]
        if any(step != 1 for _, _, step in spans):
            raise InputError(f"a DiskArray is sliced without steps, got {key}.")
        rows, columns = (slice(start, max(start, stop)) for start, stop, _ in spans)
        return rows, columns

    def _runs(self, rows: slice, columns: slice) -> Iterator[_Run]:
        """The parts of blocks that make up a rectangle."""
        height, width = self.block
        if rows.start == rows.stop or columns.start == columns.stop:
            return
        for i in range(rows.start // height, -(-rows.stop // height)):
            top, bottom = i * height, min((i + 1) * height, self.shape[-2])
            first, last = max(rows.start, top), min(rows.stop, bottom)
            for j in range(columns.start // width, -(-columns.stop // width)):
                left, right = j * width, min((j + 1) * width, self.shape[-1])
                begin, end = max(columns.start, left), min(columns.stop, right)
                yield _Run(
                    offset=(i * self._across + j) * self._bytes,
                    shape=(bottom - top, right - left),
                    rows=slice(first - top, last - top),
                    columns=slice(begin - left, end - left),
                    place=(slice(first - rows.start, last - rows.start), slice(begin - columns.start, end - columns.start)),
                )

    def _transfer(self, file: BinaryIO, move: Callable[[memoryview], int], pieces: Iterable[tuple[int, np.ndarray]]) -> None:
        """Read or write pieces, each contiguous in memory and in the file, at their offsets."""
        for offset, piece in pieces:
            file.seek(offset)
            rest = memoryview(piece).cast("B")
            while rest:
                done = move(rest)
                if not done:
                    raise OSError(f"{self.path} ended early: it was cut while in use.")
                rest = rest[done:]


@dataclass(frozen=True)
class _Run:
    """Part of a block: ``offset`` of the block in bytes, its ``shape``, rows and columns in it, and its place in a slice."""

    offset: int
    shape: tuple[int, int]
    rows: slice
    columns: slice
    place: tuple[slice, slice]

    @property
    def whole_rows(self) -> bool:
        return self.columns == slice(0, self.shape[1])

    def pieces(self, data: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Offsets in the file, and the parts of ``data``, ``[leading, rows, columns]`` and contiguous, that lie there."""
        height, width = self.shape
        if self.whole_rows and self.rows == slice(0, height):
            yield self.offset, data
            return
        for index, part in enumerate(data):
            first = self.offset + 4 * width * (index * height + self.rows.start)
            if self.whole_rows:
                yield first, part
            else:
                yield from ((first + 4 * (width * number + self.columns.start), row) for number, row in enumerate(part))
