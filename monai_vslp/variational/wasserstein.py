"""Wasserstein distances between points of the simplex."""

from __future__ import annotations

import math

import torch

from monai_vslp.utils.errors import InputError

__all__ = ["entropic_conjugate", "entropic_wasserstein", "ground_metric", "line_positions", "simplex_wasserstein"]


def ground_metric(metric: str | torch.Tensor, classes: int) -> torch.Tensor:
    r"""Ground metric between classes.

    Args:
        metric: ``discrete`` (:math:`1 - I`: all classes are equally far apart), ``ordinal``
            (:math:`|i - j|/(C - 1)`: classes are grades), or a matrix ``[C, C]``.
        classes: C.

    Returns:
        G, shape ``[C, C]``, float64.

    Raises:
        InputError: an unknown name, or a matrix that is not a metric; says which axiom fails.
    """
    if isinstance(metric, str):
        if metric == "discrete":
            return 1.0 - torch.eye(classes, dtype=torch.float64)
        if metric == "ordinal":
            grade = torch.arange(classes, dtype=torch.float64) / max(classes - 1, 1)
            return (grade[:, None] - grade[None, :]).abs()
        raise InputError(f"the ground metric is 'discrete', 'ordinal' or a matrix, got {metric!r}.")
    g = torch.as_tensor(metric, dtype=torch.float64)
    if g.shape != (classes, classes):
        raise InputError(f"the ground metric of {classes} classes has shape [{classes}, {classes}], got {list(g.shape)}.")
    if not bool(torch.isfinite(g).all()) or float(g.min()) < 0:
        raise InputError("the ground metric must be finite and not negative.")
    if bool(g.diagonal().any()):
        raise InputError(f"the ground metric must be 0 between a class and itself, got a diagonal {g.diagonal().tolist()}.")
    if not torch.allclose(g, g.T, atol=1e-9):
        raise InputError("the ground metric must be symmetric.")
    shortcut = (g[:, :, None] + g[None, :, :]).amin(dim=1)
    if bool((shortcut < g - 1e-9).any()):
        i, j = torch.nonzero(shortcut < g - 1e-9)[0].tolist()
        raise InputError(
            f"the ground metric violates the triangle inequality: from class {i} to {j} costs {float(g[i, j]):.4g}, a way "
            f"through another class only {float(shortcut[i, j]):.4g}."
        )
    return g


def line_positions(g: torch.Tensor) -> torch.Tensor | None:
    """Positions x with :math:`G_{ij} = |x_i - x_j|`, shape ``[C]``; None where the classes do not lie on a line."""
    if len(g) == 1:
        return torch.zeros(1, dtype=g.dtype)
    end = int(g[0].argmax())
    x = g[end]
    return x if torch.allclose((x[:, None] - x[None, :]).abs(), g, atol=1e-9) else None


