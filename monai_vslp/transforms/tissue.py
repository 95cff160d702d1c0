"""Telling tissue from glass."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_data_type, convert_to_dst_type, optional_import

__all__ = ["TissueMask", "TissueMaskD", "TissueMaskDict", "TissueMaskd"]

gaussian_filter, _ = optional_import("scipy.ndimage", name="gaussian_filter")
threshold_otsu, _ = optional_import("skimage.filters", name="threshold_otsu")
remove_small_objects, _ = optional_import("skimage.morphology", name="remove_small_objects")
remove_small_holes, _ = optional_import("skimage.morphology", name="remove_small_holes")

# Optical densities: stained tissue is never as clear as the lower bound, glass never as dense as the upper one.
CLEAREST_TISSUE, DENSEST_GLASS = 0.02, 0.045
BLACK = 40  # brighter channels than this are no pen stroke and no scanner border


class TissueMask(Transform):
    """Mark stained tissue.

    The mean optical density, smoothed, is thresholded by Otsu's method within bounds, so that a picture of nothing but
    tissue and one of nothing but glass come out right. Holes such as lumina and fat vacuoles belong to the tissue up to
    ``max_hole``; specks below ``min_size`` and black borders do not.

    Args:
        mpp: µm/px of the images given.
        smooth: standard deviation of the smoothing, µm.
        max_hole: largest hole that is filled, µm².
        min_size: smallest piece that is kept, µm².
    """

    backend = [TransformBackends.NUMPY]

    def __init__(self, mpp: float = 8.0, smooth: float = 12.0, max_hole: float = 4e4, min_size: float = 1e4) -> None:
        self.mpp, self.smooth, self.max_hole, self.min_size = mpp, smooth, max_hole, min_size

    def __call__(self, image: NdarrayOrTensor) -> NdarrayOrTensor:
        """
        Args:
            image: RGB, shape ``[3, H, W]``, uint8, or float in [0, 1].

        Returns:
            Bool mask, shape ``[1, H, W]``, of the type of ``image``.
        """
        rgb = convert_data_type(image, np.ndarray)[0].astype(np.float32)
        if convert_data_type(image, np.ndarray)[0].dtype != np.uint8:
            rgb = rgb * 255.0
        border = rgb.max(axis=0) < BLACK
        # Glass is what most bright pixels show; scanners do not render it as exactly white.
        bright = np.quantile(rgb.reshape(3, -1), 0.99, axis=1).clip(200.0, 255.0)[:, None, None]
        density = -np.log10(np.clip(rgb / bright, 1 / 255, 1.0)).mean(axis=0)
        density[border] = 0.0
        density = gaussian_filter(density, self.smooth / self.mpp)
        threshold = float(np.clip(threshold_otsu(density), CLEAREST_TISSUE, DENSEST_GLASS))
        mask = density > threshold
        pixel = self.mpp**2
        mask = remove_small_objects(mask, max_size=max(1, int(self.min_size / pixel)))
        mask = remove_small_holes(mask, max_size=max(1, int(self.max_hole / pixel)))
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
