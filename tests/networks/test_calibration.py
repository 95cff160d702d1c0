"""Calibration from proportions: closed forms, gradients, what is and is not identified, coverage by simulation."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from monai_vslp.networks import ConfidenceNet, TTAConfidence, calibrate_network
from monai_vslp.networks.calibration import (
    calibration_objective,
    conformal_half_width,
    fit_calibration,
    fit_offset,
    mean_offset,
    patients_needed,
    pooled_proportions,
    prior_shift,
    temper,
)
from monai_vslp.utils.errors import InputError

DOUBLE = torch.float64


def world(n=24, m=400, classes=3, temperature=1.0, offset=(0.0, 0.0, 0.0), seed=0):
    """Logits ``[n, m, C]`` of images of different mixes, and the proportions of ``softmax(z / T + b)``."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, 1, classes, generator=generator, dtype=DOUBLE)
    z = 2 * torch.randn(n, m, classes, generator=generator, dtype=DOUBLE) + 1.5 * mix
    p = temper(z, temperature, torch.tensor(offset, dtype=DOUBLE), dim=2).softmax(dim=2).mean(dim=1)
    return z, p


# ---- applying -----------------------------------------------------------------------------------------------------------


def test_a_calibrated_network_gives_tempered_logits_and_keeps_its_weights():
    torch.manual_seed(0)
    small = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    plain = ConfidenceNet(3, backbone_kwargs=small, blocks=[0, 1], window=32).eval()
    calibrated = calibrate_network(copy.deepcopy(plain), {"temperature": 2.5, "offset": [0.4, -0.1, -0.3]})
    assert list(calibrated.state_dict()) == list(plain.state_dict()) and calibrated.stride == plain.stride
    calibrated.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 40, 52)
    with torch.no_grad():
        expected = plain(x) / 2.5 + torch.tensor([0.4, -0.1, -0.3]).view(1, 3, 1, 1)
        torch.testing.assert_close(calibrated(x), expected)
        # Views are averaged as probabilities, after tempering: not the tempered average.
        fused = TTAConfidence("symmetries", stride=plain.stride)(x, calibrated)
        each = TTAConfidence("symmetries", "stack", stride=plain.stride, softmax=False)(x, plain)
        torch.testing.assert_close(fused, temper(each, 2.5, torch.tensor([0.4, -0.1, -0.3]), dim=2).softmax(2).mean(1))
        assert calibrate_network(plain, None) is plain
        torch.testing.assert_close(copy.deepcopy(calibrated)(x), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0, "offset": [0, 0, 0]},
        {"temperature": math.inf, "offset": [0, 0, 0]},
        {"temperature": 1.0, "offset": [0, math.nan, 0]},
        {"temperature": 1.0, "offset": [0, 0]},
        {"temperature": 1.0},
        {"offset": [0, 0, 0]},
    ],
)
def test_wrong_calibrations_are_refused(wrong):
    network = nn.Conv2d(3, 3, 1)
    network.num_classes = 3
    with pytest.raises(InputError, match="temperature|offset"):
        calibrate_network(network, wrong)
    assert not network._forward_hooks


def test_a_network_is_not_calibrated_twice():
    network = calibrate_network(nn.Conv2d(3, 2, 1), {"temperature": 2.0, "offset": [0.0, 0.0]})
    with pytest.raises(InputError, match="already"):
        calibrate_network(network, {"temperature": 2.0, "offset": [0.0, 0.0]})


