"""``summary.json``: the numbers of one segmented image or slide, and how they were found."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import Any

import monai_vslp
from monai_vslp.utils.errors import InputError

__all__ = ["SUMMARY_NAME", "build_summary", "read_summary", "validate_summary"]

SUMMARY_NAME = "summary.json"
KINDS = ("image", "slide")
VERSIONED = ("monai", "torch", "timm", "numpy")  # packages whose versions are recorded beside our own
REGION_VALUES = ("given", "refined", "labels", "psi")  # by class
# What may be absent, as in files written by others, and what then holds.
DEFAULTS: dict[str, Any] = {
    "source": "",
    "mpp": None,
    "level0_shape": None,
    "downsample": 1.0,
    "psi": None,
    "energies": [],
    "residual": None,
    "converged": True,
    "reason": "",
    "tissue_fraction": None,
    "regions": [],
    "views": None,
    "files": {},
    "options": {},
    "seconds": {},
    "versions": {},
}


def _by_class(classes: Sequence[str], values: Sequence[float] | None, name: str) -> dict[str, float | None] | None:
    """Values by class name; JSON has no infinity and no NaN, so these become None."""
    if values is None:
        return None
    values = [float(value) for value in values]
    if len(values) != len(classes):
        raise InputError(f"{name} has {len(values)} values for {len(classes)} classes ({', '.join(classes)}).")
    return {key: value if math.isfinite(value) else None for key, value in zip(classes, values)}


def _versions() -> dict[str, str]:
    """Versions of this package and of those that results depend on, where installed."""
    versions = {"monai_vslp": monai_vslp.__version__}
    for name in VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def build_summary(
    *,
    name: str,
    kind: str,
    source: str | Path,
    classes: Sequence[str],
    colors: Sequence[Sequence[int]],
    shape: Sequence[int],
    confidence: Sequence[float],
    refined: Sequence[float],
    labels: Sequence[float],
    given: Sequence[float] | None = None,
    given_spread: Sequence[float] | None = None,
    psi: Sequence[float] | None = None,
    energies: Sequence[float] = (),
    residual: float | None = None,
    converged: bool = True,
    reason: str = "",
    tissue_fraction: float = 1.0,
    mpp: float | None = None,
    level0_shape: Sequence[int] | None = None,
    downsample: float = 1.0,
    regions: Sequence[Mapping[str, Any]] = (),
    views: Any = None,
    options: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The content of ``summary.json``.

    Args:
        name: stem of the outputs.
        kind: ``image`` or ``slide``.
        source: the input file.
        classes: C names, in the order of the label indices.
        colors: RGB per class, 0 … 255.
        shape: ``(H, W)`` of ``labels.tif`` in px.
        confidence: mean of the first stage over tissue, fractions, ``[C]``.
        refined: mean of the refined map, ``[C]``.
        labels: area fractions of the labels, ``[C]``.
        given: proportions that were given, ``[C]``; None for none.
        given_spread: standard deviation between raters, ``[C]``; None where unknown.
        psi: class offsets, ``[C]``, −inf for a class given as 0; None where no proportions were given.
        energies: energy of the start and after each step, nats.
        residual: residual of the proportions in the last step; None without proportions.
        converged: whether the stopping rule was met.
        reason: why the iteration ended.
        tissue_fraction: share of the area that is tissue.
        mpp: µm per px of ``labels.tif``; None where unknown.
        level0_shape: ``(H, W)`` of the input in px; None for ``shape``.
        downsample: level-0 px per px of ``labels.tif``.
        regions: parts with proportions of their own, each with ``name``; ``given``, ``refined``, ``labels`` and ``psi``, as
            above, ``[C]``, None where unknown; ``residual``; and ``tissue_fraction``, the tissue of the region as a share of
            the area of the whole map.
        views: how many test-time views were used, and where; JSON-like.
        options: how it was made; JSON-like.
        seconds: time per step, s.

    Returns:
        A dictionary that JSON can hold; values that are not finite are None.

    Raises:
        InputError: a length or the kind does not fit.
    """
    classes = list(classes)
    summary = {
        "name": name,
        "kind": kind,
        "source": str(source),
        "classes": classes,
        "colors": [[int(value) for value in color] for color in colors],
        "mpp": None if mpp is None else float(mpp),
        "shape": [int(side) for side in shape],
        "level0_shape": [int(side) for side in (shape if level0_shape is None else level0_shape)],
        "downsample": float(downsample),
        "tissue_fraction": float(tissue_fraction),
        "proportions": {
            "given": _by_class(classes, given, "given"),
            "given_spread": _by_class(classes, given_spread, "given_spread"),
            "confidence": _by_class(classes, confidence, "confidence"),
            "refined": _by_class(classes, refined, "refined"),
            "labels": _by_class(classes, labels, "labels"),
        },
        "psi": _by_class(classes, psi, "psi"),
        "energies": [float(energy) for energy in energies],
        "residual": None if residual is None else float(residual),
        "converged": bool(converged),
        "reason": str(reason),
        "regions": [_region(classes, region) for region in regions],
        "views": views,
        "options": dict(options or {}),
        "seconds": {key: round(float(value), 3) for key, value in (seconds or {}).items()},
        "versions": _versions(),
    }
    if kind == "image" and "calibration" in summary["options"]:  # intervals are measured on images, not on slides
        summary["interval"] = _interval(summary["proportions"]["confidence"], summary["options"]["calibration"])
    return validate_summary(summary)


