import pytest
import torch

from monai_vslp.losses import BagObjective
from monai_vslp.losses.proportion import ConsistencyLoss
from monai_vslp.utils.errors import InputError


def bag(views, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, views, 3, 4, 5, generator=generator)
    mass = torch.rand(2, 1, 4, 5, generator=generator)
    return logits, {"proportions": torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]), "mass": mass}


def test_a_teacher_adds_its_disagreement_with_the_first_view():
    logits, target = bag(3)
    without = BagObjective(0.1, 0.5)(logits[:, :2], target)
    term = ConsistencyLoss("squared")(logits[:, 0], logits[:, 2], target["mass"])
    torch.testing.assert_close(BagObjective(0.1, 0.5, 0.7)(logits, target), without + 0.7 * term)


def test_the_teacher_learns_nothing_and_its_proportions_do_not_count():
    logits, target = bag(2)
    logits.requires_grad_()
    BagObjective(0.1, 0.5, 0.7)(logits, target).backward()
    assert (logits.grad[:, 1] == 0).all() and (logits.grad[:, 0] != 0).any()


def test_half_precision_logits_give_a_loss_in_full_precision():
    logits, target = bag(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = BagObjective()(logits.bfloat16(), target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, BagObjective()(logits.bfloat16().float(), target))


def test_what_cannot_be():
    with pytest.raises(InputError, match="teacher"):
        BagObjective(teacher=-1.0)
    logits, target = bag(1)
    with pytest.raises(InputError, match="besides the teacher"):
        BagObjective(teacher=1.0)(logits, target)
