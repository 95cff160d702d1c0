"""Miniature cross-validations: two folds, networks from scratch, one epoch."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from cases import SMALL_BACKBONE, SMALL_NETWORK, write_two_class_cohort
from monai.bundle import ConfigParser
from safetensors.torch import save_file

import monai_vslp.workflows as workflows
from monai_vslp.cli import main
from monai_vslp.data import read_cohort, read_image
from monai_vslp.networks.backbone import TokenBackbone
from monai_vslp.utils.errors import InputError
from monai_vslp.utils.timm import import_timm
from monai_vslp.workflows import cross_validate, score_predictions
from monai_vslp.workflows.bundle import read_config

pytestmark = pytest.mark.usefixtures("one_mlflow_database")

module = cross_validate.__globals__
TRAIN = module["train"]
TINY = SMALL_NETWORK | {"batch_size": 3}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Seven images of four patients in train and val, one of them not named; the last image is for testing."""
    table = write_two_class_cohort(tmp_path_factory.mktemp("cohort"), train=6, val=2, size=(32, 40))
    patients = ("a", "a", "b", "b", "b", "c", "", "d")
    text = table.read_text()
    for index, patient in enumerate(patients):
        text = re.sub(rf"(i{index}\.png,\w+,)p{index},", rf"\g<1>{patient},", text)
    table.write_text(text.replace("i7.png,val", "i7.png,test"))
    return table


def run(cohort, output, **options):
    return cross_validate(
        cohort, cohort.parent / "images", output, **{"folds": 2, "epochs": 1, "progress": False, **TINY, **options}
    )


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory):
    return run(cohort, tmp_path_factory.mktemp("out") / "out").parent


def predictions(folder):
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def result(folder):
    return json.loads((folder / "cross_validation.json").read_text())


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.glob("fold*/models/model.pt"))}


@pytest.fixture
def trained(monkeypatch):
    """Names of the folds that are trained while a test runs; a function under ``fail`` sees each one first."""

    class Calls(list):
        fail = None

    calls = Calls()

    def counted(table, images, output, **options):
        calls.append(output.name)
        if calls.fail is not None:
            calls.fail(output.name)
        return TRAIN(table, images, output, **options)

    monkeypatch.setitem(module, "train", counted)
    return calls


# ---- what it says ------------------------------------------------------------------------------------------------------------


def test_no_patient_is_trained_on_and_predicted_by_one_network(cohort, finished):
    tables = [read_cohort(finished / f"fold{k}.csv", cohort.parent / "images") for k in (1, 2)]
    for table in tables:
        patients = {name: {r.patient for r in table.split(name).records} - {""} for name in ("train", "val")}
        assert not patients["train"] & patients["val"]
        assert len(table) == 7 and not len(table.split("test"))
    held_out = [record.image.name for table in tables for record in table.split("val").records]
    assert sorted(held_out) == [f"i{k}.png" for k in range(7)], "each image but the one for testing, once"
    rows = predictions(finished)
    assert [row["image"] for row in rows] == [f"i{k}.png" for k in range(7)]
    for row in rows:
        table = tables[int(row["fold"]) - 1]
        assert row["image"] in [record.image.name for record in table.split("val").records]
        assert row["patient"] == {"i6.png": "", "i0.png": "a"}.get(row["image"], row["patient"])
    for k in (1, 2):
        assert read_config(finished / f"fold{k}", "train.json")["table"] == str(finished / f"fold{k}.csv")


def test_predictions_are_those_of_the_networks_of_the_folds(cohort, finished):
    rows = predictions(finished)
    for k in (1, 2):
        network = ConfigParser(read_config(finished / f"fold{k}", "inference.json")).get_parsed_content("network_def").eval()
        network.load_state_dict(torch.load(finished / f"fold{k}" / "models" / "model.pt", weights_only=True))
        mine = [row for row in rows if row["fold"] == str(k)]
        for row in mine:
            pixels = torch.from_numpy(read_image(cohort.parent / "images" / row["image"]).copy()).permute(2, 0, 1) / 255
            with torch.no_grad():
                expected = network.head(network.features(pixels[None])).softmax(dim=1).mean(dim=(0, 2, 3))
            found = [float(row["predicted pink"]), float(row["predicted purple"])]
            assert found == pytest.approx(expected.tolist(), abs=2e-6)
        # The training's own validation saw the same images with the same network.
        history = json.loads((finished / f"fold{k}" / "models" / "history.json").read_text())
        assert np.mean([float(row["error"]) for row in mine]) == pytest.approx(history[-1]["proportion_error"], abs=1e-5)


