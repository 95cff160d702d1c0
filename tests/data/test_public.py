"""Public data sets, written small in the layouts of their owners and read back."""

import pickle
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from monai_vslp.data.cohort import read_cohort
from monai_vslp.data.public import (
    PUBLIC_SETS,
    PublicItem,
    PublicSet,
    area_fractions,
    check_manifest,
    read_public,
    split_by_patient,
    write_manifest,
)
from monai_vslp.data.public.bcss import BCSS_GROUPS, NO_CLASS
from monai_vslp.data.public.wsss import presence_from_name
from monai_vslp.utils.errors import ImageReadError, InputError

BUILT_IN = ("glas", "bcss", "bcss_wsss", "luad_histoseg", "ebhi_seg", "crag")
SIZE = (6, 10)  # rows, columns
BCSS_CODES = """
    outside_roi tumor stroma lymphocytic_infiltrate necrosis_or_debris glandular_secretions blood exclude metaplasia_NOS fat
    plasma_cells other_immune_infiltrate mucoid_material normal_acinus_or_duct lymphatics undetermined nerve skin_adnexa
    blood_vessel angioinvasion dcis other"""
BCSS_LABELS = BCSS_CODES.split()
LUAD_COLOURS = [(205, 51, 51), (0, 255, 0), (65, 105, 225), (255, 165, 0), (255, 255, 255)]
BCSS_COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (153, 0, 255), (255, 255, 255)]
REGION = "TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500"


def save(array, path, mode=None, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, dtype=np.uint8))
    if palette is not None:
        image = image.copy()
        image.putpalette([value for colour in palette for value in colour])
    (image.convert(mode) if mode else image).save(path)


def tissue(path, seed=0, size=SIZE):
    save(np.random.default_rng(seed).integers(0, 256, (*size, 3)), path)


def columns(*counts):
    """A map ``[6, 10]`` whose value k fills ``counts[k]`` columns, from the left."""
    assert sum(counts) == SIZE[1]
    return np.repeat(np.arange(len(counts)), counts)[None].repeat(SIZE[0], axis=0)


def write_glas(root, ends="\n"):
    lines = ["name,patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)"]
    for subset, number in (("train", 12), ("testA", 2), ("testB", 1)):
        for i in range(1, number + 1):
            benign = i % 2
            tissue(root / f"{subset}_{i}.bmp", i)
            glands = columns(5, 0, 0, 3, 0, 0, 0, 2)  # instances 3 and 7
            save(glands, root / f"{subset}_{i}_anno.bmp")
            grade = "benign, healthy" if benign else "malignant, moderately differentiated"
            lines.append(f"{subset}_{i},{(i - 1) // 3 + 1}, {grade}")
    (root / "Grade.csv").write_bytes((ends.join(lines) + ends).encode())


def write_crag(root):
    for folder, prefix, number in (("train", "train", 4), ("valid", "test", 2)):
        for i in range(1, number + 1):
            tissue(root / folder / "Images" / f"{prefix}_{i}.png", i)
            tissue(root / folder / "Overlay" / f"{prefix}_{i}.png", i)
            save(columns(4, 1, 5), root / folder / "Annotation" / f"{prefix}_{i}.png")


def write_bcss(root, images="rgbs_colorNormalized", codes="meta/gtruth_codes.tsv"):
    for i in range(5):
        name = f"TCGA-A{i}-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500.png"
        tissue(root / images / name, i)
        mask = np.zeros(SIZE)
        mask[:, 2:5], mask[:, 5:8], mask[:, 8] = 1, 20, 2  # outside 2, tumour 3, DCIS 3, stroma 1
        mask[:, 9] = BCSS_LABELS.index("exclude")
        save(mask, root / "masks" / name)
    path = root / codes
    path.parent.mkdir(exist_ok=True)
    path.write_text("label\tGT_code\n" + "".join(f"{label}\t{i}\n" for i, label in enumerate(BCSS_LABELS)))


def _write_patches(root, train, names, palette):
    for i, name in enumerate(train):
        tissue(root / "train" / name, i)
    for split in ("val", "test"):
        for i, name in enumerate(names):
            tissue(root / split / "img" / f"{split[0]}{name}", i)
            save(columns(1, 2, 3, 2, 2), root / split / "mask" / f"{split[0]}{name}", palette=palette)
    (root / "Readme.txt").write_text("We release …")


