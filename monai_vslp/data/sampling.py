r"""Drawing patches from an image: what their proportions may be, and which cells they are.

An image of N cells of tissue with proportions p, of which n are drawn without replacement, shows proportions :math:`p_S` of the
multivariate hypergeometric law,

.. math::
    n p_S \sim \mathrm{MVHG}(N p, n), \qquad \mathrm{E}\,p_S = p, \qquad
    \mathrm{Cov}\,p_S = \frac{N - n}{n (N - 1)} \bigl(\mathrm{diag}(p) - p p^\top\bigr).

There is no loss of its own for such samples, because targets drawn from the law suffice for
:class:`~monai_vslp.losses.proportion.ProportionLoss`. KL is affine in its target apart from the target's own entropy, so

.. math::
    \mathrm{E}\,\mathrm{KL}(p_S\|\hat p) = \mathrm{KL}(p\|\hat p) + \mathrm{E}\,\mathrm{KL}(p_S\|p):

over the draws the minimum stays at :math:`\hat p = p`, the gradient has the right mean, and the loss cannot fall below the
second term, about :math:`(C - 1)(N - n) / (2 n (N - 1))`. What drawing adds is spread: a network is kept from fitting p in each
sample. It adds no knowledge: a drawn target is independent of the cells that were drawn, so it differs from their true
proportions with twice the covariance above, and p itself with once. Losses that are not affine in the target (L1, Wasserstein)
do move their minimum, towards a median. Where the noise matters, draw more cells; :func:`sampling_covariance` says how many.
"""

from __future__ import annotations

import numpy as np

from monai_vslp.data.raters import round_to
from monai_vslp.utils.errors import InputError, ProportionError

__all__ = ["class_counts", "sample_cells", "sample_proportions", "sampling_covariance"]

MAX_TOTAL = 10**9  # numpy's hypergeometric sampler takes fewer items than this
TOLERANCE = 1e-4  # by how much proportions may miss 1: sums of float32 fractions


def _check(p: np.ndarray, total: int, drawn: int) -> np.ndarray:
    """Proportions as float64 that sum to 1."""
    p = np.asarray(p, dtype=np.float64)
    if p.ndim != 1 or not np.isfinite(p).all() or (p < 0).any() or abs(p.sum() - 1) > TOLERANCE:
        raise ProportionError(f"sampling needs proportions of shape [C], fractions that sum to 1; got {p.tolist()}.")
    if not 1 <= drawn <= total < MAX_TOTAL:
        raise InputError(f"need 1 <= drawn <= total < {MAX_TOTAL} cells, got drawn = {drawn}, total = {total}.")
    return p / p.sum()


def class_counts(p: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers of cells per class, nearest to ``total * p`` by largest remainders.

    Args:
        p: proportions, shape ``[C]``, fractions that sum to 1.
        total: cells.

    Returns:
        Shape ``[C]``, int64, at least 0; they sum to ``total``, each is off by less than 1, and zeros stay zero.

    Raises:
        ProportionError: no proportions.
        InputError: a number of cells out of range.
    """
    return np.rint(round_to(_check(p, total, 1), 1 / total) * total).astype(np.int64)


def sample_proportions(
    p: np.ndarray, total: int, drawn: int, generator: np.random.Generator, size: int | None = None
) -> np.ndarray:
    """Proportions of cells that are drawn without replacement.

    Args:
        p: proportions of the image, shape ``[C]``, fractions that sum to 1; taken as :func:`class_counts` rounds them.
        total: N, cells of tissue in the image.
        drawn: n, cells that are drawn.
        generator: source of the draws.
        size: how many draws; None for one.

    Returns:
        Shape ``[C]``, or ``[size, C]``; float64 multiples of ``1 / drawn`` that sum to 1. Exact for ``drawn == total``.

    Raises:
        ProportionError: no proportions.
        InputError: more cells drawn than there are, or too many.
    """
    _check(p, total, drawn)
    return generator.multivariate_hypergeometric(class_counts(p, total), drawn, size=size, method="marginals") / drawn


def sampling_covariance(p: np.ndarray, total: int, drawn: int) -> np.ndarray:
    r"""Covariance of :func:`sample_proportions`, :math:`\frac{N - n}{n(N - 1)}(\mathrm{diag}(p) - pp^\top)`.

    Args:
        p, total, drawn: as there.

    Returns:
        Shape ``[C, C]``, float64, squared fractions; singular, for rows sum to 0.

    Raises:
        ProportionError: no proportions.
        InputError: more cells drawn than there are, or too many.
    """
    _check(p, total, drawn)
    p = class_counts(p, total) / total
    return (total - drawn) / (drawn * max(total - 1, 1)) * (np.diag(p) - np.outer(p, p))


def sample_cells(mass: np.ndarray, drawn: int, generator: np.random.Generator) -> np.ndarray:
    """Cells of tissue, drawn without replacement; each cell that holds any tissue is as likely as another.

    Args:
        mass: tissue per cell, shape ``[h, w]`` or ``[1, h, w]``, at least 0; an array or a CPU tensor.
        drawn: how many cells.
        generator: source of the draws.

    Returns:
        ``(row, col)`` of the cells, shape ``[drawn, 2]``, int64, in reading order.

    Raises:
        InputError: a mass of another shape, or fewer cells of tissue than are asked for.
    """
    mass = np.asarray(mass)
    if mass.ndim == 3 and mass.shape[0] == 1:
        mass = mass[0]
    if mass.ndim != 2:
        raise InputError(f"mass must have shape [h, w] or [1, h, w], got {list(mass.shape)}.")
    cells = np.argwhere(mass > 0)
    if not 1 <= drawn <= len(cells):
        raise InputError(f"cannot draw {drawn} of {len(cells)} cells of tissue; ask for 1 to {len(cells)}.")
    return cells[np.sort(generator.choice(len(cells), drawn, replace=False))]
