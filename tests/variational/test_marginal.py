import math

import numpy as np
import pytest
import torch
from cases import noisy_confidence
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.optimize import minimize as scipy_minimize

from monai_vslp.utils.errors import ProportionError
from monai_vslp.variational import (
    Interval,
    KullbackLeibler,
    MarginalSum,
    Wasserstein,
    refine,
    solve_transport,
    transport_plan,
    trust_from_spread,
)

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
TERMS = [
    KullbackLeibler(P, 2.0),
    Wasserstein(P, 1.5, "ordinal", 0.1),
    MarginalSum(KullbackLeibler(P, 2.0), Wasserstein(P, 0.7, "discrete", 0.1)),
]


def problem(seed=0, pixels=10):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, pixels, generator=g, dtype=torch.float64)
    mass = torch.rand(pixels, generator=g, dtype=torch.float64) + 0.2
    return scores, mass / mass.sum()


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
def test_gradient_and_curvature_belong_to_the_value(term):
    psi = torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64)
    _, gradient, curvature = term.dual(psi)
    step = 1e-5
    for k in range(3):
        d = torch.zeros(3, dtype=torch.float64)
        d[k] = step
        up, down = term.dual(psi + d), term.dual(psi - d)
        assert (up[0] - down[0]) / (2 * step) == pytest.approx(float(gradient[k]), abs=1e-7)
        torch.testing.assert_close((down[1] - up[1]) / (2 * step), curvature[:, k], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
def test_dual_is_the_infimum_over_proportions(term):
    """Proportions add up to 1 for the distance; the divergence is defined for any positive amounts."""
    psi = torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64)
    free = isinstance(term, KullbackLeibler)

    def value(x):
        m = torch.from_numpy(np.exp(x))
        m = m if free else m / m.sum()
        return term.energy(m) + float(torch.dot(m, psi))

    best = min(scipy_minimize(value, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}).fun
               for start in (np.zeros(3), np.log(P.numpy())))  # fmt: skip
    assert term.dual(psi)[0] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
def test_transport_minimises_the_primal(term):
    scores, mass = problem()
    h = 0.5
    result = solve_transport(scores, mass, term, smoothing=h, tolerance=1e-10)
    u, _ = transport_plan(scores, result.psi, h)

    def primal(u):
        local = (-(scores * u) + h * torch.xlogy(u, u)).sum(dim=0)
        return float((local * mass).sum()) + term.energy((u * mass).sum(dim=1))

    def by_logits(x):
        """Value and gradient; that of the term by finite differences in the three proportions alone."""
        logits = torch.from_numpy(x).view(3, -1).requires_grad_()
        v = torch.softmax(logits, dim=0)
        m = (v * mass).sum(dim=1)
        units = 1e-6 * torch.eye(3, dtype=torch.float64)
        slope = torch.tensor([term.energy(m.detach() + d) - term.energy(m.detach() - d) for d in units]) / 2e-6
        local = ((-(scores * v) + h * torch.xlogy(v, v)).sum(dim=0) * mass).sum()
        (gradient,) = torch.autograd.grad(local + (slope.double() * m).sum(), logits)
        return primal(v.detach()), gradient.flatten().numpy()

    assert result.converged and result.value == pytest.approx(primal(u), abs=1e-8)
    best = scipy_minimize(by_logits, np.zeros(30), jac=True, method="BFGS", options={"gtol": 1e-7})
    assert primal(u) <= best.fun + 1e-9 and best.fun == pytest.approx(primal(u), abs=1e-5)


def solve_bounded(scores, mass, low, high, h):
    """The primal over all u_ik with bounds on the proportions, by SLSQP: segmentation and energy."""
    z, a = scores.numpy(), mass.numpy()
    classes, pixels = z.shape
    onto_pixels = np.tile(np.eye(pixels), (1, classes))
    onto_classes = np.kron(np.eye(classes), a)

    def energy(x):
        u = x.reshape(z.shape)
        slope = a * (-z + h * (np.log(u) + 1))
        return float((a * (-z * u + h * u * np.log(u))).sum()), slope.ravel()

    equal = low == high  # a bound from both sides at once is one equation: SLSQP needs independent constraints
    rows = np.concatenate([onto_classes[~equal], -onto_classes[~equal]])
    limits = np.concatenate([low[~equal], -high[~equal]])
    fixed = np.concatenate([onto_pixels, onto_classes[equal][: classes - 1]])
    to = np.concatenate([np.ones(pixels), low[equal][: classes - 1]])
    constraints = [{"type": "eq", "fun": lambda x: fixed @ x - to, "jac": lambda x: fixed}]
    if len(rows):
        constraints.append({"type": "ineq", "fun": lambda x: rows @ x - limits, "jac": lambda x: rows})
    found = scipy_minimize(
        energy, np.full(z.size, 1 / classes), jac=True, method="SLSQP", bounds=[(1e-10, 1)] * z.size,
        constraints=constraints, options={"ftol": 1e-14, "maxiter": 1000},
    )  # fmt: skip
    assert found.success, found.message
    return found.x.reshape(z.shape), found.fun


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]),
        ([0.6, 0.0, 0.0], [0.8, 1.0, 1.0]),
        ([0.0, 0.0, 0.0], [0.1, 1.0, 0.3]),
        ([0.45, 0.1, 0.1], [0.45, 0.2, 0.9]),
        ([0.1, 0.1, 0.1], [0.9, 0.9, 0.9]),
    ],
    ids=["hard", "lower", "upper", "mixed", "wide"],
)
def test_bounds_agree_with_a_generic_solver(low, high):
    scores, mass = problem(3, 8)
    low, high = np.array(low), np.array(high)
    result = solve_transport(scores, mass, Interval(torch.tensor(low), torch.tensor(high)), smoothing=0.5, tolerance=1e-11)
    u, _ = transport_plan(scores, result.psi, 0.5)
    reference, energy = solve_bounded(scores, mass, low, high, 0.5)
    np.testing.assert_allclose(u.numpy(), reference, atol=2e-5)
    assert result.converged and result.value == pytest.approx(energy, abs=1e-8)


