import os
from pathlib import Path

import pytest
import torch

from monai_vslp.networks import TokenBackbone, load_weights
from monai_vslp.utils.errors import InputError
from monai_vslp.utils.timm import import_timm

timm = import_timm()

DATA = Path(os.environ.get("MONAI_VSLP_DATA", Path(__file__).parents[3] / "shared" / "data"))
WEIGHTS = DATA / "weights" / "vit_tiny_patch16_224.safetensors"
SHALLOW = {"depth": 2}
SWIN = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2)}
FAMILIES = [
    ("test_vit", {}, 16),
    ("vit_tiny_patch16_224", SHALLOW, 16),
    ("test_convnext", {}, 8),
    ("swin_tiny_patch4_window7_224", SWIN, 8),
    ("test_resnet", {}, 8),
]


@pytest.mark.parametrize(("name", "options", "stride"), FAMILIES)
def test_one_map_of_all_blocks(name, options, stride):
    backbone = TokenBackbone(name, **options).eval()
    assert backbone.stride == stride
    assert backbone.multiple % stride == 0
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 96, 160))
    assert features.shape == (2, backbone.channels, 96 // stride, 160 // stride)
    assert features.isfinite().all()


def test_default_blocks_of_a_vit_are_middle_ones():
    assert TokenBackbone("vit_tiny_patch16_224").blocks == [3, 5, 8]


def test_features_are_those_of_timm_standardised():
    backbone = TokenBackbone("vit_tiny_patch16_224", blocks=[0, 2], depth=4).eval()
    full = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=4).eval()
    full.load_state_dict(backbone.model.state_dict(), strict=False)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = full.forward_intermediates(x, indices=[0, 2], intermediates_only=True, output_fmt="NCHW")
        features = backbone(x)
    for i, block in enumerate(expected):
        mean, spread = block.mean(dim=1, keepdim=True), block.var(dim=1, keepdim=True, unbiased=False)
        standard = (block - mean) / (spread + 1e-5).sqrt()
        torch.testing.assert_close(features[:, 192 * i : 192 * (i + 1)], standard, atol=1e-4, rtol=1e-4)


def test_norm_can_be_left_out():
    backbone = TokenBackbone("vit_tiny_patch16_224", blocks=[1], norm=False, **SHALLOW).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        (raw,) = backbone.model.forward_intermediates(x, indices=1, intermediates_only=True, output_fmt="NCHW")
        torch.testing.assert_close(backbone(x), raw)


def test_later_blocks_are_removed():
    early = TokenBackbone("vit_tiny_patch16_224", blocks=[0], depth=4)
    late = TokenBackbone("vit_tiny_patch16_224", blocks=[3], depth=4)
    count = [sum(p.numel() for p in backbone.parameters()) for backbone in (early, late)]
    block = sum(p.numel() for p in late.model.blocks[0].parameters())
    assert count[1] - count[0] == 3 * block
    assert not any(key.startswith(("head", "norm")) for key in early.model.state_dict())


def test_unknown_name_suggests_near_ones():
    with pytest.raises(InputError, match="Did you mean vit_tiny_patch16_224"):
        TokenBackbone("vit_tiny_patch17_224")


@pytest.mark.parametrize("blocks", [[], [2], [-1]])
def test_impossible_blocks(blocks):
    with pytest.raises(InputError, match="has blocks 0 to 1"):
        TokenBackbone("vit_tiny_patch16_224", blocks=blocks, **SHALLOW)


def test_options_that_timm_does_not_take():
    with pytest.raises(InputError, match="depht"):
        TokenBackbone("vit_tiny_patch16_224", depht=2)


def test_unknown_tag():
    with pytest.raises(InputError, match=r"nonsense.*local file"):
        TokenBackbone("vit_tiny_patch16_224.nonsense", **SHALLOW)


def test_hub_repository_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hf-hub:organisation/none"):
        TokenBackbone("hf-hub:organisation/none")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", num_classes=7, **SHALLOW).eval()


@pytest.mark.parametrize("nest", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_weights_from_torch_files(tmp_path, model, nest, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(nest(model.state_dict()), path)
    backbone = TokenBackbone("vit_tiny_patch16_224", weights=path, **SHALLOW)
    torch.testing.assert_close(backbone.model.blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight)


def test_weights_from_safetensors(tmp_path, model):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(model.state_dict(), str(tmp_path / "weights.safetensors"))
    backbone = TokenBackbone("vit_tiny_patch16_224", weights=tmp_path / "weights.safetensors", **SHALLOW)
    torch.testing.assert_close(backbone.model.patch_embed.proj.weight, model.patch_embed.proj.weight)


def test_weights_for_another_input_size_are_resampled(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    backbone = TokenBackbone("vit_tiny_patch16_224", weights=tmp_path / "weights.pt", img_size=112, **SHALLOW)
    assert backbone.model.pos_embed.shape == (1, 7 * 7 + 1, 192)
    corners = backbone.model.pos_embed[0, 1:].view(7, 7, 192), model.pos_embed[0, 1:].view(14, 14, 192)
    # A coarse position lies between the fine ones around it.
    torch.testing.assert_close(corners[0].mean(dim=(0, 1)), corners[1].mean(dim=(0, 1)), atol=0.01, rtol=0)


def test_missing_and_misshapen_weights_are_named(tmp_path, model):
    state = dict(model.state_dict())
    del state["blocks.1.attn.qkv.weight"]
    state["blocks.0.attn.proj.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(
        InputError, match=r"1 entries missing, 1 of another shape: blocks.1.attn.qkv.weight .*\[5\] instead of \[192\]"
    ):
        TokenBackbone("vit_tiny_patch16_224", weights=tmp_path / "weights.pt", **SHALLOW)


def test_unreadable_weights(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_weights(tmp_path / "none.pt")
    (tmp_path / "weights.onnx").write_bytes(b"1")
    with pytest.raises(InputError, match="allowed are .safetensors"):
        load_weights(tmp_path / "weights.onnx")
    for suffix in (".pt", ".safetensors"):
        (tmp_path / f"broken{suffix}").write_bytes(b"not a checkpoint")
        with pytest.raises(InputError, match="cannot be read"):
            load_weights(tmp_path / f"broken{suffix}")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(InputError, match="holds a list"):
        load_weights(tmp_path / "list.pt")


def test_files_that_hold_code_are_refused(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(InputError, match="plain state dict"):
        load_weights(tmp_path / "module.pt")


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="no weights file")
def test_real_weights_with_a_foreign_head():
    backbone = TokenBackbone("vit_tiny_patch16_224", weights=WEIGHTS)
    stored = load_weights(WEIGHTS)
    assert stored["head.weight"].shape[0] == 200
    torch.testing.assert_close(backbone.model.blocks[8].attn.qkv.weight, stored["blocks.8.attn.qkv.weight"])
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
