import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from cases import SMALL_NETWORK, write_two_class_cohort
from monai.bundle import ConfigWorkflow

from monai_vslp.networks import ConfidenceNet
from monai_vslp.utils.errors import ImageReadError, InputError
from monai_vslp.workflows import train
from monai_vslp.workflows.bundle import read_config, template

TINY = SMALL_NETWORK | {"batch_size": 3}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_two_class_cohort(tmp_path_factory.mktemp("cohort"))


def run(cohort, output, **options):
    return train(cohort, cohort.parent / "images", output, **{"epochs": 3, "progress": False, **TINY, **options})


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory):
    return run(cohort, tmp_path_factory.mktemp("runs") / "run", epochs=4)


def weights(folder):
    return torch.load(folder / "models" / "model.pt", weights_only=True)


def test_a_run_is_a_usable_bundle(finished):
    config = read_config(finished, "inference.json")
    assert config["classes"] == ["pink", "purple"]
    metadata = read_config(finished, "metadata.json")
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "pink", "1": "purple"}
    workflow = ConfigWorkflow(
        str(finished / "configs" / "inference.json"),
        str(finished / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(finished),
        datalist=[],
    )
    workflow.initialize()
    assert isinstance(workflow.parser.get_parsed_content("network"), ConfidenceNet)
    history = json.loads((finished / "models" / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4]
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(np.isfinite(entry["proportion_error"]) for entry in history)


def test_tracked_in_sqlite_with_parameters_curves_config_and_pictures(finished):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "monai_vslp"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["seed"] == "0" and "backbone" in found.data.params
    assert {"loss", "proportion_error", "learning_rate"} <= set(found.data.metrics)
    assert len(client.get_metric_history(found.info.run_id, "loss")) == 4
    folders = ("", "config", "pictures/held_out", "tables")
    names = {f.path for folder in folders for f in client.list_artifacts(found.info.run_id, folder)}
    assert {"learning_curve.png", "pictures/held_out/i6.png", "tables/held_out_proportions.csv"} <= names
    (executed,) = [name for name in names if name.startswith("config/config_")]
    with open(client.download_artifacts(found.info.run_id, executed), encoding="utf-8") as file:
        assert json.load(file)["epochs"] == 4


def test_the_same_seed_gives_the_same_weights_another_one_others(cohort, finished, tmp_path):
    again = weights(run(cohort, tmp_path / "a", epochs=4))
    other = weights(run(cohort, tmp_path / "b", epochs=4, seed=1))
    first = weights(finished)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_an_interrupted_run_continues_to_the_same_weights(cohort, finished, tmp_path, monkeypatch):
    from monai_vslp.handlers import RunCheckpoint

    save = RunCheckpoint.save

    def save_then_interrupt(self, engine):
        save(self, engine)
        if engine.state.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunCheckpoint, "save", save_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(cohort, tmp_path / "run", epochs=4)
    monkeypatch.setattr(RunCheckpoint, "save", save)
    resumed = run(cohort, tmp_path / "run", epochs=4)
    history = json.loads((resumed / "models" / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4]
    expected, found = weights(finished), weights(resumed)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_other_settings_do_not_continue_a_run(cohort, tmp_path):
    run(cohort, tmp_path / "run", epochs=1)
    with pytest.raises(InputError, match="seed.*--restart"):
        run(cohort, tmp_path / "run", epochs=1, seed=5)
    run(cohort, tmp_path / "run", epochs=1, seed=5, restart=True)


def test_ctrl_c_keeps_the_last_epoch(cohort, tmp_path):
    """A real process, a real SIGINT: exit status 130, whole checkpoint, the same command goes on."""
    program = (
        "import sys; from pathlib import Path; from monai_vslp.cli import main; import monai_vslp.workflows as w\n"
        f"train = w.train\nw.train = lambda *a, **k: train(*a, **{{**k, **{TINY!r}}})\nsys.exit(main(sys.argv[1:]))"
    )
    command = [
        sys.executable, "-c", program, "--quiet", "train", str(cohort), "--images", str(cohort.parent / "images"),
        "--output", str(tmp_path / "run"), "--epochs", "500",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    checkpoint = tmp_path / "run" / "models" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors[-2000:]
    assert "goes on where it stopped" in errors
    state = torch.load(checkpoint, weights_only=True)
    assert state["epoch"] >= 1
    assert not list(checkpoint.parent.glob(".*")), "no half-written file is left"


def test_a_full_disk_keeps_the_last_checkpoint(cohort, tmp_path):
    """Files may not grow beyond a limit, as on a full disk: the run ends with a clear error, what was written is whole."""
    run(cohort, tmp_path / "run", epochs=1)
    before = (tmp_path / "run" / "models" / "checkpoint.pt").read_bytes()
    program = f"""
import resource, signal, sys
from pathlib import Path
from monai_vslp.workflows import train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import monai_vslp.handlers.checkpoint as c
original = c.torch.save
def limited(*a, **k):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try: return original(*a, **k)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
c.torch.save = limited
table = Path({str(cohort)!r})
try:
    train(table, table.parent / "images", {str(tmp_path / "run")!r}, epochs=2, progress=False, restart=False, **{TINY!r})
except OSError as error:
    print("said:", error)
"""
    (tmp_path / "run" / "models" / "checkpoint.pt").unlink()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert "said:" in done.stdout and "untouched" in done.stdout, done.stderr[-2000:]
    assert (tmp_path / "run" / "models" / "model.pt").exists()
    assert not list((tmp_path / "run" / "models").glob(".*"))
    assert len(before) > 20_000, "the limit must lie below the size of a checkpoint"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda text: text.replace("purple", "Purple "), None, None),
        (lambda text: re.sub(r"(train,p0,)[\d.]+", r"\1-5", text), InputError, "negative"),
        (lambda text: text.replace("i1.png", "gone.png"), InputError, "gone.png"),
        (lambda text: text.replace("train", "val"), InputError, "no rows of split 'train'"),
        (lambda t: re.sub(r"(?m)^(i.*,p\d,).*", r"\g<1>100", t).replace(",pink,purple", ",pink"), InputError, "two columns"),
    ],
)  # fmt: skip
def test_wrong_tables_are_refused_before_any_computing(cohort, tmp_path, change, error, message):
    table = tmp_path / "t.csv"
    table.write_text(change(cohort.read_text()))
    if error is None:
        assert train(table, cohort.parent / "images", tmp_path / "r", epochs=1, progress=False, **TINY)
        return
    with pytest.raises(error, match=message):
        train(table, cohort.parent / "images", tmp_path / "r", epochs=1, progress=False, **TINY)
    assert not (tmp_path / "r").exists()


def test_a_truncated_image_is_named_before_training(tmp_path):
    table = write_two_class_cohort(tmp_path)
    path = tmp_path / "images" / "i3.png"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ImageReadError, match=r"i3\.png"):
        run(table, tmp_path / "r")


