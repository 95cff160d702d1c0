"""Tables of images and their proportions."""

from __future__ import annotations

import csv
import difflib
import io
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_vslp.data.proportions import ProportionLabel, combine_raters, parse_row
from monai_vslp.utils.atomic import atomic_path
from monai_vslp.utils.errors import InputError, ProportionError

__all__ = ["Cohort", "Examined", "Record", "examine_table", "read_cohort", "shared_patients", "twin_stems", "write_table"]

pandas, _ = optional_import("pandas")

SPLITS = ("train", "val", "test")
RESERVED = ("image", "split", "patient", "mpp", "rater")  # every other column is a class
MOST_PROBLEMS = 20
MOST_NAMES = 5
EXPECTED = "expected a header image,split,patient,<one column per class>"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One image of a cohort.

    Attributes:
        image: absolute path of the file.
        split: ``train``, ``val`` or ``test``.
        patient: identifier, empty where unknown.
        proportions: what is given for it, None where nothing is.
        row: line of the table (the header is 1), of the first rater.
        mpp: µm/px, None where unknown.
        estimates: what each rater gave; ``proportions`` combines them.
    """

    image: Path
    split: str
    patient: str
    proportions: ProportionLabel | None
    row: int
    mpp: float | None = None
    estimates: tuple[ProportionLabel, ...] = ()

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
        """The records of one split.

        Raises:
            InputError: not ``train``, ``val`` or ``test``.
        """
        if name not in SPLITS:
            raise InputError(f"split {name!r} is not one of {', '.join(SPLITS)}.{_did_you_mean(name, SPLITS)}")
        return Cohort(self.classes, tuple(r for r in self.records if r.split == name), self.source)

    def datalist(self) -> list[dict[str, Any]]:
        """MONAI's form: dictionaries with ``image`` (str), ``proportions`` and ``proportion_spread`` (float32 ``[C]``),
        ``proportion_bounds`` (float64 ``[2, C]``), all left out where unknown, ``stem`` and ``patient``."""
        items = []
        for record in self.records:
            item: dict[str, Any] = {"image": str(record.image), "stem": record.stem, "patient": record.patient}
            if record.proportions is not None:
                item["proportions"] = record.proportions.mean.astype(np.float32)
                item["proportion_spread"] = record.proportions.spread.astype(np.float32)
                item["proportion_bounds"] = np.stack([record.proportions.lower, record.proportions.upper])
            items.append(item)
        return items

    def lookup(self, image: str | Path) -> ProportionLabel | None:
        """Proportions of an image, found by its whole path, or else by file name, or else by stem.

        Returns:
            The label, or None where the row of the image is blank (proportions not known).

        Raises:
            ProportionError: no row, or several, belong to the image.
        """
        image = Path(image)
        tests = (
            lambda r: r.image == image.absolute(),
            lambda r: r.image.name == image.name,
            lambda r: r.stem == image.stem,
        )
        found = next(filter(None, ([r for r in self.records if test(r)] for test in tests)), [])
        if len(found) == 1:
            return found[0].proportions
        if found:
            rows = ", ".join(f"{r.row} ({r.image})" for r in found[:MOST_NAMES])
            raise ProportionError(
                f"{self.source} has several rows for {image.name!r}: rows {rows}. Give the whole path of the image, or rename."
            )
        hint = _did_you_mean(image.name, [r.image.name for r in self.records])
        raise ProportionError(
            f"{self.source} has no row for {image.name!r}.{hint} Add a row (blank proportions mean unknown), or leave the "
            "image out."
        )


def _did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""


def _listing(lines: Sequence[str], most: int, separator: str) -> str:
    """The first ``most`` entries, and how many more there are."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return separator.join([*lines[:most], *more])


def _cells_of_sheet(path: Path) -> list[tuple[int, list[Any]]]:
    """Lines of a spreadsheet's first sheet, with their numbers."""
    try:
        frame = pandas.read_excel(path, header=None, dtype=object)
    except Exception as error:  # pandas is absent, its reader is, or the file is damaged
        raise InputError(f"table {path} cannot be read as a spreadsheet: {error}. Save it as CSV instead.") from error
    frame = frame.where(frame.notna(), None)
    return [(i + 1, list(row)) for i, row in enumerate(frame.itertuples(index=False, name=None))]


