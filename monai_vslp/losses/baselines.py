"""Objectives of weakly supervised methods that VSLP is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from monai_vslp.losses.proportion import ProportionLoss
from monai_vslp.networks.baseline_heads import MaskedHead
from monai_vslp.networks.confidence import token_mass
from monai_vslp.utils.errors import InputError

__all__ = ["ActivationMapObjective", "AdversarialObjective", "AdversarialViews", "MaskedObjective"]


def _target(logits: torch.Tensor, target: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Proportions ``[B, C]`` and tissue per token ``[B, 1, h, w]``."""
    return target["proportions"], token_mass(target["mass"], target["mass"].shape[-1] // logits.shape[-1])


class ActivationMapObjective(nn.Module):
    r"""Multi-label classification of pooled features, from which class activation maps are read,

    .. math:: -\tfrac1C\sum_c y_c\log\sigma(\bar z_c) + (1 - y_c)\log\sigma(-\bar z_c), \qquad y_c = [p_c > \tau],

    with the mean :math:`\bar z_c` of the activations over the tissue; amounts are not used. Views are averaged.

    Args:
        threshold: :math:`\tau \ge 0`, the proportion above which a class counts as present.
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        if not threshold >= 0:
            raise InputError(f"threshold must be at least 0 (a fraction), got {threshold}.")
        self.threshold = threshold

    def forward(self, logits: torch.Tensor, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            logits: activations, shape ``[B, V, C, h, w]``.
            target: ``proportions`` ``[B, C]`` and tissue ``mass`` ``[B, 1, H, W]``.

        Returns:
            A scalar.
        """
        p, mass = _target(logits, target)
        weight = mass[:, None] / mass.sum(dim=(2, 3), keepdim=True)[:, None].clamp_min(1e-12)
        pooled = (logits * weight).sum(dim=(3, 4))
        present = (p > self.threshold).to(pooled)[:, None].expand_as(pooled)
        return F.binary_cross_entropy_with_logits(pooled, present)


class MaskedObjective(nn.Module):
    r"""Presence for the masks, proportions for what they leave; see :class:`~monai_vslp.networks.baseline_heads.MaskedHead`.

    .. math::
        \mathrm{KL}(p\,\|\,\hat p) - \lambda\,\tfrac1C\sum_c \bigl(y_c\log\sigma(s_c) + (1 - y_c)\log\sigma(-s_c)\bigr),
        \qquad s_c = \tfrac1r\log\sum_i a_i e^{r u_{ic}},

    where :math:`\hat p` are proportions of the joined map and :math:`y_c = [p_c > 0]`.

    Args:
        presence: :math:`\lambda \ge 0`.
        sharpness: r of the pooling: towards 0 the mean over tokens, towards infinity the maximum.

    Raises:
        InputError: a value out of its range.
    """

    def __init__(self, presence: float = 1.0, sharpness: float = 4.0) -> None:
        super().__init__()
        if not presence >= 0 or not sharpness > 0:
            raise InputError(f"presence must be at least 0 and sharpness above 0, got {presence} and {sharpness}.")
        self.presence, self.sharpness = presence, sharpness
        self.proportion = ProportionLoss()

    def forward(self, logits: torch.Tensor, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            logits: both branches, shape ``[B, V, 2 C, h, w]``, signs first.
            target: ``proportions`` ``[B, C]`` and tissue ``mass`` ``[B, 1, H, W]``.

        Returns:
            A scalar.
        """
        p, mass = _target(logits, target)
        joined = MaskedHead.joined(logits)
        loss = sum(self.proportion(view, p, mass) for view in joined.unbind(dim=1)) / logits.shape[1]
        weight = (mass / mass.sum(dim=(2, 3), keepdim=True).clamp_min(1e-12)).clamp_min(1e-30).log()[:, None]
        signs = logits[:, :, : p.shape[1]]
        pooled = (self.sharpness * signs + weight).flatten(3).logsumexp(dim=3) / self.sharpness
        present = (p > 0).to(pooled)[:, None].expand_as(pooled)
        return loss + self.presence * F.binary_cross_entropy_with_logits(pooled, present)


class AdversarialViews:
    r"""Logits of features and of features moved to where the prediction changes most [1]_,

    .. math::
        r_i = \epsilon\,\frac{g_i}{\lVert g_i\rVert},\qquad
        g = \nabla_d\,\tfrac1n\sum_i\mathrm{KL}\bigl(q(x_i)\,\|\,q(x_i + \xi d_i)\bigr),

    from a random direction d, the same at each call, so that a fit of all bags has one objective. LLP-VAT [2]_ perturbs
    pixels of whole networks; with a frozen backbone its features are what can be moved.

    Args:
        head: logits ``[V, C, h, w]`` of features ``[V, F, h, w]``.
        radius: :math:`\epsilon > 0`, in units of the features.
        step: :math:`\xi > 0`, likewise.
        iterations: of the power method.
        seed: of the direction.

    Raises:
        InputError: a value out of its range.

    References:
        .. [1] T. Miyato et al.: Virtual adversarial training. IEEE TPAMI 2019.
        .. [2] K.-H. Tsai, H.-T. Lin: Learning from label proportions with consistency regularization. ACML 2020.
    """

    def __init__(
        self,
        head: Callable[[torch.Tensor], torch.Tensor],
        radius: float = 4.0,
        step: float = 1e-2,
        iterations: int = 1,
        seed: int = 0,
    ) -> None:
        if not radius > 0 or not step > 0 or iterations < 1:
            raise InputError(f"radius, step and iterations must be positive, got {radius}, {step} and {iterations}.")
        self.head, self.radius, self.step, self.iterations, self.seed = head, radius, step, iterations, seed

    @staticmethod
    def _unit(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Logits ``[2 V, C, h, w]`` of features ``[V, F, h, w]``: those of the features, then of the perturbed ones."""
        clean = self.head(features)
        log_q = clean.detach().log_softmax(dim=1)
        generator = torch.Generator().manual_seed(self.seed)
        direction = self._unit(torch.randn(features.shape, generator=generator).to(features))
        for _ in range(self.iterations):
            direction.requires_grad_(True)
            moved = self.head(features + self.step * direction).log_softmax(dim=1)
            (gradient,) = torch.autograd.grad((log_q.exp() * (log_q - moved)).sum(dim=1).mean(), direction)
            # Where nothing changes (a head that is all zero) the random direction is as good as any.
            still = gradient.norm(dim=1, keepdim=True) < 1e-20
            direction = torch.where(still, direction.detach(), self._unit(gradient))
        return torch.cat([clean, self.head(features + self.radius * direction)])


class AdversarialObjective(nn.Module):
    r"""Proportions, and predictions that small moves do not change:

    .. math:: \mathrm{KL}(p\,\|\,\hat p) + \lambda\,\tfrac1n\sum_i\mathrm{KL}\bigl(q(x_i)\,\|\,q(x_i + r_i)\bigr)

    Args:
        weight: :math:`\lambda \ge 0`.

    Raises:
        InputError: a negative weight.
    """

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        if not weight >= 0:
            raise InputError(f"weight must be at least 0, got {weight}.")
        self.weight = weight
        self.proportion = ProportionLoss()

    def forward(self, logits: torch.Tensor, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            logits: shape ``[B, 2 V, C, h, w]``, as of :class:`AdversarialViews`.
            target: ``proportions`` ``[B, C]`` and tissue ``mass`` ``[B, 1, H, W]``.

        Returns:
            A scalar.
        """
        p, mass = _target(logits, target)
        clean, moved = logits.chunk(2, dim=1)
        loss = sum(self.proportion(view, p, mass) for view in clean.unbind(dim=1)) / clean.shape[1]
        log_q = clean.detach().log_softmax(dim=2)
        change = (log_q.exp() * (log_q - moved.log_softmax(dim=2))).sum(dim=2)
        weight = mass / mass.sum(dim=(2, 3), keepdim=True).clamp_min(1e-12)
        return loss + self.weight * (change * weight).sum(dim=(2, 3)).mean()
