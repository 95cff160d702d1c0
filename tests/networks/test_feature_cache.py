import errno

import pytest
import torch
from torch import nn

from monai_vslp.networks import feature_cache
from monai_vslp.networks.feature_cache import FeatureCache


class Counting(nn.Module):
    """A backbone that counts the windows it has seen."""

    def __init__(self, seed=0):
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 8, stride=8)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(self.layer.weight.shape, generator=torch.Generator().manual_seed(seed)))
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return self.layer(x)


def windows(count=4, seed=1):
    return torch.randn(count, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


def test_a_window_is_seen_once_whatever_its_batch(tmp_path):
    backbone = Counting()
    cache = FeatureCache(tmp_path, backbone)
    x = windows()
    first = cache(x)
    torch.testing.assert_close(first, backbone.layer(x), rtol=2e-3, atol=2e-3)
    again = FeatureCache(tmp_path, backbone)
    assert backbone.seen == 4
    assert torch.equal(again(x[[2, 0]]), first[[2, 0]]) and backbone.seen == 4
    mixed = again(torch.cat([x[1:2], windows(1, seed=5)]))
    assert backbone.seen == 5 and torch.equal(mixed[0], first[1])
    assert not first.requires_grad


def test_weights_and_options_have_entries_of_their_own(tmp_path):
    x = windows(1)
    one, other = Counting(0), Counting(3)
    a, b = FeatureCache(tmp_path, one)(x), FeatureCache(tmp_path, other)(x)
    assert other.seen == 1 and not torch.allclose(a, b)
    third = Counting(0)
    FeatureCache(tmp_path, third, options={"blocks": [1]})(x)
    assert third.seen == 1
    assert len(list(tmp_path.rglob("*.pt"))) == 3


def test_a_damaged_entry_is_computed_anew(tmp_path, caplog):
    backbone = Counting()
    cache, x = FeatureCache(tmp_path, backbone), windows(1)
    first = cache(x)
    (path,) = tmp_path.rglob("*.pt")
    path.write_bytes(path.read_bytes()[:40])
    assert torch.equal(cache(x), first) and backbone.seen == 2 and "computed anew" in caplog.text
    assert torch.equal(cache(x), first) and backbone.seen == 2


def test_a_full_disk_costs_time_and_not_the_run(tmp_path, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_cache.torch, "save", full)
    backbone = Counting()
    cache = FeatureCache(tmp_path, backbone)
    first = cache(windows())
    assert torch.equal(cache(windows()), first) and backbone.seen == 8
    assert caplog.text.count("no longer kept") == 1 and not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_do_not_depend_on_who_computed_them(tmp_path, dtype):
    cache, x = FeatureCache(tmp_path, Counting().to(dtype)), windows().to(dtype)
    assert torch.equal(cache(x), cache(x))
