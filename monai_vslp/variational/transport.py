"""Transport between pixels and classes: the entropic semi-dual and its damped Newton method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from monai_vslp.variational.marginal import Interval, KullbackLeibler, Marginal

__all__ = ["PixelSums", "TransportResult", "maximize_dual", "pixel_sums", "solve_transport", "transport_plan"]

# Columns per chunk and thread: C x 32768 float32 values stay in a core's cache between the handful of operations of one pass.
CHUNK = 32768
STEP_LIMIT = 10.0  # largest Newton step, in units of the smoothing h


@dataclass(frozen=True)
class TransportResult:
    r"""Maximiser of the semi-dual.

    Attributes:
        psi: class potentials ψ, shape ``[C]``, float64; −inf for classes without proportion. Where the marginal term leaves
            them free up to a constant it is fixed by :math:`\sum_k \bar u_k \psi_k = 0`.
        marginal: :math:`\bar u(\psi)`, shape ``[C]``, float64.
        residual: how far the optimality conditions of ψ are from being met, in the 1-norm; with a hard marginal
            :math:`\lVert\bar u - p\rVert_1`.
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
class PixelSums:
    """The C + C² + 1 numbers that one pass over pixels yields; those of parts of a map add up to those of the map.

    Attributes:
        value: Σ aᵢ hᵢ log Σₖ exp((Zᵢₖ + ψₖ)/hᵢ).
        marginal: its gradient Σ aᵢ uᵢ, shape ``[C]``, float64.
        curvature: its Hessian Σ aᵢ (diag uᵢ − uᵢ uᵢᵀ)/hᵢ, shape ``[C, C]``, float64.
    """

    value: float
    marginal: torch.Tensor
    curvature: torch.Tensor

    def __add__(self, other: PixelSums) -> PixelSums:
        return PixelSums(self.value + other.value, self.marginal + other.marginal, self.curvature + other.curvature)

    def __reduce__(self) -> tuple:
        # Workers send one of these per window: as arrays they are pickled many times faster than as tensors.
        return _unpickled_sums, (self.value, self.marginal.numpy(), self.curvature.numpy())


def _unpickled_sums(value: float, marginal: np.ndarray, curvature: np.ndarray) -> PixelSums:
    return PixelSums(value, torch.from_numpy(marginal), torch.from_numpy(curvature))


def pixel_sums(
    scores: torch.Tensor,
    mass: torch.Tensor,
    psi: torch.Tensor,
    rate: float | torch.Tensor,
    *,
    scale: float = 1.0,
    factor: float = 1.0,
) -> PixelSums:
    r"""One pass over pixels: float64 sums of chunks in the dtype of ``scores``.

    The segmentation is :math:`u_i = \operatorname{softmax}((s Z_i + r_i\psi)/f)`, that of smoothing :math:`h_i = f/r_i`.

    Args:
        scores: Z, shape ``[C, N]``.
        mass: a, shape ``[N]``.
        psi: ψ, shape ``[C]``, float64.
        rate: r, a number or one per pixel, shape ``[N]``.
        scale: s; 1 for scores that are divided by the smoothing already.
        factor: f.
    """
    classes, pixels = scores.shape
    shift = psi.to(scores)[:, None]
    uniform = not isinstance(rate, torch.Tensor)
    value = 0.0
    marginal = torch.zeros(classes, dtype=torch.float64, device=scores.device)
    second = torch.zeros(classes, classes, dtype=torch.float64, device=scores.device)
    chunk = pixels if scores.is_cuda else CHUNK * torch.get_num_threads()
    for start in range(0, pixels, max(chunk, 1)):
        part = slice(start, start + chunk)
        a = mass[part]
        if uniform:
            x = torch.add(shift * (rate / factor), scores[:, part], alpha=scale / factor)
        else:
            x = torch.addcmul(scores[:, part], shift, rate[part])
            if factor != 1.0:
                x.div_(factor)
        top = x.amax(dim=0)
        x.sub_(top).exp_()
        norm = x.sum(dim=0)
        top.add_(norm.log())
        x.div_(norm)
        weighted = x * a
        marginal += weighted.sum(dim=1)
        if uniform:
            value += torch.dot(top, a).item() / rate
            second += (weighted @ x.T).double() * rate
        else:
            value += torch.dot(top.div_(rate[part]), a).item()
            second += (weighted.mul_(rate[part]) @ x.T).double()
    # As the classes of a pixel add up to 1, the rows of the second moments add up to the diagonal.
    curvature = (torch.diag(second.sum(dim=1)) - second) / factor
    return PixelSums(value * factor, marginal.cpu(), curvature.cpu())


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
    log_u = torch.log_softmax((scores + psi.to(scores)[:, None]).div_(smoothing), dim=0)
    return log_u.exp(), log_u


