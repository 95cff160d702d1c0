"""What a learned regularizer has learned: its nonlinear eigenfunctions, the energies along its steps, its energy maps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from monai_vslp.utils.errors import InputError
from monai_vslp.variational.unrolled import UnrolledRefinement

__all__ = [
    "STARTS",
    "Eigenfunction",
    "EnergyPath",
    "RegularizationMaps",
    "eigenfunction",
    "energies_along",
    "rayleigh_quotient",
    "regularization_maps",
    "starting_map",
]

STARTS = ("disc", "stripes", "noise", "triple junction")
IGNORED = 255  # label of pixels without a reference


# ---- eigenfunctions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eigenfunction:
    r"""Output of :func:`eigenfunction`.

    Attributes:
        u: the eigenfunction as a segmentation :math:`\bar u + v`, shape ``[C, H, W]``; classes sum to 1 at each pixel, values
            may leave [0, 1].
        eigenvalue: :math:`\Lambda(u)`, regularization energy per squared unit of u.
        residual: :math:`\lVert P\nabla R(u) - \Lambda(u)\,v\rVert / \lVert P\nabla R(u)\rVert`, the sine of the angle between
            gradient and map: 0 for an eigenfunction, 1 for a map that has none of its gradient; 0 where the gradient vanishes.
        history: :math:`\lVert P\nabla R - \Lambda v\rVert^2` of the start and after each step.
        start: the map that the search began at, shape ``[C, H, W]``.
    """

    u: torch.Tensor
    eigenvalue: float
    residual: float
    history: list[float]
    start: torch.Tensor


def starting_map(kind: str, shape: tuple[int, int], classes: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """A map to start an eigenfunction at.

    Args:
        kind: ``"disc"`` (class 1 in class 0, radius a quarter of the shorter side), ``"stripes"`` (upright, an eighth of the
            width each, class after class), ``"noise"`` (each pixel a softmax of normal numbers) or ``"triple junction"`` (three
            sectors that meet in the middle; of two classes the first takes two of them).
        shape: ``(H, W)`` in px.
        classes: C, at least 2.
        generator: for the noise.

    Returns:
        Simplex-valued map, shape ``[C, H, W]``, float32; crisp but for the noise.

    Raises:
        InputError: another kind, fewer than two classes, or a side below 4 px.
    """
    height, width = shape
    if kind not in STARTS or classes < 2 or min(shape) < 4:
        raise InputError(
            f"starting_map: kind must be one of {', '.join(STARTS)}, classes at least 2 and sides at least 4 px, "
            f"got {kind!r}, {classes} and {height} x {width}."
        )
    if kind == "noise":
        device = None if generator is None else generator.device
        return torch.randn(classes, height, width, generator=generator, device=device).softmax(dim=0)
    rows = torch.arange(height)[:, None] - (height - 1) / 2
    columns = torch.arange(width)[None, :] - (width - 1) / 2
    if kind == "disc":
        labels = (rows.square() + columns.square() <= (min(shape) / 4) ** 2).long()
    elif kind == "stripes":
        labels = (torch.arange(width) // max(1, width // 8) % classes).expand(height, width)
    else:
        angle = torch.atan2(rows, columns) + math.pi
        labels = (angle / (2 * math.pi / 3)).long().clamp_max(2) % classes
    return nn.functional.one_hot(labels, classes).permute(2, 0, 1).float()


def _tangent(x: torch.Tensor) -> torch.Tensor:
    """P: drop what changes the sum over classes at a pixel or the mean of a class; the two projections commute."""
    x = x - x.mean(dim=0, keepdim=True)
    return x - x.mean(dim=(1, 2), keepdim=True)


def _quotient(
    network: nn.Module, mean: torch.Tensor, v: torch.Tensor, image: torch.Tensor | None, create_graph: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Projected gradient at ``mean + v``, and the quotient; ``v`` requires a gradient."""
    u = (mean + v)[None]
    energy = network(u) if image is None else network(u, image[None])
    (gradient,) = torch.autograd.grad(energy.sum(), v, create_graph=create_graph)
    gradient = _tangent(gradient)
    return gradient, (gradient * v).sum() / v.square().sum()


