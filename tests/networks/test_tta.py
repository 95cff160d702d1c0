import pytest
import torch
from monai.engines import SupervisedEvaluator
from monai.inferers import SlidingWindowInferer
from monai.utils import CommonKeys
from torch import nn

from monai_vslp.inferers import TTAInferer
from monai_vslp.networks.tta import (
    SYMMETRIES,
    TTA_GROUPS,
    Chain,
    GridShift,
    Scale,
    StainJitter,
    Symmetry,
    TTAConfidence,
    jitter_stain,
    training_views,
)
from monai_vslp.utils.errors import InputError

GEOMETRIC = [*SYMMETRIES, *(GridShift(down, right) for down in (0, 3, 8) for right in (0, 5))]
SIZES = [(16, 16), (23, 37)]


@pytest.fixture
def pixelwise():
    """A network that sees one pixel at a time: it commutes with every rearrangement of pixels."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.Tanh(), nn.Conv2d(16, 4, 1)).double().requires_grad_(False)


@pytest.fixture
def oriented():
    """A network that is not equivariant to anything but shifts."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 5, padding=2), nn.Tanh(), nn.Conv2d(8, 4, 3, padding=1)
    return nn.Sequential(*layers).double().requires_grad_(False)


def image(size, batch=2):
    return torch.rand(batch, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("view", GEOMETRIC, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_geometric_views_are_undone_exactly(view, size, pixelwise):
    x = image(size)
    torch.testing.assert_close(view(x, lambda y: y), x, rtol=0, atol=0)
    torch.testing.assert_close(view(x, pixelwise), pixelwise(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (4, 3)])
def test_shifts_larger_than_the_image(size, pixelwise):
    x = image(size)
    torch.testing.assert_close(GridShift(8, 8)(x, pixelwise), pixelwise(x), rtol=0, atol=1e-12)


def test_views_change_what_the_network_sees():
    x, seen = image((12, 20), batch=1), []

    def record(y):
        seen.append(y)
        return y

    for view in [*SYMMETRIES, GridShift(0, 4), Scale(1.5), StainJitter(0)]:
        view(x, record)
    assert {tuple(y.shape[-2:]) for y in seen[:8]} == {(12, 20), (20, 12)}
    assert len({tuple(y.flatten().tolist()) for y in seen}) == len(seen)
    assert seen[8].shape[-2:] == (12, 24)
    torch.testing.assert_close(seen[8][..., 4:], x)
    torch.testing.assert_close(seen[8][..., :4], x[..., 1:5].flip(-1))
    assert seen[9].shape[-2:] == (18, 30)


@pytest.mark.parametrize("first", SYMMETRIES[1::3], ids=str)
@pytest.mark.parametrize("second", [SYMMETRIES[1], SYMMETRIES[6], GridShift(2, 5)], ids=str)
def test_chains_are_undone_in_reverse(first, second, pixelwise):
    x, seen = image((10, 14)), []
    out = Chain(first, second)(x, lambda y: (seen.append(y), pixelwise(y))[1])
    torch.testing.assert_close(out, pixelwise(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(seen[0], second_of(second, first.forward(x)), rtol=0, atol=0)


def second_of(view, x):
    """What ``view`` shows of ``x``."""
    seen = []
    view(x, lambda y: (seen.append(y), y)[1])
    return seen[0]


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.25, 2.0])
@pytest.mark.parametrize("size", [(32, 32), (37, 53)])
def test_scales(factor, size):
    view = Scale(factor)
    constant = torch.full((1, 3, *size), 0.3, dtype=torch.float64)
    torch.testing.assert_close(view(constant, lambda y: y), constant, rtol=0, atol=1e-12)
    rows, columns = torch.meshgrid(*(torch.linspace(0, 1, side, dtype=torch.float64) for side in size), indexing="ij")
    smooth = torch.stack([rows, columns, 0.5 + 0.5 * torch.sin(3 * rows) * torch.cos(2 * columns)])[None]
    back = view(smooth, lambda y: y)
    assert back.shape == smooth.shape
    assert (back - smooth).abs().max() < 0.04
    assert (back - smooth)[..., 4:-4, 4:-4].abs().max() < 0.005


def test_scaled_maps_stay_on_the_simplex(oriented):
    q = Scale(0.7)(image((33, 20)), lambda y: oriented(y).softmax(dim=1))
    torch.testing.assert_close(q.sum(dim=1), torch.ones_like(q[:, 0]))
    assert q.min() >= 0


def test_stain_jitter_is_deterministic_and_keeps_places():
    x = image((8, 9))
    seen = [second_of(StainJitter(seed), x) for seed in (4, 4, 5)]
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(seen[0], seen[2])
    assert seen[0].min() >= 0 and seen[0].max() <= 1
    # Pixelwise: changing one pixel changes only this pixel.
    other = x.clone()
    other[..., 3, 4] = 0.5
    changed = (second_of(StainJitter(4), other) != seen[0]).any(dim=1)
    assert changed.sum() == 2 and changed[:, 3, 4].all()
    state = torch.get_rng_state()
    StainJitter(1)(x, lambda y: y)
    assert torch.equal(state, torch.get_rng_state())


def test_stain_without_change_is_the_identity():
    x = image((8, 9)).clamp_min(1 / 255)
    same = jitter_stain(x, torch.ones(3), torch.zeros(3))
    torch.testing.assert_close(same, x, rtol=0, atol=1e-5)
    white = torch.ones(1, 3, 2, 2)
    torch.testing.assert_close(jitter_stain(white, torch.tensor([1.2, 0.8, 1.0]), torch.full((3,), 0.05)), white)


def test_more_haematoxylin_is_darker_in_red():
    purple = torch.tensor([0.5, 0.3, 0.7]).view(1, 3, 1, 1)
    darker = jitter_stain(purple, torch.tensor([1.3, 1.0, 1.0]), torch.zeros(3))
    assert darker[0, 0] < purple[0, 0]


@pytest.mark.parametrize("g", SYMMETRIES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_mean_over_the_symmetries_is_equivariant(g, size, oriented):
    x = image(size)
    tta = TTAConfidence("symmetries", "mean_spread")
    torch.testing.assert_close(tta(g.forward(x), oriented), g.forward(tta(x, oriented)), rtol=0, atol=1e-12)
    if g != SYMMETRIES[0]:
        assert not torch.allclose(oriented(g.forward(x)), g.forward(oriented(x)))


@pytest.mark.parametrize("group", TTA_GROUPS.names)
def test_outputs_agree_with_the_stack(group, oriented):
    x = image((24, 30))
    out = {kind: TTAConfidence(group, kind, stride=8)(x, oriented) for kind in ("stack", "mean", "spread", "mean_spread")}
    stack = out["stack"]
    assert stack.shape[2:] == (4, 24, 30)
    torch.testing.assert_close(stack.sum(dim=2), torch.ones_like(stack[:, :, 0]))
    torch.testing.assert_close(out["mean"], stack.mean(dim=1))
    deviation = stack.std(dim=1, unbiased=False).mean(dim=1, keepdim=True)
    torch.testing.assert_close(out["spread"], deviation, atol=1e-9, rtol=1e-6)
    assert torch.equal(out["mean_spread"], torch.cat([out["mean"], out["spread"]], dim=1))


def test_groups():
    views = {name: TTA_GROUPS[name](16) for name in TTA_GROUPS.names}
    assert {name: len(group) for name, group in views.items()} == {
        "none": 1,
        "flips": 4,
        "symmetries": 8,
        "shifts": 4,
        "shifted_symmetries": 8,
        "full": 14,
    }
    assert set(views["flips"]) == {Symmetry(t, m) for t in (0, 2) for m in (False, True)}
    assert {(v.down, v.right) for v in views["shifts"]} == {(0, 0), (0, 8), (8, 0), (8, 8)}


def test_only_the_stack_keeps_all_views(oriented):
    """While the mean is computed, no more than two maps are handed out and still alive."""
    import weakref

    alive, most = weakref.WeakSet(), 0

    def predict(x):
        nonlocal most
        most = max(most, len(alive))
        y = oriented(x)
        alive.add(y)
        return y

    TTAConfidence("full", "mean", stride=8)(image((24, 24)), predict)
    assert most <= 2


def test_softmax_can_be_left_to_the_predictor(pixelwise):
    x = image((6, 7))
    plain = TTAConfidence("none", softmax=False)(x, pixelwise)
    torch.testing.assert_close(plain, pixelwise(x))


def test_errors():
    with pytest.raises(ValueError, match="symmetries"):
        TTAConfidence("symetries")
    with pytest.raises(ValueError, match="spread"):
        TTAConfidence("flips", "spraed")
    with pytest.raises(InputError, match="at least one view"):
        TTAConfidence([])


def test_training_views():
    views = training_views(seed=1, count=4)
    assert len(views) == 4 and views[0] == SYMMETRIES[0]
    x = image((8, 8))
    first, again = ([second_of(view, x) for view in training_views(1, 4)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.allclose(a, x) for a in first[1:])


class _Strided(nn.Module):
    stride = 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Tanh())

    def forward(self, x):
        return self.layers(x)


def test_inferer_in_a_supervised_evaluator():
    network, x = _Strided().eval(), torch.rand(1, 3, 20, 25)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{CommonKeys.IMAGE: x}],
        network=network,
        inferer=TTAInferer("shifts", "mean_spread"),
        decollate=False,
    )
    evaluator.run()
    with torch.no_grad():
        expected = TTAConfidence("shifts", "mean_spread", stride=4)(x, network)
    assert expected.shape == (1, 3, 20, 25)
    torch.testing.assert_close(evaluator.state.output[CommonKeys.PRED], expected)


@torch.no_grad()
def test_inferer_over_sliding_windows():
    torch.manual_seed(0)
    network, x = nn.Conv2d(3, 2, 1), torch.rand(1, 3, 40, 52)
    window = SlidingWindowInferer(roi_size=(16, 16), sw_batch_size=4, overlap=0.25)
    tta = TTAInferer("symmetries", inferer=window)
    torch.testing.assert_close(tta(x, network), network(x).softmax(dim=1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_inferer_in_reduced_precision():
    network, x = _Strided().eval(), torch.rand(1, 3, 16, 16)
    full, reduced = (TTAInferer("flips", amp=amp)(x, network) for amp in (False, True))
    assert reduced.dtype == torch.float32
    torch.testing.assert_close(full, reduced, atol=0.02, rtol=0)
