import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_vslp.utils.errors import InputError
from monai_vslp.variational import (
    DeepVariationPotential,
    FusionFidelity,
    HuberTotalVariation,
    TotalDeepVariation,
    WeightedSum,
)
from monai_vslp.variational.potential import FIDELITIES, REGULARIZERS
from monai_vslp.variational.windows import DiskArray, Window, split_windows

SIDE = st.integers(1, 22)


def setting(shape, seed=0, dtype=torch.float64):
    """A segmentation, a mass with background, and weights of edges."""
    g = torch.Generator().manual_seed(seed)
    u = torch.softmax(2 * torch.randn(3, *shape, generator=g, dtype=torch.float64), dim=0)
    mass = torch.rand(shape, generator=g, dtype=torch.float64)
    mass = torch.where(mass < 0.25, 0.0, mass)
    mass[0, 0] = 0.5
    weight = torch.rand(shape, generator=g, dtype=torch.float64)
    return u.to(dtype), (mass / mass.sum()).to(dtype), weight.to(dtype)


def network(macro_blocks=1, scales=2, channels=1):
    torch.manual_seed(0)
    return TotalDeepVariation(channels, features=3, macro_blocks=macro_blocks, scales=scales).double()


def potentials(shape, seed=0):
    u, mass, weight = setting(shape, seed)
    views = torch.stack([setting(shape, seed + k)[0] for k in (1, 2)])
    tv, learned, fusion = (
        HuberTotalVariation(mass, weight),
        DeepVariationPotential(network(), mass),
        FusionFidelity(views, mass),
    )
    terms = {"tv": tv, "tdv": learned, "fusion": fusion, "sum": WeightedSum([(0.5, tv), (2.0, learned), (1.5, fusion)])}
    return u, mass, terms


def assembled(potential, u, windows):
    """Value, gradient, curvature and map, put together from windows."""
    shape = u.shape[1:]
    total, by_value, gradient, slope = 0.0, 0.0, torch.full_like(u, torch.nan), torch.full_like(u, torch.nan)
    bend, energy = (torch.full(shape, torch.nan, dtype=u.dtype) for _ in range(2))
    for window in windows:
        part, core = u[(slice(None), *window.outer)].clone(), (slice(None), *window.core)
        seen = part.clone()
        value, gradient[core] = potential.value_and_gradient(part, window)
        total, by_value = total + value, by_value + potential.value(part, window)
        slope[core], bend[window.core] = potential.majorizer(part, window)
        energy[window.core] = potential.energy_map(part, window)
        assert torch.equal(part, seen)  # what is given stays as it is
    return total, by_value, gradient, slope, bend, energy


