"""The MONAI Deploy application, run by the App SDK in its own environment, as a hospital would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import tifffile
import torch
from dicom_slides import FRAME, SERIES, STUDY, write_dicom_slide
from monai.bundle import ConfigParser
from tiny_slides import FAST, TINY
from wheels import unpack_wheel

from monai_vslp.data.synthetic import CLASSES, write_slide
from monai_vslp.io import read_label_tiff, read_summary
from monai_vslp.workflows.bundle import create_run

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("VENV_DEPLOY", REPOSITORY / ".venv-deploy"))
PYTHON = ENVIRONMENT / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not (ENVIRONMENT / ".installed").is_file(),
    reason=f"needs the environment {ENVIRONMENT}; make it with: bash scripts/setup_deploy.sh",
)

SIDE = (1152, 512)
MANIFEST = {
    "4.2.0": {
        "holoscan": {
            "wheel-version": "4.2.0",
            "debian-version": "4.2.0.1-1",
            "base-images": {"dgpu": "registry.local/cuda:13.0.0-runtime-ubuntu24.04"},
            "build-images": {"dgpu": {}, "igpu": {}, "cpu": {}},
        }
    }
}
FAILURES = """
import json, sys
from monai_vslp.apps.deploy.app import main
for arguments in json.loads(sys.argv[1]):
    print("CODE", main(["app.py", *arguments]), flush=True)
from monai.deploy.conditions import CountCondition
from monai.deploy.core import Application
from monai_vslp.apps.deploy import SlideSegmentationOperator, SlideSourceOperator

class Own(Application):
    def compose(self):
        source = SlideSourceOperator(self, CountCondition(self, 1), source=sys.argv[2], name="source")
        self.add_flow(source, SlideSegmentationOperator(self, model=sys.argv[3], output=sys.argv[2], name="segmentation"))

try:
    Own().run()
except Exception as error:
    print("RAISED", type(error).__name__, error)
"""


def run(*words, timeout=600, **environment):
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "no_proxy": "*"} | environment
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=timeout, env=os.environ | settings, check=False
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with one bundle, as the packager lays models; its weights are by lot: the path is tested, not the accuracy."""
    folder = tmp_path_factory.mktemp("models")
    create_run(folder / "tissue", TINY | FAST | {"classes": list(CLASSES)}, CLASSES)
    torch.manual_seed(0)
    parser = ConfigParser(ConfigParser.load_config_file(folder / "tissue" / "configs" / "slide_inference.json"))
    (folder / "tissue" / "models").mkdir(exist_ok=True)
    torch.save(parser.get_parsed_content("network_def").state_dict(), folder / "tissue" / "models" / "model.pt")
    return folder


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    made = write_slide(tmp_path_factory.mktemp("slide") / "s1.tif", shape=SIDE)
    made.mask.unlink()
    return made


@pytest.fixture(scope="module")
def application(tmp_path_factory):
    """The folder that is packaged, made as docs/deploy.md says."""
    folder = unpack_wheel(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("package") / "app")
    for name in ("app.py", "app.yaml", "requirements.txt"):
        shutil.copy(folder / "monai_vslp" / "apps" / "deploy" / name, folder)
    return folder


