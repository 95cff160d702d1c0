"""What all readers of slides share: batches, threads, colours, associated images, bounds, names; and plain images."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from monai_vslp.data.icc import to_srgb
from monai_vslp.data.readers import SLIDE_READERS, CucimReader, OpenSlideReader, SlideReader, plain
from monai_vslp.data.slides import is_slide, open_slide
from monai_vslp.utils.errors import InputError, SlideError

REAL = Path(os.environ.get("MONAI_VSLP_DATA", Path(__file__).parents[3] / "shared" / "data")) / "slides"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real slides here")
READERS = ["cucim", "openslide", "ome"]


@lru_cache  # a profile holds the time at which it was made
def srgb_profile(swapped=False):
    """sRGB, or sRGB with the primaries of red and blue exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if swapped:
        profile = profile.replace(b"rXYZ", b"?XYZ", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"?XYZ", b"bXYZ", 1)
    return profile


def write_pyramid(path, image, downsamples=(1, 2), profile=None):
    with tifffile.TiffWriter(path) as writer:
        for index, d in enumerate(downsamples):
            height, width = image.shape[0] // d, image.shape[1] // d
            level = image[: height * d, : width * d].reshape(height, d, width, d, 3).mean(axis=(1, 3)).round()
            writer.write(
                level.astype(np.uint8),
                tile=(64, 64),
                compression="zlib",
                photometric="rgb",
                subfiletype=int(index > 0),
                resolution=(1e4 / 0.5 / d,) * 2,
                resolutionunit="CENTIMETER",
                iccprofile=profile if index == 0 else None,
            )


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (420, 516, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory, image):
    path = tmp_path_factory.mktemp("readers") / "x.tif"
    write_pyramid(path, image)
    return path


CORNERS = {
    "inside": [(row, col) for row in (0, 3, 64, 100) for col in (0, 17, 128)],
    "one": [(5, 6)],
    "mixed": [(-10, 4), (5, 6), (190, 200), (80, 90), (5000, 0), (0, 0), (380, 490)],
    "outside": [(-500, 0)],
    "none": [],
}


