"""Polygons against brute-force rasterisation."""

from __future__ import annotations

import json
import time
import uuid

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from monai_vslp.io.geojson import labels_to_geojson, write_geojson
from monai_vslp.io.lazy_maps import halve_labels
from monai_vslp.utils.errors import InputError

COLORS = [[200, 0, 0], [0, 200, 0], [0, 0, 200]]


def convert(labels, **options):
    return labels_to_geojson(labels, classes=["a", "b", "c"], colors=COLORS, **({"min_area": 0, "tolerance": 0} | options))


def rasterise(collection, shape, downsample=1.0):
    """Even-odd rule at pixel centres; 255 where no polygon lies, an error where two do."""
    result = np.full(shape, 255, dtype=np.uint8)
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    for feature in collection["features"]:
        inside = np.zeros(shape, dtype=bool)
        for ring in feature["geometry"]["coordinates"]:
            points = np.array(ring) / downsample
            for (x0, y0), (x1, y1) in zip(points[:-1], points[1:]):
                if y0 != y1:
                    crosses = (np.minimum(y0, y1) <= y) & (y < np.maximum(y0, y1))
                    inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        assert (result[inside] == 255).all()
        result[inside] = "abc".index(feature["properties"]["classification"]["name"])
    return result


def area(ring):
    x, y = np.array(ring).T
    return 0.5 * np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])


def cross(o, a, b):
    return (a[0] - o[0]) * (b[1] - o[1]) - (a[1] - o[1]) * (b[0] - o[0])


def crossings(feature):
    """Pairs of segments of one polygon that cross, or touch other than at common corners within a ring."""
    segments = [
        (number, np.array(a), np.array(b))
        for number, ring in enumerate(feature["geometry"]["coordinates"])
        for a, b in zip(ring[:-1], ring[1:])
    ]
    count = 0
    for i, (ring, a, b) in enumerate(segments):
        for other, c, d in segments[i + 1 :]:
            c_side, d_side, a_side, b_side = cross(a, b, c), cross(a, b, d), cross(c, d, a), cross(c, d, b)
            count += c_side * d_side < 0 and a_side * b_side < 0
            if ring == other:
                count += any(
                    cross(p, q, v) == 0 and (v - p) @ (v - q) < 0 for p, q, v in ((a, b, c), (a, b, d), (c, d, a), (c, d, b))
                )
    return count


def smooth(rng, shape, sigma):
    return np.stack([ndimage.gaussian_filter(rng.normal(size=shape), sigma) for _ in range(3)]).argmax(axis=0).astype(np.uint8)


SHAPES = {
    "one pixel": [[0]],
    "hole": [[0, 0, 0], [0, 255, 0], [0, 0, 0]],
    "nested islands": np.minimum.reduce(np.meshgrid(*[np.minimum(np.arange(9), np.arange(9)[::-1])] * 2)) % 2,
    "diagonal touch": [[0, 1], [1, 0]],
    "holes touching at a corner": [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
    "pinched ring": [[0, 0, 255], [0, 255, 0], [0, 0, 0]],
    "border": [[0, 255, 0], [255, 255, 255], [1, 1, 1]],
    "line": [[2, 2, 0, 0, 2]],
}


@pytest.mark.parametrize("name", SHAPES)
def test_rasterised_polygons_are_the_labels(name):
    labels = np.array(SHAPES[name], dtype=np.uint8)
    collection = convert(labels)
    np.testing.assert_array_equal(rasterise(collection, labels.shape), labels)
    for feature in collection["features"]:
        outer, *holes = feature["geometry"]["coordinates"]
        assert area(outer) > 0 and all(area(hole) < 0 for hole in holes)
        assert all(ring[0] == ring[-1] and len(ring) >= 4 for ring in (outer, *holes))
        assert crossings(feature) == 0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 14), st.integers(1, 14))
def test_random_maps_come_back_exactly(seed, height, width):
    labels = np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], dtype=np.uint8), size=(height, width))
    collection = convert(labels)
    np.testing.assert_array_equal(rasterise(collection, labels.shape), labels)
    for feature in collection["features"]:
        for ring in feature["geometry"]["coordinates"]:
            corners = [tuple(point) for point in ring[:-1]]
            assert len(set(corners)) == len(corners)  # no ring passes a point twice: valid in the sense of OGC


def test_holes_that_touch_at_a_corner_are_two_rings():
    feature = convert(np.array(SHAPES["holes touching at a corner"], dtype=np.uint8))["features"][0]
    assert len(feature["geometry"]["coordinates"]) == 3


