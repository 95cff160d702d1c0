"""One whole slide: tiles to confidences, one variational problem, files."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer

from monai_vslp.data.slides import open_slide
from monai_vslp.inferers.slide import infer_slide
from monai_vslp.io.output import PICTURE_SIDE, SegmentationOutput, write_output
from monai_vslp.transforms.overlay import default_colors
from monai_vslp.transforms.refinement import VariationalRefinement

__all__ = ["SlidePipeline"]

WORK = "tiles"  # folder inside the output that holds results of tiles until the slide is written


class SlidePipeline:
    """Segment a whole slide with its proportions as one problem.

    Tiles over tissue are read through cuCIM (OpenSlide where it cannot), blended to a map of confidences, refined with the
    proportions of the whole tissue, and written as :func:`monai_vslp.io.write_output` tells. Finished tiles stay on disk
    until the slide is written, so an interrupted call goes on where it stopped.

    Args:
        network: gives logits ``[B, C, H, W]`` for images ``[B, 3, H, W]`` in [0, 1].
        inferer: fuses the network's views to mean and spread, ``[B, C + 1, H, W]``.
        refinement: the variational stage; its ``pixel_size`` is ``map_downsample``.
        classes: names in class order.
        colors: RGB per class; None for the default palette.
        mpp: µm/px that the network was trained at.
        tile: side of the tiles, px at ``mpp``.
        overlap: share of a tile that it has in common with the next.
        batch_size: tiles per call of the network.
        map_downsample: px at ``mpp`` per px of the maps.
        device: where the network runs.
        progress: show a progress bar.
        options: recorded in the summary.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        inferer: Inferer,
        refinement: VariationalRefinement,
        classes: Sequence[str],
        colors: Sequence[Sequence[int]] | None = None,
        mpp: float = 0.5,
        tile: int = 896,
        overlap: float = 0.125,
        batch_size: int = 4,
        map_downsample: int = 4,
        device: str | torch.device = "cpu",
        progress: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.network, self.inferer, self.refinement = network, inferer, refinement
        self.classes = list(classes)
        self.colors = default_colors(len(self.classes)) if colors is None else colors
        self.mpp, self.tile, self.overlap, self.batch_size = mpp, tile, overlap, batch_size
        self.map_downsample, self.device, self.progress = map_downsample, device, progress
        self.options = dict(options or {})

    def _predict(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fused = self.inferer(images, self.network)
        return fused[:, :-1], fused[:, -1:]

    def __call__(
        self,
        slide: str | Path,
        folder: str | Path,
        *,
        proportions: Sequence[float] | None = None,
        given_spread: Sequence[float] | None = None,
        given_bounds: Sequence[Sequence[float]] | None = None,
        source_mpp: float | None = None,
        fingerprint: str | None = None,
    ) -> Path:
        """
        Args:
            slide: the file.
            folder: where its outputs go.
            proportions: fractions of the tissue per class; None leaves them free.
            given_spread: standard deviation between raters per class.
            given_bounds: lower and upper fractions per class.
            source_mpp: µm per level-0 px, where the file does not say.
            fingerprint: names network and settings; tiles of another one are not reused.

        Returns:
            Path of ``summary.json``.

        Raises:
            SlideError: the slide cannot be read or does not say its µm/px.
            InputError: there is no tissue.
            OSError: a full disk; finished tiles are kept.
        """
        path, folder = Path(slide), Path(folder)
        started = time.perf_counter()
        with open_slide(path, mpp=source_mpp) as source:
            found = infer_slide(
                source,
                self._predict,
                len(self.classes),
                mpp=self.mpp,
                work_dir=folder / WORK,
                fingerprint=str(fingerprint),
                tile=self.tile,
                overlap=self.overlap,
                map_downsample=self.map_downsample,
                batch_size=self.batch_size,
                device=self.device,
                progress=self.progress,
            )
            inferred = time.perf_counter()
            # The image on the grid of the maps, for its edges; the thumbnail comes from it too.
            image = np.ascontiguousarray(
                source.thumbnail(downsample=found.downsample)[: found.mass.shape[0], : found.mass.shape[1]]
            )
            level0_shape, reader = source.shape, source.reader
        confidence = found.mean / found.mean.sum(axis=0, keepdims=True)
        result = self.refinement(
            confidence, proportions, found.mass, np.moveaxis(image, -1, 0), spread=given_spread, bounds=given_bounds
        )
        refined = time.perf_counter()
        step = math.ceil(max(image.shape[:2]) / PICTURE_SIDE)
        output = SegmentationOutput(
            name=path.stem,
            kind="slide",
            source=str(path),
            classes=self.classes,
            colors=self.colors,
            confidence=confidence,
            segmentation=result.u.numpy(),
            fidelity=result.fidelity_energy.numpy(),
            regularization=result.regularization_energy.numpy(),
            mass=found.mass,
            thumbnail=np.ascontiguousarray(image[::step, ::step]),
            refinement={
                "psi": result.psi.tolist(),
                "energies": result.energies,
                "residual": result.residual,
                "converged": result.converged,
                "reason": result.reason,
                "proportions_given": None if proportions is None else list(proportions),
                "proportions_refined": result.proportions.tolist(),
            },
            spread=found.spread,
            given_spread=given_spread,
            mpp=found.mpp,
            downsample=found.downsample,
            level0_shape=level0_shape,
            options=self.options | {"reader": reader, "tiles": len(found.tiles), "fingerprint": fingerprint},
            seconds={"tiles": inferred - started, "refinement": refined - inferred},
        )
        written = write_output(folder, output)
        found.clear()
        return written
