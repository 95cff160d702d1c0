"""The network of the first stage: an image in, class confidences for every pixel out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from monai_vslp.networks.adapters import add_lora
from monai_vslp.networks.backbone import TokenBackbone
from monai_vslp.networks.baseline_heads import ActivationMapHead, ClusterHead, MaskedHead
from monai_vslp.networks.feature_cache import FeatureCache
from monai_vslp.networks.heads import AdditiveHead, DenseHead, PatchHead, pool_subtypes
from monai_vslp.utils.errors import InputError

__all__ = ["ConfidenceNet", "pool_proportions", "token_mass"]

BASELINES = {"activation_map": ActivationMapHead, "masked": MaskedHead}  # without options
HEADS = ("dense", "patch", "additive", "clusters", *BASELINES)
WINDOW_BATCH = 32  # windows that go through the backbone together; bounds memory for large inputs


def token_mass(mass: torch.Tensor, stride: int) -> torch.Tensor:
    """Tissue per token: the mean over the token's pixels, of which those beyond the image's border count as 0.

    Args:
        mass: tissue per pixel, shape ``[B, 1, H, W]`` or ``[B, H, W]``, at least 0, any size.
        stride: px per token.

    Returns:
        Shape ``[B, 1, ceil(H / stride), ceil(W / stride)]``, the grid of :meth:`ConfidenceNet.features`, float.

    Raises:
        InputError: a mass of another shape.
    """
    if mass.ndim == 3:
        mass = mass[:, None]
    if mass.ndim != 4 or mass.shape[1] != 1:
        raise InputError(f"mass must have shape [B, 1, H, W] or [B, H, W], got {list(mass.shape)}.")
    mass = mass if mass.is_floating_point() else mass.float()
    return F.avg_pool2d(F.pad(mass, (0, -mass.shape[-1] % stride, 0, -mass.shape[-2] % stride)), stride)


def pool_proportions(probability: torch.Tensor, mass: torch.Tensor | None = None) -> torch.Tensor:
    r"""Tissue-weighted proportions :math:`\hat p_k = \sum_i a_i q_{ik} / \sum_i a_i`.

    Args:
        probability: shape ``[B, C, h, w]``, on the simplex.
        mass: tissue ``[B, 1, H, W]`` or ``[B, H, W]`` on the grid of ``probability`` or on one that is a whole number of
            times finer, such as pixels; None for tissue everywhere. Pixels of an image whose sides are no multiples of
            the stride go through :func:`token_mass` first.

    Returns:
        Shape ``[B, C]``; zeros for an image without tissue.

    Raises:
        InputError: a mass on a grid that does not fit.
    """
    if mass is None:
        return probability.mean(dim=(2, 3))
    size, fine = probability.shape[-2:], mass.shape[-2:]
    factor = max(fine[0] // size[0], 1)
    if tuple(fine) != (factor * size[0], factor * size[1]):
        raise InputError(
            f"mass must have the {size[0]} x {size[1]} cells of the map, or a whole number of times as many along both "
            f"sides, got {fine[0]} x {fine[1]}; token_mass(mass, stride) brings pixels onto the tokens' grid."
        )
    mass = token_mass(mass.to(probability), factor)
    return (probability * mass).sum(dim=(2, 3)) / mass.sum(dim=(2, 3)).clamp_min(1e-12)


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    """Evenly placed starts, multiples of ``stride``, of the fewest windows that cover ``length`` px."""
    count = math.ceil(length / window)
    if count == 1:
        return [0]
    return [round(i * (length - window) / (count - 1) / stride) * stride for i in range(count)]


def _window_weight(rows: int, columns: int) -> torch.Tensor:
    """Weight ``[rows, columns]`` of a window's tokens: falls off linearly towards its edges, never 0."""
    ramps = [torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)) / n for n in (rows, columns)]
    return torch.outer(*ramps)