def _cells_of_text(path: Path) -> list[tuple[int, list[Any]]]:
    """Lines of a text table with their numbers; the delimiter is the most frequent of comma, semicolon and tab."""
    data = path.read_bytes()
    # Spreadsheet programs write UTF-16 ("Unicode text") or the Windows code page where they do not write UTF-8.
    encodings = ("utf-16",) if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252")
    for encoding in encodings:
        try:
            text = data.decode(encoding)
            break
        except UnicodeDecodeError:
            continue
    else:
        raise InputError(f"table {path} is no text in UTF-8; save it as CSV (UTF-8).")
    first = next((line for line in text.splitlines() if line.strip()), "")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
    try:
        return [(reader.line_num, list(cells)) for cells in reader]
    except csv.Error as error:
        raise InputError(f"table {path}, row {reader.line_num}: {error}. Save it as CSV (UTF-8).") from error


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _read_rows(
    path: Path, problems: list[str], aliases: Mapping[str, str] | None = None
) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    """Header and rows with their line numbers; what does not fit the header is added to ``problems``.

    Columns named in ``aliases`` are read under their other name.
    """
    lines = _cells_of_sheet(path) if path.suffix.lower() in (".xlsx", ".xls") else _cells_of_text(path)
    lines = [(number, cells) for number, cells in lines if any(map(_text, cells))]
    if not lines:
        raise InputError(f"table {path} is empty; {EXPECTED}.")
    header = [_text(cell) for cell in lines[0][1]]
    while header and not header[-1]:
        header.pop()  # delimiters at the end of the line
    header = [name.lower() if name.lower() in RESERVED else (aliases or {}).get(name, name) for name in header]
    rows = []
    for number, cells in lines[1:]:
        while len(cells) > len(header) and not _text(cells[-1]):
            cells.pop()
        if len(cells) != len(header):
            problems.append(
                f"row {number}: {len(cells)} cells but {len(header)} columns. "
                + (
                    "A decimal comma, or a comma in a name, needs quotes or another delimiter (semicolon, tab)."
                    if len(cells) > len(header)
                    else "Is the file cut short? Cells that are not known stay, empty."
                )
            )
            continue
        row = dict(zip(header, cells))
        if _text(row.pop("", None)):
            problems.append(f"row {number}: a value stands in a column without a name.")
        rows.append((number, row))
    return header, rows


def _class_columns(header: Sequence[str], classes: Sequence[str] | None) -> tuple[tuple[str, ...], list[str]]:
    """Classes in their order, and what is wrong with the header."""
    columns = [name for name in header if name and name not in RESERVED]
    absent = [name for name in RESERVED if name not in header]
    names = tuple(classes) if classes is not None else tuple(columns)
    problems = [f"column {name!r} occurs twice." for name in dict.fromkeys(header) if name and header.count(name) > 1]
    if "image" not in header:
        problems.append(f"no column 'image' (columns: {', '.join(header)}); {EXPECTED}.")
    if not columns:
        problems.append(f"no class columns (columns: {', '.join(header)}); {EXPECTED}.")
    for name in columns:
        if hint := _did_you_mean(name.lower(), absent, cutoff=0.8):
            problems.append(f"column {name!r} is taken for a class.{hint}")
        elif name not in names:
            hint = _did_you_mean(name, [n for n in names if n not in columns])
            problems.append(f"column {name!r} is not a class; classes are {', '.join(names)}.{hint}")
    if columns:
        problems += [f"class {name!r} has no column." for name in names if name not in columns]
    return names, problems


def read_cohort(
    table: str | Path,
    image_dir: str | Path | None = None,
    classes: Sequence[str] | None = None,
    check_files: bool = True,
    warn: bool = True,
    training: bool = True,
) -> Cohort:
    """Read and check a table ``image,split,patient,<one column per class>``.

    Optional columns: ``mpp`` (µm/px) and ``rater`` (several rows per image, combined to mean and spread). Missing ``split``
    means ``train``. Cells are read as :func:`~monai_vslp.data.proportions.parse_row` tells; a row whose class cells are all
    blank has unknown proportions, which images of ``train`` may not have. All problems are reported together.

    Args:
        table: CSV (comma, semicolon or tab; UTF-8, UTF-16 or Windows-1252) or, with pandas and openpyxl, XLSX.
        image_dir: folder that image names are relative to; the table's own folder by default.
        classes: expected classes, in the order wanted; None takes the columns of the table.
        check_files: require the image files to exist.
        warn: log what is allowed but often a mistake.
        training: False for a table of images to segment: proportions may be unknown whatever the split, which it need not name.

    Raises:
        InputError: lists what is wrong with row, column and value.
    """
    found = examine_table(table, image_dir, classes, check_files, training=training)
    if found.header_problems:
        raise InputError(f"table {table}:\n  {_listing(found.header_problems, MOST_PROBLEMS, chr(10) + '  ')}")
    if found.problems:
        listed = _listing(found.problems, MOST_PROBLEMS, chr(10) + "  ")
        raise InputError(f"table {table} has {len(found.problems)} problem(s):\n  {listed}")
    if warn:
        _warn(found.cohort)
    return found.cohort


