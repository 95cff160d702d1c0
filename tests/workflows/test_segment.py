import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile
from cases import SMALL_NETWORK, write_two_class_cohort
from PIL import Image

from monai_vslp.cli import main
from monai_vslp.data.synthetic import CLASSES, write_cohort, write_slide
from monai_vslp.io import read_label_tiff, read_summary
from monai_vslp.utils.errors import ImageReadError, InputError, ProportionError
from monai_vslp.workflows import segment, train

pytestmark = pytest.mark.usefixtures("one_mlflow_database")

TINY = SMALL_NETWORK | {"batch_size": 2, "progress": False}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_two_class_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def model(cohort, tmp_path_factory):
    return train(cohort, cohort.parent / "images", tmp_path_factory.mktemp("run") / "run", epochs=25, **TINY)


@pytest.fixture(scope="module")
def slide_model(tmp_path_factory):
    """Five classes, hardly trained: the path is tested, not the accuracy."""
    folder = tmp_path_factory.mktemp("five")
    table = write_cohort(folder, train=6, val=2, size=64)
    return train(table, folder / "images", folder / "run", epochs=1, **TINY)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return write_slide(tmp_path_factory.mktemp("slide") / "small.tif", shape=(2048, 2048))


def test_images_get_labels_on_their_own_grid_with_all_outputs(cohort, model, tmp_path):
    out = tmp_path / "out"
    assert segment([cohort.parent / "images"], model, out, proportions=cohort, progress=False) == {}
    assert len(list(out.glob("*/summary.json"))) == 8
    folder = out / "i7"
    labels = read_label_tiff(folder / "labels.tif")
    assert labels.shape == (64, 80) and labels.dtype == np.uint8 and labels.max() <= 1
    names = {path.name for path in folder.iterdir()}
    assert {
        "labels.tif", "labels_argmax.tif", "confidence.tif", "segmentation.tif", "spread.tif", "energies.npz", "thumbnail.jpg",
        "overlay.jpg", "segmentation.geojson", "summary.json", "report.html",
    } <= names  # fmt: skip
    summary = read_summary(folder)
    assert summary["residual"] < 1e-3 and summary["converged"]
    assert summary["proportions"]["refined"]["pink"] == pytest.approx(summary["proportions"]["given"]["pink"], abs=1e-4)
    assert (np.diff(summary["energies"]) <= 1e-9).all()
    truth = np.array(Image.open(cohort.parent / "masks" / "i7.png"))
    assert (labels == truth).mean() > 0.9, "two colours are learned from proportions"
    assert (out / "report.html").exists()


def test_evaluate_and_report_from_the_command_line(cohort, model, tmp_path, capsys):
    out = str(tmp_path / "out")
    images = [str(cohort.parent / "images" / f"i{i}.png") for i in (6, 7)]
    assert main(["--quiet", "segment", *images, "--model", str(model), "--output", out, "--proportions", str(cohort)]) == 0
    assert main(["evaluate", out, "--masks", str(cohort.parent / "masks")]) == 0
    assert "mIoU" in capsys.readouterr().out
    scores = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert "iou" in json.dumps(scores).lower()
    (tmp_path / "out" / "i6" / "report.html").unlink()
    assert main(["report", out]) == 0
    assert (tmp_path / "out" / "i6" / "report.html").exists()


def test_without_proportions_the_map_rests_on_the_image(cohort, model, tmp_path):
    image = cohort.parent / "images" / "i6.png"
    segment([image], model, tmp_path, progress=False)
    summary = read_summary(tmp_path / "i6")
    assert summary["proportions"]["given"] is None and summary["psi"] is None and summary["residual"] is None


def test_grey_rgba_and_16_bit_images_are_segmented(cohort, model, tmp_path):
    image = np.array(Image.open(cohort.parent / "images" / "i0.png"))
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(image[..., 0]).save(folder / "grey.png")
    Image.fromarray(np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])).save(folder / "rgba.png")
    tifffile.imwrite(folder / "deep.tif", image.astype(np.uint16) * 257, photometric="rgb")
    assert segment([folder], model, tmp_path / "out", progress=False) == {}
    deep, rgba = (read_label_tiff(tmp_path / "out" / name / "labels.tif") for name in ("deep", "rgba"))
    np.testing.assert_array_equal(deep, rgba)


