"""The variational stage on maps of a slide: equal to that in memory, resumed, with regions."""

import math

import numpy as np
import pytest
import torch
import zarr

from monai_vslp.inferers import Given, Region, SlideMaps, refine_maps
from monai_vslp.inferers.slide_maps import MAPS_NAME, create_maps
from monai_vslp.inferers.slide_refinement import edge_weight_store
from monai_vslp.transforms import VariationalRefinement
from monai_vslp.utils.errors import InputError
from monai_vslp.variational import image_edge_weight

SHAPE, CLASSES = (96, 128), 3


@pytest.fixture
def maps(tmp_path):
    """Maps of a slide with smooth random confidences and a border without tissue."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.nn.functional.interpolate(torch.randn(1, CLASSES, 12, 16, generator=generator) * 2, SHAPE, mode="bicubic")[0]
    mass = np.ones(SHAPE, np.float32)
    mass[:6] = 0
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 24, 32, generator=generator) * 255, SHAPE)[0].byte().numpy()
    with create_maps(tmp_path / "tiles", CLASSES, SHAPE, spread=False, plan="x") as group:
        group["confidence"][...] = logits.softmax(0).numpy().astype(np.float16) * (mass > 0)
        group["mass"][...], group["image"][...] = mass, image
        values = {"downsample": 4.0, "mpp": 2.0, "slide": "s", "reader": "cucim", "tiles": 1, "tile": 128, "fingerprint": "f"}
        group.attrs.update(values | {"shape": SHAPE, "classes": CLASSES, "level0_shape": (384, 512), "plan": "x"})
    return SlideMaps.read(tmp_path / "tiles" / MAPS_NAME)


def _in_memory(maps, refinement, proportions):
    q = np.asarray(maps.confidence[...], dtype=np.float32)
    q = np.where(q.sum(0) > 0, q / np.maximum(q.sum(0), 1e-6), 1 / CLASSES)
    return refinement(q, proportions, np.asarray(maps.mass[...]), np.asarray(maps.image[...]))


@pytest.mark.parametrize("trust", [math.inf, 3.0])
def test_maps_on_disk_are_refined_like_those_in_memory(maps, trust):
    refinement = VariationalRefinement(pixel_size=4.0, alpha=8.0, trust=trust, tolerance=1e-6)
    found = refine_maps(maps, refinement, Given([0.5, 0.3, 0.2]))
    expected = _in_memory(maps, refinement, [0.5, 0.3, 0.2])
    # A minimiser is flat along borders; its energy is not.
    assert found.refinement["energies"][-1] == pytest.approx(expected.energies[-1], rel=3e-3)
    assert np.abs(np.asarray(found.array("u")[...], np.float32) - expected.u.numpy())[:, 6:].mean() < 1e-2
    assert np.abs(np.array(found.refinement["proportions_refined"]) - expected.proportions.numpy()).max() < 2e-3
    labels = np.asarray(found.array("labels")[...])
    assert (labels[:6] == 255).all() and (labels[6:] == expected.labels.numpy()[6:]).mean() > 0.98
    assert found.refinement["energies"] == sorted(found.refinement["energies"], reverse=True)


def test_a_second_call_finds_the_result_and_other_proportions_do_not(maps):
    refinement = VariationalRefinement(pixel_size=4.0, alpha=2.0)
    first = refine_maps(maps, refinement, Given([0.5, 0.3, 0.2]))
    stamp = (first.path / "zarr.json").stat().st_mtime_ns
    again = refine_maps(maps, refinement, Given([0.5, 0.3, 0.2]))
    assert (again.path / "zarr.json").stat().st_mtime_ns == stamp and again.refinement == first.refinement
    other = refine_maps(maps, refinement, Given([0.2, 0.3, 0.5]))
    assert other.refinement["proportions_refined"] == pytest.approx([0.2, 0.3, 0.5], abs=1e-3)


def test_each_region_meets_its_own_proportions(maps):
    refinement = VariationalRefinement(pixel_size=4.0, alpha=2.0)
    left, right = np.ones((80, 50), bool), np.ones((80, 50), bool)
    right[:10] = False
    regions = [
        Region("left", left, (slice(8, 88), slice(4, 54)), Given([0.7, 0.2, 0.1])),
        Region("right", right, (slice(8, 88), slice(40, 90)), Given([0.1, 0.1, 0.8])),  # overlaps: the first one owns it
    ]
    found = refine_maps(maps, refinement, regions=regions)
    labels, u = np.asarray(found.array("labels")[...]), np.asarray(found.array("u")[...], np.float64)
    assert u[:, 8:88, 4:54].mean(axis=(1, 2)) == pytest.approx([0.7, 0.2, 0.1], abs=2e-3)
    assert u[:, 18:88, 54:90].mean(axis=(1, 2)) == pytest.approx([0.1, 0.1, 0.8], abs=2e-3)
    assert [region["name"] for region in found.regions] == ["left", "right"]
    assert (labels[6:] != 255).all() and (labels[:6] == 255).all(), "every pixel of tissue belongs to a problem"
    whole = u[:, 6:].mean(axis=(1, 2))
    assert found.refinement["proportions_refined"] == pytest.approx(whole, abs=2e-3)
    free = refine_maps(maps, refinement)  # what is far from all regions is as without them
    assert (labels[6:, 110:] == np.asarray(free.array("labels")[6:, 110:])).mean() > 0.95


def test_regions_without_tissue_or_with_one_name_are_refused(maps):
    refinement = VariationalRefinement(pixel_size=4.0, alpha=2.0)
    glass = Region("glass", np.ones((4, 8), bool), (slice(0, 4), slice(0, 8)), Given([0.7, 0.2, 0.1]))
    with pytest.raises(InputError, match="no tissue"):
        refine_maps(maps, refinement, regions=[glass])
    with pytest.raises(InputError, match="different names"):
        refine_maps(maps, refinement, regions=[glass, glass])


def test_edge_weights_by_blocks_are_those_of_the_whole_image(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (3, 1100, 1300)).astype(np.uint8)
    path = edge_weight_store(image, tmp_path / "w.zarr", 2.0)
    expected = image_edge_weight(torch.from_numpy(image), 2.0).numpy()
    assert np.abs(np.asarray(zarr.open_array(str(path))[...], np.float32) - expected).max() < 1e-3
