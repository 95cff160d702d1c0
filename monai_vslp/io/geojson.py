"""Label maps as polygons that QuPath opens."""

from __future__ import annotations

import json
import uuid
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.io.lazy_maps import MapLike, halve_labels
from monai_vslp.io.map_blocks import halve_block
from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.errors import InputError

__all__ = ["labels_to_geojson", "write_geojson"]

ndimage, _ = optional_import("scipy.ndimage")

MAX_PIXELS = 2**25  # of a map whose outlines are followed in memory
MAX_EDGES = 2**22  # on these outlines, each counted once; polygons of that many take some 1.5 GiB


def _edges(labels: np.ndarray) -> int:
    """Number of pixel edges between different labels."""
    return sum(int(np.count_nonzero(a != b)) for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])))


def _traceable(labels: MapLike, max_pixels: int, max_edges: int) -> tuple[np.ndarray, int]:
    """The finest of the levels of labels that keeps to both bounds, and how often it was halved."""
    height, width = labels.shape
    times = 0
    while -(-height // 2**times) * -(-width // 2**times) > max_pixels:
        times += 1
    level = halve_labels(labels, times)
    while _edges(level) > max_edges:
        level, times = halve_block(level[None], labels=True)[0], times + 1
    return level, times


def _components(labels: np.ndarray, count: int, ignore: int) -> tuple[np.ndarray, np.ndarray]:
    """Regions of equal label connected through edges.

    Returns:
        Number of the region of each pixel, 0 for none, shape ``[H, W]``, int32; label of each region, index 0 unused.
    """
    regions = np.zeros(labels.shape, dtype=np.int32)
    owners = [np.zeros(1, dtype=np.int64)]
    total = 0
    for index in range(count):
        if index == ignore:
            continue
        numbers, found = ndimage.label(labels == index)
        np.add(regions, numbers + total, out=regions, where=numbers > 0, casting="unsafe")
        owners.append(np.full(found, index))
        total += found
    return regions, np.concatenate(owners)


def _ring_corners(regions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All rings along the pixel edges of all regions at once.

    Each pixel edge on the outline of a region is walked with the region on the right: outer rings run clockwise on the
    screen, holes the other way. Where two pixels of a region touch at a corner only, the ring turns so that no ring passes a
    corner twice; so every polygon is valid as it is.

    Args:
        regions: shape ``[H, W]``, 0 outside.

    Returns:
        Corners ``(row, col)`` ring after ring, shape ``[N, 2]``, int64; the first corner of each ring in that list, followed by
        N; the region of each ring. Corners on straight runs are left out unless three outlines meet there.
    """
    padded = np.pad(regions, 1)
    width = padded.shape[1]
    flat = padded.ravel()
    # Side s of a pixel is walked in direction s: 0 top, to the right; 1 right, down; 2 bottom, to the left; 3 left, up.
    across = np.array([-width, 1, width, -1])
    ahead = np.array([1, width, -1, -width])
    beside = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    outline = []
    for side, other in enumerate(beside):
        row, col = np.nonzero((regions != other) & (regions != 0))
        outline.append(((row + 1) * width + col + 1) * 4 + side)
    keys = np.sort(np.concatenate(outline), kind="stable")
    pixel, side = keys // 4, keys % 4
    right = pixel + ahead[side]
    left = right + across[side]
    own = flat[pixel]
    turns_left = flat[left] == own
    goes_on = ~turns_left & (flat[right] == own)
    following = np.where(turns_left, left * 4 + (side - 1) % 4, np.where(goes_on, right * 4 + side, pixel * 4 + (side + 1) % 4))
    # Arrays and not lists: those take five times the memory.
    successor = array("q", np.searchsorted(keys, following).tobytes())
    order, starts = array("q"), array("q", [0])
    seen = bytearray(len(keys))
    for start in range(len(keys)):
        if seen[start]:
            continue
        edge = start
        while not seen[edge]:
            seen[edge] = 1
            order.append(edge)
            edge = successor[edge]
        starts.append(len(order))
    walked = np.frombuffer(order, dtype=np.int64)
    first = np.frombuffer(starts, dtype=np.int64)
    pixel, side, own = pixel[walked], side[walked], own[walked]
    row = pixel // width - 1 + np.isin(side, (2, 3))
    col = pixel % width - 1 + np.isin(side, (1, 2))

    previous = np.arange(-1, len(walked) - 1)
    previous[first[:-1]] = first[1:] - 1
    corner = side != side[previous]
    upper_left, upper_right = padded[row, col], padded[row, col + 1]
    lower_left, lower_right = padded[row + 1, col], padded[row + 1, col + 1]
    meeting = (
        (upper_left != upper_right).astype(np.int8)
        + (lower_left != lower_right)
        + (upper_left != lower_left)
        + (upper_right != lower_right)
    )
    kept = corner | (meeting > 2)
    position = np.concatenate([[0], np.cumsum(kept)])
    return np.stack([row, col], axis=1)[kept], position[first], own[first[:-1]]


def _is_anchor(corners: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Corners where three or more outlines meet; simplification must not move them. Shape ``[N]``, bool."""
    padded = np.pad(regions, 1)
    row, col = corners[:, 0], corners[:, 1]
    around = [padded[row, col], padded[row, col + 1], padded[row + 1, col + 1], padded[row + 1, col]]
    return sum((around[i - 1] != around[i]).astype(np.int8) for i in range(4)) > 2


def _rank(corners: np.ndarray) -> np.ndarray:
    """A number for each place, row by row, shape ``[N]``, int64."""
    return corners[:, 0] * (corners[:, 1].max() + 1) + corners[:, 1]


def _areas(corners: np.ndarray, first: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
    """Signed area of each ring in px², of those corners that are ``kept``; positive for outer rings, shape ``[R]``, float64."""
    if kept is not None:  # at least one of each ring
        corners, first = corners[kept], np.concatenate([[0], np.cumsum(kept)])[first]
    following = np.arange(1, len(corners) + 1)
    following[first[1:] - 1] = first[:-1]
    row, col = corners[:, 0].astype(np.float64), corners[:, 1].astype(np.float64)
    # Doubled areas are whole numbers, so the running sum is exact.
    doubled = np.concatenate([[0.0], np.cumsum(col * row[following] - col[following] * row)])
    return (doubled[first[1:]] - doubled[first[:-1]]) / 2


def _simplify(corners: np.ndarray, first: np.ndarray, anchors: np.ndarray, tolerance: float) -> np.ndarray:
    """Douglas-Peucker between anchors, all rings at once; which corners stay, shape ``[N]``, bool.

    Neighbouring regions share the outline between two anchors. What stays does not depend on the direction in which it is
    walked, so both keep the same corners, and no gap or overlap appears between them.
    """
    kept = anchors.copy()
    ring = np.repeat(np.arange(len(first) - 1), np.diff(first))
    rank = _rank(corners)
    # A ring without anchor, an island or the hole around it, starts at its upper left corner.
    loose = ~np.bincount(ring, weights=anchors, minlength=len(first) - 1).astype(bool)
    best = np.minimum.reduceat(rank, first[:-1])
    kept |= loose[ring] & (rank == best[ring])
    # Turn each ring so that it begins at a corner that stays, and close it.
    index = np.arange(len(corners))
    start = np.full(len(first) - 1, len(corners))
    np.minimum.at(start, ring[kept], index[kept])
    length = np.diff(first)
    shift = start - first[:-1]
    closed = np.repeat(first[:-1], length + 1)
    place = np.arange(len(closed)) - np.repeat(first[:-1] + np.arange(len(length)), length + 1)
    closed = closed + (place + np.repeat(shift, length + 1)) % np.repeat(length, length + 1)
    points, ranks, stays = corners[closed].astype(np.float64), rank[closed], kept[closed]
    last_of_ring = np.zeros(len(closed), dtype=bool)
    last_of_ring[np.cumsum(length + 1) - 1] = True

    # Each round splits every stretch at its farthest corner until none is farther than the tolerance.
    todo = np.flatnonzero(stays & ~last_of_ring)
    ends = np.append(np.flatnonzero(stays), len(closed))
    ends = ends[np.searchsorted(ends, todo) + 1]
    while len(todo):
        long = ends - todo > 1
        todo, ends = todo[long], ends[long]
        if not len(todo):
            break
        count = ends - todo - 1
        offset = np.cumsum(count) - count
        part = np.repeat(np.arange(len(todo)), count)
        inner = todo[part] + 1 + np.arange(len(part)) - offset[part]
        a, b, p = points[todo][part], points[ends][part], points[inner]
        along, from_a, from_b = b - a, p - a, p - b
        squared = (along**2).sum(axis=1)
        cross = along[:, 0] * from_a[:, 1] - along[:, 1] * from_a[:, 0]
        beyond = ((from_a * along).sum(axis=1) <= 0) | ((from_b * along).sum(axis=1) >= 0)
        nearest = np.minimum((from_a**2).sum(axis=1), (from_b**2).sum(axis=1))
        distance = np.where(beyond, nearest, cross**2 / np.maximum(squared, 1))
        farthest = np.maximum.reduceat(distance, offset)
        candidate = np.where(distance == farthest[part], ranks[inner], np.iinfo(np.int64).max)
        chosen_rank = np.minimum.reduceat(candidate, offset)
        split = inner[candidate == chosen_rank[part]]
        over = farthest > tolerance**2
        split, todo, ends = split[over], todo[over], ends[over]
        stays[split] = True
        todo, ends = np.concatenate([todo, split]), np.concatenate([split, ends])
    result = np.zeros(len(corners), dtype=bool)
    result[closed[stays]] = True
    return result


def labels_to_geojson(
    labels: MapLike,
    *,
    classes: Sequence[str],
    colors: Sequence[Sequence[int]],
    downsample: float = 1.0,
    mpp: float | None = None,
    min_area: float = 16.0,
    tolerance: float = 0.75,
    tolerance_um: float | None = None,
    ignore: int = 255,
    max_pixels: int = MAX_PIXELS,
    max_edges: int = MAX_EDGES,
) -> dict[str, Any]:
    """Connected regions of equal label as polygons.

    Pixels of a region are connected through their edges. With ``min_area=0`` and ``tolerance=0`` the polygons cover exactly
    the labelled pixels. Neighbours are simplified alike, so that no gaps or overlaps appear between them; up to the default
    tolerance, which straightens the staircases of diagonals, no ring was found to cross or touch itself.

    Outlines are followed in memory. Labels with more pixels or longer outlines than that allows are halved by majorities of
    2×2 pixels, read by blocks, until they fit; the collection says so. Each halving moves an outline by at most one pixel of
    the finer level, where it is straight; what is thinner than two pixels of the traced level may vanish.

    Args:
        labels: class indices, shape ``[H, W]``, uint8; a NumPy or Zarr array, or another with NumPy's slicing.
        classes: name per class.
        colors: RGB per class, 0 … 255.
        downsample: level-0 px per px of ``labels``; coordinates are level-0 ``(x, y)``.
        mpp: µm per level-0 px; areas are then given in µm², else in level-0 px².
        min_area: smaller regions and holes are left out, px² of ``labels``.
        tolerance: how far a simplified outline may lie from the pixel edges, px of the traced level; 0 keeps every edge.
        tolerance_um: the same in µm, in place of ``tolerance``; needs ``mpp``.
        ignore: label without polygons; so are labels beyond ``classes``.
        max_pixels: of the traced level.
        max_edges: pixel edges between different labels of the traced level.

    Returns:
        A GeoJSON ``FeatureCollection`` of QuPath annotations, by class and place: closed rings, holes after their outline, ids
        that are the same for the same input, ``measurements`` with the area and its share of all labelled pixels. Its
        ``properties`` are ``halvings`` (of the labels before their outlines were followed), ``pixel_px`` and ``pixel_um``
        (side of the traced pixels, level-0 px and µm), ``tolerance_px`` and ``tolerance_um`` (how far outlines may lie from
        the pixel edges of ``labels``: simplification and halvings together); those in µm are None without ``mpp``.

    Raises:
        InputError: ``tolerance_um`` is negative, or given without ``mpp``.
        ValueError: ``labels`` is not ``[H, W]`` or there are not as many colours as classes.
    """
    if len(labels.shape) != 2 or len(colors) != len(classes):
        raise ValueError(
            f"expected labels [H, W] and a colour per class, got {list(labels.shape)}, {len(classes)}, {len(colors)}."
        )
    if tolerance_um is not None and (mpp is None or not tolerance_um >= 0):
        raise InputError(
            f"tolerance_um must be at least 0 and needs the size of pixels, got {tolerance_um} and mpp={mpp}; give mpp (µm per "
            "level-0 px), or tolerance in px."
        )
    full_height, full_width = labels.shape
    labels, times = _traceable(labels, max_pixels, max_edges)
    scale = 2**times
    pixel = downsample * scale  # level-0 px
    if tolerance_um is not None:
        tolerance = tolerance_um / (pixel * mpp)
    # An outline moves by up to 1 + 2 + 4 … px of the labels.
    moved = tolerance * pixel + (scale - 1) * downsample
    collection: dict[str, Any] = {
        "type": "FeatureCollection",
        "features": [],
        "properties": {
            "halvings": times,
            "pixel_px": pixel,
            "pixel_um": None if mpp is None else pixel * mpp,
            "tolerance_px": moved,
            "tolerance_um": None if mpp is None else moved * mpp,
        },
    }
    regions, owners = _components(labels, len(classes), ignore)
    if len(owners) == 1:
        return collection
    sizes = np.bincount(regions.ravel(), minlength=len(owners))
    labelled = int(sizes[1:].sum())
    corners, first, region = _ring_corners(regions)
    areas = _areas(corners, first)
    anchors = _is_anchor(corners, regions)
    smallest = min_area / scale**2
    wanted = (sizes[region] >= smallest) & ((areas > 0) | (-areas >= smallest))
    kept = np.ones(len(corners), dtype=bool)
    while tolerance > 0:
        kept = _simplify(corners, first, anchors, tolerance)
        flat = wanted & (_areas(corners, first, kept) * areas <= 0)
        fixed = np.repeat(flat, np.diff(first)) & ~anchors
        if not fixed.any():
            break
        # Of rings that would vanish or turn over every corner stays, in their neighbours as well.
        rank = _rank(corners)
        anchors = anchors | np.isin(rank, rank[fixed])

    rings: dict[int, list[np.ndarray]] = {}
    # Outer rings first, then holes as they come.
    for index in np.flatnonzero(wanted)[np.argsort(areas[wanted] < 0, kind="stable")]:
        here = slice(first[index], first[index + 1])
        rings.setdefault(int(region[index]), []).append(corners[here][kept[here]])

    unit, name_of_area = pixel * (mpp or 1.0), "Area px²" if mpp is None else "Area µm²"
    # Of odd sides the last pixel of a coarser level reaches beyond the map.
    corner = np.array([full_width, full_height])
    for number, outlines in sorted(rings.items()):
        index = int(owners[number])
        closed = [np.minimum(np.concatenate([ring, ring[:1]])[:, ::-1] * scale, corner) * downsample for ring in outlines]
        row, col = outlines[0][0]
        collection["features"].append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{index}:{classes[index]}:{row}:{col}:{pixel}")),
                "geometry": {"type": "Polygon", "coordinates": [ring.round(2).tolist() for ring in closed]},
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": classes[index], "color": [int(v) for v in colors[index]]},
                    "measurements": {
                        name_of_area: round(float(sizes[number]) * unit**2, 3),
                        "Share of labelled area": round(float(sizes[number]) / labelled, 9),
                    },
                },
            }
        )
    return collection


def write_geojson(path: str | Path, collection: dict[str, Any]) -> Path:
    """Write a collection atomically, feature by feature, so that its text is never in memory as a whole."""

    def text(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)

    others = [f"{text(key)}:{text(value)}" for key, value in collection.items() if key != "features"]
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("{" + ",".join([*others, '"features":[']))
        for number, feature in enumerate(collection["features"]):
            file.write(("," if number else "") + text(feature))
        file.write("]}")
    return Path(path)
