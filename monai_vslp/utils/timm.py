"""The one place that imports timm."""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from monai.utils.module import optional_import

__all__ = ["import_timm"]

_DECLARED: list[torch.library.Library] = []  # torch forgets the declarations when the library object dies


def _declare_missing_torchvision_operators() -> None:
    """Declare ``torchvision::nms`` and ``qnms`` where the installed torchvision cannot register its own.

    A CPU build of torch beside the package index's torchvision (compiled against CUDA) fails at import because these
    operators are absent. timm needs torchvision's transforms only, so their schemas suffice.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # the failed import leaves half a package behind
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)


def import_timm() -> ModuleType:
    """Import and return ``timm``.

    Raises:
        OptionalImportError: timm is not installed; on first use, says how to install it.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass  # timm itself then says what is missing
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _declare_missing_torchvision_operators()
    timm, _ = optional_import("timm", descriptor="{} is needed for backbones: pip install 'timm>=1.0'")
    return timm
