"""The variational stage over the maps of a whole slide, from disk to disk; regions with proportions of their own apart."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import optional_import

from monai_vslp.inferers.slide_maps import CHUNK, SlideMaps
from monai_vslp.transforms.refinement import VariationalRefinement
from monai_vslp.utils.atomic import write_json
from monai_vslp.utils.errors import InputError
from monai_vslp.variational.outofcore import NO_TISSUE, refine_store
from monai_vslp.variational.passes import Passes
from monai_vslp.variational.regularizer import EDGE_HALO, squared_gradient, weight_of_edges
from monai_vslp.variational.windows import Window, split_windows

__all__ = ["Given", "RefinedMaps", "Region", "edge_weight_store", "refine_maps"]

zarr, _ = optional_import("zarr", descriptor="{} is needed for whole slides: pip install 'zarr>=3'")

REFINED, WEIGHT, DESCRIPTION = "refined.zarr", "weight.zarr", "refined.json"
MAPS = ("labels", "u", "fidelity_energy", "regularization_energy")
LARGEST_LEARNED = 2**24  # px of maps that a learned regularizer, which sees them as a whole, is given
BLOCK = 1024  # px

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """What is known about the proportions of a slide or a region; None for what is not.

    Attributes:
        proportions: fractions per class.
        spread: standard deviation between raters per class, fractions.
        bounds: lower and upper fractions per class.
    """

    proportions: Sequence[float] | None = None
    spread: Sequence[float] | None = None
    bounds: Sequence[Sequence[float]] | None = None


@dataclass(frozen=True)
class Region:
    """Part of a slide with proportions of its own.

    Attributes:
        name: as in the table.
        mask: where it is, bool ``[h, w]`` on the grid of ``window``.
        window: rows and columns of the maps that the mask covers.
        given: its proportions.
    """

    name: str
    mask: np.ndarray
    window: tuple[slice, slice]
    given: Given


@dataclass(frozen=True)
class RefinedMaps:
    """What :func:`refine_maps` leaves on disk.

    Attributes:
        path: Zarr group with ``labels`` uint8 ``[h, w]``, ``u`` float16 ``[C, h, w]``, ``fidelity_energy`` and
            ``regularization_energy`` float16 ``[h, w]``.
        refinement: ``psi``, ``energies``, ``residual``, ``converged``, ``reason``, ``proportions_given``,
            ``proportions_refined``, ``regularizer`` of the slide; of the part outside regions where there are some.
        regions: the same of each region with its ``name``.
    """

    path: Path
    refinement: dict[str, Any]
    regions: tuple[dict[str, Any], ...] = ()

    def array(self, name: str) -> Any:
        """One of the Zarr arrays."""
        return zarr.open_array(str(self.path / name), mode="r")


class _View:
    """A rectangle of a chunked array, with a mask, as an array of its own.

    Args:
        array: ``[..., H, W]``, with ``shape``, ``dtype`` and slicing.
        window: rows and columns.
        mask: bool, of the size of the window; what is outside counts as 0. None for all.
    """

    def __init__(self, array: Any, window: tuple[slice, slice], mask: np.ndarray | None = None) -> None:
        self.array, self.window, self.mask = array, window, mask
        size = tuple(span.stop - span.start for span in window)
        self.shape, self.dtype = (*(int(n) for n in array.shape[:-2]), *size), array.dtype
        self.chunks = (*self.shape[:-2], *(min(CHUNK, side) for side in size))

    def __getitem__(self, key: Any) -> np.ndarray:
        rows, columns = (slice(*part.indices(side)) for part, side in zip(key[-2:], self.shape[-2:]))
        (top, left) = (span.start for span in self.window)
        place = (slice(rows.start + top, rows.stop + top), slice(columns.start + left, columns.stop + left))
        values = np.asarray(self.array[(*key[:-2], *place)])
        return values if self.mask is None else np.where(self.mask[rows, columns], values, 0)


def _tiles(shape: Sequence[int], halo: int = 0) -> list[Window]:
    return split_windows((int(shape[-2]), int(shape[-1])), (BLOCK, BLOCK), halo)


def edge_weight_store(image: Any, path: str | Path, strength: float) -> Path:
    """:func:`~monai_vslp.variational.image_edge_weight` of an image that is larger than memory.

    Args:
        image: shape ``[3, H, W]``, uint8, with slicing.
        path: Zarr array to write, float16 ``[H, W]``; replaced if it is there.
        strength: β.
    """
    path = Path(path)
    height, width = (int(n) for n in image.shape[-2:])
    shutil.rmtree(path, ignore_errors=True)
    chunks = (min(CHUNK, height), min(CHUNK, width))
    stored = zarr.create_array(str(path), shape=(height, width), chunks=chunks, dtype="float16")

    def squared(part: Window) -> torch.Tensor:
        return squared_gradient(torch.from_numpy(np.asarray(image[(slice(None), *part.outer)])))[part.inner]

    windows = _tiles((height, width), EDGE_HALO)
    total = sum(float(squared(part).sum(dtype=torch.float64)) for part in windows)
    for part in windows:
        stored[part.core] = weight_of_edges(squared(part), total / (height * width), strength).numpy().astype(np.float16)
    return path


def _own(confidence: Any, mass: Any) -> torch.Tensor:
    """The network's own proportions, float64 ``[C]``."""
    sums, total = np.zeros(confidence.shape[0]), 0.0
    for part in _tiles(mass.shape):
        share = np.asarray(mass[part.core], dtype=np.float64)
        if share.any():
            sums += (np.asarray(confidence[(slice(None), *part.core)], dtype=np.float64) * share).sum(axis=(1, 2))
            total += share.sum()
    return torch.from_numpy(sums / max(sums.sum(), 1e-12) if total else sums)


