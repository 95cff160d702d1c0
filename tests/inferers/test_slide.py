"""Whole-slide confidences: grids, blending, resuming."""

from __future__ import annotations

import errno
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_vslp.data.slides import open_slide
from monai_vslp.inferers import slide as module
from monai_vslp.inferers.slide import SlideConfidence, infer_slide
from monai_vslp.utils.errors import InputError, SlideError

CLASSES = 3


def predictor(images):
    """A pixelwise classifier: softmax of the colours, spread from the red channel."""
    return torch.softmax(4 * images, dim=1), 0.5 * images[:, :1]


def expected_map(slide, downsample, scale):
    """The same classifier on the whole slide at once, averaged to map pixels."""
    ratio = round(downsample / scale)
    height, width = (math.ceil(side / downsample - 1e-6) for side in slide.shape)
    pixels = slide.read_at(0, 0, height * ratio, width * ratio, downsample=scale)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 255
    mean, spread = predictor(images)
    return [torch.nn.functional.avg_pool2d(x, ratio)[0].numpy() for x in (mean, spread)]


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    """413 x 520 px at 0.5 µm/px: glass, with tissue in two places."""
    rng = np.random.default_rng(0)
    image = np.full((413, 520, 3), 240, dtype=np.uint8)
    image[50:220, 40:260] = rng.integers(60, 200, (170, 220, 3))
    image[300:413, 400:520] = rng.integers(60, 200, (113, 120, 3))
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(
            image, tile=(256, 256), compression="zlib", photometric="rgb", resolution=(2e4, 2e4), resolutionunit="CENTIMETER"
        )
    return path


@pytest.fixture
def slide(slide_path):
    with open_slide(slide_path) as opened:
        yield opened


def tissue_mask(downsample=8):
    mask = np.zeros((413, 520), dtype=bool)
    mask[50:220, 40:260] = mask[300:413, 400:520] = True
    return mask[::downsample, ::downsample], downsample


def run(slide, work_dir, predict=predictor, **options):
    options = {
        "mpp": 0.5, "tile": 64, "batch_size": 3, "tissue": tissue_mask(), "progress": False, "fingerprint": "model 1"
    } | options  # fmt: skip
    return infer_slide(slide, predict, CLASSES, work_dir=work_dir, **options)


@pytest.mark.parametrize("mpp", [0.5, 0.81, 1.0])
@pytest.mark.parametrize(("tile", "overlap"), [(32, 0.0), (64, 0.25), (96, 0.5), (128, 0.8), (1024, 0.25)])
def test_tiles_leave_no_trace(slide, tmp_path, mpp, tile, overlap):
    found = run(slide, tmp_path, mpp=mpp, tile=tile, overlap=overlap)
    mean, spread = expected_map(slide, found.downsample, mpp / 0.5)
    tissue = found.mass > 0
    assert found.mean.shape == mean.shape and found.mean.dtype == np.float32
    # 16-bit codes are exact to half a step, 7.6e-6.
    np.testing.assert_allclose(found.mean[:, tissue], mean[:, tissue], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.spread[tissue], spread[0][tissue], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.mean.sum(axis=0), 1, atol=CLASSES * 8e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 300), (63, 64), (65, 129)])
def test_any_size_of_slide(tmp_path, height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "s.tif", image, tile=(256, 256), photometric="rgb")
    with open_slide(tmp_path / "s.tif", mpp=0.5) as slide:
        found = run(slide, tmp_path / "work", tissue=(np.ones((height, width), bool), 1))
        mean, _ = expected_map(slide, found.downsample, 1)
    assert found.mass.shape == (math.ceil(height / 4), math.ceil(width / 4))
    np.testing.assert_allclose(found.mean, mean, rtol=0, atol=1e-5)
    # Pixels that stick out of the slide are tissue in part.
    assert found.mass.sum() == pytest.approx(height * width / 16, rel=1e-5)


def test_map_is_aligned_with_level_zero(slide, tmp_path):
    found = run(slide, tmp_path, mpp=0.81)
    assert found.downsample == pytest.approx(4 * 0.81 / 0.5) and found.mpp == pytest.approx(4 * 0.81)
    mask = np.repeat(np.repeat(tissue_mask()[0], 8, axis=0), 8, axis=1)[:413, :520]
    for row, col in ((7, 6), (8, 20), (33, 39), (47, 62), (0, 0)):
        top, left = row * found.downsample, col * found.downsample
        rows, cols = np.arange(413), np.arange(520)
        inside_rows = np.clip(np.minimum(rows + 1, top + found.downsample) - np.maximum(rows, top), 0, None)
        inside_cols = np.clip(np.minimum(cols + 1, left + found.downsample) - np.maximum(cols, left), 0, None)
        share = inside_rows @ mask @ inside_cols / found.downsample**2
        assert found.mass[row, col] == pytest.approx(share, abs=1e-6)


def test_near_native_resolution_is_not_resampled(slide, tmp_path):
    found = run(slide, tmp_path, mpp=0.52)
    assert found.downsample == 4.0 and found.mpp == pytest.approx(2.0)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.floats(0, 0.95), st.integers(0, 2**32 - 1))
