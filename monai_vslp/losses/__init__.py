"""Losses that need proportions only."""

from monai_vslp.losses.objective import BagObjective, consistency_loss, pixel_entropy, proportion_divergence

__all__ = ["BagObjective", "consistency_loss", "pixel_entropy", "proportion_divergence"]