def check_segmentation(path, labels):
    """What a DICOM validator asks, as far as it can go wrong here; and the labels come back."""
    dataset = pydicom.dcmread(path)
    for name in (
        "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality",
        "Manufacturer", "ManufacturerModelName", "DeviceSerialNumber", "SoftwareVersions", "ContentDate", "ContentTime",
        "ContentLabel", "InstanceNumber", "SeriesNumber", "ImageType", "SegmentationType", "SegmentSequence",
        "TotalPixelMatrixOriginSequence", "ContainerIdentifier", "SpecimenDescriptionSequence", "DimensionIndexSequence",
        "ReferencedSeriesSequence", "LossyImageCompression", "PositionReferenceIndicator",
    ):  # fmt: skip
        if name != "SpecimenDescriptionSequence" or "SpecimenDescriptionSequence" in dataset:
            assert dataset.get(name) not in (None, ""), name  # type 1
    for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"):
        assert name in dataset, name  # type 2
    assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
    assert all(pydicom.uid.UID(element.value).is_valid for element in dataset if element.VR == "UI" and element.VM == 1)
    assert dataset.NumberOfFrames == len(dataset.PerFrameFunctionalGroupsSequence)
    numbers = {item.SegmentNumber for item in dataset.SegmentSequence}
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        assert frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber in numbers
        place = frame.PlanePositionSlideSequence[0]
        assert 1 <= place.RowPositionInTotalImagePixelMatrix <= dataset.TotalPixelMatrixRows
        assert 1 <= place.ColumnPositionInTotalImagePixelMatrix <= dataset.TotalPixelMatrixColumns
    segmentation = highdicom.seg.segread(path)
    found = segmentation.get_total_pixel_matrix(combine_segments=True)
    np.testing.assert_array_equal(found, np.where(labels == 255, 0, labels.astype(int) + 1))
    assert [item.SegmentLabel for item in segmentation.SegmentSequence] == list(CLASSES)
    return segmentation


def test_python_app_py_segments_a_slide_with_its_table(application, models, slide, tmp_path):
    shares = [round(100 * share, 3) for share in slide.proportions]
    (tmp_path / "in").mkdir()
    shutil.copy(slide.path, tmp_path / "in")
    (tmp_path / "in" / "proportions.csv").write_text(f"image,{','.join(CLASSES)}\ns1.tif,{','.join(map(str, shares))}\n")
    done = run(PYTHON, application / "app.py", "-i", tmp_path / "in", "-o", tmp_path / "out", "-m", models)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "out" / "s1"
    assert f"results are in {folder}" in done.stderr
    summary = read_summary(folder)
    assert [summary["proportions"]["given"][name] for name in CLASSES] == pytest.approx(slide.proportions, abs=1e-4)
    assert [summary["proportions"]["refined"][name] for name in CLASSES] == pytest.approx(slide.proportions, abs=1e-3)
    labels = read_label_tiff(folder / "labels.tif")
    segmentation = check_segmentation(folder / "labels.dcm", labels)
    assert segmentation.PatientID == "unknown" and str(segmentation.StudyInstanceUID).startswith("2.25.")
    polygons = json.loads((folder / "segmentation.geojson").read_text())["features"]
    corners = np.concatenate([np.array(one["geometry"]["coordinates"][0]) for one in polygons])
    assert corners.min() >= 0 and SIDE[0] / 2 < corners[:, 1].max() <= SIDE[0] and corners[:, 0].max() <= SIDE[1]
    assert "s1" in (folder / "report.html").read_text() and (folder / "viewer").is_dir()
    assert (tmp_path / "out" / "report.html").is_file() and (folder / "manifest.json").is_file()


def test_a_dicom_slide_is_referred_to_and_paths_come_from_the_environment(application, models, slide, tmp_path):
    """As in an image that the packager made; the proportions lie in the folder of the series."""
    series = write_dicom_slide(tmp_path / "in" / "study", tifffile.imread(slide.path, key=0))
    shares = {name: f"{100 * share:.2f} %" for name, share in zip(CLASSES, slide.proportions)}
    (series / "proportions.json").write_text(json.dumps({"proportions": shares}))
    paths = {"INPUT": tmp_path / "in", "OUTPUT": tmp_path / "out", "MODEL": models, "CONFIG": application / "app.yaml"}
    done = run(PYTHON, application / "app.py", **{f"HOLOSCAN_{name}_PATH": str(path) for name, path in paths.items()})
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "out" / "study"
    summary = read_summary(folder)
    assert summary["options"]["reader"] == "wsidicom" and summary["level0_shape"] == list(SIDE)
    assert [summary["proportions"]["refined"][name] for name in CLASSES] == pytest.approx(slide.proportions, abs=1e-3)
    segmentation = check_segmentation(folder / "labels.dcm", read_label_tiff(folder / "labels.tif"))
    assert (segmentation.PatientID, segmentation.AccessionNumber, segmentation.ContainerIdentifier) == ("P-17", "A9", "box 7")
    assert (segmentation.StudyInstanceUID, segmentation.FrameOfReferenceUID) == (STUDY, FRAME)
    (referred,) = segmentation.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == SERIES != segmentation.SeriesInstanceUID
    assert [item.ReferencedSOPInstanceUID for item in referred.ReferencedInstanceSequence] == [f"{SERIES}.1"]
    spacing = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    assert [float(value) for value in spacing] == pytest.approx([summary["mpp"] / 1e3] * 2)


