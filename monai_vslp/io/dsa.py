"""Polygons as an annotation that the Digital Slide Archive (HistomicsUI, large_image) shows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_vslp.utils.atomic import write_json
from monai_vslp.utils.errors import InputError

__all__ = ["geojson_to_dsa", "write_dsa"]

FILL_OPACITY = 0.25  # the tissue stays visible below


def _points(ring: Sequence[Sequence[float]]) -> list[list[float]]:
    """Corners ``[x, y, 0]`` of a ring of GeoJSON, without the last, which repeats the first."""
    corners = [[float(x), float(y), 0.0] for x, y, *_ in ring]
    return corners[:-1] if len(corners) > 1 and corners[0] == corners[-1] else corners


def _element(rings: Sequence[Any], identity: str, name: str, color: Sequence[int]) -> dict[str, Any]:
    red, green, blue = (int(value) for value in color)
    outline, *holes = [_points(ring) for ring in rings]
    element = {
        "id": hashlib.sha256(identity.encode()).hexdigest()[:24],  # ids are 24 hexadecimal digits
        "type": "polyline",
        "group": name,
        "label": {"value": name},
        "closed": True,
        "points": outline,
        "lineColor": f"rgb({red}, {green}, {blue})",
        "lineWidth": 2,
        "fillColor": f"rgba({red}, {green}, {blue}, {FILL_OPACITY:g})",
    }
    return element | ({"holes": holes} if holes else {})


def geojson_to_dsa(
    collection: Mapping[str, Any], name: str, *, description: str = "", attributes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Turn a collection of :func:`~monai_vslp.io.geojson.labels_to_geojson` into an annotation of large_image.

    Args:
        collection: GeoJSON ``FeatureCollection`` of Polygons and MultiPolygons with a ``classification``; level-0 ``(x, y)``.
        name: of the annotation; not empty.
        description: shown beside the name.
        attributes: whatever JSON shall be kept with the annotation, such as the proportions.

    Returns:
        The annotation: one closed ``polyline`` per polygon in level-0 ``[x, y, 0]``, holes apart, grouped by class, with ids
        that are the same for the same input. ``json.dumps`` of it is what DSA takes.

    Raises:
        InputError: the name is empty, or a feature is no polygon with a class.
    """
    if not name:
        raise InputError("an annotation of the Digital Slide Archive needs a name of at least one character.")
    elements = []
    for number, feature in enumerate(collection["features"], start=1):
        try:
            geometry, classification = feature["geometry"], feature["properties"]["classification"]
            kind, coordinates = geometry["type"], geometry["coordinates"]
            parts = {"Polygon": [coordinates], "MultiPolygon": coordinates}[kind]
            label, color = str(classification["name"]), classification["color"]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"feature {number}: expected a Polygon or MultiPolygon with a classification of name and colour ({error})."
            ) from error
        identity = str(feature.get("id", number))
        elements += [_element(rings, f"{identity}:{part}", label, color) for part, rings in enumerate(parts)]
    annotation = {"name": name, "description": description, "elements": elements}
    return annotation | ({"attributes": dict(attributes)} if attributes else {})


def write_dsa(path: str | Path, annotation: Mapping[str, Any]) -> Path:
    """Write an annotation atomically."""
    return write_json(path, dict(annotation))
