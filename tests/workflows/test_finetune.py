"""Training a backbone from proportions: adapters, rates, precision, teachers, stopping, and models of the hub's format."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import write_two_class_cohort
from monai.bundle import ConfigParser
from safetensors.torch import save_file

from monai_vslp.cli import main
from monai_vslp.networks import SYMMETRIES, ConfidenceNet
from monai_vslp.networks.adapters import LoRALinear
from monai_vslp.networks.hub import open_backbone
from monai_vslp.utils.errors import InputError
from monai_vslp.utils.timm import import_timm
from monai_vslp.workflows import segment, train
from monai_vslp.workflows.bundle import read_config

pytestmark = pytest.mark.usefixtures("one_mlflow_database")

KWARGS = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32}
VIT = {"backbone": "vit_tiny_patch16_224", "backbone_kwargs": KWARGS, "blocks": [0, 2], "window": 32}
SWIN = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_kwargs": {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 2]},
    "window": 64,
}
CONVNEXT = {
    "backbone": "convnext_tiny",
    "backbone_kwargs": {"depths": [1, 1, 2, 1], "dims": [16, 24, 32, 48]},
    "window": 64,
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_two_class_cohort(tmp_path_factory.mktemp("cohort"))


def model(options=VIT):
    torch.manual_seed(3)
    return import_timm().create_model(options["backbone"], **options["backbone_kwargs"])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(model().state_dict(), str(path))
    return path


def run(cohort, output, options=VIT, **more):
    given = {"epochs": 2, "batch_size": 3, "progress": False, "finetune": True, **options, **more}
    return train(cohort, cohort.parent / "images", output, **given)


def state(run, name="model.pt"):
    return torch.load(run / "models" / name, weights_only=True)


def history(run):
    return json.loads((run / "models" / "history.json").read_text())


def inference_network(run):
    net = ConfigParser(read_config(run, "inference.json")).get_parsed_content("network_def")
    net.load_state_dict(state(run))
    return net.eval()


def test_adapters_are_merged_into_what_segment_uses(cohort, weights, tmp_path):
    """The inference config knows nothing of adapters, and its network gives the map of the one that was trained."""
    adapters = {"rank": 2, "alpha": 8.0, "targets": ["qkv", "fc*"]}
    done = run(
        cohort, tmp_path / "run", weights=weights, adapters=adapters, learning_rate=0.02, head_epochs=0, average_decay=0.5
    )
    checkpoint = state(done, "checkpoint.pt")
    assert not any("lora" in name for name in state(done)) and "adapters" not in read_config(done, "inference.json")
    config = ConfigParser(read_config(done, "train.json"))
    config["bundle_root"] = str(done)
    trained = config.get_parsed_content("network_def")
    assert sum(isinstance(layer, LoRALinear) for layer in trained.modules()) == 9
    best = min(history(done), key=lambda entry: entry["proportion_error"])["epoch"]
    assert best == 2, "the checkpoint holds the last epoch, and the comparison below needs it to be the best"
    trained.load_state_dict(checkpoint["network"] | checkpoint["average"]["average"])
    trained.eval()
    plain = inference_network(done)
    image = torch.rand(1, 3, 64, 80)
    with torch.inference_mode():
        expected = trained(image)
        torch.testing.assert_close(plain(image), expected, atol=1e-5, rtol=1e-5)
        before = ConfidenceNet(2, **VIT, weights=weights)
        before.head.load_state_dict(trained.head.state_dict())
        assert (before.eval()(image) - expected).abs().max() > 1e-3, "adapters changed the map"
    # Frozen weights of the backbone are those of the file, what the adapters add apart.
    file = before.backbone.state_dict()
    kept = {name.removeprefix("backbone."): value for name, value in checkpoint["network"].items() if "backbone" in name}
    assert all(torch.equal(file[name], value) for name, value in kept.items() if "lora" not in name)
    assert not segment([cohort.parent / "images" / "i0.png"], done, tmp_path / "out", progress=False, views="none")


@pytest.mark.slow
def test_an_interrupted_run_with_everything_on_continues_to_the_same_weights(cohort, weights, tmp_path, monkeypatch):
    from monai_vslp.handlers import RunCheckpoint

    more = {
        "weights": weights, "adapters": {"rank": 2}, "head_epochs": 1, "epochs": 4, "teacher_weight": 0.5, "accumulation": 2,
        "layer_decay": 0.5, "grad_checkpointing": True, "patience": 4,
    }  # fmt: skip
    whole = run(cohort, tmp_path / "whole", **more)
    save = RunCheckpoint.save

    def save_then_stop(self, engine):
        save(self, engine)
        if engine.state.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunCheckpoint, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        run(cohort, tmp_path / "parts", **more)
    monkeypatch.setattr(RunCheckpoint, "save", save)
    parts = run(cohort, tmp_path / "parts", **more)
    expected, found = state(whole), state(parts)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert len(history(parts)) == 4


def test_the_head_learns_first_then_layers_at_their_own_rates(cohort, weights, tmp_path, monkeypatch):
    first = run(cohort, tmp_path / "head", weights=weights, head_epochs=1, layer_decay=0.5, average_decay=0.0)
    groups = state(first, "checkpoint.pt")["optimizer"]["param_groups"]
    assert {round(np.log2(group["max_lr"] / 1e-4)) for group in groups} == {0, -1, -2, -3, -4}
    assert groups[0]["max_lr"] == 1e-4, "the rate that is logged is the head's"

    from monai_vslp.handlers import RunCheckpoint

    keep, save = [], RunCheckpoint.save

    def save_and_keep(self, engine):
        save(self, engine)
        keep.append({name: value.clone() for name, value in self.network.backbone.state_dict().items()})

    monkeypatch.setattr(RunCheckpoint, "save", save_and_keep)
    file = ConfidenceNet(2, **VIT, weights=weights).backbone.state_dict()
    run(cohort, tmp_path / "again", weights=weights, head_epochs=1, layer_decay=0.5)
    assert all(torch.equal(file[name], value) for name, value in keep[0].items())
    assert not any(torch.equal(file[n], v) for n, v in keep[1].items() if n.endswith("qkv.weight"))


def test_defaults_of_weights(cohort, weights, tmp_path):
    done = run(cohort, tmp_path / "run", weights=weights, epochs=10, amp=True)
    config = read_config(done, "train.json")
    assert config["head_epochs"] == 1 and config["layer_decay"] == 0.75 and config["amp"] is True
    assert read_config(done, "inference.json")["amp"] is False, "training's precision is not that of maps"
    assert history(done)[-1]["loss"] < history(done)[0]["loss"]


def test_checkpointing_changes_nothing_and_accumulation_makes_one_batch_of_several(cohort, weights, tmp_path, monkeypatch):
    more = {"weights": weights, "average_decay": 0.0, "head_epochs": 0, "consistency_weight": 0.0, "epochs": 1}
    plain = state(run(cohort, tmp_path / "a", **more))
    saved = state(run(cohort, tmp_path / "b", grad_checkpointing=True, **more))
    assert all(torch.allclose(plain[key], saved[key], atol=1e-6) for key in plain)

    # One step over six images at once, or over two halves: the views of a step are drawn per batch, so one view alone.
    monkeypatch.setattr("monai_vslp.inferers.bags.SYMMETRIES", SYMMETRIES[:1])
    more["learning_rate"] = 1e-3
    at_once = state(run(cohort, tmp_path / "c", **more | {"batch_size": 6}), "checkpoint.pt")
    halves = state(run(cohort, tmp_path / "d", **more | {"accumulation": 2}), "checkpoint.pt")
    first, second = (s["optimizer"]["state"] for s in (at_once, halves))
    assert {int(entry["step"]) for entry in second.values()} == {1}
    # The schedule moves with each batch and takes the momentum along, so that first moments agree up to one factor.
    one, other = (torch.cat([entry["exp_avg"].flatten() for entry in entries.values()]) for entries in (first, second))
    torch.testing.assert_close(one / one.norm(), other / other.norm(), atol=1e-6, rtol=1e-4)


def test_training_stops_when_held_out_proportions_do_not_improve_and_stays_so(cohort, weights, tmp_path):
    # A rate at which nothing is learned: only the first epoch is the best so far.
    more = {"weights": weights, "epochs": 30, "patience": 2, "learning_rate": 1e-12, "average_decay": 0.0, "head_epochs": 0}
    done = run(cohort, tmp_path / "run", **more)
    errors = [entry["proportion_error"] for entry in history(done)]
    best = int(np.argmin(errors))
    assert len(errors) < 30 and len(errors) - 1 - best >= 2
    before = (done / "models" / "history.json").read_bytes()
    run(cohort, tmp_path / "run", **more)
    assert (done / "models" / "history.json").read_bytes() == before
    run(cohort, tmp_path / "run", **more | {"patience": None})
    assert len(history(done)) == 30


@pytest.mark.parametrize("options", [SWIN, CONVNEXT], ids=["swin", "convnext"])
def test_hierarchical_backbones_by_name(cohort, tmp_path, options):
    path = tmp_path / "w.safetensors"
    save_file(model(options).state_dict(), str(path))
    done = run(cohort, tmp_path / "run", options, weights=path, layer_decay=0.8, head_epochs=1, grad_checkpointing=True)
    assert np.isfinite([entry["proportion_error"] for entry in history(done)]).all()
    assert not segment([cohort.parent / "images" / "i0.png"], done, tmp_path / "out", progress=False, views="none")
    file = ConfidenceNet(2, **options, weights=path).backbone.state_dict()
    changed = [
        name for name, value in inference_network(done).backbone.state_dict().items() if not torch.equal(value, file[name])
    ]
    assert changed, "the backbone learned"


# ---- folders of timm's format -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What timm writes for the hub: architecture, arguments, statistics, weights."""
    import_timm()
    from timm.models import save_for_hf

    path = tmp_path_factory.mktemp("hub") / "model"
    net = model()
    net.pretrained_cfg = {**net.pretrained_cfg, "mean": (0.7, 0.6, 0.65), "std": (0.2, 0.21, 0.22)}
    save_for_hf(net, path, model_args={**KWARGS, "dynamic_img_size": True}, safe_serialization=True)
    return path


