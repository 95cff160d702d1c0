"""``monai-vslp pretrain``: a backbone learns tissue from images without any label, for ``monai-vslp train --weights``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai_vslp.data.images import check_images
from monai_vslp.data.inputs import find_images
from monai_vslp.data.slides import is_slide
from monai_vslp.networks.masked import MaskedAutoencoder
from monai_vslp.utils.atomic import write_json
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows.bundle import plain_metadata, read_config, run_config, template

__all__ = ["BACKBONE_WEIGHTS", "pretrain"]

CONFIG = "pretrain.json"
BACKBONE_WEIGHTS = Path("models") / "backbone.safetensors"  # inside the run
NETWORK = ("backbone", "backbone_kwargs", "weights", "decoder_width", "decoder_depth", "mask_ratio", "mean", "std")


def _metadata() -> dict[str, Any]:
    """Metadata of a pretraining: images in, images out."""
    metadata = plain_metadata()
    metadata |= {
        "name": "Masked autoencoder of tissue",
        "task": "Self-supervised pretraining of a vision transformer on histology",
        "description": "A vision transformer learns to predict hidden patches of tissue; its weights start the training from "
        "proportions.",
        "data_source": "the user's own unlabelled images",
        "label_classes": "none",
        "pred_classes": "normalised pixels of patches",
    }
    metadata["network_data_format"]["outputs"]["pred"] |= {
        "type": "image",
        "format": "RGB",
        "num_channels": 3,
        "channel_def": {"0": "R", "1": "G", "2": "B"},
    }
    return metadata


def _check_positive(config: dict[str, Any]) -> None:
    for key in ("epochs", "batch_size", "learning_rate"):
        if not config[key] > 0:
            raise InputError(f"{key} must be positive, got {config[key]}.")


def pretrain(
    images: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    backbone: str | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    epochs: int | None = None,
    tile: int | None = None,
    batch_size: int | None = None,
    restart: bool = False,
    tracking_uri: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> Path:
    """Train a vision transformer as a masked autoencoder on random tissue tiles, and write its weights.

    What is written loads with ``monai-vslp train TABLE --images DIR --output RUN --backbone NAME --weights FILE``, with the
    same options of the backbone. Interrupted runs continue with the same command.

    Args:
        images: a folder of images and slides, or several folders and files; nothing but pixels is read.
        output: the folder to write: ``models/backbone.safetensors``, ``reconstructions.png``, checkpoints, configs, MLflow.
        backbone: name of a timm vision transformer; None for ``vit_tiny_patch16_224``.
        weights: local file to start from; None for random weights.
        seed: seed of all random draws.
        epochs: passes over ``tiles`` tiles; None for the default.
        tile: edge of the tiles in px, a multiple of the backbone's patch; None for the default.
        batch_size: tiles per step; None for the default.
        restart: throw away an earlier run in ``output``.
        tracking_uri: MLflow server or store; SQLite in ``output`` by default.
        progress: show progress bars.
        **overrides: top-level values of the bundle's ``pretrain.json``: ``mpp`` (µm/px of the tiles), ``tiles`` (per epoch),
            ``mask_ratio``, ``backbone_kwargs``, ``learning_rate`` …

    Returns:
        The file with the backbone's weights.

    Raises:
        InputError: images, a backbone or an option that cannot be used, before any computing.
    """
    run = Path(output)
    files = find_images(images)
    config = read_config(template(), CONFIG)
    values: dict[str, Any] = {
        "images": [str(path.absolute()) for path in files],
        "seed": seed,
        "weights": None if weights is None else str(Path(weights).absolute()),
        **{
            key: value
            for key, value in (("backbone", backbone), ("epochs", epochs), ("tile", tile), ("batch_size", batch_size))
            if value is not None
        },
        **overrides,
    }
    unknown = sorted(set(values) - set(config))
    if unknown:
        raise InputError(f"{CONFIG} has no value named {unknown[0]!r}; it has {', '.join(sorted(config))}.")
    config |= values
    _check_positive(config)
    patch = MaskedAutoencoder(**{key: config[key] for key in NETWORK}).patch
    if config["tile"] % patch or config["tile"] < 2 * patch:
        near = max(2, round(config["tile"] / patch)) * patch
        raise InputError(f"tile must be a multiple of the backbone's patch of {patch} px, got {config['tile']}; try {near}.")
    ours = (run / "configs" / CONFIG).is_file()
    if run.exists() and not ours and any(run.iterdir()):
        raise InputError(f"output folder {run} holds other files; choose an empty one.")
    check_images(path for path in files if not is_slide(path))
    if ours and restart:
        for name in ("configs", "models"):
            shutil.rmtree(run / name, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(template() / "LICENSE", run / "LICENSE")
    write_json(run / "configs" / CONFIG, config)
    write_json(run / "configs" / "metadata.json", _metadata())
    run_config(run, CONFIG, track=True, progress=progress, **({} if tracking_uri is None else {"tracking_uri": tracking_uri}))
    return run / BACKBONE_WEIGHTS
