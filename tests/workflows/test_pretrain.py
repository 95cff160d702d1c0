"""Pretraining as a user does, and training with what was learned."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import write_two_class_cohort
from PIL import Image

from monai_vslp.handlers import RunCheckpoint
from monai_vslp.networks import load_weights
from monai_vslp.utils.errors import ImageReadError, InputError
from monai_vslp.workflows import train
from monai_vslp.workflows.bundle import template
from monai_vslp.workflows.pretrain import pretrain

NAME = "vit_tiny_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY = {
    "backbone_kwargs": SMALL,
    "decoder_width": 32,
    "decoder_depth": 1,
    "tile": 32,
    "tiles": 8,
    "batch_size": 4,
    "learning_rate": 3e-3,
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_two_class_cohort(tmp_path_factory.mktemp("cohort"))


def run(cohort, output, **options):
    return pretrain(cohort.parent / "images", output, **{"epochs": 3, "progress": False, **TINY, **options})


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory):
    return run(cohort, tmp_path_factory.mktemp("pretrained") / "run", epochs=6)


def test_the_loss_falls_and_everything_is_left_in_the_folder(finished):
    folder = finished.parents[1]
    assert finished == folder / "models" / "backbone.safetensors"
    history = json.loads((folder / "models" / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["learning_rate"] < 1e-9 < history[0]["learning_rate"] < 3e-3
    picture = np.asarray(Image.open(folder / "reconstructions.png"))
    assert picture.shape == (4 * 32, 3 * 32, 3)
    assert (picture[:, 32:64] == 128).all(axis=-1).mean() == pytest.approx(0.75, abs=0.01)


def test_train_loads_what_was_learned(cohort, finished, tmp_path):
    """The frozen backbone of the training is, weight by weight, the one pretrained."""
    trained = train(
        cohort, cohort.parent / "images", tmp_path / "run", backbone=NAME, weights=finished, epochs=1, progress=False,
        backbone_kwargs=SMALL, blocks=[0, 1], window=32,
    )  # fmt: skip
    learned = load_weights(finished)
    state = torch.load(trained / "models" / "model.pt", weights_only=True)
    kept = {key.removeprefix("backbone.model."): value for key, value in state.items() if key.startswith("backbone.model.")}
    assert len(kept) > 20
    assert all(torch.equal(value, learned[key]) for key, value in kept.items())


def test_weights_of_a_run_start_the_next(cohort, finished, tmp_path):
    start = load_weights(finished)
    still = load_weights(run(cohort, tmp_path / "still", epochs=1, weights=finished, learning_rate=1e-12, weight_decay=0.0))
    assert all(torch.allclose(start[key], still[key], atol=1e-6) for key in start)
    fresh = load_weights(run(cohort, tmp_path / "fresh", epochs=1, learning_rate=1e-12))
    assert not torch.allclose(start["blocks.0.attn.qkv.weight"], fresh["blocks.0.attn.qkv.weight"], atol=1e-3)


def test_tracked_in_mlflow(finished):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished.parents[1] / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "monai_vslp_pretrain"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["tile"] == "32"
    assert len(client.get_metric_history(found.info.run_id, "loss")) == 6
    names = {f.path for folder in ("config", "pictures") for f in client.list_artifacts(found.info.run_id, folder)}
    assert {"config/metadata.json", "pictures/reconstructions.png"} <= names
    assert any(name.startswith("config/config_") for name in names), "the config as it was executed"


@pytest.mark.parametrize("finish_epoch", [False, True])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(cohort, finished, tmp_path, monkeypatch, finish_epoch):
    """Stopped after an epoch was saved, or in the middle of one."""
    save = RunCheckpoint.save

    def stop(self, engine):
        if finish_epoch or engine.state.epoch < 3:
            save(self, engine)
        if engine.state.epoch == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(cohort, tmp_path / "run", epochs=6)
    assert not (tmp_path / "run" / "models" / "backbone.safetensors").exists()
    expected, found = load_weights(finished), load_weights(run(cohort, tmp_path / "run", epochs=6))
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    history = (tmp_path / "run" / "models" / "history.json").read_text()
    assert history == (finished.parent / "history.json").read_text()


def test_other_settings_or_images_do_not_continue_a_run(cohort, tmp_path):
    first = load_weights(run(cohort, tmp_path / "run", epochs=1))
    with pytest.raises(InputError, match="seed.*--restart"):
        run(cohort, tmp_path / "run", epochs=1, seed=3)
    with pytest.raises(InputError, match="images"):
        pretrain([cohort.parent / "images" / "i0.png"], tmp_path / "run", **TINY, epochs=1, progress=False)
    second = load_weights(run(cohort, tmp_path / "run", epochs=1, seed=3, restart=True))
    assert not torch.equal(first["pos_embed"], second["pos_embed"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 36}, "multiple of the backbone's patch of 8 px, got 36; try 32"),
        ({"tile": 8}, "got 8; try 16"),
        ({"backbone": "vit_tiny_patch16_242"}, "Did you mean"),
        ({"backbone": "test_convnext", "backbone_kwargs": {}}, "plain vision transformer"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"colour": 1}, "no value named 'colour'"),
        ({"weights": "gone.safetensors"}, "gone.safetensors does not exist"),
    ],
)
def test_impossible_wishes_are_refused_before_computing(cohort, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(cohort, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_bad_images_and_folders_are_refused_before_computing(cohort, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images or slides"):
        pretrain(tmp_path / "empty", tmp_path / "run", **TINY)
    image = cohort.parent / "images" / "i0.png"
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:2000])
    with pytest.raises(ImageReadError, match=r"cut\.png"):
        pretrain([image, tmp_path / "cut.png"], tmp_path / "run", **TINY)
    assert not (tmp_path / "run").exists()
    # Not even --restart empties a folder that holds something else.
    (tmp_path / "other" / "models").mkdir(parents=True)
    (tmp_path / "other" / "models" / "model.pt").write_text("precious")
    with pytest.raises(InputError, match="other files"):
        run(cohort, tmp_path / "other", restart=True)
    assert (tmp_path / "other" / "models" / "model.pt").read_text() == "precious"


@pytest.mark.slow
def test_the_template_runs_with_monai_bundle_run(cohort, tmp_path):
    command = [
        sys.executable, "-m", "monai.bundle", "run", "--config_file", str(template() / "configs" / "pretrain.json"),
        "--meta_file", str(template() / "configs" / "metadata.json"), "--bundle_root", str(tmp_path), "--epochs", "1",
        "--images", str(cohort.parent / "images"), "--progress", "False", "--backbone_kwargs", json.dumps(SMALL),
        "--tile", "32", "--tiles", "8", "--batch_size", "4", "--decoder_width", "32", "--decoder_depth", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "models" / "backbone.safetensors").exists()
