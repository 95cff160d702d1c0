import math

import numpy as np
import pytest
import torch
from cases import noisy_confidence
from hypothesis import given, settings
from hypothesis import strategies as st
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

    assert result.converged and result.value == pytest.approx(primal(u), abs=1e-8)
    best = scipy_minimize(
        lambda x: primal(torch.softmax(torch.from_numpy(x).view(3, -1), dim=0)),
        np.zeros(30),
        method="BFGS",
        options={"gtol": 1e-7},
    )
    assert primal(u) <= best.fun + 1e-9 and best.fun == pytest.approx(primal(u), abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    h=st.sampled_from([1.0, 0.2, 0.05]),
    kind=st.sampled_from(["random", "mixed", "tight", "absent"]),
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
