"""Drawing cells of an image without replacement."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from monai_vslp.data.sampling import class_counts, sample_cells, sample_proportions, sampling_covariance
from monai_vslp.utils.errors import InputError, ProportionError

P = np.array([0.5, 0.3, 0.15, 0.05, 0.0])


def proportions(weights):
    return np.asarray(weights, dtype=np.float64) / np.sum(weights)


WEIGHTS = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any).map(proportions)


@settings(deadline=None, max_examples=100)
@given(p=WEIGHTS, total=st.integers(1, 10**8))
def test_counts_are_whole_add_up_and_lie_next_to_the_proportions(p, total):
    counts = class_counts(p, total)
    assert counts.dtype == np.int64 and counts.sum() == total
    assert (counts >= 0).all() and (counts[p == 0] == 0).all()
    assert (np.abs(counts - p * total) < 1 + 1e-6).all()


def test_counts_of_float32_thirds():
    assert class_counts(np.full(3, 1 / 3, dtype=np.float32), 10).tolist() == [4, 3, 3]
    assert class_counts(np.array([0.1, 0.2, 0.7]), 10).tolist() == [1, 2, 7]


@settings(deadline=None, max_examples=50)
@given(p=WEIGHTS, total=st.integers(1, 500), data=st.data())
def test_draws_are_on_the_simplex_and_within_what_there_is(p, total, data):
    drawn = data.draw(st.integers(1, total))
    x = sample_proportions(p, total, drawn, np.random.default_rng(0), size=8)
    assert x.shape == (8, len(p)) and x.sum(axis=1) == pytest.approx(1)
    units = x * drawn
    assert units == pytest.approx(np.round(units), abs=1e-6)
    assert (units >= -1e-9).all() and (units <= class_counts(p, total) + 1e-6).all()


@pytest.mark.parametrize("drawn", [1, 12, 80, 199])
def test_both_moments(drawn):
    total, size = 200, 40_000
    x = sample_proportions(P, total, drawn, np.random.default_rng(3), size=size)
    covariance = sampling_covariance(P, total, drawn)
    # Six standard errors of a mean; the deviation of a variance estimate is about sqrt(2 / size), more for rare classes.
    assert (np.abs(x.mean(axis=0) - P) <= 6 * np.sqrt(np.diag(covariance) / size) + 1e-12).all()
    found = np.cov(x.T, bias=True)
    assert np.abs(found - covariance).max() < 0.03 * covariance.max()
    # Without the correction for drawing without replacement the law would be another.
    assert drawn == 1 or np.abs(found - (np.diag(P) - np.outer(P, P)) / drawn).max() > 0.04 * covariance.max()


def test_covariance_of_two_classes_is_that_of_scipy():
    for total, drawn, some in ((30, 7, 11), (30, 29, 11), (1, 1, 1), (9, 1, 3)):
        expected = hypergeom(total, some, drawn).var() / drawn**2 if total > 1 else 0.0
        covariance = sampling_covariance(np.array([some, total - some]) / total, total, drawn)
        assert covariance == pytest.approx(expected * np.array([[1, -1], [-1, 1]]), abs=1e-15)


def test_all_cells_show_the_proportions_themselves():
    assert sample_proportions(P, 200, 200, np.random.default_rng(0)) == pytest.approx(P)


def test_same_seed_same_draws():
    draws = [sample_proportions(P, 1000, 64, np.random.default_rng(5), size=4) for _ in range(2)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0][0] != draws[0][1]).any()


def test_drawn_targets_leave_the_minimum_of_kl_and_raise_it_by_the_known_amount():
    """The compensation identity, by summing over all draws of 12 of 60 cells."""
    total, drawn, some = 60, 12, 24
    count = np.arange(drawn + 1)
    chance = hypergeom(total, some, drawn).pmf(count)
    targets = np.stack([count, drawn - count], axis=1) / drawn
    p = np.array([some, total - some]) / total

    def kl(target, predicted):
        return np.where(target > 0, target * np.log(np.where(target > 0, target, 1) / predicted), 0).sum(axis=-1)

    floor = chance @ kl(targets, p)
    for share in (0.1, 0.3, 0.4, 0.5, 0.8):
        predicted = np.array([share, 1 - share])
        assert chance @ kl(targets, predicted) == pytest.approx(kl(p, predicted) + floor, abs=1e-12)
    assert floor == pytest.approx((total - drawn) / (2 * drawn * (total - 1)), rel=0.06)


def test_cells_are_tissue_distinct_and_equally_likely():
    mass = np.zeros((1, 5, 6))
    mass[0, 1:4, 1:5] = np.linspace(0.1, 1, 12).reshape(3, 4)
    rng = np.random.default_rng(0)
    hits = np.zeros((5, 6))
    for _ in range(3000):
        cells = sample_cells(mass, 4, rng)
        assert cells.shape == (4, 2) and len(np.unique(cells, axis=0)) == 4
        assert (np.diff(cells[:, 0] * 6 + cells[:, 1]) > 0).all()
        hits[tuple(cells.T)] += 1
    assert (hits[mass[0] == 0] == 0).all()
    assert hits[mass[0] > 0] == pytest.approx(1000, abs=130)  # five standard deviations
    assert (sample_cells(mass[0], 12, rng) == np.argwhere(mass[0] > 0)).all()


def test_cells_of_a_tensor():
    torch = pytest.importorskip("torch")
    mass = torch.tensor([[0.0, 0.5], [1.0, 0.0]])
    assert sample_cells(mass, 2, np.random.default_rng(0)).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("p", [[0.5, 0.6], [-0.1, 1.1], [np.nan, 1.0], [[0.5, 0.5]]])
def test_what_are_no_proportions_is_refused(p):
    with pytest.raises(ProportionError, match="sum to 1"):
        sample_proportions(np.array(p), 10, 2, np.random.default_rng(0))


@pytest.mark.parametrize(("total", "drawn"), [(10, 11), (10, 0), (10**9, 5)])
def test_impossible_draws_are_refused(total, drawn):
    with pytest.raises(InputError, match="drawn <= total"):
        sample_proportions(P, total, drawn, np.random.default_rng(0))


def test_too_little_tissue_is_refused():
    with pytest.raises(InputError, match="3 of 2 cells"):
        sample_cells(np.eye(2), 3, np.random.default_rng(0))
    with pytest.raises(InputError, match="shape"):
        sample_cells(np.ones((2, 2, 2)), 3, np.random.default_rng(0))