def test_a_folder_says_everything(folder):
    found = open_backbone(f"local-dir:{folder}")
    assert found.architecture == "vit_tiny_patch16_224" and "dynamic_img_size" not in found.options
    assert {key: found.options[key] for key in KWARGS} == KWARGS | {"img_size": [32, 32]}
    assert found.weights == folder / "model.safetensors"
    assert found.mean == [0.7, 0.6, 0.65] and found.std == [0.2, 0.21, 0.22]


def test_a_local_folder_by_command_line_and_gone_when_segmenting(folder, cohort, tmp_path, monkeypatch):
    import shutil

    import monai_vslp.workflows as workflows

    copy = shutil.copytree(folder, tmp_path / "model")
    original = workflows.train
    monkeypatch.setattr(workflows, "train", lambda *a, **k: original(*a, **{**k, "blocks": [0, 2], "window": 32}))
    command = [
        "--quiet", "train", str(cohort), "--images", str(cohort.parent / "images"), "--output", str(tmp_path / "run"),
        "--backbone", f"local-dir:{copy}", "--finetune", "--adapters", "2", "--head-epochs", "1", "--epochs", "2",
        "--batch-size", "3", "--layer-decay", "0.9", "--patience", "5", "--grad-checkpointing", "--amp", "--accumulation", "2",
    ]  # fmt: skip
    assert main(command) == 0
    config = read_config(tmp_path / "run", "train.json")
    asked = ("adapters", "head_epochs", "batch_size", "layer_decay", "patience", "grad_checkpointing", "amp", "accumulation")
    assert [config[name] for name in asked] == [{"rank": 2}, 1, 3, 0.9, 5, True, True, 2]
    shutil.rmtree(copy)
    assert not segment([cohort.parent / "images" / "i0.png"], tmp_path / "run", tmp_path / "out", progress=False, views="none")
    network = inference_network(tmp_path / "run")
    torch.testing.assert_close(network.mean.flatten(), torch.tensor([0.7, 0.6, 0.65]))
    file = model().state_dict()["patch_embed.proj.weight"]
    assert torch.equal(network.backbone.model.patch_embed.proj.weight, file), "the folder's weights, which adapters leave alone"


