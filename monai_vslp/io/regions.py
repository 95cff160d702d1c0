"""Regions of a slide that people outlined: polygons of GeoJSON, or pieces of tissue by number, as masks on the grid of maps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.utils.errors import InputError

__all__ = ["PIECE", "polygon_mask", "region_masks"]

draw, _ = optional_import("skimage.draw")
ndimage, _ = optional_import("scipy.ndimage")

PIECE = "piece"  # 'piece 1' is the first piece of tissue, from top to bottom
SMALLEST_PIECE = 0.01  # of the tissue; crumbs are no pieces
PIECE_SIDE = 1024  # px, longer side of the map that pieces are told apart on


def _named(path: Path) -> dict[str, list[Any]]:
    """Polygons ``[rings]`` by name.

    Raises:
        InputError: the file is missing, damaged, or no GeoJSON of polygons.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist; the table names regions of this slide. Outline them, in QuPath for instance, name the "
            f"annotations as the table does, and export them to that file. Pieces of tissue can be named '{PIECE} 1', …"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is no GeoJSON: {error}") from error
    features = content.get("features", []) if isinstance(content, dict) else content
    found: dict[str, list[Any]] = {}
    for number, feature in enumerate(features, start=1):
        try:
            properties, geometry = feature.get("properties") or {}, feature["geometry"]
            name = properties.get("name") or (properties.get("classification") or {}).get("name")
            parts = {"Polygon": lambda c: [c], "MultiPolygon": lambda c: c}[geometry["type"]](geometry["coordinates"])
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}, feature {number}: expected a named Polygon or MultiPolygon ({error}).") from error
        if name:
            found.setdefault(str(name), []).extend(parts)
    return found


def polygon_mask(
    parts: Sequence[Any], downsample: float, shape: tuple[int, int]
) -> tuple[np.ndarray, tuple[slice, slice]] | None:
    """Pixels whose centre lies in one of the polygons, and the rectangle around them.

    Args:
        parts: polygons, lists of rings of ``(x, y)``; holes are further rings.
        downsample: units of the corners per px of the mask.
        shape: ``(H, W)`` in px.

    Returns:
        Mask, bool, and the rows and columns that it covers; None where the polygons lie outside.
    """
    corners = np.concatenate([np.asarray(ring, dtype=float)[:, :2] for part in parts for ring in part]) / downsample
    left, top = np.maximum(np.floor(corners.min(axis=0)).astype(int), 0)
    right, bottom = np.minimum(np.ceil(corners.max(axis=0)).astype(int) + 1, (shape[1], shape[0]))
    if right <= left or bottom <= top:
        return None
    size = (bottom - top, right - left)
    mask = np.zeros(size, dtype=bool)
    for part in parts:
        inside = np.zeros(size, dtype=bool)
        for ring in part:  # holes are further rings: what lies in an odd number of rings is inside
            x, y = np.asarray(ring, dtype=float)[:, :2].T / downsample - 0.5
            inside ^= draw.polygon2mask(size, np.stack([y - top, x - left], axis=1))
        mask |= inside
    return mask, (slice(int(top), int(bottom)), slice(int(left), int(right)))


def _pieces(mass: Any, wanted: dict[str, int]) -> dict[str, tuple[np.ndarray, tuple[slice, slice]]]:
    """Connected pieces of tissue by number, from top to bottom, then from left to right.

    Raises:
        InputError: there are fewer.
    """
    step = max(1, math.ceil(max(mass.shape) / PIECE_SIDE))
    tissue = np.concatenate([np.asarray(mass[row : row + 1, :])[:, ::step] > 0 for row in range(0, mass.shape[0], step)])
    numbers, count = ndimage.label(ndimage.binary_closing(np.pad(tissue, 2), iterations=2)[2:-2, 2:-2])
    sizes = np.bincount(numbers.ravel(), minlength=count + 1)[1:]
    boxes = ndimage.find_objects(numbers)
    kept = [i for i in range(count) if sizes[i] >= SMALLEST_PIECE * max(sizes.sum(), 1)]
    kept.sort(key=lambda i: (boxes[i][0].start, boxes[i][1].start))
    found = {}
    for name, number in wanted.items():
        if not 1 <= number <= len(kept):
            raise InputError(f"the table names {name!r}, but the slide has {len(kept)} pieces of tissue.")
        index = kept[number - 1]
        rows, cols = (slice(span.start * step, min(span.stop * step, side)) for span, side in zip(boxes[index], mass.shape))
        cells = numbers[boxes[index]] == index + 1
        mask = cells.repeat(step, axis=0).repeat(step, axis=1)[: rows.stop - rows.start, : cols.stop - cols.start]
        found[name] = mask, (rows, cols)
    return found


def region_masks(
    names: Sequence[str], path: str | Path, mass: Any, downsample: float
) -> dict[str, tuple[np.ndarray, tuple[slice, slice]]]:
    """Where regions are, by the names that a table gives them.

    ``piece 1``, ``piece 2``, … are pieces of tissue, those of at least 1 % of it, from top to bottom and from left to right.
    All others are polygons of a GeoJSON file as QuPath exports it, found by the annotation's name, or else the name of its
    class; polygons of one name are one region.

    Args:
        names: of the regions.
        path: the GeoJSON file, in level-0 ``(x, y)``; read only if a name is that of no piece.
        mass: share of tissue, shape ``[h, w]``, with slicing.
        downsample: level-0 px per px of the maps.

    Returns:
        For each name, a mask, bool, and the rows and columns of the maps that it covers.

    Raises:
        InputError: a region that is not there; says which are.
    """
    shape = (int(mass.shape[0]), int(mass.shape[1]))
    pieces = {name: name.lower().removeprefix(PIECE).strip() for name in names}
    wanted = {name: int(number) for name, number in pieces.items() if name.lower().startswith(PIECE) and number.isdigit()}
    found = _pieces(mass, wanted) if wanted else {}
    others = [name for name in names if name not in wanted]
    polygons = _named(Path(path)) if others else {}
    for name in others:
        if name not in polygons:
            known = ", ".join(repr(other) for other in sorted(polygons)) or "none with a name"
            raise InputError(f"{path} has no region {name!r} that the table names; it has {known}.")
        covered = polygon_mask(polygons[name], downsample, shape)
        if covered is None:
            raise InputError(f"region {name!r} of {path} lies outside the slide; its corners are level-0 (x, y).")
        found[name] = covered
    return {name: found[name] for name in names}
