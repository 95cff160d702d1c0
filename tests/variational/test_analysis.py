"""Eigenfunctions of energies whose eigenvectors are known, energies against sums done by hand."""

import math

import pytest
import torch
from torch import nn

from monai_vslp.utils.errors import InputError
from monai_vslp.variational import TotalDeepVariation, UnrolledRefinement
from monai_vslp.variational.analysis import (
    STARTS,
    _quotient,
    eigenfunction,
    energies_along,
    rayleigh_quotient,
    regularization_maps,
    starting_map,
)


class Dirichlet(nn.Module):
    """Half the squared forward differences: its gradient is the graph Laplacian, its eigenvectors are cosines."""

    def forward(self, u):
        energy = torch.zeros_like(u)
        energy[..., :-1] += 0.5 * u.diff(dim=-1).square()
        energy[..., :-1, :] += 0.5 * u.diff(dim=-2).square()
        return energy.sum(dim=1)


def eigenvalues(height, width):
    rows, columns = (2 - 2 * torch.cos(math.pi * torch.arange(n, dtype=torch.float64) / n) for n in (height, width))
    return (rows[:, None] + columns[None, :]).flatten()


def cosine_map(height, width, row, column, contrast=0.3):
    """Two classes that vary against each other along one cosine of the grid."""
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (height, width))
    wave = torch.cos(math.pi * row * y / height)[:, None] * torch.cos(math.pi * column * x / width)[None, :]
    return torch.stack([0.5 + contrast * wave, 0.5 - contrast * wave])


def small_tdv(channels=3, seed=0):
    torch.manual_seed(seed)
    return TotalDeepVariation(channels, features=4, macro_blocks=1, scales=2).double()


def case(batch=2, classes=3, height=10, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, classes, height, width, generator=generator, dtype=torch.float64).softmax(dim=1)
    p = torch.randn(batch, classes, generator=generator, dtype=torch.float64).mul(0.5).softmax(dim=1)
    mass = torch.rand(batch, height, width, generator=generator, dtype=torch.float64)
    mass[:, :2] = 0
    labels = torch.randint(classes, (batch, height, width), generator=generator)
    labels[:, -1] = 255
    return q, p, mass, labels


# ---- eigenfunctions


