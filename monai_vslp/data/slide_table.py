"""Tables of slides to segment: proportions may be blank or absent, and pieces of a slide may have their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_vslp.data.cohort import MOST_PROBLEMS, Record, _class_columns, _listing, _read_rows, _record, _text
from monai_vslp.data.proportions import ProportionLabel
from monai_vslp.utils.errors import InputError

__all__ = ["SlideRecord", "read_slide_table"]

EXPECTED = "expected a header slide,<one column per class>, and where known mpp, rater, region, patient"


@dataclass(frozen=True)
class SlideRecord:
    """One slide of a table.

    Attributes:
        path: absolute path of the file; it need not exist.
        row: line of the table (the header is 1).
        proportions: of the whole tissue, or of what is in no region; None where nothing is given.
        estimates: what each rater gave, by the name in the table, for slides with several rows.
        regions: proportions of regions of the slide by their names (a block, a core), for slides whose rows name some.
        mpp: µm/px, None where unknown.
        patient: identifier, empty where unknown.
    """

    path: Path
    row: int
    proportions: ProportionLabel | None = None
    estimates: Mapping[str, ProportionLabel] = field(default_factory=dict)
    regions: Mapping[str, ProportionLabel | None] = field(default_factory=dict)
    mpp: float | None = None
    patient: str = ""

    @property
    def stem(self) -> str:
        """File name without suffix; names the outputs."""
        return self.path.stem


def read_slide_table(table: str | Path, image_dir: str | Path | None, classes: Sequence[str]) -> list[SlideRecord]:
    """Read and check a table of slides to segment.

    Column ``slide`` (or ``image``) names the files. Optional are ``mpp`` (µm/px), ``rater`` (several rows per slide),
    ``region`` (rows for parts of a slide; one without is about the rest), ``patient``, and a column per class, whose cells are
    read as :func:`~monai_vslp.data.proportions.parse_row` tells. A row without any is a slide of unknown proportions, and so is
    every row of a table without class columns. All problems are reported together. Whether files exist is not looked at.

    Args:
        table: CSV or XLSX as :func:`~monai_vslp.data.cohort.read_cohort` takes it.
        image_dir: folder that names are relative to; the table's own folder by default.
        classes: classes of the network.

    Returns:
        A record per slide, in the order of the table.

    Raises:
        InputError: lists what is wrong with row, column and value, and slides whose outputs would have the same name.
    """
    path = Path(table)
    if not path.is_file():
        raise InputError(f"table {path} does not exist or is a folder; give the path of a CSV file.")
    folder = Path(image_dir) if image_dir is not None else path.parent
    if not folder.is_dir():
        raise InputError(f"image folder {folder} does not exist.")
    problems: list[str] = []
    header, rows = _read_rows(path, problems)
    lower = [name.lower() for name in header]
    if "slide" in lower and "image" in lower:
        raise InputError(f"table {path} has a column 'slide' and a column 'image'; keep the one that names the files.")
    names = {
        name: name.lower() if name.lower() == "region" else "image" if name.lower() == "slide" else name for name in header
    }
    columns = [names[name] for name in header if names[name] != "region"]
    given = bool(set(columns) & set(classes))
    if not given and "image" in columns:  # no proportions at all; any other column is still refused as a class mistyped
        columns += classes
    _, wrong = _class_columns(columns, classes)
    if wrong:
        raise InputError(f"table {path}: {EXPECTED}.\n  {_listing(wrong, MOST_PROBLEMS, chr(10) + '  ')}")
    if not rows and not problems:
        raise InputError(f"table {path} has a header but no rows.")

    groups: dict[str, dict[str, list[tuple[int, dict[str, Any]]]]] = {}
    seen: dict[tuple[str, str, str], int] = {}
    for line, cells in rows:
        row = {names[name]: value for name, value in cells.items()}
        name, region, rater = _text(row["image"]), _text(row.pop("region", None)), _text(row.get("rater"))
        if not name:
            problems.append(f"row {line}: no slide named.")
        elif (before := seen.setdefault((name, region, rater), line)) != line:
            problems.append(
                f"row {line}: slide {name!r}{f', region {region!r}' if region else ''} occurs twice (row {before}); "
                "several rows need different entries in a column 'rater' or 'region'."
            )
        else:
            row = dict.fromkeys(classes) | row if not given else row
            row["split"] = "test"  # nothing is learned here, so that blank proportions are allowed
            groups.setdefault(name, {}).setdefault(region, []).append((line, row))
    records = [_slide(name, regions, folder, tuple(classes), problems) for name, regions in groups.items()]
    stems: dict[str, SlideRecord] = {}
    for record in records:
        twin = stems.setdefault(record.stem, record)
        if twin is not record:
            problems.append(
                f"rows {twin.row} and {record.row}: {twin.path.name!r} and {record.path.name!r} would both write the folder "
                f"{record.stem!r}; rename one of them."
            )
    if problems:
        raise InputError(f"table {path} has {len(problems)} problem(s):\n  {_listing(problems, MOST_PROBLEMS, chr(10) + '  ')}")
    return records


def _slide(
    name: str,
    regions: Mapping[str, list[tuple[int, dict[str, Any]]]],
    folder: Path,
    classes: tuple[str, ...],
    problems: list[str],
) -> SlideRecord:
    """One slide of possibly several regions; what is wrong with it is added to ``problems``."""
    found: dict[str, Record] = {region: _record(name, group, folder, classes, problems)[0] for region, group in regions.items()}
    first = next(iter(found.values()))
    for record in found.values():
        for key in ("mpp", "patient"):
            if getattr(record, key) != getattr(first, key):
                problems.append(
                    f"row {record.row}, column {key!r}: {getattr(record, key)!r}, but row {first.row} says "
                    f"{getattr(first, key)!r} (slide {name!r})."
                )
    whole = found.get("")
    return SlideRecord(
        path=first.image,
        row=first.row,
        proportions=None if whole is None else whole.proportions,
        estimates={} if whole is None else _estimates(regions[""], whole),
        regions={region: record.proportions for region, record in found.items() if region},
        mpp=first.mpp,
        patient=first.patient,
    )


def _estimates(group: Sequence[tuple[int, Mapping[str, Any]]], record: Record) -> dict[str, ProportionLabel]:
    """Estimates by rater. ``record`` leaves out the rows without any, and so does this."""
    if len(record.estimates) < 2:
        return {}
    classes = record.estimates[0].classes
    names = [_text(row.get("rater")) for _, row in group if any(_text(row[name]) for name in classes)]
    return dict(zip(names, record.estimates))
