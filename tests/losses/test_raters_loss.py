"""The likelihood of raters' estimates."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import psi
from scipy.stats import dirichlet, multivariate_normal, norm

from monai_vslp.data.raters import NOISE_LEVELS, draw_noise, rater_offsets, simulate_raters
from monai_vslp.losses.partial import log_proportions
from monai_vslp.losses.raters import RaterLikelihood
from monai_vslp.utils.errors import InputError

MODELS = ["log_ratio", "dirichlet"]
FINE = 1e-4  # a step that hardly rounds


def maps(batch=2, classes=3, size=(2, 3), seed=0, scale=1.0):
    return scale * torch.randn(batch, classes, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def simplex(*shape, seed=0, alpha=2.0):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(shape[-1], alpha), size=shape[:-1]))


def fit(loss, estimates, present=None, steps=400, rate=0.05):
    """Most likely proportions ``[B, C]``, with the loss's own parameters learned along."""
    start = estimates if present is None else torch.where(present[..., None], estimates, 1 / estimates.shape[2])
    z = (start.mean(dim=1) + 0.01).log()[..., None, None].clone().requires_grad_()
    parameters = [p for p in loss.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([z, *parameters], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(z, estimates, present).backward()
        optimizer.step()
        schedule.step()
    return log_proportions(z.detach())[0].exp()


def test_log_ratio_is_a_gaussian_of_centred_log_ratios():
    """Against scipy: the singular normal law of centred log ratios, with its covariance sigma²/2 (I - 11ᵀ/C)."""
    log_p, y = simplex(1, 4, seed=1).log(), simplex(1, 1, 4, seed=2)
    loss = RaterLikelihood(1, 4, sigma_e=0.6, sigma_b=None, step=1e-8)
    found = loss.log_likelihood(log_p, y).item()
    centre = np.eye(4) - 0.25
    residual = centre @ (y[0, 0].log() - log_p[0]).numpy()
    expected = multivariate_normal(np.zeros(4), 0.18 * centre, allow_singular=True).logpdf(residual)
    # One constant for all estimates: the unit of volume across the centred plane is 1 / sqrt(C) of that of three log ratios.
    assert found == pytest.approx(expected - 0.5 * math.log(4), abs=1e-6)


def test_dirichlet_is_that_of_scipy():
    p, y = simplex(2, 4, seed=1), simplex(2, 3, 4, seed=2, alpha=5.0)
    loss = RaterLikelihood(3, 4, "dirichlet", kappa=13.0, sigma_b=None, step=FINE)
    found = loss.log_likelihood(p.log(), y)
    expected = [[dirichlet(13 * p[b].numpy()).logpdf(y[b, r].numpy()) for r in range(3)] for b in range(2)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_rounding_adds_the_variance_of_an_even_error():
    """Two classes, both seen: their log ratio is normal."""
    log_p, y = torch.tensor([[0.7, 0.3]], dtype=torch.float64).log(), torch.tensor([[[0.9, 0.1]]], dtype=torch.float64)
    found = RaterLikelihood(1, 2, sigma_e=0.5, sigma_b=None, step=0.1).log_likelihood(log_p, y)
    deviation = math.sqrt(0.5**2 + 0.01 / 12 * (1 / 0.9**2 + 1 / 0.1**2))
    assert found.item() == pytest.approx(norm(math.log(7 / 3), deviation).logpdf(math.log(9)), rel=1e-6)


@pytest.mark.parametrize("step", [0.05, 0.1])
def test_a_zero_is_the_chance_of_less_than_half_a_step(step):
    """Two classes, one seen: the integral has a closed form."""
    odds = torch.tensor([4.0, 1.0, -1.0, -5.0, -20.0, -200.0], dtype=torch.float64)
    log_p = torch.stack([odds, 0 * odds], dim=1).log_softmax(dim=1)  # from a class that hardly is there to one that fills all
    loss = RaterLikelihood(1, 2, sigma_e=0.8, sigma_b=None, step=step)
    found = loss.log_likelihood(log_p, torch.tensor([[[1.0, 0.0]]] * 6, dtype=torch.float64)).squeeze(1)
    deviation = math.sqrt(0.8**2 + step**2 / 12)
    expected = norm.logcdf((math.log(step / 2) + odds.numpy()) / deviation)
    assert found.detach().numpy() == pytest.approx(expected, rel=1e-6)
    coarse = loss.log_likelihood(log_p.float(), torch.tensor([[[1.0, 0.0]]] * 6)).squeeze(1)
    assert coarse.detach().numpy() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("step", [0.02, 0.05, 0.1])
def test_the_chance_of_a_zero_is_what_simulation_gives(step):
    p, sigma = np.array([0.6, 0.37, 0.03]), 0.9
    rng = np.random.default_rng(0)
    y = p * np.exp(rng.normal(0, sigma / math.sqrt(2), (200_000, 3)))
    y /= y.sum(axis=1, keepdims=True)
    simulated = (y[:, 2] < step / 2).mean()
    loss = RaterLikelihood(1, 3, sigma_e=sigma, sigma_b=None, step=step)
    # Density of the ratio of the classes seen, times the chance of the zero: integrate over the ratio.
    ratio = np.linspace(-5, 6, 600)
    share = 1 / (1 + np.exp(-ratio))
    y = torch.from_numpy(np.stack([share, 1 - share, 0 * share], axis=1))[:, None]
    log_p = torch.from_numpy(np.log(p))[None].expand(len(ratio), -1)
    density = loss.log_likelihood(log_p, y).exp().squeeze(1).detach().numpy()
    assert np.trapezoid(density, ratio) == pytest.approx(simulated, abs=0.015)


@pytest.mark.parametrize("step", [FINE, 0.05, 0.1])
def test_one_estimate_is_its_own_most_likely_truth(step):
    y = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    z = y.log()[..., None, None].clone().requires_grad_()
    loss = RaterLikelihood(1, 3, sigma_b=None, step=step)
    value = loss(z, y[:, None])
    value.backward()
    assert z.grad.abs().max() < 1e-10
    for seed in range(5):
        assert loss(z + maps(1, 3, (1, 1), seed, 0.3), y[:, None]) > value


def test_several_estimates_meet_in_their_geometric_mean():
    y = simplex(2, 4, 3, seed=5)
    expected = y.log().mean(dim=1).softmax(dim=1)
    z = expected.log()[..., None, None].clone().requires_grad_()
    RaterLikelihood(4, 3, sigma_b=None, step=1e-6)(z, y).backward()
    assert z.grad.abs().max() < 1e-5
    # With coarse steps small classes count for less, but the minimum stays near by.
    assert (fit(RaterLikelihood(4, 3, sigma_b=None, step=0.05), y) - expected).abs().max() < 0.05


def test_a_class_nobody_saw_vanishes_from_the_map():
    y = torch.tensor([[[0.7, 0.3, 0.0], [0.6, 0.4, 0.0]]], dtype=torch.float64)
    p = fit(RaterLikelihood(2, 3, sigma_b=None, step=0.1), y, steps=800)
    assert p[0, 2] < 0.02 and p[0, 0] == pytest.approx(0.65, abs=0.02)


def test_a_class_one_of_two_saw_stays_small():
    y = torch.tensor([[[0.7, 0.2, 0.1], [0.7, 0.3, 0.0]]], dtype=torch.float64)
    p = fit(RaterLikelihood(2, 3, sigma_b=None, step=0.1), y)
    assert 0.02 < p[0, 2] < 0.1


@pytest.mark.parametrize("kappa", [5.0, 50.0, 5000.0])
def test_most_likely_mean_of_a_dirichlet(kappa):
    y = simplex(3, 1, 3, seed=7, alpha=4.0)
    p = fit(RaterLikelihood(1, 3, "dirichlet", kappa=kappa, sigma_b=None, step=FINE), y, steps=800)
    score = psi(kappa * p.numpy()) - y[:, 0].log().numpy()
    assert np.ptp(score, axis=1) == pytest.approx(0, abs=0.02)
    if kappa > 1000:
        torch.testing.assert_close(p, y[:, 0], atol=1e-3, rtol=0)


def test_pseudo_counts_keep_a_dirichlet_near_a_quarter_step():
    y = torch.tensor([[[0.7, 0.3, 0.0]]], dtype=torch.float64)
    p = fit(RaterLikelihood(1, 3, "dirichlet", kappa=1000.0, sigma_b=None, step=0.1), y, steps=800)
    assert p[0, 2] == pytest.approx(0.025, abs=2e-3)
    assert p[0, 0] / p[0, 1] == pytest.approx(7 / 3, rel=0.01)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("offsets", [None, 0.5])
def test_gradients(model, offsets):
    loss = RaterLikelihood(3, 3, model, sigma_b=offsets, learn_spread=True, images=7, step=0.1).double()
    y = torch.tensor([[[0.7, 0.3, 0.0], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0]], [[0.1, 0.2, 0.7], [0, 0.1, 0.9], [0.3, 0.3, 0.4]]])
    present = torch.tensor([[True, True, True], [True, True, False]])
    mass = torch.rand(2, 1, 2, 3, dtype=torch.float64)
    names = [name for name, _ in loss.named_parameters()]
    values = [(p + 0.1 * torch.randn_like(p)).detach().requires_grad_() for p in loss.parameters()]

    def call(z, *parameters):
        return torch.func.functional_call(loss, dict(zip(names, parameters)), (z, y.double(), present, mass))

    assert len(values) == (1 if offsets is None else 2)
    assert torch.autograd.gradcheck(call, (maps().requires_grad_(), *values))


@settings(deadline=None, max_examples=100)
@given(
    model=st.sampled_from(MODELS),
    tenths=st.lists(st.integers(0, 10), min_size=2, max_size=6).filter(any),
    step=st.sampled_from([0.01, 0.05, 0.1, 1.0]),
    scale=st.sampled_from([1.0, 1e2, 1e4]),
)
def test_any_estimate_and_extreme_logits_stay_finite(model, tenths, step, scale):
    y = torch.tensor(tenths, dtype=torch.float32)
    y = (y / y.sum())[None, None]
    z = maps(1, len(tenths), scale=scale).float().requires_grad_()
    loss = RaterLikelihood(1, len(tenths), model, learn_spread=True, step=step)
    value = loss(z, y)
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in loss.parameters())


def test_many_classes_all_below_half_a_step():
    y = torch.full((1, 1, 40), 1 / 40)
    for model in MODELS:
        z = maps(1, 40).float().requires_grad_()
        value = RaterLikelihood(1, 40, model, step=0.1)(z, y)
        value.backward()
        assert value.isfinite() and z.grad.isfinite().all()


def test_a_vanished_class_that_was_seen_comes_back():
    y = torch.tensor([[[0.5, 0.5]]])
    for model in MODELS:
        z = torch.zeros(1, 2, 4, 4)
        z[:, 1] = -200.0
        z.requires_grad_()
        RaterLikelihood(1, 2, model)(z, y).backward()
        assert (z.grad[:, 1] < -1e-3).all()


@pytest.mark.parametrize("model", MODELS)
def test_absent_raters_do_not_count_and_may_be_nan(model):
    y = simplex(3, 2, 3, seed=3)
    present = torch.tensor([[True, True], [True, False], [False, False]])
    broken = torch.where(present[..., None], y, torch.nan)
    loss = RaterLikelihood(2, 3, model).double()
    torch.nn.init.normal_(loss.raw_offsets, std=0.3)
    z = maps(3).requires_grad_()
    value = loss(z, broken, present)
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(value, loss(z[:2], y[:2], present[:2]))
    assert gradient.isfinite().all() and (gradient[2] == 0).all() and (gradient[:2] != 0).all()
    nobody = loss(z, broken, torch.zeros_like(present))
    torch.testing.assert_close(nobody, loss.offsets.square().sum() / 0.5**2)


def test_images_without_tissue_do_not_count():
    y, z = simplex(2, 2, 3), maps()
    mass = torch.ones(2, 1, 2, 3, dtype=torch.float64)
    mass[1] = 0
    loss = RaterLikelihood(2, 3)
    torch.testing.assert_close(loss(z, y, None, mass), loss(z[:1], y[:1]))


def test_logits_and_probabilities_agree():
    y, z = simplex(2, 2, 3), maps()
    torch.testing.assert_close(RaterLikelihood(2, 3)(z, y), RaterLikelihood(2, 3, logits=False)(z.softmax(dim=1), y))


def simulated(level, raters, images, classes, seed):
    """Truth, estimates ``[n, R, C]`` and the centred offsets that simulate_raters drew for them."""
    truth = np.random.default_rng(seed + 100).dirichlet(np.full(classes, 6.0), images)
    estimates = simulate_raters(truth, level, raters, seed)
    rng, offsets = np.random.default_rng(seed), []
    for _ in range(raters):  # the same draws again
        offsets.append(rater_offsets(level, classes, rng))
        for _ in range(images):
            draw_noise(level, classes, rng)
    offsets = np.array(offsets)
    return truth, torch.from_numpy(estimates).transpose(0, 1), offsets - offsets.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("model", MODELS)
def test_offsets_are_found_up_to_their_mean_over_raters(model):
    """The truth is free in every image, and each rater saw three images of four."""
    level, images = "low", 160
    sigma_b, sigma_e = NOISE_LEVELS[level]
    truth, estimates, offsets = simulated(level, 5, images, 3, seed=2)
    present = torch.rand(images, 5, generator=torch.Generator().manual_seed(0)) < 0.75
    loss = RaterLikelihood(5, 3, model, sigma_e=sigma_e, kappa=30.0, sigma_b=sigma_b, images=images, step=0.1)
    p = fit(loss, estimates, present)
    found = loss.offsets.detach().numpy()
    assert found.mean(axis=1) == pytest.approx(0, abs=1e-6)
    relative, expected = found - found.mean(axis=0), offsets - offsets.mean(axis=0)
    assert np.abs(relative - expected).max() < 0.12
    assert np.corrcoef(relative.ravel(), expected.ravel())[0, 1] > 0.95
    # The mean offset over raters has gone into the proportions; the prior keeps it out of the offsets.
    assert np.abs(found.mean(axis=0)).max() < 0.02
    shared = (np.log(p.numpy()) - np.log(truth)).mean(axis=0)
    shared -= shared.mean()
    assert np.abs(shared - offsets.mean(axis=0)).max() < 0.1


def test_the_mean_offset_cannot_be_told_from_the_truth():
    y, log_p, shift = simplex(4, 3, 3), simplex(4, 3, seed=1).log(), torch.tensor([0.5, -0.2, -0.3], dtype=torch.float64)
    for model in MODELS:
        plain, moved = RaterLikelihood(3, 3, model).double(), RaterLikelihood(3, 3, model).double()
        with torch.no_grad():
            moved.raw_offsets += shift
        torch.testing.assert_close(plain.log_likelihood(log_p + shift, y), moved.log_likelihood(log_p, y))


def test_offsets_shrink_as_their_prior_narrows():
    _, estimates, _ = simulated("medium", 3, 40, 3, seed=1)
    sizes = []
    for sigma_b in (0.01, 0.1, 1.0):
        loss = RaterLikelihood(3, 3, sigma_b=sigma_b, images=40, step=0.1)
        fit(loss, estimates, steps=200)
        sizes.append(float(loss.offsets.detach().norm()))
    assert sizes[0] < 0.1 * sizes[2] and sizes[0] < sizes[1] < sizes[2]


def test_spread_is_learned_where_the_truth_is_known():
    level = "medium"
    sigma_b, sigma_e = NOISE_LEVELS[level]
    truth, estimates, _ = simulated(level, 4, 200, 3, seed=4)
    loss = RaterLikelihood(4, 3, sigma_e=0.2, learn_spread=True, sigma_b=sigma_b, images=200, step=0.1)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    z = torch.from_numpy(truth).log()[..., None, None]
    for _ in range(200):
        optimizer.zero_grad()
        loss(z, estimates).backward()
        optimizer.step()
    assert loss.spread.item() == pytest.approx(sigma_e, rel=0.12)


def test_concentration_is_learned_where_the_truth_is_known():
    truth = np.random.default_rng(0).dirichlet([4, 4, 4], 200)
    rng = np.random.default_rng(1)
    y = torch.from_numpy(np.stack([[rng.dirichlet(25 * p) for _ in range(3)] for p in truth]))
    loss = RaterLikelihood(3, 3, "dirichlet", kappa=5.0, learn_spread=True, sigma_b=None, step=0.001)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss(torch.from_numpy(truth).log()[..., None, None], y).backward()
        optimizer.step()
    assert loss.spread.item() == pytest.approx(25, rel=0.1)


def test_only_what_is_to_be_learned_is_a_free_parameter():
    free = [name for name, p in RaterLikelihood(2, 3).named_parameters() if p.requires_grad]
    assert free == ["raw_offsets"]
    loss = RaterLikelihood(2, 3, sigma_b=None, learn_spread=True)
    assert [name for name, p in loss.named_parameters() if p.requires_grad] == ["log_spread"]
    assert set(loss.state_dict()) == {"log_spread"}
    assert (loss.offsets == 0).all() and loss.offsets.shape == (2, 3)


@pytest.mark.parametrize(
    "options", [{"sigma_e": 0.0}, {"kappa": -1.0}, {"sigma_b": 0.0}, {"step": 0.0}, {"step": 5.0}, {"images": 0}, {"raters": 0}]
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        RaterLikelihood(**{"raters": 2, "classes": 3, **options})


def test_wrong_shapes_and_models_are_refused():
    loss, z = RaterLikelihood(2, 3), torch.zeros(4, 3, 2, 2)
    with pytest.raises(InputError, match=r"\[4, 2, 3\]"):
        loss(z, torch.ones(4, 3, 2))
    with pytest.raises(InputError, match="bool"):
        loss(z, torch.ones(4, 2, 3) / 3, torch.ones(4, 2))
    with pytest.raises(InputError, match="3 classes"):
        loss(z[:, :2], torch.ones(4, 2, 2) / 2)
    with pytest.raises(ValueError, match="log_ratio"):
        RaterLikelihood(2, 3, "log_ratios")
