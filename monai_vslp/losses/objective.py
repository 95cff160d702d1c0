"""The objective of training: proportions of whole images, decided pixels, agreement between views."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from monai_vslp.losses.proportion import ConsistencyLoss, ProportionLoss
from monai_vslp.networks.confidence import token_mass

__all__ = ["BagObjective"]


class BagObjective(nn.Module):
    r"""What training minimises for :math:`V` views of each bag:

    .. math::
        \tfrac1V\sum_v \mathrm{KL}(p\,\|\,\hat p^{(v)}) + \lambda_H \tfrac1V\sum_v H(q^{(v)})
        + \lambda_c \lVert q^{(1)} - q^{(2)}\rVert^2

    The proportion term alone is also minimal for a flat map that says :math:`p` everywhere; a small entropy term and
    agreement between views work against that.

    Args:
        entropy: :math:`\lambda_H \ge 0`.
        consistency: :math:`\lambda_c \ge 0`; no term where there is one view only.
    """

    def __init__(self, entropy: float = 0.1, consistency: float = 0.5) -> None:
        super().__init__()
        self.proportion = ProportionLoss(entropy=entropy)
        self.agreement = ConsistencyLoss("squared")
        self.consistency = consistency

    def forward(self, logits: torch.Tensor, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            logits: shape ``[B, V, C, h, w]``, aligned views.
            target: ``proportions`` ``[B, C]`` and tissue ``mass`` ``[B, 1, H, W]`` at the resolution of tokens or pixels.

        Returns:
            A scalar.
        """
        mass = token_mass(target["mass"], target["mass"].shape[-1] // logits.shape[-1])
        views = logits.unbind(dim=1)
        loss = sum(self.proportion(view, target["proportions"], mass) for view in views) / len(views)
        if len(views) == 1 or not self.consistency:
            return loss
        return loss + self.consistency * self.agreement(views[0], views[1], mass)
