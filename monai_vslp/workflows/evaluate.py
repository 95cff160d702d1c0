"""``monai-vslp evaluate``: segmentations against masks, before and after refinement."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.data.images import image_size
from monai_vslp.io.cohort_report import write_index
from monai_vslp.io.ome_tiff import read_label_tiff, read_map_tiff
from monai_vslp.io.report_style import REPORT_NAME
from monai_vslp.io.summary import SUMMARY_NAME, read_summary
from monai_vslp.metrics.segmentation import ConfusionMatrix, boundary_f1
from monai_vslp.utils.atomic import write_json, write_text
from monai_vslp.utils.errors import ImageReadError, InputError

__all__ = ["evaluate", "format_table"]

Image, _ = optional_import("PIL.Image")
tifffile, _ = optional_import("tifffile")

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
MAPS = {"argmax": "labels_argmax.tif", "refined": "labels.tif"}  # rows of the tables and their files
CONFIDENCES = {"argmax": "confidence.tif", "refined": "segmentation.tif"}  # class probabilities behind the labels, 8 bit
NO_TISSUE = 255  # label of pixels without tissue
BINS = 15  # of calibration, equal over [0, 1]
LARGEST_BOUNDARY = 1 << 26  # px; of greater maps no boundary is scored, its distances would need gigabytes
ALL_CLASSES = "all classes"
REST = "rest"

logger = logging.getLogger(__name__)


def find_mask(folder: Path, stem: str) -> Path | None:
    """The mask of an image: ``<stem>.png``, ``.tif``, ``.tiff`` or ``.bmp``, else the same after ``<stem>_mask``.

    Raises:
        InputError: there are several.
    """
    for name in (stem, f"{stem}_mask"):
        found = [path for suffix in MASK_SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
        if len(found) > 1:
            raise InputError(f"{stem} has several masks ({', '.join(map(str, found))}); keep one of them.")
        if found:
            return found[0]
    return None


def _read_mask(path: Path) -> np.ndarray:
    """Class indices ``[H, W]`` of an index mask, integers; palettes count by index.

    Raises:
        ImageReadError: the file is damaged.
        InputError: it holds colours or fractions instead of indices.
    """
    image_size(path)  # lets Pillow open masks of slides, whose size it would otherwise take for an attack
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            mask = tifffile.imread(path)
        else:
            with Image.open(path) as file:
                mask = np.asarray(file)
    except Exception as error:  # readers and their codecs raise many kinds for damaged files
        raise ImageReadError(f"mask {path} cannot be read; it is damaged, cut short or no image: {error}") from error
    mask = mask.squeeze()
    if mask.ndim == 3 and mask.shape[-1] in (3, 4) and (mask[..., :1] == mask[..., 1:3]).all():
        mask = mask[..., 0]  # a grey mask saved as RGB
    if mask.ndim != 2 or mask.dtype.kind not in "iub":
        raise InputError(
            f"mask {path} must have one channel of class indices, got {mask.dtype} of shape {list(mask.shape)}; "
            "save it as an 8-bit grey PNG with one number per class."
        )
    return mask.astype(np.uint8) if mask.dtype.kind == "b" else mask


def true_labels(path: Path, classes: Sequence[str], ignore_index: int) -> np.ndarray:
    """A mask as uint8 labels, ``NO_TISSUE`` where it does not count."""
    mask = _read_mask(path)
    ignored = mask == ignore_index
    wrong = np.unique(mask[~ignored & ((mask < 0) | (mask >= len(classes)))])
    if wrong.size:
        listed = ", ".join(map(str, wrong[:5].tolist())) + (" …" if wrong.size > 5 else "")
        raise InputError(
            f"mask {path} has the value {listed}; classes are 0 to {len(classes) - 1} ({', '.join(classes)}), and "
            f"{ignore_index} marks pixels that do not count. Number the classes in the order of the table's columns, "
            "or name the value to be ignored."
        )
    return np.where(ignored, NO_TISSUE, mask).astype(np.uint8)


def _on_mask_grid(labels: np.ndarray, shape: tuple[int, int], summary: Mapping[str, Any], path: Path) -> np.ndarray:
    """Labels of an image as they are, those of a slide sampled at the centres of the mask's pixels.

    Args:
        labels: ``[h, w]`` uint8.
        shape: of the mask, px.
        summary: gives the kind, the size of the slide and the downsample of ``labels``.
        path: of the mask, for messages.

    Raises:
        InputError: the mask has another shape (images) or another aspect ratio (slides).
    """
    if labels.shape == shape:
        return labels
    if summary["kind"] != "slide":
        raise InputError(
            f"mask {path} has {shape[1]} x {shape[0]} px, the segmentation of {summary['name']} has {labels.shape[1]} x "
            f"{labels.shape[0]} px; a mask must have the size of its image."
        )
    size = summary["level0_shape"] or labels.shape
    downsample = [summary["downsample"]] * 2 if summary["level0_shape"] else [1.0, 1.0]
    step = [full / side for full, side in zip(size, shape)]  # level-0 px per px of the mask, by row and by column
    whole = max(1, round(max(step)))
    if all(side in (full // whole, math.ceil(full / whole)) for full, side in zip(size, shape)):
        step = [whole, whole]  # reduced by a whole number, the last pixel left out or standing over
    elif abs(shape[0] - size[0] / step[1]) > 1.5 and abs(shape[1] - size[1] / step[0]) > 1.5:
        raise InputError(
            f"mask {path} has {shape[1]} x {shape[0]} px, the slide {summary['name']} has {size[1]} x {size[0]} px: their "
            "aspect ratios differ; the mask must cover the whole slide."
        )
    rows, columns = (
        np.minimum(((np.arange(side) + 0.5) * s / d).astype(np.int64), limit - 1)
        for side, s, d, limit in zip(shape, step, downsample, labels.shape)
    )
    return labels[rows[:, None], columns]


def group_classes(groups: Mapping[str, Sequence[str]] | None, classes: Sequence[str]) -> dict[str, list[list[int]]]:
    """For each group the indices of the rest and of the group.

    Raises:
        InputError: a class is unknown, or a group has none or all of them.
    """
    result = {}
    for name, members in (groups or {}).items():
        members = [members] if isinstance(members, str) else list(members)
        unknown = [member for member in members if member not in classes]
        if unknown:
            raise InputError(f"group {name!r} names unknown classes {', '.join(unknown)}; classes are {', '.join(classes)}.")
        inside = [index for index, label in enumerate(classes) if label in members]
        outside = [index for index in range(len(classes)) if index not in inside]
        if not inside or not outside:
            raise InputError(f"group {name!r} must have some, but not all, of the classes {', '.join(classes)}.")
        result[name] = [outside, inside]
    return result


def _unions(grouping: Mapping[str, Sequence[Sequence[int]]], classes: int) -> dict[str, np.ndarray]:
    """For all classes and for each group the new class of each label, uint8 ``[256]``; what is no class stays."""
    tables = {ALL_CLASSES: np.arange(256, dtype=np.uint8)}
    for name, (_, inside) in grouping.items():
        table = np.arange(256, dtype=np.uint8)
        table[:classes] = 0
        table[inside] = 1
        tables[name] = table
    return tables


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


class _Agreement:
    r"""Boundaries and calibration of one map over all images, for one set of classes.

    Calibration is the expected calibration error of the label that was given to a pixel,
    :math:`\sum_b \frac{n_b}{n}\,|\mathrm{acc}_b - \mathrm{conf}_b|` over bins of its probability, from the pixels of all images
    together (:func:`~monai_vslp.metrics.segmentation.expected_calibration_error` on all of them). Probabilities have 8 bits,
    so that counts per value are enough and no image is kept.

    Args:
        unite: new class of each label, shape ``[256]``, uint8; ``NO_TISSUE`` stays.
    """

    def __init__(self, unite: np.ndarray) -> None:
        self.unite = unite
        self.boundaries: list[float] = []
        self.counts = np.zeros(256, dtype=np.int64)  # pixels by probability
        self.hits = np.zeros(256, dtype=np.int64)  # those with the right label
        self.complete = True  # whether every image had probabilities

    def confidence(self, labels: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Probability of each pixel's label, its class united, uint8 ``[H, W]``; ``values`` are uint8 ``[C, H, W]``."""
        united = self.unite[labels]
        total = np.zeros(labels.shape, dtype=np.uint16)
        for index, plane in enumerate(values):
            total += np.where(self.unite[index] == united, plane, 0)
        return np.minimum(total, 255).astype(np.uint8)  # codes are rounded one by one

    def update(self, labels: np.ndarray, target: np.ndarray, confidence: np.ndarray | None, tolerance: float) -> None:
        """Add one image: labels ``[H, W]`` uint8, the mask and, where known, the probability of each label (uint8)."""
        labels, target = self.unite[labels], self.unite[target]
        kept = (target != NO_TISSUE) & (labels != NO_TISSUE)
        if not kept.any():
            return
        if labels.size <= LARGEST_BOUNDARY:
            self.boundaries.append(boundary_f1(labels, target, tolerance, NO_TISSUE))
        if confidence is None:
            self.complete = False
            return
        self.counts += np.bincount(confidence[kept], minlength=256)
        self.hits += np.bincount(confidence[kept & (labels == target)], minlength=256)

    def compute(self) -> dict[str, float | None]:
        """``boundary_f1``, mean over images, and ``ece``; None where not known."""
        codes = np.arange(256) / 255.0
        index = np.minimum((codes * BINS).astype(np.int64), BINS - 1)
        total = int(self.counts.sum())
        gap = np.abs(np.bincount(index, self.hits - codes * self.counts, minlength=BINS)).sum()
        return {
            "boundary_f1": float(np.mean(self.boundaries)) if self.boundaries else None,
            "ece": float(gap / total) if self.complete and total else None,
        }


