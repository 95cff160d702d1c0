"""Training by two real processes is training by one."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from cases import SMALL_NETWORK, write_two_class_cohort
from monai.bundle import ConfigParser

from monai_vslp.cli import main
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows import train
from monai_vslp.workflows.bundle import create_run, read_config
from monai_vslp.workflows.train import FROM_SCRATCH

TINY = SMALL_NETWORK | {"batch_size": 4, "learning_rate": 3e-4}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    # Eight images to learn from: two steps of four, or of two in each of two processes. Three to watch: uneven shares.
    return write_two_class_cohort(tmp_path_factory.mktemp("cohort"), train=8, val=3)


def state(run, name="model.pt"):
    return torch.load(run / "models" / name, weights_only=True)


def history(run):
    return json.loads((run / "models" / "history.json").read_text())


@pytest.fixture(scope="module")
def alone(cohort, tmp_path_factory):
    return train(
        cohort, cohort.parent / "images", tmp_path_factory.mktemp("alone") / "run", epochs=3, progress=False,
        consistency_weight=0.5, teacher_weight=0.5, **TINY,
    )  # fmt: skip


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=0)


def test_torchrun_gives_the_weights_of_one_process(cohort, alone, tmp_path):
    """Views, stains, teacher, averaged weights and validation are those of one process with the batch of both."""
    run = tmp_path / "run"
    values = FROM_SCRATCH | TINY | {
        "table": str(cohort), "dataset_dir": str(cohort.parent / "images"), "classes": ["pink", "purple"], "epochs": 3,
        "consistency_weight": 0.5, "teacher_weight": 0.5,
    }  # fmt: skip
    create_run(run, values, ["pink", "purple"])
    configs = run / "configs"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617", "-m", "monai.bundle", "run",
        "--config_file", f"['{configs / 'train.json'}','{configs / 'multi_gpu_train.json'}']",
        "--meta_file", str(configs / "metadata.json"), "--bundle_root", str(run), "--progress", "False",
        "--tracking", str(configs / "tracking.json"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same(state(run), state(alone))
    assert_same(state(run, "checkpoint.pt")["network"], state(alone, "checkpoint.pt")["network"])
    ours, theirs = history(run), history(alone)
    assert len(ours) == 3, "one process writes, once per epoch"
    for one, other in zip(ours, theirs):
        assert one == pytest.approx(other, abs=1e-5)

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "monai_vslp"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert len(client.get_metric_history(found.info.run_id, "loss")) == 3


@pytest.mark.slow
def test_two_processes_continue_what_one_began(cohort, alone, tmp_path, monkeypatch):
    """The checkpoint of one process, interrupted after two epochs, and the command line with two."""
    import monai_vslp.workflows as workflows
    from monai_vslp.handlers import RunCheckpoint

    more = {"epochs": 3, "consistency_weight": 0.5, "teacher_weight": 0.5, **TINY}
    save = RunCheckpoint.save

    def save_then_stop(self, engine):
        save(self, engine)
        if engine.state.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoint, "save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(cohort, cohort.parent / "images", tmp_path / "run", progress=False, **more)
    original = workflows.train
    monkeypatch.setattr(workflows, "train", lambda *a, **k: original(*a, **{**k, **more}))
    command = ["--quiet", "train", str(cohort), "--images", str(cohort.parent / "images"), "--output", str(tmp_path / "run")]
    assert main([*command, "--processes", "2"]) == 0
    assert_same(state(tmp_path / "run"), state(alone))
    assert len(history(tmp_path / "run")) == 3


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_keeps_whole_epochs(cohort, tmp_path):
    program = (
        "import sys; from monai_vslp.cli import main; import monai_vslp.workflows as w\n"
        f"train = w.train\nw.train = lambda *a, **k: train(*a, **{{**k, **{TINY!r}}})\nsys.exit(main(sys.argv[1:]))"
    )
    command = [
        sys.executable, "-c", program, "--quiet", "train", str(cohort), "--images", str(cohort.parent / "images"),
        "--output", str(tmp_path / "run"), "--epochs", "2000", "--processes", "2",
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
    assert state(tmp_path / "run", "checkpoint.pt")["epoch"] >= 1
    time.sleep(1)
    epochs = len(history(tmp_path / "run"))
    time.sleep(2)
    assert len(history(tmp_path / "run")) == epochs, "nobody trains on"


@pytest.mark.slow
def test_a_process_that_fails_ends_the_run_with_its_message(cohort, tmp_path, capfd):
    train(cohort, cohort.parent / "images", tmp_path / "run", epochs=1, progress=False, **TINY)
    with pytest.raises(RuntimeError, match="stands above"):
        train(cohort, cohort.parent / "images", tmp_path / "run", epochs=2, progress=False, processes=2, seed=5, **TINY)
    assert "written with other settings" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"processes": 3}, "batch_size 4 .* such as 3"),
        ({"processes": 0}, "from 1"),
        ({"processes": 2, "weights": "w"}, "one process"),
    ],
)
def test_what_cannot_be_shared_is_said_at_once(cohort, tmp_path, more, message):
    if "weights" in more:
        more = more | {"weights": tmp_path / "w.pt"}
        torch.save({"a": torch.zeros(1)}, more["weights"])
    with pytest.raises(InputError, match=message):
        train(cohort, cohort.parent / "images", tmp_path / "run", progress=False, **TINY, **more)
    assert not (tmp_path / "run").exists()


def test_the_overlay_without_torchrun_says_what_to_do(cohort, tmp_path):
    create_run(tmp_path, {}, ["a", "b"])
    config = ConfigParser(read_config(tmp_path, "multi_gpu_train.json") | {"imports": ["$import monai_vslp"]})
    with pytest.raises(Exception) as raised:
        config.get_parsed_content("device")
    assert "torchrun --nproc_per_node=2" in str(raised.value.__cause__ or raised.value)
