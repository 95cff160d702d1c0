"""What a segmentation leaves on disk, for images and slides alike."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.io.dicom_seg import write_dicom_seg
from monai_vslp.io.dsa import geojson_to_dsa, write_dsa
from monai_vslp.io.geojson import labels_to_geojson, write_geojson
from monai_vslp.io.lazy_maps import Derived, MapLike, read_window
from monai_vslp.io.ome_tiff import to_uint8, write_ome_tiff
from monai_vslp.io.ome_zarr import write_ome_zarr
from monai_vslp.io.report import write_report
from monai_vslp.io.summary import SUMMARY_NAME, build_summary
from monai_vslp.io.table import write_proportions
from monai_vslp.io.viewer import VIEWER_FOLDER, write_viewer
from monai_vslp.transforms.overlay import LabelOverlay
from monai_vslp.utils.atomic import atomic_path, write_json
from monai_vslp.utils.errors import InputError
from monai_vslp.utils.plugins import PluginStore
from monai_vslp.variational.outofcore import NO_TISSUE
from monai_vslp.variational.windows import Window, split_windows

__all__ = ["DEFAULT_FORMATS", "NO_TISSUE", "SLIDE_FORMATS", "WRITERS", "SegmentationOutput", "write_output"]

Image, _ = optional_import("PIL.Image")

PICTURE_SIDE = 1600  # px, longer side of the pictures for people
BLOCK = 1024  # px, side of the windows of a pass over the maps; the same for any input, so that sums are the same
SMALLEST_POLYGON = 64  # px², regions of labels below it are left out of the polygons
DEFAULT_FORMATS = ("ome_tiff", "geojson", "table")
SLIDE_FORMATS = (*DEFAULT_FORMATS, "viewer")
WRITERS = PluginStore(
    "output writers",
    "Functions writer(folder, output) that write a SegmentationOutput into a folder in some format and return the paths of the "
    "files and folders they wrote; add your own and name it in the formats of write_output.",
)


@dataclass
class SegmentationOutput:
    """One segmented image or slide.

    Maps may be NumPy or Zarr arrays, or others with ``shape``, ``dtype`` and NumPy's slicing: they are read by blocks, so that
    memory does not grow with the slide. Fractions may also be uint8, where 0 … 255 stand for 0 … 1.

    Attributes:
        name: stem of the outputs.
        kind: ``image`` or ``slide``.
        source: the input file.
        classes: names, in the order of all class axes.
        colors: RGB per class, 0 … 255.
        confidence: first stage, shape ``[C, H, W]``, in [0, 1].
        segmentation: refined, shape ``[C, H, W]``, in [0, 1].
        fidelity, regularization: energies per pixel, shape ``[H, W]``, float, nats.
        mass: tissue per pixel, shape ``[H, W]``, in [0, 1]; None for tissue everywhere.
        thumbnail: the input for people, shape ``[h, w, 3]``, uint8; None to make it from ``image``.
        refinement: ``psi``, ``energies``, ``residual``, ``converged``, ``reason``, ``proportions_given``,
            ``proportions_refined``.
        spread: standard deviation between views, shape ``[H, W]``, in [0, 1]; None where one view was used.
        given_spread: standard deviation between raters per class, fractions; None where unknown.
        mpp: µm per px of the maps; None where unknown.
        downsample: level-0 px per px of the maps.
        level0_shape: ``(H, W)`` of the input in px.
        options: how it was made.
        seconds: time per step, s.
        labels: class indices, shape ``[H, W]``, uint8, ``NO_TISSUE`` where there is none; None for the largest of
            ``segmentation``.
        image: the input on the grid of the maps, shape ``[3, H, W]``, uint8; None where there is a thumbnail.
        regions: parts with proportions of their own, as :func:`~monai_vslp.io.summary.build_summary` takes them.
        views: how many test-time views were used, and where; JSON-like.
        tolerance_um: how far simplified polygons may lie from the pixel edges, µm; None for the default in px.
    """

    name: str
    kind: str
    source: str
    classes: Sequence[str]
    colors: Sequence[Sequence[int]]
    confidence: MapLike
    segmentation: MapLike
    fidelity: MapLike
    regularization: MapLike
    mass: MapLike | None
    thumbnail: np.ndarray | None
    refinement: Mapping[str, Any]
    spread: MapLike | None = None
    given_spread: Sequence[float] | None = None
    mpp: float | None = None
    downsample: float = 1.0
    level0_shape: tuple[int, int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    labels: MapLike | None = None
    image: MapLike | None = None
    regions: Sequence[Mapping[str, Any]] = ()
    views: Any = None
    tolerance_um: float | None = None

    def __post_init__(self) -> None:
        size = tuple(int(side) for side in self.segmentation.shape[-2:])
        leading = {"confidence": (len(self.classes),), "segmentation": (len(self.classes),), "image": (3,)}
        for name in (*leading, "fidelity", "regularization", "mass", "spread", "labels"):
            values, wanted = getattr(self, name), (*leading.get(name, ()), *size)
            if values is not None and tuple(values.shape) != wanted:
                raise InputError(f"{self.name}: {name} must have shape {list(wanted)}, got {list(values.shape)}.")
        if self.labels is not None and self.labels.dtype != np.uint8:
            raise InputError(f"{self.name}: labels must be uint8, got {self.labels.dtype}.")

    @property
    def level0_mpp(self) -> float | None:
        """µm per level-0 px; None where unknown."""
        return None if self.mpp is None else self.mpp / self.downsample

    @cached_property
    def label_map(self) -> MapLike:
        """Labels of the refined map, shape ``[H, W]``, uint8, ``NO_TISSUE`` where there is none."""
        return _largest(self.segmentation, self.mass) if self.labels is None else self.labels

    @cached_property
    def first_label_map(self) -> MapLike:
        """Labels of the first stage, as ``label_map``."""
        return _largest(self.confidence, self.mass)

    @cached_property
    def picture(self) -> np.ndarray:
        """The thumbnail, or means of the image over blocks, shape ``[h, w, 3]``, uint8."""
        if self.thumbnail is not None:
            return self.thumbnail
        if self.image is None:
            raise InputError(f"{self.name}: neither thumbnail nor image was given; pass one of them, uint8.")
        return np.round(np.moveaxis(_reduce(self.image), 0, -1)).astype(np.uint8)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``; found by one pass over maps when first asked for."""
        return _summarize(self)


