"""Stop a training run that no longer meets held-out proportions better."""

from __future__ import annotations

from typing import TYPE_CHECKING

from monai.engines import Evaluator
from monai.handlers import EarlyStopHandler
from monai.utils import optional_import

from monai_vslp.handlers.checkpoint import RunCheckpoint
from monai_vslp.utils.errors import InputError

if TYPE_CHECKING:
    from ignite.engine import Engine

Events, _ = optional_import("ignite.engine", name="Events")

__all__ = ["HeldOutStop"]


class HeldOutStop(EarlyStopHandler):
    """MONAI's ``EarlyStopHandler`` on the evaluator's key metric, lower is better.

    A run that is continued from a checkpoint counts the epochs before it too, from the checkpoint's history: one that had
    stopped stays so.

    Args:
        patience: epochs without a better value, at least 1, after which the run ends.
        evaluator: engine whose key metric is watched.
        checkpoint: of the same run.

    Raises:
        InputError: no such patience.
    """

    def __init__(self, patience: int, evaluator: Evaluator, checkpoint: RunCheckpoint) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise InputError(f"patience is a whole number of epochs from 1, got {patience!r}; None never stops early.")
        super().__init__(patience, lambda engine: -self._error)
        self.evaluator, self.checkpoint = evaluator, checkpoint
        self._error = float("inf")

    def attach(self, engine: Engine) -> None:
        """Register on a trainer, after the handlers that validate and keep checkpoints."""
        self.set_trainer(engine)
        engine.add_event_handler(Events.STARTED, self._replay)
        super().attach(engine)

    def _replay(self, engine: Engine) -> None:
        for entry in self.checkpoint.history:
            self._error = entry[self.evaluator.state.key_metric_name]
            super().__call__(engine)

    def __call__(self, engine: Engine) -> None:
        """Look at the epoch that has just been validated."""
        self._error = float(self.evaluator.state.metrics[self.evaluator.state.key_metric_name])
        super().__call__(engine)
