"""Trainings, evaluations and bundles in MLflow: on a real server, in its pages, and with MONAI's own option."""

import base64
import io
import json
import logging
import shutil
import time

import numpy as np
import pytest
from browser import browser, needs_browser
from cases import SMALL_NETWORK, write_two_class_cohort
from monai.bundle import ConfigWorkflow
from PIL import Image

from monai_vslp.apps.mlflow_model import BundleModel, register
from monai_vslp.cli import main
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows import segment, track_evaluation, train

mlflow = pytest.importorskip("mlflow")

TINY = SMALL_NETWORK | {"batch_size": 3, "epochs": 2, "progress": False}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_two_class_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def patient_server(mlflow_server):
    """The server, which is given all the time that a busy machine needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
        yield mlflow_server


@pytest.fixture(scope="module")
def tracked(cohort, patient_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tracked"
    return train(cohort, cohort.parent / "images", folder, tracking_uri=patient_server.uri, **TINY)


def known(run):
    return json.loads((run / "mlflow_run.json").read_text())


def artifacts(client, run_id, folder=""):
    for item in client.list_artifacts(run_id, folder):
        yield from artifacts(client, run_id, item.path) if item.is_dir else (item.path,)


def executed(client, run_id, folder):
    """The config that was executed, from the artifacts of a run."""
    (path,) = [path for path in artifacts(client, run_id) if path.rpartition("/")[2].startswith("config_")]
    with open(client.download_artifacts(run_id, path, str(folder)), encoding="utf-8") as file:
        return json.load(file)


def test_a_training_is_on_the_server_with_all_that_belongs_to_it(tracked, patient_server, tmp_path):
    assert known(tracked)["uri"] == patient_server.uri and not (tracked / "mlflow.db").exists()
    client, run_id = mlflow.MlflowClient(patient_server.uri), known(tracked)["run_id"]
    run = client.get_run(run_id)
    assert (
        run.info.status == "FINISHED"
        and run.data.params["epochs"] == "2"
        and run.data.params["classes"] == "['pink', 'purple']"
    )
    assert {"loss", "proportion_error", "learning_rate", "system/cpu_utilization_percentage"} <= set(run.data.metrics)
    names = set(artifacts(client, run_id))
    assert {"config/metadata.json", "learning_curve.png", "tables/held_out_proportions.csv"} <= names
    assert {"pictures/held_out/i6.png", "pictures/held_out/i7.png"} <= names
    config = executed(client, run_id, tmp_path)
    assert config["epochs"] == 2 and config["tracking_uri"] == patient_server.uri, "as it was run, overrides too"
    with Image.open(client.download_artifacts(run_id, "pictures/held_out/i6.png", str(tmp_path))) as strip:
        assert strip.size == (5 * 80 + 4 * 8, 64)
    with open(client.download_artifacts(run_id, "tables/held_out_proportions.csv", str(tmp_path)), encoding="utf-8") as file:
        table = file.read().splitlines()
    assert table[0] == "image,error,given pink,predicted pink,given purple,predicted purple" and len(table) == 3


def test_monais_own_option_tracks_the_bundle_with_its_executed_config(tracked, cohort, tmp_path, mlflow_database, monkeypatch):
    """``python -m monai.bundle run --tracking mlflow``."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "bundle"
    shutil.copytree(tracked / "configs", root / "configs")
    (root / "logs").mkdir()
    shutil.copyfile(mlflow_database, root / "logs" / "mlruns.db")
    workflow = ConfigWorkflow(
        config_file=str(root / "configs" / "train.json"),
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=False,
        tracking="mlflow",
        bundle_root=str(root),
        progress=False,
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    client = mlflow.MlflowClient(f"sqlite:///{root / 'logs' / 'mlruns.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("monai_experiment").experiment_id])
    assert run.data.params["max_epochs"] == "2" and any("loss" in name.lower() for name in run.data.metrics)
    config = executed(client, run.info.run_id, tmp_path)
    assert config["epochs"] == 2 and config["bundle_root"] == str(root)
    assert not (root / "mlflow.db").exists(), "there is one tracker, not two"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".db"] == [], "nothing lies in the current folder"


def test_scores_and_pictures_of_an_evaluation_join_the_run(tracked, cohort, patient_server, tmp_path, capsys):
    image = cohort.parent / "images" / "i6.png"
    segment([image], tracked, tmp_path / "out", progress=False)
    assert (
        main(["--quiet", "evaluate", str(tmp_path / "out"), "--masks", str(cohort.parent / "masks"), "--track", str(tracked)])
        == 0
    )
    assert f"Tracked: {patient_server.uri}" in capsys.readouterr().out
    client, run_id = mlflow.MlflowClient(patient_server.uri), known(tracked)["run_id"]
    run = client.get_run(run_id)
    scores = json.loads((tmp_path / "out" / "evaluation.json").read_text())["blocks"][0]
    refined = next(row for row in scores["rows"] if row["map"] == "refined")
    assert run.data.metrics[f"evaluation/{scores['name']}/refined/mIoU"] == pytest.approx(refined["miou"])
    assert run.data.metrics["loss"] > 0 and run.info.status == "FINISHED"
    names = set(artifacts(client, run_id))
    assert {
        "evaluation/evaluation.csv",
        "pictures/evaluation/i6_overlay.png",
        "pictures/evaluation/i6_energy_total.png",
    } <= names
    with pytest.raises(InputError, match="no folder that"):
        track_evaluation(tmp_path / "out", {}, tmp_path)


@pytest.fixture(scope="module")
def registered(tracked, patient_server):
    return register(tracked, "tissue")


def test_a_registered_bundle_takes_images_and_proportions(tracked, registered, cohort, patient_server, tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    assert registered == "models:/tissue/1"
    client = mlflow.MlflowClient(patient_server.uri)
    version = client.get_model_version("tissue", "1")
    assert version.run_id == known(tracked)["run_id"]
    monkeypatch.setattr(logging.getLogger("mlflow"), "disabled", True)
    mlflow.set_tracking_uri(patient_server.uri)
    try:
        model = mlflow.pyfunc.load_model(registered, dst_path=str(tmp_path))
    finally:
        mlflow.set_tracking_uri(None)
    held = [path.name for path in (tmp_path / "data").rglob("*")]
    assert "model.pt" in held and not {"checkpoint.pt", "mlflow_run.json", "logs"} & set(held)

    path = cohort.parent / "images" / "i6.png"
    frame = pandas.DataFrame({"image": [path.read_bytes()] * 2, "proportions": ['{"pink": "20-30", "purple": 75}', None]})
    found = model.predict(frame)
    given, free = (json.loads(text) for text in found["proportions"])
    assert given == pytest.approx({"pink": 0.25, "purple": 0.75}, abs=1e-3) and free != pytest.approx(given, abs=1e-3)
    labels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["labels"][1]))))
    energy = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["fidelity"][1]))))
    assert labels.shape == (64, 80) and set(np.unique(labels)) <= {0, 1} and energy.shape == (64, 80, 3)
    # The same as the command, which reads the same bundle.
    segment([path], tracked, tmp_path / "out", progress=False)
    summary = json.loads((tmp_path / "out" / "i6" / "summary.json").read_text())
    assert free == pytest.approx(summary["proportions"]["refined"], abs=2e-3)

    with pytest.raises(InputError, match="row 0.*'stroma'"):
        BundleModel(tracked).predict([{"image": path.read_bytes(), "proportions": '{"stroma": 5}'}])
    with pytest.raises(InputError, match="cannot be read"):
        BundleModel(tracked).predict([{"image": b"no image"}])