@dataclass(frozen=True)
class Examined:
    """What a table says, and what is wrong with it.

    Attributes:
        cohort: what was understood.
        raters: names of the raters of each record, in the order of its ``estimates``; empty names where there is no column.
        header_problems: what is wrong with the columns; rows are then not looked at.
        problems: what is wrong with rows and files.
    """

    cohort: Cohort
    raters: tuple[tuple[str, ...], ...] = ()
    header_problems: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def examine_table(
    table: str | Path,
    image_dir: str | Path | None = None,
    classes: Sequence[str] | None = None,
    check_files: bool = True,
    aliases: Mapping[str, str] | None = None,
    training: bool = True,
) -> Examined:
    """As :func:`read_cohort`, but tell what is wrong instead of raising it.

    Args:
        table, image_dir, classes, check_files, training: as there.
        aliases: other names of columns, by those of the table.

    Raises:
        InputError: there is no such table or folder, or nothing in it can be read as one.
    """
    path = Path(table)
    if not path.is_file():
        raise InputError(f"table {path} does not exist or is a folder; give the path of a CSV file.")
    folder = Path(image_dir) if image_dir is not None else path.parent
    if check_files and not folder.is_dir():
        raise InputError(f"image folder {folder} does not exist.")
    problems: list[str] = []
    header, rows = _read_rows(path, problems, aliases)
    names, header_problems = _class_columns(header, classes)
    if header_problems:  # rows cannot be judged by a wrong header
        return Examined(Cohort(names, (), path), header_problems=tuple(header_problems))
    if not rows and not problems:
        raise InputError(f"table {path} has a header but no rows.")

    groups: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    seen: dict[tuple[str, str], int] = {}
    for line, row in rows:
        name, rater = _text(row["image"]), _text(row.get("rater"))
        if not name:
            problems.append(f"row {line}: no image named.")
        elif (name, rater) in seen:
            again = f"rater {rater!r} has" if rater else "several raters need different entries in a column 'rater'; there is"
            problems.append(f"row {line}: image {name!r} occurs twice: {again} row {seen[name, rater]} already.")
        else:
            seen[name, rater] = line
            groups.setdefault(name, []).append((line, row))
    found = [_record(name, group, folder, names, problems, training) for name, group in groups.items()]
    records = tuple(record for record, _ in found)
    if check_files:
        problems += _missing_files(records, folder)
    return Examined(Cohort(names, records, path), tuple(raters for _, raters in found), problems=tuple(problems))


def _record(
    name: str,
    group: Sequence[tuple[int, dict[str, Any]]],
    folder: Path,
    classes: tuple[str, ...],
    problems: list[str],
    training: bool = True,
) -> tuple[Record, tuple[str, ...]]:
    """One image of possibly several rows, and who gave its estimates; what is wrong is added to ``problems``."""
    line, first = group[0]
    for other, row in group[1:]:
        for key in ("split", "patient", "mpp"):
            here, there = _text(row.get(key)), _text(first.get(key))
            if here != there:
                problems.append(f"row {other}, column {key!r}: {here!r}, but row {line} says {there!r} (image {name!r}).")
    split = _text(first.get("split")).lower() or "train"
    if split not in SPLITS:
        problems.append(
            f"row {line}, column 'split': {split!r} is not one of {', '.join(SPLITS)}.{_did_you_mean(split, SPLITS)}"
        )
    labels: list[ProportionLabel] = []
    raters: list[str] = []
    understood = True
    for number, row in group:
        try:
            label = parse_row({key: row[key] for key in classes}, classes, row=number)
        except ProportionError as error:
            problems.append(f"{error} (image {name!r})")
            understood = False
        else:
            labels += [] if label is None else [label]
            raters += [] if label is None else [_text(row.get("rater"))]
    if training and understood and not labels and split == "train":
        problems.append(
            f"row {line}: training image {name!r} has no proportions. Fill in the classes, or set its split to val or test."
        )
    mpp = None
    if written := _text(first.get("mpp")):
        try:
            mpp = float(written.replace(",", "."))
        except ValueError:
            mpp = math.nan
        if not 0 < mpp < math.inf:
            problems.append(
                f"row {line}, column 'mpp': {written!r} is not a positive number (µm/px); leave it empty if unknown."
            )
    proportions = combine_raters(labels) if labels else None
    record = Record((folder / name).absolute(), split, _text(first.get("patient")), proportions, line, mpp, tuple(labels))
    return record, tuple(raters)