def write_luad(root):
    train = ["1031280-2300-27920-[1 0 0 1].png", "1031280-1-2-[0 0 0 1].png", "99-1-2-[1 1 1 0].png"]
    _write_patches(root, train, ["385277-44539-46781.png"], LUAD_COLOURS)


def write_bcss_wsss(root):
    train = [f"{REGION}+0[1101].png", f"{REGION}+1[0100].png"]
    _write_patches(root, train, [f"{REGION}+0.png", f"{REGION}+1.png"], BCSS_COLOURS)


def write_ebhi(root):
    stages = ("Normal", "Polyp", "Low-grade IN", "High-grade IN", "Serrated adenoma", "Adenocarcinoma")
    for k, stage in enumerate(stages):
        for i in range(3):
            name = f"{'GTxc' if i else 'GTXC'}20{k}{i // 2}-{i + 1}-400-001.png"
            tissue(root / stage / "image" / name, i)
            marked = np.zeros((*SIZE, 3))
            marked[: k + 1] = 255 if i else 1
            save(marked, root / stage / "label" / name)
    (root / ".DS_Store").write_bytes(b"x")
    (root / "Normal" / "image" / "._junk.png").write_bytes(b"x")


WRITERS = {
    "glas": write_glas,
    "crag": write_crag,
    "bcss": write_bcss,
    "luad_histoseg": write_luad,
    "bcss_wsss": write_bcss_wsss,
    "ebhi_seg": write_ebhi,
}


@pytest.fixture
def sets(tmp_path):
    def make(name, **kwargs):
        root = tmp_path / f"{name} as distributed"
        root.mkdir()
        WRITERS[name](root, **kwargs)
        return root

    return make


def recount(monkeypatch, name, **changes):
    """Have the small set's numbers, or others, for what the owners state."""
    entry = PUBLIC_SETS.components[name]
    monkeypatch.setitem(PUBLIC_SETS.components, name, entry._replace(value=replace(entry.value, **changes)))


def by_name(cohort):
    return {item.image.name: item for item in cohort}


def fractions(item, classes):
    return area_fractions(item.labels(), classes).tolist()


# --- the six layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_glas_glands_get_the_class_of_their_grade(sets, ends):
    cohort = read_public("GlaS", sets("glas", ends=ends))
    assert cohort.classes == ("other", "benign_gland", "malignant_gland") and len(cohort) == 15
    assert [item.image.stem for item in cohort][:4] == ["testA_1", "testA_2", "testB_1", "train_1"]
    assert cohort.items[-1].image.stem == "train_12"  # by number
    items = by_name(cohort)
    assert fractions(items["train_1.bmp"], 3) == [0.5, 0.5, 0] and fractions(items["train_2.bmp"], 3) == [0.5, 0, 0.5]
    assert (items["train_4.bmp"].patient, items["train_3.bmp"].patient) == ("2", "1")
    assert {item.split for item in cohort if item.subset.startswith("test")} == {"test"}
    assert items["testB_1.bmp"].mpp == 0.62 and items["train_1.bmp"].labels().dtype == np.uint8


def test_crag_counts_every_instance_as_gland(sets):
    root = sets("crag")
    cohort = read_public("crag", root)
    assert all(fractions(item, 2) == [0.4, 0.6] for item in cohort)
    assert sorted(item.image.name for item in cohort if item.split == "test") == ["test_1.png", "test_2.png"]
    assert not any(item.patient for item in cohort) and sum(item.split == "val" for item in cohort) == 1
    (root / "valid").rename(root / "test")
    (root / "test" / "Annotation").rename(root / "test" / "Annotations")
    assert read_public("crag", root).found == {"train": 4, "test": 2}


@pytest.mark.parametrize("images", ["rgbs_colorNormalized", "images"])
def test_bcss_codes_are_read_from_the_owners_table_and_grouped(sets, images):
    cohort = read_public("bcss", sets("bcss", images=images))
    item = cohort.items[0]
    assert (item.patient, item.slide, item.mpp) == ("TCGA-A0-A0SK", "TCGA-A0-A0SK-DX1", 0.25)
    labels = item.labels()
    assert (labels[:, :2] == 255).all() and (labels[:, 9] == 255).all() and (labels[:, 2:8] == 0).all()
    assert fractions(item, 5) == pytest.approx([6 / 7, 1 / 7, 0, 0, 0])
    assert sorted(label for labels in (*BCSS_GROUPS.values(), NO_CLASS) for label in labels) == sorted(BCSS_LABELS)


