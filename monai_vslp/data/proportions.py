"""Proportions as people write them: percentages, ranges, bounds, blanks, several raters."""

from __future__ import annotations

import datetime
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from monai_vslp.utils.errors import ProportionError

__all__ = ["Entry", "ProportionLabel", "check_classes", "combine_raters", "parse_entry", "parse_row"]

BLANKS = {"", "-", "–", "—", "n/a", "na", "n.a.", "none", "null", "?", "."}
TRACES = {"trace", "traces", "tr", "few", "isolated"}
TRACE = 0.01  # what "trace" counts as, a fraction
TOLERANCE = 10.0  # percentage points by which a row may miss 100 and still be scaled
SLACK = 1e-3  # of the whole: what rounding may add to an entry that means all of the tissue

_NUMBER = r"((?:\d+(?:[.,]\d*)?|[.,]\d+)(?:e[+-]?\d+)?)"
_RANGE = re.compile(rf"^{_NUMBER}\s*%?\s*(?:-|–|—|to|bis|\.\.)\s*{_NUMBER}$")
_BOUND = re.compile(rf"^(<=|>=|≤|≥|<|>|up to|at most|at least|less than|more than)\s*{_NUMBER}$")
_ABOUT = re.compile(r"^(?:~|≈|about|approx\.?|approximately|ca\.?|circa|roughly)\s*(?=[\d.,<>≤≥])")
_PLAIN = re.compile(rf"^{_NUMBER}$")
_UPPER = {"<", "<=", "≤", "up to", "at most", "less than"}
_MONTH = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
_DATE = re.compile(rf"^(\d+[-. ]?({_MONTH})|({_MONTH})[-. ]?\d+|\d+[-/.]\d+[-/.]\d+)")


@dataclass(frozen=True)
class Entry:
    """One cell, in fractions.

    Attributes:
        value: best value, None for a blank.
        lower, upper: bounds; equal to ``value`` where no interval was written.
        percent: the cell can only be meant in percent: it says ``%`` or names a number above 1.
    """

    value: float | None
    lower: float | None = None
    upper: float | None = None
    percent: bool = False

    @property
    def bounded(self) -> bool:
        """Whether the entry names an interval rather than a value."""
        return self.value is not None and self.lower != self.upper


