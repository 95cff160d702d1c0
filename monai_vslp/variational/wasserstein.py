"""Wasserstein distances between points of the simplex."""

from __future__ import annotations

import math
import warnings

import torch
from monai.utils import optional_import

from monai_vslp.utils.errors import InputError

linprog, _ = optional_import("scipy.optimize", name="linprog")

__all__ = ["entropic_conjugate", "entropic_wasserstein", "ground_metric", "line_positions", "simplex_wasserstein"]

EXACT_PAIRS = 1024  # a linear program takes 1 to 3 ms
CHUNK = 2**20  # numbers in each [pairs, C, C] array: 8 MiB
FLOOR = 1e-9  # smallest share of a class in the entropic distance, whose gradient is -inf at 0


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
    try:
        g = torch.as_tensor(metric, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"the ground metric is 'discrete', 'ordinal' or a matrix of numbers, got {metric!r}.") from error
    if g.shape != (classes, classes):
        raise InputError(f"the ground metric of {classes} classes has shape [{classes}, {classes}], got {list(g.shape)}.")
    if not bool(torch.isfinite(g).all()) or float(g.min()) < 0:
        raise InputError(f"the ground metric must be finite and not negative, got {g.tolist()}.")
    if bool(g.diagonal().any()):
        raise InputError(f"the ground metric must be 0 between a class and itself, got a diagonal {g.diagonal().tolist()}.")
    if not torch.allclose(g, g.T, atol=1e-9):
        i, j = divmod(int((g - g.T).abs().argmax()), classes)
        raise InputError(
            f"the ground metric must be symmetric, got {float(g[i, j]):.4g} from {i} to {j} and {float(g[j, i]):.4g} back."
        )
    shortcut = (g[:, :, None] + g[None, :, :]).amin(dim=1)
    if bool((shortcut < g - 1e-9).any()):
        i, j = torch.nonzero(shortcut < g - 1e-9)[0].tolist()
        raise InputError(
            f"the ground metric violates the triangle inequality: from class {i} to {j} costs {float(g[i, j]):.4g}, a way "
            f"through another class only {float(shortcut[i, j]):.4g}; lower the first to the second."
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

    It lies below the exact distance, by at most :math:`\eta\log C`; for :math:`m = p` it is negative.

    Args:
        m, p: shape ``[C]``, float64, sum 1. Classes with :math:`m_i = 0` get ψ = −inf.
        metric: G, shape ``[C, C]``.
        eta: :math:`\eta > 0`; at least a thousandth of the largest entry of G.
        tolerance: of the marginals, in the 1-norm.

    Returns:
        The value, and the potential ψ, which is its gradient in m up to a constant (mean 0 over the classes that occur).

    Raises:
        InputError: a smoothing that is not positive.
    """
    occurs = m > 0
    psi = _potentials(m[None, occurs], p[None], metric[occurs], eta, tolerance)[0]
    psi = psi - psi.mean()
    value = float(torch.dot(psi, m[occurs]) - entropic_conjugate(psi, p, metric[occurs], eta)[0])
    potential = torch.full_like(m, -math.inf)
    potential[occurs] = psi
    return value, potential


def _potentials(
    m: torch.Tensor, p: torch.Tensor, metric: torch.Tensor, eta: float, tolerance: float, max_iterations: int = 1000
) -> torch.Tensor:
    r"""Maximisers ψ of :math:`\langle\psi, m\rangle - W_{G,\eta}^*(\psi)` for many pairs of histograms.

    Newton's method with steps :math:`t = \log(1 + d)/d`, where d is the range of the Newton step in units of η. The third
    derivatives of :math:`W^*` are bounded by d times the second ones, so that such a step ascends from any start, without a
    line search.

    Args:
        m: shape ``[N, K]``, positive, for the K classes that may occur.
        p: shape ``[N, C]``.
        metric: shape ``[K, C]``.
        eta: :math:`\eta > 0`.
        tolerance: of the marginals, in the 1-norm.
        max_iterations: Newton steps.

    Returns:
        ψ, shape ``[N, K]``.

    Source:
        T. Sun and Q. Tran-Dinh, "Generalized self-concordant functions: a recipe for Newton-type methods", Math. Prog. 2019.
    """
    if not eta > 0:
        raise InputError(f"the entropic Wasserstein distance needs a smoothing eta > 0, got {eta}.")
    psi = torch.zeros_like(m)
    todo = torch.arange(len(m), device=m.device)
    ridge = 1e-15 * torch.eye(m.shape[1], dtype=m.dtype, device=m.device)
    for _ in range(max_iterations):
        share = torch.softmax((psi[todo][:, :, None] - metric) / eta, dim=1)
        plan = share * p[todo][:, None]
        marginal = plan.sum(dim=2)
        gradient = m[todo] - marginal
        far = gradient.abs().sum(dim=1) > tolerance
        if not bool(far.any()):
            return psi
        todo, gradient, share, plan = todo[far], gradient[far], share[far], plan[far]
        # The Hessian from its off-diagonal entries, all of one sign: no digits are lost where classes hardly exchange mass.
        mixed = plan @ share.transpose(1, 2)
        mixed.diagonal(dim1=1, dim2=2).zero_()
        hessian = torch.diag_embed(mixed.sum(dim=2)) - mixed + ridge
        # ψ is free up to a constant: the rank-one term removes exactly that direction.
        hessian += marginal[far].amax(dim=1)[:, None, None] / m.shape[1]
        step = torch.linalg.solve(hessian, gradient)
        reach = (step.amax(dim=1) - step.amin(dim=1)).clamp_min(1e-12)
        psi[todo] += eta * (torch.log1p(reach) / reach)[:, None] * step
    warnings.warn(
        f"{len(todo)} of {len(m)} entropic Wasserstein distances did not converge in {max_iterations} steps; "
        f"eta = {eta:.3g} is small against the metric: use a larger one.",
        stacklevel=3,
    )
    return psi


def simplex_wasserstein(
    u: torch.Tensor, q: torch.Tensor, metric: torch.Tensor, smooth: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Wasserstein distance between histograms over the classes, for many pairs, with its gradient in the first.

    .. math::
        W_G(u, q) = \begin{cases}
            \tfrac12\sum_k\varphi(u_k - q_k) & G = 1 - I\\
            \sum_k (x_{k+1} - x_k)\,\varphi\bigl(\sum_{l\le k}(u_l - q_l)\bigr) & G_{ij} = |x_i - x_j|, \; x \text{ sorted}
        \end{cases}

    with :math:`\varphi(t) = |t|`, exact, or for ``smooth`` = γ > 0 Huber's function :math:`t^2/2\gamma` for
    :math:`|t|\le\gamma`, :math:`|t| - \gamma/2` beyond, so that gradient methods work.

    For any other metric ``smooth`` = 0 gives the exact distance too, by a linear program per pair, for at most 1024 pairs;
    ``smooth`` > 0 gives the entropic distance of :func:`entropic_wasserstein` with :math:`\eta` = ``smooth``, for any number
    of pairs, in chunks of bounded memory. That one lies below the exact one by at most :math:`\eta\log C` and is negative,
    not 0, where :math:`u = q`.

    Args:
        u, q: shape ``[C, ...]``, same dtype.
        metric: G, shape ``[C, C]``.
        smooth: width of the smoothing, in units of ``u`` (closed forms) or of the metric (others).

    Returns:
        Distances, shape ``[...]``, and gradients, shape ``[C, ...]``, with mean 0 over the classes (on the simplex a gradient
        is defined up to a constant). Where the distance has a kink they are one of its subgradients.

    Raises:
        InputError: shapes that do not fit, or more pairs than are solved exactly for a metric without closed form.
    """
    if u.shape != q.shape or len(u) != len(metric):
        raise InputError(
            f"simplex_wasserstein: histograms have one shape [C, ...] with C = {len(metric)} as the metric, "
            f"got {list(u.shape)} and {list(q.shape)}."
        )
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
    pairs = u.reshape(classes, -1).T.double(), q.reshape(classes, -1).T.double()
    if smooth > 0:
        value, gradient = _entropic(*pairs, g.to(u.device), smooth)
    elif len(pairs[0]) > EXACT_PAIRS:
        raise InputError(
            f"this ground metric has no closed form and {len(pairs[0])} pairs are more than the {EXACT_PAIRS} that are solved "
            "exactly; give a positive smoothing (0.05 of its largest entry suits)."
        )
    else:
        value, gradient = _exact(*pairs, g)
    return value.to(u).view(u.shape[1:]), (gradient - gradient.mean(dim=1, keepdim=True)).T.to(u).view(u.shape)


def _absolute(t: torch.Tensor, smooth: float) -> tuple[torch.Tensor, torch.Tensor]:
    """|t| and its sign, or Huber's function and its slope."""
    if smooth <= 0:
        return t.abs(), t.sign()
    inner = t.abs() <= smooth
    return torch.where(inner, t.square() / (2 * smooth), t.abs() - 0.5 * smooth), (t / smooth).clamp(-1, 1)


def _entropic(u: torch.Tensor, q: torch.Tensor, g: torch.Tensor, eta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropic distances ``[N]`` and potentials ``[N, C]`` of histograms ``[N, C]``, float64, chunk by chunk."""
    value, psi = torch.empty(len(u), dtype=u.dtype, device=u.device), torch.empty_like(u)
    chunk = max(1, CHUNK // g.numel())
    for start in range(0, len(u), chunk):
        part = slice(start, start + chunk)
        m, p = u[part].clamp_min(FLOOR), q[part].clamp_min(0)
        m, p = m / m.sum(dim=1, keepdim=True), p / p.sum(dim=1, keepdim=True)
        psi[part] = _potentials(m, p, g, eta, 1e-3 * FLOOR)
        conjugate = eta * (p * torch.logsumexp((psi[part][:, :, None] - g) / eta, dim=1)).sum(dim=1)
        value[part] = (psi[part] * m).sum(dim=1) - conjugate
    return value, psi


def _exact(u: torch.Tensor, q: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Distances and potentials by the dual linear program: max ⟨f, u − q⟩ over :math:`f_i - f_j \le G_{ij}`."""
    classes = len(g)
    i, j = torch.nonzero(~torch.eye(classes, dtype=torch.bool), as_tuple=True)
    difference = torch.zeros(len(i), classes, dtype=torch.float64)
    difference[torch.arange(len(i)), i] = 1.0
    difference[torch.arange(len(i)), j] = -1.0
    limit = g[i, j].cpu().numpy()
    # The constant that f is free up to is fixed by its first entry; for the sum of u − q to be 0 rounding is taken out.
    bounds = [(0.0, 0.0)] + [(None, None)] * (classes - 1)
    surplus = (u - q - (u - q).mean(dim=1, keepdim=True)).cpu()
    f = torch.zeros_like(surplus)
    for index, row in enumerate(surplus):
        f[index] = torch.from_numpy(linprog(-row.numpy(), A_ub=difference.numpy(), b_ub=limit, bounds=bounds, method="highs").x)
    return (f * surplus).sum(dim=1).to(u.device), f.to(u.device)
