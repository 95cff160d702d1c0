"""What the proportions do to each pixel: derivatives of the transport step, and the band of one rounding step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from monai_vslp.utils.errors import InputError, ProportionError
from monai_vslp.variational.refine import RefinementResult, refine

__all__ = [
    "BandMove",
    "FlipBand",
    "energy_report",
    "flip_band",
    "marginal_sensitivity",
    "offset_sensitivity",
    "pixel_sensitivity",
]


# ---- derivatives of the transport step --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Linear:
    """The transport step linearised at ``u``; everything float64, over the classes of positive proportion.

    ``curvature`` is J = dū/dψ, ``offsets`` dψ/dp restricted to changes within the simplex, both ``[A, A]``.
    """

    active: torch.Tensor
    curvature: torch.Tensor
    offsets: torch.Tensor


def _linearise(
    u: torch.Tensor, mass: torch.Tensor, smoothing: float, proportions: torch.Tensor | Sequence[float], trust: float
) -> _Linear:
    classes = len(u)
    p = torch.as_tensor(proportions, dtype=torch.float64, device=u.device)
    if p.shape != (classes,) or not bool(torch.isfinite(p).all()) or float(p.min()) < 0 or float(p.sum()) <= 0:
        raise ProportionError(
            f"sensitivity: proportions must be {classes} numbers of at least 0, one per class of u, got {p.tolist()}."
        )
    if not (smoothing > 0 and math.isfinite(smoothing)) or not trust > 0:
        raise InputError(
            f"sensitivity: smoothing must be positive and finite, trust in (0, inf], got {smoothing} and {trust}; "
            "for a result of refine they are its options epsilon and trust."
        )
    if mass.shape != u.shape[1:] or float(mass.min()) < 0 or float(mass.sum()) <= 0:
        raise InputError(
            f"sensitivity: mass must be non-negative, not all zero and of shape {list(u.shape[1:])}, got {list(mass.shape)}."
        )
    active = p > 0
    p = p[active] / p.sum()
    share = mass.reshape(-1).double()
    share = share / share.sum()
    v = u.reshape(classes, -1)[active].double()
    weighted = v * share
    marginal = weighted.sum(dim=1)
    curvature = (torch.diag(marginal) - weighted @ v.T) / smoothing
    count = len(p)
    within = torch.eye(count, dtype=torch.float64, device=u.device) - 1.0 / count
    if math.isinf(trust):
        # ψ is free up to a constant, the null vector of J; the rank-one term picks the solution of mean zero.
        system, right = curvature + curvature.trace().clamp_min(1e-300) / count, within
    else:
        system, right = curvature + torch.diag(marginal) / trust, torch.diag(marginal / p) @ within
    if count == 1:
        return _Linear(active, curvature, torch.zeros_like(curvature))  # nothing to exchange
    offsets, failed = torch.linalg.solve_ex(system, right)
    divided = bool((system.diagonal() * smoothing > 1e-12 * marginal).all())
    if int(failed) or not divided or not bool(torch.isfinite(offsets).all()):
        raise InputError(
            "sensitivity: u is crisp (no pixel is divided between some classes, or one has no mass), so that its derivative "
            "does not exist; use flip_band, which moves the proportions by a finite step."
        )
    return _Linear(active, curvature, offsets)


def _all_classes(matrix: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    full = torch.zeros(len(active), len(active), dtype=torch.float64, device=matrix.device)
    full[active[:, None] & active] = matrix.flatten()
    return full


def offset_sensitivity(
    u: torch.Tensor,
    mass: torch.Tensor,
    smoothing: float,
    proportions: torch.Tensor | Sequence[float],
    trust: float = math.inf,
) -> torch.Tensor:
    r"""How the class offsets answer to a change of the proportions, :math:`\mathrm d\psi/\mathrm dp`.

    The transport step ends where :math:`p \circ e^{-\psi/\rho} = \bar u(\psi)` with
    :math:`u_i = \operatorname{softmax}((Z_i+\psi)/h)`. Both sides differentiated at fixed :math:`Z` (the regularizer's
    linearisation included), with :math:`e^{-\psi/\rho} = \bar u/p` at the optimum,

    .. math::
        \frac{\bar u}{p} \circ \mathrm dp - \frac{1}{\rho}\,\bar u \circ \mathrm d\psi = J\,\mathrm d\psi, \qquad
        J = \frac{\partial\bar u}{\partial\psi} = \frac1h\Bigl(\operatorname{diag}\bar u - \sum_i a_i u_i u_i^\top\Bigr),
        \\
        \frac{\mathrm d\psi}{\mathrm dp} = \Bigl(J + \frac1\rho\operatorname{diag}\bar u\Bigr)^{-1}
        \operatorname{diag}\Bigl(\frac{\bar u}{p}\Bigr)\,\Pi, \qquad \Pi = I - \tfrac1C \mathbf 1\mathbf 1^\top.

    :math:`\Pi` keeps :math:`p` on the simplex: column l is the answer to raising :math:`p_l` at the expense of all
    classes alike, and for any :math:`\mathrm dp` of sum zero the product is the exact directional derivative. With
    :math:`\rho = \infty` it becomes :math:`J^{+}\Pi`; ψ is then free up to a constant, and the derivative given is the one
    of mean zero.

    Args:
        u: optimal segmentation, shape ``[C, ...]``, on the simplex. For a result of ``refine`` this is ``result.u``.
        mass: :math:`a`, shape ``[...]``, non-negative, any scale; pixels of mass 0 do not count.
        smoothing: :math:`h > 0` of the step. At a converged result of ``refine`` the optimum is that of a step with
            :math:`h = \varepsilon`, its option ``epsilon``, and :math:`Z_i = -c_i - g_i`.
        proportions: :math:`p`, shape ``[C]``, fractions.
        trust: :math:`\rho`, in (0, ∞].

    Returns:
        Shape ``[C, C]``, float64, nats per unit of proportion: rows are the classes whose offset moves, columns those
        whose proportion is raised. Rows and columns of classes with :math:`p_k = 0` are 0: bringing in a class that was
        given as absent has no finite derivative; :func:`flip_band` covers it.

    Raises:
        InputError: shapes or parameters do not fit, or ``u`` is so crisp that the derivative does not exist.
        ProportionError: proportions are negative, not finite or of the wrong length.
    """
    linear = _linearise(u, mass, smoothing, proportions, trust)
    return _all_classes(linear.offsets, linear.active)


def marginal_sensitivity(
    u: torch.Tensor,
    mass: torch.Tensor,
    smoothing: float,
    proportions: torch.Tensor | Sequence[float],
    trust: float = math.inf,
) -> torch.Tensor:
    r"""How the proportions found follow those given, :math:`\mathrm d\bar u/\mathrm dp`.

    By the implicit function theorem (see :func:`offset_sensitivity`, whose symbols these are)

    .. math::
        \frac{\mathrm d\bar u}{\mathrm dp} = J\,\frac{\mathrm d\psi}{\mathrm dp}
        = J\Bigl(J + \frac1\rho\operatorname{diag}\bar u\Bigr)^{-1}\operatorname{diag}\Bigl(\frac{\bar u}{p}\Bigr)\,\Pi.

    With :math:`\rho = \infty` it is :math:`\Pi` itself: the result follows any change of sum zero in full. With finite
    trust the entries tell which fraction of a change of :math:`p` the result follows; where the image is sure (small J)
    that is little.

    Args:
        u: optimal segmentation, shape ``[C, ...]``.
        mass: :math:`a`, shape ``[...]``.
        smoothing: :math:`h > 0`; the option ``epsilon`` for a result of ``refine``.
        proportions: :math:`p`, shape ``[C]``, fractions.
        trust: :math:`\rho`, in (0, ∞].

    Returns:
        Shape ``[C, C]``, float64, no unit: rows are the classes whose share of the result changes, columns those whose
        given proportion is raised at the expense of all classes alike. Columns sum to 0. Rows and columns of classes
        with :math:`p_k = 0` are 0.

    Raises:
        InputError, ProportionError: as :func:`offset_sensitivity`.
    """
    linear = _linearise(u, mass, smoothing, proportions, trust)
    return _all_classes(linear.curvature @ linear.offsets, linear.active)


def pixel_sensitivity(
    u: torch.Tensor,
    mass: torch.Tensor,
    smoothing: float,
    proportions: torch.Tensor | Sequence[float],
    direction: torch.Tensor | Sequence[float],
    trust: float = math.inf,
) -> torch.Tensor:
    r"""How every pixel answers to a change of the proportions in one direction.

    .. math::
        \frac{\mathrm du_i}{\mathrm dp}[d] = \frac1h\,u_i \circ \bigl(\delta - \langle u_i, \delta\rangle\mathbf 1\bigr),
        \qquad \delta = \frac{\mathrm d\psi}{\mathrm dp}\,d,

    at fixed :math:`Z`, with :math:`\mathrm d\psi/\mathrm dp` of :func:`offset_sensitivity`. Sure pixels stay, divided ones
    move: the absolute value shows where the proportions decide.

    Args:
        u: optimal segmentation, shape ``[C, H, W]`` (or ``[C, ...]``).
        mass: :math:`a`, shape ``[H, W]``.
        smoothing: :math:`h > 0`; the option ``epsilon`` for a result of ``refine``.
        proportions: :math:`p`, shape ``[C]``, fractions.
        direction: :math:`d`, shape ``[C]``, sums to 0 and is 0 where :math:`p` is; +1 and −1 move mass from one class to
            another.
        trust: :math:`\rho`, in (0, ∞].

    Returns:
        Shape and dtype of ``u``, per unit of proportion; sums to 0 over the classes. Its mean by mass is the
        directional derivative of :math:`\bar u`. Pixels of mass 0 get the formula too.

    Raises:
        InputError, ProportionError: as :func:`offset_sensitivity`; also a direction that leaves the simplex.
    """
    d = torch.as_tensor(direction, dtype=torch.float64, device=u.device)
    linear = _linearise(u, mass, smoothing, proportions, trust)
    scale = float(d.abs().sum()) if d.shape == (len(u),) else math.nan
    if not abs(float(d.sum())) <= 1e-9 * max(scale, 1e-300) or bool((d[~linear.active] != 0).any()):
        raise InputError(
            f"pixel_sensitivity: direction must be {len(u)} finite numbers that sum to 0, and 0 for classes of proportion 0, "
            f"got {d.tolist()}; to move mass from class l to class k set d[k] = 1 and d[l] = -1."
        )
    change = torch.zeros(len(u), dtype=torch.float64, device=u.device)
    change[linear.active] = linear.offsets @ d[linear.active]
    change = change.to(u.dtype)
    pulled = torch.tensordot(change, u, dims=1)
    return u * (change.view(-1, *[1] * (u.ndim - 1)) - pulled) / smoothing


# ---- the band of one rounding step ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BandMove:
    """One change of the proportions and what it did.

    Attributes:
        source: index of the class that gave.
        target: index of the class that took.
        amount: proportion moved, a fraction: the step, or all of the source where that is less.
        flipped: share of the tissue area whose label changed, in [0, 1].
        converged: whether the refinement with these proportions converged.
    """

    source: int
    target: int
    amount: float
    flipped: float
    converged: bool


@dataclass(frozen=True)
class FlipBand:
    r"""An uncertainty band that proportions really imply.

    Proportions by people are rounded: whoever wrote 30 % would have written 25 % or 35 % had the tissue been a little
    different. The band is what hangs on that. Every pixel outside it keeps its label whichever class the rounding step is
    moved from and to; every pixel in it has another label for at least one such move. It is found by solving the whole
    problem again per move, regularizer included, not from a linear model and not from how sure the network is: a pixel the
    network doubts is outside the band when no nearby proportions would change it.

    It holds single moves of one step between two classes. It does not cover errors greater than the step, nor those of
    the network.

    Attributes:
        labels: label with the given proportions, shape ``[H, W]``, int64.
        flips: whether any move changes the label, shape ``[H, W]``, bool; False outside tissue.
        count: how many moves change it, shape ``[H, W]``, int64.
        alternatives: the most frequent other label over the moves, shape ``[H, W]``, int64; −1 where there is none.
        moves: what each move did, sources in class order, then targets.
        flipped: share of the tissue area in the band, in [0, 1].
        area: share of the tissue area that each class has in ``labels``, shape ``[C]``, float64.
        lower: smallest share over the given proportions and all moves, shape ``[C]``, float64.
        upper: largest share, shape ``[C]``, float64.
        step: rounding step, a fraction.
        coarsen: factor by which the maps were averaged; labels and band are constant on blocks of that many pixels.
        converged: whether all refinements converged. Where not, pixels near a tie may be in the band for that reason.
    """

    labels: torch.Tensor
    flips: torch.Tensor
    count: torch.Tensor
    alternatives: torch.Tensor
    moves: tuple[BandMove, ...]
    flipped: float
    area: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    step: float
    coarsen: int
    converged: bool

    def to_dict(self, class_names: Sequence[str]) -> dict[str, Any]:
        """All but the maps, in what JSON has; shares are fractions of the tissue area.

        Raises:
            InputError: not one name per class.
        """
        names = _names(class_names, len(self.area), "FlipBand.to_dict")
        return {
            "step": self.step,
            "flipped": self.flipped,
            "areas": {
                name: {"map": area, "lower": lower, "upper": upper}
                for name, area, lower, upper in zip(names, self.area.tolist(), self.lower.tolist(), self.upper.tolist())
            },
            "moves": [
                {
                    "from": names[move.source],
                    "to": names[move.target],
                    "amount": move.amount,
                    "flipped": move.flipped,
                    "converged": move.converged,
                }
                for move in self.moves
            ],
            "coarsen": self.coarsen,
            "converged": self.converged,
        }


def _names(class_names: Sequence[str], classes: int, where: str) -> list[str]:
    names = [str(name) for name in class_names]
    if len(names) != classes or len(set(names)) != classes:
        raise InputError(f"{where}: expected {classes} different class names, one per class in order, got {names}.")
    return names


def _block_sums(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Sums over blocks of ``factor``² pixels of the last two axes, fewer at the border; ``[K, H, W]`` to ``[K, h, w]``."""
    return F.avg_pool2d(x[None], factor, ceil_mode=True, divisor_override=1)[0]


