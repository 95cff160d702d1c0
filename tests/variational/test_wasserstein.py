"""Wasserstein distances on the simplex against exact and entropic solvers, closed forms, autograd and finite differences."""

import math
import sys

import pytest
import torch

from monai_vslp.utils.errors import InputError
from monai_vslp.variational import ground_metric, simplex_wasserstein
from monai_vslp.variational.wasserstein import CHUNK, entropic_conjugate, entropic_wasserstein, line_positions

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def histograms(classes, *shape, seed=0, power=3):
    """Points of the simplex, some of them close to its border."""
    x = torch.rand(classes, *shape, generator=seeded(seed), dtype=F64) ** power + 1e-6
    return x / x.sum(dim=0)


def plane_metric(classes, seed=0):
    """Distances of points in the plane: a metric without closed form, of largest entry 1."""
    points = torch.rand(classes, 2, generator=seeded(seed + 100), dtype=F64)
    g = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return g / g.max()


def graph_metric(classes, seed=0):
    """Shortest paths in a random graph, which are no distances in a plane."""
    g = torch.rand(classes, classes, generator=seeded(seed), dtype=F64) + 0.05
    g = (g + g.T).fill_diagonal_(0)
    for k in range(classes):
        g = torch.minimum(g, g[:, k, None] + g[None, k])
    return g


def line_metric(*positions):
    x = torch.tensor(positions, dtype=F64)
    return (x[:, None] - x).abs()


METRICS = {
    "discrete": ground_metric("discrete", 5),
    "scaled": 0.3 * ground_metric("discrete", 5),
    "ordinal": ground_metric("ordinal", 5),
    "line": line_metric(0.7, 0.1, 0.2, 2.0, 0.65),
    "plane": plane_metric(5),
    "graph": graph_metric(5),
}
CLOSED = ["discrete", "scaled", "ordinal", "line"]
OPEN = ["plane", "graph"]


# ---------------------------------------------------------------- the ground metric


def test_named_metrics():
    assert torch.equal(ground_metric("discrete", 3), torch.tensor([[0, 1, 1], [1, 0, 1], [1, 1, 0]], dtype=F64))
    assert torch.equal(ground_metric("ordinal", 3), torch.tensor([[0, 0.5, 1], [0.5, 0, 0.5], [1, 0.5, 0]], dtype=F64))
    assert ground_metric("ordinal", 1).tolist() == [[0.0]]
    given = plane_metric(4)
    assert torch.equal(ground_metric(given, 4), given)
    assert ground_metric([[0, 2], [2, 0]], 2).dtype == F64


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        ("cosine", "'discrete', 'ordinal' or a matrix"),
        ([[0, 1], [1]], "matrix of numbers"),
        ([[0, 1, 1], [1, 0, 1]], r"shape \[3, 3\]"),
        ([[0, 1], [1, 0]], r"got \[2, 2\]"),
        ([[0, 1, 1], [1, 0, -1], [1, -1, 0]], "not negative"),
        ([[0, 1, math.nan], [1, 0, 1], [math.nan, 1, 0]], "finite"),
        ([[0, 1, 1], [1, 0.5, 1], [1, 1, 0]], "between a class and itself"),
        ([[0, 1, 1], [1, 0, 1], [2, 1, 0]], "symmetric, got 1 from 0 to 2 and 2 back"),
        ([[0, 1, 3], [1, 0, 1], [3, 1, 0]], "triangle inequality: from class 0 to 2 costs 3, .* only 2"),
    ],
)
def test_what_is_no_metric_is_refused(matrix, said):
    with pytest.raises(InputError, match=said):
        ground_metric(matrix, 3)


def test_classes_on_a_line_are_recognised():
    for name in ("ordinal", "line"):
        x = line_positions(METRICS[name])
        torch.testing.assert_close((x[:, None] - x).abs(), METRICS[name])
    for name in ("discrete", *OPEN):
        assert line_positions(METRICS[name]) is None


# ---------------------------------------------------------------- many pairs


@pytest.mark.parametrize("name", METRICS)
def test_exact_distance_agrees_with_pot(name):
    ot = pytest.importorskip("ot")
    g = METRICS[name]
    u, q = histograms(5, 40), histograms(5, 40, seed=1)
    u[:2, :10] = 0  # classes that do not occur
    q[3:, 5:15] = 0
    u, q = u / u.sum(dim=0), q / q.sum(dim=0)
    value, potential = simplex_wasserstein(u, q, g)
    expected = [float(ot.emd2(a.numpy(), b.numpy(), g.numpy())) for a, b in zip(u.T.contiguous(), q.T.contiguous())]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=F64), atol=1e-9, rtol=1e-9)
    # The gradient is an optimal dual potential: as steep as the metric at most, and it attains the distance.
    assert float((potential[:, None] - potential[None] - g[:, :, None]).max()) < 1e-9
    torch.testing.assert_close((potential * (u - q)).sum(dim=0), value, atol=1e-9, rtol=0)
    assert float(potential.mean(dim=0).abs().max()) < 1e-12


