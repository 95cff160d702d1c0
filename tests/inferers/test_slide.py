"""Whole-slide confidences: grids, blending, resuming."""

from __future__ import annotations

import errno
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_vslp.data.slides import open_slide
from monai_vslp.inferers import slide as module
from monai_vslp.inferers.slide import SlideConfidence, infer_slide
from monai_vslp.inferers.slide_maps import SlideMaps
from monai_vslp.utils.errors import InputError, SlideError
from monai_vslp.variational.outofcore import refine_store

CLASSES = 3
HALF = 2.0**-12 + 1e-5  # of float16 below 1, and the 16-bit codes


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
    tissue = found.mass[:] > 0
    confidence = found.confidence[:]
    assert confidence.shape == mean.shape and confidence.dtype == np.float16
    np.testing.assert_allclose(confidence[:, tissue], mean[:, tissue], rtol=0, atol=HALF)
    np.testing.assert_allclose(found.spread[:][tissue], spread[0][tissue], rtol=0, atol=HALF)
    total = confidence.astype(np.float64).sum(axis=0)
    np.testing.assert_allclose(total[total > 0], 1, atol=CLASSES * HALF)
    assert total[tissue].min() > 0


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 300), (63, 64), (65, 129)])
def test_any_size_of_slide(tmp_path, height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "s.tif", image, tile=(256, 256), photometric="rgb")
    with open_slide(tmp_path / "s.tif", mpp=0.5) as slide:
        found = run(slide, tmp_path / "work", tissue=(np.ones((height, width), bool), 1))
        mean, _ = expected_map(slide, found.downsample, 1)
    assert found.shape == found.mass.shape == (math.ceil(height / 4), math.ceil(width / 4))
    np.testing.assert_allclose(found.confidence[:], mean, rtol=0, atol=HALF)
    # Pixels that stick out of the slide are tissue in part.
    assert found.mass[:].sum() == pytest.approx(height * width / 16, rel=1e-5)


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
    mass = job.mass(tuple(slice(0, side) for side in job.shape))
    covered = np.zeros(job.shape, dtype=bool)
    for row, col in job.tiles:
        part = np.s_[row : row + tile * 4, col : col + tile * 4]
        assert mass[part].any()
        assert 0 <= row <= max(0, job.shape[0] - tile * 4)
        covered[part] = True
    assert covered[mass > 0].all()
    assert len(np.unique(job.tiles, axis=0)) == len(job.tiles)


def test_glass_is_not_read(slide, tmp_path):
    shapes = []
    found = run(slide, tmp_path, lambda images: shapes.append(tuple(images.shape)) or predictor(images), overlap=0)
    assert sum(shape[0] for shape in shapes) == found.tiles < 7 * 9
    assert {shape[1:] for shape in shapes} == {(3, 64, 64)}
    assert (found.confidence[:, 0, -1] == 0).all() and found.mass[0, -1] == 0 and found.spread[0, -1] == 0


def test_tissue_is_looked_for(slide_path, tmp_path):
    with open_slide(slide_path, mpp=4.0) as slide:  # so that the pieces are large enough to be tissue
        found = run(slide, tmp_path, mpp=4.0, tissue=None)
    mass = found.mass[:]
    assert mass[20:50, 15:60].mean() > 0.95
    assert mass[:5].max() == 0 and mass[60:, :50].max() == 0


def test_tissue_lies_within_what_was_scanned(slide_path, tmp_path):
    with open_slide(slide_path, mpp=4.0) as slide:
        slide.bounds = (0, 0, 413, 150)
        found = run(slide, tmp_path, mpp=4.0, tissue=None)
    mass = found.mass[:]
    assert mass[20:50, 15:36].mean() > 0.95 and mass[:, 38:].max() == 0


def test_predictor_without_spread(slide, tmp_path):
    assert run(slide, tmp_path, lambda images: (predictor(images)[0], None)).spread is None


def test_work_is_kept_until_cleared(slide, tmp_path):
    work = tmp_path / "work"
    found = run(slide, work)
    assert len(list(work.glob("tiles-*.npz"))) == math.ceil(found.tiles / 3)
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