def _confidences(path: Path, labels: np.ndarray, classes: Sequence[str]) -> np.ndarray | None:
    """Class probabilities of a map, uint8 ``[C, H, W]``; None where the file is not there.

    Raises:
        ImageReadError: it is damaged or does not fit the labels.
    """
    if not path.is_file():
        return None
    values = read_map_tiff(path)
    if values.dtype != np.uint8 or values.shape != (len(classes), *labels.shape):
        raise ImageReadError(
            f"{path} holds {values.dtype} of shape {list(values.shape)}; expected uint8 of "
            f"{[len(classes), *labels.shape]}, as the labels beside it have; segment this input again."
        )
    return values


def _block(
    name: str, classes: Sequence[str], matrices: Mapping[str, ConfusionMatrix], agreements: Mapping[str, _Agreement]
) -> dict[str, Any]:
    """Scores of all maps over one set of classes; JSON has no NaN, so it becomes None."""
    rows = []
    for key, matrix in matrices.items():
        scores = matrix.compute()
        rows.append(
            {
                "map": key,
                "miou": _plain(scores.miou),
                "mdice": _plain(np.nanmean(scores.dice)),
                "accuracy": _plain(scores.accuracy),
                "proportion_error": _plain(scores.proportion_error),
                "proportion_distance": _plain(scores.proportion_distance),
                **agreements[key].compute(),
                "iou": dict(zip(classes, map(_plain, scores.iou))),
                "dice": dict(zip(classes, map(_plain, scores.dice))),
                "support": dict(zip(classes, scores.support.tolist())),
                "confusion": matrix.counts.tolist(),
            }
        )
    return {"name": name, "classes": list(classes), "rows": rows}