def test_the_report_by_hand(cohort, finished):
    rows, found = predictions(finished), result(finished)
    given = {r.image.name: r.proportions.mean for r in read_cohort(cohort, cohort.parent / "images").records}
    errors, baselines = [], []
    for row in rows:
        p = given[row["image"]]
        assert [float(row["given pink"]), float(row["given purple"])] == pytest.approx(p.tolist(), abs=1e-6)
        errors.append(np.abs(p - [float(row["predicted pink"]), float(row["predicted purple"])]))
        others = [given[other["image"]] for other in rows if other["fold"] != row["fold"]]
        baselines.append(np.abs(p - np.mean(others, axis=0)))
    errors, baselines = np.array(errors), np.array(baselines)
    assert found["overall"]["error"] == pytest.approx(errors.mean(), abs=1e-5)
    assert found["overall"]["baseline"] == pytest.approx(baselines.mean(), abs=1e-5)
    x, y = (np.array([float(row[f"{kind} purple"]) for row in rows]) for kind in ("given", "predicted"))
    purple = found["classes"]["purple"]
    assert purple["error"] == pytest.approx(errors[:, 1].mean(), abs=1e-5)
    assert purple["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-3)
    low, high = found["overall"]["interval"]
    assert low < found["overall"]["error"] < high
    assert found["patients"] == 4 and sum(fold["patients"] for fold in found["folds"]) == 4
    for fold in found["folds"]:
        mine = np.array([row["fold"] == str(fold["fold"]) for row in rows])
        assert fold["images"] == mine.sum() and fold["error"] == pytest.approx(errors[mine].mean(), abs=1e-5)
        assert fold["classes"]["pink"] == pytest.approx(errors[mine, 0].mean(), abs=1e-5)
        assert fold["seconds"] > 0
    worst = [row["error"] for row in found["images"]]
    assert worst == sorted(worst, reverse=True) and worst == pytest.approx(sorted(errors.mean(axis=1))[::-1], abs=1e-5)
    text = (finished / "cross_validation.md").read_text()
    assert f"| **all** | {100 * errors.mean():.1f} | {100 * low:.1f} to {100 * high:.1f} |" in text
    assert text.index(found["images"][0]["image"]) < text.index(found["images"][1]["image"])
    assert (finished / "cross_validation.png").stat().st_size > 5000


def test_scores_of_patients_with_equal_errors_have_no_interval():
    given = np.array([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5], [0.9, 0.1]])
    shift = np.array([0.1, -0.1])
    found = score_predictions(given, given + shift, given[::-1], ["a", "a", "b", "c"], [1, 1, 2, 2], ["x", "y"])
    assert found["overall"]["error"] == pytest.approx(0.1)
    assert found["overall"]["interval"] == pytest.approx([0.1, 0.1])
    assert found["overall"]["baseline"] == pytest.approx((0.7 + 0.1 + 0.1 + 0.7) / 4)
    assert found["classes"]["x"]["correlation"] == pytest.approx(1.0)
    assert [fold["patients"] for fold in found["folds"]] == [1, 2]
    flat = score_predictions(given, np.full((4, 2), 0.5), given, ["a", "b", "c", "d"], [1, 1, 2, 2], ["x", "y"])
    assert flat["classes"]["x"]["correlation"] is None, "nothing varies"


def test_intervals_draw_patients_not_images():
    """Two patients of 1 and 30 images with errors 0 and 1: means of draws are 0, 30/31 and 1, each in over 2.5 % of them."""
    predicted = np.array([[0.0, 1.0]] + 30 * [[1.0, 0.0]])
    given = np.tile([0.0, 1.0], (31, 1))
    found = score_predictions(given, predicted, given, ["a"] + 30 * ["b"], [1] + 30 * [2], ["x", "y"])
    assert found["overall"]["error"] == pytest.approx(30 / 31)
    assert found["overall"]["interval"] == pytest.approx([0.0, 1.0])
    alone = score_predictions(given, predicted, given, range(31), [1] + 30 * [2], ["x", "y"])
    assert alone["overall"]["interval"][0] > 0.85


def test_intervals_are_as_wide_as_theory_says():
    """Many patients with one image each: ± 1.96 standard errors of the mean."""
    rng = np.random.default_rng(0)
    error = rng.uniform(0, 0.2, size=400)
    given = np.tile([0.5, 0.5], (400, 1))
    predicted = given + np.stack([error, -error], axis=1)
    low, high = score_predictions(given, predicted, given, range(400), [1] * 400, ["x", "y"])["overall"]["interval"]
    half = 1.96 * error.std(ddof=1) / 20
    assert (low, high) == pytest.approx((error.mean() - half, error.mean() + half), abs=0.1 * half)


# ---- going on --------------------------------------------------------------------------------------------------------------


