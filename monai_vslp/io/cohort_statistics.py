"""What the proportions of a whole cohort say: which inputs stand out, and how raters differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Agreement", "RaterOffset", "agreement", "mean_difference", "outlier_bound", "rater_offsets_of", "rater_spread"]

FEWEST = 8  # inputs below which nothing is called an outlier
DEVIATIONS = 3.5  # robust standard deviations above the median
MAD_TO_SIGMA = 1.4826  # of a normal distribution
LEAST_SIGMA = 0.01  # one percentage point: where nearly all agree exactly, rounding does not make an outlier


def mean_difference(summary: Mapping[str, Any]) -> float | None:
    """Mean absolute difference over the classes between given proportions and those of the network alone.

    Args:
        summary: content of ``summary.json``.

    Returns:
        A fraction in [0, 1], or None where nothing was given.
    """
    given, found = summary["proportions"].get("given"), summary["proportions"]["confidence"]
    if given is None:
        return None
    return sum(abs((given[name] or 0.0) - (found[name] or 0.0)) for name in given) / len(given)


def outlier_bound(differences: Sequence[float]) -> float | None:
    """Median + 3.5 robust standard deviations (1.4826 times the median absolute deviation, at least one percentage point).

    Args:
        differences: one per input, fractions.

    Returns:
        What lies above is an outlier; None for fewer than eight inputs.
    """
    if len(differences) < FEWEST:
        return None
    values = np.asarray(differences, dtype=np.float64)
    middle = float(np.median(values))
    return middle + DEVIATIONS * max(MAD_TO_SIGMA * float(np.median(np.abs(values - middle))), LEAST_SIGMA)


@dataclass(frozen=True)
class Agreement:
    """How given and predicted proportions of one class go together.

    Attributes:
        count: inputs.
        bias: mean of predicted − given, a fraction.
        error: mean absolute difference, a fraction.
        correlation: Pearson's; None for fewer than three inputs or where one of the two does not vary.
    """

    count: int
    bias: float
    error: float
    correlation: float | None


def agreement(given: Sequence[float], predicted: Sequence[float]) -> Agreement:
    """Compare given and predicted proportions of one class, fractions ``[n]`` each, n ≥ 1."""
    x, y = np.asarray(given, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    varied = len(x) >= 3 and x.std() > 1e-9 and y.std() > 1e-9
    correlation = float(np.corrcoef(x, y)[0, 1]) if varied else None
    return Agreement(len(x), float((y - x).mean()), float(np.abs(y - x).mean()), correlation)


def rater_spread(summaries: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, float]]:
    """Standard deviation between raters, pooled over inputs.

    Args:
        summaries: contents of ``summary.json``; those whose ``given_spread`` is not above 0 for any class had one rater.

    Returns:
        By class the number of inputs with several raters and the root of their mean variance, a fraction.
    """
    variances: dict[str, list[float]] = {}
    for summary in summaries:
        spread = summary["proportions"].get("given_spread") or {}
        if any(spread.values()):
            for name, value in spread.items():
                variances.setdefault(name, []).append((value or 0.0) ** 2)
    return {name: (len(values), math.sqrt(sum(values) / len(values))) for name, values in variances.items()}


@dataclass(frozen=True)
class RaterOffset:
    """How one rater estimates one class, against the others.

    Attributes:
        count: inputs that others rated, too.
        mean: mean of this rater's estimate − mean of the others' for the same input, a fraction.
        error: standard error of ``mean``; None for one input.
    """

    count: int
    mean: float
    error: float | None


def rater_offsets_of(estimates: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, RaterOffset]]:
    """Habits of raters: the mean difference of each from the others.

    Args:
        estimates: input → rater → class → fraction.

    Returns:
        Rater → class → offset, raters by name; raters who share no input with another are left out.
    """
    differences: dict[str, dict[str, list[float]]] = {}
    for by_rater in estimates.values():
        for rater, mine in by_rater.items():
            others = [theirs for name, theirs in by_rater.items() if name != rater]
            for name, value in mine.items():
                theirs = [other[name] for other in others if name in other]
                if theirs:
                    differences.setdefault(rater, {}).setdefault(name, []).append(value - sum(theirs) / len(theirs))
    return {
        rater: {
            name: RaterOffset(
                len(values),
                float(np.mean(values)),
                float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None,
            )
            for name, values in by_class.items()
        }
        for rater, by_class in sorted(differences.items())
    }
