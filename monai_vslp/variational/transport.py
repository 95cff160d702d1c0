"""Transport between pixels and classes: the entropic semi-dual and its damped Newton method."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

__all__ = ["TransportResult", "solve_transport", "transport_plan"]

# Columns per chunk: C x 32768 float32 values stay in a core's cache between the handful of operations of one pass.
CHUNK = 32768
STEP_LIMIT = 10.0  # largest Newton step, in units of the smoothing h


@dataclass(frozen=True)
class TransportResult:
    r"""Maximiser of the semi-dual.

    Attributes:
        psi: class potentials ψ, shape ``[C]``, float64; −inf for classes without proportion. With a hard marginal they
            are defined up to a constant, fixed by :math:`\sum_k p_k \psi_k = 0`.
        marginal: :math:`\bar u(\psi)`, shape ``[C]``, float64.
        residual: :math:`\lVert\nabla F\rVert_1`; with a hard marginal :math:`\lVert\bar u - p\rVert_1`.
        value: the dual value :math:`F(\psi)`.
        iterations: Newton steps taken.
        passes: passes over the pixels (line search included).
        converged: whether ``residual`` reached the tolerance.
    """

    psi: torch.Tensor
    marginal: torch.Tensor
    residual: float
    value: float
    iterations: int
    passes: int
    converged: bool


@dataclass(frozen=True)
class _Sums:
    """The C + C² + 1 numbers that one pass over the pixels yields."""

    logsumexp: float
    marginal: torch.Tensor
    second: torch.Tensor


def _one_pass(scores: torch.Tensor, mass: torch.Tensor, psi: torch.Tensor, smoothing: float) -> _Sums:
    """Sum over pixels what value, gradient and Hessian need; float64 sums of chunks in the dtype of ``scores``."""
    classes, pixels = scores.shape
    shift = (psi / smoothing).to(scores.dtype)[:, None]
    total = 0.0
    marginal = torch.zeros(classes, dtype=torch.float64, device=scores.device)
    second = torch.zeros(classes, classes, dtype=torch.float64, device=scores.device)
    for start in range(0, pixels, CHUNK):
        x = torch.add(shift, scores[:, start : start + CHUNK], alpha=1.0 / smoothing)
        a = mass[start : start + CHUNK]
        top = x.amax(dim=0)
        x.sub_(top).exp_()
        norm = x.sum(dim=0)
        top.add_(norm.log())
        x.div_(norm)
        weighted = x * a
        total += torch.dot(top, a).item()
        marginal += weighted.sum(dim=1)
        second += (weighted @ x.T).double()
    return _Sums(total, marginal, second)


def transport_plan(scores: torch.Tensor, psi: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Segmentation that belongs to potentials: :math:`u_i = \operatorname{softmax}((Z_i + \psi)/h)`.

    Args:
        scores: :math:`Z`, shape ``[C, N]``.
        psi: shape ``[C]``; −inf switches a class off.
        smoothing: :math:`h > 0`.

    Returns:
        ``u`` and ``log u``, both of shape ``[C, N]`` and the dtype of ``scores``. A class that is switched off has
        ``u = 0`` and ``log u = −inf``.
    """
    log_u = torch.log_softmax((scores + psi.to(scores.dtype)[:, None]).div_(smoothing), dim=0)
    return log_u.exp(), log_u


