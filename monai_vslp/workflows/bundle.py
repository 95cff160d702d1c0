"""Bundle folders: made from the template that ships with the package, run in this process."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow
from monai.utils import optional_import

import monai_vslp
from monai_vslp.utils.atomic import write_json
from monai_vslp.utils.errors import InputError

__all__ = ["BUNDLE", "NETWORK", "create_run", "plain_metadata", "read_config", "run_config", "template", "tracking_settings"]

_, has_mlflow = optional_import("mlflow")

logger = logging.getLogger(__name__)

BUNDLE = "pathology_tissue_proportion_segmentation"
CONFIGS = (
    "train.json",
    "train_head.json",
    "finetune.json",
    "multi_gpu_train.json",
    "self_training.json",
    "train_regularizer.json",
    "inference.json",
    "slide_inference.json",
    "evaluate.json",
    "tracking.json",
)
# What the template says of the weights it ships does not hold for a run, whatever its values leave out.
PLAIN: dict[str, Any] = {"backbone_kwargs": {}, "blocks": None, "window": 224, "mean": None, "std": None, "colors": None}
# What a network is made of, in the configs of a bundle.
NETWORK = (
    "backbone",
    "backbone_kwargs",
    "blocks",
    "magnifications",
    "rank",
    "head",
    "hidden",
    "context",
    "subtypes",
    "window",
    "mean",
    "std",
)
TRACKING = "tracking.json"  # settings for MONAI's option --tracking


def template() -> Path:
    """The bundle folder that ships with the package, installed or in a checkout."""
    package = Path(monai_vslp.__file__).parent
    for folder in (package / "_bundles" / BUNDLE, package.parent / "bundles" / BUNDLE):
        if (folder / "configs").is_dir():
            return folder
    raise FileNotFoundError(f"the bundle {BUNDLE} is missing from the installation in {package}; install monai_vslp again.")


def read_config(run: Path, name: str) -> dict[str, Any]:
    """One config of a bundle folder as plain JSON.

    Raises:
        InputError: the folder is no bundle of this project.
    """
    path = run / "configs" / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; {run} is no folder that 'monai-vslp train' wrote.") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def create_run(run: Path, values: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Make ``run`` a bundle folder: the template with ``values`` set wherever a config has that key.

    Args:
        run: folder to make or bring up to date.
        values: plain JSON values for top-level keys of the configs.
        classes: class names, for the metadata.
    """
    source = template()
    for origin, copy in (
        ("LICENSE", "LICENSE"),
        ("docs/run.md", "docs/README.md"),
        ("configs/logging.conf", "configs/logging.conf"),
    ):
        (run / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / origin, run / copy)
    for name in CONFIGS:
        config = read_config(source, name)
        config.update({key: value for key, value in (PLAIN | dict(values)).items() if key in config})
        write_json(run / "configs" / name, config)
    metadata = plain_metadata()
    output = metadata["network_data_format"]["outputs"]["pred"]
    output["num_channels"] = len(classes)
    output["channel_def"] = {str(i): name for i, name in enumerate(classes)}
    write_json(run / "configs" / "metadata.json", metadata)


def plain_metadata() -> dict[str, Any]:
    """The template's metadata without what it says of the weights that it ships."""
    metadata = read_config(template(), "metadata.json")
    metadata.pop("weights", None)
    return metadata | {"eval_metrics": {}, "data_source": "the user's own cohort"}


def _root_cause(error: BaseException) -> BaseException:
    """What went wrong before MONAI wrapped it."""
    while error.__cause__ is not None and not isinstance(error, (InputError, OSError)):
        error = error.__cause__
    return error


def tracking_settings(run: Path) -> Path:
    """Settings for MONAI's option ``--tracking``: those of a bundle folder, or the template's where it has none."""
    own = run / "configs" / TRACKING
    return own if own.is_file() else template() / "configs" / TRACKING


def run_config(run: Path, name: str | Sequence[str], /, track: bool = False, **overrides: Any) -> Any:
    """Run a config of a bundle folder, or one with overlays, as ``python -m monai.bundle run`` does, in this process.

    Args:
        run: bundle folder.
        name: of the config, or of several, the first with overlays behind it.
        track: track a training in MLflow, with the settings of the bundle folder; where MLflow is not installed, only say so.
        **overrides: values of the config, by their ids.

    Raises:
        InputError, OSError: as the parts raised them, without MONAI's wrapping.
    """
    for noisy in ("ignite.engine.engine", "monai.bundle.workflows"):
        logging.getLogger(noisy).setLevel(logging.ERROR)  # they report what is raised anyway, and a choice made here
    names = [name] if isinstance(name, str) else list(name)
    if track and not has_mlflow:
        logger.warning("MLflow is not installed (pip install 'monai_vslp[tracking]'): this training is not tracked.")
    try:
        workflow = ConfigWorkflow(
            config_file=[str(run / "configs" / one) for one in names],
            meta_file=str(run / "configs" / "metadata.json"),
            logging_file=False,
            tracking=str(tracking_settings(run)) if track and has_mlflow else None,
            workflow_type="inference" if names[0].startswith(("inference", "slide", "evaluate")) else "train",
            bundle_root=str(run),
            **overrides,
        )
        workflow.initialize()
        result = workflow.run()
        workflow.finalize()
    except RuntimeError as error:
        cause = _root_cause(error)
        if isinstance(cause, (InputError, OSError)):
            raise cause from None
        raise
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return result