@pytest.mark.parametrize("metric", ["discrete", "ordinal"])
@pytest.mark.parametrize("weight", [0.2, 3.0])
def test_little_smoothing_approaches_the_linear_program(metric, weight):
    """Pixels' assignment and the plan between ū and p, together in one linear program without any entropy."""
    scores, mass = problem(1, 12)
    h, eta = 5e-3, 2e-3
    term = Wasserstein(P, weight, metric, eta)
    result = solve_transport(scores, mass, term, smoothing=h, tolerance=1e-8, max_iterations=500)
    assert result.converged
    onto_pixels, onto_classes = np.tile(np.eye(12), (1, 3)), np.kron(np.eye(3), mass.numpy())
    rows, columns = np.kron(np.eye(3), np.ones(3)), np.tile(np.eye(3), (1, 3))
    exact = linprog(
        np.concatenate([(-scores * mass).numpy().ravel(), weight * term.metric.numpy().ravel()]),
        A_eq=np.block([[onto_pixels, np.zeros((12, 9))], [onto_classes, -rows], [np.zeros((3, 36)), columns]]),
        b_eq=np.concatenate([np.ones(12), np.zeros(3), P.numpy()]),
    )
    slack = (h + weight * eta) * math.log(3)
    assert exact.fun - slack - 1e-9 <= result.value <= exact.fun + 1e-9
    # The segmentation found is nearly optimal where it is judged without entropies, and has the same proportions.
    u, _ = transport_plan(scores, result.psi, h)
    m = (u * mass).sum(dim=1)
    plan = linprog(
        term.metric.numpy().ravel(), A_eq=np.concatenate([rows, columns]), b_eq=np.concatenate([m.numpy(), P.numpy()])
    )
    assert exact.fun - 1e-9 <= float((-scores * u * mass).sum()) + weight * plan.fun <= exact.fun + slack + 1e-9
    np.testing.assert_allclose(m.numpy(), onto_classes @ exact.x[:36], atol=0.02)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    h=st.sampled_from([1.0, 0.2, 0.05]),
    kind=st.sampled_from(["random", "mixed", "tight", "absent", "corners"]),
)
def test_bounds_meet_the_conditions_of_kkt(seed, h, kind):
    rng = np.random.default_rng(seed)
    scores, mass = problem(seed, 40)
    p = rng.dirichlet(np.ones(3))
    low, high = p * rng.uniform(0, 1, 3), p + (1 - p) * rng.uniform(0, 1, 3)
    if kind == "mixed":
        low[0] = high[0] = p[0]
    if kind == "tight":
        low, high = p - 1e-3 * p, p + 1e-3
    if kind == "absent":
        low[2], high[2], high[1] = 0.0, 0.0, 1.0
        low[1] = 0.0
    if kind == "corners":  # anything, at least, at most or exactly
        low, high = np.where(rng.random(3) < 0.5, 0.0, p), np.where(rng.random(3) < 0.5, 1.0, p)
    term = Interval(torch.tensor(low), torch.tensor(high))
    result = solve_transport(scores, mass, term, smoothing=h, tolerance=1e-8)
    low, high = term.lower.numpy(), term.upper.numpy()  # tightened by what the other classes leave
    u, _ = transport_plan(scores, result.psi, h)
    found = (u * mass).sum(dim=1).numpy()
    assert result.converged, result
    assert (found >= low - 1e-6).all() and (found <= high + 1e-6).all()
    if not np.allclose(low, high) and kind != "tight":
        for k in range(3):
            if math.isinf(float(result.psi[k])):
                continue
            inside = low[k] + 1e-5 < found[k] < high[k] - 1e-5
            assert not inside or abs(float(result.psi[k])) < 1e-6
            assert float(result.psi[k]) <= 1e-9 or found[k] <= low[k] + 1e-5
            assert float(result.psi[k]) >= -1e-9 or found[k] >= high[k] - 1e-5


