"""Entropic proximal gradient: minimises fidelity + proportions + regularizer over simplex-valued maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from monai_vslp.variational.fidelity import AssignmentFidelity
from monai_vslp.variational.transport import solve_transport, transport_plan

__all__ = ["Regularizer", "Solution", "StoppingRule", "minimize"]


class Regularizer(Protocol):
    """What the solver asks of a regularizer; ``u`` has shape ``[C, H, W]``."""

    def value(self, u: torch.Tensor) -> float: ...

    def value_and_gradient(self, u: torch.Tensor) -> tuple[float, torch.Tensor]: ...


LOG_FLOOR = -80.0  # keeps differences of logarithms finite in float32; exp(-80) is 0 beside anything else


@dataclass(frozen=True)
class StoppingRule:
    """When to stop.

    Attributes:
        max_iterations: limit of proximal steps.
        tolerance: relative change of the energy over one step below which the iteration has converged.
        marginal_tolerance: residual of the semi-dual that each step is solved to.
    """

    max_iterations: int = 200
    tolerance: float = 1e-5
    marginal_tolerance: float = 1e-6


@dataclass(frozen=True)
class Solution:
    """Minimiser with its history; arrays over pixels have shape ``[C, N]``."""

    u: torch.Tensor
    log_u: torch.Tensor
    psi: torch.Tensor | None
    energies: list[float]
    residual: float | None
    converged: bool
    reason: str


def _relaxed_marginal_energy(u: torch.Tensor, mass: torch.Tensor, proportions: torch.Tensor, trust: float) -> float:
    """ρ KL(ū‖p) for masses that sum to 1; 0 where the marginal is a constraint."""
    if math.isinf(trust):
        return 0.0
    marginal = (u * mass).sum(dim=1, dtype=torch.float64)
    kept = marginal > 0
    return trust * float((marginal[kept] * (marginal[kept] / proportions.to(marginal)[kept]).log()).sum())


def _divergence(log_new: torch.Tensor, new: torch.Tensor, log_old: torch.Tensor, mass: torch.Tensor) -> float:
    """Σ a_i KL(new_i‖old_i); classes switched off in both count 0."""
    terms = torch.where(new > 0, new * (log_new - log_old), torch.zeros_like(new))
    return float((terms.sum(dim=0) * mass).sum(dtype=torch.float64))


def minimize(
    fidelity: AssignmentFidelity,
    shape: tuple[int, int],
    *,
    regularizer: Regularizer | None,
    alpha: float,
    proportions: torch.Tensor | None,
    trust: float,
    step: float,
    stopping: StoppingRule,
    log_start: torch.Tensor | None = None,
) -> Solution:
    r"""Minimise :math:`E(u) = D(u) + \rho\,\mathrm{KL}(\bar u\|p) + \alpha R(u)` over :math:`u_i \in \Delta_C`.

    Each step linearises :math:`R` at :math:`u^s` (moved on by momentum) and stays close to it in Kullback–Leibler
    divergence, with
    :math:`g_i = \alpha\,a_i^{-1}\partial R/\partial u_i` and :math:`h = \varepsilon + 1/\tau`:

    .. math::
        Z_i = \tfrac1\tau \log u_i^s - c_i - g_i, \qquad u_i^{s+1} = \operatorname{softmax}((Z_i + \psi)/h),

    where ψ maximises the semi-dual of :func:`~monai_vslp.variational.transport.solve_transport` (ψ = 0 without
    proportions). A step is accepted when :math:`\alpha R` lies below its linearisation plus the proximal term, which
    implies that :math:`E` does not rise above its value at :math:`u^s`; otherwise τ is halved. After an accepted step τ
    grows again. Momentum that would raise :math:`E` is dropped, so the energies never rise.

    Args:
        fidelity: costs ``[C, N]``, masses ``[N]`` and ε.
        shape: ``(H, W)`` with ``H * W == N``, the grid on which the regularizer acts.
        regularizer: :math:`R`, or None.
        alpha: :math:`\alpha \ge 0`.
        proportions: :math:`p`, shape ``[C]``, or None to leave the marginal free.
        trust: :math:`\rho` in (0, ∞]; ∞ makes the proportions a constraint.
        step: first τ.
        stopping: when to stop.
        log_start: :math:`\log u^0`, shape ``[C, N]``; by default the minimiser without regularizer.

    Returns:
        The solution; ``energies[0]`` belongs to the start.
    """
    mass, cost, epsilon = fidelity.mass, fidelity.cost, fidelity.epsilon
    grid = (cost.shape[0], *shape)
    psi: torch.Tensor | None = None
    residual: float | None = None

    def transport(scores: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal psi, residual
        if proportions is None:
            return transport_plan(scores, torch.zeros(len(scores), device=scores.device), smoothing)
        result = solve_transport(
            scores,
            mass,
            proportions,
            smoothing=smoothing,
            trust=trust,
            psi=psi,
            tolerance=stopping.marginal_tolerance,
        )
        psi, residual = result.psi, result.residual
        return transport_plan(scores, psi, smoothing)

    def energy(u: torch.Tensor, log_u: torch.Tensor, regularization: float) -> float:
        marginal = 0.0 if proportions is None else _relaxed_marginal_energy(u, mass, proportions, trust)
        return fidelity.value(u, log_u) + marginal + alpha * regularization

    if log_start is None or regularizer is None or alpha == 0:
        u, log_u = transport(-cost, epsilon)
    else:
        # Projecting the start onto the proportions makes every later energy comparable with the first.
        u, log_u = transport(log_start, 1.0)
        psi = None if psi is None else torch.zeros_like(psi)
    if regularizer is None or alpha == 0:
        return Solution(u, log_u, psi, [energy(u, log_u, 0.0)], residual, True, "closed form: no regularizer")

    energies = [energy(u, log_u, regularizer.value(u.view(grid)))]
    log_u = log_u.clamp_min(LOG_FLOOR)
    tau, age = step, 0
    previous = log_u
    reason = f"the limit of {stopping.max_iterations} steps"
    converged = False
    for _ in range(stopping.max_iterations):
        log_y = log_u
        if age > 0:
            # Momentum among logarithms keeps the extrapolated point inside the simplex.
            log_y = torch.log_softmax(torch.lerp(previous, log_u, 1.0 + age / (age + 3.0)), dim=0)
        y = log_y.exp()
        value, gradient = regularizer.value_and_gradient(y.view(grid))
        gradient = gradient.view_as(u)
        while True:
            smoothing = epsilon + 1.0 / tau
            new, log_new = transport((log_y / tau).sub_(cost).sub_(gradient, alpha=alpha), smoothing)
            new_value = regularizer.value(new.view(grid))
            linear = float(((new - y).mul_(gradient).sum(dim=0) * mass).sum(dtype=torch.float64))
            bound = value + linear + _divergence(log_new, new, log_y, mass) / (alpha * tau)
            if new_value <= bound + 1e-7 * abs(value) or tau < 1e-6 * step:
                break
            tau *= 0.5
        new_energy = energy(new, log_new, new_value)
        change = (energies[-1] - new_energy) / max(abs(new_energy), 1e-12)
        if change < 0:
            if age > 0:
                age, previous = 0, log_u  # the momentum overshot: go on from the best point without it
                continue
            # The bound allows no rise, so this is rounding error: the last iterate is the best that this dtype gives.
            converged, reason = True, "no further decrease in this precision"
            break
        previous, u, log_u = log_u, new, log_new.clamp_min_(LOG_FLOOR)
        energies.append(new_energy)
        age += 1
        if change < stopping.tolerance:
            converged, reason = True, f"relative energy change {change:.1e} below {stopping.tolerance:.1e}"
            break
        tau *= 1.2
    return Solution(u, log_u, psi, energies, residual, converged, reason)