def test_a_failure_in_the_middle_costs_nothing_that_was_finished(cohort, finished, tmp_path, trained):
    def fail(name):
        if name == "fold2":
            raise OSError("the disk is full")

    trained.fail = fail
    with pytest.raises(OSError, match="disk is full"):
        run(cohort, tmp_path / "out")
    assert trained == ["fold1", "fold2"] and not (tmp_path / "out" / "predictions.csv").exists()
    before = stamps(tmp_path / "out")
    trained.clear()
    trained.fail = None
    run(cohort, tmp_path / "out")
    assert trained == ["fold2"] and before.items() <= stamps(tmp_path / "out").items()
    assert predictions(tmp_path / "out") == predictions(finished)
    trained.clear()
    run(cohort, tmp_path / "out", feature_cache=tmp_path / "cache")
    assert not trained, "where features are kept changes no result"


def test_an_interrupted_epoch_goes_on_to_the_same_predictions(cohort, tmp_path, monkeypatch, trained):
    from monai_vslp.handlers import RunCheckpoint

    save = RunCheckpoint.save

    def save_then_interrupt(self, engine):
        save(self, engine)
        if trained == ["fold1", "fold2"] and engine.state.epoch == 1:
            raise KeyboardInterrupt

    run(cohort, tmp_path / "whole", epochs=3)
    trained.clear()
    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoint, "save", save_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(cohort, tmp_path / "out", epochs=3)
    checkpoint = tmp_path / "out" / "fold2" / "models" / "checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    trained.clear()
    run(cohort, tmp_path / "out", epochs=3)
    assert trained == ["fold2"] and predictions(tmp_path / "out") == predictions(tmp_path / "whole")


def test_what_predictions_depend_on_trains_again(cohort, tmp_path, trained):
    table = cohort.with_name(f"{tmp_path.name}.csv")
    table.write_text(cohort.read_text())
    output = tmp_path / "out"
    run(table, output)
    first = predictions(output)
    trained.clear()
    run(table, output, learning_rate=5e-3)
    assert trained == ["fold1", "fold2"] and predictions(output) != first
    trained.clear()
    run(table, output, learning_rate=5e-3, restart=True)
    assert trained == ["fold1", "fold2"]
    trained.clear()
    table.write_text(re.sub(r"(i0\.png,train,a),.*", r"\1,50,50", table.read_text()))
    run(table, output, learning_rate=5e-3)
    assert trained == ["fold1", "fold2"], "one training has the image, the other is judged by it"


def test_old_reports_do_not_outlive_their_folds(cohort, finished, tmp_path, trained):
    shutil.copytree(finished, tmp_path / "out")

    def fail(name):
        raise OSError("the disk is full")

    trained.fail = fail
    with pytest.raises(OSError, match="disk is full"):
        run(cohort, tmp_path / "out", seed=1)
    assert not [path for path in (tmp_path / "out").iterdir() if "cross_validation" in path.name or "predictions" in path.name]


def test_more_folds_before_are_said_to_be_of_no_use(cohort, finished, tmp_path, monkeypatch, caplog):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "fold3.json").write_text("{}")
    run(cohort, "out")
    assert "fold3 is of an earlier division" in caplog.text and caplog.text.count("earlier division") == 1
    assert predictions(tmp_path / "out") == predictions(finished)


@pytest.mark.slow
def test_processes_give_the_same_predictions(cohort, finished, tmp_path):
    run(cohort, tmp_path / "out", jobs=2)
    assert predictions(tmp_path / "out") == predictions(finished)


# ---- further ways ------------------------------------------------------------------------------------------------------------


def test_nested_folds_choose_for_each_other(cohort, tmp_path):
    run(cohort, tmp_path / "out", folds=3, nested=True)
    place = {row["image"]: int(row["fold"]) for row in predictions(tmp_path / "out")}
    for k in (1, 2, 3):
        table = read_cohort(tmp_path / "out" / f"fold{k}.csv", cohort.parent / "images")
        found = {name: {place[r.image.name] for r in table.split(name).records} for name in ("train", "val", "test")}
        assert found == {"test": {k}, "val": {k % 3 + 1}, "train": {(k + 1) % 3 + 1}}
    given = {row["image"]: float(row["given pink"]) for row in predictions(tmp_path / "out")}
    baseline = [
        abs(p - np.mean([given[other] for other in given if place[other] == (place[image] + 1) % 3 + 1]))
        for image, p in given.items()
    ]
    assert result(tmp_path / "out")["overall"]["baseline"] == pytest.approx(np.mean(baseline), abs=1e-5)
    assert "wholly unseen" in (tmp_path / "out" / "cross_validation.md").read_text()


