"""Pictures of a network at work, for trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from monai_vslp.transforms.overlay import LabelOverlay

__all__ = ["ConfidencePicture"]


class ConfidencePicture:
    """First image of a data set beside the network's labels on it.

    Args:
        network: gives logits ``[1, C, H, W]`` for an image ``[1, 3, H, W]`` in [0, 1].
        images: items with ``image`` ``[3, H, W]``, float in [0, 1].
        device: where the network runs.
    """

    def __init__(
        self, network: torch.nn.Module, images: Sequence[Mapping[str, Any]], device: torch.device | str = "cpu"
    ) -> None:
        self.network, self.images, self.device = network, images, device

    def __call__(self) -> np.ndarray:
        """RGB, shape ``[H, 2 W, 3]``, uint8."""
        image = torch.as_tensor(self.images[0]["image"])
        training = self.network.training
        self.network.eval()
        with torch.inference_mode():
            labels = self.network(image[None].to(self.device)).argmax(dim=1).cpu()
        self.network.train(training)
        drawn = LabelOverlay()(image, labels)
        plain = (image.clamp(0, 1) * 255).round().byte()
        return torch.cat([plain, torch.as_tensor(drawn)], dim=2).permute(1, 2, 0).numpy()
