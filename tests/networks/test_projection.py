import pytest
import torch

from monai_vslp.networks import AdditiveHead, ConfidenceNet, fit_projection
from monai_vslp.networks.heads import neighbourhood_mean
from monai_vslp.utils.errors import InputError

VIT = {"backbone": "vit_tiny_patch16_224", "backbone_kwargs": {"depth": 2, "embed_dim": 48, "num_heads": 2}, "window": 32}


def network(rank=6, **options):
    torch.manual_seed(0)
    return ConfidenceNet(3, **VIT, freeze_backbone=True, rank=rank, **options).eval()


def bags(count=4):
    generator = torch.Generator().manual_seed(1)
    return [{"image": torch.rand(3, 64, 80, generator=generator)} for _ in range(count)]


def test_components_are_those_of_a_singular_value_decomposition():
    net, items = network(), bags()
    fit_projection(net, items, tokens=10**6, progress=False)
    with torch.no_grad():
        raw = torch.cat([net.raw_features(item["image"][None])[0].flatten(1) for item in items], dim=1).double()
        found = torch.cat([net.features(item["image"][None])[0].flatten(1) for item in items], dim=1).double()
    centred = raw - raw.mean(dim=1, keepdim=True)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    expected = values[:6, None] * vectors[:6]
    expected = expected / (expected.square().sum() / expected.numel()).sqrt()
    # Components have no sign of their own.
    signs = (expected * found).sum(dim=1, keepdim=True).sign()
    torch.testing.assert_close(found, signs * expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.square().mean(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_background_has_no_say():
    items = bags()
    net = network()
    for item in items:
        item["mass"] = torch.zeros(1, 64, 80)
        item["mass"][..., :32] = 1
    fit_projection(net, items, tokens=10**6, progress=False)
    before = net.projection.weight.clone()
    for item in items:
        item["image"][..., 32:] = 0.0
    fit_projection(net, items, tokens=10**6, progress=False)
    torch.testing.assert_close(net.projection.weight, before, rtol=1e-3, atol=1e-4)


def test_the_same_draws_give_the_same_components():
    first, second = network(), network()
    for net in (first, second):
        fit_projection(net, bags(), tokens=5, seed=3, progress=False)
    assert torch.equal(first.projection.weight, second.projection.weight)
    assert not first.projection.weight.requires_grad


def test_rank_and_errors():
    assert network(rank=10**4).projection.out_channels == network(rank=None).backbone.channels
    with pytest.raises(InputError, match="rank"):
        network(rank=0)
    with pytest.raises(InputError, match="no projection"):
        fit_projection(network(rank=None), bags(), progress=False)
    empty = [{**item, "mass": torch.zeros(1, 64, 80)} for item in bags()]
    with pytest.raises(InputError, match="no tissue"):
        fit_projection(network(), empty, progress=False)


def test_additive_head_is_linear_until_it_learns():
    torch.manual_seed(0)
    head = AdditiveHead(5, 3, 7)
    x = torch.randn(2, 5, 4, 4)
    assert float(head(x).abs().max()) == 0.0
    with torch.no_grad():
        head.linear.weight.normal_()
    torch.testing.assert_close(head(x), head.linear(x))
    head(x).square().sum().backward()
    assert float(head.correction[-1].weight.grad.abs().max()) > 0


@pytest.mark.parametrize("edge", [1, 3, 9])
def test_neighbourhood_mean_is_that_of_the_square_within_the_map(edge):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 8)
    found = neighbourhood_mean(x, edge)
    half = edge // 2
    for i in range(6):
        for j in range(8):
            square = x[:, :, max(i - half, 0) : i + half + 1, max(j - half, 0) : j + half + 1]
            torch.testing.assert_close(found[:, :, i, j], square.mean(dim=(2, 3)))


def test_a_head_with_surroundings_is_linear_in_means_of_features():
    torch.manual_seed(0)
    head, x = AdditiveHead(5, 3, 7, context=(1, 3, 5)), torch.randn(2, 5, 7, 6)
    with torch.no_grad():
        head.linear.weight.normal_()
        head.linear.bias.normal_()
    parts = zip(head.linear.weight.chunk(3), head.linear.bias.chunk(3), (1, 3, 5))
    expected = sum(torch.nn.functional.conv2d(neighbourhood_mean(x, edge), w, b) for w, b, edge in parts)
    torch.testing.assert_close(head(x), expected)
    for context in ((), (2,), (0,)):
        with pytest.raises(InputError, match="odd"):
            AdditiveHead(5, 3, context=context)
    with pytest.raises(InputError, match="additive head"):
        network(context=(1, 3))