def rayleigh_quotient(network: nn.Module, u: torch.Tensor, image: torch.Tensor | None = None) -> tuple[float, torch.Tensor]:
    r"""Generalised Rayleigh quotient of a map, and how far the map is from being an eigenfunction.

    .. math::
        \Lambda(u) = \frac{\langle P\nabla R(u),\, v\rangle}{\lVert v\rVert^2}, \qquad d = P\nabla R(u) - \Lambda(u)\,v,
        \qquad v = u - \bar u,

    with :math:`R(u) = \sum_i r_i(u)` and P as in :func:`eigenfunction`.

    Args:
        network: maps ``[1, C, H, W]`` (and an image) to per-pixel energies ``[1, H, W]``.
        u: shape ``[C, H, W]``.
        image: shape ``[image_channels, H, W]``, for a regularizer that sees one.

    Returns:
        :math:`\Lambda(u)`, and :math:`d`, shape ``[C, H, W]``.

    Raises:
        InputError: a map without any variation.
    """
    mean, v = _deviation(u)
    with torch.enable_grad():
        v.requires_grad_(True)
        gradient, quotient = _quotient(network, mean, v, image, create_graph=False)
    return float(quotient.detach()), gradient - quotient.detach() * v.detach()


def _deviation(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if u.ndim != 3 or len(u) < 2:
        raise InputError(f"eigenfunction: a map must have shape [C, H, W] with C of at least 2, got {list(u.shape)}.")
    mean = u.detach().mean(dim=(1, 2), keepdim=True)
    v = _tangent(u.detach())
    # NaN fails this comparison, too.
    if not float(v.norm()) > 1e-6 * max(1.0, float(u.norm())):
        raise InputError("eigenfunction: the map is the same everywhere (or not finite); start with one that varies.")
    return mean, v


def eigenfunction(
    network: nn.Module,
    shape: tuple[int, int],
    classes: int,
    start: torch.Tensor | None = None,
    steps: int = 500,
    generator: torch.Generator | None = None,
    *,
    amplitude: float = 0.5,
    learning_rate: float = 0.05,
    image: torch.Tensor | None = None,
) -> Eigenfunction:
    r"""A map that the regularizer changes in its contrast alone: a nonlinear eigenfunction of its gradient.

    .. math::
        \min_v\ \lVert P\nabla R(\bar u + v) - \Lambda\,v\rVert^2, \qquad
        \Lambda = \frac{\langle P\nabla R(\bar u + v), v\rangle}{\lVert v\rVert^2}, \qquad
        \text{s.t.}\quad \sum_k v_{ik} = 0,\quad \sum_i v_{ik} = 0,\quad \lVert v\rVert = \sigma\lVert v^0\rVert,

    with :math:`R(u) = \sum_i r_i(u)` (the gradient is that per unit of mass, whatever the size of the map), P the projection
    onto the two linear constraints, and :math:`v^0 = u^0 - \bar u^0` the start. Where the residual is 0 the gradient flow
    :math:`\dot v = -P\nabla R` points along v: the pattern is one that R takes to be regular. It fades for
    :math:`\Lambda > 0` and is drawn out for :math:`\Lambda < 0`.

    The constraint, for segmentations: u is kept as a deviation from its own proportions :math:`\bar u`, not on the simplex.

    - The sums over classes keep u in the plane of the simplex, the sums over pixels keep its proportions. Their multipliers,
      one number per pixel and one per class, are those of the transport step (normalisation and ψ), so P takes away just what
      that step takes away from a gradient. Constant maps, which a class-wise regularizer cannot see (eigenvalue 0), are
      excluded.
    - The norm excludes :math:`v = 0`, towards which the residual falls trivially, and names the contrast: R is not
      homogeneous, so that each contrast has eigenfunctions of its own.
    - Bounds :math:`u \ge 0` are left out: where they are active the minimiser is no eigenfunction. Of the contrast of a crisp
      map only crisp maps are on the simplex, hence half of it by default (σ = 1/2). Values may still leave [0, 1] by some
      tenths; look at the range of u before reading it as a segmentation.

    Adam descends on v with a double backward pass and is brought back to the constraints after each step; its step size
    falls to zero along a cosine. The best iterate is returned. Minimisation is local: the start decides which eigenfunction is
    found. Mixtures of eigenfunctions whose eigenvalues lie a gap apart have a relative residual of up to half that gap over Λ
    and are slow to resolve; longer steps help more than more of them, but lead further away from the start.

    Args:
        network: :math:`r`, maps ``[1, C, H, W]`` (and an image) to per-pixel energies ``[1, H, W]``; twice differentiable. Its
            weights and their gradients are left alone.
        shape: ``(H, W)`` in px.
        classes: C, at least 2.
        start: :math:`u^0`, shape ``[C, H, W]``; by default the noise of :func:`starting_map`.
        steps: of Adam.
        generator: for the default start.
        amplitude: σ, positive.
        learning_rate: first step size of Adam, in units of the root mean square of v.
        image: shape ``[image_channels, H, W]``, for a regularizer that sees one.

    Returns:
        The map, its eigenvalue and how good it is; on the device and in the dtype of the network.

    Raises:
        InputError: a start of another shape or without variation, or options out of range.

    Source:
        The problem is that of E. Kobler, A. Effland, K. Kunisch and T. Pock, arXiv 2006.08789, section on nonlinear
        eigenfunctions, for images in a box; the constraint for segmentations and the optimiser are ours.
    """
    if steps < 1 or not 0 < amplitude < math.inf or not 0 < learning_rate < math.inf:
        raise InputError(
            f"eigenfunction: steps must be at least 1, amplitude and learning_rate positive, got {steps}, {amplitude} and "
            f"{learning_rate}."
        )
    if start is None:
        start = starting_map("noise", shape, classes, generator)
    if list(start.shape) != [classes, *shape]:
        raise InputError(f"eigenfunction: start must have shape {[classes, *shape]}, got {list(start.shape)}.")
    weight = next((x for x in network.parameters() if x.is_floating_point()), None)
    start = start if weight is None else start.to(weight)
    image = None if image is None else image.to(start)
    mean, v = _deviation(start)
    v = amplitude * v
    first, norm = v.clone(), v.norm()
    scale = norm / math.sqrt(v.numel())
    # Adam sees v in units of its root mean square, so that its step size means the same for all contrasts.
    point = (v / scale).requires_grad_(True)
    optimizer = torch.optim.Adam([point], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history: list[float] = []
    best, best_loss = v, math.inf
    for step in range(steps + 1):
        with torch.enable_grad():
            v = scale * point
            gradient, quotient = _quotient(network, mean, v, image, create_graph=True)
            loss = (gradient - quotient * v).square().sum()
            history.append(float(loss.detach()))
            if history[-1] < best_loss:
                best, best_loss = v.detach().clone(), history[-1]
            if step == steps:
                break
            (slope,) = torch.autograd.grad(loss, point)
        with torch.no_grad():
            slope = _tangent(slope)
            # Across the sphere the loss is not to change: only what runs along it moves v.
            slope -= point * (slope * point).sum() / point.square().sum()
            point.grad = slope
            optimizer.step()
            schedule.step()
            point.copy_(_tangent(point))
            point.mul_(norm / scale / point.norm())
    with torch.enable_grad():
        best.requires_grad_(True)
        gradient, quotient = _quotient(network, mean, best, image, create_graph=False)
    best = best.detach()
    defect, size = float((gradient - quotient.detach() * best).norm()), float(gradient.norm())
    return Eigenfunction(
        u=mean + best,
        eigenvalue=float(quotient.detach()),
        residual=defect / size if size > 0 else 0.0,
        history=history,
        start=mean + first,
    )


# ---- energies along the steps ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnergyPath:
    r"""Output of :func:`energies_along`; tensors of shape ``[B, steps + 1]`` in nats, from the start to the last step.

    Attributes:
        fidelity: :math:`\sum_i a_i(\lambda\langle c_i, u_i\rangle + \varepsilon\langle u_i, \log u_i\rangle)`.
        regularization: :math:`\alpha \sum_i a_i r_i(u)`.
        marginal: :math:`\rho\,\mathrm{KL}(\bar u\|p)` for a finite trust, else 0.
        total: their sum.
        residual: :math:`\lVert\bar u - p\rVert_1`, no unit; None without proportions.
        miou: mean intersection over union with the reference over the classes that occur in either map; None without one.
        times: :math:`s\tau`, shape ``[steps + 1]``.
        stopping_step: S, the step at which the learned stopping time is reached.
        stopping_time: T.
        u: segmentation at the chosen steps, each of shape ``[B, C, H, W]``; 0 at background.
    """

    fidelity: torch.Tensor
    regularization: torch.Tensor
    marginal: torch.Tensor
    total: torch.Tensor
    residual: torch.Tensor | None
    miou: torch.Tensor | None
    times: torch.Tensor
    stopping_step: int
    stopping_time: float
    u: dict[int, torch.Tensor]


@torch.no_grad()
def energies_along(
    model: UnrolledRefinement,
    confidence: torch.Tensor,
    proportions: torch.Tensor | None = None,
    trust: torch.Tensor | float = math.inf,
    mass: torch.Tensor | None = None,
    image: torch.Tensor | None = None,
    *,
    steps: int | None = None,
    labels: torch.Tensor | None = None,
    keep: Iterable[int] = (),
) -> EnergyPath:
    r"""Energies of each step of an unrolled refinement, up to its stopping time and beyond.

    .. math::
        E(u^s) = \sum_i a_i\bigl(\lambda\langle c_i, u_i^s\rangle + \varepsilon\langle u_i^s, \log u_i^s\rangle\bigr)
        + \alpha\sum_i a_i r_i(u^s) + \rho\,\mathrm{KL}(\bar u^s\|p), \qquad s = 0, \dots, \text{steps}.

    Args:
        model: the trained steps; not changed.
        confidence, proportions, trust, mass, image: see :meth:`UnrolledRefinement.forward`.
        steps: how far to go, at the model's step size; by default twice the model's number of steps.
        labels: reference, class indices, shape ``[B, H, W]``; 255 where unknown. Background does not count.
        keep: steps whose segmentation is kept.

    Returns:
        The energies by step.

    Raises:
        InputError: steps out of range, or labels that do not fit.
    """
    steps = 2 * model.steps if steps is None else steps
    kept = sorted(set(keep))
    if steps < 0 or any(not 0 <= s <= steps for s in kept):
        raise InputError(f"energies_along: steps must be at least 0 and keep from 0 to steps, got {steps} and {kept}.")
    batch, classes, height, width = confidence.shape
    if labels is not None:
        known = labels[labels != IGNORED]
        if labels.shape != (batch, height, width) or (
            known.numel() and not 0 <= int(known.min()) <= int(known.max()) < classes
        ):
            raise InputError(
                f"energies_along: labels must have shape {[batch, height, width]} and values 0 to {classes - 1} or {IGNORED}, "
                f"got {list(labels.shape)} and values {known.unique().tolist()[:8]}."
            )
    if mass is None:
        mass = torch.ones(batch, height, width, dtype=confidence.dtype, device=confidence.device)
    share = mass / mass.sum(dim=(1, 2), keepdim=True)
    tissue = mass > 0
    time, alpha, weight, epsilon, effective = model.scalars(0.0 if proportions is None else trust)
    cost = -weight * torch.log(confidence + model.delta)
    rho = float(effective)
    columns: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("fidelity", "regularization", "marginal", "residual", "miou")
    }
    maps: dict[int, torch.Tensor] = {}

    def record(u: torch.Tensor, energy: torch.Tensor) -> None:
        step = len(columns["fidelity"])
        u = u.detach()
        with torch.no_grad():
            local = (u * cost + epsilon * torch.xlogy(u, u)).sum(dim=1)
            columns["fidelity"].append((share * local).sum(dim=(1, 2)))
            columns["regularization"].append(alpha * (share * energy.detach()).sum(dim=(1, 2)))
            found = (u * share[:, None]).sum(dim=(2, 3))
            divergence = torch.zeros_like(columns["fidelity"][-1])
            if proportions is not None:
                p = proportions.to(found)
                columns["residual"].append((found - p).abs().sum(dim=1))
                if math.isfinite(rho):
                    # A class given as absent has no mass but that of the floor of log u, which is none in this dtype.
                    ratio = torch.xlogy(found, found / torch.where(p > 0, p, found.clamp_min(1e-30))) - found + p
                    divergence = rho * ratio.sum(dim=1)
            columns["marginal"].append(divergence)
            if labels is not None:
                columns["miou"].append(_miou(u.argmax(dim=1), labels, tissue, classes))
            if step in kept:
                maps[step] = u.clone()

    # Each u^s is seen once, at the beginning of the step after it: hence one step more.
    model.unroll(confidence, proportions, trust, mass, image, steps=steps + 1, on_step=record)
    stacked = {name: torch.stack(values, dim=1) for name, values in columns.items() if values}
    return EnergyPath(
        fidelity=stacked["fidelity"],
        regularization=stacked["regularization"],
        marginal=stacked["marginal"],
        total=stacked["fidelity"] + stacked["regularization"] + stacked["marginal"],
        residual=stacked.get("residual"),
        miou=stacked.get("miou"),
        times=torch.arange(steps + 1) * (float(time) / model.steps),
        stopping_step=model.steps,
        stopping_time=float(time),
        u=maps,
    )


def _miou(found: torch.Tensor, labels: torch.Tensor, tissue: torch.Tensor, classes: int) -> torch.Tensor:
    """Mean IoU of each image over the classes in either map, shape ``[B]``; NaN where nothing counts."""
    scores = []
    for one, reference, counted in zip(found, labels, tissue & (labels != IGNORED)):
        flat = reference[counted].long() * classes + one[counted]
        counts = torch.bincount(flat, minlength=classes**2).view(classes, classes).double()
        union = counts.sum(dim=0) + counts.sum(dim=1) - counts.diagonal()
        scores.append((counts.diagonal() / union)[union > 0].mean())
    return torch.stack(scores)


# ---- energy maps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegularizationMaps:
    r"""Per-pixel energies of one segmentation under two regularizers.

    Attributes:
        before: :math:`r_i` (times α for an unrolled model, then in nats), shape ``[B, H, W]``; 0 at background.
        after: likewise.
    """

    before: torch.Tensor
    after: torch.Tensor


@torch.no_grad()
def regularization_maps(
    before: nn.Module,
    after: nn.Module,
    u: torch.Tensor,
    mass: torch.Tensor | None = None,
    image: torch.Tensor | None = None,
) -> RegularizationMaps:
    r"""Energy maps :math:`r_i(u)` before and after training, of the same segmentation.

    Args:
        before: regularizer as initialised, or the unrolled model that holds it; the energies of a model are weighted by its α.
        after: the trained one.
        u: shape ``[B, C, H, W]``.
        mass: tissue, shape ``[B, H, W]``; everywhere by default. Background is seen as zeros.
        image: shape ``[B, image_channels, H, W]``, for regularizers that see one.

    Returns:
        Both maps.

    Raises:
        InputError: another shape of ``u`` or ``mass``.
    """
    if u.ndim != 4 or (mass is not None and mass.shape != (len(u), *u.shape[2:])):
        raise InputError(
            "regularization_maps: u must have shape [B, C, H, W] and mass [B, H, W], got "
            f"{list(u.shape)} and {None if mass is None else list(mass.shape)}."
        )
    tissue = torch.ones_like(u[:, 0]) if mass is None else (mass > 0).to(u)

    def energies(model: nn.Module) -> torch.Tensor:
        unrolled = isinstance(model, UnrolledRefinement)
        network = model.regularizer if unrolled else model
        seen = u * tissue[:, None]
        r = (network(seen) if image is None else network(seen, image)) * tissue
        return r * model.log_alpha.exp() if unrolled else r

    return RegularizationMaps(energies(before), energies(after))
