import functools
import json

import numpy as np
import pytest
import torch
from cases import SMALL_BACKBONE, write_small_backbone, write_two_class_cohort

from monai_vslp.data import read_cohort
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows import fit_to_masks, run_benchmark, segment, train
from monai_vslp.workflows.benchmark import plan_benchmark
from monai_vslp.workflows.bound import token_targets

pytestmark = pytest.mark.usefixtures("one_mlflow_database")

OPTIONS = {"backbone_kwargs": SMALL_BACKBONE, "blocks": [0, 1], "window": 32, "rank": 16, "hidden": 8, "epochs": 2}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_two_class_cohort(tmp_path_factory.mktemp("cohort"), train=4, val=4)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_small_backbone(tmp_path_factory.mktemp("weights") / "vit.safetensors")


@pytest.fixture(scope="module")
def trained(cohort, local, tmp_path_factory):
    target = tmp_path_factory.mktemp("runs") / "run"
    return train(cohort, cohort.parent / "images", target, weights=local, progress=False, rounds=0, **OPTIONS)


def held_out(cohort):
    return [record.image for record in read_cohort(cohort, cohort.parent / "images").split("val").records]


def agreement(run, images, masks, output):
    from monai_vslp.workflows import evaluate

    segment(images, run, output, progress=False)
    return evaluate(output, masks)["blocks"][0]["rows"][0]["miou"]


def test_targets_by_hand():
    labels = np.zeros((3, 4), dtype=np.uint8)
    labels[:2, :2] = [[1, 1], [0, 255]]
    found = token_targets(labels, 2, 2)
    expected = torch.tensor([[[0.25, 1.0], [0.5, 0.5]], [[0.5, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(found, expected)


def test_masks_teach_what_proportions_did_not(cohort, trained, tmp_path):
    images, masks = held_out(cohort), cohort.parent / "masks"
    before = (trained / "models" / "model.pt").read_bytes()
    bound = fit_to_masks(trained, tmp_path / "bound", images, masks, epochs=30, progress=False)
    assert (trained / "models" / "model.pt").read_bytes() == before
    scores = [agreement(run, images, masks, tmp_path / f"out{i}") for i, run in enumerate((trained, bound))]
    assert scores[1] >= scores[0] and scores[1] > 0.8
    again = fit_to_masks(trained, tmp_path / "again", images, masks, epochs=30, progress=False)
    one, two = (torch.load(run / "models" / "model.pt", weights_only=True) for run in (bound, again))
    assert all(torch.equal(one[key], two[key]) for key in one)
    backbone = torch.load(trained / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(one[key], backbone[key]) for key in one if not key.startswith("head."))


def test_missing_masks_are_named(cohort, trained, tmp_path):
    (tmp_path / "masks").mkdir()
    with pytest.raises(InputError, match="no mask for i4.png"):
        fit_to_masks(trained, tmp_path / "bound", held_out(cohort), tmp_path / "masks", progress=False)


def test_the_benchmark_crosses_and_trains_each_network_once(cohort, local, tmp_path, monkeypatch):
    from monai_vslp.workflows import benchmark

    config = {
        "data": {"one": {"images": str(cohort.parent / "images"), "masks": str(cohort.parent / "masks"),
                         "tables": {"exact": str(cohort)}, "mpp": 0.5}},
        "noise": ["exact"],
        "seeds": [0],
        "methods": {
            "vslp": {"given": ["none"]},
            "smooth": {"given": ["none"], "segment": {"alpha": 20.0}},
            "bound": {"given": ["none"], "masks": {"folds": 2, "epochs": 10}},
        },
        "shared": {"train": OPTIONS | {"weights": str(local), "rounds": 0}, "segment": {"views": "none"}},
    }  # fmt: skip
    tasks = {task.method: task for task in plan_benchmark(config, tmp_path / "out")}
    folds = tasks["bound"].folds
    assert sorted(set(folds)) == [0, 1] and len(folds) == 4 and tasks["vslp"].folds == ()
    calls, fits = [], []

    def watch(function, found):
        @functools.wraps(function)
        def watched(*arguments, **options):
            found.append(arguments)
            return function(*arguments, **options)

        monkeypatch.setattr(benchmark, function.__name__, watched)

    watch(train, calls)
    watch(fit_to_masks, fits)
    run_benchmark(config, tmp_path / "out", progress=False)
    assert len(calls) == 1, "methods that differ in segmentation share their network"
    inputs = tasks["bound"].inputs
    for fold, (_, _, seen, _) in enumerate(fits):
        assert sorted(seen) == sorted(path for path, its in zip(inputs, folds) if its != fold)
    scores = {m: json.loads((t.folder / "scores.json").read_text())["given"]["none"] for m, t in tasks.items()}
    assert len({str(score["blocks"]) for score in scores.values()}) == 3 and len(scores["bound"]["images"]) == 4
    for masks, message in ({"folds": 1}, "from 2"), ({"folds": 9}, "as many patients"), ({}, "folds"), ({"fold": 2}, "folds"):
        config["methods"]["bound"]["masks"] = masks
        with pytest.raises(InputError, match=message):
            plan_benchmark(config, tmp_path / "out")
