"""Miniature benchmarks of tiny cohorts and networks."""

import copy
import csv
import functools
import inspect
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import SMALL_NETWORK, write_two_class_cohort
from monai.bundle import ConfigParser

from monai_vslp.data.synthetic import write_cohort
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows import benchmark
from monai_vslp.workflows.benchmark import plan_benchmark, run_benchmark
from monai_vslp.workflows.bundle import create_run, read_config
from monai_vslp.workflows.train import FROM_SCRATCH

TINY = SMALL_NETWORK
ORIGINALS = {name: getattr(benchmark, name) for name in ("train", "segment", "evaluate")}
EXAMPLE = Path(__file__).parents[2] / "configs" / "benchmark_example.json"


# ---- functions that a config names under "fit" ---------------------------------------------------------------------------


def untrained(run, table, images, seed, progress, scale=1.0):
    """A bundle folder with a network of random weights: much like training, and quick."""
    create_run(run, FROM_SCRATCH | TINY | {"classes": ["pink", "purple"]}, ["pink", "purple"])
    torch.manual_seed(seed)
    network = ConfigParser(read_config(run, "inference.json")).get_parsed_content("network_def")
    (run / "models").mkdir(exist_ok=True)
    torch.save({key: scale * value for key, value in network.state_dict().items()}, run / "models" / "model.pt")


def failing(run, table, images, seed, progress):
    raise ValueError("this method has a mistake")


def deadly(run, table, images, seed, progress):
    os._exit(7)


def forgetful(run, table, images, seed, progress):
    pass


def endless(run, table, images, seed, progress):
    (Path(run).parent / "started").touch()
    time.sleep(600)


# ---- data ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory):
    """Two cohorts with tables of two noise levels, and masks of the split that is scored alone."""
    root = tmp_path_factory.mktemp("cohorts")
    for index, name in enumerate(("one", "two")):
        table = write_two_class_cohort(root / name, train=3, val=2, size=(32, 40 + 8 * index))
        for stem in ("i0", "i1", "i2"):
            (root / name / "masks" / f"{stem}.png").unlink()
        noisy = re.sub(r",[\d.]+,[\d.]+$", ",60,40" if index else ",30,70", table.read_text(), flags=re.M)
        (root / name / "medium.csv").write_text(noisy)
    return root


@pytest.fixture
def config(cohorts):
    """Two data sets, two tables, two methods, two seeds; written to a file by ``save``."""
    data = {
        name: {
            "images": f"{name}/images",
            "masks": f"{name}/masks",
            "tables": {"exact": f"{name}/table.csv", "medium": f"{name}/medium.csv"},
            "mpp": 0.5,
        }
        for name in ("one", "two")
    }
    data["one"]["groups"] = {"dark": ["purple"]}
    store = f"sqlite:///{cohorts / 'mlflow.db'}"  # one database for all trainings: making one takes longer than they do
    return {
        "data": data,
        "noise": ["exact", "medium"],
        "seeds": [0, 1],
        "methods": {
            "trained": {"title": "Trained", "train": {"epochs": 1, "tracking_uri": store}, "given": ["none", "exact"]},
            "random": {"fit": {"_target_": f"{__name__}.untrained"}, "segment": {"alpha": 0.5}},
        },
        "shared": {"train": TINY, "segment": {"views": "none"}},
    }


@pytest.fixture
def small(config):
    """One data set, one table, the quick method, two seeds."""
    config |= {"noise": ["exact"], "data": {"one": config["data"]["one"]}}
    del config["methods"]["trained"]
    return config


@pytest.fixture
def save(cohorts, tmp_path):
    def write(config):
        path = cohorts / f"{tmp_path.name}.json"
        path.write_text(json.dumps(config))
        return path

    return write


def _failed(output):
    path = output / "failed.csv"
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _count(monkeypatch, name, action=None):
    """Calls of a step of the benchmark, recorded by their named arguments; ``action`` sees them first."""
    original, calls = getattr(benchmark, name), []

    @functools.wraps(original)  # the benchmark looks at its arguments
    def counted(*arguments, **options):
        calls.append((arguments, inspect.signature(ORIGINALS[name]).bind(*arguments, **options).arguments))
        if action is not None:
            action(len(calls))
        return original(*arguments, **options)

    monkeypatch.setattr(benchmark, name, counted)
    return calls


