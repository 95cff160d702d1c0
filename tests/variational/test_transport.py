import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_vslp.variational import solve_transport, transport_plan


def problem(pixels: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.log_softmax(2 * torch.randn(classes, pixels, generator=generator, dtype=torch.float64), dim=0)
    mass = torch.rand(pixels, generator=generator, dtype=torch.float64) + 0.1
    mass /= mass.sum()
    p = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.05
    return scores.to(dtype), mass.to(dtype), p / p.sum()


def primal(u, scores, mass, h):
    return float((mass * (-(scores * u) + h * torch.xlogy(u, u)).sum(dim=0)).sum())


@pytest.mark.parametrize("h", [1.0, 0.3, 0.1, 0.03])
@pytest.mark.parametrize("classes", [2, 5])
def test_hard_marginal_agrees_with_pot(h, classes):
    scores, mass, p = problem(400, classes)
    result = solve_transport(scores, mass, p, smoothing=h, tolerance=1e-10)
    u, _ = transport_plan(scores, result.psi, h)
    plan = ot.sinkhorn(
        mass.numpy(), p.numpy(), -scores.T.numpy(), reg=h, method="sinkhorn_log", numItermax=100_000, stopThr=1e-12
    )
    assert result.converged
    np.testing.assert_allclose((u * mass).T.numpy(), plan, atol=1e-7)
    # POT's plan must not be cheaper than ours: same objective, written for u instead of the plan
    reference = torch.from_numpy(plan.T) / mass
    assert primal(u, scores, mass, h) == pytest.approx(primal(reference, scores, mass, h), rel=1e-7)


def test_small_smoothing_approaches_exact_transport():
    scores, mass, p = problem(200, 4)
    exact = float(ot.solve(-scores.T.numpy(), mass.numpy(), p.numpy()).value)
    h = 2e-3
    result = solve_transport(scores, mass, p, smoothing=h, tolerance=1e-9)
    u, _ = transport_plan(scores, result.psi, h)
    cost = float((mass * -(scores * u).sum(dim=0)).sum())
    assert result.converged
    assert exact - 1e-9 <= cost <= exact + h * math.log(4)


@pytest.mark.parametrize("trust", [0.05, 1.0, 20.0])
def test_relaxed_marginal_agrees_with_pot(trust):
    """ot.solve relaxes both marginals at once, so the pixel side gets a weight that makes it a constraint."""
    scores, mass, p = problem(60, 3)
    h = 0.5
    result = solve_transport(scores, mass, p, smoothing=h, trust=trust, tolerance=1e-11)
    plan = ot.unbalanced.sinkhorn_unbalanced(
        mass.numpy(), p.numpy(), -scores.T.numpy(), reg=h, reg_m=(math.inf, trust), reg_type="entropy",
        method="sinkhorn_stabilized", numItermax=100_000, stopThr=1e-13,
    )  # fmt: skip
    np.testing.assert_allclose(result.marginal.numpy(), plan.sum(axis=0), atol=1e-6)


def test_gradient_and_hessian_belong_to_the_value():
    """The optimum of F by autograd equals the Newton optimum, and no neighbour is better."""
    scores, mass, p = problem(50, 4)
    h, trust = 0.2, 2.0

    def dual(psi):
        first = -trust * (p * (torch.exp(-psi / trust) - 1)).sum()
        return first - h * (mass * torch.logsumexp((scores + psi[:, None]) / h, dim=0)).sum()

    result = solve_transport(scores, mass, p, smoothing=h, trust=trust, tolerance=1e-12)
    psi = result.psi.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dual(psi), psi)
    assert float(gradient.abs().sum()) < 1e-10
    assert result.value == pytest.approx(float(dual(result.psi)), rel=1e-12)
    for direction in torch.eye(4, dtype=torch.float64):
        assert float(dual(result.psi + 1e-2 * direction)) < result.value
        assert float(dual(result.psi - 1e-2 * direction)) < result.value


def test_strong_duality():
    scores, mass, p = problem(300, 5)
    h = 0.1
    result = solve_transport(scores, mass, p, smoothing=h, tolerance=1e-12)
    u, _ = transport_plan(scores, result.psi, h)
    assert result.value == pytest.approx(primal(u, scores, mass, h), rel=1e-9)


def test_two_pixels_two_classes_closed_form():
    """By symmetry u_1 = (1-s, s), u_2 = (s, 1-s) with s = sigmoid(-c/h) for opposite scores."""
    scores = torch.tensor([[0.0, -1.0], [-1.0, 0.0]], dtype=torch.float64)
    mass = torch.tensor([0.5, 0.5], dtype=torch.float64)
    result = solve_transport(scores, mass, torch.tensor([0.5, 0.5]), smoothing=0.5)
    u, _ = transport_plan(scores, result.psi, 0.5)
    s = 1 / (1 + math.exp(1 / 0.5))
    np.testing.assert_allclose(u.numpy(), [[1 - s, s], [s, 1 - s]], atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(1, 7),
    h=st.sampled_from([2.0, 0.3, 0.05, 0.01]),
    trust=st.sampled_from([math.inf, 0.1, 5.0]),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    zero=st.booleans(),
)
def test_any_problem_converges_on_the_simplex(seed, classes, h, trust, scale, zero):
    scores, mass, p = problem(80, classes, seed)
    if zero and classes > 1:
        p[0] = 0
        p /= p.sum()
    result = solve_transport(scale * scores, mass, p, smoothing=h, trust=trust, tolerance=1e-7, max_iterations=500)
    u, _ = transport_plan(scale * scores, result.psi, h)
    assert result.converged, result
    np.testing.assert_allclose(u.sum(dim=0).numpy(), 1, atol=1e-12)
    if math.isinf(trust):
        assert float(((u * mass).sum(dim=1) - p).abs().sum()) <= 1.1e-7
    assert not bool((u[p == 0] > 0).any())


def test_constant_shift_of_scores_does_not_matter():
    scores, mass, p = problem(100, 3)
    shift = torch.randn(100, dtype=torch.float64)
    a = solve_transport(scores, mass, p, smoothing=0.1, tolerance=1e-11)
    b = solve_transport(scores + shift, mass, p, smoothing=0.1, tolerance=1e-11)
    np.testing.assert_allclose(a.psi.numpy(), b.psi.numpy(), atol=1e-8)


def test_float32_reaches_a_residual_of_1e_6_on_many_pixels():
    scores, mass, p = problem(200_000, 5, dtype=torch.float32)
    result = solve_transport(scores, mass, p, smoothing=0.1, tolerance=1e-6)
    u, _ = transport_plan(scores, result.psi, 0.1)
    assert result.converged
    assert float(((u.double() * mass.double()).sum(dim=1) - p).abs().sum()) < 1e-6


def test_warm_start_needs_fewer_passes():
    scores, mass, p = problem(2000, 4)
    cold = solve_transport(scores, mass, p, smoothing=0.05)
    warm = solve_transport(scores, mass, p, smoothing=0.05, psi=cold.psi)
    assert warm.passes == 1 < cold.passes