def test_failures_are_clear(models, slide, tmp_path):
    """No slide, two slides, no model, unknown µm/px by exit code and message; an operator in an app of others raises."""
    for name in ("none", "two", "scale"):
        (tmp_path / name).mkdir()
    for name in ("a.tif", "b.tif"):
        shutil.copy(slide.path, tmp_path / "two" / name)
    with tifffile.TiffWriter(tmp_path / "scale" / "scaleless.tif") as writer:
        for side in (512, 256):
            pixels = np.full((side, side, 3), 200, np.uint8)
            writer.write(pixels, tile=(256, 256), photometric="rgb", subfiletype=int(side < 512))
    out = ["-o", str(tmp_path / "out")]
    calls = [
        (["-i", str(tmp_path / "none"), "-m", str(models), *out], 2, "no slide in"),
        (["-i", str(tmp_path / "two"), "-m", str(models), *out], 2, "2 slides in"),
        (["-i", str(slide.path), "-m", str(tmp_path / "none"), *out], 2, "holds no model"),
        (["-i", str(tmp_path / "scale"), "-m", str(models), *out], 1, "does not say how large its pixels are"),
    ]
    done = run(PYTHON, "-c", FAILURES, json.dumps([call[0] for call in calls]), tmp_path / "none", models)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("CODE")] == [c[1] for c in calls]
    said = [line for line in done.stderr.splitlines() if line.startswith("monai-vslp deploy:")]
    assert len(said) == len(calls) and all(call[2] in line for call, line in zip(calls, said))
    assert "Traceback" not in done.stderr.split("[info]")[0], "what is wrong is said before the graph runs, without a traceback"
    assert "RAISED" in done.stdout and "no slide in" in done.stdout.split("RAISED")[1]
    assert not list((tmp_path / "out").glob("*"))


def test_the_packager_takes_the_app(application, models, tmp_path):
    """``monai-deploy package`` up to Docker, which is not here: it reads app.yaml, requirements and models."""
    (tmp_path / "artifacts.json").write_text(json.dumps(MANIFEST))
    words = ["package", application / "app.py", "-c", application / "app.yaml", "-m", models, "-t", "monai-vslp:0.1.0"]
    source = ["--platform", "x86_64", "--source", tmp_path / "artifacts.json", "-l", "DEBUG"]
    done = run(ENVIRONMENT / "bin" / "monai-deploy", *words, *source, HOME=str(tmp_path), PATH=str(ENVIRONMENT / "bin"))
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "docker" in said.lower(), said[-2000:]
    app, package = (
        json.loads(said.split(f"Begin {name} ===============")[1].split("================ End")[0])
        for name in ("app.json", "pkg.json")
    )
    assert app["command"] == '["python3", "/opt/holoscan/app/app.py"]' and app["input"]["formats"] == ["file"]
    assert package["models"] == {"tissue": "/opt/holoscan/models/tissue"} and package["resources"]["gpu"] == 0
    assert "highdicom==" in said and "monai-deploy-app-sdk==4.0.0" in said, "requirements.txt is taken"
