import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monai_vslp.utils.errors import InputError
from monai_vslp.variational import (
    DeepVariationPotential,
    HuberTotalVariation,
    TotalDeepVariation,
    WeightedSum,
    convert_published_state_dict,
)
from monai_vslp.variational.tdv import fold_symmetric, pad_symmetric
from monai_vslp.variational.windows import split_windows


def small(channels=3, **options):
    torch.manual_seed(0)
    network = TotalDeepVariation(channels, features=4, macro_blocks=options.pop("macro_blocks", 2), **options).double()
    network.project()
    return network


@pytest.mark.parametrize(("channels", "count"), [(1, 387_392), (3, 387_968), (4, 388_256), (5, 388_544)])
def test_parameter_counts_are_those_published(channels, count):
    assert sum(p.numel() for p in TotalDeepVariation(channels).parameters()) == count


def test_constraint_is_kept_by_projection():
    network = small(image_channels=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn_like(parameter)
    network.project()
    for weight in (network.analysis.weight, network.image_analysis.weight):
        weight = weight.detach()
        assert float(weight.mean(dim=(1, 2, 3)).abs().max()) < 1e-12
        assert float(weight.flatten(1).norm(dim=1).max()) <= 1 + 1e-12


@pytest.mark.parametrize(("size", "width"), [((7, 9), 3), ((2, 5), 3), ((1, 1), 3)])
def test_padding_is_numpys_and_folding_its_transpose(size, width):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (width, width), (width, width)), mode="symmetric")
    np.testing.assert_array_equal(pad_symmetric(x, width).numpy(), expected)
    y = torch.randn(expected.shape, dtype=torch.float64)
    assert float((pad_symmetric(x, width) * y).sum()) == pytest.approx(float((x * fold_symmetric(y, width)).sum()), rel=1e-12)


def test_gradient_against_finite_differences():
    network = small()
    mass = torch.rand(9, 11, dtype=torch.float64)
    mass[0, :4] = 0
    potential = DeepVariationPotential(network, mass / mass.sum())
    u = torch.softmax(torch.randn(3, 9, 11, dtype=torch.float64), dim=0)
    value, gradient = potential.value_and_gradient(u)
    assert value == pytest.approx(potential.value(u), rel=1e-12)
    assert float((potential.energy_map(u) * potential.mass).sum()) == pytest.approx(value, rel=1e-10)
    d = torch.randn_like(u)
    numeric = (potential.value(u + 1e-5 * d) - potential.value(u - 1e-5 * d)) / 2e-5
    assert float((gradient * potential.mass * d).sum()) == pytest.approx(numeric, rel=1e-6)
    assert not bool(gradient[:, mass == 0].any())


def test_class_wise_network_does_not_know_class_names():
    network = small(1)
    u = torch.softmax(torch.randn(2, 5, 12, 12, dtype=torch.float64), dim=1)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(network(u[:, order]), network(u))


@pytest.mark.parametrize("channels", [1, 3])
def test_constants_are_not_seen(channels):
    """Filters have mean 0 over all their channels: a class-wise network sees no constant, another none that all classes share.

    So nothing pushes a map as a whole along such a constant, although single pixels may be pushed: the strided filters and
    the mirrored border have a linear part.
    """
    potential = DeepVariationPotential(small(channels), torch.full((12, 14), 1 / 168, dtype=torch.float64))
    level = torch.tensor([0.5, 0.3, 0.2] if channels == 1 else [0.4], dtype=torch.float64)[:, None, None].expand(3, 12, 14)
    assert potential.value(level) == pytest.approx(0.0, abs=1e-12)
    assert float(potential.energy_map(level).abs().max()) < 1e-12
    u = torch.softmax(torch.randn(3, 12, 14, dtype=torch.float64), dim=0)
    value, gradient = potential.value_and_gradient(u)
    assert value == pytest.approx(potential.value(u + level), rel=1e-10)
    push = (gradient * potential.mass).sum(dim=(1, 2))
    assert float((push if channels == 1 else push.sum()).abs().max()) < 1e-12


def test_the_image_matters_where_it_is_seen():
    network = small(3, image_channels=3)
    u = torch.softmax(torch.randn(1, 3, 12, 12, dtype=torch.float64), dim=1)
    first, second = (network(u, torch.randn(1, 3, 12, 12, dtype=torch.float64)).detach() for _ in range(2))
    assert float((first - second).abs().max()) > 1e-3
    with pytest.raises(InputError, match="3 image channels, got none"):
        network(u)
    with pytest.raises(InputError, match="0 image channels"):
        small()(u, torch.zeros(1, 3, 12, 12))
    with pytest.raises(InputError, match="3 classes, got 4"):
        small()(torch.zeros(1, 4, 8, 8, dtype=torch.float64))