def _coarsened(
    confidence: torch.Tensor, mass: torch.Tensor, image: torch.Tensor | None, factor: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Confidence averaged by mass, mass summed, image averaged, over blocks of ``factor``² pixels."""
    pixels = _block_sums(torch.ones_like(mass)[None], factor)
    sums = _block_sums(mass[None], factor)
    by_mass = _block_sums(confidence * mass, factor) / sums.clamp_min(torch.finfo(mass.dtype).tiny)
    q = torch.where(sums > 0, by_mass, _block_sums(confidence, factor) / pixels)
    small = None if image is None else _block_sums(torch.as_tensor(image).to(mass), factor) / pixels.to(mass)
    return q / q.sum(dim=0, keepdim=True), sums[0], small


def _enlarged(x: torch.Tensor, factor: int, shape: Sequence[int]) -> torch.Tensor:
    return x.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)[..., : shape[0], : shape[1]]


def _moves(p: torch.Tensor, step: float) -> list[tuple[int, int, float]]:
    """Source, target and amount of every move of ``step``, or of what is there, between two classes."""
    return [
        (source, target, min(step, float(p[source])))
        for source in range(len(p))
        for target in range(len(p))
        if source != target and float(p[source]) > 0
    ]


def flip_band(
    confidence: torch.Tensor,
    proportions: torch.Tensor | Sequence[float],
    mass: torch.Tensor | None = None,
    image: torch.Tensor | None = None,
    step: float = 0.05,
    coarsen: int = 1,
    on_move: Callable[[int, int], None] | None = None,
    **options: Any,
) -> FlipBand:
    r"""Which labels would be others, were the proportions one rounding step off.

    For every ordered pair of classes (k, l) with :math:`p_l > 0` the problem of
    :func:`~monai_vslp.variational.refine.refine` is solved anew, in full, with

    .. math:: p' = p + s\,(e_k - e_l), \qquad s = \min(\text{step}, p_l),

    and its labels :math:`\arg\max_k u'_{ik}` are compared with those of :math:`p`. A class that gives all it had does not
    occur in the result of that move, and a class that was given as absent does in those of the moves to it.

    The cost is one refinement and up to C(C − 1) more.

    Args:
        confidence: :math:`q`, shape ``[C, H, W]``, float32 or float64, on the simplex.
        proportions: :math:`p`, shape ``[C]``, fractions.
        mass: tissue per pixel, shape ``[H, W]``, non-negative; None for tissue everywhere.
        image: shape ``[channels, H, W]``, for its edges; None for none.
        step: rounding step of the rater as a fraction, in (0, 1): 0.05 for percentages given in fives.
        coarsen: average all maps over blocks of this many pixels a side first, and divide ``alpha`` by it, which keeps the
            price of a boundary of given length; for slides. 1 for full resolution.
        on_move: called with the number of refinements done and to do, after each.
        **options: options of ``refine``.

    Returns:
        The band, on the grid of ``confidence``.

    Raises:
        InputError: an argument or option that cannot be used; says what is expected.
        ProportionError: proportions that are negative, NaN, all zero or of the wrong length.

    Example:
        >>> q = torch.softmax(torch.randn(2, 16, 16), dim=0)
        >>> band = flip_band(q, [0.7, 0.3], step=0.1, alpha=0.1)
        >>> len(band.moves), bool((band.lower <= band.upper).all())
        (2, True)
    """
    if confidence.ndim != 3:
        raise InputError(
            f"flip_band: confidence must have shape [C, H, W], one image without batch axis, got {list(confidence.shape)}."
        )
    if not 0 < step < 1:
        raise InputError(f"flip_band: step is a fraction in (0, 1), got {step}; divide percentages by 100.")
    if not (isinstance(coarsen, int) and coarsen >= 1):
        raise InputError(f"flip_band: coarsen must be an integer of at least 1, got {coarsen!r}.")
    if proportions is None:
        raise ProportionError("flip_band: a band says what given proportions decide, so it needs proportions, got None.")
    classes, *shape = confidence.shape
    p = torch.as_tensor(proportions, dtype=torch.float64)
    if p.shape != (classes,):
        raise ProportionError(f"flip_band: proportions must have shape [{classes}], one per class, got {list(p.shape)}.")
    q = confidence if confidence.dtype == torch.float64 else confidence.float()
    mass = torch.ones(shape, dtype=q.dtype, device=q.device) if mass is None else torch.as_tensor(mass).to(q)
    if list(mass.shape) != shape or (image is not None and list(image.shape[-2:]) != shape):
        raise InputError(
            f"flip_band: mass and image must be of the size of the confidence, {shape}, "
            f"got {list(mass.shape)} and {None if image is None else list(image.shape)}."
        )
    if coarsen > 1:
        q, mass, image = _coarsened(q, mass, image, coarsen)
        options = options | {"alpha": options.get("alpha", 1.0) / coarsen}

    base = refine(q, p, mass, image, **options)  # checks confidence, proportions and options too

    def solve(target: torch.Tensor) -> RefinementResult:
        # The neighbour's solution is close, but its corners of the simplex are slow to leave: mix in the confidences.
        return refine(q, target, mass, image, start=0.95 * base.u + 0.05 * q, **options)

    p = p / p.sum()
    planned = _moves(p, step)
    if on_move is not None:
        on_move(1, len(planned) + 1)
    tissue = mass > 0
    share = mass.double() / mass.sum(dtype=torch.float64).clamp_min(1e-300)

    def areas(labels: torch.Tensor) -> torch.Tensor:
        return torch.bincount(labels.flatten(), share.flatten(), minlength=classes)

    count = torch.zeros_like(base.labels)
    votes = torch.zeros(classes, *base.labels.shape, dtype=torch.int16, device=q.device)
    area = areas(base.labels)
    lower, upper = area.clone(), area.clone()
    moves = []
    for done, (source, target, amount) in enumerate(planned, start=2):
        moved = p.clone()
        moved[target] += amount
        moved[source] = max(0.0, float(moved[source]) - amount)
        result = solve(moved)
        flips = (result.labels != base.labels) & tissue
        count += flips
        votes.scatter_add_(0, result.labels[None], flips[None].to(votes.dtype))
        found = areas(result.labels)
        lower, upper = torch.minimum(lower, found), torch.maximum(upper, found)
        moves.append(BandMove(source, target, amount, float(share[flips].sum()), bool(result.converged)))
        if on_move is not None:
            on_move(done, len(planned) + 1)
    in_band = count > 0
    alternatives = torch.where(in_band, votes.argmax(dim=0), -1)

    def full(x: torch.Tensor) -> torch.Tensor:
        return _enlarged(x, coarsen, shape)

    return FlipBand(
        labels=full(base.labels),
        flips=full(in_band),
        count=full(count),
        alternatives=full(alternatives),
        moves=tuple(moves),
        flipped=float(share[in_band].sum()),
        area=area,
        lower=lower,
        upper=upper,
        step=float(step),
        coarsen=coarsen,
        converged=bool(base.converged) and all(move.converged for move in moves),
    )


# ---- the numbers behind one result ------------------------------------------------------------------------------------


def _number(value: float) -> float | None:
    """JSON has no infinity and no NaN; these become None."""
    return float(value) if math.isfinite(value) else None


def energy_report(
    result: RefinementResult,
    class_names: Sequence[str],
    *,
    proportions: Sequence[float] | torch.Tensor | None = None,
    mass: torch.Tensor | None = None,
) -> dict[str, Any]:
    r"""The numbers that say why a segmentation is as it is.

    The energies of class region k, the pixels labelled k, are :math:`\sum_{i:\,\text{label}_i = k} a_i e_i` for the
    fidelity and :math:`\sum_i a_i\,\alpha r_i` over the same pixels for the regularizer; :math:`a` sums to 1 over the
    tissue, so the regions add up to the energies of the whole, but for :math:`\rho\,\mathrm{KL}(\bar u\|p)` of a finite
    trust, which belongs to no pixel.

    Args:
        result: of ``refine`` for one image, without batch axis.
        class_names: C names in class order.
        proportions: :math:`p` as given, shape ``[C]``, fractions; None where there were none.
        mass: as given to ``refine``, shape ``[H, W]``; None for tissue everywhere.

    Returns:
        What JSON can hold; values that are not finite are None:

        - ``energy``: ``fidelity``, ``regularization``, ``total`` (their sum) of the whole, in nats;
          ``first`` and ``last`` energy of the solver and the number of ``steps``;
        - ``classes``: per name ``area`` (share of the tissue with this label), ``fidelity``, ``regularization``, ``total``
          in nats, ``mean_total`` (total per tissue area of the region), ``offset`` (ψ in nats), ``odds_factor``
          (:math:`e^{\psi}`, by which the offset multiplies the confidence of the class in its odds; 0 for a class given as
          absent), ``given``, ``found`` (:math:`\bar u`);
        - ``residual``, ``converged``, ``reason``.

    Raises:
        InputError: a batch, or lengths and shapes that do not fit.
    """
    if result.labels.ndim != 2:
        raise InputError(
            f"energy_report: expected the result of one image, labels [H, W], got {list(result.labels.shape)}; "
            "refine the images of a batch one by one."
        )
    classes = len(result.u)
    names = _names(class_names, classes, "energy_report")
    given = None if proportions is None else torch.as_tensor(proportions, dtype=torch.float64).tolist()
    if given is not None and (not isinstance(given, list) or len(given) != classes):
        raise InputError(f"energy_report: proportions must be {classes} numbers, one per class, got {given}.")
    share = torch.ones_like(result.fidelity_energy) if mass is None else torch.as_tensor(mass).to(result.u)
    if share.shape != result.labels.shape:
        raise InputError(f"energy_report: mass must have shape {list(result.labels.shape)}, got {list(share.shape)}.")
    share = share.double() / share.sum(dtype=torch.float64).clamp_min(1e-300)
    labels = result.labels.flatten()

    def by_region(values: torch.Tensor) -> list[float]:
        return torch.bincount(labels, (share * values).flatten(), minlength=classes).tolist()

    area = by_region(torch.ones_like(share))
    fidelity, regularization = by_region(result.fidelity_energy), by_region(result.regularization_energy)
    psi = result.psi.tolist()
    found = result.proportions.tolist()
    regions = {}
    for k, name in enumerate(names):
        total = fidelity[k] + regularization[k]
        regions[name] = {
            "area": area[k],
            "fidelity": fidelity[k],
            "regularization": regularization[k],
            "total": total,
            "mean_total": total / area[k] if area[k] > 0 else None,
            "offset": _number(psi[k]),
            "odds_factor": None if math.isnan(psi[k]) else _number(math.exp(min(psi[k], 700.0))),
            "given": None if given is None else _number(given[k]),
            "found": _number(found[k]),
        }
    return {
        "energy": {
            "fidelity": sum(fidelity),
            "regularization": sum(regularization),
            "total": sum(fidelity) + sum(regularization),
            "first": float(result.energies[0]),
            "last": float(result.energies[-1]),
            "steps": len(result.energies) - 1,
        },
        "classes": regions,
        "residual": None if result.residual is None else _number(result.residual),
        "converged": bool(result.converged),
        "reason": str(result.reason),
    }
