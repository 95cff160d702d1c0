"""Maps block by block: what writers of maps that do not fit into memory have in common."""

from __future__ import annotations

from typing import Any

import numpy as np

from monai_vslp.utils.errors import InputError
from monai_vslp.variational.outofcore import NO_TISSUE
from monai_vslp.variational.windows import Window, split_windows

__all__ = ["aligned_windows", "check_classes", "halve_block", "number_labels"]

BLOCK_VALUES = 2**23  # numbers that are read at once so as to meet the chunks of a source; beyond it the blocks stay small


def check_classes(classes: Any, colors: Any) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names and RGB colours of the classes as lists of equal length.

    Raises:
        InputError: none or more than 254 classes, names that are empty or occur twice, or colours that do not fit them.
    """
    names, rgb = [str(name) for name in classes], [tuple(int(v) for v in color) for color in colors]
    if not 1 <= len(names) < NO_TISSUE or len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise InputError(f"1 to {NO_TISSUE - 1} classes with different names that are not empty are needed, got {names}.")
    if len(rgb) != len(names) or any(len(color) != 3 or not all(0 <= v <= 255 for v in color) for color in rgb):
        raise InputError(f"{len(names)} classes need as many colours, each red, green and blue of 0 to 255, got {rgb}.")
    return names, rgb


def aligned_windows(array: Any, size: int) -> list[Window]:
    """Windows over the last two axes of a map whose sides are multiples of ``size`` px, except at the end.

    A window covers whole chunks of the source where it says what they are and where that takes no more than
    ``BLOCK_VALUES`` numbers, so that hardly a chunk is decoded twice.

    Args:
        array: anything with ``shape`` ``[..., H, W]``; ``chunks`` are those of a Zarr array.
        size: px.
    """
    shape = tuple(int(n) for n in array.shape)
    sides = (size, size)
    chunks = getattr(array, "chunks", None) or ()
    if len(chunks) == len(shape) and all(isinstance(n, int) for n in chunks):  # those of a Dask array are tuples
        wanted = tuple(-(-n // size) * size for n in chunks[-2:])
        if int(np.prod(shape[:-2])) * wanted[0] * wanted[1] <= BLOCK_VALUES:
            sides = wanted
    return split_windows(shape[-2:], sides)


def number_labels(block: np.ndarray, classes: int) -> np.ndarray:
    """Class indices as the numbers of labels or segments: 1 for the first class, 0 for no tissue.

    Args:
        block: class indices, integers, 255 = no tissue, any shape.
        classes: their number.

    Returns:
        uint8, same shape.

    Raises:
        InputError: other values than class indices and 255.
    """
    block = np.asarray(block)
    wrong = (block != NO_TISSUE) & ((block < 0) | (block >= classes))
    if wrong.any():
        raise InputError(
            f"labels must be class indices 0 to {classes - 1}, or {NO_TISSUE} for no tissue; got {int(block[wrong].flat[0])}. "
            "Are these the classes that the map was made with?"
        )
    return block.astype(np.uint8) + np.uint8(1)  # 255 + 1 is 0 in 8 bits


def halve_block(block: np.ndarray, labels: bool) -> np.ndarray:
    """2×2 pixels become one: the most frequent of labels, the mean of anything else.

    Odd sides are extended by their last pixels, so blocks that begin at even pixels give the parts of the halved map.

    Args:
        block: shape ``[C, H, W]``, uint8 or floating point.
        labels: take majorities; of equally frequent values the one that comes first in the order of rows.

    Returns:
        Shape ``[C, ceil(H / 2), ceil(W / 2)]``, same type; means of integers are rounded.
    """
    height, width = block.shape[-2:]
    if height % 2 or width % 2:
        block = np.pad(block, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    a, b, c, d = (block[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    if labels:
        # The first value wins unless it is alone and two of the others agree.
        alone = (a != b) & (a != c) & (a != d)
        return np.where(alone & ((b == c) | (b == d)), b, np.where(alone & (c == d), c, a))
    mean = a.astype(np.float32)
    for part in (b, c, d):
        mean += part
    mean /= 4
    return np.round(mean).astype(block.dtype) if block.dtype.kind in "ui" else mean.astype(block.dtype)