def solve_transport(
    scores: torch.Tensor,
    mass: torch.Tensor,
    proportions: torch.Tensor | Marginal,
    *,
    smoothing: float,
    trust: float = math.inf,
    psi: torch.Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
) -> TransportResult:
    r"""Maximise the concave semi-dual of transport between pixels and classes.

    .. math::
        F(\psi) = \Phi_*(\psi) - h \sum_i a_i \log\sum_k e^{(Z_{ik} + \psi_k)/h},
        \qquad u_i = \operatorname{softmax}((Z_i + \psi)/h),

    where the marginal term gives :math:`\Phi_*(\psi) = -\rho \sum_k p_k(e^{-\psi_k/\rho} - 1)` for proportions that are
    trusted with ρ, :math:`\langle p, \psi\rangle` for :math:`\rho = \infty` (hard marginal), and others for intervals and
    ground metrics (:mod:`monai_vslp.variational.marginal`). The maximiser gives the minimiser over simplex-valued
    :math:`u`, with :math:`\bar u = \sum_i a_i u_i`, of

    .. math:: \sum_i a_i(-\langle Z_i,u_i\rangle + h\langle u_i,\log u_i\rangle) + \Phi(\bar u).

    Newton's method on C unknowns, damped by a line search on :math:`F`; for intervals each step solves its quadratic
    model together with the part that is linear on either side of 0. Where a Newton step fails, one that always ascends is
    taken (Sinkhorn's, or a proximal gradient step). Where that stalls too (flat :math:`F` at small :math:`h`) the problem is
    first solved with four times the smoothing. Each pass over the pixels adds up C + C² + 1 numbers only.

    Args:
        scores: :math:`Z`, shape ``[C, N]``, float32 or float64; no unit (negative log probabilities). −inf rules a class
            out at a pixel; each pixel needs a class with a finite score.
        mass: :math:`a \ge 0`, shape ``[N]``, sums to 1, same dtype.
        proportions: :math:`p`, shape ``[C]``, sums to 1, or a marginal term. Classes with :math:`p_k = 0` get no mass.
        smoothing: :math:`h > 0`.
        trust: :math:`\rho`, in (0, ∞]; only for proportions given as a tensor.
        psi: start, shape ``[C]``; zeros by default.
        tolerance: stop when the residual is below it.
        max_iterations: limit of Newton steps.

    Returns:
        The potentials with marginal, residual and status.

    Source:
        The semi-dual view follows M. Cuturi and G. Peyré, "Semidual regularized optimal transport", SIAM Review 2018;
        the KL relaxation L. Chizat et al., "Scaling algorithms for unbalanced optimal transport", Math. Comp. 2018.
    """
    marginal = marginal_term(proportions, trust) if isinstance(proportions, torch.Tensor) else proportions
    active = marginal.active.to(scores.device)
    z = scores if bool(active.all()) else scores[active]

    def sums(point: torch.Tensor, factor: float) -> PixelSums:
        return pixel_sums(z, mass, point, 1.0 / smoothing, scale=1.0 / smoothing, factor=factor)

    spread = 4.0 * float(z.max() - z.clamp_min(-1e4).min()) / smoothing if z.numel() else 0.0
    return maximize_dual(
        sums,
        marginal,
        smoothing=smoothing,
        psi=psi,
        tolerance=tolerance,
        max_iterations=max_iterations,
        continuation=spread,
    )


