import pytest
import torch

from monai_vslp.losses import ActivationMapObjective, AdversarialObjective, AdversarialViews, MaskedObjective, ProportionLoss
from monai_vslp.utils.errors import InputError

P = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.2, 0.3]])


def target():
    mass = torch.ones(2, 1, 8, 8)
    mass[0, :, :, 4:] = 0.0
    return {"proportions": P, "mass": mass}


def check_gradient(objective, channels, views=2):
    torch.manual_seed(0)
    logits = torch.randn(2, views, channels, 4, 4, dtype=torch.float64, requires_grad=True)
    where = {"proportions": P.double(), "mass": target()["mass"].double()}
    assert torch.autograd.gradcheck(lambda z: objective(z, where), logits, atol=1e-6)


def test_presence_by_hand():
    logits = torch.zeros(2, 1, 3, 4, 4)
    logits[0, 0, 1, :, :2], logits[0, 0, 1, :, 2:] = 3.0, -100.0  # no tissue on the right
    ln2 = torch.tensor(2.0).log()
    expected = (5 * ln2 + torch.nn.functional.softplus(torch.tensor(-3.0))) / 6
    torch.testing.assert_close(ActivationMapObjective()(logits, target()), expected)
    sure = torch.where(P > 0, 50.0, -50.0)[:, None, :, None, None].expand(2, 1, 3, 4, 4)
    assert float(ActivationMapObjective()(sure, target())) < 1e-12
    assert float(ActivationMapObjective(threshold=0.22)(sure, target())) > 5, "a fifth counts as absent now"
    check_gradient(ActivationMapObjective(), 3)


def test_masks_and_kinds():
    torch.manual_seed(0)
    # Tokens of one class each, in the right amounts, sure of what they are: nothing is left to gain.
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    labels[0, 1:, :2] = 1
    labels[1] = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]).view(4, 4)
    hot = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2)[:, None].float()
    p = torch.stack([torch.tensor([0.25, 0.75, 0.0]), torch.tensor([8, 3, 5]) / 16])
    branches = torch.cat([200 * hot - 100, 200 * hot - 100], dim=2)
    where = {"proportions": p, "mass": target()["mass"]}
    assert float(MaskedObjective()(branches, where)) < 1e-4
    # Without the presence term it is the proportion loss of the joined map.
    random = torch.randn(2, 1, 6, 4, 4)
    joined = random[:, 0, 3:] + torch.nn.functional.logsigmoid(random[:, 0, :3])
    mass = torch.nn.functional.avg_pool2d(target()["mass"], 2)
    torch.testing.assert_close(MaskedObjective(presence=0.0)(random, target()), ProportionLoss()(joined, P, mass))
    check_gradient(MaskedObjective(), 6)


def test_adversarial_moves_are_worse_than_random_ones():
    torch.manual_seed(0)
    weight = torch.randn(3, 5)

    def head(x):
        return torch.einsum("cf,vfhw->vchw", weight, x)

    x = torch.randn(2, 5, 6, 6)
    views = AdversarialViews(head, radius=0.5)
    clean, moved = views(x).chunk(2)
    torch.testing.assert_close(clean, head(x))
    log_q = clean.log_softmax(dim=1)

    def change(logits):
        return float((log_q.exp() * (log_q - logits.log_softmax(dim=1))).sum(dim=1).mean())

    noise = torch.randn(20, *x.shape)
    noise = 0.5 * noise / noise.norm(dim=2, keepdim=True)
    assert change(moved) > 1.5 * max(change(head(x + r)) for r in noise)
    # The move has the length asked for: undo the linear head on its row space.
    shift = torch.einsum("fc,vchw->vfhw", torch.linalg.pinv(weight), moved - clean)
    assert float(shift.norm(dim=1).max()) <= 0.5 + 1e-4
    assert torch.equal(views(x), views(x)), "the same direction at each call"
    assert torch.equal(*AdversarialViews(lambda x: 0 * x[:, :3])(x).chunk(2)), "nothing to find is no error"


def test_adversarial_objective():
    torch.manual_seed(0)
    clean, moved = torch.randn(2, 1, 3, 4, 4), torch.randn(2, 1, 3, 4, 4)
    mass = torch.nn.functional.avg_pool2d(target()["mass"], 2)
    same = AdversarialObjective(2.0)(torch.cat([clean, clean], dim=1), target())
    torch.testing.assert_close(same, ProportionLoss()(clean[:, 0], P, mass))
    found = AdversarialObjective(2.0)(torch.cat([clean, moved], dim=1), target())
    q, r = clean[:, 0].softmax(dim=1), moved[:, 0].softmax(dim=1)
    kl = (q * (q / r).log()).sum(dim=1, keepdim=True)
    expected = sum((kl[i] * mass[i]).sum() / mass[i].sum() for i in range(2)) / 2
    torch.testing.assert_close(found - same, 2 * expected)


def test_impossible_values():
    with pytest.raises(InputError, match="threshold"):
        ActivationMapObjective(-1.0)
    with pytest.raises(InputError, match="sharpness"):
        MaskedObjective(sharpness=0.0)
    with pytest.raises(InputError, match="weight"):
        AdversarialObjective(-1.0)
    with pytest.raises(InputError, match="radius"):
        AdversarialViews(torch.nn.Identity(), radius=0.0)
