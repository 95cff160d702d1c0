"""``monai-vslp calibrate``: how sure a trained network should be, and how far off its proportions are, without masks."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import optional_import

import monai_vslp
from monai_vslp.data.cohort import Cohort, read_cohort
from monai_vslp.data.folds import assign_folds, patient_of
from monai_vslp.data.images import check_images, list_images
from monai_vslp.io.calibration_report import write_calibration_report
from monai_vslp.networks.calibration import (
    VARIANTS,
    CalibrationFit,
    conformal_half_width,
    fit_calibration,
    fit_offset,
    mean_offset,
    patients_needed,
    pooled_proportions,
    prior_shift,
    temper,
)
from monai_vslp.networks.tta import TTAConfidence
from monai_vslp.transforms import LoadTissueImage
from monai_vslp.utils.atomic import write_json
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows.bundle import read_config

tqdm, _ = optional_import("tqdm", name="tqdm")

__all__ = ["AUTO", "CALIBRATION", "calibrate", "read_calibration", "sample_logits", "segment_settings"]

AUTO = "auto"  # the variant that patients left out say
CALIBRATION = Path("models") / "calibration.json"
POINTS = 4096  # per image, over all views: proportions of them are those of all pixels within 0.2 % on average
MOST_FOLDS = 20  # of the leave-out fits; more patients are left out several at a time
PLASTIC = 1.32471795724474602596  # root of x³ = x + 1: its powers make the most even sequence of points in the plane
SHARES = 0.02  # a mean of shares may miss 1 by so much before it is taken for a slip

logger = logging.getLogger(__name__)


# ---- logits -------------------------------------------------------------------------------------------------------------


def _points(size: tuple[int, int], first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of ``count`` pixels, evenly spread however many there are; other ones for another ``first``."""
    step = torch.arange(first + 1, first + count + 1, dtype=torch.float64)
    rows, columns = ((0.5 + step / PLASTIC**power) % 1 for power in (1, 2))
    return (rows * size[0]).long().clamp_max(size[0] - 1), (columns * size[1]).long().clamp_max(size[1] - 1)


def sample_logits(
    network: torch.nn.Module,
    images: Sequence[str | Path],
    views: str = "none",
    points: int = POINTS,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> torch.Tensor:
    """Logits of a network at points of images, over all test-time views: what calibration is fitted to.

    Points are those of a low-discrepancy sequence [1], other ones in each view; the mean of their probabilities is that of all
    pixels and views, as :class:`~monai_vslp.networks.tta.TTAConfidence` has it: on 70 real images within 0.2 % on average,
    0.6 % at most.

    Args:
        network: gives logits ``[B, C, H, W]``; its ``stride`` sets the shifts of the views.
        images: paths.
        views: name of a group of views.
        points: m, over all views; rounded down to the same number for each, at least 1.
        device: where the network is.
        progress: show a progress bar.

    Returns:
        Shape ``[n, m, C]``, float32, on the processor.

    Raises:
        ImageReadError: an image cannot be read.

    References:
        [1] Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018 (the R2 sequence).
    """
    fuse, load = TTAConfidence(views, stride=getattr(network, "stride", 16), softmax=False), LoadTissueImage()
    each = max(1, points // len(fuse.views))
    result = []
    for path in tqdm(images, desc="calibration", unit="image", disable=not progress):
        image = load(path)[None].to(device)
        sampled = []
        with torch.inference_mode():
            for number, view in enumerate(fuse.views):
                rows, columns = _points(tuple(image.shape[-2:]), number * each, each)
                sampled.append(view(image, network)[0, :, rows, columns].T.float().cpu())
        result.append(torch.cat(sampled))
    return torch.stack(result)


def _load_network(run: Path, config: dict[str, Any]) -> tuple[torch.nn.Module, torch.device]:
    """The trained network of a run, not calibrated."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = ConfigParser(config).get_parsed_content("network_def")
    network.load_state_dict(torch.load(run / "models" / "model.pt", map_location="cpu", weights_only=True))
    return network.to(device).eval(), device


# ---- the file -----------------------------------------------------------------------------------------------------------


def _fingerprint(checkpoint: Path) -> str:
    """Digest of the weights' file."""
    with open(checkpoint, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checkpoint(run: Path) -> Path:
    path = run / "models" / "model.pt"
    if not path.is_file():
        raise InputError(f"{path} does not exist; has the training of {run} finished an epoch?")
    return path


def _needs_key(run: Path) -> None:
    """Raises where the configs of a run know nothing of calibration, so that it would be passed over in silence."""
    for name in ("inference.json", "slide_inference.json"):
        if "calibration" not in read_config(run, name):
            raise InputError(
                f"{run / 'configs' / name} is of an earlier version and has no 'calibration': give the command of its training "
                "again, which brings the configs up to date and trains nothing that is done."
            )


def read_calibration(run: str | Path, classes: Sequence[str]) -> dict[str, Any] | None:
    """``models/calibration.json`` of a run, checked to belong to its ``model.pt``; None where there is none.

    Args:
        run: bundle folder.
        classes: of its network, in order.

    Raises:
        InputError: the file is damaged, or belongs to other weights or classes.
    """
    run = Path(run)
    path = run / CALIBRATION
    advice = f"Run 'monai-vslp calibrate {run}' again, delete the file, or segment with --no-calibration."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        stamp, names = found["fingerprint"], list(found["offset"])
        values = [found["temperature"], *found["offset"].values(), found["interval"]["level"]]
        half_width = found["interval"]["half_width"]
        values += [] if half_width is None else [half_width[name] for name in names]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}). {advice}") from error
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values) or found["temperature"] <= 0:
        raise InputError(f"{path} is damaged: it has a value that is no finite number, or no temperature above 0. {advice}")
    if names != list(classes):
        raise InputError(f"{path} is for the classes {', '.join(names)}, the network has {', '.join(classes)}. {advice}")
    if stamp != _fingerprint(_checkpoint(run)):
        raise InputError(f"{path} belongs to other weights than {run / 'models' / 'model.pt'}: it was trained since. {advice}")
    return found


