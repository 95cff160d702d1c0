"""Confidences as sure as proportions warrant: temperature and class offsets of a trained network, without masks."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from monai_vslp.utils.errors import InputError
from monai_vslp.variational.transport import solve_transport

__all__ = [
    "VARIANTS",
    "CalibrationFit",
    "calibrate_network",
    "calibration_objective",
    "conformal_half_width",
    "fit_calibration",
    "fit_offset",
    "mean_offset",
    "patients_needed",
    "pooled_proportions",
    "prior_shift",
    "temper",
]

VARIANTS = ("none", "temperature", "temperature_offset")
PRIOR = 0.02  # weight of the prior on log T and b, nats per unit squared (times one half)
LEAST_PATIENTS = 3  # to leave one out and still fit to different ones
LEAST_IMAGES = 6
LEAST_SPREAD = 0.03  # of given proportions: standard deviation over images, of the class that varies most
LARGEST_ERROR = math.log(2.0)  # standard error of log T beyond which T is called undetermined
LARGEST_LOG_TEMPERATURE = math.log(10.0)
ABSENT = 1e-3  # least share of a class in a mean of proportions: a class that was not seen may yet come


# ---- applying -----------------------------------------------------------------------------------------------------------


def temper(logits: torch.Tensor, temperature: float | torch.Tensor, offset: torch.Tensor, dim: int = 1) -> torch.Tensor:
    r"""Calibrated logits :math:`z / T + b`.

    Args:
        logits: :math:`z`, any shape with classes along ``dim``, float.
        temperature: :math:`T > 0`; above 1 makes less sure.
        offset: :math:`b`, shape ``[C]``; ``log(new / old)`` for a class whose share is new instead of old.
        dim: of the classes.

    Returns:
        Of the shape and dtype of ``logits``.
    """
    shape = [1] * logits.ndim
    shape[dim] = -1
    return logits / temperature + offset.to(logits).view(shape)


class _TemperOutput:
    """Forward hook: what a network gives, tempered."""

    def __init__(self, temperature: float, offset: Sequence[float]) -> None:
        self.temperature, self.offset = temperature, torch.tensor(list(offset), dtype=torch.float64)

    def __call__(self, network: nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return temper(logits, self.temperature, self.offset)


def calibrate_network(network: nn.Module, calibration: Mapping[str, Any] | None = None) -> nn.Module:
    r"""Let a network give calibrated logits, :math:`z \mapsto z / T + b`, from now on.

    A forward hook does it: the network stays the same object with the same state dictionary, so weights load as before, and
    images, views and tiles of slides, which all call it, need to know nothing. Logits of tokens are interpolated linearly to
    pixels, so tempering pixels is tempering tokens.

    Args:
        network: gives logits ``[B, C, H, W]``; must have ``num_classes`` for a check of the offsets.
        calibration: ``temperature``, a number above 0, and ``offset``, C numbers; None leaves the network as it is.

    Returns:
        ``network``.

    Raises:
        InputError: values that cannot be, or a network that is calibrated already.
    """
    if calibration is None:
        return network
    temperature, offset = calibration.get("temperature"), calibration.get("offset")
    classes = getattr(network, "num_classes", None)
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise InputError(f"calibration needs a temperature, a finite number above 0, got {temperature!r}.")
    if not isinstance(offset, Sequence) or not all(isinstance(b, (int, float)) and math.isfinite(b) for b in offset):
        raise InputError(f"calibration needs an offset, one finite number per class, got {offset!r}.")
    if classes is not None and len(offset) != classes:
        raise InputError(f"calibration has {len(offset)} offsets for a network of {classes} classes; calibrate it again.")
    if any(isinstance(hook, _TemperOutput) for hook in network._forward_hooks.values()):
        raise InputError("the network is calibrated already; load it anew to calibrate it in another way.")
    network.register_forward_hook(_TemperOutput(float(temperature), offset))
    return network


# ---- the objective ------------------------------------------------------------------------------------------------------


def _check(logits: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float64; weights add up to 1 in each image."""
    if logits.ndim != 3 or logits.shape[0] == 0 or logits.shape[1] == 0 or logits.shape[2] < 2:
        raise InputError(f"logits must have shape [n, m, C] with at least 2 classes, got {list(logits.shape)}.")
    if weights is None:
        weights = logits.new_ones(logits.shape[:2])
    if weights.shape != logits.shape[:2] or bool((weights < 0).any()) or bool((weights.sum(dim=1) <= 0).any()):
        raise InputError(
            f"weights must have shape {list(logits.shape[:2])}, be at least 0, and above 0 somewhere in each image, "
            f"got {list(weights.shape)}."
        )
    weights = weights.double()
    return logits.double(), weights / weights.sum(dim=1, keepdim=True)


