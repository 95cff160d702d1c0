"""``monai-vslp segment``: images, folders and slides in, tissue maps with reports out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import convert_to_tensor, optional_import

from monai_vslp.data.cohort import Cohort, read_cohort
from monai_vslp.data.images import check_images, list_images
from monai_vslp.data.inputs import content_mark, find_images
from monai_vslp.data.slides import is_slide, open_slide
from monai_vslp.io.cohort_report import write_index
from monai_vslp.io.manifest import MANIFEST_NAME
from monai_vslp.io.ome_tiff import write_ome_tiff
from monai_vslp.io.report import BAND_MAP, write_report
from monai_vslp.io.report_pictures import band_picture
from monai_vslp.io.summary import SUMMARY_NAME, read_summary
from monai_vslp.transforms.refinement import VariationalRefinementd
from monai_vslp.utils.atomic import atomic_path, write_json
from monai_vslp.utils.errors import InputError, ProportionError, SlideError
from monai_vslp.utils.lock import FolderLock, LockedError
from monai_vslp.utils.plugins import PluginError
from monai_vslp.variational.explain import flip_band
from monai_vslp.variational.learned import WEIGHTS
from monai_vslp.variational.potential import REGULARIZERS
from monai_vslp.workflows.bundle import read_config, run_config
from monai_vslp.workflows.calibration import segment_settings
from monai_vslp.workflows.regularizer import REGULARIZER, has_regularizer

__all__ = ["datalist", "segment"]

Image, _ = optional_import("PIL.Image")

BAND_PICTURE = "band.jpg"

logger = logging.getLogger(__name__)


def datalist(folder: str | Path, proportions: str | Path | None, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Images of a folder with their proportions, as MONAI's datasets take them.

    Args:
        folder: holds the images.
        proportions: table with proportions, or None.
        classes: classes of the network; the table's columns must be the same.
    """
    cohort = None if proportions is None else read_cohort(proportions, folder, classes, check_files=False, training=False)
    return [_item(path, cohort) for path in list_images(folder)]


def _item(path: Path, cohort: Cohort | None) -> dict[str, Any]:
    item: dict[str, Any] = {"image": str(path)}
    label = None if cohort is None else cohort.lookup(path)
    if label is not None:
        item["proportions"] = label.mean
        item["proportion_spread"] = label.spread
        item["proportion_bounds"] = np.stack([label.lower, label.upper])
    return item


def _expand(inputs: Sequence[str | Path]) -> list[Path]:
    """Images and slides named, or in folders named.

    Raises:
        InputError: a name that does not exist, a folder without images, or two inputs of one stem.
    """
    files = find_images(inputs)
    stems: dict[str, Path] = {}
    for path in files:
        if path.stem in stems:
            raise InputError(f"{stems[path.stem]} and {path} would both write the folder {path.stem!r}; rename one of them.")
        stems[path.stem] = path
    return files