@dataclass(frozen=True, eq=False)
class ProportionLabel:
    """Proportions of one image with what is known of their uncertainty.

    Attributes:
        classes: names, in the order of all arrays.
        mean: best estimate on the simplex, shape ``[C]``, float64, fractions.
        lower, upper: bounds of what was written, shape ``[C]``, float64, fractions; equal to ``mean`` for plain values.
        spread: standard deviation between raters, shape ``[C]``, float64, fractions; 0 for a single rater.
        missing: which classes were left blank, shape ``[C]``, bool.
        raters: how many raters the label rests on.
        raw_sum: what the entries summed to before they were brought to 1, a fraction (mean over raters).
    """

    classes: tuple[str, ...]
    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    spread: np.ndarray
    missing: np.ndarray
    raters: int = 1
    raw_sum: float = 1.0

    @classmethod
    def exact(cls, classes: Sequence[str], values: Sequence[float] | np.ndarray) -> ProportionLabel:
        """Label from amounts with any positive sum (fractions, percent, pixel counts), scaled to 1.

        Raises:
            ProportionError: negative, NaN, infinite or all-zero values, or not one per class.
        """
        p = np.asarray(values, dtype=np.float64).reshape(-1)
        if len(p) != len(classes):
            raise ProportionError(f"expected {len(classes)} proportions ({', '.join(classes)}), got {len(p)}.")
        if not np.isfinite(p).all() or (p < 0).any() or p.sum() <= 0:
            raise ProportionError(f"proportions must be finite, not negative and not all zero, got {p.tolist()}.")
        p = p / p.sum()
        return cls(tuple(classes), p, p.copy(), p.copy(), np.zeros_like(p), np.zeros(len(p), dtype=bool))

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form; :meth:`from_dict` reads it back."""
        return {
            "classes": list(self.classes),
            "mean": self.mean.tolist(),
            "lower": self.lower.tolist(),
            "upper": self.upper.tolist(),
            "spread": self.spread.tolist(),
            "missing": self.missing.tolist(),
            "raters": self.raters,
            "raw_sum": self.raw_sum,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ProportionLabel:
        """Inverse of :meth:`to_dict`; of a hand-written form only ``classes`` and ``mean`` are needed.

        Raises:
            ProportionError: a key is missing, or the arrays do not fit the classes.
        """
        for key in ("classes", "mean"):
            if key not in value:
                raise ProportionError(f"a stored proportion label needs {key!r}; it has {', '.join(map(str, value))}.")
        label = cls.exact(value["classes"], value["mean"])
        arrays = {
            key: np.asarray(value.get(key, getattr(label, key)), dtype=getattr(label, key).dtype)
            for key in ("lower", "upper", "spread", "missing")
        }
        for key, array in arrays.items():
            if array.shape != label.mean.shape:
                raise ProportionError(f"{key!r} of a proportion label has shape {array.shape}, not {label.mean.shape}.")
        return cls(label.classes, label.mean, **arrays, raters=int(value.get("raters", 1)), raw_sum=value.get("raw_sum", 1.0))


def _number(text: str) -> float:
    return float(text.replace(",", "."))


def parse_entry(text: Any, where: str = "entry", percent: bool | None = None) -> Entry:
    """Read one cell.

    Understood are numbers (``60``, ``0.6``, ``12,5``), a ``%`` sign, ranges (``10-20``, ``10 – 20 %``, ``10 to 20``), bounds
    (``<5``, ``≥ 90``), approximations (``~30%``, ``ca. 30``), ``trace`` and blanks (empty, ``-``, ``n/a``). A range counts as
    its middle, ``<5`` as half of it, ``>90`` as halfway to the whole, ``trace`` as 1 % (0 to 2 %).

    Args:
        text: what was written; numbers are fine too.
        where: how an error names the place, for instance ``row 3, column 'tumour'``.
        percent: whether numbers without ``%`` are percentages; None judges by the cell alone (a number above 1 is).

    Returns:
        The entry in fractions.

    Raises:
        ProportionError: the text is not understood, negative, NaN, infinite or more than the whole.
    """
    raw = text
    if text is None:
        return Entry(None)
    if isinstance(text, (float, np.floating)):
        if math.isnan(text):
            raise ProportionError(f"{where}: NaN is not a proportion; leave the cell empty where the value is not known.")
        text = repr(float(text))
    text = " ".join(str(text).strip().lower().split())
    if text in BLANKS:
        return Entry(None)
    if text in TRACES:
        return Entry(TRACE, 0.0, 2 * TRACE)
    body = _ABOUT.sub("", text)
    signed = body.endswith(("%", "percent"))
    body = re.sub(r"\s*(%|percent)$", "", body).strip()
    high: float | None
    if match := _PLAIN.match(body):
        low = high = _number(match[1])
        telling = high > 1 + SLACK
    elif match := _RANGE.match(body):
        low, high = _number(match[1]), _number(match[2])
        telling = high > 1 + SLACK or (low, high) == (0.0, 1.0)  # "0-1" would say nothing as a fraction
        if low > high:
            raise ProportionError(f"{where}: the range {raw!r} runs from high to low; write the smaller value first.")
    elif match := _BOUND.match(body):
        bound = _number(match[2])
        low, high = (0.0, bound) if match[1] in _UPPER else (bound, None)
        telling = bound >= 1  # "<1" would say nothing as a fraction
    else:
        raise ProportionError(f"{where}: {raw!r} {_complaint(raw, body)}")
    unit = 100.0 if signed or (telling if percent is None else percent) else 1.0
    low, high = low / unit, 1.0 if high is None else high / unit
    if percent is not False and max(low, high) > 1 + SLACK:
        raise ProportionError(f"{where}: {raw!r} is more than 100 %. Proportions are parts of the tissue area.")
    return Entry((low + high) / 2, low, high, signed or telling)


def _complaint(raw: Any, body: str) -> str:
    """Why a cell is not understood, and what to write instead."""
    if isinstance(raw, datetime.date) or _DATE.match(body):
        return "looks like a date: spreadsheets turn 10-12 into one. Format the column as text, or write '10 to 12'."
    reason = "is negative" if re.match(r"^[-–]\s*[\d.,]", body) else "is not a proportion"
    return f"{reason}. Allowed are numbers from 0 to 100 (or 0 to 1), '10-20', '<5', '>90', '~30%', 'trace' or an empty cell."


def check_classes(names: Sequence[str], classes: Sequence[str], where: str = "proportions") -> None:
    """Refuse names that are not among ``classes``.

    Raises:
        ProportionError: names the unknown class and the nearest known one.
    """
    for name in names:
        if name not in classes:
            near = difflib.get_close_matches(str(name), classes, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ProportionError(f"{where}: unknown class {name!r}; classes are {', '.join(classes)}.{hint}")


def _row_unit(cells: Mapping[str, Any], entries: Mapping[str, Entry], prefix: str) -> bool:
    """Whether a row is in percent; refuses rows that may be either."""
    if any(entry.percent for entry in entries.values()):
        return True
    blanks = any(entry.value is None for entry in entries.values())
    for name, entry in entries.items():
        # 1 and blanks: all of the tissue as a fraction, next to nothing in percent.
        if blanks and entry.value == 1.0 and str(cells[name]).strip() == "1":
            raise ProportionError(
                f"{prefix}column {name!r}: '1' beside blank classes may be 1 % or all of the tissue; write '1%' or '100%'."
            )
    return False


def parse_row(
    cells: Mapping[str, Any],
    classes: Sequence[str],
    row: int | str | None = None,
    tolerance: float = TOLERANCE,
) -> ProportionLabel | None:
    """Read the proportions of one image.

    A row is in percent or in fractions as a whole: a ``%`` sign or a number above 1 means percent, otherwise it is in
    fractions; a row that then misses the whole (a sum of 7, say) is refused. Blank classes share equally what the others
    leave, nothing if they leave nothing. A row that misses 100 by no more than ``tolerance`` is brought there: entries
    with bounds move within them first, then all entries are scaled; ``raw_sum`` of the result keeps the sum as written.

    Args:
        cells: what was written per class; classes that are absent count as blank.
        classes: all classes, in the order of the result.
        row: how errors name the row, for instance its line number.
        tolerance: percentage points by which the sum may miss 100.

    Returns:
        The label, or None for a row that is blank throughout (proportions not known).

    Raises:
        ProportionError: an unknown class, an entry that is not understood, a value above 100, a row of zeros, or a sum
            too far from 100; names row, column and value.
    """
    prefix = "" if row is None else f"row {row}, "
    check_classes(list(cells), classes, f"{prefix}columns")

    def read(percent: bool | None) -> dict[str, Entry]:
        return {name: parse_entry(cells.get(name), f"{prefix}column {name!r}", percent) for name in classes}

    entries = read(False)
    if all(entry.value is None for entry in entries.values()):
        return None
    percent = _row_unit(cells, entries, prefix)
    if percent:
        entries = read(True)

    blank = np.array([e.value is None for e in entries.values()])
    value, lower, upper = (
        np.array([getattr(e, part) or 0.0 for e in entries.values()]) for part in ("value", "lower", "upper")
    )
    raw_sum = float(value.sum())
    written = ", ".join(f"{name} = {cells.get(name)!r}" for name in classes)
    if raw_sum <= 0 and not blank.any():
        raise ProportionError(f"{prefix}all proportions are zero ({written}); at least one class must occur.")
    if blank.any():
        upper[blank] = max(0.0, 1.0 - lower.sum())
        if blank.sum() == 1:
            lower[blank] = max(0.0, 1.0 - upper[~blank].sum())
        value[blank] = max(0.0, 1.0 - raw_sum) / blank.sum()
    total = float(value.sum())
    # Entries with bounds take up what is missing before plain values are touched.
    room = (upper - value) if total < 1.0 else (lower - value)
    available = float(room.sum())
    if available:
        value = value + room * min(1.0, (1.0 - total) / available)
        total = float(value.sum())
    if abs(total - 1.0) > tolerance / 100.0 + 1e-9:
        raise ProportionError(
            f"{prefix}proportions sum to {raw_sum * (100 if percent else 1):.4g} ({written}); expected about 100 (percent) or "
            f"1 (fractions), at most {tolerance:g} percentage points off. {_sum_advice(entries, total)}"
        )
    mean = value / total
    return ProportionLabel(
        classes=tuple(classes),
        mean=mean,
        lower=np.clip(np.minimum(lower / total, mean), 0.0, 1.0),
        upper=np.clip(np.maximum(upper / total, mean), 0.0, 1.0),
        spread=np.zeros(len(classes)),
        missing=blank,
        raw_sum=raw_sum,
    )


def _sum_advice(entries: Mapping[str, Entry], total: float) -> str:
    """What may be wrong with a row whose sum is off."""
    telling = {name for name, entry in entries.items() if entry.percent}
    small = [name for name, entry in entries.items() if name not in telling and entry.value]
    if telling and small and total < 1.0:
        return f"Write all of the row in one unit: {', '.join(map(repr, small))} may be meant as fractions."
    if total < 1.0:
        return "Add what is left out; a class with an empty cell takes the rest."
    return "Look for a slip, or for classes that overlap."


def combine_raters(labels: Sequence[ProportionLabel]) -> ProportionLabel:
    """Mean of several raters of one image, with their standard deviation (n − 1) and the hull of their bounds.

    Raises:
        ProportionError: no labels, or labels of different classes.
    """
    if not labels:
        raise ProportionError("no rater's proportions to combine.")
    if len({label.classes for label in labels}) > 1:
        raise ProportionError(f"raters used different classes: {sorted({label.classes for label in labels})}.")
    if len(labels) == 1:
        return labels[0]
    means = np.stack([label.mean for label in labels])
    mean = means.mean(axis=0)
    return ProportionLabel(
        classes=labels[0].classes,
        mean=mean,
        lower=np.minimum(np.min([label.lower for label in labels], axis=0), mean),
        upper=np.maximum(np.max([label.upper for label in labels], axis=0), mean),
        spread=means.std(axis=0, ddof=1),
        missing=np.all([label.missing for label in labels], axis=0),
        raters=sum(label.raters for label in labels),
        raw_sum=float(np.mean([label.raw_sum for label in labels])),
    )
