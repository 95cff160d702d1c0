"""Random label maps and degraded confidences over them, with known truth: for benchmarks, tests and learned regularizers.

Label maps are tissue-like in their geometry only (regions, glands, strands, islands); confidences err as networks do (confused
classes, a bias per class, noise with and without spatial correlation). Figures measured on them say nothing about patients.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from monai_vslp.utils.errors import InputError

__all__ = ["degraded_confidence", "random_label_map", "reference_case"]

STRAND_WIDTH = 0.12  # half width of strands in standard deviations of the field whose zero line they follow
ISLAND_LEVEL = 2.1  # islands are where a field of unit variance exceeds this


def _spline_basis(length: int, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Cubic B-splines on knots ``scale`` px apart, shape ``[length, knots]``; rows of unit Euclidean norm."""
    device = generator.device
    offset = torch.rand(1, generator=generator, device=device)
    x = torch.arange(length, device=device) / scale + 1.0 + offset
    knots = torch.arange(math.ceil(length / scale) + 4, device=device)
    t = (x[:, None] - knots).abs()
    basis = torch.where(t < 1, 2 / 3 - t.square() + t.pow(3) / 2, (2 - t).clamp_min(0).pow(3) / 6)
    return F.normalize(basis, dim=1)


def _smooth_fields(count: int, shape: tuple[int, int], scale: float, generator: torch.Generator) -> torch.Tensor:
    """Gaussian fields of unit variance that vary over ``scale`` px, shape ``[count, H, W]``, float32."""
    rows, columns = (_spline_basis(length, scale, generator) for length in shape)
    noise = torch.randn(count, rows.shape[1], columns.shape[1], generator=generator, device=generator.device)
    return rows @ noise @ columns.T


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, device=generator.device))


def _draw_gland(labels: torch.Tensor, wall: int, lumen: int, scale: float, generator: torch.Generator) -> None:
    """Draw an ellipse of semi-axes 0.15 to 0.5 ``scale`` into ``labels`` in place, inside its bounding box alone."""
    height, width = labels.shape
    row, column = _uniform(0, height, generator), _uniform(0, width, generator)
    major = _uniform(0.2, 0.5, generator) * scale
    minor = _uniform(0.6, 1.0, generator) * major
    thickness = _uniform(0.25, 0.5, generator)
    angle = _uniform(0, math.pi, generator)
    top, bottom = max(0, math.floor(row - major)), min(height, math.ceil(row + major) + 1)
    left, right = max(0, math.floor(column - major)), min(width, math.ceil(column + major) + 1)
    dy = torch.arange(top, bottom, device=labels.device)[:, None] - row
    dx = torch.arange(left, right, device=labels.device)[None] - column
    along = (math.cos(angle) * dx + math.sin(angle) * dy) / major
    across = (math.cos(angle) * dy - math.sin(angle) * dx) / minor
    radius = (along.square() + across.square()).sqrt()
    box = labels[top:bottom, left:right]
    box[radius < 1] = wall
    box[radius < 1 - thickness] = lumen


