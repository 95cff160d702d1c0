"""Faults injected into cohorts, as docs/cohort.md lists them: what happens, and that nothing that was finished is lost."""

from __future__ import annotations

import errno
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_slides
import pytest
from tiny_slides import FAST, SAME, STEMS, train_tiny, write_slides

from monai_vslp.utils.lock import FolderLock
from monai_vslp.workflows.cohort import cohort, run_jobs
from monai_vslp.workflows.cohort_slide import SlideJob
from monai_vslp.workflows.cohort_state import EventLog, SlideState
from monai_vslp.workflows.executors import Call, Work, make_executor

pytestmark = pytest.mark.usefixtures("one_mlflow_database")

cohort_module = importlib.import_module("monai_vslp.workflows.cohort")
slide_module = importlib.import_module("monai_vslp.workflows.cohort_slide")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("five"))


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return write_slides(tmp_path_factory.mktemp("slides"))


@pytest.fixture(scope="module")
def reference(model, slides, tmp_path_factory):
    """Outputs of a cohort to which nothing happened."""
    output = tmp_path_factory.mktemp("reference")
    assert cohort(slides, output, model=model, workers=0, **FAST).failures == {}
    return output


def check_same(output, reference, stems=STEMS):
    for stem in stems:
        for name in SAME:
            assert (output / stem / name).read_bytes() == (reference / stem / name).read_bytes(), f"{stem}/{name}"


def start(slides, output, model, first=0.5) -> subprocess.Popen:
    """The same cohort in a process of its own, slower by ``first`` s in the first slide, so that it is met in the middle."""
    program = f"""
import importlib, time
from monai_vslp.workflows.cohort import cohort
slide = importlib.import_module("monai_vslp.workflows.cohort_slide")
segment = slide._segment
waits = iter([{first}])
def slow(*arguments):
    time.sleep(next(waits, 0.5))
    segment(*arguments)
slide._segment = slow
result = cohort({str(slides)!r}, {str(output)!r}, model={str(model)!r}, workers=0, **{FAST!r})
print("COMPUTED", *result.computed)
"""
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition(), "the process ended too early"


def status(output, stem):
    return SlideState.read(output / stem).status


