import pytest
import torch

from monai_vslp.data.synthetic_labels import random_label_map
from monai_vslp.losses import PatchWasserstein, RefinementLoss
from monai_vslp.utils.errors import InputError


def maps(count=4, classes=3, seed=0, scale=24.0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.stack([random_label_map((48, 48), classes, g, scale=scale) for _ in range(count)])
    return torch.nn.functional.one_hot(labels, classes).permute(0, 3, 1, 2).float()


def test_patch_distance_is_small_between_maps_of_one_style_and_grows_with_noise():
    loss = PatchWasserstein()
    reference = maps(seed=1, count=16)
    torch.manual_seed(0)
    alike = float(loss(maps(seed=2, count=16), reference))
    noisy = [float(loss(torch.lerp(maps(seed=2, count=16), torch.rand(16, 3, 48, 48), t), reference)) for t in (0.2, 0.5)]
    assert 2 * alike < noisy[0] < noisy[1]


def test_patch_distance_of_a_set_to_itself_is_zero():
    loss = PatchWasserstein(samples=10**9)
    assert float(loss(maps(), maps())) == 0.0


def test_patch_distance_does_not_see_class_order_or_amounts():
    loss = PatchWasserstein(samples=10**9)
    torch.manual_seed(0)
    assert float(loss(maps()[:, [2, 0, 1]], maps())) < 1e-6
    flat = torch.full((1, 2, 16, 16), 0.5)
    other = torch.stack([torch.full((16, 16), 0.9), torch.full((16, 16), 0.1)])[None]
    assert float(loss(flat, other)) < 1e-6


def test_patch_distance_against_sorting_by_hand():
    loss = PatchWasserstein(patch=2, scales=1, projections=1, samples=10**9)
    u, v = torch.rand(1, 1, 5, 5), torch.rand(1, 1, 5, 5)
    torch.manual_seed(3)
    found = float(loss(u, v))
    torch.manual_seed(3)
    d = torch.randn(1, 4)
    d = torch.nn.functional.normalize(d - d.mean(), dim=1)
    a, b = (torch.nn.functional.unfold(x, 2)[0].T @ d[0] for x in (u, v))
    assert found == pytest.approx(float((a.sort().values - b.sort().values).abs().mean()), rel=1e-5)


def test_loss_is_least_at_the_target_and_descends():
    target = maps(count=2)
    batch = {"label": target, "reference": target, "mass": torch.ones(2, 48, 48)}
    loss = RefinementLoss(0.5, 0.0)
    logits = torch.zeros(2, 3, 48, 48, requires_grad=True)
    start = float(loss(logits.log_softmax(dim=1), batch))
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(logits.log_softmax(dim=1), batch)
        value.backward()
        optimizer.step()
    assert float(value) < 0.02 < start
    assert bool((logits.argmax(dim=1) == target.argmax(dim=1)).all())


def test_background_does_not_count():
    target = maps(count=1)
    mass = torch.ones(1, 48, 48)
    mass[:, :20] = 0
    u = torch.rand(1, 3, 48, 48).log_softmax(dim=1)
    changed = u.clone()
    changed[:, :, :20] = torch.rand(1, 3, 20, 48).log_softmax(dim=1)
    loss = RefinementLoss(0.5, 0.0)
    batch = {"label": target, "reference": target, "mass": mass}
    assert float(loss(u, batch)) == pytest.approx(float(loss(changed, batch)), rel=1e-6)


def test_impossible_options_are_refused():
    with pytest.raises(InputError, match="patch"):
        PatchWasserstein(patch=0)
    with pytest.raises(InputError, match="at least 0"):
        RefinementLoss(-1.0)
