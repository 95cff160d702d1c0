"""Inferers of training a regularizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from monai.inferers import Inferer

__all__ = ["RefinementInferer", "ReleasedProportions"]


class RefinementInferer(Inferer):
    """Run an unrolled refinement on a batch; gives :math:`\\log u`, shape ``[B, C, H, W]``."""

    def __call__(self, inputs: torch.Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            inputs: confidences ``[B, C, H, W]``.
            network: an :class:`~monai_vslp.variational.UnrolledRefinement`.
            **kwargs: ``proportions`` ``[B, C]``, ``trust``, ``mass`` ``[B, H, W]`` and ``guide`` ``[B, 3, H, W]``.
        """
        sees = network.regularizer.image_channels > 0
        return network(
            inputs, kwargs["proportions"], float(kwargs["trust"]), kwargs["mass"], kwargs["guide"] if sees else None
        ).log_u


class ReleasedProportions(Inferer):
    """Proportions ``[B, C]`` that a refinement finds without being told any: a held-out check that needs no mask."""

    def __call__(self, inputs: torch.Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As :class:`RefinementInferer`, whose proportions are left out."""
        sees = network.regularizer.image_channels > 0
        with torch.no_grad():
            u = network(inputs, None, math.inf, kwargs["mass"], kwargs["guide"] if sees else None).log_u.exp()
        mass = kwargs["mass"]
        return (u * mass[:, None]).sum(dim=(2, 3)) / mass.sum(dim=(1, 2))[:, None].clamp_min(1e-6)
