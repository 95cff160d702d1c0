"""Scores, tables and pictures of an evaluation, added to the MLflow run of the training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from monai_vslp.handlers.tracked_run import TrackedRun
from monai_vslp.io.report_pictures import draw_overlay, energy_range, read_energies, read_map, read_photo
from monai_vslp.io.summary import read_summary
from monai_vslp.transforms.overlay import EnergyPicture
from monai_vslp.utils.errors import InputError

__all__ = ["track_evaluation"]

SIDE = 768  # px, longer side of the pictures
MOST = 8  # images with pictures
SCORES = {
    "mIoU": "miou",
    "mDice": "mdice",
    "accuracy": "accuracy",
    "proportion_error": "proportion_error",
    "boundary_f1": "boundary_f1",
    "ece": "ece",
}


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """``evaluation/<block>/<map>/<score>``, and IoU by class."""
    found = {}
    for block in result["blocks"]:
        for row in block["rows"]:
            place = f"evaluation/{block['name']}/{row['map']}"
            found |= {f"{place}/{name}": row[key] for name, key in SCORES.items() if row.get(key) is not None}
            found |= {f"{place}/IoU {name}": value for name, value in row["iou"].items() if value is not None}
    return found


def _pictures(folder: Path) -> dict[str, np.ndarray]:
    """Overlay of the refined labels, and fidelity and regularization energy on one scale; what the folder has of it."""
    summary, photo = read_summary(folder), read_photo(folder / "thumbnail.jpg", SIDE)
    labels, energies = read_map(folder / "labels.tif", SIDE), read_energies(folder / "energies.npz")
    found = {}
    if photo is not None and labels is not None:
        found["overlay"] = draw_overlay(photo, labels, summary["colors"])
    if {"fidelity", "regularization"} <= set(energies):
        energies.setdefault("total", energies["fidelity"] + energies["regularization"])
        draw = EnergyPicture(*energy_range(energies))
        found |= {f"energy_{key}": np.moveaxis(draw(energies[key]), 0, -1) for key in ("fidelity", "regularization", "total")}
    return found


def track_evaluation(output: str | Path, result: Mapping[str, Any], run: str | Path) -> str:
    """Add an evaluation to the run of the network that made the segmentations.

    Metrics ``evaluation/<classes>/<map>/<score>``, the artifacts ``evaluation/evaluation.csv`` and ``.json``, and pictures of
    the first eight images: labels over the image, and the energies.

    Args:
        output: output folder of ``monai-vslp segment``.
        result: what :func:`~monai_vslp.workflows.evaluate` returned.
        run: bundle folder of ``monai-vslp train``, whose run is continued, at its server or in its database.

    Returns:
        Where it was logged.

    Raises:
        InputError: ``run`` is no bundle folder.
    """
    output, run = Path(output), Path(run)
    if not (run / "configs").is_dir():
        raise InputError(f"{run} is no folder that 'monai-vslp train' wrote, so that there is no MLflow run to add to.")
    tracked = TrackedRun.of(run)
    tracked.open()
    tracked.metrics(_metrics(result))
    for name in ("evaluation.csv", "evaluation.json"):
        tracked.file(output / name, "evaluation")
    for stem in result["images"][:MOST]:
        for kind, picture in _pictures(output / stem).items():
            tracked.picture(f"evaluation/{stem}_{kind}", picture)
    tracked.close()
    return tracked.uri
