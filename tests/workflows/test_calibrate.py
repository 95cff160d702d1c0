"""``monai-vslp calibrate`` and what ``segment`` makes of it, on a miniature cohort."""

import filecmp
import json
import re
import shutil

import numpy as np
import pytest
import torch
from cases import SMALL_NETWORK, write_two_class_cohort
from monai.bundle import ConfigParser

from monai_vslp.cli import main
from monai_vslp.data import read_cohort, read_image
from monai_vslp.data.synthetic import write_cohort, write_slide
from monai_vslp.io import read_summary
from monai_vslp.networks import TTAConfidence
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows import calibrate, read_calibration, segment, train
from monai_vslp.workflows.bundle import read_config
from monai_vslp.workflows.calibration import sample_logits

pytestmark = pytest.mark.usefixtures("one_mlflow_database")

TINY = SMALL_NETWORK | {"batch_size": 2, "progress": False}
CLASSES = ["pink", "purple"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_two_class_cohort(tmp_path_factory.mktemp("cohort"), train=6, val=10, size=(40, 56))


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    return train(cohort, cohort.parent / "images", tmp_path_factory.mktemp("run") / "run", epochs=8, **TINY)


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def network(trained):
    found = ConfigParser(read_config(trained, "inference.json")).get_parsed_content("network_def").eval()
    found.load_state_dict(torch.load(trained / "models" / "model.pt", weights_only=True))
    return found


def image_of(cohort, name="i6.png"):
    return cohort.parent / "images" / name


def stored(run):
    return json.loads((run / "models" / "calibration.json").read_text())


def write(run, **values):
    path = run / "models" / "calibration.json"
    path.write_text(json.dumps(stored(run) | values))


# ---- the command --------------------------------------------------------------------------------------------------------


def test_sampled_logits_have_the_mean_of_all_pixels_and_views(cohort, network):
    path = image_of(cohort)
    pixels = torch.from_numpy(read_image(path).copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = TTAConfidence("shifted_symmetries", stride=network.stride)(pixels, network).mean(dim=(2, 3))[0]
    logits = sample_logits(network, [path], "shifted_symmetries", progress=False)
    assert logits.shape == (1, 4096, 2)
    found = logits[0].softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)


def test_errors_and_intervals_are_those_of_held_out_images(cohort, network, run, capsys):
    assert main(["--quiet", "calibrate", str(run)]) == 0
    assert "calibration.md" in capsys.readouterr().out
    found = stored(run)
    assert (found["temperature"], found["variant"]) == (1.0, "none")
    assert found["offset"] == {"pink": 0.0, "purple": 0.0} and found["counts"] == {"images": 10, "patients": 10, "unnamed": 0}
    records = read_cohort(cohort, cohort.parent / "images").split("val").records
    tta = TTAConfidence("shifted_symmetries", stride=network.stride)
    errors = []
    for record in records:
        pixels = torch.from_numpy(read_image(record.image).copy()).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            errors.append(np.abs(tta(pixels, network).mean(dim=(2, 3))[0].numpy() - record.proportions.mean))
    # Ten patients and 90 %: the ceil(11 · 0.9) = 10th smallest, that is the largest.
    assert found["interval"]["half_width"]["pink"] == pytest.approx(np.max(errors, axis=0)[0], abs=5e-3)
    assert found["interval"]["reason"] == ""
    text = (run / "calibration.md").read_text()
    assert "## Images that fit worst" in text and "slope" in text
    worst = records[int(np.mean(errors, axis=1).argmax())].image.name
    assert re.search(r"\|---\|---\|---:.*\n\| (\S+)", text.split("fit worst")[1])[1] == worst
    assert (run / "calibration.png").stat().st_size > 5000


def test_too_few_patients_are_said_to_be_too_few(cohort, run, tmp_path):
    calibrate(run, level=0.95, output=tmp_path / "look", progress=False)
    assert not (run / "models" / "calibration.json").exists() and not (run / "calibration.md").exists()
    interval = json.loads((tmp_path / "look" / "calibration.json").read_text())["interval"]
    assert interval["half_width"] is None
    assert "10 held-out patients are too few for 95 % intervals, which need 19" in interval["reason"]
    assert "--level 0.9)" in interval["reason"]
    assert interval["reason"] in (tmp_path / "look" / "calibration.md").read_text()


def test_a_table_of_other_images_is_used_whole(cohort, run, tmp_path):
    table = tmp_path / "other.csv"
    table.write_text("image,pink,purple\n" + "".join(f"i{k}.png,{10 * k + 10},{90 - 10 * k}\n" for k in range(7)))
    calibrate(run, table, cohort.parent / "images", progress=False)
    assert stored(run)["counts"] == {"images": 7, "patients": 7, "unnamed": 7} and stored(run)["table"] == str(table)


def test_fitted_temperatures_lower_the_error_of_proportions(cohort, run, monkeypatch, network):
    """Proportions are those of the network at T = 0.5 with offsets: auto finds that, none leaves it."""
    paths = [image_of(cohort, f"i{k}.png") for k in range(6, 16)]
    z = sample_logits(network, paths, "shifted_symmetries", progress=False).double()
    p = (z / 2 + torch.tensor([0.8, -0.8])).softmax(dim=2).mean(dim=1)
    rows = [f"{path.name},{q[0]:.6f},{q[1]:.6f}\n" for path, q in zip(paths, p.tolist())]
    table = run.parent / "made.csv"
    table.write_text("image,pink,purple\n" + "".join(rows))
    calibrate(run, table, cohort.parent / "images", progress=False)
    plain = stored(run)
    assert plain["variant"] == "none" and "choice would be temperature_offset" in plain["reason"]
    calibrate(run, table, cohort.parent / "images", variant="auto", progress=False)
    found = stored(run)
    assert found["variant"] == "temperature_offset" and found["offset"]["pink"] == pytest.approx(0.8, abs=0.15)
    assert found["interval"]["half_width"]["pink"] < 0.5 * plain["interval"]["half_width"]["pink"]
    assert found["errors"]["temperature_offset"] < 0.5 * found["errors"]["none"]


def test_offsets_of_another_site(cohort, run):
    folder = run.parent / "site"
    folder.mkdir()
    for k in range(6, 10):
        shutil.copy(image_of(cohort, f"i{k}.png"), folder)
    calibrate(run, site=folder, site_mean=[30, 70], progress=False)
    by_mean = stored(run)
    assert by_mean["site"]["known"] == "mean" and by_mean["site"]["images"] == 4
    assert by_mean["site"]["mean_after"]["pink"] == pytest.approx(0.3, abs=1e-6)
    assert by_mean["interval"]["half_width"] is None and "another site" in by_mean["interval"]["reason"]
    given = read_cohort(cohort, cohort.parent / "images").records[6:10]
    table = folder / "table.csv"
    lines = [f"{r.image.name},{100 - 100 * r.proportions.mean[0]:.1f},{100 * r.proportions.mean[0]:.1f}\n" for r in given]
    table.write_text("image,pink,purple\n" + "".join(lines))  # the other way round: a large shift
    calibrate(run, site=folder, site_table=table, progress=False)
    expected = 1 - np.mean([r.proportions.mean[0] for r in given])
    site = stored(run)["site"]
    assert abs(site["mean_after"]["pink"] - expected) < abs(site["mean_before"]["pink"] - expected)
    calibrate(run, site=folder, progress=False)
    assert stored(run)["site"]["known"] == "images" and "expectation maximisation" in (run / "calibration.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "isotonic"}, "variant must be one of"),
        ({"level": 1.5}, "level must be above 0"),
        ({"site_mean": [50, 50]}, "--site DIR"),
        ({"site": ".", "site_mean": [50, 20]}, "add up to"),
        ({"site": ".", "site_mean": [50, 50], "site_table": "t.csv"}, "not both"),
        ({"table": "gone.csv"}, "does not exist"),
    ],
)
def test_wrong_options(run, options, message):
    with pytest.raises(InputError, match=message):
        calibrate(run, progress=False, **options)
    assert not (run / "models" / "calibration.json").exists()


