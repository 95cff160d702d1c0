"""Losses that learn a segmentation from the proportions of whole images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from monai_vslp.networks.confidence import pool_proportions

__all__ = ["BagObjective", "consistency_loss", "pixel_entropy", "proportion_divergence"]

FLOOR = 1e-8  # keeps the logarithm finite where a class has vanished from an image


def proportion_divergence(predicted: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    r"""Divergence of given from predicted proportions, :math:`\mathrm{KL}(p\,\|\,\hat p)`, mean over the batch.

    The cross-entropy less the entropy of ``given``: 0 where both agree.

    Args:
        predicted: :math:`\hat p`, shape ``[B, C]``, on the simplex.
        given: :math:`p`, shape ``[B, C]``, on the simplex; zeros allowed.

    Returns:
        A scalar in nats.
    """
    if predicted.shape != given.shape:
        raise ValueError(f"proportions must have one shape [B, C], got {list(predicted.shape)} and {list(given.shape)}.")
    return (torch.xlogy(given, given) - given * (predicted + FLOOR).log()).sum(dim=1).mean()


def _mean_over_tissue(values: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Mean of ``[B, 1, h, w]`` weighted by ``mass`` of the same shape."""
    return (values * mass).sum() / mass.sum().clamp_min(FLOOR)


def pixel_entropy(probability: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    r"""Mean entropy of the pixels, :math:`-\sum_i a_i\sum_k q_{ik}\log q_{ik}`; 0 for decided maps.

    Args:
        probability: shape ``[B, C, h, w]``.
        mass: shape ``[B, 1, h, w]``.
    """
    return _mean_over_tissue(-torch.xlogy(probability, probability).sum(dim=1, keepdim=True), mass)


def consistency_loss(first: torch.Tensor, second: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    r"""Squared difference of two aligned views, :math:`\sum_i a_i\lVert q_i - q_i'\rVert^2`.

    Args:
        first, second: probabilities ``[B, C, h, w]``.
        mass: shape ``[B, 1, h, w]``.
    """
    return _mean_over_tissue((first - second).square().sum(dim=1, keepdim=True), mass)


class BagObjective(nn.Module):
    r"""What training minimises for two views :math:`v` of each bag:

    .. math::
        \tfrac12\sum_v \mathrm{KL}(p\,\|\,\hat p^{(v)}) + \lambda_H \tfrac12\sum_v H(q^{(v)})
        + \lambda_c \lVert q^{(1)} - q^{(2)}\rVert^2

    The proportion term alone is also minimal for a flat map that says :math:`p` everywhere; a small entropy term and
    agreement between views work against that.

    Args:
        entropy: :math:`\lambda_H \ge 0`.
        consistency: :math:`\lambda_c \ge 0`.
    """

    def __init__(self, entropy: float = 0.1, consistency: float = 0.5) -> None:
        super().__init__()
        self.entropy, self.consistency = entropy, consistency

    def forward(self, logits: torch.Tensor, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            logits: shape ``[B, 2, C, h, w]``, two aligned views.
            target: ``proportions`` ``[B, C]`` and tissue ``mass`` ``[B, 1, H, W]`` at the resolution of tokens or pixels.

        Returns:
            A scalar.
        """
        mass = F.adaptive_avg_pool2d(target["mass"], logits.shape[-2:])
        views = [view.softmax(dim=1) for view in logits.unbind(dim=1)]
        loss = logits.new_zeros(())
        for view in views:
            loss = loss + proportion_divergence(pool_proportions(view, mass), target["proportions"]) / len(views)
            loss = loss + self.entropy * pixel_entropy(view, mass) / len(views)
        return loss + self.consistency * consistency_loss(views[0], views[1], mass)
