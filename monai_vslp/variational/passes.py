"""Passes over the windows of a map: in one process, or shared by the workers of any executor, with the same result."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import connection
from typing import Any, Protocol

import torch

from monai_vslp.utils.errors import InputError
from monai_vslp.variational.windows import MapArray, Window

__all__ = ["ExecutorPasses", "Passes", "ProcessPasses", "SerialPasses", "tissue_windows", "window_groups", "write_from"]

logger = logging.getLogger(__name__)

GROUPS = 64  # tasks per pass at most: a scheduler's load does not grow with the map, and 32 workers have two each
SMALLEST_GROUP = 2**18  # px; some 20 ms of work, beside which 1 ms for a task is little
ATTEMPTS = 3


class Passes(Protocol):
    """Makes passes over windows.

    What a pass finds is a list in the order of the windows, so that sums over it are rounded alike whoever computed what.
    """

    def map(self, function: Callable[..., Any], windows: Sequence[Window], *args: Any) -> list:
        """``[function(window, *args) for window in windows]``, complete when it returns.

        Args:
            function: at the top level of a module. It writes to maps in ``args`` only within the core of its window, and
                reads nothing that the same pass writes, so that it may be run again where a worker was lost.
            windows: their cores do not overlap.
            *args: maps and whatever else the function needs.
        """
        ...


class SerialPasses:
    """One window after the other, in this process; maps may lie in memory."""

    def map(self, function: Callable[..., Any], windows: Sequence[Window], *args: Any) -> list:
        return [function(window, *args) for window in windows]


def window_groups(windows: Sequence[Window], groups: int = GROUPS) -> list[Sequence[Window]]:
    """Cut a list of windows into runs of about as many pixels: ``groups`` of them, or fewer of ``SMALLEST_GROUP`` px each.

    The cut depends on the windows alone, not on who works.
    """
    sizes = [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in (w.core for w in windows)]
    target = max(SMALLEST_GROUP, -(-sum(sizes) // groups))
    found: list[list[Window]] = []
    before, last = 0, -1
    for window, size in zip(windows, sizes):
        if before // target != last:
            found.append([])
            last = before // target
        found[-1].append(window)
        before += size
    return found


class ExecutorPasses:
    """Windows shared by the workers of a ``concurrent.futures`` executor; every map is a file or store that all of them see.

    A task computes a group of windows (:func:`window_groups`) with one thread and sends what it found, a few numbers per
    window. The result is that of :class:`SerialPasses` with one thread, bit by bit, for any number of workers on processors
    of one kind; another instruction set rounds sums differently.

    If workers die (killed, out of memory) the executor is opened again and the groups that are missing are computed again,
    which gives the same numbers because a pass reads nothing that it writes. Dask does so itself. A worker that is cut off
    from the others but goes on writing is not a case that this can see: let its host go before the call is repeated.

    Args:
        open_executor: makes the executor, at the first pass and after workers died: ``client.get_executor`` of a
            ``dask.distributed.Client``, or ``partial(ProcessPoolExecutor, 4)``. It is shut down by :meth:`close`.
        groups: tasks per pass at most.
        attempts: how often a pass is tried before dead workers end it.

    Raises:
        InputError: numbers below 1.

    Example:
        >>> with ExecutorPasses(client.get_executor) as passes:  # doctest: +SKIP
        ...     refine_store("slide.zarr/confidence", "refined.zarr", [0.6, 0.3, 0.1], passes=passes)
    """

    def __init__(self, open_executor: Callable[[], Executor], *, groups: int = GROUPS, attempts: int = ATTEMPTS) -> None:
        if groups < 1 or attempts < 1:
            raise InputError(f"passes need at least 1 group and 1 attempt, got {groups} and {attempts}.")
        self.open_executor, self.groups, self.attempts = open_executor, groups, attempts
        self._executor: Executor | None = None

    def __enter__(self) -> ExecutorPasses:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what runs and let the workers go; a later pass opens the executor again."""
        executor, self._executor = self._executor, None
        if executor is not None:
            self._shut_down(executor)

    def _shut_down(self, executor: Executor) -> None:
        executor.shutdown(wait=True)

    def map(self, function: Callable[..., Any], windows: Sequence[Window], *args: Any) -> list:
        """See :class:`Passes`.

        Raises:
            InputError: something in ``args`` cannot be sent to another process.
            RuntimeError: workers died in every attempt.
            Exception: what the function raised; the first in the order of the windows.
        """
        work = _pickled(function, args)
        groups = [pickle.dumps(group) for group in window_groups(windows, self.groups)]
        found: list[bytes | None] = [None] * len(groups)
        for attempt in range(1, self.attempts + 1):
            try:
                self._compute(work, groups, found)
                break
            except BrokenExecutor as error:
                missing = found.count(None)
                logger.warning("a worker died in attempt %d of %d; %d tasks are missing.", attempt, self.attempts, missing)
                if attempt == self.attempts:
                    raise RuntimeError(
                        f"worker processes died in {attempt} of {attempt} attempts at one pass over the map ({error}). The "
                        "usual reason is that they were killed for memory: use fewer workers."
                    ) from error
        return [result for group in found for result in pickle.loads(group)]

    def _compute(self, work: bytes, groups: list[bytes], found: list[bytes | None]) -> None:
        """Fill in what is missing in ``found``; on an error nothing runs any more when it is raised."""
        if self._executor is None:
            self._executor = self.open_executor()
        # A name of its own keeps Dask, which looks tasks up by their arguments, from an earlier answer: files have changed.
        name, futures = uuid.uuid4().hex, {}
        try:
            for index, group in enumerate(groups):
                if found[index] is None:
                    futures[index] = self._executor.submit(_run, work, group, name)
            for index, future in futures.items():
                found[index] = future.result()
        except BaseException:
            self.close()
            for index, future in futures.items():
                if future.done() and not future.cancelled() and future.exception() is None:
                    found[index] = future.result()
            raise