def segment_settings(run: str | Path, classes: Sequence[str]) -> dict[str, Any]:
    """Values of the inference configs that make a run's calibration count; nothing where it has none.

    Args:
        run: bundle folder.
        classes: of its network.

    Returns:
        ``calibration`` for the network and ``options#calibration`` for the summary.

    Raises:
        InputError: the calibration is stale or damaged, or the configs are of an earlier version.
    """
    found = read_calibration(run, classes)
    if found is None:
        return {}
    _needs_key(Path(run))
    values = {key: found[key] for key in ("temperature", "offset")}
    return {
        "calibration": {"temperature": found["temperature"], "offset": list(found["offset"].values())},
        "options#calibration": values | {"interval": {k: found["interval"][k] for k in ("level", "half_width", "reason")}},
    }


# ---- the command --------------------------------------------------------------------------------------------------------


def _held_out(run: Path, table: str | Path | None, images: str | Path | None, classes: Sequence[str]) -> Cohort:
    """Images with proportions that calibration is fitted to.

    Raises:
        InputError: there are none.
    """
    trained = read_config(run, "train.json")
    cohort = read_cohort(table or trained["table"], images or trained["dataset_dir"], classes)
    rows = cohort.split("val")
    if not len(rows) and table is not None:
        rows = cohort
    rows = Cohort(rows.classes, tuple(r for r in rows.records if r.proportions is not None), rows.source)
    if not len(rows):
        raise InputError(
            f"table {cohort.source} has no row of split 'val' with proportions. Calibration needs images that the network "
            "was not trained on: give a table of such images (--table TABLE --images DIR)."
        )
    return rows


def _shares(mean: Mapping[str, float] | Sequence[float], classes: Sequence[str]) -> torch.Tensor:
    """Mean proportions of a site as fractions, from fractions or percent."""
    if isinstance(mean, Mapping):
        if set(mean) != set(classes):
            raise InputError(f"site_mean must have the classes {', '.join(classes)}, got {', '.join(mean)}.")
        mean = [mean[name] for name in classes]
    values = torch.tensor([float(value) for value in mean], dtype=torch.float64)
    total = float(values.sum())
    scale = next((s for s in (1.0, 100.0) if abs(total / s - 1) <= SHARES), None)
    if len(values) != len(classes) or bool((values < 0).any()) or scale is None:
        raise InputError(
            f"site_mean must be {len(classes)} shares ({', '.join(classes)}) that add up to 1 or to 100 %, got "
            f"{values.tolist()}."
        )
    return values / total


