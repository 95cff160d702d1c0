"""Losses between predicted and given proportions, and between two views of one image, as modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.utils import look_up_option
from torch import nn

from monai_vslp.utils.errors import InputError
from monai_vslp.variational.wasserstein import ground_metric, simplex_wasserstein

__all__ = ["ConsistencyLoss", "ProportionLoss", "wasserstein_proportions"]

Metric = str | torch.Tensor | Sequence[Sequence[float]]


def _check_metric(metric: Metric) -> str | torch.Tensor:
    """The metric's name, or its matrix ``[C, C]`` as float64."""
    if isinstance(metric, str):
        return look_up_option(metric, ("discrete", "ordinal"))
    return ground_metric(metric, len(metric))


def wasserstein_proportions(predicted: torch.Tensor, given: torch.Tensor, metric: Metric = "discrete") -> torch.Tensor:
    r"""Wasserstein-1 distance of proportions under a metric between classes,

    .. math::
        W_G(\hat p, p) = \min_{P \ge 0}\ \sum_{kl} P_{kl} G_{kl} \quad\text{with}\quad P 1 = \hat p,\ P^\top 1 = p,

    exact: in closed form where all classes are equally far apart or lie on a line, by a linear program otherwise, whose
    dual potentials are the gradient.

    Args:
        predicted: :math:`\hat p`, shape ``[B, C]``, on the simplex.
        given: :math:`p`, shape ``[B, C]``, on the simplex; a constant.
        metric: see :func:`monai_vslp.variational.wasserstein.ground_metric`.

    Returns:
        Distances, shape ``[B]``, in the unit of the metric, differentiable in ``predicted``.

    Raises:
        InputError: shapes that do not fit, or no metric.
    """
    if predicted.ndim != 2 or predicted.shape != given.shape:
        raise InputError(f"proportions must have one shape [B, C], got {list(predicted.shape)} and {list(given.shape)}.")
    fixed, target = predicted.detach().double().T, given.detach().double().T
    value, gradient = simplex_wasserstein(fixed, target.to(fixed), ground_metric(metric, predicted.shape[1]))
    # The distance is piecewise linear: its value and one linear term carry all of the first derivative.
    return value.to(predicted) + ((predicted - predicted.detach()) * gradient.T.to(predicted)).sum(dim=1)


def _log_probability(prediction: torch.Tensor, logits: bool) -> torch.Tensor:
    """Finite logarithms of class probabilities, in float32 or better."""
    if prediction.ndim != 4:
        raise InputError(f"predictions must have shape [B, C, h, w], got {list(prediction.shape)}.")
    if prediction.dtype in (torch.float16, torch.bfloat16):
        prediction = prediction.float()
    if logits:
        return prediction.log_softmax(dim=1)
    return prediction.clamp_min(torch.finfo(prediction.dtype).tiny).log()