def _segmented(output: Path) -> dict[str, dict[str, Any]]:
    """Summaries by stem.

    Raises:
        InputError: there are none, or their classes differ.
    """
    folders = sorted(path.parent for path in output.glob(f"*/{SUMMARY_NAME}"))
    if not folders:
        raise InputError(f"{output} holds no */{SUMMARY_NAME}; give the output folder of 'monai-vslp segment'.")
    summaries = {folder.name: read_summary(folder) for folder in folders}
    first = summaries[folders[0].name]["classes"]
    for stem, summary in summaries.items():
        if summary["classes"] != first:
            raise InputError(
                f"{output / stem} has the classes {summary['classes']}, {folders[0]} has {first}; evaluate the outputs of one "
                "network at a time."
            )
    return summaries


def evaluate(
    output: str | Path,
    masks: str | Path,
    *,
    ignore_index: int = 255,
    groups: Mapping[str, Sequence[str]] | None = None,
    tolerance: float = 3.0,
) -> dict[str, Any]:
    """Compare segmentations with masks, from the counts of all pixels of all images together.

    The argmax of the network (``labels_argmax.tif``) and the refined map (``labels.tif``) are scored on the same pixels:
    those that the mask annotates and that have a class in both maps. An image and its mask must have one size. For a
    slide the labels are brought to the grid of the mask, finer or coarser, by nearest neighbour.

    Writes ``evaluation.json`` and ``evaluation.csv`` into ``output``, prints the table, and renews the report over all
    inputs where there is one.

    Args:
        output: output folder of ``monai-vslp segment``, one folder per input.
        masks: folder with ``<stem>.png``, ``.tif``, ``.tiff`` or ``.bmp``, or ``<stem>_mask`` and such a suffix: one channel
            of class indices in the order of the classes.
        ignore_index: value of mask pixels that do not count.
        groups: further two-class scores by name, each of some classes, united, against the rest, for instance
            ``{"gland": ["benign_gland", "malignant_gland"]}``.
        tolerance: distance up to which boundaries agree, px of the mask.

    Returns:
        ``classes``; ``images`` and ``without_mask``, stems; ``pixels``, number of those counted; ``unlabelled``, share of the
        annotated pixels that were not counted because the segmentation has no tissue there; ``blocks``, one for all classes
        and one per group, each with ``name``, ``classes`` and ``rows`` for ``argmax`` and ``refined``: ``miou``, ``mdice``,
        ``accuracy``, ``proportion_error``, ``proportion_distance``, by class ``iou``, ``dice`` and ``support`` (px), and
        ``confusion`` (rows: mask); see :class:`~monai_vslp.metrics.segmentation.SegmentationScores`. Further ``boundary_f1``,
        the mean over images of :func:`~monai_vslp.metrics.segmentation.boundary_f1` (maps of more than 67 million px are left
        out), and ``ece``, the calibration error of the labels over all pixels, from ``confidence.tif`` and
        ``segmentation.tif`` where every image has them. None stands for what is not defined.

    Raises:
        InputError: no segmentation or no mask is found, sizes or classes do not fit; names the file.
        ImageReadError: a mask or map cannot be read.
    """
    output, masks = Path(output), Path(masks)
    if not tolerance >= 0:
        raise InputError(f"tolerance of boundaries must be at least 0 px, got {tolerance}.")
    summaries = _segmented(output)
    classes = next(iter(summaries.values()))["classes"]
    grouping = group_classes(groups, classes)
    if not masks.is_dir():
        raise InputError(f"folder of masks {masks} does not exist.")
    found = {stem: path for stem in summaries if (path := find_mask(masks, stem)) is not None}
    without = [stem for stem in summaries if stem not in found]
    if not found:
        stem = without[0]
        raise InputError(
            f"{masks} has a mask for none of the {len(without)} segmented inputs; looked for {stem}.png, {stem}.tif, "
            f"{stem}.tiff, {stem}.bmp and {stem}_mask.*, and likewise for the others."
        )
    matrices = {key: ConfusionMatrix(len(classes), NO_TISSUE) for key in MAPS}
    agreements = {name: {key: _Agreement(unite) for key in MAPS} for name, unite in _unions(grouping, len(classes)).items()}
    annotated = 0
    for stem, path in found.items():
        target = true_labels(path, classes, ignore_index)
        annotated += int((target != NO_TISSUE).sum())

        def placed(values: np.ndarray, target=target, stem=stem, path=path) -> np.ndarray:
            return _on_mask_grid(values, target.shape, summaries[stem], path)

        raw = {key: _labels(output / stem / name, classes) for key, name in MAPS.items()}
        maps = {key: placed(labels) for key, labels in raw.items()}
        for labels in maps.values():
            target[labels == NO_TISSUE] = NO_TISSUE
        for key, labels in maps.items():
            matrices[key].update(labels, target)
            values = _confidences(output / stem / CONFIDENCES[key], raw[key], classes)
            for block in agreements.values():
                sure = None if values is None else placed(block[key].confidence(raw[key], values))
                block[key].update(labels, target, sure, tolerance)
    pixels = int(matrices["refined"].counts.sum())
    if pixels == 0:
        raise InputError(
            f"no pixel could be compared: the masks in {masks} mark none of the tissue that was segmented, or hold nothing but "
            f"the ignored value {ignore_index}."
        )
    blocks = [_block(ALL_CLASSES, classes, matrices, agreements[ALL_CLASSES])]
    for name, members in grouping.items():
        united = {key: matrix.grouped(members) for key, matrix in matrices.items()}
        blocks.append(_block(f"{name} against rest", [REST, name], united, agreements[name]))
    result = {
        "masks": str(masks),
        "ignore_index": ignore_index,
        "classes": classes,
        "images": list(found),
        "without_mask": without,
        "pixels": pixels,
        "unlabelled": 1 - pixels / annotated,
        "blocks": blocks,
    }
    write_json(output / "evaluation.json", result)
    write_text(output / "evaluation.csv", _as_csv(result))
    if without:
        logger.warning("%d of %d inputs have no mask and were left out: %s", len(without), len(summaries), ", ".join(without))
    print(format_table(result))
    if (output / REPORT_NAME).exists():
        write_index(output)
    return result