def test_what_is_done_is_left_alone_until_something_changes(cohort, model, tmp_path):
    image = cohort.parent / "images" / "i6.png"
    path = tmp_path / "i6" / "summary.json"
    segment([image], model, tmp_path, progress=False)
    first = path.stat().st_mtime_ns
    segment([image], model, tmp_path, progress=False)
    assert path.stat().st_mtime_ns == first
    segment([image], model, tmp_path, proportions=cohort, progress=False)
    assert path.stat().st_mtime_ns > first


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ("image,pink,purpel\ni6.png,50,50\n", InputError, "Did you mean 'purple'"),
        ("image,pink,purple\ni6.png,-5,105\n", InputError, "negative"),
        ("image,pink,purple\ni6.png,nan,50\n", InputError, "row 2"),
        ("image,pink,purple\ni6.png,0,0\n", InputError, "zero"),
        ("image,pink,purple\ni5.png,50,50\n", ProportionError, "i6.png"),
    ],
)
def test_wrong_proportions_are_refused_before_computing(cohort, model, tmp_path, rows, error, message):
    table = tmp_path / "p.csv"
    table.write_text(rows)
    with pytest.raises(error, match=message):
        segment([cohort.parent / "images" / "i6.png"], model, tmp_path / "out", proportions=table, progress=False)
    assert not (tmp_path / "out").exists()


def test_wrong_inputs_are_refused_before_computing(cohort, model, tmp_path, capsys):
    with pytest.raises(InputError, match=r"gone\.png does not exist"):
        segment([tmp_path / "gone.png"], model, tmp_path / "out")
    with pytest.raises(InputError, match="no images"):
        segment([tmp_path], model, tmp_path / "out")
    with pytest.raises(InputError, match="no folder that 'monai-vslp train' wrote"):
        segment([cohort.parent / "images"], tmp_path, tmp_path / "out")
    good = cohort.parent / "images" / "i0.png"
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:3000])
    with pytest.raises(ImageReadError, match=r"cut\.png"):
        segment([good, cut], model, tmp_path / "out")
    shutil.copy(good, tmp_path / "i0.png")
    with pytest.raises(InputError, match="both write"):
        segment([good, tmp_path / "i0.png"], model, tmp_path / "out")
    assert main(["segment", str(cut), "--model", str(model), "--output", str(tmp_path / "out")]) == 2
    assert "cut.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_slide_is_segmented_through_cucim_with_its_proportions(slide_model, slide, tmp_path):
    table = tmp_path / "p.csv"
    shares = ",".join(f"{100 * p:.3f}" for p in slide.proportions)
    table.write_text(f"image,{','.join(CLASSES)}\nsmall.tif,{shares}\n")
    assert segment([slide.path], slide_model, tmp_path / "out", proportions=table, progress=False, tile=256) == {}
    folder = tmp_path / "out" / "small"
    summary = read_summary(folder)
    assert summary["kind"] == "slide" and summary["options"]["reader"] == "cucim"
    assert summary["level0_shape"] == [2048, 2048] and summary["mpp"] == pytest.approx(4.0)
    assert summary["residual"] < 1e-3
    labels = read_label_tiff(folder / "labels.tif")
    assert labels.shape == (256, 256)
    mask = np.array(Image.open(slide.mask))[1::2, 1::2]
    tissue, found = mask != 255, labels != 255
    assert (tissue & found).sum() / (tissue | found).sum() > 0.85
    given = summary["proportions"]["given"]
    assert all(summary["proportions"]["refined"][name] == pytest.approx(given[name], abs=1e-3) for name in CLASSES)
    collection = json.loads((folder / "segmentation.geojson").read_text())
    corners = np.concatenate([np.array(f["geometry"]["coordinates"][0]) for f in collection["features"]])
    assert corners.min() >= 0 and 1000 < corners.max() <= 2048, "polygons are in level-0 pixels"
    with tifffile.TiffFile(folder / "labels.tif") as file:
        assert file.is_ome
    assert not (folder / "tiles").exists(), "intermediate results are removed"


