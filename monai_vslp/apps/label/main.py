"""What MONAI Label loads: in its server, and in the process of its own that it starts for training."""

from monai_vslp.utils.timm import import_timm

import_timm()  # declares what a torchvision without its compiled part lacks, before MONAI Label imports it

from monai_vslp.apps.label.app import ProportionLabelApp  # noqa: E402

__all__ = ["ProportionLabelApp"]
