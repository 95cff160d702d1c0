"""Inferers of training: aligned views of a bag, and the proportions that a network predicts for it."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import Inferer

from monai_vslp.networks.confidence import pool_proportions
from monai_vslp.networks.tta import SYMMETRIES

__all__ = ["BagInferer", "ProportionInferer"]


def _is_features(inputs: torch.Tensor) -> bool:
    """Cached features come as ``[B, V, F, h, w]``, images as ``[B, 3, H, W]``."""
    return inputs.ndim == 5


class BagInferer(Inferer):
    """Logits of views of each bag on one token grid, for proportion and consistency losses.

    Of cached features different views are drawn at random; an image is seen under different symmetries of the square. Draws
    come from torch's global generator, so that seeding it makes training repeatable.

    Args:
        views: how many views; two or more let views be compared, one is as many times cheaper.
    """

    def __init__(self, views: int = 2) -> None:
        self.views = views

    def __call__(self, inputs: torch.Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            inputs: features ``[B, V, F, h, w]`` or images ``[B, 3, H, W]`` in [0, 1], sides multiples of the stride.
            network: a network with ``features`` and ``head``.

        Returns:
            Logits ``[B, views, C, h, w]``, aligned.
        """
        available = inputs.shape[1] if _is_features(inputs) else len(SYMMETRIES)
        chosen = torch.randperm(available)[: self.views].tolist()
        if _is_features(inputs):
            return torch.stack([network.head(inputs[:, view]) for view in chosen], dim=1)

        def logits(x: torch.Tensor) -> torch.Tensor:
            return network.head(network.features(x))

        return torch.stack([SYMMETRIES[view](inputs, logits) for view in chosen], dim=1)


class ProportionInferer(Inferer):
    """Proportions ``[B, C]`` that a network predicts for bags; the first view of cached features is used."""

    def __call__(
        self, inputs: torch.Tensor, network: torch.nn.Module, mass: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            inputs: features ``[B, V, F, h, w]`` or images ``[B, 3, H, W]`` in [0, 1].
            network: a network with ``features`` and ``head``.
            mass: tissue ``[B, 1, H', W']`` at the resolution of pixels or tokens.
        """
        features = inputs[:, 0] if _is_features(inputs) else network.features(inputs)
        return pool_proportions(network.head(features).softmax(dim=1), mass)
