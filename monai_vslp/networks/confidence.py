"""The network of the first stage: an image in, class confidences for every pixel out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from monai_vslp.networks.backbone import TokenBackbone
from monai_vslp.networks.heads import DenseHead, PatchHead
from monai_vslp.utils.errors import InputError

__all__ = ["ConfidenceNet", "pool_proportions"]

HEADS = {"dense": DenseHead, "patch": PatchHead}
WINDOW_BATCH = 32  # windows that go through the backbone together; bounds memory for large inputs


def pool_proportions(probability: torch.Tensor, mass: torch.Tensor | None = None) -> torch.Tensor:
    r"""Tissue-weighted proportions :math:`\hat p_k = \sum_i a_i q_{ik} / \sum_i a_i`.

    Args:
        probability: shape ``[B, C, h, w]``, on the simplex.
        mass: tissue ``[B, 1, H, W]`` on any grid, averaged onto that of ``probability``; None for tissue everywhere.

    Returns:
        Shape ``[B, C]``; zeros for an image without tissue.
    """
    if mass is None:
        return probability.mean(dim=(2, 3))
    mass = F.adaptive_avg_pool2d(mass.to(probability), probability.shape[-2:])
    return (probability * mass).sum(dim=(2, 3)) / mass.sum(dim=(2, 3)).clamp_min(1e-12)


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    """Evenly placed starts, multiples of ``stride``, of the fewest windows that cover ``length`` px."""
    count = math.ceil(length / window)
    if count == 1:
        return [0]
    return [round(i * (length - window) / (count - 1) / stride) * stride for i in range(count)]


class ConfidenceNet(nn.Module):
    """Backbone, head, and the windows within which tokens see each other.

    A token of a transformer that sees the whole image can predict the image's proportions everywhere, and training on
    proportions rewards that. So an image is cut into windows that are seen apart; where they overlap, their features
    are averaged.

    Args:
        num_classes: classes.
        in_channels: 3; MONAI's tools ask for the argument.
        backbone: name of a timm model; see :class:`~monai_vslp.networks.backbone.TokenBackbone`.
        blocks: which of its blocks to use; None for middle ones.
        weights: local weights of the backbone.
        pretrained: let timm fetch weights.
        head: ``dense`` (a softmax per token) or ``patch`` (a softmax per input).
        hidden: width of a hidden layer in the head; 0 for a linear one.
        dropout: dropout before the head.
        window: edge of the windows in px, a multiple of the backbone's stride; None to see the whole input at once.
        freeze_backbone: train the head alone.
        mean, std: channel statistics the input is normalised with; None for those of the backbone.
        backbone_kwargs: further options of ``timm.create_model``.

    Raises:
        InputError: an option that cannot be.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        backbone: str = "vit_tiny_patch16_224",
        blocks: Sequence[int] | None = None,
        weights: str | Path | None = None,
        pretrained: bool = False,
        head: str = "dense",
        hidden: int = 0,
        dropout: float = 0.0,
        window: int | None = 224,
        freeze_backbone: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if in_channels != 3:
            raise InputError(f"ConfidenceNet takes RGB images (3 channels), got in_channels = {in_channels}.")
        if head not in HEADS:
            raise InputError(f"head must be one of {', '.join(HEADS)}, got {head!r}.")
        self.backbone = TokenBackbone(backbone, blocks, weights, pretrained, **(backbone_kwargs or {}))
        self.stride = self.backbone.stride
        if window is not None and (window <= 0 or window % self.stride):
            below = max(window // self.stride, 1) * self.stride
            raise InputError(
                f"window must be a multiple of the stride {self.stride} px of {backbone!r}, got {window}; the nearest are "
                f"{below} and {below + self.stride}."
            )
        self.window = window
        self.num_classes = num_classes
        self.head = HEADS[head](self.backbone.channels, num_classes, hidden, dropout)
        self.freeze_backbone = freeze_backbone
        for name, values in (("mean", mean or self.backbone.mean), ("std", std or self.backbone.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1))
        if freeze_backbone:
            self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> ConfidenceNet:
        """As in torch, except that a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Token features.

        Args:
            x: RGB images, shape ``[B, 3, H, W]``, float in [0, 1], any size.

        Returns:
            Shape ``[B, F, ceil(H / stride), ceil(W / stride)]``; without gradient where the backbone is frozen.
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise InputError(f"ConfidenceNet takes images of shape [B, 3, H, W], got {list(x.shape)}.")
        height, width = x.shape[-2:]
        x = F.pad((x - self.mean) / self.std, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            return self._windowed(x)

    def _windowed(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        if self.window is None or (height <= self.window and width <= self.window):
            return self.backbone(x)
        # An input narrower than a window is seen in windows of its own width.
        size = (min(self.window, height), min(self.window, width))
        tops = _window_starts(height, size[0], self.stride)
        lefts = _window_starts(width, size[1], self.stride)
        places = [(top, left) for top in tops for left in lefts]
        windows = torch.cat([x[:, :, top : top + size[0], left : left + size[1]] for top, left in places])
        maps = torch.cat([self.backbone(part) for part in windows.split(WINDOW_BATCH)]).split(batch)
        total = x.new_zeros(batch, maps[0].shape[1], height // self.stride, width // self.stride)
        count = x.new_zeros(1, 1, *total.shape[-2:])
        for (top, left), features in zip(places, maps):
            rows = slice(top // self.stride, top // self.stride + features.shape[2])
            columns = slice(left // self.stride, left // self.stride + features.shape[3])
            total[:, :, rows, columns] += features
            count[:, :, rows, columns] += 1
        return total / count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class logits for every pixel.

        Args:
            x: RGB images, shape ``[B, 3, H, W]``, float in [0, 1], any size.

        Returns:
            Logits, shape ``[B, C, H, W]``: those of the tokens, interpolated linearly between token centres.
        """
        logits = self.head(self.features(x))
        size = (logits.shape[-2] * self.stride, logits.shape[-1] * self.stride)
        logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
        return logits[..., : x.shape[-2], : x.shape[-1]]
