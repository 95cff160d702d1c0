"""EBHI-Seg: biopsies of the bowel in six stages of differentiation.

Shi et al., "EBHI-Seg: a novel enteroscope biopsy histopathological hematoxylin and eosin image dataset for image segmentation
tasks", Frontiers in Medicine 10 (2023) 1114673. One folder per stage with ``image`` and ``label``, PNGs of 224 x 224 px of the
same name, at 400x. What a label image marks is of the folder's class, the rest is ``other``. The paper counts 76, 474, 639,
186, 58 and 795 images. https://github.com/dataset-ninja/ebhi-seg found those 2,228 with two of them unlabelled, so as
many may be.

Names such as ``GT2012118-1-400-001.png`` are understood as case, section, magnification and number (the owners do not explain
them); the case stands for the patient, without regard to capitals. The owners divide images at random; here cases stay
together.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from monai_vslp.data.images import list_images
from monai_vslp.data.public.cohort import PUBLIC_SETS, PublicItem, PublicSet
from monai_vslp.data.public.files import foreground

__all__ = ["EBHI_SEG"]

STAGES = {  # folder: class, images
    "Normal": ("normal", 76),
    "Polyp": ("polyp", 474),
    "Low-grade IN": ("low_grade_neoplasia", 639),
    "High-grade IN": ("high_grade_neoplasia", 186),
    "Serrated adenoma": ("serrated_adenoma", 58),
    "Adenocarcinoma": ("adenocarcinoma", 795),
}


def _stage_labels(path: Path, index: int) -> np.ndarray:
    return np.where(foreground(path), index, 0).astype(np.uint8)


def _read_ebhi(root: Path) -> list[PublicItem]:
    items = []
    for index, stage in enumerate(STAGES, start=1):
        for image in list_images(root / stage / "image"):
            case, _, rest = image.stem.partition("-")
            file = root / stage / "label" / image.name
            found = {"label_file": file, "labels": partial(_stage_labels, file, index)} if file.is_file() else {}
            case = case.upper()  # GTXC and GTxc both occur
            section = rest.partition("-")[0]
            items.append(PublicItem(image, stage, "train", case, f"{case}-{section}" if section else "", **found))
    return items


EBHI_SEG = PUBLIC_SETS.add(
    "ebhi_seg",
    "EBHI-Seg: biopsies of the bowel in six stages of differentiation",
    PublicSet(
        title="EBHI-Seg",
        classes=("other", *(name for name, _ in STAGES.values())),
        layout=tuple(f"{stage}/{kind}" for stage in STAGES for kind in ("image", "label")),
        obtained="https://figshare.com/articles/dataset/EBHI-SEG/21540159/1",
        read=_read_ebhi,
        counts={stage: number for stage, (_, number) in STAGES.items()},
        unlabelled=2,
    ),
)
