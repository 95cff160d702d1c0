"""MONAI Label: an app that segments, corrects by hand, trains from proportions, and proposes what fits worst.

What needs MONAI Label itself (:mod:`~monai_vslp.apps.label.app`, :mod:`~monai_vslp.apps.label.tasks`) is not imported here.
"""

from monai_vslp.apps.label.bundle_model import BundleModel, View
from monai_vslp.apps.label.ranking import Fit, FitStore, rank_fits
from monai_vslp.apps.label.request import LabelRequest, move_proportion, parse_request
from monai_vslp.apps.label.session import Session, SessionCache, Solution
from monai_vslp.apps.label.start import label_command
from monai_vslp.apps.label.strokes import NOT_PAINTED, paint_strokes, unary_costs

__all__ = [
    "BundleModel",
    "Fit",
    "FitStore",
    "LabelRequest",
    "NOT_PAINTED",
    "Session",
    "SessionCache",
    "Solution",
    "View",
    "label_command",
    "move_proportion",
    "paint_strokes",
    "parse_request",
    "rank_fits",
    "unary_costs",
]