def _site(
    sample: Any,
    source: torch.Tensor,
    fitted: tuple[float, torch.Tensor],
    classes: Sequence[str],
    folder: Path,
    table: str | Path | None,
    mean: Mapping[str, float] | Sequence[float] | None,
) -> dict[str, Any]:
    """Offsets of another site on top of the fitted ones, by what is known of it: proportions, their mean, or images alone."""
    if table is not None:
        records = [r for r in read_cohort(table, folder, classes).records if r.proportions is not None]
        if not records:
            raise InputError(f"table {table} of the site has no row with proportions; leave it out to use the images alone.")
        paths = [record.image for record in records]
    else:
        paths = list_images(folder)
    check_images(paths)
    logits = temper(sample(paths).double(), *fitted, dim=2)
    if table is not None:
        given = torch.from_numpy(np.stack([record.proportions.mean for record in records]))
        offset, how = fit_offset(logits, given), "proportions"
    elif mean is not None:
        offset, how = mean_offset(logits, _shares(mean, classes)), "mean"
    else:
        offset, _ = prior_shift(logits, source)
        how = "images"
    shares = pooled_proportions(logits, offset=offset).mean(dim=0)
    before = pooled_proportions(logits).mean(dim=0)
    return {
        "known": how,
        "images": len(paths),
        "folder": str(folder.absolute()),
        "offset": dict(zip(classes, offset.tolist())),
        "mean_before": dict(zip(classes, before.tolist())),
        "mean_after": dict(zip(classes, shares.tolist())),
    }


def _interval(
    errors: torch.Tensor, patients: Sequence[Any], classes: Sequence[str], level: float, site: bool
) -> dict[str, Any]:
    """Half widths by class, or why there are none."""
    count, needed = len(set(patients)), patients_needed(level)
    interval: dict[str, Any] = {"level": level, "half_width": None, "reason": "", "patients": count, "images": len(errors)}
    if site:
        return interval | {"reason": "Errors were measured at another site than these offsets are for."}
    if count < needed:
        highest = math.floor(100 * count / (count + 1))
        reason = f"{count} held-out patients are too few for {100 * level:g} % intervals, which need {needed}"
        return interval | {"reason": f"{reason}; they allow {highest} % at most (--level {highest / 100:g})."}
    widths = [conformal_half_width(errors[:, k], patients, level) for k in range(len(classes))]
    return interval | {"half_width": dict(zip(classes, widths))}


def _folds(patients: Sequence[Any], given: torch.Tensor) -> list[Any]:
    """What is left out together: a patient, or several where there are many."""
    count = len(set(patients))
    return list(patients) if count <= MOST_FOLDS else assign_folds(patients, given.numpy(), MOST_FOLDS).tolist()


def _fit(logits: torch.Tensor, given: torch.Tensor, groups: Sequence[Any], variant: str) -> CalibrationFit:
    """The variant asked for; for ``none``, too, the others are tried, so that the report can say what they would do."""
    fit = fit_calibration(logits, given, groups, variant=variant if variant in VARIANTS[1:] else None)
    if variant != "none":
        return fit
    reason = f"Confidences stay as they are. By proportions alone the choice would be {fit.variant}. {fit.reason}"
    return replace(
        fit, temperature=1.0, offset=torch.zeros_like(fit.offset), variant="none", reason=reason, predicted=fit.before
    )