def _log_pooled(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(logits.log_softmax(dim=2) + weights.log()[..., None], dim=1)


def pooled_proportions(
    logits: torch.Tensor,
    weights: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Predicted proportions of images, :math:`\hat p_I = \sum_i a_i \operatorname{softmax}(z_{Ii}/T + b)`.

    Args:
        logits: :math:`z`, shape ``[n, m, C]``: m points in each of n images.
        weights: :math:`a`, shape ``[n, m]``, at least 0; scaled to add up to 1. None for equal ones.
        temperature: :math:`T > 0`.
        offset: :math:`b`, shape ``[C]``; None for zeros.

    Returns:
        Shape ``[n, C]``, float64.

    Raises:
        InputError: shapes that do not fit.
    """
    logits, weights = _check(logits, weights)
    offset = logits.new_zeros(logits.shape[2]) if offset is None else offset
    return _log_pooled(temper(logits, temperature, offset, dim=2), weights).exp()


def calibration_objective(
    log_temperature: torch.Tensor,
    offset: torch.Tensor,
    logits: torch.Tensor,
    weights: torch.Tensor,
    proportions: torch.Tensor,
    prior: float = PRIOR,
) -> torch.Tensor:
    r"""How badly tempered confidences explain given proportions, and how far T and b are from doing nothing,

    .. math::
        L(\log T, b) = \sum_I \mathrm{KL}\Bigl(p_I\,\Big\|\,\sum_i a_{Ii} \operatorname{softmax}(z_{Ii}/T + b)\Bigr)
        + \frac\lambda2\bigl((\log T)^2 + \lVert b\rVert^2\bigr).

    The prior also picks one of the offsets that differ by a constant and mean the same: :math:`\sum_k b_k = 0`.

    Args:
        log_temperature: scalar.
        offset: :math:`b`, shape ``[C]``.
        logits: :math:`z`, shape ``[n, m, C]``, float64.
        weights: :math:`a`, shape ``[n, m]``, float64, adding up to 1 in each image.
        proportions: :math:`p`, shape ``[n, C]``, float64, on the simplex; zeros allowed.
        prior: :math:`\lambda \ge 0`.

    Returns:
        A scalar in nats, differentiable in ``log_temperature`` and ``offset``.
    """
    log_predicted = _log_pooled(temper(logits, log_temperature.exp(), offset, dim=2), weights)
    divergence = (torch.xlogy(proportions, proportions) - proportions * log_predicted).sum()
    return divergence + 0.5 * prior * (log_temperature.square() + offset.square().sum())


def _minimise(
    logits: torch.Tensor,
    weights: torch.Tensor,
    proportions: torch.Tensor,
    variant: str,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
    prior: float = PRIOR,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimiser ``(log T, b)`` of the objective by L-BFGS; what ``variant`` does not name stays 0."""
    log_temperature, offset = start or (logits.new_zeros(()), logits.new_zeros(logits.shape[2]))
    log_temperature, offset = log_temperature.clone(), offset.clone()
    free = [tensor for tensor, name in ((log_temperature, "temperature"), (offset, "offset")) if name in variant]
    if not free:
        return log_temperature, offset
    for tensor in free:
        tensor.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        free, max_iter=100, tolerance_grad=1e-7, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = calibration_objective(log_temperature, offset, logits, weights, proportions, prior)
        value.backward()
        return value

    optimizer.step(closure)
    return log_temperature.detach(), offset.detach()


# ---- the fit ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationFit:
    """What :func:`fit_calibration` found.

    Attributes:
        temperature: T; 1 where nothing was to be gained or learned.
        offset: b, shape ``[C]``, float64, adding up to 0.
        variant: which of :data:`VARIANTS` was taken.
        reason: why, a sentence.
        predicted: proportions of each image by a calibration that has not seen its group, shape ``[n, C]``, float64.
        before: proportions without calibration, shape ``[n, C]``, float64.
        errors: mean absolute error of held-out proportions by variant, fractions; empty where none was tried.
        temperatures: T of each variant fitted to all images, with the jackknife's standard error of log T.
    """

    temperature: float
    offset: torch.Tensor
    variant: str
    reason: str
    predicted: torch.Tensor
    before: torch.Tensor
    errors: dict[str, float] = field(default_factory=dict)
    temperatures: dict[str, tuple[float, float]] = field(default_factory=dict)


def _ill_posed(proportions: torch.Tensor, groups: Sequence[Hashable]) -> str:
    """Why T cannot be learned from these images, or nothing."""
    count, images = len(set(groups)), len(proportions)
    if count < LEAST_PATIENTS or images < LEAST_IMAGES:
        return (
            f"{images} images of {count} patients are too few to fit a calibration: at least {LEAST_IMAGES} images of "
            f"{LEAST_PATIENTS} patients are needed."
        )
    spread = float(proportions.std(dim=0).max())
    if spread < LEAST_SPREAD:
        return (
            f"given proportions hardly vary (standard deviation {100 * spread:.1f} % at most, {100 * LEAST_SPREAD:.0f} % are "
            "needed), so they do not say how predicted ones should move with the temperature."
        )
    return ""


def _by_group(values: torch.Tensor, groups: Sequence[Hashable]) -> torch.Tensor:
    """Means ``[G]`` of values ``[n]`` over groups."""
    names = list(dict.fromkeys(groups))
    place = torch.tensor([names.index(name) for name in groups])
    total = torch.zeros(len(names), dtype=values.dtype).index_add_(0, place, values)
    return total / torch.bincount(place, minlength=len(names))


def fit_calibration(
    logits: torch.Tensor,
    proportions: torch.Tensor,
    groups: Sequence[Hashable],
    weights: torch.Tensor | None = None,
    variant: str | None = None,
    prior: float = PRIOR,
) -> CalibrationFit:
    r"""Temperature and class offsets from images with proportions, :func:`calibration_objective` by L-BFGS in float64.

    Proportions see T only through how :math:`\hat p` moves with it: whether the mean confidence is the share of right pixels
    they cannot say. So the fit has to earn its place. Every variant is fitted without each group in turn, and a
    richer one is taken only if it meets the proportions left out better, by more than one standard error of the difference
    over groups. A variant whose T is undetermined (the jackknife's standard error of log T is above log 2, or T is beyond a
    factor of 10) is not eligible. With too few images, or proportions that hardly vary, T = 1 and b = 0.

    Args:
        logits: shape ``[n, m, C]``: m points in each of n images; of all views one after the other, where there are several.
        proportions: given ones, shape ``[n, C]``, on the simplex.
        groups: of each image what is left out together, such as its patient.
        weights: tissue at the points, shape ``[n, m]``; None for equal ones.
        variant: of :data:`VARIANTS`, taken whether it helps or not, as far as it is well-posed; None to choose.
        prior: weight of the prior, nats.

    Raises:
        InputError: shapes that do not fit, or an unknown variant.
    """
    logits, weights = _check(logits, weights)
    proportions = torch.as_tensor(proportions).double()
    if proportions.shape != (logits.shape[0], logits.shape[2]) or len(groups) != len(logits):
        raise InputError(
            f"expected proportions of shape {[logits.shape[0], logits.shape[2]]} and as many groups, got "
            f"{list(proportions.shape)} and {len(groups)}."
        )
    if variant is not None and variant not in VARIANTS:
        raise InputError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}.")
    before = pooled_proportions(logits, weights)
    nothing = logits.new_zeros(logits.shape[2])
    if variant == "none":
        return CalibrationFit(1.0, nothing, "none", "No calibration was asked for.", before, before)
    if problem := _ill_posed(proportions, groups):
        return CalibrationFit(1.0, nothing, "none", f"T = 1: {problem}", before, before)
    names = list(dict.fromkeys(groups))
    member = torch.tensor([names.index(name) for name in groups])
    fits, held_out, undetermined = {}, {"none": before}, {}
    fits["none"] = (logits.new_zeros(()), nothing)
    temperatures: dict[str, tuple[float, float]] = {}
    for name in VARIANTS[1:]:
        whole = _minimise(logits, weights, proportions, name, prior=prior)
        predicted, log_temperatures = torch.empty_like(before), []
        for index in range(len(names)):
            rest, mine = member != index, member == index
            part = _minimise(logits[rest], weights[rest], proportions[rest], name, start=whole, prior=prior)
            predicted[mine] = pooled_proportions(logits[mine], weights[mine], part[0].exp(), part[1])
            log_temperatures.append(part[0])
        values = torch.stack(log_temperatures)
        error = float(((len(names) - 1) / len(names) * (values - values.mean()).square().sum()).sqrt())
        fits[name], held_out[name] = whole, predicted
        temperatures[name] = (float(whole[0].exp()), error)
        if error > LARGEST_ERROR or abs(float(whole[0])) > LARGEST_LOG_TEMPERATURE:
            undetermined[name] = f"T = {temperatures[name][0]:.3g} within a factor of {math.exp(min(error, 50.0)):.3g}"
    image_errors = {name: (predicted - proportions).abs().mean(dim=1) for name, predicted in held_out.items()}
    eligible = [name for name in VARIANTS if name not in undetermined and variant in (None, name)]
    if not eligible:
        chosen, reason = "none", f"T = 1: {variant} is undetermined by these images ({undetermined[variant]})."
    elif variant is not None:
        chosen, reason = variant, "This variant was asked for."
    else:
        chosen, reason = _choose(image_errors, eligible, groups)
        if undetermined:
            reason += " Undetermined: " + "; ".join(f"{name} ({text})" for name, text in undetermined.items()) + "."
    log_temperature, offset = fits[chosen]
    errors = {name: float(values.mean()) for name, values in image_errors.items()}
    return CalibrationFit(
        float(log_temperature.exp()), offset - offset.mean(), chosen, reason, held_out[chosen], before, errors, temperatures
    )


def _choose(errors: Mapping[str, torch.Tensor], eligible: Sequence[str], groups: Sequence[Hashable]) -> tuple[str, str]:
    """The last of ``eligible`` that is better than the one taken so far by more than one standard error, and why."""
    chosen = eligible[0]
    for name in eligible[1:]:
        gain = _by_group(errors[chosen] - errors[name], groups)
        if float(gain.mean()) > float(gain.std() / math.sqrt(len(gain))):
            chosen = name
    if chosen == "none":
        return chosen, "T = 1: no calibration meets proportions of patients left out better by more than one standard error."
    plain, found = (100 * float(errors[name].mean()) for name in ("none", chosen))
    return chosen, f"Proportions of patients left out are missed by {found:.1f} % instead of {plain:.1f} %."


# ---- another site -------------------------------------------------------------------------------------------------------


def fit_offset(
    logits: torch.Tensor, proportions: torch.Tensor, weights: torch.Tensor | None = None, prior: float = PRIOR
) -> torch.Tensor:
    """Offsets that explain the proportions of a few images best, :func:`calibration_objective` with T = 1.

    Args:
        logits: shape ``[n, m, C]``, tempered already.
        proportions: shape ``[n, C]``, on the simplex.
        weights: shape ``[n, m]``; None for equal ones.
        prior: weight of the prior, nats; with few images it holds b near 0.

    Returns:
        Shape ``[C]``, float64, adding up to 0.
    """
    logits, weights = _check(logits, weights)
    offset = _minimise(logits, weights, torch.as_tensor(proportions).double(), "offset", prior=prior)[1]
    return offset - offset.mean()


def mean_offset(logits: torch.Tensor, mean: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    r"""Offsets under which images have a given mean proportion: the b with :math:`\frac1n\sum_I \hat p_I(b) = \bar p`.

    Unique up to a constant, by Newton on the concave semi-dual (:func:`~monai_vslp.variational.transport.solve_transport`).

    Args:
        logits: shape ``[n, m, C]``, tempered already.
        mean: :math:`\bar p`, shape ``[C]``, on the simplex; classes below 0.1 % are taken for 0.1 %, so that they may yet come.
        weights: shape ``[n, m]``; None for equal ones.

    Returns:
        Shape ``[C]``, float64, adding up to 0.
    """
    logits, weights = _check(logits, weights)
    target = torch.as_tensor(mean).double().clamp_min(ABSENT)
    scores = logits.flatten(0, 1).T.contiguous()
    mass = (weights / len(weights)).flatten()
    found = solve_transport(scores, mass, target / target.sum(), smoothing=1.0, tolerance=1e-10)
    return found.psi - found.psi.mean()


def prior_shift(
    logits: torch.Tensor,
    source: torch.Tensor,
    weights: torch.Tensor | None = None,
    tolerance: float = 1e-9,
    max_iterations: int = 10_000,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Shares of the classes at a new site from images without any proportions, by expectation maximisation [1]:

    .. math::
        \pi'_k \leftarrow \frac1n\sum_I\sum_i a_{Ii}
        \frac{(\pi'_k/\pi_k)\,q_{Iik}}{\sum_l (\pi'_l/\pi_l)\,q_{Iil}}, \qquad b_k = \log\frac{\pi'_k}{\pi_k}.

    It is maximum likelihood if appearance within a class is the same at both sites and confidences :math:`q` are true
    posteriors under :math:`\pi`; it sees nothing of whether they are.

    Args:
        logits: shape ``[n, m, C]``, tempered already: their softmax is :math:`q`.
        source: :math:`\pi`, shape ``[C]``, shares that the confidences were made for, above 0.
        weights: shape ``[n, m]``; None for equal ones.
        tolerance: stop when shares change by less, in the 1-norm.
        max_iterations: limit of the steps.

    Returns:
        Offsets b, adding up to 0, and shares :math:`\pi'`, both of shape ``[C]``, float64.

    Raises:
        InputError: a source share of 0.

    References:
        [1] Saerens, Latinne and Decaestecker, "Adjusting the outputs of a classifier to new a priori probabilities: a simple
        procedure", Neural Computation 14, 2002, equation 2.9.
    """
    logits, weights = _check(logits, weights)
    source = torch.as_tensor(source).double()
    if source.shape != (logits.shape[2],) or bool((source <= 0).any()):
        raise InputError(f"source shares must be {logits.shape[2]} numbers above 0, got {source.tolist()}.")
    source = source / source.sum()
    q = logits.flatten(0, 1).softmax(dim=1)
    mass = (weights / len(weights)).flatten()
    shares = source
    for _ in range(max_iterations):
        posterior = q * (shares / source)
        new = mass @ (posterior / posterior.sum(dim=1, keepdim=True))
        change, shares = float((new - shares).abs().sum()), new
        if change < tolerance:
            break
    offset = (shares.clamp_min(ABSENT**2) / source).log()  # a share that goes to 0 would be switched off for good
    return offset - offset.mean(), shares


# ---- intervals ----------------------------------------------------------------------------------------------------------


def patients_needed(level: float) -> int:
    """Patients without whom no interval of this level can be guaranteed: the least G with G / (G + 1) ≥ level."""
    if not 0 < level < 1:
        raise InputError(f"level must be above 0 and below 1, such as 0.9, got {level}.")
    return math.ceil(level / (1 - level) - 1e-9)


def conformal_half_width(errors: torch.Tensor, patients: Sequence[Hashable], level: float = 0.9) -> float | None:
    r"""Half width of an interval that holds the proportion of an image of a new patient with probability ``level``.

    With errors :math:`e_{gj}` of the :math:`n_g` images of patients :math:`g = 1..G`, the ``level`` quantile of

    .. math:: \sum_g\sum_j \frac{1}{(G+1)\,n_g}\,\delta_{e_{gj}} + \frac1{G+1}\,\delta_\infty .

    Patients are exchangeable, images of one are not independent [1]; with one image each it is the split-conformal quantile
    :math:`e_{(\lceil (G+1)\,\mathrm{level}\rceil)}` [2]. Coverage is over draws of the held-out patients and of the new one.

    Args:
        errors: absolute errors of held-out images, shape ``[n]``, at least 0.
        patients: of each image.
        level: of coverage, in (0, 1).

    Returns:
        The half width, or None where there are too few patients for the level (:func:`patients_needed`).

    Raises:
        InputError: a level that cannot be, or as many errors as there are not patients.

    References:
        [1] Lee, Barber and Willett, "Distribution-free inference with hierarchical data", 2023 (arXiv 2306.06342), section 3.
        [2] Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005, chapter 4.
    """
    errors = torch.as_tensor(errors).double()
    if errors.ndim != 1 or len(errors) != len(patients):
        raise InputError(f"errors must be one per image, got shape {list(errors.shape)} for {len(patients)} images.")
    sizes: dict[Hashable, int] = {}
    for name in patients:
        sizes[name] = sizes.get(name, 0) + 1
    if len(sizes) < patients_needed(level):
        return None
    mass = torch.tensor([1.0 / ((len(sizes) + 1) * sizes[name]) for name in patients], dtype=torch.float64)
    order = errors.argsort()
    reached = mass[order].cumsum(dim=0) >= level - 1e-12
    return float(errors[order][int(reached.double().argmax())])