@pytest.mark.parametrize(("row", "column"), [(1, 0), (0, 2), (2, 1)])
def test_cosines_are_eigenfunctions(row, column):
    value, defect = rayleigh_quotient(Dirichlet(), cosine_map(6, 9, row, column))
    assert value == pytest.approx(float(eigenvalues(6, 9).view(6, 9)[row, column]), rel=1e-12)
    assert float(defect.abs().max()) < 1e-12


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_noise_ends_at_an_eigenvector(seed):
    """Distinct eigenvalues of this grid are 0.17 or more apart; mixtures of closer ones are slow to resolve."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).softmax(dim=0)
    found = eigenfunction(Dirichlet(), (3, 4), 2, start, steps=1500, learning_rate=0.2)
    assert found.residual < 1e-4
    assert float((eigenvalues(3, 4) - found.eigenvalue).abs().min()) < 1e-6
    # An eigenvector of a quadratic energy: the Laplacian of the map itself, not of what the search worked with.
    v = found.u - found.u.mean(dim=(1, 2), keepdim=True)
    with torch.enable_grad():
        v.requires_grad_(True)
        (laplacian,) = torch.autograd.grad(Dirichlet()(v[None]).sum(), v)
    torch.testing.assert_close(laplacian, found.eigenvalue * v.detach(), atol=1e-4, rtol=0)


def test_a_disturbed_cosine_returns_to_it():
    generator = torch.Generator().manual_seed(3)
    clean = cosine_map(6, 9, 2, 1)
    start = clean + 0.03 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    found = eigenfunction(Dirichlet(), (6, 9), 2, start, steps=800, amplitude=1.0)
    assert found.eigenvalue == pytest.approx(float(eigenvalues(6, 9).view(6, 9)[2, 1]), abs=1e-3)
    v, wave = (found.u - 0.5).flatten(), (clean - 0.5).flatten()
    assert float(torch.dot(v, wave) / v.norm() / wave.norm()) > 0.999


@pytest.mark.parametrize("channels", [1, 3])
def test_quotient_and_defect_of_a_tdv_by_the_formula(channels):
    network = small_tdv(channels)
    u = torch.randn(3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(dim=0)
    value, defect = rayleigh_quotient(network, u)
    v = u - u.mean(dim=(1, 2), keepdim=True)
    # Directional derivative along v, which P leaves as it is.
    step = 1e-5
    with torch.no_grad():
        slope = sum(sign * float(network((u + sign * step * v)[None]).sum()) for sign in (1, -1)) / (2 * step)
    assert value == pytest.approx(slope / float(v.square().sum()), rel=1e-5)
    assert float((defect * v).sum()) == pytest.approx(0, abs=1e-10)
    assert float(defect.sum(dim=0).abs().max()) < 1e-10
    assert float(defect.mean(dim=(1, 2)).abs().max()) < 1e-10


def test_derivative_of_the_residual_through_the_gradient():
    """What the search descends on, against finite differences of the defect."""
    network = small_tdv()
    generator = torch.Generator().manual_seed(2)
    u = torch.randn(3, 6, 6, dtype=torch.float64, generator=generator).softmax(dim=0)
    direction = torch.randn(3, 6, 6, dtype=torch.float64, generator=generator)
    direction -= direction.mean(dim=0)
    direction -= direction.mean(dim=(1, 2), keepdim=True)

    def residual(x):
        return float(rayleigh_quotient(network, x)[1].square().sum())

    mean = u.mean(dim=(1, 2), keepdim=True)
    v = (u - mean).requires_grad_(True)
    gradient, quotient = _quotient(network, mean, v, None, create_graph=True)
    (slope,) = torch.autograd.grad((gradient - quotient * v).square().sum(), v)
    step = 1e-5
    numeric = (residual(u + step * direction) - residual(u - step * direction)) / (2 * step)
    assert float((slope * direction).sum()) == pytest.approx(numeric, rel=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_search_on_a_tdv_keeps_the_constraints_and_improves(channels):
    network = small_tdv(channels).float()
    start = starting_map("disc", (12, 12), 3)
    found = eigenfunction(network, (12, 12), 3, start, steps=150)
    mean = start.mean(dim=(1, 2))
    assert found.u.shape == (3, 12, 12) and found.u.dtype == torch.float32
    torch.testing.assert_close(found.u.sum(dim=0), torch.ones(12, 12))
    torch.testing.assert_close(found.u.mean(dim=(1, 2)), mean, atol=1e-6, rtol=0)
    deviation, first = (x - mean[:, None, None] for x in (found.u, start))
    assert float(deviation.norm()) == pytest.approx(0.5 * float(first.norm()), rel=1e-4)
    assert len(found.history) == 151 and min(found.history) < 0.5 * found.history[0]
    value, defect = rayleigh_quotient(network, found.u)
    assert value == pytest.approx(found.eigenvalue, rel=1e-3, abs=1e-6)
    assert float(defect.square().sum()) == pytest.approx(min(found.history), rel=1e-2)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


def test_search_repeats_with_its_generator_and_works_without_recording():
    network = small_tdv().float()
    with torch.no_grad():
        first, second = (
            eigenfunction(network, (8, 8), 3, steps=5, generator=torch.Generator().manual_seed(7)) for _ in range(2)
        )
    assert torch.equal(first.u, second.u)


def test_image_is_passed_on():
    torch.manual_seed(0)
    network = TotalDeepVariation(3, features=4, macro_blocks=1, scales=2, image_channels=2)
    image = torch.randn(2, 8, 8)
    found = eigenfunction(network, (8, 8), 3, starting_map("stripes", (8, 8), 3), steps=20, image=image)
    assert found.history[-1] < found.history[0]
    with pytest.raises(InputError, match="image"):
        eigenfunction(network, (8, 8), 3, steps=1)


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_starts_are_on_the_simplex(kind, classes):
    u = starting_map(kind, (16, 24), classes, torch.Generator().manual_seed(0))
    assert u.shape == (classes, 16, 24) and float(u.min()) >= 0
    torch.testing.assert_close(u.sum(dim=0), torch.ones(16, 24))
    used = min(classes, {"disc": 2, "triple junction": 3}.get(kind, classes))
    assert int((u.amax(dim=(1, 2)) > 0).sum()) == used


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": torch.full((3, 8, 8), 1 / 3)}, "same everywhere"),
        ({"start": torch.full((3, 8, 8), math.nan)}, "same everywhere"),
        ({"start": torch.rand(2, 8, 8)}, "shape"),
        ({"steps": 0}, "steps"),
        ({"amplitude": 0.0}, "amplitude"),
        ({"learning_rate": math.nan}, "learning_rate"),
    ],
)
def test_bad_searches_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        eigenfunction(Dirichlet(), (8, 8), 3, **options)


def test_bad_starting_maps_are_refused():
    for kind, shape, classes in (("ring", (8, 8), 3), ("disc", (8, 8), 1), ("disc", (3, 8), 2)):
        with pytest.raises(InputError, match="starting_map"):
            starting_map(kind, shape, classes)


# ---- energies along the steps


@pytest.mark.parametrize("trust", [math.inf, 2.0, None])
def test_energies_equal_those_by_hand(trust):
    q, p, mass, labels = case()
    p = None if trust is None else p
    rho = math.inf if trust is None else trust
    model = UnrolledRefinement(small_tdv(), steps=3, stopping_time=2.0, alpha=0.7, fidelity_weight=1.3, epsilon=0.4).double()
    path = energies_along(model, q, p, rho, mass, labels=labels, keep=(0, 2, 3, 5), steps=5)
    assert path.stopping_step == 3 and path.stopping_time == pytest.approx(2.0)
    torch.testing.assert_close(path.times, torch.arange(6) * 2.0 / 3)
    assert sorted(path.u) == [0, 2, 3, 5]
    a = mass / mass.sum(dim=(1, 2), keepdim=True)
    tissue = (mass > 0).double()[:, None]
    for s in (2, 3, 5):
        with torch.no_grad():
            result = model(q, p, rho, mass, steps=s)
            u = result.log_u.exp()
            r = model.regularizer(u * tissue)
        torch.testing.assert_close(path.u[s], u * tissue)
        cost = -1.3 * torch.log(q + model.delta)
        fidelity = (a[:, None] * u * (cost + 0.4 * result.log_u)).sum(dim=(1, 2, 3))
        regularization = 0.7 * (a * r).sum(dim=(1, 2))
        found = (a[:, None] * u).sum(dim=(2, 3))
        marginal = rho * (found * (found / p).log()).sum(dim=1) if trust == 2.0 else torch.zeros(2, dtype=torch.float64)
        torch.testing.assert_close(path.fidelity[:, s], fidelity, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(path.regularization[:, s], regularization, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(path.marginal[:, s], marginal, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(path.total[:, s], fidelity + regularization + marginal, atol=1e-6, rtol=1e-6)
        if p is None:
            assert path.residual is None
        else:
            torch.testing.assert_close(path.residual[:, s], (found - p).abs().sum(dim=1), atol=1e-8, rtol=1e-6)
        for b in range(2):
            counted = (mass[b] > 0) & (labels[b] != 255)
            pred, true = u[b].argmax(dim=0)[counted], labels[b][counted]
            iou = [((pred == k) & (true == k)).sum() / ((pred == k) | (true == k)).sum() for k in range(3)]
            assert float(path.miou[b, s]) == pytest.approx(float(sum(iou)) / 3, rel=1e-6)
    # The model's own account leaves out the marginal term.
    own = model(q, p, rho, mass, steps=6).energies
    torch.testing.assert_close(path.total - path.marginal, own, atol=1e-6, rtol=1e-6)


def test_path_leaves_the_model_alone_and_defaults_to_twice_its_steps():
    q, p, _, _ = case()
    model = UnrolledRefinement(small_tdv(), steps=2).double()
    path = energies_along(model, q, p)
    assert path.total.shape == (2, 5) and path.miou is None and path.u == {}
    assert not path.total.requires_grad
    assert not model.regularizer._forward_hooks
    torch.testing.assert_close(energies_along(model, q, p, steps=0).total, path.total[:, :1])


def test_classes_given_as_absent_do_not_spoil_the_marginal_term():
    q, _, _, _ = case()
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    model = UnrolledRefinement(small_tdv(), steps=2).double()
    path = energies_along(model, q, p, trust=1.0)
    assert bool(torch.isfinite(path.total).all())
    assert float(path.marginal.min()) > -1e-9


def test_bad_paths_are_refused():
    q, p, _, labels = case()
    model = UnrolledRefinement(small_tdv(), steps=2).double()
    for options in ({"steps": -1}, {"keep": (5,)}, {"labels": labels[:, 1:]}, {"labels": labels.clamp_min(1) + 2}):
        with pytest.raises(InputError, match="energies_along"):
            energies_along(model, q, p, **options)


# ---- energy maps


def test_regularization_maps_are_those_of_the_networks():
    q, _, mass, _ = case()
    before, trained = small_tdv(), small_tdv(seed=1)
    model = UnrolledRefinement(trained, steps=2, alpha=0.5).double()
    maps = regularization_maps(before, model, q, mass)
    tissue = (mass > 0).double()
    with torch.no_grad():
        torch.testing.assert_close(maps.before, before(q * tissue[:, None]) * tissue)
        torch.testing.assert_close(maps.after, 0.5 * trained(q * tissue[:, None]) * tissue)
    assert not maps.before[:, :2].any() and bool((maps.before[:, 2:] != 0).any())
    with pytest.raises(InputError, match="regularization_maps"):
        regularization_maps(before, model, q[0])
    with pytest.raises(InputError, match="regularization_maps"):
        regularization_maps(before, model, q, mass[:1])
