"""Vision transformers, Swin and ConvNeXt by name, as small ones of the same build as the large ones."""

import json

import pytest
import torch

from monai_vslp.networks import ConfidenceNet, TokenBackbone, token_mass
from monai_vslp.utils.errors import InputError
from monai_vslp.utils.timm import import_timm

timm = import_timm()

VIT = ("vit_tiny_patch16_224", {"depth": 4, "embed_dim": 48, "num_heads": 2})
SWIN = ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 2, 2)})
CONVNEXT = ("convnext_tiny", {"depths": (1, 2, 2, 1), "dims": (16, 24, 32, 40), "ls_init_value": 1.0})
FAMILIES = pytest.mark.parametrize("family", [VIT, SWIN, CONVNEXT], ids=["vit", "swin", "convnext"])
BLOCKS = {VIT[0]: "model.blocks.{}", SWIN[0]: "model.layers.{}.blocks.0", CONVNEXT[0]: "model.stages.{}.blocks.0"}

# Options with which the pathology models are built, by their model cards, at small sizes.
UNI = {"init_values": 1e-5, "dynamic_img_size": True}
H_OPTIMUS = {"patch_size": 14, "init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}
VIRCHOW2 = {**H_OPTIMUS, "no_embed_class": False, "mlp_ratio": 5.3375, "mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
PATHOLOGY = pytest.mark.parametrize("options", [UNI, H_OPTIMUS, VIRCHOW2], ids=["uni", "h-optimus", "virchow2"])
SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 2}


def network(family, **more):
    torch.manual_seed(0)
    name, options = family
    return ConfidenceNet(3, backbone=name, backbone_kwargs={**options, **more.pop("backbone_kwargs", {})}, window=64, **more)


@FAMILIES
@torch.no_grad()
def test_all_share_one_grid_with_the_tissue(family):
    net = network(family).eval()
    x = torch.rand(2, 3, 70, 100)
    features = net.features(x)
    assert features.shape[1] == net.backbone.channels and features.isfinite().all()
    assert features.shape[-2:] == token_mass(torch.ones(2, 1, 70, 100), net.stride).shape[-2:]
    assert net(x).shape == (2, 3, 70, 100)
    # Each block's channels are standardised on their own, so that none outweighs another.
    widths = [net.backbone.model.feature_info[block]["num_chs"] for block in net.backbone.blocks]
    assert len(widths) >= 2 and sum(widths) == features.shape[1]
    for part in net.features(x[..., :64, :64]).split(widths, dim=1)[:1]:  # the finest: others are resampled
        torch.testing.assert_close(part.mean(dim=1), torch.zeros_like(part[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(part.var(dim=1, unbiased=False), torch.ones_like(part[:, 0]), atol=1e-2, rtol=0)


def train_once(net, x, target):
    torch.manual_seed(5)  # stochastic depth draws the same
    loss = torch.nn.functional.cross_entropy(net(x), target)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapters", [None, {"rank": 2}], ids=["full", "adapters"])
@FAMILIES
def test_gradient_checkpointing_changes_memory_alone(family, adapters):
    options = {"backbone_kwargs": {"drop_path_rate": 0.3}, "adapters": adapters}
    plain = network(family, **options).train()
    saving = network(family, grad_checkpointing=True, **options).train()
    saving.load_state_dict(plain.state_dict())
    x, target = torch.rand(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    kept, calls = [], []
    for net in (plain, saving):
        block = net.backbone.get_submodule(BLOCKS[family[0]].format(net.backbone.blocks[-1]))
        count = []
        handle = block.register_forward_pre_hook(lambda *_, count=count: count.append(torch.is_grad_enabled()))
        stored = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=stored: (s.append(t.numel()), t)[1], lambda t: t):
            torch.manual_seed(5)
            net(x).sum()
        kept.append(sum(stored))
        count.clear()
        result = train_once(net, x, target)
        handle.remove()
        calls.append(len(count))
        if net is plain:
            expected = result
    assert calls == [1, 2]  # once more on the way back
    assert kept[1] < 0.7 * kept[0]
    assert torch.equal(result[0], expected[0])
    assert result[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(result[1][name], gradient, rtol=1e-5, atol=1e-7)
    assert any(name.startswith("backbone") and gradient.abs().max() > 0 for name, gradient in expected[1].items())


def test_models_that_know_no_checkpointing():
    backbone = TokenBackbone(VIT[0], **VIT[1])

    def refuse(enable=True):
        assert not enable, "gradient checkpointing not supported"

    backbone.model.set_grad_checkpointing = refuse
    with pytest.raises(InputError, match="(?s)gradient checkpointing.*leave out"):
        backbone.set_grad_checkpointing()


@FAMILIES
def test_bfloat16(family):
    net = network(family, adapters={"rank": 2}).train()
    x = torch.rand(1, 3, 64, 96)
    exact = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = net.features(x), net(x)
    assert features.dtype == logits.dtype == torch.float32  # standardised, and interpolated, in full precision
    assert 0 < (logits - exact).abs().max() < 0.1 * exact.abs().max()
    logits.square().sum().backward()
    gradients = [p.grad for name, p in net.named_parameters() if name.endswith("lora_b")]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    assert max(g.abs().max() for g in gradients) > 0


@FAMILIES
def test_safetensors_of_the_whole_model(family, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(8)
    model = timm.create_model(family[0], num_classes=5, **family[1])
    state = model.state_dict()
    save_file(state, str(tmp_path / "model.safetensors"))
    backbone = TokenBackbone(family[0], weights=tmp_path / "model.safetensors", **family[1])
    own = backbone.model.state_dict()
    assert own.keys() <= state.keys() and len(own) > 0.5 * len(state)
    assert all(torch.equal(value, state[name]) for name, value in own.items())
    short = next(name for name in reversed(own) if name.endswith("weight"))
    save_file({name: value for name, value in state.items() if name != short}, str(tmp_path / "short.safetensors"))
    with pytest.raises(InputError, match=r"1 entries missing.*missing\)"):
        TokenBackbone(family[0], weights=tmp_path / "short.safetensors", **family[1])


@pytest.mark.parametrize(
    "name",
    ["MahmoodLab/UNI", "MahmoodLab/UNI2-h", "bioptimus/H-optimus-0", "paige-ai/Virchow2", "prov-gigapath/prov-gigapath"],
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_hub_models_without_a_connection(name, pretrained, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=f"'hf-hub:{name}' cannot be made.*Without a connection.*local file"):
        TokenBackbone(f"hf-hub:{name}", pretrained=pretrained)


def hub_folder(folder, options, **config):
    """A repository as on the hub, with a small model in it; returns the model."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(9)
    built = {key: getattr(timm.layers, value) if key == "mlp_layer" else value for key, value in options.items()}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL, **built).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(std=0.3 if name.endswith("gamma") else 0.05)  # a scale of 1e-5 would hide the blocks
    # Classes cannot be written down: the model card says what to pass by hand.
    written = {key: value for key, value in options.items() if key not in ("mlp_layer", "act_layer")}
    content = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": {**SMALL, **written, "num_classes": 0},
        "pretrained_cfg": {"input_size": [3, 224, 224], "mean": [0.707, 0.579, 0.704], "std": [0.212, 0.23, 0.178]},
        **config,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), str(folder / "model.safetensors"))
    return model


@PATHOLOGY
@torch.no_grad()
def test_copy_of_a_hub_model_in_a_folder(options, tmp_path):
    model = hub_folder(tmp_path / "model", options)
    by_hand = {key: options[key] for key in ("mlp_layer", "act_layer") if key in options}
    backbone = TokenBackbone(f"local-dir:{tmp_path / 'model'}", pretrained=True, **by_hand).eval()
    own = backbone.model.state_dict()
    assert own.keys() <= model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in own.items())
    assert backbone.mean == (0.707, 0.579, 0.704) and backbone.std == (0.212, 0.23, 0.178)
    patch = options.get("patch_size", 16)
    assert backbone.stride == patch and backbone.model.num_prefix_tokens == 1 + options.get("reg_tokens", 0)
    x = torch.randn(1, 3, 224, 224)
    (expected,) = model.forward_intermediates(x, indices=backbone.blocks[-1:], intermediates_only=True, norm=False)
    expected = torch.nn.functional.layer_norm(expected.permute(0, 2, 3, 1), [48]).permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone(x)[:, -48:], expected, atol=1e-4, rtol=1e-4)
    # Windows of another size than the one it was trained with.
    assert backbone(torch.randn(1, 3, 5 * patch, 7 * patch)).shape[-2:] == (5, 7)


@PATHOLOGY
def test_fine_tuned_from_such_a_folder(options, tmp_path):
    hub_folder(tmp_path / "model", options)
    by_hand = {key: options[key] for key in ("mlp_layer", "act_layer") if key in options}
    unit = options.get("patch_size", 16)
    net = ConfidenceNet(
        2,
        backbone=f"local-dir:{tmp_path / 'model'}",
        pretrained=True,
        backbone_kwargs=by_hand,
        window=4 * unit,
        adapters={"rank": 2},
        grad_checkpointing=True,
    ).train()
    net(torch.rand(1, 3, 100, 70)).square().sum().backward()
    gradients = [p.grad.abs().max() for name, p in net.named_parameters() if name.endswith("lora_b")]
    assert len(gradients) == 4 * len(net.backbone.model.blocks) and min(gradients) > 0


def test_options_that_do_not_fit_the_weights_are_found(tmp_path):
    hub_folder(tmp_path / "model", VIRCHOW2)
    with pytest.raises(InputError, match="local-dir"):
        TokenBackbone(f"local-dir:{tmp_path / 'model'}", pretrained=True)  # forgot the gated MLP
    with pytest.raises(InputError, match="SwiGLUPacked"):
        TokenBackbone(f"local-dir:{tmp_path / 'model'}", mlp_layer="SwiGlu")


@pytest.mark.parametrize("damage", ["no folder", "no config", "broken config", "no weights", "broken weights"])
def test_damaged_folders(damage, tmp_path):
    folder = tmp_path / "model"
    if damage != "no folder":
        hub_folder(folder, UNI)
    if damage in ("no config", "no weights"):
        (folder / ("config.json" if damage == "no config" else "model.safetensors")).unlink()
    if damage.startswith("broken"):
        (folder / ("config.json" if "config" in damage else "model.safetensors")).write_bytes(b"{not this")
    with pytest.raises(InputError, match="local-dir"):
        TokenBackbone(f"local-dir:{folder}", pretrained=True)
