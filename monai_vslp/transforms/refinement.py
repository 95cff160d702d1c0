"""Variational refinement as MONAI transforms: one array transform, its dictionary twin."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor

from monai_vslp.variational import LearnedRefinement, RefinementOptions, RefinementResult, refine

__all__ = [
    "VariationalRefinement",
    "VariationalRefinementD",
    "VariationalRefinementDict",
    "VariationalRefinementd",
]


class VariationalRefinement(Transform):
    """Fuse a confidence map with proportions and a regularizer; see :func:`monai_vslp.variational.refine`.

    Args:
        pixel_size: edge of a map pixel in the unit in which ``alpha`` is given, for instance 4 for a map at a quarter
            of the resolution. A boundary of a given length crosses fewer, larger pixels on a coarse map, so ``alpha``
            is divided by ``pixel_size``.
        regularizer: folder of a regularizer that ``monai-vslp train-regularizer`` left; None for total variation. Of the
            options a trained one uses ``trust`` and ``epsilon`` alone: it has learned the others.
        **options: fields of :class:`monai_vslp.variational.RefinementOptions`; ``alpha`` is in pixels of size 1.

    Raises:
        InputError: an unknown or impossible option.
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, pixel_size: float = 1.0, regularizer: str | Path | None = None, **options: Any) -> None:
        self.options = RefinementOptions(**options)
        self.pixel_size = pixel_size
        self.learned = None if regularizer is None else LearnedRefinement.load(regularizer)

    def __call__(
        self,
        confidence: NdarrayOrTensor,
        proportions: NdarrayOrTensor | None = None,
        mass: NdarrayOrTensor | None = None,
        image: NdarrayOrTensor | None = None,
    ) -> RefinementResult:
        """
        Args:
            confidence: shape ``[C, H, W]``, float, on the simplex.
            proportions: shape ``[C]``, fractions; None leaves them free.
            mass: tissue, shape ``[H, W]`` or ``[1, H, W]``, non-negative or bool; None means tissue everywhere.
            image: shape ``[channels, H, W]``; its edges attract boundaries. None: no edges.

        Returns:
            The result without batch axis.
        """
        q = convert_to_tensor(confidence, track_meta=False).float()
        if mass is not None:
            mass = convert_to_tensor(mass, dtype=torch.float32, track_meta=False)
            mass = mass[0] if mass.ndim == 3 else mass
        if image is not None:
            image = convert_to_tensor(image, track_meta=False)
        if proportions is not None:
            proportions = convert_to_tensor(proportions, dtype=torch.float64, track_meta=False)
        if self.learned is not None:
            return self.learned(
                q,
                proportions,
                mass,
                image,
                trust=self.options.trust,
                pixel_size=self.pixel_size,
                epsilon=self.options.epsilon,
            )
        options = replace(self.options, alpha=self.options.alpha / self.pixel_size)
        return refine(q, proportions, mass, image, **asdict(options))


class VariationalRefinementd(MapTransform):
    """Dictionary twin of :class:`VariationalRefinement`.

    For each key the confidence ``data[key]`` is replaced by the refined segmentation ``u`` (same shape), and these
    entries are added:

    - ``{key}_confidence``: the confidence as it was, ``[C, H, W]``;
    - ``{key}_labels``: ``[1, H, W]`` uint8 class indices;
    - ``{key}_fidelity_energy``, ``{key}_regularization_energy``: ``[1, H, W]`` float32, in nats;
    - ``{key}_refinement``: a dictionary with ``psi``, ``energies``, ``residual``, ``converged``, ``reason``,
      ``proportions_given``, ``proportions_refined`` (lists and plain numbers).

    Args:
        keys: keys of confidence maps ``[C, H, W]``.
        proportions_key: key of the proportions ``[C]``; absent or None there means that they are left free.
        mass_key: key of the tissue mask or mass ``[1, H, W]``; absent means tissue everywhere.
        image_key: key of the image whose edges attract boundaries; None to use none.
        pixel_size, regularizer: see :class:`VariationalRefinement`.
        allow_missing_keys: skip keys that are absent.
        **options: fields of :class:`monai_vslp.variational.RefinementOptions`.
    """

    backend = VariationalRefinement.backend

    def __init__(
        self,
        keys: KeysCollection = "pred",
        proportions_key: str = "proportions",
        mass_key: str = "mass",
        image_key: str | None = None,
        pixel_size: float = 1.0,
        regularizer: str | Path | None = None,
        allow_missing_keys: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.proportions_key = proportions_key
        self.mass_key = mass_key
        self.image_key = image_key
        self.refinement = VariationalRefinement(pixel_size, regularizer, **options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = None if self.image_key is None else d[self.image_key]
            given = d.get(self.proportions_key)
            result = self.refinement(d[key], given, d.get(self.mass_key), image)
            d[f"{key}_confidence"] = d[key]
            d[key] = convert_to_dst_type(result.u, d[key])[0]
            d[f"{key}_labels"] = result.labels[None].to(torch.uint8)
            d[f"{key}_fidelity_energy"] = result.fidelity_energy[None].float()
            d[f"{key}_regularization_energy"] = result.regularization_energy[None].float()
            d[f"{key}_refinement"] = {
                "psi": result.psi.tolist(),
                "energies": list(result.energies),
                "residual": result.residual,
                "converged": result.converged,
                "reason": result.reason,
                "proportions_given": None if given is None else [float(value) for value in given],
                "proportions_refined": result.proportions.tolist(),
            }
        return d


VariationalRefinementD = VariationalRefinementDict = VariationalRefinementd
