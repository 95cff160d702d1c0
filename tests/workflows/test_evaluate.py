"""Evaluation and reports of made-up outputs whose scores are known."""

import csv
import json
import logging

import numpy as np
import pytest
import tifffile
from PIL import Image

from monai_vslp.io.ome_tiff import write_ome_tiff
from monai_vslp.io.summary import build_summary
from monai_vslp.metrics.segmentation import boundary_f1, expected_calibration_error
from monai_vslp.utils.atomic import write_json
from monai_vslp.utils.errors import ImageReadError, InputError
from monai_vslp.workflows.evaluate import evaluate, format_table
from monai_vslp.workflows.report import report

CLASSES = ["other", "benign", "malignant"]
RNG = np.random.default_rng(0)


def _output(folder, refined, argmax=None, **changes):
    """The files of one segmented input that evaluation and reports read."""
    folder.mkdir(parents=True)
    tifffile.imwrite(folder / "labels.tif", refined.astype(np.uint8))
    tifffile.imwrite(folder / "labels_argmax.tif", (refined if argmax is None else argmax).astype(np.uint8))
    fields = {
        "name": folder.name,
        "kind": "image",
        "source": "x.png",
        "classes": CLASSES,
        "colors": [[0, 0, 255], [0, 255, 0], [255, 0, 0]],
        "shape": refined.shape,
        "confidence": [0.5, 0.3, 0.2],
        "refined": [0.5, 0.3, 0.2],
        "labels": [0.5, 0.3, 0.2],
    }
    write_json(folder / "summary.json", build_summary(**(fields | changes)))


def _save(path, mask):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(mask.astype(np.uint8)).save(path)
    else:
        tifffile.imwrite(path, mask.astype(np.uint8))


def _brute(pairs, classes):
    """IoU and Dice by class, accuracy and proportion error from loops over pixels."""
    hits, preds, targets, right, total, errors = *np.zeros((3, classes), int), 0, 0, []
    for pred, target in pairs:
        shares = np.zeros((2, classes))
        for p, t in zip(pred.flat, target.flat):
            if p == 255 or t == 255:
                continue
            total, right = total + 1, right + (p == t)
            preds[p] += 1
            targets[t] += 1
            hits[t] += p == t
            shares[0, p] += 1
            shares[1, t] += 1
        errors.append(np.abs(shares[0] - shares[1]).sum() / shares[0].sum() / classes)
    return hits / (preds + targets - hits), 2 * hits / (preds + targets), right / total, np.mean(errors)


@pytest.fixture
def cohort(tmp_path):
    """Three inputs, masks under different names for two of them."""
    data = {}
    for stem, file in (("a", "a.png"), ("b", "b_mask.tif"), ("c", None)):
        refined, argmax, mask = RNG.integers(0, 3, (3, 9, 14))
        refined[0], argmax[1], mask[:, 0] = 255, 255, 255
        _output(tmp_path / "out" / stem, refined, argmax)
        if file:
            _save(tmp_path / "masks" / file, mask)
            data[stem] = (refined, argmax, mask)
    return tmp_path / "out", tmp_path / "masks", data


def test_scores_of_both_maps_on_the_same_pixels(cohort, capsys, caplog):
    output, masks, data = cohort
    with caplog.at_level(logging.WARNING):
        result = evaluate(output, masks, groups={"gland": ["benign", "malignant"]})
    assert result["images"] == ["a", "b"] and result["without_mask"] == ["c"] and "c" in caplog.text
    pairs, unite = {"argmax": [], "refined": []}, np.array([0, 1, 1] + [255] * 253)
    for refined, argmax, mask in data.values():
        common = np.where((refined == 255) | (argmax == 255), 255, mask)
        pairs["argmax"].append((argmax, common))
        pairs["refined"].append((refined, common))
    for block, table in zip(result["blocks"], (np.arange(256), unite)):
        assert [row["map"] for row in block["rows"]] == ["argmax", "refined"]
        for row in block["rows"]:
            iou, dice, accuracy, error = _brute([(table[p], table[t]) for p, t in pairs[row["map"]]], len(block["classes"]))
            np.testing.assert_allclose(list(row["iou"].values()), iou)
            np.testing.assert_allclose(list(row["dice"].values()), dice)
            assert row["miou"] == pytest.approx(iou.mean()) and row["mdice"] == pytest.approx(dice.mean())
            assert row["accuracy"] == pytest.approx(accuracy)
            assert row["proportion_error"] == pytest.approx(error)
    assert result["blocks"][1]["classes"] == ["rest", "gland"]
    assert result["pixels"] == 2 * 7 * 13
    assert result["unlabelled"] == pytest.approx(2 / 9)
    assert json.loads((output / "evaluation.json").read_text()) == result
    assert capsys.readouterr().out.strip() == format_table(result)


