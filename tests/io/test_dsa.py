"""The annotation obeys the rules of large_image's annotation schema, written here as JSON Schema, and covers the labels."""

import json

import jsonschema
import numpy as np
import pytest
from skimage.draw import polygon2mask

from monai_vslp.io.dsa import geojson_to_dsa, write_dsa
from monai_vslp.io.geojson import labels_to_geojson
from monai_vslp.utils.errors import InputError

POINTS = {
    "type": "array",
    "minItems": 3,
    "items": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
}
COLOR = {
    "type": "string",
    "pattern": r"^(#([0-9a-fA-F]{3,4}|[0-9a-fA-F]{6}|[0-9a-fA-F]{8})|rgb\(\d+,\s*\d+,\s*\d+\)|"
    r"rgba\(\d+,\s*\d+,\s*\d+,\s*(\d?\.|)\d+\))$",
}
SCHEMA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "description": {"type": "string"},
        "attributes": {"type": "object"},
        "elements": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "points"],
                "additionalProperties": False,
                "properties": {
                    "id": {"type": "string", "pattern": "^[0-9a-f]{24}$"},
                    "type": {"enum": ["polyline"]},
                    "group": {"type": "string"},
                    "label": {"type": "object", "required": ["value"], "properties": {"value": {"type": "string"}}},
                    "closed": {"type": "boolean"},
                    "points": POINTS,
                    "holes": {"type": "array", "items": POINTS},
                    "lineColor": COLOR,
                    "fillColor": COLOR,
                    "lineWidth": {"type": "number", "minimum": 0},
                },
            },
        },
    },
}


@pytest.fixture
def labels():
    """A ring of class 1 with class 0 in its hole and around it, and a part without tissue."""
    rows, cols = np.mgrid[:60, :80]
    distance = np.hypot(rows - 30, cols - 40)
    labels = ((distance > 8) & (distance < 22)).astype(np.uint8)
    labels[:10, :10] = 255
    return labels


def polygons(labels, **options):
    return labels_to_geojson(
        labels, classes=["stroma", "tumour"], colors=[(10, 20, 30), (200, 0, 90)], min_area=0, tolerance=0, **options
    )


def test_the_annotation_is_valid_and_covers_the_labelled_pixels(labels, tmp_path):
    collection = polygons(labels, downsample=4.0)
    path = write_dsa(tmp_path / "a.json", geojson_to_dsa(collection, "map", attributes={"proportions": {"tumour": 0.3}}))
    annotation = json.loads(path.read_text())
    jsonschema.validate(annotation, SCHEMA)
    assert annotation["attributes"] == {"proportions": {"tumour": 0.3}}
    ids = [element["id"] for element in annotation["elements"]]
    assert len(set(ids)) == len(ids) == 3, "what lies around the ring, the ring, and what lies in it"
    painted = np.full(labels.shape, 255)
    for element in annotation["elements"]:
        inside = np.zeros(labels.shape, dtype=bool)
        for ring in [element["points"], *element.get("holes", [])]:
            assert ring[0] != ring[-1], "closed lines do not repeat their first point"
            x, y, _ = np.array(ring).T / 4 - 0.5
            inside ^= polygon2mask(labels.shape, np.stack([y, x], axis=1))
        painted[inside] = {"stroma": 0, "tumour": 1}[element["group"]]
    np.testing.assert_array_equal(painted, labels)


def test_ids_depend_on_the_content_alone(labels):
    assert geojson_to_dsa(polygons(labels), "a")["elements"] == geojson_to_dsa(polygons(labels), "b")["elements"]


def test_parts_of_a_multipolygon_are_elements_of_their_own(labels):
    feature = polygons(labels)["features"][0]
    rings = feature["geometry"]["coordinates"]
    feature["geometry"] = {"type": "MultiPolygon", "coordinates": [rings, rings]}
    annotation = geojson_to_dsa({"features": [feature]}, "parts")
    jsonschema.validate(annotation, SCHEMA)
    assert len({element["id"] for element in annotation["elements"]}) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"geometry": {"type": "Point", "coordinates": [0, 0]}}, "feature 1: expected a Polygon"),
        ({"properties": {}}, "classification"),
    ],
)
def test_other_features_are_refused(labels, change, message):
    feature = polygons(labels)["features"][0] | change
    with pytest.raises(InputError, match=message):
        geojson_to_dsa({"features": [feature]}, "map")
    with pytest.raises(InputError, match="name"):
        geojson_to_dsa({"features": []}, "")
