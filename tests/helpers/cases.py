"""Data that several test files share."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from monai_vslp.data import write_table


def noisy_confidence(size=(48, 56), seed=0):
    """Confidences of three classes ``[3, H, W]`` over smooth regions, and the true proportions ``[3]``."""
    generator = torch.Generator().manual_seed(seed)
    field = torch.nn.functional.interpolate(torch.randn(1, 3, 5, 5, generator=generator), size, mode="bicubic")[0]
    onehot = torch.nn.functional.one_hot(field.argmax(dim=0), 3).permute(2, 0, 1).float()
    return torch.softmax(1.5 * onehot + torch.randn(3, *size, generator=generator), dim=0), onehot.mean(dim=(1, 2))


def write_two_class_cohort(folder: Path, train=6, val=2, size=(64, 80)) -> Path:
    """A tiny cohort of pink and purple halves: images, masks, table; returns the table."""
    rng = np.random.default_rng(0)
    rows = []
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(train + val):
        mask = np.zeros(size, dtype=np.uint8)
        mask[:, rng.integers(8, size[1] - 8) :] = 1
        rgb = np.where(mask[..., None] == 0, (225, 150, 190), (110, 70, 150)) + rng.normal(0, 12, (*size, 3))
        Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"i{index}.png")
        Image.fromarray(mask).save(folder / "masks" / f"i{index}.png")
        share = 100 * float((mask == 1).mean())
        rows.append(
            {
                "image": f"i{index}.png",
                "split": "train" if index < train else "val",
                "patient": f"p{index}",
                "pink": f"{100 - share:.1f}",
                "purple": f"{share:.1f}",
            }
        )
    return write_table(folder / "table.csv", rows, ["pink", "purple"])


SMALL_BACKBONE = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL_NETWORK = {"backbone_kwargs": SMALL_BACKBONE, "blocks": [0, 1], "window": 32}  # values of a training's config


def write_small_backbone(path: Path) -> Path:
    """Random weights of ``vit_tiny_patch16_224`` with the options ``SMALL_BACKBONE``, as a local file."""
    from safetensors.torch import save_file

    from monai_vslp.utils.timm import import_timm

    torch.manual_seed(0)
    model = import_timm().create_model("vit_tiny_patch16_224", num_classes=0, **SMALL_BACKBONE)
    save_file(model.state_dict(), str(path))
    return path
