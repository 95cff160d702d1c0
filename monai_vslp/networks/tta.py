"""Test-time augmentation: views of an image whose predictions are mapped back exactly and fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from monai.utils import look_up_option

from monai_vslp.utils.errors import InputError
from monai_vslp.utils.plugins import PluginStore

__all__ = [
    "SYMMETRIES",
    "TTA_GROUPS",
    "Chain",
    "GridShift",
    "Scale",
    "StainJitter",
    "Symmetry",
    "TTAConfidence",
    "View",
    "jitter_stain",
    "training_views",
    "tta_views",
]

# Absorbance of haematoxylin, eosin and a residual in R, G, B (rows of unit length): Ruifrok and Johnston, "Quantification
# of histochemical staining by color deconvolution", 2001.
_STAINS = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
_UNMIX = torch.linalg.inv(_STAINS)


Predict = Callable[[torch.Tensor], torch.Tensor]


class View(Protocol):
    """A way to look at an image: transforms it, predicts, and maps the prediction back to the image's grid."""

    def __call__(self, x: torch.Tensor, predict: Predict) -> torch.Tensor:
        """
        Args:
            x: images ``[B, 3, H, W]``, float in [0, 1].
            predict: gives a map ``[B, K, H', W']`` for images ``[B, 3, H', W']``.

        Returns:
            The map on the grid of ``x``, shape ``[B, K, H, W]``.
        """
        ...


