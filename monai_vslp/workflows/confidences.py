"""Refine a slide's confidences that another network left in a Zarr array."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import optional_import

from monai_vslp.io.ome_tiff import write_ome_tiff
from monai_vslp.transforms.overlay import default_colors
from monai_vslp.transforms.refinement import VariationalRefinement
from monai_vslp.utils.atomic import write_json
from monai_vslp.utils.errors import InputError
from monai_vslp.variational import refine_store

__all__ = ["refine_confidences"]

zarr, _ = optional_import("zarr")

REFINED, SUMMARY, LABELS = "refined.zarr", "refinement.json", "labels.tif"


def refine_confidences(
    confidence: str | Path,
    output_dir: str | Path,
    classes: Sequence[str],
    refinement: VariationalRefinement,
    *,
    proportions: Sequence[float] | None = None,
    mass: str | Path | None = None,
    weight: str | Path | None = None,
    colors: Sequence[Sequence[int]] | None = None,
    mpp: float | None = None,
) -> Path:
    """Refine a map on disk as one variational problem, out of core, and write the labels as a pyramid.

    Args:
        confidence: Zarr array ``[C, H, W]`` on the simplex, floating point, or uint8 for 0 … 1; 0 in all classes is background.
        output_dir: takes ``refined.zarr`` (:func:`~monai_vslp.variational.refine_store`), ``labels.tif`` (OME-TIFF; 255 = no
            tissue) and ``refinement.json``; what an earlier call left is replaced.
        classes: names, in the order of the map.
        refinement: options; its trust may not be a rule, and total variation alone is solved out of core.
        proportions: fractions ``[C]``; None leaves them free.
        mass: Zarr array ``[H, W]`` of tissue; None takes what has confidences.
        weight: Zarr array ``[H, W]``, price of boundaries; None for 1.
        colors: RGB per class; None for the default palette.
        mpp: µm/px of the map, None where unknown.

    Returns:
        Path of ``refinement.json``.

    Raises:
        InputError: maps, proportions or options that cannot be used.
    """
    output = Path(output_dir)
    if not Path(confidence).is_dir():
        raise InputError(f"confidences {confidence} do not exist; give the folder of a Zarr array [C, H, W].")
    array = zarr.open_array(str(confidence), mode="r")
    if array.ndim != 3 or array.shape[0] != len(classes):
        raise InputError(f"confidences {confidence} must have shape [{len(classes)}, H, W], got {list(array.shape)}.")
    if refinement.rule is not None or refinement.learned is not None or refinement.term is not None:
        raise InputError("maps on disk are refined with total variation and a number as trust; set regularizer to null.")
    output.mkdir(parents=True, exist_ok=True)
    for stale in (output / REFINED, output / "mass.zarr"):
        shutil.rmtree(stale, ignore_errors=True)
    if mass is None:
        mass = _tissue(array, output / "mass.zarr")
    given, trust, _ = refinement.terms(proportions, None, None, _no_own)
    options = refinement.options_for(trust)
    settings = {name: getattr(options, name) for name in options.__dataclass_fields__}
    found = refine_store(str(confidence), output / REFINED, given, mass=str(mass), weight=weight, **settings)
    shutil.rmtree(output / "mass.zarr", ignore_errors=True)
    palette = default_colors(len(classes)) if colors is None else colors
    labels = zarr.open_array(str(output / REFINED / "labels"), mode="r")
    described = {"classes": list(classes), "colors": [list(map(int, color)) for color in palette], "no_tissue": 255}
    write_ome_tiff(output / LABELS, labels, channels=["label"], labels=True, mpp=mpp, description=described)
    summary = {
        "source": str(Path(confidence).absolute()),
        "classes": list(classes),
        "colors": described["colors"],
        "mpp": mpp,
        "proportions_given": None if proportions is None else [float(value) for value in proportions],
        "proportions_refined": [float(value) for value in found.proportions],
        "psi": found.psi.tolist(),
        "residual": found.residual,
        "converged": found.converged,
        "reason": found.reason,
        "options": {name: str(value) for name, value in settings.items()},
    }
    return write_json(output / SUMMARY, summary)


def _no_own() -> torch.Tensor:
    raise InputError("own_trust needs the map as a whole; leave it at 0 for maps on disk.")


def _tissue(confidence: Any, path: Path) -> Path:
    """1 where a map has confidences, by blocks."""
    height, width = (int(side) for side in confidence.shape[-2:])
    side = 1024
    stored = zarr.create_array(str(path), shape=(height, width), chunks=(min(side, height), min(side, width)), dtype="uint8")
    for top in range(0, height, side):
        for left in range(0, width, side):
            block = np.asarray(confidence[:, top : top + side, left : left + side])
            stored[top : top + side, left : left + side] = (block != 0).any(axis=0)
    return path
