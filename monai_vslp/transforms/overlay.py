"""Pictures for people: labels laid over the image, and maps of energies."""

from __future__ import annotations

import colorsys
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_data_type, convert_to_dst_type, look_up_option

from monai_vslp.utils.errors import InputError

__all__ = [
    "COLORMAPS",
    "EnergyPicture",
    "EnergyPictureD",
    "EnergyPictureDict",
    "EnergyPictured",
    "LabelOverlay",
    "LabelOverlayD",
    "LabelOverlayDict",
    "LabelOverlayd",
    "NO_TISSUE_COLOR",
    "default_colors",
]

# Okabe and Ito's colours, told apart with the common colour-vision deficiencies; the first is a quiet grey blue.
_PALETTE = (
    (148, 163, 184), (0, 158, 115), (213, 94, 0), (0, 114, 178), (230, 159, 0), (204, 121, 167), (86, 180, 233), (240, 228, 66),
)  # fmt: skip
# Sixteen anchors of matplotlib's perceptually even maps (CC0); between them linear interpolation is off by less than 7/255.
COLORMAPS = {
    "magma": (
        (0, 0, 4), (11, 9, 36), (32, 17, 75), (59, 15, 112), (87, 21, 126), (114, 31, 129),
        (140, 41, 129), (168, 50, 125), (196, 60, 117), (222, 73, 104), (241, 96, 93), (250, 127, 94),
        (254, 159, 109), (254, 191, 132), (253, 222, 160), (252, 253, 191),
    ),
    "viridis": (
        (68, 1, 84), (72, 26, 108), (71, 47, 125), (65, 68, 135), (57, 86, 140), (49, 104, 142),
        (42, 120, 142), (35, 136, 142), (31, 152, 139), (34, 168, 132), (53, 183, 121), (84, 197, 104),
        (122, 209, 81), (165, 219, 54), (210, 226, 27), (253, 231, 37),
    ),
}  # fmt: skip
NO_TISSUE_COLOR = (225, 225, 225)


def default_colors(count: int) -> list[list[int]]:
    """Distinct RGB colours for ``count`` classes, 0 … 255; the first eight suit colour-blind people."""
    colors = [list(color) for color in _PALETTE[:count]]
    for index in range(len(colors), count):
        # Steps of the golden ratio keep any number of hues apart.
        rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.75, 0.55)
        colors.append([round(255 * v) for v in rgb])
    return colors


def _plane(x: NdarrayOrTensor, name: str) -> np.ndarray:
    """``[1, H, W]`` or ``[H, W]`` as an array ``[H, W]``."""
    array = convert_data_type(x, np.ndarray)[0]
    array = array[0] if array.ndim == 3 and len(array) == 1 else array
    if array.ndim != 2:
        raise InputError(f"{name} must have shape [1, H, W] or [H, W], got {list(array.shape)}.")
    return array


class LabelOverlay(Transform):
    """Lay translucent class colours with solid outlines over an image.

    Args:
        colors: RGB per class, 0 … 255; None for :func:`default_colors`.
        alpha: opacity of the fill, 0 … 1.
        outline: width in px of the line that each region draws inside its border; 0 for none.
        ignore_index: label of pixels (no tissue) that stay as they are.
    """

    backend = [TransformBackends.NUMPY]

    def __init__(
        self, colors: Sequence[Sequence[int]] | None = None, alpha: float = 0.4, outline: int = 1, ignore_index: int = 255
    ) -> None:
        if not 0 <= alpha <= 1:
            raise InputError(f"LabelOverlay: alpha must lie in [0, 1], got {alpha}.")
        self.colors, self.alpha, self.outline, self.ignore_index = colors, alpha, outline, ignore_index

    def __call__(self, image: NdarrayOrTensor, labels: NdarrayOrTensor) -> NdarrayOrTensor:
        """
        Args:
            image: RGB, shape ``[3, H, W]``, uint8, or float in [0, 1].
            labels: class indices, shape ``[1, H, W]`` or ``[H, W]``.

        Returns:
            RGB, shape ``[3, H, W]``, uint8, array or tensor as ``image``.

        Raises:
            InputError: sizes differ, or a label has no colour.
        """
        picture = convert_data_type(image, np.ndarray)[0]
        index = _plane(labels, "labels").astype(np.int64)
        if picture.ndim != 3 or len(picture) != 3 or picture.shape[1:] != index.shape:
            raise InputError(
                f"image must have shape [3, H, W] over labels [1, H, W], got {list(picture.shape)} and {list(index.shape)}."
            )
        if picture.dtype != np.uint8:
            picture = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
        shown = index != self.ignore_index
        highest = int(index[shown].max(initial=0))
        colors = np.asarray(default_colors(highest + 1) if self.colors is None else self.colors, dtype=np.float32)
        if highest >= len(colors) or index[shown].min(initial=0) < 0:
            raise InputError(
                f"labels go up to {highest}, but colours are given for 0 to {len(colors) - 1} only; "
                f"give one per class, and {self.ignore_index} where there is no tissue."
            )
        strength = np.where(shown, np.float32(self.alpha), np.float32(0))
        strength[self._outlines(index) & shown] = 1
        color = np.moveaxis(colors[np.where(shown, index, 0)], -1, 0)
        mixed = picture + (color - picture) * strength
        return convert_to_dst_type(np.round(mixed).astype(np.uint8), image, dtype=np.uint8)[0]

    def _outlines(self, index: np.ndarray) -> np.ndarray:
        """Pixels with another label at most ``outline`` px away along a row or column."""
        edge = np.zeros(index.shape, dtype=bool)
        for shift in range(1, self.outline + 1):
            vertical, horizontal = index[shift:] != index[:-shift], index[:, shift:] != index[:, :-shift]
            edge[shift:] |= vertical
            edge[:-shift] |= vertical
            edge[:, shift:] |= horizontal
            edge[:, :-shift] |= horizontal
        return edge


