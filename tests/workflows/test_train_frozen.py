import json
import shutil
import subprocess
import sys

import pytest
import torch
from cases import SMALL_BACKBONE, write_small_backbone, write_two_class_cohort

from monai_vslp.data import bags as bags_module
from monai_vslp.data import read_cohort
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows import segment, train
from monai_vslp.workflows import train as train_workflow
from monai_vslp.workflows.bundle import read_config

pytestmark = pytest.mark.usefixtures("one_mlflow_database")

RECIPES = train_workflow.__globals__["RECIPES"]
_estimated = train_workflow.__globals__["_estimated"]

NETWORK = {"backbone_kwargs": SMALL_BACKBONE, "blocks": [0, 1], "window": 32, "rank": 16, "hidden": 8}
OPTIONS = NETWORK | {"epochs": 4, "rounds": 1, "progress": False}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_two_class_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_small_backbone(tmp_path_factory.mktemp("weights") / "vit.safetensors")


def run(cohort, local, output, **options):
    return train(cohort, cohort.parent / "images", output, weights=local, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def finished(cohort, local, tmp_path_factory):
    return run(cohort, local, tmp_path_factory.mktemp("runs") / "run")


def state(folder, name="model.pt"):
    return torch.load(folder / "models" / name, weights_only=True)


def errors(folder):
    return [entry["proportion_error"] for entry in json.loads(folder.read_text())]


def test_fit_round_and_gate(finished):
    models = finished / "models"
    first, second = errors(models / "round0" / "history.json"), errors(models / "round1" / "history.json")
    better = min(second) <= min(first)
    kept = torch.load(models / ("round1" if better else "round0") / "model.pt", weights_only=True)
    found = state(finished)
    assert all(torch.equal(found[key], kept[key]) for key in kept)
    # The fit leaves the correction at zero, the round changes it.
    assert float(state(finished, "round0/model.pt")["head.correction.3.weight"].abs().max()) == 0.0
    assert float(state(finished, "round1/model.pt")["head.correction.3.weight"].abs().max()) > 0.0
    assert not (models / "bags").exists()
    assert read_config(finished, "inference.json")["magnifications"] == [1, 2]


def test_what_it_left_segments(cohort, finished, tmp_path):
    image = sorted((cohort.parent / "images").glob("*.png"))[0]
    assert segment([image], finished, tmp_path / "out", proportions=cohort, progress=False) == {}
    assert (tmp_path / "out" / image.stem / "labels.tif").is_file()


def test_no_seed_changes_the_fit_without_jitter(cohort, local, finished, tmp_path):
    one = run(cohort, local, tmp_path / "a", rounds=0, training_views=1)
    two = run(cohort, local, tmp_path / "b", rounds=0, training_views=1)
    first, second = state(one), state(two)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_interrupted_anywhere_it_ends_the_same(cohort, local, finished, tmp_path, monkeypatch):
    target = tmp_path / "run"
    calls = {"n": 0}
    original = bags_module.torch.save

    def dying(value, path, *arguments, **options):
        calls["n"] += 1
        if calls["n"] == 4:
            raise KeyboardInterrupt
        return original(value, path, *arguments, **options)

    monkeypatch.setattr(bags_module.torch, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        run(cohort, local, target)
    monkeypatch.undo()
    kept = len(list((target / "models" / "bags").glob("*.pt")))
    assert kept == 3
    run(cohort, local, target)
    # And once more in the round of self-training, after its first epoch.
    other = tmp_path / "other"
    shutil.copytree(target, other)
    expected, found = state(finished), state(target)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


def test_a_worse_round_is_not_taken(cohort, local, tmp_path, monkeypatch):
    original = train_workflow.__globals__["_best_error"]
    monkeypatch.setitem(
        train_workflow.__globals__, "_best_error", lambda folder: original(folder) + (1.0 if folder.name == "round1" else 0.0)
    )
    target = run(cohort, local, tmp_path / "run")
    first, kept = state(target, "round0/model.pt"), state(target)
    assert all(torch.equal(first[key], kept[key]) for key in first)


def test_without_held_out_images_there_is_no_round(cohort, local, tmp_path, caplog):
    folder = tmp_path / "cohort"
    shutil.copytree(cohort.parent, folder)
    table = folder / cohort.name
    lines = table.read_text().splitlines()
    table.write_text("\n".join(line for line in lines if ",val," not in line) + "\n")
    target = run(table, local, tmp_path / "run")
    assert "could not be judged" in caplog.text and not (target / "models" / "round1").exists()


def errors_of_fits(monkeypatch, *values):
    """Let the fits have these errors on held-out proportions."""
    monkeypatch.setitem(train_workflow.__globals__, "_best_error", lambda folder: values[int(folder.name[-1])])


def test_surroundings_are_taken_where_held_out_proportions_are_met_better(cohort, local, tmp_path, monkeypatch):
    errors_of_fits(monkeypatch, 0.10, 0.08, 0.079)
    target = run(cohort, local, tmp_path / "run", rounds=None)
    kept, wide = state(target), state(target, "fit1/model.pt")
    assert all(torch.equal(kept[key], wide[key]) for key in wide)
    assert kept["head.linear.weight"].shape[0] == 3 * 2, "two classes, three squares"
    assert (target / "models" / "fit2").is_dir() and not (target / "models" / "round1").exists()
    for name in ("inference.json", "slide_inference.json", "train_regularizer.json"):
        assert read_config(target, name)["context"] == [1, 9, 31]
    ridge = read_config(target, "train_head.json")["ridge"]
    image = sorted((cohort.parent / "images").glob("*.png"))[0]
    assert segment([image], target, tmp_path / "out", progress=False) == {}
    # The same command again changes nothing; another one is refused.
    before = {path: path.stat().st_mtime_ns for path in (target / "models").rglob("*.pt")}
    run(cohort, local, target, rounds=None)
    assert before == {path: path.stat().st_mtime_ns for path in (target / "models").rglob("*.pt")}
    assert read_config(target, "inference.json")["context"] == [1, 9, 31]
    assert read_config(target, "train_head.json")["ridge"] == ridge
    with pytest.raises(InputError, match="other settings.*epochs"):
        run(cohort, local, target, rounds=None, epochs=5)


def test_surroundings_that_gain_nothing_are_left_out(cohort, local, tmp_path, monkeypatch):
    errors_of_fits(monkeypatch, 0.10, 0.096, 0.01)
    target = run(cohort, local, tmp_path / "run", rounds=None)
    assert not (target / "models" / "fit2").exists(), "the search ends with the first that is not better"
    assert (target / "models" / "round1" / "model.pt").is_file()
    assert read_config(target, "inference.json")["context"] is None
    assert state(target)["head.linear.weight"].shape[0] == 2


def test_features_are_shared_between_runs(cohort, local, tmp_path):
    run(cohort, local, tmp_path / "a", rounds=0, feature_cache=tmp_path / "features")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.pt")}
    run(cohort, local, tmp_path / "b", rounds=0, feature_cache=tmp_path / "features")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.pt")}
    assert before and before == after


def test_impossible_options(cohort, local, tmp_path):
    with pytest.raises(InputError, match="rank"):
        run(cohort, local, tmp_path / "a", rank=0)
    with pytest.raises(InputError, match="enclosing.*pink"):
        run(cohort, local, tmp_path / "c", enclosing=["gland"])
    with pytest.raises(InputError, match="rounds"):
        run(cohort, local, tmp_path / "b", rounds=-1)


@pytest.mark.slow
def test_the_overlay_runs_with_monai_bundle_run(finished, tmp_path):
    target = tmp_path / "run"
    shutil.copytree(finished, target)
    shutil.rmtree(target / "models")
    command = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", ".", "--progress", "False"]
    command += ["--config_file", "['configs/train.json','configs/train_head.json']", "--meta_file", "configs/metadata.json"]
    subprocess.run(command, cwd=target, check=True, capture_output=True, timeout=300)
    expected, found = state(finished, "round0/model.pt"), state(target)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


def test_estimates_are_told_from_measurements(cohort, tmp_path):
    records = read_cohort(cohort, cohort.parent / "images")
    assert not _estimated(records.split("train"))
    lines = cohort.read_text().splitlines()
    rounded = [lines[0]] + [",".join([*line.split(",")[:-2], "0.35", "0.65"]) for line in lines[1:]]
    table = tmp_path / "rounded.csv"
    table.write_text("\n".join(rounded) + "\n")
    assert _estimated(read_cohort(table, cohort.parent / "images").split("train"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_train_and_segment(cohort, local, tmp_path, recipe):
    options = {"rounds": None, **({"hidden": 6} if recipe == "clusters" else {})}
    target = run(cohort, local, tmp_path / "run", recipe=recipe, **options)
    overlay = read_config(target, "recipe.json")
    assert read_config(target, "inference.json")["head"] == overlay.get("head", "additive")
    assert [p.name for p in sorted((target / "models").glob("fit*"))] == ["fit0"] and not (
        target / "models" / "round1"
    ).exists()
    found = errors(target / "models" / "history.json")
    assert len(found) == 4 and min(found) < 0.5
    image = sorted((cohort.parent / "images").glob("*.png"))[0]
    assert segment([image], target, tmp_path / "out", proportions=cohort, progress=False) == {}
    with pytest.raises(InputError, match="other settings"):
        run(cohort, local, target, rounds=0)


def test_impossible_recipes(cohort, local, tmp_path):
    with pytest.raises(InputError, match="neither a file nor one of.*llp_vat"):
        run(cohort, local, tmp_path / "a", recipe="vat")
    with pytest.raises(InputError, match="frozen backbone"):
        train(cohort, cohort.parent / "images", tmp_path / "b", recipe="llp_vat")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="must be an object"):
        run(cohort, local, tmp_path / "c", recipe=tmp_path / "list.json")
