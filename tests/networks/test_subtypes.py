"""Subtypes of one tissue are told apart by all of it nearby."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_vslp.networks import ConfidenceNet
from monai_vslp.networks.heads import pool_subtypes
from monai_vslp.utils.errors import InputError

VIT = {"backbone": "vit_tiny_patch16_224", "backbone_kwargs": {"depth": 2, "embed_dim": 48, "num_heads": 2}, "window": 64}


def brute_force(logits, classes, edge):
    """The formula, token by token."""
    u = logits.softmax(dim=1)
    out = u.clone()
    _, _, height, width = logits.shape
    reach = edge // 2
    for row in range(height):
        for column in range(width):
            rows = slice(max(row - reach, 0), row + reach + 1)
            columns = slice(max(column - reach, 0), column + reach + 1)
            near = u[0, list(classes), rows, columns].flatten(1)
            tissue = near.sum(dim=0)
            evidence = ((near / tissue).log() * tissue).sum(dim=1) / tissue.sum()
            out[0, list(classes), row, column] = u[0, list(classes), row, column].sum() * evidence.softmax(dim=0)
    return out


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    classes=st.permutations(range(4)).flatmap(lambda order: st.integers(2, 4).map(lambda k: order[:k])),
    edge=st.sampled_from([1, 3, 5, 15]),
)
def test_against_the_formula(seed, size, classes, edge):
    logits = 3 * torch.randn(1, 4, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = pool_subtypes(logits, classes, edge).exp()
    torch.testing.assert_close(found, brute_force(logits, classes, edge))
    others = [c for c in range(4) if c not in classes]
    torch.testing.assert_close(found[:, others], logits.softmax(dim=1)[:, others])
    torch.testing.assert_close(found.sum(dim=1), torch.ones(1, *size, dtype=torch.float64))


def test_one_token_changes_nothing_and_flips_go_through():
    logits = torch.randn(2, 4, 7, 10)
    torch.testing.assert_close(pool_subtypes(logits, [1, 3], 1), logits.log_softmax(dim=1))
    there = pool_subtypes(logits.flip(-1), [1, 3], 5)
    torch.testing.assert_close(there.flip(-1), pool_subtypes(logits, [1, 3], 5))


def test_a_gland_is_of_one_subtype_and_stroma_has_no_say():
    logits = torch.zeros(1, 3, 1, 9)
    logits[0, 0, 0, 5:] = 20.0  # stroma, which would call its traces of gland malignant
    logits[0, 2, 0, 5:] = 10.0
    logits[0, 1, 0, :5] = torch.tensor([3.0, 3.0, -1.0, 3.0, 3.0])  # one token of a benign gland errs
    logits[0, 0, 0, :5] = -20.0
    found = pool_subtypes(logits, [1, 2], 9).softmax(dim=1)
    assert (found[0, 1, 0, :5] > 0.85).all()
    torch.testing.assert_close(found[0, 0], logits.softmax(dim=1)[0, 0])


def test_no_tissue_and_extreme_logits_stay_finite():
    logits = torch.zeros(1, 3, 6, 6)
    logits[:, 0] = 1e4
    logits.requires_grad_()
    found = pool_subtypes(logits, [1, 2], 5)
    assert found.isfinite().all()
    found.sum().backward()
    assert logits.grad.isfinite().all()
    assert pool_subtypes(logits.half(), [1, 2], 5).dtype == torch.float32


@torch.no_grad()
def test_network_pools_what_it_gives():
    torch.manual_seed(0)
    plain = ConfidenceNet(4, **VIT).eval()
    pooled = ConfidenceNet(4, **VIT, subtypes={"classes": [1, 3], "edge": 3}).eval()
    assert pooled.load_state_dict(plain.state_dict()) and pooled.subtypes == ((1, 3), 3)
    x = torch.rand(1, 3, 80, 96)
    tokens = pool_subtypes(plain.head(plain.features(x)), [1, 3], 3)
    expected = F.interpolate(tokens, scale_factor=plain.stride, mode="bilinear", align_corners=False)
    torch.testing.assert_close(pooled(x), expected[..., :80, :96])
    assert not torch.allclose(pooled(x).softmax(1), plain(x).softmax(1))
    traced = torch.jit.trace(pooled, x)
    torch.testing.assert_close(traced(x), pooled(x))


@pytest.mark.parametrize(
    ("subtypes", "message"),
    [
        ({"classes": [1, 2]}, "keys classes and edge"),
        ([1, 2], "keys classes and edge"),
        ({"classes": [1, 4], "edge": 3}, "from 0 to 3"),
        ({"classes": [1, 1], "edge": 3}, "different indices"),
        ({"classes": ["gland", 1], "edge": 3}, "different indices"),
        ({"classes": [1], "edge": 3}, "two subtypes at least"),
        ({"classes": [1, 2], "edge": 4}, "odd number"),
        ({"classes": [1, 2], "edge": 0}, "odd number"),
    ],
)
def test_bad_subtypes_are_refused(subtypes, message):
    with pytest.raises(InputError, match=message):
        ConfidenceNet(4, **VIT, subtypes=subtypes)