# ---- the way through -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_is_interrupted_and_goes_on_without_repeating(config, save, cohorts, tmp_path, monkeypatch):
    path, output = save(config), tmp_path / "out"

    def interrupt(number):
        if number == 5:
            raise KeyboardInterrupt

    opened, inside = [], []

    def watch(event, arguments):
        if inside and event == "open" and isinstance(arguments[0], str | os.PathLike):
            opened.append(os.fspath(arguments[0]))

    sys.addaudithook(watch)
    train = benchmark.train

    @functools.wraps(train)
    def watched(*arguments, **options):
        inside.append(True)
        try:
            return train(*arguments, **options)
        finally:
            inside.clear()

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "train", watched)
        trained, scored = _count(patch, "train"), _count(patch, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_benchmark(path, output, progress=False)
    # Masks are never an argument of the training, and none of their files is opened by it.
    assert "masks" not in repr(trained) and any("images" in name for name in opened)
    assert not [name for name in opened if "masks" in name]

    done = {p: p.stat().st_mtime_ns for name in ("scores.json", "model.pt") for p in output.rglob(name)}
    assert len(done) == 2 + 3, "trained/seed0 and seed1 have two tables to be scored with each, then comes the interrupt"
    assert (output / "benchmark.md").exists() and len(scored) == 5

    with monkeypatch.context() as patch:
        trained, scored, segmented = (_count(patch, name) for name in ("train", "evaluate", "segment"))
        result = run_benchmark(path, output, progress=False)
    assert len(trained) == 8 - 2 and len(scored) == 16 * 2 - 2 * 2
    assert all(p.stat().st_mtime_ns == then for p, then in done.items())
    files = sorted(output.rglob("scores.json"))
    assert len(files) == 16 and not _failed(output)
    assert result == output / "benchmark.md" and (output / "benchmark.png").exists()
    assert not list(output.rglob("labels.tif")) and not list(output.rglob("checkpoint.pt")), "bulky files are gone"
    assert len(list(output.rglob("model.pt"))) == 16

    with monkeypatch.context() as patch:
        trained, scored = _count(patch, "train"), _count(patch, "segment")
        run_benchmark(path, output, progress=False)
        assert not trained and not scored

    # The table against the scores, by hand.
    with open(output / "benchmark.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 2 * 2  # data, tables, methods, given, maps
    for row in rows:
        scores = [json.loads(p.read_text()) for p in files if p.parts[-5:-2] == (row["data"], row["noise"], row["method"])]
        blocks = [s["given"][row["given"]]["blocks"][0] for s in scores]
        maps = [next(r for r in block["rows"] if r["map"] == row["map"]) for block in blocks]
        for column, key in (("mIoU all classes", "miou"), ("ECE", "ece"), ("boundary F1", "boundary_f1")):
            values = [m[key] for m in maps]
            assert float(row[f"{column}, mean"]) == pytest.approx(statistics.mean(values))
            assert float(row[f"{column}, sd"]) == pytest.approx(statistics.stdev(values), abs=1e-12)
        assert (row["mIoU dark against rest, n"] == "2") == (row["data"] == "one")
    seconds = [json.loads(p.read_text())["train_seconds"] for p in files]
    assert all(value > 0 for value in seconds)
    given = {(row["method"], row["given"]) for row in rows if row["noise"] == "medium"}
    assert given == {("trained", "none"), ("trained", "exact"), ("random", "none"), ("random", "medium")}
    tables = {"none": None, "exact": "table.csv", "medium": "medium.csv"}
    for _, options in segmented:
        assert getattr(options["proportions"], "name", None) == tables[options["output"].name.partition("-")[2]]


def test_a_failing_method_is_recorded_tried_again_and_the_rest_goes_on(small, save, tmp_path, monkeypatch):
    small["methods"] = {
        "wrong": {"fit": {"_target_": f"{__name__}.failing"}},
        "empty": {"fit": {"_target_": f"{__name__}.forgetful"}},
        **small["methods"],
    }
    small["seeds"] = [3]
    path, output = save(small), tmp_path / "out"
    run_benchmark(path, output, progress=False)
    failed = {row["method"]: row for row in _failed(output)}
    assert set(failed) == {"wrong", "empty"} and failed["wrong"]["seed"] == "3"
    assert failed["wrong"]["reason"] == "ValueError: this method has a mistake"
    assert "inference.json is missing" in failed["empty"]["reason"]
    folder = output / "runs" / "one" / "exact"
    assert "Traceback" in (folder / "wrong" / "seed3" / "error.txt").read_text()
    assert (folder / "random" / "seed3" / "scores.json").exists()
    monkeypatch.setattr(sys.modules[__name__], "failing", untrained)
    run_benchmark(path, output, only=["wrong"], progress=False)
    assert [row["method"] for row in _failed(output)] == ["empty"], "what was not tried stays on the list"
    assert (folder / "wrong" / "seed3" / "scores.json").exists() and not (folder / "wrong" / "seed3" / "error.txt").exists()


def test_a_change_repeats_what_depends_on_it_alone(small, save, cohorts, tmp_path, monkeypatch):
    small["seeds"], output = [0], tmp_path / "out"
    small["methods"]["other"] = copy.deepcopy(small["methods"]["random"])

    def changed():
        with monkeypatch.context() as patch:
            trained, scored = [], _count(patch, "evaluate")
            fit = untrained
            patch.setattr(sys.modules[__name__], "untrained", lambda **options: (trained.append(1), fit(**options)))
            run_benchmark(save(small), output, progress=False)
        return len(trained), len(scored)

    assert changed() == (1, 4), "one network for both: they do not differ yet"
    small["methods"]["other"]["title"] = "Another title"
    assert changed() == (0, 0) and "Another title" in (output / "benchmark.md").read_text()
    small["methods"]["other"]["given"] = ["exact"]
    assert changed() == (0, 1), "the network stays"
    small["methods"]["random"]["fit"]["scale"] = 0.5
    assert changed() == (1, 2)
    table = cohorts / "one" / f"{tmp_path.name}.csv"
    shutil.copy(cohorts / "one" / "table.csv", table)
    small["data"]["one"]["tables"]["exact"] = f"one/{table.name}"
    assert changed() == (0, 0), "the same numbers elsewhere"
    table.write_text(table.read_text().replace("train,p0,", "train,p0,0"))
    assert changed() == (2, 3)


@pytest.mark.slow
def test_processes_one_dies_the_others_finish_with_the_same_scores(small, save, tmp_path):
    run_benchmark(save(small), tmp_path / "alone", progress=False)
    small["methods"]["deadly"] = {"fit": {"_target_": f"{__name__}.deadly"}}
    small["keep"] = True
    run_benchmark(save(small), tmp_path / "out", only=["random", "one/*/deadly/seed1"], jobs=2, progress=False)
    (failed,) = _failed(tmp_path / "out")
    assert (failed["method"], failed["seed"]) == ("deadly", "1") and "process died" in failed["reason"]
    for seed in (0, 1):
        name = f"runs/one/exact/random/seed{seed}/scores.json"
        here, there = (json.loads((tmp_path / folder / name).read_text()) for folder in ("out", "alone"))
        for given in ("none", "exact"):
            assert here["given"][given]["blocks"] == there["given"][given]["blocks"]
    assert len(list((tmp_path / "out").rglob("labels.tif"))) == 2 * 2 * 2, "keep: seeds, tables given, images"


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_keeps_what_is_done(small, save, tmp_path):
    """A real SIGINT to the process that waits for two others, of which one never ends."""
    small["seeds"] = [0]
    small["methods"]["endless"] = {"fit": {"_target_": f"{__name__}.endless"}}
    program = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1] / 'helpers')]}\n"
        "from monai_vslp.workflows.benchmark import run_benchmark\n"
        f"if __name__ == '__main__': run_benchmark({str(save(small))!r}, {str(tmp_path / 'out')!r}, jobs=2, progress=False)"
    )
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=log, stderr=log, preexec_fn=_default_interrupt)
        folder, deadline = tmp_path / "out" / "runs" / "one" / "exact", time.monotonic() + 120
        expected = (folder / "random" / "seed0" / "scores.json", folder / "endless" / "seed0" / "started")
        while not all(p.exists() for p in expected) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) != 0
    text = (tmp_path / "log.txt").read_text()
    assert all(p.exists() for p in expected) and "KeyboardInterrupt" in text, text[-2000:]
    assert not (folder / "endless" / "seed0" / "scores.json").exists()
    assert "| 1 |" in (tmp_path / "out" / "benchmark.md").read_text(), "the table of what is done"
    children = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in children.splitlines() if "spawn_main" in line and f"parent_pid={process.pid}," in line]


