"""What a person painted, as costs of the variational problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.utils import optional_import

from monai_vslp.data.proportions import check_classes
from monai_vslp.io.regions import polygon_mask
from monai_vslp.utils.errors import InputError

__all__ = ["NOT_PAINTED", "STROKE_COST", "features_of", "paint_strokes", "unary_costs"]

draw, _ = optional_import("skimage.draw")
ndimage, _ = optional_import("scipy.ndimage")

NOT_PAINTED = 255
STROKE_COST = 20.0  # nats; exp(-20) of another class is none
RADIUS = 8.0  # level-0 px, of points and lines that do not say theirs
KINDS = ("Point", "MultiPoint", "LineString", "MultiLineString", "Polygon", "MultiPolygon")


def features_of(value: Any, name: str) -> list[Mapping[str, Any]]:
    """Features of GeoJSON: a collection, a list of features, one feature, or a bare geometry.

    Args:
        value: parsed JSON.
        name: how errors call it.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(value, Mapping) and value.get("type") == "FeatureCollection":
        value = value.get("features", [])
    elif isinstance(value, Mapping) and value.get("type") in KINDS:
        value = [{"type": "Feature", "geometry": value, "properties": {}}]
    elif isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f"{name} must be GeoJSON (a FeatureCollection, or features of it), got {value!r:.80}.")
    for number, feature in enumerate(value, start=1):
        geometry = feature.get("geometry") if isinstance(feature, Mapping) else None
        if not isinstance(geometry, Mapping) or geometry.get("type") not in KINDS:
            raise InputError(f"{name}, feature {number}: expected a geometry of kind {', '.join(KINDS)}, got {geometry!r:.80}.")
    return list(value)


def _class_of(feature: Mapping[str, Any], classes: Sequence[str], where: str) -> int:
    found = (feature.get("properties") or {}).get("classification")
    name = found.get("name") if isinstance(found, Mapping) else found
    if not isinstance(name, str):
        raise InputError(f"{where} has no class; give properties.classification.name, one of {', '.join(classes)}.")
    check_classes([name], classes, where)
    return list(classes).index(name)


def _line_mask(lines: list[np.ndarray], radius: float, shape: tuple[int, int]) -> np.ndarray:
    """Pixels within ``radius`` px of lines of ``(row, col)``; one point is a line too."""
    pad = int(np.ceil(radius)) + 1
    size = (shape[0] + 2 * pad, shape[1] + 2 * pad)
    path = np.zeros(size, dtype=bool)
    for line in lines:
        corners = np.floor(line).astype(int) + pad
        for a, b in zip(corners, corners[1:] if len(corners) > 1 else corners):
            rows, cols = draw.line(*a, *b)
            inside = (rows >= 0) & (rows < size[0]) & (cols >= 0) & (cols < size[1])
            path[rows[inside], cols[inside]] = True
    if not path.any():
        return path[pad:-pad, pad:-pad]
    rows, cols = (np.flatnonzero(path.any(axis=axis)) for axis in (1, 0))
    box = tuple(slice(max(s[0] - pad, 0), s[-1] + pad + 1) for s in (rows, cols))  # distances in there alone
    mask = np.zeros(size, dtype=bool)
    mask[box] = ndimage.distance_transform_edt(~path[box]) <= radius
    return mask[pad:-pad, pad:-pad]


def paint_strokes(
    strokes: Any,
    classes: Sequence[str],
    shape: tuple[int, int],
    origin: tuple[float, float] = (0.0, 0.0),
    downsample: float = 1.0,
) -> np.ndarray:
    """What was painted, on the grid of a map; later strokes lie above earlier ones.

    Args:
        strokes: GeoJSON in level-0 ``(x, y)`` px. Points and lines are painted with a round brush of ``properties.radius``
            (level-0 px, 8 by default), polygons are filled. The class is ``properties.classification.name``.
        classes: known names, in order.
        shape: ``(H, W)`` of the map in px.
        origin: level-0 ``(x, y)`` of the map's upper left corner.
        downsample: level-0 px per px of the map.

    Returns:
        Class index per pixel, shape ``[H, W]``, uint8, ``NOT_PAINTED`` where nothing was.

    Raises:
        InputError: no GeoJSON, or a feature without a class, with coordinates that are none, or a radius that is not positive.
        ProportionError: an unknown class.
    """
    painted = np.full(shape, NOT_PAINTED, dtype=np.uint8)
    for number, feature in enumerate(features_of(strokes, "strokes"), start=1):
        where = f"strokes, feature {number}"
        label = _class_of(feature, classes, where)
        kind, coordinates = feature["geometry"]["type"], feature["geometry"].get("coordinates")
        radius = (feature.get("properties") or {}).get("radius", RADIUS)
        if not isinstance(radius, int | float) or not 0 < radius < np.inf:
            raise InputError(f"{where}: radius is a positive number of level-0 px, got {radius!r}.")
        try:
            if kind.endswith("Polygon"):
                parts = [coordinates] if kind == "Polygon" else coordinates
                moved = [[np.asarray(ring, dtype=float)[:, :2] - origin for ring in part] for part in parts]
                found = polygon_mask(moved, downsample, shape)
                if found is not None:
                    painted[found[1]][found[0]] = label
                continue
            depth = {"Point": [[coordinates]], "MultiPoint": [[p] for p in coordinates], "LineString": [coordinates]}
            lines = depth.get(kind, coordinates)
            moved = [(np.asarray(line, dtype=float)[:, :2] - origin)[:, ::-1] / downsample for line in lines]
            if not all(np.isfinite(line).all() for line in moved):
                raise ValueError("coordinates are not finite")
        except (TypeError, ValueError, IndexError) as error:
            raise InputError(f"{where}: coordinates of a {kind} are level-0 [x, y] as GeoJSON nests them ({error}).") from error
        painted[_line_mask(moved, max(radius / downsample, 0.5), shape)] = label
    return painted


def unary_costs(painted: np.ndarray, classes: int, cost: float = STROKE_COST) -> torch.Tensor:
    """Costs for :func:`monai_vslp.variational.refine`: what is painted costs ``cost`` in every other class.

    Args:
        painted: shape ``[H, W]``, uint8, class index or ``NOT_PAINTED``.
        classes: C.
        cost: nats.

    Returns:
        Shape ``[C, H, W]``, float32.
    """
    labels = torch.from_numpy(painted.astype(np.int64))
    there = labels != NOT_PAINTED
    costs = torch.zeros(classes, *labels.shape)
    for k in range(classes):
        costs[k][there & (labels != k)] = cost
    return costs
