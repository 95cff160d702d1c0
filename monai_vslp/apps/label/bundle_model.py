"""A bundle folder as a server uses it: loaded once, asked for images, regions of slides, and whole slides."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import optional_import

from monai_vslp.data.confidences import CONFIDENCE_SUFFIXES, on_simplex, open_confidence
from monai_vslp.data.images import IMAGE_SUFFIXES, read_image
from monai_vslp.data.inputs import content_mark
from monai_vslp.data.slides import is_slide, open_slide
from monai_vslp.io.regions import polygon_mask
from monai_vslp.networks import load_checkpoint
from monai_vslp.transforms.overlay import default_colors
from monai_vslp.transforms.refinement import VariationalRefinement
from monai_vslp.transforms.tissue import TissueMask
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows.bundle import read_config
from monai_vslp.workflows.calibration import segment_settings
from monai_vslp.workflows.regularizer import REGULARIZER, has_regularizer

__all__ = ["LARGEST_REGION", "BundleModel", "View"]

ndimage, _ = optional_import("scipy.ndimage")

LARGEST_REGION = 2**23  # px at the network's resolution that are worked on at once
TISSUE_MPP = 8.0  # µm/px at which tissue is looked for
SLIDE_CONFIG, IMAGE_CONFIG = "slide_inference.json", "inference.json"


@dataclass(frozen=True)
class View:
    """What a session works on: an image, or a region of a slide at the network's resolution.

    Attributes:
        classes: names.
        confidence: shape ``[C, H, W]``, float32, on the simplex.
        image: shape ``[3, H, W]``, float32 in [0, 1]; None where there are confidences alone.
        mass: tissue, shape ``[H, W]``, float32; None for tissue everywhere.
        origin: level-0 ``(x, y)`` px of the upper left corner.
        downsample: level-0 px per px.
        mpp: µm per px; None where unknown.
    """

    classes: tuple[str, ...]
    confidence: torch.Tensor
    image: torch.Tensor | None
    mass: torch.Tensor | None = None
    origin: tuple[float, float] = (0.0, 0.0)
    downsample: float = 1.0
    mpp: float | None = None


class BundleModel:
    """One of the two bundles, or a folder that ``monai-vslp train`` wrote.

    Args:
        folder: the bundle folder.
        views: group of test-time views; None for the bundle's.

    Attributes:
        classes, colors: of the bundle, in order; RGB 0 … 255.
        takes_confidences: images are files of confidences of another network (``pathology_segmentation_refinement``).

    Raises:
        InputError: the folder is no bundle of this project, or has no weights.
    """

    def __init__(self, folder: str | Path, views: str | None = None) -> None:
        self.folder, self.views = Path(folder), views
        config = read_config(self.folder, IMAGE_CONFIG)
        self.classes: tuple[str, ...] = tuple(config["classes"])
        self.colors: list[Sequence[int]] = config.get("colors") or default_colors(len(self.classes))
        self.takes_confidences = str(config["inferer"].get("_target_", "")).endswith("GivenConfidence")
        self.mpp: float | None = config.get("mpp")
        if not self.weights.is_file():
            raise InputError(
                f"model {self.folder} has no weights: {self.weights} does not exist. Train first, or copy all of it."
            )

    @property
    def weights(self) -> Path:
        """File of the network's weights."""
        return self.folder / "models" / "model.pt"

    def mark(self) -> str:
        """Changes when weights or configs do."""
        parts = [self.weights, self.folder / "configs", *([self.folder / REGULARIZER] if has_regularizer(self.folder) else [])]
        text = json.dumps([str(self.folder.absolute()), self.views, [content_mark(part) for part in parts]])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def takes(self, path: str | Path) -> bool:
        """Whether a file is of a kind that the model reads, by its name."""
        suffix = Path(path).suffix.lower()
        if self.takes_confidences:
            return suffix in (".npy", ".zarr")  # a TIFF in a folder of images is an image
        return suffix in IMAGE_SUFFIXES or is_slide(path)

    def _parser(self, name: str) -> ConfigParser:
        config = read_config(self.folder, name)
        config["bundle_root"] = str(self.folder)
        if self.views is not None and "views" in config:
            config["views"] = self.views
        if not self.takes_confidences:
            if has_regularizer(self.folder):
                config["regularizer"] = str((self.folder / REGULARIZER).absolute())
            for key, value in segment_settings(self.folder, self.classes).items():
                if "#" in key:
                    config[key.split("#")[0]][key.split("#")[1]] = value
                else:
                    config[key] = value
        parser = ConfigParser(config)
        parser.parse(True)
        return parser

    @cached_property
    def _image_parser(self) -> ConfigParser:
        return self._parser(IMAGE_CONFIG)

    @cached_property
    def _network(self) -> torch.nn.Module:
        parser = self._image_parser
        device = parser.get_parsed_content("device")
        return load_checkpoint(parser.get_parsed_content("network"), self.weights, device).eval()

    @cached_property
    def refinement(self) -> VariationalRefinement:
        """The variational stage for images at the network's resolution."""
        parser = self._image_parser
        steps = parser["postprocessing"]["transforms"]
        place = next(i for i, step in enumerate(steps) if str(step["_target_"]).endswith("VariationalRefinementd"))
        if self.takes_confidences:
            load_checkpoint(parser.get_parsed_content("network"), self.weights, parser.get_parsed_content("device"))
        return parser.get_parsed_content(f"postprocessing#transforms#{place}").refinement

    @cached_property
    def pipeline(self) -> Any:
        """The :class:`~monai_vslp.workflows.SlidePipeline` of the bundle, with its weights.

        Raises:
            InputError: the bundle takes confidences, not slides.
        """
        if self.takes_confidences:
            raise InputError(f"{self.folder.name} refines confidences of other networks; it does not read slides.")
        parser = self._parser(SLIDE_CONFIG)
        parser["progress"] = False
        parser.parse(True)
        load_checkpoint(parser.get_parsed_content("network"), self.weights, parser.get_parsed_content("device"))
        return parser.get_parsed_content("pipeline")

    def _confidence(self, image: torch.Tensor) -> torch.Tensor:
        """``[3, H, W]`` in [0, 1] to ``[C, H, W]``."""
        parser = self._image_parser
        device = parser.get_parsed_content("device")
        with torch.inference_mode():
            fused = parser.get_parsed_content("inferer")(image[None].to(device), self._network)
        return fused[0, : len(self.classes)].float().cpu().clone()

    def view(self, path: str | Path, region: list[Any] | None = None, mpp: float | None = None) -> View:
        """Confidences of an image, or of a region of a slide.

        Args:
            path: image, slide, or for a bundle that takes them, file of confidences.
            region: polygons ``[part][ring]`` of level-0 ``(x, y)`` px; needed for slides.
            mpp: µm per level-0 px; None for what the slide says.

        Raises:
            InputError: the image cannot be read, has another number of classes, or the region is outside or too large.
        """
        path = Path(path)
        if self.takes_confidences:
            return self._confidence_view(path, region, mpp)
        if is_slide(path):
            return self._slide_view(path, region, mpp)
        pixels = read_image(path)
        origin, mass = (0, 0), None
        if region is not None:
            mask, (rows, cols) = self._within(region, 1.0, pixels.shape[:2], path)
            pixels, origin, mass = pixels[rows, cols], (cols.start, rows.start), mask
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(255.0)
        mass = None if mass is None or mass.all() else torch.from_numpy(mass.astype(np.float32))
        scale = self.mpp if mpp is None else mpp
        return View(self.classes, self._confidence(image), image, mass, (float(origin[0]), float(origin[1])), 1.0, scale)

    def _within(
        self, region: list[Any], downsample: float, shape: tuple[int, int], path: Path
    ) -> tuple[np.ndarray, tuple[slice, slice]]:
        found = polygon_mask(region, downsample, shape)
        if found is None or not found[0].any():
            sides = [round(shape[1] * downsample), round(shape[0] * downsample)]
            raise InputError(f"the region lies outside {path.name}; its corners are level-0 [x, y] px up to {sides}.")
        mask, (rows, cols) = found
        inside = [np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0)]
        spans = [slice(int(places[0]), int(places[-1]) + 1) for places in inside]
        mask = mask[spans[0], spans[1]]
        rows = slice(rows.start + spans[0].start, rows.start + spans[0].stop)
        cols = slice(cols.start + spans[1].start, cols.start + spans[1].stop)
        size = mask.size
        if size > LARGEST_REGION:
            raise InputError(
                f"the region has {size:.2g} px at the network's resolution, more than {LARGEST_REGION:.2g}, which are "
                "worked on at once. Choose a smaller one, or ask for the whole slide: leave region and size out."
            )
        return mask, (rows, cols)

    def _confidence_view(self, path: Path, region: list[Any] | None, mpp: float | None) -> View:
        if path.suffix not in CONFIDENCE_SUFFIXES:
            raise InputError(
                f"{self.folder.name} takes confidences of other networks ({', '.join(CONFIDENCE_SUFFIXES)}), got {path.name}."
            )
        q, mass = on_simplex(open_confidence(path)[...], self._image_parser["kind"])
        q = q.mean(dim=0) if q.ndim == 4 else q
        if len(q) != len(self.classes):
            raise InputError(f"{path.name} has {len(q)} classes, {self.folder.name} has {', '.join(self.classes)}.")
        share, origin = mass[0], (0.0, 0.0)
        if region is not None:
            mask, (rows, cols) = self._within(region, 1.0, tuple(share.shape), path)
            q, share = q[:, rows, cols].contiguous(), share[rows, cols] * torch.from_numpy(mask.astype(np.float32))
            origin = (float(cols.start), float(rows.start))
        return View(self.classes, q, None, share, origin, 1.0, self.mpp if mpp is None else mpp)

    def _slide_view(self, path: Path, region: list[Any] | None, mpp: float | None) -> View:
        if region is None:
            raise InputError(f"{path.name} is a slide; a view of it needs a region.")
        reader = read_config(self.folder, SLIDE_CONFIG).get("reader", "auto")
        with open_slide(path, reader, mpp) as slide:
            down = slide.downsample_at(self.mpp)
            shape = tuple(max(1, math.ceil(side / down - 1e-6)) for side in slide.shape)
            mask, (rows, cols) = self._within(region, down, shape, path)
            size = (rows.stop - rows.start, cols.stop - cols.start)
            pixels = slide.read_at(rows.start, cols.start, *size, downsample=down)
            coarse = max(1.0, TISSUE_MPP / (slide.mpp * down))
            small = tuple(math.ceil(side / coarse) for side in size)
            thumbnail = slide.read_at(round(rows.start / coarse), round(cols.start / coarse), *small, downsample=down * coarse)
            scale = slide.mpp
        tissue = TissueMask(mpp=scale * down * coarse)(np.moveaxis(thumbnail, -1, 0))[0]
        index = [np.minimum((np.arange(side) / coarse).astype(int), len_ - 1) for side, len_ in zip(size, tissue.shape)]
        mass = mask & tissue[np.ix_(*index)]
        image = torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255.0)
        return View(
            self.classes,
            self._confidence(image),
            image,
            torch.from_numpy(mass.astype(np.float32)),
            (cols.start * down, rows.start * down),
            down,
            scale * down,
        )
