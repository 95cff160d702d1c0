"""Pictures of a network at work, for trackers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from monai_vslp.data.regularization import ConfidenceStacks
from monai_vslp.io.analysis_figures import draw_eigenfunctions, draw_energies, draw_regularization, write_figure
from monai_vslp.transforms.overlay import EnergyPicture, LabelOverlay, default_colors
from monai_vslp.transforms.refinement import VariationalRefinement
from monai_vslp.variational import TotalDeepVariation, UnrolledRefinement
from monai_vslp.variational.analysis import STARTS, eigenfunction, energies_along, regularization_maps, starting_map

__all__ = ["HeldOutPictures", "picture_regularizer"]

GAP = 8  # px between the parts of a strip


class HeldOutPictures:
    """The first images of a data set with the network's labels, the refined ones, and the energies of the refinement.

    Each is a strip: the image, the labels of the network alone, those refined with the proportions of the image (with none
    where it has none), its fidelity and its regularization energy, dark to bright. Images larger than ``longest`` are reduced
    before they are refined.

    Args:
        network: gives logits ``[1, C, H, W]`` for an image ``[1, 3, H, W]`` in [0, 1].
        images: items with ``image`` ``[3, H, W]``, float in [0, 1]; ``proportions`` ``[C]`` and ``stem`` where known.
        device: where the network runs.
        most: images at most.
        longest: longer side of a picture, px.
        **refinement: options of :class:`~monai_vslp.transforms.VariationalRefinement` that are not its defaults.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        images: Sequence[Mapping[str, Any]],
        device: torch.device | str = "cpu",
        most: int = 3,
        longest: int = 512,
        **refinement: Any,
    ) -> None:
        self.network, self.images, self.device, self.most, self.longest = network, images, device, most, longest
        self.refinement = {"alpha": 8.0} | refinement

    def __call__(self) -> dict[str, np.ndarray]:
        """By stem, RGB, shape ``[h, 5 w + gaps, 3]``, uint8."""
        training = self.network.training
        self.network.eval()
        try:
            found = {}
            for index in range(min(self.most, len(self.images))):
                item = self.images[index]
                found[str(item.get("stem", index))] = self._strip(item)
        finally:
            self.network.train(training)
        return found

    def _strip(self, item: Mapping[str, Any]) -> np.ndarray:
        image = torch.as_tensor(item["image"])
        with torch.inference_mode():
            confidence = self.network(image[None].to(self.device)).softmax(dim=1).cpu()
        factor = max(1, math.ceil(max(image.shape[-2:]) / self.longest))
        if factor > 1:
            image, confidence = (F.avg_pool2d(x, factor) for x in (image[None], confidence))
            image = image[0]
        result = VariationalRefinement(pixel_size=factor, **self.refinement)(
            confidence[0].clone(), item.get("proportions"), image=image.clone()
        )
        rgb = (image.clamp(0, 1) * 255).round().byte().numpy()
        parts = [rgb, LabelOverlay()(rgb, confidence[0].argmax(dim=0)), LabelOverlay()(rgb, result.labels)]
        parts += [EnergyPicture()(energy.numpy()) for energy in (result.fidelity_energy, result.regularization_energy)]
        gap = np.full((3, rgb.shape[1], GAP), 255, dtype=np.uint8)
        spaced = [piece for part in parts for piece in (np.asarray(part), gap)][:-1]
        return np.concatenate(spaced, axis=2).transpose(1, 2, 0)


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
