"""Handlers for ignite engines."""

from monai_vslp.handlers.averaging import WeightAverage
from monai_vslp.handlers.checkpoint import RunCheckpoint
from monai_vslp.handlers.full_batch import FullBatchUpdate
from monai_vslp.handlers.processes import (
    GradientAverage,
    end_processes,
    handlers_of_process,
    process_device,
    process_trainer,
    seed_of_process,
    share_of_batch,
    shared_sampler,
    start_processes,
)
from monai_vslp.handlers.refinement import VariationalRefinementHandler
from monai_vslp.handlers.regularizer import BatchEpoch, FilterConstraint, GradientLimit
from monai_vslp.handlers.stopping import HeldOutStop
from monai_vslp.handlers.tracked_run import TrackedRun, send_kept
from monai_vslp.handlers.tracking import HeldOutTable, MLflowTracker
from monai_vslp.handlers.training import EpochSeed, ItemProgress, TrainingProgress, mixed_precision, run_engine

__all__ = [
    "BatchEpoch",
    "EpochSeed",
    "FilterConstraint",
    "FullBatchUpdate",
    "GradientAverage",
    "GradientLimit",
    "HeldOutStop",
    "HeldOutTable",
    "ItemProgress",
    "MLflowTracker",
    "RunCheckpoint",
    "TrackedRun",
    "TrainingProgress",
    "VariationalRefinementHandler",
    "WeightAverage",
    "end_processes",
    "handlers_of_process",
    "mixed_precision",
    "process_device",
    "process_trainer",
    "run_engine",
    "seed_of_process",
    "send_kept",
    "share_of_batch",
    "shared_sampler",
    "start_processes",
]
