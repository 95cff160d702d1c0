"""Public data sets behind one interface: where they are looked up, what they hold, checks, and the project's table."""

from __future__ import annotations

import difflib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import ComponentStore, optional_import

from monai_vslp.data.cohort import SPLITS, write_table
from monai_vslp.data.images import image_size
from monai_vslp.data.public.files import NOT_COUNTED, missing_parts
from monai_vslp.data.public.manifest import MANIFEST, check_manifest
from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.errors import InputError

__all__ = ["PUBLIC_SETS", "PublicCohort", "PublicItem", "PublicSet", "area_fractions", "read_public", "split_by_patient"]

Image, _ = optional_import("PIL.Image")

PUBLIC_SETS = ComponentStore("public data sets", "Sets as their owners distribute them; PublicSet objects.")

MASKS, TRAIN_MASKS, IMAGES = "masks_val", "masks_train", "images"  # folders beside a table
MOST_NAMES = 8
MOST_PROBLEMS = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublicItem:
    """One image of a public data set.

    Attributes:
        image: absolute path.
        subset: the owners' own division that their counts go by (``testA``, ``Polyp``).
        split: ``train``, ``val`` or ``test``.
        patient: identifier, empty where the owners give none.
        slide: identifier, empty where the owners give none.
        mpp: µm/px, None where the owners give none.
        label_file: file of the label map, None where there is none.
        labels: reads the label map: ``[H, W]`` uint8, class indices, 255 for pixels of no class. None where there is none.
        presence: per class whether it occurs, None where not stated.
    """

    image: Path
    subset: str
    split: str
    patient: str = ""
    slide: str = ""
    mpp: float | None = None
    label_file: Path | None = None
    labels: Callable[[], np.ndarray] | None = None
    presence: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class PublicSet:
    """What is known of a public data set; add one with ``PUBLIC_SETS.add(name, description, PublicSet(...))``.

    Attributes:
        title: full name, for messages.
        classes: names, in the order of label indices and table columns.
        layout: what the folder must hold: paths or globs relative to it, alternatives joined by `` or ``.
        obtained: where the set is had, for messages.
        read: gives the items of a folder that has the layout, sorted.
        counts: images per subset as the owners state them; subsets without an entry are not counted.
        unlabelled: how many images lack a label map in the owners' own files.
    """

    title: str
    classes: tuple[str, ...]
    layout: tuple[str, ...]
    obtained: str
    read: Callable[[Path], list[PublicItem]]
    counts: Mapping[str, int] = field(default_factory=dict)
    unlabelled: int = 0


def area_fractions(labels: np.ndarray, classes: int) -> np.ndarray | None:
    r"""Share of each class in the pixels that count.

    .. math:: p_c = \frac{|\{i : y_i = c\}|}{|\{i : y_i \ne 255\}|}

    Args:
        labels: :math:`y`, shape ``[H, W]``, uint8; 255 marks pixels that do not count.
        classes: number of classes.

    Returns:
        Shape ``[classes]``, float64, sums to 1; None where no pixel counts.

    Raises:
        InputError: a label that is no class.
    """
    counts = np.bincount(labels.ravel(), minlength=NOT_COUNTED + 1)
    counts[NOT_COUNTED] = 0
    total = int(counts.sum())
    if counts[classes:].any():
        raise InputError(f"labels must be 0 to {classes - 1} or {NOT_COUNTED}, got {int(counts.nonzero()[0].max())}.")
    return counts[:classes] / total if total else None


def split_by_patient(items: Sequence[PublicItem], val_fraction: float, seed: int) -> list[PublicItem]:
    """Move part of the training images to ``val``, whole patients at a time.

    Patients are drawn in a random order and moved while that brings the number of validation images nearer to
    ``val_fraction`` of the training images. Where there are two patients or more both splits get at least one. The order of
    ``items`` does not matter.

    Args:
        items: those whose split is ``train`` are divided; images without a patient stand for themselves.
        val_fraction: of the training images, in [0, 1).
        seed: of the order.

    Returns:
        The items in their order.

    Raises:
        InputError: ``val_fraction`` is not in [0, 1).
    """
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction must be at least 0 and less than 1, got {val_fraction}; 0.2 is usual.")
    groups: dict[tuple[bool, str], list[int]] = {}
    for index, item in enumerate(items):
        if item.split == "train":
            groups.setdefault((bool(item.patient), item.patient or str(item.image)), []).append(index)
    if val_fraction == 0 or not groups:
        return list(items)
    if len(groups) < 2:
        logger.warning("all training images are of one patient (%s), so none go to val.", next(iter(groups))[1])
        return list(items)
    names = sorted(groups)
    total = sum(map(len, groups.values()))
    target, taken, left = val_fraction * total, 0, len(groups)
    moved: set[int] = set()
    for place in np.random.default_rng(seed).permutation(len(names)):
        group = groups[names[place]]
        if left > 1 and abs(taken + len(group) - target) < abs(taken - target):
            moved.update(group)
            taken, left = taken + len(group), left - 1
    if not moved:  # every patient has far more images than val should
        moved.update(min((groups[name] for name in names), key=len))
    return [replace(item, split="val") if index in moved else item for index, item in enumerate(items)]


