"""Scores against scikit-learn, brute force and closed form."""

import warnings

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.handlers import IgniteMetricHandler

import monai_vslp.metrics.segmentation as segmentation
from monai_vslp.metrics.segmentation import ConfusionMatrix, ProportionError, boundary_f1, expected_calibration_error

RNG = np.random.default_rng(0)


def _maps(images=3, classes=4, shape=(17, 23)):
    for _ in range(images):
        pred, target = RNG.integers(0, classes, (2, *shape)).astype(np.uint8)
        pred[RNG.random(shape) < 0.1] = 255
        target[RNG.random(shape) < 0.1] = 255
        yield pred, target


def test_counts_over_a_split_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    matrix, preds, targets, errors, distances = ConfusionMatrix(4), [], [], [], []
    for pred, target in _maps():
        matrix.update(pred, target)
        kept = (pred != 255) & (target != 255)
        preds.append(pred[kept])
        targets.append(target[kept])
        share = [np.bincount(x[kept], minlength=4) / kept.sum() for x in (pred, target)]
        errors.append(np.abs(share[0] - share[1]).mean())
        distances.append(np.maximum(share[0] - share[1], 0).sum())  # mass that must move, each move costs 1
    pred, target = np.concatenate(preds), np.concatenate(targets)
    scores = matrix.compute()
    np.testing.assert_array_equal(matrix.counts, metrics.confusion_matrix(target, pred, labels=range(4)))
    np.testing.assert_allclose(scores.iou, metrics.jaccard_score(target, pred, average=None))
    np.testing.assert_allclose(scores.dice, metrics.f1_score(target, pred, average=None))
    np.testing.assert_array_equal(scores.support, np.bincount(target))
    assert scores.miou == pytest.approx(metrics.jaccard_score(target, pred, average="macro"))
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(target, pred))
    assert scores.proportion_error == pytest.approx(np.mean(errors))
    assert scores.proportion_distance == pytest.approx(np.mean(distances))


def test_class_absent_in_both_is_nan_and_outside_the_mean():
    matrix = ConfusionMatrix(3)
    matrix.update(np.array([[0, 1]]), np.array([[0, 0]]))
    scores = matrix.compute()
    np.testing.assert_allclose(scores.iou, [0.5, 0.0, np.nan])
    np.testing.assert_allclose(scores.dice, [2 / 3, 0.0, np.nan])
    assert scores.miou == pytest.approx(0.25)
    assert scores.accuracy == 0.5
    assert scores.proportion_error == pytest.approx(1 / 3)
    assert scores.proportion_distance == pytest.approx(0.5)


def test_nothing_counted_gives_nan_without_warning():
    matrix = ConfusionMatrix(2)
    matrix.update(np.full((2, 2), 255), np.zeros((2, 2), dtype=int))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = matrix.compute()
    assert all(np.isnan(v) for v in (scores.miou, scores.accuracy, scores.proportion_error, scores.proportion_distance))


def test_merge_equals_one_matrix_and_strips_equal_the_whole(monkeypatch):
    pairs = list(_maps(4))
    whole, first, second = ConfusionMatrix(4), ConfusionMatrix(4), ConfusionMatrix(4)
    for pred, target in pairs:
        whole.update(torch.from_numpy(pred), torch.from_numpy(target))
    monkeypatch.setattr(segmentation, "STRIP", 60)  # two rows at a time
    for index, (pred, target) in enumerate(pairs):
        (first if index % 2 else second).update(pred, target)
    first.merge(second)
    np.testing.assert_array_equal(first.counts, whole.counts)
    assert first.compute().proportion_error == pytest.approx(whole.compute().proportion_error)
    with pytest.raises(ValueError, match="3 classes"):
        whole.merge(ConfusionMatrix(3))


def test_grouped_equals_relabelled_maps():
    table = np.array([0, 1, 1, 0] + [255] * 252, dtype=np.uint8)
    fine, coarse = ConfusionMatrix(4), ConfusionMatrix(2)
    for pred, target in _maps():
        fine.update(pred, target)
        coarse.update(table[pred], table[target])
    united = fine.grouped([[0, 3], [1, 2]])
    np.testing.assert_array_equal(united.counts, coarse.counts)
    assert united.compute().proportion_error == pytest.approx(coarse.compute().proportion_error)


