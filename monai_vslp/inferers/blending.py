"""Overlapping tiles to one map, rectangle by rectangle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["blend_tiles", "tile_weight", "tiles_touching"]


def tile_weight(size: int) -> np.ndarray:
    """Weights of a tile's pixels: a Gaussian, lowered to 0 just outside the edges, so that a map has no step there.

    Args:
        size: side in px; four standard deviations from the centre to the edge.

    Returns:
        Shape ``[size, size]``, float32, positive everywhere.
    """
    place = (np.arange(size) - (size - 1) / 2) / (size / 8)
    line = np.exp(-0.5 * place**2) - np.exp(-0.5 * (4 + 4 / size) ** 2)  # 0 at the first px outside
    return np.outer(line, line).astype(np.float32)


def tiles_touching(tiles: np.ndarray, size: int, part: tuple[slice, slice]) -> np.ndarray:
    """Indices of tiles that touch a rectangle, ascending.

    Args:
        tiles: upper left corners ``(row, col)`` in px, shape ``[N, 2]``.
        size: side of the tiles in px.
        part: rows and columns of the rectangle.
    """
    rows, cols = part
    touching = (tiles[:, 0] < rows.stop) & (tiles[:, 0] + size > rows.start)
    touching &= (tiles[:, 1] < cols.stop) & (tiles[:, 1] + size > cols.start)
    return np.flatnonzero(touching)


def blend_tiles(
    tiles: np.ndarray, weight: np.ndarray, values: Callable[[int], np.ndarray], part: tuple[slice, slice]
) -> np.ndarray | None:
    """Weighted mean of the tiles in a rectangle, which are added in their order.

    Args:
        tiles: upper left corners ``(row, col)`` in px, shape ``[N, 2]``.
        weight: of a tile's pixels, shape ``[M, M]``, float32, positive.
        values: gives those of the tile of an index, shape ``[K, M, M]``, any numbers.
        part: rows and columns of the rectangle.

    Returns:
        Shape ``[K, rows, columns]``, float32, 0 where no tile lies; None where there is none in the whole rectangle.
    """
    rows, cols = part
    total: np.ndarray | None = None
    norm = np.zeros((rows.stop - rows.start, cols.stop - cols.start), dtype=np.float32)
    for index in tiles_touching(tiles, len(weight), part):
        row, col = (int(n) for n in tiles[index])
        top, left = max(rows.start, row), max(cols.start, col)
        bottom, right = min(rows.stop, row + len(weight)), min(cols.stop, col + len(weight))
        inside = np.s_[top - row : bottom - row, left - col : right - col]
        here = np.s_[top - rows.start : bottom - rows.start, left - cols.start : right - cols.start]
        value = values(int(index))
        if total is None:
            total = np.zeros((len(value), *norm.shape), dtype=np.float32)
        total[(slice(None), *here)] += value[(slice(None), *inside)] * weight[inside]
        norm[here] += weight[inside]
    if total is None:
        return None
    total /= np.where(norm > 0, norm, 1)
    return total