def published(network):
    """The state dict that the authors' code would have for the same weights."""
    state = {"K1.weight": network.analysis.weight, "KN.weight": network.readout.view(1, -1, 1, 1)}
    blur = torch.outer(*[torch.tensor([1.0, 4, 6, 4, 1], dtype=torch.float64) / 16] * 2)[None, None]
    for b, block in enumerate(network.macro_blocks):
        for s in range(network.scales):
            for i, side in enumerate([block.fine_to_coarse, block.coarse_to_fine][: 2 if s < network.scales - 1 else 1]):
                state[f"mb.{b}.mb.{s}.{i}.conv1.weight"] = side[s].first.weight
                state[f"mb.{b}.mb.{s}.{i}.conv2.weight"] = side[s].second.weight
        for s in range(network.scales - 1):
            for name, part in (("conv_down", block.down[s]), ("conv_up", block.up[s])):
                state[f"mb.{b}.{name}.{s}.weight"] = part.weight
                state[f"mb.{b}.{name}.{s}.blur"] = blur
                state[f"mb.{b}.{name}.{s}.mask"] = torch.ones(1, 1, 3, 3)
    return {key: value.detach().clone() for key, value in state.items()}


def reference_energy(state, u, blocks, scales):
    """The published forward pass, written from its formulas on dense matrices of strided convolutions."""

    def conv(x, weight, stride=1):
        width = weight.shape[-1] // 2
        padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (width,) * 2, (width,) * 2), mode="symmetric"))
        return F.conv2d(padded, weight, stride=stride)

    def micro(x, prefix):
        t = conv(x, state[f"{prefix}.conv1.weight"])
        return x + conv(0.5 * torch.log(1 + t**2), state[f"{prefix}.conv2.weight"])

    def smoothed(weight):
        flat = weight.reshape(-1, 1, 3, 3)
        blur = state["mb.0.conv_down.0.blur"]
        return F.conv2d(flat, blur, padding=4).reshape(*weight.shape[:2], 7, 7)

    def up(x, weight, shape):
        # The transpose of the strided convolution, by automatic differentiation of ⟨conv(y), x⟩.
        y = torch.zeros(x.shape[0], weight.shape[1], *shape, dtype=x.dtype, requires_grad=True)
        padded = y
        for axis in (2, 3):
            n = padded.shape[axis]
            order = torch.from_numpy(np.pad(np.arange(n), 3, mode="symmetric"))
            padded = padded.index_select(axis, order)
        return torch.autograd.grad((F.conv2d(padded, weight, stride=2) * x).sum(), y)[0]

    x = [conv(u, state["K1.weight"])] + [None] * (scales - 1)
    for b in range(blocks):
        for s in range(scales - 1):
            x[s] = micro(x[s], f"mb.{b}.mb.{s}.0")
            below = conv(x[s], smoothed(state[f"mb.{b}.conv_down.{s}.weight"]), 2)
            x[s + 1] = below if x[s + 1] is None else x[s + 1] + below
        x[-1] = micro(x[-1], f"mb.{b}.mb.{scales - 1}.0")
        for s in reversed(range(scales - 1)):
            x[s] = x[s] + up(x[s + 1], smoothed(state[f"mb.{b}.conv_up.{s}.weight"]), x[s].shape[2:])
            x[s] = micro(x[s], f"mb.{b}.mb.{s}.1")
    return F.conv2d(x[0], state["KN.weight"])[:, 0] / len(state["K1.weight"])


def test_published_weights_give_published_energies():
    network = small(1, scales=3)
    state = published(network)
    config, converted = convert_published_state_dict(state)
    loaded = TotalDeepVariation(**config).double()
    loaded.load_state_dict(converted, strict=True)
    u = torch.rand(2, 1, 13, 18, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(u), network(u))
    torch.testing.assert_close(loaded(u).detach(), reference_energy(state, u, 2, 3), atol=1e-10, rtol=1e-9)


