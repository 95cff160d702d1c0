"""One slide of a cohort, as a worker does it: lock, state, outputs."""

from __future__ import annotations

import errno
import logging
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_vslp.data.images import check_images
from monai_vslp.data.slides import is_slide, open_slide
from monai_vslp.io.summary import read_summary
from monai_vslp.utils.errors import InputError
from monai_vslp.utils.lock import FolderLock, LockedError
from monai_vslp.variational.passes import Passes
from monai_vslp.workflows.bundle import run_config
from monai_vslp.workflows.cohort_state import SlideState
from monai_vslp.workflows.executors import emit, worker_passes
from monai_vslp.workflows.segment import _is_done

__all__ = ["NO_SPACE", "SlideJob", "check_batch", "finish", "is_done", "predict_part", "segment_one"]

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideJob:
    """What a worker has to know of one slide: a few hundred bytes.

    Attributes:
        path: the file.
        folder: where its outputs go.
        fingerprint: of input, network, proportions and settings.
        proportions, spread: fractions and their standard deviation between raters per class; None where nothing is given.
        bounds: lower and upper fractions per class.
        regions: proportions by name of region, for slides whose table names some.
        mpp: µm per level-0 px, where the table or the user says.
    """

    path: str
    folder: str
    fingerprint: str
    proportions: tuple[float, ...] | None = None
    spread: tuple[float, ...] | None = None
    bounds: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    regions: tuple[tuple[str, tuple[float, ...] | None], ...] = ()
    mpp: float | None = None

    @property
    def stem(self) -> str:
        """File name without suffix; names the outputs."""
        return Path(self.path).stem

    @property
    def size(self) -> int:
        """Bytes of the file or folder, a measure of the work; 0 where it is gone."""
        path = Path(self.path)
        try:
            files = path.rglob("*") if path.is_dir() else (path,)
            return sum(file.stat().st_size for file in files)
        except OSError:
            return 0


def is_done(job: SlideJob) -> bool:
    """Whether the outputs are there and complete; they tell, not the state, which a kill may leave behind."""
    return bool(job.fingerprint) and _is_done(Path(job.folder), job.fingerprint, None)


def check_slide(job: SlideJob) -> str | None:
    """Why a file cannot be read, in words; None where it can as far as a first look tells."""
    path = Path(job.path)
    try:
        if is_slide(path):
            open_slide(path, mpp=job.mpp).close()
        elif path.is_file():
            check_images([path])
        else:
            return f"{path} does not exist."
    except (InputError, OSError) as error:
        return str(error)
    return None


def check_batch(jobs: Sequence[SlideJob]) -> dict[str, str]:
    """Stem and reason of the slides among ``jobs`` that cannot be read."""
    return {job.stem: reason for job in jobs if (reason := check_slide(job)) is not None}


def _segment(run: Path, job: SlideJob, settings: Mapping[str, Any], passes: Passes | None) -> None:
    """The same as ``monai-vslp segment`` does for one input."""

    def given(value: Any) -> Any:
        return None if value is None else np.asarray(value).tolist()

    if not is_slide(job.path):
        item: dict[str, Any] = {"image": job.path, "fingerprint": job.fingerprint}
        if job.proportions is not None:
            item |= {"proportions": np.asarray(job.proportions), "proportion_spread": np.asarray(job.spread)}
            item["proportion_bounds"] = np.asarray(job.bounds)
        extra = {} if job.mpp is None else {"mpp": job.mpp}
        run_config(run, "inference.json", datalist=[item], output_dir=str(Path(job.folder).parent), **settings, **extra)
        return
    extra = {"regions": {name: given(value) for name, value in job.regions}} if job.regions else {}
    if passes is not None:
        extra["run#0#passes"] = passes
    run_config(
        run,
        "slide_inference.json",
        slide=job.path,
        output_dir=job.folder,
        proportions=given(job.proportions),
        given_spread=given(job.spread),
        given_bounds=given(job.bounds),
        source_mpp=job.mpp,
        fingerprint=job.fingerprint,
        progress=False,
        **settings,
        **extra,
    )


