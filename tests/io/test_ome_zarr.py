"""Maps as OME-Zarr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zarr

from monai_vslp.io.ome_zarr import write_ome_zarr
from monai_vslp.utils.errors import InputError

NAMES, COLORS = ["gland", "Drüse, groß"], [[200, 0, 17], [4, 5, 6]]
OPTIONS = {"classes": NAMES, "colors": COLORS, "mpp": 2.0, "chunk": 64}


def maps(height=201, width=157, seed=0):
    rng = np.random.default_rng(seed)
    first = rng.random((height, width), dtype=np.float32)
    labels = rng.integers(0, 2, (height, width)).astype(np.uint8)
    labels[rng.random((height, width)) < 0.3] = 255
    image = rng.integers(0, 256, (3, height, width)).astype(np.uint8)
    return {"image": image, "confidence": np.stack([first, 1 - first]), "labels": labels}


def reference_mean(level):
    """The next level, with whole rows and columns at once."""
    padded = np.pad(level, ((0, 0), (0, level.shape[1] % 2), (0, level.shape[2] % 2)), mode="edge").astype(np.float64)
    mean = padded.reshape(len(level), padded.shape[1] // 2, 2, padded.shape[2] // 2, 2).mean(axis=(2, 4))
    return np.round(mean).astype(np.uint8) if level.dtype == np.uint8 else mean


def attributes(folder):
    described = json.loads((folder / "zarr.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert described["zarr_format"] == 3
    return described


def check_image(folder, mpp):
    """The rules of NGFF 0.5 for a multiscale image; returns its levels."""
    described = attributes(folder)
    assert described["node_type"] == "group"
    ome = described["attributes"]["ome"]
    assert ome["version"] == "0.5"
    (multiscale,) = ome["multiscales"]
    axes = multiscale["axes"]
    assert 2 <= len(axes) <= 5 and len({axis["name"] for axis in axes}) == len(axes)
    kinds = [axis["type"] for axis in axes]
    assert kinds == ["channel", "space", "space"][3 - len(axes) :]  # channels before space, two or three of space
    assert [axis["name"] for axis in axes][-2:] == ["y", "x"]
    assert [axis.get("unit") for axis in axes if axis["type"] == "space"] == [None if mpp is None else "micrometer"] * 2
    levels = []
    for index, dataset in enumerate(multiscale["datasets"]):
        (transform,) = dataset["coordinateTransformations"]  # exactly one scale, and it comes first
        assert transform["type"] == "scale"
        size = (1.0 if mpp is None else mpp) * 2**index
        assert transform["scale"] == [*([1.0] * (len(axes) - 2)), size, size]
        array = attributes(folder / dataset["path"])
        assert array["node_type"] == "array" and array["dimension_names"] == [axis["name"] for axis in axes]
        levels.append(zarr.open_array(folder / dataset["path"], mode="r"))
    assert len({level.dtype for level in levels}) == 1 and all(level.ndim == len(axes) for level in levels)
    for finer, coarser in zip(levels, levels[1:]):  # from the highest resolution to the lowest
        assert coarser.shape[-2:] == tuple(-(-side // 2) for side in finer.shape[-2:])
        assert coarser.shape[:-2] == finer.shape[:-2]
    return ome, levels


def check_omero(ome, levels, names):
    channels = ome["omero"]["channels"]
    assert [channel["label"] for channel in channels] == names and len(channels) == levels[0].shape[0]
    for channel in channels:
        assert len(channel["color"]) == 6 and int(channel["color"], 16) >= 0
        assert set(channel["window"]) == {"min", "max", "start", "end"}
    return channels


def test_folder_is_valid_and_levels_are_right(tmp_path):
    given = maps()
    u = (given["confidence"] > 0.5).astype(np.float16)
    extra = {"psi": np.array([0.5, -np.inf]), "residual": float("nan"), "classes": NAMES}
    path = write_ome_zarr(tmp_path / "s.ome.zarr", u=u, attributes=extra, **given, **OPTIONS)
    assert list(tmp_path.iterdir()) == [path]
    expected = {"": given["image"], "segmentation": u.astype(np.uint8) * 255}
    expected["confidence"] = np.round(given["confidence"] * 255).astype(np.uint8)
    for folder, level in expected.items():
        ome, levels = check_image(path / folder, 2.0)
        names = NAMES if folder else ["red", "green", "blue"]
        channels = check_omero(ome, levels, names)
        assert channels[0]["color"] == ("C80011" if folder else "FF0000")
        assert [array.shape[-2:] for array in levels] == [(201, 157), (101, 79), (51, 40)]
        for array in levels:
            np.testing.assert_array_equal(array[:], level)
            assert array.chunks == (1, *(min(64, side) for side in array.shape[1:]))
            level = reference_mean(level)
    assert attributes(path)["attributes"]["monai_vslp"] == {"psi": [0.5, "-Infinity"], "residual": "NaN", "classes": NAMES}


def test_labels_have_names_and_colors(tmp_path):
    given = maps()
    path = write_ome_zarr(tmp_path / "s.zarr", **given, **OPTIONS)
    assert attributes(path / "labels")["attributes"]["ome"] == {"version": "0.5", "labels": ["labels"]}
    ome, levels = check_image(path / "labels" / "labels", 2.0)
    expected = np.where(given["labels"] == 255, 0, given["labels"] + 1)
    np.testing.assert_array_equal(levels[0][:], expected)
    _, of_image = check_image(path, 2.0)
    assert [level.shape for level in levels] == [level.shape[1:] for level in of_image]
    for finer, coarser in zip(levels, levels[1:]):
        fine, coarse = finer[:], coarser[:]
        for row, col in np.ndindex(coarse.shape):
            counts = Counter(fine[2 * row : 2 * row + 2, 2 * col : 2 * col + 2].ravel().tolist())
            assert counts[int(coarse[row, col])] == max(counts.values())
    described = ome["image-label"]
    assert described["colors"] == [
        {"label-value": 1, "rgba": [200, 0, 17, 255]},
        {"label-value": 2, "rgba": [4, 5, 6, 255]},
    ]
    assert {item["label-value"]: item["class"] for item in described["properties"]} == {1: "gland", 2: "Drüse, groß"}
    source = (path / "labels" / "labels" / described["source"]["image"]).resolve()
    assert source == path.resolve() and "multiscales" in attributes(source)["attributes"]["ome"]


@pytest.mark.parametrize("source", ["numpy", "zarr"])
def test_half_precision(tmp_path, source):
    confidence = maps()["confidence"].astype(np.float16)
    given = confidence
    if source == "zarr":  # chunks that do not fit those of the result
        given = zarr.create_array(tmp_path / "in.zarr", data=confidence, chunks=(2, 50, 70))
    path = write_ome_zarr(tmp_path / "s.zarr", confidence=given, dtype="float16", **(OPTIONS | {"mpp": None}))
    ome, levels = check_image(path, None)
    channels = check_omero(ome, levels, NAMES)
    assert channels[0]["window"]["max"] == 1
    level = confidence
    for array in levels:
        assert array.dtype == np.float16
        np.testing.assert_allclose(array[:], level, atol=5e-4)
        level = reference_mean(array[:])
    np.testing.assert_array_equal(levels[0][:], confidence)


def test_bytes_of_fractions_change_type_only(tmp_path):
    stored = np.round(maps()["confidence"] * 255).astype(np.uint8)
    same = write_ome_zarr(tmp_path / "a.zarr", confidence=stored, **OPTIONS)
    np.testing.assert_array_equal(zarr.open_array(same / "0", mode="r")[:], stored)
    half = write_ome_zarr(tmp_path / "b.zarr", confidence=stored, dtype="float16", **OPTIONS)
    np.testing.assert_allclose(zarr.open_array(half / "0", mode="r")[:], stored / 255, atol=3e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (64, 65), (3, 130)])
def test_any_size(tmp_path, shape):
    labels = np.random.default_rng(0).integers(0, 2, shape).astype(np.int64)
    path = write_ome_zarr(tmp_path / "s.zarr", u=np.full((2, *shape), 0.5), labels=labels, **OPTIONS)
    _, levels = check_image(path / "labels" / "labels", 2.0)
    np.testing.assert_array_equal(levels[0][:], labels + 1)
    assert max(levels[-1].shape) <= 64
    _, of_u = check_image(path, 2.0)
    assert np.unique(of_u[-1][:]).tolist() == [128]


class Failing:
    """A map whose last rows cannot be read."""

    shape, dtype = (2, 200, 100), np.dtype(np.float32)

    def __getitem__(self, key):
        if key[1].stop > 150:
            raise OSError(28, "No space left on device")
        return np.full((2, *(part.stop - part.start for part in key[1:])), 0.5, np.float32)


def test_failure_leaves_the_old_folder(tmp_path):
    given = maps()
    path = write_ome_zarr(tmp_path / "s.zarr", **given, **OPTIONS)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(OSError, match="No space"):
        write_ome_zarr(path, confidence=Failing(), **OPTIONS)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="No space"):
        write_ome_zarr(tmp_path / "new.zarr", confidence=Failing(), **OPTIONS)
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_folder_is_replaced_as_a_whole(tmp_path):
    path = write_ome_zarr(tmp_path / "s.zarr", **maps(), **OPTIONS)
    small = {name: array[..., :40, :30] for name, array in maps(seed=1).items() if name != "image"}
    write_ome_zarr(path, **small, **OPTIONS)
    _, levels = check_image(path, 2.0)
    assert [level.shape for level in levels] == [(2, 40, 30)]
    assert sorted(file.name for file in path.iterdir()) == ["0", "labels", "zarr.json"]
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    return int(Path("/proc/self/status").read_text().split("Umask:")[1].split()[0], 8)


def test_a_failing_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    path = write_ome_zarr(tmp_path / "s.zarr", **maps(), **OPTIONS)
    before = (path / "zarr.json").read_bytes()
    rename = os.rename

    def failing(source, target):
        if Path(source).name == "new":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        write_ome_zarr(path, confidence=np.full((2, 9, 9), 0.5), **OPTIONS)
    assert (path / "zarr.json").read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.svs").write_text("precious")
    with pytest.raises(InputError, match="not replaced"):
        write_ome_zarr(tmp_path / "slides", **maps(), **OPTIONS)
    assert (tmp_path / "slides" / "a.svs").read_text() == "precious"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"confidence": np.full((3, 201, 157), 0.3)}, "confidence must be"),
        ({"confidence": np.full((2, 9, 157), 0.3)}, "one size"),
        ({"confidence": np.full((2, 201, 157), 1.5)}, "fractions of 0 to 1"),
        ({"confidence": np.full((2, 201, 157), np.nan)}, "fractions of 0 to 1"),
        ({"labels": np.full((201, 157), 2)}, "class indices 0 to 1"),
        ({"labels": np.full((201, 157), 0.0)}, "labels must be"),
        ({"image": np.zeros((201, 157, 3), np.uint8)}, "image must be"),
        ({"image": None, "confidence": None}, "give image"),
        ({"colors": COLORS[:1]}, "as many colours"),
        ({"classes": ["a", "a"]}, "different names"),
        ({"mpp": 0.0}, "pixel size"),
        ({"dtype": "int8"}, "uint8 or float16"),
        ({"chunk": 63}, "even side"),
    ],
)
def test_wrong_input_is_refused(tmp_path, changed, said):
    with pytest.raises(InputError, match=said):
        write_ome_zarr(tmp_path / "s.zarr", **(maps() | OPTIONS | changed))
    assert not list(tmp_path.iterdir())


LARGE = """
import re, sys
from pathlib import Path
import numpy as np
from monai_vslp.io.ome_zarr import write_ome_zarr

