"""Tables of images and their proportions."""

from __future__ import annotations

import csv
import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.data.proportions import ProportionLabel, combine_raters, parse_row
from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.errors import InputError, ProportionError

__all__ = ["Cohort", "Record", "read_cohort", "write_table"]

pandas, _ = optional_import("pandas")

SPLITS = ("train", "val", "test")
RESERVED = ("image", "split", "patient", "rater", "mpp")
MOST_PROBLEMS = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One image of a cohort.

    Attributes:
        image: path of the file.
        split: ``train``, ``val`` or ``test``.
        patient: identifier, empty where unknown.
        proportions: what is given for it, None where nothing is.
        row: line of the table (the header is 1), of the first rater.
        mpp: µm/px, None where unknown.
    """

    image: Path
    split: str
    patient: str
    proportions: ProportionLabel | None
    row: int
    mpp: float | None = None

    @property
    def stem(self) -> str:
        """File name without suffix; names the outputs."""
        return self.image.stem


@dataclass(frozen=True)
class Cohort:
    """Images with proportions, in the order of the table."""

    classes: tuple[str, ...]
    records: tuple[Record, ...]
    source: Path

    def __len__(self) -> int:
        return len(self.records)

    def split(self, name: str) -> Cohort:
        """The records of one split."""
        return Cohort(self.classes, tuple(r for r in self.records if r.split == name), self.source)

    def datalist(self) -> list[dict[str, Any]]:
        """MONAI's form: dictionaries with ``image`` (str), ``proportions`` and ``proportion_spread`` (float32 ``[C]``, left
        out where unknown), ``stem`` and ``patient``."""
        items = []
        for record in self.records:
            item: dict[str, Any] = {"image": str(record.image), "stem": record.stem, "patient": record.patient}
            if record.proportions is not None:
                item["proportions"] = record.proportions.mean.astype(np.float32)
                item["proportion_spread"] = record.proportions.spread.astype(np.float32)
            items.append(item)
        return items

    def lookup(self, image: str | Path) -> ProportionLabel | None:
        """Proportions of an image, found by file name or else by stem.

        Raises:
            ProportionError: no row, or several, belong to the image.
        """
        name = Path(image).name
        found = [r for r in self.records if r.image.name == name] or [r for r in self.records if r.stem == Path(name).stem]
        if len(found) == 1:
            return found[0].proportions
        names = [r.image.name for r in self.records]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" The nearest is {near[0]!r}." if near else ""
        raise ProportionError(
            f"{self.source} has {'no row' if not found else 'several rows'} for {name!r}.{hint} Add a row (blank proportions "
            "mean unknown), or leave the image out."
        )


def _read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    """Header and rows with their line numbers."""
    if path.suffix.lower() in (".xlsx", ".xls"):
        frame = pandas.read_excel(path, dtype=object)
        frame = frame.where(frame.notna(), None)
        header = [str(name).strip() for name in frame.columns]
        return header, [(i + 2, dict(zip(header, row))) for i, row in enumerate(frame.itertuples(index=False))]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text(encoding="cp1252")  # what spreadsheets write where they do not write UTF-8
    lines = text.splitlines()
    if not lines:
        raise InputError(f"table {path} is empty; expected a header image,split,patient,<one column per class>.")
    delimiter = max(",;\t", key=lines[0].count)
    reader = csv.reader(lines, delimiter=delimiter)
    header = [name.strip() for name in next(reader)]
    rows = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(header):
            raise InputError(
                f"table {path}, row {reader.line_num}: {len(cells)} cells but {len(header)} columns. A decimal comma or a "
                "comma in a name needs quotes, or another delimiter (semicolon, tab)."
            )
        rows.append((reader.line_num, dict(zip(header, [*cells, *[""] * (len(header) - len(cells))]))))
    return header, rows


def read_cohort(
    table: str | Path,
    image_dir: str | Path | None = None,
    classes: Sequence[str] | None = None,
    check_files: bool = True,
) -> Cohort:
    """Read and check a table ``image,split,patient,<one column per class>``.

    Optional columns: ``mpp`` (µm/px) and ``rater`` (several rows per image, combined to mean and spread). Missing ``split``
    means ``train``. Cells are read as :func:`~monai_vslp.data.proportions.parse_row` tells. All problems are reported
    together.

    Args:
        table: CSV (comma, semicolon or tab) or XLSX file.
        image_dir: folder that image names are relative to; the table's own folder by default.
        classes: expected classes; None takes the columns of the table.
        check_files: require the image files to exist.

    Raises:
        InputError: lists what is wrong with row, column and value.
    """
    path = Path(table)
    if not path.is_file():
        raise InputError(f"table {path} does not exist.")
    folder = Path(image_dir) if image_dir is not None else path.parent
    if check_files and not folder.is_dir():
        raise InputError(f"image folder {folder} does not exist.")
    header, rows = _read_rows(path)
    if len(set(header)) < len(header):
        raise InputError(f"table {path}: columns {sorted({n for n in header if header.count(n) > 1})} occur twice.")
    if "image" not in header:
        near = difflib.get_close_matches("image", header, n=1, cutoff=0.4)
        hint = f" Should {near[0]!r} be called 'image'?" if near else ""
        raise InputError(f"table {path} has no column 'image' (columns: {', '.join(header)}).{hint}")
    columns = [name for name in header if name and name not in RESERVED]
    names = tuple(classes) if classes is not None else tuple(columns)
    if not columns:
        raise InputError(f"table {path} has no class columns; expected image,split,patient,<one column per class>.")
    if not rows:
        raise InputError(f"table {path} has a header but no rows.")
    problems: list[str] = []
    for name in columns:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            problems.append(f"column {name!r} is not a class; classes are {', '.join(names)}.{hint}")
    problems += [f"class {name!r} has no column." for name in names if name not in columns]
    if problems:
        raise InputError(f"table {path}:\n  " + "\n  ".join(problems))

    groups: dict[str, list[tuple[int, dict[str, Any], ProportionLabel | None]]] = {}
    seen: set[tuple[str, str]] = set()
    for line, row in rows:
        name = str(row["image"] or "").strip()
        rater = str(row.get("rater") or "").strip()
        if not name:
            problems.append(f"row {line}: no image named.")
            continue
        if (name, rater) in seen:
            problems.append(
                f"row {line}: image {name!r} occurs twice"
                + (f" for rater {rater!r}." if rater else "; several raters need a column 'rater'.")
            )
            continue
        seen.add((name, rater))
        try:
            label = parse_row({key: row[key] for key in columns}, names, row=line)
        except ProportionError as error:
            problems.append(f"{error} (image {name!r})")
            continue
        groups.setdefault(name, []).append((line, row, label))
    records = [_record(name, group, folder, check_files, problems) for name, group in groups.items()]
    if problems:
        shown = "\n  ".join(problems[:MOST_PROBLEMS])
        more = f"\n  and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise InputError(f"table {path} has {len(problems)} problem(s):\n  {shown}{more}")
    cohort = Cohort(names, tuple(records), path)
    shared = {r.patient for r in cohort.split("train").records if r.patient} & {
        r.patient for r in records if r.split != "train"
    }
    if shared:
        logger.warning("patients %s are in train and in another split: their errors look too small.", sorted(shared)[:5])
    return cohort


def _record(
    name: str,
    group: list[tuple[int, dict[str, Any], ProportionLabel | None]],
    folder: Path,
    check_files: bool,
    problems: list[str],
) -> Record:
    """One image of possibly several rows; what is wrong with it is added to ``problems``."""
    line, row, _ = group[0]
    split = str(row.get("split") or "train").strip().lower()
    if split not in SPLITS:
        near = difflib.get_close_matches(split, SPLITS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        problems.append(f"row {line}, column 'split': {split!r} is not one of {', '.join(SPLITS)}.{hint}")
    labels = [label for _, _, label in group if label is not None]
    if not labels and split == "train":
        problems.append(f"row {line}: training image {name!r} has no proportions.")
    path = (folder / name).absolute()
    if check_files and not path.is_file():
        problems.append(f"row {line}: image {path} does not exist.")
    mpp = None
    if str(row.get("mpp") or "").strip():
        try:
            mpp = float(str(row["mpp"]).replace(",", "."))
        except ValueError:
            problems.append(f"row {line}, column 'mpp': {row['mpp']!r} is not a number (µm/px).")
    patient = str(row.get("patient") or "").strip()
    return Record(path, split, patient, combine_raters(labels) if labels else None, line, mpp)


def write_table(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Path:
    """Write rows as CSV, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(rows)
    return Path(path)