def _missing_files(records: Sequence[Record], folder: Path) -> list[str]:
    """At most one problem, which names the images that do not exist."""
    missing = [record for record in records if not record.image.is_file()]
    if not missing:
        return []
    present = [entry.name for entry in folder.iterdir()]
    named = [f"row {record.row} {record.image.name!r}" for record in missing]
    for i, record in enumerate(missing[:MOST_NAMES]):
        if near := difflib.get_close_matches(record.image.name, present, n=1, cutoff=0.8):
            named[i] += f" (is it {near[0]!r}?)"
    advice = " Is this the right image folder?" if len(missing) == len(records) else ""
    return [f"{len(missing)} of {len(records)} images are not in {folder}: {_listing(named, MOST_NAMES, '; ')}.{advice}"]


def shared_patients(cohort: Cohort) -> list[str]:
    """Patients with images in ``train`` and in another split."""
    places: dict[str, set[str]] = {}
    for record in cohort.records:
        if record.patient:
            places.setdefault(record.patient, set()).add(record.split)
    return sorted(patient for patient, splits in places.items() if "train" in splits and len(splits) > 1)


def twin_stems(cohort: Cohort) -> list[str]:
    """Names without suffix that several images have; their outputs would go to one folder."""
    counts = Counter(record.stem for record in cohort.records)
    return sorted(stem for stem, count in counts.items() if count > 1)


def _warn(cohort: Cohort) -> None:
    """Say what is allowed but often a mistake."""
    if shared := shared_patients(cohort):
        logger.warning(
            "%s: %d patient(s) are in train and in another split, so errors there look too small: %s.",
            cohort.source,
            len(shared),
            _listing(shared, MOST_NAMES, ", "),
        )
    if twins := twin_stems(cohort):
        logger.warning(
            "%s: images share a name but for folder or suffix, and outputs are named by it: %s.",
            cohort.source,
            _listing(twins, MOST_NAMES, ", "),
        )
    labels = [record.proportions for record in cohort.records if record.proportions is not None]
    if labels:
        for k, name in enumerate(cohort.classes):
            if all(label.missing[k] for label in labels):
                logger.warning("%s: column %r is blank in every row; is it a class?", cohort.source, name)
        scaled = sum(abs(label.raw_sum - 1) > 0.005 and not label.missing.any() for label in labels)
        if scaled:
            logger.info("%s: the proportions of %d image(s) did not sum to 100 %% and were scaled.", cohort.source, scaled)


def write_table(path: str | Path, rows: Iterable[Mapping[str, Any]], classes: Sequence[str]) -> Path:
    """Write a table that :func:`read_cohort` reads, as CSV, atomically.

    Args:
        path: where to; parent folders are made.
        rows: per image ``image``, and where known ``split``, ``patient``, ``mpp``, ``rater`` and one value per class
            (fractions, or text as a person would write it); what is absent or None stays blank.
        classes: class columns in their order; names of the other columns among them are skipped.

    Returns:
        ``path``.

    Raises:
        InputError: a row names a column that does not exist, or no image.
    """
    rows = [dict(row) for row in rows]
    optional = [name for name in ("mpp", "rater") if name in classes or any(name in row for row in rows)]
    columns = ["image", "split", "patient", *optional, *(name for name in classes if name not in RESERVED)]
    for number, row in enumerate(rows, start=2):
        if not _text(row.get("image")):
            raise InputError(f"row {number} names no image: {row}.")
        for name in row:
            if name not in columns:
                raise InputError(f"row {number} has {name!r}, which is no column; columns are {', '.join(columns)}.")
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
    return Path(path)
