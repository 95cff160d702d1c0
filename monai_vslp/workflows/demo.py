"""``monai-vslp demo``: the whole way on synthetic tissue, on any machine, without any download."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from monai_vslp.data.cohort import write_table
from monai_vslp.data.images import list_images
from monai_vslp.data.synthetic import CLASSES, COLORS, write_cohort, write_slide
from monai_vslp.io.summary import read_summary
from monai_vslp.workflows.evaluate import evaluate
from monai_vslp.workflows.segment import segment
from monai_vslp.workflows.train import train

__all__ = ["demo"]

RATERS = "low"  # noise of the table that the demo trains on: three raters per image


def demo(
    output: str | Path,
    seed: int = 0,
    progress: bool = True,
    train_images: int = 120,
    val_images: int = 16,
    slide_side: int = 8192,
    epochs: int = 10,
) -> Path:
    """Make a cohort and a slide, train from proportions only, segment, refine, evaluate against masks kept aside.

    Args:
        output: folder to write; an earlier demo in it is continued.
        seed: seed of tissue, raters and training.
        progress: show progress bars.
        train_images, val_images: size of the cohort, images of 256×256 px.
        slide_side: height and width of the slide, px.
        epochs: passes over the training images.

    Returns:
        The report of the slide.
    """
    output = Path(output)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", flush=True)

    cohort = output / "cohort"
    if not (cohort / f"proportions_rater_{RATERS}.csv").exists():
        say(f"Making {train_images + val_images} synthetic images and the tables of three raters …")
        write_cohort(cohort, train=train_images, val=val_images, seed=seed)
    slide_path, slide_masks = output / "slide" / "synthetic_slide.tif", output / "slide" / "masks"
    table = output / "slide" / "proportions.csv"
    if not table.exists():
        say(f"Making a synthetic slide of {slide_side}×{slide_side} px …")
        slide = write_slide(slide_path, (slide_side, slide_side), seed=seed)
        slide_masks.mkdir(exist_ok=True)
        shutil.move(slide.mask, slide_masks / f"{slide_path.stem}.png")
        shares = {name: f"{100 * p:.2f}" for name, p in zip(CLASSES, slide.proportions)}
        write_table(table, [{"image": slide_path.name, "split": "test", **shares}], CLASSES)
    say("Training from the raters' percentages alone, no masks …")
    run = train(
        cohort / f"proportions_rater_{RATERS}.csv",
        cohort / "images",
        output / "model",
        seed=seed,
        epochs=epochs,
        progress=progress,
        colors=[list(color) for color in COLORS],
    )
    say("Segmenting the validation images with their proportions …")
    val = [path for path in list_images(cohort / "images") if path.name.startswith("val_")]
    segment(val, run, output / "images", proportions=cohort / "proportions.csv", progress=progress)
    say("Segmenting the slide through cuCIM, as one problem with its proportions …")
    segment([slide_path], run, output / "slides", proportions=table, progress=progress)
    say("Validation images against the masks kept aside:")
    evaluate(output / "images", cohort / "masks")
    say("Slide against the mask kept aside:")
    evaluate(output / "slides", slide_masks)
    summary = read_summary(output / "slides" / slide_path.stem)
    say(f"Slide: residual of the proportions {summary['residual']:.1e}, {summary['reason']}.")
    report = output / "slides" / slide_path.stem / "report.html"
    say(f"Open {report} and {output / 'images' / 'report.html'} in a browser.")
    return report
