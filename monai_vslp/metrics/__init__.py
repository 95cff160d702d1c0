"""Scores of segmentations and proportions."""

from monai_vslp.metrics.segmentation import ConfusionMatrix, SegmentationScores, boundary_f1, expected_calibration_error

__all__ = ["ConfusionMatrix", "SegmentationScores", "boundary_f1", "expected_calibration_error"]
