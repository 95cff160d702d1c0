"""Heads over token features: one softmax per window, or one per token."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["DenseHead", "PatchHead"]


class DenseHead(nn.Sequential):
    """Class logits per token.

    A linear head is the default: flexible heads read the proportions of the whole window off any token, and their maps
    go flat.

    Args:
        channels: feature channels.
        num_classes: classes.
        hidden: width of a hidden layer; 0 for a linear head.
        dropout: share of feature channels dropped in training.
    """

    def __init__(self, channels: int, num_classes: int, hidden: int = 0, dropout: float = 0.0) -> None:
        layers: list[nn.Module] = [nn.Dropout2d(dropout)] if dropout else []
        if hidden:
            layers += [nn.Conv2d(channels, hidden, 1), nn.GELU()]
        super().__init__(*layers, nn.Conv2d(hidden or channels, num_classes, 1))


class PatchHead(DenseHead):
    """Class logits of a whole window, repeated for each of its tokens."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: shape ``[B, F, h, w]``.

        Returns:
            Logits ``[B, C, h, w]``, constant over ``h`` and ``w``.
        """
        return super().forward(features.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *features.shape[2:])