def _check_folder(root: Path, known: PublicSet) -> None:
    """Refuse a folder that does not have the set's layout, saying what it has instead."""
    where = f"{known.title} is obtained from {known.obtained}."
    if not root.is_dir():
        raise InputError(f"folder {root} does not exist or is a file. {where}")
    missing = missing_parts(root, known.layout)
    if not missing:
        return
    entries = sorted(path.name + ("/" if path.is_dir() else "") for path in root.iterdir() if not path.name.startswith("."))
    found = ", ".join(entries[:MOST_NAMES]) + (f" and {len(entries) - MOST_NAMES} more" if len(entries) > MOST_NAMES else "")
    inner = [path for path in root.iterdir() if path.is_dir() and not missing_parts(path, known.layout)]
    hint = f" Did you mean {inner[0]}?" if len(inner) == 1 else ""
    raise InputError(
        f"folder {root} is not {known.title} as its owners distribute it: {', '.join(missing)} not found. Expected "
        f"{', '.join(known.layout)}; found {found or 'nothing'}.{hint} {where}"
    )


def read_public(
    name: str, root: str | Path, split: str | None = None, val_fraction: float = 0.2, seed: int = 0
) -> PublicCohort:
    """Read a public data set from a folder as its owners distribute it; label maps are read when they are asked for.

    Args:
        name: one of ``PUBLIC_SETS.names``; hyphens and capitals do not matter.
        root: the unpacked set.
        split: ``train``, ``val`` or ``test``; None for all.
        val_fraction: of the training images, moved to ``val`` by patient where the owners have no validation images.
        seed: of that division.

    Raises:
        InputError: an unknown set or split, a folder that is not the set, or a file name or table that is not the owners'.
    """
    key = name.strip().lower().replace("-", "_")
    if key not in PUBLIC_SETS:
        near = difflib.get_close_matches(key, PUBLIC_SETS.names, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{name!r} is no known data set; known are {', '.join(PUBLIC_SETS.names)}.{hint}")
    if split is not None and split not in SPLITS:
        raise InputError(f"split {split!r} is not one of {', '.join(SPLITS)}; leave it out for all images.")
    known: PublicSet = PUBLIC_SETS[key]
    root = Path(root).absolute()
    _check_folder(root, known)
    items = known.read(root)
    if not items:
        raise InputError(f"folder {root} has the layout of {known.title} but no images. It is obtained from {known.obtained}.")
    found = Counter(item.subset for item in items)
    if not any(item.split == "val" for item in items):
        items = split_by_patient(items, val_fraction, seed)
    chosen = tuple(item for item in items if split is None or item.split == split)
    return PublicCohort(key, known, root, chosen, dict(found))


@dataclass(frozen=True)
class PublicCohort:
    """The images of a public data set.

    Attributes:
        name: key in ``PUBLIC_SETS``.
        definition: what is known of the set.
        root: absolute path of its folder.
        items: images, sorted as the set's reader gives them.
        found: images per subset in the folder, whichever split was asked for.
    """

    name: str
    definition: PublicSet
    root: Path
    items: tuple[PublicItem, ...]
    found: Mapping[str, int]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of label indices."""
        return self.definition.classes

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[PublicItem]:
        return iter(self.items)

    def verify(self) -> dict[str, Any]:
        """Check numbers of images, sizes of label maps and, where ``SHA256SUMS`` lies beside the data, all files' hashes.

        Returns:
            ``images`` (number per subset), ``counted`` (subsets whose number the owners state), ``label_maps`` (how many were
            found to have their image's size, by the headers) and ``manifest`` (whether there was one).

        Raises:
            InputError: lists what is wrong, all together.
        """
        stated = self.definition.counts
        problems = [
            f"{subset}: {self.found.get(subset, 0)} images, the owners state {number}"
            for subset, number in stated.items()
            if self.found.get(subset, 0) != number
        ]
        bare = [item.image.name for item in self.items if item.label_file is None and item.presence is None]
        if len(bare) > self.definition.unlabelled:
            problems.append(f"{len(bare)} images without a label map: {', '.join(bare[:MOST_NAMES])}")
        mapped = [item for item in self.items if item.label_file is not None]
        for item in mapped:
            (height, width), (rows, columns) = image_size(item.image), image_size(item.label_file)
            if (height, width) != (rows, columns):
                problems.append(f"{item.image.name} has {width} x {height} px, its label map {columns} x {rows}")
        manifest = (self.root / MANIFEST).is_file()
        if manifest:
            problems += check_manifest(self.root)
        if problems:
            more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
            listed = "\n  ".join([*problems[:MOST_PROBLEMS], *more])
            raise InputError(
                f"{self.definition.title} in {self.root} is not whole:\n  {listed}\n"
                f"Get it again from {self.definition.obtained}."
            )
        return {
            "images": dict(self.found),
            "counted": [subset for subset in self.found if subset in stated],
            "label_maps": len(mapped),
            "manifest": manifest,
        }

    def to_table(self, path: str | Path, with_train_masks: bool = False, copy_images: bool = False) -> Path:
        """Write ``image,split,patient,<one column per class>`` and the index masks of ``val`` and ``test``.

        Classes get their area fractions (:func:`area_fractions`). Where only their presence is stated, ``>0`` stands for a
        class that occurs and ``0`` for one that does not. Images of unknown proportions stay blank in ``val`` and ``test`` and
        are left out of ``train``. Image paths are relative to the table. The table is written last: where it exists the masks
        are complete.

        Args:
            path: of the table; ``masks_val/<stem>.png`` (uint8 class indices, 255 for pixels of no class) goes beside it.
            with_train_masks: write ``masks_train`` too; learning from proportions needs none.
            copy_images: copy the images into ``images`` beside the table, as ``<subset>_<name>``; needed where images of
                several subsets share a name, because outputs and masks are named by it.

        Returns:
            ``path``.

        Raises:
            InputError: images share a name, a mask folder holds masks of other images, or a label map is not the owners'.
        """
        path = Path(path)
        names = [self._name_of(item, copy_images) for item in self.items]
        folders = {"val": MASKS, "test": MASKS} | ({"train": TRAIN_MASKS} if with_train_masks else {})
        self._check_names(path, names, folders)
        rows = []
        for item, name in zip(self.items, names):
            labels = None if item.labels is None else self._labels(item)
            cells = self._cells(item, labels)
            if not cells and item.split == "train":
                logger.warning("%s: proportions of %s are not known; left out of train.", self.name, item.image.name)
                continue
            if labels is not None and item.split in folders:
                with atomic_path(path.parent / folders[item.split] / f"{Path(name).stem}.png") as temporary:
                    Image.fromarray(labels).save(temporary)
            image = _relative(item.image, path.parent)
            if copy_images:
                image = f"{IMAGES}/{name}"
                with atomic_path(path.parent / image) as temporary:
                    shutil.copyfile(item.image, temporary)
            mpp = {} if item.mpp is None else {"mpp": f"{item.mpp:g}"}
            rows.append({"image": image, "split": item.split, "patient": item.patient, **mpp, **cells})
        return write_table(path, rows, self.classes)

    @staticmethod
    def _name_of(item: PublicItem, copy_images: bool) -> str:
        return f"{item.subset}_{item.image.name}".replace(" ", "_") if copy_images else item.image.name

    def _check_names(self, path: Path, names: Sequence[str], folders: Mapping[str, str]) -> None:
        """Refuse names that two images share, and mask folders with masks of other images.

        Another seed would otherwise leave masks of what are training images now.
        """
        stems = [Path(name).stem for name in names]
        twins = [stem for stem, count in Counter(stems).items() if count > 1]
        if twins:
            raise InputError(
                f"{len(twins)} names belong to several images ({', '.join(twins[:MOST_NAMES])}), and masks are named by them. "
                "Set copy_images=True, which copies the images under names of their own."
            )
        for folder in sorted(set(folders.values())):
            mine = {stem for stem, item in zip(stems, self.items) if folders.get(item.split) == folder and item.labels}
            there = path.parent / folder
            others = sorted(file.name for file in there.glob("*.png") if file.stem not in mine) if there.is_dir() else []
            if others:
                raise InputError(
                    f"folder {there} holds masks of other images ({', '.join(others[:MOST_NAMES])}), perhaps of another split "
                    "or seed; remove it or write the table to another folder."
                )

    def _labels(self, item: PublicItem) -> np.ndarray:
        labels = item.labels()
        if labels.shape != image_size(item.image):
            raise InputError(
                f"label map {item.label_file} has shape {list(labels.shape)}, its image {item.image.name} "
                f"{list(image_size(item.image))} (rows, columns); get the set again from {self.definition.obtained}."
            )
        return labels

    def _cells(self, item: PublicItem, labels: np.ndarray | None) -> dict[str, str]:
        """Cells of the class columns; empty where nothing is known."""
        if labels is not None:
            fractions = area_fractions(labels, len(self.classes))
            return {} if fractions is None else {name: f"{value:.8f}" for name, value in zip(self.classes, fractions)}
        if item.presence is not None and any(item.presence):
            return {name: ">0" if occurs else "0" for name, occurs in zip(self.classes, item.presence)}
        return {}


def _relative(image: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(image, folder.absolute())).as_posix()
    except ValueError:  # another drive
        return str(image)