def _weights(mass: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[B, n]`` of pixels, which add up to 1 in each image, and those ``[B]`` of images: 0 without tissue."""
    batch, _, height, width = like.shape
    if mass is None:
        mass = like.new_ones(batch, 1, height, width)
    if tuple(mass.shape) != (batch, 1, height, width):
        raise InputError(
            f"mass must have shape [B, 1, h, w] = {[batch, 1, height, width]}, got {list(mass.shape)}; "
            "monai_vslp.networks.confidence.token_mass(mass, stride) brings pixels onto the tokens' grid."
        )
    mass = mass.detach().to(like).flatten(1)
    total = mass.sum(dim=1, keepdim=True)
    tissue = (total > 0).to(like)
    # An image without tissue gets even weights, which its own weight of 0 then discards: nothing divides by 0.
    pixels = torch.where(total > 0, mass, torch.ones_like(mass))
    return pixels / pixels.sum(dim=1, keepdim=True), tissue.squeeze(1) / tissue.sum().clamp_min(1)


class ProportionLoss(nn.Module):
    r"""How far the proportions of a predicted map are from given ones. With tissue weights :math:`a_i`,
    :math:`\sum_i a_i = 1`, and :math:`\hat p = \sum_i a_i q_i`,

    .. math::
        \mathrm{KL}(p\,\|\,\hat p) + \lambda_1 \lVert\hat p - p\rVert_1 + \lambda_W W_G(\hat p, p)
        - \lambda_H \sum_i a_i \sum_k q_{ik}\log q_{ik},

    averaged over the images that have tissue. The first three terms are 0 where :math:`\hat p = p`. They are computed
    from log-probabilities, so a class that has vanished from a map still gets a gradient, and nothing overflows.

    Args:
        l1: :math:`\lambda_1 \ge 0`.
        wasserstein: :math:`\lambda_W \ge 0`.
        entropy: :math:`\lambda_H \ge 0`; works against flat maps that say :math:`p` everywhere.
        metric: :math:`G`, see :func:`wasserstein_proportions`.
        logits: predictions are logits; False for probabilities.

    Raises:
        InputError: a negative weight, or no metric.
    """

    def __init__(
        self,
        l1: float = 0.0,
        wasserstein: float = 0.0,
        entropy: float = 0.0,
        metric: Metric = "discrete",
        logits: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("l1", l1), ("wasserstein", wasserstein), ("entropy", entropy)):
            if not value >= 0:
                raise InputError(f"the weight {name} must be at least 0, got {value}.")
        self.l1, self.wasserstein, self.entropy, self.logits = l1, wasserstein, entropy, logits
        self.metric = _check_metric(metric)

    def forward(self, prediction: torch.Tensor, proportions: torch.Tensor, mass: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            prediction: logits or probabilities, shape ``[B, C, h, w]``, float.
            proportions: given proportions, shape ``[B, C]``, on the simplex; zeros allowed.
            mass: tissue, shape ``[B, 1, h, w]``, at least 0; None for tissue everywhere.

        Returns:
            A scalar; 0 for a batch without tissue.

        Raises:
            InputError: shapes that do not fit.
        """
        log_q = _log_probability(prediction, self.logits)
        if proportions.shape != log_q.shape[:2]:
            raise InputError(f"proportions must have shape [B, C] = {list(log_q.shape[:2])}, got {list(proportions.shape)}.")
        given = proportions.to(log_q)
        pixels, images = _weights(mass, log_q)
        log_q = log_q.flatten(2)
        log_predicted = torch.logsumexp(log_q + pixels.log()[:, None], dim=2)
        predicted = log_predicted.exp()
        value = (torch.xlogy(given, given) - given * log_predicted).sum(dim=1)
        if self.l1:
            value = value + self.l1 * (predicted - given).abs().sum(dim=1)
        if self.wasserstein:
            value = value + self.wasserstein * wasserstein_proportions(predicted, given, self.metric)
        if self.entropy:
            value = value - self.entropy * (pixels * (log_q.exp() * log_q).sum(dim=1)).sum(dim=1)
        return (images * value).sum()


class ConsistencyLoss(nn.Module):
    r"""Disagreement of two aligned views of an image, averaged over its tissue and over the images that have tissue:
    ``squared``, :math:`\lVert q_i - q_i'\rVert^2`, or ``kl``,
    :math:`\tfrac12(\mathrm{KL}(q_i\|q_i') + \mathrm{KL}(q_i'\|q_i))`.

    Args:
        kind: ``squared`` or ``kl``.
        logits: the views are logits; False for probabilities.

    Raises:
        ValueError: an unknown kind; names the nearest.
    """

    def __init__(self, kind: str = "squared", logits: bool = True) -> None:
        super().__init__()
        self.kind = look_up_option(kind, ("squared", "kl"))
        self.logits = logits

    def forward(self, first: torch.Tensor, second: torch.Tensor, mass: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            first, second: logits or probabilities of the views on one grid, shape ``[B, C, h, w]``, float.
            mass: tissue, shape ``[B, 1, h, w]``, at least 0; None for tissue everywhere.

        Returns:
            A scalar; 0 for a batch without tissue.

        Raises:
            InputError: shapes that do not fit.
        """
        if first.shape != second.shape:
            raise InputError(f"views must have one shape [B, C, h, w], got {list(first.shape)} and {list(second.shape)}.")
        log_q, log_r = _log_probability(first, self.logits), _log_probability(second, self.logits)
        pixels, images = _weights(mass, log_q)
        difference = log_q.exp() - log_r.exp()
        value = difference.square() if self.kind == "squared" else 0.5 * difference * (log_q - log_r)
        return (images * (pixels * value.sum(dim=1).flatten(1)).sum(dim=1)).sum()
