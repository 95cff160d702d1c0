"""Proportions as people write them: percentages, ranges, bounds, blanks, several raters."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from monai_vslp.utils.errors import ProportionError

__all__ = ["Entry", "ProportionLabel", "combine_raters", "parse_entry", "parse_row"]

BLANKS = {"", "-", "–", "—", "n/a", "na", "nan", "none", "null", "?", "."}
TRACES = {"trace", "traces", "tr", "few", "isolated"}
TRACE_PERCENT = 1.0  # what "trace" counts as
TOLERANCE = 10.0  # percentage points by which a row may miss 100 and still be scaled

_NUMBER = r"(\d+(?:[.,]\d+)?|[.,]\d+)"
_RANGE = re.compile(rf"^{_NUMBER}\s*%?\s*(?:-|–|—|to|bis|\.\.)\s*{_NUMBER}$")
_BOUND = re.compile(rf"^(<=|>=|≤|≥|<|>|up to|at most|at least|less than|more than)\s*{_NUMBER}$")
_ABOUT = re.compile(r"^(?:~|≈|about|approx\.?|approximately|ca\.?|circa|roughly)\s*")
_PLAIN = re.compile(rf"^{_NUMBER}$")
_UPPER = {"<", "<=", "≤", "up to", "at most", "less than"}


@dataclass(frozen=True)
class Entry:
    """One cell: best value with bounds, in the unit it was written in; ``percent`` if it said ``%``; None: a blank."""

    value: float | None
    lower: float | None = None
    upper: float | None = None
    percent: bool = False

    @property
    def bounded(self) -> bool:
        """Whether the entry names an interval rather than a value."""
        return self.value is not None and self.lower != self.upper


@dataclass(frozen=True)
class ProportionLabel:
    """Proportions of one image with what is known of their uncertainty.

    Attributes:
        classes: names, in the order of all arrays.
        mean: best estimate on the simplex, shape ``[C]``, float64, fractions.
        lower, upper: bounds of what was written, shape ``[C]``, fractions; equal to ``mean`` for plain values.
        spread: standard deviation between raters, shape ``[C]``, fractions; 0 for a single rater.
        missing: which classes were left blank, shape ``[C]``, bool.
        raters: how many raters the label rests on.
    """

    classes: tuple[str, ...]
    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    spread: np.ndarray
    missing: np.ndarray
    raters: int = 1

    @classmethod
    def exact(cls, classes: Sequence[str], values: Sequence[float] | np.ndarray) -> ProportionLabel:
        """Label from fractions (any positive sum, scaled to 1).

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
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ProportionLabel:
        """Inverse of :meth:`to_dict`."""
        arrays = {key: np.asarray(value[key], dtype=np.float64) for key in ("mean", "lower", "upper", "spread")}
        missing = np.asarray(value["missing"], dtype=bool)
        return cls(tuple(value["classes"]), **arrays, missing=missing, raters=int(value["raters"]))


def _number(text: str) -> float:
    return float(text.replace(",", "."))


def parse_entry(text: Any, where: str = "entry") -> Entry:
    """Read one cell.

    Understood are numbers (``60``, ``0.6``, ``12,5``), a ``%`` sign, ranges (``10-20``, ``10 – 20 %``, ``10 to 20``), bounds
    (``<5``, ``≥ 90``), approximations (``~30%``, ``ca. 30``), ``trace`` and blanks (empty, ``-``, ``n/a``). A range counts as
    its middle, ``<5`` as half of it, ``>90`` as halfway to the whole.

    Args:
        text: what was written; numbers are fine too.
        where: how an error names the place, for instance ``row 3, column 'tumour'``.

    Raises:
        ProportionError: the text is not understood, negative, NaN or infinite.
    """
    raw = text
    if text is None:
        return Entry(None)
    if isinstance(text, (int, float, np.number)) and not isinstance(text, bool):
        if math.isnan(float(text)):
            raise ProportionError(f"{where}: NaN is not a proportion; leave the cell empty where the value is not known.")
        text = repr(float(text)) if not math.isinf(float(text)) else str(text)
    text = " ".join(str(text).strip().lower().split())
    if text in BLANKS:
        return Entry(None)
    if text in TRACES:
        return Entry(TRACE_PERCENT, 0.0, 2 * TRACE_PERCENT, percent=True)
    body = _ABOUT.sub("", text)
    percent = body.endswith("%")
    body = re.sub(r"\s*(%|percent)$", "", body).strip()
    if match := _PLAIN.match(body):
        value = _number(match[1])
        return Entry(value, value, value, percent)
    if match := _RANGE.match(body):
        low, high = _number(match[1]), _number(match[2])
        if low > high:
            raise ProportionError(f"{where}: the range {raw!r} runs from high to low; write the smaller value first.")
        return Entry((low + high) / 2, low, high, percent)
    if match := _BOUND.match(body):
        value = _number(match[2])
        if match[1] in _UPPER:
            return Entry(value / 2, 0.0, value, percent)
        whole = 1.0 if value <= 1 and not percent else 100.0
        return Entry((value + whole) / 2, value, whole, percent)
    reason = "is negative" if re.match(r"^-\s*[\d.,]", body) else "is not a proportion"
    raise ProportionError(
        f"{where}: {raw!r} {reason}. Allowed are numbers from 0 to 100 (or 0 to 1), '10-20', '<5', '>90', '~30%', 'trace' "
        "or an empty cell."
    )


