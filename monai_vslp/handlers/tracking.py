"""Training runs in MLflow, without ever standing in the way of training."""

from __future__ import annotations

import json
import logging
import os
import re
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# mlflow reads these when it is imported, which MONAI's handlers do.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

import numpy as np
from monai.utils import flatten_dict, optional_import, path_to_sqlite_uri, path_to_uri

from monai_vslp.utils.atomic import write_json

if TYPE_CHECKING:
    from ignite.engine import Engine
    from mlflow import MlflowClient

Events, _ = optional_import("ignite.engine", name="Events")

__all__ = ["MLflowTracker"]

LONGEST_VALUE = 500  # characters of a parameter; MLflow refuses more than 6000
BATCH = 100  # parameters per request, MLflow's limit
RUN_FILE = "mlflow_run.json"

logger = logging.getLogger(__name__)


def _key(name: str) -> str:
    """``name`` with only what MLflow allows in keys."""
    return re.sub(r"[^\w\-./: ]", "_", str(name))[:250]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as ``a.b.c``; everything else as short text."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= _flatten(item, f"{prefix}{key}.")
        else:
            flat[_key(f"{prefix}{key}")] = _short(item)
    return flat


class MLflowTracker:
    """Log a training run to MLflow: parameters, metrics of each epoch, a learning curve, pictures and config files.

    By default everything stays in ``folder``: the SQLite database ``mlflow.db`` and the artifacts in
    ``mlflow_artifacts``; look at them with ``mlflow ui --backend-store-uri sqlite:///<folder>/mlflow.db``. The id of the run
    is kept in ``folder/mlflow_run.json``, so that a run continued in the same folder is continued in MLflow too.

    A failure of tracking (a server that does not answer, a full disk) is logged once as a warning; training goes on
    without tracking. Requests to a server are tried twice at most and give up after 10 s, unless the environment
    variables ``MLFLOW_HTTP_REQUEST_MAX_RETRIES`` and ``MLFLOW_HTTP_REQUEST_TIMEOUT`` say otherwise.

    MONAI's ``MLFlowHandler`` is not used because it lets every failure end the training, refuses a continued run whose
    parameters changed, and takes up any unfinished run of the experiment, its own or another's.

    Args:
        folder: of the training run.
        uri: of an MLflow server or database; None for the environment variable ``MLFLOW_TRACKING_URI`` and, without
            that, the database in ``folder``.
        experiment: name of the experiment; made if needed.
        run_name: None for the name of ``folder``.
        parameters: logged at the start; nested mappings become ``a.b``, long values are cut.
        evaluator: engine whose metrics are logged beside those of the trainer, under ``val_<name>`` where the trainer
            has a metric of that name.
        configs: files kept as artifacts under ``config``.
        pictures: by name, the path of a picture, or a function without arguments that gives a path or an RGB array
            ``[H, W, 3]`` uint8; looked up when the run ends and kept under ``pictures``. What gives None is left out.
    """

    def __init__(
        self,
        folder: str | Path,
        uri: str | None = None,
        experiment: str = "monai_vslp",
        run_name: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        evaluator: Engine | None = None,
        configs: Sequence[str | Path] = (),
        pictures: Mapping[str, str | Path | Callable[[], Any]] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or path_to_sqlite_uri(self.folder / "mlflow.db")
        self.experiment = experiment
        self.run_name = run_name or self.folder.absolute().name
        self.parameters = dict(parameters or {})
        self.evaluator = evaluator
        self.configs = [Path(path) for path in configs]
        self.pictures = dict(pictures or {})
        self.run_id: str | None = None
        self._client: MlflowClient | None = None
        self._broken = False

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do ``action`` while tracking works; the first failure is the last one."""
        if self._broken:
            return
        try:
            action(*arguments)
        except Exception as error:  # whatever tracking raises, training is worth more
            self._broken = True
            logger.warning(
                "Tracking in MLflow at %s failed and is off for the rest of this run; training goes on. Check that the server "
                "or folder can be reached and written. (%s: %s)", self.uri, type(error).__name__, _short(error),
            )  # fmt: skip

    def begin(self, parameters: Mapping[str, Any], parent: str | None = None) -> None:
        """Open a run without an engine.

        Args:
            parameters: logged at once.
            parent: id of the run that this one is nested under; None for none.
        """
        self._try(self._open)
        if parent is not None:
            self._try(lambda: self._client.set_tag(self.run_id, "mlflow.parentRunId", parent))
        self._try(self._log_parameters, parameters)

    # ---- what happens when --------------------------------------------------------------------------------------------

    def _start(self, engine: Engine) -> None:
        # Registered here so that it runs after all handlers that compute metrics, whatever the order of attaching.
        if not engine.has_event_handler(self._log_epoch, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._log_epoch)
        self._broken = False
        self._try(self._open)
        self._try(self._log_parameters, {"max_epochs": engine.state.max_epochs} | self.parameters)
        for path in self.configs:
            self._try(self._log_file, path, "config")
        # A run that dies is marked as failed when its trainer is dropped or Python ends.
        self._on_drop = weakref.finalize(engine, self._try, self._close, "FAILED")

    def _log_epoch(self, engine: Engine) -> None:
        metrics = flatten_dict(engine.state.metrics)
        if self.evaluator is not None:
            for name, value in flatten_dict(self.evaluator.state.metrics).items():
                metrics[f"val_{name}" if name in metrics else name] = value
        optimizer = getattr(engine, "optimizer", None)
        if optimizer is not None:
            metrics["learning_rate"] = optimizer.param_groups[0]["lr"]
        self._try(self._log_metrics, metrics, engine.state.epoch)

    def _complete(self, engine: Engine) -> None:
        self._try(self._log_curve)
        for name, picture in self.pictures.items():
            self._try(self._log_picture, name, picture)
        self._try(self._close, "FINISHED")
        self._on_drop.detach()

    # ---- MLflow -------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Connect; continue the run of ``folder`` or start one."""
        mlflow, _ = optional_import("mlflow", descriptor="{} is needed for tracking: pip install 'monai_vslp[tracking]'")
        telemetry, has_telemetry = optional_import("mlflow.telemetry", name="set_telemetry_client")
        if has_telemetry:
            telemetry()  # takes note of the variables above if mlflow was imported before they were set
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
        for name in ("alembic", "mlflow.store.db.utils"):  # the steps of making a database concern nobody
            logging.getLogger(name).setLevel(logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._client = mlflow.MlflowClient(tracking_uri=self.uri)
        self.run_id = self._known_run()
        if self.run_id is not None:
            self._client.update_run(self.run_id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            # Without a place for artifacts, MLflow puts those of a database into the current directory.
            local = path_to_uri(self.folder / "mlflow_artifacts") if self.uri.startswith("sqlite:") else None
            experiment_id = self._client.create_experiment(self.experiment, artifact_location=local)
        else:
            experiment_id = found.experiment_id
        self.run_id = self._client.create_run(experiment_id, run_name=self.run_name).info.run_id
        write_json(self.folder / RUN_FILE, {"uri": self.uri, "experiment": self.experiment, "run_id": self.run_id})

    def _known_run(self) -> str | None:
        """Id of the run to be continued; None where this folder has none at this address."""
        path = self.folder / RUN_FILE
        if not path.exists():
            return None
        known = json.loads(path.read_text(encoding="utf-8"))
        if (known["uri"], known["experiment"]) != (self.uri, self.experiment):
            return None
        exceptions, _ = optional_import("mlflow.exceptions")
        try:
            run = self._client.get_run(known["run_id"])
        except exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            logger.warning("Run %s of %s is no longer in MLflow; a new one is started.", known["run_id"], self.folder)
            return None
        return known["run_id"]

    def _log_parameters(self, parameters: Mapping[str, Any]) -> None:
        entities, _ = optional_import("mlflow.entities")
        logged = self._client.get_run(self.run_id).data.params
        flat = _flatten(parameters)
        changed = [f"{k}: {logged[k]} -> {v}" for k, v in flat.items() if k in logged and logged[k] != v]
        if changed:
            # MLflow never changes a parameter; a note keeps the continued run honest.
            self._client.set_tag(self.run_id, "changed_parameters", _short("; ".join(changed)))
        new = [entities.Param(key, value) for key, value in flat.items() if key not in logged]
        for start in range(0, len(new), BATCH):
            self._client.log_batch(self.run_id, params=new[start : start + BATCH])

    def _log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        entities, _ = optional_import("mlflow.entities")
        now = int(time.time() * 1000)
        numbers = []
        for name, value in metrics.items():
            array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
            if array.size == 1 and array.dtype.kind in "fiub":
                numbers.append(entities.Metric(_key(name), float(array.reshape(())), now, step))
        if numbers:
            self._client.log_batch(self.run_id, metrics=numbers)

    def _log_file(self, path: Path, folder: str) -> None:
        if not path.is_file():
            logger.warning("%s is not logged to MLflow: there is no such file.", path)
            return
        self._client.log_artifact(self.run_id, str(path), folder)

    def _log_picture(self, name: str, picture: str | Path | Callable[[], Any]) -> None:
        try:
            found = picture() if callable(picture) else picture
        except Exception as error:  # a picture that cannot be drawn is no failure of tracking
            logger.warning("Picture %s is not logged to MLflow: %s", name, error)
            return
        if isinstance(found, (str, Path)):
            self._log_file(Path(found), "pictures")
        elif found is not None:
            self._client.log_image(self.run_id, np.asarray(found), artifact_file=f"pictures/{_key(name)}.png")

    def _log_curve(self) -> None:
        """Draw every metric over the epochs, those before an interruption too."""
        figure_module, has_matplotlib = optional_import("matplotlib.figure")
        names = sorted(self._client.get_run(self.run_id).data.metrics)
        if not has_matplotlib or not names:
            return
        figure = figure_module.Figure(figsize=(7, 1 + 2 * len(names)), layout="constrained")
        for axis, name in zip(np.atleast_1d(figure.subplots(len(names), 1, sharex=True)), names):
            history = {metric.step: metric.value for metric in self._client.get_metric_history(self.run_id, name)}
            axis.plot(sorted(history), [history[step] for step in sorted(history)], marker=".")
            axis.set_ylabel(name)
            axis.grid(alpha=0.3)
        axis.set_xlabel("epoch")
        self._client.log_figure(self.run_id, figure, "learning_curve.png")

    def _close(self, status: str) -> None:
        self._client.set_terminated(self.run_id, status)