@pytest.mark.parametrize("reader", [*READERS, "plain"])
@pytest.mark.parametrize("downsample", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("kind", CORNERS)
def test_many_places_are_those_read_one_by_one(pyramid, reader, downsample, kind):
    corners = CORNERS[kind]
    with open_slide(pyramid, reader) as slide:
        for workers in (1, 2, 3):
            many = slide.read_many(corners, 40, 52, downsample=downsample, workers=workers)
            assert many.shape == (len(corners), 40, 52, 3) and many.dtype == np.uint8
            for (row, col), pixels in zip(corners, many):
                np.testing.assert_array_equal(pixels, slide.read_at(row, col, 40, 52, downsample=downsample))


def test_batches_of_cucim_are_used_inside_only(pyramid, monkeypatch):
    batched = []
    original = CucimReader.read_batch

    def spy(self, level, corners, *rest):
        batched.append((level, list(corners)))
        return original(self, level, corners, *rest)

    monkeypatch.setattr(CucimReader, "read_batch", spy)
    with open_slide(pyramid) as slide:
        for downsample in (1, 1.5, 2):
            slide.read_many([(0, 0), (-1, 0), (170, 200), (380, 0), (381, 0)], 40, 40, downsample=downsample)
    assert batched == [(0, [(0, 0), (170, 200), (380, 0)]), (1, [(0, 0), (170, 200)])]


def test_many_places_with_wrong_options(pyramid):
    with open_slide(pyramid) as slide:
        with pytest.raises(InputError, match="workers"):
            slide.read_many([(0, 0)], 4, 4, downsample=1, workers=0)
        with pytest.raises(InputError, match="positive"):
            slide.read_many([(0, 0)], 4, 4, downsample=0)


@pytest.mark.parametrize("name", ["read", "read_batch"])
def test_damage_within_many_places_is_told(pyramid, monkeypatch, name):
    def fail(*args):
        raise RuntimeError("bad tile")

    monkeypatch.setattr(CucimReader, name, fail)
    with open_slide(pyramid) as slide, pytest.raises(SlideError, match="level 0.*bad tile"):
        slide.read_many([(0, 0), (-9, 0), (-9, 9)], 40, 40, downsample=1)


@pytest.mark.parametrize("reader", [*READERS, "plain"])
def test_threads_share_a_slide(pyramid, image, reader):
    corners = [(row, col) for row in range(0, 360, 29) for col in range(0, 450, 37)]
    with open_slide(pyramid, reader) as slide, ThreadPoolExecutor(4) as pool:
        for (row, col), region in zip(corners, pool.map(lambda corner: slide.read(0, *corner, 60, 60), corners)):
            np.testing.assert_array_equal(region, image[row : row + 60, col : col + 60])


def memory():
    """Private memory that this process has asked for, MiB, whether it has touched it or not."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc here")
@pytest.mark.parametrize("count", [4, 6, 9])
def test_batches_leave_no_memory_behind(pyramid, count):
    corners = [(4 * k, 8 * k) for k in range(count)]
    with open_slide(pyramid, "cucim") as slide:
        for calls in (5, 60):  # the first ones fill pools
            before = memory()
            for _ in range(calls):
                slide.read_many(corners, 256, 256, downsample=1, workers=2)
    assert memory() - before < 20  # a leak of three batches of two per call is 66 MiB


OPEN_AT_ONCE = """
import sys, threading
from pathlib import Path
from monai_vslp.data.readers import CucimReader

def read():
    barrier.wait()
    reader = CucimReader(Path(sys.argv[1]))
    reader.read_batch(0, [(0, 0), (8, 8)], 32, 32, 2)
    reader.close()

barrier = threading.Barrier(8)
threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_the_first_slides_of_a_process_are_opened_at_once(pyramid):
    """A third of such processes never ended: threads that made cuCIM's first calls waited for each other."""
    subprocess.run([sys.executable, "-c", OPEN_AT_ONCE, str(pyramid)], check=True, timeout=240)


@needs_real
@pytest.mark.parametrize("size", [200, 512])
def test_many_places_of_a_real_slide(size):
    rng = np.random.default_rng(0)
    with open_slide(REAL / "crc_section.tif") as slide:
        for downsample in (1, 4):
            high, wide = (int(side / downsample) for side in slide.shape)
            corners = [(int(rng.integers(0, high)), int(rng.integers(0, wide))) for _ in range(7)]
            for (row, col), pixels in zip(corners, slide.read_many(corners, size, size, downsample=downsample)):
                np.testing.assert_array_equal(pixels, slide.read_at(row, col, size, size, downsample=downsample))


# Colours


def test_srgb_stays_srgb(image):
    assert np.abs(to_srgb(srgb_profile())(image).astype(int) - image).max() <= 1


def test_exchanged_primaries_exchange_red_and_blue(image):
    converted = to_srgb(srgb_profile(swapped=True))(image).astype(int)
    assert np.abs(converted - image[..., ::-1]).max() <= 2


@pytest.mark.parametrize("reader", [*READERS, "plain"])
def test_conversion_to_srgb(tmp_path, image, reader):
    write_pyramid(tmp_path / "x.tif", image, profile=srgb_profile(swapped=True))
    with open_slide(tmp_path / "x.tif", reader) as slide:
        assert slide.icc_profile == srgb_profile(swapped=True) and slide.color == "stored"
        np.testing.assert_array_equal(slide.read(0, 5, 6, 30, 40), image[5:35, 6:46])  # left as they are
    with open_slide(tmp_path / "x.tif", reader, color="srgb") as slide:
        region = slide.read_at(400, 5, 40, 40, downsample=1)
        assert np.abs(region[:20].astype(int) - image[400:, 5:45, ::-1]).max() <= 2
        assert (region[20:] == 255).all()
        many = slide.read_many([(400, 5), (10, 20), (30, 40)], 40, 40, downsample=1)
        np.testing.assert_array_equal(many[0], region)
        np.testing.assert_array_equal(many[2], slide.read_at(30, 40, 40, 40, downsample=1))
        again = pickle.loads(pickle.dumps(slide))
        assert (again.color, again.reader) == ("srgb", reader)
        np.testing.assert_array_equal(again.read_at(400, 5, 40, 40, downsample=1), region)
        again.close()


def test_profiles_that_cannot_be_used(tmp_path, pyramid, image, caplog):
    write_pyramid(tmp_path / "x.tif", image, profile=b"no profile at all")
    with pytest.raises(SlideError, match="cannot be converted to sRGB.*color='stored'"):
        open_slide(tmp_path / "x.tif", "cucim", color="srgb")
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    with pytest.raises(ValueError, match="made for Lab"):
        to_srgb(lab)
    with caplog.at_level(logging.INFO), open_slide(pyramid, color="srgb") as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 9, 9), image[:9, :9])
    assert "no ICC profile" in caplog.text
    with pytest.raises(ValueError, match="stored"):
        open_slide(pyramid, color="rgb")