class EnergyPicture(Transform):
    """Colour a map of energies, dark to bright; pixels without tissue are light grey.

    Args:
        vmin: energy at the dark end; None for the smallest of the tissue.
        vmax: energy at the bright end; None for the 99.5 % quantile of the tissue.
        colormap: ``magma`` or ``viridis``.
    """

    backend = [TransformBackends.NUMPY]

    def __init__(self, vmin: float | None = None, vmax: float | None = None, colormap: str = "magma") -> None:
        self.vmin, self.vmax = vmin, vmax
        self.anchors = np.array(COLORMAPS[look_up_option(colormap, COLORMAPS.keys())], dtype=np.float64)

    def __call__(self, energy: NdarrayOrTensor, mass: NdarrayOrTensor | None = None) -> NdarrayOrTensor:
        """
        Args:
            energy: shape ``[1, H, W]`` or ``[H, W]``, float; values that are not finite count as no tissue.
            mass: tissue of the same size, 0 where there is none; None for tissue everywhere.

        Returns:
            RGB, shape ``[3, H, W]``, uint8, array or tensor as ``energy``.

        Raises:
            InputError: sizes differ.
        """
        values = _plane(energy, "energy").astype(np.float64)
        tissue = np.isfinite(values)
        if mass is not None:
            weight = _plane(mass, "mass")
            if weight.shape != values.shape:
                raise InputError(f"energy and mass must have one size, got {values.shape} and {weight.shape}.")
            tissue &= weight > 0
        inside = values[tissue] if tissue.any() else np.zeros(1)
        low = float(inside.min()) if self.vmin is None else self.vmin
        high = float(np.quantile(inside, 0.995)) if self.vmax is None else self.vmax
        position = np.clip((np.where(tissue, values, low) - low) / max(high - low, 1e-12), 0, 1)
        anchors = np.linspace(0, 1, len(self.anchors))
        rgb = np.stack([np.interp(position, anchors, channel) for channel in self.anchors.T])
        rgb[:, ~tissue] = np.array(NO_TISSUE_COLOR)[:, None]
        return convert_to_dst_type(np.round(rgb).astype(np.uint8), energy, dtype=np.uint8)[0]


class LabelOverlayd(MapTransform):
    """Dictionary twin of :class:`LabelOverlay`: the picture of ``data[key]`` goes to ``{key}_overlay``.

    Args:
        keys: keys of images.
        labels_key: key of the labels.
        allow_missing_keys: skip keys that are absent.
        **options: arguments of :class:`LabelOverlay`.
    """

    backend = LabelOverlay.backend

    def __init__(
        self, keys: KeysCollection = "image", labels_key: str = "pred_labels", allow_missing_keys: bool = False, **options: Any
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.labels_key = labels_key
        self.overlay = LabelOverlay(**options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[f"{key}_overlay"] = self.overlay(d[key], d[self.labels_key])
        return d


class EnergyPictured(MapTransform):
    """Dictionary twin of :class:`EnergyPicture`: the picture of ``data[key]`` goes to ``{key}_picture``.

    Args:
        keys: keys of energy maps.
        mass_key: key of the tissue mass; absent or None for tissue everywhere.
        allow_missing_keys: skip keys that are absent.
        **options: arguments of :class:`EnergyPicture`.
    """

    backend = EnergyPicture.backend

    def __init__(
        self,
        keys: KeysCollection = ("pred_fidelity_energy", "pred_regularization_energy"),
        mass_key: str = "mass",
        allow_missing_keys: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mass_key = mass_key
        self.picture = EnergyPicture(**options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[f"{key}_picture"] = self.picture(d[key], d.get(self.mass_key))
        return d


LabelOverlayD = LabelOverlayDict = LabelOverlayd
EnergyPictureD = EnergyPictureDict = EnergyPictured
