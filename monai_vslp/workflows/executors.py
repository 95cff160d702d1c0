"""Many independent pieces of work, in this process or on the workers of a Dask cluster, a bounded number of them at a time."""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from monai.utils import optional_import

from monai_vslp.utils.errors import InputError
from monai_vslp.variational.passes import ExecutorPasses, Passes

__all__ = [
    "Call",
    "DaskExecutor",
    "Executor",
    "InlineExecutor",
    "Outcome",
    "Work",
    "default_workers",
    "emit",
    "make_executor",
    "worker_passes",
]

dask, has_dask = optional_import("dask")
distributed, has_distributed = optional_import("distributed")
psutil, has_psutil = optional_import("psutil")

TOPIC = "monai_vslp"
CONNECT_SECONDS = 20
AHEAD = 2.0  # pieces of work that are with the scheduler, per worker thread: one runs, the next is there when it ends
COUNT_SECONDS = 5.0  # how often the workers are counted; they may come and go

Listener = Callable[[dict[str, Any]], None]

_listeners: list[Listener] = []  # of an InlineExecutor that runs in this process

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """A call that a worker makes; all of it is pickled, so let it be paths and settings.

    Attributes:
        key: names the call on the cluster; the same key means the same result.
        function: of a module, so that it is pickled by name.
        arguments: what it is called with.
    """

    key: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Work:
    """A piece of work: ``parts`` on any workers at the same time, then ``final``.

    A slide is one piece: its parts fill one folder with results of tiles, each part those of other tiles; its final call
    blends, refines and writes. Without parts the final call does everything. Parts leave their results on disk and return
    small things, so that a dead worker costs the part it was at.

    Attributes:
        name: for people.
        final: the call whose result is that of the work.
        parts: calls that must have ended well before ``final`` begins.
        size: how long it takes against others, in any unit; the largest begin first.
    """

    name: str
    final: Call
    parts: tuple[Call, ...] = ()
    size: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What became of a piece of work.

    Attributes:
        work: the piece.
        result: of its final call; None after an error.
        error: what was raised, or how its workers died; None where all went well.
    """

    work: Work
    result: Any = None
    error: BaseException | None = None


class Executor(Protocol):
    """Runs work; a context manager that ends what it started."""

    @property
    def threads(self) -> int:
        """Calls that run at a time."""
        ...

    def run(self, works: Iterable[Work]) -> Generator[Outcome, None, None]:
        """Outcomes in the order in which they come; closing the iterator gives up what has not begun."""
        ...

    def listen(self, listener: Listener) -> None:
        """Have ``listener`` called with what calls say through :func:`emit` while they run, in a thread of its own."""
        ...

    def __enter__(self) -> Executor: ...

    def __exit__(self, *exception: object) -> None: ...


def emit(**event: Any) -> None:
    """Say something to the process that runs the work, from inside a call: small JSON-like values."""
    if has_distributed:
        with suppress(ValueError):  # not in a worker
            distributed.get_worker().log_event(TOPIC, event)
            return
    for listener in _listeners:
        listener(event)


@contextmanager
def worker_passes() -> Iterator[Passes | None]:
    """Passes of the variational solver that all workers of the cluster make together, from inside a call on one of them.

    Meanwhile the call's own worker takes its share of the passes, too. None where no cluster runs the call.
    """
    try:
        if not has_distributed:
            raise ValueError("no Dask")
        distributed.get_worker()
    except ValueError:
        yield None
        return
    with distributed.worker_client() as client, ExecutorPasses(client.get_executor) as passes:
        yield passes


def _version() -> str:
    return importlib.import_module("monai_vslp").__version__


def _order(works: Iterable[Work]) -> deque[Work]:
    return deque(sorted(works, key=lambda work: (-work.size, work.name)))


class InlineExecutor:
    """One call after another in this process; needs no Dask."""

    threads = 1

    def __init__(self) -> None:
        self._mine: list[Listener] = []

    def __enter__(self) -> InlineExecutor:
        return self

    def __exit__(self, *exception: object) -> None:
        for listener in self._mine:
            _listeners.remove(listener)
        self._mine.clear()

    def listen(self, listener: Listener) -> None:
        """See :meth:`Executor.listen`."""
        self._mine.append(listener)
        _listeners.append(listener)

    def run(self, works: Iterable[Work]) -> Generator[Outcome, None, None]:
        """See :meth:`Executor.run`."""
        for work in _order(works):
            try:
                for part in work.parts:
                    part.function(*part.arguments)
                result = work.final.function(*work.final.arguments)
            except Exception as error:  # work of any kind: one piece that fails stops no other
                yield Outcome(work, error=error)
            else:
                yield Outcome(work, result)


class DaskExecutor:
    """Work on a Dask cluster, as :func:`make_executor` finds or starts one.

    Only ``AHEAD`` pieces per worker thread are with the scheduler at a time, so that neither it nor this process ever holds
    a graph of the whole cohort. Keys are those of the calls: no random part, and work whose result was lost with its worker
    is called again. A call during which ``retries + 1`` workers died is given up (on a cluster of its own; another's says
    itself how many may die).

    Args:
        cluster: started for this executor, ended with it; None where ``address`` is somebody else's.
        address: of a scheduler, where there is no ``cluster``, or a scheduler file.
        retries: how often a call that raised is made again.

    Raises:
        InputError: no scheduler answers, or it or a worker lacks this package.
    """

    def __init__(self, cluster: Any = None, address: dict[str, str] | None = None, retries: int = 2) -> None:
        self.retries, self._cluster = retries, cluster
        try:
            if cluster is not None:
                self.client = distributed.Client(cluster, set_as_default=False)
            else:
                self.client = distributed.Client(**(address or {}), timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise InputError(
                f"no Dask scheduler answers at {', '.join((address or {}).values())}: {error}. Start one with 'dask scheduler' "
                "and workers with 'dask worker ADDRESS --nthreads 1', or leave --scheduler out for a cluster on this machine."
            ) from error
        self._counted = (-float("inf"), 1)
        if cluster is None:
            self._check_versions()

    def __enter__(self) -> DaskExecutor:
        return self

    def _check_versions(self) -> None:
        """Make sure that somebody else's scheduler and workers have this package, before every slide fails for it.

        Raises:
            InputError: it is missing there, or has another version.
        """
        try:
            found = {"the scheduler": self.client.run_on_scheduler(_version)} | self.client.run(_version)
        except Exception as error:  # whatever is missing there
            self.client.close()
            raise InputError(
                f"the scheduler or its workers cannot use this package: {error}. Install monai_vslp {_version()} where they "
                "run, and start them again."
            ) from error
        wrong = [f"{place} has {version}" for place, version in found.items() if version != _version()]
        if wrong:
            self.client.close()
            raise InputError(f"here is monai_vslp {_version()}, but {', '.join(wrong)}; results would not be the same.")

    def __exit__(self, *exception: object) -> None:
        self.client.close()
        if self._cluster is not None:
            self._cluster.close()

    @property
    def threads(self) -> int:
        """Calls that run at a time, at least 1 while workers are yet to come."""
        when, count = self._counted
        if time.monotonic() - when > COUNT_SECONDS:
            count = max(1, sum(self.client.nthreads().values()))
            self._counted = (time.monotonic(), count)
        return count

    def listen(self, listener: Listener) -> None:
        """See :meth:`Executor.listen`."""
        self.client.subscribe_topic(TOPIC, lambda event: listener({"worker": event[1].get("worker"), **event[1]}))

    def _submit(self, call: Call, size: float) -> Any:
        return self.client.submit(call.function, *call.arguments, key=call.key, priority=size, retries=self.retries, pure=True)

    def run(self, works: Iterable[Work]) -> Generator[Outcome, None, None]:
        """See :meth:`Executor.run`.

        Raises:
            InputError: the scheduler is gone.
        """
        queue = _order(works)
        finished = distributed.as_completed(loop=self.client.loop)
        origin: dict[str, tuple[Work, bool]] = {}  # per key: the work, and whether this is its final call
        left: dict[str, int] = {}  # per name: parts that have not ended
        held: dict[str, Any] = {}  # futures of which the cluster has not said how they ended

        def submit(work: Work, calls: Iterable[Call], final: bool) -> None:
            for call in calls:
                origin[call.key] = (work, final)
                held[call.key] = self._submit(call, work.size)
                finished.add(held[call.key])

        try:
            while queue or held:
                while queue and len(held) < max(2, round(AHEAD * self.threads)):
                    work = queue.popleft()
                    left[work.name] = len(work.parts)
                    submit(work, work.parts or (work.final,), not work.parts)
                future = next(finished)
                work, final = origin.pop(future.key)
                del held[future.key]
                result, error = self._result(future)
                if work.name not in left:
                    continue  # another part of it failed before
                if error is not None:
                    del left[work.name]
                    yield Outcome(work, error=error)
                elif final:
                    del left[work.name]
                    yield Outcome(work, result)
                else:
                    left[work.name] -= 1
                    if not left[work.name]:
                        submit(work, (work.final,), True)
        finally:
            if held and self.client.status == "running":
                self.client.cancel(list(held.values()))

    def _result(self, future: Any) -> tuple[Any, BaseException | None]:
        """Result and error of a future that ended.

        Raises:
            InputError: the scheduler is gone.
        """
        try:
            return future.result(), None
        except Exception as error:  # whatever the call raised, or KilledWorker
            lost = future.cancelled() or isinstance(error, distributed.client.FutureCancelledError)
            if lost or self.client.status != "running":
                raise InputError(
                    f"the Dask scheduler is gone, or gave the work up ({error}). What was finished is kept: run the same "
                    "command again."
                ) from error
            return None, error


def _cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) if has_psutil else None
    return max(1, min(allowed, physical or allowed))


def default_workers(threads: int = 1) -> int:
    """Processes of a cluster of this machine where nobody says how many: one per GPU, or as many as cores allow."""
    if torch.cuda.is_available():
        return torch.cuda.device_count() if optional_import("dask_cuda", name="LocalCUDACluster")[1] else 1
    return max(1, _cores() // threads)


def _local_cluster(workers: int | None, threads: int, memory: int | str | None, retries: int) -> Any:
    """A cluster of processes on this machine, one call at a time each; one per GPU where there are some and dask-cuda."""
    settings = {
        "distributed.scheduler.allowed-failures": retries,
        # Slides take minutes: one that is sent ahead to a busy worker would wait there beside idle ones.
        "distributed.scheduler.worker-saturation": 1.0,
    }
    options: dict[str, Any] = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "silence_logs": logging.CRITICAL}
    cuda_cluster, has_dask_cuda = optional_import("dask_cuda", name="LocalCUDACluster")
    count = default_workers(threads) if workers is None else workers
    with dask.config.set(settings):
        if torch.cuda.is_available() and has_dask_cuda:
            if count > (gpus := torch.cuda.device_count()):
                raise InputError(f"{count} workers need a GPU each, this machine has {gpus}; ask for {gpus} at most.")
            return cuda_cluster(n_workers=count, **options, **({} if memory is None else {"memory_limit": memory}))
        if torch.cuda.is_available():
            logger.warning("dask-cuda is not installed: all workers share the first GPU (pip install dask-cuda for one each).")
        # Shares of the machine; a worker above its own is ended and its slide begun elsewhere, so that the machine never swaps.
        share = distributed.system.MEMORY_LIMIT // count if memory is None else memory
        threading = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        return distributed.LocalCluster(n_workers=count, processes=True, memory_limit=share, env=threading, **options)


def make_executor(
    *,
    scheduler: str | None = None,
    scheduler_file: str | Path | None = None,
    workers: int | None = None,
    threads: int = 1,
    memory: int | str | None = None,
    retries: int = 2,
) -> Executor:
    """Where work runs: a Dask cluster of this machine, an existing one, or this process.

    Args:
        scheduler: address of an existing scheduler, ``tcp://host:8786``; its workers must have this package and see the same
            paths.
        scheduler_file: file that ``dask scheduler --scheduler-file`` wrote, instead of the address.
        workers: processes of a cluster of this machine; None for one per GPU with dask-cuda, one in all for a GPU without, else
            as many as physical cores allow; 0 for no cluster but this process.
        threads: threads that torch may use per process of a cluster of this machine.
        memory: limit per worker, bytes or ``"8GB"``; None to share the machine's memory evenly.
        retries: how often a call is made again after an error that nobody expected or the death of its worker.

    Raises:
        InputError: options that do not go together, no Dask, or no scheduler that answers.
    """
    if scheduler is not None and scheduler_file is not None:
        raise InputError("give the address of a scheduler or its file, not both.")
    for name, value, low in (("workers", workers, 0), ("threads", threads, 1), ("retries", retries, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise InputError(f"{name} must be a whole number from {low}, got {value!r}.")
    existing = scheduler is not None or scheduler_file is not None
    if existing and workers is not None:
        raise InputError("the workers of an existing scheduler are what they are; leave 'workers' out.")
    if workers == 0:
        return InlineExecutor()
    if not (has_dask and has_distributed):
        raise InputError(
            "Dask is not installed: pip install 'monai_vslp[distributed]', or use --workers 0 for this process alone."
        )
    if scheduler_file is not None and not Path(scheduler_file).is_file():
        raise InputError(f"{scheduler_file} does not exist; 'dask scheduler --scheduler-file {scheduler_file}' writes it.")
    if existing:
        address = {"address": scheduler} if scheduler is not None else {"scheduler_file": str(scheduler_file)}
        return DaskExecutor(address=address, retries=retries)
    return DaskExecutor(_local_cluster(workers, threads, memory, retries), retries=retries)
