"""Regularizers: what makes a segmentation plausible, independent of the confidences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from monai_vslp.utils.errors import InputError
from monai_vslp.variational.potential import REGULARIZERS
from monai_vslp.variational.windows import MapArray, Window, whole_window

__all__ = ["EDGE_HALO", "HuberTotalVariation", "image_edge_weight", "squared_gradient", "weight_of_edges"]

EDGE_HALO = 3  # px: a binomial filter of 5 x 5 px, then forward differences


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
    squared = squared_gradient(image)
    return weight_of_edges(squared, float(squared.mean()), strength)


def squared_gradient(image: torch.Tensor) -> torch.Tensor:
    r""":math:`|\nabla I|^2` of :func:`image_edge_weight`; a pixel sees ``EDGE_HALO`` px around it.

    Args:
        image: shape ``[channels, H, W]``, any real or integer dtype.

    Returns:
        Shape ``[H, W]``, float32.
    """
    grey = image.to(torch.float32).mean(dim=0)[None, None]
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=image.device) / 16.0
    grey = F.conv2d(F.pad(grey, (2, 2, 2, 2), mode="replicate"), torch.outer(row, row)[None, None])[0, 0]
    squared = torch.zeros_like(grey)
    squared[:, :-1] += (grey[:, 1:] - grey[:, :-1]).square()
    squared[:-1, :] += (grey[1:, :] - grey[:-1, :]).square()
    return squared


def weight_of_edges(squared: torch.Tensor, scale: float, strength: float) -> torch.Tensor:
    r"""The weight of :func:`image_edge_weight` for :math:`|\nabla I|^2` and its mean :math:`\kappa^2`, ``scale``."""
    return torch.ones_like(squared) if scale == 0.0 else 1.0 / (1.0 + strength * squared / scale)


@REGULARIZERS.add_def("total_variation", "Huber total variation, weighted by the edges of an image where one is given")
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
        mass: :math:`a`, shape ``[H, W]``, non-negative; a tensor, or a map on disk.
        weight: :math:`w`, shape ``[H, W]``, or None for 1.
        huber: :math:`\gamma > 0`, in units of ``u``.
    """

    halo = 1
    multiple = 1

    def __init__(self, mass: MapArray, weight: MapArray | None = None, huber: float = 0.1) -> None:
        if huber <= 0:
            raise InputError(f"huber is the width of the quadratic part and must be positive, got {huber}.")
        self.mass, self.weight, self.huber = mass, weight, huber
        self._geometry: dict[tuple[int, ...], _Geometry] = {}
        self._keep = isinstance(mass, torch.Tensor)  # what is derived from a map on disk is not held in memory

    def _geometry_of(self, window: Window | None) -> tuple[Window, _Geometry]:
        window = whole_window(self.mass.shape) if window is None else window
        if window.key in self._geometry:
            return window, self._geometry[window.key]
        found = _geometry(self.mass[window.outer], None if self.weight is None else self.weight[window.outer])
        if self._keep:
            self._geometry[window.key] = found
        return window, found

    @staticmethod
    def _differences(u: torch.Tensor, geometry: _Geometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        across = u[:, :, 1:] - u[:, :, :-1]
        down = u[:, 1:, :] - u[:, :-1, :]
        if geometry.across is not None:
            across.mul_(geometry.across)
            down.mul_(geometry.down)
        squared = torch.zeros(u.shape[1:], dtype=u.dtype, device=u.device)
        squared[:, :-1] += across.square().sum(dim=0)
        squared[:-1, :] += down.square().sum(dim=0)
        return across, down, squared

    def _huber(self, squared: torch.Tensor) -> torch.Tensor:
        norm = squared.sqrt()
        return torch.where(norm <= self.huber, squared / (2.0 * self.huber), norm - 0.5 * self.huber)

    def energy_map(self, u: torch.Tensor, window: Window | None = None) -> torch.Tensor:
        """Per-pixel energy :math:`r_i` on the core, shape ``[h, w]``; 0 outside tissue."""
        window, geometry = self._geometry_of(window)
        energy = self._huber(self._differences(u, geometry)[2]) * geometry.factor * geometry.per_mass
        return energy[window.inner]

    def value(self, u: torch.Tensor, window: Window | None = None) -> float:
        """:math:`R(u)` over the core, summed in float64."""
        window, geometry = self._geometry_of(window)
        energy = self._huber(self._differences(u, geometry)[2]).mul_(geometry.factor)
        return float(energy[window.inner].sum(dtype=torch.float64))

    def value_and_gradient(self, u: torch.Tensor, window: Window | None = None) -> tuple[float, torch.Tensor]:
        r""":math:`R(u)` and :math:`g_i = a_i^{-1}\,\partial R/\partial u_i` on the core (0 outside tissue)."""
        window, geometry = self._geometry_of(window)
        across, down, squared = self._differences(u, geometry)
        value = float((self._huber(squared).mul_(geometry.factor))[window.inner].sum(dtype=torch.float64))
        pull = geometry.factor / squared.sqrt_().clamp_(min=self.huber)
        gradient = self._divergence(across, down, pull)
        return value, gradient.mul_(geometry.per_mass)[(slice(None), *window.inner)]

    def majorizer(self, u: torch.Tensor, window: Window | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Gradient as above, and the curvature :math:`d` of a quadratic that lies above R everywhere.

        .. math::
            R(v) \le R(u) + \sum_i a_i\bigl(\langle g_i, v_i - u_i\rangle + d_i\lVert v_i - u_i\rVert_2^2\bigr), \qquad
            a_i d_i = 2\pi_i + \pi_{\mathrm{left}(i)} + \pi_{\mathrm{up}(i)}, \quad
            \pi_i = \frac{m_i w_i}{\max(\lVert(Du)_i\rVert, \gamma)},

        since :math:`\varphi_\gamma` lies below the parabola of curvature :math:`1/\max(t, \gamma)` that touches it at t, and
        :math:`\lVert x - y\rVert^2 \le 2\lVert x\rVert^2 + 2\lVert y\rVert^2`. Shape ``[h, w]``.
        """
        window, geometry = self._geometry_of(window)
        across, down, squared = self._differences(u, geometry)
        pull = geometry.factor / squared.sqrt_().clamp_(min=self.huber)
        curvature = 2.0 * pull
        curvature[:, 1:] += pull[:, :-1]
        curvature[1:, :] += pull[:-1, :]
        gradient = self._divergence(across, down, pull)
        inner = window.inner
        return gradient.mul_(geometry.per_mass)[(slice(None), *inner)], curvature.mul_(geometry.per_mass)[inner]

    @staticmethod
    def _divergence(across: torch.Tensor, down: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
        """Dᵀ of the differences weighted by ``pull``; overwrites the differences."""
        across.mul_(pull[:, :-1])
        down.mul_(pull[:-1, :])
        gradient = torch.empty(across.shape[0], *pull.shape, dtype=pull.dtype, device=pull.device)
        gradient[:, :, -1:] = 0.0
        torch.neg(across, out=gradient[:, :, :-1])
        gradient[:, :, 1:] += across
        gradient[:, :-1, :] -= down
        gradient[:, 1:, :] += down
        return gradient


@dataclass(frozen=True)
class _Geometry:
    """What the total variation needs of mass and weight on the outer rectangle of a window."""

    factor: torch.Tensor  # m_i w_i
    per_mass: torch.Tensor  # 1 / a_i, 1 at background
    across: torch.Tensor | None  # differences that stay in tissue; None where all do
    down: torch.Tensor | None


def _geometry(mass: torch.Tensor, weight: torch.Tensor | None) -> _Geometry:
    tissue = mass > 0
    across = tissue[:, 1:] & tissue[:, :-1]
    down = tissue[1:, :] & tissue[:-1, :]
    smallest = mass.clone()
    smallest[:, :-1] = torch.where(across, torch.minimum(smallest[:, :-1], mass[:, 1:]), smallest[:, :-1])
    smallest[:-1, :] = torch.where(down, torch.minimum(smallest[:-1, :], mass[1:, :]), smallest[:-1, :])
    factor = smallest if weight is None else smallest * weight.to(mass)
    # A mass of zero carries no term; 1 only keeps the division defined there.
    per_mass = 1.0 / torch.where(tissue, mass, torch.ones_like(mass))
    factor = torch.where(tissue, factor, torch.zeros_like(factor))
    if bool(tissue.all()):
        return _Geometry(factor, per_mass, None, None)
    return _Geometry(factor, per_mass, across.to(mass), down.to(mass))
