"""Unrolled refinement: a fixed number of proximal steps whose regularizer, weights and stopping time are learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from monai_vslp.utils.errors import InputError
from monai_vslp.variational.implicit import implicit_offsets
from monai_vslp.variational.tdv import TotalDeepVariation

__all__ = ["UnrolledRefinement", "UnrolledResult", "regularizer_groups"]

LOG_FLOOR = -30.0  # log u is held above it: in float32 e^-30 is 0 beside 1, and differences stay finite
TRUST_SCALE = 3.0  # ρ at which learned scalars are halfway between those of a constraint and those without proportions
SLOPES = ("T", "alpha", "lambda", "epsilon", "rho")


@dataclass(frozen=True)
class UnrolledResult:
    r"""Output of :class:`UnrolledRefinement`.

    Attributes:
        log_u: logarithm of the segmentation, shape ``[B, C, H, W]``.
        psi: class offsets of the last step, shape ``[B, C]``; None without proportions.
        energies: :math:`\sum_i a_i(\langle c_i,u_i\rangle + \varepsilon\langle u_i,\log u_i\rangle) + \alpha R(u)` of the
            start and of each step but the last, shape ``[B, S]``, without gradient.
    """

    log_u: torch.Tensor
    psi: torch.Tensor | None
    energies: torch.Tensor


class UnrolledRefinement(nn.Module):
    r"""Learned refinement: :math:`S` entropic proximal steps of the variational energy.

    .. math::
        Z_i = \tfrac1\tau \log u_i^s - c_i - \alpha\,a_i^{-1}\partial_i R(u^s, \theta), \qquad
        u_i^{s+1} = \operatorname{softmax}\bigl((Z_i + \psi)/h\bigr), \qquad
        h = \varepsilon + \tfrac1\tau,\quad \tau = \tfrac TS,

    with ψ from the semi-dual of the transport (hard or trusted proportions) or 0 without them, and costs
    :math:`c = -\lambda\log(q + \delta)`. Learned: θ, the stopping time :math:`T`, the strength α, the weight λ, the entropy ε.
    The start is the transport step alone.

    The less proportions decide, the more the image and the regularizer have to: each scalar s of T, α, λ and ε is used as
    :math:`s\,e^{\kappa_s\rho_0/(\rho_0+\rho)}` with :math:`\rho_0 = 3`, and ρ as :math:`\rho\,e^{\kappa_\rho}`, with learned
    κ, 0 at the start, so that one network serves constraints, estimates, and no proportions at all.

    Args:
        regularizer: :math:`R`; its energy is per pixel.
        steps: :math:`S`.
        stopping_time: start of :math:`T`, in steps of the flow's time.
        alpha: start of α.
        fidelity_weight: start of λ.
        epsilon: start of ε.
        delta: :math:`\delta`.
    """

    def __init__(
        self,
        regularizer: TotalDeepVariation,
        steps: int = 10,
        stopping_time: float = 10.0,
        alpha: float = 1.0,
        fidelity_weight: float = 1.0,
        epsilon: float = 0.3,
        delta: float = 1e-3,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise InputError(f"UnrolledRefinement: steps must be at least 1, got {steps}.")
        self.regularizer, self.steps, self.delta = regularizer, steps, delta
        # Logarithms keep the parameters positive whatever the optimizer does.
        self.log_time = nn.Parameter(torch.tensor(math.log(stopping_time)))
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)))
        self.log_weight = nn.Parameter(torch.tensor(math.log(fidelity_weight)))
        self.log_epsilon = nn.Parameter(torch.tensor(math.log(epsilon)))
        self.trust_slopes = nn.Parameter(torch.zeros(5))  # of T, α, λ, ε and ρ

    @property
    def parameters_learned(self) -> dict[str, float]:
        """The scalars that were learned, by the name of their symbol."""
        return {
            "T": float(self.log_time.detach().exp()),
            "alpha": float(self.log_alpha.detach().exp()),
            "lambda": float(self.log_weight.detach().exp()),
            "epsilon": float(self.log_epsilon.detach().exp()),
            **{f"slope of {name}": k for name, k in zip(SLOPES, self.trust_slopes.tolist())},
        }

    def scalars(self, trust: torch.Tensor | float) -> tuple[torch.Tensor, ...]:
        """T, α, λ, ε and ρ at a trust; without proportions the trust is 0."""
        trust = torch.as_tensor(trust).to(self.log_time)
        logs = torch.stack([self.log_time, self.log_alpha, self.log_weight, self.log_epsilon])
        time, alpha, weight, epsilon = (logs + self.trust_slopes[:4] * (TRUST_SCALE / (TRUST_SCALE + trust))).exp().unbind()
        return time, alpha, weight, epsilon, trust * self.trust_slopes[4].exp()

    def unroll(
        self,
        confidence: torch.Tensor,
        proportions: torch.Tensor | None = None,
        trust: torch.Tensor | float = math.inf,
        mass: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        steps: int | None = None,
        on_step: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ) -> UnrolledResult:
        """Refine a batch.

        Args:
            confidence: :math:`q` on the simplex, shape ``[B, C, H, W]``.
            proportions: :math:`p`, shape ``[B, C]``; None leaves them free.
            trust: ρ in [0, ∞]; 0 leaves the proportions free.
            mass: tissue per pixel, shape ``[B, H, W]``, any scale; all ones by default.
            image: shape ``[B, image_channels, H, W]`` where the regularizer sees one.
            steps: another number of steps at the same step size (to look beyond the stopping time).
            on_step: called at the beginning of each step with :math:`u^s` on tissue (0 elsewhere), ``[B, C, H, W]``, and
                :math:`r(u^s)`, ``[B, H, W]``.

        Returns:
            The segmentation, differentiable in the parameters and in ``confidence``.
        """
        batch, classes, height, width = confidence.shape
        if float(trust) == 0.0:
            proportions = None
        if mass is None:
            mass = torch.ones(batch, height, width, dtype=confidence.dtype, device=confidence.device)
        tissue = (mass > 0).to(confidence.dtype)
        share = (mass / mass.sum(dim=(1, 2), keepdim=True)).view(batch, -1)
        time, alpha, weight, epsilon, trust = self.scalars(0.0 if proportions is None else trust)
        tau = time / self.steps
        cost = -weight * torch.log(confidence + self.delta)
        psi: torch.Tensor | None = None

        def transport(scores: torch.Tensor, smoothing: torch.Tensor) -> torch.Tensor:
            nonlocal psi
            flat = scores.reshape(batch, classes, -1)
            if proportions is not None:
                start = None if psi is None else psi.detach()
                psi = implicit_offsets(flat, share, proportions, smoothing, trust, psi=start, tolerance=1e-5)
                flat = flat + psi[..., None]
            return torch.log_softmax(flat / smoothing, dim=1).clamp_min(LOG_FLOOR).view_as(scores)

        log_u = transport(-cost, epsilon)
        energies = []
        for _ in range(self.steps if steps is None else steps):
            u = log_u.exp()
            # The energy is per pixel of tissue: uniform mass there.
            seen = u * tissue[:, None]
            energy, gradient = self.regularizer.energy_and_gradient(seen, tissue, image)
            if on_step is not None:
                on_step(seen, energy)
            gradient = gradient * tissue[:, None]
            with torch.no_grad():
                local = (u * (cost + epsilon * log_u)).sum(dim=1) + alpha * energy * tissue
                energies.append((local * share.view_as(local)).sum(dim=(1, 2)))
            log_u = transport(log_u / tau - cost - alpha * gradient, epsilon + 1.0 / tau)
        return UnrolledResult(log_u, psi, torch.stack(energies, dim=1))

    def forward(self, *args: Any, **kwargs: Any) -> UnrolledResult:
        """As :meth:`unroll`."""
        return self.unroll(*args, **kwargs)


def regularizer_groups(network: UnrolledRefinement, regularizer_rate: float, scalar_rate: float) -> list[dict[str, Any]]:
    """Parameters for an optimizer: those of the regularizer, then the numbers of the steps, which learn at another rate.

    Args:
        network: the steps with their regularizer.
        regularizer_rate, scalar_rate: learning rates.

    Returns:
        Two groups with ``params`` and ``lr``.
    """
    scalars = [network.log_time, network.log_alpha, network.log_weight, network.log_epsilon, network.trust_slopes]
    return [
        {"params": list(network.regularizer.parameters()), "lr": regularizer_rate},
        {"params": scalars, "lr": scalar_rate},
    ]
