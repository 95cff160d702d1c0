"""Refinement of maps that are larger than memory: from Zarr, by way of scratch files, to Zarr."""

from __future__ import annotations

import logging
import math
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import optional_import

from monai_vslp.utils.errors import InputError, ProportionError
from monai_vslp.variational.fidelity import AssignmentFidelity, assignment_cost
from monai_vslp.variational.levels import WINDOW_VALUES, Level, solve_levels
from monai_vslp.variational.passes import Passes, SerialPasses, tissue_windows, write_from
from monai_vslp.variational.potential import Potential
from monai_vslp.variational.refine import RefinementOptions, check_proportions, marginal_for, refinement_options
from monai_vslp.variational.regularizer import HuberTotalVariation
from monai_vslp.variational.scratch import ScratchArrays, working_folders
from monai_vslp.variational.solver import Solution, Step, StoppingRule
from monai_vslp.variational.windows import DiskArray, MapArray, Window, split_windows

zarr, _ = optional_import("zarr", descriptor="{} is needed for maps larger than memory: pip install 'zarr>=3'")

__all__ = ["NO_TISSUE", "StoreArray", "StoreResult", "refine_store", "scratch_bytes"]

logger = logging.getLogger(__name__)

NO_TISSUE = 255  # label of pixels without mass
TILE_VALUES = 2**22  # numbers that are read from or written to a store at once, unless one chunk holds more
LARGE_CHUNK = 2**28  # numbers; a chunk that large is read whole and takes a GiB or more
SMALLEST_CONFIDENCE = -1e-4  # what refine takes for rounding
SUM_ERROR = 1e-2
HALO = HuberTotalVariation.halo  # px


class StoreArray:
    """An array of a chunked store as float32: slices of the last two axes are read and written as tensors.

    Args:
        array: a Zarr array, or anything with ``shape``, ``dtype`` and NumPy's slicing, ``[..., H, W]``.
        fractions: the array holds fractions; uint8 then stands for 0..1 in steps of 1/255.
    """

    def __init__(self, array: Any, fractions: bool = False) -> None:
        self.array, self.shape = array, tuple(int(n) for n in array.shape)
        self._scale = 255.0 if fractions and np.dtype(array.dtype) == np.uint8 else 1.0

    def __getitem__(self, key: tuple) -> torch.Tensor:
        values = torch.from_numpy(np.array(self.array[key], dtype=np.float32))
        return values if self._scale == 1.0 else values.div_(self._scale)

    def __setitem__(self, key: tuple, value: torch.Tensor) -> None:
        value = value.detach().cpu()
        if self._scale != 1.0:
            value = (value * self._scale).round_().clamp_(0, self._scale)
        self.array[key] = value.numpy().astype(self.array.dtype)

    @property
    def chunk(self) -> tuple[int, int]:
        """Rows and columns that are stored together; a row where the array has no chunks."""
        return tuple(getattr(self.array, "chunks", (1, self.shape[-1]))[-2:])

    def tiles(self) -> list[Window]:
        """Rectangles made of whole chunks, of about ``TILE_VALUES`` numbers."""
        (height, width), (rows, columns) = self.shape[-2:], self.chunk
        budget = TILE_VALUES // max(1, math.prod(self.shape[:-2]))
        while rows * columns * 2 <= budget and (rows < height or columns < width):
            if columns < width and (columns <= rows or rows >= height):
                columns *= 2
            else:
                rows *= 2
        return split_windows((height, width), (min(rows, height), min(columns, width)))


class _Uniform:
    """A map of one value."""

    def __init__(self, value: float, shape: tuple[int, int]) -> None:
        self.value, self.shape = value, shape

    def __getitem__(self, key: tuple) -> torch.Tensor:
        sides = [len(range(*part.indices(length))) for part, length in zip(key, self.shape)]
        return torch.full(sides, self.value, dtype=torch.float32)


