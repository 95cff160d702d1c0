"""Inferers of training: aligned views of a bag, and the proportions that a network predicts for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from monai.inferers import Inferer

from monai_vslp.networks.confidence import pool_proportions
from monai_vslp.networks.tta import SYMMETRIES, Chain, StainJitter

__all__ = ["BagInferer", "ProportionInferer"]


def _is_features(inputs: torch.Tensor) -> bool:
    """Cached features come as ``[B, V, F, h, w]``, images as ``[B, 3, H, W]``."""
    return inputs.ndim == 5


class Teacher(Protocol):
    """Whoever lends a network other weights for a while, such as :class:`~monai_vslp.handlers.WeightAverage`."""

    def shown(self) -> AbstractContextManager[None]:
        """Context within which the network has those weights."""
        ...


class BagInferer(Inferer):
    """Logits of views of each bag on one token grid, for proportion and consistency losses.

    Of cached features different views are drawn at random; an image is seen under different symmetries of the square, and by
    the teacher with another stain besides. Draws follow from the seed last given to torch's global generator and from the
    number of calls since, and from nothing else: neither dropout nor how many processes share a batch changes them.

    Args:
        views: how many views; two or more let views be compared, one is as many times cheaper.
        teacher: gives the network the weights of a teacher, whose view is put behind the others, without gradient; None for
            no such view.
        amp: run the network in bfloat16 on a CPU. On a GPU that is for the trainer, which also scales the loss.
        stain: strength of the change of stain that the teacher sees.
    """

    def __init__(self, views: int = 2, teacher: Teacher | None = None, amp: bool = False, stain: float = 0.2) -> None:
        self.views, self.teacher, self.amp, self.stain = views, teacher, amp, stain
        self._seed: int | None = None
        self._generator = torch.Generator()

    def _draw(self, available: int) -> tuple[list[int], int]:
        """Different views, the teacher's last, and the seed of a stain."""
        if torch.initial_seed() != self._seed:
            self._seed = torch.initial_seed()
            self._generator.manual_seed(self._seed)
        wanted = self.views + (self.teacher is not None)
        order = torch.randperm(available, generator=self._generator).tolist()
        return order[:wanted], int(torch.randint(2**31, (), generator=self._generator))

    def __call__(self, inputs: torch.Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            inputs: features ``[B, V, F, h, w]`` or images ``[B, 3, H, W]`` in [0, 1], sides multiples of the stride.
            network: a network with ``features`` and ``head``.

        Returns:
            Logits ``[B, views, C, h, w]``, aligned, float32; with a teacher ``[B, views + 1, C, h, w]``.
        """
        features = _is_features(inputs)
        chosen, stain = self._draw(inputs.shape[1] if features else len(SYMMETRIES))

        def logits(x: torch.Tensor) -> torch.Tensor:
            return network.head(x if features else network.features(x))

        def see(view: int) -> torch.Tensor:
            return logits(inputs[:, view]) if features else SYMMETRIES[view](inputs, logits)

        with torch.autocast("cpu", torch.bfloat16) if self.amp and inputs.device.type == "cpu" else nullcontext():
            taught = []
            if self.teacher is not None:
                # Before the views with gradient: their backward pass needs weights that nobody has touched since.
                training = network.training
                network.eval()
                with torch.no_grad(), self.teacher.shown():
                    view = chosen.pop()
                    jitter = StainJitter(stain, self.stain)
                    taught.append(see(view) if features else Chain(jitter, SYMMETRIES[view])(inputs, logits))
                network.train(training)
            return torch.stack([*map(see, chosen), *taught], dim=1).float()


class ProportionInferer(Inferer):
    """Proportions ``[B, C]`` that a network predicts for bags; the first view of cached features is used."""

    def __call__(
        self, inputs: torch.Tensor, network: torch.nn.Module, mass: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            inputs: features ``[B, V, F, h, w]`` or images ``[B, 3, H, W]`` in [0, 1].
            network: a network with ``features`` and ``head``.
            mass: tissue ``[B, 1, H', W']`` at the resolution of pixels or tokens.
        """
        features = inputs[:, 0] if _is_features(inputs) else network.features(inputs)
        return pool_proportions(network.head(features).softmax(dim=1), mass)
