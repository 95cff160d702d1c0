"""Handlers of training a regularizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from monai.engines import IterationEvents
from monai.utils import optional_import

from monai_vslp.data.regularization import RegularizerBatches
from monai_vslp.variational import TotalDeepVariation

if TYPE_CHECKING:
    from ignite.engine import Engine

Events, _ = optional_import("ignite.engine", name="Events")

__all__ = ["BatchEpoch", "FilterConstraint", "GradientLimit"]


class FilterConstraint:
    """Bring a regularizer's first filters back to zero mean and the unit ball after each optimizer step.

    Args:
        regularizer: the network whose constraint is kept.
    """

    def __init__(self, regularizer: TotalDeepVariation) -> None:
        self.regularizer = regularizer

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: self.regularizer.project())


class BatchEpoch:
    """Tell the batches which epoch they are drawn for, so that a continued run repeats an uninterrupted one.

    Args:
        batches: the training batches.
    """

    def __init__(self, batches: RegularizerBatches) -> None:
        self.batches = batches

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, lambda engine: self.batches.set_epoch(engine.state.epoch))


class GradientLimit:
    """Scale the gradient down where its norm exceeds a limit, before the optimizer's step.

    Args:
        network: the network trained.
        limit: largest 2-norm over all parameters.
    """

    def __init__(self, network: torch.nn.Module, limit: float = 1.0) -> None:
        self.network, self.limit = network, limit

    def attach(self, engine: Engine) -> None:
        """Register on a trainer of MONAI."""
        engine.add_event_handler(
            IterationEvents.BACKWARD_COMPLETED,
            lambda _: torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.limit),
        )
