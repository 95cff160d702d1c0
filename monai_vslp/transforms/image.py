"""Reading images and varying their stain, as MONAI transforms."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, RandomizableTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor

from monai_vslp.data.images import read_image
from monai_vslp.networks.tta import jitter_stain

__all__ = [
    "LoadTissueImage",
    "LoadTissueImageD",
    "LoadTissueImageDict",
    "LoadTissueImaged",
    "RandStainJitter",
    "RandStainJitterD",
    "RandStainJitterDict",
    "RandStainJitterd",
]


class LoadTissueImage(Transform):
    """Read an image file as RGB, ``[3, H, W]`` float32 in [0, 1]; see :func:`monai_vslp.data.images.read_image`.

    Raises:
        ImageReadError: the file is missing, truncated or no image.
    """

    backend = [TransformBackends.TORCH]

    def __call__(self, path: str | Path) -> torch.Tensor:
        """
        Args:
            path: PNG, JPEG, TIFF or BMP; grey, RGBA and 16-bit images are converted.
        """
        return torch.from_numpy(read_image(path).copy()).permute(2, 0, 1).float().div_(255.0)


class LoadTissueImaged(MapTransform):
    """Dictionary twin of :class:`LoadTissueImage`; keeps the path under ``{key}_path``."""

    backend = LoadTissueImage.backend

    def __init__(self, keys: KeysCollection = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.loader = LoadTissueImage()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[f"{key}_path"] = str(d[key])
            d[key] = self.loader(d[key])
        return d


class RandStainJitter(RandomizableTransform):
    """Change the amounts of haematoxylin and eosin at random, see :func:`monai_vslp.networks.tta.jitter_stain`.

    Args:
        prob: probability of a change.
        strength: gains are drawn from 1 ± ``strength``, offsets from ± ``strength`` / 5 (optical density).
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, prob: float = 0.8, strength: float = 0.2) -> None:
        RandomizableTransform.__init__(self, prob)
        self.strength = strength
        self._draw = np.zeros((2, 3))

    def randomize(self, data: Any | None = None) -> None:
        super().randomize(None)
        self._draw = self.R.uniform(-1.0, 1.0, size=(2, 3))

    def __call__(self, image: NdarrayOrTensor, randomize: bool = True) -> NdarrayOrTensor:
        """
        Args:
            image: shape ``[3, H, W]``, float in [0, 1].
            randomize: draw anew; else repeat the last draw.
        """
        if randomize:
            self.randomize()
        if not self._do_transform:
            return image
        x = convert_to_tensor(image, track_meta=False)
        gain, offset = (torch.from_numpy(row) for row in self._draw)
        changed = jitter_stain(x[None], 1 + self.strength * gain, 0.2 * self.strength * offset)[0]
        return convert_to_dst_type(changed, image)[0]


class RandStainJitterd(RandomizableTransform, MapTransform):
    """Dictionary twin of :class:`RandStainJitter`; all keys get the same change."""

    backend = RandStainJitter.backend

    def __init__(
        self, keys: KeysCollection = "image", prob: float = 0.8, strength: float = 0.2, allow_missing_keys: bool = False
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        self.jitter = RandStainJitter(prob, strength)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandStainJitterd:
        super().set_random_state(seed, state)
        self.jitter.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.jitter.randomize()
        for key in self.key_iterator(d):
            d[key] = self.jitter(d[key], randomize=False)
        return d


LoadTissueImageD = LoadTissueImageDict = LoadTissueImaged
RandStainJitterD = RandStainJitterDict = RandStainJitterd
