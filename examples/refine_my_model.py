"""Refine the output of a network of your own with the proportions of a report.

    python examples/refine_my_model.py --output out

The network here is a small U-Net of MONAI that learned from the masks of a few synthetic images for a minute; put your own in
its place. All that is needed of it are confidences: one map per class, adding up to 1 at each pixel. Three ways to refine them
follow: a call in Python, a transform in a post-processing chain of MONAI, and the bundle for confidences that lie in files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import BasicUNet
from monai.transforms import Compose
from PIL import Image

from monai_vslp.data.synthetic import CLASSES, COLORS, VAL_VARIANTS, synthetic_image
from monai_vslp.transforms import VariationalRefinementd
from monai_vslp.variational import energy_report, refine

SIDE = 128  # px


def my_model(steps: int, seed: int = 0) -> torch.nn.Module:
    """Your network: RGB in [0, 1], ``[B, 3, H, W]``, to logits ``[B, C, H, W]``."""
    torch.manual_seed(seed)
    images = [synthetic_image((SIDE, SIDE), seed=seed) for seed in range(8)]
    x = torch.stack([torch.from_numpy(one.image).movedim(-1, 0) / 255 for one in images])
    y = torch.stack([torch.from_numpy(one.mask).long() for one in images])
    net = BasicUNet(spatial_dims=2, in_channels=3, out_channels=len(CLASSES), features=(8, 8, 16, 32, 32, 8))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(x), (2,))
        loss = torch.nn.functional.cross_entropy(net(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def refine_my_model(output: Path, steps: int = 120) -> dict[str, float]:
    """Refine one image in three ways.

    Args:
        output: folder to write: the picture ``refined.png`` (image, network, refined, total energy, from left to right) and
            ``confidence.npy`` as the bundle takes it.
        steps: steps of the network's training.

    Returns:
        Accuracy over pixels of the network alone and refined.
    """
    output.mkdir(parents=True, exist_ok=True)
    tissue = synthetic_image((SIDE, SIDE), [0.4, 0.3, 0.2, 0.1, 0.0], seed=99, variants=VAL_VARIANTS)
    proportions = tissue.proportions  # what the report says
    image = torch.from_numpy(tissue.image).movedim(-1, 0)
    network = my_model(steps)
    with torch.no_grad():
        confidence = network(image[None] / 255)[0].softmax(dim=0)  # [C, H, W], on the simplex

    # 1. A call. The image lends its edges; without proportions the map is only smoothed.
    result = refine(confidence, proportions, image=image, alpha=4.0)
    print(f"{len(result.energies) - 1} steps, {result.reason}, residual of the proportions {result.residual:.1e}")
    for name, why in energy_report(result, CLASSES, proportions=proportions)["classes"].items():
        print(
            f"{name}: given {why['given']:.1%}, found {why['found']:.1%}, its odds were multiplied by {why['odds_factor']:.1f}"
        )

    # 2. In a chain: the same by dictionary transform, for engines of MONAI.
    chain = Compose([VariationalRefinementd(keys="pred", proportions_key="proportions", image_key="image", alpha=4.0)])
    chained = chain({"pred": confidence, "proportions": proportions, "image": image})
    assert bool((chained["pred_labels"][0] == result.labels).all())

    # 3. From files: bundles/pathology_segmentation_refinement takes .npy, TIFF and Zarr; its docs/README.md has the command.
    np.save(output / "confidence.npy", confidence.numpy())

    colors = np.asarray(COLORS, dtype=np.uint8)
    energy = (result.fidelity_energy + result.regularization_energy).clamp_min(0)
    panels = [
        tissue.image,
        colors[confidence.argmax(dim=0)],
        colors[result.labels],
        np.repeat((255 * energy / energy.max()).byte().numpy()[..., None], 3, axis=-1),
    ]
    Image.fromarray(np.concatenate(panels, axis=1)).save(output / "refined.png")
    truth = torch.from_numpy(tissue.mask).long()
    return {
        "network alone": float((confidence.argmax(dim=0) == truth).float().mean()),
        "refined": float((result.labels == truth).float().mean()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    for name, value in refine_my_model(parser.parse_args().output).items():
        print(f"{name}: {value:.3f} of the pixels are right")
