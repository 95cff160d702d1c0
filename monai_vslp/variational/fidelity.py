"""Data fidelities: how well a segmentation agrees with the confidences."""

from __future__ import annotations

import torch

__all__ = ["AssignmentFidelity", "assignment_cost"]


def assignment_cost(confidence: torch.Tensor, delta: float = 1e-3) -> torch.Tensor:
    r"""Cost of a class at a pixel, :math:`c_{ik} = -\log(q_{ik} + \delta)`.

    Args:
        confidence: :math:`q`, class axis anywhere, values in [0, 1].
        delta: floor that bounds the cost of a class which the network rules out; :math:`-\log\delta` at most.

    Returns:
        Costs of the same shape and dtype.
    """
    return -torch.log(confidence + delta)


class AssignmentFidelity:
    r"""Transport of pixels to classes without its marginal term.

    .. math:: D(u) = \sum_i a_i\,e_i, \qquad e_i = \langle c_i, u_i\rangle + \varepsilon\langle u_i, \log u_i\rangle

    Together with :math:`\rho\,\mathrm{KL}(\bar u\|p)`, or the constraint :math:`\bar u = p`, this is entropic optimal
    transport between pixels and classes; the plan is :math:`a_i u_{ik}`.

    Args:
        cost: :math:`c`, shape ``[C, N]``.
        mass: :math:`a`, shape ``[N]``, sums to 1.
        epsilon: :math:`\varepsilon > 0`.
    """

    def __init__(self, cost: torch.Tensor, mass: torch.Tensor, epsilon: float) -> None:
        self.cost = cost
        self.mass = mass
        self.epsilon = epsilon

    def energy_map(self, u: torch.Tensor, log_u: torch.Tensor) -> torch.Tensor:
        """Per-pixel energy :math:`e_i`, shape ``[N]``, for ``u`` and its logarithm of shape ``[C, N]``."""
        # A class without mass has u = 0 and log u = -inf, whose product must count as 0.
        entropy = torch.where(u > 0, u * log_u, torch.zeros_like(u))
        return (self.cost * u + self.epsilon * entropy).sum(dim=0)

    def value(self, u: torch.Tensor, log_u: torch.Tensor) -> float:
        """:math:`D(u)`, summed in float64."""
        return float((self.energy_map(u, log_u) * self.mass).sum(dtype=torch.float64))
