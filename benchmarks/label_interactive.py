"""From a moved proportion, or a stroke, to a redrawn region in the MONAI Label app, against solving anew.

    OMP_NUM_THREADS=2 python benchmarks/label_interactive.py [--size 1024] [--classes 5] [--moves 9] [--alpha 8]

What is timed is :meth:`monai_vslp.apps.label.Session.solve` and, apart, the writing of the answer as polygons; confidences
and edges are in memory, as in the server after its first answer. Moves of 5 percentage points follow one another,
each from the answer before; the last answer is compared with solving anew, and with a solution that was iterated on for long.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from monai_vslp.apps.label import Session, View, move_proportion, paint_strokes
from monai_vslp.apps.label.answer import write_result
from monai_vslp.data.synthetic_labels import reference_case
from monai_vslp.transforms import VariationalRefinement
from monai_vslp.transforms.overlay import default_colors
from monai_vslp.variational import refine

STEP = 0.05  # of a move
LONG = 150  # steps of the solution that is iterated on


def picture(labels: torch.Tensor, classes: int, seed: int) -> torch.Tensor:
    """A stained image of a label map, float32 ``[3, H, W]`` in [0, 1]: a colour per class under noise."""
    generator = torch.Generator().manual_seed(seed)
    colours = 0.6 + 0.12 * torch.randn(classes, 3, generator=generator)
    noise = 0.05 * torch.randn(3, *labels.shape, generator=generator)
    return (colours[labels].permute(2, 0, 1) + noise).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="side of the region in px")
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--moves", type=int, default=9, help="moved proportions, and strokes")
    parser.add_argument("--alpha", type=float, default=8.0, help="strength of the regularizer; that of the bundles by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the table here")
    options = parser.parse_args()
    labels, confidence, proportions = reference_case(options.size, options.classes, options.seed)
    names = tuple(f"class {k}" for k in range(options.classes))
    view = View(names, confidence, picture(labels, options.classes, options.seed), mpp=0.5)
    session = Session(view, VariationalRefinement(alpha=options.alpha))
    rng = np.random.default_rng(options.seed)

    def timed(call, *arguments, **settings):
        started = time.perf_counter()
        found = call(*arguments, **settings)
        return found, time.perf_counter() - started

    _, first = timed(session.solve, proportions.tolist())
    moved, residuals = [], []
    given = proportions.tolist()
    for number in range(options.moves):
        index = number % options.classes
        sign = 1 if given[index] < STEP or rng.random() < 0.5 else -1
        given = move_proportion(given, index, given[index] + sign * STEP)
        solution, seconds = timed(session.solve, given)
        moved.append(seconds)
        residuals.append(solution.result.residual)
    last = solution
    file, polygons = timed(write_result, "geojson", view, last, default_colors(options.classes), "region", {})
    file.unlink()
    painted = []
    for number in range(options.moves):
        x, y = rng.uniform(0.2, 0.7, size=2) * options.size
        stroke = {
            "type": "Feature",
            "geometry": {"type": "LineString", "coordinates": [[x, y], [x + options.size / 8, y + options.size / 10]]},
            "properties": {"classification": {"name": names[number % options.classes]}, "radius": 6},
        }
        mask, painting = timed(paint_strokes, [stroke], names, tuple(labels.shape))
        _, seconds = timed(session.solve, given, painted=mask)
        painted.append(painting + seconds)
    anew, cold = timed(Session(view, session.refinement).solve, given)
    longer = asdict(session.refinement.options) | {"tolerance": 1e-7, "max_iterations": LONG}
    long = refine(confidence, given, image=view.image, start=last.result.u, **longer)

    def differ(one, other) -> str:
        return f"{100 * float((one.labels != other.labels).float().mean()):.2f} %"

    rows = [
        ("solved anew (as the first answer)", f"{cold:.2f}", "1", differ(anew.result, long), f"{anew.result.residual:.0e}"),
        (
            f"moved proportion, median of {options.moves}",
            f"{statistics.median(moved):.2f} ({min(moved):.2f}–{max(moved):.2f})",
            f"1/{cold / statistics.median(moved):.1f}",
            differ(last.result, long),
            f"{max(residuals):.0e}",
        ),
        (
            f"stroke, median of {options.moves}",
            f"{statistics.median(painted):.2f} ({min(painted):.2f}–{max(painted):.2f})",
            f"1/{cold / statistics.median(painted):.1f}",
            "–",
            "–",
        ),
        ("polygons of the answer", f"{polygons:.2f}", "–", "–", "–"),
    ]
    shape = f"{options.size}² × {options.classes} classes, α = {options.alpha:g}"
    lines = [
        f"{shape}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}; first answer "
        f"{first:.2f} s; the last answer and the one anew differ in {differ(last.result, anew.result)} of the pixels",
        "",
        "| answer | s | ratio | pixels that differ from a long solution | ‖ū − p‖₁ |",
        "|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