def test_slides_that_cannot_be_read_are_named_and_do_not_stop_others(slide_model, slide, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(slide.path, folder / "good.tif")
    tifffile.imwrite(folder / "scaleless.tif", np.full((512, 512, 3), 200, np.uint8), tile=(256, 256), photometric="rgb")
    with tifffile.TiffWriter(folder / "scaleless.tif") as writer:
        for side in (512, 256):
            writer.write(
                np.full((side, side, 3), 200, np.uint8), tile=(256, 256), photometric="rgb", subfiletype=int(side < 512)
            )
    (folder / "broken.svs").write_bytes(slide.path.read_bytes()[:5000])
    (folder / "scan.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 500)
    code = main(["--quiet", "segment", str(folder), "--model", str(slide_model), "--output", str(tmp_path / "out")])
    errors = capsys.readouterr().err
    assert code == 1
    assert "scaleless" in errors and "--mpp" in errors
    assert "broken" in errors and "scan" in errors and "DICOM" in errors
    assert read_summary(tmp_path / "out" / "good")["converged"] in (True, False)


def test_ctrl_c_in_a_slide_loses_nothing(slide_model, slide, tmp_path):
    """A real SIGINT between tiles; the next run takes over what was done and gives the same labels."""
    reference = tmp_path / "reference"
    segment([slide.path], slide_model, reference, progress=False, tile=128, batch_size=2)
    program = f"""
import sys, time
import monai_vslp.inferers.slide as s
from monai_vslp.cli import main
import monai_vslp.workflows as w
predict = s.SlideConfidence._predict
def slow(self, *a):
    time.sleep(0.05)
    return predict(self, *a)
s.SlideConfidence._predict = slow
segment = w.segment
w.segment = lambda *a, **k: segment(*a, **k, tile=128, batch_size=2)
sys.exit(main(["segment", {str(slide.path)!r}, "--model", {str(slide_model)!r}, "--output", {str(tmp_path / "out")!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    tiles = tmp_path / "out" / "small" / "tiles"
    deadline = time.monotonic() + 120
    while len(list(tiles.glob("tiles-*.npz"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-2000:]
    kept = len(list(tiles.glob("tiles-*.npz")))
    assert kept >= 3
    stamp = {path.name: path.stat().st_mtime_ns for path in tiles.glob("tiles-*.npz")}
    assert not (tmp_path / "out" / "small" / "summary.json").exists()
    segment([slide.path], slide_model, tmp_path / "out", progress=False, tile=128, batch_size=2)
    assert stamp
    for name in ("labels.tif", "confidence.tif"):
        first, second = (tifffile.imread(root / "small" / name) for root in (reference, tmp_path / "out"))
        np.testing.assert_array_equal(first, second)


def test_a_full_disk_in_a_slide_keeps_finished_tiles(slide_model, slide, tmp_path):
    """Files may not grow beyond a limit, as on a full disk: exit status 3, a clear message, and the tiles are still there."""
    program = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import monai_vslp.workflows.slide as s
from monai_vslp.cli import main
write = s.write_output
def limited(*a, **k):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
    return write(*a, **k)
s.write_output = limited
sys.exit(main(["segment", {str(slide.path)!r}, "--model", {str(slide_model)!r}, "--output", {str(tmp_path / "out")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 3, done.stderr[-2000:]
    assert "no space left" in done.stderr
    folder = tmp_path / "out" / "small"
    assert list((folder / "tiles").glob("tiles-*.npz"))
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize(
    "words", [[], ["train"], ["segment", "x"], ["segment", "x", "--model", "m", "--output", "o", "--trust", "-1"]]
)
def test_wrong_words_are_explained(words, capsys):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.slow
def test_monai_bundle_run_executes_the_configs_of_a_run(cohort, model, tmp_path):
    """MONAI's own command segments a folder and evaluates it, with nothing of ours but the bundle folder."""
    out = tmp_path / "out"
    common = ["--meta_file", str(model / "configs" / "metadata.json"), "--bundle_root", str(model), "--output_dir", str(out)]
    for words in (
        ["inference.json", "--dataset_dir", str(cohort.parent / "images"), "--proportions", str(cohort)],
        ["evaluate.json", "--masks", str(cohort.parent / "masks")],
    ):
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(model / "configs" / words[0]), *common]
        done = subprocess.run([*command, *words[1:]], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(out.glob("*/labels.tif"))) == 8
    assert "mIoU" in done.stdout and (out / "evaluation.json").exists()
