"""Where the work of a cohort runs: real Dask workers, some of them killed, and this process."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_slides
import pytest
import torch

import monai_vslp
from monai_vslp.utils.errors import InputError
from monai_vslp.workflows import executors
from monai_vslp.workflows.executors import Call, DaskExecutor, InlineExecutor, Work, make_executor

pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def cluster():
    """Two processes that are started once; killed ones are started again."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with make_executor(workers=2, retries=1) as executor:
        yield executor


@pytest.fixture(params=["inline", "dask"])
def executor(request):
    if request.param == "inline":
        with InlineExecutor() as one:
            yield one
    else:
        yield request.getfixturevalue("cluster")


def note(folder, name, size=0.0, **options):
    return Work(name, Call(f"{name}-{folder}", fake_slides.note, (str(folder), name, *options.values())), size=size)


def test_every_piece_has_one_outcome_and_bad_ones_stop_no_other(executor, tmp_path):
    works = [note(tmp_path, f"w{i}", seconds=0.0, fail=i == 3) for i in range(12)]
    outcomes = {outcome.work.name: outcome for outcome in executor.run(works)}
    assert sorted(outcomes) == sorted(work.name for work in works)
    assert isinstance(outcomes["w3"].error, ValueError) and "w3 is bad" in str(outcomes["w3"].error)
    assert all(outcome.result["name"] == name for name, outcome in outcomes.items() if name != "w3")


def test_the_largest_begin_first(executor, tmp_path):
    works = [note(tmp_path, f"w{i}", size=i, seconds=0.2) for i in (3, 9, 1, 7, 5, 0, 8)]
    list(executor.run(works))
    begun = [int(name[1:]) for name in fake_slides.begun(tmp_path)]
    assert len(begun) == 7
    # Two workers may note their beginnings in either order.
    assert all(abs(place - sorted(begun, reverse=True).index(size)) <= 1 for place, size in enumerate(begun))


def test_final_calls_see_all_parts(executor, tmp_path):
    works = [
        Work(
            f"w{i}",
            Call(f"gather-{tmp_path}-{i}", fake_slides.gather, (str(tmp_path), f"w{i}", 4)),
            tuple(Call(f"part-{tmp_path}-{i}-{k}", fake_slides.part, (str(tmp_path), f"w{i}", k)) for k in range(4)),
        )
        for i in range(5)
    ]
    assert {outcome.work.name: outcome.result for outcome in executor.run(works)} == {f"w{i}": 6 for i in range(5)}


def test_a_part_that_fails_is_that_of_its_piece_alone(executor, tmp_path):
    bad = Work(
        "bad",
        Call(f"never-{tmp_path}", fake_slides.note, (str(tmp_path), "never")),
        tuple(Call(f"p-{tmp_path}-{k}", fake_slides.note, (str(tmp_path), f"p{k}", 0.0, k != 1)) for k in range(3)),
    )
    outcomes = {outcome.work.name: outcome for outcome in executor.run([bad, note(tmp_path, "good")])}
    assert "is bad" in str(outcomes["bad"].error) and outcomes["good"].error is None
    assert "never" not in fake_slides.begun(tmp_path)


def test_closing_gives_up_what_has_not_begun(executor, tmp_path):
    outcomes = executor.run([note(tmp_path, f"w{i:02d}", seconds=0.02) for i in range(40)])
    next(outcomes)
    outcomes.close()
    time.sleep(0.2)
    assert len(fake_slides.begun(tmp_path)) <= 6, "one that ended, and those that were with the scheduler"


def test_a_dead_worker_costs_only_the_call_it_was_at(cluster, tmp_path):
    dying = Work("dying", Call(f"die-{tmp_path}", fake_slides.die, (str(tmp_path), "d", 1)), size=1)
    outcomes = {o.work.name: o for o in cluster.run([dying, *(note(tmp_path, f"w{i}", seconds=0.1) for i in range(12))])}
    assert outcomes["dying"].result == {"name": "d", "deaths": 1}
    assert all(outcome.error is None for outcome in outcomes.values()) and len(outcomes) == 13
    begun = fake_slides.begun(tmp_path)
    assert set(begun) == {f"w{i}" for i in range(12)} and len(begun) <= 13, "finished work is not done again"


def test_a_call_that_kills_its_workers_is_given_up_and_named(cluster, tmp_path):
    deadly = Work("deadly", Call(f"deadly-{tmp_path}", fake_slides.die, (str(tmp_path), "d", 99)))
    (outcome,) = cluster.run([deadly])
    assert type(outcome.error).__name__ == "KilledWorker"
    assert len((tmp_path / "d.deaths").read_text()) == 2, "retries = 1"