def test_foreign_weights_are_refused():
    state = published(small(1))
    with pytest.raises(InputError, match="K1.weight"):
        convert_published_state_dict({"conv.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="unknown"):
        convert_published_state_dict(state | {"extra.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="has shape"):
        convert_published_state_dict(state | {"mb.0.mb.1.0.conv1.weight": torch.zeros(8, 8, 3, 3)})
    with pytest.raises(InputError, match="no macro-block"):
        convert_published_state_dict({key: value for key, value in state.items() if key.startswith("K")})


@pytest.mark.parametrize("size", [(16, 16), (13, 40), (100, 100)])
def test_windows_add_up_to_the_map(size):
    """Total variation and a learned energy, separately and summed: values, gradients, majorizers and maps."""
    g = torch.Generator().manual_seed(1)
    mass = torch.rand(70, 66, generator=g, dtype=torch.float64)
    mass[mass < 0.2] = 0
    mass /= mass.sum()
    weight = torch.rand(70, 66, generator=g, dtype=torch.float64)
    u = torch.softmax(torch.randn(3, 70, 66, generator=g, dtype=torch.float64), dim=0)
    learned = DeepVariationPotential(small(macro_blocks=1, scales=2), mass)
    tv = HuberTotalVariation(mass, weight)
    for potential in (tv, learned, WeightedSum([(0.5, tv), (2.0, learned)])):
        whole_value, whole_gradient = potential.value_and_gradient(u)
        whole_map, (_, whole_bend) = potential.energy_map(u), potential.majorizer(u)
        total, gradient, energy = 0.0, torch.zeros_like(u), torch.zeros_like(u[0])
        for window in split_windows((70, 66), size, potential.halo, potential.multiple):
            part = u[(slice(None), *window.outer)]
            value, gradient[(slice(None), *window.core)] = potential.value_and_gradient(part, window)
            total += value
            energy[window.core] = potential.energy_map(part, window)
            slope, bend = potential.majorizer(part, window)
            torch.testing.assert_close(slope, gradient[(slice(None), *window.core)])
            if isinstance(bend, torch.Tensor):
                torch.testing.assert_close(bend, whole_bend[window.core])
            assert potential.value(part, window) == pytest.approx(value, abs=1e-12)
        assert total == pytest.approx(whole_value, rel=1e-9)
        torch.testing.assert_close(gradient, whole_gradient, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(energy, whole_map, atol=1e-12, rtol=1e-9)


def test_an_energy_depends_on_nothing_beyond_its_radius():
    network = small(1, macro_blocks=1, scales=2)
    u = torch.randn(1, 1, 64, 64, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(u)[0, 32, 32], u)
    reached = torch.nonzero(gradient[0, 0])
    assert int((reached - 32).abs().max()) <= network.radius


def test_total_variation_lies_below_its_majorizer():
    g = torch.Generator().manual_seed(2)
    mass = torch.rand(20, 24, generator=g, dtype=torch.float64)
    mass[mass < 0.1] = 0
    mass /= mass.sum()
    potential = HuberTotalVariation(mass, torch.rand(20, 24, generator=g, dtype=torch.float64), 0.1)
    for scale in (0.3, 3.0, 30.0):
        u, v = (torch.softmax(scale * torch.randn(3, 20, 24, generator=g, dtype=torch.float64), dim=0) for _ in range(2))
        gradient, bend = potential.majorizer(u)
        bound = potential.value(u) + float((((gradient * (v - u)).sum(dim=0) + bend * ((v - u) ** 2).sum(dim=0)) * mass).sum())
        assert potential.value(v) <= bound + 1e-12


@pytest.mark.parametrize(("channels", "image_channels", "size"), [(1, 0, (17, 22)), (3, 2, (9, 5)), (1, 1, (12, 8))])
def test_written_out_gradient_is_that_of_automatic_differentiation(channels, image_channels, size):
    """Both the gradient and what is learned through it: odd and tiny sizes, several U-shapes, with and without image."""
    network = small(channels, image_channels=image_channels)
    u = torch.rand(2, 3, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, *size, dtype=torch.float64)
    image = torch.randn(2, image_channels, *size, dtype=torch.float64) if image_channels else None
    energy = network(u, image)
    (expected,) = torch.autograd.grad((energy * weight).sum(), u, create_graph=True)
    found, gradient = network.energy_and_gradient(u, weight, image)
    torch.testing.assert_close(found, energy)
    torch.testing.assert_close(gradient, expected)
    parameters = list(network.macro_blocks.parameters())
    theirs = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    ours = torch.autograd.grad(gradient.square().sum(), parameters, allow_unused=True)
    for a, b in zip(ours, theirs):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b)