def check_classes(names: Sequence[str], classes: Sequence[str], where: str = "proportions") -> None:
    """Refuse names that are not among ``classes``.

    Raises:
        ProportionError: names the unknown class and the nearest known one.
    """
    for name in names:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ProportionError(f"{where}: unknown class {name!r}; classes are {', '.join(classes)}.{hint}")


def parse_row(
    cells: Mapping[str, Any],
    classes: Sequence[str],
    row: int | str | None = None,
    tolerance: float = TOLERANCE,
) -> ProportionLabel | None:
    """Read the proportions of one image.

    A row is in percent or in fractions as a whole: a ``%`` sign or a value above 1 means percent, otherwise it is in
    fractions. Blank classes share what the others leave of 100 equally, nothing if they leave
    nothing. A row that misses 100 by no more than ``tolerance`` is brought there: entries with bounds move within them
    first, then all are scaled.

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
    check_classes(list(cells), classes, f"{prefix}columns".strip())
    entries = [parse_entry(cells.get(name), f"{prefix}column {name!r}") for name in classes]
    known = [entry for entry in entries if entry.value is not None]
    if not known:
        return None
    written = ", ".join(f"{name} = {cells.get(name)!r}" for name in classes)
    where = f"{prefix}" or "proportions, "
    largest = max(entry.upper for entry in known)
    percent = any(entry.percent for entry in known) or largest > 1.0
    scale = 1.0 if percent else 100.0

    value = np.array([0.0 if e.value is None else e.value * scale for e in entries])
    lower = np.array([0.0 if e.value is None else e.lower * scale for e in entries])
    upper = np.array([0.0 if e.value is None else e.upper * scale for e in entries])
    blank = np.array([e.value is None for e in entries])
    for name, high in zip(classes, upper):
        if high > 100.0 + 1e-9:
            raise ProportionError(
                f"{prefix}column {name!r}: {cells.get(name)!r} is more than 100 %. Proportions are parts of the tissue area."
            )
    total = float(value.sum())
    if total <= 0 and not blank.any():
        raise ProportionError(f"{where}all proportions are zero ({written}); at least one class must occur.")
    if blank.any():
        rest = max(0.0, 100.0 - total)
        value[blank] = rest / blank.sum()
        upper[blank] = rest
        total = float(value.sum())
    # Entries with bounds take up what is missing before plain values are touched.
    room = (upper - value) if total < 100.0 else (lower - value)
    available = float(room.sum())
    if abs(available) > 0:
        value = value + room * min(1.0, (100.0 - total) / available)
        total = float(value.sum())
    if abs(total - 100.0) > tolerance:
        fix = "Were fractions and percentages mixed, or a class left out?" if total < 50 else "Check the row for a slip."
        raise ProportionError(
            f"{where}proportions sum to {total:g} % instead of 100 % ({written}); at most {tolerance:g} points off are "
            f"scaled. {fix}"
        )
    factor = 100.0 / total
    mean = value * factor / 100.0
    return ProportionLabel(
        classes=tuple(classes),
        mean=mean / mean.sum(),
        lower=np.clip(np.minimum(lower * factor / 100.0, mean), 0.0, 1.0),
        upper=np.clip(np.maximum(upper * factor / 100.0, mean), 0.0, 1.0),
        spread=np.zeros(len(classes)),
        missing=blank,
    )


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
    return ProportionLabel(
        classes=labels[0].classes,
        mean=means.mean(axis=0),
        lower=np.min([label.lower for label in labels], axis=0),
        upper=np.max([label.upper for label in labels], axis=0),
        spread=means.std(axis=0, ddof=1),
        missing=np.all([label.missing for label in labels], axis=0),
        raters=sum(label.raters for label in labels),
    )
