import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize as scipy_minimize

from monai_vslp.data.synthetic_labels import reference_case
from monai_vslp.utils.errors import InputError, ProportionError
from monai_vslp.variational import AssignmentFidelity, HuberTotalVariation, assignment_cost, image_edge_weight, refine


def noisy_map(seed=0, size=(64, 80), classes=3, noise=1.5):
    """Regions of a smooth random field, seen through biased and noisy confidences: returns (q, labels, proportions)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, classes, 6, 6, generator=generator)
    labels = torch.nn.functional.interpolate(coarse, size, mode="bicubic")[0].argmax(dim=0)
    onehot = torch.nn.functional.one_hot(labels, classes).permute(2, 0, 1).float()
    bias = torch.linspace(-0.6, 0.6, classes)[:, None, None]
    logits = 1.2 * onehot + bias + noise * torch.randn(classes, *size, generator=generator)
    return torch.softmax(logits, dim=0), labels, onehot.mean(dim=(1, 2))


def miou(labels, truth, classes=3):
    scores = [((labels == k) & (truth == k)).sum() / ((labels == k) | (truth == k)).sum().clamp_min(1) for k in range(classes)]
    return float(torch.stack(scores).mean())


def energy_of(u, q, p, trust, alpha, epsilon, delta, huber):
    mass = torch.full(q.shape[1:], 1 / q[0].numel(), dtype=torch.float64)
    marginal = (u * mass).sum(dim=(1, 2))
    cost = -(q + delta).log()
    energy = (mass * (cost * u + epsilon * torch.xlogy(u, u)).sum(dim=0)).sum()
    if p is not None and math.isfinite(trust):
        energy = energy + trust * torch.xlogy(marginal, marginal / p).sum()
    return energy + alpha * HuberTotalVariation(mass, huber=huber).value(u)


@pytest.mark.parametrize("trust", [0.5, 10.0])
def test_minimum_agrees_with_a_generic_optimiser(trust):
    """Brute force: L-BFGS over logits of all pixels, in float64, finds the same minimum of the same energy."""
    q, _, p = noisy_map(size=(6, 7))
    q, p = q.double(), p.double() / p.double().sum()
    options = dict(trust=trust, alpha=0.6, epsilon=0.2, delta=1e-3, huber=0.2)
    result = refine(q, p, **options, tolerance=1e-13, max_iterations=5000, marginal_tolerance=1e-12)
    mass = torch.full(q.shape[1:], 1 / q[0].numel(), dtype=torch.float64)
    regularizer = HuberTotalVariation(mass, huber=options["huber"])

    def objective(x):
        logits = torch.from_numpy(x).view_as(q).clone().requires_grad_()
        u = torch.softmax(logits, dim=0)
        marginal = (u * mass).sum(dim=(1, 2))
        smooth = (mass * (-(q + 1e-3).log() * u + 0.2 * torch.xlogy(u, u)).sum(dim=0)).sum()
        smooth = smooth + trust * torch.xlogy(marginal, marginal / p).sum()
        value, gradient = regularizer.value_and_gradient(u.detach())
        (by_logits,) = torch.autograd.grad(smooth + 0.6 * (gradient * mass * u).sum(), logits)
        return float(smooth.detach()) + 0.6 * value, by_logits.flatten().numpy()

    best = scipy_minimize(
        objective,
        np.zeros(q.numel()),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9},
    )
    assert result.energies[-1] == pytest.approx(best.fun, abs=1e-7)
    u = torch.softmax(torch.from_numpy(best.x).view_as(q), dim=0)
    torch.testing.assert_close(result.u, u, atol=2e-3, rtol=0)
    assert result.energies[-1] == pytest.approx(float(energy_of(result.u, q, p, **options)), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trust", [math.inf, 2.0])
@pytest.mark.parametrize("multigrid", [True, False])
def test_energy_never_rises_and_simplex_holds(dtype, trust, multigrid):
    q, _, p = noisy_map(size=(130, 101))
    result = refine(q.to(dtype), p, trust=trust, alpha=2.0, multigrid=multigrid)
    assert result.converged, result.reason
    assert len(result.energies) > 5
    assert (np.diff(result.energies) <= 0).all()
    torch.testing.assert_close(result.u.sum(dim=0), torch.ones_like(result.u[0]), atol=1e-5, rtol=0)
    assert float(result.u.min()) >= 0
    if math.isinf(trust):
        assert result.residual <= 1e-6
        assert float((result.proportions - p / p.sum()).abs().sum()) < 1e-5


def test_proportions_and_regularizer_help_together():
    """In kind, the synthetic table of the method: argmax < one term alone < both; soft trust wins where p is off."""
    scores: dict[str, list[float]] = {name: [] for name in ("argmax", "transport", "tv", "both", "hard_off", "soft_off")}
    for seed in range(4):
        q, labels, p = noisy_map(seed, size=(128, 128))
        wrong = p * torch.exp(0.5 * torch.randn(3, generator=torch.Generator().manual_seed(seed)))
        wrong = wrong / wrong.sum()
        scores["argmax"].append(miou(q.argmax(dim=0), labels))
        scores["transport"].append(miou(refine(q, p, alpha=0).labels, labels))
        scores["tv"].append(miou(refine(q, None, alpha=2).labels, labels))
        scores["both"].append(miou(refine(q, p, alpha=2).labels, labels))
        scores["hard_off"].append(miou(refine(q, wrong, alpha=2).labels, labels))
        scores["soft_off"].append(miou(refine(q, wrong, alpha=2, trust=3).labels, labels))
    mean = {name: float(np.mean(values)) for name, values in scores.items()}
    assert mean["argmax"] + 0.03 < max(mean["transport"], mean["tv"])
    assert max(mean["transport"], mean["tv"]) + 0.1 < mean["both"]
    assert mean["hard_off"] < mean["both"]
    assert mean["hard_off"] < mean["soft_off"]


def test_no_regularizer_is_the_closed_form():
    q, _, _ = noisy_map()
    result = refine(q, None, alpha=0, epsilon=0.5, delta=1e-3)
    torch.testing.assert_close(result.u, torch.softmax((q + 1e-3).log() / 0.5, dim=0))
    assert result.residual is None
    assert bool(torch.isnan(result.psi).all())


def test_flips_and_class_order_commute_with_refinement():
    q, _, p = noisy_map(size=(48, 48))
    options = dict(alpha=1.0, tolerance=1e-10, max_iterations=2000)
    result = refine(q.double(), p, **options)
    order = torch.tensor([2, 0, 1])
    permuted = refine(q.double()[order], p[order], **options)
    torch.testing.assert_close(permuted.u, result.u[order], atol=1e-4, rtol=0)
    torch.testing.assert_close(permuted.psi, result.psi[order], atol=1e-4, rtol=0)
    # forward differences pair the two directions at a pixel, so transposing is an exact symmetry
    transposed = refine(q.double().mT, p, **options)
    torch.testing.assert_close(transposed.u.mT, result.u, atol=1e-4, rtol=0)


def test_multigrid_changes_the_way_not_the_minimum():
    q, _, p = noisy_map(size=(200, 150))
    options = dict(alpha=2.0, tolerance=1e-9, max_iterations=3000)
    with_grids, without = refine(q, p, **options), refine(q, p, multigrid=False, **options)
    assert with_grids.energies[-1] == pytest.approx(without.energies[-1], rel=1e-5)
    assert with_grids.energies[0] < without.energies[0]


@pytest.mark.parametrize("alpha", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("seen", [False, True])
def test_default_stopping_comes_close_to_the_minimum(alpha, seen):
    """The first steps after momentum was dropped are small; they must not be taken for convergence (α = 8 ended 2 % above)."""
    labels, q, p = reference_case(128, 5)
    noise = torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(0))
    picture = (40 * labels + 20 * noise).clamp(0, 255).to(torch.uint8) if seen else None
    found = refine(q, p, image=picture, alpha=alpha)
    best = refine(q, p, image=picture, alpha=alpha, tolerance=1e-9, max_iterations=2000)
    assert found.converged and found.energies[-1] < best.energies[-1] * (1 + 1.5e-3)
    assert float((found.labels == best.labels).double().mean()) > 0.96
    accuracy = [float((result.labels == labels).double().mean()) for result in (found, best)]
    assert accuracy[0] > accuracy[1] - 0.015


def test_energy_maps_add_up_to_the_energy():
    q, _, p = noisy_map()
    result = refine(q, p, alpha=1.5)
    total = (result.fidelity_energy + result.regularization_energy).double().mean()
    assert float(total) == pytest.approx(result.energies[-1], rel=1e-5)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_energy_maps_can_be_left_out(batch):
    q, _, p = noisy_map()
    q = q.expand(*batch, *q.shape)
    for mass in (None, torch.zeros(64, 80)):
        result, less = refine(q, p, mass), refine(q, p, mass, energy_maps=False)
        assert less.fidelity_energy is None and less.regularization_energy is None
        assert torch.equal(less.u, result.u) and less.energies == result.energies


def test_background_takes_no_part():
    q, _, p = noisy_map()
    mass = torch.ones(64, 80)
    mass[:, :20] = 0
    result = refine(q, p, mass)
    inside = refine(q[:, :, 20:], p)
    changed = q.clone()
    changed[:, :, :20] = torch.tensor([1.0, 0, 0])[:, None, None]
    torch.testing.assert_close(refine(changed, p, mass).u[:, :, 20:], result.u[:, :, 20:])
    assert miou(result.labels[:, 20:], inside.labels) > 0.97
    assert not result.fidelity_energy[:, :20].any() and not result.regularization_energy[:, :20].any()
    torch.testing.assert_close(result.proportions, (result.u[:, :, 20:].mean(dim=(1, 2))).double(), atol=1e-5, rtol=0)


def test_background_far_from_tissue_is_the_softmax_of_its_costs():
    q, _, p = noisy_map()
    q = q.repeat(1, 1, 40)  # wide enough for several windows, the first of them all background
    mass = torch.ones(q.shape[1:])
    mass[:48] = 0
    result = refine(q, p, mass, epsilon=0.5)
    expected = torch.softmax(((q + 1e-3).log() + result.psi.float()[:, None, None]) / 0.5, dim=0)
    torch.testing.assert_close(result.u[:, :47], expected[:, :47], atol=1e-3, rtol=0)


def test_class_without_proportion_does_not_occur():
    q, _, _ = noisy_map()
    result = refine(q, [0.7, 0.0, 0.3])
    assert not bool((result.u[1] > 0).any())
    assert result.psi[1] == -math.inf
    assert np.isfinite(result.energies).all() and (np.diff(result.energies) <= 0).all()
    soft = refine(q, [0.7, 0.0, 0.3], trust=1.0)
    assert not bool((soft.u[1] > 0).any())


def test_degenerate_maps():
    one = refine(torch.ones(1, 5, 5), [1.0])
    assert one.converged and bool((one.u == 1).all())
    pixel = refine(torch.tensor([0.3, 0.7]).view(2, 1, 1), [0.5, 0.5])
    torch.testing.assert_close(pixel.u.flatten(), torch.tensor([0.5, 0.5]), atol=1e-5, rtol=0)
    empty = refine(torch.full((2, 4, 4), 0.5), [0.5, 0.5], mass=torch.zeros(4, 4))
    assert empty.converged and "no tissue" in empty.reason
    certain = torch.zeros(2, 20, 20)
    certain[0] = 1
    against = refine(certain, [0.2, 0.8])
    assert against.residual < 1e-6 and np.isfinite(against.energies).all()


def test_batch_equals_single_images():
    q, _, p = noisy_map(1)
    r, _, s = noisy_map(2)
    batch = refine(torch.stack([q, r]), torch.stack([p, s]), mass=torch.ones(64, 80), alpha=1.0)
    for i, single in enumerate((refine(q, p, alpha=1.0), refine(r, s, alpha=1.0))):
        torch.testing.assert_close(batch.u[i], single.u)
        assert batch.energies[i] == single.energies
        assert batch.reason[i] == single.reason
    assert batch.u.shape == (2, 3, 64, 80) and batch.labels.shape == (2, 64, 80) and batch.psi.shape == (2, 3)


def test_image_edges_attract_boundaries():
    """A weak confidence jump at column 30 and an image edge at column 34: with the image the boundary moves to it."""
    q = torch.full((2, 40, 64), 0.5)
    q[0, :, :30], q[0, :, 38:] = 0.9, 0.1
    q[1] = 1 - q[0]
    image = torch.zeros(1, 40, 64)
    image[:, :, 34:] = 1
    result = refine(q, None, image=image, alpha=1.0, huber=0.02, edge_strength=5.0, tolerance=1e-9, max_iterations=3000)
    assert abs(int((result.labels == 0).sum(dim=1).float().median()) - 34) <= 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(confidence=torch.rand(3)), InputError, r"\[C, H, W\]"),
        (dict(confidence=torch.ones(2, 4, 4)), InputError, "softmax"),
        (dict(confidence=torch.full((2, 4, 4), -0.5)), InputError, "logits"),
        (dict(confidence=torch.ones(2, 4, 4, dtype=torch.int64)), InputError, "floating point"),
        (dict(proportions=[0.5, 0.6]), ProportionError, "sum to 1"),
        (dict(proportions=[60, 40]), ProportionError, "percentages by 100"),
        (dict(proportions=[1.5, -0.5]), ProportionError, "not negative"),
        (dict(proportions=[math.nan, 1.0]), ProportionError, "finite"),
        (dict(proportions=[0.0, 0.0]), ProportionError, "all zero"),
        (dict(proportions=[0.2, 0.3, 0.5]), ProportionError, "C = 2"),
        (dict(mass=torch.ones(3, 3)), InputError, "mass must have shape"),
        (dict(mass=-torch.ones(4, 4)), InputError, "not negative"),
        (dict(image=torch.ones(3, 5, 5)), InputError, "image must have shape"),
        (dict(rho=1.0), InputError, "unknown option 'rho'"),
        (dict(epsilon=0.0), InputError, "epsilon must be positive"),
        (dict(alpha=-1.0), InputError, "alpha"),
        (dict(max_iterations=0), InputError, "max_iterations"),
    ],
)
def test_wrong_input_is_refused_with_a_reason(arguments, error, message):
    with pytest.raises(error, match=message):
        refine(**{"confidence": torch.full((2, 4, 4), 0.5), **arguments})


def test_assignment_fidelity_against_its_formula():
    u = torch.tensor([[0.25, 1.0], [0.75, 0.0]], dtype=torch.float64)
    cost = assignment_cost(torch.tensor([[0.5, 0.9], [0.5, 0.1]], dtype=torch.float64), delta=0.1)
    mass = torch.tensor([0.4, 0.6], dtype=torch.float64)
    fidelity = AssignmentFidelity(cost, mass, epsilon=0.3)
    entropy = 0.25 * math.log(0.25) + 0.75 * math.log(0.75)
    expected = torch.tensor([-math.log(0.6) + 0.3 * entropy, -math.log(1.0)], dtype=torch.float64)
    torch.testing.assert_close(fidelity.energy_map(u, u.log()), expected)
    assert fidelity.value(u, u.log()) == pytest.approx(float((expected * mass).sum()))


def test_a_price_of_boundaries_may_be_given_in_place_of_the_image():
    """As that of the image's edges it gives the same map; it must fit and be positive."""
    q, _, p = noisy_map(size=(48, 56))
    image = torch.rand(3, 48, 56, generator=torch.Generator().manual_seed(3))
    weight = image_edge_weight(image, 1.0)
    expected, got = refine(q, p, image=image, alpha=1.0), refine(q, p, weight=weight, alpha=1.0)
    assert torch.equal(got.u, expected.u) and not torch.equal(got.u, refine(q, p, alpha=1.0).u)
    for wrong in (-weight, weight * torch.nan, weight[1:]):
        with pytest.raises(InputError, match="weight must"):
            refine(q, p, weight=wrong, alpha=1.0)