# Associated images and bounds


@needs_real
@pytest.mark.parametrize("reader", ["cucim", "openslide"])
def test_associated_images_of_a_real_slide(reader):
    with open_slide(REAL / "cmu-1-small-region.svs", reader) as slide:
        shapes = {name: load().shape for name, load in slide.associated.items()}
        assert shapes == {"label": (463, 387, 3), "macro": (431, 1280, 3), "thumbnail": (768, 574, 3)}
        small = slide.thumbnail(downsample=slide.shape[0] / 768).astype(float)
        assert np.abs(slide.associated["thumbnail"]()[:768, :574] - small[:768, :574]).mean() < 8  # the same picture
    with open_slide(REAL / "tcga-cr-7395-01a-01-ts1.svs", reader, mpp=0.25) as slide:
        assert slide.icc_profile[36:40] == b"acsp"


def test_damaged_associated_images_are_told(pyramid, monkeypatch):
    class Broken(OpenSlideReader):
        def __init__(self, path):
            super().__init__(path)
            self.associated = {"macro": lambda: 1 / 0}

    monkeypatch.setitem(SLIDE_READERS.components, "openslide", SLIDE_READERS._Component("", Broken))
    with open_slide(pyramid, "openslide") as slide, pytest.raises(SlideError, match="macro image.*division"):
        slide.associated["macro"]()


@pytest.mark.parametrize(
    ("values", "bounds"),
    [((3, 5, 100, 200), (5, 3, 200, 100)), ((500, 5, 100, 200), (5, 500, 200, 16)), ((600, 5, 9, 9), None)],
)
def test_bounds(pyramid, monkeypatch, values, bounds):
    """OpenSlide gives x, y, width, height; a slide clips them to itself. No MRXS file is at hand, so its properties are set."""
    openslide = pytest.importorskip("openslide")
    names = ("bounds-x", "bounds-y", "bounds-width", "bounds-height")
    original = openslide.OpenSlide.properties.fget
    more = {f"openslide.{name}": str(value) for name, value in zip(names, values)}
    monkeypatch.setattr(openslide.OpenSlide, "properties", property(lambda self: {**original(self), **more}))
    with open_slide(pyramid, "openslide") as slide:
        assert slide.bounds == bounds
    with open_slide(pyramid, "cucim") as slide:
        assert slide.bounds is None


# Names


