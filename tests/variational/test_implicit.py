import math

import pytest
import torch

from monai_vslp.variational import implicit_offsets, solve_transport

OPTIONS = {"tolerance": 1e-12}


def problem(batch=2, classes=3, pixels=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, classes, pixels, generator=g, dtype=torch.float64)
    mass = torch.rand(batch, pixels, generator=g, dtype=torch.float64) + 0.1
    p = torch.rand(batch, classes, generator=g, dtype=torch.float64) + 0.2
    return scores, mass / mass.sum(dim=1, keepdim=True), p / p.sum(dim=1, keepdim=True)


def outcome(scores, mass, p, h, rho):
    """A number that depends on the segmentation, not on ψ's free constant."""
    psi = implicit_offsets(scores, mass, p, h, rho, **OPTIONS)
    u = torch.softmax((scores + psi[..., None]) / h, dim=1)
    weight = torch.arange(1.0, u.shape[-1] + 1, dtype=u.dtype).sin()
    return (u.square() * weight).sum() + (u[:, 0] * weight.cos()).sum()


@pytest.mark.parametrize("rho", [math.inf, 0.7])
def test_value_is_that_of_newtons_method(rho):
    scores, mass, p = problem()
    psi = implicit_offsets(scores, mass, p, 0.3, rho, **OPTIONS)
    for b in range(2):
        found = solve_transport(scores[b], mass[b], p[b], smoothing=0.3, trust=rho, tolerance=1e-12).psi
        torch.testing.assert_close(psi[b] - psi[b].mean(), found - found.mean(), atol=1e-9, rtol=0)
        assert math.isinf(rho) or torch.allclose(psi[b], found, atol=1e-9)


@pytest.mark.parametrize("rho", [math.inf, 0.7])
def test_derivatives_against_finite_differences(rho):
    scores, mass, p = problem()
    h = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    trust = torch.tensor(rho, dtype=torch.float64, requires_grad=math.isfinite(rho))
    scores.requires_grad_(True)
    p.requires_grad_(True)
    outcome(scores, mass, p, h, trust).backward()
    step = 1e-6
    g = torch.Generator().manual_seed(5)
    d = torch.randn(scores.shape, generator=g, dtype=torch.float64)
    dp = torch.randn(p.shape, generator=g, dtype=torch.float64)
    dp -= dp.mean(dim=1, keepdim=True)  # proportions stay on the simplex

    def at(t, **moved):
        with torch.no_grad():
            values = {"scores": scores.detach(), "p": p.detach(), "h": h.detach(), "trust": trust.detach()}
            return float(
                outcome(
                    *[values[k] + t * moved.get(k, 0) if k != "mass" else mass for k in ("scores", "mass", "p", "h", "trust")]
                )
            )

    assert (at(step, scores=d) - at(-step, scores=d)) / (2 * step) == pytest.approx(float((scores.grad * d).sum()), rel=1e-5)
    assert (at(step, p=dp) - at(-step, p=dp)) / (2 * step) == pytest.approx(float((p.grad * dp).sum()), rel=1e-5)
    assert (at(step, h=1.0) - at(-step, h=1.0)) / (2 * step) == pytest.approx(float(h.grad), rel=1e-5)
    if math.isfinite(rho):
        assert (at(step, trust=1.0) - at(-step, trust=1.0)) / (2 * step) == pytest.approx(float(trust.grad), rel=1e-5)


@pytest.mark.parametrize("rho", [math.inf, 0.7])
def test_a_class_without_proportion_takes_no_part(rho):
    scores, mass, p = problem()
    p[0] = torch.tensor([0.6, 0.0, 0.4])
    scores.requires_grad_(True)
    psi = implicit_offsets(scores, mass, p, 0.3, rho, **OPTIONS)
    assert psi[0, 1] == -math.inf and bool(torch.isfinite(psi[1]).all())
    u = torch.softmax((scores + psi[..., None]) / 0.3, dim=1)
    u[:, 0].square().sum().backward()
    assert bool(torch.isfinite(scores.grad).all()) and not bool(scores.grad[0, 1].any())
