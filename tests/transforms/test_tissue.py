import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from monai_vslp.data.slides import open_slide
from monai_vslp.data.synthetic import synthetic_image, write_slide
from monai_vslp.transforms import TissueMask, TissueMaskD, TissueMaskd, TissueMaskDict
from monai_vslp.utils.errors import InputError

DATA = Path(os.environ.get("MONAI_VSLP_DATA", Path(__file__).parents[3] / "shared" / "data"))


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_tissue_of_a_synthetic_slide(tmp_path):
    slide = write_slide(tmp_path / "s.tif", shape=(4096, 4096))
    with open_slide(slide.path) as opened:
        thumbnail = opened.thumbnail(downsample=16)
    mask = TissueMask(mpp=8.0)(np.moveaxis(thumbnail, -1, 0))
    assert mask.shape == (1, *thumbnail.shape[:2]) and mask.dtype == bool
    truth = np.array(Image.open(slide.mask))[2::4, 2::4] != 255
    assert overlap(mask[0], truth) > 0.95


@pytest.mark.parametrize("shares", [*np.eye(5), [0.5, 0.3, 0.2, 0, 0], [0.09, 0, 0.06, 0, 0.85]])
def test_pictures_of_nothing_but_tissue(shares):
    """A threshold between two groups must not invent a second one, nor take fat beside dense tissue for glass."""
    for seed in (1, 2, 14):
        image = synthetic_image((256, 256), shares, seed=seed).image
        assert TissueMask(mpp=1.0)(np.moveaxis(image, -1, 0)).mean() > 0.97


@pytest.mark.parametrize("mpp", [0.25, 1.0, 8.0])
@pytest.mark.parametrize("noise", [0, 3, 10])
def test_pictures_of_nothing_but_glass(mpp, noise):
    glass = np.random.default_rng(0).normal(240, noise, (3, 128, 160)).clip(0, 255).astype(np.uint8)
    assert not TissueMask(mpp=mpp)(glass).any()


def test_glass_in_a_small_picture_is_no_hole():
    tissue = synthetic_image((256, 256), [1, 0, 0, 0, 0], seed=3).image
    tissue[:, 128:] = 243
    mask = TissueMask(mpp=0.5)(np.moveaxis(tissue, -1, 0))[0]
    assert mask[:, :120].all() and not mask[:, 180:].any()


@pytest.mark.parametrize("ink", [(30, 140, 70), (50, 80, 200), (215, 30, 35), (20, 20, 20)])
def test_pen_is_no_tissue(ink):
    image = np.full((3, 400, 400), 240, dtype=np.uint8)
    image[:, 100:140, 20:380] = np.array(ink)[:, None, None]
    image[:, 200:300, 100:300] = np.array([200, 120, 170])[:, None, None]
    mask = TissueMask(mpp=8.0)(image)[0]
    assert mask[205:295, 105:295].all()
    assert mask[80:160].mean() < 0.1


@pytest.mark.parametrize("colour", [(190, 60, 90), (95, 60, 140), (110, 80, 150)])
def test_blood_and_crowded_nuclei_are_no_pen(colour):
    image = np.full((3, 400, 400), 240, dtype=np.uint8)
    image[:, 100:300, 100:300] = np.array(colour)[:, None, None]
    assert TissueMask(mpp=8.0)(image)[0, 105:295, 105:295].all()


def test_wrong_images_are_refused():
    with pytest.raises(InputError, match="RGB"):
        TissueMask()(np.zeros((4, 8, 8), dtype=np.uint8))
    with pytest.raises(InputError, match="divide by 255"):
        TissueMask()(np.full((3, 8, 8), 200.0))
    with pytest.raises(InputError, match="mpp"):
        TissueMask(mpp=0)


def test_lumina_belong_and_specks_and_black_borders_do_not():
    image = np.full((3, 200, 200), 240, dtype=np.uint8)
    image[:, 40:160, 40:160] = np.array([200, 120, 170])[:, None, None]
    image[:, 90:100, 90:100] = 240
    image[:, 5:8, 100:103] = 100
    image[:, :, 195:] = 0
    mask = TissueMask(mpp=8.0, smooth=8.0)(image)[0]
    assert mask[95, 95] and not mask[6, 101] and not mask[:, 190:].any()


def test_types_and_dictionary_twin():
    image = torch.from_numpy(np.moveaxis(synthetic_image((64, 64), [1, 0, 0, 0, 0], seed=2).image, -1, 0).copy())
    bytes_, floats = TissueMask(mpp=1.0)(image), TissueMask(mpp=1.0)(image / 255.0)
    assert bytes_.float().mean() > 0.97
    assert isinstance(bytes_, torch.Tensor) and bytes_.dtype == torch.bool and torch.equal(bytes_, floats)
    out = TissueMaskd("image", mpp=1.0)({"image": image})
    assert torch.equal(out["mass"], bytes_)
    assert TissueMaskD is TissueMaskDict is TissueMaskd


@pytest.mark.skipif(not (DATA / "slides").is_dir(), reason="the real slides are not here")
def test_tissue_of_a_real_section():
    with open_slide(DATA / "slides" / "crc_section.tif", mpp=0.5) as slide:
        mask = TissueMask(mpp=8.0)(np.moveaxis(slide.thumbnail(downsample=16), -1, 0))[0]
    truth = np.array(Image.open(DATA / "slides" / "crc_section_tissue_ds16.png")) > 0
    rows, columns = (min(a, b) for a, b in zip(mask.shape, truth.shape))
    assert overlap(mask[:rows, :columns], truth[:rows, :columns]) > 0.88


def test_scanned_glass_beside_what_the_scanner_left_out_is_no_tissue():
    """Scanners fill with pure white what they leave out; glass is a little darker, here with a tint and noise."""
    generator = np.random.default_rng(5)
    image = np.full((3, 160, 200), 255.0)
    image[:, 30:150, 20:180] = np.array([243.0, 236.0, 240.0])[:, None, None] + generator.normal(0, 1.5, (3, 120, 160))
    image[:, 60:110, 60:130] = np.array([190.0, 120.0, 170.0])[:, None, None] + generator.normal(0, 12, (3, 50, 70))
    mask = TissueMask(mpp=8.0)(image.clip(0, 255).astype(np.uint8))[0]
    tissue = np.zeros((160, 200), dtype=bool)
    tissue[60:110, 60:130] = True
    assert (mask & tissue).sum() / (mask | tissue).sum() > 0.9
