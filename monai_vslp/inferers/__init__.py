"""Inferers: test-time augmentation, training views, whole slides."""

from monai_vslp.inferers.bags import ProportionInferer, TwoViewInferer
from monai_vslp.inferers.tta import TTAInferer

__all__ = ["ProportionInferer", "TTAInferer", "TwoViewInferer"]