def test_only_a_few_pieces_are_with_the_scheduler(cluster, tmp_path):
    most = 0
    for _ in cluster.run([note(tmp_path, f"w{i}") for i in range(60)]):
        most = max(most, len(cluster._cluster.scheduler.tasks))
    # The scheduler learns a little later that results are not wanted any more.
    assert 0 < most <= 3 * executors.AHEAD * 2, "of 60"


def test_an_existing_scheduler_by_address_and_by_file(cluster, tmp_path, monkeypatch):
    scheduler = cluster.client.scheduler.address
    with make_executor(scheduler=scheduler) as other:
        (outcome,) = other.run([note(tmp_path, "by_address")])
        assert outcome.result["name"] == "by_address"
    monkeypatch.setattr(monai_vslp, "__version__", "0.0")  # of this process, where the scheduler is, too
    with pytest.raises(InputError, match=r"here is monai_vslp 0\.0, but tcp://.* has .*, tcp://.* has"):
        make_executor(scheduler=scheduler)
    monkeypatch.setattr(DaskExecutor, "_check_versions", lambda self: None)
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": scheduler}))
    with make_executor(scheduler_file=file) as other:
        (outcome,) = other.run([note(tmp_path, "by_file")])
        assert outcome.result["name"] == "by_file"
    (outcome,) = cluster.run([note(tmp_path, "still")])
    assert outcome.result["name"] == "still", "somebody else's cluster is left running"


def test_a_scheduler_that_goes_away_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(DaskExecutor, "_check_versions", lambda self: None)
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--host", "127.0.0.1"]
    file = tmp_path / "scheduler.json"
    paths = os.pathsep.join(filter(None, [str(Path(fake_slides.__file__).parent), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [*command, "--scheduler-file", str(file)], stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": paths}
    )
    deadline = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        with make_executor(scheduler_file=file) as executor:
            threading.Timer(0.5, process.kill).start()
            with pytest.raises(InputError, match="scheduler is gone"):
                list(executor.run([note(tmp_path, "w")]))  # there is no worker, so it waits
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "workers must be a whole number from 0"),
        ({"workers": 1, "threads": 0}, "threads"),
        ({"scheduler": "tcp://127.0.0.1:1", "scheduler_file": "f"}, "not both"),
        ({"scheduler": "tcp://127.0.0.1:1", "workers": 2}, "leave 'workers' out"),
        ({"scheduler_file": "gone.json"}, "--scheduler-file"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        make_executor(**options)


def test_no_scheduler_there_is_said(monkeypatch):
    monkeypatch.setattr(executors, "CONNECT_SECONDS", 0.5)
    with pytest.raises(InputError, match=r"no Dask scheduler answers at tcp://127.0.0.1:1"):
        make_executor(scheduler="tcp://127.0.0.1:1")


def test_without_dask_one_process_is_left(monkeypatch):
    monkeypatch.setattr(executors, "has_distributed", False)
    with pytest.raises(InputError, match="--workers 0"):
        make_executor(workers=2)
    assert isinstance(make_executor(workers=0), InlineExecutor)


def test_gpus_get_a_worker_each_where_dask_cuda_is(monkeypatch):
    """No GPU here: what torch and dask-cuda would say is put in their place; the choice is the real one."""
    asked = {}

    class LocalCUDACluster:
        def __init__(self, **options):
            asked.update(options)

    real = executors.optional_import
    monkeypatch.setattr(
        executors,
        "optional_import",
        lambda module, name="": (LocalCUDACluster, True) if module == "dask_cuda" else real(module, name=name),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert executors.default_workers() == 4
    assert isinstance(executors._local_cluster(None, 1, None, 2), LocalCUDACluster)
    assert asked["n_workers"] == 4 and asked["threads_per_worker"] == 1
    with pytest.raises(InputError, match="this machine has 4"):
        executors._local_cluster(5, 1, None, 2)


def test_one_gpu_without_dask_cuda_has_one_worker(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    if executors.optional_import("dask_cuda", name="LocalCUDACluster")[1]:
        pytest.skip("dask-cuda is installed")
    assert executors.default_workers() == 1


def test_threads_share_the_cores(monkeypatch):
    monkeypatch.setattr(executors, "_cores", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [executors.default_workers(threads) for threads in (1, 3, 16)] == [8, 2, 1]


def test_workers_have_the_threads_and_memory_that_were_asked_for():
    with make_executor(workers=1, threads=3, memory="1GB") as executor:
        assert isinstance(executor, DaskExecutor) and executor.threads == 1
        (worker,) = executor.client.scheduler_info()["workers"].values()
        assert worker["memory_limit"] == 10**9 and worker["nthreads"] == 1
        (found,) = executor.client.run(lambda: __import__("os").environ["OMP_NUM_THREADS"]).values()
        assert found == "3"