def _fingerprint(path: Path, models: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """Changes when the input, the network or the settings change."""
    stats = [content_mark(p) for p in (path, *models)]
    return hashlib.sha256(json.dumps([str(path.absolute()), stats, settings], default=str).encode()).hexdigest()[:16]


def _is_done(folder: Path, fingerprint: str, band: float | None) -> bool:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    # What comes after the summary: the report, and for slides the list of checksums.
    last = ["report.html"] if summary.get("kind") != "slide" else ["report.html", MANIFEST_NAME]
    same = summary["options"].get("fingerprint") == fingerprint and all((folder / name).exists() for name in last)
    return same and (band is None or "band" in summary)  # the band comes after the rest, an interrupt may leave it out


class _FlipBandd(VariationalRefinementd):
    """Last step of a chain with a band: adds it to the files of an image that was refined and saved.

    Writes ``band.tif`` (uint8 ``[2, H, W]``: number of moves that change the label, at most 255; most frequent other class,
    255 for none), ``band.jpg``, and ``band`` in ``summary.json`` (:meth:`monai_vslp.variational.explain.FlipBand.to_dict`),
    and the report anew.

    Args:
        step: rounding step of the proportions, a fraction.
        output_dir: each input has a folder ``output_dir/<stem>``.
        **refinement: arguments of the refinement in the same chain.
    """

    def __init__(self, step: float, output_dir: str | Path, **refinement: Any) -> None:
        super().__init__(**refinement)
        self.step, self.output_dir = step, Path(output_dir)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)

        def tensor(name: str | None) -> Any:
            return None if name is None or d.get(name) is None else convert_to_tensor(d[name], track_meta=False)

        options = {field.name: getattr(self.refinement.options, field.name) for field in fields(self.refinement.options)}
        options["alpha"] /= self.refinement.pixel_size
        for key in self.key_iterator(d):
            folder = self.output_dir / Path(d["image_path"]).stem
            summary, mass = read_summary(folder), tensor(self.mass_key)
            band = flip_band(
                tensor(f"{key}_confidence").float(),
                tensor(self.proportions_key),
                None if mass is None else mass.float().view(mass.shape[-2:]),
                tensor(self.image_key),
                self.step,
                **options,
            )
            count = band.count.clamp_max(255).cpu().numpy().astype(np.uint8)
            other = np.where(count > 0, band.alternatives.cpu().numpy(), 255).astype(np.uint8)
            labels = band.labels.cpu().numpy().astype(np.uint8)
            if mass is not None:
                labels[mass.cpu().numpy().reshape(labels.shape) <= 0] = 255
            description = {"classes": summary["classes"], "step": band.step, "moves": len(band.moves)}
            maps = np.stack([count, other])
            write_ome_tiff(
                folder / BAND_MAP,
                maps,
                channels=["moves", "alternative"],
                labels=True,
                mpp=summary["mpp"],
                description=description,
                pyramid=False,
            )
            with Image.open(folder / "thumbnail.jpg") as photo, atomic_path(folder / BAND_PICTURE) as temporary:
                picture = band_picture(np.asarray(photo.convert("RGB")), labels, maps, summary["colors"])
                Image.fromarray(picture).save(temporary, quality=92)
            write_json(folder / SUMMARY_NAME, summary | {"band": band.to_dict(summary["classes"])})
            write_report(folder)
        return d


def _with_band(config: Mapping[str, Any], step: float) -> list[dict[str, Any]]:
    """Post-processing of an inference config with the band as its last step, refined as the config says.

    Raises:
        InputError: the config refines nothing.
    """
    steps = config["postprocessing"]["transforms"]
    refined = [entry for entry in steps if str(entry.get("_target_")).endswith("VariationalRefinementd")]
    if not refined:
        raise InputError(
            "inference.json of this bundle has no VariationalRefinementd in its postprocessing, so there is no band."
        )
    return [*steps, refined[-1] | {"_target_": _FlipBandd, "step": step, "output_dir": "@output_dir"}]


def _regularizer(run: Path, name: str | None, band: bool) -> dict[str, str]:
    """The config's value ``regularizer`` for a choice of the user; nothing for total variation."""
    if name not in (None, "tv", "learned"):
        try:
            REGULARIZERS.find(name)
        except PluginError:
            raise
        except ValueError as error:
            known = "'tv', 'learned' or one that another package adds"
            raise InputError(f"regularizer is {known}, got {name!r}: {error}") from error
        if band:
            raise InputError("a band is found with total variation; choose --regularizer tv, or leave the band out.")
        return {"regularizer": name}
    if name == "learned" and not has_regularizer(run):
        raise InputError(f"{run} has no learned regularizer; make one with 'monai-vslp train-regularizer {run}'.")
    if name == "learned" and band:
        raise InputError("a band is found with total variation; choose --regularizer tv, or leave the band out.")
    if name == "tv" or band or not has_regularizer(run):
        return {}
    return {"regularizer": str((run / REGULARIZER).absolute())}


