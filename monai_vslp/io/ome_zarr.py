"""Image, confidences, segmentation and labels as one OME-Zarr folder."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.io.map_blocks import aligned_windows, check_classes, halve_block, number_labels
from monai_vslp.io.ome_tiff import to_uint8
from monai_vslp.utils.errors import InputError
from monai_vslp.variational.windows import split_windows

__all__ = ["write_ome_zarr"]

zarr, _ = optional_import("zarr", descriptor="{} is needed for OME-Zarr: pip install 'zarr>=3'")
codecs, _ = optional_import("zarr.codecs", descriptor="{} is needed for OME-Zarr: pip install 'zarr>=3'")

NGFF = "0.5"
NAMESPACE = "monai_vslp"  # of our own attributes
LABELS = "labels"  # name of the label image inside the group of that name
BEYOND = 1e-3  # what fractions may lie outside 0 … 1; float16 rounds by half of it
CHUNK = 512  # px


def write_ome_zarr(
    path: str | Path,
    *,
    image: Any = None,
    u: Any = None,
    confidence: Any = None,
    labels: Any = None,
    mpp: float | None,
    classes: Sequence[str],
    colors: Sequence[Sequence[int]],
    attributes: Mapping[str, Any] | None = None,
    dtype: str = "uint8",
    chunk: int = CHUNK,
) -> Path:
    """Write maps of one size as OME-Zarr (NGFF 0.5, Zarr v3), block by block.

    The folder is an image itself: the first given of ``image``, ``u`` and ``confidence``. The others lie in groups inside
    it, each an image that opens on its own:

    =============================== ===================== =====================================================
    group                           axes                  holds
    =============================== ===================== =====================================================
    the folder                      c, y, x               ``image``, else ``u``, else ``confidence``
    ``segmentation``, ``confidence`` c, y, x              what is given of ``u`` and ``confidence`` beside that
    ``labels/labels``               y, x                  ``labels``: class index + 1, and 0 for no tissue, which
                                                          viewers show as nothing
    =============================== ===================== =====================================================

    Each has levels ``0``, ``1``, … of half the size down to one chunk: majorities of 2×2 pixels of labels, means of
    anything else. Channels carry names and colours of the classes, labels carry them as ``image-label`` metadata.
    Everything is made in a hidden folder beside ``path`` and renamed when it is complete; an OME-Zarr that was there
    stays until then. Memory holds a few blocks of ``[C, chunk, chunk]``, or the source's own chunks where they are larger.

    Args:
        path: the folder, ``….ome.zarr`` by custom.
        image: RGB on the grid of the maps, shape ``[3, H, W]``, uint8. This and the other maps are NumPy arrays or anything
            with ``shape``, ``dtype`` and slicing (Zarr arrays).
        u: refined segmentation, shape ``[C, H, W]``, fractions as floating point or as uint8 where 255 is 1.
        confidence: of the first stage, as ``u``.
        labels: class indices, shape ``[H, W]``, integer, 255 = no tissue.
        mpp: µm/px of the maps, None where unknown.
        classes: names in the order of the class axes.
        colors: RGB 0 … 255 per class.
        attributes: further values, kept under ``monai_vslp`` in the attributes of the folder; NaN and infinities become
            text.
        dtype: how fractions are stored, ``uint8`` (255 is 1) or ``float16``.
        chunk: side of the chunks in px, even.

    Raises:
        InputError: maps that do not fit each other, values outside their range, or a ``path`` that is something else.
        OSError: the folder cannot be written (a full disk, say); what was there stays.
    """
    path = Path(path)
    names, rgb = check_classes(classes, colors)
    if dtype not in ("uint8", "float16"):
        raise InputError(f"fractions are stored as uint8 or float16, got {dtype!r}.")
    if chunk < 2 or chunk % 2:
        raise InputError(f"chunks need an even side of at least 2 px, got {chunk}.")
    if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
        raise InputError(f"the maps need a pixel size in µm/px above 0, or None where it is unknown; got {mpp}.")
    _check_shapes(len(names), {"image": image, "u": u, "confidence": confidence, "labels": labels})

    def fractions(block: np.ndarray) -> np.ndarray:
        return _fractions(block, dtype)

    channels = list(zip(names, rgb))
    found: list[tuple[str, Any, Callable, list, str]] = []
    if image is not None:
        found.append(("image", image, np.asarray, list(zip(("red", "green", "blue"), 255 * np.eye(3, dtype=int))), "uint8"))
    found += [
        (name, array, fractions, channels, dtype)
        for name, array in (("segmentation", u), ("confidence", confidence))
        if array is not None
    ]
    with _atomic_folder(path) as temporary:
        root = zarr.open_group(temporary, mode="w", zarr_format=3)
        for index, (name, array, convert, shown, stored) in enumerate(found):
            group = root if index == 0 else root.create_group(name)
            count = _write_levels(group, array, convert, stored, ("c", "y", "x"), chunk, labels=False)
            group.attrs["ome"] = {
                "version": NGFF,
                "multiscales": [_multiscale(name, ("c", "y", "x"), count, mpp, "mean")],
                "omero": _omero(shown, stored),
            }
        if labels is not None:
            above = root.create_group("labels")
            above.attrs["ome"] = {"version": NGFF, "labels": [LABELS]}
            group = above.create_group(LABELS)
            count = _write_levels(
                group, labels, lambda block: number_labels(block, len(names)), "uint8", ("y", "x"), chunk, labels=True
            )
            group.attrs["ome"] = {
                "version": NGFF,
                "multiscales": [_multiscale(LABELS, ("y", "x"), count, mpp, "majority")],
                "image-label": _image_label(names, rgb),
            }
        if attributes is not None:
            root.attrs[NAMESPACE] = _plain(dict(attributes))
    return path


def _check_shapes(classes: int, maps: Mapping[str, Any]) -> None:
    given = {name: array for name, array in maps.items() if array is not None}
    if not set(given) - {"labels"}:
        raise InputError("an OME-Zarr needs an image that labels belong to: give image, u or confidence.")
    size = tuple(next(iter(given.values())).shape[-2:])
    wanted = {"image": ("uint8 of shape [3, H, W]", (3, *size)), "labels": ("integers of shape [H, W]", size)}
    for name, array in given.items():
        said, shape = wanted.get(name, (f"floating point or uint8 of shape [{classes}, H, W]", (classes, *size)))
        kind = np.dtype(array.dtype)
        allowed = kind == np.uint8 or (kind.kind in "iu" if name == "labels" else kind.kind == "f" and name != "image")
        if tuple(array.shape) != shape or not allowed or 0 in shape:
            raise InputError(f"{name} must be {said}, all maps of one size; got {kind} of {list(array.shape)} beside {size}.")


def _fractions(block: np.ndarray, dtype: str) -> np.ndarray:
    """Fractions as they are stored."""
    block = np.asarray(block)
    if block.dtype == np.uint8:
        return block if dtype == "uint8" else (block.astype(np.float32) / 255).astype(np.float16)
    block = block.astype(np.float32)
    if not ((block >= -BEYOND) & (block <= 1 + BEYOND)).all():  # neither is NaN
        raise InputError(
            f"confidences and segmentations must be fractions of 0 to 1, got {block.min():.4g} to {block.max():.4g}; store a "
            "softmax over the classes."
        )
    return to_uint8(block) if dtype == "uint8" else block.clip(0, 1).astype(np.float16)


def _write_levels(
    group: Any,
    source: Any,
    convert: Callable[[np.ndarray], np.ndarray],
    dtype: str,
    axes: tuple[str, ...],
    chunk: int,
    labels: bool,
) -> int:
    """Write the levels of one image into its group; returns how many."""
    shapes = [tuple(int(n) for n in source.shape)]
    while max(shapes[-1][-2:]) > chunk:
        shapes.append((*shapes[-1][:-2], *(-(-side // 2) for side in shapes[-1][-2:])))
    arrays = [
        group.create_array(
            str(index),
            shape=shape,
            # One channel per chunk: viewers show them one by one.
            chunks=(*(1 for _ in shape[:-2]), *(min(chunk, side) for side in shape[-2:])),
            dtype=dtype,
            fill_value=0,
            compressors=codecs.BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
            dimension_names=axes,
        )
        for index, shape in enumerate(shapes)
    ]
    leading = [slice(None)] * (len(axes) - 2)
    for window in aligned_windows(source, chunk):
        arrays[0][(*leading, *window.core)] = convert(np.asarray(source[(*leading, *window.core)]))
    for finer, coarser in pairwise(arrays):
        for window in split_windows(coarser.shape[-2:], (chunk, chunk)):
            under = (slice(2 * part.start, min(2 * part.stop, side)) for part, side in zip(window.core, finer.shape[-2:]))
            block = finer[(*leading, *under)]
            halved = halve_block(block.reshape(-1, *block.shape[-2:]), labels)
            coarser[(*leading, *window.core)] = halved.reshape(*block.shape[:-2], *halved.shape[-2:])
    return len(arrays)


def _multiscale(name: str, axes: Sequence[str], levels: int, mpp: float | None, method: str) -> dict[str, Any]:
    unit = {} if mpp is None else {"unit": "micrometer"}
    kinds = {"c": {"type": "channel"}, "y": {"type": "space", **unit}, "x": {"type": "space", **unit}}
    size = 1.0 if mpp is None else float(mpp)
    return {
        "name": name,
        "axes": [{"name": axis, **kinds[axis]} for axis in axes],
        "datasets": [
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [1.0 if axis == "c" else size * 2**level for axis in axes]}
                ],
            }
            for level in range(levels)
        ],
        "type": method,
    }


def _omero(channels: Sequence[tuple[str, Sequence[int]]], dtype: str) -> dict[str, Any]:
    """How viewers show the channels, by name and RGB colour."""
    top = 255 if dtype == "uint8" else 1
    return {
        "channels": [
            {
                "label": name,
                "color": "".join(f"{int(v):02X}" for v in rgb),
                "active": True,
                "window": {"min": 0, "max": top, "start": 0, "end": top},
            }
            for name, rgb in channels
        ],
        "rdefs": {"model": "color"},
    }


def _image_label(names: Sequence[str], colors: Sequence[Sequence[int]]) -> dict[str, Any]:
    numbered = list(enumerate(zip(names, colors), start=1))
    return {
        "colors": [{"label-value": number, "rgba": [*rgb, 255]} for number, (_, rgb) in numbered],
        "properties": [{"label-value": number, "class": name, "index": number - 1} for number, (name, _) in numbered],
        "source": {"image": "../../"},
    }


def _plain(value: Any) -> Any:
    """Values as JSON has them; other numbers by their names in Zarr."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(value) if isinstance(value, Path) else value


@contextmanager
def _atomic_folder(path: Path) -> Iterator[Path]:
    """Yield the path of a folder to make; give it the name ``path`` when the block succeeds, else remove it."""
    if path.exists() and not (path / "zarr.json").is_file():
        raise InputError(f"{path} exists and is no Zarr folder, so it is not replaced; remove it or choose another path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    around = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    new, old = around / "new", around / "old"
    try:
        yield new
        if path.exists():  # a folder with contents cannot be renamed over
            os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
    finally:
        if path.exists() or not old.exists():  # never the last copy
            shutil.rmtree(around, ignore_errors=True)