# ---- the fit ------------------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_objective():
    z, p = world(n=4, m=20, temperature=1.7)
    p[0] = torch.tensor([0.0, 1.0, 0.0])
    weights = torch.rand(4, 20, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    weights[:, :3] = 0.0
    weights = weights / weights.sum(dim=1, keepdim=True)
    log_temperature = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    offset = torch.tensor([0.2, -0.5, 0.1], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, b: calibration_objective(t, b, z, weights, p), (log_temperature, offset))
    # By hand, the prior apart: d KL(p || p̂) = −Σ_k p_k/p̂_k dp̂_k, with dq = (diag q − q qᵀ) d(z/T + b).
    calibration_objective(log_temperature, offset, z, weights, p, prior=0.0).backward()
    q = (z / math.exp(0.3) + offset.detach()).softmax(dim=2)
    factor = p / (weights[..., None] * q).sum(dim=1)
    inner = (q * factor[:, None]).sum(dim=2, keepdim=True)
    by_offset = -(weights[..., None] * q * (factor[:, None] - inner)).sum(dim=(0, 1))
    torch.testing.assert_close(offset.grad, by_offset)
    by_log = (weights[..., None] * q * (factor[:, None] - inner) * z / math.exp(0.3)).sum()
    torch.testing.assert_close(log_temperature.grad, by_log)


@pytest.mark.parametrize(("temperature", "offset"), [(2.0, (0.0, 0.0, 0.0)), (0.5, (0.0, 0.0, 0.0)), (1.6, (0.7, -0.5, -0.2))])
def test_a_known_calibration_comes_back(temperature, offset):
    z, p = world(temperature=temperature, offset=offset)
    fit = fit_calibration(z, p, list(range(24)), prior=1e-6)
    assert fit.temperature == pytest.approx(temperature, rel=1e-3)
    pulled = fit_calibration(z, p, list(range(24))).temperature
    assert abs(math.log(pulled / temperature)) < 0.15 and abs(math.log(pulled)) < abs(math.log(temperature)), "the prior"
    assert fit.offset.tolist() == pytest.approx(list(offset), abs=1e-2)
    assert float(fit.offset.sum()) == pytest.approx(0, abs=1e-12)
    assert fit.variant == ("temperature_offset" if any(offset) else fit.variant) != "none"
    assert fit.errors[fit.variant] < 0.2 * fit.errors["none"]


def test_predictions_of_an_image_do_not_depend_on_its_own_patient():
    z, p = world(n=12, temperature=2.0, seed=3)
    groups = [i // 3 for i in range(12)]
    first = fit_calibration(z, p, groups, variant="temperature_offset")
    changed = p.clone()
    changed[:3] = changed[:3].flip(1)
    second = fit_calibration(z, changed, groups, variant="temperature_offset")
    torch.testing.assert_close(first.predicted[:3], second.predicted[:3], atol=1e-4, rtol=0)
    assert float((first.predicted[3:] - second.predicted[3:]).abs().max()) > 1e-2
    torch.testing.assert_close(first.before, pooled_proportions(z))


def noisy_world(seed, n=15):
    """Proportions of a network that needs no calibration, with errors of 10 %."""
    z, p = world(n=n, seed=seed)
    noise = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + seed), dtype=DOUBLE)
    p = (p + noise).clamp_min(0.01)
    return z, p / p.sum(dim=1, keepdim=True)


def test_noise_alone_is_left_alone():
    """No variant earns its place over a network that needs none."""
    chosen = [fit_calibration(*noisy_world(seed), list(range(15))) for seed in range(10)]
    assert sum(fit.variant == "none" for fit in chosen) >= 8
    for fit in chosen:
        if fit.variant == "none":
            assert fit.temperature == 1.0 and not fit.offset.any() and "one standard error" in fit.reason


def test_ill_posed_fits_return_one_and_say_so():
    z, p = world(temperature=2.0)
    few = fit_calibration(z[:4], p[:4], [0, 1, 2, 3])
    assert (few.temperature, few.variant) == (1.0, "none") and "too few" in few.reason
    alike = fit_calibration(z, p, [0] * 12 + [1] * 12)
    assert alike.variant == "none" and "2 patients" in alike.reason
    same = fit_calibration(z, p.mean(dim=0).expand_as(p), list(range(24)))
    assert same.temperature == 1.0 and not same.offset.any() and "hardly vary" in same.reason
    torch.testing.assert_close(same.predicted, same.before)


def test_an_undetermined_temperature_is_refused_even_if_asked_for():
    z, p = noisy_world(seed=1)
    asked = fit_calibration(z, p, list(range(15)), variant="temperature")
    assert asked.temperatures["temperature"][1] > math.log(2), "leaving images out changes T by more than a factor of two"
    assert asked.temperature == 1.0 and asked.variant == "none" and "undetermined" in asked.reason
    torch.testing.assert_close(asked.predicted, asked.before)
    z, p = world(temperature=2.0)
    assert fit_calibration(z, p, list(range(24)), variant="temperature").variant == "temperature"


def test_sharp_but_wrong_pixels_are_not_seen():
    """The limit of proportions: shuffling which pixel has which confidence changes accuracy, and nothing that is fitted."""
    z, p = world(temperature=2.0, seed=5)
    shuffled = z[:, torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(0))]
    first, second = (fit_calibration(x, p, list(range(24))) for x in (z, shuffled))
    assert first.temperature == pytest.approx(second.temperature, rel=1e-4)


def test_wrong_shapes_and_variants():
    z, p = world(n=8)
    with pytest.raises(InputError, match="as many groups"):
        fit_calibration(z, p, [0, 1])
    with pytest.raises(InputError, match="variant"):
        fit_calibration(z, p, list(range(8)), variant="isotonic")
    with pytest.raises(InputError, match=r"\[n, m, C\]"):
        pooled_proportions(z[0])
    with pytest.raises(InputError, match="above 0 somewhere"):
        pooled_proportions(z, torch.zeros(8, 400))


