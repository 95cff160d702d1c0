"""Regions as masks on the grid of the maps."""

import json

import numpy as np
import pytest

from monai_vslp.io.regions import region_masks
from monai_vslp.utils.errors import InputError


def _whole(found, shape):
    mask, window = found
    full = np.zeros(shape, dtype=bool)
    full[window] = mask
    return full


def _feature(name, rings, **extra):
    return {"type": "Feature", "properties": {"name": name, **extra}, "geometry": {"type": "Polygon", "coordinates": rings}}


def _square(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def test_polygons_with_holes_cover_the_pixels_whose_centre_is_inside(tmp_path):
    path = tmp_path / "r.geojson"
    rings = [_square(40, 80, 240, 160), _square(80, 100, 120, 140)]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [_feature("core A", rings)]}))
    shape = (60, 80)
    found = region_masks(["core A"], path, np.ones(shape, np.float32), 4.0)
    expected = np.zeros(shape, dtype=bool)
    expected[20:40, 10:60] = True
    expected[25:35, 20:30] = False
    assert np.array_equal(_whole(found["core A"], shape), expected)


def test_polygons_of_one_name_are_one_region_and_classes_name_too(tmp_path):
    path = tmp_path / "r.geojson"
    unnamed = _feature(None, [_square(0, 0, 8, 8)], classification={"name": "block"})
    features = [_feature("block", [_square(16, 16, 24, 24)]), unnamed]
    path.write_text(json.dumps(features))  # QuPath also writes a bare list
    found = _whole(region_masks(["block"], path, np.ones((10, 10), np.float32), 4.0)["block"], (10, 10))
    assert found.sum() == 8 and found[0, 0] and found[5, 5] and not found[2, 2]


def test_pieces_of_tissue_are_numbered_from_top_to_bottom(tmp_path):
    mass = np.zeros((300, 200), np.float32)
    mass[200:280, 10:90] = 1
    mass[20:120, 60:180] = 0.5
    mass[150, 150] = 1  # a crumb
    found = region_masks(["piece 1", "Piece 2"], tmp_path / "absent.geojson", mass, 4.0)
    assert np.array_equal(_whole(found["piece 1"], mass.shape), mass == 0.5)
    assert np.array_equal(_whole(found["Piece 2"], mass.shape)[150:, :100], mass[150:, :100] > 0)
    with pytest.raises(InputError, match="2 pieces"):
        region_masks(["piece 3"], tmp_path / "absent.geojson", mass, 4.0)


def test_regions_that_are_not_there_are_named(tmp_path):
    path, mass = tmp_path / "r.geojson", np.ones((10, 10), np.float32)
    with pytest.raises(InputError, match="QuPath"):
        region_masks(["a"], path, mass, 1.0)
    path.write_text(json.dumps([_feature("b", [_square(0, 0, 4, 4)]), _feature("far", [_square(90, 90, 99, 99)])]))
    with pytest.raises(InputError, match="no region 'a'.*'b'"):
        region_masks(["a"], path, mass, 1.0)
    with pytest.raises(InputError, match="outside the slide"):
        region_masks(["far"], path, mass, 1.0)
    path.write_text("{")
    with pytest.raises(InputError, match="no GeoJSON"):
        region_masks(["a"], path, mass, 1.0)
