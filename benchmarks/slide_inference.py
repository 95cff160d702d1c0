"""How much of a slide's time is the network's: tiles per second, what the network waits for, memory.

    python benchmarks/slide_inference.py slide.tif [--model RUN] [--tiles 40] [--threads 1]

Tiles around the middle of the tissue are predicted and blended as ``monai-vslp segment`` does, with the network of a bundle
folder that ``monai-vslp train`` wrote, or else with a ViT-tiny of random weights. The bare network sees as many random tensors
of the same shape, half of them before and half after. Prints a Markdown table. "waits" is the share of the time for tiles
(reading to writing) in which the network had none or could not give its result away; "time / bare" is that time over the
bare network's, by the clock and, in brackets, of processors, which other programs disturb less. The maps that are blended
are those of the whole slide, so few tiles make blending look dear. Memory is the peak of the whole process. Needs Linux and
Zarr.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser

from monai_vslp.data.slides import Slide, open_slide
from monai_vslp.inferers import AdaptiveTTAInferer, SlideConfidence, TTAInferer, network_predictor
from monai_vslp.inferers.slide import Predictor
from monai_vslp.networks import ConfidenceNet
from monai_vslp.transforms.tissue import TissueMask
from monai_vslp.workflows.bundle import read_config

TISSUE_MPP = 8.0  # µm/px


def peak_memory() -> float:
    """Largest resident size of this process so far, GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    raise SystemExit("this benchmark reads /proc/self/status, which Linux has")


def load_network(run: str | None) -> tuple[torch.nn.Module, int]:
    """A network and its number of classes."""
    if run is None:
        torch.manual_seed(0)
        return ConfidenceNet(3).eval(), 3
    config = read_config(Path(run), "inference.json")
    config["feature_cache"] = None  # what is timed is the network
    network = ConfigParser(config).get_parsed_content("network_def")
    network.load_state_dict(torch.load(Path(run) / "models" / "model.pt", map_location="cpu", weights_only=True))
    return network.eval(), len(config["classes"])


def job_around_the_middle(slide: Slide, tiles: int, **options: object) -> SlideConfidence:
    """A job with at least ``tiles`` tiles, over the tissue in a square around the middle of all tissue."""
    down = max(1.0, TISSUE_MPP / slide.mpp)
    mask = TissueMask(mpp=down * slide.mpp)(np.moveaxis(slide.thumbnail(downsample=down), -1, 0))[0]
    row, col = (int(np.median(places)) for places in np.nonzero(mask))
    for half in range(16, max(mask.shape), 8):
        kept = np.zeros_like(mask)
        part = np.s_[max(0, row - half) : row + half, max(0, col - half) : col + half]
        kept[part] = mask[part]
        if not kept.any():
            continue
        job = SlideConfidence(slide, tissue=(kept, down), **options)
        if len(job.tiles) >= tiles:
            return job
    return job


def bare_seconds(predict: Predictor, shape: tuple[int, ...], batches: int, device: torch.device) -> np.ndarray:
    """Seconds of the network for ``batches`` batches of random tensors: by the clock, and of processors."""
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    started = now()
    with torch.inference_mode():
        for _ in range(batches):
            predict(images)[0].sum().item()  # waits for a GPU
    return now() - started


def now() -> np.ndarray:
    """Seconds by the clock, and of processors in this process."""
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide")
    parser.add_argument("--model", help="bundle folder of monai-vslp train; random weights without")
    parser.add_argument("--tiles", type=int, default=40, help="at least that many")
    parser.add_argument("--tile", type=int, default=896)
    parser.add_argument("--overlap", type=float, default=0.125)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--mpp", type=float, default=0.5)
    parser.add_argument("--source-mpp", type=float)
    parser.add_argument("--views", default="none")
    parser.add_argument(
        "--adaptive", type=float, metavar="THRESHOLD", help="adaptive views; the bare network then spends others"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network; compiling is not counted")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, classes = load_network(options.model)
    network = network.to(device)
    if options.compile:
        network.compile()
    if options.adaptive is None:
        inferer = TTAInferer(options.views, "mean_spread")
    else:
        inferer = AdaptiveTTAInferer(options.views, threshold=options.adaptive)
    predict = network_predictor(network, inferer)
    shape = (options.batch_size, 3, options.tile, options.tile)
    with tempfile.TemporaryDirectory() as work, open_slide(options.slide, mpp=options.source_mpp) as slide:
        job = job_around_the_middle(
            slide, options.tiles, num_classes=classes, mpp=options.mpp, work_dir=work, fingerprint="", tile=options.tile,
            overlap=options.overlap, batch_size=options.batch_size, device=device, progress=False,
        )  # fmt: skip
        bare_seconds(predict, shape, 1, device)  # warm up
        count = len(job.tiles) / options.batch_size
        half = max(1, round(count / 2))
        before = bare_seconds(predict, shape, half, device)
        started = now()
        job.run(predict)
        inferred = now() - started
        found = job.merge()
        total = now() - started
        peak = peak_memory()
        after = bare_seconds(predict, shape, half, device)
        bare = (before + after) / (2 * half) * count
        waits = (found.seconds["read_wait"] + found.seconds["write_wait"]) / inferred[0]
        views = "-" if found.views is None else f"{found.views['mean']:.2f}"
        maps = f"{found.shape[0]} x {found.shape[1]}"
    print(f"{Path(options.slide).name}, {slide.reader}, {device}, {options.threads} threads, tiles of {options.tile} px\n")
    print("| tiles | tiles/s | waits | time / bare | with blending | views | seconds | map | peak GiB |")
    print("|---|---|---|---|---|---|---|---|---|")

    def ratio(both: np.ndarray) -> str:
        return f"{both[0]:.3f} ({both[1]:.3f})"

    seconds = ", ".join(f"{name} {value:.2f}" for name, value in found.seconds.items())
    cells = [f"{found.tiles}", f"{found.tiles / inferred[0]:.2f}", f"{waits:.1%}", ratio(inferred / bare), ratio(total / bare)]
    print("| " + " | ".join([*cells, views, f"{seconds}, bare {bare[0]:.2f}", maps, f"{peak:.2f}"]) + " |")


if __name__ == "__main__":
    main()
