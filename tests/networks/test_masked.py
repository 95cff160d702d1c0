"""Masked autoencoder: what is hidden, what is seen, what is learned."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from monai_vslp.networks import TokenBackbone
from monai_vslp.networks.masked import (
    MaskedAutoencoder,
    MaskedReconstructionLoss,
    ReconstructedPatches,
    ReconstructionPicture,
    normalized_patches,
    patchify,
    save_backbone,
    unpatchify,
)
from monai_vslp.utils.errors import InputError
from monai_vslp.utils.timm import import_timm

timm = import_timm()

NAME = "vit_tiny_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def small(seed=0, **options):
    torch.manual_seed(seed)
    return MaskedAutoencoder(NAME, **{"backbone_kwargs": SMALL, "decoder_width": 32, "decoder_depth": 1, **options})


@pytest.fixture(scope="module")
def network():
    return small().eval()


def images(count=2, size=(32, 48), seed=0):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def pixels_of(masked, size, patch):
    """Mask of pixels ``[B, 1, H, W]`` of a mask of patches."""
    grid = masked.view(len(masked), 1, size[0] // patch, size[1] // patch)
    return grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def test_patches_are_squares_row_by_row_and_come_back():
    x = images(1, (16, 24))
    patches = patchify(x, 8)
    assert patches.shape == (1, 6, 192)
    torch.testing.assert_close(patches[0, 4], x[0, :, 8:16, 8:16].flatten(), rtol=0, atol=0)
    torch.testing.assert_close(unpatchify(patches, (16, 24), 8), x, rtol=0, atol=0)


def test_targets_have_mean_0_and_variance_1():
    target = normalized_patches(images(), 8)
    torch.testing.assert_close(target.mean(dim=-1), torch.zeros(2, 24), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(dim=-1, unbiased=False), torch.ones(2, 24), atol=5e-3, rtol=0)


def test_neither_a_common_hue_nor_the_noise_of_glass_is_a_target():
    x = images()
    stained = x * 0.5 + torch.tensor([0.5, 0.1, 0.3]).view(3, 1, 1)
    target = normalized_patches(stained, 8)
    torch.testing.assert_close(target, normalized_patches(x * 0.5, 8), atol=1e-4, rtol=1e-4)
    assert target.view(2, 24, 3, 64).mean(dim=(1, 3)).abs().max() < 0.02
    glass = 0.95 + (torch.randint(0, 2, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0)) - 0.5) / 255
    assert normalized_patches(glass, 8).var() < 0.1


@settings(max_examples=20)
@given(st.floats(0.05, 0.95), st.integers(1, 6), st.integers(2, 6))
def test_exactly_the_stated_share_is_hidden(ratio, rows, cols):
    network = small(mask_ratio=ratio)
    masked = network.random_mask(torch.zeros(3, 3, 8 * rows, 8 * cols))
    count = rows * cols
    assert masked.sum(dim=1).tolist() == [min(max(round(ratio * count), 1), count - 1)] * 3


def test_masks_are_uniform_and_follow_the_generator(network):
    x = torch.zeros(4000, 3, 16, 16)
    masked = network.random_mask(x, torch.Generator().manual_seed(1))
    assert torch.equal(masked, network.random_mask(x, torch.Generator().manual_seed(1)))
    assert not torch.equal(masked, network.random_mask(x, torch.Generator().manual_seed(2)))
    assert (masked.float().mean(dim=0) - 0.75).abs().max() < 0.03  # four standard deviations


def test_the_encoder_sees_visible_patches_only(network):
    x, other = images(), images(seed=1)
    masked = network.random_mask(x, torch.Generator().manual_seed(0))
    hidden = pixels_of(masked, x.shape[-2:], 8)
    with torch.no_grad():
        latent = network.encode(x, masked)
        assert latent.shape == (2, 1 + 6, 32)
        assert torch.equal(latent, network.encode(torch.where(hidden, other, x), masked))
        assert not torch.allclose(latent, network.encode(torch.where(hidden, x, other), masked))
    x.requires_grad_()
    network.encode(x, masked).square().sum().backward()
    gradient = x.grad.abs()
    assert gradient[hidden.expand_as(x)].max() == 0
    assert (gradient.sum(dim=1, keepdim=True) * ~hidden).view(2, 1, 4, 8, 6, 8).sum(dim=(3, 5)).count_nonzero() == 12


def test_seeing_everything_is_timms_own_forward(network):
    x = images()
    reference = timm.create_model(NAME, num_classes=0, dynamic_img_size=True, **SMALL).eval()
    reference.load_state_dict(network.encoder.state_dict())
    with torch.no_grad():
        expected = reference.forward_features((x - 0.5) / 0.5)
        torch.testing.assert_close(network.encode(x), expected)
        # Nothing but the hidden patches is missing: the rest keeps its place.
        masked = torch.zeros(2, 24, dtype=torch.bool)
        torch.testing.assert_close(network.encode(x, masked), expected)


def test_where_a_patch_lies_matters_to_encoder_and_decoder(network):
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 4, 4)
    masked = torch.ones(1, 16, dtype=torch.bool)
    one, two = masked.clone(), masked.clone()
    one[0, 2], two[0, 9] = False, False
    with torch.no_grad():
        first, second = network.encode(x, one), network.encode(x, two)
        assert not torch.allclose(first, second)
        predicted = network.decode(first, one, (4, 4))
    assert predicted[0].std(dim=0).max() > 1e-3


def test_loss_is_0_for_a_perfect_prediction_and_counts_hidden_patches_only():
    x = images()
    target = normalized_patches(x, 8)
    masked = torch.zeros(2, 24, dtype=torch.bool)
    masked[0, :6] = masked[1, 3:9] = True
    loss = MaskedReconstructionLoss()
    assert loss(ReconstructedPatches(target, masked), x) == 0
    wrong = torch.where(masked[..., None], target, target + 7)
    assert loss(ReconstructedPatches(wrong, masked), x) == 0
    wrong = torch.where(masked[..., None], target + 2, target)
    torch.testing.assert_close(loss(ReconstructedPatches(wrong, masked), x), torch.tensor(4.0))
    nothing = loss(ReconstructedPatches(torch.zeros_like(target), masked), x)
    assert 0.97 < nothing <= 1
    assert loss(ReconstructedPatches(wrong, torch.zeros_like(masked)), x) == 0


def test_every_weight_learns():
    network = small()
    x = images()
    MaskedReconstructionLoss()(network(x), x).backward()
    idle = [name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert idle == []
    groups = network.parameter_groups(0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    assert all(p.ndim > 1 for p in groups[0]["params"]) and groups[1]["weight_decay"] == 0
    assert any(p is network.encoder.pos_embed for p in groups[1]["params"])


def test_a_tiny_batch_is_learned_by_heart():
    """Four images and fixed masks; a network that cannot place what it predicts stays at about 1."""
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(images(4, (6, 6)), (32, 32), mode="bilinear")
    network = small()
    masked = network.random_mask(x)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, betas=(0.9, 0.95))
    loss = MaskedReconstructionLoss()
    for _ in range(200):
        optimizer.zero_grad()
        value = loss(network(x, masked), x)
        value.backward()
        optimizer.step()
    assert value < 0.1
    _, filled = network.eval().reconstruct(x, masked)
    hidden = pixels_of(masked, (32, 32), 8).expand_as(x)
    assert (filled - x)[hidden].abs().mean() < 0.03
    assert torch.equal(filled[~hidden], x[~hidden])


def test_saved_weights_are_timms_and_load_everywhere(network, tmp_path):
    path = save_backbone(network, tmp_path / "w.safetensors", {"backbone": NAME})
    with safe_open(path, "pt") as file:
        assert file.metadata()["backbone"] == NAME
    reference = timm.create_model(NAME, num_classes=0, **SMALL).state_dict()
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(reference)
        assert all(list(file.get_slice(key).get_shape()) == list(value.shape) for key, value in reference.items())
    backbone = TokenBackbone(NAME, [0, 1], weights=path, **SMALL).eval()
    again = small(seed=1, weights=path).eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(again.encode(x), network.encode(x))
        grid = backbone.model.forward_intermediates(
            (x - 0.5) / 0.5, indices=[1], norm=False, intermediates_only=True, output_fmt="NLC"
        )
        torch.testing.assert_close(again.encoder.norm(grid[0]), network.encode(x)[:, 1:])


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_r_s16_p8_224", "swin_tiny_patch4_window7_224", "test_convnext", "vit_relpos_small_patch16_224"],
)
def test_other_kinds_of_backbones_are_refused(name):
    with pytest.raises(InputError, match="plain vision transformer"):
        MaskedAutoencoder(name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit3_small_patch16_224", {"depth": 1, "embed_dim": 32, "num_heads": 2}),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}),
        ("vit_base_patch16_clip_224", {"depth": 1, "embed_dim": 32, "num_heads": 2}),
        ("vit_small_patch14_reg4_dinov2", {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 224}),
        ("vit_base_patch16_siglip_gap_224", {"depth": 1, "embed_dim": 32, "num_heads": 2}),
    ],
)
def test_families_of_vision_transformers(name, options):
    """Two prefix tokens, registers, norms before the blocks, average pooling: all hide the same."""
    network = MaskedAutoencoder(name, options, decoder_width=32, decoder_depth=1).eval()
    x = images(1, (4 * network.patch, 4 * network.patch))
    masked = network.random_mask(x)
    hidden = pixels_of(masked, x.shape[-2:], network.patch)
    with torch.no_grad():
        latent = network.encode(x, masked)
        assert latent.shape == (1, network.encoder.num_prefix_tokens + 4, network.encoder.embed_dim)
        assert torch.equal(latent, network.encode(x * ~hidden, masked))
        assert network(x).patches.shape == (1, 16, 3 * network.patch**2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "vit_tiny_patch16_242"}, "Did you mean"),
        ({"mask_ratio": 1.0}, "between 0 and 1"),
        ({"decoder_width": 40}, "multiple of 32, got 40; try 32"),
        ({"decoder_depth": 0}, "at least 1 block"),
        ({"std": [1.0, 0.0, 1.0]}, "above 0"),
        ({"backbone_kwargs": {"colour": 1}}, "colour"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(InputError, match=message):
        MaskedAutoencoder(**{"backbone_kwargs": SMALL, **options})


def test_weights_of_another_model_are_refused(network, tmp_path):
    path = save_backbone(network, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="do not fit"):
        MaskedAutoencoder(NAME, {**SMALL, "depth": 3}, weights=path)


def test_sides_that_are_no_multiples_are_refused(network):
    with pytest.raises(InputError, match="multiples of the patch of 8 px.*20 x 32"):
        network(torch.zeros(1, 3, 20, 32))


def test_picture(network, tmp_path):
    x = images(3, (32, 32))
    picture = ReconstructionPicture(network, lambda i: x[i], tmp_path / "p.png", count=3)
    drawn = np.asarray(Image.open(picture()))
    assert drawn.shape == (96, 96, 3) and drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn, picture.draw())
    np.testing.assert_array_equal(drawn[:, :32], np.concatenate([(i * 255).round().byte().permute(1, 2, 0) for i in x]))
    seen, filled = drawn[:, 32:64], drawn[:, 64:]
    assert (seen == 128).all(axis=-1).mean() == pytest.approx(0.75, abs=0.01)
    visible = ~(seen == 128).all(axis=-1)
    np.testing.assert_array_equal(filled[visible], drawn[:, :32][visible])
