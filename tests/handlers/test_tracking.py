"""Tracking against a real SQLite store, and against a server that is not there."""

import gc
import json
import logging
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from PIL import Image

from monai_vslp.handlers import HeldOutTable, MLflowTracker, TrackedRun, send_kept
from monai_vslp.utils.errors import InputError

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch, mlflow_database):
    """Run in an empty directory, which must stay empty, and without settings of the machine; a database is ready."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "run").mkdir()
    shutil.copyfile(mlflow_database, tmp_path / "run" / "mlflow.db")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield
    assert not list((tmp_path / "cwd").iterdir())


def _trainer(losses=(3.0, 2.0, 1.0), fail_at=None):
    """An engine with a loss per epoch and an evaluator whose metric follows it; metrics are set as handlers do."""
    evaluator = SimpleNamespace(state=SimpleNamespace(metrics={}))

    def step(engine, batch):
        if engine.state.epoch == fail_at:
            raise RuntimeError("out of memory")

    engine = Engine(step)
    engine.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.25)

    def set_metrics(engine):
        engine.state.metrics["loss"] = torch.tensor(losses[engine.state.epoch - 1])
        engine.state.metrics["name"] = "not a number"
        evaluator.state.metrics = {"proportion_error": losses[engine.state.epoch - 1] / 10, "loss": 9.0}

    return engine, evaluator, set_metrics


def _run(tracker, engine, set_metrics, epochs=3):
    tracker.attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, set_metrics)  # after the tracker: it must still see the metrics
    engine.run([0], max_epochs=epochs)


def _client(folder):
    known = json.loads((folder / "mlflow_run.json").read_text())
    client = mlflow.MlflowClient(known["uri"])
    return client, known["run_id"]


def _history(client, run_id, name):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def test_a_run_is_found_again_in_its_folder(tmp_path):
    folder = (tmp_path / "run").rename(tmp_path / "run ä 1")
    config, photo = tmp_path / "train.json", tmp_path / "photo.png"
    config.write_text("{}")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(photo)
    engine, evaluator, set_metrics = _trainer()

    def broken_picture():
        raise RuntimeError("cannot draw")

    tracker = MLflowTracker(
        folder,
        parameters={"network": {"backbone": "vit", "blocks": [4, 8]}, "note": "x" * 5000, "odd key #1": 1, "empty": {}},
        evaluator=evaluator,
        configs=[config, tmp_path / "absent.json"],
        pictures={
            "a": photo,
            "b": lambda: np.full((4, 5, 3), 7, np.uint8),
            "c": broken_picture,
            "d": lambda: None,
            "e": lambda: {"x": np.zeros((2, 3, 3), np.uint8)},
        },
        tables={"shares": lambda: [{"image": "i 1", "given": 0.25}, {"image": "i,2", "given": 1 / 3}], "none": None},
    )
    _run(tracker, engine, set_metrics)

    client, run_id = _client(folder)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "run ä 1" and run_id == tracker.run_id
    params = run.data.params
    assert params["network.backbone"] == "vit" and params["network.blocks"] == "[4, 8]" and params["max_epochs"] == "3"
    assert len(params["note"]) == 500 and params["note"].endswith("…")
    assert params["odd key _1"] == "1" and params["empty"] == "{}"
    assert _history(client, run_id, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert _history(client, run_id, "proportion_error") == pytest.approx(np.array([(1, 0.3), (2, 0.2), (3, 0.1)]))
    assert _history(client, run_id, "val_loss") == [(1, 9.0), (2, 9.0), (3, 9.0)]
    assert _history(client, run_id, "learning_rate")[0] == (1, 0.25)
    assert "name" not in run.data.metrics
    folders = ("", "config", "pictures", "pictures/e", "tables")
    found = [item.path for place in folders for item in client.list_artifacts(run_id, place)]
    pictures = {"pictures/photo.png", "pictures/b.png", "pictures/e/x.png", "learning_curve.png"}
    assert {"config/train.json", "tables/shares.csv", *pictures} <= set(found)
    table = Path(client.download_artifacts(run_id, "tables/shares.csv", str(tmp_path)))
    assert table.read_text(encoding="utf-8") == 'image,given\ni 1,0.25\n"i,2",0.333333\n'
    assert not [path for path in found if path.endswith(("c.png", "d.png", "absent.json"))]
    curve = Image.open(client.download_artifacts(run_id, "learning_curve.png", str(tmp_path)))
    assert min(curve.size) > 300
    assert (folder / "mlflow_artifacts").is_dir() and (folder / "mlflow.db").is_file()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_failed_run_is_marked_and_continued(tmp_path):
    engine, evaluator, set_metrics = _trainer(fail_at=3)
    with pytest.raises(RuntimeError, match="out of memory"):
        _run(MLflowTracker(tmp_path / "run", evaluator=evaluator, parameters={"lr": 0.1}), engine, set_metrics)
    client, run_id = _client(tmp_path / "run")
    del engine
    gc.collect()
    assert client.get_run(run_id).info.status == "FAILED"

    engine, evaluator, set_metrics = _trainer(losses=(3.0, 2.0, 1.0, 0.5))
    tracker = MLflowTracker(tmp_path / "run", evaluator=evaluator, parameters={"lr": 0.2, "new": 1})
    engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "epoch", 2))  # as a checkpoint does
    _run(tracker, engine, set_metrics, epochs=4)
    assert tracker.run_id == run_id
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert _history(client, run_id, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]
    assert run.data.params["lr"] == "0.1" and run.data.params["new"] == "1"
    assert "lr: 0.1 -> 0.2" in run.data.tags["changed_parameters"]
    assert len(client.search_runs([run.info.experiment_id])) == 1

    client.delete_run(run_id)
    engine, evaluator, set_metrics = _trainer()
    tracker = MLflowTracker(tmp_path / "run", evaluator=evaluator)
    _run(tracker, engine, set_metrics)
    assert tracker.run_id != run_id and _client(tmp_path / "run")[1] == tracker.run_id


def test_a_server_that_does_not_answer_costs_one_warning(tmp_path, caplog, monkeypatch):
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"):
        monkeypatch.delenv(name, raising=False)
    engine, evaluator, set_metrics = _trainer()
    picture = {"p": lambda: np.zeros((2, 3, 3), np.uint8)}
    tracker = MLflowTracker(
        tmp_path / "run", uri="http://127.0.0.1:9", evaluator=evaluator, pictures=picture, parameters={"lr": 0.5}
    )
    with caplog.at_level(logging.WARNING, logger="monai_vslp"):
        _run(tracker, engine, set_metrics)
    assert engine.state.epoch == 3 and engine.state.metrics["loss"] == 1.0
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("monai_vslp")]
    assert len(warnings) == 1 and "http://127.0.0.1:9" in warnings[0] and "training goes on" in warnings[0]
    kept = f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}"
    assert kept in warnings[0] and tracker.uri == kept, "it says where the run is kept"
    client, known = mlflow.MlflowClient(kept), json.loads((tmp_path / "run" / "mlflow_run.json").read_text())
    assert (known["uri"], known["run_id"]) == ("http://127.0.0.1:9", None)
    run = client.get_run(known["kept"])
    assert run.info.status == "FINISHED" and run.data.params["lr"] == "0.5"
    assert run.data.tags["monai_vslp.server"] == "http://127.0.0.1:9"
    assert _history(client, known["kept"], "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert [item.path for item in client.list_artifacts(known["kept"], "pictures")] == ["pictures/p.png"]
    with pytest.raises(InputError, match="could not be sent"):
        send_kept(tmp_path)
    assert json.loads((tmp_path / "run" / "mlflow_run.json").read_text()) == known, "what is kept stays"

    # The server is still away: the same command goes on with the same run.
    engine, evaluator, set_metrics = _trainer(losses=(3.0, 2.0, 1.0, 0.5))
    engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "epoch", 3))
    _run(MLflowTracker(tmp_path / "run", uri="http://127.0.0.1:9", evaluator=evaluator), engine, set_metrics, epochs=4)
    assert json.loads((tmp_path / "run" / "mlflow_run.json").read_text()) == known
    assert _history(client, known["kept"], "loss")[-1] == (4, 0.5)


def test_metrics_of_the_machine_are_logged(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    run = TrackedRun(tmp_path / "run", system_metrics=True)
    run.open()
    client, run_id = _client(tmp_path / "run")
    end = time.monotonic() + 60
    while not any(name.startswith("system/") for name in client.get_run(run_id).data.metrics):
        assert time.monotonic() < end
        time.sleep(0.2)
    run.curves()
    run.close()
    assert "system/cpu_utilization_percentage" in client.get_run(run_id).data.metrics
    assert not client.list_artifacts(run_id), "there are no curves of the training, and those of the machine are not drawn"


def test_stages_of_one_run_keep_their_metrics_and_parameters_apart(tmp_path):
    for stage, rate in (("fit0", 0.1), ("fit1", 0.2)):
        engine, evaluator, set_metrics = _trainer()
        _run(MLflowTracker(tmp_path / "run", stage=stage, parameters={"lr": rate, "seed": 0}), engine, set_metrics)
    client, run_id = _client(tmp_path / "run")
    run = client.get_run(run_id)
    assert {key: run.data.params[key] for key in ("lr", "fit1.lr", "seed")} == {"lr": "0.1", "fit1.lr": "0.2", "seed": "0"}
    assert "changed_parameters" not in run.data.tags and "fit1.seed" not in run.data.params
    assert _history(client, run_id, "fit0/loss") == _history(client, run_id, "fit1/loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_the_table_of_held_out_images_is_that_of_the_last_validation():
    batches = [
        (torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])),
        (torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])),
    ]
    evaluator = Engine(lambda engine, batch: batch)
    table = HeldOutTable(evaluator, [{"stem": "a"}, {"stem": "b"}], ["pink", "purple"], lambda output: output)
    for _ in range(2):
        evaluator.run(batches)
    assert [row["image"] for row in table()] == ["b", "a"], "the worst first, each once"
    expected = {
        "image": "a", "error": 0.25, "given pink": 0.25, "predicted pink": 0.5, "given purple": 0.75, "predicted purple": 0.5,
    }  # fmt: skip
    assert table()[1] == expected


def test_a_folder_that_cannot_be_written_does_not_stop_training(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    engine, evaluator, set_metrics = _trainer()
    _run(MLflowTracker(tmp_path / "file" / "run", evaluator=evaluator), engine, set_metrics)
    assert engine.state.epoch == 3 and "training goes on" in caplog.text


def test_the_address_comes_from_the_option_then_the_environment(tmp_path, monkeypatch):
    assert MLflowTracker(tmp_path).uri.startswith("sqlite:///")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert MLflowTracker(tmp_path).uri == "http://tracking:5000"
    assert MLflowTracker(tmp_path, uri="http://other:1").uri == "http://other:1"
