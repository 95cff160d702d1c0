"""Losses that need proportions only."""

from monai_vslp.losses.objective import BagObjective
from monai_vslp.losses.proportion import ConsistencyLoss, ProportionLoss, wasserstein_proportions

__all__ = ["BagObjective", "ConsistencyLoss", "ProportionLoss", "wasserstein_proportions"]
