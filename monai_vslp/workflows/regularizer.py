"""``monai-vslp train-regularizer``: learn what segmentations look like, from proportions and confidences alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from monai_vslp.data.cohort import read_cohort
from monai_vslp.data.images import check_images
from monai_vslp.utils.atomic import write_json
from monai_vslp.utils.errors import InputError
from monai_vslp.variational.learned import ARCHITECTURE, WEIGHTS
from monai_vslp.workflows.bundle import NETWORK, read_config, run_config, template

__all__ = ["PUBLISHED", "REGULARIZER", "has_regularizer", "train_regularizer"]

REGULARIZER = "regularizer"  # folder inside a run
CONFIG = "train_regularizer.json"
PUBLISHED: dict[str, Any] = {"features": 32, "macro_blocks": 3, "scales": 3, "steps": 10, "stopping_time": 5.0}


def has_regularizer(run: Path) -> bool:
    """Whether the training of a regularizer in a bundle folder has come to its end."""
    return (run / REGULARIZER / WEIGHTS).is_file() and (run / REGULARIZER / ARCHITECTURE).is_file()


def train_regularizer(
    model: str | Path,
    *,
    table: str | Path | None = None,
    images: str | Path | None = None,
    seed: int = 0,
    epochs: int | None = None,
    published: bool = False,
    class_wise: bool = False,
    see_image: bool = True,
    restart: bool = False,
    tracking_uri: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> Path:
    """Train an unrolled refinement for the network of a bundle folder; no mask is read.

    Two sources teach it, in turn: views of the training images, whose target is the mean of all views made consistent with
    the image's proportions, and synthetic label maps degraded by what was measured of the network on these
    images. Interrupted runs continue with the same command.

    Args:
        model: bundle folder of ``monai-vslp train``; ``regularizer/`` is written inside.
        table: proportions; None for the table that the network was trained with.
        images: folder of the images; None for that of the network's training.
        seed: seed of all random draws.
        epochs: passes of 40 batches; None for the default.
        published: the published size of total deep variation (three macro-blocks, ten steps); about five times as slow.
        class_wise: learn one energy for all classes alike, which serves any number of classes.
        see_image: let the energy depend on the image too.
        restart: throw away an earlier regularizer.
        tracking_uri: MLflow server or store; SQLite in ``regularizer/`` by default.
        progress: show progress bars.
        **overrides: top-level values of ``train_regularizer.json``.

    Returns:
        The folder with ``model.pt`` and ``architecture.json``.

    Raises:
        InputError: a folder, table or option that cannot be used, before any computing.
    """
    run = Path(model)
    trained = read_config(run, "train.json")
    if not (run / "models" / "model.pt").is_file():
        raise InputError(f"{run / 'models' / 'model.pt'} does not exist; has the training of {run} finished an epoch?")
    table = Path(trained["table"] if table is None else table)
    images = Path(trained["dataset_dir"] if images is None else images)
    inference = read_config(run, "inference.json")
    cohort = read_cohort(table, images, inference["classes"])
    training = cohort.split("train")
    if len(training) == 0:
        raise InputError(f"table {table} has no rows of split 'train'.")
    check_images(record.image for record in (*training.records, *cohort.split("val").records))
    folder = run / REGULARIZER
    if restart and folder.exists():
        shutil.rmtree(folder)
    config = read_config(template(), CONFIG)
    values = {key: inference[key] for key in NETWORK if key in inference} | {
        "table": str(table.absolute()),
        "dataset_dir": str(images.absolute()),
        "classes": list(cohort.classes),
        "seed": seed,
        "class_wise": class_wise,
        "see_image": see_image,
        **(PUBLISHED if published else {}),
        **({} if epochs is None else {"regularizer_epochs": epochs}),
        **overrides,
    }
    unknown = sorted(set(values) - set(config))
    if unknown:
        raise InputError(f"{CONFIG} has no value named {unknown[0]!r}; it has {', '.join(sorted(config))}.")
    write_json(run / "configs" / CONFIG, config | values)
    run_config(run, CONFIG, track=True, progress=progress, **({} if tracking_uri is None else {"tracking_uri": tracking_uri}))
    return folder
