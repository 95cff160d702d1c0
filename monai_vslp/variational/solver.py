"""Entropic proximal gradient: minimises fidelity + marginal term + smooth potentials over simplex-valued maps.

Every quantity is added up over windows of the map, so that the same code runs in memory, from disk, and over workers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from monai_vslp.utils.errors import InputError
from monai_vslp.variational.marginal import Marginal
from monai_vslp.variational.passes import Passes, SerialPasses, write_from
from monai_vslp.variational.potential import Potential
from monai_vslp.variational.transport import PixelSums, maximize_dual, pixel_sums
from monai_vslp.variational.windows import MapArray, Window

__all__ = ["Problem", "Solution", "Step", "StoppingRule", "minimize"]

LOG_FLOOR = -80.0  # keeps differences of logarithms finite in float32; exp(-80) is 0 beside anything else
FIRST_STEP = 2.0  # σ: twice what is safe for any segmentation; near a solution it is mostly accepted, with momentum not always
SMALLEST_STEP = 1e-6
PATIENCE = 6  # steps after a halving of σ before it may grow
UNSTABLE_AGE = 6  # momentum that overshoots within so many steps says that σ is too long for it, not that it turned
SMALL_STEPS = 3  # so many in a row mean convergence: one alone is also what follows a restart, or comes before one


@dataclass(frozen=True)
class StoppingRule:
    """When to stop.

    Attributes:
        max_iterations: limit of proximal steps.
        tolerance: relative change of the energy per step; the iteration has converged after three in a row below it.
        marginal_tolerance: residual of the semi-dual that each step is solved to.
    """

    max_iterations: int = 200
    tolerance: float = 3e-5
    marginal_tolerance: float = 1e-6


@dataclass(frozen=True)
class Step:
    """What is reported after each accepted step.

    Attributes:
        iteration: number of the step, from 1; 0 is the start.
        energy: energy after it.
        change: relative decrease of the energy; None at the start.
        residual: of the semi-dual; None without a marginal term.
        pixels: size of the grid, for progress over several grids.
    """

    iteration: int
    energy: float
    change: float | None
    residual: float | None
    pixels: int


@dataclass(frozen=True)
class Problem:
    r"""The energy :math:`\sum_i a_i(\langle c_i,u_i\rangle + \varepsilon\langle u_i,\log u_i\rangle) + \Phi(\bar u) + P(u)`.

    Attributes:
        cost: :math:`c`, shape ``[C, H, W]``, finite.
        mass: :math:`a`, shape ``[H, W]``, sums to 1.
        epsilon: :math:`\varepsilon > 0`.
        marginal: Φ, or None; all of its classes are active.
        smooth: P, or None.
        windows: cover the map; their margin is at least that of ``smooth``.
    """

    cost: MapArray
    mass: MapArray
    epsilon: float
    marginal: Marginal | None
    smooth: Potential | None
    windows: Sequence[Window]


@dataclass(frozen=True)
class _Iterate:
    """A segmentation as scores: u = softmax(S + r ψ) with S = Z/h and r = 1/h, never stored itself."""

    scores: MapArray
    rate: MapArray | float
    psi: torch.Tensor
    sums: PixelSums
    residual: float | None

    def exponents(self, rows: slice, columns: slice) -> torch.Tensor:
        """S + r ψ on a rectangle, a new array."""
        scores = self.scores[:, rows, columns]
        shift = self.psi.to(scores)[:, None, None]
        if isinstance(self.rate, float):
            return scores + shift * self.rate
        return torch.addcmul(scores, shift, self.rate[rows, columns])


@dataclass(frozen=True)
class Solution:
    r"""Minimiser with its history.

    Attributes:
        psi: ψ, shape ``[C]``, float64.
        proportions: :math:`\bar u`, shape ``[C]``, float64.
        energies: energy of the start and after each accepted step.
        residual: of the semi-dual; None without a marginal term.
        converged, reason: whether the stopping rule was met, and why the iteration ended.
    """

    iterate: _Iterate
    energies: list[float]
    converged: bool
    reason: str

    @property
    def psi(self) -> torch.Tensor:
        return self.iterate.psi

    @property
    def proportions(self) -> torch.Tensor:
        return self.iterate.sums.marginal

    @property
    def residual(self) -> float | None:
        return self.iterate.residual

    def log_u(self, rows: slice, columns: slice) -> torch.Tensor:
        """Logarithm of the segmentation on a rectangle, shape ``[C, h, w]``."""
        return torch.log_softmax(self.iterate.exponents(rows, columns), dim=0)


def minimize(
    problem: Problem,
    allocate: Callable[[Sequence[int]], MapArray],
    stopping: StoppingRule,
    *,
    start: MapArray | None = None,
    psi: torch.Tensor | None = None,
    on_step: Callable[[Step], bool | None] | None = None,
    passes: Passes | None = None,
) -> Solution:
    r"""Minimise :math:`E(u) = D(u) + \Phi(\bar u) + P(u)` over :math:`u_i \in \Delta_C`.

    Each step replaces :math:`P` by its linearisation at :math:`y` (the last iterate moved on by momentum) plus a
    Kullback–Leibler divergence, scaled pixel by pixel with the curvature :math:`d_i` of a quadratic above :math:`P`. With
    :math:`g_i = a_i^{-1}\partial P/\partial y_i`, :math:`\tau_i = \sigma/d_i` and :math:`h_i = \varepsilon + 1/\tau_i`:

    .. math::
        Z_i = \tfrac1{\tau_i} \log y_i - c_i - g_i, \qquad u_i^{s+1} = \operatorname{softmax}((Z_i + \psi)/h_i),

    where ψ maximises the semi-dual of :func:`~monai_vslp.variational.transport.solve_transport` (ψ = 0 without a marginal
    term). For σ = 1 and a true majorizer such a step without momentum cannot raise :math:`E`, because
    :math:`\mathrm{KL}(u\|y) \ge \tfrac12\lVert u-y\rVert_1^2 \ge \lVert u-y\rVert_2^2` on the simplex.
    Longer steps are tried first. A step that would raise :math:`E` is not taken: momentum is dropped, without momentum σ is
    halved, and where momentum overshot soon after its start σ stays at half. So the energies never rise.

    A step is three or four passes over the windows: one that linearises, one or two for ψ, one that evaluates.

    Args:
        problem: the energy.
        allocate: makes an array of a shape ``[C, H, W]`` or ``[H, W]``; up to four of each are used.
        stopping: when to stop.
        start: :math:`\log u^0` up to a constant per pixel, shape ``[C, H, W]``, overwritten; by default the minimiser
            without P.
        psi: start of the potentials.
        on_step: called after the start and each accepted step; returning False ends the iteration there.
        passes: who makes the passes; this process by default. Others need maps that are files.

    Returns:
        The solution; ``energies[0]`` belongs to the start.

    Raises:
        InputError: maps in memory, which other processes cannot write.

    Source:
        Bregman proximal gradient: H. Bauschke, J. Bolte and M. Teboulle, "A descent lemma beyond Lipschitz gradient
        continuity", Math. Oper. Res. 2017. Restarts: B. O'Donoghue and E. Candès, "Adaptive restart for accelerated
        gradient schemes", Found. Comput. Math. 2015. The scaling by pixel is ours.
    """
    passes = SerialPasses() if passes is None else passes
    if isinstance(problem.cost, torch.Tensor) and not isinstance(passes, SerialPasses):
        raise InputError("minimize: a map in memory cannot be shared by other processes; leave passes out.")
    runner = _Runner(problem, stopping.marginal_tolerance, passes)
    shape = tuple(problem.cost.shape)
    # Sums over one and the same state may differ by this much, relatively.
    rounding = 4.0 * torch.finfo(runner.dtype).eps
    sigma, longest, age, patience, small = FIRST_STEP, FIRST_STEP, 0, 0, 0
    if start is None or problem.smooth is None:
        scores = allocate(shape)
        passes.map(write_from, problem.windows, problem.cost, scores, operator.mul, -1.0 / problem.epsilon)
        current = runner.transport(scores, 1.0 / problem.epsilon, psi, problem.epsilon)
    else:
        # Projecting the start onto the proportions makes every later energy comparable with the first.
        current = runner.transport(start, 1.0, None, 1.0)
    energies = [runner.energy(current)]

    def done(reason: str, converged: bool) -> Solution:
        return Solution(current, energies, converged, reason)

    def proceed(iteration: int, change: float | None) -> bool:
        report = Step(iteration, energies[-1], change, current.residual, shape[1] * shape[2])
        return on_step is None or on_step(report) is not False

    go_on = proceed(0, None)
    if problem.smooth is None:
        return done("closed form: no regularizer", True)
    previous: _Iterate | None = None
    offsets = psi if psi is not None else current.psi if start is None else None
    spare: list[tuple[MapArray, MapArray]] = []
    for iteration in range(1, stopping.max_iterations + 1):
        if not go_on:
            return done("stopped by the caller", False)
        scores, rate = spare.pop() if spare else (allocate(shape), allocate(shape[1:]))
        typical = runner.linearise(current, previous, age, sigma, scores, rate)
        trial = runner.transport(scores, rate, offsets, typical)
        energy = runner.energy(trial)
        change = (energies[-1] - energy) / max(abs(energy), 1e-12)
        if change < 0:
            spare.append((scores, rate))
            small = 0
            if age > 0:
                if age <= UNSTABLE_AGE:
                    longest = max(0.5 * longest, SMALLEST_STEP)
                    sigma = min(sigma, longest)
                age = 0  # the momentum overshot: go on from the best point without it
            elif sigma > SMALLEST_STEP and change < -rounding:
                sigma, patience = 0.5 * sigma, PATIENCE
            else:
                return done("no further decrease in this precision", True)
            continue
        if previous is not None and not isinstance(previous.rate, float):
            spare.append((previous.scores, previous.rate))
        previous, current = current, trial
        offsets = trial.psi
        energies.append(energy)
        age += 1
        go_on = proceed(iteration, change)
        small = small + 1 if change < stopping.tolerance else 0
        if small == SMALL_STEPS:
            return done(f"relative energy change {change:.1e} below {stopping.tolerance:.1e}", True)
        # A step that is too long costs a whole round: try a longer one only where the last few were accepted at once.
        patience -= 1
        if patience < 0 and sigma < longest:
            sigma, patience = min(2.0 * sigma, longest), PATIENCE
    return done(f"the limit of {stopping.max_iterations} steps", False)


class _Runner:
    """The passes over the windows of a problem."""

    def __init__(self, problem: Problem, tolerance: float, passes: Passes) -> None:
        self.problem, self.tolerance, self.passes = problem, tolerance, passes
        self.terms = replace(problem, windows=())  # what a pass over some windows needs
        self.dtype = problem.cost[:, :1, :1].dtype

    def transport(self, scores: MapArray, rate: MapArray | float, psi: torch.Tensor | None, smoothing: float) -> _Iterate:
        """Solve for the potentials that belong to scores S = Z/h and rates 1/h; ``smoothing`` is a typical h."""
        problem = self.problem

        def sums(point: torch.Tensor, factor: float) -> PixelSums:
            found = self.passes.map(_window_sums, problem.windows, scores, rate, problem.mass, point, factor)
            return reduce(operator.add, found)

        if problem.marginal is None:
            zeros = torch.zeros(problem.cost.shape[0], dtype=torch.float64)
            return _Iterate(scores, rate, zeros, sums(zeros, 1.0), None)
        found = maximize_dual(
            sums, problem.marginal, smoothing=smoothing, psi=psi, tolerance=self.tolerance, continuation=256.0
        )
        sums_found = PixelSums(found.value, found.marginal, torch.empty(0))
        return _Iterate(scores, rate, found.psi, sums_found, found.residual)

    def linearise(
        self, current: _Iterate, previous: _Iterate | None, age: int, sigma: float, scores: MapArray, rate: MapArray
    ) -> float:
        """Write S and r for a step from the current iterate, moved on by momentum; returns the mean smoothing h."""
        # Momentum grows as for convex energies; restarts adapt it to strongly convex ones.
        beta = (age + 2.0) / (age + 5.0) if age > 0 and previous is not None else 0.0
        behind = previous if beta > 0 else None
        return sum(self.passes.map(_linearise, self.problem.windows, self.terms, current, behind, beta, sigma, scores, rate))

    def energy(self, iterate: _Iterate) -> float:
        """E(u)."""
        total = sum(self.passes.map(_energy, self.problem.windows, self.terms, iterate))
        marginal = self.problem.marginal
        return total if marginal is None else total + marginal.energy(iterate.sums.marginal)


def _window_sums(
    window: Window, scores: MapArray, rate: MapArray | float, mass: MapArray, psi: torch.Tensor, factor: float
) -> PixelSums:
    """What a window adds to the semi-dual."""
    s = scores[(slice(None), *window.core)]
    r = rate if isinstance(rate, float) else rate[window.core].reshape(-1)
    return pixel_sums(s.reshape(len(s), -1), mass[window.core].reshape(-1), psi, r, factor=factor)


def _linearise(
    window: Window,
    terms: Problem,
    current: _Iterate,
    previous: _Iterate | None,
    beta: float,
    sigma: float,
    scores: MapArray,
    rate: MapArray,
) -> float:
    """Write S and r on a window; returns what it adds to the mean smoothing."""
    inner = (slice(None), *window.inner)
    log_y = current.exponents(*window.outer)
    if previous is not None:
        # Momentum among logarithms keeps the extrapolated point inside the simplex.
        log_y = torch.lerp(previous.exponents(*window.outer), log_y, 1.0 + beta)
    log_y.sub_(log_y.amax(dim=0)).clamp_min_(LOG_FLOOR)
    y = log_y.exp()
    y.div_(y.sum(dim=0))
    gradient, curvature = terms.smooth.majorizer(y, window)
    curvature = curvature / sigma
    r = 1.0 / (terms.epsilon + curvature)
    s = log_y[inner].mul_(curvature).sub_(terms.cost[(slice(None), *window.core)]).sub_(gradient).mul_(r)
    scores[(slice(None), *window.core)] = s
    rate[window.core] = r
    return float((terms.mass[window.core] * (terms.epsilon + curvature)).sum(dtype=torch.float64))


def _energy(window: Window, terms: Problem, iterate: _Iterate) -> float:
    """What a window adds to the energy, without the marginal term."""
    log_u = iterate.exponents(*(window.core if terms.smooth is None else window.outer))
    log_u.sub_(log_u.amax(dim=0))
    u = log_u.exp()
    norm = u.sum(dim=0)
    u.div_(norm)
    regularization = 0.0
    if terms.smooth is not None:
        regularization = terms.smooth.value(u, window)
        inner = (slice(None), *window.inner)
        u, log_u, norm = u[inner], log_u[inner], norm[window.inner]
    cost = terms.cost[(slice(None), *window.core)]
    local = torch.add(cost, log_u, alpha=terms.epsilon).mul_(u).sum(dim=0)
    local.sub_(norm.log(), alpha=terms.epsilon)
    return regularization + float((local * terms.mass[window.core]).sum(dtype=torch.float64))
