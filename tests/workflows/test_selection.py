import math

import numpy as np
import pytest
import torch

from monai_vslp.utils.errors import InputError
from monai_vslp.workflows.selection import choose_strength, choose_trust


class Stacks(list):
    """Confidences of noisy halves with their true proportions."""


def stacks(count=4, noise=1.5, bias=0.0):
    g = torch.Generator().manual_seed(0)
    items = Stacks()
    for index in range(count):
        labels = (torch.arange(40)[None].expand(40, 40) < 12 + 4 * index).long()
        truth = torch.nn.functional.one_hot(labels, 2).permute(2, 0, 1).float()
        logits = 2 * truth + noise * torch.randn(3, 2, 40, 40, generator=g)
        logits[:, 0] += bias
        views = torch.softmax(logits, dim=1)
        item = {"stack": views, "mass": torch.ones(40, 40), "image": torch.zeros(3, 40, 40)}
        items.append(item | {"proportions": truth.mean(dim=(1, 2))})
    return items


def test_strength_is_the_largest_that_explains_held_out_proportions():
    choice = choose_strength(stacks(), (0.0, 1.0, 2.0, 200.0), progress=False)
    assert choice.value in (1.0, 2.0)
    assert choice.errors[3] > min(choice.errors) and len(choice.errors) == 4


@pytest.mark.parametrize(("noise", "trusting"), [(0.01, True), (1.5, False)])
def test_trust_follows_how_well_raters_agree(noise, trusting):
    found = stacks(count=8, bias=1.5)  # a network that is wrong about amounts
    rng = np.random.default_rng(1)
    raters = []
    for item in found:
        given = item["proportions"].numpy() * np.exp(noise * rng.normal(size=(3, 2)))
        raters.append(given / given.sum(axis=1, keepdims=True))
    choice = choose_trust(found, raters, 1.0, (0.1, 1.0, 10.0, math.inf), progress=False)
    assert (choice.value >= 10.0) == trusting, str(choice)


def test_trust_needs_two_raters():
    with pytest.raises(InputError, match="no image has two"):
        choose_trust(stacks(2), [np.array([[0.5, 0.5]])] * 2, 1.0, progress=False)
