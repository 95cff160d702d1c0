import copy

import pytest
import torch
from torch import nn

from monai_vslp.networks import ConfidenceNet, TokenBackbone
from monai_vslp.networks.adapters import (
    LoRALinear,
    adapter_state_dict,
    add_lora,
    load_adapters,
    merge_lora,
    trainable_parameters,
)
from monai_vslp.utils.errors import InputError
from monai_vslp.utils.timm import import_timm

VIT = ("vit_tiny_patch16_224", {"depth": 4, "embed_dim": 48, "num_heads": 2, "blocks": [0, 1]})
SWIN = ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2)})
CONVNEXT = ("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40), "ls_init_value": 1.0})
FAMILIES = [VIT, SWIN, CONVNEXT]
NET = {"backbone": VIT[0], "backbone_kwargs": {"depth": 2, "embed_dim": 48, "num_heads": 2}, "window": 64}


def backbone(family):
    torch.manual_seed(0)
    return TokenBackbone(family[0], **family[1]).eval()


def disturb(module, seed=1):
    """As after some training: no adapter is 0 any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in adapter_state_dict(module).values():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))


@pytest.fixture
def x():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_output_is_unchanged_at_the_start_and_not_after(family, x):
    model = backbone(family)
    before = model(x)
    layers = add_lora(model, rank=4)
    assert torch.equal(model(x), before)
    assert not any(".blocks.2." in name for name in layers) or family is not VIT  # that block was removed
    disturb(model)
    assert (model(x) - before).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merged_is_the_same_function_without_a_trace(family, x):
    model = backbone(family)
    names = list(model.state_dict())
    count = len(add_lora(model, rank=4, alpha=6.0))
    disturb(model)
    expected = model(x)
    assert merge_lora(model) == count > 0
    torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=1e-4)
    assert list(model.state_dict()) == names
    assert not any(isinstance(layer, LoRALinear) for layer in model.modules())
    assert merge_lora(model) == 0
    plain = backbone(family)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("bias", [True, False])
def test_one_layer_by_its_formula(bias):
    holder = nn.ModuleDict({"fc1": nn.Linear(5, 7, bias=bias, dtype=torch.float64)})
    weight = holder["fc1"].weight
    (layer,) = add_lora(holder, rank=3, alpha=1.5).values()
    disturb(holder)
    x = torch.randn(4, 5, dtype=torch.float64)
    full = layer.weight + 1.5 / 3 * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(holder["fc1"](x), nn.functional.linear(x, full, layer.bias))
    assert torch.linalg.matrix_rank(full - weight) == 3
    assert layer.weight is weight and (layer.bias is not None) == bias
    assert torch.autograd.gradcheck(
        lambda a, b: torch.func.functional_call(layer, {"lora_a": a, "lora_b": b}, (x,)), (layer.lora_a, layer.lora_b)
    )


def test_only_adapters_are_trained():
    model = backbone(VIT).train()
    before = copy.deepcopy(model.state_dict())
    total = trainable_parameters(model)[1]
    layers = add_lora(model, rank=2)
    expected = sum(2 * (layer.in_features + layer.out_features) for layer in layers.values())
    assert len(layers) == 2 * 4
    assert trainable_parameters(model) == (expected, total + expected)
    assert expected < 0.1 * total
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # in the first step the gradient of A is 0, as B is
        optimizer.zero_grad()
        model(torch.rand(1, 3, 32, 32)).square().mul(torch.arange(4.0).view(2, 2)[None, None]).sum().backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        if name in before:
            assert torch.equal(value, before[name]), name
        elif name.endswith("lora_b"):
            assert value.abs().max() > 0, name


def test_names_of_the_base_are_kept():
    model = backbone(VIT)
    names = set(model.state_dict())
    add_lora(model, rank=2)
    assert set(model.state_dict()) - names == set(adapter_state_dict(model))
    assert names <= set(model.state_dict())


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("qkv",), {"attn.qkv"}),
        ("fc?", {"mlp.fc1", "mlp.fc2"}),
        (("model.blocks.1.*",), {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),
    ],
)
def test_layers_are_chosen_by_name(targets, expected):
    layers = add_lora(backbone(VIT), rank=2, targets=targets)
    assert {".".join(name.split(".")[-2:]) for name in layers} == expected
    assert {name.split(".")[2] for name in layers} == ({"1"} if "model" in targets[0] else {"0", "1"})


def test_gated_mlps():
    timm = import_timm()
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=1, embed_dim=48, num_heads=2, num_classes=0, mlp_layer=timm.layers.SwiGLU
    )
    assert {"blocks.0.mlp.fc1_g", "blocks.0.mlp.fc1_x", "blocks.0.mlp.fc2"} <= set(add_lora(model, rank=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "at least 1"),
        ({"rank": 2.5}, "whole number"),
        ({"rank": 49}, "at most 48"),
        ({"alpha": 0.0}, "larger than 0"),
        ({"alpha": float("nan")}, "larger than 0"),
        ({"targets": ["query"]}, "linear layers are: fc1, fc2, proj, qkv"),
    ],
)
def test_impossible_adapters_leave_the_network_alone(options, message):
    model = backbone(VIT)
    with pytest.raises(InputError, match=message):
        add_lora(model, **options)
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_are_not_put_on_adapters():
    model = backbone(VIT)
    add_lora(model, rank=2)
    with pytest.raises(InputError, match="merge_lora"):
        add_lora(model, rank=2)


@torch.no_grad()
def test_small_state_carries_all_that_was_learned(tmp_path, x):
    model, other = backbone(VIT), backbone(VIT)
    for each in (model, other):
        add_lora(each, rank=2)
    disturb(model)
    torch.save(adapter_state_dict(model), tmp_path / "adapters.pt")
    torch.save(model.state_dict(), tmp_path / "all.pt")
    assert (tmp_path / "adapters.pt").stat().st_size < 0.3 * (tmp_path / "all.pt").stat().st_size
    load_adapters(other, torch.load(tmp_path / "adapters.pt", weights_only=True))
    assert torch.equal(other(x), model(x))


def test_other_adapters_are_refused():
    model, other = backbone(VIT), backbone(VIT)
    with pytest.raises(InputError, match="no adapters"):
        adapter_state_dict(model)
    add_lora(model, rank=2)
    add_lora(other, rank=3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(InputError, match="another shape.*rank"):
        load_adapters(other, adapter_state_dict(model))
    state = adapter_state_dict(other)
    state.pop(next(iter(state)))
    with pytest.raises(InputError, match="missing"):
        load_adapters(other, state)
    with pytest.raises(InputError, match="1 entries .* weight"):
        load_adapters(other, {**adapter_state_dict(other), "weight": torch.zeros(1)})
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("frozen", [False, True])
def test_confidence_net_with_adapters(tmp_path, frozen):
    torch.manual_seed(0)
    net = ConfidenceNet(3, **NET, adapters={"rank": 4, "alpha": 8, "targets": ["qkv"]}, freeze_backbone=frozen).train()
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {f"head.0.{n}" for n in ("weight", "bias")} | {f"backbone.{n}" for n in adapter_state_dict(net.backbone)}
    assert net.backbone.training is not frozen
    x = torch.rand(1, 3, 64, 96)
    net(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in net.named_parameters() if n.endswith("lora_b"))
    disturb(net)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    other = ConfidenceNet(3, **NET, adapters={"rank": 4, "alpha": 8, "targets": ["qkv"]}).eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    net.eval()
    with torch.no_grad():
        assert torch.equal(other(x), net(x))
        merge_lora(net)
        plain = ConfidenceNet(3, **NET).eval()
        plain.load_state_dict(net.state_dict())  # strict: a merged network is a plain one
        torch.testing.assert_close(plain(x), other(x), atol=1e-5, rtol=1e-4)


def test_weights_go_below_adapters(tmp_path):
    timm = import_timm()
    torch.manual_seed(5)
    model = timm.create_model(NET["backbone"], num_classes=2, **NET["backbone_kwargs"])
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    net = ConfidenceNet(3, **NET, weights=tmp_path / "weights.pt", adapters={"rank": 2})
    assert torch.equal(net.backbone.model.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    assert isinstance(net.backbone.model.blocks[1].attn.qkv, LoRALinear)


def test_what_adapters_cannot_be_combined_with(tmp_path):
    with pytest.raises(InputError, match="frozen"):
        ConfidenceNet(3, **NET, adapters={"rank": 2}, freeze_backbone=True, cache=tmp_path)
    with pytest.raises(InputError, match="rank, alpha and targets"):
        ConfidenceNet(3, **NET, adapters={"r": 2})
