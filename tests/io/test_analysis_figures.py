"""Figures are written, not empty, with the axes they promise."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from PIL import Image

from monai_vslp.io.analysis_figures import draw_eigenfunctions, draw_energies, draw_regularization, write_figure
from monai_vslp.utils.errors import InputError
from monai_vslp.variational import TotalDeepVariation, UnrolledRefinement
from monai_vslp.variational.analysis import eigenfunction, energies_along, regularization_maps, starting_map

COLORS = [[0, 114, 178], [213, 94, 0], [240, 228, 66]]


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    network = TotalDeepVariation(3, features=4, macro_blocks=1, scales=2)
    q = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    return UnrolledRefinement(network, steps=2), q, torch.full((2, 3), 1 / 3)


def check(tmp_path, figure, axes):
    assert len(figure.axes) == axes
    path = write_figure(tmp_path / "figure.png", figure, dpi=60)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > 100 and pixels.std() > 5
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize(
    ("proportions", "trust", "reference", "axes"),
    [(False, math.inf, False, 3), (True, math.inf, False, 4), (True, math.inf, True, 5), (True, 1.0, True, 6)],
)
def test_energies(setting, tmp_path, proportions, trust, reference, axes):
    model, q, p = setting
    path = energies_along(model, q, p if proportions else None, trust, labels=q.argmax(dim=1) if reference else None)
    figure = draw_energies(path, "title")
    check(tmp_path, figure, axes)
    assert "T = 10 (step 2)" in figure.get_suptitle()
    for axis in figure.axes:
        assert any(np.array_equal(line.get_xdata(), [2, 2]) for line in axis.get_lines())  # the stopping time


def test_stopping_time_beyond_the_path_is_not_drawn(setting):
    model, q, p = setting
    figure = draw_energies(energies_along(model, q[:1], p[:1], steps=1))
    assert all(len(axis.get_lines()) == 1 for axis in figure.axes)


def test_regularization(setting, tmp_path):
    model, q, _ = setting
    mass = torch.ones(2, 12, 16)
    mass[:, :3] = 0
    before = TotalDeepVariation(3, features=4, macro_blocks=1, scales=2)
    maps = regularization_maps(before, model, q, mass)
    labels = q.argmax(dim=1)
    labels[:, 5] = 255
    figure = draw_regularization(maps, q, labels, COLORS, ["a", "b", "c"], index=1, mass=mass, unit="nats")
    check(tmp_path, figure, 6)
    first, reference = (axis.get_images()[0].get_array() for axis in figure.axes[:2])
    expected = np.asarray(COLORS)[q[1].argmax(dim=0).numpy()] / 255
    np.testing.assert_allclose(first[3:], expected[3:])
    assert np.ptp(first[:3]) == 0 and np.ptp(reference[5]) == 0
    np.testing.assert_allclose(figure.axes[3].get_images()[0].get_array(), maps.after[1].numpy())


def test_maps_without_energy_can_be_drawn(setting, tmp_path):
    _, q, _ = setting
    zero = torch.zeros(2, 12, 16)
    maps = type(regularization_maps(torch.nn.Flatten(1, 1), torch.nn.Flatten(1, 1), q[:, :1]))(zero, zero)
    check(tmp_path, draw_regularization(maps, q, q.argmax(dim=1), COLORS), 6)


def test_eigenfunctions(setting, tmp_path):
    network = setting[0].regularizer
    found = {
        kind: eigenfunction(network, (12, 12), 3, starting_map(kind, (12, 12), 3), steps=3)
        for kind in ("disc", "triple junction")
    }
    figure = draw_eigenfunctions(found, COLORS)
    check(tmp_path, figure, 6)
    # The start is shown crisp, at the contrast that the eigenfunction shares.
    disc = figure.axes[0].get_images()[0].get_array()
    expected = np.einsum("khw,kc->hwc", starting_map("disc", (12, 12), 3).numpy(), np.asarray(COLORS) / 255)
    np.testing.assert_allclose(disc, expected, atol=1e-4)
    assert f"{found['disc'].eigenvalue:.3g}" in figure.axes[2].get_title()


def test_bad_input_is_refused(setting, tmp_path):
    with pytest.raises(InputError, match="nothing to draw"):
        draw_eigenfunctions({}, COLORS)
    model, q, p = setting
    maps = regularization_maps(model, model, q)
    for colors in (COLORS[:2], [[0, 0]] * 3, [[0, 0, 300]] * 3):
        with pytest.raises(InputError, match="colors"):
            draw_regularization(maps, q, q.argmax(dim=1), colors)
    with pytest.raises(InputError, match="PNG"):
        write_figure(tmp_path / "figure.pdf", draw_energies(energies_along(model, q, p)))
