"""Outputs of images and slides, from arrays and from stores."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

import monai_vslp.io.output as module
from monai_vslp.io.ome_tiff import read_label_tiff, read_map_tiff
from monai_vslp.io.output import NO_TISSUE, WRITERS, SegmentationOutput, write_output
from monai_vslp.io.summary import read_summary
from monai_vslp.io.viewer import read_viewer
from monai_vslp.utils.atomic import write_text
from monai_vslp.utils.errors import InputError

CLASSES = ["gland", "stroma", "fat"]
SHAPE = (660, 700)
PICTURES = ("thumbnail.jpg", "overlay.jpg")
TABLES = ("proportions.csv", "proportions.json")
MAPS = ("labels.tif", "labels_argmax.tif", "confidence.tif", "segmentation.tif", "spread.tif")
ALWAYS = {*PICTURES, "energies.npz", "summary.json", "report.html"}


def softmax(values):
    values = np.exp(values - values.max(axis=0))
    return (values / values.sum(axis=0)).astype(np.float16)


@pytest.fixture(scope="module")
def maps():
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(2, 3, 22, 28)).repeat(30, axis=2).repeat(25, axis=3)
    mass = np.ones(SHAPE, np.float32)
    mass[:, :100] = 0
    mass[:, 100:120] = 0.5
    return {
        "confidence": softmax(coarse[0] + rng.normal(size=(3, *SHAPE)) * 0.2),
        "segmentation": softmax(2 * coarse[0] + coarse[1]),
        "fidelity": rng.random(SHAPE).astype(np.float16),
        "regularization": (0.1 * rng.random(SHAPE)).astype(np.float16),
        "mass": mass,
        "spread": (0.3 * rng.random(SHAPE)).astype(np.float16),
        "image": rng.integers(0, 256, (3, *SHAPE), dtype=np.uint8),
    }


def stored(maps, path, chunk):
    group = zarr.create_group(str(path))
    result = {}
    for name, values in maps.items():
        chunks = (*values.shape[:-2], *chunk)
        result[name] = group.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype)
        result[name][:] = values
    return result


def make(maps, **changes):
    fields = {
        "name": "s",
        "kind": "slide",
        "source": "s.svs",
        "classes": CLASSES,
        "colors": [[200, 0, 0], [0, 200, 0], [0, 0, 200]],
        "thumbnail": None,
        "refinement": {
            "psi": [0.1, -0.1, 0.0],
            "energies": [2.0, 1.0],
            "residual": 0.01,
            "converged": True,
            "reason": "tolerance",
            "proportions_given": [0.3, 0.3, 0.4],
            "proportions_refined": [0.3, 0.31, 0.39],
        },
        "mpp": 2.0,
        "downsample": 8.0,
        "level0_shape": (5280, 5600),
        "options": {"fingerprint": "f"},
        "seconds": {"tiles": 1.23456},
    }
    return SegmentationOutput(**(fields | maps | changes))


def without_report(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix not in (".npz", ".html")}


def test_stores_give_the_files_of_arrays(maps, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PICTURE_SIDE", 300)
    write_output(tmp_path / "arrays", make(maps))
    write_output(tmp_path / "stores", make(stored(maps, tmp_path / "m.zarr", (128, 200))))
    first, second = (without_report(tmp_path / name) for name in ("arrays", "stores"))
    assert set(first) == {*MAPS, *TABLES, *PICTURES, "segmentation.geojson", "summary.json"}
    for name, data in first.items():
        assert data == second[name], name
    with np.load(tmp_path / "arrays" / "energies.npz") as a, np.load(tmp_path / "stores" / "energies.npz") as b:
        assert set(a.files) == {"fidelity", "regularization", "spread"}
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])


def test_contents_are_those_of_the_maps(maps, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PICTURE_SIDE", 300)
    write_output(tmp_path, make(maps))
    tissue = maps["mass"] > 0
    expected = np.where(tissue, maps["segmentation"].astype(np.float32).argmax(axis=0), NO_TISSUE)
    np.testing.assert_array_equal(read_label_tiff(tmp_path / "labels.tif"), expected)
    first = np.where(tissue, maps["confidence"].astype(np.float32).argmax(axis=0), NO_TISSUE)
    np.testing.assert_array_equal(read_label_tiff(tmp_path / "labels_argmax.tif"), first)
    codes = read_map_tiff(tmp_path / "confidence.tif")
    np.testing.assert_allclose(codes / 255, maps["confidence"], atol=0.5 / 255 + 1e-6)
    with tifffile.TiffFile(tmp_path / "confidence.tif") as file:
        assert len(file.series[0].levels) == 2
    summary = read_summary(tmp_path)
    wide = maps["confidence"].astype(np.float64) * maps["mass"]
    found = [summary["proportions"]["confidence"][name] for name in CLASSES]
    np.testing.assert_allclose(found, wide.sum(axis=(1, 2)) / maps["mass"].sum(), rtol=1e-6)
    shares = [summary["proportions"]["labels"][name] for name in CLASSES]
    np.testing.assert_allclose(shares, [(expected == k).sum() / tissue.sum() for k in range(3)])
    assert summary["tissue_fraction"] == pytest.approx(tissue.mean()) and summary["shape"] == list(SHAPE)
    assert summary["seconds"] == {"tiles": 1.235}
    with np.load(tmp_path / "energies.npz") as file:  # 3 x 3 px
        reduced, values = file["fidelity"].astype(np.float32), np.where(tissue, maps["fidelity"].astype(np.float32), np.nan)
    assert reduced.shape == (220, 234)
    np.testing.assert_allclose(reduced[:, 34:233], values[:, 102:699].reshape(220, 3, 199, 3).mean(axis=(1, 3)), rtol=2e-3)
    assert np.isnan(reduced[:, :33]).all()
    np.testing.assert_allclose(reduced[:, 33], values[:, 100:102].reshape(220, 3, 2).mean(axis=(1, 2)), rtol=2e-3)
    with Image.open(tmp_path / "thumbnail.jpg") as picture:
        assert picture.size == (234, 220)
    polygons = json.loads((tmp_path / "segmentation.geojson").read_text())
    assert polygons["properties"]["pixel_um"] == 2.0 and len(polygons["features"]) > 5
    points = np.array([p for f in polygons["features"] for p in f["geometry"]["coordinates"][0]])
    assert points[:, 0].min() == 800 and points[:, 0].max() == 5600 and points[:, 1].max() == 5280  # level-0 (x, y)


def test_given_labels_are_taken_as_they_are(maps, tmp_path):
    labels = np.full(SHAPE, 2, np.uint8)
    labels[:330] = NO_TISSUE
    write_output(tmp_path, make(maps, labels=labels), formats=("ome_tiff",))
    np.testing.assert_array_equal(read_label_tiff(tmp_path / "labels.tif"), labels)
    summary = read_summary(tmp_path)
    assert summary["proportions"]["labels"] == {"gland": 0, "stroma": 0, "fat": 1} and summary["tissue_fraction"] == 0.5


def test_codes_of_8_bits_stand_for_fractions(maps, tmp_path):
    codes = {name: np.round(maps[name].astype(np.float32) * 255).astype(np.uint8) for name in ("confidence", "spread")}
    write_output(tmp_path, make(maps | codes), formats=("ome_tiff",))
    np.testing.assert_array_equal(read_map_tiff(tmp_path / "confidence.tif"), codes["confidence"])
    expected = make(maps).summary["proportions"]["confidence"]
    assert read_summary(tmp_path)["proportions"]["confidence"] == pytest.approx(expected, abs=2e-3)
    with np.load(tmp_path / "energies.npz") as file:
        assert np.nanmax(file["spread"]) <= 0.31


def test_images_have_one_level_and_the_thumbnail_that_was_given(maps, tmp_path):
    thumbnail = np.full((66, 70, 3), 200, np.uint8)
    changes = {"kind": "image", "thumbnail": thumbnail, "image": None, "mass": None, "spread": None}
    write_output(tmp_path, make(maps, **changes))
    assert {path.name for path in tmp_path.iterdir()} == {*MAPS[:4], *TABLES, *ALWAYS, "segmentation.geojson"}
    with tifffile.TiffFile(tmp_path / "segmentation.tif") as file:
        assert len(file.series[0].levels) == 1
    with Image.open(tmp_path / "thumbnail.jpg") as picture:
        assert picture.size == (70, 66) and np.abs(np.asarray(picture).astype(int) - 200).max() <= 2
    assert read_summary(tmp_path)["tissue_fraction"] == 1


def test_regions_and_views_are_in_summary_and_table(maps, tmp_path):
    region = {"name": "A1", "given": [1, 0, 0], "refined": [0.9, 0.1, 0], "psi": [0, -float("inf"), 0], "tissue_fraction": 0.2}
    write_output(tmp_path, make(maps, regions=[region], views={"mean": 2.5}), formats=("table",))
    summary = read_summary(tmp_path)
    assert summary["views"] == {"mean": 2.5}
    (found,) = summary["regions"]
    assert found["name"] == "A1" and found["given"] == {"gland": 1, "stroma": 0, "fat": 0} and found["psi"]["stroma"] is None
    assert found["labels"] is None and found["residual"] is None and found["tissue_fraction"] == 0.2
    rows = json.loads((tmp_path / "proportions.json").read_text())["rows"]
    assert [row["region"] for row in rows] == ["", "", "", "A1", "A1", "A1"]


def test_formats_of_others_can_be_added(maps, tmp_path):
    def counted(folder, output):
        total = int((np.asarray(output.label_map[:]) != NO_TISSUE).sum())
        return [write_text(folder / "count.txt", f"{output.name} {total}")]

    WRITERS.add("count_of_tissue", "number of pixels", counted)
    try:
        write_output(tmp_path, make(maps), formats=("count_of_tissue", "table"))
    finally:
        del WRITERS.components["count_of_tissue"]
    assert (tmp_path / "count.txt").read_text() == f"s {(maps['mass'] > 0).sum()}"
    assert {path.name for path in tmp_path.iterdir()} == {"count.txt", *TABLES, *ALWAYS}


def test_files_of_formats_left_out_do_not_stay_beside_other_maps(maps, tmp_path):
    (tmp_path / "notes.txt").write_text("of the user")
    write_output(tmp_path, make(maps), formats=("table", "geojson", "ome_zarr", "viewer"))
    files = read_summary(tmp_path)["files"]
    assert files == {
        "table": list(TABLES),
        "geojson": ["segmentation.geojson"],
        "ome_zarr": ["s.ome.zarr"],
        "viewer": ["viewer"],
    }
    assert {"notes.txt", "s.ome.zarr", "viewer", "segmentation.geojson"} <= {path.name for path in tmp_path.iterdir()}
    write_output(tmp_path, make(maps), formats=("table",))
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", *TABLES, *ALWAYS}


def test_an_annotation_for_dsa_has_the_polygons_and_the_proportions(maps, tmp_path):
    write_output(tmp_path, make(maps), formats=("geojson", "dsa"))
    annotation = json.loads((tmp_path / "annotation.json").read_text())
    polygons = json.loads((tmp_path / "segmentation.geojson").read_text())["features"]
    assert annotation["name"] == "s" and len(annotation["elements"]) >= len(polygons) > 0
    assert {element["group"] for element in annotation["elements"]} <= set(CLASSES)
    assert annotation["attributes"]["proportions"] == read_summary(tmp_path)["proportions"]


@pytest.mark.parametrize("names", [["../outside.txt"], ["/{outside}"], [""], ["."], 7])
def test_a_summary_that_was_tampered_with_deletes_nothing_else(maps, tmp_path, names):
    outside, folder = tmp_path / "outside.txt", tmp_path / "out"
    outside.write_text("of the user")
    write_output(folder, make(maps), formats=())
    names = [str(name).replace("/{outside}", str(outside)) for name in names] if isinstance(names, list) else names
    (folder / "summary.json").write_text(json.dumps(read_summary(folder) | {"files": {"other": names}}))
    write_output(folder, make(maps), formats=())
    assert outside.read_text() == "of the user" and {path.name for path in folder.iterdir()} == ALWAYS


def test_the_report_shows_the_viewer_of_slides_and_images(maps, tmp_path):
    thumbnail = np.moveaxis(maps["image"], 0, -1)
    for name, changes in (("slide", {}), ("image", {"kind": "image", "image": None, "thumbnail": thumbnail})):
        write_output(tmp_path / name, make(maps, **changes), formats=("viewer",))
        layers = [layer["key"] for layer in read_viewer(tmp_path / name / "viewer")["layers"]]
        assert {"image", "labels", "network", "confidence", "spread", "fidelity", "regularization"} <= set(layers)
        assert 'id="viewer"' in (tmp_path / name / "report.html").read_text()


def test_unknown_formats_are_guessed_before_anything_is_written(maps, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'geojson'"):
        write_output(tmp_path / "new", make(maps), formats=("table", "geojsn"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("writer", ["geojson", "table"])
def test_no_summary_says_complete_when_a_writer_fails(maps, tmp_path, monkeypatch, writer):
    def full(folder, output):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(WRITERS.components, writer, WRITERS._Component("", full))
    with pytest.raises(OSError, match="No space"):
        write_output(tmp_path, make(maps))
    assert (tmp_path / "labels.tif").exists() and not (tmp_path / "summary.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "changes",
    [
        {"mass": np.ones((5, 5))},
        {"labels": np.zeros(SHAPE, np.int64)},
        {"classes": ["a", "b"]},
        {"image": np.zeros((4, *SHAPE), np.uint8)},
    ],
)
def test_maps_that_do_not_fit_are_refused(maps, changes):
    with pytest.raises(InputError, match="s: "):
        make(maps, **changes)


def test_a_picture_needs_something_to_show(maps, tmp_path):
    with pytest.raises(InputError, match="neither thumbnail nor image"):
        write_output(tmp_path, make(maps, image=None), formats=())
