"""Tiny slides and a tiny network for them, for tests of cohorts."""

from pathlib import Path

from cases import SMALL_NETWORK

from monai_vslp.data.synthetic import CLASSES, write_cohort, write_slide
from monai_vslp.workflows import train

TINY = SMALL_NETWORK | {"batch_size": 2, "progress": False}
FAST = {"tile": 256, "batch_size": 2, "views": "none", "progress": False}
SAME = ("labels.tif", "labels_argmax.tif", "confidence.tif", "segmentation.tif", "segmentation.geojson")
STEMS = ("s0", "s1", "s2", "s3")  # s1 is the largest


def train_tiny(folder: Path) -> Path:
    """Five classes, hardly trained: the path is tested, not the accuracy."""
    table = write_cohort(folder, train=4, val=1, size=64)
    return train(table, folder / "images", folder / "run", epochs=1, **TINY)


def write_slides(folder: Path) -> Path:
    """Four slides of different sizes with a table, one of unknown proportions; returns the table."""
    lines = [f"slide,{','.join(CLASSES)}"]
    for index, side in enumerate((1152, 1536, 1152, 1280)):
        made = write_slide(folder / f"s{index}.tif", shape=(side, 512), seed=index)
        shares = "," * (len(CLASSES) - 1) if index == 2 else ",".join(f"{100 * p:.3f}" for p in made.proportions)
        lines.append(f"s{index}.tif,{shares}")
        made.mask.unlink()
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"
