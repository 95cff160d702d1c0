"""Training from items ``{image, label}`` whose label is a file of proportions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_vslp.apps.label.service import LabelService
from monai_vslp.data.cohort import Record, write_table
from monai_vslp.data.folds import assign_folds, patient_of
from monai_vslp.data.proportion_file import read_proportion_file
from monai_vslp.data.slides import is_slide
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows.train import train

__all__ = ["STARTS", "items_to_table", "train_items", "training_stats"]

STARTS = ("model", "scratch")
FEWEST_HELD_OUT = 5  # images, from which a part is held out
TRAINED = "trained_{}"

logger = logging.getLogger(__name__)


def _cells(record: Record, classes: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a table that say of a record what its file said, in percent; one per rater."""
    rows = []
    for number, label in enumerate(record.estimates, start=1):
        cells = {
            name: "" if missing else f"{100 * mean:.6f}%" if low == high else f"{100 * low:.6f}-{100 * high:.6f}%"
            for name, mean, low, high, missing in zip(classes, label.mean, label.lower, label.upper, label.missing)
        }
        if not any(cells.values()):  # all but one class were blank
            cells = {name: f"{100 * mean:.6f}%" for name, mean in zip(classes, label.mean)}
        rows.append(cells | ({"rater": str(number)} if len(record.estimates) > 1 else {}))
    return rows


def items_to_table(path: str | Path, items: Sequence[Mapping[str, str]], classes: Sequence[str], held_out: float = 0.2) -> Path:
    """Write the table that ``monai-vslp train`` takes.

    Args:
        path: of the CSV.
        items: ``image`` and ``label``, a file as :func:`~monai_vslp.data.proportion_file.read_proportion_file` takes it.
        classes: names, in order.
        held_out: share of the patients (images, where no patient is named) that becomes the split ``val``, where no file says
            a split and there are at least 5 images.

    Raises:
        InputError: no items, an image that is a slide, or a label that is not understood.
    """
    if not items:
        raise InputError(
            "no image has a label to train from; hand in files of proportions (PUT /datastore/label, or labels/final/<id>.csv)."
        )
    if not 0 <= held_out < 1:
        raise InputError(f"val_split is a share of the images, at least 0 and below 1, got {held_out}.")
    if slides := [Path(item["image"]).name for item in items if is_slide(item["image"])]:
        raise InputError(
            f"training takes images, and {', '.join(slides[:3])} {'is a slide' if len(slides) == 1 else 'are slides'}; cut "
            "regions out of it and give those proportions, or take its label away."
        )
    records = [read_proportion_file(item["label"], item["image"], classes) for item in items]
    if blank := [record.image.name for record in records if record.proportions is None]:
        raise InputError(f"the labels of {', '.join(blank[:3])} say no proportions; fill them in, or take them away.")
    splits = ["train" if record.split == "test" else record.split for record in records]  # JSON knows no split
    folds = round(1 / held_out) if held_out > 0 else 0
    groups = [patient_of(record) for record in records]
    if folds >= 2 and "val" not in splits and len(set(groups)) >= max(FEWEST_HELD_OUT, folds):
        found = assign_folds(groups, np.stack([record.proportions.mean for record in records]), folds)
        splits = ["val" if fold == 0 else "train" for fold in found]
    rows = []
    for item, record, split in zip(items, records, splits):
        common = {"image": str(Path(item["image"]).absolute()), "split": split, "patient": record.patient}
        common |= {} if record.mpp is None else {"mpp": record.mpp}
        rows += [common | cells for cells in _cells(record, classes)]
    return write_table(path, rows, classes)


def train_items(
    service: LabelService,
    name: str,
    items: Sequence[Mapping[str, str]],
    *,
    epochs: int | None = None,
    start: str = "model",
    val_split: float = 0.2,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Train a model further, and serve the result.

    Args:
        service: where the model is served; a new folder ``trained_<n>`` beside its files takes the bundle.
        name: of the model.
        items: ``image`` and ``label``.
        epochs: passes; None for the default.
        start: ``model`` to go on from the weights in use, ``scratch`` for none.
        val_split: see :func:`items_to_table`.
        seed: of all random draws.
        **options: of :func:`monai_vslp.workflows.train`.

    Returns:
        :func:`training_stats` of the new bundle.

    Raises:
        InputError: a model that cannot be trained, or labels that are not understood.
    """
    model = service.model(name)
    if model.takes_confidences:
        raise InputError(f"{name} refines confidences of other networks; its training is 'train.json' of the bundle.")
    if start not in STARTS:
        raise InputError(f"start is one of {', '.join(STARTS)}, got {start!r}.")
    folder = service.folder(name)
    number = 1 + max((int(path.name.rpartition("_")[2]) for path in folder.glob(TRAINED.format("[0-9]*"))), default=0)
    run = folder / TRAINED.format(number)
    table = items_to_table(folder / "tables" / f"{number}.csv", items, model.classes, val_split)
    found = train(
        table,
        folder,
        run,
        start=model.folder if start == "model" else None,
        epochs=epochs,
        seed=seed,
        mpp=model.mpp,
        progress=False,
        **options,
    )
    service.serve(name, found)
    return training_stats(found)


def training_stats(folder: str | Path) -> dict[str, Any]:
    """What a training came to: epochs, and the mean error of held-out proportions (a fraction), where there are some."""
    folder = Path(folder)
    try:
        history = json.loads((folder / "models" / "history.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"folder": str(folder)}
    errors = [entry["proportion_error"] for entry in history if entry.get("proportion_error") is not None]
    return {"folder": str(folder), "epochs": len(history), "best_proportion_error": min(errors, default=None)}
