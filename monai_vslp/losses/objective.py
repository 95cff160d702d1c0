"""The objective of training: proportions of whole images, decided pixels, agreement between views."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from monai_vslp.losses.proportion import ConsistencyLoss, ProportionLoss
from monai_vslp.networks.confidence import token_mass
from monai_vslp.utils.errors import InputError

__all__ = ["BagObjective"]


class BagObjective(nn.Module):
    r"""What training minimises for :math:`V` views of each bag, and one more, :math:`\bar q`, of a teacher:

    .. math::
        \tfrac1V\sum_v \mathrm{KL}(p\,\|\,\hat p^{(v)}) + \lambda_H \tfrac1V\sum_v H(q^{(v)})
        + \lambda_c \lVert q^{(1)} - q^{(2)}\rVert^2 + \lambda_t \lVert q^{(1)} - \bar q\rVert^2

    The proportion term alone is also minimal for a flat map that says :math:`p` everywhere; a small entropy term and
    agreement between views work against that. The teacher is the network with weights averaged along the run [1]_, and
    learns nothing from its view. Computed in float32, whatever precision the network runs in.

    Args:
        entropy: :math:`\lambda_H \ge 0`.
        consistency: :math:`\lambda_c \ge 0`; no term where there is one view only.
        teacher: :math:`\lambda_t \ge 0`; above 0, the last of the views given is the teacher's.

    Raises:
        InputError: a negative weight.

    References:
        .. [1] A. Tarvainen, H. Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv 1703.01780.
    """

    def __init__(self, entropy: float = 0.1, consistency: float = 0.5, teacher: float = 0.0) -> None:
        super().__init__()
        for name, value in (("consistency", consistency), ("teacher", teacher)):
            if not value >= 0:
                raise InputError(f"the weight {name} must be at least 0, got {value}.")
        self.proportion = ProportionLoss(entropy=entropy)
        self.agreement = ConsistencyLoss("squared")
        self.consistency = consistency
        self.teacher = teacher

    def forward(self, logits: torch.Tensor, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            logits: shape ``[B, V, C, h, w]``, aligned views; with a teacher ``[B, V + 1, C, h, w]``.
            target: ``proportions`` ``[B, C]`` and tissue ``mass`` ``[B, 1, H, W]`` at the resolution of tokens or pixels.

        Returns:
            A scalar.

        Raises:
            InputError: a teacher's view alone.
        """
        with torch.autocast(logits.device.type, enabled=False):
            mass = token_mass(target["mass"], target["mass"].shape[-1] // logits.shape[-1])
            views = list(logits.float().unbind(dim=1))
            taught = views.pop().detach() if self.teacher else None
            if not views:
                raise InputError("an objective with a teacher needs a view of the network besides the teacher's, got one view.")
            loss = sum(self.proportion(view, target["proportions"], mass) for view in views) / len(views)
            if len(views) > 1 and self.consistency:
                loss = loss + self.consistency * self.agreement(views[0], views[1], mass)
            if taught is not None:
                loss = loss + self.teacher * self.agreement(views[0], taught, mass)
            return loss
