"""Derivatives against finite differences, the band against refinements done by hand, the report against its sums."""

import dataclasses
import json
import math

import pytest
import torch
from cases import noisy_confidence

from monai_vslp.utils.errors import InputError, ProportionError
from monai_vslp.variational import refine, solve_transport, transport_plan
from monai_vslp.variational.explain import (
    energy_report,
    flip_band,
    marginal_sensitivity,
    offset_sensitivity,
    pixel_sensitivity,
)


def problem(seed=0, classes=4, pixels=200):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(classes, pixels, generator=generator, dtype=torch.float64)
    mass = torch.rand(pixels, generator=generator, dtype=torch.float64) + 0.1
    mass[:10] = 0
    p = torch.softmax(0.7 * torch.randn(classes, generator=generator, dtype=torch.float64), dim=0)
    return scores, mass / mass.sum(), p


def solve(scores, mass, p, smoothing, trust):
    found = solve_transport(scores, mass, p, smoothing=smoothing, trust=trust, tolerance=1e-13, max_iterations=200)
    u, _ = transport_plan(scores.clone(), found.psi, smoothing)
    return u, found.psi, (u * mass).sum(dim=1)


def between(classes, source, target):
    d = torch.zeros(classes, dtype=torch.float64)
    d[target], d[source] = 1.0, -1.0
    return d


@pytest.mark.parametrize("trust", [math.inf, 20.0, 1.0, 0.1])
@pytest.mark.parametrize("smoothing", [0.2, 1.0])
def test_derivatives_agree_with_finite_differences(trust, smoothing):
    scores, mass, p = problem()
    u, _, _ = solve(scores, mass, p, smoothing, trust)
    by_p = marginal_sensitivity(u, mass, smoothing, p, trust)
    offsets = offset_sensitivity(u, mass, smoothing, p, trust)
    eps = 1e-5
    for source, target in ((0, 1), (3, 2), (1, 3)):
        d = between(4, source, target)
        plus, minus = (solve(scores, mass, p + sign * eps * d, smoothing, trust) for sign in (1, -1))
        u_d, psi_d, marginal_d = ((a - b) / (2 * eps) for a, b in zip(plus, minus))
        torch.testing.assert_close(by_p @ d, marginal_d, rtol=1e-5, atol=1e-6)
        change = offsets @ d
        if math.isinf(trust):  # ψ is free up to a constant
            change, psi_d = change - change.mean(), psi_d - psi_d.mean()
        torch.testing.assert_close(change, psi_d, rtol=1e-5, atol=1e-5)
        pixels = pixel_sensitivity(u, mass, smoothing, p, d, trust)
        torch.testing.assert_close(pixels, u_d, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close((pixels * mass).sum(dim=1), by_p @ d, rtol=1e-9, atol=1e-12)


def test_a_column_is_the_answer_to_raising_one_class_at_the_expense_of_all():
    scores, mass, p = problem(seed=1, classes=3)
    u, _, _ = solve(scores, mass, p, 0.5, 2.0)
    d = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) - 1 / 3
    eps = 1e-5
    plus, minus = (solve(scores, mass, p + sign * eps * d, 0.5, 2.0)[2] for sign in (1, -1))
    torch.testing.assert_close(
        marginal_sensitivity(u, mass, 0.5, p, 2.0)[:, 0], (plus - minus) / (2 * eps), rtol=1e-5, atol=1e-7
    )


def test_a_constraint_is_followed_in_full_and_less_trust_less():
    scores, mass, p = problem(seed=2)
    d = between(4, 0, 2)
    u, _, _ = solve(scores, mass, p, 0.3, math.inf)
    projection = torch.eye(4, dtype=torch.float64) - 0.25
    torch.testing.assert_close(marginal_sensitivity(u, mass, 0.3, p), projection, rtol=0, atol=1e-10)
    followed = []
    for trust in (100.0, 3.0, 0.3, 0.03):
        u, _, _ = solve(scores, mass, p, 0.3, trust)
        matrix = marginal_sensitivity(u, mass, 0.3, p, trust)
        torch.testing.assert_close(matrix.sum(dim=0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
        followed.append(float((d * (matrix @ d)).sum() / 2))
    assert followed == sorted(followed, reverse=True)
    assert followed[0] > 0.9 and followed[-1] < 0.5


def test_absent_classes_take_no_part_and_scale_of_mass_does_not_matter():
    scores, mass, p = problem(seed=3)
    p[1] = 0
    p = p / p.sum()
    u, _, _ = solve(scores, mass, p, 0.4, 1.0)
    matrix, offsets = marginal_sensitivity(u, 7 * mass, 0.4, p, 1.0), offset_sensitivity(u, mass, 0.4, p, 1.0)
    for found in (matrix, offsets):
        assert bool((found[1] == 0).all()) and bool((found[:, 1] == 0).all())
    kept = [0, 2, 3]
    torch.testing.assert_close(matrix[kept][:, kept], marginal_sensitivity(u[kept], mass, 0.4, p[kept], 1.0))
    with pytest.raises(InputError, match="sum to 0"):
        pixel_sensitivity(u, mass, 0.4, p, between(4, 0, 1), 1.0)
    alone = marginal_sensitivity(torch.ones(1, 5), torch.ones(5), 0.4, [1.0])
    assert alone.tolist() == [[0.0]]


def test_pixel_sensitivity_of_a_refined_map_has_its_shape():
    q, p = noisy_confidence(size=(12, 15))
    result = refine(q, p, alpha=0.3, epsilon=0.3)
    moved = pixel_sensitivity(result.u, torch.ones(12, 15), 0.3, p, [1.0, -1.0, 0.0])
    assert moved.shape == (3, 12, 15) and moved.dtype == result.u.dtype
    torch.testing.assert_close(moved.mean(dim=(1, 2)), torch.tensor([1.0, -1.0, 0.0]), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"proportions": [0.5, 0.5]}, ProportionError, "one per class"),
        ({"proportions": [1.2, -0.2, 0.0, 0.0]}, ProportionError, "at least 0"),
        ({"smoothing": 0.0}, InputError, "smoothing"),
        ({"trust": 0.0}, InputError, "trust"),
        ({"mass": torch.ones(3)}, InputError, "shape"),
        ({"u": torch.eye(4)[:, torch.arange(200) % 4]}, InputError, "crisp"),
    ],
)
def test_sensitivities_refuse_what_has_no_derivative(change, error, message):
    scores, mass, p = problem()
    arguments = {"u": torch.softmax(scores, dim=0), "mass": mass, "smoothing": 1.0, "proportions": p}
    with pytest.raises(error, match=message):
        marginal_sensitivity(**(arguments | change))