def calibrate(
    run: str | Path,
    table: str | Path | None = None,
    images: str | Path | None = None,
    *,
    output: str | Path | None = None,
    variant: str = "none",
    level: float = 0.9,
    site: str | Path | None = None,
    site_table: str | Path | None = None,
    site_mean: Mapping[str, float] | Sequence[float] | None = None,
    progress: bool = True,
) -> Path:
    """Measure how well a trained network meets proportions of held-out images, and correct it if asked; no mask is read.

    By default confidences stay as they are, and what is gained are intervals around predicted proportions. Temperature and
    offsets fitted to proportions serve proportions; on real masks they made single pixels *less* well calibrated
    (``docs/calibration.md``), so they are for the asking.

    Writes ``models/calibration.json``, which ``monai-vslp segment`` uses from then on, and ``calibration.md`` with, where
    matplotlib is there, ``calibration.png``. For another hospital, whose mix of classes differs, ``site`` adds class offsets
    from what is known there: proportions of some images (``site_table``), their mean alone (``site_mean``), or images alone.

    Args:
        run: bundle folder of ``monai-vslp train``.
        table: proportions; None for the table of the training. Its rows of split ``val`` are used; of a table given here
            without such rows, all.
        images: folder of the images; None for that of the training.
        output: folder for all three files, to look at before they count; None for the run itself.
        variant: ``none``, ``temperature``, ``temperature_offset``, or ``auto`` to choose by the proportion error of patients
            left out (:func:`~monai_vslp.networks.calibration.fit_calibration`).
        level: of the intervals around predicted proportions, such as 0.9.
        site: folder with images of another site.
        site_table: proportions of images in ``site``.
        site_mean: mean proportions of the images in ``site``, by class or in the order of the classes; fractions or percent.
        progress: show a progress bar.

    Returns:
        ``calibration.json``.

    Raises:
        InputError: a folder, table, image or option that cannot be used.
    """
    run = Path(run)
    if variant not in (*VARIANTS, AUTO):
        raise InputError(f"variant must be one of {', '.join((*VARIANTS, AUTO))}, got {variant!r}.")
    patients_needed(level)
    if site is None and (site_table is not None or site_mean is not None):
        raise InputError("proportions of a site come with its images: give their folder, too (--site DIR).")
    if site_table is not None and site_mean is not None:
        raise InputError("give proportions of the site's images or their mean, not both.")
    config = read_config(run, "inference.json")
    checkpoint, classes, views = _checkpoint(run), config["classes"], config["views"]
    if output is None:
        _needs_key(run)
    if site_mean is not None:
        _shares(site_mean, classes)
    held_out = _held_out(run, table, images, classes)
    check_images(record.image for record in held_out.records)
    network, device = _load_network(run, config)

    def sample(paths: Sequence[str | Path]) -> torch.Tensor:
        return sample_logits(network, paths, views, device=device, progress=progress)

    paths = [record.image for record in held_out.records]
    given = torch.from_numpy(np.stack([record.proportions.mean for record in held_out.records])).double()
    patients = [patient_of(record) for record in held_out.records]
    logits = sample(paths)
    fit = _fit(logits, given, _folds(patients, given), variant)
    after = pooled_proportions(logits, None, fit.temperature, fit.offset)
    offset, shift = fit.offset, None
    if site is not None:
        shift = _site(sample, after.mean(dim=0), (fit.temperature, fit.offset), classes, Path(site), site_table, site_mean)
        offset = offset + torch.tensor(list(shift["offset"].values()), dtype=torch.float64)
    errors = (fit.predicted - given).abs()
    unnamed = sum(not record.patient for record in held_out.records)
    result = {
        "version": monai_vslp.__version__,
        "fingerprint": _fingerprint(checkpoint),
        "temperature": fit.temperature,
        "offset": dict(zip(classes, offset.tolist())),
        "variant": fit.variant,
        "reason": fit.reason,
        "errors": fit.errors,
        "temperatures": {name: {"value": t, "log_error": e} for name, (t, e) in fit.temperatures.items()},
        "interval": _interval(errors, patients, classes, level, site is not None),
        "site": shift,
        "counts": {"images": len(paths), "patients": len(set(patients)), "unnamed": unnamed},
        "selected": table is None,  # these images chose the best pass of the training, too
        "views": views,
        "table": str(held_out.source.absolute()),
    }
    logger.info("%s T = %.3g.", fit.reason, fit.temperature)
    names = [record.image.name for record in held_out.records]
    folder = run if output is None else Path(output)
    write_calibration_report(
        folder,
        result,
        names,
        [record.patient for record in held_out.records],
        given.numpy(),
        {"before": fit.before.numpy(), "after": fit.predicted.numpy()},
    )
    return write_json(run / CALIBRATION if output is None else folder / CALIBRATION.name, result)