@pytest.mark.slow
def test_a_hub_name_from_the_filled_cache_without_connection(folder, tmp_path):
    """The cache's own layout, in a process that may not go online."""
    import shutil

    cache = tmp_path / "models--someone--model"
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    program = "from monai_vslp.networks import open_backbone; import sys; print(open_backbone(sys.argv[1]).weights)"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for name, said in (("hf-hub:someone/model", "model.safetensors"), ("hf-hub:someone/other", "local-dir:FOLDER")):
        done = subprocess.run(
            [sys.executable, "-c", program, name], env=environment, capture_output=True, text=True, timeout=120
        )
        assert said in done.stdout + done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "config.json"), ({"config.json": "[1]"}, "config.json"), ({"config.json": '{"architecture": "x"}'}, "no weights")],
)
def test_folders_that_are_no_models_are_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        open_backbone(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"adapters": {"rank": 2}}, "adapters correct a backbone"),
        ({"weights": True, "adapters": {"rank": 2}, "finetune": False}, "--finetune"),
        ({"weights": True, "adapters": {"rank": 2, "size": 3}}, "rank, alpha and targets"),
        ({"weights": True, "head_epochs": 2}, "less than the 2 epochs"),
        ({"weights": True, "accumulation": 0}, "accumulation"),
        ({"weights": True, "patience": 0}, "patience"),
        ({"weights": True, "layer_decay": 1.5}, "layer_decay"),
        ({"weights": True, "teacher_weight": -1.0}, "teacher"),
    ],
)
def test_options_that_cannot_be_are_refused(cohort, weights, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        run(cohort, tmp_path / "run", **more | ({"weights": weights} if more.get("weights") else {}))


def test_patience_needs_held_out_images(weights, tmp_path):
    table = write_two_class_cohort(tmp_path, train=3, val=0)
    with pytest.raises(InputError, match="split 'val'"):
        run(table, tmp_path / "run", weights=weights, patience=2)
