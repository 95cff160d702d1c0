"""One run in MLflow that outlives its server: what a server does not take is kept in SQLite beside the results."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

# mlflow reads these when it is imported, which MONAI's handlers do.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

import numpy as np
from monai.utils import optional_import, path_to_uri

from monai_vslp.utils.atomic import write_json
from monai_vslp.utils.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["RUN_FILE", "TrackedRun", "connect", "send_kept"]

LONGEST_VALUE = 500  # characters of a parameter; MLflow refuses more than 6000
BATCH = 100  # parameters per request, MLflow's limit
METRIC_BATCH = 1000  # metrics per request, MLflow's limit
RUN_FILE = "mlflow_run.json"
DATABASE, ARTIFACTS = "mlflow.db", "mlflow_artifacts"
SYSTEM = "system/"  # prefix of metrics of the machine
SERVER_TAG, SERVER_RUN_TAG, SENT_TAG = "monai_vslp.server", "monai_vslp.server_run", "monai_vslp.sent_to"
PARENT_TAG = "mlflow.parentRunId"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else the pages show what chat bots need

logger = logging.getLogger(__name__)


def _sqlite_uri(path: Path) -> str:
    """The address of a database file for MLflow; MONAI has a function for it only from 1.6 on."""
    return f"sqlite:///{quote(path.absolute().as_posix(), safe='/:')}"


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


def connect(uri: str) -> MlflowClient:
    """A client of a server or database that gives up after two tries of 10 s.

    The environment variables ``MLFLOW_HTTP_REQUEST_MAX_RETRIES``, ``_TIMEOUT`` and ``_BACKOFF_FACTOR`` say otherwise.

    Args:
        uri: of an MLflow server or database.
    """
    mlflow, _ = optional_import("mlflow", descriptor="{} is needed for tracking: pip install 'monai_vslp[tracking]'")
    telemetry, has_telemetry = optional_import("mlflow.telemetry", name="set_telemetry_client")
    if has_telemetry:
        telemetry()  # takes note of the variables above if mlflow was imported before they were set
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    for name in ("alembic", "mlflow.store.db.utils"):  # the steps of making a database concern nobody
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow.MlflowClient(tracking_uri=uri)


def _is_database(uri: str) -> bool:
    return uri.startswith("sqlite:")


def _experiment_id(client: MlflowClient, uri: str, name: str, folder: Path) -> str:
    """Id of an experiment, made if needed."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    # Without a place for artifacts, MLflow puts those of a database into the current directory.
    local = path_to_uri(folder / ARTIFACTS) if _is_database(uri) else None
    exceptions, _ = optional_import("mlflow.exceptions")
    try:
        return client.create_experiment(name, artifact_location=local, tags=KIND)
    except exceptions.MlflowException:
        found = client.get_experiment_by_name(name)  # another process made it meanwhile
        if found is None:
            raise
        return found.experiment_id