@dataclass(frozen=True)
class StoreResult:
    r"""What the variational stage found, beside the arrays in the store.

    Attributes:
        path: the Zarr group.
        psi: class offsets ψ, shape ``[C]``, float64; −inf for a class that cannot occur; NaN where nothing was given.
        proportions: :math:`\bar u`, shape ``[C]``, float64.
        energies: energy of the start and after each accepted step.
        residual: as of :class:`~monai_vslp.variational.refine.RefinementResult`.
        converged, reason: whether the stopping rule was met, and why the iteration ended.
        scratch: disk space that was set aside for scratch files, bytes.
    """

    path: Path
    psi: torch.Tensor
    proportions: torch.Tensor
    energies: list[float]
    residual: float | None
    converged: bool
    reason: str
    scratch: int


def refine_store(
    confidence: Any,
    output: str | os.PathLike[str],
    proportions: torch.Tensor | Sequence[float] | None = None,
    *,
    mass: Any = None,
    weight: Any = None,
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
    scratch: str | os.PathLike[str] | None = None,
    window: tuple[int, int] | None = None,
    u_dtype: str = "float16",
    energy_dtype: str = "float16",
    on_step: Callable[[Step], bool | None] | None = None,
    passes: Passes | None = None,
    **options: float | int | bool | str,
) -> StoreResult:
    r"""Fuse pixel-wise confidences with global proportions and total variation, in memory that the map's size leaves alone.

    .. math::
        \min_{u_i\in\Delta_C} \; \sum_i a_i\bigl(\lambda_a\langle c_i,u_i\rangle + \varepsilon\langle u_i,\log u_i\rangle\bigr)
        + \Phi(\bar u) + \alpha R(u), \qquad
        c_{ik} = -\log\Bigl(\frac{q_{ik}}{\textstyle\sum_l q_{il}}+\delta\Bigr),

    which is the energy of :func:`~monai_vslp.variational.refine.refine` with total variation, and the same solver. All
    its passes go over windows of the map that have tissue, so time and scratch files follow the tissue; costs and iterates
    lie in scratch files (:func:`scratch_bytes` says how large at most) that are removed at the end, whatever it is; what a
    killed process left is removed by the next call for the same output and scratch folder. The stores are read and written
    by whole chunks, once (a mass three times). A chunk is held as a whole, so a store of few huge chunks should be rechunked
    first.

    With :class:`~monai_vslp.variational.passes.ProcessPasses`, or :class:`~monai_vslp.variational.passes.ExecutorPasses` for
    any other executor, all passes are shared by workers that see the same disk. The result does not depend on how many
    they are; it is that of one process with one thread.

    The group at ``output`` holds, with ``NO_TISSUE`` = 255 for labels of pixels without mass,

    ========================= ============== ===============================================================
    ``labels``                ``[H, W]``     uint8, class of the largest ``u``
    ``u``                     ``[C, H, W]``  segmentation on the simplex, 0 outside tissue, in ``u_dtype``
    ``fidelity_energy``       ``[H, W]``     nats per pixel, 0 outside tissue, in ``energy_dtype``
    ``regularization_energy`` ``[H, W]``     the same
    ========================= ============== ===============================================================

    and the attributes ``psi``, ``proportions``, ``energies``, ``residual``, ``converged``, ``reason`` and ``options``;
    what JSON has no number for is spelt "NaN", "Infinity" or "-Infinity". It appears under its name when it is complete.

    Args:
        confidence: :math:`q`, Zarr array or the path or URL of one, shape ``[C, H, W]``, at most 255 classes, on the
            simplex. Floating point, or uint8, where 0..255 stand for 0..1. Pixels without mass may be 0 in all classes.
        output: folder of the Zarr group to make; it must not exist.
        proportions: :math:`p`, fractions of the tissue area, shape ``[C]``; None leaves them free.
        mass: tissue per pixel, Zarr array or path, shape ``[H, W]``, bool, integer or float, non-negative, any scale; 0
            is background. All ones by default.
        weight: price of a boundary at each pixel, Zarr array or path, shape ``[H, W]``, floating point, non-negative,
            such as that of :func:`~monai_vslp.variational.regularizer.image_edge_weight`; 1 by default.
        bounds: lower and upper fractions per class, each of shape ``[C]``, instead of ``proportions``.
        scratch: folder for the scratch files, on a fast disk; that of ``output`` by default.
        window: rows and columns of the windows that passes are made in; by default what suits a processor's cache.
        u_dtype: ``float16``, ``float32``, or ``uint8`` (coded as confidences are).
        energy_dtype: ``float16`` or ``float32``.
        on_step: called with a :class:`~monai_vslp.variational.solver.Step` after each step; returning False stops there,
            with what has been found. An exception from it ends the call and leaves nothing behind.
        passes: who makes the passes; this process by default. Others open the maps themselves: give them as paths.
        **options: fields of :class:`~monai_vslp.variational.refine.RefinementOptions`; ``edge_strength`` has no effect, and
            ``fusion_weight`` must be 0.

    Returns:
        Potentials, energies and status.

    Raises:
        InputError: a shape, value or option that cannot be used (values with the tile that holds them), an output that
            exists, a mass of 0 everywhere, or too little disk space, with the numbers.
        ProportionError: proportions or bounds that cannot be.
        LockedError: another process makes this output.
        OSError: the disk filled up, or failed, on the way.
        RuntimeError: workers that make the passes died again and again.

    Example:
        >>> result = refine_store("slide.zarr/confidence", "refined.zarr", [0.6, 0.3, 0.1])  # doctest: +SKIP
        >>> zarr.open_group(result.path)["labels"][:512, :512]  # doctest: +SKIP
    """
    settings = _settings(options)
    if u_dtype not in ("float16", "float32", "uint8") or energy_dtype not in ("float16", "float32"):
        raise InputError(
            f"refine_store: u_dtype is float16, float32 or uint8 and energy_dtype float16 or float32, "
            f"got {u_dtype!r} and {energy_dtype!r}."
        )
    q = _opened(confidence, "confidence", "[C, H, W]", "f", fractions=True)
    classes, height, width = q.shape
    if not 1 <= classes <= NO_TISSUE or height * width == 0:
        raise InputError(f"refine_store: confidence must have 1 to {NO_TISSUE} classes and pixels, got shape {list(q.shape)}.")
    maps = {
        name: None if given is None else _opened(given, name, "[H, W]", kinds, shape=(height, width))
        for name, given, kinds in (("mass", mass, "biuf"), ("weight", weight, "f"))
    }
    if proportions is not None and bounds is not None:
        raise ProportionError("refine_store: give proportions or bounds, not both.")
    p = None if proportions is None else check_proportions(proportions, classes, 1)[0]
    marginal = marginal_for(p, None if bounds is None else _checked_bounds(bounds, classes), settings)
    active = torch.ones(classes, dtype=torch.bool) if marginal is None else marginal.active
    count = int(active.sum())
    if window is None:
        side = max(32, round(math.sqrt(WINDOW_VALUES / count) / 32) * 32)
        window = (side, side)

    passes = SerialPasses() if passes is None else passes
    share = 1.0 if mass is None else _tissue_share(maps["mass"], window, passes)
    needed = scratch_bytes((height, width), count, mass=mass is not None, weight=weight is not None, tissue=share)
    of_result = height * width * (1 + classes * np.dtype(u_dtype).itemsize + 2 * np.dtype(energy_dtype).itemsize)
    with working_folders(output, scratch, needed, of_result) as (result, files):
        allocate = ScratchArrays(files, window)
        level = Level(*_read(q, maps["mass"], maps["weight"], active, settings, allocate, passes))
        solution, smooth = solve_levels(
            level,
            marginal=marginal if marginal is None or count == classes else marginal.restricted(),
            epsilon=settings.epsilon,
            alpha=settings.alpha,
            huber=settings.huber,
            stopping=StoppingRule(settings.max_iterations, settings.tolerance, settings.marginal_tolerance),
            multigrid=settings.multigrid,
            on_step=on_step,
            allocate=allocate,
            window=window,
            passes=passes,
        )
        found = torch.zeros(classes, dtype=torch.float64)
        found[active] = solution.proportions
        psi = torch.full((classes,), math.nan if marginal is None else -math.inf, dtype=torch.float64)
        if marginal is not None:
            psi[active] = solution.psi
        attributes = {
            "psi": psi.tolist(),
            "proportions": found.tolist(),
            "energies": solution.energies,
            "residual": solution.residual,
            "converged": solution.converged,
            "reason": solution.reason,
            "options": asdict(settings),
            "no_tissue": NO_TISSUE,
        }
        group = zarr.create_group(str(result), attributes=_json(attributes))
        _write(group, solution, level, smooth, active, settings.epsilon, u_dtype, energy_dtype, passes)
    return StoreResult(
        Path(output), psi, found, solution.energies, solution.residual, solution.converged, solution.reason, needed
    )