def random_label_map(
    shape: tuple[int, int],
    classes: int,
    generator: torch.Generator,
    scale: float = 64.0,
    *,
    absent: float = 0.15,
    detail: float = 1.0,
) -> torch.Tensor:
    r"""Label map with the geometry of tissue.

    Regions are

    .. math:: \ell_i = \arg\max_k \Bigl(o_k + \sum_{j=0}^{2} v_{j}\, f^{(j)}_{ik}\Bigr),

    with Gaussian fields :math:`f^{(j)}` (cubic splines on random coefficients) that vary over ``scale``, ``scale / 2`` and
    ``scale / 4`` px, weights :math:`v` with squares that sum to 1, and class offsets :math:`o_k \sim N(0, 0.5^2)`, so that the
    proportions differ from map to map. Into them are drawn strands (along the zero line of a field), islands (where a finer
    field is high) and glands (ellipses with wall and lumen), each of randomly chosen classes.

    Args:
        shape: ``(H, W)`` in px.
        classes: number of classes C, at least 2.
        generator: source of all randomness; the map lies on its device.
        scale: size of the largest structures in px, at least 4.
        absent: probability of each class not to occur at all, in [0, 1); two classes always remain.
        detail: how many glands are drawn, in glands per ``(2 scale)²`` px on average, and whether strands and islands are
            (``detail > 0``).

    Returns:
        Class indices, shape ``[H, W]``, int64.

    Raises:
        InputError: a size, number or probability that cannot be used.
    """
    if len(shape) != 2 or min(shape) < 1:
        raise InputError(f"random_label_map: shape must be (H, W) with at least one pixel each, got {tuple(shape)}.")
    if classes < 2:
        raise InputError(f"random_label_map: classes must be at least 2, got {classes}.")
    if not (scale >= 4 and math.isfinite(scale)):
        raise InputError(f"random_label_map: scale must be finite and at least 4 px, got {scale}.")
    if not 0 <= absent < 1 or not (detail >= 0 and math.isfinite(detail)):
        raise InputError(
            f"random_label_map: absent must lie in [0, 1) and detail be finite and at least 0, got {absent} and {detail}."
        )
    device = generator.device
    height, width = shape
    draw = torch.rand(classes, generator=generator, device=device)
    # The two classes with the largest draws occur in any case.
    present = ((draw >= absent) | (draw >= draw.topk(2).values[-1])).nonzero().flatten()
    count = len(present)

    weights = F.normalize(
        torch.rand(3, generator=generator, device=device) + torch.tensor([1.0, 0.4, 0.0], device=device), dim=0
    )
    fields = 0.5 * torch.randn(count, 1, 1, generator=generator, device=device)
    for level, weight in enumerate(weights.tolist()):
        fields = fields + weight * _smooth_fields(count, shape, max(scale / 2**level, 2.0), generator)
    labels = present[fields.argmax(dim=0)]
    if detail == 0:
        return labels

    def pick() -> int:
        return int(present[torch.randint(count, (), generator=generator, device=device)])

    coarse, line = _smooth_fields(2, shape, scale, generator)
    labels[(line.abs() < STRAND_WIDTH) & (coarse > 0)] = pick()
    fine = _smooth_fields(1, shape, max(scale / 6, 2.0), generator)[0]
    labels[(fine > ISLAND_LEVEL) & (coarse < 0)] = pick()
    wall, lumen = pick(), pick()
    expected = torch.tensor(detail * height * width / (2 * scale) ** 2, device=device)
    for _ in range(int(torch.poisson(expected, generator=generator))):
        _draw_gland(labels, wall, lumen, scale, generator)
    return labels


def _default_confusion(classes: int, diagonal: float = 0.5) -> torch.Tensor:
    """Confusion with ``diagonal`` for the true class and the rest spread evenly, shape ``[C, C]``."""
    rest = (1 - diagonal) / (classes - 1)
    return torch.full((classes, classes), rest) + (diagonal - rest) * torch.eye(classes)


