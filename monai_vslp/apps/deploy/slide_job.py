"""What a platform hands over for one slide (a folder, a model, perhaps proportions), and the call of ``segment`` for it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_vslp.data.cohort import write_table
from monai_vslp.data.proportion_file import (
    PROPORTION_FILES,
    find_proportion_file,
    read_proportion_file,
    read_proportion_json,
)
from monai_vslp.data.slides import SLIDE_SUFFIXES, is_slide, open_slide
from monai_vslp.io.summary import SUMMARY_NAME
from monai_vslp.utils.errors import InputError, SlideError
from monai_vslp.workflows.bundle import read_config
from monai_vslp.workflows.segment import segment

__all__ = ["FORMATS", "SlideJob", "find_model", "find_slide", "prepare", "run_job"]

FORMATS = ("dicom_seg", "geojson", "table", "viewer")  # always written, beside those of the model's config
SLIDE_CONFIG = "slide_inference.json"
MOST_NAMES = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideJob:
    """One slide that was looked at and can be segmented.

    Attributes:
        slide: the file, or the folder of a DICOM series or an OME-Zarr image.
        model: bundle folder.
        formats: what is written.
        table: file with the proportions, None where there is none.
        row: what a JSON says of the slide as a row of a table, empty where the table is one.
        mpp: µm per level-0 px where the file with the proportions says it; it overrides what the slide says.
    """

    slide: Path
    model: Path
    formats: tuple[str, ...]
    table: Path | None = None
    row: dict[str, Any] = field(default_factory=dict)
    mpp: float | None = None


def _slides_in(folder: Path) -> Iterator[Path]:
    """Slides in a folder and the folders in it, as studies and series nest; what is no slide is passed over."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if is_slide(entry):
            yield entry
        elif entry.is_dir():
            yield from _slides_in(entry)


def _names(paths: list[Path], folder: Path) -> str:
    shown = [str(path.relative_to(folder)) for path in paths[:MOST_NAMES]]
    return ", ".join(shown) + (f" and {len(paths) - MOST_NAMES} more" if len(paths) > MOST_NAMES else "")


def find_slide(source: str | Path) -> Path:
    """The one slide that was handed over.

    Args:
        source: a slide, or a folder with one slide in it or in a folder below. The instances of one DICOM series, lying in a
            folder, are one slide, which is that folder.

    Raises:
        InputError: there is none, or more than one.
    """
    source = Path(source)
    if not source.exists():
        raise InputError(f"input {source} does not exist; give a slide, or a folder with one slide.")
    if is_slide(source):
        return source
    if source.is_file():
        raise InputError(f"input {source} is no slide; expected {', '.join(SLIDE_SUFFIXES)}, a tiled TIFF, or DICOM.")
    found = list(_slides_in(source))
    if not found:
        files = [path for path in sorted(source.rglob("*")) if path.is_file()]
        held = f"it holds {_names(files, source)}" if files else "it is empty"
        raise InputError(
            f"no slide in {source}: {held}; expected one of {', '.join(SLIDE_SUFFIXES)}, a tiled TIFF, or a DICOM series."
        )
    if len(found) > 1:
        raise InputError(
            f"{len(found)} slides in {source} ({_names(found, source)}); one run takes one slide. Start the app once per "
            "slide, or use 'monai-vslp cohort' for many."
        )
    return found[0]


def find_model(source: str | Path) -> Path:
    """The bundle folder: ``source`` itself, or the one folder in it that is one, as packaged models lie.

    Raises:
        InputError: there is none, or more than one, or it has no weights.
    """
    source = Path(source)

    def is_bundle(folder: Path) -> bool:
        return (folder / "configs" / SLIDE_CONFIG).is_file()

    found = [source] if is_bundle(source) else []
    if not found and source.is_dir():
        found = [folder for folder in sorted(source.iterdir()) if is_bundle(folder)]
    if len(found) != 1:
        held = "does not exist" if not source.exists() else "holds no model" if not found else f"holds {len(found)} models"
        raise InputError(
            f"model {source} {held}; give the folder that 'monai-vslp train' wrote (it has configs/{SLIDE_CONFIG} and "
            "models/model.pt), or a folder with one such folder in it."
        )
    weights = found[0] / "models" / "model.pt"
    if not weights.is_file():
        raise InputError(f"model {found[0]} has no weights: {weights} does not exist. Copy the whole folder of the training.")
    return found[0]


def prepare(source: str | Path, model: str | Path) -> SlideJob:
    """Find slide, model and proportions, and look at all of them, so that what is wrong is said before anything is computed.

    Args:
        source: as of :func:`find_slide`. Proportions lie beside the slide in ``proportions.csv``, ``.xlsx`` or ``.json``, or
            in a file of the slide's name with one of these suffixes.
        model: as of :func:`find_model`.

    Raises:
        SlideError: the slide cannot be read, or does not say its µm/px.
        InputError: something else is missing, twice there, or not understood.
    """
    run, slide = find_model(model), find_slide(source)
    config = read_config(run, SLIDE_CONFIG)
    classes, table = list(config["classes"]), find_proportion_file(slide)
    row: dict[str, Any] = {}
    mpp = None
    if table is not None:
        mpp = read_proportion_file(table, slide, classes).mpp
        if table.suffix == ".json":
            row = read_proportion_json(table, slide, classes)
    try:
        open_slide(slide, config.get("reader", "auto"), mpp).close()
    except SlideError as error:
        hint = 'Here: "mpp" in proportions.json or a column mpp in proportions.csv beside the slide.' if mpp is None else ""
        raise SlideError(f"{error} {hint}".strip()) from error
    formats = tuple(dict.fromkeys([*config.get("formats", ()), *FORMATS]))
    return SlideJob(slide, run, formats, table, row, mpp)


def run_job(job: SlideJob, output: str | Path, progress: bool = False) -> Path:
    """Segment the slide as ``monai-vslp segment`` does.

    What is done already is left alone, and an interrupted run goes on where it was.

    Args:
        job: from :func:`prepare`.
        output: gets a folder of the slide's name.
        progress: show a bar over tiles.

    Returns:
        Path of ``summary.json``.

    Raises:
        SlideError: the slide fails on the way, or another process writes its folder.
        OSError: a full disk; what was finished is kept.
    """
    output = Path(output)
    logger.info("slide %s, model %s, proportions %s", job.slide, job.model, job.table or "unknown")
    with tempfile.TemporaryDirectory() as folder:
        table = job.table
        if job.row:
            classes = list(read_config(job.model, SLIDE_CONFIG)["classes"])
            table = write_table(Path(folder) / PROPORTION_FILES[0], [job.row], classes)
        failures = segment(
            [job.slide], job.model, output, proportions=table, mpp=job.mpp, formats=list(job.formats), progress=progress
        )
    if failures:
        raise SlideError("\n".join(failures.values()))
    return output / job.slide.stem / SUMMARY_NAME