def solve_transport(
    scores: torch.Tensor,
    mass: torch.Tensor,
    proportions: torch.Tensor,
    *,
    smoothing: float,
    trust: float = math.inf,
    psi: torch.Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
) -> TransportResult:
    r"""Maximise the concave semi-dual of transport between pixels and classes.

    .. math::
        F(\psi) = -\rho \sum_k p_k\bigl(e^{-\psi_k/\rho} - 1\bigr)
                  - h \sum_i a_i \log\sum_k e^{(Z_{ik} + \psi_k)/h},
        \qquad u_i = \operatorname{softmax}((Z_i + \psi)/h),

    whose first term is :math:`\langle p, \psi\rangle` for :math:`\rho = \infty` (hard marginal). The maximiser gives
    the minimiser over simplex-valued :math:`u`, with :math:`\bar u = \sum_i a_i u_i`, of

    .. math:: \sum_i a_i(-\langle Z_i,u_i\rangle + h\langle u_i,\log u_i\rangle) + \rho\,\mathrm{KL}(\bar u\|p).

    Newton's method on C unknowns, damped by a line search on :math:`F`; where a Newton step fails a Sinkhorn step,
    which always ascends, is taken instead. Where that stalls too (flat :math:`F` at small :math:`h`) the problem is first
    solved with four times the smoothing. Each pass over the pixels adds up C + C² + 1 numbers only.

    Args:
        scores: :math:`Z`, shape ``[C, N]``, float32 or float64; no unit (negative log probabilities).
        mass: :math:`a \ge 0`, shape ``[N]``, sums to 1, same dtype.
        proportions: :math:`p`, shape ``[C]``, sums to 1. Classes with :math:`p_k = 0` get no mass.
        smoothing: :math:`h > 0`.
        trust: :math:`\rho`, in (0, ∞].
        psi: start, shape ``[C]``; zeros by default.
        tolerance: stop when :math:`\lVert\nabla F\rVert_1` is below it.
        max_iterations: limit of Newton steps.

    Returns:
        The potentials with marginal, residual and status.

    Source:
        The semi-dual view follows M. Cuturi and G. Peyré, "Semidual regularized optimal transport", SIAM Review 2018;
        the KL relaxation L. Chizat et al., "Scaling algorithms for unbalanced optimal transport", Math. Comp. 2018.
    """
    device = scores.device
    p_all = proportions.to(device=device, dtype=torch.float64)
    active = p_all > 0
    p = p_all[active]
    z = scores if bool(active.all()) else scores[active]
    start = torch.zeros_like(p) if psi is None else psi.to(device=device, dtype=torch.float64)[active]
    start = torch.where(torch.isfinite(start), start, torch.zeros_like(start))
    result = _newton(z, mass, p, smoothing, trust, start, tolerance, max_iterations)
    coarsest = smoothing
    while not result.converged and coarsest < 4.0 * float(z.max() - z.min()):
        coarsest *= 4.0
        point, level = result.psi, coarsest
        while level >= smoothing:
            result = _newton(z, mass, p, level, trust, point, tolerance, max_iterations)
            point, level = result.psi, level / 4.0

    potentials = torch.full_like(p_all, -math.inf)
    potentials[active] = result.psi - torch.dot(p, result.psi) if math.isinf(trust) else result.psi
    marginal = torch.zeros_like(p_all)
    marginal[active] = result.marginal
    return replace(result, psi=potentials, marginal=marginal)


def _newton(
    z: torch.Tensor,
    mass: torch.Tensor,
    p: torch.Tensor,
    smoothing: float,
    trust: float,
    start: torch.Tensor,
    tolerance: float,
    max_iterations: int,
) -> TransportResult:
    """Damped Newton ascent of :func:`solve_transport` from ``start``, over classes of positive proportion."""
    hard = math.isinf(trust)
    current = start

    def evaluate(point: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
        sums = _one_pass(z, mass, point, smoothing)
        target = p if hard else p * torch.exp(-point / trust)
        first = torch.dot(p, point) if hard else trust * (p - target).sum()
        value = float(first) - smoothing * sums.logsumexp
        hessian = (torch.diag(sums.marginal) - sums.second) / smoothing
        # A hard marginal leaves ψ free up to a constant: the rank-one term removes exactly that direction.
        hessian = hessian + (torch.ones_like(hessian) / len(p) if hard else torch.diag(target) / trust)
        return value, target - sums.marginal, hessian, sums.marginal

    value, gradient, hessian, marginal = evaluate(current)
    passes, iterations = 1, 0
    residual = float(gradient.abs().sum())
    while residual > tolerance and iterations < max_iterations:
        iterations += 1
        ridge = 1e-12 * torch.eye(len(p), dtype=torch.float64, device=z.device)
        direction = torch.linalg.solve(hessian + ridge, gradient)
        # Softmax changes on the scale of h: what the quadratic model says much further out means nothing.
        direction = direction * min(1.0, STEP_LIMIT * smoothing / max(float(direction.abs().max()), 1e-300))
        slope = float(torch.dot(gradient, direction))
        accepted = None
        if math.isfinite(slope) and slope > 0:
            length = 1.0
            for _ in range(8):
                trial = current + length * direction
                outcome = evaluate(trial)
                passes += 1
                # Close to the maximum F changes by less than its rounding error, the residual still tells.
                ascends = outcome[0] >= value + 1e-4 * length * slope
                if ascends or float(outcome[1].abs().sum()) < 0.5 * residual:
                    accepted = (trial, outcome)
                    break
                length *= 0.25
        if accepted is None:
            step = smoothing * (p.log() - marginal.clamp_min(1e-300).log())
            trial = current + step if hard else (current + step) * (trust / (trust + smoothing))
            accepted = (trial, evaluate(trial))
            passes += 1
            if float(accepted[1][1].abs().sum()) >= residual and accepted[1][0] <= value:
                break  # neither step improves: rounding error is reached
        current, (value, gradient, hessian, marginal) = accepted
        residual = float(gradient.abs().sum())

    return TransportResult(current, marginal, residual, value, iterations, passes, residual <= tolerance)
