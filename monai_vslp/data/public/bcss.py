"""BCSS: regions of breast cancer slides of TCGA, annotated by a crowd.

Amgad et al., "Structured crowdsourcing enables convolutional segmentation of histology images", Bioinformatics 35 (2019),
btz083; https://github.com/PathologyDataScience/BCSS, whose README gives the layout. ``masks`` holds code PNGs,
``rgbs_colorNormalized`` (the owners' single download) or ``images`` (their script) the regions under the same name, such as
``TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500.png``: slide, place on it and µm/px. ``meta/gtruth_codes.tsv`` (columns
``label`` and ``GT_code``) says what the codes mean. 151 regions of as many slides. Code 0 lies outside the annotated region and
is no class, as the README stresses.

The 22 codes become tumour, stroma, inflammation, necrosis and other. The grouping is this project's: angioinvasion and DCIS
count as tumour, plasma cells and other immune cells as inflammation; ``outside_roi``, ``exclude`` and ``undetermined`` do not
count. The files have no division into splits.
"""

from __future__ import annotations

import csv
import re
from functools import partial
from pathlib import Path

import numpy as np

from monai_vslp.data.images import list_images
from monai_vslp.data.public.cohort import PUBLIC_SETS, PublicItem, PublicSet
from monai_vslp.data.public.files import NOT_COUNTED, instance_ids, relabel
from monai_vslp.utils.errors import InputError

__all__ = ["BCSS", "BCSS_GROUPS"]

CODE_FILES = ("meta/gtruth_codes.tsv", "gtruth_codes.tsv", "masks/gtruth_codes.tsv")
IMAGE_FOLDERS = ("rgbs_colorNormalized", "images")
MPP = re.compile(r"MPP-(\d+(?:\.\d+)?)")
BCSS_GROUPS = {
    "tumor": ("tumor", "angioinvasion", "dcis"),
    "stroma": ("stroma",),
    "inflammatory": ("lymphocytic_infiltrate", "plasma_cells", "other_immune_infiltrate"),
    "necrosis": ("necrosis_or_debris",),
    "other": (
        "glandular_secretions",
        "blood",
        "metaplasia_NOS",
        "fat",
        "mucoid_material",
        "normal_acinus_or_duct",
        "lymphatics",
        "nerve",
        "skin_adnexa",
        "blood_vessel",
        "other",
    ),
}
NO_CLASS = ("outside_roi", "exclude", "undetermined")


def _class_per_code(path: Path) -> tuple[int, ...]:
    """Class index per code as the owners' table numbers them; -1 for numbers without a meaning."""
    index = {label: position for position, labels in enumerate(BCSS_GROUPS.values()) for label in labels}
    index |= dict.fromkeys(NO_CLASS, NOT_COUNTED)
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    codes: dict[int, int] = {}
    for row in rows:
        label, code = (row.get("label") or "").strip(), (row.get("GT_code") or "").strip()
        if label not in index or not code.isdigit():
            raise InputError(f"{path}: {label!r} with code {code!r} is not understood; labels are {', '.join(index)}.")
        codes[int(code)] = index[label]
    if not codes:
        raise InputError(f"{path} has no rows; expected the columns label and GT_code, separated by tabs.")
    return tuple(codes.get(code, -1) for code in range(max(codes) + 1))


def _region_labels(path: Path, classes: tuple[int, ...]) -> np.ndarray:
    return relabel(instance_ids(path), classes, path)


def _read_bcss(root: Path) -> list[PublicItem]:
    classes = _class_per_code(next(path for name in CODE_FILES if (path := root / name).is_file()))
    folder = next(path for name in IMAGE_FOLDERS if (path := root / name).is_dir())
    # The owners' script of 2019 wrote images with an underscore more than masks.
    masks = {path.stem.rstrip("_"): path for path in list_images(root / "masks")}
    items = []
    for image in list_images(folder):
        slide = image.stem.partition("_")[0]
        scale = MPP.search(image.stem)
        file = masks.get(image.stem.rstrip("_"))
        found = {"label_file": file, "labels": partial(_region_labels, file, classes)} if file else {}
        mpp = float(scale[1]) if scale else None
        items.append(PublicItem(image, "regions", "train", "-".join(slide.split("-")[:3]), slide, mpp, **found))
    return items


BCSS = PUBLIC_SETS.add(
    "bcss",
    "BCSS: tissue regions of breast cancer, annotated by a crowd",
    PublicSet(
        title="BCSS",
        classes=tuple(BCSS_GROUPS),
        layout=("masks", " or ".join(IMAGE_FOLDERS), " or ".join(CODE_FILES)),
        obtained="https://github.com/PathologyDataScience/BCSS (its README links one download of images, masks and codes)",
        read=_read_bcss,
        counts={"regions": 151},
    ),
)