def test_coordinates_are_level_zero_x_y():
    labels = np.full((4, 6), 255, dtype=np.uint8)
    labels[1:3, 2:5] = 1
    (feature,) = convert(labels, downsample=8.5, mpp=0.5)["features"]
    (ring,) = feature["geometry"]["coordinates"]
    assert {tuple(p) for p in ring} == {(17.0, 8.5), (42.5, 8.5), (42.5, 25.5), (17.0, 25.5)}
    assert feature["geometry"]["type"] == "Polygon" and feature["type"] == "Feature"
    assert feature["properties"]["objectType"] == "annotation"
    assert feature["properties"]["classification"] == {"name": "b", "color": [0, 200, 0]}
    measured = feature["properties"]["measurements"]
    assert measured == {"Area µm²": pytest.approx(6 * 4.25**2, abs=1e-3), "Share of labelled area": 1.0}
    uuid.UUID(feature["id"])


def test_identifiers_are_unique_and_repeatable():
    labels = smooth(np.random.default_rng(1), (60, 60), 2)
    ids = [feature["id"] for feature in convert(labels)["features"]]
    assert len(set(ids)) == len(ids) > 5
    assert ids == [feature["id"] for feature in convert(labels)["features"]]


@pytest.mark.parametrize("sigma", [0.0, 0.8, 2.0])
def test_simplified_neighbours_fit_and_stay_valid(sigma):
    rng = np.random.default_rng(5)
    for _ in range(4):
        labels = np.pad(smooth(rng, (14, 14), sigma), 3)  # a frame, so that no pixel lies in a corner of the map
        collection = labels_to_geojson(labels, classes=["a", "b", "c"], colors=COLORS, min_area=0)
        rings = [ring for feature in collection["features"] for ring in feature["geometry"]["coordinates"]]
        # Every outline between two regions is walked once in each direction, so that the areas add up to the whole.
        assert sum(area(ring) for ring in rings) == pytest.approx(labels.size)
        assert sum(crossings(feature) for feature in collection["features"]) == 0


def test_simplification_keeps_its_tolerance_and_saves_points():
    y, x = np.mgrid[:200, :200]
    labels = ((y - 100) ** 2 + (x - 100) ** 2 < 80**2).astype(np.uint8)
    exact, simpler = convert(labels), convert(labels, tolerance=0.75)
    count = [sum(len(ring) for f in c["features"] for ring in f["geometry"]["coordinates"]) for c in (exact, simpler)]
    assert count[1] < 0.5 * count[0]
    fine = np.array(exact["features"][1]["geometry"]["coordinates"][0])
    coarse = np.array(simpler["features"][1]["geometry"]["coordinates"][0])
    a, b = coarse[:-1, None], coarse[1:, None]
    t = np.clip(((fine - a) * (b - a)).sum(-1) / ((b - a) ** 2).sum(-1), 0, 1)[..., None]
    assert np.linalg.norm(a + t * (b - a) - fine, axis=-1).min(axis=0).max() <= 0.75 + 1e-9


def test_small_regions_and_holes_are_left_out():
    labels = np.zeros((10, 10), dtype=np.uint8)
    labels[2, 2] = 1
    labels[5:8, 5:8] = 2
    collection = convert(labels, min_area=4)
    assert [f["properties"]["classification"]["name"] for f in collection["features"]] == ["a", "c"]
    assert len(collection["features"][0]["geometry"]["coordinates"]) == 2
    assert collection["features"][0]["properties"]["measurements"]["Area px²"] == 90


def test_large_tolerance_does_not_erase_regions():
    labels = np.full((5, 5), 255, dtype=np.uint8)
    labels[2, 2] = 0
    (feature,) = convert(labels, tolerance=3)["features"]
    assert area(feature["geometry"]["coordinates"][0]) == 1


def test_nothing_but_ignored_pixels_gives_no_feature():
    collection = convert(np.full((3, 3), 255, dtype=np.uint8))
    assert collection["type"] == "FeatureCollection" and collection["features"] == []


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="colour per class"):
        labels_to_geojson(np.zeros((2, 2), np.uint8), classes=["a"], colors=COLORS)


def test_stores_give_the_polygons_of_arrays(tmp_path):
    labels = smooth(np.random.default_rng(3), (130, 171), 3)
    store = zarr.create_array(str(tmp_path / "l.zarr"), shape=labels.shape, chunks=(32, 50), dtype="uint8")
    store[:] = labels
    for options in ({}, {"max_pixels": 4000, "mpp": 0.5, "tolerance_um": 1.0}, {"max_edges": 400}):
        assert convert(store, **options) == convert(labels, **options)