class Checkerboard(SlideReader):
    """A format of somebody else's: a text file with height, width and side of the squares."""

    name = "checkerboard"

    @classmethod
    def unsuited(cls, path):
        return None if path.suffix == ".board" else "it reads .board"

    def __init__(self, path):
        height, width, self.side = (int(word) for word in path.read_text().split())
        self.level_shapes, self.downsamples, self.mpp = ((height, width),), (1.0,), (0.5, 0.5)

    def read(self, level, row, col, height, width):
        y, x = np.mgrid[row : row + height, col : col + width] // self.side
        return np.repeat(((x + y) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)

    def close(self):
        self.side = 0


def test_a_reader_of_somebody_else(tmp_path, monkeypatch):
    monkeypatch.setattr(SLIDE_READERS, "components", dict(SLIDE_READERS.components))
    SLIDE_READERS.add("checkerboard", "An example.", Checkerboard)
    (tmp_path / "x.board").write_text("50 60 10")
    with open_slide(tmp_path / "x.board") as slide:
        assert slide.reader == "checkerboard" and slide.shape == (50, 60) and slide.mpp == 0.5
        assert slide.read_at(0, 0, 5, 6, downsample=10)[:2, :3, 0].tolist() == [[0, 255, 0], [255, 0, 255]]
        assert slide.read_many([(0, 0), (0, 10)], 10, 10, downsample=1).mean(axis=(1, 2, 3)).tolist() == [0, 255]
        assert dict(slide.associated) == {} and slide.bounds is None and slide.icc_profile is None


def test_names_are_their_keys():
    assert SLIDE_READERS.names[:5] == ("cucim", "wsidicom", "openslide", "ome", "plain")
    assert all(reader.name == name for name, reader in SLIDE_READERS)


def test_every_reader_is_heard(tmp_path):
    (tmp_path / "x.tif").write_bytes(b"no slide at all")
    with pytest.raises(SlideError, match="(?s)cucim: .*openslide: .*ome: .*plain: .*wsidicom: it is no DICOM"):
        open_slide(tmp_path / "x.tif")


def test_unsuited_readers_are_no_warning(tmp_path, image, caplog):
    Image.fromarray(image).save(tmp_path / "x.png")
    with caplog.at_level(logging.INFO), open_slide(tmp_path / "x.png", mpp=0.5) as slide:
        assert slide.reader == "plain"
    told = [record for record in caplog.records if "passed over" in record.message]
    assert len(told) == 1 and "openslide: " in told[0].message and "cucim: it reads .svs" in told[0].message


# Plain images


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.jpg"])
def test_plain_images(tmp_path, image, name):
    options = {"dpi": (50800, 50800)} if name != "x.jpg" else {"dpi": (50800, 50800), "quality": 100, "subsampling": 0}
    Image.fromarray(image).save(tmp_path / name, **options)
    assert not is_slide(tmp_path / name)
    with open_slide(tmp_path / name, "plain") as slide:
        assert slide.shape == (420, 516) and slide.level_downsamples == (1.0,)
        assert slide.mpp == pytest.approx(0.5, rel=1e-3)
        region = slide.read(0, 400, 500, 30, 30).astype(int)
        assert np.abs(region[:20, :16] - image[400:, 500:]).max() <= (12 if name == "x.jpg" else 0)
        assert (region[20:] == 255).all()


@pytest.mark.parametrize("dpi", [None, (72, 72), (300, 300)])
def test_plain_images_without_a_plausible_size(tmp_path, image, dpi):
    Image.fromarray(image).save(tmp_path / "x.png", **({} if dpi is None else {"dpi": dpi}))
    with pytest.raises(SlideError, match="--mpp 0.5"):
        open_slide(tmp_path / "x.png")
    with open_slide(tmp_path / "x.png", mpp=0.25) as slide:
        assert slide.mpp == 0.25
        np.testing.assert_array_equal(slide.read(0, 0, 0, 420, 516), image)


def test_profiles_of_plain_images(tmp_path, image):
    Image.fromarray(image).save(tmp_path / "x.png", icc_profile=srgb_profile(swapped=True))
    with open_slide(tmp_path / "x.png", mpp=0.5, color="srgb") as slide:
        assert np.abs(slide.read(0, 0, 0, 420, 516).astype(int) - image[..., ::-1]).max() <= 2


def test_large_plain_images(tmp_path, image, monkeypatch, caplog):
    Image.fromarray(image).save(tmp_path / "x.png")
    monkeypatch.setattr(plain, "MANY_PIXELS", 1000)
    with caplog.at_level(logging.WARNING), open_slide(tmp_path / "x.png", mpp=0.5):
        assert "held in memory" in caplog.text
    monkeypatch.setattr(plain, "MOST_PIXELS", 2000)
    with pytest.raises(SlideError, match="516 x 420 px.*vips tiffsave x.png x_tiled.tif --tile --pyramid"):
        open_slide(tmp_path / "x.png", mpp=0.5)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif", "x.bmp"])
def test_truncated_plain_images(tmp_path, image, name):
    Image.fromarray(image).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * 0.7)])
    with pytest.raises(SlideError, match="cannot be read.*plain: "):
        open_slide(tmp_path / name, mpp=0.5)


def test_stacks_are_no_plain_images(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((5, 40, 40), dtype=np.uint8), photometric="minisblack")
    with pytest.raises(SlideError, match="plain: its first image has several pages"):
        open_slide(tmp_path / "x.tif", mpp=0.5)