def test_closed_forms():
    u, q = histograms(4, 3, 6), histograms(4, 3, 6, seed=1)
    half = 0.5 * (u - q).abs().sum(dim=0)
    torch.testing.assert_close(simplex_wasserstein(u, q, ground_metric("discrete", 4))[0], half)
    area = (u - q).cumsum(dim=0).abs().sum(dim=0) / 3
    torch.testing.assert_close(simplex_wasserstein(u, q, ground_metric("ordinal", 4))[0], area)
    for name in ("discrete", "ordinal"):  # with two classes all metrics are one
        torch.testing.assert_close(simplex_wasserstein(u[:2], q[:2], ground_metric(name, 2))[0][0, 0], simplex_wasserstein(
            u[:2, :1, :1], q[:2, :1, :1], line_metric(3.0, 2.0))[0][0, 0])  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_it_is_a_metric(name):
    g = METRICS[name]
    a, b, c = (histograms(5, 30, seed=seed) for seed in range(3))
    distance = {pair: simplex_wasserstein(*pair_of, g)[0] for pair, pair_of in {
        "ab": (a, b), "ba": (b, a), "bc": (b, c), "ac": (a, c), "aa": (a, a)}.items()}  # fmt: skip
    assert float(distance["aa"].abs().max()) < 1e-12
    assert float(distance["ab"].min()) > 1e-3
    torch.testing.assert_close(distance["ab"], distance["ba"], atol=1e-10, rtol=0)
    assert bool((distance["ac"] <= distance["ab"] + distance["bc"] + 1e-10).all())
    # Between certain classes it is the ground metric itself.
    corners = torch.eye(5, dtype=F64)
    pairs = simplex_wasserstein(corners.repeat_interleave(5, dim=1), corners.repeat(1, 5), g)[0]
    torch.testing.assert_close(pairs.view(5, 5), g, atol=1e-10, rtol=0)


@pytest.mark.parametrize("smooth", [0.0, 0.05])
@pytest.mark.parametrize("name", METRICS)
def test_names_of_classes_do_not_matter(name, smooth):
    g = METRICS[name]
    u, q = histograms(5, 20), histograms(5, 20, seed=1)
    order = torch.tensor([3, 0, 4, 1, 2])
    value, gradient = simplex_wasserstein(u, q, g, smooth)
    moved, turned = simplex_wasserstein(u[order], q[order], g[order][:, order], smooth)
    torch.testing.assert_close(moved, value, atol=1e-9, rtol=0)
    torch.testing.assert_close(turned, gradient[order], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CLOSED)
def test_smoothed_closed_forms_have_their_gradient(name):
    g = METRICS[name]
    u, q = histograms(5, 4, 6).requires_grad_(), histograms(5, 4, 6, seed=1)
    q[:, 0] = u.detach()[:, 0]  # where the exact distance has a kink
    value, gradient = simplex_wasserstein(u, q, g, 0.05)
    (reference,) = torch.autograd.grad(value.sum(), u)
    torch.testing.assert_close(gradient, reference - reference.mean(dim=0))
    value, gradient = value.detach(), gradient.detach()
    exact = simplex_wasserstein(u.detach(), q, g)[0]
    below = exact - value
    # Huber's function lies below the absolute value by at most half its width, at each of the C terms.
    assert float(below.min()) >= 0 and float(below.max()) <= 0.5 * 0.05 * 5 * float(g.max())
    assert float(value[0].abs().max()) == 0 and float(gradient[:, 0].abs().max()) == 0


@pytest.mark.parametrize("name", METRICS)
def test_gradients_along_the_simplex_by_finite_differences(name):
    g = METRICS[name]
    u, q = histograms(5, 12), histograms(5, 12, seed=1)
    u = 0.9 * u + 0.02
    direction = torch.randn(5, 12, generator=seeded(2), dtype=F64)
    direction -= direction.mean(dim=0)
    gradient = simplex_wasserstein(u, q, g, 0.1)[1]
    ahead, behind = (simplex_wasserstein(u + t * direction, q, g, 0.1)[0] for t in (1e-5, -1e-5))
    torch.testing.assert_close((gradient * direction).sum(dim=0), (ahead - behind) / 2e-5, atol=1e-6, rtol=1e-6)
    assert float(gradient.mean(dim=0).abs().max()) < 1e-12