# ---- another site -------------------------------------------------------------------------------------------------------


def shifted(source, target, seed=0):
    """Exact posteriors under ``source`` on a finite set of appearances, whose weights are those of ``target``."""
    likelihood = torch.rand(40, len(source), generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) ** 3
    likelihood = likelihood / likelihood.sum(dim=0)
    source, target = torch.tensor(source, dtype=DOUBLE), torch.tensor(target, dtype=DOUBLE)
    logits = (likelihood * source).log()[None]
    b = (target / source).log()
    return logits, (likelihood @ target)[None], source, target, b - b.mean()


@pytest.mark.parametrize(("source", "target"), [((0.5, 0.3, 0.2), (0.15, 0.25, 0.6)), ((0.9, 0.1), (0.4, 0.6))])
def test_a_known_shift_comes_back_in_closed_form(source, target):
    logits, weights, source, target, b = shifted(source, target)
    offset, shares = prior_shift(logits, source, weights, tolerance=1e-13, max_iterations=100_000)
    torch.testing.assert_close(shares, target, atol=1e-5, rtol=0)
    torch.testing.assert_close(offset, b, atol=1e-4, rtol=0)
    torch.testing.assert_close(mean_offset(logits, target, weights), b, atol=1e-7, rtol=0)
    torch.testing.assert_close(fit_offset(logits, target[None], weights, prior=0.0), b, atol=1e-4, rtol=0)
    moved = pooled_proportions(logits, weights, offset=b)[0]
    torch.testing.assert_close(moved, target)


def test_without_a_shift_nothing_moves_and_each_step_of_em_is_bayes():
    logits, weights, source, _, _ = shifted((0.5, 0.3, 0.2), (0.5, 0.3, 0.2))
    offset, shares = prior_shift(logits, source, weights)
    torch.testing.assert_close(offset, torch.zeros(3, dtype=DOUBLE), atol=1e-6, rtol=0)
    logits, weights, source, target, _ = shifted((0.5, 0.3, 0.2), (0.1, 0.2, 0.7))
    _, first = prior_shift(logits, source, weights, max_iterations=1)
    torch.testing.assert_close(first, weights[0] @ logits[0].softmax(dim=1))
    with pytest.raises(InputError, match="above 0"):
        prior_shift(logits, torch.tensor([1.0, 0.0, 0.0]), weights)


def test_a_class_that_a_site_did_not_show_may_yet_come():
    logits, weights, *_ = shifted((0.5, 0.3, 0.2), (0.5, 0.5, 1e-9))
    offset = mean_offset(logits, torch.tensor([0.5, 0.5, 0.0]), weights)
    assert torch.isfinite(offset).all() and offset[2] < offset[:2].min()


# ---- intervals ----------------------------------------------------------------------------------------------------------


def test_the_quantile_by_hand():
    errors = torch.arange(1, 10) / 10
    assert conformal_half_width(errors, range(9), 0.9) == pytest.approx(0.9), "the largest of nine, at the least"
    assert conformal_half_width(errors, range(9), 0.8) == pytest.approx(0.8)
    assert conformal_half_width(errors[:8], range(8), 0.9) is None
    assert [patients_needed(level) for level in (0.5, 0.8, 0.9, 0.95)] == [1, 4, 9, 19]
    # Two patients and infinity weigh a third each: the three images of one count a ninth each.
    errors, patients = torch.tensor([0.1, 0.2, 0.3, 0.4]), ["a", "a", "a", "b"]
    assert conformal_half_width(errors, patients, 0.2) == pytest.approx(0.2)
    assert conformal_half_width(errors, patients, 0.5) == pytest.approx(0.4)
    with pytest.raises(InputError, match="level"):
        conformal_half_width(errors, patients, 90)


@pytest.mark.parametrize(("patients", "level"), [(9, 0.9), (20, 0.8), (40, 0.9)])
def test_coverage_by_simulation(patients, level):
    """Images of a patient are alike, patients have different numbers of them: a new patient's image is still covered."""
    rng = np.random.default_rng(0)
    covered, trials = 0, 4000
    for _ in range(trials):
        own = np.exp(0.8 * rng.normal(size=patients + 1))  # how hard each patient is
        counts = rng.integers(1, 12, size=patients)
        errors = [abs(own[g] * rng.normal(size=counts[g])) for g in range(patients)]
        names = np.repeat(np.arange(patients), counts).tolist()
        half = conformal_half_width(torch.from_numpy(np.concatenate(errors)), names, level)
        covered += abs(own[-1] * rng.normal()) <= half
    error = math.sqrt(level * (1 - level) / trials)
    assert covered / trials >= level - 3 * error
    assert covered / trials <= level + 1.2 / (patients + 1) + 3 * error, "not wider than the guarantee needs"