def test_bcss_follows_another_numbering_and_refuses_what_it_does_not_know(sets):
    root = sets("bcss", codes="gtruth_codes.tsv")
    table = root / "gtruth_codes.tsv"
    text = table.read_text()
    table.write_text(text.replace("tumor\t1\n", "tumor\t2\n").replace("stroma\t2\n", "stroma\t1\n"))
    assert fractions(read_public("bcss", root).items[0], 5) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0])
    table.write_text(text.replace("dcis\t20\n", ""))
    with pytest.raises(InputError, match="code 20; codes are 0, 1, 2"):
        read_public("bcss", root).items[0].labels()
    table.write_text(text + "cartilage\t22\n")
    with pytest.raises(InputError, match="'cartilage' with code '22'"):
        read_public("bcss", root)


def test_bcss_images_of_the_older_script_end_in_an_underscore(sets):
    root = sets("bcss")
    for path in (root / "rgbs_colorNormalized").iterdir():
        path.rename(path.with_name(f"{path.stem}_.png"))
    assert all(item.labels is not None for item in read_public("bcss", root))


@pytest.mark.parametrize(("name", "patients"), [("luad_histoseg", {"1031280", "99"}), ("bcss_wsss", {"TCGA-A1-A0SK"})])
def test_patches_have_presence_for_training_and_palette_masks_beyond(sets, name, patients):
    cohort = read_public(name, sets(name))
    train = [item for item in cohort if item.split == "train"]
    assert {item.patient for item in train} == patients
    assert all(item.labels is None and len(item.presence) == 4 for item in train)
    for item in cohort:
        if item.split != "train":
            labels = item.labels()
            assert (labels == np.where(columns(1, 2, 3, 2, 2) == 4, 255, columns(1, 2, 3, 2, 2))).all()
            assert fractions(item, 4) == [1 / 8, 2 / 8, 3 / 8, 2 / 8]


def test_flags_of_file_names(sets):
    assert presence_from_name("1031280-2300-27920-[1 0 0 1].png", 4) == (True, False, False, True)
    assert presence_from_name(f"x/{REGION}+0[1101].png", 4) == (True, True, False, True)
    for wrong in ("a-[1 0 0].png", "a-[1 0 0 2].png", "a-[1 0 0 1]b.png", "a.png"):
        with pytest.raises(InputError, match=r"4 flags, such as '\[1 0 0 0\].png'"):
            presence_from_name(wrong, 4)


@pytest.mark.parametrize("kind", ["shuffled", "rgb", "grey"])
def test_the_colour_decides_not_the_number_of_the_palette(sets, kind):
    root = sets("luad_histoseg")
    path = next((root / "val" / "mask").iterdir())
    expected = read_public("luad_histoseg", root, "val").items[0].labels()
    indices = columns(1, 2, 3, 2, 2)
    if kind == "shuffled":
        order = [3, 0, 4, 1, 2]  # place in the file -> colour
        save(np.argsort(order)[indices], path, palette=[LUAD_COLOURS[k] for k in order])
        assert (np.asarray(Image.open(path)) != indices).any()
    elif kind == "rgb":
        save(indices, path, palette=LUAD_COLOURS, mode="RGB")
    else:
        save(indices, path)
    assert (read_public("luad_histoseg", root, "val").items[0].labels() == expected).all()


def test_colours_of_another_palette_are_refused(sets):
    root = sets("luad_histoseg")
    path = next((root / "val" / "mask").iterdir())
    save(columns(5, 5), path, palette=[(205, 51, 52), (0, 255, 0)])
    with pytest.raises(InputError, match=r"holds \(205, 51, 52\); the owners' palette is \(205, 51, 51\)"):
        read_public("luad_histoseg", root, "val").items[0].labels()
    save(columns(2, 2, 2, 2, 1, 1), path)
    with pytest.raises(InputError, match="holds 5;"):
        read_public("luad_histoseg", root, "val").items[0].labels()
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(ImageReadError):
        read_public("luad_histoseg", root, "val").items[0].labels()


