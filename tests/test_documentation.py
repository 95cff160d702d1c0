"""Commands of README and docs: all are understood by the program, and those of the pages that people follow are executed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import write_two_class_cohort
from PIL import Image

from monai_vslp.cli import _parser
from monai_vslp.data.cohort import write_table
from monai_vslp.data.synthetic import synthetic_image, write_slide

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SERVES = ("mlflow ui", "monai-vslp label")  # until they are stopped; started in tests of their own


def commands(page):
    """The lines of a page's blocks that call our program or MONAI's, continuation lines joined."""
    blocks = [line[4:] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("    ")]
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if re.match(r"(monai-vslp|python -m monai\.bundle) ", line)]


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_every_command_is_one_of_the_program(page):
    text = page.read_text(encoding="utf-8")
    known = _parser()._subparsers._group_actions[0].choices
    for line in commands(page):
        if line.startswith("monai-vslp"):
            _parser().parse_args(shlex.split(line, comments=True)[1:])  # ends the process where it is not understood
    for name in re.findall(r"`monai-vslp ([a-z-]+)[ `]", text):
        assert name in known, f"{page.name} speaks of 'monai-vslp {name}'"
    for path in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert "://" in path or (page.parent / path).exists(), f"{page.name} links to {path}"


def _weights(path):
    import torch
    from safetensors.torch import save_file

    from monai_vslp.utils.timm import import_timm

    torch.manual_seed(0)
    save_file(import_timm().create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), str(path))


def _run(line, folder):
    words = shlex.split(line, comments=True)
    program = [sys.executable, "-m", "monai_vslp"] if words[0] == "monai-vslp" else [sys.executable]
    settings = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [*program, *words[1:]], cwd=folder, env=os.environ | settings, capture_output=True, text=True, timeout=3600, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_readme_from_table_to_report(tmp_path):
    write_two_class_cohort(tmp_path, train=10, val=5)
    _weights(tmp_path / "vit_tiny_patch16_224.safetensors")
    (tmp_path / "new_images").mkdir()
    shutil.copy(tmp_path / "images" / "i11.png", tmp_path / "new_images" / "new.png")
    shutil.copy(tmp_path / "masks" / "i11.png", tmp_path / "masks" / "new.png")
    made = write_slide(tmp_path / "made.tif", (1024, 512))
    made.path.rename(tmp_path / "slide.svs")  # tiles and levels as in that format; readers look at the content
    made.mask.unlink()
    rows = [{"image": "new.png", "pink": "50", "purple": "50"}, {"image": "slide.svs", "pink": "", "purple": ""}]
    write_table(tmp_path / "new_table.csv", rows, ["image", "pink", "purple"])
    for line in commands(ROOT / "README.md"):
        if " benchmark " not in line and not line.startswith(SERVES):  # its data sets are not shipped
            _run(line, tmp_path)
    for name in ("new", "slide"):
        assert (tmp_path / "out" / name / "report.html").is_file()
    assert (tmp_path / "cv" / "cross_validation.md").is_file()


@pytest.mark.slow
def test_the_guides_for_a_cohort_and_for_tracking(tmp_path):
    import openpyxl

    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    shares = {}
    for index in range(15):
        tissue = synthetic_image((96, 96), seed=index)
        Image.fromarray(tissue.image).save(tmp_path / "images" / f"i{index}.png")
        Image.fromarray(tissue.mask.clip(0, 2)).save(tmp_path / "masks" / f"i{index}.png")
        by_class = tissue.proportions.tolist()
        shares[f"i{index}.png"] = [*by_class[:2], sum(by_class[2:])]
    _weights(tmp_path / "vit_tiny_patch16_224.safetensors")
    shutil.copytree(ROOT / "bundles", tmp_path / "bundles")
    shutil.copytree(ROOT / "bundles" / "pathology_tissue_proportion_segmentation", tmp_path / "B")

    def fill():
        book = openpyxl.load_workbook(tmp_path / "table.xlsx")
        sheet = book.active
        columns = {cell.value: cell.column for cell in sheet[1]}
        for row in range(2, sheet.max_row + 1):
            name = sheet.cell(row, columns["image"]).value
            if name in shares:
                number = int(name[1:-4])
                for label, share in zip(("tumour", "stroma", "necrosis"), shares[name]):
                    sheet.cell(row, columns[label]).value = f"{100 * share:.1f} %"
                sheet.cell(row, columns["split"]).value = "val" if number % 5 == 4 else "train"
                sheet.cell(row, columns["patient"]).value = f"p{number}"
        book.save(tmp_path / "table.xlsx")
        names = ["image", "split", "tumour", "stroma", "necrosis"]
        rows = [
            dict(zip(names, [name, "val" if index % 5 == 4 else "train", *(f"{share:.6f}" for share in values)]))
            for index, (name, values) in enumerate(shares.items())
        ]
        write_table(tmp_path / "table.csv", rows, names)

    for line in commands(ROOT / "docs" / "finetuning.md"):
        if line.startswith(SERVES):
            continue
        if " train " in line and (tmp_path / "run").exists():  # the page's ways to train are alternatives
            shutil.rmtree(tmp_path / "run")
        if "monai.bundle" in line:
            line += " --keep_head False"  # as the page says for other classes
        _run(line, tmp_path)
        if "--template" in line:
            fill()
    assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "B" / "models" / "finetuned").is_dir()

    (tmp_path / "run").rename(tmp_path / "RUN")
    for line in commands(ROOT / "docs" / "tracking.md"):
        if not line.startswith(SERVES):
            _run(line, tmp_path)
