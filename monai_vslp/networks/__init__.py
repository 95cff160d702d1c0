"""Networks that turn images into class confidences, and their test-time augmentation."""

from monai_vslp.networks.backbone import TokenBackbone, load_weights
from monai_vslp.networks.confidence import ConfidenceNet, pool_proportions, token_mass
from monai_vslp.networks.heads import AdditiveHead, DenseHead, PatchHead
from monai_vslp.networks.projection import fit_projection
from monai_vslp.networks.tta import SYMMETRIES, TTA_GROUPS, TTAConfidence, training_views

__all__ = [
    "SYMMETRIES",
    "TTA_GROUPS",
    "AdditiveHead",
    "ConfidenceNet",
    "DenseHead",
    "PatchHead",
    "TTAConfidence",
    "TokenBackbone",
    "fit_projection",
    "load_weights",
    "pool_proportions",
    "token_mass",
    "training_views",
]