def test_table_is_aligned_and_complete(cohort):
    output, masks, _ = cohort
    result = evaluate(output, masks, groups={"gland": ["benign", "malignant"]})
    text = format_table(result)
    blocks = text.split("\n\n")
    assert len(blocks) == 3 and "without mask, left out: c" in blocks[0]
    for block, scores in zip(blocks[1:], result["blocks"]):
        lines = block.splitlines()
        assert len({len(line) for line in lines}) == 1
        assert f"{scores['rows'][1]['miou']:.3f}" in lines[2]
        assert f"{scores['rows'][0]['mdice']:.3f}" in lines[1] and f"IoU {scores['classes'][1]}" in lines[0]


def test_csv_holds_the_scores(cohort):
    output, masks, _ = cohort
    result = evaluate(output, masks)
    with open(output / "evaluation.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (3 + 1)
    whole = next(row for row in rows if row["map"] == "refined" and row["class"] == "(all)")
    assert float(whole["iou"]) == pytest.approx(result["blocks"][0]["rows"][1]["miou"])
    assert float(whole["accuracy"]) == pytest.approx(result["blocks"][0]["rows"][1]["accuracy"])
    benign = next(row for row in rows if row["map"] == "argmax" and row["class"] == "benign")
    assert float(benign["dice"]) == pytest.approx(result["blocks"][0]["rows"][0]["dice"]["benign"])


def test_perfect_map_with_an_absent_class(tmp_path):
    labels = RNG.integers(0, 2, (6, 7))
    _output(tmp_path / "out" / "a", labels, 1 - labels)
    _save(tmp_path / "masks" / "a.tiff", labels)
    argmax, refined = evaluate(tmp_path / "out", tmp_path / "masks")["blocks"][0]["rows"]
    assert refined["miou"] == refined["accuracy"] == 1 and refined["proportion_error"] == 0
    assert argmax["miou"] == argmax["accuracy"] == 0
    assert refined["iou"]["malignant"] is None and "NaN" not in (tmp_path / "out" / "evaluation.json").read_text()
    assert "-" in format_table(json.loads((tmp_path / "out" / "evaluation.json").read_text()))


def test_ignored_value_and_palette_mask(tmp_path):
    labels = np.zeros((4, 4), int)
    _output(tmp_path / "out" / "a", labels)
    mask = np.zeros((4, 4), np.uint8)
    mask[:2] = 9
    palette = Image.new("P", (4, 4))
    palette.putdata(mask.ravel().tolist())
    palette.putpalette([value for index in range(256) for value in (255 - index, index, 7)])
    (tmp_path / "masks").mkdir()
    palette.save(tmp_path / "masks" / "a.png")
    result = evaluate(tmp_path / "out", tmp_path / "masks", ignore_index=9)
    assert result["pixels"] == 8 and result["blocks"][0]["rows"][0]["accuracy"] == 1


@pytest.mark.parametrize("step", [1, 2, 3, 8])
def test_slide_is_compared_on_the_grid_of_its_mask(tmp_path, step):
    """The labels are a quarter of a slide of 81 × 122 px, rounded up; the mask, at ``step``, is finer or coarser."""
    labels = RNG.integers(0, 3, (21, 31))
    _output(tmp_path / "out" / "s", labels, kind="slide", level0_shape=[81, 122], downsample=4.0)
    centres = [(np.arange(int(np.ceil(side / step))) + 0.5) * step for side in (81, 122)]
    rows, columns = (np.minimum((c // 4).astype(int), n - 1) for c, n in zip(centres, labels.shape))
    _save(tmp_path / "masks" / "s.png", labels[rows[:, None], columns])
    result = evaluate(tmp_path / "out", tmp_path / "masks")
    assert result["pixels"] == len(rows) * len(columns)
    assert result["blocks"][0]["rows"][1]["accuracy"] == 1


def test_slide_with_a_mask_at_any_scale_agrees_but_for_borders(tmp_path):
    labels = np.zeros((100, 150), int)
    labels[30:, 60:] = 1
    _output(tmp_path / "out" / "s", labels, kind="slide", level0_shape=[400, 600], downsample=4.0)
    _save(tmp_path / "masks" / "s.tif", np.asarray(Image.fromarray(labels.astype(np.uint8)).resize((211, 141), 0)))
    assert evaluate(tmp_path / "out", tmp_path / "masks")["blocks"][0]["rows"][1]["accuracy"] > 0.98


def _message(tmp_path, mask, groups=None, name="a.png", **changes):
    _output(tmp_path / "out" / "a", np.zeros((8, 12), int), **changes)
    _save(tmp_path / "masks" / name, mask)
    with pytest.raises(InputError) as raised:
        evaluate(tmp_path / "out", tmp_path / "masks", groups=groups)
    assert not (tmp_path / "out" / "evaluation.json").exists()
    return str(raised.value)


def test_wrong_masks_are_named(tmp_path):
    assert "12 x 9 px" in _message(tmp_path / "1", np.zeros((9, 12)))
    text = _message(tmp_path / "2", np.full((8, 12), 7))
    assert "a.png has the value 7" in text and "other, benign, malignant" in text
    slide = {"kind": "slide", "level0_shape": [80, 120], "downsample": 10.0}
    assert "aspect ratios" in _message(tmp_path / "3", np.zeros((40, 40)), **slide)
    assert "looked for a.png" in _message(tmp_path / "4", np.zeros((8, 12)), name="other.png")
    assert "one channel" in _message(tmp_path / "5", RNG.integers(0, 3, (8, 12, 3)))
    assert "no pixel could be compared" in _message(tmp_path / "6", np.full((8, 12), 255))


@pytest.mark.parametrize(
    ("members", "message"), [(["gland"], "unknown classes gland"), ([], "some, but not all"), (CLASSES, "some, but not all")]
)
def test_wrong_groups_are_explained(tmp_path, members, message):
    assert message in _message(tmp_path, np.zeros((8, 12)), groups={"g": members})


def test_other_failures_are_explained(tmp_path):
    with pytest.raises(InputError, match="monai-vslp segment"):
        evaluate(tmp_path, tmp_path)
    _output(tmp_path / "out" / "a", np.zeros((8, 12), int))
    with pytest.raises(InputError, match="does not exist"):
        evaluate(tmp_path / "out", tmp_path / "nowhere")
    _save(tmp_path / "masks" / "a.png", np.zeros((8, 12)))
    _save(tmp_path / "masks" / "a.tif", np.zeros((8, 12)))
    with pytest.raises(InputError, match="several masks"):
        evaluate(tmp_path / "out", tmp_path / "masks")
    (tmp_path / "masks" / "a.tif").unlink()
    (tmp_path / "masks" / "a.png").write_bytes(b"no image")
    with pytest.raises(ImageReadError, match=r"a\.png"):
        evaluate(tmp_path / "out", tmp_path / "masks")
    _save(tmp_path / "masks" / "a.png", np.zeros((8, 12)))
    (tmp_path / "out" / "a" / "labels_argmax.tif").unlink()
    with pytest.raises(ImageReadError, match=r"labels_argmax\.tif"):
        evaluate(tmp_path / "out", tmp_path / "masks")
    tifffile.imwrite(tmp_path / "out" / "a" / "labels_argmax.tif", np.full((8, 12), 5, np.uint8))
    with pytest.raises(ImageReadError, match="label 5"):
        evaluate(tmp_path / "out", tmp_path / "masks")
    _output(tmp_path / "out" / "b", np.zeros((8, 12), int), classes=["x", "y", "z"])
    with pytest.raises(InputError, match="one network at a time"):
        evaluate(tmp_path / "out", tmp_path / "masks")


def test_reports_are_made_again_and_show_the_evaluation(cohort, caplog):
    output, masks, _ = cohort
    index = report(output)
    assert index == output / "report.html" and all((output / stem / "report.html").exists() for stem in "abc")
    assert "Evaluation" not in index.read_text(encoding="utf-8")
    result = evaluate(output, masks)
    assert f"{result['blocks'][0]['rows'][1]['miou']:.3f}" in index.read_text(encoding="utf-8")
    (output / "b" / "summary.json").write_text("{")
    (output / "a" / "report.html").unlink()
    report(output)
    assert (output / "a" / "report.html").exists() and "damaged" in caplog.text
    assert report(output / "a") == output / "a" / "report.html"
    with pytest.raises(InputError, match="monai-vslp segment"):
        report(masks)


def _with_confidences(cohort, names=("a", "b", "c")):
    """8-bit probabilities behind the labels of both maps; returns those of the first two inputs as fractions."""
    output, _, data = cohort
    given = {}
    for stem in names:
        for key, file, labels in (("argmax", "confidence", 1), ("refined", "segmentation", 0)):
            codes = RNG.integers(0, 80, (3, 9, 14))
            chosen = data[stem][labels] if stem in data else np.zeros((9, 14), int)
            rows, columns = np.nonzero(chosen < 3)
            codes[chosen[rows, columns], rows, columns] = RNG.integers(90, 96, len(rows))
            codes[2] += 255 - codes.sum(axis=0)  # on the simplex
            codes = np.where(codes.argmax(axis=0) == chosen, codes, np.where(np.arange(3)[:, None, None] == chosen, 255, 0))
            write_ome_tiff(output / stem / f"{file}.tif", codes.astype(np.uint8), channels=CLASSES, pyramid=False)
            given[stem, key] = codes / 255.0
    return given


def test_boundaries_are_means_over_images_and_calibration_counts_all_pixels_together(cohort):
    output, masks, data = cohort
    given = _with_confidences(cohort)
    blocks = evaluate(output, masks, groups={"gland": ["benign", "malignant"]}, tolerance=0.0)["blocks"]
    unite = np.array([0, 1, 1] + [255] * 253)
    for key, index in (("argmax", 1), ("refined", 0)):
        common = {s: np.where((m[0] == 255) | (m[1] == 255), 255, m[2]) for s, m in data.items()}
        whole, group = (next(row for row in block["rows"] if row["map"] == key) for block in blocks)
        f1 = [boundary_f1(data[s][index], common[s], 0.0) for s in data]
        assert whole["boundary_f1"] == pytest.approx(np.mean(f1)) and 0 < np.mean(f1) < 1
        f1 = [boundary_f1(unite[data[s][index]], unite[common[s]], 0.0) for s in data]
        assert group["boundary_f1"] == pytest.approx(np.mean(f1))
        probabilities = np.concatenate([given[s, key] for s in data], axis=1)
        target = np.concatenate([common[s] for s in data])
        assert whole["ece"] == pytest.approx(expected_calibration_error(probabilities, target)) and whole["ece"] > 0
    with open(output / "evaluation.csv", newline="", encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if row["map"] == "refined" and row["class"] == "(all)")
    assert float(row["boundary_f1"]) == pytest.approx(blocks[0]["rows"][1]["boundary_f1"])
    assert float(row["ece"]) == pytest.approx(blocks[0]["rows"][1]["ece"])


def test_calibration_of_united_classes_in_closed_form(tmp_path):
    """Of each pixel's probability .4 + .2 belongs to glands, and half of the pixels are glands: the error is 1/10."""
    _output(tmp_path / "out" / "a", np.ones((4, 6), int))
    codes = np.broadcast_to(np.array([102, 102, 51])[:, None, None], (3, 4, 6)).astype(np.uint8)
    write_ome_tiff(tmp_path / "out" / "a" / "segmentation.tif", codes, channels=CLASSES, pyramid=False)
    mask = np.zeros((4, 6), int)
    mask[:2] = 2
    _save(tmp_path / "masks" / "a.png", mask)
    whole, group = evaluate(tmp_path / "out", tmp_path / "masks", groups={"gland": ["benign", "malignant"]})["blocks"]
    assert group["rows"][1]["ece"] == pytest.approx(0.6 - 0.5)
    assert whole["rows"][1]["ece"] == pytest.approx(0.4)  # benign everywhere, right nowhere
    assert whole["rows"][0]["ece"] is None, "there is no confidence.tif"


def test_no_calibration_where_an_image_has_no_confidences(cohort, caplog):
    output, masks, _ = cohort
    assert evaluate(output, masks)["blocks"][0]["rows"][1]["ece"] is None
    _with_confidences(cohort, ["a"])
    result = evaluate(output, masks)
    assert result["blocks"][0]["rows"][1]["ece"] is None and "ECE" in format_table(result)
    report(output)
    assert "Mean IoU" in (output / "report.html").read_text(encoding="utf-8")
    tifffile.imwrite(output / "a" / "segmentation.tif", np.zeros((3, 4, 5), np.uint8))
    with pytest.raises(ImageReadError, match=r"segmentation\.tif holds"):
        evaluate(output, masks)
    with pytest.raises(InputError, match="tolerance"):
        evaluate(output, masks, tolerance=-1)