def test_ebhi_marks_are_of_the_folders_stage_and_cases_stay_together(sets):
    cohort = read_public("ebhi-seg", sets("ebhi_seg"), val_fraction=0.3)
    assert cohort.classes[0] == "other" and len(cohort.classes) == 7 and len(cohort) == 18
    for item in cohort:
        k = list(cohort.found).index(item.subset)
        expected = np.zeros(7)
        expected[0], expected[k + 1] = 1 - (k + 1) / 6, (k + 1) / 6
        assert fractions(item, 7) == pytest.approx(expected.tolist())
    assert cohort.items[0].patient == cohort.items[1].patient == "GTXC2000"  # GTXC and GTxc
    assert cohort.items[0].slide == "GTXC2000-1" != cohort.items[1].slide


# --- wrong folders and names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_wrong_folder_is_told_from_the_set(sets, tmp_path, name):
    known = PUBLIC_SETS[name]
    with pytest.raises(InputError, match="does not exist or is a file") as missing:
        read_public(name, tmp_path / "nowhere")
    (tmp_path / "else").mkdir()
    with pytest.raises(InputError, match="found nothing") as empty:
        read_public(name, tmp_path / "else")
    assert known.obtained in str(missing.value) and known.obtained in str(empty.value)
    root = sets(name)
    with pytest.raises(InputError) as outer:
        read_public(name, root.parent)
    text = str(outer.value)
    assert f"Did you mean {root}?" in text and known.layout[0] in text and "else/" in text
    for path in root.rglob("*.*"):
        if path.suffix in (".png", ".bmp") and "anno" not in path.name and "mask" not in path.parts:
            path.unlink()
    with pytest.raises(InputError, match="no images|not found"):
        read_public(name, root)


def test_names_and_splits_that_do_not_exist(tmp_path):
    with pytest.raises(InputError, match=r"known are bcss, .*Did you mean 'luad_histoseg'\?"):
        read_public("luad-histsegs", tmp_path)
    with pytest.raises(InputError, match="split 'validation' is not one of train, val, test"):
        read_public("glas", tmp_path, split="validation")
    with pytest.raises(InputError, match="less than 1, got 1"):
        split_by_patient([], 1, 0)


def test_a_table_that_does_not_fit_the_glands(sets):
    root = sets("glas")
    table = root / "Grade.csv"
    text = table.read_text()
    table.write_text(text.replace("train_7,", "train_70,"))
    with pytest.raises(InputError, match="no row for 'train_7'"):
        read_public("glas", root)
    table.write_text(text.replace(" malignant,", " maligant,", 1))
    with pytest.raises(InputError, match="is 'maligant'; expected benign or malignant"):
        read_public("glas", root)
    table.write_text(text.replace("patient ID", "case"))
    with pytest.raises(InputError, match="lacks the column patient ID; it has name, case"):
        read_public("glas", root)


# --- verify ----------------------------------------------------------------------------------------------------------


def test_stated_numbers():
    stated = {name: sum(PUBLIC_SETS[name].counts.values()) for name in BUILT_IN}
    # 165, 151 and 213 images; 23,422 + 3,418 + 4,986 and 16,678 + 300 + 307 patches; half of 4,456 (images and labels).
    assert stated == {
        "glas": 165,
        "bcss": 151,
        "crag": 213,
        "bcss_wsss": 31_826,
        "luad_histoseg": 17_285,
        "ebhi_seg": 4_456 // 2,
    }


@pytest.mark.parametrize("name", BUILT_IN)
def test_verify_counts(sets, monkeypatch, name):
    cohort = read_public(name, sets(name))
    with pytest.raises(InputError, match="the owners state") as error:
        cohort.verify()
    for subset, number in PUBLIC_SETS[name].counts.items():
        assert f"{subset}: {cohort.found.get(subset, 0)} images, the owners state {number}" in str(error.value)
    recount(monkeypatch, name, counts=dict(cohort.found))
    result = read_public(name, cohort.root).verify()
    assert result["images"] == cohort.found and sorted(result["counted"]) == sorted(cohort.found) and not result["manifest"]
    assert result["label_maps"] == sum(item.presence is None for item in cohort)
    # A part of the set still knows the numbers of the whole.
    assert read_public(name, cohort.root, split="train").verify()["images"] == cohort.found
    first = cohort.items[0]
    first.image.unlink()
    with pytest.raises(InputError, match=f"{first.subset}: .* images"):
        read_public(name, cohort.root).verify()


