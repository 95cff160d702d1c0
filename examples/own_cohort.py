"""From a folder of images and a spreadsheet of percentages to tissue maps of new images.

    python examples/own_cohort.py --output out [--table table.xlsx --images images/] [--weights backbone.safetensors]

Without a table, a small cohort of synthetic tissue is made first, with percentages as three raters would write them. The steps
are those of docs/finetuning.md; each is one call, and the same command goes on where an earlier one was interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from monai_vslp.data import read_cohort
from monai_vslp.data.synthetic import write_cohort
from monai_vslp.io import read_summary
from monai_vslp.io.check_report import format_check
from monai_vslp.workflows import calibrate, check, segment, train


def own_cohort(
    output: Path,
    table: Path | None = None,
    images: Path | None = None,
    weights: Path | None = None,
    epochs: int | None = None,
    progress: bool = True,
) -> Path:
    """Check, train, calibrate, segment.

    Args:
        output: folder to write.
        table: ``image,split,patient,<one column per class>``, CSV or XLSX; None for synthetic tissue.
        images: folder that image names are relative to; the table's own by default.
        weights: local weights of ``vit_tiny_patch16_224``; None trains a small transformer from scratch.
        epochs: passes over the images; None for the default.
        progress: show progress bars.

    Returns:
        The report over all segmented images.
    """
    if table is None:
        table = output / "cohort" / "proportions_rater_low.csv"
        images = table.parent / "images"
        if not table.exists():
            write_cohort(table.parent, train=40, val=8, size=192)
    images = table.parent if images is None else images

    found = check(table, images, progress=progress)
    print(format_check(found))
    if found.count("error"):
        raise SystemExit("Mend the table first; nothing was computed.")

    run = train(table, images, output / "run", weights=weights, epochs=epochs, progress=progress)
    calibrate(run, progress=progress)  # how far off are predicted proportions?

    # Images of split "val" stand for new ones. Their proportions are given; leave the table out where they are not known.
    new = [images / record.image for record in read_cohort(table, images).split("val").records]
    segment(new, run, output / "maps", proportions=table, trust="raters", progress=progress)
    for path in new[:3]:
        summary = read_summary(output / "maps" / path.stem)
        for name, share in summary["proportions"]["refined"].items():
            print(f"{path.name}  {name}: given {summary['proportions']['given'][name]:.1%}, in the map {share:.1%}")
    return output / "maps" / "report.html"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--epochs", type=int)
    print("Open", own_cohort(**vars(parser.parse_args())))
