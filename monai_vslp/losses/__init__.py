"""Losses that need proportions only."""

from monai_vslp.losses.objective import BagObjective
from monai_vslp.losses.proportion import ConsistencyLoss, ProportionLoss, wasserstein_proportions
from monai_vslp.losses.refinement import PatchWasserstein, RefinementLoss

__all__ = ["BagObjective", "ConsistencyLoss", "PatchWasserstein", "ProportionLoss", "RefinementLoss", "wasserstein_proportions"]
