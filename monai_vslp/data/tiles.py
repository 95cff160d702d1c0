"""Random tissue tiles of unlabelled images and slides."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.utils import CommonKeys, optional_import
from torch.utils.data import Dataset

from monai_vslp.data.images import read_image
from monai_vslp.data.inputs import find_images
from monai_vslp.data.slides import area_resample, is_slide, open_slide
from monai_vslp.utils.errors import InputError

tqdm, _ = optional_import("tqdm", name="tqdm")

__all__ = ["TissueTiles", "prepare_tiles"]

MASK_MPP = 8.0  # µm/px at which tissue is looked for, unless the detector has a scale of its own
POSITIONS = 20_000  # kept per file; each stands for a cell of the mask, within which tiles move freely
OPEN_SLIDES = 128
LONGEST_EPOCH = 20_000  # tiles

logger = logging.getLogger(__name__)


def prepare_tiles(
    batch: Mapping[str, torch.Tensor], device: torch.device | str | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """``prepare_batch`` of MONAI's engines for tiles: the images, ``[B, 3, tile, tile]``, as input and as target."""
    images = batch[CommonKeys.IMAGE].to(device, non_blocking=non_blocking)
    return images, images


class _Places:
    """Where one file has tissue, in px of the scale at which its tiles are taken.

    Args:
        shape: ``(H, W)`` of the file in px.
        mask: tissue, bool ``[h, w]``.
        cell: px per cell of the mask.
        tile: edge of a tile, px.
        least: share of tissue a tile needs, in [0, 1].
        rng: chooses the positions kept where there are very many.
    """

    def __init__(
        self, shape: tuple[int, int], mask: np.ndarray, cell: float, tile: int, least: float, rng: np.random.Generator
    ) -> None:
        self.shape, self.cell = shape, cell
        self.area = float(mask.sum()) * cell**2  # px
        edge = [min(max(1, round(tile / cell)), side) for side in mask.shape]
        # Tissue share of every place a tile can have, by a summed-area table.
        table = np.pad(mask.astype(np.int64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
        rows, cols = edge
        share = (table[rows:, cols:] - table[:-rows, cols:] - table[rows:, :-cols] + table[:-rows, :-cols]) / (rows * cols)
        corners = np.argwhere(share >= max(least, 1e-9)) if min(shape) >= tile else np.empty((0, 2), dtype=np.int64)
        if len(corners) > POSITIONS:
            corners = corners[np.sort(rng.choice(len(corners), POSITIONS, replace=False))]
        self.corners = corners.astype(np.int32)

    def draw(self, rng: np.random.Generator, tile: int, side: int) -> tuple[int, int]:
        """``(row, col)`` in px of a crop of ``side`` px around a tile that has enough tissue."""
        corner = (self.corners[rng.integers(len(self.corners))] + rng.uniform(size=2)) * self.cell
        # The tile first, so that a crop of another size has the centre of a tile that lies within the image.
        last = np.array(self.shape) - tile
        middle = np.clip(corner, 0, last) + tile / 2
        row, col = np.clip(np.round(middle - side / 2), 0, np.array(self.shape) - side).astype(int)
        return int(row), int(col)


class TissueTiles(Dataset):
    """Tiles at random places with tissue, turned, mirrored, resized and restained at random.

    A file is chosen by its area of tissue, then a place in it. A tile must have enough tissue at its nominal size; tissue is
    judged on a grid of about 8 µm, so shares are exact to a cell. Item ``i`` of epoch ``e`` depends on ``(seed, e, i)`` alone.
    Files without a suitable place are left out with a warning.

    Args:
        sources: folders and files; see :func:`~monai_vslp.data.inputs.find_images`.
        tile: edge of the tiles, px.
        length: tiles per epoch; None for as many as tile the tissue without overlap, 20,000 at most.
        mpp: µm/px of the tiles. Slides are read at it; images are taken to have it.
        tissue: finds tissue in an image ``[3, h, w]`` uint8 and gives ``[1, h, w]`` bool, such as
            :class:`~monai_vslp.transforms.TissueMask`; its attribute ``mpp`` is the µm/px it wants. None for tissue everywhere.
        min_tissue: share of a tile that must be tissue, in [0, 1].
        scale: range of the factor between the edge of what is cropped and ``tile``; (1, 1) for no resizing.
        transform: further random change of a tile ``[3, tile, tile]`` in [0, 1] that can be seeded with
            ``set_random_state``, such as :class:`~monai_vslp.transforms.RandStainJitter`; None for none.
        seed: seed of all draws.
        memory: bytes of decoded images that are kept; further ones are decoded each time.
        progress: show a progress bar while tissue is looked for.

    Attributes:
        files: those with suitable places.
        area: px of tissue in them, at ``mpp``.

    Raises:
        InputError: an impossible option, no images, or none with a suitable place.
        ImageReadError, SlideError: a file that cannot be read.
    """

    def __init__(
        self,
        sources: str | Path | Sequence[str | Path],
        tile: int = 224,
        length: int | None = None,
        mpp: float = 0.5,
        tissue: Callable[[np.ndarray], np.ndarray] | None = None,
        min_tissue: float = 0.5,
        scale: Sequence[float] = (0.8, 1.25),
        transform: Any | None = None,
        seed: int = 0,
        memory: float = 2e9,
        progress: bool = True,
    ) -> None:
        if tile < 1 or (length is not None and length < 1):
            raise InputError(f"tile and length must be at least 1, got tile = {tile}, length = {length}.")
        if not mpp > 0:
            raise InputError(f"mpp must be a positive number of µm per px, got {mpp}.")
        if not 0 <= min_tissue <= 1:
            raise InputError(f"min_tissue is the share of a tile that must be tissue, in [0, 1], got {min_tissue}.")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise InputError(f"scale must be two positive factors, the smaller first, such as 0.8 and 1.25, got {list(scale)}.")
        self.tile, self.mpp, self.scale, self.seed, self.memory = int(tile), mpp, (scale[0], scale[1]), seed, memory
        self.tissue, self.transform = tissue, transform
        self.epoch = 0
        self._kept: dict[Path, np.ndarray] = {}
        self._slide = lru_cache(maxsize=OPEN_SLIDES)(open_slide)
        self._is_slide: dict[Path, bool] = {}
        rng = np.random.default_rng([seed, 0])
        self.files: list[Path] = []
        self._places: list[_Places] = []
        without = []
        found = find_images(sources)
        for path in tqdm(found, desc="tissue", unit="file", disable=not progress):
            self._is_slide[path] = is_slide(path)
            places = _Places(*self._find_tissue(path), self.tile, min_tissue, rng)
            if len(places.corners):
                self.files.append(path)
                self._places.append(places)
            else:
                without.append(path.name)
        if without:
            logger.warning(
                "%d of %d files have no tile of %d px with %.0f %% tissue and are left out: %s%s", len(without), len(found),
                tile, 100 * min_tissue, ", ".join(without[:5]), " …" if len(without) > 5 else "",
            )  # fmt: skip
        if not self.files:
            raise InputError(
                f"none of {len(found)} files has a tile of {tile} px ({tile * mpp:g} µm) with {min_tissue:.0%} tissue. Choose "
                "a smaller tile or min_tissue, or check mpp."
            )
        self.area = sum(places.area for places in self._places)
        self._share = np.cumsum([places.area for places in self._places]) / self.area
        self.length = length or int(np.clip(round(self.area / self.tile**2), 1, LONGEST_EPOCH))

    @property
    def fingerprint(self) -> str:
        """Digest of the names and sizes of the files, to tell whether a checkpoint belongs to the same ones."""
        known = [(path.name, path.stat().st_size) for path in self.files]
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]

    def set_epoch(self, epoch: int) -> None:
        """Draw other tiles."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """``{"image": [3, tile, tile] float in [0, 1]}``, tile ``index`` of the present epoch."""
        if not 0 <= index < self.length:
            raise IndexError(f"there are tiles 0 to {self.length - 1}, got {index}.")
        return {CommonKeys.IMAGE: self.draw(self.epoch, index)}

    def draw(self, epoch: int, index: int) -> torch.Tensor:
        """One tile of one epoch, shape ``[3, tile, tile]``, float32 in [0, 1]."""
        rng = np.random.default_rng([self.seed, 1, epoch, index])
        number = min(int(np.searchsorted(self._share, rng.uniform(), side="right")), len(self.files) - 1)
        places = self._places[number]
        # Logarithmic, so that enlarging is as likely as shrinking.
        factor = float(np.exp(rng.uniform(*np.log(self.scale))))
        side = min(max(1, round(self.tile * factor)), *places.shape)
        row, col = places.draw(rng, self.tile, side)
        x = self._crop(self.files[number], row, col, side)
        x = torch.rot90(x, int(rng.integers(4)), (-2, -1))
        x = x.flip(-1) if rng.integers(2) else x
        if self.transform is not None:
            self.transform.set_random_state(seed=int(rng.integers(2**31)))
            x = torch.as_tensor(self.transform(x))
        return x.contiguous()

    def picture(self, index: int) -> torch.Tensor:
        """Tile ``index`` of epoch 0, which no training sees: the same whenever it is asked for."""
        return self.draw(0, index)

    # ---- files ----------------------------------------------------------------------------------------------------------

    def _image(self, path: Path) -> np.ndarray:
        image = self._kept.get(path)
        if image is None:
            image = read_image(path)
            if sum(kept.nbytes for kept in self._kept.values()) + image.nbytes <= self.memory:
                self._kept[path] = image
        return image

    def _find_tissue(self, path: Path) -> tuple[tuple[int, int], np.ndarray, float]:
        """Size in px at ``mpp``, mask of tissue ``[h, w]``, and px per cell of the mask."""
        wanted = float(getattr(self.tissue, "mpp", MASK_MPP))
        if self._is_slide[path]:
            slide = self._slide(path)
            down = slide.downsample_at(self.mpp)
            shape = (int(slide.shape[0] / down), int(slide.shape[1] / down))
            # With tissue everywhere its size is enough.
            coarse = max(1.0, wanted / slide.mpp)
            if self.tissue is None:
                small = np.empty([max(1, int(side / coarse)) for side in slide.shape] + [0])
            else:
                small = slide.thumbnail(downsample=coarse)
            cell = coarse / down
        else:
            image = self._image(path)
            shape = (image.shape[0], image.shape[1])
            cell = min(max(1.0, wanted / self.mpp), *shape)
            size = (max(1, int(shape[0] / cell)), max(1, int(shape[1] / cell)))
            small = np.round(area_resample(image, (0.0, 0.0), cell, size)).astype(np.uint8)
        if self.tissue is None:
            return shape, np.ones(small.shape[:2], dtype=bool), cell
        mask = np.asarray(self.tissue(np.ascontiguousarray(np.moveaxis(small, -1, 0))), dtype=bool)[0]
        return shape, mask, cell

    def _crop(self, path: Path, row: int, col: int, side: int) -> torch.Tensor:
        """A square of ``side`` px at ``mpp``, resampled to the size of a tile."""
        if self._is_slide[path]:
            slide = self._slide(path)
            factor = side / self.tile
            down = slide.downsample_at(self.mpp) * factor
            pixels = slide.read_at(round(row / factor), round(col / factor), self.tile, self.tile, downsample=down)
            return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(255.0)
        pixels = self._image(path)[row : row + side, col : col + side]
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(255.0)
        if side == self.tile:
            return x
        size = (self.tile, self.tile)
        return F.interpolate(x[None], size, mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)