def _default_interrupt():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells start background jobs that ignore it


def test_mlflow_has_a_nested_run_per_task_and_a_dead_server_stops_nothing(small, save, tmp_path, monkeypatch, caplog):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    small |= {"tracking": True, "seeds": [0]}
    small["methods"]["wrong"] = {"fit": {"_target_": f"{__name__}.failing"}}
    output = tmp_path / "out"
    run_benchmark(save(small), output, progress=False)
    client = mlflow.MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("monai_vslp_benchmark")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("out")
    assert set(runs) == {"one/exact/random/seed0", "one/exact/wrong/seed0"}
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    good, bad = runs["one/exact/random/seed0"], runs["one/exact/wrong/seed0"]
    assert (parent.info.status, good.info.status, bad.info.status) == ("FINISHED", "FINISHED", "FAILED")
    scores = json.loads((output / "runs/one/exact/random/seed0/scores.json").read_text())
    expected = scores["given"]["exact"]["blocks"][0]["rows"][1]["miou"]
    assert good.data.metrics["exact/refined/mIoU all classes"] == pytest.approx(expected)
    assert good.data.params["segment.alpha"] == "0.5" and "mistake" in bad.data.tags["reason"]
    names = {file.path for file in client.list_artifacts(parent.info.run_id, "benchmark")}
    assert {"benchmark/benchmark.md", "benchmark/benchmark.csv", "benchmark/benchmark.png", "benchmark/failed.csv"} <= names
    del small["methods"]["wrong"]
    small["tracking"] = "http://127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run_benchmark(save(small), tmp_path / "dead", progress=False)
    assert (tmp_path / "dead" / "runs/one/exact/random/seed0/scores.json").exists() and "Tracking in MLflow" in caplog.text


