"""Fusion of views: values, gradients, the exact proximal map against a quadratic program, and what the minimisers are."""

import math

import numpy as np
import pytest
import torch

from monai_vslp.utils.errors import InputError
from monai_vslp.variational import FusionFidelity, ground_metric, refine, simplex_wasserstein, spread_weights
from monai_vslp.variational.windows import split_windows

F64 = torch.float64
PLANE = torch.tensor([[0.0, 0.6, 1.0, 0.5], [0.6, 0.0, 0.7, 0.8], [1.0, 0.7, 0.0, 0.9], [0.5, 0.8, 0.9, 0.0]], dtype=F64)
METRICS = {"discrete": "discrete", "ordinal": "ordinal", "plane": PLANE}


def views(count, classes=4, shape=(3, 5), seed=0, power=2.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, classes, *shape, generator=generator, dtype=F64) ** power + 1e-4
    return x / x.sum(dim=1, keepdim=True)


def tissue(shape=(3, 5), seed=7, background=()):
    mass = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) + 0.2
    for pixel in background:
        mass[pixel] = 0.0
    return mass / mass.sum()


def exact_energy(u, stack, weight):
    """Σ_t w_t ½‖u − q_t‖₁ per pixel."""
    return 0.5 * (weight[:, None] * (u - stack).abs()).sum(dim=(0, 1))


# ---------------------------------------------------------------- value, gradient, maps


@pytest.mark.parametrize("name", METRICS)
def test_value_is_what_the_formula_says(name):
    stack, mass, u = views(3), tissue(background=[(0, 0)]), views(1, seed=5)[0]
    weight = torch.rand(3, 3, 5, generator=torch.Generator().manual_seed(1), dtype=F64) + 0.1
    fidelity = FusionFidelity(stack, mass, METRICS[name], weight, smooth=0.05)
    g = ground_metric(METRICS[name], 4)
    expected = 0.0
    for t in range(3):
        distance = simplex_wasserstein(u, stack[t], g, 0.05)[0]
        expected += float((mass * weight[t] / weight.sum(dim=0) * distance).sum())
    assert fidelity.value(u) == pytest.approx(expected, rel=1e-12)
    value, gradient = fidelity.value_and_gradient(u)
    energy = fidelity.energy_map(u)
    assert value == fidelity.value(u) == pytest.approx(float((energy * mass).sum()), rel=1e-12)
    assert gradient.shape == u.shape and energy.shape == mass.shape
    assert float(energy[0, 0]) == 0 and float(gradient[:, 0, 0].abs().max()) == 0


@pytest.mark.parametrize("name", ["discrete", "ordinal"])
def test_gradient_by_autograd(name):
    """Gradient per unit mass, up to the constant that the simplex leaves free."""
    stack, mass = views(3), tissue(background=[(1, 2)])
    u = views(1, seed=5)[0].requires_grad_()
    weight = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    g = ground_metric(name, 4)
    total = sum(w * (mass * simplex_wasserstein(u, q, g, 0.02)[0]).sum() for w, q in zip(weight, stack))
    (reference,) = torch.autograd.grad(total, u)
    reference = reference / mass.masked_fill(mass == 0, 1.0)
    gradient = FusionFidelity(stack, mass, name, weight, smooth=0.02).value_and_gradient(u.detach())[1]
    torch.testing.assert_close(gradient, reference - reference.mean(dim=0))


