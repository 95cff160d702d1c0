"""Regularizers: what makes a segmentation plausible, independent of the confidences."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["HuberTotalVariation", "image_edge_weight"]


def image_edge_weight(image: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    r"""Weight that lowers the price of a class boundary where the image has an edge.

    .. math:: w_i = \frac{1}{1 + \beta\,(|\nabla I|_i / \kappa)^2},

    with :math:`I` the mean of the channels smoothed by a 5×5 binomial filter and :math:`\kappa` the root mean square of
    its gradient, so that neither the range nor the contrast of the image matters.

    Args:
        image: shape ``[channels, H, W]``, any real or integer dtype.
        strength: :math:`\beta \ge 0`; 0 gives a weight of 1 everywhere.

    Returns:
        Weights in (0, 1], shape ``[H, W]``, float32.
    """
    grey = image.to(torch.float32).mean(dim=0)[None, None]
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=image.device) / 16.0
    grey = F.conv2d(F.pad(grey, (2, 2, 2, 2), mode="replicate"), torch.outer(row, row)[None, None])[0, 0]
    squared = torch.zeros_like(grey)
    squared[:, :-1] += (grey[:, 1:] - grey[:, :-1]).square()
    squared[:-1, :] += (grey[1:, :] - grey[:-1, :]).square()
    scale = squared.mean()
    if float(scale) == 0.0:
        return torch.ones_like(grey)
    return 1.0 / (1.0 + strength * squared / scale)


class HuberTotalVariation:
    r"""Huber-smoothed vectorial total variation, optionally weighted by an image.

    .. math::
        R(u) = \sum_i a_i r_i, \qquad r_i = \frac{m_i}{a_i} w_i\,\varphi_\gamma(\lVert (Du)_i\rVert_2), \qquad
        \varphi_\gamma(t) = \begin{cases} t^2/(2\gamma) & t \le \gamma\\ t - \gamma/2 & t > \gamma\end{cases}

    :math:`D` are forward differences in rows and columns over all classes; differences that leave the tissue or the
    image are dropped (natural boundary). :math:`m_i` is the smallest mass among pixel :math:`i` and the neighbours its
    differences reach, hence :math:`m_i = a_i` where the mass is uniform, and a pixel with little tissue never feels a
    force greater than its mass warrants.

    Args:
        mass: :math:`a`, shape ``[H, W]``, non-negative.
        weight: :math:`w`, shape ``[H, W]``, or None for 1.
        huber: :math:`\gamma > 0`, in units of ``u``.
    """

    def __init__(self, mass: torch.Tensor, weight: torch.Tensor | None = None, huber: float = 0.1) -> None:
        if huber <= 0:
            raise ValueError(f"huber is the width of the quadratic part and must be positive, got {huber}.")
        self.huber = huber
        tissue = mass > 0
        self._across = tissue[:, 1:] & tissue[:, :-1]
        self._down = tissue[1:, :] & tissue[:-1, :]
        smallest = mass.clone()
        smallest[:, :-1] = torch.where(self._across, torch.minimum(smallest[:, :-1], mass[:, 1:]), smallest[:, :-1])
        smallest[:-1, :] = torch.where(self._down, torch.minimum(smallest[:-1, :], mass[1:, :]), smallest[:-1, :])
        factor = smallest if weight is None else smallest * weight.to(mass)
        # A mass of zero carries no term; 1 only keeps the division defined there.
        self._per_mass = 1.0 / torch.where(tissue, mass, torch.ones_like(mass))
        self._factor = torch.where(tissue, factor, torch.zeros_like(factor))
        self._all_tissue = bool(tissue.all())

    def _differences(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        across = u[:, :, 1:] - u[:, :, :-1]
        down = u[:, 1:, :] - u[:, :-1, :]
        if not self._all_tissue:
            across.mul_(self._across)
            down.mul_(self._down)
        squared = torch.zeros(u.shape[1:], dtype=u.dtype, device=u.device)
        squared[:, :-1] += across.square().sum(dim=0)
        squared[:-1, :] += down.square().sum(dim=0)
        return across, down, squared.sqrt_()

    def _huber(self, norm: torch.Tensor) -> torch.Tensor:
        gamma = self.huber
        return torch.where(norm <= gamma, norm.square() / (2.0 * gamma), norm - 0.5 * gamma)

    def energy_map(self, u: torch.Tensor) -> torch.Tensor:
        """Per-pixel energy :math:`r_i`, shape ``[H, W]``, for ``u`` of shape ``[C, H, W]``; 0 outside tissue."""
        return self._huber(self._differences(u)[2]) * self._factor * self._per_mass

    def value(self, u: torch.Tensor) -> float:
        """:math:`R(u)`, summed in float64."""
        return float((self._huber(self._differences(u)[2]) * self._factor).sum(dtype=torch.float64))

    def value_and_gradient(self, u: torch.Tensor) -> tuple[float, torch.Tensor]:
        r""":math:`R(u)` and :math:`g_i = a_i^{-1}\,\partial R/\partial u_i`, shape ``[C, H, W]`` (0 outside tissue)."""
        across, down, norm = self._differences(u)
        value = float((self._huber(norm) * self._factor).sum(dtype=torch.float64))
        pull = self._factor / norm.clamp_(min=self.huber)
        across.mul_(pull[:, :-1])
        down.mul_(pull[:-1, :])
        gradient = torch.zeros_like(u)
        gradient[:, :, :-1] -= across
        gradient[:, :, 1:] += across
        gradient[:, :-1, :] -= down
        gradient[:, 1:, :] += down
        return value, gradient.mul_(self._per_mass)
