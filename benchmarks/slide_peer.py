"""Whole-slide inference side by side with tiatoolbox's semantic segmentor: tiles per second and peak memory.

    python benchmarks/slide_peer.py slide.tif --peer-python /path/to/venv_tiatoolbox/bin/python [--tiles 60] [--repeats 3]

Same slide, same square of tissue, same network (a ViT-tiny with random weights), same tile, overlap and
batch, confidences at the same scale (averaged over blocks before they are blended), level 0 of the slide in both. Ours reads
through cuCIM, blends with a Gaussian window and leaves a Zarr group; the peer reads through its own reader, averages
overlapping tiles and leaves a Zarr group. Each run is a process of its own; its time is from opening the slide to the finished
map, imports and loading of the network left out; "unsaved" leaves out, too, what comes after the last tile: the peer's saving,
our blending. The peer gets several numbers of loading workers (``--peer-workers``), all
shown; peak memory is that of the main process, without the peer's workers. Runs alternate; medians. Needs Linux and Zarr.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from slide_inference import job_around_the_middle, peak_memory

from monai_vslp.data.slides import open_slide
from monai_vslp.inferers import SlideConfidence, TTAInferer, network_predictor
from monai_vslp.networks import ConfidenceNet

CLASSES = 3
PEER = Path(__file__).with_name("tiatoolbox_peer.py")


def ours(task: dict) -> dict[str, float | str]:
    """One run in this process."""
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    network = ConfidenceNet(task["classes"]).eval()
    predict = network_predictor(network, TTAInferer("none", "mean_spread"))
    mask = np.load(task["mask"]) > 0
    with tempfile.TemporaryDirectory() as work:
        started = time.perf_counter()
        with open_slide(task["slide"], mpp=task["mpp"]) as slide:
            job = SlideConfidence(
                slide, num_classes=task["classes"], work_dir=work, fingerprint="", mpp=slide.mpp,
                tile=task["tile"], overlap=1 - task["stride"] / task["tile"], batch_size=task["batch_size"],
                map_downsample=task["down"], tissue=(mask, task["mask_down"]), progress=False,
            )  # fmt: skip
            job.run(predict)
            unsaved = time.perf_counter() - started
            maps = job.merge()
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "unsaved": unsaved, "tiles": maps.tiles, "peak_gib": peak_memory(), "version": slide.reader}


def run(command: list[str], threads: int) -> dict:
    """A run in a process of its own."""
    environment = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:2])} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--ours":
        print(json.dumps(ours(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--peer-workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tiles", type=int, default=60, help="at least that many")
    parser.add_argument("--tile", type=int, default=896)
    parser.add_argument("--stride", type=int, default=784)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--down", type=int, default=4, help="px per px of the map")
    parser.add_argument("--mpp", type=float, help="of level 0, where the slide does not say")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with open_slide(options.slide, mpp=options.mpp) as slide:
            job = job_around_the_middle(
                slide, options.tiles, num_classes=CLASSES, mpp=slide.mpp, work_dir=folder / "plan", fingerprint="",
                tile=options.tile, overlap=1 - options.stride / options.tile, batch_size=options.batch_size, progress=False,
            )  # fmt: skip
            shape, mask = slide.shape, job.mass.mask
        np.save(folder / "mask.npy", mask.astype(np.uint8))
        task = {
            "slide": str(Path(options.slide).absolute()), "root": str(Path(__file__).parents[1]), "classes": CLASSES,
            "mask": str(folder / "mask.npy"), "mask_down": shape[0] / mask.shape[0], "mpp": options.mpp, "tile": options.tile,
            "stride": options.stride, "batch_size": options.batch_size, "down": options.down, "threads": options.threads,
        }  # fmt: skip
        names = ["ours", *(f"tiatoolbox, {count} workers" for count in options.peer_workers)]
        found: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(options.repeats):
            found["ours"].append(run([sys.executable, __file__, "--ours", json.dumps(task)], options.threads))
            for name, workers in zip(names[1:], options.peer_workers):
                command = [options.peer_python, str(PEER), json.dumps(task | {"workers": workers})]
                found[name].append(run(command, options.threads))
    medians = {
        name: {key: statistics.median(one[key] for one in runs) for key in ("seconds", "unsaved", "tiles", "peak_gib")}
        for name, runs in found.items()
    }
    rate = {name: values["tiles"] / values["seconds"] for name, values in medians.items()}
    print(
        f"{Path(options.slide).name}, tiles of {options.tile} px every {options.stride}, batches of {options.batch_size}, "
        f"{options.threads} threads, {options.repeats} repeats, medians\n"
    )
    print("| | version, reader | tiles | s | tiles/s | ours / this | unsaved: s | ours / this | peak GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, values in medians.items():
        unsaved = values["unsaved"] / medians["ours"]["unsaved"]
        print(
            f"| {name} | {found[name][0]['version']} | {values['tiles']:.0f} | {values['seconds']:.1f} | {rate[name]:.2f} | "
            f"{rate['ours'] / rate[name]:.2f} | {values['unsaved']:.1f} | {unsaved:.2f} | {values['peak_gib']:.2f} |"
        )


if __name__ == "__main__":
    main()
