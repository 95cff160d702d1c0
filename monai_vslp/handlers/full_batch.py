"""Training of a head on all bags at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from monai.utils import CommonKeys

from monai_vslp.data.bags import FEATURES
from monai_vslp.utils.errors import InputError

if TYPE_CHECKING:
    from monai.engines import SupervisedTrainer

__all__ = ["FullBatchUpdate"]


class FullBatchUpdate:
    r"""Iteration of a trainer that takes a step on all bags together,

    .. math::
        \min_\theta\ \tfrac1n\sum_{I=1}^n \mathcal L(f_\theta(I), p_I) + \frac{\lambda_R}n\lVert\theta_W\rVert^2,

    with the weights (not offsets) :math:`\theta_W` that the optimizer was given. For a linear head this is a smooth problem of
    a few thousand unknowns, which L-BFGS solves in some tens of passes, from 0 and without any random draw: what a head
    learns from few bags no longer depends on a seed, a learning rate, or when one stops.

    Use it as ``iteration_update`` of MONAI's ``SupervisedTrainer``; the optimizer's ``step`` must take a closure.

    Args:
        bags: items with ``features`` ``[V, F, h, w]``, ``mass`` ``[1, h, w]`` and ``proportions`` ``[C]``.
        head: gives logits ``[V, C, h, w]`` for features ``[V, F, h, w]``.
        ridge: :math:`\lambda_R \ge 0`; what is known beforehand weighs less the more bags there are.
        device: where the head is.

    Raises:
        InputError: no bags, or a negative ridge.
    """

    def __init__(
        self, bags: Sequence[Mapping[str, Any]], head: torch.nn.Module, ridge: float = 0.13, device: torch.device | str = "cpu"
    ) -> None:
        if len(bags) == 0:
            raise InputError("there are no bags to learn from.")
        if not ridge >= 0:
            raise InputError(f"the ridge must be at least 0, got {ridge}.")
        self.bags, self.head, self.ridge, self.device = bags, head, ridge, device

    def __call__(self, engine: SupervisedTrainer, batch: Any) -> dict[str, Any]:
        """One step of the optimizer; the loss is that before it."""
        weights = [p for group in engine.optimizer.param_groups for p in group["params"] if p.ndim > 1]

        def closure() -> torch.Tensor:
            engine.optimizer.zero_grad()
            total = torch.zeros((), device=self.device)
            for index in range(len(self.bags)):
                item = self.bags[index]
                target = {key: item[key][None].to(self.device) for key in ("mass", "proportions")}
                logits = self.head(item[FEATURES].to(self.device).float())[None]
                loss = engine.loss_function(logits, target) / len(self.bags)
                loss.backward()
                total += loss.detach()
            if self.ridge:
                penalty = self.ridge / len(self.bags) * torch.stack([w.square().sum() for w in weights]).sum()
                penalty.backward()
                total += penalty.detach()
            return total

        loss = engine.optimizer.step(closure)
        return {CommonKeys.LOSS: float(loss)}