# ---- what is wrong is said before anything is trained ------------------------------------------------------------------------


def _set(path, value):
    """Sets a value inside nested mappings; the keys are separated by blanks."""

    def change(config):
        *parents, last = path.split()
        for key in parents:
            config = config.setdefault(key, {})
        config[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("sedes", [0]), "unknown key 'sedes'. Did you mean 'seeds'"),
        (lambda c: c.pop("noise"), "lacks 'noise'"),
        (_set("seeds", [0, 0]), "different whole numbers"),
        (_set("noise", ["exakt"]), "no table 'exakt'. Did you mean 'exact'"),
        (_set("data one maks", "x"), "data set 'one' has the unknown key 'maks'. Did you mean 'masks'"),
        (_set("data one score_split", "vall"), "Did you mean 'val'"),
        (_set("data one mpp", -1), "mpp must be a positive number"),
        (_set("data one groups", {"g": ["pnik"]}), "unknown classes pnik"),
        (_set("data one images", "one/nowhere"), "nowhere does not exist"),
        (_set("data one masks", "one/images"), "the same folder"),
        (_set("data one masks", "two/masks"), "they must have one size"),
        (_set("data one tables exact", "one/gone.csv"), "gone.csv does not exist"),
        (_set("data", {"a/b": {}}), "names become folders"),
        (_set("methods random trian", {}), "Did you mean 'train'"),
        (_set("methods trained train epoch", 3), "unknown key 'epoch'. Did you mean 'epochs'"),
        (_set("methods trained train seed", 3), "unknown key 'seed'"),
        (_set("methods trained train weights", "gone.pt"), "gone.pt does not exist"),
        (_set("methods trained train weights", "one/masks/i3.png"), "masks serve to score, never to train"),
        (_set("methods random fit table", "x"), "multiple values"),
        (_set("methods random fit scael", 1), "unexpected keyword argument 'scael'"),
        (_set("methods random fit", {"_target_": "monai_vslp.nothing.here"}), "that can be imported"),
        (_set("methods random segment alhpa", 1), "Did you mean 'alpha'"),
        (_set("methods random segment trust", "rater"), "trust must be positive"),
        (_set("methods random segment regularizer", "learned"), "trains none"),
        (_set("methods random given", ["lwo"]), "no table 'lwo'"),
        (_set("methods random given", "none"), "list of different names"),
        (_set("methods trained regularizer", {"epcohs": 3}), "Did you mean 'epochs'"),
        (_set("shared segment views", "flisp"), "Did you mean 'flips'"),
        (_set("tracking", 3), "'tracking' must be"),
    ],
)
def test_wrong_configs_are_explained(config, save, tmp_path, change, message):
    change(config)
    with pytest.raises(InputError, match=re.escape(message)):
        run_benchmark(save(config), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_wrong_files_are_explained(config, save, cohorts, tmp_path):
    def message(config, **options):
        with pytest.raises(InputError) as raised:
            run_benchmark(save(config), tmp_path / "out", progress=False, **options)
        assert not (tmp_path / "out").exists()
        return str(raised.value)

    shutil.copytree(cohorts / "one", tmp_path / "one")
    config["data"] = {"one": config["data"]["one"]}
    for key in ("images", "masks"):
        config["data"]["one"][key] = str(tmp_path / "one" / key)
    table = tmp_path / "one" / "table.csv"
    config["data"]["one"]["tables"]["exact"] = str(table)
    text = table.read_text()
    swapped = [",".join([*cells[:3], cells[4], cells[3]]) for cells in (line.split(",") for line in text.splitlines())]
    table.write_text("\n".join(swapped))
    assert "another order" in message(config)
    table.write_text(re.sub(r"(i4.png,val,p4),.*", r"\1,,", text))
    assert "has no proportions of 1 images that are scored: i4.png" in message(config)
    table.write_text(text.replace("i4.png,val", "i4.png,test"))
    assert "different images of split 'val'" in message(config)
    table.write_text(text)
    mask = tmp_path / "one" / "masks" / "i4.png"
    data = mask.read_bytes()
    mask.unlink()
    assert "no mask for 1 of 2 images of split 'val': i4.png" in message(config)
    mask.write_bytes(data)
    assert "names no task. Did you mean 'random'" in message(config, only=["randon"])
    assert "jobs" in message(config, jobs=0)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(InputError, match="no JSON"):
        run_benchmark(broken, tmp_path / "out")
    with pytest.raises(InputError, match="does not exist"):
        run_benchmark(tmp_path / "nowhere.json", tmp_path / "out")


def test_the_example_fits_the_demo(tmp_path):
    write_cohort(tmp_path / "demo" / "cohort", train=2, val=1, size=64)
    (tmp_path / "configs").mkdir()
    shutil.copy(EXAMPLE, tmp_path / "configs")
    tasks = plan_benchmark(tmp_path / "configs" / EXAMPLE.name, tmp_path / "out")
    config = json.loads(EXAMPLE.read_text())
    assert len(tasks) == len(config["noise"]) * len(config["methods"]) * len(config["seeds"])
    assert {task.name for task in tasks if task.seed == 0 and task.noise == "low"} == {
        f"synthetic/low/{method}/seed0" for method in config["methods"]
    }
    assert all([path.name for path in task.inputs] == ["val_0002.png"] for task in tasks)
    assert len({task.digest for task in tasks}) == len(tasks) and not (tmp_path / "out").exists()