def test_verify_hashes(sets, monkeypatch):
    root = sets("crag")
    recount(monkeypatch, "crag", counts={"train": 4, "test": 2})
    write_manifest(root)
    assert read_public("crag", root).verify()["manifest"]
    path = root / "train" / "Images" / "train_2.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # in the pixels; the header is whole
    path.write_bytes(data)
    (root / "train" / "Overlay" / "train_1.png").unlink()
    with pytest.raises(InputError) as error:
        read_public("crag", root).verify()
    assert "train/Images/train_2.png: SHA-256 is" in str(error.value)
    assert "train/Overlay/train_1.png: missing" in str(error.value) and "train_3" not in str(error.value)


def test_verify_label_maps(sets, monkeypatch):
    root = sets("ebhi_seg")
    recount(monkeypatch, "ebhi_seg", counts={})
    labels = sorted((root / "Polyp" / "label").iterdir())
    labels[0].unlink()
    labels[1].unlink()
    cohort = read_public("ebhi_seg", root)
    assert cohort.verify()["label_maps"] == 16  # two may lack one
    save(np.zeros((6, 9)), labels[2])
    with pytest.raises(InputError, match="has 10 x 6 px, its label map 9 x 6"):
        read_public("ebhi_seg", root).verify()
    labels[2].unlink()
    with pytest.raises(InputError, match="3 images without a label map"):
        read_public("ebhi_seg", root).verify()


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_manifests_are_those_of_sha256sum(tmp_path):
    root = tmp_path / "data"
    (root / "a b").mkdir(parents=True)
    (root / "a b" / "x-[1 0 0 1].png").write_bytes(b"1")
    (root / "back\\slash\nline").write_bytes(b"2")
    (root / "empty").touch()
    (root / ".DS_Store").write_bytes(b"3")
    manifest = write_manifest(root)
    assert manifest.read_text().count("\n") == 3
    assert subprocess.run(["sha256sum", "-c", "--strict", manifest.name], cwd=root, capture_output=True).returncode == 0
    assert check_manifest(root) == []
    names = ["a b/x-[1 0 0 1].png", "back\\slash\nline", "empty"]
    theirs = subprocess.run(["sha256sum", "-b", *names], cwd=root, capture_output=True, check=True).stdout
    (tmp_path / "theirs").write_bytes(theirs.replace(b"\n", b"\r\n"))
    assert check_manifest(root, tmp_path / "theirs") == []
    (root / "empty").write_bytes(b"no more")
    assert [line.split(":")[0] for line in check_manifest(root)] == ["empty"]
    write_manifest(root)
    assert check_manifest(root) == []


def test_manifests_that_are_none(tmp_path):
    with pytest.raises(InputError, match="does not exist; write one"):
        check_manifest(tmp_path)
    with pytest.raises(InputError, match="holds no files"):
        write_manifest(tmp_path / "nowhere")
    (tmp_path / "SHA256SUMS").write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        check_manifest(tmp_path)
    (tmp_path / "SHA256SUMS").write_text("d41d8cd98f00b204e9800998ecf8427e  a.png\n")
    with pytest.raises(InputError, match="line 1: .* is not '<64 hexadecimal digits>"):
        check_manifest(tmp_path)


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_tables_are_read_by_the_project_and_agree_with_the_masks(sets, tmp_path, name):
    cohort = read_public(name, sets(name))
    out = tmp_path / "out" / "deep"
    table = read_cohort(cohort.to_table(out / "proportions.csv"), classes=cohort.classes)
    assert len(table) == len(cohort)
    for item, record in zip(cohort, table.records):
        assert record.image.resolve() == item.image.resolve()
        assert (record.split, record.patient, record.mpp) == (item.split, item.patient, item.mpp)
        mask = out / "masks_val" / f"{record.stem}.png"
        assert mask.exists() == (item.split != "train")
        if item.labels is None:
            occurs = np.array(item.presence)
            assert (record.proportions.upper == occurs).all() and (record.proportions.mean[~occurs] == 0).all()
            assert record.proportions.mean[occurs] == pytest.approx(1 / occurs.sum())
            continue
        labels = item.labels() if item.split == "train" else np.asarray(Image.open(mask))
        assert (labels == item.labels()).all() and labels.dtype == np.uint8
        counted = labels[labels != 255]
        shares = [(counted == k).mean() for k in range(len(cohort.classes))]
        assert record.proportions.mean == pytest.approx(shares, abs=1e-8)
    assert sorted(path.name for path in out.iterdir()) == ["masks_val", "proportions.csv"]