def test_all_tissue_is_covered_by_tiles_that_touch_tissue(slide_path, tile, overlap, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((26, 33)) < rng.choice([0.01, 0.1, 0.5])
    mask[rng.integers(26), rng.integers(33)] = True
    with open_slide(slide_path) as slide:
        job = SlideConfidence(
            slide, CLASSES, mpp=0.5, work_dir="unused", fingerprint="", tile=tile * 16, overlap=overlap, tissue=(mask, 16)
        )
    covered = np.zeros(job.mass.shape, dtype=bool)
    for row, col in job.tiles:
        part = np.s_[row : row + tile * 4, col : col + tile * 4]
        assert job.mass[part].any()
        assert 0 <= row <= max(0, job.mass.shape[0] - tile * 4)
        covered[part] = True
    assert covered[job.mass > 0].all()
    assert len(np.unique(job.tiles, axis=0)) == len(job.tiles)


def test_glass_is_not_read(slide, tmp_path):
    shapes = []
    found = run(slide, tmp_path, lambda images: shapes.append(tuple(images.shape)) or predictor(images), overlap=0)
    assert sum(shape[0] for shape in shapes) == len(found.tiles) < 7 * 9
    assert {shape[1:] for shape in shapes} == {(3, 64, 64)}
    np.testing.assert_allclose(found.mean[:, 0, -1], 1 / CLASSES)
    assert found.mass[0, -1] == 0 and found.spread[0, -1] == 0


def test_tissue_is_looked_for(slide_path, tmp_path):
    with open_slide(slide_path, mpp=4.0) as slide:  # so that the pieces are large enough to be tissue
        found = run(slide, tmp_path, mpp=4.0, tissue=None)
    assert found.mass[20:50, 15:60].mean() > 0.95
    assert found.mass[:5].max() == 0 and found.mass[60:, :50].max() == 0


def test_predictor_without_spread(slide, tmp_path):
    assert run(slide, tmp_path, lambda images: (predictor(images)[0], None)).spread is None


def test_work_is_kept_until_cleared(slide, tmp_path):
    work = tmp_path / "work"
    found = run(slide, work)
    assert len(list(work.glob("tiles-*.npz"))) == math.ceil(len(found.tiles) / 3)
    (work / "notes.txt").write_text("not ours")
    found.clear()
    assert [path.name for path in work.iterdir()] == ["notes.txt"]
    (work / "notes.txt").unlink()
    run(slide, work).clear()
    assert not work.exists()


class Interrupt:
    """Raises in the given call."""

    def __init__(self, call, error=KeyboardInterrupt):
        self.call, self.error, self.calls = call, error, 0

    def __call__(self, images):
        self.calls += 1
        if self.calls == self.call:
            raise self.error
        return predictor(images)


def same(first, second):
    return (
        first.mean.tobytes() == second.mean.tobytes()
        and first.spread.tobytes() == second.spread.tobytes()
        and first.mass.tobytes() == second.mass.tobytes()
    )


@pytest.mark.parametrize("call", [1, 4])
def test_interrupted_run_goes_on(slide, tmp_path, call):
    whole = run(slide, tmp_path / "whole")
    first = Interrupt(call)
    with pytest.raises(KeyboardInterrupt):
        run(slide, tmp_path / "work", first)
    assert len(list((tmp_path / "work").glob("tiles-*.npz"))) == call - 1  # all but the batch it stopped in
    second = Interrupt(0)
    again = run(slide, tmp_path / "work", second)
    assert second.calls == math.ceil(len(whole.tiles) / 3) - (call - 1)
    assert again.reused == 3 * (call - 1) and whole.reused == 0
    assert same(whole, again)


def test_missing_and_damaged_files_are_computed_again(slide, tmp_path, caplog):
    whole = run(slide, tmp_path)
    files = sorted(tmp_path.glob("tiles-*.npz"))
    for index, path in enumerate(files):
        content = path.read_bytes()
        if index % 4 == 0:
            path.unlink()
        elif index % 4 == 1:
            path.write_bytes(content[: len(content) // 2])
        elif index % 4 == 2:
            path.write_bytes(content[:1000] + bytes(200) + content[1200:])  # same length, other bytes
    counting = Interrupt(0)
    with caplog.at_level(logging.WARNING):
        again = run(slide, tmp_path, counting)
    assert counting.calls == sum(index % 4 != 3 for index in range(len(files)))
    assert "damaged" in caplog.text
    assert same(whole, again)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"fingerprint": "model 2"}, "fingerprint"),
        ({"overlap": 0.3}, "overlap"),
        ({"mpp": 1.0}, "scale"),
        ({"batch_size": 2}, "batch_size"),
        ({"tissue": tissue_mask(16)}, "tissue"),
    ],
)
def test_other_settings_start_anew(slide, tmp_path, caplog, options, key):
    run(slide, tmp_path / "work")
    with caplog.at_level(logging.WARNING):
        again = run(slide, tmp_path / "work", **options)
    assert f"{key} was" in caplog.text and again.reused == 0
    assert same(again, run(slide, tmp_path / "fresh", **options))


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_results_without_a_plan_are_not_trusted(slide, tmp_path, content):
    run(slide, tmp_path)
    (tmp_path / "plan.json").unlink()
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    assert run(slide, tmp_path).reused == 0


