"""Training runs in MLflow, without ever standing in the way of training."""

from __future__ import annotations

import csv
import io
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monai.utils import flatten_dict, optional_import

from monai_vslp.handlers.tracked_run import TrackedRun

if TYPE_CHECKING:
    from ignite.engine import Engine

Events, _ = optional_import("ignite.engine", name="Events")

__all__ = ["HeldOutTable", "MLflowTracker"]

Picture = Any  # a path, or an RGB array [H, W, 3] uint8

logger = logging.getLogger(__name__)


class HeldOutTable:
    """Proportions given and predicted of each held-out image, as of the last validation; a table for :class:`MLflowTracker`.

    Args:
        evaluator: goes through the held-out images in their order.
        items: its images, with ``stem`` where known.
        classes: names, in the order of the proportions.
        output_transform: gives proportions predicted and given, ``[B, C]`` each, of the evaluator's output.
    """

    def __init__(
        self,
        evaluator: Engine,
        items: Sequence[Mapping[str, Any]],
        classes: Sequence[str],
        output_transform: Callable[[Any], tuple[Any, Any]],
    ) -> None:
        self.items, self.classes, self.output_transform = items, tuple(classes), output_transform
        self._pairs: list[tuple[list[float], list[float]]] = []
        evaluator.add_event_handler(Events.STARTED, lambda engine: self._pairs.clear())
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._collect)

    def _collect(self, engine: Engine) -> None:
        predicted, given = self.output_transform(engine.state.output)
        self._pairs += zip(predicted.detach().cpu().tolist(), given.detach().cpu().tolist())

    def __call__(self) -> list[dict[str, Any]]:
        """Rows with ``image``, ``error`` and per class ``given <class>`` and ``predicted <class>``, fractions, worst first."""
        rows = []
        for index, (predicted, given) in enumerate(self._pairs):
            # Where processes share the images, each sees its own ones: names are not known.
            known = len(self._pairs) == len(self.items)
            row: dict[str, Any] = {"image": self.items[index].get("stem", index) if known else index}
            row["error"] = sum(abs(p - g) for p, g in zip(predicted, given)) / len(given)
            for name, p, g in zip(self.classes, predicted, given):
                row |= {f"given {name}": g, f"predicted {name}": p}
            rows.append(row)
        return sorted(rows, key=lambda row: -row["error"])


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return stream.getvalue()


class MLflowTracker:
    """Log a training run to MLflow: parameters, metrics of each epoch, learning curves, pictures, tables and config files.

    Where and how: see :class:`~monai_vslp.handlers.tracked_run.TrackedRun`. Whatever fails in tracking, training goes on; what
    a server does not take is kept in ``folder``.

    MONAI's ``MLFlowHandler`` is not used because it lets every failure end the training, refuses a continued run whose
    parameters changed, and takes up any unfinished run of the experiment, its own or another's.

    Args:
        folder: of the training run.
        uri: of an MLflow server or database; None for the environment variable ``MLFLOW_TRACKING_URI`` and, without
            that, the database in ``folder``.
        experiment: name of the experiment; made if needed.
        run_name: None for the name of ``folder``.
        parent: id of the run that this one is nested under.
        stage: of several trainings that make one run: metrics, pictures and tables get names ``<stage>/…``.
        parameters: logged at the start; nested mappings become ``a.b``, long values are cut.
        evaluator: engine whose metrics are logged beside those of the trainer, under ``val_<name>`` where the trainer
            has a metric of that name.
        configs: files kept as artifacts under ``config``.
        pictures: by name, the path of a picture, or a function without arguments that gives a path, an RGB array
            ``[H, W, 3]`` uint8, or several of these by name; looked up when the run ends and kept under ``pictures``. What
            gives None is left out.
        tables: by name, a function without arguments that gives rows (mappings with the same keys); called when the run
            ends and kept as ``tables/<name>.csv``.
        system_metrics: log the use of the machine while training.
    """

    def __init__(
        self,
        folder: str | Path,
        uri: str | None = None,
        experiment: str = "monai_vslp",
        run_name: str | None = None,
        parent: str | None = None,
        stage: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        evaluator: Engine | None = None,
        configs: Sequence[str | Path] = (),
        pictures: Mapping[str, str | Path | Callable[[], Any]] | None = None,
        tables: Mapping[str, Callable[[], Sequence[Mapping[str, Any]]] | None] | None = None,
        system_metrics: bool = True,
    ) -> None:
        self.run = TrackedRun(folder, uri, experiment, run_name, parent, system_metrics)
        self.stage = stage or ""
        self.parameters = dict(parameters or {})
        self.evaluator = evaluator
        self.configs = [Path(path) for path in configs]
        self.pictures = dict(pictures or {})
        self.tables = {name: table for name, table in (tables or {}).items() if table is not None}

    @property
    def uri(self) -> str:
        """Where the run is logged now."""
        return self.run.uri

    @property
    def run_id(self) -> str | None:
        """Of the run in MLflow; None before it has begun."""
        return self.run.run_id

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _name(self, name: str) -> str:
        return f"{self.stage}/{name}" if self.stage else name

    def _start(self, engine: Engine) -> None:
        # Registered here so that it runs after all handlers that compute metrics, whatever the order of attaching.
        if not engine.has_event_handler(self._log_epoch, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._log_epoch)
        self.run.open()
        self.run.parameters({"max_epochs": engine.state.max_epochs} | self.parameters, self.stage)
        for path in self.configs:
            self.run.file(path, "config")
        # A run that dies is marked as failed when its trainer is dropped or Python ends.
        self._on_drop = weakref.finalize(engine, self.run.close, "FAILED")

    def _log_epoch(self, engine: Engine) -> None:
        metrics = flatten_dict(engine.state.metrics)
        if self.evaluator is not None:
            for name, value in flatten_dict(self.evaluator.state.metrics).items():
                metrics[f"val_{name}" if name in metrics else name] = value
        optimizer = getattr(engine, "optimizer", None)
        if optimizer is not None:
            metrics["learning_rate"] = optimizer.param_groups[0]["lr"]
        self.run.metrics({self._name(name): value for name, value in metrics.items()}, engine.state.epoch)

    def _complete(self, engine: Engine) -> None:
        self.run.curves()
        for name, table in self.tables.items():
            if rows := self._made(name, table):
                self.run.text(f"tables/{self._name(name)}.csv", _csv(rows))
        for name, picture in self.pictures.items():
            self._log_picture(name, self._made(name, picture) if callable(picture) else picture)
        self.run.close("FINISHED")
        self._on_drop.detach()

    @staticmethod
    def _made(name: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:  # a picture that cannot be drawn ends no training
            logger.warning("%s is not logged to MLflow: %s", name, error)
            return None

    def _log_picture(self, name: str, picture: Picture | Mapping[str, Picture] | None) -> None:
        if isinstance(picture, Mapping):
            for inner, one in picture.items():
                self._log_picture(f"{name}/{inner}", one)
        elif isinstance(picture, (str, Path)):
            self.run.file(picture, f"pictures/{self.stage}" if self.stage else "pictures")
        elif picture is not None:
            self.run.picture(self._name(name), picture)