def _learned(refinement: VariationalRefinement, maps: Mapping[str, Any], given: Given, output: Path) -> dict[str, Any]:
    """A learned regularizer on maps that fit into memory, into a group like that of ``refine_store``."""
    q = np.asarray(maps["confidence"][:, :, :], dtype=np.float32)
    total = q.sum(axis=0, keepdims=True)
    q = np.where(total > 0, q / np.maximum(total, 1e-6), 1 / len(q))
    mass = np.asarray(maps["mass"][:, :], dtype=np.float32)
    image = np.asarray(maps["image"][:, :, :])
    found = refinement(q, given.proportions, mass, image, spread=given.spread, bounds=given.bounds)
    labels = found.labels.numpy().astype(np.uint8)
    labels[mass <= 0] = NO_TISSUE
    group = zarr.open_group(str(output), mode="w", zarr_format=3)
    arrays = {
        "labels": labels,
        "u": found.u.numpy().astype(np.float16),
        "fidelity_energy": found.fidelity_energy.numpy().astype(np.float16),
        "regularization_energy": found.regularization_energy.numpy().astype(np.float16),
    }
    for name, values in arrays.items():
        chunks = (*values.shape[:-2], *(min(CHUNK, side) for side in values.shape[-2:]))
        group.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype)[...] = values
    return _status(found)


def _status(found: Any) -> dict[str, Any]:
    return {
        "psi": found.psi.tolist(),
        "energies": [float(value) for value in found.energies],
        "residual": found.residual,
        "converged": found.converged,
        "reason": found.reason,
        "proportions_refined": found.proportions.tolist(),
    }


