"""Backbones with their weights in one folder, as timm and the Hugging Face hub hand them out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.utils import optional_import

from monai_vslp.utils.errors import InputError

__all__ = ["HUB", "LOCAL", "BackboneFolder", "is_folder", "open_backbone"]

HUB, LOCAL = ("hf-hub:", "hf_hub:"), "local-dir:"
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # timm's order
# What a classifier needs, or what every backbone here is told anyway.
UNUSED = ("num_classes", "dynamic_img_size", "strict_img_size")

snapshot_download, _ = optional_import(
    "huggingface_hub", name="snapshot_download", descriptor="{} is needed for hf-hub names: pip install huggingface_hub"
)


@dataclass(frozen=True)
class BackboneFolder:
    """A pre-trained backbone, told apart into what configs hold.

    With these a bundle makes the network from the architecture's name alone: who uses it needs neither the folder nor a
    connection.

    Attributes:
        architecture: name of a timm model.
        options: of ``timm.create_model``.
        weights: file with the state dict.
        mean, std: channel statistics (R, G, B in [0, 1]) of the images it was trained with; None where the folder says nothing.
    """

    architecture: str
    options: dict[str, Any]
    weights: Path
    mean: list[float] | None
    std: list[float] | None


def is_folder(name: str | None) -> bool:
    """Whether a backbone's name means a folder: ``local-dir:<path>``, or ``hf-hub:<organisation>/<model>[@<revision>]``."""
    return name is not None and name.startswith((*HUB, LOCAL))


def _download(name: str) -> Path:
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=["config.json", *WEIGHTS]))
    except Exception as error:  # no such repository, no connection, no token: a dozen kinds
        raise InputError(
            f"backbone hf-hub:{name} cannot be fetched: {error} Without a connection copy its config.json and "
            "model.safetensors into a folder and name it local-dir:FOLDER."
        ) from error


def open_backbone(name: str) -> BackboneFolder:
    """Read what a folder of timm's format says of its model; of the hub, after fetching it or from the hub's local cache.

    Args:
        name: see :func:`is_folder`. The folder holds ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``.

    Raises:
        InputError: the folder, or one of its files, is missing or is none of timm's.
    """
    path = Path(name.removeprefix(LOCAL)).expanduser() if name.startswith(LOCAL) else _download(name.partition(":")[2])
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        architecture, options = str(config["architecture"]), dict(config.get("model_args") or {})
        statistics = dict(config.get("pretrained_cfg") or config)  # older folders have one level
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"backbone {name!r}: {path / 'config.json'} cannot be read as the config of a timm model "
            f"({type(error).__name__}: {error}); the folder needs config.json and model.safetensors, as timm's save_for_hf "
            "writes them."
        ) from error
    weights = next((path / file for file in WEIGHTS if (path / file).is_file()), None)
    if weights is None:
        raise InputError(f"backbone {name!r}: {path} holds no weights; one of {', '.join(WEIGHTS)} is needed.")
    options = {key: value for key, value in options.items() if key not in UNUSED}
    mean, std = (None if statistics.get(key) is None else [float(x) for x in statistics[key]] for key in ("mean", "std"))
    return BackboneFolder(architecture, options, weights, mean, std)
