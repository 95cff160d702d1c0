"""Confidences of other networks: reading them, and a picture of them where there is no image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import TransformBackends, convert_to_tensor

from monai_vslp.data.confidences import on_simplex, open_confidence
from monai_vslp.transforms.overlay import default_colors

__all__ = [
    "ConfidencePictureD",
    "ConfidencePictureDict",
    "ConfidencePictured",
    "LoadConfidenceD",
    "LoadConfidenceDict",
    "LoadConfidenced",
]


class LoadConfidenced(MapTransform):
    """Read a file of confidences: ``data[key]`` becomes ``[C, H, W]`` float32 on the simplex, the mean where there are views.

    ``mass`` ``[1, H, W]`` is 0 where all classes are 0, and the path is kept under ``{key}_path``.

    Args:
        keys: keys of paths, see :func:`~monai_vslp.data.confidences.open_confidence`.
        kind: ``logits``, ``probabilities`` or ``auto``.

    Raises:
        ImageReadError: a file cannot be read.
        InputError: values that are no confidences.
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, keys: KeysCollection = "image", kind: str = "auto", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.kind = kind

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[f"{key}_path"] = str(d[key])
            q, d["mass"] = on_simplex(open_confidence(d[key])[...], self.kind)
            d[key] = q.mean(dim=0) if q.ndim == 4 else q
        return d


class ConfidencePictured(MapTransform):
    """A picture of confidences for people, colours of the classes mixed as sure as they are.

    ``picture`` ``[3, H, W]`` in [0, 1], white where there is no tissue, and ``picture_path``, that of ``data[key]``.

    Args:
        keys: key of a map ``[C, H, W]``, its file under ``{key}_path``.
        colors: RGB per class, 0 … 255; None for the default palette.
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self, keys: KeysCollection = "image", colors: Sequence[Sequence[int]] | None = None, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.colors = colors

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            q = convert_to_tensor(d[key], track_meta=False).float()
            palette = torch.as_tensor(self.colors or default_colors(len(q)), dtype=torch.float32) / 255.0
            picture = torch.einsum("chw,ck->khw", q, palette)
            mass = d.get("mass")
            if mass is not None:
                picture = torch.where(convert_to_tensor(mass, track_meta=False) > 0, picture, torch.ones_like(picture))
            d["picture"], d["picture_path"] = picture, d[f"{key}_path"]
        return d


LoadConfidenceD = LoadConfidenceDict = LoadConfidenced
ConfidencePictureD = ConfidencePictureDict = ConfidencePictured