class TrackedRun:
    """A run in MLflow: parameters, metrics, files, pictures and tables, without ever raising.

    By default everything stays in ``folder``: the SQLite database ``mlflow.db`` and the artifacts in
    ``mlflow_artifacts``; look at them with ``mlflow ui --backend-store-uri sqlite:///<folder>/mlflow.db``. The id of the run
    is kept in ``folder/mlflow_run.json``, so that a run continued in the same folder is continued in MLflow too.

    Where a server does not answer, at the start or later, that is logged once as a warning, and the run goes on in the
    database in ``folder``: all parameters and metrics of this process again, and the files that could not be sent. The next
    run in the same folder, or :func:`send_kept`, sends them once the server is back. Where that database cannot be written
    either (a full disk), tracking is off, with one more warning.

    Args:
        folder: of the results.
        uri: of an MLflow server or database; None for the environment variable ``MLFLOW_TRACKING_URI`` and, without
            that, the database in ``folder``.
        experiment: name of the experiment; made if needed.
        name: of the run; None for the name of ``folder``.
        parent: id of the run that this one is nested under.
        system_metrics: log use of processor, memory, disk, network and GPU between :meth:`open` and :meth:`close`, every 10 s
            unless ``MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL`` says otherwise; needs psutil, and nvidia-ml-py for GPUs.
        strict: raise :class:`InputError` where MLflow fails, for commands that do nothing but log.

    Attributes:
        uri: where the run is logged now.
        run_id: of the run there; None before :meth:`open`, and where tracking is off.
    """

    def __init__(
        self,
        folder: str | Path,
        uri: str | None = None,
        experiment: str = "monai_vslp",
        name: str | None = None,
        parent: str | None = None,
        system_metrics: bool = False,
        strict: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.local = _sqlite_uri(self.folder / DATABASE)
        self.wanted = uri or os.environ.get("MLFLOW_TRACKING_URI") or self.local
        self.uri = self.wanted
        self.experiment = experiment
        self.name = name or self.folder.absolute().name
        self.parent = parent
        self.system_metrics, self.strict = system_metrics, strict
        self.run_id: str | None = None
        self._client: MlflowClient | None = None
        self._monitor: Any = None
        self._off = False
        self._sent: list[tuple[Callable[..., None], tuple[Any, ...]]] = []  # what the local database is told again

    @classmethod
    def of(cls, folder: str | Path, uri: str | None = None, **options: Any) -> TrackedRun:
        """The run that was logged from ``folder``, to add to it; a new one where there is none (at ``uri``)."""
        known = _read_known(Path(folder))
        known = {"uri": known["uri"], "experiment": known["experiment"]} if known else {}
        return cls(folder, **(known | options | ({} if uri is None else {"uri": uri})))

    @property
    def client(self) -> MlflowClient:
        """The client of :attr:`uri`, for what is not here; raises what MLflow raises.

        Raises:
            InputError: the run is not open, or tracking is off.
        """
        if self._client is None or self.run_id is None:
            raise InputError(f"there is no MLflow at {self.uri}; see the warning before.")
        return self._client

    # ---- what is logged -----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect; continue the run of ``folder`` or start one."""
        self._off, self.uri, self.run_id, self._sent = False, self.wanted, None, []
        self._perform(self._open)

    def parameters(self, parameters: Mapping[str, Any], stage: str = "") -> None:
        """Log parameters; nested mappings become ``a.b``, long values are cut.

        MLflow never changes a parameter. Of a run that is continued with another value, the tag ``changed_parameters`` says
        so; in a stage (of several trainings that make one run) the new value gets a parameter ``<stage>.<name>``.
        """
        self._remember(self._log_parameters, dict(parameters), stage)

    def metrics(self, metrics: Mapping[str, Any], step: int = 0) -> None:
        """Log those values of ``metrics`` that are single numbers."""
        self._remember(self._log_metrics, _numbers(metrics), step, int(time.time() * 1000))

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self._remember(self._set_tag, name, _short(value))

    def file(self, path: str | Path, folder: str) -> None:
        """Keep a file as artifact ``<folder>/<name>``; one that does not exist is left out with a warning."""
        if not Path(path).is_file():
            logger.warning("%s is not logged to MLflow: there is no such file.", path)
            return
        self._perform(self._log_file, Path(path), folder)

    def picture(self, name: str, array: np.ndarray) -> None:
        """Keep an RGB array ``[H, W, 3]`` uint8 as ``pictures/<name>.png``."""
        self._perform(self._log_picture, f"pictures/{_key(name)}.png", np.asarray(array))

    def text(self, name: str, text: str) -> None:
        """Keep a text as artifact ``<name>``, for instance a table ``tables/x.csv``, which MLflow shows as a table."""
        self._perform(self._log_text, name, text)

    def curves(self) -> None:
        """Draw every metric over the epochs, those before an interruption too, as ``learning_curve.png``."""
        self._perform(self._log_curves)

    def close(self, status: str = "FINISHED") -> None:
        """End the run as ``FINISHED`` or ``FAILED``; it may be opened again."""
        self._stop_monitor(wait=True)
        self._perform(self._close, status)

    # ---- what happens where MLflow fails ------------------------------------------------------------------------------

    def _remember(self, action: Callable[..., None], *arguments: Any) -> None:
        self._perform(action, *arguments)
        self._sent.append((action, arguments))

    def _perform(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do ``action``; where a server fails, do it with the local database; where that fails, never do anything again."""
        if self._off or (self._client is None and action != self._open):
            return
        try:
            action(*arguments)
        except Exception as error:  # whatever tracking raises, training is worth more
            if self.strict:
                raise InputError(f"MLflow at {self.uri} failed. ({type(error).__name__}: {_short(error)})") from error
            if self.uri == self.local:
                self._give_up(error)
                return
            logger.warning(
                "Tracking in MLflow at %s failed; training goes on, and the run is kept in %s instead. Once the server "
                "answers, 'monai-vslp send-tracking %s' sends it there, and so does the same command. (%s: %s)",
                self.uri, self.local, self.folder, type(error).__name__, _short(error),
            )  # fmt: skip
            try:
                self._fall_back()
                if action != self._open:
                    action(*arguments)
            except Exception as second:
                self._give_up(second)

    def _give_up(self, error: Exception) -> None:
        self._off, self.run_id = True, None
        self._stop_monitor(wait=False)
        logger.warning(
            "Tracking in MLflow at %s failed and is off for the rest of this run; training goes on. Check that the server or "
            "folder can be reached and written. (%s: %s)", self.uri, type(error).__name__, _short(error),
        )  # fmt: skip

    def _fall_back(self) -> None:
        """Go on in the local database, with all that this process logged so far."""
        server_run, self.uri = self.run_id, self.local
        self._stop_monitor(wait=False)
        self._client = connect(self.local)
        known = self._known(self.wanted)
        server_run = server_run or known.get("run_id")
        if known.get("kept") is not None and self._exists(known["kept"]):
            self.run_id = known["kept"]
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            self._create()
            self._client.set_tag(self.run_id, SERVER_TAG, self.wanted)
            if server_run is not None:
                self._client.set_tag(self.run_id, SERVER_RUN_TAG, server_run)
        self._note(server_run, kept=self.run_id)
        for action, arguments in self._sent:
            action(*arguments)
        self._start_monitor()

    # ---- MLflow -------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._client = connect(self.uri)
        known = self._known(self.uri)
        if known.get("run_id") is not None and self._exists(known["run_id"]):
            self.run_id = known["run_id"]
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            if known.get("run_id") is not None:
                logger.warning("Run %s of %s is no longer in MLflow; a new one is started.", known["run_id"], self.folder)
            self._create()
        if known.get("kept") is not None:
            _copy_run(connect(self.local), known["kept"], self._client, self.run_id)
            logger.info("What was kept in %s is now in MLflow at %s.", self.local, self.uri)
        self._note(self.run_id)
        self._start_monitor()

    def _known(self, uri: str) -> dict[str, Any]:
        """What ``folder`` knows of an earlier run of this experiment at ``uri``."""
        known = _read_known(self.folder)
        return known if (known.get("uri"), known.get("experiment")) == (uri, self.experiment) else {}

    def _create(self) -> None:
        experiment = _experiment_id(self._client, self.uri, self.experiment, self.folder)
        tags = {} if self.parent is None else {PARENT_TAG: self.parent}
        self.run_id = self._client.create_run(experiment, run_name=self.name, tags=tags).info.run_id

    def _note(self, run_id: str | None, kept: str | None = None) -> None:
        known = {"uri": self.wanted, "experiment": self.experiment, "run_id": run_id}
        write_json(self.folder / RUN_FILE, known if kept is None else known | {"kept": kept})

    def _exists(self, run_id: str) -> bool:
        exceptions, _ = optional_import("mlflow.exceptions")
        try:
            return self._client.get_run(run_id).info.lifecycle_stage == "active"
        except exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _start_monitor(self) -> None:
        monitor, has_monitor = optional_import("mlflow.system_metrics.system_metrics_monitor", name="SystemMetricsMonitor")
        _, has_psutil = optional_import("psutil")
        if self.system_metrics and has_monitor and has_psutil:
            for name in ("monitor", "metrics.gpu_monitor"):  # it says each time that there is no GPU
                logging.getLogger(f"mlflow.system_metrics.system_metrics_{name}").setLevel(logging.ERROR)
            self._monitor = monitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
            self._monitor.start()

    def _stop_monitor(self, wait: bool) -> None:
        """Its thread is a daemon: one that waits for a dead server need not be waited for."""
        monitor, self._monitor = self._monitor, None
        if monitor is None:
            return
        if wait:
            monitor.finish()
        else:
            monitor._shutdown_event.set()

    def _set_tag(self, name: str, value: str) -> None:
        self._client.set_tag(self.run_id, name, value)

    def _log_parameters(self, parameters: Mapping[str, Any], stage: str) -> None:
        logged = self._client.get_run(self.run_id).data.params
        flat = _flatten(parameters)
        changed = {k: v for k, v in flat.items() if k in logged and logged[k] != v}
        if changed and stage:
            flat |= {_key(f"{stage}.{k}"): v for k, v in changed.items()}
        elif changed:
            text = "; ".join(f"{k}: {logged[k]} -> {v}" for k, v in changed.items())
            self._client.set_tag(self.run_id, "changed_parameters", _short(text))
        _send_parameters(self._client, self.run_id, {k: v for k, v in flat.items() if k not in logged})

    def _log_metrics(self, metrics: Mapping[str, float], step: int, time_ms: int) -> None:
        entities, _ = optional_import("mlflow.entities")
        numbers = [entities.Metric(_key(name), value, time_ms, step) for name, value in metrics.items()]
        if numbers:
            self._client.log_batch(self.run_id, metrics=numbers)

    def _log_file(self, path: Path, folder: str) -> None:
        self._client.log_artifact(self.run_id, str(path), folder)

    def _log_picture(self, name: str, array: np.ndarray) -> None:
        self._client.log_image(self.run_id, array, artifact_file=name)

    def _log_text(self, name: str, text: str) -> None:
        self._client.log_text(self.run_id, text, name)

    def _log_curves(self) -> None:
        figure_module, has_matplotlib = optional_import("matplotlib.figure")
        names = [name for name in sorted(self._client.get_run(self.run_id).data.metrics) if not name.startswith(SYSTEM)]
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


def _read_known(folder: Path) -> dict[str, Any]:
    """The content of ``mlflow_run.json``; nothing where it is missing or damaged."""
    try:
        known = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and {"uri", "experiment", "run_id"} <= set(known) else {}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those that are single numbers, also as arrays and tensors."""
    found = {}
    for name, value in metrics.items():
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        if array.size == 1 and array.dtype.kind in "fiub":
            found[name] = float(array.reshape(()))
    return found


def _batches(items: Iterable[Any], size: int) -> Iterable[Sequence[Any]]:
    items = list(items)
    return (items[start : start + size] for start in range(0, len(items), size))


def _send_parameters(client: MlflowClient, run_id: str, parameters: Mapping[str, str]) -> None:
    entities, _ = optional_import("mlflow.entities")
    for batch in _batches((entities.Param(key, value) for key, value in parameters.items()), BATCH):
        client.log_batch(run_id, params=batch)


def _artifacts(client: MlflowClient, run_id: str, folder: str = "") -> Iterable[str]:
    """Paths of all files of a run."""
    for item in client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from _artifacts(client, run_id, item.path)
        else:
            yield item.path


def _copy_run(source: MlflowClient, run_id: str, target: MlflowClient, target_id: str) -> None:
    """Add to a run what another has and it lacks: parameters, points of metrics, tags, all files, and nested runs."""
    old, new = source.get_run(run_id), target.get_run(target_id)
    _send_parameters(target, target_id, {k: v for k, v in old.data.params.items() if k not in new.data.params})
    for name in old.data.metrics:
        there = {(m.step, m.timestamp) for m in target.get_metric_history(target_id, name)} if name in new.data.metrics else ()
        points = [m for m in source.get_metric_history(run_id, name) if (m.step, m.timestamp) not in there]
        for batch in _batches(points, METRIC_BATCH):
            target.log_batch(target_id, metrics=batch)
    for name, value in old.data.tags.items():
        if not name.startswith(("mlflow.", "monai_vslp.")):
            target.set_tag(target_id, name, value)
    with tempfile.TemporaryDirectory() as folder:
        for path in _artifacts(source, run_id):
            file = source.download_artifacts(run_id, path, folder)
            target.log_artifact(target_id, file, str(Path(path).parent) if "/" in path else None)
    source.set_tag(run_id, SENT_TAG, target_id)
    # Runs nested under one that is kept are kept with it, and go where it goes.
    experiment = target.get_run(target_id).info.experiment_id
    for nested in source.search_runs([old.info.experiment_id], f"tags.`{PARENT_TAG}` = '{run_id}'"):
        there = nested.data.tags.get(SENT_TAG)
        if there is None:
            there = target.create_run(experiment, run_name=nested.info.run_name, tags={PARENT_TAG: target_id}).info.run_id
            source.set_tag(nested.info.run_id, SENT_TAG, there)  # an interrupted sending does not make another one
        _copy_run(source, nested.info.run_id, target, there)
        target.set_terminated(there, nested.info.status)


def send_kept(folder: str | Path) -> list[str]:
    """Send to their servers the runs that were kept locally because the servers did not answer.

    Args:
        folder: of a training, or of a cross-validation or benchmark: folders inside are looked through.

    Returns:
        A line for each run that was sent; none where nothing was kept.

    Raises:
        InputError: a server still does not answer; what is kept stays.
    """
    done = []
    for path in sorted(Path(folder).rglob(RUN_FILE)):
        known = _read_known(path.parent)
        if known.get("kept") is None:
            continue
        local = connect(_sqlite_uri(path.parent / DATABASE))
        try:
            kept = local.get_run(known["kept"])
            client = connect(known["uri"])
            run_id = known["run_id"]
            if run_id is None:
                experiment = _experiment_id(client, known["uri"], known["experiment"], path.parent)
                parent = {k: v for k, v in kept.data.tags.items() if k == PARENT_TAG}
                run_id = client.create_run(experiment, run_name=kept.info.run_name, tags=parent).info.run_id
                write_json(path, known | {"run_id": run_id})  # an interrupted sending does not make another one
            _copy_run(local, known["kept"], client, run_id)
            if kept.info.status in ("FINISHED", "FAILED", "KILLED"):
                client.set_terminated(run_id, kept.info.status)
        except Exception as error:  # a server raises many kinds
            raise InputError(
                f"what is kept of {path.parent} could not be sent to MLflow at {known['uri']}; it stays where it is. "
                f"({type(error).__name__}: {_short(error)})"
            ) from error
        write_json(path, {"uri": known["uri"], "experiment": known["experiment"], "run_id": run_id})
        done.append(f"{path.parent}: run {run_id} at {known['uri']}")
    return done
