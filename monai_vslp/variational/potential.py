"""The algebra of the energy: what a potential is, sums of them, and where they are looked up by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from monai_vslp.utils.errors import InputError
from monai_vslp.utils.plugins import PluginStore
from monai_vslp.variational.windows import Window

__all__ = ["FIDELITIES", "REGULARIZERS", "Potential", "WeightedSum"]

FIDELITIES = PluginStore("fidelities", "How well a segmentation agrees with the confidences; potentials.")
REGULARIZERS = PluginStore("regularizers", "What makes a segmentation plausible; potentials.")


class Potential(Protocol):
    r"""A function :math:`P(u) = \sum_i a_i e_i` of a segmentation, evaluated on a whole map or on a window of it.

    ``u`` has shape ``[C, h, w]``: the map, or the window's ``outer`` rectangle where a window is given. Values are those of
    the window's core, in float64 sums; those of windows that tile a map add up to those of the map. Potentials whose
    proximal map is known have a method ``prox(v, step)`` besides.

    Attributes:
        halo: px of margin around a window's core that values and gradients on the core depend on.
        multiple: outer rectangles start at multiples of it.
    """

    halo: int
    multiple: int

    def value(self, u: torch.Tensor, window: Window | None = None) -> float:
        """P(u)."""
        ...

    def value_and_gradient(self, u: torch.Tensor, window: Window | None = None) -> tuple[float, torch.Tensor]:
        r"""P(u) and :math:`g_i = a_i^{-1}\,\partial P/\partial u_i` on the core, ``[C, h, w]``, 0 at background."""
        ...

    def majorizer(self, u: torch.Tensor, window: Window | None = None) -> tuple[torch.Tensor, torch.Tensor | float]:
        r"""The gradient, and a curvature :math:`d_i \ge 0` on the core, ``[h, w]`` or a number, with which

        .. math::
            P(v) \le P(u) + \sum_i a_i\bigl(\langle g_i, v_i - u_i\rangle + d_i\lVert v_i - u_i\rVert_2^2\bigr)

        should hold for :math:`v` near :math:`u`. Where it does not the solver takes shorter steps, at the cost of trying.
        """
        ...

    def energy_map(self, u: torch.Tensor, window: Window | None = None) -> torch.Tensor:
        """:math:`e_i` on the core, ``[h, w]``, 0 at background."""
        ...


class WeightedSum:
    r"""A weighted sum of potentials.

    .. math:: P(u) = \sum_j \lambda_j P_j(u)

    Args:
        terms: pairs :math:`(\lambda_j, P_j)` with :math:`\lambda_j \ge 0`, at least one.
    """

    def __init__(self, terms: Sequence[tuple[float, Potential]]) -> None:
        if not terms or any(not weight >= 0 for weight, _ in terms):
            raise InputError(f"WeightedSum needs terms with weights of at least 0, got {[weight for weight, _ in terms]}.")
        self.terms = list(terms)
        self.halo = max(term.halo for _, term in terms)
        self.multiple = max(term.multiple for _, term in terms)

    def value(self, u: torch.Tensor, window: Window | None = None) -> float:
        """P(u)."""
        return sum(weight * term.value(u, window) for weight, term in self.terms)

    def value_and_gradient(self, u: torch.Tensor, window: Window | None = None) -> tuple[float, torch.Tensor]:
        """P(u) and its gradient per unit mass on the core."""
        total, gradient = 0.0, None
        for weight, term in self.terms:
            value, part = term.value_and_gradient(u, window)
            total += weight * value
            gradient = part * weight if gradient is None else gradient.add_(part, alpha=weight)
        return total, gradient

    def majorizer(self, u: torch.Tensor, window: Window | None = None) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Gradient and curvature: those of the terms, weighted."""
        gradient, curvature = None, 0.0
        for weight, term in self.terms:
            part, bend = term.majorizer(u, window)
            gradient = part * weight if gradient is None else gradient.add_(part, alpha=weight)
            curvature = curvature + weight * bend
        return gradient, curvature

    def energy_map(self, u: torch.Tensor, window: Window | None = None) -> torch.Tensor:
        """Per-pixel energy on the core."""
        return torch.stack([weight * term.energy_map(u, window) for weight, term in self.terms]).sum(dim=0)