@pytest.mark.slow
def test_a_frozen_backbone_runs_once(cohort, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = import_timm().create_model("vit_tiny_patch16_224", num_classes=0, **SMALL_BACKBONE)
    save_file(model.state_dict(), str(tmp_path / "vit.safetensors"))
    options = {**TINY, "rank": 8, "hidden": 4, "epochs": 2, "rounds": 0, "weights": tmp_path / "vit.safetensors"}
    seen, forward, finish = [], TokenBackbone.forward, []

    def counted(self, x):
        seen.extend(window.numpy().tobytes() for window in x)
        return forward(self, x)

    def train(table, images, output, **given):
        finish.append(len(seen))
        return TRAIN(table, images, output, **given)

    monkeypatch.setattr(TokenBackbone, "forward", counted)
    monkeypatch.setitem(module, "train", train)
    run(cohort, tmp_path / "out", **options)
    assert len(list((tmp_path / "out" / "features").rglob("*.pt"))) == len(seen) == len(set(seen)) > 0
    # The second fold trains on images that the first one held out: their views are new, and nothing else is.
    before, after = finish[1], len(seen) - finish[1]
    assert after < before
    assert read_config(tmp_path / "out" / "fold1", "train.json")["feature_cache"] == str(tmp_path / "out" / "features")


def test_mlflow_has_a_nested_run_per_fold_and_a_dead_server_stops_nothing(cohort, finished, tmp_path, monkeypatch, caplog):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert not (finished / "mlflow_run.json").exists(), "off unless asked for"
    output = tmp_path / "out"
    for _ in range(2):  # the second call has nothing to train, and continues the same runs
        run(cohort, output, tracking=True)
    client = mlflow.MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("monai_vslp_cross_validation")
    runs = {found.info.run_name: found for found in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("out")
    assert set(runs) == {"fold1", "fold2"} and parent.info.status == "FINISHED"
    assert {found.data.tags["mlflow.parentRunId"] for found in runs.values()} == {parent.info.run_id}
    scores = result(output)
    assert parent.data.metrics["error"] == pytest.approx(scores["overall"]["error"])
    assert parent.data.metrics["error purple"] == pytest.approx(scores["classes"]["purple"]["error"])
    assert runs["fold2"].data.metrics["fold/baseline"] == pytest.approx(scores["folds"][1]["baseline"])
    assert all("loss" in found.data.metrics for found in runs.values()), "the run of a fold is that of its training"
    assert parent.data.params["folds"] == "2" and runs["fold1"].data.params["epochs"] == "1"
    names = {file.path for file in client.list_artifacts(parent.info.run_id, "cross_validation")}
    assert names == {
        f"cross_validation/{name}" for name in ("predictions.csv", *(f"cross_validation.{s}" for s in ("json", "md", "png")))
    }
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run(cohort, tmp_path / "dead", tracking_uri="http://127.0.0.1:9")
    assert predictions(tmp_path / "dead") == predictions(finished) and "Tracking in MLflow" in caplog.text


def test_the_command_line_takes_the_options_of_train(cohort, tmp_path, monkeypatch, capsys):
    original = workflows.cross_validate
    monkeypatch.setattr(workflows, "cross_validate", lambda *a, **k: original(*a, **{**TINY, **k}))
    command = [
        "--quiet",
        "cross-validate",
        str(cohort),
        "--images",
        str(cohort.parent / "images"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--folds", "2", "--epochs", "1", "--seed", "3", "--mpp", "0.25"]) == 0
    assert capsys.readouterr().out.strip() == f"Report: {tmp_path / 'out' / 'cross_validation.md'}"
    config = read_config(tmp_path / "out" / "fold1", "train.json")
    assert (config["seed"], config["mpp"], config["epochs"]) == (3, 0.25, 1)
    assert main([*command, "--folds", "9"]) == 2
    assert "4 patients cannot be divided into 9 folds" in capsys.readouterr().err


# ---- what is wrong is said before anything is trained ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "folds must be a whole number from 2"),
        ({"folds": 5}, "4 patients cannot be divided into 5 folds"),
        ({"folds": 2, "nested": True}, "needs 3 folds"),
        ({"jobs": 0}, "jobs must be a whole number"),
        ({"epoch": 3}, "no option 'epoch'. Did you mean 'epochs'"),
        ({"weights": "nowhere.pt"}, "nowhere.pt does not exist"),
        ({"enclosing": ["blue"]}, "enclosing names 'blue'"),
    ],
)
def test_wrong_options_are_explained(cohort, tmp_path, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        run(cohort, tmp_path / "out", **options)
    assert not list(tmp_path.rglob("model.pt"))


def test_folders_of_others_are_left_alone(cohort, tmp_path):
    (tmp_path / "fold2").mkdir()
    (tmp_path / "fold2" / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match="fold2 was not written by a cross-validation"):
        run(cohort, tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["fold2", "notes.txt"]