def test_large_maps_are_traced_on_a_coarser_level_that_is_named():
    labels = smooth(np.random.default_rng(3), (131, 171), 6)
    collection = convert(labels, downsample=4.0, mpp=0.5, max_pixels=6000, tolerance=0.75)
    found = collection["properties"]
    assert found["halvings"] == 1 and found["pixel_px"] == 8.0 and found["pixel_um"] == 4.0
    assert found["tolerance_px"] == 0.75 * 8 + 4 and found["tolerance_um"] == found["tolerance_px"] * 0.5
    assert convert(labels, max_pixels=1500)["properties"]["halvings"] == 2
    points = np.array([p for f in collection["features"] for ring in f["geometry"]["coordinates"] for p in ring])
    assert points.min() == 0 and points[:, 0].max() == 171 * 4 and points[:, 1].max() == 131 * 4  # odd sides end at the map's
    # Without simplification the polygons are the halved labels.
    exact = convert(labels, max_pixels=6000)
    assert exact["properties"]["tolerance_px"] == 1.0 and exact["properties"]["tolerance_um"] is None
    halved = halve_labels(labels, 1)
    np.testing.assert_array_equal(rasterise(exact, labels.shape), halved.repeat(2, axis=0).repeat(2, axis=1)[:131, :171])
    measured = [f["properties"]["measurements"]["Area µm²"] for f in collection["features"]]
    assert sum(measured) == pytest.approx(halved.size * 4.0**2)


@pytest.mark.parametrize("angle", [0.0, 0.3, 0.7])
def test_straight_outlines_keep_the_tolerance_that_is_named(angle):
    y, x = np.mgrid[:240, :240] + 0.5
    distance = (x - 120) * np.cos(angle) + (y - 120) * np.sin(angle)  # from a straight line
    collection = convert((distance > 0).astype(np.uint8), max_pixels=2000, tolerance=0.75)
    assert collection["properties"]["halvings"] == 3
    ring = np.array(collection["features"][1]["geometry"]["coordinates"][0])
    inner = ring[((ring > 0) & (ring < 240)).all(axis=1)]
    off = abs((inner[:, 0] - 120) * np.cos(angle) + (inner[:, 1] - 120) * np.sin(angle))
    assert len(inner) or angle == 0
    assert (off <= collection["properties"]["tolerance_px"] + 1).all()  # a pixel edge lies within 1 px of the line


def test_long_outlines_are_traced_on_a_coarser_level():
    labels = np.random.default_rng(0).integers(0, 3, (64, 64), dtype=np.uint8)
    edges = int((labels[1:] != labels[:-1]).sum() + (labels[:, 1:] != labels[:, :-1]).sum())
    assert convert(labels, max_edges=edges)["properties"]["halvings"] == 0
    assert convert(labels, max_edges=edges - 1)["properties"]["halvings"] == 1


def test_smallest_areas_are_those_of_the_labels_at_any_level():
    labels = np.zeros((64, 64), dtype=np.uint8)
    labels[8:16, 8:16] = 1  # 64 px
    labels[32:36, 32:36] = 2  # 16 px
    for max_pixels in (4096, 1024):
        names = [
            f["properties"]["classification"]["name"] for f in convert(labels, min_area=64, max_pixels=max_pixels)["features"]
        ]
        assert names == ["a", "b"]


def test_tolerance_in_micrometres_is_that_in_pixels():
    labels = smooth(np.random.default_rng(7), (60, 60), 3)
    by_px = convert(labels, downsample=2.0, mpp=0.25, tolerance=1.5)
    assert convert(labels, downsample=2.0, mpp=0.25, tolerance_um=0.75) == by_px
    assert by_px["properties"]["tolerance_um"] == 0.75
    for wrong in ({"tolerance_um": 1.0}, {"tolerance_um": -1.0, "mpp": 1.0}):
        with pytest.raises(InputError, match="tolerance_um"):
            convert(labels, **wrong)


def test_large_maps_are_fast():
    rng = np.random.default_rng(0)
    labels = smooth(rng, (1000, 1750), 6)
    begin = time.process_time()
    collection = labels_to_geojson(labels, classes=["a", "b", "c"], colors=COLORS)
    assert time.process_time() - begin < 10  # a sixteenth of a large slide
    assert len(collection["features"]) > 1000


def test_written_file_is_json(tmp_path):
    collection = convert(np.array([[0, 1]], dtype=np.uint8))
    path = write_geojson(tmp_path / "new" / "x.geojson", collection)
    assert json.loads(path.read_text(encoding="utf-8")) == collection
    assert [p.name for p in path.parent.iterdir()] == ["x.geojson"]
