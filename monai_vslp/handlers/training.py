"""Progress of a training run, for a person at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from monai.engines import Evaluator
from monai.transforms import Compose
from monai.utils import CommonKeys, optional_import

if TYPE_CHECKING:
    from ignite.engine import Engine

Events, _ = optional_import("ignite.engine", name="Events")
Average, _ = optional_import("ignite.metrics", name="Average")
tqdm, _ = optional_import("tqdm", name="tqdm")

__all__ = ["EpochSeed", "ItemProgress", "TrainingProgress", "mixed_precision", "run_engine"]


class EpochSeed:
    """Seed every random draw of an epoch by (seed, epoch), so that a run continued from a checkpoint repeats it.

    Args:
        seed: seed of the run.
        transform: random transforms of the data, seeded likewise; None for none.
    """

    def __init__(self, seed: int, transform: Compose | None = None) -> None:
        self.seed = seed
        self.transform = transform

    def attach(self, engine: Engine) -> None:
        """Register on a trainer, before other handlers."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        seed = (self.seed * 100_003 + engine.state.epoch) % 2**31
        torch.manual_seed(seed)
        if self.transform is not None:
            self.transform.set_random_state(seed=seed)


class TrainingProgress:
    """A bar over epochs with the mean loss of the epoch and the evaluator's key metric.

    Also puts the mean loss of each epoch into ``engine.state.metrics["loss"]``, which checkpoints and trackers read, and the
    output of each iteration into a list of one, as engines that decollate leave it: handlers that MONAI adds to a trainer
    (``--tracking mlflow``) take the loss of the first entry.

    Args:
        evaluator: engine whose key metric is shown; None for none.
        show: draw the bar.
    """

    def __init__(self, evaluator: Evaluator | None = None, show: bool = True) -> None:
        self.evaluator = evaluator
        self.show = show
        self._bar = None

    def attach(self, engine: Engine) -> None:
        """Register on a trainer of MONAI."""
        Average(output_transform=lambda output: output[CommonKeys.LOSS]).attach(engine, "loss")
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._list_output)
        engine.add_event_handler(Events.EPOCH_STARTED, self._open)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._advance)
        engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED | Events.INTERRUPT, self._close)

    @staticmethod
    def _list_output(engine: Engine) -> None:
        engine.state.output = [engine.state.output]

    def _open(self, engine: Engine) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=engine.state.max_epochs,
                initial=engine.state.epoch - 1,
                desc="training",
                unit="epoch",
                disable=not self.show,
            )

    def _advance(self, engine: Engine) -> None:
        shown = {"loss": f"{engine.state.metrics['loss']:.4f}"}
        if self.evaluator is not None:
            name = self.evaluator.state.key_metric_name
            shown[name] = f"{self.evaluator.state.metrics[name]:.4f}"
        self._bar.set_postfix(shown)
        self._bar.update()

    def _close(self, engine: Engine, *args: Exception) -> None:
        if self._bar is not None:
            self._bar.close()
        for error in args:
            raise error


class ItemProgress:
    """A bar over the items of an evaluator.

    Args:
        show: draw the bar.
    """

    def __init__(self, show: bool = True) -> None:
        self.show = show
        self._bar = None

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: self._bar.update())
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda _: self._bar.close())

    def _open(self, engine: Engine) -> None:
        self._bar = tqdm(total=engine.state.epoch_length, desc="segmenting", unit="image", disable=not self.show)


def run_engine(engine: Engine) -> None:
    """Run a trainer or evaluator: a step of ``run`` in a config."""
    engine.run()


def mixed_precision(amp: bool, device: torch.device | str) -> bool:
    """Whether a trainer scales its loss for mixed precision: where that is asked for, and on a GPU alone."""
    return bool(amp) and torch.device(device).type == "cuda"
