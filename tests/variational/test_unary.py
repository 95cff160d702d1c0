"""Costs that a person adds, such as strokes of a brush: part of the energy like those of the confidences."""

import pytest
import torch
from cases import noisy_confidence

from monai_vslp.utils.errors import InputError
from monai_vslp.variational import refine

SIZE = (48, 56)


def stroke(label, rows, columns, cost=20.0, classes=3):
    """Costs ``[C, H, W]`` of all classes but one on a rectangle."""
    unary = torch.zeros(classes, *SIZE)
    unary[:, rows, columns] = cost
    unary[label, rows, columns] = 0.0
    return unary


def test_unary_costs_act_as_confidences_that_contain_them():
    """-log(q') = -log q + c up to a constant per pixel, which moves no minimiser."""
    q, p = noisy_confidence(SIZE)
    unary = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(1))
    tilted = q.double() * torch.exp(-unary.double())
    options = {"alpha": 1.0, "delta": 1e-12, "tolerance": 1e-9, "multigrid": False}
    got = refine(q.double(), p, unary=unary, **options)
    expected = refine(tilted / tilted.sum(dim=0), p, **options)
    torch.testing.assert_close(got.u, expected.u, atol=2e-3, rtol=0)


@pytest.mark.parametrize("multigrid", [False, True])
def test_what_is_painted_becomes_that_class_and_the_proportions_still_hold(multigrid):
    q, p = noisy_confidence(SIZE)
    before = refine(q, p, alpha=1.0)
    rows, columns = slice(10, 20), slice(12, 26)
    label = int((before.labels[rows, columns].flatten().mode().values + 1) % 3)
    after = refine(q, p, alpha=1.0, unary=stroke(label, rows, columns), multigrid=multigrid)
    assert (before.labels[rows, columns] == label).float().mean() < 0.5
    assert (after.labels[rows, columns] == label).all()
    torch.testing.assert_close(after.proportions, (p / p.sum()).double(), atol=1e-5, rtol=0)
    assert (after.psi[label] - before.psi[label]) < (after.psi - before.psi).max(), "elsewhere the class gives way"


def test_a_class_of_proportion_0_does_not_occur_even_where_it_is_painted():
    q, _ = noisy_confidence(SIZE)
    result = refine(q, [0.5, 0.5, 0.0], alpha=1.0, unary=stroke(2, slice(0, 9), slice(0, 9)))
    assert (result.labels != 2).all()


def test_a_batch_takes_one_map_of_costs_or_one_each():
    q, p = noisy_confidence(SIZE)
    unary = stroke(0, slice(5, 15), slice(5, 15))
    single = refine(q, p, unary=unary)
    both = refine(torch.stack([q, q]), p, unary=torch.stack([unary, torch.zeros_like(unary)]))
    torch.testing.assert_close(both.u[0], single.u)
    torch.testing.assert_close(both.u[1], refine(q, p).u)


def test_costs_that_cannot_be_used_are_refused():
    q, p = noisy_confidence(SIZE)
    with pytest.raises(InputError, match="unary must have shape"):
        refine(q, p, unary=torch.zeros(2, *SIZE))
    with pytest.raises(InputError, match="finite"):
        refine(q, p, unary=torch.full((3, *SIZE), torch.inf))
