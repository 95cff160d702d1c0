import torch
from torch import nn

from monai_vslp.handlers import WeightAverage
from monai_vslp.inferers import BagInferer
from monai_vslp.networks.tta import SYMMETRIES, jitter_stain


class Pointwise(nn.Module):
    """Sees each pixel alone, so that every symmetry gives the same aligned map."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Conv2d(4, 2, 1)


class Local(Pointwise):
    """Sees neighbours, so that views differ."""

    def __init__(self, dropout=0.0):
        super().__init__(dropout)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Dropout(dropout))


IMAGES = torch.rand(2, 3, 6, 9, generator=torch.Generator().manual_seed(1))


def test_views_are_mapped_back_exactly():
    net = Pointwise()
    found = BagInferer(views=8)(IMAGES, net)
    assert found.shape == (2, 8, 2, 6, 9)
    expected = net.head(net.features(IMAGES))
    for view in range(8):
        torch.testing.assert_close(found[:, view], expected)


def test_the_teacher_sees_another_stain_with_its_own_weights_and_no_gradient():
    net = Pointwise()
    average = WeightAverage(net, 0.5)
    old = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        net.head.weight.add_(1.0)
    inferer = BagInferer(views=1, teacher=average)
    torch.manual_seed(5)
    found = inferer(IMAGES, net)
    torch.testing.assert_close(found[:, 0], net.head(net.features(IMAGES)))
    _, seed = BagInferer(views=1, teacher=average)._draw(8)
    draw = 2 * torch.rand(2, 3, generator=torch.Generator().manual_seed(seed)) - 1
    teacher = Pointwise()
    teacher.load_state_dict(old)
    stained = jitter_stain(IMAGES, 1 + 0.2 * draw[0], 0.04 * draw[1])
    torch.testing.assert_close(found[:, 1], teacher.head(teacher.features(stained)))
    (found[:, 1] * 0 + found[:, 0]).sum().backward()
    assert net.head.weight.grad is not None, "the swap of weights left the student's backward pass whole"
    assert torch.equal(net.head.weight, old["head.weight"] + 1.0)
    gradient = torch.autograd.grad(inferer(IMAGES, net)[:, 1].sum() + 0 * net.head.weight.sum(), net.head.weight)[0]
    assert (gradient == 0).all()


def test_the_teacher_does_without_dropout_and_leaves_training_mode_alone():
    net = Pointwise(dropout=0.5).train()
    inferer = BagInferer(views=1, teacher=WeightAverage(net, 0.5), stain=0.0)
    found = inferer(IMAGES, net)
    assert net.training and net.features[2].training
    torch.testing.assert_close(found[:, 1], net.eval().head(net.features(IMAGES)))


def test_draws_follow_the_seed_and_the_call_not_what_else_is_drawn():
    """As in processes that share a batch: others draw more or less for dropout in between."""

    def views(dropout, batch):
        net = Local(dropout).train()
        inferer, chosen = BagInferer(views=2), []
        torch.manual_seed(7)
        for step in range(6):
            if step == 3:
                torch.manual_seed(8)  # the next epoch
            inferer(IMAGES[:batch], net)
            chosen.append(inferer._generator.get_state().tolist())
        return chosen

    assert views(0.5, 1) == views(0.0, 2)
    net = Local()
    inferer = BagInferer(views=2)
    torch.manual_seed(7)
    first = [inferer(IMAGES, net) for _ in range(4)]
    torch.manual_seed(8)
    inferer(IMAGES, net)
    torch.manual_seed(7)
    again = [inferer(IMAGES, net) for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(first[0], other) for other in first[1:])


def test_mixed_precision_gives_float32_near_the_full_one():
    net = Local()
    torch.manual_seed(7)
    full = BagInferer(views=2)(IMAGES, net)
    torch.manual_seed(7)
    mixed = BagInferer(views=2, amp=True)(IMAGES, net)
    assert mixed.dtype == torch.float32 and not torch.equal(mixed, full)
    torch.testing.assert_close(mixed, full, atol=0.05, rtol=0.05)
    mixed.sum().backward()
    assert net.head.weight.grad.dtype == torch.float32


def test_cached_features_have_different_views():
    features = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(2, 5, 4, 3, 3)
    net = Pointwise()
    with torch.no_grad():
        net.head.weight.fill_(1.0), net.head.bias.zero_()
    found = BagInferer(views=2, teacher=WeightAverage(net, 0.5))(features, net) / 4
    assert found.shape == (2, 3, 2, 3, 3)
    assert len({round(found[0, view, 0, 0, 0].item()) for view in range(3)}) == 3
    assert len(SYMMETRIES) == 8
