"""Label maps as polygons that QuPath opens."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.utils.atomic import write_text

__all__ = ["labels_to_geojson", "write_geojson"]

ndimage, _ = optional_import("scipy.ndimage")
approximate_polygon, _ = optional_import("skimage.measure", name="approximate_polygon")

# Directions along pixel edges: right, down, left, up as (row, column) steps between corners.
_STEPS = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])


def _rings(mask: np.ndarray) -> list[np.ndarray]:
    """Closed rings along the pixel edges of ``mask``, corners as (row, column), the region to the right of the way.

    Outer rings run clockwise on the screen, holes the other way. At corners where two pixels touch diagonally the ring
    stays with its pixel, so that regions are connected through edges only.
    """
    padded = np.pad(mask, 1).astype(bool)
    # edges[d, r, c]: an edge leaves corner (r, c) in direction d; corner (r, c) is the upper left one of pixel (r, c).
    height, width = mask.shape
    edges = np.zeros((4, height + 1, width + 1), dtype=bool)
    inside = padded[1:-1, 1:-1]
    edges[0, :height, :width] = inside & ~padded[:-2, 1:-1]
    edges[1, :height, 1:] = inside & ~padded[1:-1, 2:]
    edges[2, 1:, 1:] = inside & ~padded[2:, 1:-1]
    edges[3, 1:, :width] = inside & ~padded[1:-1, :-2]
    remaining = {(int(d), int(r), int(c)) for d, r, c in np.argwhere(edges)}
    rings = []
    for start in sorted(remaining):
        if start not in remaining:
            continue
        direction, row, column = start
        corners = []
        while (direction, row, column) in remaining:
            remaining.remove((direction, row, column))
            row, column = row + int(_STEPS[direction][0]), column + int(_STEPS[direction][1])
            # Turning right first keeps to the pixel just followed.
            for turn in (1, 0, 3):
                following = (direction + turn) % 4
                if (following, row, column) in remaining or (following, row, column) == start:
                    if following != direction:
                        corners.append((row, column))
                    direction = following
                    break
            if (direction, row, column) == start:
                break
        rings.append(np.array([*corners, corners[0]], dtype=np.float64))
    return rings


def _area(ring: np.ndarray) -> float:
    """Signed area in px²; positive for outer rings."""
    row, column = ring[:, 0], ring[:, 1]
    return 0.5 * float(np.sum(column[:-1] * row[1:] - column[1:] * row[:-1]))


def labels_to_geojson(
    labels: np.ndarray,
    *,
    classes: Sequence[str],
    colors: Sequence[Sequence[int]],
    downsample: float = 1.0,
    mpp: float | None = None,
    min_area: float = 16.0,
    tolerance: float = 0.5,
    ignore: int = 255,
) -> dict[str, Any]:
    """Connected regions of equal label as polygons.

    Args:
        labels: class indices, shape ``[H, W]``, uint8.
        classes: name per class.
        colors: RGB per class, 0 … 255.
        downsample: level-0 px per px of ``labels``; coordinates are level-0 ``(x, y)``.
        mpp: µm per level-0 px; areas are then given in µm².
        min_area: smaller regions and holes are left out, px² of ``labels``.
        tolerance: how far a simplified outline may lie from the pixel edges, px of ``labels``; 0 keeps every edge.
        ignore: label without polygons.

    Returns:
        A GeoJSON ``FeatureCollection`` of QuPath annotations. Rings are closed, holes follow their outline.
    """
    features = []
    for index, (name, color) in enumerate(zip(classes, colors)):
        if index == ignore:
            continue
        components, _ = ndimage.label(labels == index)
        for number, box in enumerate(ndimage.find_objects(components), start=1):
            region = components[box] == number
            if region.sum() < min_area:
                continue
            offset = np.array([box[0].start, box[1].start], dtype=np.float64)
            rings = sorted(_rings(region), key=_area, reverse=True)
            area = sum(_area(ring) for ring in rings)
            kept = [ring for ring in rings if _area(ring) > 0 or -_area(ring) >= min_area]
            if tolerance > 0:
                simpler = [approximate_polygon(ring, tolerance) for ring in kept]
                kept = [small if len(small) >= 4 else ring for small, ring in zip(simpler, kept)]
            coordinates = [((ring + offset)[:, ::-1] * downsample).round(2).tolist() for ring in kept]
            outer = [c for c, ring in zip(coordinates, kept) if _area(ring) > 0]
            holes = [c for c, ring in zip(coordinates, kept) if _area(ring) <= 0]
            unit = downsample * (mpp or 1.0)
            features.append(
                {
                    "type": "Feature",
                    "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name}:{box[0].start}:{box[1].start}:{number}")),
                    "geometry": {"type": "Polygon", "coordinates": [outer[0], *holes]},
                    "properties": {
                        "objectType": "annotation",
                        "classification": {"name": name, "color": [int(v) for v in color]},
                        "measurements": {"Area µm²" if mpp else "Area px²": round(area * unit**2, 3)},
                    },
                }
            )
    return {"type": "FeatureCollection", "features": features}


def write_geojson(path: str | Path, collection: dict[str, Any]) -> Path:
    """Write a collection atomically."""
    return write_text(path, json.dumps(collection, separators=(",", ":")))