def entropic_conjugate(
    psi: torch.Tensor, p: torch.Tensor, metric: torch.Tensor, eta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""Legendre transform of the entropic Wasserstein distance in its first argument.

    .. math::
        W_{G,\eta}^*(\psi) = \sup_m \langle\psi, m\rangle - W_{G,\eta}(m, p)
            = \eta\sum_j p_j\log\sum_i e^{(\psi_i - G_{ij})/\eta}

    with the cost of :func:`entropic_wasserstein`.

    Args:
        psi: shape ``[C]``, float64.
        p: shape ``[C]``, sums to 1.
        metric: G, shape ``[C, C]``.
        eta: :math:`\eta > 0`.

    Returns:
        Value, gradient ``[C]`` (the proportions m where the supremum is reached) and Hessian ``[C, C]``.

    Source:
        M. Cuturi and G. Peyré, "A smoothed dual approach for variational Wasserstein problems", SIAM J. Imaging Sci. 2016.
    """
    exponent = (psi[:, None] - metric) / eta
    value = eta * torch.dot(p, torch.logsumexp(exponent, dim=0))
    share = torch.softmax(exponent, dim=0)
    gradient = share @ p
    hessian = (torch.diag(gradient) - (share * p) @ share.T) / eta
    return value, gradient, hessian


def entropic_wasserstein(
    m: torch.Tensor, p: torch.Tensor, metric: torch.Tensor, eta: float, tolerance: float = 1e-12
) -> tuple[float, torch.Tensor]:
    r"""Entropic Wasserstein distance of two histograms.

    .. math::
        W_{G,\eta}(m, p) = \min_{T\ge0,\;T\mathbf 1 = m,\;T^\top\mathbf 1 = p} \langle G, T\rangle
            + \eta\sum_{ij}T_{ij}\log\frac{T_{ij}}{p_j}
            = \max_\psi \langle\psi, m\rangle - W_{G,\eta}^*(\psi)

    Args:
        m, p: shape ``[C]``, float64, sum 1. Classes with :math:`m_i = 0` get ψ = −inf.
        metric: G, shape ``[C, C]``.
        eta: :math:`\eta > 0`.
        tolerance: of the marginals, in the 1-norm.

    Returns:
        The value, and the potential ψ, which is its gradient in m up to a constant (mean 0 over the classes that occur).
    """
    occurs = m > 0
    target, g = m[occurs], metric[occurs]
    psi = torch.zeros_like(target)
    ridge = torch.ones(len(target), len(target), dtype=m.dtype) / len(target)

    def dual(point: torch.Tensor) -> float:
        return float(torch.dot(point, target) - entropic_conjugate(point, p, g, eta)[0])

    best = dual(psi)
    for _ in range(500):
        _, marginal, hessian = entropic_conjugate(psi, p, g, eta)
        gradient = target - marginal
        if float(gradient.abs().sum()) <= tolerance:
            break
        step = torch.linalg.lstsq(hessian + ridge, gradient[:, None]).solution[:, 0]
        step = step * min(1.0, 10.0 * eta / max(float(step.abs().max()), 1e-300))
        trial = dual(psi + step)
        if not trial >= best:
            # Sinkhorn's step always ascends.
            step = eta * (target.log() - marginal.clamp_min(1e-300).log())
            trial = dual(psi + step)
            if trial < best and best - trial > 1e-14:
                break
        psi, best = psi + step, trial
    potential = torch.full_like(m, -math.inf)
    potential[occurs] = psi - psi.mean()
    return best, potential


def simplex_wasserstein(
    u: torch.Tensor, q: torch.Tensor, metric: torch.Tensor, smooth: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Wasserstein distance between histograms over the classes, for many pairs, with its gradient in the first.

    .. math::
        W_G(u, q) = \begin{cases}
            \tfrac12\sum_k\varphi(u_k - q_k) & G = 1 - I\\
            \sum_k (x_{k+1} - x_k)\,\varphi\bigl(\sum_{l\le k}(u_l - q_l)\bigr) & G_{ij} = |x_i - x_j|, \; x \text{ sorted}
        \end{cases}

    with :math:`\varphi(t) = |t|`, exact, or for ``smooth`` > 0 Huber's function of that width, so that gradient methods
    work. For any other metric the entropic distance with :math:`\eta` = ``smooth`` (which must be positive) is computed by
    Sinkhorn's algorithm in logarithms, debiased by nothing: its value lies above the exact one by at most
    :math:`\eta\log C`.

    Args:
        u, q: shape ``[C, ...]``, same dtype.
        metric: G, shape ``[C, C]``.
        smooth: width of the smoothing, in units of ``u`` (closed forms) or of the metric (others).

    Returns:
        Distances, shape ``[...]``, and gradients, shape ``[C, ...]``, with mean 0 over the classes (on the simplex a gradient
        is defined up to a constant).

    Raises:
        InputError: a metric without closed form and no smoothing.
    """
    g = metric.to(torch.float64)
    classes = len(g)
    if torch.allclose(g, g.max() * (1.0 - torch.eye(classes, dtype=g.dtype))):
        value, slope = _absolute(u - q, smooth)
        scale = 0.5 * float(g.max())
        gradient = slope * scale
        return scale * value.sum(dim=0), gradient - gradient.mean(dim=0)
    x = line_positions(g)
    if x is not None:
        order = torch.argsort(x)
        gaps = (x[order][1:] - x[order][:-1]).to(u)
        gaps = gaps.view(-1, *[1] * (u.ndim - 1))
        value, slope = _absolute((u - q)[order].cumsum(dim=0)[:-1], smooth)
        # A class adds to all cumulative sums from its own position on.
        tail = (gaps * slope).flip(0).cumsum(dim=0).flip(0)
        gradient = torch.zeros_like(u)
        gradient[order[:-1]] = tail
        return (gaps * value).sum(dim=0), gradient - gradient.mean(dim=0)
    if smooth <= 0:
        raise InputError("this ground metric has no closed form; give a positive smoothing (0.05 of its largest entry suits).")
    return _sinkhorn(u, q, g.to(u), smooth)


def _absolute(t: torch.Tensor, smooth: float) -> tuple[torch.Tensor, torch.Tensor]:
    """|t| and its sign, or Huber's function and its slope."""
    if smooth <= 0:
        return t.abs(), t.sign()
    inner = t.abs() <= smooth
    return torch.where(inner, t.square() / (2 * smooth), t.abs() - 0.5 * smooth), (t / smooth).clamp(-1, 1)


def _sinkhorn(
    u: torch.Tensor, q: torch.Tensor, g: torch.Tensor, eta: float, sweeps: int = 500, tolerance: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = u.shape
    log_u = u.reshape(shape[0], -1).clamp_min(1e-12).log()
    log_q = q.reshape(shape[0], -1).clamp_min(1e-12).log()
    kernel = -g / eta
    f = torch.zeros_like(log_u)
    for _ in range(sweeps):
        back = log_q - torch.logsumexp(kernel[:, :, None] + f[:, None, :], dim=0)
        new = log_u - torch.logsumexp(kernel[:, :, None] + back[None], dim=1)
        moved = float((new - f).abs().max())
        f = new
        if moved < tolerance:
            break
    plan = (kernel[:, :, None] + f[:, None, :] + back[None]).exp()
    cost = (plan * (g[:, :, None] + eta * (plan.clamp_min(1e-38).log() - log_q[None]))).sum(dim=(0, 1))
    gradient = eta * f
    return cost.view(shape[1:]), (gradient - gradient.mean(dim=0)).view(shape)
