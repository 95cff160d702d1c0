"""Variational refinement as MONAI transforms: one array transform, its dictionary twin."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor

from monai_vslp.utils.errors import InputError
from monai_vslp.variational import (
    REGULARIZERS,
    LearnedRefinement,
    RefinementOptions,
    RefinementResult,
    UnrolledRefinement,
    refine,
    trust_from_spread,
)

__all__ = [
    "VariationalRefinement",
    "VariationalRefinementD",
    "VariationalRefinementDict",
    "VariationalRefinementd",
    "named_regularizer",
]

TRUST_RULES = ("raters", "bounds")
SINGLE_RATER_TRUST = 3.0  # suits estimates with medium noise; a single rater's own spread is not known


class VariationalRefinement(Transform):
    """Fuse a confidence map with proportions and a regularizer; see :func:`monai_vslp.variational.refine`.

    Args:
        pixel_size: edge of a map pixel in the unit in which ``alpha`` is given, for instance 4 for a map at a quarter
            of the resolution. A boundary of a given length crosses fewer, larger pixels on a coarse map, so ``alpha``
            is divided by ``pixel_size``.
        regularizer: folder of a regularizer that ``monai-vslp train-regularizer`` left, or the object itself; a name in
            :data:`~monai_vslp.variational.REGULARIZERS`; None for total variation. Of the
            options a trained one uses ``trust`` and ``epsilon`` alone: it has learned the others.
        trust: ρ, a number (the text ``inf`` in configs: proportions are met exactly); or ``raters``: what the raters'
            disagreement warrants (:func:`~monai_vslp.variational.trust_from_spread`), ``SINGLE_RATER_TRUST`` for one rater; or
            ``bounds``: no estimate is trusted, but the result stays within the ranges that were written (or that several
            raters span).
        own_trust: ρ of the network's own proportions where none are given; 0 leaves them free.
        **options: fields of :class:`monai_vslp.variational.RefinementOptions`; ``alpha`` is in pixels of size 1.

    Raises:
        InputError: an unknown or impossible option.
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        pixel_size: float = 1.0,
        regularizer: str | Path | LearnedRefinement | None = None,
        trust: float | str = math.inf,
        own_trust: float = 0.0,
        **options: Any,
    ) -> None:
        if trust == "inf":  # JSON has no infinity
            trust = math.inf
        if isinstance(trust, str) and trust not in TRUST_RULES:
            raise InputError(f"trust is a positive number, 'inf' or one of {', '.join(TRUST_RULES)}, got {trust!r}.")
        if not 0 <= own_trust < math.inf:
            raise InputError(f"own_trust must be finite and at least 0, got {own_trust}.")
        self.rule = trust if isinstance(trust, str) else None
        self.own_trust = own_trust
        self.options = RefinementOptions(trust=math.inf if self.rule else trust, **options)
        self.pixel_size = pixel_size
        self.learned: LearnedRefinement | None = None
        self.term: str | None = None
        if isinstance(regularizer, LearnedRefinement):
            self.learned = regularizer
        elif isinstance(regularizer, str) and regularizer.isidentifier() and regularizer in REGULARIZERS:
            self.term = None if regularizer == "total_variation" else regularizer
        elif regularizer is not None:
            self.learned = LearnedRefinement.load(regularizer)

    def __call__(
        self,
        confidence: NdarrayOrTensor,
        proportions: NdarrayOrTensor | None = None,
        mass: NdarrayOrTensor | None = None,
        image: NdarrayOrTensor | None = None,
        spread: NdarrayOrTensor | None = None,
        bounds: Sequence[NdarrayOrTensor] | None = None,
    ) -> RefinementResult:
        """
        Args:
            confidence: shape ``[C, H, W]``, float, on the simplex.
            proportions: shape ``[C]``, fractions; None leaves them free.
            mass: tissue, shape ``[H, W]`` or ``[1, H, W]``, non-negative or bool; None means tissue everywhere.
            image: shape ``[channels, H, W]``; its edges attract boundaries. None: no edges.
            spread: standard deviation between raters, shape ``[C]``, for ``trust="raters"``.
            bounds: lower and upper fractions, shape ``[C]`` each, for ``trust="bounds"``.

        Returns:
            The result without batch axis.

        Raises:
            InputError: a rule of trust without what it rests on.
        """
        q = convert_to_tensor(confidence, track_meta=False).float()
        if mass is not None:
            mass = convert_to_tensor(mass, dtype=torch.float32, track_meta=False)
            mass = mass[0] if mass.ndim == 3 else mass
        if image is not None:
            image = convert_to_tensor(image, track_meta=False)

        def own() -> torch.Tensor:
            weight = torch.ones_like(q[0]) if mass is None else mass
            return (q * weight).sum(dim=(1, 2), dtype=torch.float64) / weight.sum(dtype=torch.float64).clamp_min(1e-12)

        given, trust, limits = self.terms(proportions, spread, bounds, own)
        if self.learned is not None:
            return self.learned(
                q,
                given,
                mass,
                image,
                bounds=limits,
                trust=trust,
                pixel_size=self.pixel_size,
                epsilon=self.options.epsilon,
            )
        return refine(q, given, mass, image, bounds=limits, regularizer=self.term, **asdict(self.options_for(trust)))

    def options_for(self, trust: float) -> RefinementOptions:
        """Options of the variational problem on maps of ``pixel_size``, with another trust."""
        return replace(self.options, trust=trust, alpha=self.options.alpha / self.pixel_size)

    def terms(
        self,
        proportions: NdarrayOrTensor | None,
        spread: NdarrayOrTensor | None,
        bounds: Sequence[NdarrayOrTensor] | None,
        own: Callable[[], torch.Tensor],
    ) -> tuple[torch.Tensor | None, float, tuple[torch.Tensor, torch.Tensor] | None]:
        """What the rule of trust makes of what is known about the proportions.

        Args:
            proportions, spread, bounds: as of :meth:`__call__`.
            own: gives the network's own proportions, shape ``[C]``, where they are asked for.

        Returns:
            Proportions ``[C]``, float64, or None; ρ; lower and upper bounds, or None.

        Raises:
            InputError: a rule of trust without what it rests on.
        """
        given, trust, limits = None, self.options.trust, None
        if proportions is None:
            if self.own_trust > 0:
                given, trust = own(), self.own_trust
            return given, trust, limits
        given = convert_to_tensor(proportions, dtype=torch.float64, track_meta=False)
        if self.rule == "raters":
            if spread is None:
                raise InputError("trust='raters' needs the spread between raters beside the proportions.")
            trust = trust_from_spread(given, convert_to_tensor(spread, dtype=torch.float64, track_meta=False))
            trust = SINGLE_RATER_TRUST if math.isinf(trust) else trust
        elif self.rule == "bounds":
            if bounds is None:
                raise InputError("trust='bounds' needs lower and upper fractions beside the proportions.")
            limits = tuple(convert_to_tensor(x, dtype=torch.float64, track_meta=False) for x in bounds)
            given = None
        return given, trust, limits


def named_regularizer(
    name: str | None, network: UnrolledRefinement | None = None, cell: int = 4
) -> str | LearnedRefinement | None:
    """The ``regularizer`` of :class:`VariationalRefinement` by a name in a config.

    Args:
        name: ``learned`` for ``network``; ``tv`` or None for total variation; else a name in
            :data:`~monai_vslp.variational.REGULARIZERS`, or a folder.
        network: trained steps.
        cell: edge of a cell that they were trained at, px.
    """
    if name == "learned":
        if network is None:
            raise InputError("the regularizer 'learned' needs a trained network; there is none here.")
        return LearnedRefinement(network, cell)
    return None if name == "tv" else name


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
        proportions_key: key of the proportions ``[C]``; absent or None there means that they are left free. For the rules
            of trust, ``proportion_spread`` and ``proportion_bounds`` (``[2, C]``) are looked up beside it.
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
        regularizer: str | Path | LearnedRefinement | None = None,
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
            result = self.refinement(
                d[key], given, d.get(self.mass_key), image, d.get("proportion_spread"), d.get("proportion_bounds")
            )
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