class ProcessPasses(ExecutorPasses):
    """Windows shared by processes of this machine, with one thread each; they end with this process, however it ends.

    The processes are spawned: a script that uses them needs ``if __name__ == "__main__":``.

    Args:
        workers: processes.
        groups, attempts: see :class:`ExecutorPasses`.

    Raises:
        InputError: numbers below 1.
    """

    def __init__(self, workers: int, *, groups: int = GROUPS, attempts: int = ATTEMPTS) -> None:
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise InputError(f"workers must be a whole number from 1, got {workers!r}.")
        context = multiprocessing.get_context("spawn")
        pool = partial(ProcessPoolExecutor, workers, mp_context=context, initializer=_begin_worker)
        super().__init__(pool, groups=groups, attempts=attempts)

    def _shut_down(self, executor: Executor) -> None:
        executor.shutdown(wait=True, cancel_futures=True)  # unlike Dask's, these know which tasks run


def write_from(
    window: Window, source: MapArray, target: MapArray, operation: Callable[[torch.Tensor, float], torch.Tensor], number: float
) -> None:
    """A pass that writes ``operation(source, number)`` to ``target``, another map of the same shape."""
    key = (*[slice(None)] * (len(source.shape) - 2), *window.core)
    target[key] = operation(source[key], number)


def tissue_windows(passes: Passes, windows: Sequence[Window], mass: MapArray) -> list[Window]:
    """The windows that have tissue or border on it within their margin; what lies in the others has no part in any energy."""
    return [window for window, has in zip(windows, passes.map(_has_tissue, windows, mass)) if has]


def _has_tissue(window: Window, mass: MapArray) -> bool:
    return bool((mass[window.outer] > 0).any())


def _pickled(function: Callable[..., Any], args: tuple) -> bytes:
    # Once per pass, and not by the pool: the pickler of multiprocessing would share tensors by file descriptors.
    try:
        return pickle.dumps((function, args), protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise InputError(
            f"what a pass needs cannot be sent to other processes ({error}); give maps as paths of Zarr arrays."
        ) from error


def _run(work: bytes, group: bytes, name: str) -> bytes:
    """A task: a function's results on a group of windows; ``name`` only tells passes apart."""
    function, args = pickle.loads(work)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads round sums differently, and each worker may have another number of them
    try:
        return pickle.dumps([function(window, *args) for window in pickle.loads(group)], protocol=pickle.HIGHEST_PROTOCOL)
    finally:
        torch.set_num_threads(threads)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all; the parent says what happens
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's workers wait for tasks for ever when their parent was killed."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