def content(found):
    """Every file of the arrays, by name."""
    names = ("confidence", "spread", "mass", "image")
    return {
        str(path.relative_to(found.path)): path.read_bytes()
        for name in names
        for path in (found.path / name).rglob("*")
        if path.is_file()
    }


def same(first, second):
    return content(first) == content(second) and len(content(first)) > 4


@pytest.mark.parametrize("call", [1, 4])
def test_interrupted_run_goes_on(slide, tmp_path, call):
    whole = run(slide, tmp_path / "whole")
    first = Interrupt(call)
    with pytest.raises(KeyboardInterrupt):
        run(slide, tmp_path / "work", first)
    assert len(list((tmp_path / "work").glob("tiles-*.npz"))) == call - 1  # all but the batch it stopped in
    second = Interrupt(0)
    again = run(slide, tmp_path / "work", second)
    assert second.calls == math.ceil(whole.tiles / 3) - (call - 1)
    assert again.reused == 3 * (call - 1) and whole.reused == 0
    assert same(whole, again)


def test_missing_and_damaged_files_are_computed_again(slide, tmp_path, caplog):
    whole = run(slide, tmp_path / "whole")
    run(slide, tmp_path)
    shutil.rmtree(tmp_path / "maps.zarr")
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
        ({"margin": 8}, "margin"),
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


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_results_are_told_by_their_names(slide, tmp_path, caplog, text):
    """A lost or damaged plan costs nothing, since results name the plan; results of no known plan are not trusted."""
    run(slide, tmp_path)
    shutil.rmtree(tmp_path / "maps.zarr")
    (tmp_path / "tiles-000000.npz").write_bytes(b"of an older version")
    (tmp_path / "plan.json").unlink()
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    again = run(slide, tmp_path)
    assert again.reused == again.tiles
    assert "not used but deleted: " + ("there is no plan.json" if text is None else "plan.json is damaged") in caplog.text
    assert not (tmp_path / "tiles-000000.npz").exists()


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


def work_on(slide_path, work, part=slice(None), predict=0.1, blend=0.0):
    """In a process of its own: the job of ``run``, with ``part`` of its batches, slowed down by seconds per call."""
    torch.set_num_threads(1)

    def slow(images):
        time.sleep(predict)
        return predictor(images)

    original = module.blend_tiles

    def slow_blend(*arguments):
        time.sleep(blend)
        return original(*arguments)

    module.blend_tiles = slow_blend
    options = {"mpp": 0.5, "tile": 64, "batch_size": 3, "tissue": tissue_mask(), "progress": False, "fingerprint": "model 1"}
    with open_slide(slide_path) as slide:
        job = SlideConfidence(slide, CLASSES, work_dir=work, **options)
        job.run(slow, range(len(job.batches))[part])
        while any(job.store.load(index) is None for index in range(len(job.batches))):
            time.sleep(0.02)
        job.merge()


