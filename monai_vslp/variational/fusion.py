"""Fusion of augmented views: a per-pixel Wasserstein barycentre as a data fidelity."""

from __future__ import annotations

import torch

from monai_vslp.utils.errors import InputError
from monai_vslp.variational.potential import FIDELITIES
from monai_vslp.variational.wasserstein import ground_metric, simplex_wasserstein
from monai_vslp.variational.windows import Window, whole_window

__all__ = ["FusionFidelity", "spread_weights"]


def spread_weights(
    stack: torch.Tensor,
    temperature: float = 0.1,
    metric: str | torch.Tensor = "discrete",
    weight: torch.Tensor | None = None,
    smooth: float = 0.0,
) -> torch.Tensor:
    r"""Weights of views from their spread: at a pixel, a view far from the consensus weighs less.

    .. math:: w_t(i) \propto v_t(i)\exp\bigl(-W_G(q_i^{(t)}, \textstyle\sum_s v_s(i)\,q_i^{(s)})/T\bigr)

    Args:
        stack: confidences of the views, shape ``[A, C, H, W]``.
        temperature: T > 0, in units of the metric; large values weigh all views alike.
        metric: G, a name or a matrix ``[C, C]``.
        weight: prior weights :math:`v`, shape ``[A]`` or ``[A, H, W]``, made to sum to 1; equal by default.
        smooth: see :func:`~monai_vslp.variational.wasserstein.simplex_wasserstein`; metrics without closed form need it.

    Returns:
        Shape ``[A, H, W]``; sums to 1 over the views.

    Raises:
        InputError: shapes, weights or a temperature that cannot be used.
    """
    if not temperature > 0:
        raise InputError(f"temperature must be positive, got {temperature}; 0.1 of the metric's largest entry suits.")
    if stack.ndim != 4:
        raise InputError(f"spread_weights: the stack has shape [A, C, H, W], got {list(stack.shape)}.")
    g = ground_metric(metric, stack.shape[1])
    prior = _view_weights(weight, stack)
    mean = (prior[:, None] * stack).sum(dim=0)
    distance = torch.stack([simplex_wasserstein(view, mean, g, smooth)[0] for view in stack])
    return torch.softmax(prior.log() - distance / temperature, dim=0)


def _view_weights(weight: torch.Tensor | None, stack: torch.Tensor, tissue: torch.Tensor | None = None) -> torch.Tensor:
    """Weights of views, equal by default, as ``[A, H, W]`` that sum to 1; outside ``tissue`` all may be 0."""
    views, grid = len(stack), tuple(stack.shape[2:])
    weight = torch.ones(views) if weight is None else torch.as_tensor(weight)
    if weight.shape not in ((views,), (views, *grid)):
        raise InputError(
            f"weights of {views} views have shape [A] = [{views}] or [A, H, W] = {[views, *grid]}, got {list(weight.shape)}."
        )
    weight = weight.to(stack)
    weight = weight if weight.ndim == 3 else weight.view(-1, 1, 1).expand(views, *grid)
    total = weight.sum(dim=0)
    empty = total <= 0
    if (
        not bool(torch.isfinite(total).all())
        or float(weight.min()) < 0
        or bool((empty if tissue is None else empty & tissue).any())
    ):
        raise InputError("weights of views must be finite, not negative, and at each pixel positive for one view at least.")
    return torch.where(empty, 1.0 / views, weight / total.masked_fill(empty, 1.0))


