"""Maps as OME-TIFF."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections import Counter

import numpy as np
import pytest
import tifffile

from monai_vslp.io import ome_tiff
from monai_vslp.io.ome_tiff import read_label_tiff, read_map_tiff, to_uint8, write_ome_tiff
from monai_vslp.utils.errors import ImageReadError

DESCRIPTION = {"classes": ["gland", "Drüse"], "colors": [[1, 2, 3], [4, 5, 6]], "no_tissue": 255, "note": "text"}


def ome(path):
    with tifffile.TiffFile(path) as file:
        return ElementTree.fromstring(file.ome_metadata)


def test_label_pyramid_comes_back(tmp_path):
    labels = np.random.default_rng(0).integers(0, 3, (1301, 1003), dtype=np.uint8)
    path = write_ome_tiff(tmp_path / "labels.tif", labels, channels=["label"], labels=True, mpp=2.0, description=DESCRIPTION)
    np.testing.assert_array_equal(read_label_tiff(path), labels)
    with tifffile.TiffFile(path) as file:
        assert file.is_ome and len(file.pages) == 1  # lower levels are SubIFDs
        levels = file.series[0].levels
        assert [level.shape[-2:] for level in levels] == [(1301, 1003), (651, 502), (326, 251)]
        assert all(level.keyframe.tile == (512, 512) and level.keyframe.is_tiled for level in levels)
        first = levels[1].asarray()
        tag = file.pages[0].tags
        assert tag["XResolution"].value == (5000, 1) and tag["ResolutionUnit"].value == 3  # 2 µm/px in px/cm
    for row, col in ((0, 0), (17, 300), (324, 249)):
        block = labels[2 * row : 2 * row + 2, 2 * col : 2 * col + 2].ravel().tolist()
        counts = Counter(block)
        assert counts[int(first[row, col])] == max(counts.values())
    pixels = ome(path).find(".//{*}Pixels")
    assert float(pixels.get("PhysicalSizeX")) == float(pixels.get("PhysicalSizeY")) == 2.0
    assert pixels.get("PhysicalSizeXUnit") == "µm"
    assert [c.get("Name") for c in pixels.findall("{*}Channel")] == ["label"]
    values = {m.get("K"): m.text for m in ome(path).findall(".//{*}MapAnnotation/{*}Value/{*}M")}
    assert values.pop("note") == "text"
    assert {key: json.loads(value) for key, value in values.items()} == {k: v for k, v in DESCRIPTION.items() if k != "note"}


def test_majority_of_every_block():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, (1, 40, 40), dtype=np.uint8)
    half = ome_tiff._halve(labels, labels=True)
    for row in range(20):
        for col in range(20):
            counts = Counter(labels[0, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2].ravel().tolist())
            assert counts[int(half[0, row, col])] == max(counts.values())


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_confidences_keep_values_names_and_colors(tmp_path, dtype):
    values = np.random.default_rng(0).random((3, 600, 701)).astype(np.float32)
    values = to_uint8(values) if dtype == np.uint8 else values
    path = write_ome_tiff(tmp_path / "c.tif", values, channels=["a", "b", "ö"], colors=[[255, 0, 0], [0, 255, 0], [1, 2, 3]])
    read = read_map_tiff(path)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, values)
    half = read_map_tiff(path, longest=300)
    assert half.shape == (3, 300, 351)
    expected = values[:, :, :700].astype(np.float64).reshape(3, 300, 2, 350, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(half[:, :, :350], expected, atol=0.5001 if dtype == np.uint8 else 1e-6)
    channels = ome(path).findall(".//{*}Channel")
    assert [c.get("Name") for c in channels] == ["a", "b", "ö"]
    assert int(channels[2].get("Color")) & 0xFFFFFFFF == 0x010203FF
    assert ome(path).find(".//{*}Pixels").get("PhysicalSizeX") is None


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (37, 90)])
def test_small_images_need_no_pyramid(tmp_path, shape):
    labels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = write_ome_tiff(tmp_path / "s.tif", labels, channels=["label"], labels=True, pyramid=False)
    np.testing.assert_array_equal(read_label_tiff(path), labels)
    with tifffile.TiffFile(path) as file:
        assert not file.pages[0].is_tiled


def test_same_map_gives_same_bytes(tmp_path):
    labels = np.arange(600 * 600, dtype=np.uint32).reshape(600, 600).astype(np.uint8)
    paths = [write_ome_tiff(tmp_path / name, labels, channels=["label"], labels=True, mpp=1.0) for name in ("a.tif", "b.tif")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_ome_tiff(tmp_path / "l.tif", np.zeros((9, 9), np.uint8), channels=["label"], labels=True)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tifffile.TiffWriter, "write", full)
    with pytest.raises(OSError, match="No space"):
        write_ome_tiff(path, np.ones((9, 9), np.uint8), channels=["label"], labels=True)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_truncated_map_is_an_error(tmp_path, share):
    labels = np.random.default_rng(0).integers(0, 256, (700, 700), dtype=np.uint8)
    path = write_ome_tiff(tmp_path / "l.tif", labels, channels=["label"], labels=True)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ImageReadError, match="cannot be read"):
        read_label_tiff(path)


def test_other_maps_are_no_labels(tmp_path):
    path = write_ome_tiff(tmp_path / "c.tif", np.zeros((2, 9, 9), np.uint8), channels=["a", "b"])
    with pytest.raises(ImageReadError, match="no label map"):
        read_label_tiff(path)
    with pytest.raises(ImageReadError, match="cannot be read"):
        read_label_tiff(tmp_path / "missing.tif")


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (np.zeros((2, 9, 9), np.uint8), {"channels": ["a"]}),
        (np.zeros((9, 9), np.uint8), {"channels": ["a"], "colors": [[0, 0, 0]] * 2}),
        (np.zeros((9, 9), np.int64), {"channels": ["a"]}),
        (np.zeros((9, 9), np.float32), {"channels": ["a"], "labels": True}),
        (np.zeros((0, 9), np.uint8), {"channels": ["a"]}),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, array, options):
    with pytest.raises(ValueError, match="got"):
        write_ome_tiff(tmp_path / "x.tif", array, **options)
    assert not list(tmp_path.iterdir())