@pytest.mark.parametrize("eta", [0.3, 0.1])
@pytest.mark.parametrize("name", OPEN)
def test_entropic_distance_agrees_with_pot(name, eta):
    batch = pytest.importorskip("ot.batch")
    g = METRICS[name]
    u, q = histograms(5, 30, power=1), histograms(5, 30, seed=1, power=1)
    plan = batch.solve_batch(
        g.expand(30, -1, -1), reg=eta, a=u.T.contiguous(), b=q.T.contiguous(), method="log_sinkhorn", max_iter=20_000, tol=1e-12
    ).plan
    expected = (plan * (g + eta * (plan / q.T[:, None]).log())).sum(dim=(1, 2))
    torch.testing.assert_close(simplex_wasserstein(u, q, g, eta)[0], expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("eta", [0.3, 0.01, 0.001])
def test_many_entropic_pairs_are_single_ones_and_bound_the_exact(eta):
    g = METRICS["plane"]
    u, q = histograms(5, 60), histograms(5, 60, seed=1)
    value, gradient = simplex_wasserstein(u.view(5, 6, 10), q.view(5, 6, 10), g, eta)
    assert value.shape == (6, 10) and gradient.shape == (5, 6, 10)
    singles = [entropic_wasserstein(a, b, g, eta) for a, b in zip(u.T, q.T)]
    torch.testing.assert_close(value.flatten(), torch.tensor([x for x, _ in singles], dtype=F64), atol=1e-8, rtol=0)
    torch.testing.assert_close(gradient.flatten(1), torch.stack([psi for _, psi in singles], dim=1), atol=1e-5, rtol=0)
    gap = simplex_wasserstein(u, q, g)[0] - value.flatten()
    assert float(gap.min()) > -1e-8 and float(gap.max()) <= eta * math.log(5) + 1e-8


def test_chunks_and_dtypes(monkeypatch):
    g = METRICS["graph"]
    u, q = histograms(5, 7, 11), histograms(5, 7, 11, seed=1)
    value, gradient = simplex_wasserstein(u, q, g, 0.05)
    assert CHUNK // g.numel() > u[0].numel()
    monkeypatch.setattr("monai_vslp.variational.wasserstein.CHUNK", 10 * g.numel())
    again, turned = simplex_wasserstein(u, q, g, 0.05)
    torch.testing.assert_close(again, value, atol=1e-12, rtol=0)
    torch.testing.assert_close(turned, gradient, atol=1e-8, rtol=0)
    for name, smooth in (("graph", 0.05), ("graph", 0.0), ("line", 0.0), ("line", 0.05), ("discrete", 0.05)):
        small = simplex_wasserstein(u.float(), q.float(), METRICS[name], smooth)
        large = simplex_wasserstein(u, q, METRICS[name], smooth)
        assert small[0].dtype == small[1].dtype == torch.float32
        torch.testing.assert_close(small[0].double(), large[0], atol=2e-6, rtol=0)


def test_classes_without_mass_stay_finite():
    g = METRICS["plane"]
    corners = torch.eye(5, dtype=F64)
    value, gradient = simplex_wasserstein(corners, corners.roll(1, dims=1), g, 0.05)
    assert bool(value.isfinite().all()) and bool(gradient.isfinite().all())
    # A plan between two corners has no choice and no entropy.
    torch.testing.assert_close(value, g.diagonal(1).new_tensor([g[i, i - 1] for i in range(5)]), atol=1e-6, rtol=0)


def test_what_cannot_be_computed_is_refused():
    u = histograms(5, 40, 40)
    with pytest.raises(InputError, match="1600 pairs .* positive smoothing"):
        simplex_wasserstein(u, u, METRICS["plane"])
    with pytest.raises(InputError, match="C = 4"):
        simplex_wasserstein(u, u, ground_metric("discrete", 4))
    with pytest.raises(InputError, match="one shape"):
        simplex_wasserstein(u, u[:, 1:], METRICS["discrete"])


# ---------------------------------------------------------------- single pairs and the Legendre transform


@pytest.mark.parametrize("eta", [1.0, 0.1, 0.02])
def test_single_entropic_distance_agrees_with_pot(eta):
    ot = pytest.importorskip("ot")
    g = METRICS["graph"]
    for seed in range(4):
        m, p = histograms(5, seed=seed, power=1), histograms(5, seed=seed + 50, power=1)
        value, psi = entropic_wasserstein(m, p, g, eta)
        plan = torch.from_numpy(
            ot.sinkhorn(
                m.numpy(), p.numpy(), g.numpy(), reg=eta, method="sinkhorn_log", numItermax=100_000, stopThr=1e-13, warn=False
            )
        )
        assert value == pytest.approx(float((plan * (g + eta * torch.log(plan / p))).sum()), abs=1e-9)
        # The plan that belongs to ψ has both marginals.
        own = p * torch.softmax((psi[:, None] - g) / eta, dim=0)
        torch.testing.assert_close(own.sum(dim=1), m, atol=1e-11, rtol=0)
        assert value == pytest.approx(float((own * (g + eta * torch.log(own / p))).sum()), abs=1e-9)


@pytest.mark.parametrize("eta", [1.0, 0.05, 0.001])
def test_single_distance_with_absent_classes(eta):
    g = METRICS["graph"]
    m, p = torch.tensor([0.0, 0.2, 0.5, 0.3, 0.0], dtype=F64), torch.tensor([0.6, 0.0, 0.1, 0.0, 0.3], dtype=F64)
    value, psi = entropic_wasserstein(m, p, g, eta)
    assert torch.equal(psi == -math.inf, m == 0)
    gradient = entropic_conjugate(psi, p, g, eta)[1]
    torch.testing.assert_close(gradient, m, atol=1e-11, rtol=0)
    exact = float(simplex_wasserstein(m[:, None], p[:, None], g)[0])
    assert exact - eta * math.log(5) - 1e-9 <= value <= exact + 1e-9


def test_smoothing_must_be_positive():
    m = torch.full((5,), 0.2, dtype=F64)
    with pytest.raises(InputError, match="eta > 0, got 0"):
        entropic_wasserstein(m, m, METRICS["plane"], 0.0)


@pytest.mark.parametrize("name", ["discrete", "ordinal", "graph"])
@pytest.mark.parametrize("eta", [0.5, 0.05])
def test_conjugate_has_its_derivatives(name, eta):
    g, p = METRICS[name], histograms(5, seed=3)
    psi = 0.3 * torch.randn(5, generator=seeded(4), dtype=F64)
    value, gradient, hessian = entropic_conjugate(psi, p, g, eta)
    assert gradient.shape == (5,) and hessian.shape == (5, 5)
    for k, unit in enumerate(torch.eye(5, dtype=F64)):
        ahead, behind = (entropic_conjugate(psi + t * unit, p, g, eta) for t in (1e-6, -1e-6))
        assert float(ahead[0] - behind[0]) / 2e-6 == pytest.approx(float(gradient[k]), abs=1e-8)
        torch.testing.assert_close((ahead[1] - behind[1]) / 2e-6, hessian[k], atol=1e-6 / eta, rtol=0)
    assert float(gradient.sum()) == pytest.approx(1.0, abs=1e-12) and float(gradient.min()) > 0
    torch.testing.assert_close(hessian, hessian.T)
    assert float(torch.linalg.eigvalsh(hessian).min()) > -1e-12
    assert float(hessian.sum(dim=0).abs().max()) < 1e-12
    # A constant is worth itself: the arguments have mass 1.
    assert float(entropic_conjugate(psi + 2.5, p, g, eta)[0]) == pytest.approx(float(value) + 2.5, abs=1e-12)


@pytest.mark.parametrize("eta", [0.5, 0.05])
def test_conjugate_and_distance_are_a_pair(eta):
    """Fenchel and Young: ⟨ψ, m⟩ ≤ W(m) + W*(ψ), with equality where either is the other's gradient; so the constant is 0."""
    g, p = METRICS["plane"], histograms(5, seed=5)
    for seed in range(6):
        psi = 0.5 * torch.randn(5, generator=seeded(seed), dtype=F64)
        m = histograms(5, seed=seed + 20)
        conjugate, reached, _ = entropic_conjugate(psi, p, g, eta)
        value, best = entropic_wasserstein(m, p, g, eta)
        assert float(psi @ m) <= value + float(conjugate) + 1e-12
        assert float(psi @ reached) - entropic_wasserstein(reached, p, g, eta)[0] == pytest.approx(float(conjugate), abs=1e-9)
        assert float(best @ m) - float(entropic_conjugate(best, p, g, eta)[0]) == pytest.approx(value, abs=1e-9)


def test_potential_is_the_gradient_in_the_first_argument():
    g, m, p, eta = METRICS["graph"], histograms(5, power=1), histograms(5, seed=1, power=1), 0.1
    potential = entropic_wasserstein(m, p, g, eta)[1]
    direction = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0], dtype=F64) * 1e-5
    slope = entropic_wasserstein(m + direction, p, g, eta)[0] - entropic_wasserstein(m - direction, p, g, eta)[0]
    assert slope / 2 == pytest.approx(float(potential @ direction), abs=1e-10)
    assert float(potential.mean()) == pytest.approx(0.0, abs=1e-12)


def test_pot_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    u, q = histograms(5, 3), histograms(5, 3, seed=1)
    for g in METRICS.values():
        assert bool((simplex_wasserstein(u, q, g)[0] > 0).all())
        assert math.isfinite(entropic_wasserstein(u[:, 0], q[:, 0], g, 0.05)[0])
