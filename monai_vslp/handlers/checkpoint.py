"""Checkpoints of a training run that survive a crash at any moment."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from monai.engines import Evaluator
from monai.utils import optional_import

from monai_vslp.handlers.averaging import WeightAverage
from monai_vslp.utils.atomic import atomic_path, write_json
from monai_vslp.utils.errors import InputError

if TYPE_CHECKING:
    from ignite.engine import Engine

Events, _ = optional_import("ignite.engine", name="Events")

__all__ = ["RunCheckpoint"]


class RunCheckpoint:
    """Save a run after every epoch, keep the best network, continue an interrupted run.

    Writes into ``folder``: ``checkpoint.pt`` (everything needed to continue), ``model.pt`` (state dict of the best
    network so far, by the evaluator's key metric, lower is better; of the last epoch without evaluator) and
    ``history.json`` (per epoch: loss, metric, learning rate). All are replaced atomically: after a crash or on a full
    disk the previous ones are still there and whole. MONAI's ``CheckpointSaver`` writes in place, which loses them.

    Args:
        folder: where to write; made if needed.
        network: the network trained.
        optimizer: its optimizer.
        scheduler: learning-rate scheduler.
        evaluator: engine whose key metric chooses the best network; None to keep the last.
        average: averaged weights, kept too, and written as ``model.pt`` instead of the last ones; None for none.
        settings: what must be equal for a checkpoint to be continued (table, classes, seed …), JSON-like.
    """

    def __init__(
        self,
        folder: str | Path,
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        evaluator: Evaluator | None = None,
        average: WeightAverage | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.network, self.optimizer, self.scheduler = network, optimizer, scheduler
        self.evaluator, self.average = evaluator, average
        self.settings = dict(settings or {})
        self.history: list[dict[str, float]] = []
        self.best: float | None = None

    @property
    def path(self) -> Path:
        """The checkpoint to continue from."""
        return self.folder / "checkpoint.pt"

    def attach(self, engine: Engine) -> None:
        """Register on a trainer, after the handler that validates; continues a checkpoint when the run starts."""
        engine.add_event_handler(Events.STARTED, self.resume)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def resume(self, engine: Engine) -> None:
        """Load ``checkpoint.pt`` into network, optimizer, scheduler and ``engine``, if there is one.

        Raises:
            InputError: the checkpoint belongs to other settings.
        """
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["settings"] != self.settings:
            changed = [k for k in {*state["settings"], *self.settings} if state["settings"].get(k) != self.settings.get(k)]
            raise InputError(
                f"{self.path} was written with other settings ({', '.join(sorted(changed))}): "
                "continue with the same ones, choose another output folder, or start afresh with --restart."
            )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.history, self.best = state["history"], state["best"]
        engine.state.epoch, engine.state.iteration = state["epoch"], state["iteration"]
        engine.logger.info(f"Continuing {self.path} after epoch {state['epoch']} of {engine.state.max_epochs}.")

    def save(self, engine: Engine) -> None:
        """Write the checkpoint of the epoch that has just ended.

        Raises:
            OSError: it cannot be written; the one of the epoch before is untouched.
        """
        metric = None
        if self.evaluator is not None:
            metric = float(self.evaluator.state.metrics[self.evaluator.state.key_metric_name])
        self.history.append(
            {
                "epoch": engine.state.epoch,
                "loss": float(engine.state.metrics.get("loss", float("nan"))),
                "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
                **({} if metric is None else {self.evaluator.state.key_metric_name: metric}),
            }
        )
        improved = metric is None or self.best is None or metric < self.best
        if improved:
            self.best = metric
        network = self.network.state_dict()
        if improved:
            self._write(network if self.average is None else self.average.averaged_state(), self.folder / "model.pt")
        self._write(
            {
                "network": network,
                "average": None if self.average is None else self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "epoch": engine.state.epoch,
                "iteration": engine.state.iteration,
                "history": self.history,
                "best": self.best,
                "settings": self.settings,
            },
            self.path,
        )
        write_json(self.folder / "history.json", self.history)

    @staticmethod
    def _write(value: Any, path: Path) -> None:
        try:
            with atomic_path(path) as temporary:
                torch.save(value, temporary)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            code = getattr(error, "errno", None) or errno.ENOSPC
            raise OSError(
                code,
                f"cannot write {path} ({error}); the previous one is untouched. Free some space and run the same "
                "command again: it continues after the last complete epoch.",
            ) from error