@FIDELITIES.add_def("fusion", "per-pixel Wasserstein fusion of augmented views under a class ground metric")
class FusionFidelity:
    r"""Fusion of views.

    .. math:: D_b(u) = \sum_i a_i \sum_t w_t(i)\, W_G(u_i, q_i^{(t)})

    For :math:`G = 1 - I` the distance is :math:`\tfrac12\lVert\cdot\rVert_1` and the minimiser a median of the views, which an
    outlying view does not move. The absolute values are smoothed (Huber) so that gradient methods work.

    Args:
        stack: :math:`q^{(t)}`, shape ``[A, C, H, W]``, each on the simplex.
        mass: :math:`a`, shape ``[H, W]``, sums to 1; 0 is background.
        metric: G, a name or a matrix ``[C, C]``, see :func:`~monai_vslp.variational.wasserstein.ground_metric`.
        weight: :math:`w`, shape ``[A]`` or ``[A, H, W]``, made to sum to 1; equal by default.
        smooth: width of the smoothing; for a metric without closed form the entropy η of the distance, which is then not 0
            where a view is met (0.05 of the metric's largest entry suits).

    Raises:
        InputError: shapes, weights or views that cannot be used.
    """

    halo = 0
    multiple = 1

    def __init__(
        self,
        stack: torch.Tensor,
        mass: torch.Tensor,
        metric: str | torch.Tensor = "discrete",
        weight: torch.Tensor | None = None,
        smooth: float = 1e-2,
    ) -> None:
        if stack.ndim != 4 or stack.shape[2:] != mass.shape:
            raise InputError(f"FusionFidelity: the stack has shape [A, C, H, W] on the mass's grid, got {list(stack.shape)}.")
        if not smooth > 0:
            raise InputError(f"FusionFidelity: smooth must be positive, got {smooth}.")
        tissue = mass > 0
        lowest, off = stack.amin(dim=(0, 1))[tissue], (stack.sum(dim=1) - 1).abs().amax(dim=0)[tissue]
        # Written so that NaN fails, too.
        if not bool(((lowest >= -1e-4) & (off <= 1e-2)).all()):
            raise InputError(
                "FusionFidelity: each view must be probabilities over the classes (axis 1), got values down to "
                f"{float(lowest.min()):.3g} with sums off 1 by up to {float(off.max()):.3g}; apply a softmax first."
            )
        self.weight = _view_weights(weight, stack, tissue)
        self.stack, self.mass, self.smooth = stack, mass, smooth
        self.metric = ground_metric(metric, stack.shape[1])
        # Curvature of Huber's function, halved for the discrete metric; a guess for others.
        self._curvature = 0.25 * float(self.metric.max()) / smooth

    def _terms(self, u: torch.Tensor, window: Window | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, columns = (whole_window(self.mass.shape) if window is None else window).core
        if window is not None:
            u = u[(slice(None), *window.inner)]
        energy, gradient = torch.zeros(u.shape[1:], dtype=u.dtype, device=u.device), torch.zeros_like(u)
        for view, weight in zip(self.stack, self.weight):
            distance, slope = simplex_wasserstein(u, view[:, rows, columns].to(u), self.metric, self.smooth)
            energy += weight[rows, columns] * distance
            gradient += weight[rows, columns] * slope
        mass = self.mass[rows, columns]
        # Not a product with 0: views may hold anything outside tissue, NaN too.
        return energy.masked_fill_(mass <= 0, 0.0), gradient.masked_fill_(mass <= 0, 0.0), mass

    def value(self, u: torch.Tensor, window: Window | None = None) -> float:
        """:math:`D_b(u)` over the core, summed in float64."""
        energy, _, mass = self._terms(u, window)
        return float((energy * mass).sum(dtype=torch.float64))

    def value_and_gradient(self, u: torch.Tensor, window: Window | None = None) -> tuple[float, torch.Tensor]:
        r""":math:`D_b(u)` and :math:`a_i^{-1}\,\partial D_b/\partial u_i` on the core (mean 0 over the classes)."""
        energy, gradient, mass = self._terms(u, window)
        return float((energy * mass).sum(dtype=torch.float64)), gradient

    def majorizer(self, u: torch.Tensor, window: Window | None = None) -> tuple[torch.Tensor, float]:
        """Gradient and curvature of the smoothed distance."""
        return self._terms(u, window)[1], self._curvature

    def energy_map(self, u: torch.Tensor, window: Window | None = None) -> torch.Tensor:
        """Per-pixel energy on the core, shape ``[h, w]``; 0 at background."""
        return self._terms(u, window)[0]

    def prox(self, v: torch.Tensor, step: float, sweeps: int = 60) -> torch.Tensor:
        r"""Proximal map of the exact distance for the discrete metric.

        .. math:: \arg\min_{u_i\in\Delta_C} \tfrac1{2s}\lVert u_i - v_i\rVert_2^2
            + \tfrac12\sum_t w_t(i)\lVert u_i - q_i^{(t)}\rVert_1

        For a multiplier λ of :math:`\sum_k u_{ik} = 1` each class is a weighted median of the shifted point and the
        views, found exactly; λ by bisection.

        Args:
            v: shape ``[C, H, W]``.
            step: s > 0.
            sweeps: bisection steps; each halves the error.

        Returns:
            Shape ``[C, H, W]``.

        Raises:
            InputError: another metric, or a step that is not positive.
        """
        if not step > 0:
            raise InputError(f"FusionFidelity.prox: the step must be positive, got {step}.")
        classes = len(self.metric)
        if not torch.allclose(self.metric, 1.0 - torch.eye(classes, dtype=torch.float64)):
            raise InputError("FusionFidelity.prox is known for the discrete metric only.")
        points, order = self.stack.to(v).sort(dim=0)  # [A, C, H, W]
        weights = 0.5 * torch.gather(self.weight.to(v)[:, None].expand_as(points), 0, order)
        # Slope of ½ Σ w|u - q| between consecutive points: -W, -W + 2w_1, ...
        slopes = torch.cat([torch.zeros_like(points[:1]), 2 * weights.cumsum(dim=0)]) - weights.sum(dim=0)
        edges = torch.cat([torch.zeros_like(points[:1]), points, torch.ones_like(points[:1])])

        def at(multiplier: torch.Tensor) -> torch.Tensor:
            free = v + step * multiplier
            best = torch.minimum(torch.maximum(free - step * slopes[0], edges[0]), edges[1])
            for low, high, slope in zip(edges[1:-1], edges[2:], slopes[1:]):
                # On each piece the stationary point, held to the piece; going up only where the piece before ends.
                best = torch.where(best < low, best, torch.minimum(torch.maximum(free - step * slope, low), high))
            return best

        reach = (2.0 + float(v.abs().max())) / step + 2.0
        low = torch.full_like(v[:1], -reach)
        high = torch.full_like(v[:1], reach)
        for _ in range(sweeps):
            middle = 0.5 * (low + high)
            above = at(middle).sum(dim=0, keepdim=True) > 1
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        u = at(0.5 * (low + high))
        return u / u.sum(dim=0, keepdim=True)
