"""Handlers for ignite engines."""

from monai_vslp.handlers.checkpoint import RunCheckpoint
from monai_vslp.handlers.refinement import VariationalRefinementHandler
from monai_vslp.handlers.training import EpochSeed, TrainingProgress

__all__ = ["EpochSeed", "RunCheckpoint", "TrainingProgress", "VariationalRefinementHandler"]