def scratch_bytes(shape: tuple[int, int], classes: int, *, mass: bool = True, weight: bool = False, tissue: float = 1.0) -> int:
    """Disk space that :func:`refine_store` needs at most for its scratch files, bytes.

    Per pixel these are float32 numbers: C costs, C scores of the start and three times C + 1 of iterates, those given of
    mass and weight, and what the solution on the next coarser grid takes; 5 % are added for the file system.

    Args:
        shape: ``(H, W)`` of the map.
        classes: those that may occur (a proportion of 0 rules a class out).
        mass, weight: whether these are given.
        tissue: share of the windows that have tissue.
    """
    height, width = shape
    coarse = (height // 2 + 1) * (width // 2 + 1) * (classes + 1)
    return int(4.2 * (tissue * height * width * (5 * classes + 3 + int(mass) + int(weight)) + coarse))


def _tissue_share(mass: StoreArray, window: tuple[int, int], passes: Passes) -> float:
    """Share of the windows, their margins included, that have tissue."""
    windows = split_windows(mass.shape, window, HALO)
    found = passes.map(_touched, mass.tiles(), mass, windows)
    return len(set().union(*found)) / len(windows)


def _touched(part: Window, mass: StoreArray, windows: Sequence[Window]) -> set[int]:
    """Numbers of the windows that have tissue in common with a tile."""
    tissue = _load(mass, part, "mass") > 0
    if not bool(tissue.any()):
        return set()
    found = set()
    for number, window in enumerate(windows):
        key = tuple(
            slice(max(a.start, b.start) - b.start, min(a.stop, b.stop) - b.start) for a, b in zip(window.outer, part.core)
        )
        if all(side.stop > side.start for side in key) and bool(tissue[key].any()):
            found.add(number)
    return found


def _settings(options: dict) -> RefinementOptions:
    for name in ("stack", "regularizer"):
        if options.pop(name, None) is not None:
            raise InputError(f"refine_store: {name} is not for maps from a store; they have total variation only. Use refine.")
    if options.pop("image", None) is not None:
        raise InputError("refine_store: give weight, a map of image_edge_weight, in place of an image.")
    settings = refinement_options(options)
    if settings.fusion_weight > 0:
        raise InputError(
            "refine_store: fusion_weight needs the stack of views of every pixel, which stores do not hold; leave it at 0 or "
            "use refine on parts that fit into memory."
        )
    return settings


def _checked_bounds(bounds: tuple[Sequence[float], Sequence[float]], classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    both = [torch.as_tensor(x, dtype=torch.float64) for x in bounds]
    if len(both) != 2 or any(x.shape != (classes,) for x in both):
        raise ProportionError(f"refine_store: bounds are two lists of {classes} fractions, got {bounds}.")
    return both[0], both[1]


def _opened(
    given: Any, name: str, axes: str, kinds: str, shape: tuple[int, ...] | None = None, fractions: bool = False
) -> StoreArray:
    """A Zarr array, opened where its path is given, with axes, shape and kind of numbers checked."""
    array = given
    if isinstance(given, (str, os.PathLike)):
        try:
            array = zarr.open_array(str(given), mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"refine_store: {name} {str(given)!r} cannot be opened as a Zarr array ({error}); give the path of the array "
                "itself, such as slide.zarr/confidence."
            ) from error
    if len(array.shape) != axes.count(",") + 1 or (shape is not None and tuple(array.shape) != shape):
        wanted = axes if shape is None else f"{axes} = {list(shape)}"
        raise InputError(f"refine_store: {name} must have shape {wanted}, got {list(array.shape)}.")
    kind = np.dtype(array.dtype)
    if kind.kind not in kinds and not (fractions and kind == np.uint8):
        allowed = "floating point or uint8 (0..255 for 0..1)" if fractions else f"of a kind among {', '.join(kinds)}"
        raise InputError(f"refine_store: {name} must be {allowed}, got {kind}.")
    opened = StoreArray(array, fractions)
    if math.prod((*opened.shape[:-2], *opened.chunk)) > LARGE_CHUNK:
        logger.warning(
            "refine_store: %s comes in chunks of %s px, which are read whole; rechunk it (512 x 512, say) to need less memory.",
            name,
            " x ".join(str(n) for n in opened.chunk),
        )
    return opened


def _tile(window: Window) -> str:
    rows, columns = window.core
    return f"the tile of rows {rows.start} to {rows.stop - 1}, columns {columns.start} to {columns.stop - 1}"


def _load(source: StoreArray, part: Window, name: str) -> torch.Tensor:
    """A tile, with every value finite and not negative beyond rounding."""
    key = (*[slice(None)] * (len(source.shape) - 2), *part.core)
    try:
        values = source[key]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"refine_store: {name} cannot be read in {_tile(part)} ({error}); the store is damaged.") from error
    wrong = ~torch.isfinite(values) | (values < (SMALLEST_CONFIDENCE if name == "confidence" else 0.0))
    if bool(wrong.any()):
        *_, row, column = (int(n) for n in wrong.nonzero()[0])
        raise InputError(
            f"refine_store: {name} has negative, NaN or infinite values in {_tile(part)}, the first at row "
            f"{part.core[0].start + row}, column {part.core[1].start + column}; {int(wrong.sum())} in this tile."
        )
    return values


def _put(target: DiskArray, part: Window, values: torch.Tensor, tissue: torch.Tensor) -> None:
    """Write a tile to a scratch file, but for its blocks without tissue: those stay zeros, which take no space."""
    for block in split_windows(target.shape[-2:], target.block):
        spans = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(block.core, part.core)]
        inside = tuple(slice(span.start - at.start, span.stop - at.start) for span, at in zip(spans, part.core))
        if all(span.stop > span.start for span in spans) and bool(tissue[inside].any()):
            leading = [slice(None)] * (len(target.shape) - 2)
            target[(*leading, *spans)] = values[(..., *inside)]