def _check_band(band: float, items: Mapping[Path, Mapping[str, Any]]) -> None:
    """Everything about a band that can be wrong before it is computed."""
    if not 0 < band < 100:
        raise InputError(f"band is the rounding step of the proportions in percent, above 0 and below 100, got {band}.")
    slides = [path.name for path in items if is_slide(path)]
    if slides:
        raise InputError(
            f"a band is made for images, not for slides ({', '.join(slides)}); segment the slides in a call without a band."
        )
    without = [path.name for path, item in items.items() if "proportions" not in item]
    if without:
        raise ProportionError(
            "a band says what given proportions decide, so it needs given proportions; there are none for "
            f"{', '.join(without)}. Give a table of proportions with a row for each, or leave the band out."
        )


def segment(
    inputs: Sequence[str | Path],
    model: str | Path,
    output: str | Path,
    *,
    proportions: str | Path | None = None,
    mpp: float | None = None,
    trust: float | str | None = None,
    alpha: float | None = None,
    views: str | None = None,
    band: float | None = None,
    regularizer: str | None = None,
    calibration: bool = True,
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
        trust: ρ, trust in the proportions; ``raters`` for what their disagreement warrants, ``bounds`` to stay within the
            ranges that were written; None for the bundle's (a constraint).
        alpha: strength of the regularizer; None for the bundle's.
        views: group of test-time views; None for the bundle's.
        regularizer: ``tv`` or ``learned``; None for a learned one where ``monai-vslp train-regularizer`` left it in the bundle.
        band: rounding step of the proportions in percent; which labels hang on one such step is then found too
            (:func:`monai_vslp.variational.explain.flip_band`), for images with proportions. None for no band.
        calibration: temper confidences as ``monai-vslp calibrate`` found, where it left a file in the bundle; False for the
            network's own.
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
    cohort = None if proportions is None else read_cohort(proportions, ".", classes, check_files=False, training=False)
    items, problems = {}, []
    for path in files:
        try:
            items[path] = _item(path, cohort)
        except ProportionError as error:
            problems.append(str(error))
    if problems:
        raise ProportionError("\n".join(problems))
    if band is not None:
        _check_band(band, items)
    settings = {key: value for key, value in (("trust", trust), ("alpha", alpha), ("views", views)) if value is not None}
    settings |= _regularizer(run, regularizer, band is not None)
    settings |= segment_settings(run, classes) if calibration else {}
    settings |= overrides
    models = [checkpoint, *(p for p in [Path(settings.get(REGULARIZER, run)) / WEIGHTS] if p.is_file())]
    todo_images, todo_slides = [], []
    for path in files:
        given = items[path].get("proportions")
        marked = settings | {"p": None if given is None else given.tolist(), "mpp": mpp}
        mark = _fingerprint(path, models, marked if band is None else marked | {"band": band})
        items[path]["fingerprint"] = mark
        if not overwrite and _is_done(output / path.stem, mark, band):
            logger.info("%s is done already.", path.name)
            continue
        (todo_slides if is_slide(path) else todo_images).append(path)
    if overrides.get("dense_crf") and todo_slides:
        raise InputError(f"dense_crf is for images alone, {todo_slides[0].name} is a slide; segment it without.")
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
        for path in todo_images:
            for name in (BAND_MAP, BAND_PICTURE):  # of an earlier call; without a band they would not be replaced
                (output / path.stem / name).unlink(missing_ok=True)
        extra = {} if mpp is None else {"mpp": mpp}
        if band is not None:
            extra["postprocessing#transforms"] = _with_band(config, band / 100)
        run_config(run, "inference.json", datalist=[items[p] for p in todo_images], output_dir=str(output), **settings, **extra)
    for path in opened:
        item = items[path]
        try:
            with FolderLock(output / path.stem):
                run_config(
                    run,
                    "slide_inference.json",
                    slide=str(path),
                    output_dir=str(output / path.stem),
                    proportions=None if "proportions" not in item else item["proportions"].tolist(),
                    given_spread=None if "proportions" not in item else item["proportion_spread"].tolist(),
                    given_bounds=None if "proportions" not in item else item["proportion_bounds"].tolist(),
                    source_mpp=mpp,
                    fingerprint=item["fingerprint"],
                    progress=progress,
                    **settings,
                )
        except (SlideError, LockedError) as error:
            logger.info("%s", error)
            failures[path.stem] = str(error)
    if any(output.glob("*/summary.json")):
        write_index(output, failures)
    return failures