def _fractions(values: np.ndarray) -> np.ndarray:
    """float32 in [0, 1]; uint8 codes it as 0 … 255."""
    return values.astype(np.float32) / 255.0 if values.dtype == np.uint8 else values.astype(np.float32)


def _codes(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.uint8 else to_uint8(values.astype(np.float32))


def _coded(values: MapLike) -> Derived:
    """Fractions as uint8."""
    return Derived(_codes, values, dtype=np.uint8, leading=tuple(values.shape[:-2]))


def _argmax(values: np.ndarray, mass: np.ndarray | None) -> np.ndarray:
    """The first of the largest; plane by plane, which is several times faster than NumPy's along the first axis."""
    labels = np.zeros(values.shape[1:], dtype=np.uint8)
    best = values[0].astype(np.float32)
    for index, plane in enumerate(values[1:], start=1):
        larger = plane > best
        labels[larger] = index
        np.copyto(best, plane, where=larger)
    if mass is not None:
        labels[mass <= 0] = NO_TISSUE
    return labels


def _largest(values: MapLike, mass: MapLike | None) -> MapLike:
    labels = Derived(_argmax, values, mass, dtype=np.uint8)
    return labels[...] if isinstance(values, np.ndarray) else labels  # what is in memory is found once


def _windows(shape: Sequence[int], side: int = BLOCK) -> list[Window]:
    return split_windows((int(shape[-2]), int(shape[-1])), (side, side))


def _reduce(values: MapLike, mass: MapLike | None = None) -> np.ndarray:
    """Mean over blocks of tissue so that the longer side is at most ``PICTURE_SIDE``, ``[..., h, w]``, float32, NaN without."""
    factor = math.ceil(max(values.shape[-2:]) / PICTURE_SIDE)
    reduced = np.empty([*values.shape[:-2], *(-(-side // factor) for side in values.shape[-2:])], dtype=np.float32)
    for window in _windows(values.shape, factor * -(-BLOCK // factor)):
        block = read_window(values, *window.core).astype(np.float32)
        if mass is not None:
            block[..., read_window(mass, *window.core) <= 0] = np.nan
        height, width = (-(-side // factor) for side in block.shape[-2:])
        missing = [(0, full * factor - side) for full, side in zip((height, width), block.shape[-2:])]
        padded = np.pad(block, [*[(0, 0)] * (block.ndim - 2), *missing], constant_values=np.nan)
        cells = padded.reshape(*block.shape[:-2], height, factor, width, factor)
        present = np.isfinite(cells)
        count = present.sum(axis=(-3, -1))
        total = np.where(present, cells, 0.0).sum(axis=(-3, -1))
        top, left = (part.start // factor for part in window.core)
        means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        reduced[..., top : top + height, left : left + width] = means
    return reduced


def _nearest(array: MapLike, size: Sequence[int]) -> np.ndarray:
    """``[H, W]`` sampled on a grid of ``size`` (height, width)."""
    rows, cols = (np.minimum(np.arange(shown) * full // shown, full - 1) for shown, full in zip(size, array.shape))
    found = np.empty((len(rows), len(cols)), dtype=array.dtype)
    for window in _windows(array.shape):
        (top, bottom), (left, right) = (
            np.searchsorted(at, (part.start, part.stop)) for at, part in zip((rows, cols), window.core)
        )
        if top < bottom and left < right:
            block = read_window(array, *window.core)
            at = np.ix_(rows[top:bottom] - window.core[0].start, cols[left:right] - window.core[1].start)
            found[top:bottom, left:right] = block[at]
    return found


def _overlay(thumbnail: np.ndarray, labels: MapLike, colors: Sequence[Sequence[int]]) -> np.ndarray:
    """Class colours over the thumbnail, ``[h, w, 3]``, uint8."""
    shown = _nearest(labels, thumbnail.shape[:2])
    return np.moveaxis(LabelOverlay(colors)(np.moveaxis(thumbnail, -1, 0), shown[None]), 0, -1)


def _summarize(output: SegmentationOutput) -> dict[str, Any]:
    classes, labels, mass = list(output.classes), output.label_map, output.mass
    counts = np.zeros(256, dtype=np.int64)
    sums, total = np.zeros(len(classes)), 0.0
    for window in _windows(labels.shape):
        counts += np.bincount(read_window(labels, *window.core).ravel(), minlength=256)
        planes = _fractions(read_window(output.confidence, *window.core))
        if mass is None:
            sums, total = sums + planes.sum(axis=(1, 2), dtype=np.float64), total + planes[0].size
        else:
            share = read_window(mass, *window.core).astype(np.float32)
            sums, total = (
                sums + [(plane * share).sum(dtype=np.float64) for plane in planes],
                total + share.sum(dtype=np.float64),
            )
    present = int(counts.sum() - counts[NO_TISSUE])
    refinement = output.refinement
    return build_summary(
        name=output.name,
        kind=output.kind,
        source=output.source,
        classes=classes,
        colors=output.colors,
        shape=labels.shape,
        confidence=(sums / max(total, 1e-12)).tolist(),
        refined=refinement["proportions_refined"],
        labels=(counts[: len(classes)] / max(present, 1)).tolist(),
        given=refinement["proportions_given"],
        given_spread=output.given_spread,
        psi=None if refinement["proportions_given"] is None else refinement["psi"],
        energies=refinement["energies"],
        residual=refinement["residual"],
        converged=refinement["converged"],
        reason=refinement["reason"],
        tissue_fraction=present / int(counts.sum()),
        mpp=output.mpp,
        level0_shape=output.level0_shape,
        downsample=output.downsample,
        regions=output.regions,
        views=output.views,
        options=output.options,
        seconds=output.seconds,
    )


@WRITERS.add_def("ome_tiff", "labels, confidences, refined map and spread as OME-TIFF, those of slides as pyramids")
def _write_maps(folder: Path, output: SegmentationOutput) -> list[Path]:
    classes = list(output.classes)
    options = {"mpp": output.mpp, "pyramid": output.kind == "slide"}
    described = {"classes": classes, "colors": [list(map(int, c)) for c in output.colors], "no_tissue": NO_TISSUE}
    paths = [
        write_ome_tiff(folder / f"{name}.tif", labels, channels=["label"], labels=True, description=described, **options)
        for name, labels in (("labels", output.label_map), ("labels_argmax", output.first_label_map))
    ]
    for name, values in (("confidence", output.confidence), ("segmentation", output.segmentation)):
        path = folder / f"{name}.tif"
        paths.append(write_ome_tiff(path, _coded(values), channels=classes, colors=output.colors, **options))
    if output.spread is not None:
        paths.append(write_ome_tiff(folder / "spread.tif", _coded(output.spread), channels=["spread"], **options))
    return paths


def _polygons(output: SegmentationOutput) -> dict[str, Any]:
    return labels_to_geojson(
        output.label_map,
        classes=list(output.classes),
        colors=output.colors,
        downsample=output.downsample,
        mpp=output.level0_mpp,
        min_area=SMALLEST_POLYGON,
        tolerance_um=output.tolerance_um,
    )


@WRITERS.add_def("energies", "energies per pixel as OME-TIFF, float32 in nats, those of slides as pyramids")
def _write_energy_maps(folder: Path, output: SegmentationOutput) -> list[Path]:
    both = Derived(
        lambda *parts: np.stack(parts).astype(np.float32),
        output.fidelity,
        output.regularization,
        dtype=np.float32,
        leading=(2,),
    )
    names = ["fidelity energy", "regularization energy"]
    options = {"mpp": output.mpp, "pyramid": output.kind == "slide"}
    return [write_ome_tiff(folder / "energies.tif", both, channels=names, **options)]


@WRITERS.add_def("geojson", "labels as polygons for QuPath")
def _write_polygons(folder: Path, output: SegmentationOutput) -> list[Path]:
    return [write_geojson(folder / "segmentation.geojson", _polygons(output))]


@WRITERS.add_def("dsa", "labels as an annotation for the Digital Slide Archive")
def _write_annotation(folder: Path, output: SegmentationOutput) -> list[Path]:
    attributes = {"proportions": output.summary["proportions"]}
    annotation = geojson_to_dsa(_polygons(output), output.name, description="monai_vslp", attributes=attributes)
    return [write_dsa(folder / "annotation.json", annotation)]


@WRITERS.add_def("table", "proportions as CSV and JSON")
def _write_table(folder: Path, output: SegmentationOutput) -> list[Path]:
    return write_proportions(folder, output.summary)


@WRITERS.add_def("ome_zarr", "image, refined map, confidences and labels as OME-Zarr, for slides")
def _write_zarr(folder: Path, output: SegmentationOutput) -> list[Path]:
    if output.image is None:
        raise InputError(f"{output.name}: OME-Zarr is written for slides; images have no map of the input beside them.")
    return [
        write_ome_zarr(
            folder / f"{output.name}.ome.zarr",
            image=output.image,
            u=output.segmentation,
            confidence=output.confidence,
            labels=output.label_map,
            mpp=output.mpp,
            classes=output.classes,
            colors=output.colors,
            attributes={"source": output.source, **output.options},
        )
    ]


@WRITERS.add_def("dicom_seg", "labels as a DICOM Segmentation, for slides")
def _write_dicom(folder: Path, output: SegmentationOutput) -> list[Path]:
    if output.mpp is None or output.level0_shape is None:
        raise InputError(f"{output.name}: a DICOM Segmentation needs µm/px and size of the input; it is for slides.")
    return [
        write_dicom_seg(
            folder / "labels.dcm",
            output.label_map,
            classes=output.classes,
            colors=output.colors,
            mpp=output.mpp,
            level0_shape=output.level0_shape,
            downsample=output.downsample,
            source=output.source,
            parameters=output.options,
        )
    ]


@WRITERS.add_def("viewer", "tiles of the input, the maps and the energies that the viewer in report.html shows")
def _write_tiles(folder: Path, output: SegmentationOutput) -> list[Path]:
    image = np.moveaxis(output.picture, -1, 0) if output.image is None else output.image
    layers = {"image": image, "labels": output.label_map, "network": output.first_label_map}
    layers |= {"confidence": output.confidence, "fidelity": output.fidelity, "regularization": output.regularization}
    if output.spread is not None:
        layers["spread"] = output.spread
    write_viewer(
        folder / VIEWER_FOLDER,
        layers,
        classes=output.classes,
        colors=output.colors,
        level0_shape=output.level0_shape or output.label_map.shape,
        mpp=output.level0_mpp,
    )
    return [folder / VIEWER_FOLDER]


def _earlier_files(folder: Path) -> set[str]:
    """What the formats of an earlier call wrote into a folder, as paths in it; empty where that is not known."""
    try:
        written = json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))["files"].values()
        names = {str(name) for files in written for name in files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()  # none, of an earlier version, or damaged: then nothing is known, so nothing is deleted
    return {name for name in names if name not in ("", ".") and ".." not in Path(name).parts and not Path(name).is_absolute()}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_energies(path: Path, output: SegmentationOutput) -> None:
    energies = {"fidelity": output.fidelity, "regularization": output.regularization}
    reduced = {name: _reduce(values, output.mass) for name, values in energies.items()}
    if output.spread is not None:
        scale = 255.0 if output.spread.dtype == np.uint8 else 1.0
        reduced["spread"] = _reduce(output.spread, output.mass) / scale
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **{name: values.astype(np.float16) for name, values in reduced.items()})


def write_output(folder: str | Path, output: SegmentationOutput, formats: Sequence[str] = DEFAULT_FORMATS) -> Path:
    """Write maps, polygons, tables, pictures, ``summary.json`` and ``report.html`` into ``folder``.

    ``summary.json`` comes last but for the report, so its presence says that the rest is complete. It lists the files of each
    format; those of formats that an earlier call wrote and this one does not are deleted, so that no map lies beside another's.

    Args:
        folder: made where it is not there.
        output: what to write.
        formats: names in ``WRITERS``; energies, pictures, summary and report are always written.

    Returns:
        Path of ``summary.json``.

    Raises:
        ValueError: a format that nobody registered; nothing was written then.
        OSError: the disk is full or not writable; files already there are whole.
    """
    folder = Path(folder)
    writers: list[Callable[[Path, SegmentationOutput], list[Path]]] = [WRITERS.find(name) for name in formats]
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, writer in zip(formats, writers):
        paths = [path for path in writer(folder, output) if path.is_relative_to(folder)]
        files[name] = [path.relative_to(folder).as_posix() for path in paths]
    for name in _earlier_files(folder) - {name for names in files.values() for name in names}:
        _remove(folder / name)
    _write_energies(folder / "energies.npz", output)
    pictures = {"thumbnail": output.picture, "overlay": _overlay(output.picture, output.label_map, output.colors)}
    for name, picture in pictures.items():
        with atomic_path(folder / f"{name}.jpg") as temporary:
            Image.fromarray(picture).save(temporary, quality=88)
    path = write_json(folder / SUMMARY_NAME, output.summary | {"files": files})
    write_report(folder)
    return path
