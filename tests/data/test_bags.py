import numpy as np
import pytest
import torch

from monai_vslp.data import FeatureBagDataset, collate_bags, fingerprint, prepare_bags
from monai_vslp.data.bags import pad_to_multiple
from monai_vslp.inferers import BagInferer, ProportionInferer
from monai_vslp.networks import SYMMETRIES, ConfidenceNet


class Pixelwise(torch.nn.Module):
    """Tokens are means over 4×4 px: whatever the view, the features of a token are the same."""

    stride = 4

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Conv2d(3, 2, 1)

    def features(self, x):
        return torch.nn.functional.avg_pool2d(x, 4)


def bag(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.rand(3, height, width, generator=generator), "proportions": np.array([0.25, 0.75])}


def test_cached_views_are_aligned_on_the_token_grid():
    """Sides that are no multiples of the stride are padded before turning, so the views match token by token."""
    bags = FeatureBagDataset([bag(10, 15)], Pixelwise(), SYMMETRIES, progress=False)
    features = bags[0]["features"].float()
    assert features.shape == (8, 3, 3, 4)
    for view in features[1:]:
        torch.testing.assert_close(view, features[0], atol=2e-3, rtol=0)
    mass = bags[0]["mass"]
    assert mass.shape == (1, 3, 4)
    assert float(mass.sum()) * 16 == pytest.approx(10 * 15)


def test_batches_of_different_sizes_have_no_mass_in_the_padding():
    batch = collate_bags([bag(10, 15), bag(17, 9)], stride=4)
    assert batch["image"].shape == (2, 3, 20, 16)
    assert batch["mass"].sum(dim=(1, 2, 3)).tolist() == [150, 153]
    assert batch["proportions"].shape == (2, 2)
    inputs, target, args, kwargs = prepare_bags(batch)
    assert inputs.dtype == torch.float32 and set(target) == {"mass", "proportions"}
    assert args == () and kwargs["mass"] is target["mass"]
    features = FeatureBagDataset([bag(10, 15), bag(17, 9)], Pixelwise(), SYMMETRIES[:2], progress=False)
    batch = collate_bags([features[0], features[1]])
    assert batch["features"].shape == (2, 2, 3, 5, 4) and batch["mass"].shape == (2, 1, 5, 4)


def test_predicted_proportions_do_not_depend_on_the_padding():
    network = Pixelwise()
    one = collate_bags([bag(12, 16)], stride=4)
    two = collate_bags([bag(12, 16), bag(24, 24, seed=1)], stride=4)
    alone = ProportionInferer()(one["image"], network, mass=one["mass"])
    among = ProportionInferer()(two["image"], network, mass=two["mass"])
    torch.testing.assert_close(alone[0], among[0])


@pytest.mark.parametrize("views", [1, 2, 3])
def test_views_of_an_equivariant_network_agree_and_are_seeded(views):
    network = Pixelwise()
    images = torch.rand(2, 3, 8, 12)
    torch.manual_seed(0)
    first = BagInferer(views)(images, network)
    torch.manual_seed(0)
    assert torch.equal(first, BagInferer(views)(images, network))
    assert first.shape == (2, views, 2, 2, 3)
    for view in range(views):
        torch.testing.assert_close(first[:, view], network.head(network.features(images)))


def test_a_frozen_network_trains_its_head_on_cached_features():
    options = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    network = ConfidenceNet(2, backbone_kwargs=options, blocks=[0, 1], window=16, freeze_backbone=True)
    bags = FeatureBagDataset([bag(20, 30)], network, SYMMETRIES[:2], progress=False)
    batch = collate_bags([bags[0]])
    BagInferer(2)(batch["features"].float(), network).sum().backward()
    assert all(parameter.grad is None for parameter in network.backbone.parameters())
    assert all(parameter.grad is not None for parameter in network.head.parameters())


def test_fingerprint_tells_bags_apart():
    items = [{"image": "a.png", "proportions": [0.5, 0.5]}, {"image": "b.png", "proportions": [0.1, 0.9]}]
    assert fingerprint(items) == fingerprint([dict(item) for item in items])
    assert fingerprint(items) != fingerprint(items[:1])
    assert fingerprint(items) != fingerprint([items[0], items[1] | {"proportions": [0.2, 0.8]}])


def test_padding_repeats_the_edge_and_has_no_mass():
    image, mass = pad_to_multiple(torch.rand(3, 5, 6), torch.ones(1, 5, 6), 4)
    assert image.shape == (3, 8, 8) and mass.shape == (1, 8, 8)
    assert torch.equal(image[:, 5:, :6], image[:, 4:5, :6].expand(-1, 3, -1))
    assert mass.sum() == 30
