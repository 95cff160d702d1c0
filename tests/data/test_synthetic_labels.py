import math

import pytest
import torch

from monai_vslp.data.synthetic_labels import degraded_confidence, random_label_map, reference_case
from monai_vslp.metrics import ConfusionMatrix
from monai_vslp.utils.errors import InputError
from monai_vslp.variational import refine


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def miou(labels, truth, classes=3):
    matrix = ConfusionMatrix(classes)
    matrix.update(labels, truth)
    return matrix.compute().miou


@pytest.mark.parametrize("shape", [(64, 96), (1, 1), (130, 33)])
@pytest.mark.parametrize("classes", [2, 5])
def test_label_map_has_shape_range_and_seed(shape, classes):
    labels = random_label_map(shape, classes, seeded())
    assert labels.shape == shape and labels.dtype == torch.int64
    assert int(labels.min()) >= 0
    assert int(labels.max()) < classes
    assert torch.equal(labels, random_label_map(shape, classes, seeded()))


def test_label_maps_differ_in_their_proportions_and_lack_classes_at_times():
    generator = seeded()
    counts = torch.stack(
        [torch.bincount(random_label_map((128, 128), 4, generator, scale=32).flatten(), minlength=4) for _ in range(40)]
    )
    shares = counts.double() / 128**2
    assert float(shares.std(dim=0).min()) > 0.1
    assert bool((counts == 0).any())
    assert bool(((counts > 0).sum(dim=1) >= 2).all())
    assert bool((shares.mean(dim=0) > 0.1).all()), "no class is preferred"


def test_no_class_is_missing_where_none_may_be():
    generator = seeded(1)
    plain = [random_label_map((256, 256), 3, generator, scale=32, absent=0, detail=0) for _ in range(5)]
    assert all(len(labels.unique()) == 3 for labels in plain)


def test_structures_grow_with_scale():
    def boundary(scale):
        labels = random_label_map((256, 256), 4, seeded(2), scale=scale, absent=0)
        return float((labels[:, 1:] != labels[:, :-1]).float().mean())

    assert boundary(128) < 0.5 * boundary(16)


def test_confidence_is_on_the_simplex_and_depends_on_the_seed_alone():
    labels = random_label_map((48, 40), 4, seeded())
    q = degraded_confidence(labels, 4, seeded(3))
    assert q.shape == (4, 48, 40) and q.dtype == torch.float32
    torch.testing.assert_close(q.sum(dim=0), torch.ones(48, 40))
    assert torch.equal(q, degraded_confidence(labels, 4, seeded(3)))
    assert not torch.equal(q, degraded_confidence(labels, 4, seeded(4)))


def test_without_noise_the_row_of_the_confusion_matrix_returns():
    labels = torch.tensor([[0, 1], [2, 1]])
    confusion = torch.tensor([[8.0, 1.0, 1.0], [1.0, 3.0, 6.0], [2.0, 2.0, 6.0]])
    q = degraded_confidence(labels, 3, seeded(), confusion, noise=0, bias=0, correlated_noise=0)
    torch.testing.assert_close(q.permute(1, 2, 0), (confusion / confusion.sum(dim=1, keepdim=True))[labels])


def test_noise_bias_and_correlation_are_what_was_asked_for():
    labels = torch.zeros(256, 256, dtype=torch.int64)
    even = torch.ones(3, 3)
    offset = torch.tensor([0.4, -0.1, -0.3])

    def contrasts(**options):
        q = degraded_confidence(labels, 3, seeded(5), even, bias=offset, **options).log()
        return q[0] - q[1]  # the logits of two classes, free of the normalisation

    white = contrasts(noise=0.7, correlated_noise=0)
    assert float(white.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(white.std()) == pytest.approx(0.7 * math.sqrt(2), rel=0.02)
    smooth = contrasts(noise=0, correlated_noise=0.7, correlation=6) - 0.5
    assert float(smooth.square().mean().sqrt()) == pytest.approx(0.7 * math.sqrt(2), rel=0.1)

    def neighbours(x, lag):
        return float((x[:, lag:] * x[:, :-lag]).mean() / x.square().mean())

    assert abs(neighbours(white - white.mean(), 1)) < 0.02
    assert neighbours(smooth, 1) > 0.9
    assert abs(neighbours(smooth, 40)) < 0.15


def test_reference_case_needs_both_terms():
    """In kind, the synthetic table of the method: argmax, transport and TV alone fail, TV with proportions does not."""
    labels, q, p = reference_case(256, 3, seed=0)
    torch.testing.assert_close(p, torch.bincount(labels.flatten(), minlength=3).double() / labels.numel())
    options = {"alpha": 1.5, "tolerance": 1e-4}
    argmax = miou(q.argmax(dim=0), labels)
    transport = miou(refine(q, p, alpha=0).labels, labels)
    tv = miou(refine(q, None, **options).labels, labels)
    soft = miou(refine(q, p, trust=1.0, **options).labels, labels)
    hard = miou(refine(q, p, **options).labels, labels)
    assert argmax < transport < 0.5
    assert tv < 0.65
    assert tv + 0.15 < soft < hard


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (0, 5)},
        {"shape": (5,)},
        {"classes": 1},
        {"scale": 1.0},
        {"scale": math.nan},
        {"absent": 1.0},
        {"detail": -1.0},
    ],
)
def test_label_map_refuses_bad_input(options):
    with pytest.raises(InputError, match="random_label_map"):
        random_label_map(**{"shape": (32, 32), "classes": 3, "generator": seeded(), **options})


@pytest.mark.parametrize(
    "options",
    [
        {"labels": torch.full((4, 4), 3)},
        {"labels": torch.zeros(4, 4)},
        {"labels": torch.zeros(4, dtype=torch.int64)},
        {"classes": 1},
        {"confusion": torch.eye(3)},
        {"confusion": torch.ones(2, 3)},
        {"noise": -1.0},
        {"correlation": 0.5},
        {"bias": -0.1},
        {"bias": torch.zeros(2)},
    ],
)
def test_confidence_refuses_bad_input(options):
    with pytest.raises(InputError, match="degraded_confidence"):
        degraded_confidence(**{"labels": torch.zeros(4, 4, dtype=torch.int64), "classes": 3, "generator": seeded(), **options})


def test_reference_case_refuses_small_sizes():
    with pytest.raises(InputError, match="reference_case"):
        reference_case(16)
