"""Scores of segmentations and of proportions: one confusion matrix over a whole split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.metrics import CumulativeIterationMetric
from monai.utils import convert_data_type, optional_import

__all__ = ["ConfusionMatrix", "ProportionError", "SegmentationScores", "boundary_f1", "expected_calibration_error"]

ndimage, _ = optional_import("scipy.ndimage")

STRIP = 1 << 24  # px counted at once, so that the map of a slide costs little more memory than itself


def _labels(x: NdarrayOrTensor, name: str) -> np.ndarray:
    """``x`` as an integer array ``[H, W]``."""
    array = convert_data_type(x, np.ndarray)[0]
    if array.ndim != 2 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise ValueError(f"{name} must be a map of class indices [H, W], got {array.dtype} of shape {array.shape}.")
    return array


@dataclass(frozen=True)
class SegmentationScores:
    """Scores from global counts; arrays have one value per class.

    Attributes:
        iou: intersection over union, shape ``[C]``; NaN for a class that is in neither map.
        miou: mean of ``iou`` over the classes that occur.
        dice: shape ``[C]``; NaN for a class that is in neither map.
        accuracy: share of pixels with the right class.
        support: pixels of the target per class, shape ``[C]``, int64.
        proportion_error: absolute difference of proportions (fractions), mean over classes and images.
        proportion_distance: Wasserstein-1 distance of proportions under the 0/1 metric (half of the L1 distance), mean
            over images.

    Scores without any pixel are NaN.
    """

    iou: np.ndarray
    miou: float
    dice: np.ndarray
    accuracy: float
    support: np.ndarray
    proportion_error: float
    proportion_distance: float


class ConfusionMatrix:
    """Counts of pixels over all images of a split; rows are classes of the target, columns predicted ones.

    Args:
        num_classes: number of classes C.
        ignore_index: label of pixels that do not count, in either map.

    Attributes:
        counts: shape ``[C, C]``, int64.
        differences: predicted minus target proportions of each image, a list of float64 ``[C]``.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = np.zeros((num_classes, num_classes), dtype=np.int64)
        self.differences: list[np.ndarray] = []

    def update(self, pred: NdarrayOrTensor, target: NdarrayOrTensor) -> None:
        """Add one image.

        Args:
            pred: predicted class indices, shape ``[H, W]``, integers.
            target: true class indices, same shape.

        Raises:
            ValueError: shapes differ, or a label is neither a class nor ``ignore_index``.
        """
        pred, target = _labels(pred, "pred"), _labels(target, "target")
        if pred.shape != target.shape:
            raise ValueError(f"pred and target must have one shape, got {pred.shape} and {target.shape}.")
        counts = np.zeros_like(self.counts)
        rows = max(1, STRIP // max(pred.shape[1], 1))
        for start in range(0, pred.shape[0], rows):
            counts += self._count(pred[start : start + rows], target[start : start + rows])
        self.counts += counts
        if counts.any():
            self.differences.append((counts.sum(axis=0) - counts.sum(axis=1)) / counts.sum())

    def _count(self, pred: np.ndarray, target: np.ndarray) -> np.ndarray:
        kept = (pred != self.ignore_index) & (target != self.ignore_index)
        pred, target = pred[kept].astype(np.int64), target[kept].astype(np.int64)
        for name, values in (("pred", pred), ("target", target)):
            if values.size and not 0 <= values.min() <= values.max() < self.num_classes:
                raise ValueError(
                    f"{name} has labels from {values.min()} to {values.max()}; allowed are 0 to {self.num_classes - 1}, "
                    f"and {self.ignore_index} for pixels that do not count."
                )
        flat = np.bincount(target * self.num_classes + pred, minlength=self.num_classes**2)
        return flat.reshape(self.num_classes, self.num_classes)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the images of ``other``, for instance those that another process counted.

        Raises:
            ValueError: ``other`` has another number of classes.
        """
        if other.num_classes != self.num_classes:
            raise ValueError(f"cannot merge counts of {other.num_classes} classes into counts of {self.num_classes}.")
        self.counts += other.counts
        self.differences += other.differences

    def grouped(self, groups: Sequence[Sequence[int]]) -> ConfusionMatrix:
        """The same images with classes united.

        Args:
            groups: the class indices that make up each new class, a partition of all classes.
        """
        unite = np.zeros((len(groups), self.num_classes), dtype=np.int64)
        for row, members in enumerate(groups):
            unite[row, list(members)] = 1
        result = ConfusionMatrix(len(groups), self.ignore_index)
        result.counts = unite @ self.counts @ unite.T
        result.differences = [unite @ difference for difference in self.differences]
        return result

    def compute(self) -> SegmentationScores:
        """Scores of all images added so far."""
        right = np.diag(self.counts).astype(np.float64)
        support, predicted = self.counts.sum(axis=1), self.counts.sum(axis=0)
        total = int(self.counts.sum())
        with np.errstate(invalid="ignore"):
            iou = right / (support + predicted - right)
            dice = 2 * right / (support + predicted)
        if total == 0:
            nan = float("nan")
            return SegmentationScores(iou, nan, dice, nan, support, nan, nan)
        differences = np.abs(self.differences)
        return SegmentationScores(
            iou=iou,
            miou=float(np.nanmean(iou)),
            dice=dice,
            accuracy=float(right.sum() / total),
            support=support,
            proportion_error=float(differences.mean()),
            proportion_distance=float(0.5 * differences.sum(axis=1).mean()),
        )


class ProportionError(CumulativeIterationMetric):
    """Mean absolute error between predicted and given proportions, over images and classes; lower is better.

    In an ignite evaluator it is wrapped as ``IgniteMetricHandler(metric_fn=ProportionError(), output_transform=...)``.

    Example:
        >>> metric = ProportionError()
        >>> _ = metric(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.7, 0.3]]))
        >>> round(metric.aggregate().item(), 6)
        0.2
    """

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            y_pred: predicted proportions, shape ``[B, C]``, fractions.
            y: given proportions, same shape.

        Returns:
            Absolute differences, shape ``[B, C]``.

        Raises:
            ValueError: shapes differ or are not ``[B, C]``.
        """
        if y is None or y_pred.ndim != 2 or y_pred.shape != y.shape:
            shapes = [None if x is None else list(x.shape) for x in (y_pred, y)]
            raise ValueError(f"predicted and given proportions must both have shape [B, C], got {shapes[0]} and {shapes[1]}.")
        return (y_pred - y.to(y_pred)).abs()

    def aggregate(self) -> torch.Tensor:
        """The mean over everything added since the last reset, a scalar; NaN where nothing was."""
        errors = self.get_buffer()
        return torch.tensor(float("nan")) if errors is None else errors.mean()


