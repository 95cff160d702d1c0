"""Slides: synthetic pyramids with known pixels, real slides where they are."""

from __future__ import annotations

import logging
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_vslp.data import slides
from monai_vslp.data.readers import cucim as cucim_reader
from monai_vslp.data.slides import area_resample, is_slide, open_slide
from monai_vslp.utils.errors import InputError, SlideError

REAL = Path(os.environ.get("MONAI_VSLP_DATA", Path(__file__).parents[3] / "shared" / "data")) / "slides"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real slides here")
CENTIMETER, INCH = 3, 2
READERS = ["cucim", "openslide"]


def write_pyramid(path, image, downsamples=(1, 2, 4), mpp=0.5, compression="zlib", mpp_y=None, unit=CENTIMETER):
    """Tiled TIFF with levels by block means; returns the levels."""
    levels = []
    with tifffile.TiffWriter(path) as writer:
        for index, d in enumerate(downsamples):
            height, width = image.shape[0] // d, image.shape[1] // d
            blocks = image[: height * d, : width * d].reshape(height, d, width, d, 3)
            levels.append(np.round(blocks.mean(axis=(1, 3))).astype(np.uint8))
            per_unit = 1e4 if unit == CENTIMETER else 25400
            resolution = {} if mpp is None else {"resolution": (per_unit / mpp / d, per_unit / (mpp_y or mpp) / d)}
            resolution |= {} if mpp is None else {"resolutionunit": unit}
            writer.write(
                levels[-1],
                tile=(256, 256),
                compression=compression,
                photometric="rgb",
                subfiletype=int(index > 0),
                **resolution,
            )
    return levels


def picture(height, width, seed=0):
    """Smooth colours, so that JPEG keeps them."""
    y, x = np.mgrid[:height, :width]
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = [128 + 60 * np.sin(x / 37 + p) + 60 * np.cos(y / 23 + 2 * p) for p in phase]
    return np.stack(waves, axis=-1).round().astype(np.uint8)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "pyramid.tif"
    return path, write_pyramid(path, picture(1030, 1301))


@pytest.mark.parametrize("reader", READERS)
def test_attributes(pyramid, reader):
    path, levels = pyramid
    with open_slide(path, reader) as slide:
        assert slide.reader == reader and slide.path == path
        assert slide.shape == (1030, 1301)
        assert slide.level_shapes == tuple(level.shape[:2] for level in levels)
        assert slide.level_downsamples == (1.0, 2.0, 4.0)  # 1301 / 325 is not 4, but that is what it was made with
        assert slide.mpp == pytest.approx(0.5)


def test_cucim_comes_first(pyramid):
    with open_slide(pyramid[0]) as slide:
        assert slide.reader == "cucim"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_pixels_of_each_level(pyramid, reader, level):
    path, levels = pyramid
    down = 2**level
    with open_slide(path, reader) as slide:
        for row, col in ((0, 0), (7, 101), (200, 33), (100, 250)):
            region = slide.read(level, row * down, col * down, 41, 59)
            expected = levels[level][row : row + 41, col : col + 59]
            # OpenSlide interpolates where the ratio of the rounded sizes is not whole.
            tolerance = 0 if reader == "cucim" or level == 0 else 6
            assert region.dtype == np.uint8
            assert np.abs(region.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("reader", READERS)
def test_outside_is_white(pyramid, reader):
    path, levels = pyramid
    with open_slide(path, reader) as slide:
        region = slide.read(0, -10, 1290, 30, 30)
        assert (region[:10] == 255).all() and (region[:, 11:] == 255).all()
        np.testing.assert_array_equal(region[10:, :11], levels[0][:20, 1290:])
        assert (slide.read(0, 5000, 0, 4, 4) == 255).all()
        low = slide.read(2, 1030 - 8, 0, 5, 3)
        assert (low[2:] == 255).all()


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])
def test_readers_agree(tmp_path, compression):
    write_pyramid(tmp_path / "x.tif", picture(600, 512), (1, 2), compression=compression)
    with open_slide(tmp_path / "x.tif", "cucim") as first, open_slide(tmp_path / "x.tif", "openslide") as second:
        for d in (1, 1.7, 2, 3):
            difference = first.read_at(3, 5, 90, 80, downsample=d).astype(int) - second.read_at(3, 5, 90, 80, downsample=d)
            assert np.abs(difference).max() <= 3  # two JPEG decoders


