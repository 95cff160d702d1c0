"""Cohorts of tiny slides through a real network: state, retries, workers, logs, dry runs."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from tiny_slides import FAST, SAME, STEMS, train_tiny, write_slides

from monai_vslp.data.slide_table import read_slide_table
from monai_vslp.data.synthetic import CLASSES
from monai_vslp.io import read_label_tiff, read_summary
from monai_vslp.utils.errors import InputError
from monai_vslp.utils.lock import FolderLock
from monai_vslp.workflows import segment
from monai_vslp.workflows.cohort import cohort
from monai_vslp.workflows.cohort_state import EventLog, SlideState, write_failed

pytestmark = pytest.mark.usefixtures("one_mlflow_database")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("five"))


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return write_slides(tmp_path_factory.mktemp("slides"))


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def events(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(model, slides, tmp_path_factory):
    """The cohort by this process alone."""
    output = tmp_path_factory.mktemp("out") / "out"
    return output, cohort(slides, output, model=model, workers=0, **FAST)


def test_a_table_of_slides_comes_out_segmented_and_reported(done, slides):
    output, result = done
    assert result.failures == {} and result.done == result.computed == STEMS
    for stem in result.done:
        state = SlideState.read(output / stem)
        assert state.status == "done" and state.attempts == 1 and state.tiles > 0 and state.seconds > 0
        assert not (output / f".{stem}.lock").exists()
    table = {row["slide"]: row for row in rows(result.table)}
    assert list(table) == list(STEMS)
    summary, row = read_summary(output / "s0"), table["s0"]
    given, network = summary["proportions"]["given"], summary["proportions"]["confidence"]
    for name in CLASSES:
        assert float(row[f"given_{name}"]) == pytest.approx(given[name], abs=1e-6)
        assert float(row[f"network_{name}"]) == pytest.approx(network[name], abs=1e-6)
        assert float(row[f"refined_{name}"]) == pytest.approx(summary["proportions"]["refined"][name], abs=1e-6)
        assert float(row[f"psi_{name}"]) == pytest.approx(summary["psi"][name], abs=1e-6)
    apart = sum(abs(given[name] - network[name]) for name in CLASSES) / 2
    assert float(row["difference"]) == pytest.approx(apart, abs=1e-5)
    assert int(row["tiles"]) == summary["options"]["tiles"]
    assert table["s2"][f"given_{CLASSES[0]}"] == table["s2"]["difference"] == "", "unknown stays blank"
    assert not (output / "failed.csv").exists()
    report = (output / "report.html").read_text()
    assert all(f"{stem}/report.html" in report for stem in result.done)


def test_the_log_has_one_object_per_event(done):
    output, _ = done
    found = events(output)
    assert [event["event"] for event in found if event["event"] in ("start", "end")][:2] == ["start", "end"]
    first = found[: next(i for i, event in enumerate(found) if event["event"] == "end") + 1]
    assert [event["slide"] for event in first if event["event"] == "running"][0] == "s1", "the largest begins"
    finished = [event for event in first if event["event"] == "done"]
    assert sorted(event["slide"] for event in finished) == list(STEMS)
    assert all(event["tiles"] > 0 and event["seconds"] > 0 and event["tiles_per_second"] > 0 for event in finished)
    assert finished[-1]["seconds_left"] == 0
    assert first[-1]["done"] == 4 and first[-1]["failed"] == 0
    assert [event["time"] for event in found] == sorted(event["time"] for event in found)


def test_the_same_as_segment_gives(done, model, slides, tmp_path):
    output, _ = done
    table = tmp_path / "p.csv"
    first, *rest = slides.read_text().splitlines()
    table.write_text("\n".join(["split," + first.replace("slide", "image"), *("test," + line for line in rest)]))
    paths = [slides.parent / "s0.tif", slides.parent / "s2.tif"]
    assert segment(paths, model, tmp_path / "out", proportions=table, **FAST) == {}
    for stem in ("s0", "s2"):
        for name in SAME:
            assert (tmp_path / "out" / stem / name).read_bytes() == (output / stem / name).read_bytes(), f"{stem}/{name}"
    # What segment made counts, too.
    result = cohort(slides, tmp_path / "out", model=model, workers=0, **FAST)
    assert result.done == STEMS and result.computed == ("s1", "s3")
    assert SlideState.read(tmp_path / "out" / "s0").status == "done"


def test_what_is_done_is_left_alone_until_something_changes(done, model, slides):
    output, _ = done
    before = {stem: (output / stem / "summary.json").stat().st_mtime_ns for stem in ("s0", "s1")}
    again = cohort(slides, output, model=model, workers=0, **FAST)
    assert again.computed == () and len(again.done) == 4
    assert {stem: (output / stem / "summary.json").stat().st_mtime_ns for stem in before} == before
    table = slides.parent / "other.csv"
    lines = slides.read_text().splitlines()
    table.write_text("\n".join([lines[0], "s0.tif" + "," * len(CLASSES), *lines[2:]]))
    try:
        changed = cohort(table, output, model=model, workers=0, **FAST)
        assert changed.computed == ("s0",)
        assert SlideState.read(output / "s0").attempts == 1, "attempts at another thing do not count"
    finally:
        cohort(slides, output, model=model, workers=0, **FAST)


def test_two_workers_one_killed_give_the_same_bytes(done, model, slides, tmp_path):
    """Real processes; kill -9 of the one that is at a slide as soon as it says so."""
    reference, _ = done
    output, killed, over = tmp_path / "out", [], threading.Event()

    def kill():
        while not killed and not over.is_set():
            for stem in ("s1", "s3", "s0", "s2"):
                state = SlideState.read(output / stem) if (output / stem / "state.json").exists() else None
                if state is not None and state.status == "running" and state.pid != os.getpid():
                    os.kill(state.pid, signal.SIGKILL)
                    killed.append((stem, state.pid))
                    break
            time.sleep(0.002)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        result = cohort(slides, output, model=model, workers=2, **FAST)
    finally:
        over.set()
        thread.join()
    assert result.failures == {} and len(result.done) == 4
    ((stem, pid),) = killed
    state = SlideState.read(output / stem)
    assert state.status == "done" and state.attempts == 2 and state.pid != pid
    assert sum(SlideState.read(output / name).attempts for name in result.done) == 5, "the others were not done again"
    for name in result.done:
        for file in SAME:
            assert (output / name / file).read_bytes() == (reference / name / file).read_bytes(), f"{name}/{file}"
    running = [event for event in events(output) if event["event"] == "running"]
    # What the killed one said with its last breath may be lost, and nothing else.
    finishers = {SlideState.read(output / name).pid for name in result.done}
    assert {event["pid"] for event in running} - {pid} == finishers and all(
        event["worker"].startswith("tcp://") for event in running
    )


@pytest.mark.slow
def test_fewer_slides_than_workers_share_their_tiles_and_passes(done, model, slides, tmp_path):
    reference, _ = done
    header, *rows = slides.read_text().splitlines()
    table = tmp_path / "one.csv"
    table.write_text("\n".join([header, *(row for row in rows if row.startswith("s1"))]) + "\n")
    result = cohort(table, tmp_path / "out", model=model, images=slides.parent, workers=2, **FAST)
    assert result.failures == {} and result.done == ("s1",)
    shared = [event for event in events(tmp_path / "out") if event["event"] == "tiles"]
    assert sorted((event["part"], event["parts"]) for event in shared) == [(0, 2), (1, 2)]
    (running,) = (event for event in events(tmp_path / "out") if event["event"] == "running")
    assert running["shared_passes"]
    for file in SAME:
        assert (tmp_path / "out" / "s1" / file).read_bytes() == (reference / "s1" / file).read_bytes(), file


def test_bad_slides_are_written_down_and_tried_again_on_demand(model, slides, tmp_path, caplog):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    good = (slides.parent / "s0.tif").read_bytes()
    (folder / "good.tif").write_bytes(good)
    (folder / "cut.svs").write_bytes(good[:5000])
    Image.fromarray(np.full((64, 64, 3), 240, np.uint8)).save(folder / "photo.png")
    (folder / "t.csv").write_text("slide\ncut.svs\ngone.svs\ngood.tif\nphoto.png\n")
    result = cohort(folder / "t.csv", output, model=model, workers=0, **FAST)
    assert "good" in result.done and set(result.failures) >= {"cut", "gone"}
    failed = {row["slide"]: row for row in rows(output / "failed.csv")}
    assert list(failed) == sorted(failed) and failed["cut"]["step"] == "check" and failed["cut"]["attempts"] == "1"
    assert "does not exist" in failed["gone"]["reason"]
    text = (output / "failed.csv").read_bytes()
    again = cohort(folder / "t.csv", output, model=model, workers=0, **FAST)
    assert again.computed == () and set(again.failures) == set(result.failures)
    assert "--retry-failed" in caplog.text and (output / "failed.csv").read_bytes() == text, "made of states alone"
    # Replaced by a whole file, it is another input: tried without being asked to. The other one has to be asked for.
    (folder / "cut.svs").write_bytes(good)
    os.rename(folder / "cut.svs", folder / "cut.tif")
    (folder / "t.csv").write_text("slide\ncut.tif\ngone.svs\ngood.tif\nphoto.png\n")
    assert "cut" in cohort(folder / "t.csv", output, model=model, workers=0, **FAST).computed
    retried = cohort(folder / "t.csv", output, model=model, workers=0, retry_failed=True, **FAST)
    assert "gone" in retried.failures and SlideState.read(output / "gone").attempts == 2
    assert SlideState.read(output / "good").attempts == 1, "what is done is not tried again"


def test_overwrite_computes_all_again(model, slides, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("slide\ns0.tif\n")
    options = {"model": model, "images": slides.parent, "workers": 0, **FAST}
    cohort(table, tmp_path / "out", **options)
    before = (tmp_path / "out" / "s0" / "summary.json").stat().st_mtime_ns
    assert cohort(table, tmp_path / "out", overwrite=True, **options).computed == ("s0",)
    assert (tmp_path / "out" / "s0" / "summary.json").stat().st_mtime_ns > before


def test_a_dry_run_looks_and_writes_nothing(done, model, slides, tmp_path, capsys):
    reference, _ = done
    result = cohort(slides, tmp_path / "out", model=model, workers=2, dry_run=True, tiles_per_second=2.0, **FAST)
    assert not (tmp_path / "out").exists()
    plan = result.plan
    assert [slide.slide for slide in plan.slides] == list(STEMS)
    assert [slide.tiles for slide in plan.slides] == [
        read_summary(reference / slide.slide)["options"]["tiles"] for slide in plan.slides
    ], "as many as the real run has"
    assert plan.slides[1].shape == (1536, 512) and plan.slides[1].mpp == pytest.approx(0.5)
    assert plan.seconds == pytest.approx(max(plan.tiles / 2, max(slide.tiles for slide in plan.slides)) / 2.0)
    written = sum(file.stat().st_size for file in (reference / "s1").iterdir())
    assert plan.slides[1].output_bytes > 0 and written > 0
    said = capsys.readouterr().out
    assert "s1" in said and "512 x 1536" in said and "4 to do" in said and "2 worker(s)" in said
    measured = cohort(slides, reference, model=model, workers=1, dry_run=True, alpha=3.0, **FAST).plan
    assert measured.measured and measured.tiles_per_second > 0, "from slides that are done, with other settings too"
    assert "4 done" in str(cohort(slides, reference, model=model, workers=1, dry_run=True, **FAST).plan)


def test_a_dry_run_says_what_is_wrong(model, slides, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("slide\ns0.tif\ngone.svs\n")
    result = cohort(table, tmp_path / "out", model=model, images=slides.parent, workers=0, dry_run=True, **FAST)
    assert set(result.failures) == {"gone"}
    assert "1 bad" in str(result.plan) and "Time: unknown" in str(result.plan)
    assert "not enough" in str(replace(result.plan, free_bytes=0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slid\na.svs\n", "no column 'image'"),
        ("slide,image\na.svs,b.svs\n", "keep the one"),
        (f"slide,{','.join(CLASSES)}\na.svs,200,0,0,0,0\n", "row 2"),
        ("slide\nx/a.svs\ny/a.ndpi\n", "would both write the folder 'a'"),
        ("slide\na.svs\na.svs\n", "occurs twice"),
        ("slide,mpp\na.svs,fast\n", "µm/px"),
        ("slide\n", "no rows"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_before_anything_runs(model, tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        cohort(tmp_path / "t.csv", tmp_path / "out", model=model, workers=0)
    assert not (tmp_path / "out").exists()


def test_raters_regions_and_scales_are_read(tmp_path):
    (tmp_path / "t.csv").write_text(
        "Slide,a,b,rater,Region,mpp\n"
        "x.svs,60,40,r1,,0.5\nx.svs,40,60,r2,,0.5\nx.svs,,,r3,,0.5\n"
        "y.svs,10,90,,core 1,\ny.svs,,,,core 2,\nz.svs,,,,,\n"
    )
    x, y, z = read_slide_table(tmp_path / "t.csv", None, ["a", "b"])
    np.testing.assert_allclose(x.proportions.mean, [0.5, 0.5], atol=1e-9)
    assert x.mpp == 0.5 and x.path == (tmp_path / "x.svs").absolute()
    assert {name: label.mean[0] for name, label in x.estimates.items()} == {"r1": 0.6, "r2": 0.4}
    assert y.proportions is None and y.regions["core 2"] is None
    np.testing.assert_allclose(y.regions["core 1"].mean, [0.1, 0.9])
    assert z.proportions is None and z.regions == {} and z.mpp is None
    (tmp_path / "t.csv").write_text("slide,a,b,region\nx.svs,60,40,\nx.svs,40,60,core\n")
    (x,) = read_slide_table(tmp_path / "t.csv", None, ["a", "b"])
    np.testing.assert_allclose([x.proportions.mean[0], x.regions["core"].mean[0]], [0.6, 0.4])  # the rest, and a region
    assert list(x.regions) == ["core"]


def test_the_scale_of_the_table_is_used(model, tmp_path):
    pixels = np.random.default_rng(0).integers(60, 200, (600, 512, 3), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "plain.tif") as writer:
        for step in (1, 2):
            writer.write(pixels[::step, ::step], tile=(256, 256), photometric="rgb", subfiletype=step - 1)
    (tmp_path / "t.csv").write_text("slide,mpp\nplain.tif,0.5\n")
    result = cohort(tmp_path / "t.csv", tmp_path / "out", model=model, workers=0, mpp=0.25, **FAST)
    # The network sees 1 µm/px and the map has a quarter of that.
    assert result.failures == {} and read_summary(tmp_path / "out" / "plain")["mpp"] == pytest.approx(4.0)
    assert read_label_tiff(tmp_path / "out" / "plain" / "labels.tif").shape == (75, 64)


def test_a_slide_that_another_run_writes_is_left_to_it(model, slides, tmp_path):
    (tmp_path / "t.csv").write_text("slide\ns0.tif\ns2.tif\n")
    options = {"model": model, "images": slides.parent, "workers": 0, **FAST}
    with FolderLock(tmp_path / "out" / "s0"):
        result = cohort(tmp_path / "t.csv", tmp_path / "out", **options)
    assert result.done == ("s2",) and "is being written by process" in result.failures["s0"]
    assert not (tmp_path / "out" / "failed.csv").exists(), "it did not fail"
    assert cohort(tmp_path / "t.csv", tmp_path / "out", **options).computed == ("s0",)


def test_states_are_complete_or_pending(tmp_path, caplog):
    folder = tmp_path / "s"
    assert SlideState.read(folder) == SlideState("s")
    state = SlideState("s").begin("f").write(folder)
    assert SlideState.read(folder) == state and state.pid == os.getpid() and state.attempts == 1
    assert SlideState.read(folder).begin("f").attempts == 2 and SlideState.read(folder).begin("other").attempts == 1
    (folder / "state.json").write_text('{"status": "runn')
    assert SlideState.read(folder).status == "pending" and "damaged" in caplog.text
    (folder / "state.json").write_text('{"slide": "s", "status": "asleep"}')
    assert SlideState.read(folder).status == "pending"


def test_failed_csv_depends_on_states_alone(tmp_path):
    states = [SlideState(name).begin("f").fail("open", f"{name}, bad").write(tmp_path / name) for name in ("b", "a")]
    first = write_failed(tmp_path, states).read_bytes()
    assert write_failed(tmp_path, reversed(states)).read_bytes() == first
    assert [row["slide"] for row in rows(tmp_path / "failed.csv")] == ["a", "b"]
    assert rows(tmp_path / "failed.csv")[0] == {
        "slide": "a", "reason": "a, bad", "step": "open", "attempts": "1", "time": states[1].since,
    }  # fmt: skip
    assert not write_failed(tmp_path, [SlideState("a", "done")]).exists()


def test_a_line_that_a_kill_cut_short_does_not_spoil_the_next(tmp_path):
    with EventLog(tmp_path / "log.jsonl") as log:
        log.write("done", "s", tiles=3)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"time": "20')
    with EventLog(tmp_path / "log.jsonl") as log:
        log.write("start")
    first, torn, last = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(first)["tiles"] == 3 and json.loads(last)["event"] == "start" and torn == '{"time": "20'


def test_the_model_and_its_configs_must_fit(tmp_path, model, slides):
    with pytest.raises(InputError, match="no folder that 'monai-vslp train' wrote"):
        cohort(slides, tmp_path / "out", model=tmp_path)
    (tmp_path / "t.csv").write_text(f"slide,region,{','.join(CLASSES)}\ns0.tif,core,20,20,20,20,20\n")
    config = json.loads((Path(model) / "configs" / "slide_inference.json").read_text())
    if "regions" not in config:
        with pytest.raises(InputError, match="configs of .* do not know"):
            cohort(tmp_path / "t.csv", tmp_path / "out", model=model, images=slides.parent)
