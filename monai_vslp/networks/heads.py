"""Heads over token features: one softmax per window, or one per token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from monai_vslp.utils.errors import InputError

__all__ = ["AdditiveHead", "DenseHead", "PatchHead"]


class DenseHead(nn.Sequential):
    """Class logits per token.

    A linear head is the default: flexible heads read the proportions of the whole window off any token, and their maps
    go flat.

    Args:
        channels: feature channels.
        num_classes: classes.
        hidden: width of a hidden layer; 0 for a linear head.
        dropout: share of feature channels dropped in training.
        kernel: edge of the first convolution in tokens, odd; borders are repeated.

    Raises:
        InputError: an even or non-positive ``kernel``.
    """

    def __init__(self, channels: int, num_classes: int, hidden: int = 0, dropout: float = 0.0, kernel: int = 1) -> None:
        if kernel < 1 or kernel % 2 == 0:
            raise InputError(f"kernel must be an odd number of tokens (1, 3, 5 ...), got {kernel}.")
        layers: list[nn.Module] = [nn.Dropout2d(dropout)] if dropout else []
        layers.append(nn.Conv2d(channels, hidden or num_classes, kernel, padding=kernel // 2, padding_mode="replicate"))
        if hidden:
            layers += [nn.GELU(), nn.Conv2d(hidden, num_classes, 1)]
        super().__init__(*layers)


class AdditiveHead(nn.Module):
    r"""Linear class logits per token plus a correction,

    .. math:: z = W x + b + B\,\mathrm{GELU}(A x + a),

    with :math:`W = 0`, :math:`b = 0` and :math:`B = 0` at the start, which says nothing about any class. Fitted as a linear
    head, it can learn the correction later from a teacher's maps.

    Args:
        channels: feature channels.
        num_classes: classes.
        hidden: rows of :math:`A`.
        dropout: share of hidden values dropped in training.
    """

    def __init__(self, channels: int, num_classes: int, hidden: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels, num_classes, 1)
        self.correction = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Dropout(dropout), nn.Conv2d(hidden, num_classes, 1, bias=False)
        )
        for weight in (self.linear.weight, self.linear.bias, self.correction[-1].weight):
            nn.init.zeros_(weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: shape ``[B, F, h, w]``.

        Returns:
            Logits ``[B, C, h, w]``.
        """
        return self.linear(features) + self.correction(features)


class PatchHead(DenseHead):
    """Class logits of a whole window, repeated for each of its tokens.

    A map larger than a window is divided evenly into the fewest windows that cover it.

    Args:
        channels: feature channels.
        num_classes: classes.
        hidden: width of a hidden layer; 0 for a linear head.
        dropout: share of feature channels dropped in training.
        window: edge of a window in tokens; None for one window, whatever the size of the map.
    """

    def __init__(
        self, channels: int, num_classes: int, hidden: int = 0, dropout: float = 0.0, window: int | None = None
    ) -> None:
        super().__init__(channels, num_classes, hidden, dropout)
        self.window = window

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: shape ``[B, F, h, w]``.

        Returns:
            Logits ``[B, C, h, w]``, constant within a window.
        """
        size = features.shape[-2:]
        windows = [1 if self.window is None else math.ceil(side / self.window) for side in size]
        return F.interpolate(super().forward(F.adaptive_avg_pool2d(features, windows)), size, mode="nearest")
