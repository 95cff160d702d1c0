"""Coarse to fine: the energy on ever coarser grids, each of which starts the next finer one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from monai_vslp.variational.marginal import Marginal
from monai_vslp.variational.passes import Passes, SerialPasses, tissue_windows, write_from
from monai_vslp.variational.potential import Potential, WeightedSum
from monai_vslp.variational.regularizer import HuberTotalVariation
from monai_vslp.variational.solver import Problem, Solution, Step, StoppingRule, minimize
from monai_vslp.variational.windows import MapArray, Window, split_windows

__all__ = ["Level", "solve_levels"]

COARSEST_SIDE = 48  # px; below it a coarser grid costs more to set up than it saves
WINDOW_VALUES = 320_000  # numbers per array and window that stay in a core's cache through one pass
PIXEL_SHARE = 0.05  # θ: how much of a finer grid's start comes from its own pixels
NETWORK_PIXELS = 2**22  # px that a potential with a wide margin sees at once; larger maps are cut into windows


@dataclass(frozen=True)
class Level:
    """What the energy needs on one grid: cost ``[C, H, W]``, mass ``[H, W]`` with sum 1, edge weight ``[H, W]`` or None."""

    cost: MapArray
    mass: MapArray
    weight: MapArray | None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.mass.shape)


Allocate = Callable[[Sequence[int]], MapArray]


def solve_levels(
    level: Level,
    *,
    marginal: Marginal | None,
    epsilon: float,
    alpha: float,
    huber: float,
    others: Sequence[tuple[float, Potential]] = (),
    stopping: StoppingRule,
    multigrid: bool = True,
    start: MapArray | None = None,
    on_step: Callable[[Step], bool | None] | None = None,
    allocate: Allocate | None = None,
    window: tuple[int, int] | None = None,
    passes: Passes | None = None,
) -> tuple[Solution, Potential | None]:
    """Minimise the energy on a grid, started from coarser ones.

    Of maps on disk, windows without tissue in reach are left out of every pass: their pixels have no part in the energy. Time
    follows the tissue, not the map.

    Args:
        level: the grid.
        marginal: term on the proportions, all of whose classes are active.
        epsilon, alpha, huber: parameters of the energy with total variation.
        others: further potentials with their weights; they know this grid only, so there are no coarser ones with them.
        stopping: when to stop on this grid.
        multigrid: use coarser grids.
        start: logarithm of a segmentation to start from, ``[C, H, W]``; no coarser grids then.
        on_step: see :func:`~monai_vslp.variational.solver.minimize`.
        allocate: makes the arrays that are worked in, by shape, filled with 0; in memory beside the costs by default.
        window: rows and columns of the windows that passes are made in; strips that suit the processor by default.
        passes: who makes the passes; this process by default. Others need maps that are files.

    Returns:
        The solution, and the potential that was minimised with it.
    """
    classes, height, width = level.cost.shape
    make = allocate if allocate is not None else _in_memory(level)
    passes = SerialPasses() if passes is None else passes
    terms = list(others)
    if alpha > 0:
        terms.append((alpha, HuberTotalVariation(level.mass, level.weight, huber)))
    smooth = WeightedSum(terms) if terms else None
    windows = _windows(level, classes, smooth, window)
    # In memory glass is solved with the rest: there its segmentation is promised to be the softmax of its costs.
    worked = windows if allocate is None else tissue_windows(passes, windows, level.mass)
    psi = None
    if start is None and multigrid and alpha > 0 and not others and min(height, width) >= 2 * COARSEST_SIDE:
        coarse, _ = solve_levels(
            _coarsened(level, windows, make, passes),
            marginal=marginal,
            epsilon=epsilon,
            alpha=alpha / 2,  # a boundary crosses half as many of a quarter of the cells: its length per cell doubles
            huber=huber,
            stopping=replace(stopping, tolerance=max(stopping.tolerance, 3e-4)),
            on_step=on_step,
            allocate=allocate,
            window=window,
            passes=passes,
        )
        psi = coarse.psi
        start = make((classes, height, width))
        passes.map(_refine, worked, coarse, level.cost, start)
    elif start is not None:
        start = start.clone() if isinstance(start, torch.Tensor) else start
    problem = Problem(level.cost, level.mass, epsilon, marginal, smooth, worked)
    solution = minimize(problem, make, stopping, start=start, psi=psi, on_step=on_step, passes=passes)
    return solution, smooth


def _in_memory(level: Level) -> Allocate:
    like = level.cost

    def make(shape: Sequence[int]) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)

    return make


def _windows(level: Level, classes: int, smooth: Potential | None, window: tuple[int, int] | None) -> list[Window]:
    height, width = level.shape
    halo, multiple = (0, 1) if smooth is None else (smooth.halo, smooth.multiple)
    if window is None:
        if halo > 8:  # a network: margins are dear, so as few windows as memory allows
            side = max(height, width) if height * width <= NETWORK_PIXELS else int(NETWORK_PIXELS**0.5)
            window = (side, side)
        elif isinstance(level.cost, torch.Tensor) and level.cost.is_cuda:
            window = (height, width)
        else:
            window = (max(8, WINDOW_VALUES // (classes * width)), width)
    return split_windows(level.shape, window, halo, multiple)


def _pooled(x: torch.Tensor) -> torch.Tensor:
    """Halve the last two axes by averaging 2×2 pixels (fewer at an odd border)."""
    return F.avg_pool2d(x[None], 2, ceil_mode=True, count_include_pad=False)[0]


def _coarsened(level: Level, windows: Sequence[Window], make: Allocate, passes: Passes) -> Level:
    """The energy's data on a grid of half the resolution: mass, and means of cost and weight."""
    classes, height, width = level.cost.shape
    half = ((height + 1) // 2, (width + 1) // 2)
    cost, share = make((classes, *half)), make(half)
    weight = None if level.weight is None else make(half)
    parts = split_windows(half, tuple(side.stop for side in windows[0].core))  # those that are worked in on that grid
    sums = passes.map(_coarsen, parts, level, cost, share, weight)
    mass = make(half)
    tissue = [part for part, found in zip(parts, sums) if found > 0]
    passes.map(write_from, tissue, share, mass, operator.truediv, sum(sums))
    return Level(cost, mass, weight)


def _coarsen(part: Window, level: Level, cost: MapArray, mass: MapArray, weight: MapArray | None) -> float:
    """Write means on a window of the coarser grid, where it has tissue; returns the sum of those of the mass."""
    key = tuple(slice(2 * side.start, min(2 * side.stop, length)) for side, length in zip(part.core, level.shape))
    fine = level.mass[key]
    if not bool((fine > 0).any()):
        return 0.0
    share = _pooled(fine[None])[0]
    mass[part.core] = share
    fine_cost = level.cost[(slice(None), *key)]
    cost[(slice(None), *part.core)] = _pooled(fine_cost * fine) / share.clamp_min(torch.finfo(fine.dtype).tiny)
    if weight is not None:
        weight[part.core] = _pooled(level.weight[key][None])[0]
    return float(share.sum(dtype=torch.float64))


def _refine(window: Window, coarse: Solution, cost: MapArray, start: MapArray) -> None:
    r"""Write the logarithm of a start on a window: the coarse solution between its cells, and what the pixels say.

    .. math:: u^0 = (1 - \theta)\,\text{bilinear}(u^{\text{coarse}}) + \theta\,\operatorname{softmax}(-c)

    A pixel that starts at a corner of the simplex takes many steps to leave it, because the steps are multiplicative.
    """
    cells, inside = [], []
    for span, length in zip(window.core, cost.shape[1:]):
        first, last = max(span.start // 2 - 1, 0), min((span.stop + 1) // 2 + 1, (length + 1) // 2)
        cells.append(slice(first, last))
        inside.append(slice(span.start - 2 * first, span.stop - 2 * first))
    u = coarse.log_u(*cells).exp()
    u = F.interpolate(u[None], scale_factor=2, mode="bilinear", align_corners=False)[0][(slice(None), *inside)]
    key = (slice(None), *window.core)
    start[key] = torch.lerp(u, torch.softmax(-cost[key], dim=0), PIXEL_SHARE).clamp_min_(1e-4).log_()
