"""Writing segmentations as the last step of a post-processing chain."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import TransformBackends, convert_data_type, optional_import

from monai_vslp.io.output import SegmentationOutput, write_output
from monai_vslp.transforms.overlay import default_colors

__all__ = ["SaveSegmentationD", "SaveSegmentationDict", "SaveSegmentationd", "SplitSpreadD", "SplitSpreadDict", "SplitSpreadd"]

Image, _ = optional_import("PIL.Image")

THUMBNAIL_SIDE = 1600  # px


class SplitSpreadd(MapTransform):
    """Take the spread of the views off a confidence map.

    The last channel of ``data[key]`` ``[C + 1, H, W]`` goes to ``{key}_spread`` ``[1, H, W]``, the others stay.
    """

    backend = [TransformBackends.TORCH]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[f"{key}_spread"] = d[key][-1:]
            d[key] = d[key][:-1]
        return d


class SaveSegmentationd(MapTransform):
    """Write what :class:`~monai_vslp.transforms.VariationalRefinementd` left in the dictionary; see
    :func:`monai_vslp.io.write_output` for the files.

    Args:
        keys: key of the refined map.
        output_dir: each input gets a folder ``output_dir/<stem>``.
        classes: names in class order.
        colors: RGB per class; None for the default palette.
        image_key: key of the image ``[3, H, W]`` in [0, 1], its file under ``{image_key}_path``.
        mpp: µm/px of the images, None where unknown.
        options: recorded in the summary.
    """

    backend = [TransformBackends.NUMPY]

    def __init__(
        self,
        keys: KeysCollection = "pred",
        output_dir: str | Path = "eval",
        classes: Sequence[str] = (),
        colors: Sequence[Sequence[int]] | None = None,
        image_key: str = "image",
        mpp: float | None = None,
        options: Mapping[str, Any] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_dir = Path(output_dir)
        self.classes = list(classes)
        self.colors = default_colors(len(self.classes)) if colors is None else colors
        self.image_key, self.mpp = image_key, mpp
        self.options = dict(options or {})
        self._last = time.perf_counter()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)

        def array(name: str) -> np.ndarray | None:
            return None if d.get(name) is None else convert_data_type(d[name], np.ndarray)[0]

        for key in self.key_iterator(d):
            path = Path(d[f"{self.image_key}_path"])
            image = (torch.as_tensor(d[self.image_key]).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            thumbnail = Image.fromarray(image)
            thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            mass, spread, given_spread = array("mass"), array(f"{key}_spread"), array("proportion_spread")
            output = SegmentationOutput(
                name=path.stem,
                kind="image",
                source=str(path),
                classes=self.classes,
                colors=self.colors,
                confidence=array(f"{key}_confidence"),
                segmentation=array(key),
                fidelity=array(f"{key}_fidelity_energy")[0],
                regularization=array(f"{key}_regularization_energy")[0],
                mass=None if mass is None else mass[0],
                thumbnail=np.asarray(thumbnail),
                refinement=d[f"{key}_refinement"],
                spread=None if spread is None else spread[0],
                given_spread=None if given_spread is None else given_spread.tolist(),
                mpp=self.mpp,
                level0_shape=image.shape[:2],
                options=self.options | {"fingerprint": d.get("fingerprint")},
                seconds={"all": time.perf_counter() - self._last},
            )
            write_output(self.output_dir / path.stem, output)
            self._last = time.perf_counter()
        return d


SplitSpreadD = SplitSpreadDict = SplitSpreadd
SaveSegmentationD = SaveSegmentationDict = SaveSegmentationd