def _checked_subtypes(subtypes: Mapping[str, Any], num_classes: int) -> tuple[tuple[int, ...], int]:
    """Indices of classes, and the edge of a square in tokens.

    Raises:
        InputError: other keys, classes that are not there or fewer than two, or an edge that is no odd number.
    """
    form = 'such as {"classes": [1, 2], "edge": 9}'
    if not isinstance(subtypes, Mapping) or set(subtypes) != {"classes", "edge"}:
        raise InputError(f"subtypes must have the keys classes and edge, {form}, got {subtypes}.")
    classes, edge = subtypes["classes"], subtypes["edge"]
    if any(not isinstance(c, int) or not 0 <= c < num_classes for c in classes) or len(set(classes)) != len(classes):
        raise InputError(f"classes of subtypes must be different indices from 0 to {num_classes - 1}, {form}, got {classes}.")
    if len(classes) < 2:
        raise InputError(f"there must be two subtypes at least, {form}, got the classes {classes}.")
    if not isinstance(edge, int) or edge < 1 or edge % 2 == 0:
        raise InputError(f"the edge for subtypes must be an odd number of tokens, {form}, got {edge}.")
    return tuple(classes), edge


class ConfidenceNet(nn.Module):
    """Backbone, head, and the windows within which tokens see each other.

    A token of a transformer that sees the whole image can predict the image's proportions everywhere, and training on
    proportions rewards that. So an image is cut into windows that are seen apart; where they overlap, one fades into
    the other.

    Args:
        num_classes: classes.
        in_channels: 3; MONAI's tools ask for the argument.
        backbone: name of a timm model; see :class:`~monai_vslp.networks.backbone.TokenBackbone`.
        blocks: which of its blocks to use; None for middle ones.
        weights: local weights of the backbone.
        pretrained: let timm fetch weights.
        rank: how many principal components of the features the head sees
            (:func:`~monai_vslp.networks.projection.fit_projection`); all where there are
            fewer; None for the features themselves.
        head: ``dense`` (a softmax per token), ``patch`` (a softmax per window), or ``additive`` (``dense`` and linear, plus a
            correction by a hidden layer that is 0 at the start); of methods for comparison ``activation_map``, ``masked``,
            ``clusters`` (:mod:`monai_vslp.networks.baseline_heads`).
        hidden: width of a hidden layer in the head; 0 for a linear one; of the correction of an additive head; clusters.
        context: of an additive head, edges of the squares of tokens around a token that it sees, such as ``[1, 9, 31]``; None
            for the token alone.
        subtypes: ``{"classes": [1, 2], "edge": 9}``: classes that are subtypes of one tissue, told apart by all of it in
            squares of so many tokens (:func:`~monai_vslp.networks.heads.pool_subtypes`), in :meth:`forward`; the head is
            trained without. None for no such classes.
        dropout: dropout before the head.
        window: edge of the windows in px of what the backbone sees, a multiple of its stride (of the coarsest block's, where
            they differ); None to see the whole input at once.
        magnifications: scales at which the backbone sees the input, None for 1 alone; features are put together on the grid
            of the largest.
            With 1 and 2 tokens are half as wide and know both the cells and their surroundings, at five times the cost of 1.
        freeze_backbone: train the head alone.
        cache: folder where features of a frozen backbone are kept (:class:`~monai_vslp.networks.feature_cache.FeatureCache`);
            None to compute them each time.
        grad_checkpointing: trade a third more time in training for the memory of the blocks' activations.
        adapters: train the backbone through low-rank adapters alone: the arguments of
            :func:`~monai_vslp.networks.adapters.add_lora`, such as ``{"rank": 8}``; None for none. With ``freeze_backbone`` it
            stays in evaluation mode besides.
        mean, std: channel statistics the input is normalised with; None for those of the backbone.
        backbone_kwargs: further options of ``timm.create_model``.

    Raises:
        InputError: an option that cannot be.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        backbone: str = "vit_tiny_patch16_224",
        blocks: Sequence[int] | None = None,
        weights: str | Path | None = None,
        pretrained: bool = False,
        rank: int | None = None,
        head: str = "dense",
        hidden: int = 0,
        context: Sequence[int] | None = None,
        subtypes: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        window: int | None = 224,
        magnifications: Sequence[float] | None = None,
        freeze_backbone: bool = False,
        cache: str | Path | None = None,
        grad_checkpointing: bool = False,
        adapters: dict[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if in_channels != 3:
            raise InputError(f"ConfidenceNet takes RGB images (3 channels), got in_channels = {in_channels}.")
        if head not in HEADS:
            raise InputError(f"head must be one of {', '.join(HEADS)}, got {head!r}.")
        if context is not None and head != "additive":
            raise InputError(f"context {context} is for the additive head, got the head {head!r}.")
        self.subtypes = None if subtypes is None else _checked_subtypes(subtypes, num_classes)
        self.backbone = TokenBackbone(backbone, blocks, weights, pretrained, **(backbone_kwargs or {}))
        scales = sorted(float(scale) for scale in ([1.0] if magnifications is None else magnifications))
        if not scales or scales[0] <= 0 or any(scales[-1] % scale for scale in scales):
            raise InputError(
                f"magnifications must be positive and each must divide the largest without rest, such as 1 and 2, got {scales}."
            )
        if self.backbone.stride % scales[-1]:
            raise InputError(
                f"the largest magnification must divide the stride {self.backbone.stride} px of {backbone!r}, got {scales[-1]}."
            )
        self.magnifications = tuple(scales)
        self.stride = int(self.backbone.stride / self.magnifications[-1])
        unit = self.backbone.multiple
        if window is not None and (window <= 0 or window % unit):
            below = max(window // unit, 1) * unit
            raise InputError(
                f"window must be a multiple of the stride {unit} px of {backbone!r}, got {window}; the nearest are "
                f"{below} and {below + unit}."
            )
        self.window = window
        self.num_classes = num_classes
        channels = self.backbone.channels * len(self.magnifications)
        self.projection: nn.Conv2d | None = None
        if rank is not None:
            if rank < 1:
                raise InputError(f"rank must be at least 1, got {rank}.")
            self.projection = nn.Conv2d(channels, min(rank, channels), 1).requires_grad_(False)
            channels = min(rank, channels)
        if head == "dense":
            self.head: nn.Module = DenseHead(channels, num_classes, hidden, dropout)
        elif head == "additive":
            self.head = AdditiveHead(channels, num_classes, hidden or channels, dropout, context or (1,))
        elif head == "clusters":
            self.head = ClusterHead(channels, num_classes, hidden)
        elif head in BASELINES:
            self.head = BASELINES[head](channels, num_classes)
        else:
            tokens = None if window is None else window // self.stride
            self.head = PatchHead(channels, num_classes, hidden, dropout, tokens)
        self.freeze_backbone = freeze_backbone
        for name, values in (("mean", mean or self.backbone.mean), ("std", std or self.backbone.std)):
            if len(values) != 3:
                raise InputError(f"{name} must be three numbers (R, G, B in [0, 1]), got {list(values)}.")
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1))
        if freeze_backbone:
            self.backbone.requires_grad_(False)
        if cache is not None and (adapters is not None or not freeze_backbone):
            raise InputError("features are kept for a frozen backbone only: leave out cache, or freeze the backbone.")
        self.adapted = adapters is not None
        if adapters is not None:
            try:
                add_lora(self.backbone, **adapters)
            except TypeError as error:
                raise InputError(f"adapters take rank, alpha and targets, got {adapters}: {error}.") from error
        if grad_checkpointing:
            self.backbone.set_grad_checkpointing()
        self.cache = None if cache is None else Path(cache)
        self._tokens: FeatureCache | None = None

    def train(self, mode: bool = True) -> ConfidenceNet:
        """As in torch, except that a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What the head sees: token features, or their principal components.

        Args:
            x: RGB images, shape ``[B, 3, H, W]``, float in [0, 1], any size.

        Returns:
            Shape ``[B, F, ceil(H / stride), ceil(W / stride)]``; without gradient where the backbone is frozen
            and has no adapters.
        """
        features = self.raw_features(x)
        return features if self.projection is None else self.projection(features)

    def tokens_of_mass(self, mass: torch.Tensor) -> torch.Tensor:
        """Tissue of pixels ``[B, 1, H, W]`` on the grid of :meth:`features`."""
        return token_mass(mass, self.stride)

    def raw_features(self, x: torch.Tensor) -> torch.Tensor:
        """Token features before any projection, as :meth:`features`."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise InputError(f"ConfidenceNet takes images of shape [B, 3, H, W], got {list(x.shape)}.")
        size = [math.ceil(side / self.stride) for side in x.shape[-2:]]
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self.adapted or not self.freeze_backbone)):
            maps = [self._at_scale(x, scale)[..., : size[0], : size[1]] for scale in self.magnifications]
        return maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)

    def _at_scale(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """Features of the magnified input on the grid of the largest scale, or a little more of it."""
        if scale != 1.0:
            # A whole number of px at this scale per token of the finest grid, so that grids line up to the last pixel.
            unit = 1 if scale > 1 else round(1 / scale)
            x = F.pad(x, (0, -x.shape[-1] % unit, 0, -x.shape[-2] % unit), mode="replicate")
            target = [round(side * scale) for side in x.shape[-2:]]
            x = F.interpolate(x, target, mode="bicubic", align_corners=False, antialias=scale < 1).clamp(0, 1)
        unit = self.backbone.multiple
        x = F.pad((x - self.mean) / self.std, (0, -x.shape[-1] % unit, 0, -x.shape[-2] % unit), mode="replicate")
        features = self._windowed(x)
        ratio = round(self.magnifications[-1] / scale)
        if ratio == 1:
            return features
        return F.interpolate(features, scale_factor=ratio, mode="bilinear", align_corners=False)

    def _backbone_tokens(self, x: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            return self.backbone(x)
        if self._tokens is None:  # not before weights are loaded: they name the entries
            self._tokens = FeatureCache(self.cache, self.backbone, (self.backbone.blocks, self.backbone.norm))
        return self._tokens(x)

    def _windowed(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = (int(side) for side in x.shape)  # torch.jit.trace gives tensors, which cannot be rounded
        if self.window is None or (height <= self.window and width <= self.window):
            return self._backbone_tokens(x)
        # An input narrower than a window is seen in windows of its own width.
        size = (min(self.window, height), min(self.window, width))
        tops = _window_starts(height, size[0], self.backbone.stride)
        lefts = _window_starts(width, size[1], self.backbone.stride)
        places = [(top, left) for top in tops for left in lefts]
        windows = torch.cat([x[:, :, top : top + size[0], left : left + size[1]] for top, left in places])
        maps = torch.cat([self._backbone_tokens(part) for part in windows.split(WINDOW_BATCH)]).split(batch)
        stride = self.backbone.stride
        total = x.new_zeros(batch, maps[0].shape[1], height // stride, width // stride)
        norm = x.new_zeros(total.shape[-2:])
        weight = _window_weight(*maps[0].shape[-2:]).to(x)
        for (top, left), features in zip(places, maps):
            rows = slice(top // stride, top // stride + features.shape[2])
            columns = slice(left // stride, left // stride + features.shape[3])
            total[:, :, rows, columns] += features * weight
            norm[rows, columns] += weight
        return total / norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class logits for every pixel.

        Args:
            x: RGB images, shape ``[B, 3, H, W]``, float in [0, 1], any size.

        Returns:
            Logits, shape ``[B, C, H, W]``: those of the tokens, interpolated linearly between token centres.
        """
        logits = self.head(self.features(x))
        if self.subtypes is not None:
            logits = pool_subtypes(logits, *self.subtypes)
        size = (logits.shape[-2] * self.stride, logits.shape[-1] * self.stride)
        logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
        return logits[..., : x.shape[-2], : x.shape[-1]]