def test_kill_9_of_everything_loses_only_the_slide_it_was_at(model, slides, reference, tmp_path):
    output = tmp_path / "out"
    process = start(slides, output, model)
    wait_for(lambda: status(output, "s1") == "done" and status(output, "s3") == "running", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert status(output, "s3") == "running", "what a kill leaves"
    before = (output / "s1" / "summary.json").stat().st_mtime_ns
    result = cohort(slides, output, model=model, workers=0, **FAST)
    assert result.failures == {} and result.done == STEMS and "s1" not in result.computed and "s3" in result.computed
    assert (output / "s1" / "summary.json").stat().st_mtime_ns == before
    assert SlideState.read(output / "s3").attempts == 2
    assert not list(output.glob(".*.lock"))
    check_same(output, reference)


@pytest.mark.slow
def test_two_cohorts_at_once_never_write_one_slide(model, slides, reference, tmp_path):
    output = tmp_path / "out"
    process = start(slides, output, model, first=10.0)
    wait_for(lambda: status(output, "s1") == "running", process)
    result = cohort(slides, output, model=model, workers=0, **FAST)
    other, _ = process.communicate(timeout=120)
    assert f"is being written by process {process.pid}" in result.failures["s1"]
    theirs = other.split("COMPUTED")[1].split()
    assert sorted({*theirs, *result.computed}) == list(STEMS)
    assert [SlideState.read(output / stem).attempts for stem in STEMS] == [1, 1, 1, 1], "each was computed once"
    assert cohort(slides, output, model=model, workers=0, **FAST).failures == {}
    check_same(output, reference)


def test_a_full_disk_ends_the_cohort_and_fails_no_slide(model, slides, reference, tmp_path):
    """Real errors of the kernel: no file of this process may grow beyond 30 kB."""
    output = tmp_path / "out"
    one = tmp_path / "one.csv"
    one.write_text("\n".join(slides.read_text().splitlines()[:2]) + "\n")
    cohort(one, output, model=model, images=slides.parent, workers=0, **FAST)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            cohort(slides, output, model=model, workers=0, **FAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert not (output / "failed.csv").exists(), "it is not the slides' fault"
    assert status(output, "s0") == "done" and status(output, "s1") == "running" and status(output, "s2") == "pending"
    result = cohort(slides, output, model=model, workers=0, **FAST)
    assert result.failures == {} and result.computed == ("s1", "s2", "s3")
    check_same(output, reference)


@pytest.mark.parametrize(("fault", "said"), [("cut", "cut short"), ("vanish", "does not exist")])
def test_a_slide_that_is_lost_after_it_was_checked(model, slides, reference, tmp_path, monkeypatch, fault, said):
    """Copied away, or half overwritten, between the first look and its turn."""
    folder, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(slides.parent, folder)
    lost, whole = folder / "s3.tif", (folder / "s3.tif").read_bytes()
    times = lost.stat()
    look = cohort_module.check_slides

    def look_and_lose(*arguments):
        found = look(*arguments)
        assert found == {}
        if fault == "cut":
            lost.write_bytes(whole[: len(whole) // 2])
        else:
            lost.unlink()
        return found

    monkeypatch.setattr(cohort_module, "check_slides", look_and_lose)
    result = cohort(folder / "table.csv", output, model=model, workers=0, **FAST)
    monkeypatch.undo()
    assert result.done == ("s0", "s1", "s2") and set(result.failures) == {"s3"}
    state = SlideState.read(output / "s3")
    assert state.status == "failed" and state.step == "open" and said in state.reason
    check_same(output, reference, result.done)
    lost.write_bytes(whole)
    os.utime(lost, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cohort(folder / "table.csv", output, model=model, workers=0, **FAST).computed == (), "it failed before"
    assert cohort(folder / "table.csv", output, model=model, workers=0, retry_failed=True, **FAST).computed == ("s3",)
    check_same(output, reference)
    assert not (output / "failed.csv").exists()


def test_an_error_that_nobody_expected_is_kept_with_its_traceback(model, slides, reference, tmp_path, monkeypatch):
    segment = slide_module._segment

    def fail(run, job, settings, passes):
        if job.stem == "s1":
            raise ZeroDivisionError("by accident")
        segment(run, job, settings, passes)

    monkeypatch.setattr(slide_module, "_segment", fail)
    result = cohort(slides, tmp_path / "out", model=model, workers=0, **FAST)
    assert result.done == ("s0", "s2", "s3") and result.failures == {"s1": "ZeroDivisionError: by accident"}
    state = SlideState.read(tmp_path / "out" / "s1")
    assert state.step == "segment" and "Traceback" in state.detail and "in fail" in state.detail
    check_same(tmp_path / "out", reference, result.done)


def test_a_lock_that_is_lost_stops_its_slide_without_a_trace_in_its_state(model, slides, tmp_path, monkeypatch):
    """Another process took the slide over while this one was suspended: the state is the other's now."""
    segment, output = slide_module._segment, tmp_path / "out"

    def overtaken(run, job, settings, passes):
        segment(run, job, settings, passes)
        if job.stem == "s1":
            lock = FolderLock(job.folder)
            holder = json.loads(lock.file.read_text())
            lock.file.write_text(json.dumps(holder | {"token": "another", "host": "node7"}))

    monkeypatch.setattr(slide_module, "_segment", overtaken)
    result = cohort(slides, output, model=model, workers=0, **FAST)
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [event["slide"] for event in log if event["event"] == "busy"] == ["s1"]
    assert "on node7" in next(event["reason"] for event in log if event["event"] == "busy")
    assert result.computed[0] == "s0" and status(output, "s3") == "done"
    assert json.loads((output / ".s1.lock").read_text())["token"] == "another", "it is left to the other"


def test_a_slide_that_kills_its_workers_is_named_and_the_others_are_done(tmp_path):
    """Real workers, fake slides: one takes its process with it each time, as one that needs too much memory does."""
    pytest.importorskip("distributed")
    jobs = [SlideJob(str(tmp_path / f"f{i}.svs"), str(tmp_path / "out" / f"f{i}"), f"mark{i}") for i in range(6)]
    works = [Work(job.folder, Call(f"fault-{tmp_path}-{job.stem}", fake_slides.slide, (10, 0.01))) for job in jobs]
    works[2] = Work(jobs[2].folder, Call(f"fault-{tmp_path}-f2", fake_slides.die, (str(tmp_path), "f2", 99)))
    with EventLog(tmp_path / "log.jsonl") as log, make_executor(workers=2, retries=1) as executor:
        results = run_jobs(works, jobs, executor, log, progress=False)
    assert {stem for stem, result in results.items() if result["status"] == "done"} == {"f0", "f1", "f3", "f4", "f5"}
    state = SlideState.read(Path(jobs[2].folder))
    assert state.status == "failed" and state.step == "worker" and "KilledWorker" in state.reason and "memory" in state.reason
    assert len((tmp_path / "f2.deaths").read_text()) == 2