def _solve(
    refinement: VariationalRefinement,
    maps: Mapping[str, Any],
    stores: Mapping[str, Any],
    given: Given,
    output: Path,
    passes: Passes | None = None,
) -> dict[str, Any]:
    """One variational problem into the group at ``output``; its status. ``stores``: the maps as other processes open them."""
    shutil.rmtree(output, ignore_errors=True)
    pixels = math.prod(maps["mass"].shape)
    whole = refinement.learned is not None or refinement.term is not None  # what is not made for maps on disk
    learned = whole and pixels <= LARGEST_LEARNED
    if learned:
        status = _learned(refinement, maps, given, output)
    else:
        if whole:
            logger.warning(
                "the maps of this slide have %.3g px; this regularizer sees a map as a whole, %.3g px at most, so total "
                "variation is used. Coarser maps (--map-downsample) would fit.",
                *(pixels, LARGEST_LEARNED),
            )
        proportions, trust, bounds = refinement.terms(
            given.proportions, given.spread, given.bounds, lambda: _own(maps["confidence"], maps["mass"])
        )
        options = refinement.options_for(trust)
        settings = {name: getattr(options, name) for name in options.__dataclass_fields__}
        status = _status(
            refine_store(
                stores["confidence"],
                output,
                proportions,
                mass=stores["mass"],
                weight=stores["weight"],
                bounds=bounds,
                passes=passes,
                **settings,
            )
        )
    listed = None if given.proportions is None else [float(value) for value in given.proportions]
    return status | {
        "proportions_given": listed,
        "regularizer": (refinement.term or "learned") if learned else "total variation",
    }


def refine_maps(
    maps: SlideMaps,
    refinement: VariationalRefinement,
    given: Given | None = None,
    *,
    regions: Sequence[Region] = (),
    passes: Passes | None = None,
) -> RefinedMaps:
    """Refine the maps of a slide as one variational problem, and each region with proportions of its own as another.

    The result lies beside the maps. A second call with the same maps, options and proportions finds it there. Regions and the
    rest of the slide are problems apart: no price is asked for borders between them. Where regions overlap, a
    pixel belongs to the first.

    Args:
        maps: what :func:`~monai_vslp.inferers.infer_slide` left.
        refinement: the variational stage; its ``pixel_size`` is that of the maps. A learned regularizer is used on maps of at
            most 2²⁴ px, total variation on larger ones, with a warning.
        given: what is known about the whole slide, or about the rest of it where there are regions.
        regions: parts with proportions of their own.
        passes: who makes the passes over the maps; this process by default.

    Raises:
        InputError: proportions, options or regions that cannot be used.
        OSError: a full disk, say; the maps stay.
    """
    given = Given() if given is None else given
    folder = maps.path.parent
    output, description = folder / REFINED, folder / DESCRIPTION
    digest = _digest(maps, refinement, given, regions)
    if (known := _known(description, output, digest)) is not None:
        return known
    description.unlink(missing_ok=True)
    weight = None
    strength = refinement.options.edge_strength
    if strength > 0 and refinement.options.alpha > 0:
        weight = edge_weight_store(maps.image, folder / WEIGHT, strength)
    if not regions:
        arrays = {"confidence": maps.confidence, "mass": maps.mass, "image": maps.image}
        stores = {"confidence": maps.path / "confidence", "mass": maps.path / "mass", "weight": weight}
        found = RefinedMaps(output, _solve(refinement, arrays, stores, given, output, passes))
    else:
        found = _by_regions(maps, refinement, given, regions, weight, output)
    write_json(description, {"digest": digest, "refinement": found.refinement, "regions": list(found.regions)})
    shutil.rmtree(folder / WEIGHT, ignore_errors=True)
    return found


