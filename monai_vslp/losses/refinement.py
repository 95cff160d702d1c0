"""Losses of a learned refinement, none of which needs a label of a pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from monai_vslp.utils.errors import InputError

__all__ = ["PatchWasserstein", "RefinementLoss"]


class PatchWasserstein(nn.Module):
    r"""Sliced Wasserstein distance between the patches of two sets of maps.

    .. math::
        W(U, L) = \frac1K\sum_{j=1}^K \frac1n\sum_{s=1}^n\bigl|\operatorname{sort}(\langle v_j, P u\rangle)_s
            - \operatorname{sort}(\langle v_j, P l\rangle)_s\bigr|

    with all patches :math:`P` of each class's map (so that no class has a style of its own) at some scales, and random
    directions :math:`v_j` of norm 1, orthogonal to constants: amounts of a class are the business of the
    proportions, local shape is that of this loss.

    Args:
        patch: edge of the patches, px.
        scales: how many times patches are also taken from maps at half the resolution of the one before.
        projections: :math:`K`.
        samples: :math:`n`, patches drawn from each set; more are left out.

    Source:
        J. Rabin et al., "Wasserstein barycenter and its application to texture mixing", 2011, for slicing;
        patch distances as a prior for labels follow T. Pinetz et al., "Shared prior learning of energy-based models for
        image reconstruction", SIAM J. Imaging Sci. 2021.
    """

    def __init__(self, patch: int = 7, scales: int = 2, projections: int = 32, samples: int = 4096) -> None:
        super().__init__()
        for name, value in (("patch", patch), ("scales", scales), ("projections", projections), ("samples", samples)):
            if value < 1:
                raise InputError(f"PatchWasserstein: {name} must be at least 1, got {value}.")
        self.patch, self.scales, self.projections, self.samples = patch, scales, projections, samples

    def forward(self, u: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """
        Args:
            u: maps ``[B, C, H, W]``.
            reference: maps ``[B', C', H', W']`` of the style wished for, at least a patch wide.

        Returns:
            The distance, a tensor without axes; draws come from torch's global generator.
        """
        total = u.new_zeros(())
        directions = torch.randn(self.projections, self.patch**2, device=u.device, dtype=u.dtype)
        directions = F.normalize(directions - directions.mean(dim=1, keepdim=True), dim=1)
        for scale in range(self.scales):
            if scale:
                u, reference = F.avg_pool2d(u, 2), F.avg_pool2d(reference, 2)
            if min(*u.shape[2:], *reference.shape[2:]) < self.patch:
                break
            first, second = self._projected(u, directions), self._projected(reference, directions)
            count = min(first.shape[1], second.shape[1], self.samples)
            sets = [x[:, torch.randperm(x.shape[1], device=x.device)[:count]].sort(dim=1).values for x in (first, second)]
            total = total + (sets[0] - sets[1]).abs().mean()
        return total

    def _projected(self, x: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        kernel = directions.view(-1, 1, self.patch, self.patch)
        maps = F.conv2d(x.reshape(-1, 1, *x.shape[2:]), kernel)
        return maps.transpose(0, 1).reshape(len(kernel), -1)


class RefinementLoss(nn.Module):
    r"""Loss of an unrolled refinement.

    .. math::
        \mathcal L = -\sum_i a_i\langle t_i, \log u_i\rangle + \lambda_p\,\mathrm{KL}(\bar t\,\|\,\bar u)
            + \lambda_w\,W(u, L)

    with targets :math:`t` made of proportions or of synthetic label maps, their proportions :math:`\bar t`, and the patch
    distance to reference label maps :math:`L`.

    Args:
        proportion_weight: :math:`\lambda_p \ge 0`.
        patch_weight: :math:`\lambda_w \ge 0`.
        patch: options of :class:`PatchWasserstein`.
    """

    def __init__(self, proportion_weight: float = 0.1, patch_weight: float = 0.1, patch: int = 7) -> None:
        super().__init__()
        if proportion_weight < 0 or patch_weight < 0:
            raise InputError(f"weights must be at least 0, got {proportion_weight} and {patch_weight}.")
        self.proportion_weight, self.patch_weight = proportion_weight, patch_weight
        self.style = PatchWasserstein(patch)

    def forward(self, log_u: torch.Tensor, target: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            log_u: logarithm of the segmentation, shape ``[B, C, H, W]``.
            target: ``label`` (targets) and ``reference`` (label maps), each like ``log_u``, and ``mass`` ``[B, H, W]``.

        Returns:
            The loss, a tensor without axes.
        """
        weight = target["mass"] / target["mass"].sum(dim=(1, 2), keepdim=True).clamp_min(1e-6)
        t, u = target["label"], log_u.exp()
        loss = -((t * log_u).sum(dim=1) * weight).sum(dim=(1, 2)).mean()
        if self.proportion_weight:
            wanted, found = ((x * weight[:, None]).sum(dim=(2, 3)) for x in (t, u))
            divergence = torch.xlogy(wanted, wanted) - wanted * found.clamp_min(1e-8).log()
            loss = loss + self.proportion_weight * divergence.sum(dim=1).mean()
        if self.patch_weight:
            loss = loss + self.patch_weight * self.style(u, target["reference"])
        return loss
