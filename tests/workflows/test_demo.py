import json

from monai_vslp.io import read_summary
from monai_vslp.workflows import demo


def test_the_whole_way_on_a_small_cohort_and_slide(tmp_path, capsys):
    report = demo(tmp_path, progress=False, train_images=6, val_images=2, slide_side=2048, epochs=1)
    printed = capsys.readouterr().out
    assert "argmax" in printed and "refined" in printed and "mIoU" in printed
    assert report.exists() and (tmp_path / "images" / "report.html").exists()
    summary = read_summary(tmp_path / "slides" / "synthetic_slide")
    assert summary["kind"] == "slide" and summary["options"]["reader"] == "cucim"
    assert summary["residual"] < 1e-3
    scores = json.loads((tmp_path / "images" / "evaluation.json").read_text())
    assert scores
    training = json.loads((tmp_path / "model" / "configs" / "train.json").read_text())
    assert training["table"].endswith("proportions_rater_low.csv"), "training sees percentages, never masks"
    assert "mask" not in json.dumps(training["train"]).lower()
    started = (tmp_path / "slides" / "synthetic_slide" / "summary.json").stat().st_mtime_ns
    demo(tmp_path, progress=False, train_images=6, val_images=2, slide_side=2048, epochs=1)
    assert (tmp_path / "slides" / "synthetic_slide" / "summary.json").stat().st_mtime_ns == started
