"""An empty table of proportions to fill in, as CSV or as a spreadsheet that guards against slips."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from monai.utils import optional_import

from monai_vslp.data.cohort import RESERVED, SPLITS
from monai_vslp.utils.atomic import atomic_path, write_text
from monai_vslp.utils.errors import InputError

__all__ = ["EXAMPLE_CLASSES", "write_table_template"]

openpyxl, _ = optional_import(
    "openpyxl", descriptor="{} is needed for spreadsheets: pip install 'monai_vslp[tables]', or give a .csv"
)
styles, _ = optional_import("openpyxl.styles")
validation, _ = optional_import("openpyxl.worksheet.datavalidation")

EXAMPLE_CLASSES = ("tumour", "stroma", "necrosis")
FIXED = ("image", "split", "patient", "rater", "mpp")
ROWS = 1000  # of the spreadsheet that are prepared
SUFFIXES = (".csv", ".xlsx")
HELP = (
    ("image", "File name of the image, as it lies in the folder of images, with its suffix: case01_a.png"),
    ("split", "train: learned from. val: held out, tells how well it went. test: left alone. Empty means train."),
    ("patient", "Any identifier. All images of a patient belong into one split."),
    ("rater", "Who estimated. Several people may rate one image: one row each. May stay empty."),
    ("mpp", "µm per pixel, about 0.25 for 40x, 0.5 for 20x. The same for all images. May stay empty."),
    (
        "each class",
        "Share of the tissue area, glass left out. Understood are 60, 60 %, 0.6, 10-20, <5, >90, ~30%, trace, or nothing.",
    ),
    ("sum", "About 100 per row. An empty class takes what the others leave; a row without any entry is unknown."),
    ("names", "Rename, add or remove class columns as you need; the other columns keep their names."),
    ("check", "monai-vslp check TABLE --images FOLDER says what is wrong before anything is trained."),
)


def write_table_template(path: str | Path, classes: Sequence[str] = EXAMPLE_CLASSES, images: Sequence[str] = ()) -> Path:
    """Write a table with a header and a row per image, the shares left empty.

    A spreadsheet has cells of type text, so that ``10-20`` does not become a date, a list to choose the split from, and a
    second sheet that explains the columns.

    Args:
        path: ``.csv`` or ``.xlsx`` to write; must not exist.
        classes: names of the class columns.
        images: file names for the column ``image``.

    Returns:
        ``path``.

    Raises:
        InputError: another suffix, a file that exists, or classes that cannot be columns.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"a template is a .csv or .xlsx file, got {path}.")
    if path.exists():
        raise InputError(f"{path} exists already; a template does not replace it. Choose another name.")
    names = [name.strip() for name in classes]
    if len(names) < 2 or len(set(names)) < len(names) or not all(names) or {n.lower() for n in names} & set(RESERVED):
        raise InputError(
            f"classes must be two or more different names, none of {', '.join(RESERVED)}; got {', '.join(classes) or 'none'}."
        )
    header = [*FIXED, *names]
    rows = [[image, *[""] * (len(header) - 1)] for image in images]
    if path.suffix.lower() == ".csv":
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])
        return write_text(path, stream.getvalue())
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "proportions"
    for row in (header, *rows):
        sheet.append(row)
    bold, fill = styles.Font(bold=True), styles.PatternFill("solid", fgColor="DCE6F1")
    for index, name in enumerate(header, start=1):
        cell = sheet.cell(1, index)
        cell.font = bold
        if name in names:
            cell.fill = fill
        sheet.column_dimensions[cell.column_letter].width = 32 if name == "image" else 14
        for number in range(2, max(ROWS, len(rows)) + 2):
            sheet.cell(number, index).number_format = "@"  # text
    sheet.freeze_panes = "B2"
    choice = validation.DataValidation(type="list", formula1=f'"{",".join(SPLITS)}"', allow_blank=True)
    choice.error, choice.errorTitle = f"one of {', '.join(SPLITS)}, or nothing", "split"
    sheet.add_data_validation(choice)
    choice.add(f"B2:B{max(ROWS, len(rows)) + 1}")
    guide = book.create_sheet("help")
    for name, text in HELP:
        guide.append([name, text])
        guide.cell(guide.max_row, 1).font = bold
    guide.column_dimensions["A"].width, guide.column_dimensions["B"].width = 12, 110
    with atomic_path(path) as temporary:
        book.save(temporary)
    return path
