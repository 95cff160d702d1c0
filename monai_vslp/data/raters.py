"""Simulated raters: tables of proportions as people would have estimated them."""

from __future__ import annotations

import numpy as np
from monai.utils import look_up_option

from monai_vslp.utils.errors import InputError, ProportionError

__all__ = ["NOISE_LEVELS", "RATER_LEVELS", "apply_rater", "draw_noise", "rater_offsets", "round_to", "simulate_raters"]

# Standard deviations (σ_b between raters, σ_e within one) of the logit of a binary estimate. Low resembles trained raters
# (BreastPathQ), high routine practice (Smits 2014: off by 20 points on average, a third of the estimates by 25 and more).
NOISE_LEVELS = {"low": (0.3, 0.45), "medium": (0.5, 0.7), "high": (0.85, 1.1)}
RATER_LEVELS = (*NOISE_LEVELS, "uniform")
UNIFORM_RANGE = 0.1  # half width of the level "uniform", in fractions
UNIFORM_FLOOR = 1e-3  # what a class that occurs keeps at least under "uniform"
COARSE_SHARE = 0.7  # share of estimates rounded to COARSE_STEP, the rest to FINE_STEP
COARSE_STEP, FINE_STEP = 0.1, 0.05


def round_to(p: np.ndarray, step: float) -> np.ndarray:
    """Round to multiples of ``step`` that sum to 1, by largest remainders; zeros stay zero.

    Args:
        p: shape ``[C]``, fractions that sum to 1.
        step: 1 / step is a whole number.
    """
    parts = round(1 / step)
    units = np.asarray(p, dtype=np.float64) * parts
    floor = np.floor(units + 1e-9)
    rest = parts - int(floor.sum())
    order = np.argsort(np.where(units > 0, floor - units, np.inf), kind="stable")
    floor[order[:rest]] += 1
    return floor / parts


def rater_offsets(level: str, classes: int, rng: np.random.Generator | np.random.RandomState) -> np.ndarray:
    """Draw the habits of one rater: log-ratio offsets b, shape ``[C]``, float64; zero for ``uniform``."""
    if level == "uniform":
        return np.zeros(classes)
    return rng.normal(0.0, _per_class(NOISE_LEVELS[level][0]), classes)


def draw_noise(level: str, classes: int, rng: np.random.Generator | np.random.RandomState) -> tuple[np.ndarray, float]:
    """Draw the error of one estimate: log-ratio noise e ``[C]`` (fractions for ``uniform``) and rounding step (0: none)."""
    if level == "uniform":
        return rng.uniform(-UNIFORM_RANGE, UNIFORM_RANGE, classes), 0.0
    noise = rng.normal(0.0, _per_class(NOISE_LEVELS[level][1]), classes)
    return noise, COARSE_STEP if rng.uniform() < COARSE_SHARE else FINE_STEP


def apply_rater(p: np.ndarray, level: str, offset: np.ndarray, noise: np.ndarray, step: float) -> np.ndarray:
    """One estimate of ``p`` from draws of :func:`rater_offsets` and :func:`draw_noise`; all arrays ``[C]``, float64."""
    if level == "uniform":
        noisy = np.where(p > 0, np.clip(p + noise, UNIFORM_FLOOR, 1.0), 0.0)
    else:
        noisy = p * np.exp(offset + noise)
    noisy = noisy / noisy.sum()
    return round_to(noisy, step) if step else noisy


def _per_class(sigma: float) -> float:
    """Per-class deviation for which the log ratio of two classes, a binary logit, deviates by ``sigma``."""
    return sigma / np.sqrt(2.0)


def simulate_raters(proportions: np.ndarray, level: str = "medium", raters: int = 3, seed: int = 0) -> np.ndarray:
    r"""Estimates of several raters for several images.

    .. math:: \log \tilde p_{rik} = \log p_{ik} + b_{rk} + e_{rik} + \mathrm{const}, \qquad
        b \sim N(0, \sigma_b^2 / 2),\; e \sim N(0, \sigma_e^2 / 2),

    normalised, then rounded to 10 % (70 % of the estimates) or 5 % so that each row still sums to 1. The offset :math:`b`
    belongs to a rater r and a class k, :math:`e` to one estimate of image i; the halves make :math:`\sigma` the deviation of
    the log ratio of two classes. The level ``uniform`` adds independent noise within ±0.1 instead and does not round.

    Args:
        proportions: true proportions, shape ``[n, C]``, fractions that sum to 1.
        level: ``low``, ``medium``, ``high`` or ``uniform``.
        raters: number of raters.
        seed: seed of all draws.

    Returns:
        Shape ``[raters, n, C]``, float64, on the simplex. Classes that do not occur are never seen.

    Raises:
        ProportionError: rows are not on the simplex.
        InputError: fewer than one rater.
        ValueError: an unknown level.
    """
    look_up_option(level, RATER_LEVELS)
    p = np.asarray(proportions, dtype=np.float64)
    if raters < 1:
        raise InputError(f"raters must be at least 1, got {raters}.")
    if p.ndim != 2 or not np.isfinite(p).all() or (p < 0).any() or np.abs(p.sum(axis=1) - 1).max(initial=0.0) > 1e-2:
        raise ProportionError(
            f"simulated raters need proportions of shape [images, classes], fractions whose rows sum to 1; got shape {p.shape}."
        )
    rng = np.random.default_rng(seed)
    estimates = np.empty((raters, *p.shape))
    for r in range(raters):
        offset = rater_offsets(level, p.shape[1], rng)
        for i, row in enumerate(p):
            estimates[r, i] = apply_rater(row, level, offset, *draw_noise(level, p.shape[1], rng))
    return estimates