def brute_area(image, row, col, height, width, d):
    """Area means of a white-padded image, by weights of each pixel."""
    result = np.empty((height, width, 3))

    def weights(start, end, size):
        overlap = {i: min(i + 1, end) - max(i, start) for i in range(math.floor(start), math.ceil(end))}
        return [(i if 0 <= i < size else None, w) for i, w in overlap.items() if w > 0]

    for r in range(height):
        for c in range(width):
            total = np.zeros(3)
            for i, wi in weights((row + r) * d, (row + r + 1) * d, image.shape[0]):
                for j, wj in weights((col + c) * d, (col + c + 1) * d, image.shape[1]):
                    total += wi * wj * (image[i, j] if i is not None and j is not None else 255.0)
            result[r, c] = total / d**2
    return result


@pytest.mark.parametrize("d", [1.3, 1.9999, 3.0, 7.25])
def test_resampling_is_the_exact_area_mean(tmp_path, d):
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    write_pyramid(tmp_path / "x.tif", image, (1,))
    rows, cols = math.ceil(70 / d) + 2, math.ceil(90 / d) + 2  # beyond all four sides
    with open_slide(tmp_path / "x.tif") as slide:
        region = slide.read_at(-1, -1, rows, cols, downsample=d)
    expected = brute_area(image, -1, -1, rows, cols, d)
    assert np.abs(region - expected).max() <= 0.5 + 1e-3


@settings(deadline=None, max_examples=25)
@given(st.floats(0.4, 9.0), st.integers(-5, 60), st.integers(-5, 60), st.integers(1, 40), st.integers(1, 40))
def test_a_pixel_does_not_depend_on_the_region(pyramid, d, row, col, height, width):
    with open_slide(pyramid[0]) as slide:
        whole = slide.read_at(-5, -5, 110, 110, downsample=d)
        part = slide.read_at(row, col, height, width, downsample=d)
    np.testing.assert_array_equal(part, whole[row + 5 : row + 5 + height, col + 5 : col + 5 + width])


def test_the_next_finer_level_is_used(pyramid, monkeypatch):
    with open_slide(pyramid[0]) as slide:
        used = []
        original = slides.Slide._read_level
        monkeypatch.setattr(
            slides.Slide, "_read_level", lambda self, level, *a: used.append(level) or original(self, level, *a)
        )
        for d in (0.5, 1, 1.99, 2, 3.9, 4, 40):
            slide.read_at(0, 0, 8, 8, downsample=d)
        assert used == [0, 0, 0, 1, 1, 2, 2]


def test_finer_than_stored_is_interpolated(tmp_path):
    ramp = np.repeat(np.arange(0, 200, 4, dtype=np.uint8)[None, :, None], 40, axis=0).repeat(3, axis=2)
    write_pyramid(tmp_path / "x.tif", ramp, (1,))
    with open_slide(tmp_path / "x.tif") as slide:
        line = slide.read_at(20, 20, 1, 40, downsample=0.5)[0, :, 0].astype(float)
    np.testing.assert_allclose(line, 4 * ((np.arange(20, 60) + 0.5) * 0.5 - 0.5), atol=0.51)


def test_resolution_in_micrometers(pyramid):
    with open_slide(pyramid[0]) as slide:
        np.testing.assert_array_equal(slide.read_at(3, 4, 20, 20, mpp=1.5), slide.read_at(3, 4, 20, 20, downsample=3))
        assert slide.downsample_at(0.51) == 1.0  # within 5 % a stored level is taken as it is
        assert slide.downsample_at(1.96) == 4.0
        assert slide.downsample_at(0.6) == pytest.approx(1.2)
        with pytest.raises(InputError, match="µm/px"):
            slide.downsample_at(1000)
        with pytest.raises(InputError, match="either"):
            slide.read_at(0, 0, 2, 2)
        with pytest.raises(InputError, match="levels 0 to 2"):
            slide.read(3, 0, 0, 2, 2)


