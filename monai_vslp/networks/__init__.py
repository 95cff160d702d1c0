"""Networks that turn images into class confidences, and their test-time augmentation."""

from monai_vslp.networks.adapters import (
    adapter_state_dict,
    add_lora,
    load_adapters,
    merge_lora,
    merged_state_dict,
    trainable_parameters,
)
from monai_vslp.networks.backbone import TokenBackbone, load_weights
from monai_vslp.networks.baseline_heads import ActivationMapHead, ClusterHead, MaskedHead, fit_clusters, mark_background
from monai_vslp.networks.calibration import calibrate_network, fit_calibration, prior_shift
from monai_vslp.networks.confidence import ConfidenceNet, pool_proportions, token_mass
from monai_vslp.networks.heads import AdditiveHead, DenseHead, PatchHead
from monai_vslp.networks.hub import open_backbone
from monai_vslp.networks.placing import (
    group_rates,
    load_checkpoint,
    parameters_of,
    place_network,
    tokens_of_area,
)
from monai_vslp.networks.projection import fit_projection
from monai_vslp.networks.schedule import HeadFirst, parameter_groups
from monai_vslp.networks.start import load_start
from monai_vslp.networks.tta import SYMMETRIES, TTA_GROUPS, TTAConfidence, training_views, tta_views

__all__ = [
    "SYMMETRIES",
    "TTA_GROUPS",
    "ActivationMapHead",
    "AdditiveHead",
    "ClusterHead",
    "ConfidenceNet",
    "DenseHead",
    "HeadFirst",
    "MaskedHead",
    "PatchHead",
    "TTAConfidence",
    "TokenBackbone",
    "adapter_state_dict",
    "add_lora",
    "calibrate_network",
    "fit_calibration",
    "fit_clusters",
    "fit_projection",
    "group_rates",
    "load_adapters",
    "load_checkpoint",
    "load_start",
    "load_weights",
    "mark_background",
    "merge_lora",
    "merged_state_dict",
    "open_backbone",
    "parameter_groups",
    "parameters_of",
    "place_network",
    "pool_proportions",
    "prior_shift",
    "token_mass",
    "tokens_of_area",
    "trainable_parameters",
    "training_views",
    "tta_views",
]
