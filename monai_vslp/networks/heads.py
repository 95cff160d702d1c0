"""Heads over token features: one softmax per window, or one per token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from monai_vslp.utils.errors import InputError

__all__ = ["AdditiveHead", "DenseHead", "PatchHead", "neighbourhood_mean", "pool_subtypes"]


class DenseHead(nn.Sequential):
    """Class logits per token.

    A linear head is the default: flexible heads read the proportions of the whole window off any token, and their maps
    go flat.

    Args:
        channels: feature channels.
        num_classes: classes.
        hidden: width of a hidden layer; 0 for a linear head.
        dropout: share of feature channels dropped in training.
        kernel: edge of the first convolution in tokens, odd; borders are repeated.

    Raises:
        InputError: an even or non-positive ``kernel``.
    """

    def __init__(self, channels: int, num_classes: int, hidden: int = 0, dropout: float = 0.0, kernel: int = 1) -> None:
        if kernel < 1 or kernel % 2 == 0:
            raise InputError(f"kernel must be an odd number of tokens (1, 3, 5 ...), got {kernel}.")
        layers: list[nn.Module] = [nn.Dropout2d(dropout)] if dropout else []
        layers.append(nn.Conv2d(channels, hidden or num_classes, kernel, padding=kernel // 2, padding_mode="replicate"))
        if hidden:
            layers += [nn.GELU(), nn.Conv2d(hidden, num_classes, 1)]
        super().__init__(*layers)


def neighbourhood_mean(x: torch.Tensor, edge: int) -> torch.Tensor:
    """Mean over the square around each token, as far as the map reaches.

    Args:
        x: shape ``[B, F, h, w]``.
        edge: of the square in tokens, odd; 1 gives ``x``.

    Returns:
        Shape ``[B, F, h, w]``.
    """
    if edge == 1:
        return x
    # Rows, then columns: the mean over a square is that of means over lines, cut off at the border or not. As products with
    # matrices they cost little beside what made the features, and far less than pooling where gradients are wanted.
    rows, columns = (_line_means(side, edge, x) for side in x.shape[-2:])
    return rows @ x @ columns.T


def _line_means(length: int, edge: int, like: torch.Tensor) -> torch.Tensor:
    """Matrix ``[length, length]`` of means over ``edge`` tokens of a line."""
    at = torch.arange(length, device=like.device)
    near = (at[:, None] - at).abs() <= edge // 2
    return near.to(like.dtype) / near.sum(dim=1, keepdim=True)


def pool_subtypes(logits: torch.Tensor, classes: Sequence[int], edge: int) -> torch.Tensor:
    r"""Tell the subtypes of one tissue apart by all of that tissue nearby, not by single tokens.

    Where the tissue is, a token knows best; of which subtype it is, its neighbours of the same tissue know as much. With the
    softmax :math:`u` of the logits :math:`z`, subtypes :math:`S` and :math:`g_i = \sum_{c\in S} u_{ic}`,

    .. math::
        u'_{ic} = g_i\,\mathrm{softmax}_{c\in S}\Bigl(
        \frac{\sum_{j\in N(i)} g_j \log (u_{jc}/g_j)}{\sum_{j\in N(i)} g_j}\Bigr),\qquad c \in S,

    over the square :math:`N(i)` around token i. :math:`g` and all other classes stay as they are.

    Args:
        logits: shape ``[B, C, h, w]``.
        classes: :math:`S`, indices of two classes at least.
        edge: of the square in tokens, odd; 1 changes nothing.

    Returns:
        Logits :math:`\log u'`, shape ``[B, C, h, w]``, float32 at least.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    others = [c for c in range(logits.shape[1]) if c not in classes]
    order = [*others, *classes]
    back = [order.index(c) for c in range(len(order))]
    log_u = logits.log_softmax(dim=1)
    log_g = log_u[:, list(classes)].logsumexp(dim=1, keepdim=True)
    weight = log_g.exp().clamp_min(1e-6)  # where there is none of the tissue at all, a plain mean
    evidence = weight * (log_u[:, list(classes)] - log_g)
    pooled = neighbourhood_mean(evidence, edge) / neighbourhood_mean(weight, edge)
    return torch.cat([log_u[:, others], log_g + pooled.log_softmax(dim=1)], dim=1)[:, back]


class AdditiveHead(nn.Module):
    r"""Linear class logits of a token and of its surroundings, plus a correction,

    .. math:: z_i = \sum_k W_k\,\bar x_i^{(k)} + b + B\,\mathrm{GELU}(A x_i + a),

    where :math:`\bar x_i^{(k)}` is the mean over the k-th square around token i (:func:`neighbourhood_mean`; linear, so
    that means of logits are taken), with :math:`W = 0`, :math:`b = 0` and :math:`B = 0` at the start, which says
    nothing about any class. Fitted as a linear head, it can learn the correction later from a teacher's maps.

    Args:
        channels: feature channels.
        num_classes: classes.
        hidden: rows of :math:`A`.
        dropout: share of hidden values dropped in training.
        context: edges of the squares in tokens, odd; ``(1,)`` for the token alone.

    Raises:
        InputError: no context, or an even or non-positive edge.
    """

    def __init__(
        self, channels: int, num_classes: int, hidden: int = 128, dropout: float = 0.0, context: Sequence[int] = (1,)
    ) -> None:
        super().__init__()
        if not context or any(edge < 1 or edge % 2 == 0 for edge in context):
            raise InputError(
                f"context lists edges of squares in tokens, odd and at least 1 (such as [1, 9, 31]), got {context}."
            )
        self.context = tuple(context)
        self.linear = nn.Conv2d(channels, num_classes * len(self.context), 1)
        self.correction = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Dropout(dropout), nn.Conv2d(hidden, num_classes, 1, bias=False)
        )
        for weight in (self.linear.weight, self.linear.bias, self.correction[-1].weight):
            nn.init.zeros_(weight)

    def linear_logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C, h, w]`` without the correction."""
        parts = self.linear(features).chunk(len(self.context), dim=1)
        return torch.stack([neighbourhood_mean(part, edge) for part, edge in zip(parts, self.context)]).sum(dim=0)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: shape ``[B, F, h, w]``.

        Returns:
            Logits ``[B, C, h, w]``.
        """
        return self.linear_logits(features) + self.correction(features)


class PatchHead(DenseHead):
    """Class logits of a whole window, repeated for each of its tokens.

    A map larger than a window is divided evenly into the fewest windows that cover it.

    Args:
        channels: feature channels.
        num_classes: classes.
        hidden: width of a hidden layer; 0 for a linear head.
        dropout: share of feature channels dropped in training.
        window: edge of a window in tokens; None for one window, whatever the size of the map.
    """

    def __init__(
        self, channels: int, num_classes: int, hidden: int = 0, dropout: float = 0.0, window: int | None = None
    ) -> None:
        super().__init__(channels, num_classes, hidden, dropout)
        self.window = window

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: shape ``[B, F, h, w]``.

        Returns:
            Logits ``[B, C, h, w]``, constant within a window.
        """
        size = features.shape[-2:]
        windows = [1 if self.window is None else math.ceil(side / self.window) for side in size]
        return F.interpolate(super().forward(F.adaptive_avg_pool2d(features, windows)), size, mode="nearest")
