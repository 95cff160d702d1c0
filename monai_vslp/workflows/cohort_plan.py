"""What a cohort needs before it runs: the jobs, and for a dry run readers, tiles, disk and time."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.utils import optional_import

from monai_vslp.data.slide_table import SlideRecord
from monai_vslp.data.slides import is_slide, open_slide
from monai_vslp.inferers.slide import SlideConfidence
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows.cohort_slide import SlideJob, check_batch
from monai_vslp.workflows.cohort_state import SlideState
from monai_vslp.workflows.executors import Call, Executor, Work
from monai_vslp.workflows.segment import _fingerprint

__all__ = ["CohortPlan", "SlidePlan", "check_slides", "make_jobs", "plan_slides"]

Image, _ = optional_import("PIL.Image")

CHECKED_TOGETHER = 32  # files that one call opens
OUTPUT_BYTES = 12  # per map px beside two bytes per class: labels twice, spread, two energies in 32 bit, overlay

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlidePlan:
    """What one slide needs.

    Attributes:
        slide: stem.
        status: ``to do``, ``done``, ``failed`` (before; ``--retry-failed`` runs it) or ``bad`` (cannot be read).
        reader: name of the reader, ``image`` for what is not read tile by tile.
        mpp: µm per level-0 px.
        shape: level-0 ``(H, W)`` in px.
        tiles: tiles that touch tissue; None for an image.
        work_bytes: disk for results of tiles and for confidences until the slide is written.
        output_bytes: disk for its outputs at most, before compression.
        reason: what is wrong.
    """

    slide: str
    status: str
    reader: str = ""
    mpp: float | None = None
    shape: tuple[int, int] | None = None
    tiles: int | None = None
    work_bytes: int = 0
    output_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True)
class CohortPlan:
    """What a cohort needs.

    Attributes:
        slides: one plan per slide of the table, in its order.
        workers: calls at a time that the time is meant for.
        tiles_per_second: of one worker; None where neither given nor measured.
        measured: whether it was measured, on slides of this output that are done.
        free_bytes: on the disk of the output.
    """

    slides: tuple[SlidePlan, ...]
    workers: int
    tiles_per_second: float | None
    measured: bool
    free_bytes: int

    def _todo(self) -> list[SlidePlan]:
        return [plan for plan in self.slides if plan.status == "to do"]

    @property
    def tiles(self) -> int:
        """Of all slides that are to do."""
        return sum(plan.tiles or 0 for plan in self._todo())

    @property
    def bytes_needed(self) -> int:
        """Outputs of all slides at most, and results of tiles of the largest ones that run at a time."""
        largest = sorted((plan.work_bytes for plan in self._todo()), reverse=True)[: self.workers]
        return sum(plan.output_bytes for plan in self._todo()) + sum(largest)

    @property
    def seconds(self) -> float | None:
        """For the tiles; no less than the largest slide takes one worker. None where the speed is unknown."""
        if self.tiles_per_second is None:
            return None
        most = max((plan.tiles or 0 for plan in self._todo()), default=0)
        return max(self.tiles / self.workers, most) / self.tiles_per_second

    def __str__(self) -> str:
        lines = [
            f"{'slide':<32} {'status':<7} {'reader':<10} {'µm/px':>7} {'size, px':>17} {'tiles':>8} {'work':>9} {'outputs':>9}"
        ]
        for plan in self.slides:
            size = "" if plan.shape is None else f"{plan.shape[1]} x {plan.shape[0]}"
            mpp = "" if plan.mpp is None else f"{plan.mpp:.4g}"
            tiles = "" if plan.tiles is None else f"{plan.tiles:,}"
            lines.append(
                f"{plan.slide:<32} {plan.status:<7} {plan.reader:<10} {mpp:>7} {size:>17} {tiles:>8} "
                f"{_bytes(plan.work_bytes):>9} {_bytes(plan.output_bytes):>9}"
            )
            if plan.reason:
                lines.append(f"    {plan.reason}")
        counts = {name: sum(plan.status == name for plan in self.slides) for name in ("to do", "done", "failed", "bad")}
        lines.append(", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "no slides")
        lines.append(f"Tiles: {self.tiles:,}")
        short = " – not enough" if self.bytes_needed > self.free_bytes else ""
        lines.append(f"Disk: up to {_bytes(self.bytes_needed)}, {_bytes(self.free_bytes)} free{short}")
        if self.seconds is None:
            lines.append("Time: unknown; give --tiles-per-second, or segment one slide first, which measures it")
        else:
            origin = "measured on slides that are done" if self.measured else "given"
            lines.append(
                f"Time: about {_duration(self.seconds)} with {self.workers} worker(s) at {self.tiles_per_second:.3g} tiles/s "
                f"each ({origin})"
            )
        return "\n".join(lines)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def make_jobs(
    records: Iterable[SlideRecord], output: Path, models: Sequence[Path], settings: Mapping[str, Any], mpp: float | None
) -> list[SlideJob]:
    """A job per slide; the µm/px of the table comes before ``mpp``. A file that is gone has no fingerprint."""
    jobs = []
    for record in records:
        label, scale = record.proportions, record.mpp if record.mpp is not None else mpp
        regions = tuple((name, None if p is None else tuple(p.mean.tolist())) for name, p in record.regions.items())
        marked = dict(settings) | {"p": None if label is None else label.mean.tolist(), "mpp": scale}
        if regions:
            marked["regions"] = regions
        try:
            fingerprint = _fingerprint(record.path, models, marked)
        except FileNotFoundError:
            fingerprint = ""
        jobs.append(
            SlideJob(
                path=str(record.path),
                folder=str(output / record.stem),
                fingerprint=fingerprint,
                proportions=None if label is None else tuple(label.mean.tolist()),
                spread=None if label is None else tuple(label.spread.tolist()),
                bounds=None if label is None else (tuple(label.lower.tolist()), tuple(label.upper.tolist())),
                regions=regions,
                mpp=scale,
            )
        )
    return jobs


def check_slides(jobs: Sequence[SlideJob], executor: Executor) -> dict[str, str]:
    """Open every file once, on the workers.

    Threads of this process would be the simpler way, but cuCIM waits for itself for good where several of them open files.

    Returns:
        Stem and reason of those that cannot be read. Files that take their reader's process with them are not among them: each
        meets its end alone, later, and is named then.
    """
    batches = [tuple(jobs[i : i + CHECKED_TOGETHER]) for i in range(0, len(jobs), CHECKED_TOGETHER)]
    works = []
    for batch in batches:
        mark = hashlib.sha256(repr([(job.path, job.fingerprint) for job in batch]).encode()).hexdigest()[:16]
        works.append(Work(mark, Call(f"check_slides-{mark}", check_batch, (batch,))))
    found: dict[str, str] = {}
    for outcome in executor.run(works):
        if outcome.error is None:
            found |= outcome.result
        else:
            logger.warning("some slides could not be looked at before they are segmented: %s", outcome.error)
    return {job.stem: found[job.stem] for job in jobs if job.stem in found}


def _plan_slide(job: SlideJob, status: str, values: Mapping[str, Any]) -> SlidePlan:
    """Readers, tiles and bytes of one slide; the tissue is looked for as when it is segmented."""
    path, classes = Path(job.path), len(values["classes"])
    try:
        if not is_slide(path):
            with Image.open(path) as image:
                width, height = image.size
            return SlidePlan(
                job.stem, status, "image", job.mpp, (height, width), None, 0, height * width * (2 * classes + OUTPUT_BYTES)
            )
        # Bundles of earlier versions know neither readers nor margins.
        with open_slide(path, values.get("reader", "auto"), job.mpp) as slide:
            found = SlideConfidence(
                slide,
                classes,
                mpp=values["mpp"],
                work_dir=Path(job.folder) / "tiles",
                fingerprint=job.fingerprint,
                tile=values["tile"],
                overlap=values["overlap"],
                margin=values.get("margin", 0),
                map_downsample=values["map_downsample"],
                progress=False,
            )
            needs = found.estimate()
            work = needs["tile_bytes"] + needs["map_bytes"]
            outputs = math.prod(needs["map_shape"]) * (2 * classes + OUTPUT_BYTES)
            return SlidePlan(job.stem, status, slide.reader, slide.mpp, slide.shape, needs["tiles"], work, outputs)
    except (InputError, OSError) as error:
        return SlidePlan(job.stem, "bad", reason=str(error))


def plan_slides(
    jobs: Sequence[SlideJob],
    status: Mapping[str, str],
    values: Mapping[str, Any],
    output: Path,
    workers: int,
    tiles_per_second: float | None,
) -> CohortPlan:
    """Look at every slide without computing anything.

    Args:
        jobs: all slides.
        status: of each stem, as :class:`SlidePlan` has it.
        values: of the slide config with the user's in place: ``classes``, ``mpp``, ``tile``, ``overlap``,
            ``map_downsample``, ``margin``, ``reader``.
        output: folder of the cohort.
        workers: calls at a time.
        tiles_per_second: of one worker; None for what was measured on slides of ``output`` that are done.
    """
    if tiles_per_second is not None and not tiles_per_second > 0:
        raise InputError(f"tiles_per_second must be above 0, got {tiles_per_second}.")
    plans = tuple(_plan_slide(job, status[job.stem], values) for job in jobs)
    measured = None
    if tiles_per_second is None:
        states = [SlideState.read(job.folder) for job in jobs]
        rates = [state.tiles / state.seconds for state in states if state.status == "done" and state.tiles and state.seconds]
        measured = statistics.median(rates) if rates else None
    disk = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    rate = measured if tiles_per_second is None else tiles_per_second
    return CohortPlan(plans, workers, rate, measured is not None, shutil.disk_usage(disk).free)