def test_wide_bounds_change_nothing_and_equal_ones_are_the_constraint():
    scores, mass = problem(pixels=50)
    free = torch.softmax(scores / 0.3, dim=0)
    wide = solve_transport(scores, mass, Interval(torch.zeros(3), torch.ones(3)), smoothing=0.3)
    torch.testing.assert_close(transport_plan(scores, wide.psi, 0.3)[0], free, atol=1e-7, rtol=0)
    hard, equal = (solve_transport(scores, mass, x, smoothing=0.3, tolerance=1e-10) for x in (P, Interval(P, P)))
    torch.testing.assert_close(hard.psi, equal.psi, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("rho", "weight", "eta"), [(2.0, 1.0, 0.05), (2.0, 0.7, 0.3), (0.1, 1.0, 0.005), (1e-3, 20.0, 0.05)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_a_sum_is_maximised_from_anywhere_in_few_steps(monkeypatch, rho, weight, eta, scale):
    """Far out the distance is flat in single classes; close to the maximum its value no longer tells what is better."""
    calls, dual = [], KullbackLeibler.dual
    monkeypatch.setattr(KullbackLeibler, "dual", lambda *arguments: (calls.append(1), dual(*arguments))[1])
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    term = MarginalSum(KullbackLeibler(p, rho), Wasserstein(p, weight, "ordinal", eta))
    psi = scale * min(1.0, 3 * rho) * torch.tensor([1.0, -0.7, 0.1, -0.4], dtype=torch.float64)
    value, m, curvature = term.dual(psi)
    assert len(calls) < 150
    assert float(m.sum()) == pytest.approx(1.0, abs=1e-9) and float(m.min()) >= 0
    # The infimum is attained at m: with Fenchel's inequality, which holds for any m, that proves both.
    assert value == pytest.approx(term.energy(m) + float(torch.dot(m, psi)), abs=1e-7)
    assert float(torch.linalg.eigvalsh(curvature).min()) > -1e-9


def test_mass_moves_to_similar_classes_first():
    """More of grade 0 is asked for than the pixels want: its neighbour keeps the excess, because that is the nearest lie."""
    scores = torch.zeros(3, 300, dtype=torch.float64)
    scores[0, :100], scores[1, 100:200], scores[2, 200:] = 2.0, 2.0, 2.0
    mass = torch.full((300,), 1 / 300, dtype=torch.float64)
    asked = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    result = solve_transport(scores, mass, Wasserstein(asked, 3.0, "ordinal", 0.02), smoothing=0.3)
    missed = asked - result.marginal
    assert float(missed[0]) > 0.03 and float(missed[1]) < -0.03 and abs(float(missed[2])) < 1e-3


def test_refine_with_bounds_and_with_distances():
    q, p = noisy_confidence()
    low, high = [0.5, 0.0, 0.0], [0.6, 1.0, 1.0]
    result = refine(q, bounds=(low, high), alpha=1.0)
    assert result.converged and (np.diff(result.energies) <= 0).all()
    assert 0.5 - 1e-5 <= float(result.proportions[0]) <= 0.6 + 1e-5
    absent = torch.tensor([0.6, 0.0, 0.4])
    both = refine(q, absent, alpha=1.0, trust=2.0, histogram_weight=1.0)
    assert not bool((both.u[1] > 0).any()) and (np.diff(both.energies) <= 0).all()
    assert both.converged and both.residual <= 1e-6
    near, far = (refine(q, p, alpha=1.0, histogram_weight=w, metric="ordinal").proportions for w in (20.0, 0.05))
    assert float((near - p).abs().sum()) < float((far - p).abs().sum())


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ([0.5, 0.6, 0.1], [1, 1, 1], "add up to 1.2"),
        ([0, 0, 0], [0.3, 0.3, 0.3], "0.9"),
        ([0.5, 0, 0], [0.4, 1, 1], "at most its upper"),
    ],
)
def test_bounds_that_nothing_satisfies_are_refused(low, high, message):
    with pytest.raises(ProportionError, match=message):
        Interval(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64))


def test_trust_falls_with_disagreement():
    trusts = [trust_from_spread(P, torch.full((3,), s)) for s in (0.02, 0.05, 0.1, 0.3)]
    assert sorted(trusts, reverse=True) == trusts and trust_from_spread(P, torch.zeros(3)) == math.inf
    assert trust_from_spread(P, torch.full((3,), 0.08)) == pytest.approx(0.1 * 0.62 / (3 * 0.0064), rel=1e-5)
