"""Test-time augmentation as a MONAI inferer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.inferers import Inferer

from monai_vslp.networks.tta import TTAConfidence, View

__all__ = ["TTAInferer"]


class TTAInferer(Inferer):
    """Confidences of a network, fused over views; see :class:`~monai_vslp.networks.tta.TTAConfidence`.

    Args:
        views: name of a group of views, or a list of views.
        output: ``mean``, ``spread``, ``mean_spread`` or ``stack``.
        amp: run the network in bfloat16, about twice as fast on processors and GPUs that compute in it.
        inferer: how the network is run on each view, MONAI's ``SlidingWindowInferer`` for instance; None to call it.
    """

    def __init__(
        self,
        views: str | Sequence[View] = "shifted_symmetries",
        output: str = "mean",
        amp: bool = False,
        inferer: Inferer | None = None,
    ) -> None:
        self.views, self.output, self.amp, self.inferer = views, output, amp, inferer

    def __call__(self, inputs: torch.Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            inputs: images ``[B, 3, H, W]``, float in [0, 1].
            network: gives logits ``[B, C, H, W]``; its ``stride`` (16 where it has none) sets the grid shifts.
        """

        def predict(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
                return (network(x) if self.inferer is None else self.inferer(x, network)).float()

        tta = TTAConfidence(self.views, self.output, stride=getattr(network, "stride", 16))
        return tta(torch.as_tensor(inputs), predict)
