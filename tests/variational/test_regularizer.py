import numpy as np
import pytest
import torch

from monai_vslp.variational import HuberTotalVariation, image_edge_weight


def brute_force(u, mass, weight, gamma):
    """The sum of the docstring, pixel by pixel."""
    _, height, width = u.shape
    total = 0.0
    for i in range(height):
        for j in range(width):
            if mass[i, j] == 0:
                continue
            reach, squared = mass[i, j], 0.0
            for di, dj in ((0, 1), (1, 0)):
                if i + di < height and j + dj < width and mass[i + di, j + dj] > 0:
                    reach = min(reach, mass[i + di, j + dj])
                    squared += ((u[:, i + di, j + dj] - u[:, i, j]) ** 2).sum()
            t = squared**0.5
            total += reach * weight[i, j] * (t * t / (2 * gamma) if t <= gamma else t - gamma / 2)
    return float(total)


@pytest.fixture
def setting():
    generator = torch.Generator().manual_seed(3)
    u = torch.softmax(2 * torch.randn(3, 7, 9, generator=generator, dtype=torch.float64), dim=0)
    mass = torch.rand(7, 9, generator=generator, dtype=torch.float64)
    mass[mass < 0.25] = 0
    weight = torch.rand(7, 9, generator=generator, dtype=torch.float64)
    return u, mass / mass.sum(), weight


@pytest.mark.parametrize("gamma", [0.02, 0.3, 5.0])
def test_value_equals_brute_force(setting, gamma):
    u, mass, weight = setting
    regularizer = HuberTotalVariation(mass, weight, gamma)
    expected = brute_force(u.numpy(), mass.numpy(), weight.numpy(), gamma)
    assert regularizer.value(u) == pytest.approx(expected, rel=1e-12)
    assert regularizer.value_and_gradient(u)[0] == pytest.approx(expected, rel=1e-12)
    assert float((regularizer.energy_map(u) * mass).sum()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.02, 0.3])
def test_gradient_equals_finite_differences(setting, gamma):
    u, mass, weight = setting
    regularizer = HuberTotalVariation(mass, weight, gamma)
    gradient = regularizer.value_and_gradient(u)[1] * mass
    step = 1e-6
    numeric = torch.zeros_like(u)
    for index in np.ndindex(*u.shape):
        for sign in (1, -1):
            moved = u.clone()
            moved[index] += sign * step
            numeric[index] += sign * regularizer.value(moved) / (2 * step)
    torch.testing.assert_close(gradient, numeric, atol=1e-7, rtol=1e-5)


def test_constant_map_costs_nothing_and_background_takes_no_part(setting):
    u, mass, weight = setting
    regularizer = HuberTotalVariation(mass, weight)
    constant = u[:, :1, :1].expand_as(u)
    assert regularizer.value(constant) == 0
    changed = u.clone()
    changed[:, mass == 0] = 0.9
    assert regularizer.value(changed) == pytest.approx(regularizer.value(u), rel=1e-12)
    assert not regularizer.value_and_gradient(changed)[1][:, mass == 0].any()


def test_perimeter_of_a_square():
    """A crisp square costs about its perimeter times the jump √2, divided by the number of pixels."""
    u = torch.zeros(2, 64, 64, dtype=torch.float64)
    u[0, 16:48, 16:48] = 1
    u[1] = 1 - u[0]
    mass = torch.full((64, 64), 1 / 64**2, dtype=torch.float64)
    # 4 x 32 edges; the corner pixel whose two differences both jump counts √2 times instead of twice.
    edges = 4 * 32 - 2 + 2**0.5
    assert HuberTotalVariation(mass, huber=1e-6).value(u) == pytest.approx(edges * 2**0.5 / 64**2, rel=1e-5)


def test_edge_weight_is_low_on_edges_only_and_ignores_range():
    image = torch.zeros(3, 40, 40)
    image[:, :, 20:] = 1
    weight = image_edge_weight(image)
    assert float(weight[:, 18:21].min()) < 0.2
    assert float(weight[:, :15].min()) == 1
    torch.testing.assert_close(weight, image_edge_weight(200 * image + 7), atol=1e-4, rtol=1e-4)
    assert bool((image_edge_weight(torch.full((1, 8, 8), 3, dtype=torch.uint8)) == 1).all())
    assert bool((image_edge_weight(image, strength=0) == 1).all())


def test_huber_must_be_positive():
    with pytest.raises(ValueError, match="huber"):
        HuberTotalVariation(torch.ones(4, 4), huber=0)
