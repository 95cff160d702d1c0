"""How a cohort of equal slides speeds up with workers.

    python benchmarks/cohort_workers.py [--slides 6] [--side 6144] [--workers 1 2] [--repeats 3] [--views none]

Writes one synthetic slide and as many links to it, a bundle folder with a ViT-tiny of random weights, and segments the cohort
once per number of workers and repeat, alternating, with one thread per worker. Prints a Markdown table of medians: the time
from the first slide's start to the last one's end as ``log.jsonl`` has it (the cluster's start and the imports of its
processes are paid once per cohort, not per slide), and the whole command. Needs Linux and Dask.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import datetime
from pathlib import Path

import torch

from monai_vslp.data.synthetic import CLASSES, write_slide
from monai_vslp.networks import ConfidenceNet
from monai_vslp.workflows.bundle import create_run
from monai_vslp.workflows.cohort import cohort

NETWORK = {"backbone": "vit_tiny_patch16_224", "backbone_kwargs": {}, "window": 224}


def write_run(folder: Path) -> Path:
    """A bundle folder whose network was never trained: what is timed does not depend on its weights."""
    torch.manual_seed(0)
    create_run(folder, NETWORK | {"mpp": 0.5, "classes": list(CLASSES)}, list(CLASSES))
    network = ConfidenceNet(len(CLASSES), **NETWORK)
    (folder / "models").mkdir(exist_ok=True)
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    return folder


def write_slides(folder: Path, count: int, side: int) -> Path:
    """A table of equal slides: one file with several names."""
    first = write_slide(folder / "slide0.tif", shape=(side, side), seed=0)
    first.mask.unlink()
    for index in range(1, count):
        os.link(folder / "slide0.tif", folder / f"slide{index}.tif")
    shares = ",".join(f"{100 * value:.3f}" for value in first.proportions)
    rows = [f"slide{index}.tif,{shares}" for index in range(count)]
    (folder / "table.csv").write_text("\n".join([f"slide,{','.join(CLASSES)}", *rows]) + "\n")
    return folder / "table.csv"


def events(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=6)
    parser.add_argument("--side", type=int, default=6144, help="px")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--views", default="none")
    options = parser.parse_args()
    seconds: dict[int, list[tuple[float, float]]] = {count: [] for count in options.workers}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run, table = write_run(folder / "run"), write_slides(folder, options.slides, options.side)
        for repeat in range(options.repeats):
            for count in options.workers:
                output, started = folder / f"out-{repeat}-{count}", time.perf_counter()
                result = cohort(
                    table, output, model=run, workers=count, threads=1, views=options.views, batch_size=2, progress=False
                )
                whole = time.perf_counter() - started
                if result.failures:
                    raise SystemExit(f"slides failed: {result.failures}")
                log = events(output)
                begun = min(event["time"] for event in log if event["event"] == "running")
                ended = max(event["time"] for event in log if event["event"] == "done")
                slides = datetime.fromisoformat(ended) - datetime.fromisoformat(begun)
                seconds[count].append((slides.total_seconds(), whole))
                tiles = sum(event.get("tiles", 0) for event in log if event["event"] == "done")
    medians = {count: [statistics.median(values) for values in zip(*found)] for count, found in seconds.items()}
    base = medians[options.workers[0]]
    print(f"{options.slides} slides of {options.side} x {options.side} px, {tiles} tiles, {options.repeats} repeats, medians\n")
    print("| workers | slides, s | speed-up | whole command, s | speed-up |")
    print("|---|---|---|---|---|")
    for count, (slides, whole) in medians.items():
        print(f"| {count} | {slides:.1f} | {base[0] / slides:.2f} | {whole:.1f} | {base[1] / whole:.2f} |")


if __name__ == "__main__":
    main()
