"""Windows over a map: the unit in which passes over pixels are made, in memory or from disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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

    Every access maps the file and lets it go again, so that a process holds no more of it than the slice.

    Args:
        path: the file; made with zeros (sparse) if it does not exist.
        shape: ``[..., H, W]``.
    """

    def __init__(self, path: str | Path, shape: Sequence[int]) -> None:
        self.path, self.shape = Path(path), tuple(int(n) for n in shape)
        size = int(np.prod(self.shape)) * 4
        if not self.path.exists():
            with open(self.path, "wb") as file:
                file.truncate(size)
        elif self.path.stat().st_size != size:
            raise InputError(f"{self.path} holds {self.path.stat().st_size} bytes, {size} are needed for {self.shape}.")

    def _map(self, mode: str) -> np.memmap:
        return np.memmap(self.path, np.float32, mode, shape=self.shape)

    def __getitem__(self, key: tuple) -> torch.Tensor:
        return torch.from_numpy(np.array(self._map("r")[key]))

    def __setitem__(self, key: tuple, value: torch.Tensor) -> None:
        self._map("r+")[key] = value.numpy()
