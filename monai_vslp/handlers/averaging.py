"""An average of the weights along a training run: steadier than the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from monai.engines import Evaluator
from monai.utils import optional_import
from torch.optim.swa_utils import get_ema_multi_avg_fn

from monai_vslp.networks.adapters import merged_state_dict
from monai_vslp.utils.errors import InputError

if TYPE_CHECKING:
    from ignite.engine import Engine

Events, _ = optional_import("ignite.engine", name="Events")

__all__ = ["WeightAverage"]


class WeightAverage:
    r"""Exponential moving average of the weights of a network.

    .. math::
        \bar\theta_n = d_n\bar\theta_{n-1} + (1 - d_n)\theta_n, \qquad d_n = \min\bigl(d, \tfrac{1 + n}{10 + n}\bigr),

    after each step n, so that the first steps are soon forgotten. Buffers and weights that are frozen when this is made stay
    as they are; those that :class:`~monai_vslp.networks.schedule.HeadFirst` freezes for a while are averaged throughout. An
    evaluator sees the averaged weights, training goes on with its own; :class:`~monai_vslp.handlers.RunCheckpoint` keeps both
    and writes the average as the result.

    Args:
        network: the network trained.
        decay: :math:`d` in [0, 1); 0 leaves the weights as they are.
        evaluator: engine that is to see the average; None for none.
    """

    def __init__(self, network: torch.nn.Module, decay: float = 0.97, evaluator: Evaluator | None = None) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"the decay of an average is in [0, 1), got {decay}.")
        self.network, self.decay, self.evaluator = network, decay, evaluator
        self.steps = 0
        self._trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
        self.average = {name: value.detach().clone() for name, value in self._trained.items()}
        self._own: dict[str, torch.Tensor] | None = None

    def attach(self, engine: Engine) -> None:
        """Register on a trainer, before the handler that validates."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.STARTED, self._show)
            self.evaluator.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED | Events.INTERRUPT, self._hide)

    @torch.no_grad()
    def update(self, engine: Engine | None = None) -> None:
        """Take the present weights into the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        if self.average:
            get_ema_multi_avg_fn(decay)(list(self.average.values()), list(self._trained.values()), self.steps)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The network has its averaged weights inside the context. Finish backward passes of its own weights before."""
        self._show()
        try:
            yield
        finally:
            self._hide()

    @torch.no_grad()
    def _show(self, engine: Engine | None = None) -> None:
        self._own = {name: value.detach().clone() for name, value in self._trained.items()}
        for name, value in self._trained.items():
            value.copy_(self.average[name])

    @torch.no_grad()
    def _hide(self, engine: Engine | None = None, *args: BaseException) -> None:
        if self._own is not None:
            for name, value in self._trained.items():
                value.copy_(self._own[name])
        self._own = None
        for error in args:  # ignite leaves it to the handlers of an exception to raise it again
            raise error

    def averaged_state(self) -> dict[str, torch.Tensor]:
        """State dict of the network with its averaged weights; of adapters, merged: whoever loads it needs to know of none."""
        state = {name: self.average.get(name, value) for name, value in self.network.state_dict().items()}
        return merged_state_dict(self.network, state)

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave.

        Raises:
            InputError: it is the average of other weights; nothing was loaded.
        """
        stored = (state or {}).get("average", {})
        other = [name for name in {*stored, *self.average} if name not in stored or name not in self.average]
        other += [name for name, value in self.average.items() if name in stored and stored[name].shape != value.shape]
        if other:
            raise InputError(
                f"the stored average is of other weights than those trained now ({len(other)} differ, such as {min(other)}): "
                "freeze and train the same ones as before, or start afresh."
            )
        self.steps = int(state["steps"])
        for name, value in self.average.items():
            value.copy_(state["average"][name])