def marginal_term(proportions: torch.Tensor, trust: float) -> Marginal:
    """The term that proportions with a trust stand for: a constraint for ρ = ∞."""
    p = proportions.detach().to("cpu", torch.float64)
    return Interval.constraint(p) if math.isinf(trust) else KullbackLeibler(p, trust)


def maximize_dual(
    sums: Callable[[torch.Tensor, float], PixelSums],
    marginal: Marginal,
    *,
    smoothing: float,
    psi: torch.Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
    continuation: float = 0.0,
) -> TransportResult:
    """Maximise the semi-dual where a function adds up the pixels: in memory, by tiles from disk, or over workers.

    Args:
        sums: gives the sums over all pixels and the *active* classes for ``(psi, factor)``, with every h multiplied by the
            factor; ``psi`` is float64 on the CPU.
        marginal: term on the proportions.
        smoothing: a typical h, the scale of a sensible step.
        psi, tolerance, max_iterations: see :func:`solve_transport`.
        continuation: largest factor that is gone up to when Newton's method fails; 0 for no continuation.

    Returns:
        As :func:`solve_transport`.
    """
    active = marginal.active
    term = marginal if bool(active.all()) else marginal.restricted()
    count = int(active.sum())
    start = torch.zeros(count, dtype=torch.float64)
    if psi is not None:
        start = torch.nan_to_num(psi.detach().to("cpu", torch.float64)[active], nan=0.0, posinf=0.0, neginf=0.0)
    result = _newton(sums, term, smoothing, 1.0, start, tolerance, max_iterations)
    highest = 1.0
    # A residual of this size is a stall, not the rounding error of sums.
    while result.residual > 100.0 * tolerance and highest < continuation:
        highest *= 4.0
        point, factor = result.psi, highest
        while factor >= 1.0:
            result = _newton(sums, term, smoothing, factor, point, tolerance, max_iterations)
            point, factor = result.psi, factor / 4.0
    found = result.psi
    if term.shift_invariant:
        found = found - torch.dot(result.marginal, found) / result.marginal.sum()
    potentials = torch.full((len(active),), -math.inf, dtype=torch.float64)
    potentials[active] = found
    full = torch.zeros(len(active), dtype=torch.float64)
    full[active] = result.marginal
    return replace(result, psi=potentials, marginal=full)


@dataclass(frozen=True)
class _Point:
    """Value, derivatives and optimality of F at ψ; ``smooth`` leaves out the part that is linear on either side of 0."""

    psi: torch.Tensor
    value: float
    smooth: torch.Tensor
    hessian: torch.Tensor
    residual: float
    sums: PixelSums


