"""What is wrong with a cohort is found before training, all at once."""

import json

import numpy as np
import pytest
from cases import write_two_class_cohort
from PIL import Image

from monai_vslp.cli import main
from monai_vslp.data import read_cohort
from monai_vslp.data.checks import check_cohort
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows import check, make_template

CLASSES = ("tumour", "stroma", "necrosis")


@pytest.fixture
def images(tmp_path):
    """Thirty-six small images of different pixels."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(36):
        pixels = rng.integers(60, 220, (64, 70, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"i{index:02d}.png", compress_level=1)
    return folder


def rows(count=36, shares=None, **columns):
    """Rows of 30 training and 6 held-out images of a patient each."""
    rng = np.random.default_rng(1)
    result = []
    for index in range(count):
        row = {"image": f"i{index:02d}.png", "split": "train" if index < 30 else "val", "patient": f"p{index}", "mpp": "0.5"}
        drawn = rng.dirichlet([1.0, 1.0, 1.0]) * 0.9 + 1 / 30
        given = [f"{100 * v:.1f}" for v in drawn] if shares is None else shares(index, drawn)
        result.append(row | dict(zip(CLASSES, given)) | {k: v(index) for k, v in columns.items()})
    return result


def found(folder, table_rows):
    header = list(dict.fromkeys(key for row in table_rows for key in row))
    lines = [",".join(header), *(",".join(str(row.get(key, "")) for key in header) for row in table_rows)]
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return check_cohort(path, folder / "images")


def codes(result, level=None):
    return {finding.code for finding in result.findings if level in (None, finding.level)}


def one(result, code):
    (finding,) = [finding for finding in result.findings if finding.code == code]
    return finding


def test_nothing_is_wrong_with_a_good_cohort(tmp_path, images):
    result = found(tmp_path, rows())
    assert not result.findings and result.step is None and result.mpp == (0.5,)
    assert result.counts == {"images": 36, "patients": 36, "train": 30, "val": 6}
    assert result.classes["tumour"]["occurs_in"] == 30
    cohort = read_cohort(tmp_path / "table.csv", images)
    mean = np.mean([record.proportions.mean[0] for record in cohort.split("train").records])
    assert result.classes["tumour"]["mean"] == pytest.approx(mean)


def test_everything_is_found_at_once(tmp_path, images):
    """A misspelt column, a bad sum, a repeated row, a missing and a damaged file, and what the proportions say."""
    table = rows(mpp=lambda i: 0.5 if i else 0.25)
    table[3] |= {"tumour": "50", "stroma": "20", "necrosis": "10"}
    table[4] |= {"image": "absent.png"}
    table[5] |= {"tumour": "sixty"}
    table[6] |= {"split": "trian"}
    table.append(dict(table[7]))
    (images / "i08.png").write_bytes((images / "i08.png").read_bytes()[:500])
    for row in table:
        row["patinet"] = row.pop("patient")
    table[31]["patinet"] = "p1"
    result = found(tmp_path, table)
    errors = {finding.code: finding for finding in result.findings if finding.level == "error"}
    assert set(errors) == {"columns", "rows", "repeated_row", "missing_images", "unreadable_image", "mpp_differs"}
    assert "Did you mean 'patient'" in errors["columns"].advice
    assert errors["repeated_row"].rows == (38, 9) and "i07.png" in errors["repeated_row"].message
    assert errors["missing_images"].rows == (6,) and "absent.png" in errors["missing_images"].message
    assert errors["unreadable_image"].rows == (10,) and "i08.png" in errors["unreadable_image"].message
    told = {finding.rows: finding.message for finding in result.findings if finding.code == "rows"}
    assert set(told) == {(5,), (7,), (8,)}
    assert told[5,].startswith("proportions sum to 80") and "'sixty'" in told[7,] and "column 'split'" in told[8,]
    assert one(result, "shared_patients").rows == (3, 33), "the misspelt column was read as what it is meant to be"
    assert [finding.level for finding in result.findings] == sorted(
        (finding.level for finding in result.findings), key=["error", "warning", "note"].index
    )


def test_many_problems_of_one_kind_are_told_together(tmp_path, images):
    table = [row | dict.fromkeys(CLASSES, "") for row in rows()]
    result = found(tmp_path, table)
    told = [finding for finding in result.findings if finding.code == "rows"]
    assert [len(finding.rows) for finding in told] == [1, 1, 1, 27]
    assert sorted(row for finding in told for row in finding.rows) == list(range(2, 32))


@pytest.mark.parametrize(
    "shares, code, level, said",
    [
        (lambda i, p: [f"{v:.3f}" for v in (p[0], 1 - p[0], 0)], "absent_class", "error", "'necrosis' is 0 in every"),
        (lambda i, p: [f"{v:.3f}" for v in (p[0], 1 - p[0])] + [""], "blank_class", "error", "'necrosis' is blank"),
        (lambda i, p: [40, 35, 25], "constant_proportions", "error", "nothing tells the classes apart"),
        (
            lambda i, p: [f"{v:.4f}" for v in (p[0], 0.6 * (1 - p[0]), 0.4 * (1 - p[0]))],
            "confounded_classes",
            "warning",
            "stroma, necrosis hardly vary against each other",
        ),
        (lambda i, p: [60, 40, 0] if i > 2 else [20, 30, 50], "rare_class", "warning", "'necrosis' is in 3 of 30"),
        (lambda i, p: [60, 40, 0] if i > 9 else [20, 30, 50], "absent_held_out", "warning", "no held-out image shows necrosis"),
        (lambda i, p: [[75, 25, 0], [0, 50, 50], [25, 25, 50], [50, 0, 50]][i % 4], "coarse_step", "warning", "25 %"),
        (lambda i, p: [f"{91 * v:.2f}" for v in p], "scaled_sums", "warning", "of 36 images do not sum to 100 %"),
    ],
)
def test_proportions_that_teach_little(tmp_path, images, shares, code, level, said):
    finding = one(found(tmp_path, rows(shares=shares)), code)
    assert finding.level == level and said in finding.message


def test_the_rounding_step_is_found(tmp_path, images):
    def rounded(step):
        def shares(index, p):
            a, b = (round(v * 100 / step) * step for v in p[:2])
            return [a, min(b, 100 - a), max(100 - a - b, 0)]

        return shares

    for step in (5, 10):
        result = found(tmp_path, rows(shares=rounded(step)))
        assert result.step == pytest.approx(step / 100) and f"multiples of {step} %" in one(result, "rounding_step").message


def test_images_that_are_empty_repeated_small_or_not_listed(tmp_path, images):
    (images / "i31.png").write_bytes((images / "i02.png").read_bytes())
    Image.fromarray(np.full((64, 64, 3), 244, np.uint8)).save(images / "i03.png")
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (20, 64, 3)).astype(np.uint8)).save(images / "i04.png")
    result = found(tmp_path, rows(35))
    same = one(result, "same_pixels")
    assert same.level == "error" and set(same.rows) == {4, 33} and "different splits" in same.message
    assert one(result, "empty_image").rows == (5,) and one(result, "small_image").rows == (6,)
    assert "i35.png" in one(result, "unlisted_images").message


def test_patients_and_numbers(tmp_path, images):
    few = found(tmp_path, rows(5, patient=lambda i: "p1"))
    assert {"few_images", "no_held_out", "few_patients"} <= codes(few, "warning")
    assert "too_few_images" in codes(found(tmp_path, rows(2)), "error")
    assert "no_patients" in codes(found(tmp_path, rows(patient=lambda i: "")), "warning")
    assert one(found(tmp_path, rows(patient=lambda i: "" if i == 4 else f"p{i}")), "patients_missing").rows == (6,)


@pytest.mark.parametrize(
    "mpp, code, level",
    [
        (lambda i: 0.5 if i < 30 else 0.25, "mpp_differs_held_out", "warning"),
        (lambda i: 30, "mpp_impossible", "error"),
        (lambda i: 4, "mpp_unusual", "warning"),
        (lambda i: "" if i == 2 else 0.5, "mpp_missing", "warning"),
        (lambda i: "", "mpp_unknown", "note"),
    ],
)
def test_pixel_sizes(tmp_path, images, mpp, code, level):
    assert one(found(tmp_path, rows(mpp=mpp)), code).level == level


def test_raters_who_disagree_or_overrate(tmp_path, images):
    rng = np.random.default_rng(2)
    table = []
    for row in rows():
        p = np.array([float(row[name]) for name in CLASSES]) / 100
        for rater, habit in (("anna", 1.0), ("ben", 1.0), ("carl", 1.9)):
            seen = p * [habit, 1, 1] * np.exp(rng.normal(0, 0.05, 3))
            table.append(row | {"rater": rater} | {k: f"{100 * v:.1f}" for k, v in zip(CLASSES, seen / seen.sum())})
    result = found(tmp_path, table)
    offsets = [finding for finding in result.findings if finding.code == "rater_offset"]
    assert any("'carl'" in finding.message and "more tumour" in finding.message for finding in offsets)
    assert "raters" in codes(result, "note") and "raters_apart" not in codes(result)
    table[1] |= dict(zip(CLASSES, (0, 0, 100)))
    table[2] |= dict(zip(CLASSES, (100, 0, 0)))
    assert one(found(tmp_path, table), "raters_apart").rows == (2,)
    for index in range(0, len(table), 3):
        table[index] |= dict(zip(CLASSES, (0, 50, 50)))
        table[index + 1] |= dict(zip(CLASSES, (90, 5, 5)))
    assert "raters_disagree" in codes(found(tmp_path, table), "warning")


def test_the_command_prints_a_table_and_says_by_its_status_whether_training_may_begin(tmp_path, capsys):
    table = write_two_class_cohort(tmp_path, train=20, val=4)
    command = ["--quiet", "check", str(table), "--images", str(tmp_path / "images")]
    assert main([*command, "--json", str(tmp_path / "found.json")]) == 0
    said = capsys.readouterr().out
    assert "24 images (20 train, 4 val), 24 patients" in said and "0 errors, 0 warnings. Nothing is wrong." in said
    (tmp_path / "images" / "i3.png").unlink()
    assert main([*command, "--json", str(tmp_path / "found.json")]) == 1
    said = capsys.readouterr().out
    assert "ERROR    row 5" in said and "i3.png" in said and "1 error," in said
    assert max(map(len, said.splitlines()[1:])) <= 120
    written = json.loads((tmp_path / "found.json").read_text())
    (error,) = [finding for finding in written["findings"] if finding["level"] == "error"]
    assert error["code"] == "missing_images" and error["rows"] == [5] and written["counts"]["train"] == 20
    assert main(["check", str(tmp_path / "absent.csv")]) == 2 and "does not exist" in capsys.readouterr().err
    assert main(["check"]) == 2 and "--template" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
def test_the_template_is_a_table_once_it_is_filled_in(tmp_path, images, suffix):
    pytest.importorskip("openpyxl")
    path = make_template(tmp_path / f"table{suffix}", CLASSES, images)
    with pytest.raises(InputError, match="exists already"):
        make_template(path)
    empty = check(path, images, progress=False)
    assert "rows" in codes(empty, "error") and empty.counts["images"] == 36, "each image of the folder has its row"
    if suffix == ".csv":
        lines = path.read_text().splitlines()
        assert lines[0] == "image,split,patient,rater,mpp,tumour,stroma,necrosis"
        filled = [
            f"{line.split(',')[0]},{'val' if i % 5 == 0 else ''},p{i},,0.5,10-20,{i},," for i, line in enumerate(lines[1:])
        ]
        path.write_text("\n".join([lines[0], *(line.removesuffix(",") for line in filled)]) + "\n")
    else:
        import openpyxl

        book = openpyxl.load_workbook(path)
        assert book.sheetnames == ["proportions", "help"]
        sheet = book["proportions"]
        (choice,) = sheet.data_validations.dataValidation
        assert choice.formula1 == '"train,val,test"' and sheet["F2"].number_format == "@", "10-20 stays what it is"
        for i in range(36):
            for column, value in zip("BCEFG", ("val" if i % 5 == 0 else None, f"p{i}", "0.5", "10-20", i)):
                sheet[f"{column}{i + 2}"] = value
        book.save(path)
    cohort = read_cohort(path, images)
    assert len(cohort.split("val")) == 8 and cohort.records[3].proportions.lower[0] == pytest.approx(0.1)
    assert cohort.records[3].proportions.mean == pytest.approx([0.15, 0.03, 0.82]) and cohort.records[3].mpp == 0.5


@pytest.mark.parametrize(
    "name, classes, said",
    [("a.ods", CLASSES, "a .csv or .xlsx"), ("a.csv", ("one",), "two or more"), ("a.csv", ("tumour", "Patient"), "none of")],
)
def test_templates_that_cannot_be(tmp_path, name, classes, said):
    with pytest.raises(InputError, match=said):
        make_template(tmp_path / name, classes)
    with pytest.raises(InputError, match="does not exist"):
        make_template(tmp_path / "b.csv", CLASSES, tmp_path / "absent")