@settings(max_examples=40)
@given(shape=st.tuples(SIDE, SIDE), size=st.tuples(st.integers(3, 22), st.integers(3, 22)), seed=st.integers(0, 99))
def test_windows_of_any_size_add_up_to_the_map(shape, size, seed):
    u, mass, terms = potentials(shape, seed)
    for potential in terms.values():
        value, gradient = potential.value_and_gradient(u)
        total, by_value, parts, slope, bend, energy = assembled(
            potential, u, split_windows(shape, size, potential.halo, potential.multiple)
        )
        assert total == pytest.approx(value, abs=1e-12) and by_value == pytest.approx(value, abs=1e-12)
        torch.testing.assert_close(parts, gradient, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(slope, gradient, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(bend, torch.as_tensor(potential.majorizer(u)[1], dtype=u.dtype).expand(shape))
        torch.testing.assert_close(energy, potential.energy_map(u))
        # All of them are Σ a_i e_i, and background takes no part.
        assert float((energy * mass).sum()) == pytest.approx(value, abs=1e-12)
        assert not bool(energy[mass == 0].any()) and not bool(gradient[:, mass == 0].any())


@pytest.mark.parametrize("name", ["tv", "tdv", "fusion", "sum"])
def test_gradients_by_finite_differences(name):
    u, mass, terms = potentials((9, 11))
    potential = terms[name]
    gradient = potential.value_and_gradient(u)[1]
    direction = torch.randn(u.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    direction = 1e-6 * u.amin(dim=0) * (direction - direction.mean(dim=0))  # the simplex is not left
    slope = (potential.value(u + direction) - potential.value(u - direction)) / 2
    assert slope == pytest.approx(float((gradient * mass * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("name", ["tv", "tdv", "fusion"])
@pytest.mark.parametrize("side", [0, 1])
def test_nothing_beyond_the_margin_matters(name, side):
    """On the whole map: pixels further from a core than the margin change neither its energies nor its gradient."""
    shape = (96, 96)
    u, mass, terms = potentials(shape)
    potential = terms[name]
    core = (slice(40, 48), slice(44, 52))
    beyond = torch.ones(shape, dtype=torch.bool)
    near = [slice(c.start - potential.halo, c.stop + potential.halo) for c in core]
    near[1 - side] = slice(None)  # one direction at a time, so that the changed pixels lie next to the margin
    beyond[tuple(near)] = False
    assert bool(beyond.any()) and potential.halo < 40
    changed = torch.where(beyond, u.flip(0), u)
    for one, two in (
        (potential.value_and_gradient(u)[1], potential.value_and_gradient(changed)[1]),
        (potential.energy_map(u)[None], potential.energy_map(changed)[None]),
    ):
        torch.testing.assert_close(one[(slice(None), *core)], two[(slice(None), *core)], atol=1e-14, rtol=0)
    assert potential.value(u) != potential.value(changed)


@given(seed=st.integers(0, 999), scale=st.sampled_from([0.1, 1.0, 10.0]), huber=st.sampled_from([0.01, 0.1, 1.0]))
def test_total_variation_lies_below_its_majorizer(seed, scale, huber):
    """Everywhere, not only nearby; it touches at u."""
    u, mass, weight = setting((7, 9), seed)
    v = torch.softmax(scale * torch.randn(u.shape, generator=torch.Generator().manual_seed(seed), dtype=u.dtype), dim=0)
    potential = HuberTotalVariation(mass, weight, huber)
    gradient, bend = potential.majorizer(u)
    assert float(bend.min()) >= 0
    for t in (1e-3, 0.3, 1.0):
        step = t * (v - u)
        bound = potential.value(u) + float((mass * ((gradient * step).sum(dim=0) + bend * step.square().sum(dim=0))).sum())
        assert potential.value(u + step) <= bound + 1e-13


def test_the_majorizer_is_as_low_as_it_can_be():
    """Worst case: neighbours move against each other where the energy is quadratic. Only the border then leaves a gap."""
    shape = (40, 40)
    mass = torch.full(shape, 1 / 1600, dtype=torch.float64)
    u = torch.full((3, *shape), 1 / 3, dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    step = 0.05 * torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)[:, None, None] * (1 - 2 * ((rows + columns) % 2))
    potential = HuberTotalVariation(mass, huber=1.0)
    gradient, bend = potential.majorizer(u)
    assert not bool(gradient.any())
    bound = (bend * step.square().sum(dim=0) * mass)[1:-1, 1:-1]
    energy = (potential.energy_map(u + step) * mass)[1:-1, 1:-1]
    torch.testing.assert_close(energy, bound)
    assert potential.value(u + step) < float((bend * step.square().sum(dim=0) * mass).sum())


def test_maps_on_disk_are_as_good(tmp_path):
    shape = (30, 41)
    u, mass, weight = setting(shape, dtype=torch.float32)
    stored = {}
    for name, x in (("mass", mass), ("weight", weight)):
        stored[name] = DiskArray(tmp_path / name, shape, (8, 8))
        stored[name][:, :] = x
    for one, two in (
        (HuberTotalVariation(mass, weight), HuberTotalVariation(stored["mass"], stored["weight"])),
        (DeepVariationPotential(network().float(), mass), DeepVariationPotential(network().float(), stored["mass"])),
    ):
        for window in split_windows(shape, (16, 20), one.halo, one.multiple):
            part = u[(slice(None), *window.outer)]
            assert one.value(part, window) == two.value(part, window)
            assert torch.equal(one.value_and_gradient(part, window)[1], two.value_and_gradient(part, window)[1])
            assert torch.equal(one.energy_map(part, window), two.energy_map(part, window))
    assert HuberTotalVariation(mass, weight).value_and_gradient(u)[1].dtype == torch.float32


def test_a_sum_is_the_sum_of_its_terms():
    u, _, terms = potentials((12, 10))
    tv, learned = terms["tv"], terms["tdv"]
    whole = WeightedSum([(0.5, tv), (2.0, learned)])
    assert whole.value(u) == pytest.approx(0.5 * tv.value(u) + 2 * learned.value(u), rel=1e-12)
    gradient = 0.5 * tv.value_and_gradient(u)[1] + 2 * learned.value_and_gradient(u)[1]
    torch.testing.assert_close(whole.value_and_gradient(u)[1], gradient)
    torch.testing.assert_close(whole.majorizer(u)[0], gradient)
    torch.testing.assert_close(whole.majorizer(u)[1], 0.5 * tv.majorizer(u)[1] + 2 * learned.majorizer(u)[1])
    torch.testing.assert_close(whole.energy_map(u), 0.5 * tv.energy_map(u) + 2 * learned.energy_map(u))
    assert (whole.halo, whole.multiple) == (max(tv.halo, learned.halo), max(tv.multiple, learned.multiple))
    assert whole.multiple == 2 and whole.halo % whole.multiple == 0
    assert WeightedSum([(0.0, tv)]).value(u) == 0
    for terms_given in ([], [(-1.0, tv)], [(float("nan"), tv)]):
        with pytest.raises(InputError, match="weights of at least 0"):
            WeightedSum(terms_given)


def test_windows_off_the_grid_of_a_network_are_not_exact():
    """Why outer rectangles start at multiples: a strided filter sees another grid otherwise."""
    u, _, terms = potentials((90, 90))
    learned, core = terms["tdv"], (slice(41, 50), slice(41, 50))
    even, odd = (Window(core, (slice(start, 90),) * 2) for start in (10, 9))
    assert learned.halo <= 41 - 10
    whole = learned.energy_map(u)[core]
    exact, other = (float((learned.energy_map(u[(slice(None), *w.outer)], w) - whole).abs().max()) for w in (even, odd))
    assert exact < 1e-12 and other > 1e-4


def test_potentials_are_found_by_name():
    assert REGULARIZERS["total_variation"] is HuberTotalVariation
    assert REGULARIZERS["total_deep_variation"] is DeepVariationPotential
    assert FIDELITIES["fusion"] is FusionFidelity
