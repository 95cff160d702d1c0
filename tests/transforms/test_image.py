import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from PIL import Image

from monai_vslp.transforms import (
    LoadTissueImage,
    LoadTissueImageD,
    LoadTissueImaged,
    LoadTissueImageDict,
    RandStainJitter,
    RandStainJitterD,
    RandStainJitterd,
    RandStainJitterDict,
    SplitSpreadd,
)
from monai_vslp.utils.errors import ImageReadError


def test_images_load_as_rgb_in_the_unit_interval(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = LoadTissueImage()(tmp_path / "a.png")
    assert image.shape == (3, 5, 7) and image.dtype == torch.float32
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy() * 255, pixels, atol=1e-4)
    out = LoadTissueImaged("image")({"image": str(tmp_path / "a.png")})
    assert torch.equal(out["image"], image) and out["image_path"].endswith("a.png")
    with pytest.raises(ImageReadError):
        LoadTissueImage()(tmp_path / "b.png")
    assert LoadTissueImageD is LoadTissueImageDict is LoadTissueImaged


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, MetaTensor])
def test_stain_jitter_changes_tissue_not_glass_and_keeps_the_type(kind):
    image = torch.tensor([0.8, 0.5, 0.7])[:, None, None].expand(3, 4, 8).clone()
    image[:, :, 4:] = 1.0
    jitter = RandStainJitter(prob=1.0).set_random_state(seed=3)
    changed = jitter(kind(image))
    assert isinstance(changed, type(kind(image)))
    changed = torch.as_tensor(np.asarray(changed))
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1
    assert not torch.allclose(changed[:, :, :4], image[:, :, :4], atol=1e-3)
    torch.testing.assert_close(changed[:, :, 4:], image[:, :, 4:], atol=0.02, rtol=0)


def test_stain_jitter_follows_its_seed_and_probability():
    image = torch.full((3, 4, 4), 0.6)
    chain = Compose([RandStainJitterd("image", prob=1.0)])
    results = []
    for seed in (1, 1, 2):
        chain.set_random_state(seed=seed)
        results.append(chain({"image": image})["image"])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(RandStainJitter(prob=0.0)(image), image)
    assert RandStainJitterD is RandStainJitterDict is RandStainJitterd


def test_the_spread_is_split_off_a_map():
    out = SplitSpreadd("pred")({"pred": torch.arange(12.0).view(3, 2, 2)})
    assert out["pred"].shape == (2, 2, 2) and out["pred_spread"].shape == (1, 2, 2)
    assert float(out["pred_spread"][0, 0, 0]) == 8