def test_changed_slide_starts_anew(slide_path, tmp_path):
    path = tmp_path / "copy.tif"
    path.write_bytes(slide_path.read_bytes())
    with open_slide(path) as slide:
        run(slide, tmp_path / "work")
    os.utime(path, ns=(1, 1))
    with open_slide(path) as slide:
        assert run(slide, tmp_path / "work").reused == 0


def test_full_disk_keeps_what_is_done(slide, tmp_path, monkeypatch):
    whole = run(slide, tmp_path / "whole")
    saved, savez = [], np.savez

    def fill_up(file, **arrays):
        saved.append(file)
        if len(saved) == 3:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        savez(file, **arrays)

    monkeypatch.setattr(np, "savez", fill_up)
    with pytest.raises(OSError, match="No space left on device. 2 finished batches are kept.*make room") as caught:
        run(slide, tmp_path / "work")
    assert caught.value.errno == errno.ENOSPC
    assert len([p for p in (tmp_path / "work").iterdir() if "tiles-" in p.name]) == 2  # nothing half written either
    monkeypatch.setattr(np, "savez", savez)
    again = run(slide, tmp_path / "work")
    assert again.reused == 6 and same(whole, again)


def test_small_disk_is_announced(slide, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with caplog.at_level(logging.WARNING):
        run(slide, tmp_path / "new" / "work")
    assert "the tile results need up to" in caplog.text


KILLED = """
import sys, time, torch
from tests_predictor import predictor, CLASSES, tissue_mask
from monai_vslp.data.slides import open_slide
from monai_vslp.inferers.slide import infer_slide
torch.set_num_threads(1)

def slow(images):
    time.sleep(0.1)
    return predictor(images)

infer_slide(open_slide(sys.argv[1]), slow, CLASSES, mpp=0.5, work_dir=sys.argv[2], fingerprint="model 1", tile=64, batch_size=3,
            tissue=tissue_mask(), progress=False)
"""


def test_killed_run_goes_on(slide_path, tmp_path):
    with open_slide(slide_path) as slide:
        whole = run(slide, tmp_path / "whole")
    (tmp_path / "tests_predictor.py").write_text(Path(__file__).read_text())
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    work = tmp_path / "work"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(slide_path), str(work)], env=environment)
    deadline = time.monotonic() + 60
    while len(list(work.glob("tiles-*.npz"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open_slide(slide_path) as slide:
        again = run(slide, work)
    assert 6 <= again.reused < len(again.tiles)
    assert same(whole, again)


def test_damaged_slide_is_an_error_and_stops_the_readers(slide, tmp_path, monkeypatch):
    def fail(self, row, *args, **options):
        raise SlideError("damaged here")

    monkeypatch.setattr(type(slide), "read_at", fail)
    with pytest.raises(SlideError, match="damaged here"):
        run(slide, tmp_path)
    assert not [thread for thread in threading.enumerate() if "slide-reader" in thread.name]


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (lambda x: (torch.softmax(x[:, :, ::2, ::2], 1), None), "shape"),
        (lambda x: (torch.softmax(x[:, :2], 1), None), r"expected \[3, 3, 64, 64\]"),
        (lambda x: (predictor(x)[0], x), "spread of shape"),
        (lambda x: (predictor(x)[0] * math.nan, None), "nan"),
        (lambda x: (x * 20 - 5, None), "expected 0 to 1"),
    ],
)
def test_wrong_predictions_are_refused(slide, tmp_path, predict, message):
    with pytest.raises(ValueError, match=message):
        run(slide, tmp_path, predict)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 66}, "multiple of map_downsample = 4, got 66; the next is 68"),
        ({"tile": 0}, "at least 1"),
        ({"overlap": 1.0}, "overlap"),
        ({"overlap": -0.1}, "overlap"),
        ({"batch_size": 0}, "at least 1"),
        ({"mpp": 0.0}, "µm/px"),
        ({"tissue": (np.ones((10, 10), bool), 8)}, r"needs about \[52, 65\]"),
        ({"tissue": (np.zeros((52, 65), bool), 8)}, "no tissue"),
    ],
)
def test_wrong_options_are_refused(slide, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(slide, tmp_path / "work", **options)
    assert not (tmp_path / "work").exists()


def test_merging_unfinished_work_is_an_error(slide, tmp_path):
    job = SlideConfidence(slide, CLASSES, mpp=0.5, work_dir=tmp_path, fingerprint="", tile=64, tissue=tissue_mask())
    with pytest.raises(SlideError, match="missing"):
        job.merge()


def test_progress_counts_tiles(slide, tmp_path, capfd):
    found = run(slide, tmp_path, progress=True)
    assert f"{len(found.tiles)}/{len(found.tiles)}" in capfd.readouterr().err