def test_a_failure_leaves_the_file_of_before(cohort, run, monkeypatch):
    calibrate(run, progress=False)
    before = (run / "models" / "calibration.json").read_bytes()
    module = calibrate.__globals__

    def full(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setitem(module, "write_calibration_report", full)
    with pytest.raises(OSError, match="full"):
        calibrate(run, level=0.8, progress=False)
    assert (run / "models" / "calibration.json").read_bytes() == before
    assert not list((run / "models").glob(".calibration*"))


# ---- segment ------------------------------------------------------------------------------------------------------------


def test_segment_tempers_before_refinement_and_shows_intervals(cohort, run, network, tmp_path):
    calibrate(run, progress=False)
    write(run, temperature=3.0, offset={"pink": 0.5, "purple": -0.5})
    image = image_of(cohort)
    assert segment([image], run, tmp_path / "out", progress=False) == {}
    summary = read_summary(tmp_path / "out" / "i6")
    pixels = torch.from_numpy(read_image(image).copy()).permute(2, 0, 1)[None] / 255

    def tempered(x):
        return network(x) / 3.0 + torch.tensor([0.5, -0.5]).view(1, 2, 1, 1)

    with torch.no_grad():
        expected = TTAConfidence("shifted_symmetries", stride=network.stride)(pixels, tempered).mean(dim=(2, 3))[0, 0]
    pink = summary["proportions"]["confidence"]["pink"]
    assert pink == pytest.approx(float(expected), abs=1e-5)
    half = stored(run)["interval"]["half_width"]["pink"]
    assert summary["interval"]["level"] == 0.9
    assert summary["interval"]["bounds"]["pink"] == pytest.approx([max(0, pink - half), min(1, pink + half)])
    assert summary["options"]["calibration"]["temperature"] == 3.0
    low, high = summary["interval"]["bounds"]["pink"]
    text = (tmp_path / "out" / "i6" / "report.html").read_text()
    assert f"{100 * pink:.0f} % ({100 * low:.0f}–{100 * high:.0f} %)" in text and "90 % of images of new patients" in text


def test_without_calibration_nothing_changes(cohort, run, trained, tmp_path):
    """Maps, energies and polygons to the last byte; in the summary all but times and the fingerprint of this run."""
    calibrate(run, progress=False)
    write(run, temperature=3.0)
    image = image_of(cohort)
    for model, name, options in ((trained, "never", {}), (run, "off", {"calibration": False}), (run, "on", {})):
        segment([image], model, tmp_path / name, progress=False, **options)
    folders = [tmp_path / name / "i6" for name in ("never", "off", "on")]
    files = sorted(p.name for p in folders[0].iterdir() if p.suffix not in (".json", ".html", ".geojson"))
    assert len(files) >= 8
    assert filecmp.cmpfiles(*folders[:2], files, shallow=False)[0] == files
    assert "confidence.tif" in filecmp.cmpfiles(folders[0], folders[2], files, shallow=False)[1]
    never, off = (json.loads((folder / "summary.json").read_text()) for folder in folders[:2])
    for summary in (never, off):
        summary.pop("seconds"), summary["options"].pop("fingerprint")
    assert never == off and "interval" not in never and "calibration" not in never["options"]


def test_what_is_done_is_done_again_with_another_calibration(cohort, run, tmp_path):
    image, path = image_of(cohort), tmp_path / "i6" / "summary.json"
    segment([image], run, tmp_path, progress=False)
    stamps = [path.stat().st_mtime_ns]
    calibrate(run, progress=False)
    for _ in range(2):
        segment([image], run, tmp_path, progress=False)
        stamps.append(path.stat().st_mtime_ns)
    assert stamps[0] < stamps[1] == stamps[2]
    assert main(["--quiet", "segment", str(image), "--model", str(run), "--output", str(tmp_path), "--no-calibration"]) == 0
    assert "interval" not in read_summary(tmp_path / "i6")


def test_a_stale_or_damaged_calibration_is_refused_and_can_be_switched_off(cohort, run, tmp_path):
    calibrate(run, progress=False)
    path, image = run / "models" / "calibration.json", image_of(cohort)
    good = path.read_text()
    for damaged in ("{", "[]", "{}", good.replace('"temperature": 1.0', '"temperature": 0'), good.replace("purple", "blue")):
        path.write_text(damaged)
        with pytest.raises(InputError, match=r"calibration\.json (is damaged|is for the classes).*--no-calibration"):
            segment([image], run, tmp_path / "out", progress=False)
    path.write_text(good)
    assert read_calibration(run, CLASSES)["temperature"] == 1.0
    weights = torch.load(run / "models" / "model.pt", weights_only=True)
    torch.save(
        {name: value * 1.01 if value.is_floating_point() else value for name, value in weights.items()},
        run / "models" / "model.pt",
    )
    with pytest.raises(InputError, match=r"other weights.*monai-vslp calibrate .* again.*--no-calibration"):
        segment([image], run, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert segment([image], run, tmp_path / "out", calibration=False, progress=False) == {}
    calibrate(run, progress=False)
    assert segment([image], run, tmp_path / "out", progress=False) == {}


def test_configs_of_an_earlier_version_are_not_passed_over_in_silence(cohort, run, tmp_path):
    calibrate(run, progress=False)
    path = run / "configs" / "inference.json"
    config = json.loads(path.read_text())
    del config["calibration"]
    path.write_text(json.dumps(config))
    for act in (lambda: segment([image_of(cohort)], run, tmp_path / "out"), lambda: calibrate(run)):
        with pytest.raises(InputError, match="earlier version"):
            act()


def test_slides_are_tempered_and_have_no_intervals(tmp_path):
    table = write_cohort(tmp_path, train=6, val=2, size=64)
    run = train(table, tmp_path / "images", tmp_path / "run", epochs=1, **TINY)
    slide = write_slide(tmp_path / "small.tif", shape=(2048, 2048))
    calibrate(run, level=0.5, progress=False)
    write(run, temperature=50.0)
    for name, options in (("off", {"calibration": False}), ("on", {})):
        assert segment([slide.path], run, tmp_path / name, progress=False, views="none", **options) == {}
    off, on = (read_summary(tmp_path / name / "small") for name in ("off", "on"))
    classes = len(on["classes"])
    shares = list(on["proportions"]["confidence"].values())
    assert shares == pytest.approx([1 / classes] * classes, abs=0.02), "at T = 50 nothing is sure"
    assert list(off["proportions"]["confidence"].values()) != pytest.approx(shares, abs=0.02)
    assert on["options"]["calibration"]["temperature"] == 50.0 and "interval" not in on
