"""What adaptive views cost and gain: mIoU of one view, of all, and of views spent where the network is in doubt.

    python benchmarks/adaptive_views.py RUN images/ masks/ [--thresholds 0.1 0.2 0.3] [--shares 0.05 0.1]

RUN is a bundle folder that ``monai-vslp train`` wrote; masks are index images that ``monai-vslp evaluate`` would take. Prints a
Markdown table: mIoU from one confusion matrix over all images, by the network alone (argmax, no refinement), the part of the
gain of all views over one, the cost in views (windows predicted, those of one view being 1), and seconds. "all views, windows"
goes through the adaptive code with everything in doubt: what it differs by from plain augmentation is due to windows that
are predicted one by one and rims that shifted views leave out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.inferers import Inferer

from monai_vslp.data.images import list_images
from monai_vslp.inferers import AdaptiveTTAInferer, TTAInferer
from monai_vslp.metrics.segmentation import ConfusionMatrix
from monai_vslp.networks import calibrate_network
from monai_vslp.transforms import LoadTissueImage
from monai_vslp.workflows.bundle import read_config
from monai_vslp.workflows.evaluate import find_mask, true_labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("--views", default="shifted_symmetries")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--first", type=int, default=2, help="views everywhere")
    parser.add_argument("--most", type=int, default=4, help="views at most")
    parser.add_argument("--ignore-index", type=int, default=255)
    parser.add_argument("--window", default="auto", help="edge of the windows in px, 'auto', or 'none' for whole images")
    parser.add_argument("--limit", type=int, help="first images only")
    options = parser.parse_args()
    config = read_config(options.run, "inference.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config["feature_cache"] = None  # what is timed is the network
    network = ConfigParser(config).get_parsed_content("network_def")
    network.load_state_dict(torch.load(options.run / "models" / "model.pt", map_location="cpu", weights_only=True))
    network = calibrate_network(network.to(device).eval(), config["calibration"])
    window = int(options.window) if options.window.isdigit() else {"none": None}.get(options.window, options.window)
    pairs = [(path, mask) for path in list_images(options.images) if (mask := find_mask(options.masks, path.stem))]
    if not pairs:
        raise SystemExit(f"none of the images in {options.images} has a mask in {options.masks}")
    inferers: dict[str, Inferer] = {
        "one view": TTAInferer("none", "mean_spread"),
        "all views": TTAInferer(options.views, "mean_spread"),
        "all views, windows": AdaptiveTTAInferer(options.views, 2.0, 0.0, 1, None, window),
    }
    for share in options.shares:
        for threshold in options.thresholds:
            inferers[f"threshold {threshold:g}, share {share:g}"] = AdaptiveTTAInferer(
                options.views, threshold, share, options.first, options.most, window
            )
    matrices = {name: ConfusionMatrix(len(config["classes"])) for name in inferers}
    cost, seconds = dict.fromkeys(inferers, 0.0), dict.fromkeys(inferers, 0.0)
    load = LoadTissueImage()
    pairs = pairs[: options.limit]
    for path, mask in pairs:
        target = true_labels(mask, config["classes"], options.ignore_index)
        image = torch.as_tensor(load(path))[None].to(device)
        for name, inferer in inferers.items():
            started = time.perf_counter()
            with torch.inference_mode():
                labels = inferer(image, network)[0, :-1].argmax(dim=0).cpu()
            seconds[name] += time.perf_counter() - started
            cost[name] += float(inferer.spent.sum()) if hasattr(inferer, "spent") else float("nan")
            matrices[name].update(labels, target)
    scores = {name: matrix.compute().miou for name, matrix in matrices.items()}
    one, gain = scores["one view"], scores["all views"] - scores["one view"]
    print(f"{len(pairs)} images, {options.views}, {device}; gain of all views {gain:+.4f}\n")
    print("| views | mIoU | part of the gain | cost | seconds / one view |")
    print("|---|---|---|---|---|")
    for name, score in scores.items():
        views = 1.0 if name == "one view" else cost[name] / len(pairs)
        spent = "-" if views != views else f"{views:.2f}"
        relative = seconds[name] / seconds["one view"]
        part = f"{(score - one) / gain:.0%}" if gain else "-"
        print(f"| {name} | {score:.4f} | {part} | {spent} | {relative:.2f} |")


if __name__ == "__main__":
    main()
