"""The front door of the variational stage: confidences and proportions in, a segmentation with its energies out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

from monai_vslp.utils.errors import InputError, ProportionError
from monai_vslp.variational.fidelity import AssignmentFidelity, assignment_cost
from monai_vslp.variational.regularizer import HuberTotalVariation, image_edge_weight
from monai_vslp.variational.solver import StoppingRule, minimize

__all__ = ["RefinementOptions", "RefinementResult", "refine"]

COARSEST_SIDE = 48  # px; below it a coarser grid costs more to set up than it saves


@dataclass(frozen=True)
class RefinementOptions:
    r"""Parameters of the energy and of its solver.

    Attributes:
        trust: :math:`\rho` in (0, ∞], trust in the proportions; ∞ makes them a constraint, values of 1 to 10 suit
            estimates by people.
        alpha: :math:`\alpha \ge 0`, strength of the regularizer (pixels of boundary against nats of confidence).
        epsilon: :math:`\varepsilon > 0`, entropy; smaller is crisper.
        delta: :math:`\delta > 0`, floor of the confidences in :math:`c = -\log(q + \delta)`.
        huber: :math:`\gamma > 0`, width of the quadratic part of the total variation.
        edge_strength: how much an edge of the image lowers the price of a boundary; used only when an image is given.
        max_iterations: limit of proximal steps on the finest grid.
        tolerance: relative energy change that counts as converged.
        marginal_tolerance: residual :math:`\lVert\bar u - p\rVert_1` that each step is solved to.
        multigrid: start from the solution on coarser grids; changes the time, not the minimiser.
    """

    trust: float = math.inf
    alpha: float = 1.0
    epsilon: float = 0.1
    delta: float = 1e-3
    huber: float = 0.1
    edge_strength: float = 1.0
    max_iterations: int = 200
    tolerance: float = 1e-5
    marginal_tolerance: float = 1e-6
    multigrid: bool = True

    def __post_init__(self) -> None:
        for name in ("trust", "epsilon", "delta", "huber", "tolerance", "marginal_tolerance"):
            if not getattr(self, name) > 0:
                raise InputError(f"refine: {name} must be positive, got {getattr(self, name)}.")
        for name in ("alpha", "edge_strength"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise InputError(f"refine: {name} must be finite and at least 0, got {value}.")
        if self.max_iterations < 1:
            raise InputError(f"refine: max_iterations must be at least 1, got {self.max_iterations}.")


@dataclass(frozen=True)
class RefinementResult:
    r"""What the variational stage found and why. ``[B, ...]`` where the confidence had a batch axis, else without it.

    Attributes:
        u: segmentation on the simplex, shape ``[(B,) C, H, W]``, dtype of the confidence.
        labels: argmax of ``u``, shape ``[(B,) H, W]``, int64.
        psi: class offsets ψ, shape ``[(B,) C]``, float64; −inf for a class with proportion 0; NaN where no proportions
            were given.
        energies: energy of the start and after each accepted step; a list, or a list per image.
        residual: :math:`\lVert\nabla F\rVert_1` of the last step, with a hard marginal :math:`\lVert\bar u-p\rVert_1`;
            None without proportions. A value, or a list per image.
        converged: whether the stopping rule was met. A value, or a list per image.
        reason: why the iteration ended. A string, or a list per image.
        proportions: :math:`\bar u`, shape ``[(B,) C]``, float64.
        fidelity_energy: :math:`\langle c_i,u_i\rangle + \varepsilon\langle u_i,\log u_i\rangle` per pixel,
            shape ``[(B,) H, W]``; 0 outside tissue. In nats.
        regularization_energy: :math:`\alpha r_i` per pixel, same shape and unit, so that the sum of both is the total.
    """

    u: torch.Tensor
    labels: torch.Tensor
    psi: torch.Tensor
    energies: list
    residual: float | None | list
    converged: bool | list
    reason: str | list
    proportions: torch.Tensor
    fidelity_energy: torch.Tensor
    regularization_energy: torch.Tensor


def _coarser(x: torch.Tensor) -> torch.Tensor:
    """Halve the last two axes by averaging 2×2 pixels (fewer at an odd border)."""
    return F.avg_pool2d(x[None], 2, ceil_mode=True, count_include_pad=False)[0]


def _log_start_from_coarse(
    cost: torch.Tensor,
    mass: torch.Tensor,
    weight: torch.Tensor | None,
    proportions: torch.Tensor | None,
    options: RefinementOptions,
) -> torch.Tensor | None:
    """Solve on a grid of half the resolution and interpolate; None where the grid is small already."""
    height, width = mass.shape
    if min(height, width) < 2 * COARSEST_SIDE:
        return None
    share = _coarser(mass[None])[0]
    coarse_cost = _coarser(cost * mass) / share.clamp_min(torch.finfo(mass.dtype).tiny)
    coarse_mass = share / share.sum(dtype=torch.float64).to(share)
    coarse_weight = None if weight is None else _coarser(weight[None])[0]
    # A boundary crosses half as many of a quarter of the cells: its length per cell doubles.
    coarse = _solve(
        coarse_cost, coarse_mass, coarse_weight, proportions, replace(options, alpha=options.alpha / 2, tolerance=1e-4)
    )
    log_u = F.interpolate(coarse.log_u.view(coarse_cost.shape).clamp_min(-60.0)[None], scale_factor=2, mode="nearest")
    return log_u[0, :, :height, :width].reshape(len(cost), -1)


def _solve(cost, mass, weight, proportions, options: RefinementOptions):
    """Minimise the energy on one grid; ``cost`` is ``[C, H, W]``, ``mass`` ``[H, W]`` with sum 1."""
    classes, height, width = cost.shape
    log_start = None
    if options.multigrid and options.alpha > 0:
        log_start = _log_start_from_coarse(cost, mass, weight, proportions, options)
    return minimize(
        AssignmentFidelity(cost.reshape(classes, -1), mass.reshape(-1), options.epsilon),
        (height, width),
        regularizer=HuberTotalVariation(mass, weight, options.huber) if options.alpha > 0 else None,
        alpha=options.alpha,
        proportions=proportions,
        trust=options.trust,
        step=1.0,
        stopping=StoppingRule(options.max_iterations, options.tolerance, options.marginal_tolerance),
        log_start=log_start,
    )


def _refine_one(
    confidence: torch.Tensor,
    proportions: torch.Tensor | None,
    mass: torch.Tensor,
    image: torch.Tensor | None,
    options: RefinementOptions,
) -> RefinementResult:
    classes, height, width = confidence.shape
    total = float(mass.sum(dtype=torch.float64))
    if total == 0.0:
        zeros = torch.zeros(height, width, dtype=confidence.dtype, device=confidence.device)
        nan = torch.full((classes,), math.nan, dtype=torch.float64, device=confidence.device)
        return RefinementResult(
            confidence.clone(), confidence.argmax(dim=0), nan, [0.0], None, True, "no tissue: nothing to refine", nan,
            zeros, zeros.clone(),
        )  # fmt: skip
    share = mass / total
    cost = assignment_cost(confidence, options.delta)
    weight = None
    if image is not None and options.alpha > 0 and options.edge_strength > 0:
        weight = image_edge_weight(image, options.edge_strength).to(confidence)
    solution = _solve(cost, share, weight, proportions, options)
    flat = share.reshape(-1)
    tissue = share > 0
    fidelity = AssignmentFidelity(cost.reshape(classes, -1), flat, options.epsilon)
    e_fidelity = fidelity.energy_map(solution.u, solution.log_u).view(height, width) * tissue
    u = solution.u.view(classes, height, width)
    if options.alpha > 0:
        e_regularization = options.alpha * HuberTotalVariation(share, weight, options.huber).energy_map(u)
    else:
        e_regularization = torch.zeros_like(e_fidelity)
    psi = solution.psi
    if psi is None:
        psi = torch.full((classes,), math.nan, dtype=torch.float64, device=confidence.device)
    return RefinementResult(
        u=u,
        labels=u.argmax(dim=0),
        psi=psi,
        energies=solution.energies,
        residual=solution.residual,
        converged=solution.converged,
        reason=solution.reason,
        proportions=(solution.u * flat).sum(dim=1, dtype=torch.float64),
        fidelity_energy=e_fidelity,
        regularization_energy=e_regularization,
    )


def _check_confidence(confidence: torch.Tensor) -> None:
    if confidence.ndim not in (3, 4):
        raise InputError(f"refine: confidence must have shape [C, H, W] or [B, C, H, W], got {list(confidence.shape)}.")
    if not confidence.is_floating_point():
        raise InputError(f"refine: confidence must be floating point on the simplex, got {confidence.dtype}.")
    if not bool(torch.isfinite(confidence).all()) or float(confidence.min()) < -1e-4:
        raise InputError("refine: confidence has negative, NaN or infinite values; pass probabilities (softmax, not logits).")
    worst = float((confidence.sum(dim=-3) - 1).abs().max())
    if worst > 1e-2:
        raise InputError(
            f"refine: confidence must sum to 1 over the class axis ({-3}), it is off by up to {worst:.3g}; "
            "apply a softmax over the classes first."
        )


def _check_proportions(proportions: torch.Tensor, classes: int, batch: int) -> torch.Tensor:
    p = torch.as_tensor(proportions, dtype=torch.float64)
    if p.ndim == 1:
        p = p.expand(batch, -1)
    if p.shape != (batch, classes):
        raise ProportionError(
            f"refine: proportions must have shape [C] or [B, C] with C = {classes}, B = {batch}, got {list(p.shape)}."
        )
    if not bool(torch.isfinite(p).all()) or float(p.min()) < 0 or float(p.sum(dim=1).min()) <= 0:
        raise ProportionError(f"refine: proportions must be finite, not negative and not all zero, got {p.tolist()}.")
    total = p.sum(dim=1, keepdim=True)
    if float((total - 1).abs().max()) > 0.02:
        raise ProportionError(
            f"refine: proportions are fractions that sum to 1, got sums {total.flatten().tolist()}; divide percentages by 100."
        )
    return p / total


def _broadcast(x: torch.Tensor, shape: Sequence[int], name: str, like: torch.Tensor) -> torch.Tensor:
    """Give ``x`` a batch axis and check its shape; None in ``shape`` matches any length."""
    x = torch.as_tensor(x, device=like.device)
    if x.ndim == len(shape) - 1:
        x = x[None].expand(shape[0], *x.shape)
    if x.ndim != len(shape) or any(want is not None and have != want for have, want in zip(x.shape, shape)):
        wanted = ["B" if i == 0 else "any" if n is None else n for i, n in enumerate(shape)]
        raise InputError(f"refine: {name} must have shape {wanted} or that without B, got {list(x.shape)}.")
    return x


def refine(
    confidence: torch.Tensor,
    proportions: torch.Tensor | Sequence[float] | None = None,
    mass: torch.Tensor | None = None,
    image: torch.Tensor | None = None,
    **options: float | int | bool,
) -> RefinementResult:
    r"""Fuse pixel-wise confidences with global proportions and a regularizer.

    .. math::
        \min_{u_i\in\Delta_C} \; \sum_i a_i\bigl(\langle c_i,u_i\rangle + \varepsilon\langle u_i,\log u_i\rangle\bigr)
        + \rho\,\mathrm{KL}(\bar u\,\|\,p) + \alpha R(u), \qquad
        c_{ik} = -\log(q_{ik}+\delta),\quad \bar u = \sum_i a_i u_i,

    with the Huber total variation :math:`R`, weighted by the edges of ``image`` where one is given.

    Args:
        confidence: :math:`q`, shape ``[C, H, W]`` or ``[B, C, H, W]``, float32 or float64, on the simplex.
        proportions: :math:`p`, fractions of the tissue area, shape ``[C]`` or ``[B, C]``; None leaves them free.
            Classes of proportion 0 do not occur in the result.
        mass: tissue per pixel, shape ``[H, W]`` or ``[B, H, W]``, non-negative, any scale; 0 is background, which takes
            no part (its ``u`` is the softmax of its costs and ψ). All ones by default.
        image: shape ``[channels, H, W]`` or ``[B, channels, H, W]``, any dtype; only its edges are used.
        **options: fields of :class:`RefinementOptions`.

    Returns:
        The segmentation with potentials, energies and status.

    Raises:
        InputError: a shape, value or option that cannot be used; says what is expected.
        ProportionError: proportions that are negative, NaN, all zero or of the wrong length.

    Example:
        >>> q = torch.softmax(torch.randn(3, 32, 32), dim=0)
        >>> result = refine(q, proportions=[0.6, 0.3, 0.1])
        >>> bool((result.proportions - torch.tensor([0.6, 0.3, 0.1])).abs().max() < 1e-5)
        True
    """
    known = [field.name for field in fields(RefinementOptions)]
    for name in options:
        if name not in known:
            raise InputError(f"refine: unknown option {name!r}; options are {', '.join(known)}.")
    settings = RefinementOptions(**options)
    _check_confidence(confidence)
    batched = confidence.ndim == 4
    q = confidence if batched else confidence[None]
    q = q if q.dtype == torch.float64 else q.float()
    batch, classes, height, width = q.shape
    p = None
    if proportions is not None:
        p = _check_proportions(proportions, classes, batch).to(q.device)
    if mass is None:
        mass = torch.ones(height, width, device=q.device)
    mass = _broadcast(mass, (batch, height, width), "mass", q).to(q)
    if not bool(torch.isfinite(mass).all()) or float(mass.min()) < 0:
        raise InputError("refine: mass must be finite and not negative (tissue area per pixel).")
    if image is not None:
        image = _broadcast(image, (batch, None, height, width), "image", q)
    results = [
        _refine_one(q[i], None if p is None else p[i], mass[i], None if image is None else image[i], settings)
        for i in range(batch)
    ]
    if not batched:
        return results[0]
    merged = {}
    for field in fields(RefinementResult):
        values = [getattr(result, field.name) for result in results]
        merged[field.name] = torch.stack(values) if isinstance(values[0], torch.Tensor) else values
    return RefinementResult(**merged)