def test_masks_of_training_images_are_written_on_request_only(sets, tmp_path):
    cohort = read_public("glas", sets("glas"))
    cohort.to_table(tmp_path / "out" / "t.csv", with_train_masks=True)
    names = {split: {f"{i.image.stem}.png" for i in cohort if i.split == split} for split in ("train", "val", "test")}
    assert {path.name for path in (tmp_path / "out" / "masks_train").iterdir()} == names["train"]
    assert {path.name for path in (tmp_path / "out" / "masks_val").iterdir()} == names["val"] | names["test"]


def test_masks_left_by_another_seed_are_noticed_before_anything_is_written(sets, tmp_path):
    root = sets("glas")
    first, again = read_public("glas", root), read_public("glas", root)
    path = first.to_table(tmp_path / "out" / "t.csv")
    before = path.read_bytes()
    assert again.to_table(path).read_bytes() == before  # the same division may be written again
    cohorts = (read_public("glas", root, seed=seed) for seed in range(1, 20))
    other = next(cohort for cohort in cohorts if cohort.items != first.items)
    with pytest.raises(InputError, match=r"holds masks of other images \(train_"):
        other.to_table(path)
    assert path.read_bytes() == before


def test_a_damaged_label_map_leaves_no_table(sets, tmp_path):
    root = sets("glas")
    path = root / "train_9_anno.bmp"
    save(np.zeros((6, 9)), path)
    with pytest.raises(InputError, match=r"has shape \[6, 9\], its image train_9.bmp \[6, 10\]"):
        read_public("glas", root).to_table(tmp_path / "out" / "t.csv")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ImageReadError, match="train_9_anno.bmp"):
        read_public("glas", root).to_table(tmp_path / "out" / "t.csv")
    assert not (tmp_path / "out" / "t.csv").exists()


def test_images_that_share_a_name_are_copied_under_names_of_their_own(sets, tmp_path):
    root = sets("ebhi_seg")
    for kind in ("image", "label"):
        shutil.copy(root / "Polyp" / kind / "GTXC2010-1-400-001.png", root / "Low-grade IN" / kind)
    cohort = read_public("ebhi_seg", root)
    with pytest.raises(InputError, match="1 names belong to several images .*copy_images=True"):
        cohort.to_table(tmp_path / "out" / "t.csv")
    assert not (tmp_path / "out").exists()
    table = read_cohort(cohort.to_table(tmp_path / "out" / "t.csv", with_train_masks=True, copy_images=True))
    assert len({record.stem for record in table.records}) == len(cohort) == 19
    for item, record in zip(cohort, table.records):
        assert record.image.read_bytes() == item.image.read_bytes() and record.image.parent == tmp_path / "out" / "images"
    assert len(list((tmp_path / "out").glob("masks_*/Low-grade_IN_*.png"))) == 4


def test_what_is_not_known_stays_blank_or_leaves_the_training_images(sets, tmp_path, caplog):
    root = sets("luad_histoseg")
    tissue(root / "train" / "7-1-2-[0 0 0 0].png")
    save(np.full(SIZE, 4), root / "val" / "mask" / "v385277-44539-46781.png", palette=LUAD_COLOURS)
    table = read_cohort(read_public("luad_histoseg", root).to_table(tmp_path / "out" / "t.csv"))
    assert [r.proportions is None for r in table.split("val").records] == [True]
    assert len(table.split("train")) == 3 and "7-1-2-[0 0 0 0].png are not known; left out of train" in caplog.text


# --- the division by patients ----------------------------------------------------------------------------------------


def items_of(patients):
    return [PublicItem(Path(f"/{i}.png"), "train", "train", patient) for i, patient in enumerate(patients)]


