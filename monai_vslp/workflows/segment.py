"""``monai-vslp segment``: images, folders and slides in, tissue maps with reports out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_vslp.data.cohort import Cohort, read_cohort
from monai_vslp.data.images import IMAGE_SUFFIXES, check_images, list_images
from monai_vslp.data.slides import SLIDE_SUFFIXES, is_slide, open_slide
from monai_vslp.io.report import write_index
from monai_vslp.utils.errors import InputError, ProportionError, SlideError
from monai_vslp.workflows.bundle import read_config, run_config

__all__ = ["datalist", "segment"]

logger = logging.getLogger(__name__)


def datalist(folder: str | Path, proportions: str | Path | None, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Images of a folder with their proportions, as MONAI's datasets take them.

    Args:
        folder: holds the images.
        proportions: table with proportions, or None.
        classes: classes of the network; the table's columns must be the same.
    """
    cohort = None if proportions is None else read_cohort(proportions, folder, classes, check_files=False)
    return [_item(path, cohort) for path in list_images(folder)]


def _item(path: Path, cohort: Cohort | None) -> dict[str, Any]:
    item: dict[str, Any] = {"image": str(path)}
    label = None if cohort is None else cohort.lookup(path)
    if label is not None:
        item["proportions"] = label.mean
        item["proportion_spread"] = label.spread
    return item


def _expand(inputs: Sequence[str | Path]) -> list[Path]:
    """Files named, and the images and slides of folders named.

    Raises:
        InputError: a name that does not exist, a folder without images, or two inputs of one stem.
    """
    files: list[Path] = []
    for name in map(Path, inputs):
        if name.is_dir():
            found = sorted({*list_images(name), *(p for p in name.iterdir() if p.suffix.lower() in SLIDE_SUFFIXES)})
            if not found:
                raise InputError(f"folder {name} holds no images or slides ({', '.join((*IMAGE_SUFFIXES, *SLIDE_SUFFIXES))}).")
            files += found
        elif name.is_file():
            files.append(name)
        else:
            raise InputError(f"input {name} does not exist.")
    stems: dict[str, Path] = {}
    for path in files:
        if path.stem in stems:
            raise InputError(f"{stems[path.stem]} and {path} would both write the folder {path.stem!r}; rename one of them.")
        stems[path.stem] = path
    return files


def _fingerprint(path: Path, checkpoint: Path, settings: Mapping[str, Any]) -> str:
    """Changes when the input, the network or the settings change."""
    stats = [(p.stat().st_size, p.stat().st_mtime_ns) for p in (path, checkpoint)]
    return hashlib.sha256(json.dumps([str(path.absolute()), stats, settings], default=str).encode()).hexdigest()[:16]


def _is_done(folder: Path, fingerprint: str) -> bool:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return summary["options"].get("fingerprint") == fingerprint and (folder / "report.html").exists()


def segment(
    inputs: Sequence[str | Path],
    model: str | Path,
    output: str | Path,
    *,
    proportions: str | Path | None = None,
    mpp: float | None = None,
    trust: float | None = None,
    alpha: float | None = None,
    views: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **overrides: Any,
) -> dict[str, str]:
    """Segment images and slides with a trained bundle folder.

    Everything that can be wrong with inputs and proportions is found before the first is computed. Inputs that are done
    already, with the same network and settings, are left alone; an interrupted slide continues where it was.

    Args:
        inputs: images, slides, or folders of them.
        model: bundle folder of ``monai-vslp train``.
        output: each input gets ``output/<stem>``.
        proportions: table with proportions of the inputs; blank cells mean unknown.
        mpp: µm per px of the inputs, for slides that do not say.
        trust: ρ, trust in the proportions; None for a constraint.
        alpha: strength of the regularizer; None for the bundle's.
        views: group of test-time views; None for the bundle's.
        overwrite: compute again what is done.
        progress: show progress bars.
        **overrides: top-level values of the bundle's inference configs.

    Returns:
        Stem and reason of every slide that failed; empty where all went well.

    Raises:
        InputError: an input, table, or model that cannot be used.
    """
    run, output = Path(model), Path(output)
    config = read_config(run, "inference.json")
    classes = config["classes"]
    checkpoint = run / "models" / "model.pt"
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint} does not exist; has the training of {run} finished an epoch?")
    files = _expand(inputs)
    cohort = None if proportions is None else read_cohort(proportions, ".", classes, check_files=False)
    items, problems = {}, []
    for path in files:
        try:
            items[path] = _item(path, cohort)
        except ProportionError as error:
            problems.append(str(error))
    if problems:
        raise ProportionError("\n".join(problems))
    settings = {key: value for key, value in (("trust", trust), ("alpha", alpha), ("views", views)) if value is not None}
    settings |= overrides
    todo_images, todo_slides = [], []
    for path in files:
        given = items[path].get("proportions")
        mark = _fingerprint(path, checkpoint, settings | {"p": None if given is None else given.tolist(), "mpp": mpp})
        items[path]["fingerprint"] = mark
        if not overwrite and _is_done(output / path.stem, mark):
            logger.info("%s is done already.", path.name)
            continue
        (todo_slides if is_slide(path) else todo_images).append(path)
    check_images(todo_images)
    failures: dict[str, str] = {}
    opened = []
    for path in todo_slides:
        try:
            open_slide(path, mpp=mpp).close()  # unreadable, or of unknown scale: said before hours are spent on others
            opened.append(path)
        except SlideError as error:
            logger.info("%s", error)
            failures[path.stem] = str(error)
    if todo_images:
        given_mpp = {} if mpp is None else {"mpp": mpp}
        run_config(
            run, "inference.json", datalist=[items[p] for p in todo_images], output_dir=str(output), **settings, **given_mpp
        )
    for path in opened:
        item = items[path]
        try:
            run_config(
                run,
                "slide_inference.json",
                slide=str(path),
                output_dir=str(output / path.stem),
                proportions=None if "proportions" not in item else item["proportions"].tolist(),
                given_spread=None if "proportions" not in item else item["proportion_spread"].tolist(),
                source_mpp=mpp,
                fingerprint=item["fingerprint"],
                progress=progress,
                **settings,
            )
        except SlideError as error:
            logger.info("%s", error)
            failures[path.stem] = str(error)
    if any(output.glob("*/summary.json")):
        write_index(output)
    return failures