@dataclass(frozen=True)
class Symmetry:
    """One of the eight symmetries of the square: ``turns`` quarter turns, then a mirror image if ``mirror``."""

    turns: int = 0
    mirror: bool = False

    def __call__(self, x: torch.Tensor, predict: Predict) -> torch.Tensor:
        return self.inverse(predict(self.forward(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.rot90(x, self.turns, (-2, -1)) if self.turns else x
        return x.flip(-1) if self.mirror else x

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        y = y.flip(-1) if self.mirror else y
        return torch.rot90(y, -self.turns, (-2, -1)) if self.turns else y


SYMMETRIES = tuple(Symmetry(turns, mirror) for mirror in (False, True) for turns in range(4))


def _pad(x: torch.Tensor, top: int, left: int) -> torch.Tensor:
    """Pad at the top and left by reflection, by repetition where the image is too small to reflect."""
    mode = "reflect" if top < x.shape[-2] and left < x.shape[-1] else "replicate"
    return F.pad(x, (left, 0, top, 0), mode=mode)


@dataclass(frozen=True)
class GridShift:
    """Move the token grid by ``down`` and ``right`` px (at least 0) against the image."""

    down: int
    right: int

    def __call__(self, x: torch.Tensor, predict: Predict) -> torch.Tensor:
        return predict(_pad(x, self.down, self.right))[..., self.down :, self.right :]


@dataclass(frozen=True)
class Scale:
    """See the image ``factor`` times as large; the map is resampled to the exact size of the image.

    Resampling is linear (antialiased when shrinking), so constants come back exactly and smooth maps closely.
    """

    factor: float

    def __call__(self, x: torch.Tensor, predict: Predict) -> torch.Tensor:
        def resample(y: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
            return F.interpolate(y, size, mode="bilinear", align_corners=False, antialias=True)

        seen = resample(x, [max(1, round(side * self.factor)) for side in x.shape[-2:]])
        return resample(predict(seen.clamp(0, 1)), x.shape[-2:])


def jitter_stain(x: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    r"""Change the concentrations of haematoxylin and eosin: :math:`s_k \mapsto g_k s_k + o_k` in optical density.

    Args:
        x: RGB images, shape ``[B, 3, H, W]``, float in [0, 1].
        gain: shape ``[3]`` (haematoxylin, eosin, residual), 1 for no change.
        offset: shape ``[3]``, optical density, 0 for no change; applied in proportion to the tissue's own density, so
            that white glass stays white.

    Returns:
        Images of the same shape in [0, 1].
    """
    stains = _STAINS.to(x)
    density = -torch.log(x.clamp_min(1 / 255))
    concentration = torch.einsum("bchw,cs->bshw", density, _UNMIX.to(x))
    tissue = 1 - torch.exp(-density.mean(dim=1, keepdim=True) / 0.1)
    changed = concentration * gain.to(x).view(1, 3, 1, 1) + offset.to(x).view(1, 3, 1, 1) * tissue
    return torch.exp(-torch.einsum("bshw,sc->bchw", changed, stains)).clamp(0, 1)


@dataclass(frozen=True)
class StainJitter:
    """A fixed change of stain, drawn from ``seed``: gains within 1 ± ``strength``, offsets within ± ``strength`` / 5."""

    seed: int
    strength: float = 0.2

    def __call__(self, x: torch.Tensor, predict: Predict) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        draw = 2 * torch.rand(2, 3, generator=generator) - 1
        return predict(jitter_stain(x, 1 + self.strength * draw[0], 0.2 * self.strength * draw[1]))


class Chain:
    """Views one after the other; the first transforms first and is undone last."""

    def __init__(self, *views: View) -> None:
        self.views = views

    def __call__(self, x: torch.Tensor, predict: Predict) -> torch.Tensor:
        for view in reversed(self.views):
            predict = partial(view, predict=predict)
        return predict(x)


TTA_GROUPS = PluginStore("TTA groups", "Named lists of views; each is a function of the network's stride in px.")


@TTA_GROUPS.add_def("none", "the image as it is")
def _none(stride: int) -> list[View]:
    return [SYMMETRIES[0]]


@TTA_GROUPS.add_def("flips", "the image and its three mirror images (half turn included)")
def _flips(stride: int) -> list[View]:
    return [Symmetry(turns, mirror) for mirror in (False, True) for turns in (0, 2)]


@TTA_GROUPS.add_def("symmetries", "the eight symmetries of the square")
def _symmetries(stride: int) -> list[View]:
    return list(SYMMETRIES)


@TTA_GROUPS.add_def("shifts", "the image and three shifts of the token grid by half a token")
def _shifts(stride: int) -> list[View]:
    half = stride // 2
    return [GridShift(down, right) for down in (0, half) for right in (0, half)]


@TTA_GROUPS.add_def("shifted_symmetries", "eight views: each symmetry of the square once, on four half-token shifts")
def _shifted_symmetries(stride: int) -> list[View]:
    shifts = _shifts(stride)
    return [Chain(symmetry, shifts[i % 4]) for i, symmetry in enumerate(SYMMETRIES)]


@TTA_GROUPS.add_def("full", "shifted symmetries, two scales and four changes of stain: fourteen views")
def _full(stride: int) -> list[View]:
    stains = [Chain(SYMMETRIES[2 * i + 1], StainJitter(seed=i)) for i in range(4)]
    return [*_shifted_symmetries(stride), Scale(0.8), Scale(1.25), *stains]


def tta_views(group: str = "none", stride: int = 16) -> list[View]:
    """Views of a group by name.

    Args:
        group: a name in :data:`TTA_GROUPS`; ``none`` for the image as it is.
        stride: px per token of the network.

    Raises:
        ValueError: an unknown group; names the nearest.
    """
    return TTA_GROUPS.find(group)(stride)


def training_views(seed: int = 0, count: int = 6) -> list[View]:
    """The identity, then random symmetries with changed stain: views whose features are cached for training."""
    order = torch.randperm(len(SYMMETRIES) - 1, generator=torch.Generator().manual_seed(seed))[: count - 1].tolist()
    return [SYMMETRIES[0], *(Chain(StainJitter(seed=seed * 100 + i), SYMMETRIES[1 + i]) for i in order)]


class TTAConfidence:
    r"""Fuse the confidences of several views.

    .. math::
        q_i = \frac1A\sum_t q_i^{(t)}, \qquad
        \text{spread}_i = \frac1C\sum_k\Bigl(\frac1A\sum_t(q_{ik}^{(t)} - q_{ik})^2\Bigr)^{1/2}

    Args:
        views: name of a group in ``TTA_GROUPS``, or a list of views.
        output: ``mean``: q, ``[B, C, H, W]``; ``spread``: ``[B, 1, H, W]``; ``mean_spread``: both,
            ``[B, C + 1, H, W]``; ``stack``: all views, ``[B, A, C, H, W]``. Only the stack holds more than sums in memory.
        stride: px per token of the network, which sets the size of grid shifts.
        softmax: apply a softmax over classes to what the predictor returns.

    Raises:
        ValueError: an unknown group or output; names the nearest.
        InputError: an empty list of views.
    """

    def __init__(
        self,
        views: str | Sequence[View] = "shifted_symmetries",
        output: str = "mean",
        stride: int = 16,
        softmax: bool = True,
    ) -> None:
        self.output = look_up_option(output, ("mean", "spread", "mean_spread", "stack"))
        self.views = tta_views(views, stride) if isinstance(views, str) else list(views)
        if not self.views:
            raise InputError("test-time augmentation needs at least one view; the group 'none' is the image as it is.")
        self.softmax = softmax

    def _view(self, view: View, x: torch.Tensor, predict: Predict) -> torch.Tensor:
        def confidence(y: torch.Tensor) -> torch.Tensor:
            return predict(y).softmax(dim=1) if self.softmax else predict(y)

        return view(x, confidence)

    def __call__(self, x: torch.Tensor, predict: Predict) -> torch.Tensor:
        """
        Args:
            x: images ``[B, 3, H, W]``, float in [0, 1].
            predict: gives class logits ``[B, C, H', W']`` for images ``[B, 3, H', W']``.

        Returns:
            Float, of the shape that ``output`` has, see above.
        """
        if self.output == "stack":
            return torch.stack([self._view(view, x, predict) for view in self.views], dim=1)
        mean, deviation = None, None
        for count, view in enumerate(self.views, start=1):
            q = self._view(view, x, predict)
            if mean is None:
                mean, deviation = q, torch.zeros_like(q)
                continue
            # Welford's update: no loss of precision where views agree closely.
            delta = q - mean
            mean = mean + delta / count
            deviation = deviation + delta * (q - mean)
        spread = (deviation / len(self.views)).clamp_min(0).sqrt().mean(dim=1, keepdim=True)
        if self.output == "mean":
            return mean
        return spread if self.output == "spread" else torch.cat([mean, spread], dim=1)
