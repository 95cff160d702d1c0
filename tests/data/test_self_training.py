import numpy as np
import pytest
import torch
from torch import nn

from monai_vslp.data import PseudoLabelTokens, prepare_tokens
from monai_vslp.data.self_training import fill_enclosed
from monai_vslp.utils.errors import InputError


def bags(count=3, views=2):
    g = torch.Generator().manual_seed(0)
    items = []
    for _ in range(count):
        x = torch.randn(views, 2, 8, 10, generator=g)
        p = torch.rand(3, generator=g) + 0.1
        mass = torch.ones(1, 8, 10)
        mass[..., :3] = 0
        items.append({"features": x.half(), "mass": mass, "proportions": p / p.sum()})
    return items


def head():
    torch.manual_seed(0)
    return nn.Conv2d(2, 3, 1)


def tokens(**options):
    return PseudoLabelTokens(bags(), head(), **{"images": 4, "tokens": 6, "length": 5, "progress": False, **options})


def test_targets_meet_the_proportions_on_tissue():
    batches = tokens()
    for item, target in zip(bags(), batches.targets):
        weight = item["mass"] / item["mass"].sum()
        torch.testing.assert_close((target.float() * weight).sum(dim=(1, 2)), item["proportions"], rtol=0, atol=2e-3)
    soft = tokens(trust=0.3)
    gaps = [
        float(((t.float() * i["mass"] / i["mass"].sum()).sum(dim=(1, 2)) - i["proportions"]).abs().max())
        for i, t in zip(bags(), soft.targets)
    ]
    assert max(gaps) > 0.02


def test_batches_are_pairs_of_one_place_on_tissue_and_repeatable():
    batches = tokens()
    batch = batches[2]
    assert batch["image"].shape == (1, 2, 1, 24) and batch["label"].shape == (1, 3, 1, 24)
    torch.testing.assert_close(batch["label"].sum(dim=1), torch.ones(1, 1, 24), rtol=0, atol=2e-3)
    items = bags()
    for column in range(24):
        x, u = batch["image"][0, :, 0, column], batch["label"][0, :, 0, column]
        places = [
            (b, tuple(at.tolist()))
            for b, item in enumerate(items)
            for view in item["features"].float()
            for at in torch.nonzero((view == x[:, None, None]).all(dim=0))
        ]
        assert any(
            torch.equal(batches.targets[b][(slice(None), *at)].float(), u) and items[b]["mass"][(0, *at)] > 0
            for b, at in places
        )
    assert torch.equal(batches[2]["image"], batch["image"]) and not torch.equal(batches[3]["image"], batch["image"])
    batches.set_epoch(1)
    assert not torch.equal(batches[2]["image"], batch["image"])
    inputs, label = prepare_tokens(batch)
    assert torch.equal(inputs, batch["image"]) and torch.equal(label, batch["label"])
    with pytest.raises(IndexError):
        batches[5]


def test_nothing_to_learn_from():
    with pytest.raises(InputError, match="no bags"):
        PseudoLabelTokens([], head(), progress=False)


def test_lumens_belong_to_their_glands():
    labels = np.zeros((12, 14), dtype=np.int64)
    labels[1:6, 1:6] = 1
    labels[3, 3] = 0  # a lumen
    labels[7:12, 7:12] = 2
    labels[8:11, 8:11] = 0  # a larger one
    labels[0:3, 10:14] = 1
    labels[0, 12] = 0  # open at the border
    filled = fill_enclosed(labels, [1, 2], 4)
    expected = labels.copy()
    expected[3, 3] = 1
    assert (filled == expected).all()
    expected[8:11, 8:11] = 2
    assert (fill_enclosed(labels, [1, 2], 9) == expected).all()
    assert (fill_enclosed(labels, [2], 9)[3, 3]) == 0
    assert labels[3, 3] == 0


def test_targets_without_holes_still_meet_the_proportions():
    size = 24
    y, x = np.mgrid[:size, :size] - size / 2
    r = np.hypot(x, y)
    ring = torch.from_numpy((r > 4) & (r < 9)).float()
    item = {
        "features": (4 * ring[None, None] - 2).half(),
        "mass": torch.ones(1, size, size),
        "proportions": torch.tensor([0.55, 0.45]),
    }
    head = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1))
        head.bias.zero_()
    hollow, solid = (
        PseudoLabelTokens([item], head, alpha=0.1, enclosing=classes, progress=False).targets[0].float()
        for classes in ([], [1])
    )
    centre = (slice(11, 13), slice(11, 13))
    assert float(hollow[1][centre].max()) < 0.5 < float(solid[1][centre].min())
    for target in (hollow, solid):
        torch.testing.assert_close(target.mean(dim=(1, 2)), item["proportions"], rtol=0, atol=2e-3)