def _copy(part: Window, source: StoreArray, name: str, target: DiskArray, mass: MapArray | None = None) -> float:
    """Write a tile of a map to a scratch file, where there is tissue; returns its sum."""
    values = _load(source, part, name)
    _put(target, part, values, (values if mass is None else mass[part.core]) > 0)
    return float(values.sum(dtype=torch.float64))


def _read(
    q: StoreArray,
    mass: StoreArray | None,
    weight: StoreArray | None,
    active: torch.Tensor,
    settings: RefinementOptions,
    allocate: ScratchArrays,
    passes: Passes,
) -> tuple[MapArray, MapArray, MapArray | None]:
    """Costs of the active classes, shares of the mass, and weights, from one pass over each store that checks it, too."""
    height, width = q.shape[-2:]
    if mass is None:
        share: MapArray = _Uniform(1.0 / (height * width), (height, width))
    else:
        given, share = allocate(mass.shape), allocate(mass.shape)
        total = sum(passes.map(_copy, mass.tiles(), mass, "mass", given))
        if total == 0.0:
            raise InputError("refine_store: mass is 0 everywhere: there is no tissue to refine.")
        tissue = tissue_windows(passes, split_windows((height, width), share.block), given)
        passes.map(write_from, tissue, given, share, operator.truediv, total)
    weights = None
    if weight is not None and settings.alpha > 0:
        weights = allocate(weight.shape)
        passes.map(_copy, weight.tiles(), weight, "weight", weights, share)
    cost = allocate((int(active.sum()), height, width))
    passes.map(_write_cost, q.tiles(), q, share, active, settings, cost)
    return cost, share, weights


