"""``monai-vslp cohort``: a table of slides in, tissue maps and one report over all of them out, on one machine or many."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.utils import optional_import

from monai_vslp.data.slide_table import SlideRecord, read_slide_table
from monai_vslp.io.cohort_report import write_cohort_report
from monai_vslp.io.report_style import REPORT_NAME
from monai_vslp.io.summary import SUMMARY_NAME, read_summary
from monai_vslp.utils.errors import InputError
from monai_vslp.utils.lock import FolderLock, LockedError
from monai_vslp.variational.learned import WEIGHTS
from monai_vslp.workflows.bundle import read_config
from monai_vslp.workflows.calibration import segment_settings
from monai_vslp.workflows.cohort_plan import CohortPlan, check_slides, make_jobs, plan_slides
from monai_vslp.workflows.cohort_slide import SlideJob, finish, is_done, predict_part, segment_one
from monai_vslp.workflows.cohort_state import EventLog, SlideState, cohort_rows, write_cohort_table, write_failed
from monai_vslp.workflows.executors import Call, Executor, Outcome, Work, default_workers, make_executor
from monai_vslp.workflows.regularizer import REGULARIZER
from monai_vslp.workflows.segment import _regularizer

__all__ = ["CohortResult", "cohort", "run_jobs"]

tqdm, has_tqdm = optional_import("tqdm", name="tqdm")

LOG_NAME = "log.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CohortResult:
    """What became of a cohort.

    Attributes:
        failures: stem and reason of every slide of the table that is not done; empty where all went well.
        done: stems that are done, in the order of the table.
        computed: stems among them that this call computed.
        table: ``cohort.csv``, beside which ``report.html`` is; None after a dry run.
        plan: of a dry run, else None.
    """

    failures: dict[str, str] = field(default_factory=dict)
    done: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    table: Path | None = None
    plan: CohortPlan | None = None


class _Progress:
    """A bar over slides that tells tiles/s and the time left, which goes by bytes because the largest slides come first."""

    def __init__(self, jobs: Sequence[SlideJob], show: bool) -> None:
        self.sizes = {job.stem: job.size for job in jobs}
        self.total, self.bytes, self.tiles, self.started = sum(self.sizes.values()), 0, 0, time.monotonic()
        shape = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} slides [{elapsed}{postfix}]"
        self.bar = tqdm(total=len(jobs), desc="cohort", bar_format=shape) if show and has_tqdm and jobs else None

    def update(self, stem: str, tiles: int | None) -> dict[str, float]:
        """One slide more.

        Returns:
            The numbers: ``slides_per_hour``, ``tiles_per_second``, ``seconds_left``.
        """
        self.bytes, self.tiles = self.bytes + self.sizes.pop(stem), self.tiles + (tiles or 0)
        elapsed = max(time.monotonic() - self.started, 1e-3)
        left = elapsed * (self.total - self.bytes) / self.bytes if self.bytes else 0.0
        rate = self.tiles / elapsed
        if self.bar is not None:
            hours, minutes = divmod(round(left / 60), 60)
            self.bar.set_postfix_str(f"{self.tiles:,} tiles, {rate:.1f} tiles/s, {hours}:{minutes:02d} h left", refresh=False)
            self.bar.update()
        return {"tiles_per_second": round(rate, 3), "seconds_left": round(left, 1)}

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()


def _work(run: Path, job: SlideJob, settings: Mapping[str, Any], threads: int | None, count: int = 1) -> Work:
    """One slide for an executor; its tiles in ``count`` parts that different workers may compute, its passes shared then."""
    shared = count > 1 and threads in (1, None)  # passes run on one thread, and more threads round sums differently
    mark = hashlib.sha256(f"{job.folder}\n{job.fingerprint}".encode()).hexdigest()[:16]
    call = Call(f"segment_slide-{job.stem}-{mark}", segment_one, (str(run), job, dict(settings), threads, shared))
    parts = tuple(
        Call(f"tiles-{job.stem}-{mark}-{k}-{count}", predict_part, (str(run), job, dict(settings), (k, count), threads))
        for k in range(count if count > 1 else 0)
    )
    return Work(job.folder, call, parts, size=job.size)


def _record(outcome: Outcome, log: EventLog) -> dict[str, Any]:
    """Result of a slide; where the cluster gave it up, its state too."""
    folder = Path(outcome.work.name)
    if outcome.error is None:
        result = outcome.result
    else:
        error = outcome.error
        reason = (
            f"{type(error).__name__}: {error}. If workers died, memory is the usual reason: give each more (fewer workers), or "
            "look into their logs."
        )
        state = SlideState.read(folder)
        result = {"status": "failed", "step": "worker", "reason": reason, "attempts": state.attempts}
        try:
            state.fail("worker", reason).write(folder)
        except OSError as problem:
            logger.warning("the state of %s cannot be written: %s", folder.name, problem)
    return result


def _log(log: EventLog, stem: str, result: Mapping[str, Any], **numbers: Any) -> None:
    """The result of one slide as an event that is called by its status."""
    log.write(result["status"], stem, **{key: value for key, value in result.items() if key != "status"}, **numbers)


def run_jobs(
    works: Sequence[Work], jobs: Sequence[SlideJob], executor: Executor, log: EventLog, progress: bool = True
) -> dict[str, dict[str, Any]]:
    """Have an executor do the work of slides, with a bar and a log.

    Args:
        works: one per job, named by its folder; the final call returns what
            :func:`~monai_vslp.workflows.cohort_slide.segment_one` does.
        jobs: the slides.
        executor: where.
        log: where events go.
        progress: show a bar.

    Returns:
        Per stem the result. After a full disk the slides that had not begun are missing.
    """
    results: dict[str, dict[str, Any]] = {}
    folders = {job.folder: job.stem for job in jobs}

    def hear(event: Mapping[str, Any]) -> None:
        values = dict(event)
        if values.pop("folder", None) in folders:  # a shared scheduler tells of others' slides, too
            log.write(values.pop("event"), values.pop("slide", None), values.pop("worker", None), **values)

    executor.listen(hear)
    bar = _Progress(jobs, progress)
    outcomes = executor.run(works)
    try:
        for outcome in outcomes:
            stem, result = folders[outcome.work.name], _record(outcome, log)
            results[stem] = result
            _log(log, stem, result, **bar.update(stem, result.get("tiles")))
            if result["status"] == "full":
                break  # the others would meet the same
    finally:
        outcomes.close()
        bar.close()
    return results


def _sort(jobs: Sequence[SlideJob], retry_failed: bool, overwrite: bool) -> dict[str, str]:
    """Per stem ``to do``, ``done``, or ``failed`` for a slide that failed before, has not changed, and is not tried again."""
    status = {}
    for job in jobs:
        state = SlideState.read(job.folder)
        if not overwrite and is_done(job):
            status[job.stem] = "done"
            logger.info("%s is done already.", job.stem)
        elif state.status == "failed" and state.fingerprint == job.fingerprint and not (retry_failed or overwrite):
            logger.warning(
                "%s failed before (%s) and is left out; --retry-failed tries again: %s", job.stem, state.step, state.reason
            )
            status[job.stem] = "failed"
        else:
            status[job.stem] = "to do"
    return status


def _settings(
    run: Path, classes: Sequence[str], choices: Mapping[str, Any], regularizer: str | None, calibration: bool
) -> dict[str, Any]:
    """Top-level values of the inference configs, as ``segment`` sets them."""
    settings = {key: value for key, value in choices.items() if value is not None}
    settings |= _regularizer(run, regularizer, False)
    return settings | (segment_settings(run, classes) if calibration else {})


def cohort(
    table: str | Path,
    output: str | Path,
    *,
    model: str | Path,
    images: str | Path | None = None,
    scheduler: str | None = None,
    scheduler_file: str | Path | None = None,
    workers: int | None = None,
    threads: int = 1,
    memory: int | str | None = None,
    retries: int = 2,
    retry_failed: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    tiles_per_second: float | None = None,
    mpp: float | None = None,
    trust: float | str | None = None,
    alpha: float | None = None,
    views: str | None = None,
    regularizer: str | None = None,
    calibration: bool = True,
    progress: bool = True,
    **overrides: Any,
) -> CohortResult:
    """Segment all slides of a table, on the processes of this machine or of a cluster, whatever fails on the way.

    What is wrong with the table is found, and every file is opened, before anything is computed; files that cannot be read are
    written down and do not stop the others. Each slide's state is on disk (``OUT/<stem>/state.json``): the same command leaves
    alone what is done, goes on where it was interrupted, and leaves out what failed before unless the input or a setting
    changed. Outputs do not depend on the number of workers. Written besides the slides' own outputs: ``failed.csv``,
    ``cohort.csv``, ``log.jsonl`` and the report over all slides.

    Args:
        table: slides and what is known of them (:func:`monai_vslp.data.slide_table.read_slide_table`).
        output: each slide gets ``output/<stem>``.
        model: bundle folder of ``monai-vslp train``.
        images: folder that names in the table are relative to; the table's own by default.
        scheduler, scheduler_file, workers, threads, memory, retries: where it runs
            (:func:`monai_vslp.workflows.executors.make_executor`).
        retry_failed: try again what failed before.
        overwrite: compute again what is done, too.
        dry_run: only look, print and return what would be done.
        tiles_per_second: of one worker, for the time that a dry run tells; None for what was measured on slides that are done.
        mpp: µm per level-0 px, for slides of which neither file nor table says it.
        trust, alpha, views, regularizer, calibration: as of :func:`monai_vslp.workflows.segment`.
        progress: show a bar.
        **overrides: top-level values of the bundle's inference configs.

    Returns:
        What became of the slides.

    Raises:
        InputError: a table, model or option that cannot be used, or a scheduler that is not there.
        OSError: the disk is full. What was finished is kept, and the same command goes on.
    """
    run, output = Path(model).absolute(), Path(output).absolute()
    config = read_config(run, "slide_inference.json")
    classes, checkpoint = config["classes"], run / "models" / "model.pt"
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint} does not exist; has the training of {run} finished an epoch?")
    records = read_slide_table(table, images, classes)
    with_regions = [record.stem for record in records if record.regions]
    if with_regions and "regions" not in config:
        raise InputError(
            f"{table} gives proportions of regions ({', '.join(with_regions[:5])}), which the configs of {run} do not know; "
            "train again with this version, or leave column 'region' out."
        )
    choices = {"trust": trust, "alpha": alpha, "views": views}
    settings = _settings(run, classes, choices, regularizer, calibration) | overrides
    models = [checkpoint, *(p for p in [Path(settings.get(REGULARIZER, run)) / WEIGHTS] if p.is_file())]
    jobs = make_jobs(records, output, models, settings, mpp)
    status = _sort(jobs, retry_failed, overwrite)
    if dry_run:
        count = default_workers(threads) if workers is None else max(workers, 1)
        plan = plan_slides(jobs, status, config | settings, output, count, tiles_per_second)
        print(plan)
        return CohortResult({slide.slide: slide.reason for slide in plan.slides if slide.status == "bad"}, plan=plan)
    todo = [job for job in jobs if status[job.stem] == "to do"]
    results: dict[str, dict[str, Any]] = {}
    with EventLog(output / LOG_NAME) as log:
        counts = {name: sum(value == name for value in status.values()) for name in ("to do", "done", "failed")}
        log.write(
            "start", table=str(table), model=str(run), **{name.replace(" ", "_"): count for name, count in counts.items()}
        )
        if todo:
            # First of all, because a scheduler that is not there is said at once.
            with make_executor(
                scheduler=scheduler,
                scheduler_file=scheduler_file,
                workers=workers,
                threads=threads,
                memory=memory,
                retries=retries,
            ) as executor:
                results = _prepare(todo, overwrite, log, executor)
                ready = [job for job in todo if job.stem not in results]
                own = threads if scheduler is None and scheduler_file is None and workers != 0 else None
                # Fewer slides than workers: their tiles are shared.
                count = -(-executor.threads // len(ready)) if 0 < len(ready) < executor.threads else 1
                works = [_work(run, job, settings, own, count) for job in ready]
                results |= run_jobs(works, ready, executor, log, progress)
        result = _finish_cohort(jobs, records, classes, output, results)
        log.write("end", done=len(result.done), failed=len(result.failures), computed=len(result.computed))
    full = next((found for found in results.values() if found["status"] == "full"), None)
    if full is not None:
        raise OSError(full["errno"], full["reason"])
    return result


def _prepare(todo: Sequence[SlideJob], overwrite: bool, log: EventLog, executor: Executor) -> dict[str, dict[str, Any]]:
    """Open every file once, and forget outputs that are to be made again.

    Returns:
        Stem and result of the slides that cannot be read; their states say so too.
    """
    results: dict[str, dict[str, Any]] = {}
    jobs = {job.stem: job for job in todo}
    for job in todo if overwrite else ():
        with suppress(LockedError), FolderLock(job.folder):  # somebody who writes it now is met again later
            (Path(job.folder) / SUMMARY_NAME).unlink(missing_ok=True)
    for stem, reason in check_slides(todo, executor).items():
        job = jobs[stem]
        try:
            with FolderLock(job.folder):
                state = SlideState.read(job.folder).begin(job.fingerprint)
                state.fail("check", reason).write(job.folder)
        except LockedError as error:
            results[stem] = {"status": "busy", "reason": str(error)}
        else:
            results[stem] = {"status": "failed", "step": "check", "reason": reason, "attempts": state.attempts}
        logger.warning("%s is left out: %s", stem, results[stem]["reason"])
        _log(log, stem, results[stem])
    return results


def _finish_cohort(
    jobs: Sequence[SlideJob],
    records: Sequence[SlideRecord],
    classes: Sequence[str],
    output: Path,
    results: Mapping[str, Mapping[str, Any]],
) -> CohortResult:
    """Tables and report from what is on disk."""
    done, failures, states = [], {}, []
    for job in jobs:
        state = SlideState.read(job.folder)
        if is_done(job):
            if (state.status, state.fingerprint) != ("done", job.fingerprint):
                finish(state, job)  # by 'segment', or by a worker that died before it could say so
                state = SlideState.read(job.folder)
            done.append(job.stem)
        elif job.stem in results:
            failures[job.stem] = results[job.stem].get("reason", "it was given up")
        elif state.status == "failed":
            failures[job.stem] = state.reason
        else:
            failures[job.stem] = "it had not begun when the disk was full"
        states.append(state)
    write_failed(output, states)
    written = write_cohort_table(output, cohort_rows(output, records, classes), classes)
    computed = tuple(stem for stem in done if stem in results)
    _write_report(output, records, done, failures)
    return CohortResult(failures, tuple(done), computed, written)


def _write_report(output: Path, records: Sequence[SlideRecord], done: Sequence[str], failures: Mapping[str, str]) -> None:
    """The report over all slides of the table, where there is something to report."""
    rows = []
    for stem in done:
        try:
            rows.append(read_summary(output / stem) | {"folder": stem})
        except InputError as error:
            logger.warning("%s is not in the report: %s", stem, error)
    if rows or failures:
        raters = {
            record.stem: {name: dict(zip(label.classes, label.mean.tolist())) for name, label in record.estimates.items()}
            for record in records
            if len(record.estimates) > 1
        }
        failed = [{"name": stem, "reason": reason} for stem, reason in failures.items()]
        write_cohort_report(output, rows, failures=failed, raters=raters, name=REPORT_NAME)
