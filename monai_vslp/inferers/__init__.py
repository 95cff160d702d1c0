"""Inferers: test-time augmentation, training views, whole slides."""

from monai_vslp.inferers.adaptive import AdaptiveTTAInferer, tta_inferer
from monai_vslp.inferers.bags import BagInferer, ProportionInferer
from monai_vslp.inferers.confidence import GivenConfidence
from monai_vslp.inferers.regularizer import RefinementInferer, ReleasedProportions
from monai_vslp.inferers.slide import SlideConfidence, infer_slide, network_predictor
from monai_vslp.inferers.slide_maps import SlideMaps
from monai_vslp.inferers.slide_refinement import Given, RefinedMaps, Region, refine_maps
from monai_vslp.inferers.tta import TTAInferer

__all__ = [
    "AdaptiveTTAInferer",
    "BagInferer",
    "Given",
    "GivenConfidence",
    "ProportionInferer",
    "RefinedMaps",
    "RefinementInferer",
    "Region",
    "ReleasedProportions",
    "SlideConfidence",
    "SlideMaps",
    "TTAInferer",
    "infer_slide",
    "network_predictor",
    "refine_maps",
    "tta_inferer",
]
