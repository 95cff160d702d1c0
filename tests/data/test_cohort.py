"""Tables of images and proportions."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from monai_vslp.data.cohort import read_cohort, write_table
from monai_vslp.utils.errors import InputError, ProportionError

DATA = Path(os.environ.get("MONAI_VSLP_DATA", Path(__file__).parents[3] / "shared" / "data"))
GOOD = "image,split,patient,tumour,stroma\na.png,train,p1,60,40\nb.png,val,p2,0.5,0.5\nc.png,test,p3,,\n"


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def table(folder, text, name="table.csv", encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.fixture
def folder(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png")
    return tmp_path


def problems_of(folder, text, **kwargs):
    with pytest.raises(InputError) as info:
        read_cohort(table(folder, text), **kwargs)
    return str(info.value)


def test_records_and_datalist(folder):
    cohort = read_cohort(table(folder, GOOD))
    assert cohort.classes == ("tumour", "stroma") and len(cohort) == 3
    first = cohort.records[0]
    assert first.image == folder / "a.png" and first.image.is_absolute() and first.stem == "a"
    assert (first.split, first.patient, first.row, first.mpp) == ("train", "p1", 2, None)
    assert cohort.records[2].proportions is None
    items = cohort.datalist()
    assert items[0]["image"] == str(folder / "a.png")
    assert items[0]["proportions"].dtype == np.float32 and items[0]["proportion_spread"].dtype == np.float32
    assert items[0]["proportions"] == pytest.approx([0.6, 0.4]) and items[0]["proportion_spread"].tolist() == [0, 0]
    assert "proportions" not in items[2] and (items[2]["stem"], items[2]["patient"]) == ("c", "p3")


def test_splits(folder):
    cohort = read_cohort(table(folder, GOOD))
    assert [r.stem for r in cohort.split("val").records] == ["b"]
    assert sum(len(cohort.split(name)) for name in ("train", "val", "test")) == 3
    with pytest.raises(InputError, match="Did you mean 'train'"):
        cohort.split("trian")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (GOOD, "utf-8-sig"),
        (GOOD, "utf-16"),
        (GOOD.replace(",", ";"), "utf-8"),
        (GOOD.replace(",", ";").replace("0.5", "0,5"), "utf-8"),
        (GOOD.replace(",", "\t"), "utf-8"),
        (GOOD.replace("\n", "\r\n"), "utf-8"),
        (GOOD.replace("image,split,patient", "Image, Split ,PATIENT"), "utf-8"),
        (GOOD.replace("\n", ",,\n"), "utf-8"),
        ("\n" + GOOD + "\n,,,,\n", "utf-8"),
        (GOOD.replace("p1", '"p1\nsecond line"'), "utf-8"),
    ],
)
def test_dialects(folder, text, encoding):
    cohort = read_cohort(table(folder, text, encoding=encoding))
    assert cohort.classes == ("tumour", "stroma")
    assert cohort.records[1].proportions.mean == pytest.approx([0.5, 0.5])


def test_names_in_the_windows_code_page(folder):
    touch(folder, "größe.png")
    cohort = read_cohort(table(folder, GOOD + "größe.png,train,,10,90\n", encoding="cp1252"))
    assert cohort.records[-1].stem == "größe"


def test_optional_columns(folder):
    text = "image,tumour,stroma,mpp\na.png,60,40,0.5\nb.png,30,70,\n"
    cohort = read_cohort(table(folder, text))
    assert [r.split for r in cohort.records] == ["train", "train"]
    assert [r.mpp for r in cohort.records] == [0.5, None]
    assert read_cohort(table(folder, text.replace("train", ""))).records[0].split == "train"


def test_empty_split_means_train(folder):
    assert read_cohort(table(folder, GOOD.replace("val", ""))).records[1].split == "train"


def test_classes_in_the_order_asked_for(folder):
    cohort = read_cohort(table(folder, GOOD), classes=["stroma", "tumour"])
    assert cohort.records[0].proportions.mean == pytest.approx([0.4, 0.6])


def test_several_raters_are_combined(folder):
    text = "image,split,rater,tumour,stroma\na.png,train,x,60,40\na.png,train,y,80,20\na.png,train,z,,\nb.png,train,x,50,50\n"
    cohort = read_cohort(table(folder, text))
    label = cohort.records[0].proportions
    assert len(cohort) == 2 and label.raters == 2
    assert label.mean == pytest.approx([0.7, 0.3]) and label.spread == pytest.approx([np.sqrt(0.02)] * 2)
    assert cohort.records[1].proportions.spread.tolist() == [0, 0]


def test_all_problems_are_reported_at_once(folder):
    text = (
        "image,split,patient,mpp,tumour,stroma\n"
        "a.png,train,p1,,60,40\n"
        "a.png,train,p1,,60,40\n"  # 3: twice
        "b.png,tran,p2,-1,60,60\n"  # 4: split, mpp and sum
        ",train,p3,,60,40\n"  # 5: no image
        "c.png,train,p3,,,\n"  # 6: train without proportions
        "d.png,val,p3,x,50,lots\n"  # 7: missing file, mpp, entry
        "e.png,val,p3,1,50\n"  # 8: too few cells
        "f.png,val,p3,1,50,1,2\n"  # 9: too many cells
    )
    message = problems_of(folder, text)
    for expected in (
        "row 3: image 'a.png' occurs twice",
        "row 4, column 'split': 'tran' is not one of train, val, test. Did you mean 'train'?",
        "row 4, column 'mpp': '-1'",
        "row 4, proportions sum to 120",
        "(image 'b.png')",
        "row 5: no image named",
        "row 6: training image 'c.png' has no proportions",
        "row 7, column 'stroma': 'lots'",
        "row 7, column 'mpp': 'x'",
        "1 of 4 images are not in",
        "row 7 'd.png'",
        "row 8: 5 cells but 6 columns",
        "row 9: 7 cells but 6 columns",
        "decimal comma",
        "11 problem(s)",
    ):
        assert expected in message


def test_long_lists_of_problems_are_cut(folder):
    message = problems_of(folder, "image,tumour,stroma\n" + "".join(f"{i}.png,many,few\n" for i in range(50)))
    assert "51 problem(s)" in message and "and 31 more" in message and message.count("\n") == 21


def test_missing_images_hint_at_the_folder(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    path = table(folder, GOOD)
    with pytest.raises(InputError, match="3 of 3 images .*row 2 'a.png'; row 3 'b.png'.*right image folder"):
        read_cohort(path, other)
    with pytest.raises(InputError, match=r"row 2 'a\.jpeg'"):
        read_cohort(table(folder, GOOD.replace("a.png", "a.jpeg")))
    with pytest.raises(InputError, match="image folder .* does not exist"):
        read_cohort(path, tmp_path / "nowhere")
    assert len(read_cohort(path, other, check_files=False)) == 3
    touch(folder, "long_name_of_image.png")
    with pytest.raises(InputError, match="is it 'long_name_of_image.png'"):
        read_cohort(table(folder, GOOD + "long_name_of_image.tif,train,,50,50\n"))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("images,split,patient,tumour,stroma", "(?s)no column 'image'.*\n.*'images'.*Did you mean 'image'"),
        ("image,splits,patient,tumour,stroma", "'splits' is taken for a class. Did you mean 'split'"),
        ("image,split,patient,tumour,tumour", "'tumour' occurs twice"),
    ],
)
def test_headers_with_slips(folder, header, message):
    with pytest.raises(InputError, match=message):
        read_cohort(table(folder, GOOD.replace("image,split,patient,tumour,stroma", header)))


def test_class_names_are_checked(folder):
    message = problems_of(folder, GOOD, classes=["tumor", "stroma", "necrosis"])
    assert "column 'tumour' is not a class" in message and "Did you mean 'tumor'" in message
    assert "class 'necrosis' has no column" in message
    assert "no class columns" in problems_of(folder, "image,split\na.png,train\n")


def test_empty_tables(folder, tmp_path):
    assert "is empty" in problems_of(folder, "")
    assert "no rows" in problems_of(folder, "image,tumour,stroma\n")
    with pytest.raises(InputError, match="does not exist"):
        read_cohort(tmp_path / "absent.csv")
    with pytest.raises(InputError, match="does not exist or is a folder"):
        read_cohort(tmp_path)


def test_values_in_nameless_columns_are_not_dropped_silently(folder):
    message = problems_of(folder, "image,tumour,,stroma\na.png,60,7,40\n")
    assert "row 2: a value stands in a column without a name" in message


def test_rows_of_one_image_must_agree(folder):
    text = "image,split,patient,rater,tumour,stroma\na.png,train,p1,x,60,40\na.png,val,p2,y,60,40\n"
    message = problems_of(folder, text)
    assert "row 3, column 'split': 'val', but row 2 says 'train'" in message and "column 'patient'" in message


def test_a_rater_twice_is_refused(folder):
    text = "image,split,rater,tumour,stroma\na.png,train,x,60,40\na.png,train,x,70,30\n"
    assert "rater 'x' has row 2 already" in problems_of(folder, text)


def test_damaged_tables(folder):
    path = folder / "table.xlsx"
    path.write_bytes(b"not a spreadsheet")
    with pytest.raises(InputError, match="Save it as CSV"):
        read_cohort(path)
    (folder / "bytes.csv").write_bytes(b"image\x81\xff,\x00\n")
    with pytest.raises(InputError):
        read_cohort(folder / "bytes.csv")


def test_suspicious_tables_are_warned_of(folder, caplog):
    touch(folder, "sub/a.png")
    text = "image,split,patient,tumour,stroma,notes\na.png,train,p1,60,40,\nsub/a.png,val,p1,50,45,\n"
    with caplog.at_level(logging.INFO):
        read_cohort(table(folder, text))
    assert "1 patient(s) are in train and in another split" in caplog.text and "p1" in caplog.text
    assert "images share a name" in caplog.text
    assert "'notes' is blank in every row" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        read_cohort(table(folder, GOOD.replace("60,40", "60,45")))
    assert "1 image(s) did not sum to 100 %" in caplog.text and "WARNING" not in caplog.text


def test_spreadsheets(folder):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("openpyxl")
    frame = pandas.DataFrame(
        {
            "image": ["a.png", "b.png", "c.png"],
            "split": ["train", None, "test"],
            "patient": ["p1", 2, "p3"],
            "tumour": [60, "10-20", None],
            "stroma": [40, None, None],
        }
    )
    frame.to_excel(folder / "table.xlsx", index=False)
    cohort = read_cohort(folder / "table.xlsx")
    assert cohort.records[0].proportions.mean == pytest.approx([0.6, 0.4])
    assert cohort.records[1].proportions.mean == pytest.approx([0.15, 0.85])
    assert cohort.records[1].split == "train" and cohort.records[1].patient == "2" and cohort.records[1].row == 3
    assert cohort.records[2].proportions is None
    frame.loc[1, "tumour"] = pandas.Timestamp(2026, 10, 20)
    frame.to_excel(folder / "table.xlsx", index=False)
    with pytest.raises(InputError, match="row 3, column 'tumour': .*looks like a date"):
        read_cohort(folder / "table.xlsx")


def test_lookup(folder):
    touch(folder, "x/d.png", "y/d.png", "x/e.png", "y/e.jpg")
    rows = "x/d.png,train,,10,90\ny/d.png,train,,20,80\nx/e.png,train,,30,70\ny/e.jpg,train,,40,60\n"
    cohort = read_cohort(table(folder, GOOD + rows))
    assert cohort.lookup("a.png").mean == pytest.approx([0.6, 0.4])
    assert cohort.lookup("/elsewhere/a.png").mean == pytest.approx([0.6, 0.4])
    assert cohort.lookup(Path("a.svs")).mean == pytest.approx([0.6, 0.4])
    assert cohort.lookup("c.png") is None
    assert cohort.lookup(folder / "y" / "d.png").mean == pytest.approx([0.2, 0.8])
    assert cohort.lookup("e.jpg").mean == pytest.approx([0.4, 0.6])
    with pytest.raises(ProportionError, match=r"several rows for 'd.png': rows 5 .*, 6"):
        cohort.lookup("d.png")
    with pytest.raises(ProportionError, match="several rows"):
        cohort.lookup("e.tif")
    with pytest.raises(ProportionError, match=r"no row for 'bb.png'.*Did you mean 'b.png'"):
        cohort.lookup("bb.png")


def test_written_tables_are_read_back(folder):
    rows = [
        {"image": "a.png", "split": "train", "patient": "p1", "tumour": 0.625, "stroma": 0.375},
        {"image": "b.png", "split": "val", "mpp": 0.5, "tumour": "10-20", "stroma": "rest, I think"},
        {"image": "c.png", "split": "test", "tumour": None},
    ]
    path = write_table(folder / "new" / "table.csv", rows, ["tumour", "stroma"])
    assert path.read_text().splitlines()[0] == "image,split,patient,mpp,tumour,stroma"
    with pytest.raises(InputError, match="'rest, I think'"):
        read_cohort(path, folder)
    rows[1]["stroma"] = ""
    cohort = read_cohort(write_table(path, rows, ["tumour", "stroma"]), folder)
    assert cohort.records[0].proportions.mean.tolist() == [0.625, 0.375]
    assert cohort.records[1].mpp == 0.5 and cohort.records[2].proportions is None
    assert sorted(p.name for p in path.parent.iterdir()) == ["table.csv"]


def test_wrong_rows_are_not_written(folder):
    path = folder / "new.csv"
    with pytest.raises(InputError, match="'tumor', which is no column; columns are image, split, patient, tumour"):
        write_table(path, [{"image": "a.png", "tumor": 1}], ["tumour"])
    with pytest.raises(InputError, match="names no image"):
        write_table(path, [{"tumour": 1}], ["tumour"])
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "train", "val", "classes"),
    [
        ("glas", 65, 20, ("other", "benign_gland", "malignant_gland")),
        ("ebhi_mosaic", 300, 50, ("other", "benign_gland", "neoplasia", "adenocarcinoma")),
    ],
)
@pytest.mark.parametrize("suffix", ["", "_rater_low", "_rater_medium", "_rater_high"])
def test_real_tables(name, train, val, classes, suffix):
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    cohort = read_cohort(folder / f"proportions{suffix}.csv", folder / "images")
    assert cohort.classes == classes
    assert (len(cohort.split("train")), len(cohort.split("val"))) == (train, val)
    rows = np.loadtxt(folder / f"proportions{suffix}.csv", delimiter=",", skiprows=1, usecols=range(3, 3 + len(classes)))
    assert np.stack([r.proportions.mean for r in cohort.records]) == pytest.approx(rows, abs=2e-4)


def test_images_to_segment_may_be_unknown_without_a_split(tmp_path):
    (tmp_path / "t.csv").write_text("image,tumour,stroma\na.png,60,40\nb.svs,,\n")
    known, unknown = read_cohort(tmp_path / "t.csv", check_files=False, training=False).records
    assert known.proportions is not None and unknown.proportions is None
    with pytest.raises(InputError, match="training image 'b.svs' has no proportions"):
        read_cohort(tmp_path / "t.csv", check_files=False)
