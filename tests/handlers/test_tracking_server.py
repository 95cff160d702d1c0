"""Tracking against a real MLflow server, which dies in the middle of a training and comes back."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events

from monai_vslp.handlers import MLflowTracker, TrackedRun, send_kept

mlflow = pytest.importorskip("mlflow")


def _train(folder, server, epochs=4, dies_before=None, first=0):
    """A training of ``epochs``; the server is killed before one of them."""
    engine = Engine(lambda engine, batch: None)
    engine.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.25)

    def begin(engine):
        engine.state.metrics["loss"] = 1.0 / engine.state.epoch
        if engine.state.epoch == dies_before:
            server.kill()

    tracker = MLflowTracker(
        folder,
        uri=server.uri,
        parameters={"lr": 0.25},
        pictures={"last": lambda: np.zeros((2, 3, 3), np.uint8)},
        tables={"t": lambda: [{"image": "a", "error": 0.5}]},
    )
    tracker.attach(engine)
    engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "epoch", first))
    engine.add_event_handler(Events.EPOCH_STARTED, begin)
    engine.run([0], max_epochs=epochs)
    return tracker


def _losses(client, run_id):
    return [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")]


def test_a_server_that_dies_in_the_middle_gets_the_rest_when_it_is_back(
    tmp_path, mlflow_server, mlflow_database, caplog, monkeypatch
):
    for name in ("MAX_RETRIES", "TIMEOUT", "BACKOFF_FACTOR"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", {"MAX_RETRIES": "0"}.get(name, "60"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copyfile(mlflow_database, tmp_path / name / "mlflow.db")
    whole = [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25)]
    try:
        with caplog.at_level(logging.WARNING, logger="monai_vslp"):
            tracker = _train(tmp_path / "a", mlflow_server, dies_before=3)
        warnings = [record.getMessage() for record in caplog.records if record.name.startswith("monai_vslp")]
        assert len(warnings) == 1 and "training goes on" in warnings[0] and str(tmp_path / "a" / "mlflow.db") in warnings[0]
        _train(tmp_path / "b", mlflow_server, epochs=2)  # it is still away
        nested = TrackedRun(tmp_path / "b" / "fold", tracker.uri, "monai_vslp", parent=tracker.run_id)
        nested.open()
        nested.metrics({"error": 0.125})
        nested.close()

        local, known = mlflow.MlflowClient(tracker.uri), json.loads((tmp_path / "a" / "mlflow_run.json").read_text())
        assert tracker.uri.startswith("sqlite:") and tracker.run_id == known["kept"] != known["run_id"]
        assert _losses(local, known["kept"]) == whole, "the local run has all of it, not the rest alone"
        assert local.get_run(known["kept"]).data.tags["monai_vslp.server_run"] == known["run_id"]
        kept = {item.path for folder in ("pictures", "tables") for item in local.list_artifacts(known["kept"], folder)}
        assert kept == {"pictures/last.png", "tables/t.csv"}
    finally:
        if mlflow_server.process is None:
            mlflow_server.start()

    client = mlflow.MlflowClient(mlflow_server.uri)
    assert _losses(client, known["run_id"]) == whole[:2] and client.get_run(known["run_id"]).info.status == "RUNNING"
    (line,) = send_kept(tmp_path / "a")
    assert known["run_id"] in line and mlflow_server.uri in line
    nested = f"tags.`mlflow.parentRunId` = '{known['run_id']}'"
    (fold,) = client.search_runs([client.get_run(known["run_id"]).info.experiment_id], nested)
    assert fold.info.run_name == "fold" and fold.data.metrics == {"error": 0.125} and fold.info.status == "FINISHED"
    run = client.get_run(known["run_id"])
    assert _losses(client, known["run_id"]) == whole, "the rest, and nothing twice"
    assert run.info.status == "FINISHED" and run.data.params["lr"] == "0.25"
    sent = {item.path for folder in ("pictures", "tables") for item in client.list_artifacts(known["run_id"], folder)}
    assert sent == kept
    assert "kept" not in json.loads((tmp_path / "a" / "mlflow_run.json").read_text()) and not send_kept(tmp_path / "a")

    # The other never reached the server: the same command, which goes on, sends what was kept and continues there.
    tracker = _train(tmp_path / "b", mlflow_server, epochs=4, first=2)
    assert tracker.uri == mlflow_server.uri
    assert _losses(client, tracker.run_id) == whole
    experiment = client.get_experiment_by_name("monai_vslp")
    names = [run.info.run_name for run in client.search_runs([experiment.experiment_id])]
    assert sorted(name for name in names if name in ("a", "b", "fold")) == ["a", "b", "fold"], "one run each"
