"""Losses for incomplete proportions: intervals, blanks, and which classes occur at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from monai_vslp.losses.proportion import _log_probability, _weights
from monai_vslp.utils.errors import InputError, ProportionError

__all__ = ["IntervalLoss", "PresenceLoss", "interval_bounds", "log_proportions", "project_interval"]

TOLERANCE = 1e-4  # by how much bounds may miss the simplex: sums of float32 fractions


def log_proportions(
    prediction: torch.Tensor, mass: torch.Tensor | None = None, logits: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Logarithms of predicted proportions, :math:`\log\hat p_k = \log\sum_i a_i q_{ik}`, finite for logits that are.

    Args:
        prediction: logits or probabilities, shape ``[B, C, h, w]``, float.
        mass: tissue, shape ``[B, 1, h, w]``, at least 0; None for tissue everywhere.
        logits: predictions are logits; False for probabilities.

    Returns:
        Log-proportions ``[B, C]``, and weights of the images ``[B]``, which sum to 1; 0 for an image without tissue.

    Raises:
        InputError: shapes that do not fit.
    """
    log_q = _log_probability(prediction, logits)
    pixels, images = _weights(mass, log_q)
    return torch.logsumexp(log_q.flatten(2) + pixels.log()[:, None], dim=2), images


def interval_bounds(proportions: torch.Tensor, width: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds for values of which some are blank: ``value ± width``, and 0 to 1 for a blank.

    Args:
        proportions: shape ``[B, C]``, fractions; NaN for a class left blank. Rows without blanks sum to 1.
        width: half of the step that values were rounded to, a fraction.

    Returns:
        Lower and upper bounds ``[B, C]``, in [0, 1].

    Raises:
        InputError: a negative width.
    """
    if not width >= 0:
        raise InputError(f"width must be at least 0 (a fraction), got {width}.")
    blank = proportions.isnan()
    lower = torch.where(blank, 0.0, proportions - width).clamp(0, 1)
    upper = torch.where(blank, 1.0, proportions + width).clamp(0, 1)
    return lower, upper


def _feasible(lower: torch.Tensor, upper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds as float64, between which the simplex certainly has a point."""
    lower, upper = lower.detach().double(), upper.detach().double()
    low, high = lower.sum(dim=1), upper.sum(dim=1)
    bad = (lower < 0).any(dim=1) | (upper < lower).any(dim=1) | (low > 1 + TOLERANCE) | (high < 1 - TOLERANCE)
    bad = bad | ~(lower.isfinite() & upper.isfinite()).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ProportionError(
            f"bounds need 0 <= lower <= upper and sum(lower) <= 1 <= sum(upper); image {row} of the batch has lower = "
            f"{[round(x, 4) for x in lower[row].tolist()]}, upper = {[round(x, 4) for x in upper[row].tolist()]}. "
            "Widen the bounds, or scale them as monai_vslp.data.proportions.parse_row does."
        )
    return lower / low.clamp_min(1)[:, None], upper / high.clamp_max(1)[:, None]


@torch.no_grad()
def project_interval(log_p: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    r"""The point of a box on the simplex that is nearest to :math:`\hat p`,

    .. math::
        m = \arg\min_{\ell \le m \le u,\ \sum_k m_k = 1} \mathrm{KL}(m\,\|\,\hat p), \qquad
        m_k = \min(\max(e^{\nu} \hat p_k, \ell_k), u_k),

    where one multiplier :math:`\nu` makes the sum 1. The sum grows with :math:`\nu` and bends only where a class leaves one of
    its bounds, so the stretch between two bends that holds the solution is looked up and solved in closed form: exact, without
    iterations.

    Args:
        log_p: :math:`\log\hat p`, shape ``[B, C]``, finite.
        lower, upper: :math:`\ell, u`, shape ``[B, C]``, fractions, with
            :math:`\ell \le u` and :math:`\sum\ell \le 1 \le \sum u`.

    Returns:
        :math:`m`, shape ``[B, C]``, float64, without gradient.

    Raises:
        ProportionError: bounds between which the simplex has no point.
    """
    lower, upper = _feasible(lower, upper)
    log_p = log_p.detach().double()
    leave, arrive = lower.log() - log_p, upper.log() - log_p  # the multipliers at which classes leave their bounds

    def clipped(nu: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.maximum((log_p[:, None] + nu[..., None]).exp(), lower[:, None]), upper[:, None])

    bends = torch.cat([leave, arrive], dim=1)
    # The smallest bend has all classes at their lower bounds, whose sum is at most 1: one bend always qualifies.
    below = clipped(bends).sum(dim=2) <= 1
    below |= bends == bends.amin(dim=1, keepdim=True)
    start = torch.where(below, bends, -torch.inf).amax(dim=1, keepdim=True)
    free = (leave <= start) & (start < arrive)
    held = torch.where(free, 0.0, torch.where(start < leave, lower, upper)).sum(dim=1, keepdim=True)
    rest = torch.logsumexp(torch.where(free, log_p, -torch.inf), dim=1, keepdim=True)
    # Where the free classes have vanished from p, rounding may leave them nothing: then the multiplier is the bend itself.
    nu = torch.where(free.any(dim=1, keepdim=True), (1 - held).clamp_min(0).log() - rest, start).maximum(start)
    return clipped(nu)[:, 0]


class IntervalLoss(nn.Module):
    r"""How far predicted proportions are from all proportions that lie within bounds,

    .. math::
        \min_{\ell \le m \le u,\ \sum_k m_k = 1} \mathrm{KL}(m\,\|\,\hat p),

    averaged over the images that have tissue: 0 where :math:`\ell \le \hat p \le u`, and outside the loss of
    :class:`~monai_vslp.losses.proportion.ProportionLoss` for the most favourable label that the bounds allow. KL from the label
    side is chosen because it is that loss where :math:`\ell = u`, and because a class that is missing from the map still gets a
    gradient. Its gradient is that of :math:`\mathrm{KL}(m\|\hat p)` with the minimiser held fixed (envelope theorem); only
    first derivatives are right.

    Blanks need no loss of their own. With :math:`[0, 1]` for the classes :math:`U` left blank and :math:`\ell = u = p` for the
    others, the minimum is the divergence over the known classes and the pooled rest,

    .. math::
        \sum_{k\notin U} p_k \log\frac{p_k}{\hat p_k} + r \log\frac{r}{\sum_{k\in U}\hat p_k},
        \qquad r = 1 - \sum_{k\notin U} p_k.

    Bounds come from :class:`~monai_vslp.data.proportions.ProportionLabel` (``lower``, ``upper``) or :func:`interval_bounds`.

    Args:
        logits: predictions are logits; False for probabilities.
    """

    def __init__(self, logits: bool = True) -> None:
        super().__init__()
        self.logits = logits

    def forward(
        self, prediction: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, mass: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            prediction: logits or probabilities, shape ``[B, C, h, w]``, float.
            lower, upper: bounds, shape ``[B, C]``, fractions.
            mass: tissue, shape ``[B, 1, h, w]``, at least 0; None for tissue everywhere.

        Returns:
            A scalar; 0 for a batch without tissue.

        Raises:
            InputError: shapes that do not fit.
            ProportionError: bounds between which the simplex has no point.
        """
        log_p, images = log_proportions(prediction, mass, self.logits)
        if lower.shape != log_p.shape or upper.shape != log_p.shape:
            raise InputError(
                f"bounds must have shape [B, C] = {list(log_p.shape)}, got {list(lower.shape)} and {list(upper.shape)}."
            )
        nearest = project_interval(log_p, lower.to(log_p.device), upper.to(log_p.device))
        value = (torch.xlogy(nearest, nearest) - nearest * log_p.double()).sum(dim=1)
        return (images * value.to(log_p)).sum()


class PresenceLoss(nn.Module):
    r"""Binary cross-entropy of which classes occur in an image, from pooled log-odds of the pixels,

    .. math::
        s_k = \frac1r \log \sum_i a_i e^{r z_{ik}}, \qquad z_{ik} = \log\frac{q_{ik}}{1 - q_{ik}}, \qquad
        -\sum_k \bigl(y_k \log\sigma(s_k) + (1 - y_k)\log\sigma(-s_k)\bigr),

    averaged over the classes whose presence is known and over the images that have tissue. Log-sum-exp pooling [1]_ lies
    between the mean (:math:`r \to 0`) and the maximum (:math:`r \to \infty`) of the log-odds. It is preferred to noisy-or,
    :math:`1 - \prod_i (1 - q_{ik})`, because that counts pixels: with 10⁴ of them a confidence of 0.001 everywhere already
    means presence, and a finer grid changes the answer. Here the weights sum to 1, the log-odds do not saturate, and the
    gradient with respect to :math:`s_k` never exceeds 1.

    For :math:`r = 1` a class counts as present where its mean odds exceed 1, so an area of 1 % does if the network is surer
    than about 0.99 there. Presence says nothing of amounts: combine it with
    :class:`IntervalLoss`, or take a lower bound above 0 where one is known.

    Args:
        sharpness: :math:`r > 0`.
        logits: predictions are logits; False for probabilities.

    Raises:
        InputError: a sharpness that is not positive.

    References:
        .. [1] P. O. Pinheiro, R. Collobert: From image-level to pixel-level labeling with convolutional networks. CVPR 2015.
    """

    def __init__(self, sharpness: float = 1.0, logits: bool = True) -> None:
        super().__init__()
        if not sharpness > 0:
            raise InputError(f"sharpness must be above 0, got {sharpness}.")
        self.sharpness, self.logits = sharpness, logits

    def pooled(self, prediction: torch.Tensor, mass: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled log-odds ``[B, C]`` and weights of the images ``[B]``; arguments as in :meth:`forward`."""
        log_q = _log_probability(prediction, self.logits)
        classes = log_q.shape[1]
        if classes < 2:
            raise InputError(f"presence needs predictions of at least 2 classes, got {classes}; add one for other tissue.")
        pixels, images = _weights(mass, log_q)
        log_q = log_q.flatten(2)
        # log(1 - q) as the sum of the other classes: exact where q is 1 to within rounding.
        others = [torch.cat([log_q[:, :k], log_q[:, k + 1 :]], dim=1).logsumexp(dim=1) for k in range(classes)]
        odds = log_q - torch.stack(others, dim=1)
        return torch.logsumexp(self.sharpness * odds + pixels.log()[:, None], dim=2) / self.sharpness, images

    def forward(self, prediction: torch.Tensor, presence: torch.Tensor, mass: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            prediction: logits or probabilities, shape ``[B, C, h, w]``, float.
            presence: 1 where a class occurs, 0 where it does not, NaN where that is not known; shape ``[B, C]``, float or bool.
            mass: tissue, shape ``[B, 1, h, w]``, at least 0; None for tissue everywhere.

        Returns:
            A scalar; 0 for a batch without tissue.

        Raises:
            InputError: shapes that do not fit, or fewer than two classes.
        """
        score, images = self.pooled(prediction, mass)
        if presence.shape != score.shape:
            raise InputError(f"presence must have shape [B, C] = {list(score.shape)}, got {list(presence.shape)}.")
        presence = presence.to(score)
        known = ~presence.isnan()
        value = F.binary_cross_entropy_with_logits(score, presence.nan_to_num(), reduction="none")
        value = torch.where(known, value, 0.0).sum(dim=1) / known.sum(dim=1).clamp_min(1)
        return (images * value).sum()