@pytest.mark.parametrize(
    ("pred", "target", "message"),
    [
        (np.zeros((2, 2), int), np.zeros((2, 3), int), "one shape"),
        (np.full((2, 2), 7), np.zeros((2, 2), int), "0 to 1, and 255"),
        (np.zeros((2, 2), int), np.full((2, 2), -1), "target has labels from -1"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), "class indices"),
    ],
)
def test_wrong_maps_are_refused_and_leave_the_counts(pred, target, message):
    matrix = ConfusionMatrix(2)
    with pytest.raises(ValueError, match=message):
        matrix.update(pred, target)
    assert matrix.counts.sum() == 0 and not matrix.differences


def _brute_boundary_f1(pred, target, tolerance):
    def points(labels):
        found = []
        for r, c in np.ndindex(labels.shape):
            around = [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
            inside = [(i, j) for i, j in around if 0 <= i < labels.shape[0] and 0 <= j < labels.shape[1]]
            valid = pred[r, c] != 255 and target[r, c] != 255
            if valid and any(labels[n] != labels[r, c] and pred[n] != 255 and target[n] != 255 for n in inside):
                found.append((r, c))
        return np.array(found, dtype=float).reshape(-1, 2)

    a, b = points(pred), points(target)
    if not len(a) or not len(b):
        return float(len(a) == len(b))
    distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    p, r = (distance.min(1) <= tolerance).mean(), (distance.min(0) <= tolerance).mean()
    return 2 * p * r / (p + r) if p + r else 0.0


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 1.5, 3.0])
def test_boundary_f1_against_brute_force(tolerance):
    for _ in range(5):
        maps = np.repeat(np.repeat(RNG.integers(0, 3, (2, 4, 5)), 4, axis=1), 4, axis=2)
        maps[0, RNG.random((16, 20)) < 0.05] = 255
        assert boundary_f1(*maps, tolerance) == pytest.approx(_brute_boundary_f1(*maps, tolerance))


def test_boundary_f1_is_symmetric_under_flips_and_one_for_equal_maps():
    pred, target = np.zeros((2, 20, 20), dtype=int)
    pred[:, 10:], target[:, 13:] = 1, 1
    assert boundary_f1(target, target) == 1.0
    assert boundary_f1(pred, target, 3) == 1.0
    assert boundary_f1(pred, target, 2) == boundary_f1(pred[:, ::-1], target[:, ::-1], 2) == 0.5
    assert boundary_f1(pred, np.zeros_like(pred)) == 0.0
    assert boundary_f1(np.zeros_like(pred), np.zeros_like(pred)) == 1.0


def test_calibration_error_against_a_loop():
    prob = RNG.dirichlet(np.ones(3), size=(11, 13)).transpose(2, 0, 1)
    target = RNG.integers(0, 3, (11, 13))
    target[0] = 255
    expected, kept = 0.0, target != 255
    confidence, right = prob.max(0)[kept], (prob.argmax(0) == target)[kept]
    for b in range(10):
        inside = (confidence >= b / 10) & (confidence < (b + 1) / 10)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(prob, target, bins=10) == pytest.approx(expected)


def test_calibration_error_at_its_ends():
    certain = np.stack([np.ones((2, 2)), np.zeros((2, 2))])
    assert expected_calibration_error(certain, np.zeros((2, 2), int)) == 0.0
    assert expected_calibration_error(certain, np.ones((2, 2), int)) == 1.0
    assert np.isnan(expected_calibration_error(certain, np.full((2, 2), 255)))
    with pytest.raises(ValueError, match="over target"):
        expected_calibration_error(certain, np.zeros((3, 2), int))


def test_proportion_error_in_an_evaluator():
    batches = [(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.6, 0.4], [0.7, 0.3]])), (torch.eye(2), torch.eye(2))]
    engine = Engine(lambda _, batch: {"pred": batch[0], "given": batch[1]})
    handler = IgniteMetricHandler(metric_fn=ProportionError(), output_transform=lambda out: (out["pred"], out["given"]))
    handler.attach(engine, "proportion_error")
    for _ in range(2):  # a second run starts afresh
        engine.run(batches)
        assert engine.state.metrics["proportion_error"] == pytest.approx((0.1 + 0.1 + 0.3 + 0.3) / 8)


def test_proportion_error_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\[B, C\]"):
        ProportionError()(torch.rand(2, 3), torch.rand(2, 4))
