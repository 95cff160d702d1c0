"""``monai-vslp segment --band`` end to end."""

import json

import numpy as np
import pytest
import tifffile
from cases import SMALL_NETWORK, write_two_class_cohort
from PIL import Image

from monai_vslp.cli import main
from monai_vslp.io import read_label_tiff, read_map_tiff, read_summary
from monai_vslp.utils.errors import InputError, ProportionError
from monai_vslp.workflows import segment, train

pytestmark = pytest.mark.usefixtures("one_mlflow_database")

TINY = SMALL_NETWORK | {"batch_size": 2, "progress": False}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_two_class_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def model(cohort, tmp_path_factory):
    return train(cohort, cohort.parent / "images", tmp_path_factory.mktemp("run") / "run", epochs=10, **TINY)


def test_band_from_the_command_line(cohort, model, tmp_path):
    image, out = cohort.parent / "images" / "i7.png", tmp_path / "out"
    words = ["--quiet", "segment", str(image), "--model", str(model), "--output", str(out), "--proportions", str(cohort)]
    assert main([*words, "--band", "5"]) == 0
    folder = out / "i7"
    labels, (count, other) = read_label_tiff(folder / "labels.tif"), read_map_tiff(folder / "band.tif")
    assert count.shape == other.shape == labels.shape and count.dtype == np.uint8
    summary = read_summary(folder)
    band = summary["band"]
    assert band["step"] == 0.05 and {(m["from"], m["to"]) for m in band["moves"]} == {("pink", "purple"), ("purple", "pink")}
    assert band["flipped"] == pytest.approx((count > 0).mean(), abs=1e-6) and 0 < band["flipped"] < 0.2
    assert (other[count > 0] == 1 - labels[count > 0]).all() and (other[count == 0] == 255).all()
    for name, area in band["areas"].items():
        assert area["map"] == pytest.approx(summary["proportions"]["labels"][name], abs=1e-4)
        assert area["lower"] < area["upper"]
        assert area["map"] - 0.07 < area["lower"] <= area["map"] <= area["upper"] < area["map"] + 0.07
    with Image.open(folder / "band.jpg") as picture:
        assert picture.size == (80, 64)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "What hangs on one rounding step" in page and f"{100 * band['flipped']:.1f} %" in page
    with tifffile.TiffFile(folder / "band.tif") as file:
        assert file.is_ome

    stamp = (folder / "summary.json").stat().st_mtime_ns
    assert main([*words, "--band", "5"]) == 0
    assert (folder / "summary.json").stat().st_mtime_ns == stamp, "what is done is left alone"
    path = folder / "summary.json"
    path.write_text(json.dumps({key: value for key, value in summary.items() if key != "band"}))
    assert main([*words, "--band", "5"]) == 0
    assert read_summary(folder)["band"] == band, "an interrupt before the band is made up for"
    assert main(words) == 0
    assert "band" not in read_summary(folder) and not list(folder.glob("band.*")), "an old band does not stay"
    assert "rounding step" not in (folder / "report.html").read_text(encoding="utf-8")


def test_band_uses_trust_and_alpha_of_the_call(cohort, model, tmp_path):
    image = cohort.parent / "images" / "i6.png"
    flipped = []
    for trust in (None, 0.05):
        segment([image], model, tmp_path, proportions=cohort, trust=trust, band=10, alpha=1.0, progress=False)
        flipped.append(read_summary(tmp_path / "i6")["band"]["flipped"])
    assert flipped[0] > flipped[1], "what is hardly trusted decides little"


def test_nonsense_is_refused_before_computing(cohort, model, tmp_path, capsys):
    image, out = cohort.parent / "images" / "i6.png", tmp_path / "out"
    assert main(["segment", str(image), "--model", str(model), "--output", str(out), "--band", "5"]) == 2
    assert "needs given proportions" in capsys.readouterr().err
    blank = tmp_path / "blank.csv"
    blank.write_text("image,split,pink,purple\ni6.png,test,,\n")
    with pytest.raises(ProportionError, match=r"i6\.png"):
        segment([image], model, out, proportions=blank, band=5)
    for step in (0, -5, 100, float("nan")):
        with pytest.raises(InputError, match="percent"):
            segment([image], model, out, proportions=cohort, band=step)
    slide = tmp_path / "scan.svs"
    slide.write_bytes(b"II*\0")
    with pytest.raises(InputError, match=r"not for slides \(scan\.svs\)"):
        segment([slide], model, out, band=5)
    assert not out.exists()
