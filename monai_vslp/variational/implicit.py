"""Class offsets ψ as a differentiable function of scores, proportions and parameters."""

from __future__ import annotations

import torch

from monai_vslp.variational.transport import solve_transport

__all__ = ["implicit_offsets"]


def implicit_offsets(
    scores: torch.Tensor,
    mass: torch.Tensor,
    proportions: torch.Tensor,
    smoothing: torch.Tensor | float,
    trust: torch.Tensor | float,
    psi: torch.Tensor | None = None,
    tolerance: float = 1e-6,
) -> torch.Tensor:
    r"""Potentials of the transport step of each image of a batch, differentiable by the implicit function theorem.

    .. math::
        \psi^* = \arg\max_\psi F(\psi; Z, p, h, \rho), \qquad
        \mathrm d\psi^* = \bigl(-\nabla^2_{\psi\psi} F\bigr)^{-1}\,\mathrm d_{(Z,p,h,\rho)} \nabla_\psi F(\psi^*),

    with :math:`F` of :func:`~monai_vslp.variational.transport.solve_transport`. The maximiser is found without recording a
    graph; one Newton step from it, whose right-hand side is recorded, then has the value :math:`\psi^*` (the step is zero up
    to the tolerance) and the derivative above. Memory is that of one pass over the pixels, whatever the number of Newton steps.

    Args:
        scores: :math:`Z`, shape ``[B, C, N]``, float32 or float64.
        mass: :math:`a`, shape ``[B, N]``, each row sums to 1.
        proportions: :math:`p`, shape ``[B, C]``, rows sum to 1. A class with proportion 0 gets ψ = −inf and no gradient.
        smoothing: :math:`h > 0`, a number or a tensor without axes.
        trust: :math:`\rho`, in (0, ∞], a number or a tensor without axes.
        psi: where Newton's method starts, shape ``[B, C]``; zeros by default.
        tolerance: residual that Newton's method stops at.

    Returns:
        ψ, shape ``[B, C]``, dtype of ``scores``. With ρ = ∞ it is fixed by :math:`\langle p, \psi\rangle = 0` in value and
        defined up to a constant in its derivative (the segmentation does not depend on it).
    """
    h, rho = (float(x.detach()) if isinstance(x, torch.Tensor) else float(x) for x in (smoothing, trust))
    with torch.no_grad():
        found = torch.stack(
            [
                solve_transport(
                    scores[b].detach(),
                    mass[b],
                    proportions[b].detach(),
                    smoothing=h,
                    trust=rho,
                    psi=None if psi is None else psi[b].double(),
                    tolerance=tolerance,
                ).psi
                for b in range(len(scores))
            ]
        ).to(scores.dtype)
    active = torch.isfinite(found)
    known = torch.where(active, found, torch.zeros_like(found))
    blocked = torch.where(active, 0.0, -torch.inf).to(scores.dtype)
    u = torch.softmax((scores + (known + blocked)[..., None]) / smoothing, dim=1)
    marginal = torch.einsum("bcn,bn->bc", u, mass)
    p = proportions.to(scores.dtype)
    hard = rho == float("inf")
    target = p if hard else p * torch.exp(-known / trust)
    gradient = torch.where(active, target - marginal, torch.zeros_like(marginal))
    with torch.no_grad():
        second = torch.einsum("bcn,bdn,bn->bcd", u, u, mass).double()
        curvature = (torch.diag_embed(marginal.double()) - second) / h
        # As in solve_transport: with a hard marginal ψ is free up to a constant, which the rank-one term removes.
        both = (active[:, :, None] & active[:, None, :]).double()
        curvature = curvature + (both / both.shape[-1] if hard else torch.diag_embed(target.double() / rho))
        # Classes without proportion take no part: an identity row leaves their (zero) step alone.
        curvature = curvature * both + torch.diag_embed((~active).double())
        curvature = curvature + 1e-12 * torch.eye(curvature.shape[-1], dtype=torch.float64, device=scores.device)
        inverse = torch.linalg.inv(curvature).to(scores.dtype)
    return known + blocked + torch.einsum("bcd,bd->bc", inverse, gradient)
