"""Variational segmentation from label proportions, as a plugin for MONAI.

Turns the tissue percentages of a pathology report into pixel-level tissue maps: a network trained from
proportions alone gives pixel-wise confidences, a variational problem fuses them with the proportions.
"""

__version__ = "0.1.0"

# Bundles find classes by short names among loaded modules, so one import loads all of them.
from monai_vslp import data, handlers, inferers, io, losses, metrics, networks, transforms, variational, workflows

__all__ = [
    "data",
    "handlers",
    "inferers",
    "io",
    "losses",
    "metrics",
    "networks",
    "transforms",
    "variational",
    "workflows",
]
