"""Pictures of a network at work, for trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_vslp.data.regularization import ConfidenceStacks
from monai_vslp.io.analysis_figures import draw_eigenfunctions, draw_energies, draw_regularization, write_figure
from monai_vslp.transforms.overlay import LabelOverlay, default_colors
from monai_vslp.variational import TotalDeepVariation, UnrolledRefinement
from monai_vslp.variational.analysis import STARTS, eigenfunction, energies_along, regularization_maps, starting_map

__all__ = ["ConfidencePicture", "picture_regularizer"]


class ConfidencePicture:
    """First image of a data set beside the network's labels on it.

    Args:
        network: gives logits ``[1, C, H, W]`` for an image ``[1, 3, H, W]`` in [0, 1].
        images: items with ``image`` ``[3, H, W]``, float in [0, 1].
        device: where the network runs.
    """

    def __init__(
        self, network: torch.nn.Module, images: Sequence[Mapping[str, Any]], device: torch.device | str = "cpu"
    ) -> None:
        self.network, self.images, self.device = network, images, device

    def __call__(self) -> np.ndarray:
        """RGB, shape ``[H, 2 W, 3]``, uint8."""
        image = torch.as_tensor(self.images[0]["image"])
        training = self.network.training
        self.network.eval()
        with torch.inference_mode():
            labels = self.network(image[None].to(self.device)).argmax(dim=1).cpu()
        self.network.train(training)
        drawn = LabelOverlay()(image, labels)
        plain = (image.clamp(0, 1) * 255).round().byte()
        return torch.cat([plain, torch.as_tensor(drawn)], dim=2).permute(1, 2, 0).numpy()


def picture_regularizer(
    before: TotalDeepVariation,
    model: UnrolledRefinement,
    stacks: ConfidenceStacks,
    folder: str | Path,
    colors: Sequence[Sequence[int]] | None = None,
    class_names: Sequence[str] | None = None,
    eigen_steps: int = 200,
) -> list[Path]:
    """Draw what training a regularizer has done, with the first image of ``stacks`` and its proportions.

    Args:
        before: the regularizer as it was before training.
        model: the trained steps.
        stacks: confidences; the first is drawn.
        folder: where ``energies.png``, ``regularization.png`` and ``eigenfunctions.png`` go.
        colors: RGB per class; None for the default palette.
        class_names: names in class order.
        eigen_steps: steps of the search for eigenfunctions.

    Returns:
        The files.
    """
    folder = Path(folder)
    model = model.eval()
    entry = stacks[0]
    q, mass = entry["stack"].mean(dim=0)[None], entry["mass"][None]
    sees = model.regularizer.image_channels > 0
    image = entry["image"][None] if sees else None
    p = entry["proportions"].clamp_min(1e-4)[None]
    path = energies_along(model, q, p / p.sum(), mass=mass, image=image, keep=(model.steps,))
    u = path.u[model.steps]
    colors = default_colors(q.shape[1]) if colors is None else colors
    maps = regularization_maps(before, model, u, mass, image)
    found = {}
    for kind in STARTS:
        generator = torch.Generator().manual_seed(0)
        start = starting_map(kind, (32, 32), q.shape[1], generator)
        blank = torch.zeros(3, 32, 32) if sees else None
        found[kind] = eigenfunction(
            model.regularizer, (32, 32), q.shape[1], start, steps=eigen_steps, generator=generator, image=blank
        )
    drawn = draw_regularization(maps, q, u.argmax(dim=1), colors, class_names, mass=mass)
    return [
        write_figure(folder / "energies.png", draw_energies(path)),
        write_figure(folder / "regularization.png", drawn),
        write_figure(folder / "eigenfunctions.png", draw_eigenfunctions(found, colors)),
    ]