OPTIONS = {"alpha": 0.5, "tolerance": 1e-12, "marginal_tolerance": 1e-11, "max_iterations": 5000}


def test_band_is_what_refinements_by_hand_give():
    q, _ = noisy_confidence(size=(20, 24))
    p = torch.tensor([0.58, 0.4, 0.02], dtype=torch.float64)  # the last has less than a step to give
    q = q.double()
    mass = torch.ones(20, 24, dtype=torch.float64)
    mass[:4] = 0
    calls = []
    band = flip_band(q, p, mass, step=0.05, on_move=lambda done, total: calls.append((done, total)), **OPTIONS)
    assert calls == [(i, 7) for i in range(1, 8)]
    base = refine(q, p, mass, **OPTIONS).labels
    assert torch.equal(band.labels, base)
    count = torch.zeros(20, 24, dtype=torch.int64)
    areas = [torch.bincount(base[mass > 0], minlength=3) / 384]
    for move in band.moves:
        assert move.amount == pytest.approx(min(0.05, float(p[move.source])))
        moved = p + move.amount * between(3, move.source, move.target)
        labels = refine(q, moved.clamp_min(0), mass, **OPTIONS).labels
        flips = (labels != base) & (mass > 0)
        assert move.flipped == pytest.approx(float(flips.sum()) / 384)
        count += flips
        areas.append(torch.bincount(labels[mass > 0], minlength=3) / 384)
        if move.source == 2:
            assert not bool((labels == 2).any()), "a class that gives all it has does not occur"
    assert torch.equal(band.count, count) and torch.equal(band.flips, count > 0)
    assert bool(band.flips.any()) and not bool(band.flips[:4].any())
    areas = torch.stack(areas).double()
    for have, want in ((band.area, areas[0]), (band.lower, areas.amin(dim=0)), (band.upper, areas.amax(dim=0))):
        torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-6)
    assert bool((band.alternatives[~band.flips] == -1).all())
    inside = band.flips
    assert bool((band.alternatives[inside] != band.labels[inside]).all() and (band.alternatives[inside] >= 0).all())
    assert band.flipped == pytest.approx(float(inside.sum()) / 384) and band.converged
    with pytest.raises(dataclasses.FrozenInstanceError):
        band.step = 0.1


def test_a_larger_step_widens_the_band_and_an_absent_class_can_come_in():
    q, _ = noisy_confidence(size=(20, 24))
    p = [0.6, 0.4, 0.0]
    bands = [flip_band(q, p, step=step, alpha=0.5, tolerance=1e-8) for step in (0.02, 0.1)]
    assert bands[0].flipped < bands[1].flipped
    assert bool((bands[1].lower <= bands[0].lower + 1e-9).all()) and bool((bands[1].upper >= bands[0].upper - 1e-9).all())
    assert len(bands[0].moves) == 4 and {move.target for move in bands[0].moves} == {0, 1, 2}
    assert float(bands[1].area[2]) == 0.0 and float(bands[1].upper[2]) > 0.03


def test_a_sure_image_has_no_band_at_low_trust():
    """What the image says without doubt, weakly trusted proportions do not change."""
    labels = torch.zeros(16, 16, dtype=torch.int64)
    labels[:, 8:] = 1
    q = 0.998 * torch.nn.functional.one_hot(labels, 2).permute(2, 0, 1) + 0.001
    band = flip_band(q, [0.5, 0.5], step=0.05, trust=1.0, alpha=0.1)
    assert not bool(band.flips.any()) and band.flipped == 0.0
    assert band.lower.tolist() == band.upper.tolist() == band.area.tolist() == [0.5, 0.5]