def _write_cost(
    part: Window, q: StoreArray, share: MapArray, active: torch.Tensor, settings: RefinementOptions, cost: DiskArray
) -> None:
    """Write the costs of the active classes on a tile of the confidences, which are checked."""
    values = _load(q, part, "confidence").clamp_min_(0)
    total = values.sum(dim=0)
    glass = share[part.core] == 0
    # Background is often stored as zeros.
    empty = (total == 0) & glass
    worst = float(torch.where(empty, 0.0, (total - 1).abs()).max())
    # Rounding to 8 bits moves each class by up to half a step.
    if worst > SUM_ERROR + (len(active) * 0.5 / 255 if q.array.dtype == np.uint8 else 0.0):
        raise InputError(
            f"refine_store: confidence must sum to 1 over the classes, it is off by up to {worst:.3g} in {_tile(part)}; "
            "store a softmax over the classes (for uint8, 255 times it)."
        )
    values = torch.where(empty, 1.0 / len(active), values / torch.where(empty, 1.0, total))
    _put(cost, part, settings.fidelity_weight * assignment_cost(values[active], settings.delta), ~glass)


def _write(
    group: Any,
    solution: Solution,
    level: Level,
    smooth: Potential | None,
    active: torch.Tensor,
    epsilon: float,
    u_dtype: str,
    energy_dtype: str,
    passes: Passes,
) -> None:
    """Evaluate the solution chunk by chunk into the arrays of a Zarr group."""
    classes, (height, width) = len(active), level.shape
    side = min(1024, 2 ** int(math.log2(TILE_VALUES / classes) / 2))
    chunk = (min(side, height), min(side, width))

    def array(name: str, dtype: str, fill: int = 0, leading: tuple[int, ...] = ()) -> StoreArray:
        made = group.create_array(
            name,
            shape=(*leading, height, width),
            chunks=(*leading, *chunk),
            dtype=dtype,
            fill_value=fill,
            dimension_names=(*("class" for _ in leading), "y", "x"),
        )
        return StoreArray(made, fractions=name == "u")

    outputs = _Outputs(
        array("labels", "uint8", NO_TISSUE),
        array("u", u_dtype, leading=(classes,)),
        array("fidelity_energy", energy_dtype),
        array("regularization_energy", energy_dtype),
    )
    parts = split_windows((height, width), chunk, 0 if smooth is None else smooth.halo)
    passes.map(_write_chunk, parts, outputs, solution, level, smooth, active, epsilon)