def _newton(
    sums: Callable[[torch.Tensor, float], PixelSums],
    term: Marginal,
    smoothing: float,
    factor: float,
    start: torch.Tensor,
    tolerance: float,
    max_iterations: int,
) -> TransportResult:
    """Damped (proximal) Newton ascent from ``start``, over active classes, with every h multiplied by ``factor``."""
    smoothing = smoothing * factor
    lower, upper = term.lower, term.upper
    kinked = lower is not None and not term.shift_invariant
    ridge = 1e-12 * torch.eye(len(start), dtype=torch.float64)

    def evaluate(psi: torch.Tensor) -> _Point:
        found = sums(psi, factor)
        value, target, curvature = term.dual(psi)
        smooth = target - found.marginal
        if lower is not None:
            value += float(torch.dot(lower, psi.clamp_min(0)) + torch.dot(upper, psi.clamp_max(0)))
        hessian = found.curvature + curvature
        if term.shift_invariant:
            # ψ is free up to a constant: the rank-one term removes exactly that direction.
            hessian = hessian + torch.ones_like(hessian) / len(start)
        if lower is None:
            gap = smooth
        elif kinked:
            above, below = (lower + smooth).clamp_min(0), (upper + smooth).clamp_max(0)
            gap = torch.where(psi > 0, lower + smooth, torch.where(psi < 0, upper + smooth, above + below))
        else:
            gap = smooth + lower
        residual = float(gap.abs().sum())
        return _Point(psi, value - found.value, smooth, hessian, residual, found)

    point = evaluate(start)
    passes, iterations = 1, 0
    while point.residual > tolerance and iterations < max_iterations:
        iterations += 1
        if kinked:
            damping = min(1e-3, point.residual) * float(torch.diag(point.hessian).mean())
            step = _kinked_step(point, lower, upper, damping)
        else:
            gradient = point.smooth if lower is None else point.smooth + lower
            step = torch.linalg.solve(point.hessian + ridge, gradient)
        # Softmax changes on the scale of h: what the quadratic model says much further out means nothing.
        step = step * min(1.0, STEP_LIMIT * smoothing / max(float(step.abs().max()), 1e-300))
        slope = float(torch.dot(point.smooth, step))
        if lower is not None:
            ahead = point.psi + step
            slope += float(torch.dot(lower, ahead.clamp_min(0) - point.psi.clamp_min(0)))
            slope += float(torch.dot(upper, ahead.clamp_max(0) - point.psi.clamp_max(0)))
        accepted = None
        if math.isfinite(slope) and slope > 0:
            length = 1.0
            for _ in range(8):
                trial = evaluate(point.psi + length * step)
                passes += 1
                # Close to the maximum F changes by less than its rounding error, the residual still tells.
                if trial.value >= point.value + 1e-4 * length * slope or trial.residual < 0.5 * point.residual:
                    accepted = trial
                    break
                length *= 0.25
        if accepted is None:
            accepted = evaluate(_ascending_step(point, term, smoothing))
            passes += 1
            if accepted.residual >= point.residual and accepted.value <= point.value:
                break  # neither step improves: rounding error is reached
        point = accepted
    return TransportResult(
        point.psi, point.sums.marginal, point.residual, point.value, iterations, passes,
        point.residual <= tolerance,
    )  # fmt: skip


def _ascending_step(point: _Point, term: Marginal, smoothing: float) -> torch.Tensor:
    """A step along which F never falls: Sinkhorn's for proportions, a proximal gradient step for any other term."""
    if isinstance(term, KullbackLeibler) or (isinstance(term, Interval) and term.fixed):
        p = term.p if isinstance(term, KullbackLeibler) else term.lower
        moved = point.psi + smoothing * (p.log() - point.sums.marginal.clamp_min(1e-300).log())
        return moved * (term.trust / (term.trust + smoothing)) if isinstance(term, KullbackLeibler) else moved
    # The Hessian of F is at most its Gershgorin bound, so this step length ascends.
    length = 1.0 / max(float(point.hessian.abs().sum(dim=1).max()), 1.0 / smoothing)
    moved = point.psi + length * point.smooth
    if term.lower is None:
        return moved
    up, down = moved + length * term.lower, moved + length * term.upper
    return torch.where(up > 0, up, torch.where(down < 0, down, torch.zeros_like(moved)))


def _kinked_step(point: _Point, lower: torch.Tensor, upper: torch.Tensor, damping: float) -> torch.Tensor:
    """Maximise the quadratic model plus the piecewise linear part by coordinate ascent, which is exact in each class."""
    psi, gradient = point.psi.numpy(), point.smooth.numpy()
    hessian = point.hessian.numpy() + (damping + 1e-14) * np.eye(len(psi))
    low, high, scale = lower.numpy(), upper.numpy(), np.diag(hessian)
    new, pull = psi.copy(), gradient.copy()  # pull: gradient of the quadratic model at the new point
    for _ in range(1000):
        largest = 0.0
        for k in range(len(new)):
            centre = new[k] + pull[k] / scale[k]
            up, down = centre + low[k] / scale[k], centre + high[k] / scale[k]
            value = up if up > 0 else down if down < 0 else 0.0
            change = value - new[k]
            if change:
                pull -= hessian[:, k] * change
                new[k] = value
                largest = max(largest, abs(change))
        if largest <= 1e-13 * max(1.0, float(np.abs(new).max())):
            break
    return torch.from_numpy(new - psi)
