"""Maps as OME-TIFF."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter

import numpy as np
import pytest
import tifffile
import zarr

from monai_vslp.io.lazy_maps import TileFile
from monai_vslp.io.map_blocks import halve_block
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


@pytest.mark.parametrize("shape", [(1301, 1003), (512, 513), (37, 2050)])
@pytest.mark.parametrize("chunks", [(1, 512, 512), (3, 700, 300), (2, 64, 2048)])
def test_stores_give_the_bytes_of_arrays(tmp_path, shape, chunks):
    values = np.random.default_rng(2).integers(0, 256, (3, *shape), dtype=np.uint8)
    chunks = tuple(min(part, side) for part, side in zip(chunks, values.shape))
    store = zarr.create_array(str(tmp_path / "v.zarr"), shape=values.shape, chunks=chunks, dtype="uint8")
    store[:] = values
    paths = [
        write_ome_tiff(tmp_path / f"{name}.tif", data, channels=["a", "b", "c"], mpp=0.5, tile=256)
        for name, data in (("array", values), ("store", store))
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    levels = [values]
    with tifffile.TiffFile(paths[1]) as file:
        for level in file.series[0].levels:
            np.testing.assert_array_equal(level.asarray(), levels[-1])
            levels.append(halve_block(levels[-1], labels=False))
    assert len(levels) > 2
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".tif", ".zarr")]


def test_any_changed_value_changes_the_identity(tmp_path):
    labels = np.zeros((700, 600), np.uint8)
    identities = set()
    for row, col in ((0, 0), (511, 511), (512, 0), (699, 599)):
        for pyramid in (True, False):
            changed = labels.copy()
            changed[row, col] = 1
            path = write_ome_tiff(tmp_path / "l.tif", changed, channels=["label"], labels=True, pyramid=pyramid)
            identities.add(ome(path).get("UUID"))
    assert len(identities) == 4  # one for each content, whatever the file's form


MEASURED = """
import resource, sys, zarr
from pathlib import Path
import monai_vslp.io
from monai_vslp.io.ome_tiff import write_ome_tiff
folder, side = Path(sys.argv[1]), int(sys.argv[2])
store = zarr.create_array(str(folder / "l.zarr"), shape=(side, side), chunks=(1000, 1000), dtype="uint8", fill_value=1)
store[: side // 2, :1000] = 2
small = zarr.create_array(str(folder / "s.zarr"), shape=(600, 600), chunks=(100, 100), dtype="uint8", fill_value=1)
write_ome_tiff(folder / "s.tif", small, channels=["label"], labels=True)  # loads what is loaded at first use
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_ome_tiff(folder / "l.tif", store, channels=["label"], labels=True)
print("MiB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_does_not_grow_with_the_map(tmp_path):
    side = 20_000  # 400 MB of labels
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), str(side)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split("MiB")[1]) < 150
    with tifffile.TiffFile(tmp_path / "l.tif") as file:
        levels = file.series[0].levels
        assert [level.shape[-1] for level in levels] == [20_000, 10_000, 5000, 2500, 1250, 625, 313]
        coarse = levels[4].asarray()
    assert (coarse[:624, :62] == 2).all() and (coarse[626:] == 1).all() and (coarse[:, 64:] == 1).all()


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    """The disk is full while levels wait in their files."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TileFile, "halved", full)
    with pytest.raises(OSError, match="No space"):
        write_ome_tiff(tmp_path / "l.tif", np.zeros((1000, 1000), np.uint8), channels=["label"], labels=True)
    assert not list(tmp_path.iterdir())


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
