"""Fine-tuning on an own cohort, from the weights of a trained bundle."""

import json
import shutil

import pytest
import torch
from cases import SMALL_NETWORK, write_two_class_cohort
from monai.bundle import ConfigWorkflow

from monai_vslp.cli import main
from monai_vslp.networks import ConfidenceNet, load_start
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows import train
from monai_vslp.workflows.bundle import read_config

pytestmark = pytest.mark.usefixtures("one_mlflow_database")

TINY = SMALL_NETWORK | {"batch_size": 3, "epochs": 1, "progress": False}
STILL = {"epochs": 2, "learning_rate": 1e-12, "progress": False, "batch_size": 3}  # so that weights are those of the start


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_two_class_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    return train(cohort, cohort.parent / "images", tmp_path_factory.mktemp("runs") / "trained", **TINY)


def weights(run, folder="models"):
    return torch.load(run / folder / "model.pt", weights_only=True)


def close(one, other, head=True):
    return all(torch.allclose(one[key], other[key], atol=1e-6) for key in one if head or not key.startswith("head."))


def test_a_trained_network_goes_on_with_all_its_weights(cohort, trained, tmp_path):
    run = train(cohort, cohort.parent / "images", tmp_path / "run", start=trained, **STILL)
    assert close(weights(run), weights(trained))
    config = read_config(run, "inference.json")
    assert config["backbone_kwargs"] == TINY["backbone_kwargs"] and config["window"] == 32
    assert len(json.loads((run / "models" / "history.json").read_text())) == 2
    command = [
        "--quiet",
        "train",
        str(cohort),
        "--images",
        str(cohort.parent / "images"),
        "--output",
        str(tmp_path / "learned"),
    ]
    assert main([*command, "--start", str(trained), "--epochs", "2", "--batch-size", "3"]) == 0
    assert not close(weights(tmp_path / "learned"), weights(trained)), "at the rate of finetune.json it learns"


def test_other_classes_get_a_new_head(cohort, trained, tmp_path):
    table = tmp_path / "table.csv"
    lines = cohort.read_text().splitlines()
    table.write_text("\n".join(["image,split,patient,pink,purple,blue", *(f"{line},0" for line in lines[1:])]) + "\n")
    run = train(table, cohort.parent / "images", tmp_path / "run", start=trained, **STILL)
    before, after = weights(trained), weights(run)
    backbone = [key for key in before if not key.startswith("head.")]
    assert backbone and all(torch.allclose(before[key], after[key], atol=1e-6) for key in backbone)
    assert any(before[key].shape != after[key].shape for key in before if key.startswith("head."))


def test_with_monai_alone_the_bundle_keeps_its_own_weights(cohort, trained, tmp_path):
    root = tmp_path / "bundle"
    for name in ("configs", "models"):
        shutil.copytree(trained / name, root / name, ignore=shutil.ignore_patterns("checkpoint.pt"))
    workflow = ConfigWorkflow(
        config_file=[str(root / "configs" / name) for name in ("train.json", "finetune.json")],
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(root),
        **STILL,
    )
    workflow.initialize()
    workflow.run()
    assert close(weights(root, "models/finetuned"), weights(trained)) and close(weights(root), weights(trained))


def test_what_cannot_be_a_start(cohort, trained, tmp_path):
    images = cohort.parent / "images"
    with pytest.raises(InputError, match="brings its backbone"):
        train(cohort, images, tmp_path / "a", start=trained, backbone="vit_tiny_patch16_224")
    with pytest.raises(InputError, match="no folder that"):
        train(cohort, images, tmp_path / "b", start=tmp_path)
    run = train(cohort, images, tmp_path / "c", start=trained, **STILL)
    shutil.copytree(trained, tmp_path / "moved")
    with pytest.raises(InputError, match="start"):
        train(cohort, images, run, start=tmp_path / "moved", **STILL)
    three = ConfidenceNet(3, backbone="vit_tiny_patch16_224", **{k: TINY[k] for k in ("backbone_kwargs", "blocks", "window")})
    with pytest.raises(InputError, match="other classes"):
        load_start(three, trained / "models" / "model.pt")
    wider = ConfidenceNet(
        2, backbone="vit_tiny_patch16_224", backbone_kwargs=TINY["backbone_kwargs"] | {"embed_dim": 64}, window=32
    )
    with pytest.raises(InputError, match="does not fit"):
        load_start(wider, trained / "models" / "model.pt")
