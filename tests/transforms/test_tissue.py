import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from monai_vslp.data.slides import open_slide
from monai_vslp.data.synthetic import synthetic_image, write_slide
from monai_vslp.transforms import TissueMask, TissueMaskD, TissueMaskd, TissueMaskDict

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
    assert overlap(mask[0], truth) > 0.88


def test_all_tissue_and_no_tissue():
    """A threshold between two groups must not invent a second one."""
    tissue = synthetic_image((256, 256), [0.5, 0.3, 0.2, 0, 0], seed=1).image
    assert TissueMask(mpp=1.0)(np.moveaxis(tissue, -1, 0)).mean() > 0.97
    glass = np.full((3, 128, 128), 243) + np.random.default_rng(0).normal(0, 2, (3, 128, 128))
    assert TissueMask()(glass.astype(np.uint8)).mean() == 0


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
    assert overlap(mask[:rows, :columns], truth[:rows, :columns]) > 0.9
