import pytest
import torch
from torch import nn

from monai_vslp.data import PseudoLabelTokens, prepare_tokens
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