def test_what_cannot_be_registered(tracked, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(["register", str(tracked), "--tracking-uri", "http://127.0.0.1:9"]) == 2
    assert "MLflow at http://127.0.0.1:9 failed" in capsys.readouterr().err
    shutil.copytree(tracked / "configs", tmp_path / "empty" / "configs")
    assert main(["register", str(tmp_path / "empty")]) == 2 and "model.pt does not exist" in capsys.readouterr().err


def wait_for_text(window, text, seconds=180):
    """Wait until a page shows a text; its own scripts may keep a busy machine from answering for a while."""
    end = time.monotonic() + seconds
    while True:
        try:
            if window.run("return document.body.innerText.includes(arguments[0])", text):
                return
        except AssertionError as error:
            if "script timeout" not in str(error):
                raise
        assert time.monotonic() < end, f"never shown: {text}"
        time.sleep(0.2)


@pytest.mark.slow
@needs_browser
def test_the_pages_of_the_server_show_run_and_model(tracked, registered, patient_server, tmp_path):
    client, run_id = mlflow.MlflowClient(patient_server.uri), known(tracked)["run_id"]
    experiment = client.get_run(run_id).info.experiment_id
    pages = {
        f"#/experiments/{experiment}/runs": "tracked",
        f"#/experiments/{experiment}/runs/{run_id}": "Finished",
        f"#/experiments/{experiment}/runs/{run_id}/model-metrics": "proportion_error",
        f"#/experiments/{experiment}/runs/{run_id}/artifacts/tables/held_out_proportions.csv": "given pink",
        "#/models/tissue": "Version 1",
    }
    with browser() as window:
        for address, text in pages.items():
            window.call("POST", "/url", {"url": "about:blank"})
            window.call("POST", "/url", {"url": f"{patient_server.uri}/{address}"})
            wait_for_text(window, text)
