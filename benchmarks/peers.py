r"""A generic primal–dual peer (Chambolle–Pock) for exactly the energy that ``monai_vslp.variational.refine`` minimises.

With uniform mass, and everything multiplied by the number n of pixels,

.. math::
    \min_{u_i\in\Delta_C} \sum_i \langle c_i,u_i\rangle + \varepsilon\langle u_i,\log u_i\rangle
    + \alpha \sum_i \varphi_\gamma(\lVert (Du)_i\rVert_2) \quad\text{(and } \bar u = p \text{)}
    = \min_u \max_{\lVert y_i\rVert\le\alpha,\,\psi} \dots + \langle Du, y\rangle - \tfrac{\gamma}{2\alpha}\lVert y\rVert_2^2
    - \langle\psi, n(\bar u - p)\rangle .

The primal step is proximal in Kullback–Leibler divergence, hence a softmax; both sides are strongly convex without a marginal,
which gives the linearly convergent steps of [1], and [2] for the divergence. Per pixel
:math:`\mathrm{KL}(u\|v)\ge\tfrac12\lVert u-v\rVert_1^2\ge\lVert u-v\rVert_2^2`, so that D counts with the squared norm 8 / 2
and not 8. The marginal acts on constant maps, which D annihilates: the two dual steps do not share a budget and each is as long
as it can be.

[1] A. Chambolle, T. Pock, "A first-order primal-dual algorithm for convex problems", J. Math. Imaging Vis. 2011, algorithm 3.
[2] A. Chambolle, T. Pock, "On the ergodic convergence rates of a first-order primal-dual algorithm", Math. Program. 2016.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

__all__ = ["Trace", "energy", "primal_dual"]


@dataclass(frozen=True)
class Trace:
    """Course of one run.

    Attributes:
        u: last iterate, shape ``[C, H, W]``.
        iterations: iteration counts at which it was looked at.
        seconds: time of the iterations alone up to there.
        energies: energy there, per pixel (comparable with that of ``refine``).
        residuals: ‖ū − p‖₁ there; 0 without proportions.
    """

    u: torch.Tensor
    iterations: list[int]
    seconds: list[float]
    energies: list[float]
    residuals: list[float]

    def reached(self, target: float, residual: float = math.inf) -> tuple[float, int] | None:
        """Seconds and iterations from which on the energy stays at or below ``target`` and the residual at or below its own."""
        good = [e <= target and r <= residual for e, r in zip(self.energies, self.residuals)]
        first = len(good)
        while first > 0 and good[first - 1]:
            first -= 1
        return (self.seconds[first], self.iterations[first]) if first < len(good) else None


def energy(u: torch.Tensor, cost: torch.Tensor, *, alpha: float, epsilon: float, huber: float) -> float:
    """The energy per pixel with uniform mass, without the marginal term; ``u`` and ``cost`` of shape ``[C, H, W]``."""
    data = (cost * u + epsilon * torch.xlogy(u, u)).sum(dtype=torch.float64)
    squared = torch.zeros_like(u[0])
    squared[:, :-1] += (u[:, :, 1:] - u[:, :, :-1]).square().sum(dim=0)
    squared[:-1] += (u[:, 1:] - u[:, :-1]).square().sum(dim=0)
    t = squared.sqrt()
    length = torch.where(t <= huber, squared / (2 * huber), t - huber / 2).sum(dtype=torch.float64)
    return float(data + alpha * length) / squared.numel()


def primal_dual(
    cost: torch.Tensor,
    *,
    alpha: float,
    epsilon: float,
    huber: float,
    proportions: torch.Tensor | None = None,
    iterations: int = 400,
    every: int = 10,
    ratio: float = 1.0,
    stop_at: float | None = None,
    stop_residual: float = math.inf,
) -> Trace:
    """Chambolle–Pock for the energy of the module's head.

    Args:
        cost: c, shape ``[C, H, W]``.
        alpha: strength of the regularizer, positive.
        epsilon: entropy, positive.
        huber: width of the quadratic part, positive.
        proportions: p, shape ``[C]``, for a hard marginal; None leaves it free.
        iterations: limit.
        every: look at energy and residual after so many iterations; that time is not counted.
        ratio: multiplies the primal step of the theory and divides the dual one.
        stop_at: end once the energy is at or below it (and the residual below ``stop_residual``).
        stop_residual: see ``stop_at``.
    """
    classes, height, width = cost.shape
    norm = 2.0
    speed = 2.0 * math.sqrt(epsilon * huber / alpha) / norm
    tau = ratio * speed / (2.0 * epsilon)
    sigma = 1.0 / (norm**2 * tau)
    relax = 1.0 / (1.0 + speed) if proportions is None else 1.0
    sigma_marginal = 2.0 / tau
    smoothing = epsilon + 1.0 / tau
    damping = 1.0 / (1.0 + sigma * huber / alpha)

    log_u = torch.log_softmax(-cost / epsilon, dim=0)
    u = log_u.exp()
    extrapolated = u.clone()
    across, down = torch.zeros(classes, height, width - 1), torch.zeros(classes, height - 1, width)
    squared = torch.empty(height, width)
    p = None if proportions is None else proportions.double()
    psi = torch.zeros(classes, dtype=torch.float64)
    trace = Trace(u, [], [], [], [])
    spent = 0.0
    for done in range(1, iterations + 1):
        start = time.perf_counter()
        across.add_(extrapolated[:, :, 1:], alpha=sigma).sub_(extrapolated[:, :, :-1], alpha=sigma)
        down.add_(extrapolated[:, 1:], alpha=sigma).sub_(extrapolated[:, :-1], alpha=sigma)
        squared.zero_()
        squared[:, :-1] += across.square().sum(dim=0)
        squared[:-1] += down.square().sum(dim=0)
        # Damped by the quadratic term first, then projected onto the ball of radius alpha.
        factor = damping * alpha / squared.sqrt().mul_(damping).clamp_min_(alpha)
        across.mul_(factor[:, :-1])
        down.mul_(factor[:-1])
        if p is not None:
            psi += sigma_marginal * (p - extrapolated.mean(dim=(1, 2), dtype=torch.float64))
        scores = (log_u / tau).sub_(cost)
        scores[:, :, :-1] += across
        scores[:, :, 1:] -= across
        scores[:, :-1] += down
        scores[:, 1:] -= down
        if p is not None:
            scores += psi.to(scores)[:, None, None]
        log_u = torch.log_softmax(scores.div_(smoothing), dim=0)
        new = log_u.exp()
        extrapolated = torch.lerp(u, new, 1.0 + relax)
        u = new
        spent += time.perf_counter() - start
        if done % every == 0 or done == iterations:
            value = energy(u, cost, alpha=alpha, epsilon=epsilon, huber=huber)
            residual = 0.0 if p is None else float((u.mean(dim=(1, 2), dtype=torch.float64) - p).abs().sum())
            trace.iterations.append(done)
            trace.seconds.append(spent)
            trace.energies.append(value)
            trace.residuals.append(residual)
            if stop_at is not None and value <= stop_at and residual <= stop_residual:
                break
    return Trace(u, trace.iterations, trace.seconds, trace.energies, trace.residuals)