@pytest.mark.parametrize("name", METRICS)
def test_gradient_by_finite_differences(name):
    stack, mass, u = views(3), tissue(), views(1, seed=5)[0]
    fidelity = FusionFidelity(stack, mass, METRICS[name], smooth=0.1)
    gradient = fidelity.value_and_gradient(u)[1]
    direction = torch.randn(u.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    direction = 1e-2 * u.amin(dim=0) * (direction - direction.mean(dim=0))
    slope = (fidelity.value(u + 1e-2 * direction) - fidelity.value(u - 1e-2 * direction)) / 2e-2
    assert slope == pytest.approx(float((mass * gradient * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("start", ["at a view", "elsewhere"])
def test_majorizer_lies_above(start):
    """At its single view the bound is met with equality, for steps within the width of the smoothing."""
    tight = start == "at a view"
    stack, mass = views(1 if tight else 4), tissue()
    u = stack[0] if tight else views(1, seed=5)[0]
    fidelity = FusionFidelity(stack, mass, smooth=0.05)
    value, gradient = fidelity.value_and_gradient(u)
    slope, curvature = fidelity.majorizer(u)
    torch.testing.assert_close(slope, gradient)
    for seed in range(20):
        step = (0.02 + 0.05 * seed) * (views(1, seed=seed + 40)[0] - u)
        bound = value + float((mass * ((gradient * step).sum(dim=0) + curvature * step.square().sum(dim=0))).sum())
        assert fidelity.value(u + step) <= bound + 1e-12
        if tight and float(step.abs().max()) < 0.05:
            assert fidelity.value(u + step) == pytest.approx(bound, rel=1e-9)


def test_windows_add_up_to_the_map():
    stack, mass = views(3, shape=(11, 13)), tissue((11, 13), background=[(0, 3), (5, 5)])
    u = views(1, shape=(11, 13), seed=5)[0]
    fidelity = FusionFidelity(stack, mass)
    value, gradient = fidelity.value_and_gradient(u)
    energy, parts = fidelity.energy_map(u), 0.0
    for window in split_windows((11, 13), (4, 5), halo=2):
        cut = u[(slice(None), *window.outer)]
        part, slope = fidelity.value_and_gradient(cut, window)
        parts += part
        torch.testing.assert_close(slope, gradient[(slice(None), *window.core)])
        torch.testing.assert_close(fidelity.energy_map(cut, window), energy[window.core])
    assert parts == pytest.approx(value, rel=1e-12)


def test_background_counts_nothing():
    mass = tissue(background=[(0, 0), (2, 4)])
    stack, u = views(3), views(1, seed=5)[0]
    other = stack.clone()
    other[:, :, 0, 0] = math.nan
    other[:, :, 2, 4] = 0.0
    first, second = FusionFidelity(stack, mass), FusionFidelity(other, mass)
    assert first.value(u) == second.value(u)
    assert torch.equal(first.value_and_gradient(u)[1], second.value_and_gradient(u)[1])
    assert torch.equal(first.energy_map(u), second.energy_map(u))


def test_float32_stays_float32():
    stack, mass, u = views(3), tissue(), views(1, seed=5)[0]
    for metric in METRICS.values():
        small = FusionFidelity(stack.float(), mass.float(), metric, smooth=0.05)
        large = FusionFidelity(stack, mass, metric, smooth=0.05)
        value, gradient = small.value_and_gradient(u.float())
        assert gradient.dtype == small.energy_map(u.float()).dtype == torch.float32
        assert value == pytest.approx(large.value(u), rel=1e-5)


# ---------------------------------------------------------------- minimisers


def solve_pixel(v, stack, weight, step):
    """The proximal map of one pixel as a quadratic program with slacks s ≥ |u − q|, by SLSQP."""
    optimize = pytest.importorskip("scipy.optimize")
    classes, count = len(v), len(stack)
    smaller = np.concatenate([np.tile(np.eye(classes), (count, 1)), -np.tile(np.eye(classes), (count, 1))])
    slack = np.tile(np.eye(classes * count), (2, 1))
    offset = np.concatenate([-stack.ravel(), stack.ravel()])
    price = 0.5 * np.repeat(weight, classes)

    def energy(x):
        return 0.5 / step * ((x[:classes] - v) ** 2).sum() + price @ x[classes:]

    def slope(x):
        return np.concatenate([(x[:classes] - v) / step, price])

    start = np.concatenate([np.full(classes, 1 / classes), np.full(classes * count, 1.0)])
    found = optimize.minimize(
        energy, start, jac=slope, method="SLSQP", bounds=[(0, None)] * len(start),
        constraints=[
            {"type": "eq", "fun": lambda x: x[:classes].sum() - 1,
             "jac": lambda x: np.concatenate([np.ones(classes), np.zeros(classes * count)])},
            {"type": "ineq", "fun": lambda x: slack @ x[classes:] - smaller @ x[:classes] - offset,
             "jac": lambda x: np.concatenate([-smaller, slack], axis=1)},
        ],
        options={"ftol": 1e-15, "maxiter": 500},
    )  # fmt: skip
    return found.x[:classes]


@pytest.mark.parametrize("step", [0.05, 0.4, 3.0])
def test_prox_agrees_with_a_quadratic_program(step):
    stack, mass = views(3, shape=(2, 4)), tissue((2, 4))
    v = views(1, shape=(2, 4), seed=5)[0] + 0.3 * torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(3), dtype=F64)
    weight = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(4), dtype=F64) + 0.1
    weight /= weight.sum(dim=0)
    found = FusionFidelity(stack, mass, weight=weight).prox(v, step)
    for row, column in np.ndindex(2, 4):
        at = (..., row, column)
        reference = solve_pixel(v[at].numpy(), stack[at].numpy(), weight[at].numpy(), step)
        np.testing.assert_allclose(found[at].numpy(), reference, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("step", [1e-4, 0.3, 1e3])
def test_prox_is_on_the_simplex_and_no_point_is_better(step, dtype):
    stack, mass = views(5, shape=(8, 8)).to(dtype), tissue((8, 8)).to(dtype)
    v = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=F64).to(dtype)
    fidelity = FusionFidelity(stack, mass)
    u = fidelity.prox(v, step)
    assert u.dtype == dtype and float(u.min()) >= 0
    assert float((u.sum(dim=0) - 1).abs().max()) < 10 * torch.finfo(dtype).eps

    def energy(w):
        w = w.double()
        return 0.5 / step * (w - v).square().sum(dim=0) + exact_energy(w, stack.double(), fidelity.weight.double())

    best = energy(u)
    for seed in range(10):
        other = views(1, shape=(8, 8), seed=seed + 60)[0]
        for length in (1e-3, 0.1, 1.0):
            slack = 1e-9 if dtype == F64 else 1e-5
            assert bool((energy(u + length * (other - u)) >= best * (1 - slack) - slack).all())


def test_prox_of_large_and_small_steps():
    stack, mass = views(1, shape=(4, 4)), tissue((4, 4))
    v = views(1, shape=(4, 4), seed=9)[0]
    fidelity = FusionFidelity(stack, mass)
    torch.testing.assert_close(fidelity.prox(v, 1e-9), v, atol=1e-8, rtol=0)  # already on the simplex: stays
    torch.testing.assert_close(fidelity.prox(v, 100.0), stack[0], atol=1e-12, rtol=0)  # one view: goes there in one step


@pytest.mark.parametrize("name", METRICS)
def test_one_view_is_its_own_minimiser(name):
    stack, mass = views(1), tissue()
    g = ground_metric(METRICS[name], 4)
    others = [views(1, seed=seed)[0] for seed in range(30, 40)]
    if name == "plane":  # exactly, pair by pair
        least = simplex_wasserstein(stack[0], stack[0], g)[0]
        assert float(least.abs().max()) < 1e-12
        assert all(bool((simplex_wasserstein(u, stack[0], g)[0] > 1e-4).all()) for u in others)
        return
    fidelity = FusionFidelity(stack, mass, METRICS[name])
    value, gradient = fidelity.value_and_gradient(stack[0])
    assert value == 0 and float(gradient.abs().max()) == 0
    assert all(fidelity.value(u) > 1e-3 for u in others)


def minimiser(fidelity, start, steps=60):
    """Proximal points of the unsmoothed discrete fidelity, to its minimiser."""
    u = start
    for _ in range(steps):
        u = fidelity.prox(u, 1.0)
    return u


def test_an_outlying_view_does_not_move_the_minimiser():
    q = views(1, shape=(4, 4))[0]
    outlier = torch.zeros_like(q)
    outlier[3] = 1.0
    mass, start = tissue((4, 4)), torch.full_like(q, 0.25)
    kept = minimiser(FusionFidelity(torch.stack([q, q, outlier]), mass), start)
    torch.testing.assert_close(kept, q, atol=1e-9, rtol=0)
    assert float((torch.stack([q, q, outlier]).mean(dim=0) - q).abs().max()) > 0.1  # the mean is moved
    # An outlier that weighs more than half is none any more.
    moved = minimiser(FusionFidelity(torch.stack([q, q, outlier]), mass, weight=torch.tensor([0.2, 0.2, 0.6])), start)
    torch.testing.assert_close(moved, outlier, atol=1e-9, rtol=0)


def test_refinement_follows_the_views_not_the_outlier():
    """In the whole energy: with a strong fusion term and hardly any other the result is near the two views that agree."""
    q = views(1, shape=(8, 8), power=1.0)[0]
    outlier = torch.full_like(q, 0.02)
    outlier[3] = 0.94
    stack = torch.stack([q, q, outlier])
    result = refine(
        torch.full_like(q, 0.25), stack=stack, alpha=0.0, epsilon=1e-3, fusion_weight=20.0, max_iterations=2000, tolerance=1e-9
    )
    assert float((result.u - q).abs().mean()) < 0.01
    assert all(after <= before + 1e-9 for before, after in zip(result.energies, result.energies[1:]))


# ---------------------------------------------------------------- weights


def test_weights_of_spread():
    q = views(1, shape=(4, 4))[0]
    outlier = views(1, shape=(4, 4), seed=9)[0]
    stack = torch.stack([q, q, q, outlier])
    weight = spread_weights(stack, 0.1)
    assert weight.shape == (4, 4, 4)
    torch.testing.assert_close(weight.sum(dim=0), torch.ones(4, 4, dtype=F64))
    assert bool((weight[3] < weight[0]).all())
    torch.testing.assert_close(weight[0], weight[2])
    distance = 0.5 * (stack - stack.mean(dim=0)).abs().sum(dim=1)
    torch.testing.assert_close(weight, torch.softmax(-distance / 0.1, dim=0))
    torch.testing.assert_close(spread_weights(stack, 1e9), torch.full((4, 4, 4), 0.25, dtype=F64))
    torch.testing.assert_close(spread_weights(stack[:1], 0.1), torch.ones(1, 4, 4, dtype=F64))


def test_prior_weights_enter_consensus_and_result():
    stack = views(3, shape=(4, 4))
    prior = torch.tensor([2.0, 0.0, 6.0], dtype=F64)
    consensus = 0.25 * stack[0] + 0.75 * stack[2]
    distance = 0.5 * (stack - consensus).abs().sum(dim=1)
    expected = torch.tensor([0.25, 0.0, 0.75], dtype=F64).view(3, 1, 1) * torch.exp(-distance / 0.2)
    torch.testing.assert_close(spread_weights(stack, 0.2, weight=prior), expected / expected.sum(dim=0))
    torch.testing.assert_close(spread_weights(stack, 0.2, weight=torch.ones(3)), spread_weights(stack, 0.2))


def test_spread_under_a_metric_without_closed_form():
    q, outlier = views(1, shape=(40, 40))[0], views(1, shape=(40, 40), seed=9)[0]
    stack = torch.stack([q, q, outlier])
    with pytest.raises(InputError, match="positive smoothing"):
        spread_weights(stack, 0.1, PLANE)
    weight = spread_weights(stack, 0.1, PLANE, smooth=0.05)
    assert float((weight[2] < weight[0]).double().mean()) > 0.99
    exact = spread_weights(stack[:, :, :4, :4], 0.1, PLANE)
    torch.testing.assert_close(spread_weights(stack[:, :, :4, :4], 0.1, PLANE, smooth=1e-3), exact, atol=0.02, rtol=0)


def test_scale_of_weights_does_not_matter_and_background_needs_none():
    stack, mass, u = views(3), tissue(background=[(0, 0)]), views(1, seed=5)[0]
    weight = torch.tensor([1.0, 3.0, 4.0])
    one, ten = FusionFidelity(stack, mass, weight=weight), FusionFidelity(stack, mass, weight=10 * weight)
    assert one.value(u) == pytest.approx(ten.value(u), rel=1e-6)
    masked = weight.view(3, 1, 1) * (mass > 0)
    assert FusionFidelity(stack, mass, weight=masked).value(u) == pytest.approx(one.value(u), rel=1e-12)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stack": views(1)[0]}, r"shape \[A, C, H, W\]"),
        ({"mass": tissue((4, 5))}, "mass's grid"),
        ({"stack": torch.randn(3, 4, 3, 5, generator=torch.Generator().manual_seed(0))}, "apply a softmax"),
        ({"stack": views(3) * math.nan}, "apply a softmax"),
        ({"weight": torch.ones(2)}, r"weights of 3 views have shape \[A\] = \[3\]"),
        ({"weight": torch.tensor([1.0, -1.0, 1.0])}, "not negative"),
        ({"weight": torch.tensor([1.0, math.nan, 1.0])}, "finite"),
        ({"weight": torch.zeros(3)}, "positive for one view"),
        ({"smooth": 0.0}, "smooth must be positive, got 0"),
        ({"metric": "cosine"}, "'discrete', 'ordinal' or a matrix"),
    ],
)
def test_what_cannot_be_used_is_refused(change, said):
    with pytest.raises(InputError, match=said):
        FusionFidelity(**({"stack": views(3), "mass": tissue()} | change))


def test_prox_and_spread_refuse_what_they_cannot_do():
    stack, mass = views(3), tissue()
    with pytest.raises(InputError, match="discrete metric only"):
        FusionFidelity(stack, mass, "ordinal").prox(stack[0], 1.0)
    with pytest.raises(InputError, match="step must be positive, got 0"):
        FusionFidelity(stack, mass).prox(stack[0], 0.0)
    with pytest.raises(InputError, match="temperature must be positive"):
        spread_weights(stack, 0.0)
    with pytest.raises(InputError, match=r"shape \[A, C, H, W\]"):
        spread_weights(stack[0])