def test_thumbnail(pyramid, monkeypatch):
    path, levels = pyramid
    monkeypatch.setattr(slides, "STRIP_PIXELS", 1000)  # many strips
    with open_slide(path) as slide:
        assert slide.thumbnail(max_size=100).shape == (80, 100, 3)
        assert slide.thumbnail(max_size=9999).shape == (1030, 1301, 3)
        small = slide.thumbnail(downsample=4)
        assert small.shape == (258, 326, 3)
        np.testing.assert_array_equal(small[:257, :325], levels[2])
        other = slide.thumbnail(downsample=5.3)
        np.testing.assert_array_equal(other, slide.read_at(0, 0, *other.shape[:2], downsample=5.3))
        with pytest.raises(InputError, match="either"):
            slide.thumbnail()


def test_pickled_slide_reopens(pyramid):
    with open_slide(pyramid[0], mpp=0.4) as slide:
        again = pickle.loads(pickle.dumps(slide))
        assert (again.path, again.reader, again.mpp) == (slide.path, slide.reader, 0.4)
        np.testing.assert_array_equal(again.read(1, 20, 40, 9, 9), slide.read(1, 20, 40, 9, 9))
        again.close()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("unit", [CENTIMETER, INCH])
def test_pixel_size_from_tags(tmp_path, reader, unit):
    write_pyramid(tmp_path / "x.tif", picture(64, 64), (1,), mpp=0.25, mpp_y=0.252, unit=unit)
    with open_slide(tmp_path / "x.tif", reader) as slide:
        assert slide.mpp == pytest.approx(0.251, rel=1e-3)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mpp": None}, "does not say.*--mpp 0.5"),
        ({"mpp": 352.8}, "not plausible.*--mpp 0.5"),  # 72 dpi
        ({"mpp": 0.5, "mpp_y": 0.52}, "wide and .* high"),
    ],
)
def test_doubtful_pixel_sizes_are_refused(tmp_path, reader, options, message):
    path = tmp_path / "x.tif"
    write_pyramid(path, picture(64, 64), (1,), **options)
    with pytest.raises(SlideError, match=message):
        open_slide(path, reader)
    with open_slide(path, reader, mpp=0.5) as slide:
        assert slide.mpp == 0.5
    with pytest.raises(InputError, match="by hand"):
        open_slide(path, reader, mpp=500)


def test_pixel_size_given_against_the_file_is_logged(pyramid, caplog):
    with caplog.at_level(logging.WARNING), open_slide(pyramid[0], mpp=0.25):
        pass
    assert "the file says 0.5" in caplog.text


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_truncated_slides_are_refused(tmp_path, compression, share):
    path = tmp_path / "x.tif"
    write_pyramid(path, np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8), compression=compression)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(SlideError, match="(?s)cannot be read.*cucim:.*openslide:"):
        open_slide(path, mpp=0.5)


@pytest.mark.parametrize("name", ["x.svs", "x.tif", "x.ndpi"])
@pytest.mark.parametrize("content", [b"", b"no slide at all", b"II*\x00\xff\xff\xff\xff"])
def test_other_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlideError, match="cannot be read"):
        open_slide(tmp_path / name)


def test_missing_files_and_unknown_readers(tmp_path, pyramid):
    with pytest.raises(SlideError, match="does not exist"):
        open_slide(tmp_path / "x.svs")
    with pytest.raises(ValueError, match="openslide"):
        open_slide(pyramid[0], "opnslide")


def test_fallback_to_openslide_is_logged(pyramid, caplog, monkeypatch):
    def refuse(path):
        raise RuntimeError("no such compression")

    monkeypatch.setattr(cucim_reader, "_problem", refuse)
    with caplog.at_level(logging.WARNING), open_slide(pyramid[0]) as slide:
        assert slide.reader == "openslide"
    assert "no such compression" in caplog.text


@pytest.fixture
def cuda_build_without_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cucim_reader, "_verdict", [])


@pytest.mark.parametrize(
    ("program", "reader"),
    [
        ("import time; time.sleep(60)", "openslide"),  # hangs
        ("import os; os.abort()", "openslide"),  # crashes
        ("import no_such_module", "openslide"),
        (cucim_reader._PROBE, "cucim"),
    ],
)
def test_cucim_is_probed_beside_a_cuda_build(pyramid, cuda_build_without_gpu, monkeypatch, caplog, program, reader):
    monkeypatch.setattr(cucim_reader, "_PROBE", program)
    monkeypatch.setattr(cucim_reader, "PROBE_SECONDS", 1 if "sleep" in program else 60)
    calls = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: calls.append(args) or run(*args, **options))
    for _ in range(2):
        with caplog.at_level(logging.WARNING), open_slide(pyramid[0]) as slide:
            assert slide.reader == reader
    assert len(calls) == 1  # once per process
    assert ("CUDA build of torch" in caplog.text) == (reader == "openslide")