@given(
    patients=st.lists(st.sampled_from(["", *"abcdefgh"]), min_size=1, max_size=60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_no_patient_is_ever_divided(patients, fraction, seed):
    items = items_of(patients)
    divided = split_by_patient(items, fraction, seed)
    assert [replace(item, split="train") for item in divided] == items
    places = {}
    for item in divided:
        places.setdefault(item.patient or item.image, set()).add(item.split)
    assert all(len(splits) == 1 for splits in places.values())
    if len(places) > 1:
        assert {item.split for item in divided} == {"train", "val"}
    backwards = split_by_patient(items[::-1], fraction, seed)
    assert backwards[::-1] == divided


@given(seed=st.integers(0, 2**31), fraction=st.sampled_from([0.1, 0.2, 0.5]))
@settings(max_examples=50, deadline=None)
def test_the_division_has_the_size_asked_for(seed, fraction):
    patients = [name for k, name in enumerate("abcdefghijklmnopqrst") for _ in range(1 + k % 5)]
    taken = sum(item.split == "val" for item in split_by_patient(items_of(patients), fraction, seed))
    assert abs(taken - fraction * len(patients)) <= 2.5  # half of the largest patient


def test_divisions_depend_on_the_seed_and_on_nothing_else(sets, caplog):
    items = items_of("abcdefghij" * 2)
    assert split_by_patient(items, 0.3, 1) == split_by_patient(items, 0.3, 1)
    assert len({tuple(i.split for i in split_by_patient(items, 0.3, seed)) for seed in range(8)}) > 2
    assert split_by_patient(items, 0, 0) == items
    assert (
        split_by_patient(items_of("aaa"), 0.3, 0) == items_of("aaa") and "all training images are of one patient" in caplog.text
    )
    # Images of val and test are not touched, and the parts make up the whole.
    root = sets("glas")
    parts = [read_public("glas", root, split=split) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == 15 and len(parts[2]) == 3
    assert not {i.patient for i in parts[0]} & {i.patient for i in parts[1]}
    luad = read_public("luad_histoseg", sets("luad_histoseg"))
    assert [item.split for item in luad] == [item.subset for item in luad]  # has a val of its own


# --- fractions -------------------------------------------------------------------------------------------------------


@given(
    labels=hnp.arrays(
        np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.sampled_from([0, 1, 2, 3, 255])
    ),
    order=st.permutations(range(4)),
)
@settings(max_examples=150, deadline=None)
def test_fractions_are_on_the_simplex_and_move_with_the_labels(labels, order):
    p = area_fractions(labels, 4)
    counted = labels[labels != 255]
    if not counted.size:
        assert p is None
        return
    assert p.dtype == np.float64 and (p >= 0).all() and p.sum() == pytest.approx(1, abs=1e-12)
    assert ((p > 0) == np.isin(np.arange(4), counted)).all()
    assert (area_fractions(labels.T[::-1], 4) == p).all()  # where pixels lie does not matter
    renamed = np.append(np.array(order), [255] * 252).astype(np.uint8)[labels]
    assert (area_fractions(renamed, 4)[list(order)] == p).all()
    assert area_fractions(np.concatenate([labels, np.full_like(labels, 255)]), 4).tolist() == p.tolist()


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(InputError, match="labels must be 0 to 2 or 255, got 3"):
        area_fractions(np.array([[0, 3]], dtype=np.uint8), 3)


# --- sets of others --------------------------------------------------------------------------------------------------


def _halves(path, index):
    labels = np.zeros(SIZE, dtype=np.uint8)
    labels[:3] = index
    return labels


def _read_mine(root):
    return [
        PublicItem(path, "all", "train", f"p{i}", label_file=path, labels=partial(_halves, path, 1))
        for i, path in enumerate(sorted(root.glob("*.png")))
    ]


def test_a_set_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(PUBLIC_SETS, "components", dict(PUBLIC_SETS.components))
    mine = PublicSet("My set", ("a", "b"), ("one.png",), "my disk", _read_mine, {"all": 2})
    PUBLIC_SETS.add("my_set", "for one's own use", mine)
    for name in ("one.png", "two.png"):
        tissue(tmp_path / "data" / name)
    cohort = read_public("My-Set", tmp_path / "data")
    assert cohort.verify() == {"images": {"all": 2}, "counted": ["all"], "label_maps": 2, "manifest": False}
    table = read_cohort(cohort.to_table(tmp_path / "out" / "t.csv"))
    assert sorted(record.split for record in table.records) == ["train", "val"]
    assert all(record.proportions.mean.tolist() == [0.5, 0.5] for record in table.records)


def test_items_travel_to_workers(sets):
    item = read_public("bcss", sets("bcss")).items[0]
    assert (pickle.loads(pickle.dumps(item)).labels() == item.labels()).all()