def test_a_folder_with_other_files_is_not_overwritten(cohort, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match="other files"):
        run(cohort, tmp_path)


def test_wrong_backbone_and_weights_are_refused(cohort, tmp_path):
    with pytest.raises(InputError, match="Did you mean"):
        train(cohort, cohort.parent / "images", tmp_path / "r", backbone="vit_tiny_patch16_242", progress=False, epochs=1)
    (tmp_path / "w.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="w.safetensors"):
        train(cohort, cohort.parent / "images", tmp_path / "q", weights=tmp_path / "w.safetensors", progress=False)


def test_the_template_runs_with_monai_bundle_run(cohort, tmp_path):
    """MONAI's own command executes the train config of the template."""
    command = [
        sys.executable, "-m", "monai.bundle", "run", "--config_file", str(template() / "configs" / "train.json"),
        "--meta_file", str(template() / "configs" / "metadata.json"), "--bundle_root", str(tmp_path), "--epochs", "1",
        "--table", str(cohort), "--dataset_dir", str(cohort.parent / "images"), "--progress", "False",
        "--backbone_kwargs", json.dumps(TINY["backbone_kwargs"]), "--blocks", "[0,1]", "--window", "32",
        "--freeze_backbone", "False", "--cache_features", "False",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "models" / "model.pt").exists()
