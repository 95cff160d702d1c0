"""Simulated raters."""

import numpy as np
import pytest

from monai_vslp.data.raters import NOISE_LEVELS, round_to, simulate_raters
from monai_vslp.utils.errors import InputError, ProportionError


@pytest.fixture(scope="module")
def binary():
    share = np.random.default_rng(0).uniform(0.05, 0.95, 150)
    return np.stack([share, 1 - share], axis=1)


@pytest.mark.parametrize("level", [*NOISE_LEVELS, "uniform"])
def test_estimates_are_on_the_simplex_and_keep_zeros(level):
    p = np.random.default_rng(1).dirichlet(np.ones(5), 40)
    p[:20, 2] = 0
    p /= p.sum(axis=1, keepdims=True)
    p[0] = [0, 0, 0, 1, 0]
    estimates = simulate_raters(p, level, raters=4, seed=3)
    assert estimates.shape == (4, 40, 5) and estimates.dtype == np.float64
    assert estimates.sum(axis=-1) == pytest.approx(1, abs=1e-12)
    assert (estimates >= 0).all()
    assert (estimates[:, p == 0] == 0).all()
    assert (estimates[:, 0] == p[0]).all()


def test_rounding_is_to_10_percent_in_7_of_10(binary):
    estimates = simulate_raters(np.repeat(binary, 4, axis=0), "medium", raters=6, seed=0)
    fives = estimates[..., 0] * 20
    assert fives == pytest.approx(np.round(fives), abs=1e-9)
    odd = (np.round(fives).astype(int) % 2 == 1).mean()
    # Rounded to 5 % (30 %), about half of the estimates do not fall on a ten; those near 0 and 100 % do more often.
    assert 0.10 < odd < 0.17


def test_same_seed_same_raters(binary):
    assert (simulate_raters(binary, "low", 2, 5) == simulate_raters(binary, "low", 2, 5)).all()
    assert (simulate_raters(binary, "low", 2, 5) != simulate_raters(binary, "low", 2, 6)).any()
    more = simulate_raters(binary, "low", 3, 5)
    assert (more[:2] == simulate_raters(binary, "low", 2, 5)).all()


def test_levels_are_ordered_and_match_what_they_stand_for(binary):
    errors, disagreement = {}, {}
    for level in NOISE_LEVELS:
        estimates = simulate_raters(binary, level, raters=40, seed=2)[..., 0]
        errors[level] = np.abs(estimates - binary[:, 0])
        disagreement[level] = estimates.std(axis=0).mean()
    assert errors["low"].mean() < errors["medium"].mean() < errors["high"].mean()
    assert disagreement["low"] < disagreement["medium"] < disagreement["high"]
    # Routine practice errs by 20 points on average and by three ten-point categories in a third of the cases, where both
    # classes are well represented; the margins here cover the spread over such samples.
    middle = np.abs(binary[:, 0] - 0.5) < 0.25
    assert 0.16 < errors["high"][:, middle].mean() < 0.24
    assert 0.22 < (errors["high"][:, middle] >= 0.25).mean() < 0.42


def test_noise_of_a_binary_logit_has_the_stated_deviation():
    p = np.full((200, 2), 0.5)
    logits = {}
    for level, (between, within) in NOISE_LEVELS.items():
        with np.errstate(divide="ignore"):
            estimates = np.clip(simulate_raters(p, level, raters=200, seed=1)[..., 0], 0.02, 0.98)
        logits[level] = np.log(estimates / (1 - estimates))
        assert logits[level].std() == pytest.approx(np.hypot(between, within), rel=0.12)
        assert logits[level].mean(axis=1).std() == pytest.approx(between, rel=0.2)  # the habits of a rater


def test_raters_are_unbiased_between_symmetric_classes():
    p = np.full((60, 3), 1 / 3)
    for level in (*NOISE_LEVELS, "uniform"):
        assert simulate_raters(p, level, raters=80, seed=4).mean(axis=(0, 1)) == pytest.approx(1 / 3, abs=0.035)


def test_uniform_stays_within_a_tenth():
    p = np.full((500, 2), 0.5)
    errors = simulate_raters(p, "uniform", 1, 0)[0, :, 0] - 0.5
    assert np.abs(errors).max() < 0.112 and np.abs(errors).max() > 0.08 and abs(errors.mean()) < 0.01


@pytest.mark.parametrize("step", [0.1, 0.05])
def test_rounding_by_largest_remainder(step):
    rng = np.random.default_rng(0)
    for classes in (2, 3, 7):
        for p in rng.dirichlet(np.ones(classes), 50):
            rounded = round_to(p, step)
            assert rounded.sum() == pytest.approx(1) and np.abs(rounded - p).max() < step
            assert rounded / step == pytest.approx(np.round(rounded / step))
            assert (round_to(rounded, step) == rounded).all()
    assert round_to(np.array([0.55, 0.0, 0.45]), 0.1)[1] == 0


def test_impossible_arguments_are_refused(binary):
    with pytest.raises(ValueError, match="low"):
        simulate_raters(binary, "lwo")
    with pytest.raises(InputError, match="raters"):
        simulate_raters(binary, raters=0)
    for wrong in (binary[0], binary * 100, binary - 0.5, binary * np.nan):
        with pytest.raises(ProportionError, match="sum to 1"):
            simulate_raters(wrong)