class Made:
    def __init__(self, leading, dtype):
        self.shape, self.dtype = (*leading, 4096, 3000), np.dtype(dtype)
    def __getitem__(self, key):
        rows, cols = (np.arange(part.start, part.stop) for part in key[-2:])
        plane = (rows[:, None] // 100 + cols // 100) % 2
        if len(self.shape) == 2:
            return plane.astype(np.uint8)
        return np.stack([plane, 1 - plane, 0 * plane, 0 * plane]).astype(self.dtype)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024

names = list("abcd")
options = {"mpp": 1.0, "classes": names, "colors": [[9, 9, 9]] * 4}
write_ome_zarr(sys.argv[1] + "/small.zarr", confidence=np.full((4, 1100, 1100), 0.25), **options)  # threads and codecs
Path("/proc/self/clear_refs").write_text("5")
before = peak()
write_ome_zarr(sys.argv[1] + "/large.zarr", confidence=Made((4,), np.float16), labels=Made((), np.uint8), **options)
print("GREW", peak() - before)
"""


def test_memory_does_not_grow_with_the_map(tmp_path):
    """110 MB of confidences and labels in a few tens of MB."""
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split("GREW")[1]) < 60
    _, levels = check_image(tmp_path / "large.zarr", 1.0)
    assert levels[0].shape == (4, 4096, 3000)
    np.testing.assert_array_equal(levels[0][:2, 4000:4001, 2998:3000], [[[255, 255]], [[0, 0]]])  # 40 + 29 is odd