def _region(classes: Sequence[str], region: Mapping[str, Any]) -> dict[str, Any]:
    """A region as ``summary.json`` has it."""
    allowed = {"name", *REGION_VALUES, "residual", "tissue_fraction"}
    if "name" not in region or not set(region) <= allowed:
        raise InputError(f"a region has a name and may have {', '.join(sorted(allowed))}; got {', '.join(map(str, region))}.")
    values = {key: _by_class(classes, region.get(key), f"{key} of region {region['name']!r}") for key in REGION_VALUES}
    numbers = {key: None if region.get(key) is None else float(region[key]) for key in ("residual", "tissue_fraction")}
    return {"name": str(region["name"])} | values | numbers


def _interval(confidence: Mapping[str, float | None], calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Ranges that hold the proportions of new images with a known probability: level, by class low and high, or the reason."""
    interval, bounds = calibration["interval"], None
    if interval["half_width"] is not None:
        bounds = {
            name: None if value is None else [max(0.0, value - half), min(1.0, value + half)]
            for (name, value), half in zip(confidence.items(), (interval["half_width"][name] for name in confidence))
        }
    return {"level": interval["level"], "bounds": bounds, "reason": interval["reason"]}


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, int) and v > 0 for v in value)


def _is_class_values(value: Any, classes: Sequence[str]) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) == set(classes)
        and all(v is None or isinstance(v, Real) for v in value.values())
    )


def _is_region(region: Any, classes: Sequence[str]) -> bool:
    return (
        isinstance(region, Mapping)
        and isinstance(region.get("name"), str)
        and region["name"] != ""
        and all(region.get(key) is None or _is_class_values(region[key], classes) for key in REGION_VALUES)
    )


def _problems(summary: Mapping[str, Any]) -> list[str]:
    """What is wrong with a summary, in words."""
    missing = [key for key in ("name", "kind", "classes", "colors", "shape", "proportions") if key not in summary]
    if missing:
        return [f"{', '.join(missing)} missing"]
    problems = []
    classes, colors = summary["classes"], summary["colors"]
    if summary["kind"] not in KINDS:
        problems.append(f"kind is {summary['kind']!r}, allowed are {' and '.join(KINDS)}")
    if not (isinstance(classes, list) and classes and all(isinstance(c, str) for c in classes)):
        return [*problems, f"classes must be a list of names, got {classes!r}"]
    if len(set(classes)) != len(classes):
        problems.append(f"classes repeat a name: {classes}")
    if not (isinstance(colors, list) and len(colors) == len(classes) and all(len(c) == 3 for c in colors)):
        problems.append(f"colors must be one [r, g, b] for each of the {len(classes)} classes, got {colors!r}")
    for key in ("shape", "level0_shape"):
        if not (_is_pair(summary.get(key)) or (key == "level0_shape" and summary.get(key) is None)):
            problems.append(f"{key} must be [height, width] in px, got {summary.get(key)!r}")
    proportions = summary["proportions"]
    if not isinstance(proportions, Mapping):
        return [*problems, f"proportions must be an object, got {proportions!r}"]
    for key in ("given", "given_spread", "confidence", "refined", "labels"):
        optional = key.startswith("given")
        value = proportions.get(key)
        if not (_is_class_values(value, classes) or (optional and value is None)):
            problems.append(f"proportions.{key} must have one number per class ({', '.join(classes)}), got {value!r}")
    psi = summary.get("psi")
    if not (psi is None or _is_class_values(psi, classes)):
        problems.append(f"psi must have one number per class or be null, got {psi!r}")
    regions = summary.get("regions", [])
    if not (isinstance(regions, list) and all(_is_region(region, classes) for region in regions)):
        problems.append(f"regions must be a list of objects with a name and one number per class, got {regions!r}")
    elif len({region["name"] for region in regions}) != len(regions):
        problems.append(f"regions repeat a name: {[region['name'] for region in regions]}")
    energies = summary.get("energies", [])
    if not (isinstance(energies, list) and all(isinstance(e, Real) for e in energies)):
        problems.append(f"energies must be a list of numbers, got {energies!r}")
    return problems


def validate_summary(summary: Mapping[str, Any], where: str | Path = "summary") -> dict[str, Any]:
    """Check a summary and fill in what may be absent.

    Args:
        summary: content of a ``summary.json``.
        where: what to call it in the message.

    Returns:
        A copy with all keys.

    Raises:
        InputError: keys are missing or their values have the wrong form; names all of them.
    """
    problems = _problems(summary) if isinstance(summary, Mapping) else ["it is not a JSON object"]
    if problems:
        raise InputError(f"{where} is not a summary of a segmentation: {'; '.join(problems)}. Segment this input again.")
    return DEFAULTS | dict(summary)


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Read and check ``folder/summary.json``.

    Args:
        folder: outputs of one image or slide.

    Raises:
        InputError: the file is missing, no JSON, or lacks something.
    """
    path = Path(folder) / SUMMARY_NAME
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist; expected the outputs of one image or slide, as 'monai-vslp segment' writes them."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); segment this input again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return validate_summary(summary, path)