def _by_regions(
    maps: SlideMaps,
    refinement: VariationalRefinement,
    given: Given,
    regions: Sequence[Region],
    weight: Path | None,
    output: Path,
) -> RefinedMaps:
    height, width = maps.shape
    names = [region.name for region in regions]
    if len(set(names)) < len(names):
        raise InputError(f"regions need different names, got {', '.join(names)}.")
    whole = (slice(0, height), slice(0, width))
    owner = np.zeros((height, width), dtype=np.uint16)  # number of the region, 0 for the rest
    for number, region in reversed(list(enumerate(regions, start=1))):
        owner[region.window][region.mask] = number
    parts = [(None, whole, owner == 0, given)]
    for number, region in enumerate(regions, start=1):
        parts.append((region.name, region.window, owner[region.window] == number, region.given))
    shutil.rmtree(output, ignore_errors=True)
    temporary = output.with_name(f".{output.name}")
    group = zarr.open_group(str(temporary), mode="w", zarr_format=3)
    statuses = []
    price = None if weight is None else zarr.open_array(str(weight), mode="r")
    for name, window, mask, known in parts:
        arrays = {
            "confidence": _View(maps.confidence, window),
            "mass": _View(maps.mass, window, mask),
            "image": _View(maps.image, window),
        }
        share = sum(float(arrays["mass"][part.core].sum(dtype=np.float64)) for part in _tiles(arrays["mass"].shape))
        if share == 0:
            if name is not None:
                raise InputError(f"region {name!r} of slide {maps.slide} has no tissue; look at its outline, or leave it out.")
            continue
        place = output.with_name(f".part-{output.name}")
        stores = arrays | {"weight": None if price is None else _View(price, window)}
        status = _solve(refinement, arrays, stores, known, place)
        _paste(zarr.open_group(str(place), mode="r"), group, window, mask, maps)
        shutil.rmtree(place)
        statuses.append(status | {"name": name, "tissue_fraction": share / (height * width)})
    rest = next((status for status in statuses if status["name"] is None), None)
    shares = np.array([status["tissue_fraction"] for status in statuses])
    refined = shares / shares.sum() @ np.array([status["proportions_refined"] for status in statuses])
    nothing = {"psi": [math.nan] * maps.classes, "energies": [0.0], "residual": None, "converged": True, "reason": "no rest"}
    converged = all(status["converged"] for status in statuses)
    summary = (rest or nothing) | {
        "converged": converged,
        "proportions_given": None,  # of the rest alone, if at all; regions have their own
        "proportions_refined": refined.tolist(),
        "regularizer": statuses[0]["regularizer"],
    }
    for key in ("name", "tissue_fraction"):
        summary.pop(key, None)
    temporary.rename(output)
    return RefinedMaps(output, summary, tuple(status for status in statuses if status["name"] is not None))


def _paste(source: Any, target: Any, window: tuple[slice, slice], mask: np.ndarray, maps: SlideMaps) -> None:
    """Write the part of a group's maps where ``mask`` is set into those of the whole slide."""
    for name in MAPS:
        part = source[name]
        leading = part.shape[:-2]
        if name not in target:
            target.create_array(
                name,
                shape=(*leading, *maps.shape),
                chunks=(*leading, *(min(CHUNK, side) for side in maps.shape)),
                dtype=part.dtype,
                fill_value=NO_TISSUE if name == "labels" else 0,
            )
        for tile in _tiles(mask.shape):
            inside = mask[tile.core]
            if not inside.any():
                continue
            place = tuple(slice(span.start + at.start, span.stop + at.start) for span, at in zip(tile.core, window))
            key = (*(slice(None) for _ in leading), *place)
            before = np.asarray(target[name][key])
            target[name][key] = np.where(inside, part[(*(slice(None) for _ in leading), *tile.core)], before)


def _digest(maps: SlideMaps, refinement: VariationalRefinement, given: Given, regions: Sequence[Region]) -> str:
    def plain(known: Given) -> list[Any]:
        return [None if value is None else np.asarray(value, dtype=float).tolist() for value in vars(known).values()]

    options = {name: str(value) for name, value in vars(refinement.options).items()}
    described = [maps.plan, refinement.pixel_size, refinement.rule, refinement.own_trust, options, plain(given)]
    if refinement.term is not None:
        described.append(refinement.term)
    if refinement.learned is not None:
        state = refinement.learned.model.state_dict()
        described.append([float(value.double().sum()) for value in state.values()])
    for region in regions:
        corners = [(span.start, span.stop) for span in region.window]
        mask = hashlib.sha256(np.packbits(region.mask).tobytes()).hexdigest()
        described.append([region.name, corners, mask, plain(region.given)])
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _known(description: Path, output: Path, digest: str) -> RefinedMaps | None:
    """What an earlier call with the same arguments left."""
    try:
        values = json.loads(description.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s is damaged (%s); the maps are refined again.", description, error)
        return None
    if values["digest"] != digest or not output.is_dir():
        return None
    return RefinedMaps(output, values["refinement"], tuple(values["regions"]))
