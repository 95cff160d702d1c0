"""What is sent back: files for people's programs, and numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.apps.label.bundle_model import View
from monai_vslp.apps.label.session import Solution
from monai_vslp.apps.label.strokes import NOT_PAINTED
from monai_vslp.io.dsa import geojson_to_dsa, write_dsa
from monai_vslp.io.geojson import labels_to_geojson, write_geojson
from monai_vslp.io.ome_tiff import write_ome_tiff
from monai_vslp.variational.outofcore import NO_TISSUE

__all__ = ["describe", "write_result"]

Image, _ = optional_import("PIL.Image")

SMALLEST_POLYGON = 64  # px² of the labels


def label_map(view: View, solution: Solution) -> np.ndarray:
    """Class indices, shape ``[H, W]``, uint8, ``NO_TISSUE`` where there is none."""
    labels = solution.result.labels.numpy().astype(np.uint8)
    if view.mass is not None:
        labels[view.mass.numpy() <= 0] = NO_TISSUE
    return labels


def _moved(collection: dict[str, Any], origin: tuple[float, float]) -> dict[str, Any]:
    for feature in collection["features"]:
        rings = feature["geometry"]["coordinates"]
        feature["geometry"]["coordinates"] = [[[x + origin[0], y + origin[1]] for x, y in ring] for ring in rings]
    return collection


def write_result(
    kind: str, view: View, solution: Solution, colors: Sequence[Sequence[int]], name: str, attributes: Mapping[str, Any]
) -> Path | None:
    """Write one result into a temporary file, which the server deletes when it is sent.

    Args:
        kind: ``labels`` (PNG, class index + 1, 0 for no tissue), ``geojson``, ``dsa``, ``layers`` (OME-TIFF, float32:
            confidence and segmentation of each class, both energies in nats per pixel), or ``none``.
        view, solution: what was found.
        colors: RGB per class, 0 … 255.
        name: of the image.
        attributes: kept with a DSA annotation.
    """
    if kind == "none":
        return None
    classes = list(view.classes)
    suffix = {"labels": ".png", "geojson": ".geojson", "dsa": ".json", "layers": ".tif"}[kind]
    with tempfile.NamedTemporaryFile(prefix=f"{name}_", suffix=suffix, delete=False) as file:
        path = Path(file.name)
    labels = label_map(view, solution)
    if kind == "labels":
        index = np.where(labels == NO_TISSUE, 0, labels + 1).astype(np.uint8)
        picture = Image.fromarray(index)
        picture.putpalette([0, 0, 0, *(int(v) for color in colors for v in color)])
        picture.save(path, compress_level=1)  # a few kB more, and the person waits less
    elif kind == "layers":
        result = solution.result
        layers = [*view.confidence.numpy(), *result.u.numpy(), result.fidelity_energy.numpy()]
        layers.append(result.regularization_energy.numpy())
        names = [*(f"confidence {c}" for c in classes), *classes, "fidelity energy", "regularization energy"]
        write_ome_tiff(path, np.stack(layers).astype(np.float32), channels=names, mpp=view.mpp, pyramid=False)
    else:
        collection = labels_to_geojson(
            labels,
            classes=classes,
            colors=colors,
            downsample=view.downsample,
            mpp=None if view.mpp is None else view.mpp / view.downsample,
            min_area=SMALLEST_POLYGON,
        )
        collection = _moved(collection, view.origin)
        if kind == "geojson":
            write_geojson(path, collection)
        else:
            write_dsa(path, geojson_to_dsa(collection, name, description="monai_vslp", attributes=attributes))
    return path


def _named(classes: Sequence[str], values: Sequence[float] | None) -> dict[str, float] | None:
    return None if values is None else {name: round(float(value), 6) for name, value in zip(classes, values)}


def describe(view: View, solution: Solution, network: Sequence[float], colors: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The numbers of an answer, JSON-like; proportions are fractions of the tissue."""
    result, classes = solution.result, list(view.classes)
    labels = label_map(view, solution)
    counts = np.bincount(labels.ravel(), minlength=256)[: len(classes)]
    height, width = labels.shape
    painted = 0 if solution.painted is None else int((solution.painted != NOT_PAINTED).sum())
    return {
        "classes": classes,
        "colors": [list(map(int, color)) for color in colors],
        "proportions": {
            "given": _named(classes, solution.given),
            "network": _named(classes, network),
            "refined": _named(classes, result.proportions.tolist()),
            "labels": _named(classes, counts / max(int(counts.sum()), 1)),
        },
        "psi": None if solution.given is None else [v if np.isfinite(v) else None for v in result.psi.tolist()],
        "residual": result.residual,
        "converged": result.converged,
        "reason": result.reason,
        "steps": len(result.energies) - 1,
        "energy": result.energies[-1],
        "warm": solution.warm,
        "location": list(view.origin),
        "size": [width * view.downsample, height * view.downsample],
        "downsample": view.downsample,
        "mpp": view.mpp,
        "strokes": {"pixels": painted, "kept": solution.kept},
    }
