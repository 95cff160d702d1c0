"""BCSS-WSSS and LUAD-HistoSeg: training patches of which only the classes present are known, as part of the file name.

Han et al., "Multi-layer pseudo-supervision for histopathology tissue semantic segmentation using patch-level classification
labels", Medical Image Analysis 80 (2022), arXiv 2110.08048; https://github.com/ChuHan89/WSSS-Tissue. Layout, numbers and
palettes are those of the ``Readme.txt`` inside each set: patches of 224 x 224 px in ``train``, the names of which end in a flag
per class, and in ``val`` and ``test`` with ``img`` and ``mask``, palette PNGs of the same names whose fifth colour, white,
marks background and what is excluded.

- BCSS-WSSS: ``TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500+0[1101].png``, slide and region of BCSS, number of the patch;
  flags are tumour, stroma, lymphocytes, necrosis. 23,422, 3,418 and 4,986 patches.
- LUAD-HistoSeg: ``1031280-2300-27920-[1 0 0 1].png``, patient, x and y; flags are tumour epithelium, necrosis, lymphocytes,
  tumour-associated stroma. 16,678, 300 and 307 patches at 10x.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np

from monai_vslp.data.images import list_images
from monai_vslp.data.public.cohort import PUBLIC_SETS, PublicItem, PublicSet
from monai_vslp.data.public.files import NOT_COUNTED, indices_by_colour, relabel
from monai_vslp.utils.errors import InputError

__all__ = ["BCSS_WSSS", "LUAD_HISTOSEG", "presence_from_name"]

FLAGS = re.compile(r"\[\s*([01](?:\s*[01])*)\s*\]$")
WHITE = (255, 255, 255)
BCSS_PALETTE = {
    "tumor": (255, 0, 0),
    "stroma": (0, 255, 0),
    "lymphocytic_infiltrate": (0, 0, 255),
    "necrosis": (153, 0, 255),
}
LUAD_PALETTE = {
    "tumor_epithelium": (205, 51, 51),
    "necrosis": (0, 255, 0),
    "lymphocyte": (65, 105, 225),
    "tumor_stroma": (255, 165, 0),
}


def presence_from_name(path: str | Path, classes: int) -> tuple[bool, ...]:
    """Which classes occur in a training patch, from the flags that end its name.

    Args:
        path: such as ``1031280-2300-27920-[1 0 0 1].png`` or ``…+0[1101].png``.
        classes: number of flags expected.

    Raises:
        InputError: the name has no flags, or another number of them.
    """
    match = FLAGS.search(Path(path).stem)
    flags = tuple(flag == "1" for flag in match[1] if flag in "01") if match else ()
    if len(flags) != classes:
        example = " ".join(["1"] + ["0"] * (classes - 1))
        raise InputError(f"training patch {Path(path).name!r} should end in {classes} flags, such as '[{example}].png'.")
    return flags


def _patch_labels(path: Path, palette: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Class indices, white as ``NOT_COUNTED``."""
    return relabel(indices_by_colour(path, (*palette, WHITE)), (*range(len(palette)), NOT_COUNTED), path)


def _tcga(stem: str) -> tuple[str, str]:
    slide = stem.partition("_")[0]
    return "-".join(slide.split("-")[:3]), slide


def _first(stem: str) -> tuple[str, str]:
    return stem.partition("-")[0], ""


def _read_patches(root: Path, palette: dict[str, tuple[int, int, int]], tcga: bool) -> list[PublicItem]:
    name_of = _tcga if tcga else _first
    items = []
    for image in list_images(root / "train"):
        presence = presence_from_name(image, len(palette))
        items.append(PublicItem(image, "train", "train", *name_of(image.stem), presence=presence))
    for split in ("val", "test"):
        for image in list_images(root / split / "img"):
            file = root / split / "mask" / image.name
            labels = partial(_patch_labels, file, tuple(palette.values()))
            found = {"label_file": file, "labels": labels} if file.is_file() else {}
            items.append(PublicItem(image, split, split, *name_of(image.stem), **found))
    return items


LAYOUT = ("train", "val/img", "val/mask", "test/img", "test/mask")

BCSS_WSSS = PUBLIC_SETS.add(
    "bcss_wsss",
    "BCSS-WSSS: patches of breast cancer, classes present for training, masks for validation and test",
    PublicSet(
        title="BCSS-WSSS",
        classes=tuple(BCSS_PALETTE),
        layout=LAYOUT,
        obtained="https://github.com/ChuHan89/WSSS-Tissue",
        read=partial(_read_patches, palette=BCSS_PALETTE, tcga=True),
        counts={"train": 23_422, "val": 3_418, "test": 4_986},
    ),
)

LUAD_HISTOSEG = PUBLIC_SETS.add(
    "luad_histoseg",
    "LUAD-HistoSeg: patches of lung adenocarcinoma, classes present for training, masks for validation and test",
    PublicSet(
        title="LUAD-HistoSeg",
        classes=tuple(LUAD_PALETTE),
        layout=LAYOUT,
        obtained="https://github.com/ChuHan89/WSSS-Tissue",
        read=partial(_read_patches, palette=LUAD_PALETTE, tcga=False),
        counts={"train": 16_678, "val": 300, "test": 307},
    ),
)