def test_coarse_band_resembles_the_fine_one_on_the_fine_grid():
    q, p = noisy_confidence(size=(45, 56))
    mass = torch.ones(45, 56)
    mass[:, :5] = 0
    image = torch.rand(3, 45, 56, generator=torch.Generator().manual_seed(0))
    fine = flip_band(q, p, mass, image, step=0.1, alpha=2.0)
    coarse = flip_band(q, p, mass, image, step=0.1, alpha=2.0, coarsen=2)
    assert coarse.flips.shape == coarse.alternatives.shape == (45, 56) and coarse.coarsen == 2
    assert torch.equal(coarse.labels[:44:2, ::2], coarse.labels[1:44:2, 1::2])
    assert abs(coarse.flipped - fine.flipped) < 0.15
    assert float((coarse.labels == fine.labels).double().mean()) > 0.9
    torch.testing.assert_close(coarse.upper, fine.upper, rtol=0, atol=0.05)


def test_band_as_json():
    q, p = noisy_confidence(size=(12, 12))
    band = flip_band(q, p, alpha=0.5)
    text = json.loads(json.dumps(band.to_dict(["a", "b", "c"])))
    assert text["step"] == 0.05 and len(text["moves"]) == 6 and text["moves"][0]["from"] == "a"
    assert text["areas"]["b"]["lower"] <= text["areas"]["b"]["map"] <= text["areas"]["b"]["upper"]
    with pytest.raises(InputError, match="3 different class names"):
        band.to_dict(["a", "b"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": 5}, InputError, "divide percentages by 100"),
        ({"step": 0.0}, InputError, "fraction"),
        ({"coarsen": 0}, InputError, "coarsen"),
        ({"coarsen": 1.5}, InputError, "coarsen"),
        ({"proportions": None}, ProportionError, "needs proportions"),
        ({"proportions": [0.5, 0.5]}, ProportionError, "one per class"),
        ({"proportions": [1.5, -0.5, 0.0]}, ProportionError, "negative"),
        ({"confidence": torch.rand(1, 3, 4, 4)}, InputError, "without batch axis"),
        ({"mass": torch.ones(3, 3)}, InputError, "size of the confidence"),
        ({"sharpness": 2}, InputError, "sharpness"),
    ],
)
def test_band_refuses_nonsense(change, error, message):
    q, p = noisy_confidence(size=(4, 4))
    with pytest.raises(error, match=message):
        flip_band(**({"confidence": q, "proportions": p} | change))


@pytest.mark.parametrize("trust", [math.inf, 2.0])
def test_energies_of_regions_add_up_to_the_energy_of_the_solver(trust):
    q, p = noisy_confidence(size=(24, 28))
    q, p = q.double(), torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64)
    mass = torch.rand(24, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mass[:3] = 0
    result = refine(q, p, mass, trust=trust, alpha=0.5)
    report = json.loads(json.dumps(energy_report(result, ["a", "b", "c"], proportions=p, mass=mass)))
    marginal = 0.0 if math.isinf(trust) else trust * float((result.proportions * (result.proportions / p).log()).sum())
    assert report["energy"]["total"] + marginal == pytest.approx(result.energies[-1], rel=1e-6)
    for key in ("fidelity", "regularization", "total"):
        assert sum(region[key] for region in report["classes"].values()) == pytest.approx(report["energy"][key])
    assert sum(region["area"] for region in report["classes"].values()) == pytest.approx(1)
    b = report["classes"]["b"]
    assert b["offset"] == pytest.approx(float(result.psi[1])) and b["odds_factor"] == pytest.approx(math.exp(b["offset"]))
    assert b["given"] == pytest.approx(0.4) and b["found"] == pytest.approx(float(result.proportions[1]))
    assert report["converged"] == result.converged and report["reason"] == result.reason


def test_energy_report_of_absent_classes_and_without_proportions():
    q, _ = noisy_confidence(size=(12, 12))
    absent = energy_report(refine(q, [0.6, 0.4, 0.0], alpha=0.2), ["a", "b", "c"])["classes"]["c"]
    assert absent["offset"] is None and absent["odds_factor"] == 0.0
    assert absent["area"] == 0.0 and absent["mean_total"] is None and absent["given"] is None
    free = json.loads(json.dumps(energy_report(refine(q, alpha=0.2), ["a", "b", "c"])))
    assert free["classes"]["a"]["offset"] is free["classes"]["a"]["odds_factor"] is free["residual"] is None
    nothing = energy_report(refine(q, mass=torch.zeros(12, 12)), ["a", "b", "c"], mass=torch.zeros(12, 12))
    assert nothing["energy"]["total"] == 0.0 and nothing["reason"].startswith("no tissue")
    with pytest.raises(InputError, match="one image"):
        energy_report(refine(q[None]), ["a", "b", "c"])
    with pytest.raises(InputError, match="class names"):
        energy_report(refine(q), ["a", "a", "c"])
