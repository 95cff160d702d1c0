import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_vslp.losses.proportion import ConsistencyLoss, ProportionLoss, wasserstein_proportions
from monai_vslp.networks import pool_proportions
from monai_vslp.utils.errors import InputError

ot = pytest.importorskip("ot")

# The vertices of a pentagon: no line, not all alike, so only a solver knows the distance.
ANGLE = 2 * np.pi * np.arange(5) / 5
PENTAGON = np.hypot(*(f(ANGLE)[:, None] - f(ANGLE)[None] for f in (np.cos, np.sin)))
PLACES = np.array([3.0, 0.0, 1.5, 7.0, 2.0])
LINE = np.abs(PLACES[:, None] - PLACES)
EVEN = 2.5 * (1 - np.eye(5))


def proportions(batch=3, classes=5, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(classes), size=batch))


def maps(batch=2, classes=4, size=(3, 5), seed=0, scale=1.0):
    return scale * torch.randn(batch, classes, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


FULL = {"l1": 0.3, "wasserstein": 0.7, "entropy": 0.2, "metric": "ordinal"}


@pytest.mark.parametrize("options", [{}, {"l1": 1.0}, {"wasserstein": 1.0}, {"wasserstein": 1.0, "metric": "ordinal"}])
def test_zero_exactly_where_proportions_agree(options):
    z = maps()
    p = pool_proportions(z.softmax(dim=1))
    loss = ProportionLoss(**options)
    assert abs(float(loss(z, p))) < 1e-12
    for other in (maps(seed=1), maps(seed=2), z + torch.tensor([0.1, 0, 0, 0], dtype=torch.float64).view(1, 4, 1, 1)):
        assert float(loss(other, p)) > 1e-5


def test_gradient_vanishes_at_the_minimum():
    z = maps().requires_grad_()
    ProportionLoss()(z, pool_proportions(z.softmax(dim=1)).detach()).backward()
    assert z.grad.abs().max() < 1e-12


def test_descent_reaches_the_given_proportions():
    z = maps(batch=1).requires_grad_()
    p = torch.tensor([[0.6, 0.4, 0.0, 0.0]], dtype=torch.float64)
    optimizer = torch.optim.Adam([z], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        ProportionLoss()(z, p).backward()
        optimizer.step()
    torch.testing.assert_close(pool_proportions(z.softmax(dim=1)).detach(), p, atol=5e-3, rtol=0)


def test_value_by_hand():
    z, p = maps(), proportions(2, 4)
    mass = torch.rand(2, 1, 3, 5, dtype=torch.float64)
    q = z.softmax(dim=1)
    expected = 0.0
    for image in range(2):
        a = mass[image, 0] / mass[image, 0].sum()
        predicted = (a * q[image]).sum(dim=(1, 2))
        expected += (p[image] * (p[image] / predicted).log()).sum() + 0.3 * (predicted - p[image]).abs().sum()
        expected += 0.7 * (predicted - p[image]).cumsum(0).abs().sum() / 3
        expected -= 0.2 * (a * (q[image] * q[image].log()).sum(dim=0)).sum()
    torch.testing.assert_close(ProportionLoss(**FULL)(z, p, mass), expected / 2)
    torch.testing.assert_close(ProportionLoss(**FULL, logits=False)(q, p, mass), expected / 2)


@pytest.mark.parametrize(
    "metric", ["discrete", "ordinal", PENTAGON[:4, :4], LINE[:4, :4]], ids=["even", "ordinal", "pot", "line"]
)
@pytest.mark.parametrize("with_mass", [False, True])
def test_gradients(metric, with_mass):
    loss = ProportionLoss(**{**FULL, "metric": metric})
    mass = torch.rand(2, 1, 2, 3, dtype=torch.float64) * (torch.arange(6).view(2, 3) > 0) if with_mass else None
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    z = maps(size=(2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, p, mass), z)


@pytest.mark.parametrize("kind", ["squared", "kl"])
def test_gradients_of_consistency(kind):
    mass = torch.rand(2, 1, 2, 3, dtype=torch.float64)
    views = maps(size=(2, 3)).requires_grad_(), maps(size=(2, 3), seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: ConsistencyLoss(kind)(x, y, mass), views)


def test_background_does_not_count():
    z, p = maps(), proportions(2, 4)
    mass = torch.ones(2, 1, 3, 5, dtype=torch.float64)
    mass[..., 2:] = 0
    other = torch.where(mass > 0, z, torch.full_like(z, 50.0)).requires_grad_()
    loss = ProportionLoss(**FULL)
    value = loss(other, p, mass)
    torch.testing.assert_close(value, loss(z[..., :2], p))
    value.backward()
    assert (other.grad[..., 2:] == 0).all() and (other.grad[..., :2] != 0).all()
    for kind in ("squared", "kl"):
        consistency = ConsistencyLoss(kind)
        torch.testing.assert_close(consistency(other, z.flip(1), mass), consistency(z[..., :2], z.flip(1)[..., :2]))


def test_amount_of_tissue_does_not_weigh_images():
    z, p, mass = maps(), proportions(2, 4), torch.rand(2, 1, 3, 5, dtype=torch.float64)
    loss = ProportionLoss(**FULL)
    scaled = mass * torch.tensor([100.0, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(loss(z, p, scaled), loss(z, p, mass))


def test_images_without_tissue_are_left_out():
    z, p = maps().requires_grad_(), proportions(2, 4)
    mass = torch.ones(2, 1, 3, 5, dtype=torch.float64)
    mass[1] = 0
    loss = ProportionLoss(**FULL)
    value = loss(z, p, mass)
    torch.testing.assert_close(value, loss(z[:1], p[:1]))
    value.backward()
    assert (z.grad[1] == 0).all() and z.grad.isfinite().all()
    assert loss(z, p, torch.zeros_like(mass)) == 0
    assert ConsistencyLoss()(z, z.flip(1), torch.zeros_like(mass)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("options", [FULL, {**FULL, "metric": PENTAGON[:4, :4]}], ids=["closed", "pot"])
def test_extreme_logits_stay_finite(dtype, scale, options):
    z = maps(scale=scale).to(dtype).requires_grad_()
    p = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    value = ProportionLoss(**options)(z, p) + ConsistencyLoss("kl")(z, z.flip(1)) + ConsistencyLoss()(z, z.flip(2))
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()


def test_a_vanished_class_comes_back():
    z = torch.zeros(1, 2, 4, 4)
    z[:, 1] = -500.0  # its probability is 0 in float32
    z.requires_grad_()
    ProportionLoss()(z, torch.tensor([[0.5, 0.5]])).backward()
    assert z.grad[:, 1].sum() < -0.4


def test_probabilities_of_zero():
    q = torch.zeros(1, 3, 2, 2)
    q[:, 0] = 1.0
    q.requires_grad_()
    value = ProportionLoss(**FULL, logits=False)(q, torch.tensor([[0.2, 0.8, 0.0]]))
    value.backward()
    assert value.isfinite() and q.grad.isfinite().all()


@pytest.mark.parametrize("metric", [PENTAGON, LINE, EVEN], ids=["pentagon", "line", "even"])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), zeros=st.integers(0, 3))
def test_wasserstein_agrees_with_pot(metric, seed, zeros):
    a, b = proportions(2, seed=seed), proportions(2, seed=seed + 1)
    b[:, :zeros] = 0
    b = b / b.sum(dim=1, keepdim=True)
    expected = torch.tensor([float(ot.emd2(x.numpy(), y.numpy(), metric)) for x, y in zip(a, b)], dtype=torch.float64)
    torch.testing.assert_close(wasserstein_proportions(a, b, metric), expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(wasserstein_proportions(a, b, metric.tolist()), expected, atol=1e-9, rtol=1e-9)


def test_named_metrics_are_their_matrices():
    a, b = proportions(4), proportions(4, seed=9)
    index = torch.arange(5.0)
    torch.testing.assert_close(wasserstein_proportions(a, b), wasserstein_proportions(a, b, 1 - torch.eye(5)))
    line = (index[:, None] - index).abs() / 4
    torch.testing.assert_close(wasserstein_proportions(a, b, "ordinal"), wasserstein_proportions(a, b, line))


@pytest.mark.parametrize("metric", ["discrete", "ordinal", PENTAGON])
def test_wasserstein_is_a_distance(metric):
    a, b, c = (proportions(6, seed=seed) for seed in range(3))
    d = [wasserstein_proportions(x, y, metric) for x, y in ((a, b), (b, c), (a, c), (b, a), (a, a))]
    assert (d[2] <= d[0] + d[1] + 1e-12).all()
    torch.testing.assert_close(d[0], d[3])
    assert d[4].abs().max() < 1e-12


def test_float32_masses_reach_the_solver():
    a, b = (proportions(3, seed=seed).float() for seed in range(2))
    value = wasserstein_proportions(a.requires_grad_(), b, PENTAGON)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), wasserstein_proportions(a.double(), b.double(), PENTAGON), atol=1e-6, rtol=0)


def test_consistency_values():
    z, y = maps(), maps(seed=1)
    q, r = z.softmax(dim=1), y.softmax(dim=1)
    torch.testing.assert_close(ConsistencyLoss()(z, y), (q - r).square().sum(dim=1).mean())
    both = (q * (q / r).log() + r * (r / q).log()).sum(dim=1).mean() / 2
    torch.testing.assert_close(ConsistencyLoss("kl")(z, y), both)
    for kind in ("squared", "kl"):
        loss = ConsistencyLoss(kind)
        torch.testing.assert_close(ConsistencyLoss(kind, logits=False)(q, r), loss(z, y))
        torch.testing.assert_close(loss(z, y), loss(y, z))
        assert float(loss(z, z + 3.0)) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(2, 4)), r"\[B, C, h, w\], got \[2, 4\]"),
        ((torch.zeros(2, 4, 3, 3), torch.zeros(2, 3)), r"\[B, C\] = \[2, 4\], got \[2, 3\]"),
        ((torch.zeros(2, 4, 3, 3), torch.zeros(2, 4), torch.ones(2, 3, 3)), r"\[2, 1, 3, 3\], got \[2, 3, 3\]"),
        ((torch.zeros(2, 4, 3, 3), torch.zeros(2, 4), torch.ones(2, 1, 48, 48)), "token_mass"),
    ],
)
def test_shapes(arguments, message):
    with pytest.raises(InputError, match=message):
        ProportionLoss()(*arguments)


def test_views_of_different_shape():
    with pytest.raises(InputError, match="one shape"):
        ConsistencyLoss()(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4))


@pytest.mark.parametrize(
    "metric", [[[0, 1, 2]], [[0, 1], [2, 0]], [[1, 1], [1, 0]], [[0, -1], [-1, 0]], [[0, np.nan], [np.nan, 0]]]
)
def test_wrong_metrics(metric):
    with pytest.raises(InputError, match="ground metric"):
        ProportionLoss(metric=metric)


def test_wrong_options():
    with pytest.raises(InputError, match="l1 must be at least 0"):
        ProportionLoss(l1=-1)
    with pytest.raises(ValueError, match="ordinal"):
        ProportionLoss(metric="ordnal")
    with pytest.raises(ValueError, match="squared"):
        ConsistencyLoss("sqared")
    with pytest.raises(InputError, match=r"3 classes has shape \[3, 3\]"):
        wasserstein_proportions(torch.ones(1, 3) / 3, torch.ones(1, 3) / 3, PENTAGON)
    with pytest.raises(InputError, match="one shape"):
        wasserstein_proportions(torch.ones(1, 3) / 3, torch.ones(2, 3) / 3)
