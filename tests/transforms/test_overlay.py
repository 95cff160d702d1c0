"""Overlays and energy pictures: values in closed form, both array types, the dictionary twins."""

import monai.transforms
import numpy as np
import pytest
import torch

from monai_vslp.transforms import overlay
from monai_vslp.transforms.overlay import (
    COLORMAPS,
    NO_TISSUE_COLOR,
    EnergyPicture,
    EnergyPictured,
    LabelOverlay,
    LabelOverlayd,
    default_colors,
)
from monai_vslp.utils.errors import InputError

COLORS = [(255, 0, 0), (0, 0, 255)]


def _halves(size=8):
    labels = np.zeros((1, size, size), dtype=np.uint8)
    labels[..., size // 2 :] = 1
    return labels


def test_fill_outline_and_untouched_pixels():
    image = np.full((3, 8, 8), 100, dtype=np.uint8)
    labels = _halves()
    labels[:, :2] = 255
    picture = LabelOverlay(COLORS, alpha=0.5, outline=1)(image, labels)
    assert picture.shape == (3, 8, 8) and picture.dtype == np.uint8
    assert (picture[:, :2] == 100).all()  # no tissue
    assert picture[:, 5, 0].tolist() == [178, 50, 50]  # half of (100, 100, 100) and red
    assert picture[:, 5, 7].tolist() == [50, 50, 178]
    assert picture[:, 5, 3].tolist() == [255, 0, 0] and picture[:, 5, 4].tolist() == [0, 0, 255]  # each side in its colour
    assert picture[:, 2, 0].tolist() == [255, 0, 0]  # the border with no tissue is drawn on the tissue


def test_outline_width_and_none():
    image = np.zeros((3, 8, 8), dtype=np.uint8)
    for width in (0, 1, 3):
        solid = (LabelOverlay(COLORS, alpha=0, outline=width)(image, _halves()) > 0).any(axis=0)
        assert solid.sum() == 8 * 2 * width


def test_overlay_commutes_with_flips():
    rng = np.random.default_rng(0)
    image, labels = rng.integers(0, 256, (3, 12, 9), dtype=np.uint8), rng.integers(0, 2, (1, 12, 9))
    draw = LabelOverlay(COLORS, outline=2)
    np.testing.assert_array_equal(draw(image, labels)[:, ::-1, ::-1], draw(image[:, ::-1, ::-1], labels[:, ::-1, ::-1]))


def test_float_tensors_give_the_picture_of_uint8():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (3, 6, 6), dtype=np.uint8)
    expected = LabelOverlay(COLORS)(image, _halves(6))
    tensor = LabelOverlay(COLORS)(torch.from_numpy(image) / 255, torch.from_numpy(_halves(6)))
    assert tensor.dtype == torch.uint8
    np.testing.assert_array_equal(tensor.numpy(), expected)


@pytest.mark.parametrize(
    ("image", "labels", "message"),
    [
        (np.zeros((3, 4, 4), np.uint8), np.zeros((1, 4, 5), int), "image must have shape"),
        (np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4), int), "image must have shape"),
        (np.zeros((3, 4, 4), np.uint8), np.full((1, 4, 4), 2), "up to 2, but colours are given for 0 to 1"),
        (np.zeros((3, 4, 4), np.uint8), np.zeros((2, 4, 4), int), "labels must have shape"),
    ],
)
def test_overlay_refuses_what_does_not_fit(image, labels, message):
    with pytest.raises(InputError, match=message):
        LabelOverlay(COLORS)(image, labels)


def test_alpha_outside_the_unit_interval_is_refused():
    with pytest.raises(InputError, match="alpha"):
        LabelOverlay(alpha=1.5)


def test_default_colors_are_distinct():
    assert len({tuple(color) for color in default_colors(30)}) == 30
    assert default_colors(2) == default_colors(30)[:2]
    assert all(0 <= value <= 255 for color in default_colors(30) for value in color)


@pytest.mark.parametrize("name", list(COLORMAPS))
def test_energy_picture_ends_no_tissue_and_clipping(name):
    energy = np.array([[[0.0, 1.0, 2.0, np.nan], [-5.0, 9.0, np.inf, 0.5]]])
    picture = EnergyPicture(0.0, 2.0, name)(energy)
    first, last = COLORMAPS[name][0], COLORMAPS[name][-1]
    assert picture.dtype == np.uint8 and picture.shape == (3, 2, 4)
    assert tuple(picture[:, 0, 0]) == tuple(picture[:, 1, 0]) == first
    assert tuple(picture[:, 0, 2]) == tuple(picture[:, 1, 1]) == last
    assert tuple(picture[:, 0, 3]) == tuple(picture[:, 1, 2]) == NO_TISSUE_COLOR


@pytest.mark.parametrize("name", list(COLORMAPS))
def test_brightness_rises_with_energy_and_matches_matplotlib(name):
    ramp = np.linspace(0, 1, 256)[None]
    picture = EnergyPicture(0, 1, name)(ramp)[:, 0].astype(float)
    assert (np.diff(np.array([0.2126, 0.7152, 0.0722]) @ picture) > -1).all()
    matplotlib = pytest.importorskip("matplotlib")
    expected = 255 * matplotlib.colormaps[name](ramp[0])[:, :3].T
    assert np.abs(picture - expected).max() < 8


def test_scale_from_the_tissue_alone():
    energy = torch.tensor([[0.0, 1.0, 1000.0]])
    mass = torch.tensor([[1.0, 1.0, 0.0]])
    picture = EnergyPicture()(energy, mass)
    assert isinstance(picture, torch.Tensor) and picture.dtype == torch.uint8
    assert tuple(picture[:, 0, 0].tolist()) == COLORMAPS["magma"][0]
    assert tuple(picture[:, 0, 1].tolist()) == COLORMAPS["magma"][-1]
    assert tuple(picture[:, 0, 2].tolist()) == NO_TISSUE_COLOR
    assert (EnergyPicture()(np.full((2, 2), np.nan)) == 225).all()


def test_energy_picture_names_what_is_wrong():
    with pytest.raises(ValueError, match="magma"):
        EnergyPicture(colormap="magmma")
    with pytest.raises(InputError, match="one size"):
        EnergyPicture()(np.zeros((2, 2)), np.zeros((2, 3)))


def test_dictionary_twins_delegate():
    data = {
        "image": np.full((3, 6, 6), 0.5, dtype=np.float32),
        "pred_labels": _halves(6),
        "pred_fidelity_energy": np.random.default_rng(0).random((1, 6, 6)),
        "mass": np.ones((1, 6, 6)),
    }
    out = EnergyPictured(keys="pred_fidelity_energy", vmin=0, vmax=1)(LabelOverlayd(colors=COLORS, alpha=0.3)(data))
    np.testing.assert_array_equal(out["image_overlay"], LabelOverlay(COLORS, alpha=0.3)(data["image"], data["pred_labels"]))
    np.testing.assert_array_equal(
        out["pred_fidelity_energy_picture"], EnergyPicture(0, 1)(data["pred_fidelity_energy"], data["mass"])
    )
    assert out["image"] is data["image"] and "image_overlay" not in data
    with pytest.raises(KeyError):
        EnergyPictured(keys="absent")(data)


def test_names_are_not_monai_names():
    names = [name for name in overlay.__all__ if name.startswith(("Label", "Energy"))]
    assert not [name for name in names if hasattr(monai.transforms, name)]
