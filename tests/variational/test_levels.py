"""Solver and coarse-to-fine start: the same result whatever the windows, from memory or disk, and steps that never go up."""

import math
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from cases import noisy_confidence

from monai_vslp.variational import (
    FusionFidelity,
    HuberTotalVariation,
    Interval,
    KullbackLeibler,
    MarginalSum,
    TotalDeepVariation,
    Wasserstein,
    refine,
    solve_transport,
    transport_plan,
)
from monai_vslp.variational.levels import Level, _coarsened, solve_levels
from monai_vslp.variational.passes import SerialPasses
from monai_vslp.variational.solver import StoppingRule
from monai_vslp.variational.windows import DiskArray, split_windows

SIZE = (121, 102)  # two grids, the coarse one with an odd side
P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def level(size=SIZE, dtype=torch.float64, weighted=True, seed=0):
    """Costs over smooth regions, mass with a hole and partial pixels, weights of edges."""
    g = torch.Generator().manual_seed(seed + 1)
    q, _ = noisy_confidence(size, seed)
    mass = 0.5 + 0.5 * torch.rand(size, generator=g, dtype=torch.float64)
    mass[size[0] // 3 : size[0] // 2, : size[1] // 3] = 0
    weight = 0.3 + 0.7 * torch.rand(size, generator=g, dtype=torch.float64)
    cost = -torch.log(q.double() + 1e-3)
    return Level(cost.to(dtype), (mass / mass.sum()).to(dtype), weight.to(dtype) if weighted else None)


def solve(grid, marginal=None, *, steps=40, tolerance=1e-12, alpha=1.0, **options):
    marginal = Interval.constraint(P) if marginal is None else marginal
    reachable = 1e-6 if grid.mass[:1, :1].dtype == torch.float32 else 1e-9
    stopping = StoppingRule(steps, tolerance, reachable)
    return solve_levels(grid, marginal=marginal, epsilon=0.3, alpha=alpha, huber=0.1, stopping=stopping, **options)


def whole(solution, size=SIZE):
    return solution.log_u(slice(0, size[0]), slice(0, size[1])).exp()


def from_definition(grid, u, epsilon, alpha, marginal):
    """The energy of a segmentation in memory, without windows."""
    u = u.double()
    local = (grid.cost * u + epsilon * torch.xlogy(u, u)).sum(dim=0)
    value = float((local * grid.mass).sum()) + alpha * HuberTotalVariation(grid.mass, grid.weight).value(u)
    return value + marginal.energy((u * grid.mass).sum(dim=(1, 2)))


@pytest.mark.parametrize("window", [(31, 47), (64, 64), (5, 102), (121, 9), (1000, 1000)])
@pytest.mark.parametrize("trust", [math.inf, 2.0])
def test_windows_do_not_matter(window, trust):
    grid = level()
    marginal = Interval.constraint(P) if math.isinf(trust) else KullbackLeibler(P, trust)
    usual, one = solve(grid, marginal)
    other, two = solve(grid, marginal, window=window)
    torch.testing.assert_close(whole(other), whole(usual), atol=1e-5, rtol=0)
    np.testing.assert_allclose(other.energies, usual.energies, rtol=1e-6)
    torch.testing.assert_close(other.psi, usual.psi, atol=1e-6, rtol=0)
    torch.testing.assert_close(other.proportions, usual.proportions, atol=1e-8, rtol=0)
    assert one.value(whole(usual)) == pytest.approx(two.value(whole(usual)), rel=1e-12)


def test_the_last_energy_is_that_of_the_segmentation():
    grid = level()
    for marginal in (Interval.constraint(P), KullbackLeibler(P, 2.0), Wasserstein(P, 0.5, "ordinal")):
        solution, _ = solve(grid, marginal, steps=15, window=(40, 33))
        u = whole(solution)
        assert solution.energies[-1] == pytest.approx(from_definition(grid, u, 0.3, 1.0, marginal), abs=1e-9)
        torch.testing.assert_close(solution.proportions, (u * grid.mass).sum(dim=(1, 2)), atol=1e-10, rtol=0)
        part = solution.log_u(slice(17, 60), slice(3, 50)).exp()
        torch.testing.assert_close(part, u[:, 17:60, 3:50])


@pytest.mark.parametrize("multigrid", [True, False])
def test_from_disk_as_in_memory(tmp_path, multigrid):
    """float32 on both sides, same windows: sums are rounded in the same order."""
    grid, made, alive, most = level(dtype=torch.float32), [], Counter(), Counter()

    def allocate(shape):
        array, shape = DiskArray(tmp_path / f"{len(made)}.f32", shape, (32, 48)), tuple(shape)
        made.append(shape)
        alive[shape] += 1
        most[shape] = max(most[shape], alive[shape])
        weakref.finalize(array, alive.subtract, [shape])
        return array

    def stored(x):
        array = allocate(x.shape)
        array[(slice(None),) * x.ndim] = x
        return array

    on_disk = Level(*(stored(x) for x in (grid.cost, grid.mass, grid.weight)))
    before = Counter(alive)
    most.clear()
    expected, _ = solve(grid, window=(40, 50), multigrid=multigrid)
    found, smooth = solve(on_disk, window=(40, 50), multigrid=multigrid, allocate=allocate)
    torch.testing.assert_close(whole(found), whole(expected), atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.energies, expected.energies, rtol=1e-6)
    torch.testing.assert_close(found.psi, expected.psi, atol=1e-5, rtol=0)
    assert smooth.value(whole(found)) == pytest.approx(
        HuberTotalVariation(grid.mass, grid.weight).value(whole(found)), rel=1e-6
    )
    # At any time three arrays of scores and of step sizes at the most, beside what is given and a start from a coarser grid.
    assert [most[shape] - before[shape] for shape in ((3, *SIZE), SIZE)] == [3 + multigrid, 3]
    assert any(shape == (3, 61, 51) for shape in made) == multigrid
    reference, _ = solve(level(), multigrid=multigrid)
    assert found.energies[-1] == pytest.approx(reference.energies[-1], rel=1e-5)


def test_a_coarser_grid_keeps_mass_and_means():
    grid = level()
    for size in ((1000, 1000), (31, 46), (1, 1)):
        windows = split_windows(SIZE, size)
        zeros = lambda shape: torch.zeros(tuple(shape), dtype=torch.float64)  # noqa: E731
        coarse = _coarsened(grid, windows, zeros, SerialPasses())
        assert coarse.shape == (61, 51) and coarse.cost.shape == (3, 61, 51)
        assert float(coarse.mass.sum()) == pytest.approx(1.0, abs=1e-12)
        quad = (slice(None), slice(20, 22), slice(60, 62))
        share = grid.mass[quad[1:]]
        torch.testing.assert_close(coarse.cost[:, 10, 30], (grid.cost[quad] * share).sum(dim=(1, 2)) / share.sum())
        torch.testing.assert_close(coarse.weight[10, 30], grid.weight[quad[1:]].mean())
        empty = coarse.mass == 0
        assert bool(empty.any()) and not bool(coarse.cost[:, empty].any())


@pytest.mark.parametrize("marginal", [
    KullbackLeibler(P, 2.0),
    Interval(torch.tensor([0.4, 0.0, 0.0]), torch.tensor([0.45, 1.0, 0.2])),
    Wasserstein(P, 1.0, "ordinal"),
    MarginalSum(KullbackLeibler(P, 2.0), Wasserstein(P, 1.0)),
], ids=lambda term: type(term).__name__)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energies_never_rise(marginal, dtype):
    steps = []
    solution, _ = solve(level(dtype=dtype), marginal, steps=300, tolerance=1e-6, on_step=steps.append)
    assert solution.converged, solution.reason
    assert (np.diff(solution.energies) <= 0).all()
    fine = [step for step in steps if step.pixels == SIZE[0] * SIZE[1]]
    assert [step.energy for step in fine] == solution.energies and [step.iteration for step in fine][0] == 0
    assert {step.pixels for step in steps} == {SIZE[0] * SIZE[1], 61 * 51}
    assert fine[0].change is None and all(step.change >= 0 for step in fine[1:])


@pytest.mark.parametrize("given", [{"trust": 2.0}, {}, {"bounds": ([0.4, 0, 0], [0.5, 1, 1])}])
def test_energies_never_rise_with_learned_and_fusion_terms(given):
    torch.manual_seed(0)
    q, p = noisy_confidence((40, 44))
    views = torch.stack([noisy_confidence((40, 44), seed)[0] for seed in range(3)])
    network = TotalDeepVariation(1, features=4, macro_blocks=1, scales=2)
    terms = given if "bounds" in given else {"proportions": p, **given}
    for options in ({"regularizer": network}, {"stack": views, "fusion_weight": 0.5}, {"regularizer": network, "stack": views,
                                                                                     "fusion_weight": 0.5}):  # fmt: skip
        result = refine(q, **terms, **options, alpha=0.5, max_iterations=60)
        assert len(result.energies) > 3 and result.energies[-1] < result.energies[0]
        assert (np.diff(result.energies) <= 0).all() and np.isfinite(result.energies).all()
        torch.testing.assert_close(result.u.sum(dim=0), torch.ones_like(result.u[0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("last", [0, 4])
def test_the_caller_stops_with_what_was_found(last):
    """On each grid; the energies up to there are those of a run that goes on."""
    grid, seen = level(), []

    def stop(step):
        seen.append(step)
        return step.iteration < last

    stopped, _ = solve(grid, multigrid=False, on_step=stop)
    going_on, _ = solve(grid, multigrid=False, on_step=lambda step: None)  # None is not False
    assert not stopped.converged and "stopped by the caller" in stopped.reason
    assert len(stopped.energies) == last + 1 == len(seen) and len(going_on.energies) > 10
    assert stopped.energies == going_on.energies[: last + 1]
    u = whole(stopped)
    torch.testing.assert_close(u.sum(dim=0), torch.ones(SIZE, dtype=u.dtype))
    torch.testing.assert_close(stopped.proportions, P, atol=1e-8, rtol=0)
    del seen[:]
    both, _ = solve(grid, on_step=stop)
    assert [step.pixels for step in seen] == [61 * 51] * (last + 1) + [SIZE[0] * SIZE[1]] * (last + 1)
    assert len(both.energies) == last + 1 and not both.converged


def test_a_start_is_used_and_left_as_it_is():
    grid = level()
    best, _ = solve(grid, steps=400, tolerance=1e-9)
    start = best.log_u(slice(0, SIZE[0]), slice(0, SIZE[1]))
    kept, steps = start.clone(), []
    again, _ = solve(grid, tolerance=1e-6, start=start, on_step=steps.append)
    assert torch.equal(start, kept)
    assert len(again.energies) <= 4 and again.energies[0] == pytest.approx(best.energies[-1], abs=1e-9)
    assert {step.pixels for step in steps} == {SIZE[0] * SIZE[1]}


def test_without_a_regularizer_the_first_step_is_the_last():
    grid = level()
    solution, smooth = solve(grid, alpha=0.0)
    assert smooth is None and solution.converged and "closed form" in solution.reason and len(solution.energies) == 1
    found = solve_transport(-grid.cost.flatten(1), grid.mass.flatten(), P, smoothing=0.3, tolerance=1e-9)
    torch.testing.assert_close(solution.psi, found.psi, atol=1e-7, rtol=0)


def test_other_potentials_are_added_and_solved_on_one_grid():
    grid, steps = level(), []
    views = torch.stack([torch.softmax(-level(seed=seed).cost, dim=0) for seed in (1, 2)])
    fusion = FusionFidelity(views, grid.mass)
    solution, smooth = solve(grid, steps=200, tolerance=1e-7, others=[(0.7, fusion)], on_step=steps.append)
    u = whole(solution)
    assert {step.pixels for step in steps} == {SIZE[0] * SIZE[1]}
    expected = 0.7 * fusion.value(u) + HuberTotalVariation(grid.mass, grid.weight).value(u)
    assert smooth.value(u) == pytest.approx(expected, rel=1e-12)
    without, _ = solve(grid, steps=200, tolerance=1e-7)
    assert fusion.value(u) < fusion.value(whole(without))


@pytest.mark.parametrize("term", [
    P,
    KullbackLeibler(P, 1.0),
    Interval(torch.tensor([0.6, 0.0, 0.0]), torch.tensor([0.7, 1.0, 1.0])),
    Wasserstein(P, 1.0),
    MarginalSum(KullbackLeibler(P, 1.0), Wasserstein(P, 1.0, "ordinal")),
], ids=["hard", "kl", "interval", "wasserstein", "sum"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_that_are_ruled_out_at_a_pixel(term, dtype):
    """A score of −inf: the same as a very low one, but exactly 0 there."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 400, generator=g, dtype=torch.float64)
    mass = torch.full((400,), 1 / 400, dtype=torch.float64)
    ruled_out = torch.zeros(3, 400, dtype=torch.bool)
    ruled_out[0, :50] = ruled_out[1, 30:90] = ruled_out[2, 60:200] = True
    low = scores.masked_fill(ruled_out, -300.0)
    scores = scores.masked_fill(ruled_out, -math.inf)
    result = solve_transport(scores.to(dtype), mass.to(dtype), term, smoothing=0.3, tolerance=1e-6)
    assert result.converged and math.isfinite(result.value)
    u, _ = transport_plan(scores.to(dtype), result.psi, 0.3)
    assert not bool(u[ruled_out].any()) and bool(torch.isfinite(u).all())
    expected = solve_transport(low, mass, term, smoothing=0.3, tolerance=1e-9)
    torch.testing.assert_close(result.psi, expected.psi, atol=2e-5, rtol=0)
    torch.testing.assert_close((u.double() * mass).sum(dim=1), expected.marginal, atol=1e-5, rtol=0)
