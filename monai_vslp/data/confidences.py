"""Confidences that any network left in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.utils import look_up_option, optional_import
from torch.utils.data import Dataset

from monai_vslp.data.cohort import read_cohort
from monai_vslp.utils.errors import ImageReadError, InputError

__all__ = ["CONFIDENCE_SUFFIXES", "FileStacks", "confidence_items", "on_simplex", "open_confidence"]

tifffile, _ = optional_import("tifffile")
zarr, _ = optional_import("zarr")

CONFIDENCE_SUFFIXES = (".npy", ".tif", ".tiff", ".zarr")
KINDS = ("auto", "probabilities", "logits")


def open_confidence(path: str | Path) -> Any:
    """A map ``[C, H, W]`` or a stack of views ``[A, C, H, W]`` in a file, as an array that is read where it is sliced.

    Args:
        path: ``.npy`` (mapped into memory), ``.tif`` (read as a whole), or the folder of a Zarr array.

    Raises:
        ImageReadError: the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix in (".tif", ".tiff"):
            array = tifffile.imread(path)
        elif path.suffix == ".zarr":
            array = zarr.open_array(str(path), mode="r")
        else:
            raise ImageReadError(f"{path} is no file of confidences; there are {', '.join(CONFIDENCE_SUFFIXES)}.")
    except ImageReadError:
        raise
    except Exception as error:  # each library has its own
        raise ImageReadError(f"confidences {path} cannot be read: {type(error).__name__}: {error}") from error
    if len(array.shape) not in (3, 4):
        raise ImageReadError(
            f"confidences {path} must have shape [C, H, W], or [A, C, H, W] for views, got {list(array.shape)}."
        )
    return array


def on_simplex(array: Any, kind: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Confidences on the simplex, and where there are some.

    Args:
        array: shape ``[..., C, H, W]``; uint8 stands for 0 … 1.
        kind: ``logits`` get a softmax, ``probabilities`` are divided by their sum; ``auto``: logits where a value is negative
            or a sum is off by more than 5 % (sums of 0 are background).

    Returns:
        Float32 of the same shape, 1 / C each where all classes are 0; and the mass ``[1, H, W]``, 0 there and 1 elsewhere.

    Raises:
        InputError: values that are NaN or infinite, or cannot be of that kind.
    """
    look_up_option(kind, KINDS)
    values = np.asarray(array)
    q = torch.from_numpy(values.astype(np.float32) / (255.0 if values.dtype == np.uint8 else 1.0))
    if not bool(torch.isfinite(q).all()):
        raise InputError("confidences must be finite, got NaN or infinite values.")
    total = q.sum(dim=-3, keepdim=True)
    there = (q != 0).any(dim=-3, keepdim=True)
    proper = float(q.min()) >= 0 and float(((total - 1).abs() * there).max()) <= 0.05
    if kind == "probabilities" and not proper:
        raise InputError("these are no probabilities: some are negative, or do not add up to 1; pass kind='logits' for scores.")
    if kind == "logits" or not proper:
        q = q.softmax(dim=-3)
    else:
        q = q / total.clamp_min(1e-6)
    mass = there.flatten(0, -4).any(dim=0) if q.ndim > 3 else there
    q = torch.where(there, q, torch.full_like(q, 1.0 / q.shape[-3]))
    return q, mass.float()


def confidence_items(
    folder: str | Path, table: str | Path | None, classes: Sequence[str], split: str | None = None
) -> list[dict[str, Any]]:
    """Files of confidences in a folder, with their proportions where a table has some.

    Args:
        folder: holds ``.npy``, ``.tif`` or ``.zarr``.
        table: its column ``image`` names the files, with or without suffix; None for no proportions.
        classes: of the maps, in their order.
        split: only files of this split, as the table has it; None for all.

    Returns:
        Items with ``image`` (a path), and ``proportions``, ``proportion_spread``, ``proportion_bounds`` where known.

    Raises:
        InputError: the folder has no such file, or the table cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"folder {folder} of confidences does not exist.")
    files = sorted(path for path in folder.iterdir() if path.suffix in CONFIDENCE_SUFFIXES)
    if not files:
        raise InputError(f"folder {folder} has no confidences ({', '.join(CONFIDENCE_SUFFIXES)}).")
    if table is None:
        if split is not None:
            raise InputError("a training needs proportions: give the table of the confidences (--table).")
        return [{"image": str(path)} for path in files]
    cohort = read_cohort(table, folder, classes, check_files=False)
    if split is not None:
        stems = {record.stem for record in cohort.split(split).records}
        files = [path for path in files if path.stem in stems]
    items = []
    for path in files:
        item: dict[str, Any] = {"image": str(path), "stem": path.stem}
        label = cohort.lookup(path)
        if label is not None:
            item["proportions"] = label.mean.astype(np.float32)
            item["proportion_spread"] = label.spread.astype(np.float32)
            item["proportion_bounds"] = np.stack([label.lower, label.upper])
        items.append(item)
    return items


class FileStacks(Dataset):
    """Confidences of files averaged to cells, in the form of :class:`~monai_vslp.data.ConfidenceStacks`.

    Args:
        items: of :func:`confidence_items`, with proportions.
        cell: edge of a cell, px.
        kind: see :func:`on_simplex`.

    Raises:
        InputError: an item without proportions, or a map that cannot be used.
    """

    def __init__(self, items: Sequence[dict[str, Any]], cell: int = 4, kind: str = "auto") -> None:
        if cell < 1:
            raise InputError(f"the edge of a cell must be at least 1 px, got {cell}.")
        if without := [Path(item["image"]).name for item in items if "proportions" not in item]:
            raise InputError(f"the table has no proportions for {', '.join(without[:5])}; a regularizer is trained with them.")
        self.items, self.cell, self.kind = list(items), cell, kind

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """``stack`` ``[A, C, h, w]``, ``mass`` ``[h, w]``, ``image`` (not known: zeros ``[3, h, w]``), ``proportions``."""
        item = self.items[index]
        array = open_confidence(item["image"])
        q, mass = on_simplex(array[...], self.kind)
        stack = q if q.ndim == 4 else q[None]

        def pool(x: torch.Tensor) -> torch.Tensor:
            return x if self.cell == 1 else F.avg_pool2d(x, self.cell, ceil_mode=True, count_include_pad=False)

        share = pool(mass)
        mean = pool(stack * mass) / share.clamp_min(1e-6)
        mean = torch.where(share > 0, mean, torch.full_like(mean, 1.0 / mean.shape[1]))
        return {
            "stack": mean,
            "mass": share[0],
            "image": torch.zeros(3, *share.shape[1:]),
            "proportions": torch.as_tensor(item["proportions"], dtype=torch.float32),
        }
