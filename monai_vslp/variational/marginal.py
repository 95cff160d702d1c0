r"""Marginal terms :math:`\Phi(\bar u)`: what given proportions demand of the proportions of a segmentation.

The semi-dual of transport between pixels and classes sees a term only through

.. math:: \Phi_*(\psi) = \inf_m \; \Phi(m) + \langle m, \psi\rangle = -\Phi^*(-\psi),

a concave function of C numbers. Its maximisation needs the value, the gradient (the proportions that the term asks for at
ψ) and the curvature; intervals add a part that is linear on either side of :math:`\psi_k = 0`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from monai_vslp.utils.errors import ProportionError
from monai_vslp.utils.plugins import PluginStore
from monai_vslp.variational.wasserstein import entropic_conjugate, entropic_wasserstein, ground_metric

__all__ = [
    "MARGINALS",
    "Interval",
    "KullbackLeibler",
    "Marginal",
    "MarginalSum",
    "Wasserstein",
    "trust_from_spread",
]

MARGINALS = PluginStore("marginal terms", "What given proportions demand of a segmentation's proportions.")


class Marginal(Protocol):
    r"""A convex function Φ of proportions :math:`m \in \mathbb R^C`; tensors are float64.

    Attributes:
        active: classes that may occur, shape ``[C]``, bool.
        lower, upper: bounds, shape ``[C]``; for terms without bounds both are None.
        shift_invariant: whether :math:`\Phi_*(\psi + t) = \Phi_*(\psi) + t`, so that ψ is defined up to a constant.
    """

    active: torch.Tensor
    lower: torch.Tensor | None
    upper: torch.Tensor | None
    shift_invariant: bool

    def restricted(self) -> Marginal:
        """The same term on the active classes alone."""
        ...

    def dual(self, psi: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        r""":math:`\Phi_*(\psi)`, its gradient ``[C]`` and minus its Hessian ``[C, C]``, without the bounds."""
        ...

    def energy(self, m: torch.Tensor) -> float:
        r""":math:`\Phi(m)`; 0 for bounds, which the solver keeps."""
        ...


def _checked(p: torch.Tensor, name: str) -> torch.Tensor:
    p = torch.as_tensor(p, dtype=torch.float64)
    if p.ndim != 1 or not bool(torch.isfinite(p).all()) or float(p.min()) < 0:
        raise ProportionError(f"{name} must be finite fractions of at least 0, one per class, got {p.tolist()}.")
    return p


@MARGINALS.add_def("kl", "ρ KL(ū‖p), trust in one estimate; ρ = ∞ makes it a constraint")
@dataclass(frozen=True)
class KullbackLeibler:
    r"""Trust in an estimate.

    .. math::
        \Phi(m) = \rho\sum_k\bigl(m_k\log\tfrac{m_k}{p_k} - m_k + p_k\bigr), \qquad
        \Phi_*(\psi) = -\rho\sum_k p_k\bigl(e^{-\psi_k/\rho} - 1\bigr).

    Args:
        p: proportions, shape ``[C]``, sum 1. Classes with :math:`p_k = 0` cannot occur.
        trust: :math:`\rho` in (0, ∞); for the constraint :math:`m = p` use :class:`Interval` with equal bounds.
    """

    p: torch.Tensor
    trust: float

    lower = upper = None
    shift_invariant = False

    def __post_init__(self) -> None:
        if not 0 < self.trust < math.inf:
            raise ProportionError(f"the trust of KullbackLeibler must be positive and finite, got {self.trust}.")
        object.__setattr__(self, "p", _checked(self.p, "proportions"))

    @property
    def active(self) -> torch.Tensor:
        return self.p > 0

    def restricted(self) -> KullbackLeibler:
        return KullbackLeibler(self.p[self.active], self.trust)

    def dual(self, psi: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        target = self.p * torch.exp(-psi / self.trust)
        return float(self.trust * (self.p - target).sum()), target, torch.diag(target) / self.trust

    def energy(self, m: torch.Tensor) -> float:
        kept = m > 0
        return self.trust * float((m[kept] * (m[kept] / self.p[kept]).log()).sum() - m.sum() + self.p.sum())


@MARGINALS.add_def("interval", "lower ≤ ū ≤ upper, exactly; equal bounds are the constraint ū = p")
@dataclass(frozen=True)
class Interval:
    r"""Bounds on the proportions, such as "10 to 20 %".

    .. math::
        \Phi(m) = \begin{cases}0 & l \le m \le r\\ \infty & \text{else}\end{cases}, \qquad
        \Phi_*(\psi) = \sum_k l_k\max(\psi_k, 0) + r_k\min(\psi_k, 0).

    At the maximiser ψ of the semi-dual the conditions of Karush, Kuhn and Tucker hold: :math:`\psi_k > 0` where a class sits
    at its lower bound, :math:`\psi_k < 0` at its upper one, :math:`\psi_k = 0` between them. Bounds that the others make
    unreachable are tightened first; where no room is left the term is the constraint :math:`m = p`.

    Args:
        lower, upper: :math:`l \le r`, shape ``[C]``, with :math:`\sum l \le 1 \le \sum r`. ``upper`` 0: the class cannot occur.

    Raises:
        ProportionError: bounds that no proportions satisfy.
    """

    lower: torch.Tensor
    upper: torch.Tensor

    def __post_init__(self) -> None:
        low, high = _checked(self.lower, "lower bounds"), _checked(self.upper, "upper bounds")
        if low.shape != high.shape or bool((low > high + 1e-12).any()):
            raise ProportionError(f"each lower bound must be at most its upper bound, got {low.tolist()} and {high.tolist()}.")
        if float(low.sum()) > 1 + 1e-6 or float(high.sum()) < 1 - 1e-6:
            raise ProportionError(
                f"no proportions lie within the bounds: the lower ones add up to {float(low.sum()):.4g} (at most 1), the upper "
                f"ones to {float(high.sum()):.4g} (at least 1); widen a range."
            )
        slack_up, slack_down = (1 - low.sum()).clamp_min(0), (high.sum() - 1).clamp_min(0)
        object.__setattr__(self, "lower", torch.maximum(low, high - slack_down))
        object.__setattr__(self, "upper", torch.maximum(torch.minimum(high, low + slack_up), self.lower))

    @classmethod
    def constraint(cls, p: torch.Tensor) -> Interval:
        r"""The constraint :math:`m = p`; p is made to add up to 1 in float64."""
        p = _checked(p, "proportions")
        return cls(p / p.sum(), p / p.sum())

    @property
    def fixed(self) -> bool:
        """Whether the bounds leave a single point."""
        return bool((self.upper - self.lower).abs().max() <= 1e-12)

    @property
    def shift_invariant(self) -> bool:
        return self.fixed

    @property
    def active(self) -> torch.Tensor:
        return self.upper > 0

    def restricted(self) -> Interval:
        return Interval(self.lower[self.active], self.upper[self.active])

    def dual(self, psi: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        zeros = torch.zeros_like(psi)
        return 0.0, zeros, torch.diag(zeros)

    def energy(self, m: torch.Tensor) -> float:
        return 0.0


@MARGINALS.add_def("wasserstein", "λ W_G(ū, p): moving mass between similar classes costs less")
@dataclass(frozen=True)
class Wasserstein:
    r"""Histogram Wasserstein fidelity :math:`D_c`, entropically smoothed.

    .. math::
        \Phi(m) = \lambda\,W_{G,\eta}(m, p), \qquad
        W_{G,\eta}(m, p) = \min_{T\mathbf 1 = m,\,T^\top\mathbf 1 = p} \langle G, T\rangle
            + \eta\sum_{ij}T_{ij}\log\frac{T_{ij}}{p_j}, \qquad
        \Phi_*(\psi) = -\lambda\eta\sum_j p_j\log\sum_i e^{-(\psi_i/\lambda + G_{ij})/\eta}.

    As :math:`\eta \to 0` this is the Wasserstein distance itself. Unlike a divergence it lets a class take mass that was
    given to a similar one, at the price of the ground metric; a class with :math:`p_k = 0` may occur.

    Args:
        p: proportions, shape ``[C]``, sum 1.
        weight: :math:`\lambda > 0`.
        metric: :math:`G`, a name or a matrix, see :func:`~monai_vslp.variational.wasserstein.ground_metric`.
        smoothing: :math:`\eta > 0`, in units of the metric.
    """

    p: torch.Tensor
    weight: float = 1.0
    metric: str | torch.Tensor = "discrete"
    smoothing: float = 0.05

    lower = upper = None
    shift_invariant = True

    def __post_init__(self) -> None:
        if not (self.weight > 0 and self.smoothing > 0):
            raise ProportionError(f"weight and smoothing must be positive, got {self.weight} and {self.smoothing}.")
        object.__setattr__(self, "p", _checked(self.p, "proportions"))
        object.__setattr__(self, "metric", ground_metric(self.metric, len(self.p)).double())

    @property
    def active(self) -> torch.Tensor:
        return torch.ones(len(self.p), dtype=torch.bool)

    def restricted(self) -> Wasserstein:
        return self

    def among(self, classes: torch.Tensor) -> _WassersteinAmong:
        """The same term where some classes cannot occur: their mass goes elsewhere."""
        return _WassersteinAmong(self, classes)

    def dual(self, psi: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        value, gradient, hessian = entropic_conjugate(-psi / self.weight, self.p, self.metric, self.smoothing)
        return -self.weight * float(value), gradient, hessian / self.weight

    def energy(self, m: torch.Tensor) -> float:
        return self.weight * float(entropic_wasserstein(m / m.sum(), self.p, self.metric, self.smoothing)[0])


@dataclass(frozen=True)
class _WassersteinAmong:
    """A Wasserstein term on proportions that are 0 outside ``classes``; its arguments leave the others out."""

    term: Wasserstein
    classes: torch.Tensor

    lower = upper = None
    shift_invariant = True

    @property
    def active(self) -> torch.Tensor:
        return torch.ones(int(self.classes.sum()), dtype=torch.bool)

    def restricted(self) -> _WassersteinAmong:
        return self

    def dual(self, psi: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        full = torch.full((len(self.classes),), 1e6, dtype=torch.float64)  # a price that no class is worth
        full[self.classes] = psi
        value, gradient, curvature = self.term.dual(full)
        return value, gradient[self.classes], curvature[self.classes][:, self.classes]

    def energy(self, m: torch.Tensor) -> float:
        full = torch.zeros(len(self.classes), dtype=torch.float64)
        full[self.classes] = m
        return self.term.energy(full)


@dataclass(frozen=True)
class MarginalSum:
    r"""Sum of two terms without bounds.

    .. math:: \Phi = \Phi_1 + \Phi_2, \qquad \Phi_*(\psi) = \sup_\varphi \; \Phi_{1*}(\psi - \varphi) + \Phi_{2*}(\varphi),

    whose supremum over C numbers is found by damped Newton; the curvature is the parallel sum of the two.

    Args:
        first, second: terms, such as :class:`KullbackLeibler` and :class:`Wasserstein`, of the same classes.
    """

    first: Marginal
    second: Marginal

    lower = upper = None
    shift_invariant = False

    def __post_init__(self) -> None:
        for term in (self.first, self.second):
            if term.lower is not None:
                raise ProportionError("bounds and constraints cannot be added to other terms on the proportions.")
        if self.first.shift_invariant or self.second.shift_invariant:
            object.__setattr__(self, "shift_invariant", True)

    @property
    def active(self) -> torch.Tensor:
        return self.first.active & self.second.active

    def restricted(self) -> MarginalSum:
        if not bool(self.first.active.all()) and isinstance(self.second, Wasserstein):
            return MarginalSum(self.first.restricted(), self.second.among(self.first.active))
        return MarginalSum(self.first.restricted(), self.second.restricted())

    def dual(self, psi: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        ridge = 1e-12 * torch.eye(len(psi), dtype=torch.float64)
        phi = torch.zeros_like(psi)

        def at(point: torch.Tensor) -> tuple[float, tuple, tuple]:
            one, two = self.first.dual(psi - point), self.second.dual(point)
            return one[0] + two[0], one, two

        value, one, two = at(phi)
        for _ in range(200):
            gradient = two[1] - one[1]
            gap = float(gradient.abs().sum())
            if gap < 1e-13:
                break
            hessian = one[2] + two[2]
            # Far out a distance is flat in single classes: the damping, which vanishes with the gradient, bounds the step.
            damping = 1e-3 * min(1.0, gap) * float(hessian.diagonal().max()) * torch.eye(len(psi), dtype=torch.float64)
            step = torch.linalg.solve(hessian + damping + ridge, gradient)
            # Close to the maximum the value changes by less than its rounding error; the gradient still tells.
            unit = max(1.0, abs(value))
            length, best = 1.0, (value, one, two)
            while length > 1e-15:
                trial = at(phi + length * step)
                rise, nearer = trial[0] - value, float((trial[2][1] - trial[1][1]).abs().sum()) < 0.5 * gap
                if rise > 1e-12 * unit or (nearer and rise > -1e-9 * unit):
                    best = trial
                    break
                length *= 0.5
            if best[1] is one:
                break  # rounding error is reached
            phi = phi + length * step
            value, one, two = best
        curvature = one[2] @ torch.linalg.solve(one[2] + two[2] + ridge, two[2])
        return value, one[1], 0.5 * (curvature + curvature.T)

    def energy(self, m: torch.Tensor) -> float:
        return self.first.energy(m) + self.second.energy(m)


def trust_from_spread(proportions: torch.Tensor, spread: torch.Tensor, strength: float = 0.1) -> float:
    r"""Trust that several raters' disagreement warrants.

    .. math:: \rho = \kappa\,\frac{\sum_k p_k(1 - p_k)}{\sum_k \sigma_k^2}

    The ratio is the number of independent pixels whose proportions would scatter as the raters do (the precision of a
    Dirichlet law); κ says how many nats of the energy per pixel such an observation is worth against the map's own.

    Args:
        proportions: mean of the raters, shape ``[C]``.
        spread: their standard deviation σ per class, shape ``[C]``, fractions.
        strength: κ.

    Returns:
        ρ; ∞ where the spread is 0 (a single rater says nothing about it: give ρ by hand).
    """
    p, sigma = (torch.as_tensor(x, dtype=torch.float64) for x in (proportions, spread))
    variance = float(sigma.square().sum())
    return math.inf if variance == 0 else strength * float((p * (1 - p)).sum()) / variance