def predict_part(
    run: str, job: SlideJob, settings: Mapping[str, Any], part: tuple[int, int], threads: int | None = None
) -> None:
    """Compute every n-th batch of tiles of a slide from the k-th, where :func:`segment_one` finds them.

    What goes wrong is left for :func:`segment_one`, which meets it again and writes it down.

    Args:
        run, job, settings, threads: as of :func:`segment_one`.
        part: ``(k, n)``.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if is_done(job) or not is_slide(job.path):
        return
    try:
        run_config(
            Path(run),
            "slide_inference.json",
            slide=job.path,
            output_dir=job.folder,
            source_mpp=job.mpp,
            fingerprint=job.fingerprint,
            progress=False,
            run=[
                "$@pipeline.predict(@slide, @output_dir, @part, source_mpp=@source_mpp, fingerprint=@fingerprint)",
            ],
            part=list(part),
            **settings,
        )
        emit(event="tiles", slide=job.stem, folder=job.folder, pid=os.getpid(), part=part[0], parts=part[1])
    except Exception as error:  # of any kind, as in segment_one
        logger.info("tiles of %s, part %d of %d: %s", job.stem, part[0] + 1, part[1], error)


def segment_one(
    run: str, job: SlideJob, settings: Mapping[str, Any], threads: int | None = None, shared: bool = False
) -> dict[str, Any]:
    """Segment one slide; whatever goes wrong with it is written down and told, not raised.

    Args:
        run: bundle folder.
        job: the slide.
        settings: top-level values of the bundle's inference configs.
        threads: threads of torch in this process; None to leave them.
        shared: have all workers of the cluster make the passes of the variational solver, one thread each.

    Returns:
        ``status``: ``done``; ``failed``; ``busy`` where another process writes this slide; or ``full`` where the disk is,
        which is not the slide's fault: it stays unfinished. With ``tiles``, ``seconds``, ``attempts``, ``step``, ``reason`` and
        ``errno`` where they are known.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    folder = Path(job.folder)
    try:
        with FolderLock(folder) as lock, worker_passes() if shared else nullcontext() as passes:
            return _attempt(Path(run), job, settings, lock, passes)
    except LockedError as error:
        return {"status": "busy", "reason": str(error)}
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        return {"status": "full", "reason": str(error), "errno": error.errno}


def _attempt(run: Path, job: SlideJob, settings: Mapping[str, Any], lock: FolderLock, passes: Passes | None) -> dict[str, Any]:
    """One attempt under the lock.

    Raises:
        OSError: the disk is full.
        LockedError: the lock was lost.
    """
    folder, started = Path(job.folder), time.perf_counter()
    before = SlideState.read(folder)
    if is_done(job):  # by a worker whose answer was lost, or another run that waited less for the lock
        return finish(before, job)
    state = before.begin(job.fingerprint).write(folder)
    numbers = {"host": state.host, "pid": state.pid, "attempts": state.attempts, "shared_passes": passes is not None}
    emit(event="running", slide=job.stem, folder=job.folder, **numbers)
    step = "open"
    try:
        if (reason := check_slide(job)) is not None:
            raise InputError(reason)
        step = "segment"
        _segment(run, job, settings, passes)
        lock.check()
    except LockedError:
        raise
    except Exception as error:  # one bad slide never stops a cohort, however it is bad
        if isinstance(error, OSError):
            if error.errno in NO_SPACE:
                raise
            step = "write" if error.filename is not None and Path(error.filename).is_relative_to(folder) else step
        known = isinstance(error, (InputError, OSError))
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        state.fail(step, reason, "" if known else traceback.format_exc()).write(folder)
        logger.info("%s failed: %s", job.stem, reason)
        return {"status": "failed", "step": step, "reason": reason, "attempts": state.attempts}
    return finish(state, job, round(time.perf_counter() - started, 3))


def finish(state: SlideState, job: SlideJob, seconds: float | None = None) -> dict[str, Any]:
    """Write down that a slide is done, with what its summary says.

    Args:
        state: before.
        job: the slide.
        seconds: how long it took; None for what is known of it.

    Returns:
        The result as :func:`segment_one` gives it.
    """
    summary = read_summary(job.folder)
    tiles = summary["options"].get("tiles")
    if seconds is None:
        seconds = round(sum(summary["seconds"].values()), 3) if state.seconds is None else state.seconds
    SlideState(job.stem, "done", job.fingerprint, state.attempts, state.host, state.pid, tiles=tiles, seconds=seconds).write(
        job.folder
    )
    return {"status": "done", "tiles": tiles, "seconds": seconds, "attempts": state.attempts}