def _boundary(labels: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Pixels with a 4-neighbour of another label; pairs with a pixel that does not count make no boundary."""
    edge = np.zeros(labels.shape, dtype=bool)
    vertical = (labels[1:] != labels[:-1]) & counted[1:] & counted[:-1]
    horizontal = (labels[:, 1:] != labels[:, :-1]) & counted[:, 1:] & counted[:, :-1]
    edge[1:] |= vertical
    edge[:-1] |= vertical
    edge[:, 1:] |= horizontal
    edge[:, :-1] |= horizontal
    return edge


def boundary_f1(pred: NdarrayOrTensor, target: NdarrayOrTensor, tolerance: float = 3.0, ignore_index: int = 255) -> float:
    """Agreement of the boundaries between classes.

    Precision is the share of predicted boundary pixels that lie within ``tolerance`` of a boundary of the target, recall
    the reverse; the result is their harmonic mean. Needs SciPy.

    Args:
        pred: class indices, shape ``[H, W]``, integers.
        target: same shape.
        tolerance: Euclidean distance in px, at least 0.
        ignore_index: label that does not count; its border with tissue is no boundary.

    Returns:
        A value in [0, 1]: 1 where neither map has a boundary, 0 where only one has.

    Raises:
        ValueError: shapes differ.
    """
    pred, target = _labels(pred, "pred"), _labels(target, "target")
    if pred.shape != target.shape:
        raise ValueError(f"pred and target must have one shape, got {pred.shape} and {target.shape}.")
    counted = (pred != ignore_index) & (target != ignore_index)
    ours, theirs = _boundary(pred, counted), _boundary(target, counted)
    if not ours.any() or not theirs.any():
        return 1.0 if ours.any() == theirs.any() else 0.0
    precision = float((ndimage.distance_transform_edt(~theirs)[ours] <= tolerance).mean())
    recall = float((ndimage.distance_transform_edt(~ours)[theirs] <= tolerance).mean())
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def expected_calibration_error(
    prob: NdarrayOrTensor, target: NdarrayOrTensor, bins: int = 15, ignore_index: int = 255
) -> float:
    r"""Calibration of the most probable class, :math:`\sum_b \frac{n_b}{n}\,|\mathrm{acc}_b - \mathrm{conf}_b|`.

    Pixels are sorted into bins by the probability of their most probable class; :math:`\mathrm{acc}_b` is the share of
    right pixels and :math:`\mathrm{conf}_b` the mean probability in bin b.

    Args:
        prob: shape ``[C, H, W]``, float, on the simplex.
        target: class indices, shape ``[H, W]``, integers.
        bins: number of equal bins over [0, 1].
        ignore_index: label that does not count.

    Returns:
        A value in [0, 1]; NaN where no pixel counts.

    Raises:
        ValueError: shapes do not fit.
    """
    values, labels = convert_data_type(prob, np.ndarray)[0], _labels(target, "target")
    if values.ndim != 3 or values.shape[1:] != labels.shape:
        raise ValueError(f"prob must have shape [C, H, W] over target [H, W], got {values.shape} and {labels.shape}.")
    kept = labels != ignore_index
    if not kept.any():
        return float("nan")
    confidence = values.max(axis=0)[kept].astype(np.float64)
    right = values.argmax(axis=0)[kept] == labels[kept]
    index = np.clip((confidence * bins).astype(np.int64), 0, bins - 1)
    # n_b |acc_b − conf_b| is the absolute sum of (right − confidence) over the bin.
    return float(np.abs(np.bincount(index, right - confidence, minlength=bins)).sum() / kept.sum())
