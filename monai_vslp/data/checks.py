"""What may be wrong with a table of proportions and its images, found before anything is trained."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from monai_vslp.data.cohort import (
    RESERVED,
    Cohort,
    Examined,
    Record,
    _did_you_mean,
    _listing,
    _read_rows,
    examine_table,
    shared_patients,
    twin_stems,
)
from monai_vslp.data.images import list_images, read_image
from monai_vslp.data.slides import PLAUSIBLE_MPP, SLIDE_SUFFIXES
from monai_vslp.utils.errors import ImageReadError

__all__ = ["LEVELS", "CohortCheck", "Finding", "check_cohort", "rounding_step"]

LEVELS = ("error", "warning", "note")
NAMED = 5  # rows, images or patients named in one finding
STEPS = (0.25, 0.2, 0.1, 0.05, 0.02, 0.01)  # rounding steps that are looked for, fractions, coarse first
STEP_SHARE = 0.95  # of the entries that are multiples of it
COARSE_STEP = 0.1  # above it estimates say little about a class
BAGS_PER_CLASS, FEWEST_PATIENTS, FEWEST_WITH_CLASS = 10, 5, 5
HELD_OUT_SHARE = 0.1  # of the images; fewer cannot tell settings apart
LEAST_SPREAD = 0.02  # standard deviation over the images, a fraction; classes that vary less cannot be told apart
SAME = 0.005  # fractions that are one value
USUAL_MPP = (0.1, 2.0)  # µm/px at which cells are seen
SMALLEST_SIDE = 64  # px
LEAST_CONTRAST = 3.0  # standard deviation of grey values (0 … 255); an empty field of view has less
DISAGREEMENT, ROW_DISAGREEMENT = 0.15, 0.4  # standard deviation between raters; range within one image
OFFSET, OFFSET_ERRORS, OFFSET_IMAGES = 0.05, 2.5, 5  # of a rater: at least so much, in standard errors, on so many images
ROW = re.compile(r"\brow (\d+)")
LEADING_ROW = re.compile(r"^row \d+[:,] (column '[^']*': )?")
SPECIFIC = re.compile(r"'[^']*'|\d+(?:\.\d+)?")  # what differs between problems of one kind
ALIKE = 3  # problems of one kind that are told one by one


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        level: ``error``: training refuses the table, or a class cannot be learned from it; ``warning``: results will suffer, or
            look better than they are; ``note``: for information.
        code: short name of the kind, for programs.
        message: what was found.
        advice: what to do; empty for notes.
        rows: lines of the table (the header is 1), where there are any.
    """

    level: str
    code: str
    message: str
    advice: str = ""
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class CohortCheck:
    """All that was found about a cohort.

    Attributes:
        table, images: what was checked.
        counts: ``images``, ``patients`` and, by split, images.
        classes: by name ``mean``, ``lowest``, ``highest`` (fractions, training images), ``occurs_in`` (training images).
        step: rounding step of the estimates, a fraction; None where they follow none.
        mpp: µm/px of the training images, where known.
        findings: errors first.
    """

    table: str
    images: str
    counts: Mapping[str, int] = field(default_factory=dict)
    classes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    step: float | None = None
    mpp: tuple[float, ...] = ()
    findings: tuple[Finding, ...] = ()

    def count(self, level: str) -> int:
        """Findings of one level."""
        return sum(finding.level == level for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form."""
        return asdict(self)


def _at(records: Sequence[Record]) -> tuple[int, ...]:
    return tuple(record.row for record in records)


def _named(records: Sequence[Record]) -> str:
    return _listing([record.image.name for record in records], NAMED, ", ")


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


# ---- the table ----------------------------------------------------------------------------------------------------------


def _misspelt(table: Path) -> dict[str, str]:
    """Columns whose names are nearly those of a column that is missing, and what they are meant to be."""
    header, _ = _read_rows(table, [])
    absent = [name for name in RESERVED if name not in header]
    found = {}
    for name in header:
        hint = _did_you_mean(name.lower(), absent, cutoff=0.8) if name and name not in RESERVED else ""
        if hint:
            found[name] = hint.split("'")[1]
    return found


def _problem(text: str) -> Finding:
    rows = tuple(int(number) for number in ROW.findall(text))
    code = "columns" if not rows or "cells but" in text else "rows"
    code = "missing_images" if "images are not in" in text else "repeated_row" if "occurs twice" in text else code
    column = LEADING_ROW.match(text)
    message, _, advice = LEADING_ROW.sub(column[1] or "" if column else "", text).partition(". ")
    return Finding("error", code, message.removesuffix("."), advice, rows)


def _table_findings(found: Examined) -> Iterator[Finding]:
    kinds: dict[str, list[Finding]] = {}
    for text in (*found.header_problems, *found.problems):
        kinds.setdefault(SPECIFIC.sub("#", text), []).append(_problem(text))
    for alike in kinds.values():
        yield from alike[:ALIKE]
        if rest := alike[ALIKE:]:
            rows = tuple(row for finding in rest for row in finding.rows)
            yield Finding("error", rest[0].code, f"the same is wrong with {len(rest)} more", rest[0].advice, rows)


def _split_findings(cohort: Cohort) -> Iterator[Finding]:
    training, held_out = cohort.split("train").records, cohort.split("val").records
    classes = len(cohort.classes)
    if classes < 2:
        yield Finding("error", "one_class", "there is one class alone", "Give at least two columns of proportions.")
    if not training:
        yield Finding("error", "no_training", "no row is of split 'train'", "Set the split of most rows to train.")
        return
    if len(training) < classes:
        text = f"{len(training)} training images for {classes} classes: percentages of fewer images than classes decide nothing"
        yield Finding("error", "too_few_images", text, f"Add images: ten per class ({BAGS_PER_CLASS * classes}) are a start.")
    elif len(training) < BAGS_PER_CLASS * classes:
        text = f"{len(training)} training images for {classes} classes are few"
        yield Finding(
            "warning", "few_images", text, f"Ten per class ({BAGS_PER_CLASS * classes}) are a start, more are better."
        )
    if not held_out:
        text = "no row is of split 'val': nothing tells how well proportions of new images are met, nor when to stop"
        yield Finding("warning", "no_held_out", text, "Set the split of about every fifth patient to val.")
    elif len(held_out) < HELD_OUT_SHARE * len(training):
        text = f"{len(held_out)} held-out images (split val) beside {len(training)} for training tell little"
        yield Finding("warning", "few_held_out", text, "Set the split of about every fifth patient to val.")
    patients = {record.patient for record in cohort.records} - {""}
    unnamed = [record for record in cohort.records if not record.patient]
    if unnamed and patients:
        text = f"{len(unnamed)} of {len(cohort)} images name no patient ({_named(unnamed)})"
        yield Finding("warning", "patients_missing", text, "Fill in the column patient.", _at(unnamed))
    elif unnamed:
        text = "no patients are named: whether images of one patient are in train and in val cannot be checked"
        yield Finding("warning", "no_patients", text, "Add a column patient with any identifier.")
    elif len(patients) < FEWEST_PATIENTS:
        text = f"all images are of {len(patients)} patient(s): what is learned may be theirs alone"
        yield Finding("warning", "few_patients", text, "Add images of other patients.")
    if shared := shared_patients(cohort):
        rows = [record for record in cohort.records if record.patient in shared]
        listed = _listing(shared, NAMED, ", ")
        text = f"{len(shared)} patient(s) are in train and in another split ({listed}): errors will look too small"
        yield Finding("warning", "shared_patients", text, "Give all images of a patient one split.", _at(rows))
    if twins := twin_stems(cohort):
        rows = [record for record in cohort.records if record.stem in twins]
        text = f"images share a name but for folder or suffix: {_listing(twins, NAMED, ', ')}"
        yield Finding("warning", "same_names", text, "Rename them; outputs are named by it.", _at(rows))


# ---- proportions --------------------------------------------------------------------------------------------------------


def rounding_step(cohort: Cohort) -> float | None:
    """The coarsest step that nearly all plainly written entries are multiples of, a fraction; None where there is none."""
    entries = []
    for record in cohort.records:
        for label in record.estimates:
            plain = ~label.missing & (label.lower == label.upper)
            entries += (label.mean * label.raw_sum)[plain].tolist()
    values = np.array(entries)
    values = values[(values > 1e-9) & (values < 1 - 1e-9)]
    if len(values) < 10:
        return None
    return next((s for s in STEPS if np.mean(np.abs(values / s - np.round(values / s)) < 1e-3 / s) >= STEP_SHARE), None)


def _known(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.proportions is not None]


def _sum_findings(cohort: Cohort) -> Iterator[Finding]:
    known = _known(cohort.records)
    scaled = [r for r in known if abs(r.proportions.raw_sum - 1) > SAME and not r.proportions.missing.any()]
    if not scaled:
        return
    furthest = max(scaled, key=lambda record: abs(record.proportions.raw_sum - 1))
    text = (
        f"the proportions of {len(scaled)} of {len(known)} images do not sum to 100 % (row {furthest.row}: "
        f"{_percent(furthest.proportions.raw_sum)}) and are scaled"
    )
    many = len(scaled) > 0.1 * len(known)
    advice = "Is a class missing from the table, or do classes overlap?" if many else ""
    yield Finding("warning" if many else "note", "scaled_sums", text, advice, _at(scaled))


def _class_findings(cohort: Cohort) -> Iterator[Finding]:
    training = _known(cohort.split("train").records)
    if not training:
        return
    p = np.stack([record.proportions.mean for record in training])
    blank = np.stack([record.proportions.missing for record in training])
    for k, name in enumerate(cohort.classes):
        occurs = int((p[:, k] > SAME).sum())
        if blank[:, k].all():
            yield Finding(
                "error", "blank_class", f"class {name!r} is blank in every training row", "Is it a class? Fill it in."
            )
        elif occurs == 0:
            text = f"class {name!r} is 0 in every training image: it cannot be learned"
            yield Finding("error", "absent_class", text, "Leave its column out, or add images that show it.")
        elif occurs < min(FEWEST_WITH_CLASS, len(training)):
            text = f"class {name!r} is in {occurs} of {len(training)} training images"
            yield Finding("warning", "rare_class", text, "Add images that show it.")
    held_out = _known(cohort.split("val").records)
    absent = [
        name
        for k, name in enumerate(cohort.classes)
        if (p[:, k] > SAME).any() and held_out and not any(r.proportions.mean[k] > SAME for r in held_out)
    ]
    if absent:
        text = f"no held-out image shows {_listing(absent, NAMED, ', ')}: how well it is met will not be known"
        yield Finding("warning", "absent_held_out", text, "Move some patients with it to split val.")


def _identity_findings(cohort: Cohort) -> Iterator[Finding]:
    """Directions in which proportions do not vary over the images: along them classes may be swapped at no cost."""
    training = _known(cohort.split("train").records)
    if len(training) < 2:
        return
    p = np.stack([record.proportions.mean for record in training])
    present = np.flatnonzero((p > SAME).any(axis=0))
    names = [cohort.classes[k] for k in present]
    if len(names) < 2:
        return
    centred = (p - p.mean(axis=0))[:, present]
    if np.abs(centred).max() < LEAST_SPREAD:
        text = "all training images have nearly the same proportions: nothing tells the classes apart"
        yield Finding("error", "constant_proportions", text, "Add images, or cut out regions, in which the shares differ.")
        return
    # The sum of all classes never varies; what is left has one direction less than there are classes.
    basis = np.linalg.svd(np.ones((1, len(names))))[2][1:]
    _, spreads, directions = np.linalg.svd(centred @ basis.T / np.sqrt(len(training)), full_matrices=True)
    spreads = np.pad(spreads, (0, len(directions) - len(spreads)))
    for spread, direction in zip(spreads, directions):
        if spread < LEAST_SPREAD:
            weights = np.abs(direction @ basis)
            together = [name for name, weight in zip(names, weights) if weight > 0.3 * weights.max()]
            text = (
                f"the shares of {_listing(together, NAMED, ', ')} hardly vary against each other (by {100 * spread:.1f} %): "
                "percentages do not tell these classes apart"
            )
            advice = "Add images in which one of them is frequent and another rare, or make one class of them."
            yield Finding("warning", "confounded_classes", text, advice)


def _step_findings(step: float | None) -> Iterator[Finding]:
    if step is None:
        return
    text = f"entries are multiples of {_percent(step)}: they are treated as estimates by people"
    if step > COARSE_STEP:
        yield Finding("warning", "coarse_step", text, "Steps of 5 or 10 % tell more; ranges such as 10-20 are allowed, too.")
    else:
        yield Finding("note", "rounding_step", text)


def _rater_findings(found: Examined) -> Iterator[Finding]:
    records = [
        (record, names) for record, names in zip(found.cohort.records, found.raters) if len(record.estimates) > 1 and all(names)
    ]
    if not records:
        return
    classes = found.cohort.classes
    estimates = [np.stack([label.mean for label in record.estimates]) for record, _ in records]
    spread = np.sqrt(np.mean([values.var(axis=0, ddof=1) for values in estimates], axis=0))
    text = f"raters differ by {', '.join(f'{_percent(s)} ({name})' for name, s in zip(classes, spread))}, standard deviation"
    if spread.max() > DISAGREEMENT:
        yield Finding("warning", "raters_disagree", text, "Agree on what belongs to a class, then let them rate again.")
    else:
        yield Finding("note", "raters", f"{len(records)} images have several raters; {text}")
    apart = [r for (r, _), values in zip(records, estimates) if np.ptp(values, axis=0).max() > ROW_DISAGREEMENT]
    if apart:
        text = f"raters are more than {_percent(ROW_DISAGREEMENT)} apart on {len(apart)} image(s): {_named(apart)}"
        yield Finding("warning", "raters_apart", text, "Look at these rows: a slip, or another region was rated.", _at(apart))
    differences: dict[str, list[np.ndarray]] = {}
    for (_, names), values in zip(records, estimates):
        for index, name in enumerate(names):
            differences.setdefault(name, []).append(values[index] - np.delete(values, index, axis=0).mean(axis=0))
    for name, rows in sorted(differences.items()):
        if len(rows) < OFFSET_IMAGES:
            continue
        mean, error = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / np.sqrt(len(rows))
        apart = np.flatnonzero((np.abs(mean) >= OFFSET - 1e-9) & (np.abs(mean) > OFFSET_ERRORS * error))
        if apart.size:
            parts = [f"{100 * abs(mean[k]):.0f} {'more' if mean[k] > 0 else 'less'} {classes[k]}" for k in apart]
            text = f"rater {name!r} writes on average {', '.join(parts)} than the others, in percentage points"
            yield Finding("warning", "rater_offset", text, "Show the raters their differences on a few images.")


# ---- images -------------------------------------------------------------------------------------------------------------


def _mpp_findings(cohort: Cohort) -> Iterator[Finding]:
    known = [record for record in cohort.records if record.mpp is not None]
    training = sorted({record.mpp for record in known if record.split == "train"})
    others = sorted({record.mpp for record in known if record.split != "train"} - set(training))
    listed = _listing([f"{value:g}" for value in training], NAMED, ", ")
    if len(training) > 1:
        text = f"the training images have different µm/px ({listed})"
        yield Finding("error", "mpp_differs", text, "Bring them to one scale first: a network learns tissue at one scale.")
    elif training and others:
        text = f"training images have {listed} µm/px, others {_listing([f'{v:g}' for v in others], NAMED, ', ')}"
        yield Finding("warning", "mpp_differs_held_out", text, "Bring all images to one scale.")
    elif not training:
        text = "no µm/px is given (column mpp, or --mpp of 'train'): slides will be read at an assumed 0.5 µm/px"
        yield Finding("note", "mpp_unknown", text)
    if training and 0 < len([r for r in known if r.split == "train"]) < len(cohort.split("train")):
        missing = [record for record in cohort.split("train").records if record.mpp is None]
        text = f"{len(missing)} training image(s) have no µm/px, others do ({_named(missing)})"
        yield Finding("warning", "mpp_missing", text, "Fill in the column mpp.", _at(missing))
    impossible = [r for r in known if not PLAUSIBLE_MPP[0] <= r.mpp <= PLAUSIBLE_MPP[1]]
    unusual = [r for r in known if r not in impossible and not USUAL_MPP[0] <= r.mpp <= USUAL_MPP[1]]
    for level, code, records in (("error", "mpp_impossible", impossible), ("warning", "mpp_unusual", unusual)):
        if records:
            values = _listing([f"{value:g}" for value in sorted({record.mpp for record in records})], NAMED, ", ")
            text = f"{values} µm/px is {'not plausible' if level == 'error' else 'unusual'} ({_named(records)})"
            advice = "µm per pixel is meant: about 0.25 for 40x, 0.5 for 20x, 1 for 10x."
            yield Finding(level, code, text, advice, _at(records))


@dataclass(frozen=True)
class _Look:
    """What decoding an image told: the error, or size in px, contrast of its grey values, and a digest of its pixels."""

    error: str = ""
    size: tuple[int, int] = (0, 0)
    contrast: float = 0.0
    digest: str = ""


def _look(path: Path) -> _Look:
    if path.suffix.lower() in SLIDE_SUFFIXES:
        return _Look(f"{path.name} is a slide; training takes images: cut out the regions that the proportions are about")
    try:
        image = read_image(path)
    except ImageReadError as error:
        return _Look(str(error).removesuffix("."))
    step = max(1, max(image.shape[:2]) // 1024)
    contrast = float(image[::step, ::step].mean(axis=2).std())
    return _Look("", image.shape[:2], contrast, hashlib.sha256(image.tobytes() + repr(image.shape).encode()).hexdigest())


def _image_findings(cohort: Cohort, folder: Path, seen: Callable[[], None]) -> Iterator[Finding]:
    records = [record for record in cohort.records if record.image.is_file()]

    def look(record: Record) -> _Look:
        found = _look(record.image)
        seen()
        return found

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # each holds one decoded image
        looks = dict(zip((record.image for record in records), pool.map(look, records)))
    damaged = [record for record in records if looks[record.image].error]
    for record in damaged[:NAMED]:
        yield Finding("error", "unreadable_image", looks[record.image].error, "Export the image again.", (record.row,))
    if len(damaged) > NAMED:
        rest = damaged[NAMED:]
        yield Finding("error", "unreadable_image", f"{len(rest)} more images cannot be read: {_named(rest)}", "", _at(rest))
    good = [record for record in records if not looks[record.image].error]
    groups: dict[str, list[Record]] = {}
    for record in good:
        groups.setdefault(looks[record.image].digest, []).append(record)
    for twins in (group for group in groups.values() if len(group) > 1):
        leak = len({record.split for record in twins}) > 1
        text = f"{_named(twins)} hold the same pixels{', in different splits' if leak else ''}"
        yield Finding("error" if leak else "warning", "same_pixels", text, "Keep one of them.", _at(twins))
    small = [record for record in good if min(looks[record.image].size) < SMALLEST_SIDE]
    if small:
        text = f"{len(small)} image(s) have a side below {SMALLEST_SIDE} px: {_named(small)}"
        yield Finding("warning", "small_image", text, "Are these thumbnails?", _at(small))
    empty = [record for record in good if looks[record.image].contrast < LEAST_CONTRAST]
    if empty:
        text = f"{len(empty)} image(s) show next to nothing, one colour: {_named(empty)}"
        yield Finding("warning", "empty_image", text, "Leave them out, or export them again.", _at(empty))
    listed = {record.image for record in cohort.records}
    extra = [path.name for path in list_images(folder) if path.absolute() not in listed]
    if extra:
        text = f"{len(extra)} image(s) in {folder} are not in the table: {_listing(extra, NAMED, ', ')}"
        yield Finding("note", "unlisted_images", text)


# ---- the whole ----------------------------------------------------------------------------------------------------------


def check_cohort(table: str | Path, images: str | Path | None = None, seen: Callable[[], None] = lambda: None) -> CohortCheck:
    """Find at once all that may be wrong with a table and its images before training.

    Columns, cells, sums and repeated rows as :func:`~monai_vslp.data.read_cohort` refuses them; missing, damaged, empty and
    repeated images; patients in several splits; too few images; classes that never occur, or whose shares do not vary against
    each other, so that percentages cannot tell them apart; µm/px that differ or are not plausible; raters who disagree or
    overrate; the step to which estimates are rounded. A misspelt column is reported and read as what it is meant to be, so
    that the rows are checked too.

    Args:
        table: ``image,split,patient,<one column per class>``, CSV or XLSX.
        images: folder that image names are relative to; the table's own folder by default.
        seen: called after each image.

    Raises:
        InputError: there is no such table or folder, or nothing in it can be read as one.
    """
    table = Path(table)
    folder = Path(images) if images is not None else table.parent
    found = examine_table(table, folder)
    findings = list(_table_findings(found)) if found.header_problems else []
    if found.header_problems and (aliases := _misspelt(table)):
        found = examine_table(table, folder, aliases=aliases)
        if found.header_problems:
            findings = list(_table_findings(found)) + [
                Finding("error", "columns", f"column {name!r} is taken for a class", f"Did you mean {meant!r}?")
                for name, meant in aliases.items()
            ]
    if found.header_problems:
        return CohortCheck(str(table), str(folder), findings=tuple(findings))
    cohort = found.cohort
    step = rounding_step(cohort)
    findings += [
        *_table_findings(found),
        *_split_findings(cohort),
        *_sum_findings(cohort),
        *_class_findings(cohort),
        *_identity_findings(cohort),
        *_step_findings(step),
        *_rater_findings(found),
        *_mpp_findings(cohort),
        *_image_findings(cohort, folder, seen),
    ]
    splits = Counter(record.split for record in cohort.records)
    patients = {record.patient for record in cohort.records} - {""}
    training = _known(cohort.split("train").records)
    classes = {}
    if training:
        p = np.stack([record.proportions.mean for record in training])
        for k, name in enumerate(cohort.classes):
            classes[name] = {
                "occurs_in": int((p[:, k] > SAME).sum()),
                "mean": float(p[:, k].mean()),
                "lowest": float(p[:, k].min()),
                "highest": float(p[:, k].max()),
            }
    return CohortCheck(
        str(table),
        str(folder),
        {"images": len(cohort), "patients": len(patients), **splits},
        classes,
        step,
        tuple(sorted({record.mpp for record in cohort.split("train").records if record.mpp is not None})),
        tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level))),
    )
