"""Losses that need proportions only."""

from monai_vslp.losses.baselines import ActivationMapObjective, AdversarialObjective, AdversarialViews, MaskedObjective
from monai_vslp.losses.objective import BagObjective
from monai_vslp.losses.partial import IntervalLoss, PresenceLoss, interval_bounds
from monai_vslp.losses.proportion import ConsistencyLoss, ProportionLoss, wasserstein_proportions
from monai_vslp.losses.raters import RaterLikelihood
from monai_vslp.losses.refinement import PatchWasserstein, RefinementLoss

__all__ = [
    "ActivationMapObjective",
    "AdversarialObjective",
    "AdversarialViews",
    "BagObjective",
    "ConsistencyLoss",
    "IntervalLoss",
    "MaskedObjective",
    "PatchWasserstein",
    "PresenceLoss",
    "ProportionLoss",
    "RaterLikelihood",
    "RefinementLoss",
    "interval_bounds",
    "wasserstein_proportions",
]
