"""What a segmentation leaves on disk, for images and slides alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.io.geojson import labels_to_geojson, write_geojson
from monai_vslp.io.ome_tiff import to_uint8, write_ome_tiff
from monai_vslp.io.report import write_report
from monai_vslp.io.summary import SUMMARY_NAME, build_summary
from monai_vslp.transforms.overlay import LabelOverlay
from monai_vslp.utils.atomic import atomic_path, write_json

__all__ = ["NO_TISSUE", "SegmentationOutput", "write_output"]

Image, _ = optional_import("PIL.Image")

NO_TISSUE = 255  # label of pixels without tissue
PICTURE_SIDE = 1600  # px, longer side of the pictures for people


@dataclass
class SegmentationOutput:
    """One segmented image or slide.

    Attributes:
        name: stem of the outputs.
        kind: ``image`` or ``slide``.
        source: the input file.
        classes: names, in the order of all class axes.
        colors: RGB per class, 0 … 255.
        confidence: first stage, shape ``[C, H, W]``, float in [0, 1].
        segmentation: refined, shape ``[C, H, W]``, float in [0, 1].
        fidelity, regularization: energies per pixel, shape ``[H, W]``, float, nats.
        mass: tissue per pixel, shape ``[H, W]``, float in [0, 1]; None for tissue everywhere.
        thumbnail: the input for people, shape ``[h, w, 3]``, uint8.
        refinement: ``psi``, ``energies``, ``residual``, ``converged``, ``reason``, ``proportions_given``,
            ``proportions_refined``.
        spread: standard deviation between views, shape ``[H, W]``, float; None where one view was used.
        given_spread: standard deviation between raters per class, fractions; None where unknown.
        mpp: µm per px of the maps; None where unknown.
        downsample: level-0 px per px of the maps.
        level0_shape: ``(H, W)`` of the input in px.
        options: how it was made.
        seconds: time per step, s.
    """

    name: str
    kind: str
    source: str
    classes: Sequence[str]
    colors: Sequence[Sequence[int]]
    confidence: np.ndarray
    segmentation: np.ndarray
    fidelity: np.ndarray
    regularization: np.ndarray
    mass: np.ndarray | None
    thumbnail: np.ndarray
    refinement: Mapping[str, Any]
    spread: np.ndarray | None = None
    given_spread: Sequence[float] | None = None
    mpp: float | None = None
    downsample: float = 1.0
    level0_shape: tuple[int, int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def _argmax(values: np.ndarray, mass: np.ndarray | None) -> np.ndarray:
    labels = values.argmax(axis=0).astype(np.uint8)
    if mass is not None:
        labels[mass <= 0] = NO_TISSUE
    return labels


def _reduce(values: np.ndarray) -> np.ndarray:
    """Mean over blocks so that the longer side is at most ``PICTURE_SIDE``; NaN stays out of the means."""
    factor = math.ceil(max(values.shape) / PICTURE_SIDE)
    if factor == 1:
        return values.astype(np.float32)
    height, width = (math.ceil(side / factor) * factor for side in values.shape)
    padded = np.full((height, width), np.nan, dtype=np.float32)
    padded[: values.shape[0], : values.shape[1]] = values
    blocks = padded.reshape(height // factor, factor, width // factor, factor)
    present = np.isfinite(blocks)
    count = present.sum(axis=(1, 3))
    total = np.where(present, blocks, 0.0).sum(axis=(1, 3))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def _overlay(thumbnail: np.ndarray, labels: np.ndarray, colors: Sequence[Sequence[int]]) -> np.ndarray:
    """Class colours over the thumbnail, ``[h, w, 3]``, uint8."""
    rows, cols = (
        np.minimum(np.arange(shown) * full // shown, full - 1) for shown, full in zip(thumbnail.shape[:2], labels.shape)
    )
    return np.moveaxis(LabelOverlay(colors)(np.moveaxis(thumbnail, -1, 0), labels[rows][:, cols][None]), 0, -1)


def _mean_over(values: np.ndarray, mass: np.ndarray | None) -> list[float]:
    if mass is None:
        return values.mean(axis=(1, 2), dtype=np.float64).tolist()
    total = max(float(mass.sum(dtype=np.float64)), 1e-12)
    return [float((plane * mass).sum(dtype=np.float64) / total) for plane in values]


def write_output(folder: str | Path, output: SegmentationOutput) -> Path:
    """Write maps, polygons, pictures, ``summary.json`` and ``report.html`` into ``folder``.

    ``summary.json`` comes last but for the report, so its presence says that the maps are complete.

    Returns:
        Path of ``summary.json``.

    Raises:
        OSError: the disk is full or not writable; files already there are whole.
    """
    folder = Path(folder)
    classes = list(output.classes)
    mass = output.mass
    labels, first = _argmax(output.segmentation, mass), _argmax(output.confidence, mass)
    is_slide = output.kind == "slide"
    options = {"mpp": output.mpp, "pyramid": is_slide}
    described = {"classes": classes, "colors": [list(map(int, c)) for c in output.colors], "no_tissue": NO_TISSUE}
    write_ome_tiff(folder / "labels.tif", labels, channels=["label"], labels=True, description=described, **options)
    write_ome_tiff(folder / "labels_argmax.tif", first, channels=["label"], labels=True, description=described, **options)
    for name, values in (("confidence", output.confidence), ("segmentation", output.segmentation)):
        write_ome_tiff(folder / f"{name}.tif", to_uint8(values), channels=classes, colors=output.colors, **options)
    if output.spread is not None:
        write_ome_tiff(folder / "spread.tif", to_uint8(output.spread), channels=["spread"], **options)
    nothing = None if mass is None else mass <= 0
    energies = {"fidelity": output.fidelity, "regularization": output.regularization}
    if output.spread is not None:
        energies["spread"] = output.spread
    reduced = {
        name: _reduce(values if nothing is None else np.where(nothing, np.nan, values)) for name, values in energies.items()
    }
    with atomic_path(folder / "energies.npz") as temporary:
        np.savez_compressed(temporary, **{name: values.astype(np.float16) for name, values in reduced.items()})
    level0_mpp = None if output.mpp is None else output.mpp / output.downsample
    polygons = labels_to_geojson(
        labels, classes=classes, colors=output.colors, downsample=output.downsample, mpp=level0_mpp, min_area=64
    )
    write_geojson(folder / "segmentation.geojson", polygons)
    for name, picture in (("thumbnail", output.thumbnail), ("overlay", _overlay(output.thumbnail, labels, output.colors))):
        with atomic_path(folder / f"{name}.jpg") as temporary:
            Image.fromarray(picture).save(temporary, quality=88)
    present = labels != NO_TISSUE
    shares = np.bincount(labels[present], minlength=len(classes))[: len(classes)] / max(int(present.sum()), 1)
    refinement = output.refinement
    summary = build_summary(
        name=output.name,
        kind=output.kind,
        source=output.source,
        classes=classes,
        colors=described["colors"],
        shape=list(labels.shape),
        confidence=_mean_over(output.confidence, mass),
        refined=refinement["proportions_refined"],
        labels=shares.tolist(),
        given=refinement["proportions_given"],
        given_spread=output.given_spread,
        psi=None if refinement["proportions_given"] is None else refinement["psi"],
        energies=refinement["energies"],
        residual=refinement["residual"],
        converged=refinement["converged"],
        reason=refinement["reason"],
        tissue_fraction=float(present.mean()),
        mpp=output.mpp,
        level0_shape=list(output.level0_shape or labels.shape),
        downsample=output.downsample,
        options=output.options,
        seconds={name: round(value, 3) for name, value in output.seconds.items()},
    )
    path = write_json(folder / SUMMARY_NAME, summary)
    write_report(folder)
    return path
