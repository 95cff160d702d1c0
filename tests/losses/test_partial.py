"""Losses for intervals, blanks and presence."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from monai_vslp.data.proportions import parse_row
from monai_vslp.losses.partial import IntervalLoss, PresenceLoss, interval_bounds, log_proportions, project_interval
from monai_vslp.losses.proportion import ProportionLoss
from monai_vslp.networks import pool_proportions
from monai_vslp.utils.errors import InputError, ProportionError


def maps(batch=2, classes=4, size=(3, 5), seed=0, scale=1.0):
    return scale * torch.randn(batch, classes, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def flat(p):
    """Logits ``[B, C, 1, 1]`` of given proportions."""
    return torch.as_tensor(p, dtype=torch.float64).log()[..., None, None]


def box(seed, classes=4):
    """A random box around a random point of the simplex, and a prediction; some bounds are 0 or 1."""
    rng = np.random.default_rng(seed)
    inside, predicted = rng.dirichlet(np.full(classes, 0.7), 2)
    lower = np.clip(inside - rng.uniform(0, 0.3, classes) * rng.integers(0, 2, classes), 0, 1)
    upper = np.clip(inside + rng.uniform(0, 0.3, classes) * rng.integers(0, 2, classes), 0, 1)
    return lower, upper, np.maximum(predicted, 1e-4) / np.maximum(predicted, 1e-4).sum()


def divergence(m, p):
    return float(np.where(m > 0, m * np.log(np.maximum(m, 1e-300) / p), 0).sum())


@pytest.mark.parametrize("seed", range(12))
def test_projection_is_that_of_scipy(seed):
    lower, upper, p = box(seed)
    m = project_interval(*(torch.from_numpy(x)[None] for x in (np.log(p), lower, upper)))[0].numpy()
    assert m.sum() == pytest.approx(1, abs=1e-12)
    assert (m >= lower - 1e-12).all() and (m <= upper + 1e-12).all()
    start = lower + (upper - lower) * (1 - lower.sum()) / max((upper - lower).sum(), 1e-12)
    reference = minimize(
        lambda x: np.sum(np.maximum(x, 1e-12) * np.log(np.maximum(x, 1e-12) / p)),
        start,
        jac=lambda x: np.log(np.maximum(x, 1e-12) / p) + 1,
        bounds=list(zip(lower, upper)),
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 300},
    )
    assert divergence(m, p) <= reference.fun + 1e-7
    assert divergence(m, p) == pytest.approx(reference.fun, abs=1e-5)
    value = IntervalLoss()(flat(p[None]), torch.from_numpy(lower)[None], torch.from_numpy(upper)[None])
    assert float(value) == pytest.approx(divergence(m, p), abs=1e-12)


def test_projection_beats_every_point_of_a_fine_grid():
    lower, upper, p = np.array([0.1, 0.0, 0.3]), np.array([0.2, 0.25, 1.0]), np.array([0.7, 0.25, 0.05])
    m = project_interval(*(torch.from_numpy(x)[None] for x in (np.log(p), lower, upper)))[0].numpy()
    grid = np.arange(1001) / 1000
    a, b = np.meshgrid(grid, grid)
    points = np.stack([a.ravel(), b.ravel(), 1 - a.ravel() - b.ravel()], axis=1)
    points = points[((points >= lower - 1e-9) & (points <= upper + 1e-9)).all(axis=1)]
    best = min(divergence(x, p) for x in points)
    assert divergence(m, p) <= best + 1e-12 and best - divergence(m, p) < 1e-4


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 9), scale=st.sampled_from([1.0, 30.0, 1e4]))
def test_projection_meets_its_optimality_conditions(seed, classes, scale):
    lower, upper, _ = box(seed, classes)
    log_p = scale * np.random.default_rng(seed + 1).normal(size=classes)
    log_p = torch.from_numpy(log_p).log_softmax(0)[None]
    m = project_interval(log_p, torch.from_numpy(lower)[None], torch.from_numpy(upper)[None])[0].numpy()
    assert m.sum() == pytest.approx(1, abs=1e-9)
    assert (m >= lower - 1e-9).all() and (m <= upper + 1e-9).all()
    # log m - log p is one number inside the box, at least that where a lower bound holds, at most where an upper one does.
    nu = np.log(np.maximum(m, 1e-300)) - log_p[0].numpy()
    inner = (m > lower + 1e-9) & (m < upper - 1e-9)
    lows, highs = inner | (m >= upper - 1e-9), inner | (m <= lower + 1e-9)
    lows, highs = lows & (upper > lower), highs & (upper > lower) & (m > 1e-200)
    if lows.any() and highs.any():
        assert nu[lows].max() <= nu[highs].min() + 1e-5 * max(1.0, scale)


def test_zero_inside_the_bounds_and_above_outside():
    z = maps()
    p = pool_proportions(z.softmax(dim=1))
    loss = IntervalLoss()
    inside = loss(z.requires_grad_(), p - 0.05, p + 0.02)
    assert inside.abs() < 1e-12
    inside.backward()
    assert z.grad.abs().max() < 1e-12
    shifted = (p + torch.tensor([0.05, 0.0, 0.0, -0.05])).clamp(0, 1)
    assert loss(z, shifted - 0.02, shifted + 0.02) > 1e-4


def test_equal_bounds_are_the_proportion_loss():
    z, mass = maps(), torch.rand(2, 1, 3, 5, dtype=torch.float64)
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(IntervalLoss()(z, p, p, mass), ProportionLoss()(z, p, mass))
    torch.testing.assert_close(IntervalLoss(logits=False)(z.softmax(1), p, p, mass), ProportionLoss()(z, p, mass))


def test_blanks_pool_the_rest():
    z = maps(batch=3)
    nan = float("nan")
    known = torch.tensor([[0.5, nan, 0.2, nan], [0.1, 0.2, 0.3, nan], [nan] * 4], dtype=torch.float64)
    lower, upper = interval_bounds(known)
    p = pool_proportions(z.softmax(dim=1))
    expected = 0.5 * (0.5 / p[0, 0]).log() + 0.2 * (0.2 / p[0, 2]).log() + 0.3 * (0.3 / (p[0, 1] + p[0, 3])).log()
    full = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    expected = (expected + (full * (full / p[1]).log()).sum()) / 3  # nothing is known of the third image
    torch.testing.assert_close(IntervalLoss()(z, lower, upper), expected)


def test_bounds_of_rounded_values():
    lower, upper = interval_bounds(torch.tensor([[0.0, 0.3, 0.7]]), width=0.05)
    torch.testing.assert_close(lower, torch.tensor([[0.0, 0.25, 0.65]]))
    torch.testing.assert_close(upper, torch.tensor([[0.05, 0.35, 0.75]]))
    with pytest.raises(InputError, match="width"):
        interval_bounds(lower, width=-1.0)


@pytest.mark.parametrize(
    "cells",
    [
        {"a": "10-20", "b": "<5", "c": "80"},
        {"a": "60", "b": "", "c": ""},
        {"a": "33", "b": "33", "c": "33"},
        {"a": "> 90", "b": "trace", "c": ""},
    ],
)
def test_what_people_wrote_is_reached_by_descent(cells):
    label = parse_row(cells, ["a", "b", "c"])
    lower, upper = (torch.from_numpy(x)[None].float() for x in (label.lower, label.upper))
    z = torch.tensor([-2.0, 1.0, 2.0]).view(1, 3, 1, 1).repeat(1, 1, 4, 4).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    loss = IntervalLoss()
    assert float(loss(z, lower, upper)) > 0.1
    for _ in range(200):
        optimizer.zero_grad()
        loss(z, lower, upper).backward()
        optimizer.step()
    p = log_proportions(z)[0].exp()
    assert float(loss(z, lower, upper)) < 1e-3
    assert (p > lower - 0.02).all() and (p < upper + 0.02).all()


@pytest.mark.parametrize("with_mass", [False, True])
def test_gradients_of_intervals(with_mass):
    z = maps(size=(2, 3)).requires_grad_()
    mass = torch.rand(2, 1, 2, 3, dtype=torch.float64) * (torch.arange(6).view(2, 3) > 0) if with_mass else None
    lower = torch.tensor([[0.4, 0.0, 0.0, 0.05], [0.0, 0.0, 0.6, 0.0]], dtype=torch.float64)
    upper = torch.tensor([[0.9, 0.1, 1.0, 0.1], [0.1, 1.0, 0.7, 1.0]], dtype=torch.float64)
    assert float(IntervalLoss()(z, lower, upper, mass)) > 0.05
    assert torch.autograd.gradcheck(lambda x: IntervalLoss()(x, lower, upper, mass), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_extreme_logits_stay_finite(dtype, scale):
    z = maps(scale=scale).to(dtype).requires_grad_()
    lower = torch.tensor([[0.0, 0.0, 0.2, 0.0], [0.0, 0.1, 0.1, 0.8]])
    upper = torch.tensor([[0.0, 0.3, 0.6, 1.0], [0.0, 0.1, 0.1, 0.8]])
    presence = torch.tensor([[1.0, 0.0, float("nan"), 1.0], [0.0, 1.0, 1.0, 0.0]])
    for sharpness in (0.1, 1.0):
        value = IntervalLoss()(z, lower, upper) + PresenceLoss(sharpness)(z, presence)
        value.backward()
        assert value.isfinite() and z.grad.isfinite().all() and (z.grad != 0).any()


def test_images_without_tissue_do_not_count():
    z = maps().requires_grad_()
    mass = torch.ones(2, 1, 3, 5, dtype=torch.float64)
    mass[1] = 0
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0]] * 2, dtype=torch.float64)
    presence = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    for loss, args in ((IntervalLoss(), (p, p)), (PresenceLoss(), (presence,))):
        torch.testing.assert_close(loss(z, *args, mass), loss(z[:1], *(a[:1] for a in args)))
        (gradient,) = torch.autograd.grad(loss(z, *args, mass), z)
        assert (gradient[1] == 0).all() and (gradient[0] != 0).any()
        assert loss(z, *args, torch.zeros_like(mass)) == 0


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ([0.6, 0.6], [1.0, 1.0]),
        ([0.0, 0.0], [0.4, 0.4]),
        ([0.5, 0.2], [0.4, 1.0]),
        ([-0.1, 0.2], [0.4, 1.0]),
        ([float("nan"), 0.2], [0.4, 1.0]),
    ],
)
def test_bounds_without_a_point_are_refused(lower, upper):
    with pytest.raises(ProportionError, match="image 1 of the batch"):
        IntervalLoss()(torch.zeros(2, 2, 1, 1), torch.tensor([[0.0, 0.0], lower]), torch.tensor([[1.0, 1.0], upper]))


def test_bounds_off_by_rounding_are_taken():
    third = torch.full((1, 3), 1 / 3 + 1e-6)
    assert float(IntervalLoss()(torch.zeros(1, 3, 2, 2), third, third)) == pytest.approx(0, abs=1e-6)


def test_wrong_shapes_are_refused():
    z = torch.zeros(2, 3, 2, 2)
    with pytest.raises(InputError, match=r"\[2, 3\]"):
        IntervalLoss()(z, torch.zeros(2, 4), torch.ones(2, 4))
    with pytest.raises(InputError, match=r"\[2, 3\]"):
        PresenceLoss()(z, torch.zeros(3, 2))
    with pytest.raises(InputError, match="2 classes"):
        PresenceLoss()(z[:, :1], torch.zeros(2, 1))
    with pytest.raises(InputError, match="sharpness"):
        PresenceLoss(0.0)


def test_presence_by_hand():
    z, mass = maps(), torch.rand(2, 1, 3, 5, dtype=torch.float64)
    q = z.softmax(dim=1)
    a = mass / mass.sum(dim=(2, 3), keepdim=True)
    odds = (a * (q / (1 - q)) ** 2).sum(dim=(2, 3)).sqrt()
    y = torch.tensor([[1.0, 0.0, 1.0, 0.0], [float("nan"), 1.0, 0.0, float("nan")]], dtype=torch.float64)
    chance = odds / (1 + odds)
    by_class = torch.where(y == 1, -chance.log(), torch.where(y == 0, -(1 - chance).log(), 0.0))
    expected = (by_class[0].sum() / 4 + by_class[1].sum() / 2) / 2
    torch.testing.assert_close(PresenceLoss(2.0)(z, y, mass), expected)
    torch.testing.assert_close(PresenceLoss(2.0, logits=False)(q, y, mass), expected)


def test_pooling_lies_between_mean_and_maximum_and_ignores_the_grid():
    z = maps()
    q = z.softmax(dim=1)
    odds = (q / (1 - q)).log().flatten(2)
    near, sharp = (PresenceLoss(r).pooled(z)[0] for r in (1e-4, 200.0))
    torch.testing.assert_close(near, odds.mean(dim=2), atol=1e-2, rtol=0)
    torch.testing.assert_close(sharp, odds.amax(dim=2), atol=2e-2, rtol=0)
    fine = z.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    torch.testing.assert_close(PresenceLoss().pooled(fine)[0], PresenceLoss().pooled(z)[0])


def test_gradients_of_presence():
    z = maps(size=(2, 3)).requires_grad_()
    y = torch.tensor([[1.0, 0.0, float("nan"), 0.0], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    mass = torch.rand(2, 1, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: PresenceLoss(1.5)(x, y, mass), z)


def test_presence_is_learned_and_a_small_area_suffices():
    z = torch.zeros(1, 3, 10, 10)
    z[:, 0] += 8
    small = z.clone()
    small[:, :, 0, :2] = torch.tensor([0.0, 8.0, 0.0]).view(1, 3, 1)  # 2 % of the image
    assert (PresenceLoss().pooled(small)[0] > 0).tolist() == [[True, True, False]]
    # A start without any contrast would keep all pixels alike, and two classes cannot both fill them.
    z = (z + maps(1, 3, (10, 10)).float()).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.2)
    for _ in range(150):
        optimizer.zero_grad()
        PresenceLoss()(z, torch.tensor([[1, 0, 1]])).backward()
        optimizer.step()
    assert (PresenceLoss().pooled(z.detach())[0] > 0).tolist() == [[True, False, True]]