def test_importing_the_module_does_not_import_slow_libraries():
    program = "import sys, monai_vslp.data.slides; print([m for m in ('cucim', 'wsidicom') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert done.stdout.strip().endswith("[]")


def test_what_is_a_slide(tmp_path, pyramid):
    assert is_slide(pyramid[0])
    assert all(is_slide(tmp_path / f"x{suffix}") for suffix in (".SVS", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".dcm"))
    grey = np.zeros((64, 64), np.uint8)
    tifffile.imwrite(tmp_path / "plain.tif", picture(64, 64), photometric="rgb")
    tifffile.imwrite(tmp_path / "tiled.tif", picture(64, 64), photometric="rgb", tile=(16, 16))
    tifffile.imwrite(tmp_path / "long.tif", picture(16, 4112), photometric="rgb", tile=(16, 16))
    tifffile.imwrite(tmp_path / "long_strips.tif", picture(16, 4112), photometric="rgb")
    tifffile.imwrite(tmp_path / "stack.tif", np.stack([grey] * 5), photometric="minisblack", tile=(16, 16))
    (tmp_path / "broken.tif").write_bytes(b"II*\x00\xff")
    with tifffile.TiffWriter(tmp_path / "sub.tif", ome=True) as writer:
        writer.write(picture(64, 64), tile=(16, 16), photometric="rgb", subifds=1)
        writer.write(picture(32, 32), tile=(16, 16), photometric="rgb", subfiletype=1)
    names = ["plain", "tiled", "long", "long_strips", "stack", "broken", "sub", "missing"]
    assert [name for name in names if is_slide(tmp_path / f"{name}.tif")] == ["long", "sub"]
    assert not is_slide(tmp_path / "x.png")


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.floats(0.1, 6), st.integers(0, 2**32 - 1))
def test_area_means_keep_the_total(size, ratio, seed):
    mask = np.random.default_rng(seed).random((size, size + 3)) < 0.5
    count = math.ceil(size / ratio), math.ceil((size + 3) / ratio)
    means = area_resample(mask, (0, 0), ratio, count, smooth=False)
    assert means.sum() * ratio**2 == pytest.approx(mask.sum(), abs=1e-8)
    assert means.min() >= 0 and means.max() <= 1 + 1e-12


@needs_real
@pytest.mark.parametrize("reader", READERS)
def test_real_slides(reader):
    with open_slide(REAL / "cmu-1-small-region.svs", reader) as slide:
        assert slide.mpp == pytest.approx(0.499) and slide.shape == (2967, 2220)
    with open_slide(REAL / "crc_section.tif", reader) as slide:
        assert slide.mpp == pytest.approx(0.5) and slide.level_downsamples == (1, 4, 16, 64)
        assert slide.thumbnail(downsample=16).shape == (1696, 944, 3)
    with pytest.raises(SlideError, match="does not say"):
        open_slide(REAL / "tcga-cr-7395-01a-01-ts1.svs", reader)
    with open_slide(REAL / "tcga-cr-7395-01a-01-ts1.svs", reader, mpp=0.25) as slide:
        assert slide.level_downsamples == (1.0, 2.0)
        coarse = slide.read_at(850, 1000, 64, 64, downsample=2).astype(float)
        error = {}
        for shift in ((0, 0), (-2, 0), (2, 0), (0, -2), (0, 2)):
            fine = slide.read_at(1700 + shift[0], 2000 + shift[1], 128, 128, downsample=1)
            error[shift] = np.abs(coarse - fine.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))).mean()
        assert min(error, key=error.get) == (0, 0)  # the stored level shows the same place within one of its px


@needs_real
def test_real_slides_are_recognised():
    assert all(is_slide(path) for path in REAL.iterdir() if path.suffix != ".png")
    for image in [*(REAL.parent / "glas" / "images").iterdir()][:3]:
        assert not is_slide(image)


@needs_real
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_truncated_real_slide(tmp_path, share):
    content = (REAL / "cmu-1-small-region.svs").read_bytes()
    (tmp_path / "x.svs").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SlideError, match="cannot be read"):
        open_slide(tmp_path / "x.svs", mpp=0.5)
