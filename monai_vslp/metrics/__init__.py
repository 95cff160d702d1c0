"""Scores of segmentations and proportions."""

from monai_vslp.metrics.segmentation import (
    ConfusionMatrix,
    ProportionError,
    SegmentationScores,
    boundary_f1,
    expected_calibration_error,
)

__all__ = ["ConfusionMatrix", "ProportionError", "SegmentationScores", "boundary_f1", "expected_calibration_error"]
