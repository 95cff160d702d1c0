"""The likelihood of what several raters wrote, given predicted proportions."""

from __future__ import annotations

import math

import numpy as np
import torch
from monai.utils import look_up_option
from torch import nn

from monai_vslp.losses.partial import log_proportions
from monai_vslp.utils.errors import InputError

__all__ = ["RaterLikelihood"]

STEPS = 10  # of Newton, to the mode of that scale
NODES = 16  # of the Gauss-Hermite rule over the scale that censored estimates are compared on


@torch.no_grad()
def _censored_mode(
    scale: torch.Tensor, total: torch.Tensor, gap: torch.Tensor, deviation: torch.Tensor, censored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Where the integrand
    :math:`N(c; \mathrm{scale}, 1/\mathrm{total}) \prod_k \Phi(\mathrm{gap}_k + c/\mathrm{deviation})` over censored classes k
    is largest, and how wide it is there; a rule around ``scale`` itself would miss the mass of estimates far in the tail.

    The logarithm is concave and its derivative convex, so Newton from ``scale`` climbs without overshooting.

    Returns:
        Mode and width, shape ``[B, R, 1]``.
    """
    centre = scale
    for _ in range(STEPS):
        x = gap + centre / deviation
        slope = math.sqrt(2 / math.pi) / torch.special.erfcx(-x / math.sqrt(2))  # of log Phi
        bend = (slope * (slope + x)).clamp(0, 1)  # less its second derivative, which rounding spoils in the tail
        bend = total + torch.where(censored, bend, 0.0).sum(dim=2, keepdim=True) / deviation.square()
        slope = total * (scale - centre) + torch.where(censored, slope, 0.0).sum(dim=2, keepdim=True) / deviation
        centre = centre + slope / bend
    return centre, bend.rsqrt()


class RaterLikelihood(nn.Module):
    r"""Negative log-likelihood of the estimates :math:`y_r` of raters :math:`r`, given predicted proportions :math:`\hat p`,

    .. math::
        -\frac1B \sum_i \sum_{r \in i} \log P(y_{ir} \mid \mu_{ir})
        + \frac{1}{N \sigma_b^2} \sum_{rk} b_{rk}^2,
        \qquad \mu_{ir} = \mathrm{softmax}(\log \hat p_i + b_r),

    a sum over the raters of an image and a mean over the images that have tissue and a rater. Two models:

    ``log_ratio``
        :math:`\log y_{rk} = \log\mu_{rk} + e_{rk} + \mathrm{const}`, :math:`e_{rk} \sim N(0, \sigma_e^2/2)`, as
        :func:`monai_vslp.data.raters.simulate_raters` draws them: a Gaussian in centred log-ratio coordinates [1]_. Rounding
        to steps of :math:`s` enters twice. It adds the variance of an even error within :math:`\pm s/2`, by the delta
        method :math:`s^2 / (12 y_{rk}^2)`. And an estimate below :math:`s/2`, 0 above all, is *censored*: it only says that the
        class is below :math:`s/2`. With :math:`O` the other classes, :math:`v_k` their variances, and
        the unknown constant :math:`c`, which the classes in :math:`O` leave a Gaussian law,

        .. math::
            P(y_r) = \int \prod_{k\in O} N(\log y_{rk} + c;\ \log\mu_{rk}, v_k)
            \prod_{k\notin O} \Phi\Bigl(\frac{\log(s/2) + c - \log\mu_{rk}}{\sigma_e/\sqrt2}\Bigr)\, dc,

        by a Gauss-Hermite rule around the largest value of the integrand. A class that nobody saw may vanish from the map at
        no cost, and no logarithm of 0 occurs.
    ``dirichlet``
        :math:`y_r \sim \mathrm{Dir}(\kappa\mu_r)`. Here estimates below :math:`s/2` get a *pseudo-count*: they become
        :math:`s/4`, the middle of what rounds to 0, and the others are scaled to keep the sum (multiplicative
        replacement [2]_). The most likely :math:`\hat p_k` of such a class is about that, not 0. For finite :math:`\kappa` the
        maximum obeys :math:`\psi(\kappa\hat p_k) - \log y_k = \mathrm{const}`: it is :math:`y` only as :math:`\kappa` grows.

    The offsets :math:`b_{rk}`, a rater's habits, are centred over the classes and have the prior :math:`N(0, \sigma_b^2/2)`,
    which shrinks them to 0. Deviations are those of the log ratio of two classes, hence the halves.
    Only *differences* between raters are identified: what all of them overrate alike cannot be told from the truth, so the mean
    offset over raters goes into :math:`\hat p` and the prior keeps it near 0. With one rater per image all of it does.

    A learned spread wants at least two raters per image: a network that reproduces one rater's estimates drives
    :math:`\sigma_e \to 0`, :math:`\kappa\to\infty`. Even with R raters a network free to fit each image finds
    :math:`\sigma_e` too small by :math:`\sqrt{1 - 1/R}`.

    Args:
        raters: R, the columns of the estimates.
        classes: C.
        model: ``log_ratio`` or ``dirichlet``.
        sigma_e: :math:`\sigma_e > 0` of ``log_ratio``; the start where it is learned.
        kappa: :math:`\kappa > 0` of ``dirichlet``; the start where it is learned.
        learn_spread: learn :math:`\sigma_e` or :math:`\kappa`.
        sigma_b: :math:`\sigma_b > 0` of the offsets' prior; None for raters without offsets.
        images: N, images of the training set: the prior counts once for all of them.
        step: :math:`s` in (0, 1], the step estimates were rounded to, a fraction; where steps differ the coarsest.
        logits: predictions are logits; False for probabilities.

    Attributes:
        log_spread: :math:`\log\sigma_e` or :math:`\log\kappa`, a parameter.
        raw_offsets: offsets before they are centred, a parameter ``[R, C]``, or None.

    Raises:
        InputError: a number out of its range.
        ValueError: an unknown model; names the nearest.

    References:
        .. [1] J. Aitchison: The statistical analysis of compositional data. JRSS B 44 (1982).
        .. [2] J. A. Martín-Fernández, C. Barceló-Vidal, V. Pawlowsky-Glahn: Dealing with zeros and missing values in
           compositional data sets using nonparametric imputation. Mathematical Geology 35 (2003).
    """

    def __init__(
        self,
        raters: int,
        classes: int,
        model: str = "log_ratio",
        sigma_e: float = 0.7,
        kappa: float = 20.0,
        learn_spread: bool = False,
        sigma_b: float | None = 0.5,
        images: int = 1,
        step: float = 0.05,
        logits: bool = True,
    ) -> None:
        super().__init__()
        self.model = look_up_option(model, ("log_ratio", "dirichlet"))
        if raters < 1 or classes < 2 or images < 1:
            raise InputError(
                f"raters and images must be at least 1 and classes at least 2, got {raters} raters, {images} images, "
                f"{classes} classes."
            )
        for name, value in (("sigma_e", sigma_e), ("kappa", kappa), ("sigma_b", sigma_b)):
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be above 0 and finite, got {value}.")
        if not 0 < step <= 1:
            raise InputError(f"step must be in (0, 1], a fraction such as 0.05, got {step}; take 0.01 for unrounded estimates.")
        self.raters, self.classes, self.images, self.step = raters, classes, images, step
        self.sigma_b, self.logits = sigma_b, logits
        spread = sigma_e if self.model == "log_ratio" else kappa
        self.log_spread = nn.Parameter(torch.tensor(math.log(spread)), requires_grad=learn_spread)
        self.raw_offsets = None if sigma_b is None else nn.Parameter(torch.zeros(raters, classes))
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        self.register_buffer("nodes", torch.from_numpy(nodes).float(), persistent=False)
        self.register_buffer("log_weights", torch.from_numpy(np.log(weights / weights.sum())).float(), persistent=False)

    @property
    def spread(self) -> torch.Tensor:
        r""":math:`\sigma_e` or :math:`\kappa`, a scalar."""
        return self.log_spread.exp()

    @property
    def offsets(self) -> torch.Tensor:
        """Offsets of the raters, shape ``[R, C]``, log-ratio units; each row has mean 0."""
        if self.raw_offsets is None:
            return self.log_spread.new_zeros(self.raters, self.classes)
        return self.raw_offsets - self.raw_offsets.mean(dim=1, keepdim=True)

    def _log_ratio(self, log_mean: torch.Tensor, estimates: torch.Tensor) -> torch.Tensor:
        limit = self.step / 2
        # The largest estimate always counts as seen, so that there is something to compare the others with.
        seen = estimates >= estimates.amax(dim=2, keepdim=True).clamp_max(limit)
        value = torch.where(seen, estimates, 1.0)
        deviation = self.spread.to(log_mean) / math.sqrt(2)
        variance = deviation.square() + self.step**2 / (12 * value.square())
        weight = torch.where(seen, 1 / variance, 0.0)
        total = weight.sum(dim=2, keepdim=True)
        residual = torch.where(seen, value.log() - log_mean, 0.0)
        scale = -(weight * residual).sum(dim=2, keepdim=True) / total  # mean of c; its variance is 1 / total
        log_density = torch.where(seen, (2 * math.pi * variance).log(), 0.0).sum(dim=2) + (total / (2 * math.pi)).log()[..., 0]
        log_density = -0.5 * (log_density + (weight * (residual + scale).square()).sum(dim=2))
        gap = (math.log(limit) - log_mean) / deviation
        centre, width = _censored_mode(*(x.detach() for x in (scale, total, gap, deviation)), ~seen)
        nodes = self.nodes.to(log_mean)
        constants = centre + width * nodes  # [B, R, nodes]
        below = torch.special.log_ndtr(gap[..., None] + constants[..., None, :] / deviation)
        below = torch.where(seen[..., None], 0.0, below).sum(dim=2)
        # What the rule takes for a standard normal density is divided out again.
        below = below + 0.5 * (nodes.square() - total * (constants - scale).square() + (total * width.square()).log())
        return log_density + torch.logsumexp(below + self.log_weights.to(log_mean), dim=2)

    def _dirichlet(self, log_mean: torch.Tensor, estimates: torch.Tensor) -> torch.Tensor:
        seen = estimates >= estimates.amax(dim=2, keepdim=True).clamp_max(self.step / 2)
        pseudo = min(self.step / 4, 0.5 / self.classes)
        kept = torch.where(seen, estimates, 0.0)
        kept = kept / kept.sum(dim=2, keepdim=True) * (1 - pseudo * (~seen).sum(dim=2, keepdim=True))
        log_y = torch.where(seen, kept, pseudo).log()
        log_kappa = self.log_spread.to(log_mean)
        count = log_kappa.exp() * log_mean.exp()
        # lgamma(x) = lgamma(1 + x) - log x stays finite where a class has vanished.
        log_gamma = torch.lgamma(1 + count) - log_kappa - log_mean
        return torch.lgamma(log_kappa.exp()) + ((count - 1) * log_y - log_gamma).sum(dim=2)

    def log_likelihood(self, log_p: torch.Tensor, estimates: torch.Tensor) -> torch.Tensor:
        r"""Log-likelihood of each estimate, a density (per unit of log ratios, or of fractions for ``dirichlet``).

        Args:
            log_p: :math:`\log\hat p`, shape ``[B, C]``, finite.
            estimates: shape ``[B, R, C]``, on the simplex; zeros allowed.

        Returns:
            Shape ``[B, R]``.
        """
        log_mean = (log_p[:, None] + self.offsets.to(log_p)).log_softmax(dim=2)
        model = self._log_ratio if self.model == "log_ratio" else self._dirichlet
        return model(log_mean, estimates.detach().to(log_p))

    def forward(
        self,
        prediction: torch.Tensor,
        estimates: torch.Tensor,
        present: torch.Tensor | None = None,
        mass: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            prediction: logits or probabilities, shape ``[B, C, h, w]``, float.
            estimates: what the raters wrote, shape ``[B, R, C]``, on the simplex; zeros allowed. Column r is one person in
                all images; anything, NaN too, where a rater did not see the image.
            present: which raters saw the image, shape ``[B, R]``, bool; None for all.
            mass: tissue, shape ``[B, 1, h, w]``, at least 0; None for tissue everywhere.

        Returns:
            A scalar; the prior alone for a batch without tissue or raters.

        Raises:
            InputError: shapes that do not fit.
        """
        log_p, images = log_proportions(prediction, mass, self.logits)
        shape = (log_p.shape[0], self.raters, self.classes)
        if tuple(estimates.shape) != shape or log_p.shape[1] != self.classes:
            raise InputError(
                f"estimates must have shape [B, R, C] = {list(shape)} and predictions {self.classes} classes, got "
                f"{list(estimates.shape)} and {log_p.shape[1]}."
            )
        if present is None:
            present = torch.ones(shape[:2], dtype=torch.bool, device=log_p.device)
        if tuple(present.shape) != shape[:2] or present.dtype != torch.bool:
            raise InputError(f"present must be bool [B, R] = {list(shape[:2])}, got {present.dtype} {list(present.shape)}.")
        present = present.to(log_p.device)
        # Estimates that were not made are replaced before anything is computed: a NaN would survive a product with 0.
        estimates = torch.where(present[..., None], estimates.to(log_p), 1 / self.classes)
        log_likelihood = torch.where(present, self.log_likelihood(log_p, estimates), 0.0).sum(dim=1)
        images = images * present.any(dim=1)
        value = -(images * log_likelihood).sum() / images.sum().clamp_min(torch.finfo(images.dtype).tiny)
        if self.sigma_b is None:
            return value
        return value + self.offsets.to(log_p).square().sum() / (self.sigma_b**2 * self.images)
