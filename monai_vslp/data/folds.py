"""Division of a cohort into folds by patient, balanced in size and in proportions, and the tables of the folds."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_vslp.data.cohort import Cohort, Record, _read_rows, _text, write_table
from monai_vslp.utils.errors import InputError

__all__ = ["assign_folds", "divide", "patient_of", "write_fold_table"]

ORDERS = 32  # random orders that are tried; more of them hardly improve the balance
POOLED = ("train", "val")

logger = logging.getLogger(__name__)


def patient_of(record: Record) -> tuple[str, str]:
    """What must stay together: the patient, or the image itself where none is named."""
    return ("patient", record.patient) if record.patient else ("image", str(record.image))


def assign_folds(groups: Sequence[Hashable], proportions: np.ndarray, folds: int = 5, seed: int = 0) -> np.ndarray:
    r"""Fold of each image, so that groups stay whole and folds are alike.

    .. math::
        \min \sum_f \Bigl(n_f - \frac nF\Bigr)^2 + \frac1C\Bigl\lVert \sum_{I\in f} z_I\Bigr\rVert^2, \qquad
        z_{Ik} = \frac{p_{Ik} - \bar p_k}{\sigma_k},

    with :math:`n_f` images in fold :math:`f`, :math:`\bar p_k` and :math:`\sigma_k` the mean and standard deviation of class
    :math:`k` over all images (a constant class counts as 0). Greedy: groups go one by one, the largest first and those of one
    size in random order, to the fold where the sum grows least, among folds that would not get more than the images of the
    smallest fold plus those of the largest group. So sizes of folds differ by at most the largest group, by 1 where patients
    have one image each. Of 32 random orders the one with the smallest sum counts.

    Args:
        groups: what stays together (the patient) of each image, length n.
        proportions: shape ``[n, C]``, fractions.
        folds: F, from 2 to the number of groups.
        seed: of the orders; the same images in the same order with the same seed give the same folds.

    Returns:
        Shape ``[n]``, int64, 0 to ``folds`` - 1; each of them occurs.

    Raises:
        InputError: fewer than two folds, fewer groups than folds, or not one row of proportions per image.
    """
    if isinstance(folds, bool) or not isinstance(folds, int | np.integer) or folds < 2:
        raise InputError(f"folds must be a whole number from 2, got {folds!r}; 5 is usual.")
    proportions = np.asarray(proportions, dtype=np.float64)
    if proportions.ndim != 2 or len(proportions) != len(groups):
        raise InputError(f"proportions must have shape [{len(groups)}, C], got {list(proportions.shape)}.")
    numbers: dict[Hashable, int] = {}
    group = np.array([numbers.setdefault(name, len(numbers)) for name in groups], dtype=np.int64)
    if len(numbers) < folds:
        raise InputError(
            f"{len(numbers)} patients cannot be divided into {folds} folds; each fold needs one at least. Give at most "
            f"{len(numbers)} folds, or more patients."
        )
    spread = proportions.std(axis=0)
    z = (proportions - proportions.mean(axis=0)) / np.where(spread > 1e-12, spread, np.inf)
    sizes = np.bincount(group)
    sums = np.zeros((len(numbers), z.shape[1]))
    np.add.at(sums, group, z)
    rng = np.random.default_rng(seed)
    best, least = None, np.inf
    for _ in range(ORDERS):
        order = rng.permutation(len(numbers))
        order = order[np.argsort(-sizes[order], kind="stable")]
        found, cost = _greedy(order, sizes, sums, folds)
        if cost < least - 1e-9:
            best, least = found, cost
    return best[group]


def _greedy(order: np.ndarray, sizes: np.ndarray, sums: np.ndarray, folds: int) -> tuple[np.ndarray, float]:
    """Fold of each group, int64 ``[G]``, given in one order, and the sum that is to be small.

    Args:
        order: of the groups, ``[G]``.
        sizes: images per group, ``[G]``.
        sums: standardised proportions summed over each group, ``[G, C]``.
        folds: how many.
    """
    result = np.empty(len(sizes), dtype=np.int64)
    count, total = np.zeros(folds), np.zeros((folds, sums.shape[1]))
    target, largest = sizes.sum() / folds, sizes.max()
    for place, index in enumerate(order):
        grown = (count + sizes[index] - target) ** 2 - (count - target) ** 2
        grown += (((total + sums[index]) ** 2).sum(axis=1) - (total**2).sum(axis=1)) / sums.shape[1]
        allowed = count + sizes[index] <= count.min() + largest
        if len(order) - place <= (count == 0).sum():  # what is left is needed for folds that have nothing yet
            allowed = count == 0
        fold = int(np.where(allowed, grown, np.inf).argmin())
        result[index] = fold
        count[fold] += sizes[index]
        total[fold] += sums[index]
    return result, float(((count - target) ** 2).sum() + (total**2).sum() / sums.shape[1])


def divide(cohort: Cohort, folds: int = 5, seed: int = 0) -> dict[Path, int]:
    """Fold of each image of the splits ``train`` and ``val``, patients kept whole; see :func:`assign_folds`.

    Images of split ``test`` and images without proportions are left out.

    Args:
        cohort: images with proportions.
        folds: how many.
        seed: of the division.

    Returns:
        Folds 0 to ``folds`` - 1 by path, in the order of the table.

    Raises:
        InputError: there are no images, fewer patients than folds, or fewer than two folds.
    """
    pooled = [record for record in cohort.records if record.split in POOLED]
    known = [record for record in pooled if record.proportions is not None]
    if not known:
        raise InputError(f"table {cohort.source} has no row of split {' or '.join(POOLED)} with proportions.")
    if len(known) < len(pooled):
        logger.warning("%s: %d image(s) have no proportions and are left out.", cohort.source, len(pooled) - len(known))
    found = assign_folds([patient_of(r) for r in known], np.stack([r.proportions.mean for r in known]), folds, seed)
    patients = [record.patient for record in known]
    most = max(set(patients) - {""}, key=patients.count, default="")
    if not most:
        logger.warning(
            "%s names no patients: images of one patient may come to lie in several folds, and errors then look too small.",
            cohort.source,
        )
    elif 2 * patients.count(most) > len(known):
        logger.warning(
            "%s: patient %r has %d of %d images: the folds differ in size, and the errors mostly tell of this patient.",
            cohort.source,
            most,
            patients.count(most),
            len(known),
        )
    return {record.image: int(fold) for record, fold in zip(known, found)}


def write_fold_table(path: str | Path, cohort: Cohort, images: str | Path, splits: Mapping[Path, str]) -> Path:
    """The rows of some images under new splits, every other cell as the person wrote it.

    Args:
        path: CSV to write.
        cohort: as :func:`~monai_vslp.data.read_cohort` read it from its ``source``.
        images: folder that image names are relative to.
        splits: by path of the image; other images are left out.
    """
    _, rows = _read_rows(cohort.source, [])
    kept: list[dict[str, Any]] = []
    for _, row in rows:
        split = splits.get((Path(images) / _text(row["image"])).absolute())
        if split is not None:
            kept.append({name: _text(cell) for name, cell in row.items()} | {"split": split})
    return write_table(path, kept, cohort.classes)
