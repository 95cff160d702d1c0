"""The front door of the variational stage: confidences and proportions in, a segmentation with its energies out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from monai_vslp.utils.errors import InputError, ProportionError
from monai_vslp.variational.fidelity import AssignmentFidelity, assignment_cost
from monai_vslp.variational.levels import Level, solve_levels
from monai_vslp.variational.marginal import Interval, KullbackLeibler, Marginal, MarginalSum, Wasserstein
from monai_vslp.variational.potential import FIDELITIES, REGULARIZERS, Potential
from monai_vslp.variational.regularizer import image_edge_weight
from monai_vslp.variational.solver import Step, StoppingRule
from monai_vslp.variational.tdv import DeepVariationPotential, TotalDeepVariation

__all__ = ["RefinementOptions", "RefinementResult", "marginal_for", "refine", "refine_all"]


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
        tolerance: relative energy change per step, three steps in a row, that counts as converged.
        marginal_tolerance: residual :math:`\lVert\bar u - p\rVert_1` that each step is solved to.
        multigrid: start from the solution on coarser grids; changes the time, not the minimiser.
        fidelity_weight: :math:`\lambda_a \ge 0`, weight of the costs; the entropy stays ε.
        fusion_weight: :math:`\lambda_b \ge 0`, weight of the per-pixel Wasserstein fusion of the stack of views.
        histogram_weight: :math:`\lambda_c \ge 0`, weight of the Wasserstein distance between proportions, which comes on
            top of a finite ``trust`` and replaces an infinite one.
        metric: ground metric G of both, ``discrete`` or ``ordinal``.
        fidelity: name in :data:`~monai_vslp.variational.FIDELITIES` of what ``fusion_weight`` weighs; one of another package
            gets the confidence as a stack of one view where there is no stack.
    """

    trust: float = math.inf
    alpha: float = 1.0
    epsilon: float = 0.1
    delta: float = 1e-3
    huber: float = 0.1
    edge_strength: float = 1.0
    max_iterations: int = 200
    tolerance: float = 3e-5
    marginal_tolerance: float = 1e-6
    multigrid: bool = True
    fidelity_weight: float = 1.0
    fusion_weight: float = 0.0
    histogram_weight: float = 0.0
    metric: str = "discrete"
    fidelity: str = "fusion"

    def __post_init__(self) -> None:
        for name in ("trust", "epsilon", "delta", "huber", "tolerance", "marginal_tolerance"):
            if not getattr(self, name) > 0:
                raise InputError(f"refine: {name} must be positive, got {getattr(self, name)}.")
        for name in ("alpha", "edge_strength", "fidelity_weight", "fusion_weight", "histogram_weight"):
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
        psi: class offsets ψ, shape ``[(B,) C]``, float64; −inf for a class that cannot occur; NaN where nothing was given.
        energies: energy of the start and after each accepted step; a list, or a list per image.
        residual: how far the conditions on ψ are from being met after the last step, with a hard marginal
            :math:`\lVert\bar u-p\rVert_1`; None without proportions. A value, or a list per image.
        converged: whether the stopping rule was met. A value, or a list per image.
        reason: why the iteration ended. A string, or a list per image.
        proportions: :math:`\bar u`, shape ``[(B,) C]``, float64.
        fidelity_energy: :math:`\langle c_i,u_i\rangle + \varepsilon\langle u_i,\log u_i\rangle` per pixel,
            shape ``[(B,) H, W]``; 0 outside tissue. In nats. None where ``energy_maps`` was False.
        regularization_energy: :math:`\alpha r_i` per pixel, same shape and unit, so that the sum of both is the total; None
            likewise.
    """

    u: torch.Tensor
    labels: torch.Tensor
    psi: torch.Tensor
    energies: list
    residual: float | None | list
    converged: bool | list
    reason: str | list
    proportions: torch.Tensor
    fidelity_energy: torch.Tensor | None
    regularization_energy: torch.Tensor | None


def marginal_for(
    proportions: torch.Tensor | None, bounds: tuple[torch.Tensor, torch.Tensor] | None, options: RefinementOptions
) -> Marginal | None:
    """The marginal term that proportions ``[C]`` or bounds ``([C], [C])`` and the options stand for; None for neither."""
    if bounds is not None:
        return Interval(*bounds)
    if proportions is None:
        return None
    trusted = None if math.isinf(options.trust) else KullbackLeibler(proportions, options.trust)
    if options.histogram_weight > 0:
        distance = Wasserstein(proportions, options.histogram_weight, options.metric)
        return distance if trusted is None else MarginalSum(trusted, distance)
    return Interval.constraint(proportions) if trusted is None else trusted


class _Embedded:
    """A potential of all classes seen by a solver that left out those which cannot occur."""

    def __init__(self, potential: Potential, active: torch.Tensor) -> None:
        self.potential, self.active = potential, active
        self.halo, self.multiple = potential.halo, potential.multiple

    def _full(self, u: torch.Tensor) -> torch.Tensor:
        full = torch.zeros(len(self.active), *u.shape[1:], dtype=u.dtype, device=u.device)
        full[self.active] = u
        return full

    def value(self, u, window=None):
        return self.potential.value(self._full(u), window)

    def value_and_gradient(self, u, window=None):
        value, gradient = self.potential.value_and_gradient(self._full(u), window)
        return value, gradient[self.active]

    def majorizer(self, u, window=None):
        gradient, curvature = self.potential.majorizer(self._full(u), window)
        return gradient[self.active], curvature

    def energy_map(self, u, window=None):
        return self.potential.energy_map(self._full(u), window)


def _refine_one(
    confidence: torch.Tensor,
    marginal: Marginal | None,
    mass: torch.Tensor,
    image: torch.Tensor | None,
    weight: torch.Tensor | None,
    stack: torch.Tensor | None,
    unary: torch.Tensor | None,
    network: TotalDeepVariation | str | None,
    options: RefinementOptions,
    start: torch.Tensor | None,
    on_step: Callable[[Step], bool | None] | None,
    energy_maps: bool,
) -> RefinementResult:
    classes, height, width = confidence.shape
    total = float(mass.sum(dtype=torch.float64))
    if total == 0.0:
        zeros = torch.zeros(height, width, dtype=confidence.dtype, device=confidence.device)
        nan = torch.full((classes,), math.nan, dtype=torch.float64)
        maps = (zeros, zeros.clone()) if energy_maps else (None, None)
        return RefinementResult(
            confidence.clone(), confidence.argmax(dim=0), nan, [0.0], None, True, "no tissue: nothing to refine", nan, *maps
        )
    share = mass / total
    active = torch.ones(classes, dtype=torch.bool) if marginal is None else marginal.active
    everything = bool(active.all())
    cost = options.fidelity_weight * assignment_cost(confidence, options.delta)
    if unary is not None:
        cost = cost + unary
    term = network if isinstance(network, str) else None
    if (
        weight is None
        and image is not None
        and options.alpha > 0
        and options.edge_strength > 0
        and (network is None or term is not None)
    ):
        weight = image_edge_weight(image, options.edge_strength).to(confidence)
    others: list[tuple[float, Potential]] = []
    if term is not None and options.alpha > 0:
        others.append((options.alpha, REGULARIZERS.find(term)(share, weight)))
    elif network is not None and options.alpha > 0:
        seen = None if not network.image_channels else image
        others.append((options.alpha, DeepVariationPotential(network, share, seen)))
    if stack is not None and options.fusion_weight > 0:
        others.append((options.fusion_weight, FIDELITIES.find(options.fidelity)(stack, share, metric=options.metric)))
    if not everything:
        others = [(factor, _Embedded(term, active)) for factor, term in others]
    level = Level(cost if everything else cost[active], share, weight)
    solution, smooth = solve_levels(
        level,
        marginal=marginal if marginal is None or everything else marginal.restricted(),
        epsilon=options.epsilon,
        alpha=0.0 if network is not None else options.alpha,
        huber=options.huber,
        others=others,
        stopping=StoppingRule(options.max_iterations, options.tolerance, options.marginal_tolerance),
        multigrid=options.multigrid,
        start=None if start is None else (start if everything else start[active]),
        on_step=on_step,
    )
    log_u = solution.log_u(slice(0, height), slice(0, width))
    found = log_u.exp()
    e_fidelity = e_regularization = None
    if energy_maps:
        fidelity = AssignmentFidelity(level.cost.reshape(len(found), -1), share.reshape(-1), options.epsilon)
        flat = found.reshape(len(found), -1)
        e_fidelity = fidelity.energy_map(flat, log_u.reshape(len(found), -1)).view(height, width) * (share > 0)
        e_regularization = torch.zeros_like(e_fidelity) if smooth is None else smooth.energy_map(found)
    u, psi = found, solution.psi
    proportions = solution.proportions
    if not everything:
        u = torch.zeros_like(confidence)
        u[active] = found
        psi = torch.full((classes,), -math.inf, dtype=torch.float64)
        psi[active] = solution.psi
        proportions = torch.zeros(classes, dtype=torch.float64)
        proportions[active] = solution.proportions
    if marginal is None:
        psi = torch.full((classes,), math.nan, dtype=torch.float64)
    return RefinementResult(
        u=u,
        labels=u.max(dim=0).indices,  # eight times as fast as argmax
        psi=psi,
        energies=solution.energies,
        residual=solution.residual,
        converged=solution.converged,
        reason=solution.reason,
        proportions=proportions,
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


def check_proportions(proportions: torch.Tensor, classes: int, batch: int) -> torch.Tensor:
    """Proportions ``[B, C]``, float64, made to add up to 1; raises ProportionError for what cannot be meant."""
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
    *,
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
    weight: torch.Tensor | None = None,
    stack: torch.Tensor | None = None,
    unary: torch.Tensor | None = None,
    regularizer: TotalDeepVariation | str | None = None,
    start: torch.Tensor | None = None,
    on_step: Callable[[Step], bool | None] | None = None,
    energy_maps: bool = True,
    **options: float | int | bool | str,
) -> RefinementResult:
    r"""Fuse pixel-wise confidences with global proportions and a regularizer.

    .. math::
        \min_{u_i\in\Delta_C} \; \sum_i a_i\bigl(\lambda_a\langle c_i,u_i\rangle + \varepsilon\langle u_i,\log u_i\rangle\bigr)
        + \Phi(\bar u) + \lambda_b D_b(u) + \alpha R(u), \qquad
        c_{ik} = -\log(q_{ik}+\delta),\quad \bar u = \sum_i a_i u_i,

    where Φ is :math:`\rho\,\mathrm{KL}(\bar u\|p)` (a constraint for ρ = ∞), plus :math:`\lambda_c W_G(\bar u, p)` where asked
    for, or bounds on :math:`\bar u`; :math:`D_b` the Wasserstein fusion of a stack of views; and R the Huber total variation,
    weighted by the edges of ``image`` where one is given, or a learned regularizer.

    Args:
        confidence: :math:`q`, shape ``[C, H, W]`` or ``[B, C, H, W]``, float32 or float64, on the simplex.
        proportions: :math:`p`, fractions of the tissue area, shape ``[C]`` or ``[B, C]``; None leaves them free.
            Classes of proportion 0 do not occur in the result.
        mass: tissue per pixel, shape ``[H, W]`` or ``[B, H, W]``, non-negative, any scale; 0 is background, which takes
            no part (its ``u`` is the softmax of its costs and ψ). All ones by default.
        image: shape ``[channels, H, W]`` or ``[B, channels, H, W]``, any dtype; only its edges are used, except by a
            learned regularizer that sees images.
        bounds: lower and upper fractions per class, each of shape ``[C]`` or ``[B, C]``, instead of ``proportions``.
        weight: price of boundaries, shape ``[H, W]`` or ``[B, H, W]``, positive, in place of that of the image's edges
            (:func:`~monai_vslp.variational.image_edge_weight`); of total variation and named regularizers.
        stack: confidences of the single views, shape ``[A, C, H, W]`` or ``[B, A, C, H, W]``, for ``fusion_weight`` > 0.
        unary: costs of classes beside those of the confidences, in nats, shape of ``confidence``, finite; what a person painted
            costs much in all other classes, for instance. Part of the fidelity, whatever its weight, and of its energy.
        regularizer: a trained network instead of total variation; or a name in
            :data:`~monai_vslp.variational.REGULARIZERS`, of a part that is made by ``part(mass, weight)`` (``[H, W]`` each, the
            weight of the image's edges or None). Both are solved on one grid.
        start: a segmentation to start from, shape of ``confidence``, such as that of other proportions.
        on_step: called with a :class:`~monai_vslp.variational.solver.Step` after each step; returning False stops there,
            with what has been found.
        energy_maps: find the energies per pixel; without them a call of few steps takes a tenth less.
        **options: fields of :class:`RefinementOptions`.

    Returns:
        The segmentation with potentials, energies and status.

    Raises:
        InputError: a shape, value or option that cannot be used; says what is expected.
        ProportionError: proportions that are negative, NaN, all zero or of the wrong length, bounds that none satisfy.

    Example:
        >>> q = torch.softmax(torch.randn(3, 32, 32), dim=0)
        >>> result = refine(q, proportions=[0.6, 0.3, 0.1])
        >>> bool((result.proportions - torch.tensor([0.6, 0.3, 0.1])).abs().max() < 1e-5)
        True
    """
    settings = refinement_options(options)
    if regularizer == "total_variation":
        regularizer = None
    elif regularizer == "total_deep_variation":
        raise InputError(
            "refine: total_deep_variation needs a trained network; pass it, or the folder of one to the transform."
        )
    _check_confidence(confidence)
    batched = confidence.ndim == 4
    q = confidence if batched else confidence[None]
    q = q if q.dtype == torch.float64 else q.float()
    batch, classes, height, width = q.shape
    if proportions is not None and bounds is not None:
        raise ProportionError("refine: give proportions or bounds, not both.")
    p = None if proportions is None else check_proportions(proportions, classes, batch)
    low_high = None
    if bounds is not None:
        low_high = [torch.as_tensor(x, dtype=torch.float64).expand(batch, -1) for x in bounds]
        if len(low_high) != 2 or any(x.shape != (batch, classes) for x in low_high):
            raise ProportionError(f"refine: bounds are two lists of {classes} fractions, got {bounds}.")
    if mass is None:
        mass = torch.ones(height, width, device=q.device)
    mass = _broadcast(mass, (batch, height, width), "mass", q).to(q)
    if not bool(torch.isfinite(mass).all()) or float(mass.min()) < 0:
        raise InputError("refine: mass must be finite and not negative (tissue area per pixel).")
    if image is not None:
        image = _broadcast(image, (batch, None, height, width), "image", q)
    if weight is not None:
        weight = _broadcast(weight, (batch, height, width), "weight", q).to(q)
        if not bool(torch.isfinite(weight).all()) or float(weight.min()) <= 0:
            raise InputError("refine: weight must be finite and positive (price of boundaries per pixel).")
    if stack is not None:
        stack = _broadcast(stack, (batch, None, classes, height, width), "stack", q).to(q)
    elif settings.fusion_weight > 0 and settings.fidelity != "fusion":
        stack = q[:, None]
    elif settings.fusion_weight > 0:
        raise InputError(
            "refine: fusion_weight needs the stack of views; pass stack=[A, C, H, W] (TTAConfidence(output='stack'))."
        )
    if unary is not None:
        unary = _broadcast(unary, (batch, classes, height, width), "unary", q).to(q)
        if not bool(torch.isfinite(unary).all()):
            raise InputError("refine: unary costs must be finite; 20 nats rule a class out.")
    if start is not None:
        start = _broadcast(start, (batch, classes, height, width), "start", q).to(q).clamp_min(1e-12).log()
    results = [
        _refine_one(
            q[i],
            marginal_for(None if p is None else p[i], None if low_high is None else (low_high[0][i], low_high[1][i]), settings),
            mass[i],
            None if image is None else image[i],
            None if weight is None else weight[i],
            None if stack is None else stack[i],
            None if unary is None else unary[i],
            regularizer,
            settings,
            None if start is None else start[i],
            on_step,
            energy_maps,
        )
        for i in range(batch)
    ]
    if not batched:
        return results[0]
    merged = {}
    for field in fields(RefinementResult):
        values = [getattr(result, field.name) for result in results]
        merged[field.name] = torch.stack(values) if isinstance(values[0], torch.Tensor) else values
    if not energy_maps:
        merged |= {"fidelity_energy": None, "regularization_energy": None}
    return RefinementResult(**merged)


def refinement_options(options: dict) -> RefinementOptions:
    """Options by name.

    Raises:
        InputError: an unknown name, or an impossible value.
    """
    known = [field.name for field in fields(RefinementOptions)]
    for name in options:
        if name not in known:
            raise InputError(f"refine: unknown option {name!r}; options are {', '.join(known)}.")
    return RefinementOptions(**options)


def refine_all(
    confidences: Sequence[torch.Tensor],
    proportions: Sequence[torch.Tensor | Sequence[float] | None] | None = None,
    masses: Sequence[torch.Tensor | None] | None = None,
    images: Sequence[torch.Tensor | None] | None = None,
    **options: float | int | bool | str,
) -> list[RefinementResult]:
    """Refine maps of different sizes; see :func:`refine`.

    Args:
        confidences: maps ``[C, H, W]``, each of its own size.
        proportions, masses, images: one entry per map, or None for none at all.
        **options: as for :func:`refine`.

    Raises:
        InputError: lists of different lengths, or what :func:`refine` refuses; the message begins with the map's index.
    """
    count = len(confidences)
    columns = [[None] * count if column is None else list(column) for column in (proportions, masses, images)]
    if any(len(column) != count for column in columns):
        raise InputError(
            f"refine_all: {count} maps need as many proportions, masses and images, got {[len(c) for c in columns]}."
        )
    results = []
    for index, (q, p, mass, image) in enumerate(zip(confidences, *columns)):
        try:
            results.append(refine(q, p, mass, image, **options))
        except InputError as error:
            raise type(error)(f"map {index}: {error}") from error
    return results