def _labels(path: Path, classes: Sequence[str]) -> np.ndarray:
    """A label map, checked.

    Raises:
        ImageReadError: it is missing, damaged, or has labels that are no class.
    """
    labels = read_label_tiff(path)
    wrong = labels[(labels >= len(classes)) & (labels != NO_TISSUE)]
    if wrong.size:
        raise ImageReadError(f"{path} has the label {wrong[0]}, but classes are 0 to {len(classes) - 1}; segment it again.")
    return labels


def _as_csv(result: Mapping[str, Any]) -> str:
    """One line per block, map and class; the class ``(all)`` holds the scores over all classes."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["block", "map", "class", "iou", "dice", "support", "accuracy", "proportion_error", "proportion_distance"]
        + ["boundary_f1", "ece"]
    )
    for block in result["blocks"]:
        for row in block["rows"]:
            for name in block["classes"]:
                scores = [row["iou"][name], row["dice"][name], row["support"][name]]
                writer.writerow([block["name"], row["map"], name, *("" if v is None else v for v in scores), *[""] * 5])
            whole = [row["miou"], row["mdice"], sum(row["support"].values())]
            whole += [row["accuracy"], row["proportion_error"], row["proportion_distance"], row["boundary_f1"], row["ece"]]
            writer.writerow([block["name"], row["map"], "(all)", *("" if v is None else v for v in whole)])
    return stream.getvalue()


def format_table(result: Mapping[str, Any]) -> str:
    """The scores of :func:`evaluate` as aligned text for a terminal; Dice by class is in the files alone.

    Args:
        result: what :func:`evaluate` returned, or the content of ``evaluation.json``.
    """

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    count = len(result["images"])
    lines = [
        f"{count} image{'' if count == 1 else 's'}, {result['pixels']:,} px compared"
        f"; {100 * result['unlabelled']:.1f} % of the annotated pixels have no label (no tissue found there)"
    ]
    if result["without_mask"]:
        lines.append(f"without mask, left out: {', '.join(result['without_mask'])}")
    for block in result["blocks"]:
        head = [
            block["name"],
            "mIoU",
            "mDice",
            "accuracy",
            "prop. error",
            "boundary F1",
            "ECE",
            *(f"IoU {name}" for name in block["classes"]),
        ]
        table = [head]
        for row in block["rows"]:
            values = [row["miou"], row["mdice"], row["accuracy"], row["proportion_error"]]
            values += [row.get("boundary_f1"), row.get("ece")]  # files of earlier versions have none
            values += [row["iou"][name] for name in block["classes"]]
            table.append([row["map"], *map(number, values)])
        widths = [max(map(len, column)) for column in zip(*table)]
        lines.append("")
        for cells in table:
            line = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
            lines.append("  ".join(line).rstrip())
    return "\n".join(lines)
