"""Heads of weakly supervised methods that VSLP is compared with: class activation maps, masked instances, clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.utils import optional_import
from torch import nn

from monai_vslp.utils.errors import InputError

kmeans2, _ = optional_import("scipy.cluster.vq", name="kmeans2")

__all__ = ["ActivationMapHead", "ClusterHead", "MaskedHead", "fit_clusters", "mark_background"]

FEATURES = "features"  # of bags, [V, F, h, w]
FLOOR = 1e-3  # of normalised activations: a class without any keeps a trace


class _LinearHead(nn.Module):
    """A map ``linear`` of features or of what is made of them; all zero at the start."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels, outputs, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def linear_logits(self, features: torch.Tensor) -> torch.Tensor:
        """What the objective is about, ``[B, outputs, h, w]``."""
        return self.linear(features)


class ActivationMapHead(_LinearHead):
    r"""Class activation maps of a network that was trained on which classes occur [1]_.

    With the activations :math:`z_{ic} = w_c^\top x_i + b_c` of a classifier of pooled features, the confidence of class c is
    proportional to

    .. math:: s_{ic} = \sigma(\bar z_c)\,\frac{\max(z_{ic}, 0)}{\max_j \max(z_{jc}, 0)}

    and that of classes marked as background, which occur in nearly all images so that presence says nothing about them, to
    :math:`1 - \max_{c'} s_{ic'}` over the others [2]_. Maps are normalised per image, so this head needs whole images.

    Args:
        channels: feature channels.
        num_classes: classes.

    References:
        .. [1] B. Zhou et al.: Learning deep features for discriminative localization. CVPR 2016.
        .. [2] J. Ahn, S. Kwak: Learning pixel-level semantic affinity with image-level supervision. CVPR 2018.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.register_buffer("background", torch.zeros(num_classes, dtype=torch.bool))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: shape ``[B, F, h, w]``.

        Returns:
            Logarithms of confidences up to a constant, ``[B, C, h, w]``.
        """
        z = self.linear(features)
        active = z.clamp_min(0.0)
        score = z.mean(dim=(2, 3), keepdim=True).sigmoid() * active / active.amax(dim=(2, 3), keepdim=True).clamp_min(1e-6)
        if self.background.any() and not self.background.all():
            rest = 1.0 - score[:, ~self.background].amax(dim=1, keepdim=True)
            score = torch.where(self.background[:, None, None], rest, score)
        return score.clamp_min(FLOOR).log()


def mark_background(head: ActivationMapHead, bags: Sequence[Mapping[str, Any]], share: float = 0.95) -> None:
    """Mark classes that occur in at least this share of the bags; none where that would be all of them.

    Args:
        head: changed in place.
        bags: items with ``proportions`` ``[C]``.
        share: of the bags.
    """
    present = torch.stack([item["proportions"] > 0 for item in bags]).float().mean(dim=0) >= share
    head.background.copy_(present if not present.all() else torch.zeros_like(present))


class MaskedHead(_LinearHead):
    r"""Two branches: which classes a token shows any sign of, and which of these it is.

    .. math:: q_{ic} \propto \sigma(u_{ic})\,e^{v_{ic}}

    The first branch learns from presence (multiple-instance learning) and masks classes, the second from proportions of what
    is left; after S. Matsuo et al. [1]_, whose first branch separates tumour from the rest and whose second knows proportions
    of tumour subtypes alone. Here proportions of all classes are known, so that each class has its mask, a soft one.

    Args:
        channels: feature channels.
        num_classes: classes.

    References:
        .. [1] S. Matsuo et al.: Learning from partial label proportions for whole slide image segmentation. MICCAI 2024.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, 2 * num_classes)

    @staticmethod
    def joined(branches: torch.Tensor) -> torch.Tensor:
        """Logits ``[..., C, h, w]`` of both branches ``[..., 2 C, h, w]``, signs first."""
        signs, kinds = branches.chunk(2, dim=-3)
        return kinds + F.logsigmoid(signs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C, h, w]`` of features ``[B, F, h, w]``."""
        return self.joined(self.linear(features))


class ClusterHead(_LinearHead):
    r"""The class mixture of the nearest of K cluster centres.

    .. math:: q_i = \operatorname{softmax}(w_{k(i)} + b), \qquad k(i) = \arg\min_k \lVert x_i - m_k\rVert

    With centres from k-means, :math:`\min_w \sum_I \mathrm{KL}(p_I\|\sum_k a_{Ik}\operatorname{softmax}(w_k + b))` for the
    shares :math:`a_{Ik}` of the clusters in image I matches clusters to proportions: convex in the mixtures.

    Args:
        channels: feature channels.
        num_classes: classes.
        clusters: K.

    Raises:
        InputError: fewer clusters than 2.
    """

    def __init__(self, channels: int, num_classes: int, clusters: int = 32) -> None:
        if clusters < 2:
            raise InputError(f"there must be at least 2 clusters, got {clusters}.")
        super().__init__(clusters, num_classes)
        self.register_buffer("centres", torch.zeros(clusters, channels))

    def members(self, features: torch.Tensor) -> torch.Tensor:
        """Which cluster each token belongs to, one-hot ``[B, K, h, w]`` of features ``[B, F, h, w]``."""
        tokens = features.flatten(2).transpose(1, 2)
        # |x|² is the same for all centres.
        distance = self.centres.square().sum(dim=1) - 2 * tokens @ self.centres.T
        nearest = F.one_hot(distance.argmin(dim=2), len(self.centres))
        return nearest.transpose(1, 2).unflatten(2, features.shape[-2:]).to(features)

    def linear_logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C, h, w]``."""
        return self.linear(self.members(features))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C, h, w]`` of features ``[B, F, h, w]``."""
        return self.linear_logits(features)


def fit_clusters(head: ClusterHead, bags: Sequence[Mapping[str, Any]], tokens: int = 400, seed: int = 0) -> None:
    """Set the centres by k-means (k-means++ start) of tokens of all bags.

    Args:
        head: changed in place.
        bags: items with ``features`` ``[V, F, h, w]`` and ``mass`` ``[1, h, w]``; the first view is used.
        tokens: drawn from each bag, on tissue.
        seed: of the draws and of k-means.

    Raises:
        InputError: fewer tokens than clusters.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for item in bags:
        features = item[FEATURES][0].flatten(1)[:, item["mass"].flatten() > 0]
        drawn.append(features[:, torch.randperm(features.shape[1], generator=generator)[:tokens]].T)
    sample = torch.cat(drawn).double().cpu().numpy()
    clusters = len(head.centres)
    if len(sample) < clusters:
        raise InputError(f"{clusters} clusters need at least as many tokens of tissue, got {len(sample)}.")
    centres, _ = kmeans2(sample, clusters, iter=50, minit="++", seed=seed)
    head.centres.copy_(torch.from_numpy(centres))
