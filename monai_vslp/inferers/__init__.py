"""Inferers: test-time augmentation, training views, whole slides."""

from monai_vslp.inferers.bags import BagInferer, ProportionInferer
from monai_vslp.inferers.regularizer import RefinementInferer, ReleasedProportions
from monai_vslp.inferers.slide import SlideMap, infer_slide
from monai_vslp.inferers.tta import TTAInferer

__all__ = [
    "BagInferer",
    "ProportionInferer",
    "RefinementInferer",
    "ReleasedProportions",
    "SlideMap",
    "TTAInferer",
    "infer_slide",
]
