"""Handlers for ignite engines."""

from monai_vslp.handlers.averaging import WeightAverage
from monai_vslp.handlers.checkpoint import RunCheckpoint
from monai_vslp.handlers.full_batch import FullBatchUpdate
from monai_vslp.handlers.processes import (
    GradientAverage,
    handlers_of_process,
    process_device,
    share_of_batch,
    start_processes,
)
from monai_vslp.handlers.refinement import VariationalRefinementHandler
from monai_vslp.handlers.regularizer import BatchEpoch, FilterConstraint, GradientLimit
from monai_vslp.handlers.stopping import HeldOutStop
from monai_vslp.handlers.tracking import MLflowTracker
from monai_vslp.handlers.training import EpochSeed, ItemProgress, TrainingProgress

__all__ = [
    "BatchEpoch",
    "EpochSeed",
    "FilterConstraint",
    "FullBatchUpdate",
    "GradientAverage",
    "GradientLimit",
    "HeldOutStop",
    "ItemProgress",
    "MLflowTracker",
    "RunCheckpoint",
    "TrainingProgress",
    "VariationalRefinementHandler",
    "WeightAverage",
    "handlers_of_process",
    "process_device",
    "share_of_batch",
    "start_processes",
]
