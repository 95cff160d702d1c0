"""GlaS and CRAG: glands of the colon as instance maps, from the Tissue Image Analytics Centre, University of Warwick.

GlaS: Sirinukunwattana et al., "Gland segmentation in colon histology images: the GlaS challenge contest", Medical Image
Analysis 35 (2017), arXiv 1603.00275. One folder holds ``train_1.bmp``, its instance map ``train_1_anno.bmp``, likewise
``testA_*`` and ``testB_*``, and ``Grade.csv`` with the columns ``name``, ``patient ID``, ``grade (GlaS)`` (benign or malignant)
and ``grade (Sirinukunwattana et al. 2015)``; some headers and cells begin with a blank. 85, 60 and 20 images at 20x, 0.62
µm/px. The owners' test images are partly of the patients of the training images.

CRAG: Graham et al., "MILD-Net", Medical Image Analysis 52 (2019), arXiv 1806.01963. ``train`` and ``valid`` with ``Images``,
``Annotation`` (instance maps of the same name) and ``Overlay``; 173 and 40 images at 20x, 0.55 µm/px. The README of the set
calls the 40 images of ``valid`` the test set, and their files are named ``test_*.png``: they are ``test`` here. Neither patient
nor slide of an image is published, so a division of the training images may part those of one patient.
"""

from __future__ import annotations

import csv
import logging
from functools import partial
from pathlib import Path

import numpy as np

from monai_vslp.data.images import list_images
from monai_vslp.data.public.cohort import PUBLIC_SETS, PublicItem, PublicSet
from monai_vslp.data.public.files import instance_ids
from monai_vslp.utils.errors import InputError

__all__ = ["CRAG", "GLAS"]

GLAS_SPLITS = {"train": "train", "testA": "test", "testB": "test"}
GLAS_GRADES = ("benign", "malignant")  # class 1 and 2
GLAS_COLUMNS = ("name", "patient ID", "grade (GlaS)")
GLAS_MPP, CRAG_MPP = 0.62, 0.55  # µm/px

logger = logging.getLogger(__name__)


def _gland_labels(path: Path, index: int) -> np.ndarray:
    """Every gland of an instance map as class ``index``: ``[H, W]`` uint8."""
    return np.where(instance_ids(path) > 0, index, 0).astype(np.uint8)


def _grades(path: Path) -> dict[str, tuple[str, int]]:
    """Patient and class index per image name."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()  # any line ends: the file has been passed on with several
    rows = [[cell.strip() for cell in cells] for cells in csv.reader(lines) if any(map(str.strip, cells))]
    header = rows[0] if rows else []
    absent = [name for name in GLAS_COLUMNS if name not in header]
    if absent:
        raise InputError(f"{path} lacks the column {', '.join(absent)}; it has {', '.join(header) or 'nothing'}.")
    grades = {}
    for cells in rows[1:]:
        row = dict(zip(header, cells))
        name, patient, grade = (row.get(column, "") for column in GLAS_COLUMNS)
        if grade not in GLAS_GRADES:
            raise InputError(f"{path}: grade (GlaS) of {name!r} is {grade!r}; expected {' or '.join(GLAS_GRADES)}.")
        grades[name] = (patient, 1 + GLAS_GRADES.index(grade))
    return grades


def _number(path: Path) -> tuple[str, int, str]:
    """Sorts ``train_2`` before ``train_10``."""
    subset, _, number = path.stem.partition("_")
    return subset, int(number) if number.isdigit() else -1, path.stem


def _read_glas(root: Path) -> list[PublicItem]:
    grades = _grades(root / "Grade.csv")
    items = []
    for image in sorted(list_images(root), key=_number):
        subset = image.stem.partition("_")[0]
        if image.suffix != ".bmp" or image.stem.endswith("_anno") or subset not in GLAS_SPLITS:
            continue
        if image.stem not in grades:
            raise InputError(f"{root / 'Grade.csv'} has no row for {image.stem!r}; get the table that belongs to the images.")
        patient, index = grades[image.stem]
        file = image.with_name(f"{image.stem}_anno.bmp")
        found = {"label_file": file, "labels": partial(_gland_labels, file, index)} if file.is_file() else {}
        items.append(PublicItem(image, subset, GLAS_SPLITS[subset], patient, mpp=GLAS_MPP, **found))
    return items


def _read_crag(root: Path) -> list[PublicItem]:
    items = []
    for subset, folders in (("train", ("train",)), ("test", ("valid", "test"))):
        folder = next(root / name for name in folders if (root / name / "Images").is_dir())
        annotation = next(path for name in ("Annotation", "Annotations") if (path := folder / name).is_dir())
        for image in sorted(list_images(folder / "Images"), key=_number):
            file = annotation / image.name
            found = {"label_file": file, "labels": partial(_gland_labels, file, 1)} if file.is_file() else {}
            items.append(PublicItem(image, subset, subset, mpp=CRAG_MPP, **found))
    logger.info("CRAG names no patients: images of one patient may come to lie in train and in val.")
    return items


GLAS = PUBLIC_SETS.add(
    "glas",
    "GlaS (Warwick-QU): benign and malignant glands of the colon",
    PublicSet(
        title="GlaS (Warwick-QU)",
        classes=("other", "benign_gland", "malignant_gland"),
        layout=("Grade.csv", "train_*.bmp", "train_*_anno.bmp"),
        obtained="https://warwick.ac.uk/fac/cross_fac/tia/data/glascontest/",
        read=_read_glas,
        counts={"train": 85, "testA": 60, "testB": 20},
    ),
)

CRAG = PUBLIC_SETS.add(
    "crag",
    "CRAG: glands of colorectal adenocarcinoma",
    PublicSet(
        title="CRAG",
        classes=("other", "gland"),
        layout=(
            "train/Images",
            "train/Annotation or train/Annotations",
            "valid/Images or test/Images",
            "valid/Annotation or valid/Annotations or test/Annotation or test/Annotations",
        ),
        obtained="https://warwick.ac.uk/fac/cross_fac/tia/data/mildnet/",
        read=_read_crag,
        counts={"train": 173, "test": 40},
    ),
)
