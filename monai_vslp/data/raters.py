"""Simulated raters: tables of proportions as people would have estimated them."""

from __future__ import annotations

import numpy as np
from monai.utils import look_up_option

__all__ = ["NOISE_LEVELS", "simulate_raters"]

# Standard deviations (σ_b between raters, σ_e within) of the log ratio. Low resembles trained raters, high routine practice.
NOISE_LEVELS = {"low": (0.3, 0.45), "medium": (0.5, 0.7), "high": (0.85, 1.1)}
UNIFORM_RANGE = 0.1  # half width of the level "uniform", in fractions
COARSE_SHARE = 0.7  # share of estimates rounded to 10 %, the rest to 5 %


def _round_to(p: np.ndarray, step: float) -> np.ndarray:
    """Round ``[C]`` to multiples of ``step`` that sum to 1, by largest remainders; zeros stay zero."""
    units = p / step
    floor = np.floor(units + 1e-9)
    missing = round(1 / step) - int(floor.sum())
    if missing:
        order = np.argsort(np.where(p > 0, floor - units, np.inf), kind="stable")
        floor[order[:missing]] += 1
    return floor * step


def simulate_raters(proportions: np.ndarray, level: str = "medium", raters: int = 3, seed: int = 0) -> np.ndarray:
    r"""Estimates of several raters for several images.

    .. math:: \log \tilde p_k = \log p_k + b_{r,k} + e_{ik}, \qquad b \sim N(0, \sigma_b^2),\; e \sim N(0, \sigma_e^2),

    normalised, then rounded to 10 % (70 % of the estimates) or 5 %. The offset :math:`b` belongs to a rater and a class,
    :math:`e` to one estimate. The level ``uniform`` adds independent noise within ±0.1 instead and does not round.

    Args:
        proportions: true proportions, shape ``[n, C]``, fractions that sum to 1.
        level: ``low``, ``medium``, ``high`` or ``uniform``.
        raters: number of raters.
        seed: seed of all draws.

    Returns:
        Shape ``[raters, n, C]``, float64, on the simplex. Classes that do not occur are never seen.
    """
    look_up_option(level, (*NOISE_LEVELS, "uniform"))
    p = np.asarray(proportions, dtype=np.float64)
    rng = np.random.default_rng(seed)
    shape = (raters, *p.shape)
    if level == "uniform":
        noisy = np.where(p > 0, np.clip(p + rng.uniform(-UNIFORM_RANGE, UNIFORM_RANGE, shape), 1e-3, 1.0), 0.0)
        return noisy / noisy.sum(axis=-1, keepdims=True)
    between, within = NOISE_LEVELS[level]
    offset = rng.normal(0.0, between, (raters, 1, p.shape[1]))
    noisy = p * np.exp(offset + rng.normal(0.0, within, shape))
    noisy /= noisy.sum(axis=-1, keepdims=True)
    steps = np.where(rng.random(shape[:2]) < COARSE_SHARE, 0.1, 0.05)
    return np.stack([[_round_to(row, step) for row, step in zip(rows, line)] for rows, line in zip(noisy, steps)])