@pytest.fixture
def start(slide_path):
    """Starts a process with ``work_on``; what is left at the end is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["monai_vslp.inferers.slide"])  # imported once, not by each process
    processes = []

    def begin(work, **options):
        processes.append(context.Process(target=work_on, args=(slide_path, work), kwargs=options))
        processes[-1].start()
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.join()


def wait_for(condition, process):
    deadline = time.monotonic() + 300  # a busy machine takes minutes to import torch
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_run_goes_on(slide, tmp_path, start):
    whole = run(slide, tmp_path / "whole")
    work = tmp_path / "work"
    process = start(work)
    wait_for(lambda: len(list(work.glob("tiles-*.npz"))) >= 2, process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    again = run(slide, work)
    assert 6 <= again.reused < again.tiles
    assert same(whole, again)


def test_killed_merge_starts_over(slide, tmp_path, start):
    whole = run(slide, tmp_path / "whole")
    work = tmp_path / "work"
    process = start(work, predict=0, blend=60)
    wait_for(lambda: list(work.glob(".maps-*/maps.zarr/image/c")), process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (work / "maps.zarr").exists() and list(work.glob(".maps-*"))
    again = run(slide, work)
    assert again.reused == again.tiles and same(whole, again)
    assert not list(work.glob(".maps-*"))


def test_processes_share_the_tiles(slide, tmp_path, start):
    """Two processes prepare one folder and compute its batches, some of them both; both merge."""
    whole = run(slide, tmp_path / "whole")
    work = tmp_path / "work"
    processes = [start(work, part=part, predict=0.02) for part in (slice(0, -3), slice(3, None))]
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    found = SlideMaps.read(work / "maps.zarr")
    assert same(whole, found) and not list(work.glob(".maps-*"))


def test_preparing_deletes_nothing_of_others_with_the_same_plan(slide, tmp_path):
    options = {"mpp": 0.5, "tile": 64, "batch_size": 3, "tissue": tissue_mask(), "progress": False, "fingerprint": "model 1"}
    first, second = (SlideConfidence(slide, CLASSES, work_dir=tmp_path, **options) for _ in range(2))
    first.run(predictor, [1])
    (tmp_path / "plan.json").unlink()  # as if the second had looked before the first wrote it
    second.run(predictor, [0])
    first.run(predictor, [2])
    assert all(first.store.load(index) is not None for index in range(3))
    with pytest.raises(InputError, match="batches are 0 to"):
        first.run(predictor, [len(first.batches)])


def test_damaged_slide_is_an_error_and_stops_the_readers(slide, tmp_path, monkeypatch):
    def fail(self, *args, **options):
        raise SlideError("damaged here")

    monkeypatch.setattr(type(slide), "read_many", fail)
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
    job.run(predictor, range(1, len(job.batches)))
    with pytest.raises(SlideError, match="batch 0 .* is missing"):
        job.merge()
    job.run(predictor, [0])
    (tmp_path / f"tiles-{job.store.digest}-000002.npz").write_bytes(b"damaged")
    with pytest.raises(SlideError, match="batch 2 .* is missing"):
        job.merge()
    assert not list(tmp_path.glob("*maps*"))


def test_progress_counts_tiles(slide, tmp_path, capfd):
    found = run(slide, tmp_path, progress=True)
    shown = capfd.readouterr().err
    assert f"{found.tiles}/{found.tiles}" in shown and "tile/s" in shown


def convolution(seed=0):
    """Shift-invariant: looks 6 px far, with zeros around what it is given."""
    generator = torch.Generator().manual_seed(seed)
    kernels = [torch.randn(shape, generator=generator) for shape in ((8, 3, 7, 7), (CLASSES, 8, 7, 7))]

    def predict(images):
        hidden = torch.relu(torch.nn.functional.conv2d(images - 0.5, kernels[0], padding=3) / 5)
        return torch.softmax(torch.nn.functional.conv2d(hidden, kernels[1], padding=3) / 5, dim=1), None

    return predict


def whole_convolution(slide):
    """The map of the same network on the whole slide, which is seen in white as tiles at its border are."""
    pixels = slide.read_at(-8, -8, 413 + 19, 520 + 16, downsample=1)
    mean, _ = convolution()(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
    return torch.nn.functional.avg_pool2d(mean[..., 8:-8, 8:-8], 4)[0].numpy()


@pytest.mark.parametrize(
    ("tile", "batch_size", "overlap"), [(64, 3, 0.25), (64, 1, 0.0), (96, 4, 0.5), (160, 2, 0.125), (448, 1, 0.25)]
)
def test_a_margin_leaves_no_seams(slide, tmp_path, tile, batch_size, overlap):
    found = run(slide, tmp_path, convolution(), tile=tile, batch_size=batch_size, overlap=overlap, margin=8)
    tissue = found.mass[:] > 0
    expected = whole_convolution(slide)[:, : found.shape[0], : found.shape[1]]
    difference = np.abs(found.confidence[:].astype(np.float64) - expected)[:, tissue[: expected.shape[1]]]
    assert difference.max() < HALF
    assert np.ptp(expected[0]) > 0.5  # the network says something


def test_without_a_margin_padding_shows(slide, tmp_path):
    """Blending alone cannot undo what the network saw wrong at the edges of tiles, it only makes it small."""
    expected = whole_convolution(slide)
    errors = {}
    for overlap in (0.0, 0.5):
        found = run(slide, tmp_path / str(overlap), convolution(), tile=64, overlap=overlap)
        inside = np.s_[:, 20:50, 20:60]  # surrounded by tiles
        errors[overlap] = np.abs(found.confidence[:][inside] - expected[inside]).max()
    assert errors[0.0] > 20 * HALF and errors[0.5] < errors[0.0] / 2


def test_result_is_what_the_refinement_takes(slide, tmp_path):
    found = run(slide, tmp_path / "work")
    result = refine_store(found.confidence, tmp_path / "refined.zarr", [0.5, 0.3, 0.2], mass=found.mass, alpha=1.0)
    assert result.converged
    np.testing.assert_allclose(result.proportions.numpy(), [0.5, 0.3, 0.2], atol=1e-3)


def test_maps_describe_themselves(slide, tmp_path):
    found = run(slide, tmp_path, lambda images: (*predictor(images), torch.full((len(images),), 2.0)))
    assert SlideMaps.read(found.path) == found
    assert found.path == tmp_path / "maps.zarr" and found.level0_shape == (413, 520) and found.reader == slide.reader
    assert found.views == {"total": 2.0 * found.tiles, "mean": 2.0, "max": 2.0}
    assert set(found.seconds) == {"read_wait", "network", "write_wait", "blend"} and found.seconds["network"] > 0
    expected = slide.read_at(0, 0, *found.shape, downsample=found.downsample)
    np.testing.assert_array_equal(found.image[:], np.moveaxis(expected, -1, 0))
    with pytest.raises(InputError, match="holds no maps"):
        SlideMaps.read(tmp_path / "other.zarr")


def test_complete_maps_are_taken_as_they_are(slide, tmp_path):
    first = run(slide, tmp_path)
    for path in tmp_path.glob("tiles-*"):
        path.unlink()
    counting = Interrupt(0)
    again = run(slide, tmp_path, counting)
    assert counting.calls == 0 and again == first
    assert run(slide, tmp_path, fingerprint="model 2") != first


def test_full_disk_while_blending_keeps_the_tiles(slide, tmp_path, monkeypatch):
    whole = run(slide, tmp_path / "whole")
    blend = module.blend_tiles

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "blend_tiles", fail)
    with pytest.raises(OSError, match="maps cannot be written .* tile results are kept"):
        run(slide, tmp_path / "work")
    assert not [path for path in (tmp_path / "work").iterdir() if "maps" in path.name]
    monkeypatch.setattr(module, "blend_tiles", blend)
    again = run(slide, tmp_path / "work")
    assert again.reused == again.tiles and same(whole, again)


def test_estimate_says_what_is_needed(slide, tmp_path):
    job = SlideConfidence(slide, CLASSES, mpp=0.5, work_dir=tmp_path / "new", fingerprint="", tile=64, tissue=tissue_mask())
    needs = job.estimate()
    assert not (tmp_path / "new").exists()
    job.run(predictor)
    found = job.merge()
    files = [path.stat().st_size for path in (tmp_path / "new").glob("tiles-*.npz")]
    assert needs["tiles"] == found.tiles and needs["batches"] == len(files) and needs["map_shape"] == list(found.shape)
    assert needs["tile_bytes"] == pytest.approx(sum(files), rel=0.1)
    assert 0 < sum(path.stat().st_size for path in found.path.rglob("*") if path.is_file()) < 1.2 * needs["map_bytes"]
    assert needs["free_bytes"] > 0


def test_tissue_of_a_part_is_that_of_the_whole(slide, monkeypatch):
    job = SlideConfidence(slide, CLASSES, mpp=0.81, work_dir="unused", fingerprint="", tile=64, tissue=tissue_mask())
    whole = job.mass(tuple(slice(0, side) for side in job.shape))
    for part in (np.s_[3:17, 5:60], np.s_[60:64, 0:80], np.s_[31:32, 40:41]):
        np.testing.assert_allclose(job.mass(part), whole[part], rtol=0, atol=1e-6)
    monkeypatch.setattr(module, "CHUNK", 7)
    in_parts = SlideConfidence(slide, CLASSES, mpp=0.81, work_dir="unused", fingerprint="", tile=64, tissue=tissue_mask())
    np.testing.assert_array_equal(in_parts.tiles, job.tiles)