@dataclass(frozen=True)
class _Outputs:
    """The arrays of the result, all with the same chunks in rows and columns."""

    labels: StoreArray
    u: StoreArray
    fidelity: StoreArray
    regularization: StoreArray


def _write_chunk(
    part: Window,
    outputs: _Outputs,
    solution: Solution,
    level: Level,
    smooth: Potential | None,
    active: torch.Tensor,
    epsilon: float,
) -> None:
    """Evaluate the solution on a window that is a chunk of the outputs; without tissue they keep their fill values."""
    share = level.mass[part.core]
    tissue = share > 0
    if not bool(tissue.any()):
        return
    log_u = solution.log_u(*part.outer)
    found = log_u.exp()
    regularization = torch.zeros(()) if smooth is None else smooth.energy_map(found, part)
    inner = (slice(None), *part.inner)
    log_u, found = (x[inner].reshape(len(x), -1) for x in (log_u, found))
    fidelity = AssignmentFidelity(level.cost[(slice(None), *part.core)].flatten(1), share.reshape(-1), epsilon)
    outputs.fidelity[part.core] = fidelity.energy_map(found, log_u).view_as(share) * tissue
    outputs.regularization[part.core] = regularization.expand_as(share)
    full = torch.zeros(len(active), *share.shape)
    full[active] = found.view(-1, *share.shape) * tissue
    outputs.u[(slice(None), *part.core)] = full
    outputs.labels[part.core] = torch.where(tissue, full.argmax(dim=0), NO_TISSUE)


def _json(value: Any) -> Any:
    """Numbers that JSON does not have, by their names in Zarr."""
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