def degraded_confidence(
    labels: torch.Tensor,
    classes: int,
    generator: torch.Generator,
    confusion: torch.Tensor | None = None,
    *,
    noise: float = 1.0,
    bias: float | torch.Tensor = 0.5,
    correlation: float = 4.0,
    correlated_noise: float = 0.5,
) -> torch.Tensor:
    r"""Confidences as an imperfect network would give them for a known label map.

    .. math::
        q_i = \operatorname{softmax}\bigl(\log M_{\ell_i} + b + \sigma_c\, g_i + \sigma_w\, w_i\bigr),

    with the row of the confusion matrix :math:`M` that belongs to the true label :math:`\ell_i`, an offset :math:`b` per
    class (one for the whole map), a spatially correlated field :math:`g` and white noise :math:`w`, both Gaussian of unit
    variance and independent between classes.

    Args:
        labels: :math:`\ell`, shape ``[H, W]``, integers from 0 to C − 1.
        classes: C, at least 2.
        generator: source of all randomness, on the device of ``labels``.
        confusion: :math:`M`, shape ``[C, C]``, ``M[k, j]`` the confidence in class j where k is true; positive entries of any
            row scale. By default 0.5 on the diagonal, the rest evenly spread.
        noise: :math:`\sigma_w \ge 0`, in nats.
        bias: standard deviation of :math:`b`, drawn with zero mean over classes, in nats; or :math:`b` itself, shape ``[C]``.
        correlation: distance over which :math:`g` varies, px, at least 1.
        correlated_noise: :math:`\sigma_c \ge 0`, in nats.

    Returns:
        :math:`q` on the simplex, shape ``[C, H, W]``, float32.

    Raises:
        InputError: labels outside the classes, a confusion matrix or offset of wrong shape or range, negative noise.
    """
    if classes < 2:
        raise InputError(f"degraded_confidence: classes must be at least 2, got {classes}.")
    if labels.ndim != 2 or labels.numel() == 0 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(
            f"degraded_confidence: labels must be integers of shape [H, W], got {labels.dtype} of shape {list(labels.shape)}."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"degraded_confidence: labels must lie in 0 to {classes - 1}, got {low} to {high}; "
            "give pixels to ignore a class first."
        )
    for name, value, least in (("noise", noise, 0), ("correlated_noise", correlated_noise, 0), ("correlation", correlation, 1)):
        if not (value >= least and math.isfinite(value)):
            raise InputError(f"degraded_confidence: {name} must be finite and at least {least}, got {value}.")
    matrix = _default_confusion(classes) if confusion is None else torch.as_tensor(confusion, dtype=torch.float32)
    if matrix.shape != (classes, classes) or not bool(torch.isfinite(matrix).all()) or float(matrix.min()) <= 0:
        raise InputError(
            f"degraded_confidence: confusion must have shape {[classes, classes]} with positive, finite entries, got shape "
            f"{list(matrix.shape)}; add a small constant to counts that contain zeros."
        )
    device = labels.device
    if isinstance(bias, torch.Tensor):
        offset = bias.to(device=device, dtype=torch.float32)
        if offset.shape != (classes,) or not bool(torch.isfinite(offset).all()):
            raise InputError(f"degraded_confidence: bias must be a number or a finite tensor of shape [{classes}], got {bias}.")
    else:
        if not (bias >= 0 and math.isfinite(bias)):
            raise InputError(f"degraded_confidence: bias must be finite and at least 0, got {bias}.")
        offset = torch.randn(classes, generator=generator, device=device)
        offset = bias * (offset - offset.mean())
    matrix = (matrix / matrix.sum(dim=1, keepdim=True)).log().to(device)
    rows = (matrix + offset).T  # [C, true label]: one gather per class keeps the result contiguous
    logits = rows[:, labels.long()]
    if noise > 0:
        logits.add_(torch.randn(logits.shape, generator=generator, device=device), alpha=noise)
    if correlated_noise > 0:
        logits.add_(_smooth_fields(classes, tuple(labels.shape), correlation, generator), alpha=correlated_noise)
    return torch.softmax(logits, dim=0)


def reference_case(
    size: int = 1024, classes: int = 3, seed: int = 0, *, contrast: float = 1.2, noise: float = 1.4, bias: float = 0.6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""The synthetic test of the method: regions seen through biased, noisy confidences.

    A :func:`random_label_map` in which all classes occur, with structures of ``size / 8`` px, under
    :func:`degraded_confidence` with class offsets spread evenly over :math:`[-b, b]`: neither the proportions nor a
    regularizer alone repairs it, both together do.

    Args:
        size: side of the square map in px, at least 32.
        classes: number of classes, at least 2.
        seed: seed of map and noise.
        contrast: logit of the true class above each other one without noise and bias, nats.
        noise: standard deviation of the white noise, nats.
        bias: :math:`b`, nats.

    Returns:
        ``labels`` ``[size, size]`` int64, ``confidence`` ``[C, size, size]`` float32 and the true ``proportions`` ``[C]``
        float64, which sum to 1.

    Raises:
        InputError: size or classes too small.
    """
    if size < 32 or classes < 2:
        raise InputError(f"reference_case: size must be at least 32 px and classes at least 2, got {size} and {classes}.")
    generator = torch.Generator().manual_seed(seed)
    while True:
        labels = random_label_map((size, size), classes, generator, scale=size / 8, absent=0.0)
        proportions = torch.bincount(labels.flatten(), minlength=classes).double() / labels.numel()
        # A class of a few pixels would decide the mean over classes by chance.
        if float(proportions.min()) > 0.5 / classes:
            break
    confidence = degraded_confidence(
        labels,
        classes,
        generator,
        _default_confusion(classes, math.exp(contrast) / (math.exp(contrast) + classes - 1)),
        noise=noise,
        bias=torch.linspace(-bias, bias, classes),
        correlation=4.0,
        correlated_noise=0.3,
    )
    return labels, confidence, proportions
