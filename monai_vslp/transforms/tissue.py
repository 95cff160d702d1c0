"""Telling tissue from glass."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_data_type, convert_to_dst_type, optional_import

from monai_vslp.utils.errors import InputError

__all__ = ["TissueMask", "TissueMaskD", "TissueMaskDict", "TissueMaskd"]

gaussian_filter, _ = optional_import("scipy.ndimage", name="gaussian_filter")
label, _ = optional_import("scipy.ndimage", name="label")
threshold_otsu, _ = optional_import("skimage.filters", name="threshold_otsu")

# Optical densities. A piece counts as tissue if it reaches Otsu's threshold, and extends down to half of that; each is kept
# within bounds, for glass is never as dense as the upper ones and stained tissue never as clear as the lower.
SEED_BOUNDS = (0.02, 0.045)
EXTENT_BOUNDS = (0.012, 0.018)
BLACK = 40  # brighter channels than this are no pen stroke and no scanner border
FILL = 254.5  # of a channel; pure white
ALIKE = 6.0  # levels within which a colour is one
SECOND_GLASS = 0.05  # of what is not pure white; edges of tissue beside pure white are rarely of one colour
PEN = 0.15  # optical density from which a hue is judged


def _pen(density: np.ndarray) -> np.ndarray:
    """Ink: green or blue where red is absorbed clearly more than green, red where blue is absorbed as much as green.

    Haematoxylin and eosin both absorb green most and blue least. Bounds leave room for bluish nuclei and for blood.

    Args:
        density: optical density in R, G, B, shape ``[3, H, W]``.
    """
    red, green, blue = density
    cold = (red > PEN) & (red > 1.25 * green)
    warm = (green > PEN) & (blue > 0.85 * green) & (red < 0.25 * green)
    return cold | warm


def _glass(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour of glass, and what the scanner left out.

    Glass is what the brightest pixels show; noise must not brighten it. Scanners fill what they leave out with pure white;
    glass beside it, a little darker, must not pass for tissue. It is told from tissue by being of one colour.

    Args:
        rgb: shape ``[3, H, W]``, float, 0 … 255.

    Returns:
        RGB ``[3]``, and a mask ``[H, W]``, bool.
    """
    white = rgb.min(axis=0) > FILL
    quiet = gaussian_filter(rgb, (0, 2, 2))
    glass = np.quantile(quiet.reshape(3, -1), 0.99, axis=1).clip(200.0, 255.0)
    if white.mean() > 0.01 and not white.all():
        weight = gaussian_filter((~white).astype(np.float32), 2)
        quiet = gaussian_filter(rgb * ~white, (0, 2, 2))[:, ~white] / weight[~white]
        other = np.quantile(quiet, 0.99, axis=1).clip(200.0, 255.0)
        alike = (np.abs(quiet - other[:, None]) < ALIKE).all(axis=0)
        if alike.mean() > SECOND_GLASS:
            return other, white
    return glass, np.zeros_like(white)


def _without_small(mask: np.ndarray, size: float) -> np.ndarray:
    """Drop connected pieces of fewer than ``size`` px; those at the border may go on beyond it and stay from a tenth."""
    size = min(size, mask.size / 4)  # in a picture smaller than the largest hole, glass is still no hole
    pieces, count = label(mask)
    least = np.full(count + 1, float(size))
    least[np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]])] = size / 10
    keep = np.bincount(pieces.ravel(), minlength=count + 1) >= least
    keep[0] = False
    return keep[pieces]


class TissueMask(Transform):
    """Mark stained tissue.

    The mean optical density, smoothed, is thresholded by Otsu's method within bounds, so that a picture of nothing but
    tissue and one of nothing but glass come out right; from there tissue extends as far as anything is stained at all, so
    that fat beside dense tissue is not lost. Holes such as lumina and fat vacuoles belong to the tissue up to ``max_hole``;
    specks below ``min_size``, coloured pen and black borders do not.

    Args:
        mpp: µm/px of the images given.
        smooth: standard deviation of the smoothing, µm.
        max_hole: largest hole that is filled, µm².
        min_size: smallest piece that is kept, µm².

    Raises:
        InputError: ``mpp`` is not positive.
    """

    backend = [TransformBackends.NUMPY]

    def __init__(self, mpp: float = 8.0, smooth: float = 9.0, max_hole: float = 4e4, min_size: float = 1e4) -> None:
        if not mpp > 0:
            raise InputError(f"mpp must be a positive number of µm per px, got {mpp}.")
        self.mpp, self.smooth, self.max_hole, self.min_size = mpp, smooth, max_hole, min_size

    def __call__(self, image: NdarrayOrTensor) -> NdarrayOrTensor:
        """
        Args:
            image: RGB, shape ``[3, H, W]``, uint8, or float in [0, 1].

        Returns:
            Bool mask, shape ``[1, H, W]``, of the type of ``image``.

        Raises:
            InputError: not three channels, or floats beyond [0, 1].
        """
        rgb = convert_data_type(image, np.ndarray)[0]
        if rgb.ndim != 3 or rgb.shape[0] != 3:
            raise InputError(f"tissue is looked for in RGB images of shape [3, H, W], got {list(rgb.shape)}.")
        if rgb.dtype == np.uint8:
            rgb = rgb.astype(np.float32)
        elif rgb.max() <= 1.001:
            rgb = 255.0 * rgb.astype(np.float32)
        else:
            raise InputError(f"images that are not uint8 need values in [0, 1], got a maximum of {rgb.max():g}; divide by 255.")
        border = rgb.max(axis=0) < BLACK
        glass, unscanned = _glass(rgb)
        density = -np.log10(np.maximum(rgb / glass[:, None, None], 1 / 255))
        density[:, border | unscanned] = 0.0
        density = gaussian_filter(density, (0, self.smooth / self.mpp, self.smooth / self.mpp))
        mean = density.mean(axis=0)
        mean[_pen(density)] = 0.0
        otsu = threshold_otsu(mean)
        pieces, count = label(mean > np.clip(otsu / 2, *EXTENT_BOUNDS))
        dense = mean > np.clip(otsu, *SEED_BOUNDS)
        keep = np.zeros(count + 1, dtype=bool)
        keep[np.unique(pieces[dense])] = True
        keep[0] = False
        pixel = self.mpp**2
        mask = _without_small(keep[pieces], self.min_size / pixel)
        mask = ~_without_small(~mask, self.max_hole / pixel)
        return convert_to_dst_type(mask[None], image, dtype=torch.bool if isinstance(image, torch.Tensor) else bool)[0]


class TissueMaskd(MapTransform):
    """Dictionary twin of :class:`TissueMask`; the mask goes to ``mask_key``."""

    backend = TissueMask.backend

    def __init__(
        self, keys: KeysCollection = "image", mask_key: str = "mass", allow_missing_keys: bool = False, **options: Any
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key = mask_key
        self.detect = TissueMask(**options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[self.mask_key] = self.detect(d[key])
        return d


TissueMaskD = TissueMaskDict = TissueMaskd
