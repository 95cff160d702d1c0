"""What the readers of public data sets share: looking at layouts, and label maps as their owners store them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.data.images import image_size
from monai_vslp.utils.errors import ImageReadError, InputError

__all__ = ["NOT_COUNTED", "foreground", "indices_by_colour", "instance_ids", "missing_parts", "relabel"]

Image, _ = optional_import("PIL.Image")

NOT_COUNTED = 255  # label of pixels that belong to no class: outside the region, excluded, white


def missing_parts(root: Path, layout: Sequence[str]) -> list[str]:
    """Entries of a layout that a folder lacks; an entry names files or folders (globs), alternatives joined by `` or ``."""
    return [part for part in layout if not any(any(root.glob(option)) for option in part.split(" or "))]


def _load(path: Path, colours: bool) -> tuple[str, np.ndarray]:
    """Mode of the file and its pixels: ``[H, W, 3]`` uint8 with ``colours``, else as stored (palettes by index)."""
    image_size(path)  # raises for what is no image, and lets Pillow open large ones
    try:
        with Image.open(path) as file:
            image: Any = file.convert("RGB") if colours else file
            return file.mode, np.asarray(image)
    except Exception as error:  # codecs raise many kinds for damaged files
        raise ImageReadError(f"label map {path} cannot be read; it is damaged or cut short: {error}") from error


def instance_ids(path: Path) -> np.ndarray:
    """Instance map as stored: 0 is background, every other number one object.

    Returns:
        Shape ``[H, W]``, integers.

    Raises:
        ImageReadError: the file is missing or damaged.
        InputError: it has several channels that differ, or fractions.
    """
    _, array = _load(path, colours=False)
    if array.ndim == 3 and (array[..., :1] == array[..., 1:3]).all():
        array = array[..., 0]  # a grey map saved as RGB
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise InputError(f"label map {path} must have one channel of numbers, got {array.dtype} of shape {list(array.shape)}.")
    return array.astype(np.uint8) if array.dtype.kind == "b" else array


def foreground(path: Path) -> np.ndarray:
    """Where a label image is not black, whatever its mode: bool ``[H, W]``.

    Raises:
        ImageReadError: the file is missing or damaged.
    """
    return _load(path, colours=True)[1].any(axis=-1)


def indices_by_colour(path: Path, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Label map of a palette or RGB image, each pixel by its colour; grey images hold the index itself.

    Colours decide, not the numbers of the file's own palette, so that a map saved with a palette in another order, or without
    one, is read rightly or refused.

    Args:
        path: the image.
        palette: red, green and blue, 0 to 255, per index.

    Returns:
        Positions in ``palette``, shape ``[H, W]``, uint8.

    Raises:
        ImageReadError: the file is missing or damaged.
        InputError: a colour (or, in grey images, a number) that the palette lacks.
    """
    mode, array = _load(path, colours=True)
    if mode == "L":
        indices = array[..., 0]
        wrong = np.unique(indices[indices >= len(palette)]).tolist()
    else:
        codes = array.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
        known = np.array([red << 16 | green << 8 | blue for red, green, blue in palette], dtype=np.int32)
        order = np.argsort(known)
        indices = order[np.searchsorted(known[order], codes).clip(max=len(known) - 1)]
        outside = np.unique(codes[known[indices] != codes]).tolist()
        wrong = [(code >> 16, code >> 8 & 255, code & 255) for code in outside]
    if wrong:
        listed = ", ".join(map(str, wrong[:5])) + (" …" if len(wrong) > 5 else "")
        raise InputError(
            f"label map {path} holds {listed}; the owners' palette is {', '.join(map(str, palette))}. Was it saved as JPEG, "
            "resampled or converted? Take the files as the owners distribute them."
        )
    return indices.astype(np.uint8)


def relabel(codes: np.ndarray, table: Sequence[int], path: Path) -> np.ndarray:
    """Owners' codes to class indices.

    Args:
        codes: shape ``[H, W]``, integers.
        table: class index per code, ``NOT_COUNTED`` for pixels of no class, -1 for codes that do not exist.
        path: of the map, for messages.

    Returns:
        Shape ``[H, W]``, uint8.

    Raises:
        InputError: a code that the table lacks.
    """
    lookup = np.asarray(table, dtype=np.int64)
    inside = (codes >= 0) & (codes < len(lookup))
    labels = np.where(inside, lookup[np.where(inside, codes, 0)], -1)
    if (labels < 0).any():
        wrong = np.unique(codes[labels < 0])[:5].tolist()
        known = ", ".join(str(code) for code, label in enumerate(table) if label >= 0)
        raise InputError(f"label map {path} has the code {', '.join(map(str, wrong))}; codes are {known}.")
    return labels.astype(np.uint8)
