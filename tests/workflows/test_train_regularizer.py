"""Training a regularizer as a user does, and segmenting with it."""

import json
import shutil

import pytest
import torch
from cases import write_two_class_cohort

from monai_vslp.cli import main
from monai_vslp.io.summary import read_summary
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows import segment, train, train_regularizer
from monai_vslp.workflows.bundle import NETWORK, read_config, template

QUICK = {
    "batches": 2,
    "crop": 12,
    "regularizer_batch_size": 2,
    "features": 4,
    "steps": 2,
    "views": "flips",
    "progress": False,
    "pictures": False,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regularizer")
    table = write_two_class_cohort(folder, train=4, val=2)
    run = train(table, folder / "images", folder / "run", epochs=1, mpp=0.5, progress=False)
    return folder, run


@pytest.fixture
def copy(trained, tmp_path):
    folder, run = trained
    return folder, shutil.copytree(run, tmp_path / "run")


def test_the_network_is_made_as_it_was_trained():
    """Whatever shapes the network in the inference config is taken over; the rest changes no weights."""
    network = read_config(template(), "inference.json")["network_def"]
    assert set(network) - set(NETWORK) == {"_target_", "num_classes", "freeze_backbone", "cache"}


def test_train_then_segment_with_what_was_learned(copy, tmp_path):
    folder, run = copy
    out = train_regularizer(run, epochs=2, **(QUICK | {"pictures": True}))
    pictures = sorted(path.name for path in (out / "pictures").iterdir())
    assert pictures == ["eigenfunctions.png", "energies.png", "regularization.png"]
    history = json.loads((out / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2] and (out / "mlflow.db").exists()
    described = json.loads((out / "architecture.json").read_text())
    assert described["regularizer"] == {
        "channels": 2, "features": 4, "macro_blocks": 1, "scales": 3, "image_channels": 3,
    }  # fmt: skip
    kernel = torch.load(out / "model.pt", weights_only=True)["regularizer.analysis.weight"]
    assert float(kernel.mean(dim=(1, 2, 3)).abs().max()) < 1e-6 and float(kernel.flatten(1).norm(dim=1).max()) < 1 + 1e-5
    image = next((folder / "images").glob("i4.*"))
    table = folder / "table.csv"
    segment([image], run, tmp_path / "learned", proportions=table, progress=False)
    learned = read_summary(tmp_path / "learned" / "i4")
    assert "learned" in learned["reason"] and learned["residual"] < 1e-5
    segment([image], run, tmp_path / "tv", proportions=table, regularizer="tv", progress=False)
    assert "energy change" in read_summary(tmp_path / "tv" / "i4")["reason"]


@pytest.mark.slow
def test_an_interrupted_training_ends_as_an_uninterrupted_one(copy, tmp_path, monkeypatch):
    _, run = copy
    whole = shutil.copytree(run, tmp_path / "whole")
    train_regularizer(whole, epochs=3, **QUICK)
    from monai_vslp.handlers import RunCheckpoint

    save = RunCheckpoint.save

    def stop(self, engine):
        save(self, engine)
        if engine.state.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train_regularizer(run, epochs=3, **QUICK)
    assert not (run / "regularizer" / "architecture.json").exists()  # so that segment does not use it yet
    train_regularizer(run, epochs=3, **QUICK)
    one, two = (torch.load(r / "regularizer" / "model.pt", weights_only=True) for r in (whole, run))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("options", [{"class_wise": True}, {"see_image": False}])
def test_other_kinds(copy, options):
    folder, run = copy
    out = train_regularizer(run, epochs=1, **options, **QUICK)
    described = json.loads((out / "architecture.json").read_text())["regularizer"]
    assert described["channels"] == (1 if "class_wise" in options else 2)
    assert described["image_channels"] == (0 if "see_image" in options else 3)
    segment([folder / "images" / "i5.png"], run, run / "out", proportions=folder / "table.csv", progress=False)
    assert "learned" in read_summary(run / "out" / "i5")["reason"]


def test_impossible_wishes_are_refused_before_computing(copy, capsys):
    folder, run = copy
    with pytest.raises(InputError, match="train-regularizer"):
        segment([folder / "images" / "i4.png"], run, run / "out", regularizer="learned", progress=False)
    with pytest.raises(InputError, match="no value named 'colour'"):
        train_regularizer(run, colour=1, **QUICK)
    assert main(["--quiet", "train-regularizer", str(folder / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err
