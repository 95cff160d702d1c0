import inspect
import json

import pytest
import torch
import torch.nn.functional as F

from monai_vslp.networks import ConfidenceNet, DenseHead, PatchHead, pool_proportions
from monai_vslp.networks.confidence import token_mass
from monai_vslp.utils.errors import InputError

VIT = {"backbone": "vit_tiny_patch16_224", "backbone_kwargs": {"depth": 2, "embed_dim": 48, "num_heads": 2}}
SWIN = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_kwargs": {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2)},
}
FAMILIES = [VIT, SWIN, *({"backbone": name, "backbone_kwargs": {}} for name in ("test_convnext", "test_vit"))]


def network(**options):
    torch.manual_seed(0)
    return ConfidenceNet(3, **{**VIT, "window": 64, **options}).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(64, 64), (37, 53), (100, 150), (1, 1), (5, 200)])
@torch.no_grad()
def test_any_size(family, size):
    net = network(**family)
    x = torch.rand(2, 3, *size)
    assert net.features(x).shape[-2:] == tuple(-(-side // net.stride) for side in size)
    logits = net(x)
    assert logits.shape == (2, 3, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(64, 64), (70, 130)])
@torch.no_grad()
def test_output_is_independent_of_the_rest_of_the_batch(family, size):
    net = network(**family)
    x = torch.rand(3, 3, *size)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_chunks_of_windows_do_not_matter(monkeypatch):
    net, x = network(), torch.rand(2, 3, 200, 150)
    whole = net(x)
    monkeypatch.setattr("monai_vslp.networks.confidence.WINDOW_BATCH", 3)
    torch.testing.assert_close(net(x), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_windows_do_not_see_each_other():
    net = network()
    x = torch.rand(1, 3, 128, 128)
    changed = x.clone()
    changed[..., 64:, 64:] = 0
    difference = (net.features(x) - net.features(changed)).abs().amax(dim=1)[0]
    assert difference[4:, 4:].min() > 0
    assert max(difference[:4].max(), difference[:, :4].max()) == 0
    alone = net.features(x[..., :64, 64:])
    torch.testing.assert_close(net.features(x)[..., :4, 4:], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_overlapping_windows_fade_into_each_other():
    """Brute force over a row of 96 px: windows of 64 px at 0 and 32, with weights 1, 2, 2, 1 over 4 tokens."""
    net = network()
    x = torch.rand(1, 3, 64, 96)
    left, right = net.features(x[..., :64]), net.features(x[..., 32:])
    weight = torch.tensor([1.0, 2.0, 2.0, 1.0])
    total, norm = torch.zeros(1, left.shape[1], 4, 6), torch.zeros(6)
    for features, start in ((left, 0), (right, 2)):
        total[..., start : start + 4] += weight * features
        norm[start : start + 4] += weight
    torch.testing.assert_close(net.features(x), total / norm, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_window_all_is_seen():
    net = network(window=None)
    x = torch.rand(1, 3, 96, 128)
    changed = x.clone()
    changed[..., :16, :16] = 0
    assert (net.features(x) - net.features(changed)).abs().amax(dim=1).min() > 0


@torch.no_grad()
def test_logits_at_token_centres_are_the_tokens_logits():
    net = network(backbone="test_convnext", backbone_kwargs={}, blocks=[0])
    assert net.stride == 4
    x = torch.rand(1, 3, 32, 40)
    tokens, pixels = net.head(net.features(x)), net(x)
    # A token's centre lies between four pixels; each is 1/8 of the way towards the next token along either axis.
    inner = F.avg_pool2d(pixels[..., 1:-1, 1:-1], 2, stride=4)
    smooth = F.conv2d(
        F.pad(tokens, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None],
        torch.outer(*2 * [torch.tensor([0.0625, 0.875, 0.0625])])[None, None],
    ).view_as(tokens)
    torch.testing.assert_close(inner, smooth, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_patch_head_gives_one_softmax_per_window():
    net = network(head="patch")
    x = torch.rand(1, 3, 64, 128)
    logits = net.head(net.features(x))
    assert logits.shape[-2:] == (4, 8)
    for part, image in ((logits[..., :4], x[..., :64]), (logits[..., 4:], x[..., 64:])):
        assert (part == part[..., :1, :1]).all()
        torch.testing.assert_close(part, net.head(net.features(image)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[..., 0], logits[..., 4])


def test_dense_head_options():
    features = torch.randn(2, 6, 5, 7)
    linear = DenseHead(6, 3)
    assert [tuple(p.shape) for p in linear.parameters()] == [(3, 6, 1, 1), (3,)]
    head = DenseHead(6, 3, hidden=8, dropout=0.5, kernel=3).eval()
    assert head(features).shape == (2, 3, 5, 7)
    changed = features.clone()
    changed[..., 0, 0] += 1
    seen = (head(features) - head(changed)).abs().amax(dim=(0, 1)) > 0
    assert seen[:2, :2].all() and seen.sum() == 4
    with pytest.raises(InputError, match="odd"):
        DenseHead(6, 3, kernel=2)


def test_patch_head_without_window_pools_everything():
    features = torch.randn(2, 6, 5, 7)
    head = PatchHead(6, 3)
    expected = DenseHead.forward(head, features.mean(dim=(2, 3), keepdim=True)).expand(2, 3, 5, 7)
    torch.testing.assert_close(head(features), expected)


def test_frozen_backbone():
    net = network(freeze_backbone=True, backbone_kwargs={**VIT["backbone_kwargs"], "drop_path_rate": 0.5}).train()
    assert net.head.training and not net.backbone.training
    x = torch.rand(1, 3, 64, 64)
    features = net.features(x)
    assert not features.requires_grad
    torch.testing.assert_close(features, net.features(x))
    net(x).sum().backward()
    assert all(p.grad is None for p in net.backbone.parameters())
    assert all(p.grad is not None for p in net.head.parameters())


def test_trainable_backbone_gets_gradients_through_windows():
    net = network().train()
    net(torch.rand(1, 3, 64, 96)).square().sum().backward()
    assert net.backbone.model.patch_embed.proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_normalisation_of_pixels():
    net = network(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    x = torch.rand(1, 3, 64, 64)
    normalised = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(net.features(x), net.backbone(normalised))
    assert network().mean.flatten().tolist() == [0.5] * 3


def test_checkpoint_is_plain_tensors(tmp_path):
    net = network()
    torch.save(net.state_dict(), tmp_path / "model.pt")
    other = ConfidenceNet(3, **VIT, window=64).eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = torch.rand(1, 3, 40, 70)
    with torch.no_grad():
        torch.testing.assert_close(net(x), other(x))
    assert all(isinstance(value, torch.Tensor) for value in net.state_dict().values())


def test_constructor_arguments_are_json():
    defaults = {k: p.default for k, p in inspect.signature(ConfidenceNet).parameters.items() if k != "num_classes"}
    assert json.loads(json.dumps(defaults)) == defaults


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 1}, "RGB"),
        ({"head": "pixel"}, "dense, patch"),
        ({"window": 100}, "nearest are 96 and 112"),
        ({"window": 0}, "multiple of the stride 16"),
        ({"mean": [0.5]}, "three numbers"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(InputError, match=message):
        network(**options)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 4, 64, 64)])
def test_wrong_images(shape):
    with pytest.raises(InputError, match=r"\[B, 3, H, W\]"):
        network()(torch.rand(shape))


def test_token_mass_by_brute_force():
    mass = torch.rand(2, 1, 21, 34)
    tokens = token_mass(mass, 8)
    assert tokens.shape == (2, 1, 3, 5)
    for row in range(3):
        for column in range(5):
            part = mass[:, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            torch.testing.assert_close(tokens[:, 0, row, column], part.sum(dim=(1, 2)) / 64)
    torch.testing.assert_close(token_mass(mass[:, 0], 8), tokens)
    assert token_mass(mass > 0.5, 8).dtype == torch.float32
    with pytest.raises(InputError, match=r"\[B, 1, H, W\]"):
        token_mass(torch.rand(2, 3, 8, 8), 8)


def test_pooled_proportions():
    q = torch.rand(2, 3, 4, 5).softmax(dim=1)
    torch.testing.assert_close(pool_proportions(q), q.mean(dim=(2, 3)))
    mass = torch.zeros(2, 1, 4, 5)
    mass[0, 0, 1, 2], mass[0, 0, 3, 3] = 3.0, 1.0
    pooled = pool_proportions(q, mass)
    torch.testing.assert_close(pooled[0], 0.75 * q[0, :, 1, 2] + 0.25 * q[0, :, 3, 3])
    assert (pooled[1] == 0).all()
    fine = mass.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    torch.testing.assert_close(pool_proportions(q, fine), pooled)
    torch.testing.assert_close(pool_proportions(q, fine[:, 0]), pooled)
    for shape in ((2, 1, 60, 80), (2, 1, 64, 75), (2, 1, 2, 5)):
        with pytest.raises(InputError, match="token_mass"):
            pool_proportions(q, torch.ones(shape))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(64, 64), (37, 53), (100, 150), (5, 200)])
@torch.no_grad()
def test_magnified_views_share_one_grid(family, size):
    net = network(**family, magnifications=[1, 2])
    alone = network(**family)
    x = torch.rand(2, 3, *size)
    features = net.features(x)
    assert net.stride == alone.stride // 2
    assert features.shape[1] == 2 * alone.backbone.channels
    assert features.shape[-2:] == tuple(-(-side // net.stride) for side in size)
    assert net(x).shape == (2, 3, *size)
    # The part at magnification 1 is that of the network without magnification, brought to the finer grid.
    net.backbone.load_state_dict(alone.backbone.state_dict())
    coarse = F.interpolate(alone.features(x), scale_factor=2, mode="bilinear", align_corners=False)
    height, width = (max(side - 2, 1) for side in features.shape[-2:])  # the last tokens are interpolated at the border
    torch.testing.assert_close(net.features(x)[:, : alone.backbone.channels, :height, :width], coarse[..., :height, :width])


@torch.no_grad()
def test_magnified_tokens_lie_where_their_pixels_are():
    net = network(magnifications=[0.5, 1, 2], window=None)
    x = torch.full((1, 3, 64, 96), 0.5)
    marked = x.clone()
    marked[..., 24:32, 40:48] = 1.0  # one token of the finest grid
    # Attention spreads a mark over all tokens; it is strongest in the token that holds it.
    difference = (net.features(marked) - net.features(x)).square()[:, 2 * net.backbone.channels :].sum(dim=1)[0]
    assert divmod(int(difference.argmax()), 12) == (3, 5)


@pytest.mark.parametrize(
    ("magnifications", "message"), [([], "positive"), ([0, 1], "positive"), ([2, 3], "divide"), ([32], "stride")]
)
def test_impossible_magnifications(magnifications, message):
    with pytest.raises(InputError, match=message):
        network(magnifications=magnifications)


@torch.no_grad()
def test_cached_features_are_those_computed(tmp_path):
    x = torch.rand(1, 3, 100, 70)
    plain, first = network(magnifications=[1, 2]), network(magnifications=[1, 2], freeze_backbone=True, cache=tmp_path)
    torch.testing.assert_close(first(x), plain(x), rtol=0, atol=5e-3)
    entries = len(list(tmp_path.rglob("*.pt")))
    again = network(magnifications=[1, 2], freeze_backbone=True, cache=tmp_path)
    again.backbone.forward = None  # must not be called
    assert entries > 0 and torch.equal(again(x), first(x))
    with pytest.raises(InputError, match="frozen"):
        network(cache=tmp_path)
