"""What MONAI Deploy hands over for one slide: found, checked, or refused with a reason. Needs no App SDK."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tifffile
from dicom_slides import write_dicom_slide

from monai_vslp.apps.deploy import FORMATS, find_model, find_slide, prepare
from monai_vslp.utils.errors import InputError, SlideError
from monai_vslp.workflows.bundle import create_run

CLASSES = ["tumour", "stroma"]


def write_slide(path, mpp=0.5):
    """A pyramidal TIFF that counts as a slide; without ``mpp`` it does not say how large its pixels are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as writer:
        for side in (512, 256):
            pixels = np.full((side, side, 3), 200, np.uint8)
            writer.write(
                pixels, tile=(256, 256), photometric="rgb", subfiletype=int(side < 512), **(scale if side == 512 else {})
            )
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A bundle folder whose weights are never loaded here."""
    run = tmp_path_factory.mktemp("models") / "run"
    create_run(run, {"classes": CLASSES}, CLASSES)
    (run / "models").mkdir(exist_ok=True)
    (run / "models" / "model.pt").touch()
    return run


def test_the_slide_is_found_wherever_a_platform_lays_it(tmp_path):
    slide = write_slide(tmp_path / "in" / "study" / "series" / "s.tif")
    (tmp_path / "in" / "notes.txt").write_text("no slide")
    (tmp_path / "in" / ".hidden.svs").touch()
    assert find_slide(slide) == find_slide(tmp_path / "in") == slide
    image = np.full((300, 300, 3), 220, np.uint8)
    series = write_dicom_slide(tmp_path / "dicom" / "study" / "series", image)
    assert find_slide(series) == find_slide(tmp_path / "dicom") == series  # its files are one slide


def test_no_slide_or_two_slides_are_refused(tmp_path):
    with pytest.raises(InputError, match="absent does not exist"):
        find_slide(tmp_path / "absent")
    with pytest.raises(InputError, match="(?s)no slide in .*it is empty"):
        find_slide(tmp_path)
    (tmp_path / "letter.pdf").touch()
    with pytest.raises(InputError, match="(?s)no slide in .*it holds letter.pdf"):
        find_slide(tmp_path)
    with pytest.raises(InputError, match="letter.pdf is no slide"):
        find_slide(tmp_path / "letter.pdf")
    write_slide(tmp_path / "a.tif")
    write_slide(tmp_path / "b" / "b.tif")
    with pytest.raises(InputError, match="2 slides in .*a.tif, b/b.tif.*one run takes one slide"):
        find_slide(tmp_path)


def test_the_model_is_a_bundle_or_a_folder_with_one(model, tmp_path):
    assert find_model(model) == find_model(model.parent) == model
    with pytest.raises(InputError, match="absent does not exist.*monai-vslp train"):
        find_model(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no model"):
        find_model(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(model, tmp_path / name)
    with pytest.raises(InputError, match="holds 2 models"):
        find_model(tmp_path)
    (tmp_path / "a" / "models" / "model.pt").unlink()
    with pytest.raises(InputError, match="a has no weights.*model.pt does not exist"):
        find_model(tmp_path / "a")


def test_without_a_table_proportions_are_unknown(model, tmp_path):
    job = prepare(write_slide(tmp_path / "s.tif"), model)
    assert (job.table, job.row, job.mpp) == (None, {}, None)
    assert set(FORMATS) <= set(job.formats) and "ome_tiff" in job.formats, "formats of the model's config are kept"


@pytest.mark.parametrize("name", ["proportions.csv", "s.csv"])
def test_a_table_beside_the_slide_is_read(model, tmp_path, name):
    slide = write_slide(tmp_path / "s.tif", mpp=None)
    (tmp_path / name).write_text("image,tumour,stroma,mpp\nother.tif,10,90,1\ns.tif,60,40,0.25\n")
    job = prepare(tmp_path, model)
    assert (job.slide, job.table, job.mpp) == (slide, tmp_path / name, 0.25)


def test_json_beside_or_in_the_slide_is_read(model, tmp_path):
    series = write_dicom_slide(tmp_path / "in", np.full((300, 300, 3), 220, np.uint8))
    (series / "proportions.json").write_text(json.dumps({"proportions": {"tumour": "20-30"}, "mpp": 0.4, "slide": "in"}))
    job = prepare(series, model)
    assert job.slide == series and job.row["tumour"] == "20-30" and job.mpp == 0.4
    (series / "proportions.json").rename(tmp_path / "proportions.json")
    assert prepare(series, model) == type(job)(**vars(job) | {"table": tmp_path / "proportions.json"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "no JSON.*expected"),
        ("[]", "must hold an object of proportions, mpp, slide"),
        ('{"tumour": 60}', r"unknown: tumour.*expected \{\"proportions\""),
        ('{"proportions": {"tumor": 60}}', "tumor not among them"),
        ('{"proportions": {"tumour": 60, "stroma": 60}}', "sum|100"),
        ('{"proportions": {"tumour": 60}, "mpp": "half"}', "'half' is not a positive number"),
        ('{"proportions": {"tumour": 60}, "slide": "other"}', "about the slide 'other', but the slide is 's.tif'"),
    ],
)
def test_json_that_cannot_be_meant_is_refused(model, tmp_path, content, said):
    write_slide(tmp_path / "s.tif")
    (tmp_path / "proportions.json").write_text(content)
    with pytest.raises(InputError, match=said):
        prepare(tmp_path, model)


def test_tables_that_do_not_fit_are_refused(model, tmp_path):
    write_slide(tmp_path / "s.tif")
    (tmp_path / "proportions.csv").write_text("image,tumour,stroma\nt.tif,60,40\n")
    with pytest.raises(InputError, match="no row for 's.tif'"):
        prepare(tmp_path, model)
    (tmp_path / "proportions.json").write_text('{"proportions": {"tumour": 60}}')
    with pytest.raises(InputError, match="several files give proportions of s.tif"):
        prepare(tmp_path, model)


def test_unknown_pixel_size_says_where_to_write_it(model, tmp_path):
    write_slide(tmp_path / "s.tif", mpp=None)
    with pytest.raises(SlideError, match='(?s)does not say how large.*"mpp" in proportions.json'):
        prepare(tmp_path, model)
    (tmp_path / "proportions.json").write_text('{"mpp": 0.5}')
    assert prepare(tmp_path, model).mpp == 0.5, "the size alone may be given"


def test_damaged_slides_are_refused(model, tmp_path):
    content = write_slide(tmp_path / "s.tif").read_bytes()
    (tmp_path / "s.tif").unlink()
    (tmp_path / "s.svs").write_bytes(content[:3000])
    with pytest.raises(SlideError, match="s.svs cannot be read"):
        prepare(tmp_path, model)
