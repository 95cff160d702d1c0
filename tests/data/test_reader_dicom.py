"""DICOM whole slides that these tests write themselves, of uncompressed tiles."""

from __future__ import annotations

import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageCms

from monai_vslp.data.inputs import find_images
from monai_vslp.data.slides import is_slide, open_slide
from monai_vslp.utils.errors import SlideError

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("wsidicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage, generate_uid  # noqa: E402

REAL = Path(os.environ.get("MONAI_VSLP_DATA", Path(__file__).parents[3] / "shared" / "data")) / "slides"
TILE = 64
MPP = 0.5
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def write_instance(path, image, uids, flavor="VOLUME", down=1, leave_out=()):
    """One instance with full tiles; ``uids`` are those of study, series and frame of reference."""
    height, width = image.shape[:2]
    rows, cols = math.ceil(height / TILE), math.ceil(width / TILE)
    padded = np.zeros((rows * TILE, cols * TILE, 3), dtype=np.uint8)
    padded[:height, :width] = image
    frames = padded.reshape(rows, TILE, cols, TILE, 3).swapaxes(1, 2)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = uids
    data.ImageType = ["DERIVED" if down > 1 else "ORIGINAL", "PRIMARY", flavor, "RESAMPLED" if down > 1 else "NONE"]
    data.Modality, data.SpecimenLabelInImage = "SM", "YES" if flavor in ("LABEL", "OVERVIEW") else "NO"
    data.Rows = data.Columns = TILE
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = height, width
    data.TotalPixelMatrixFocalPlanes = data.NumberOfOpticalPaths = 1
    data.NumberOfFrames, data.DimensionOrganizationType = rows * cols, "TILED_FULL"
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.ImagedVolumeHeight, data.ImagedVolumeWidth, data.ImagedVolumeDepth = height * MPP / 1e3, width * MPP / 1e3, 0.001
    data.FocusMethod, data.ExtendedDepthOfField = "AUTO", "NO"
    data.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]
    origin, measures, groups, optics = Dataset(), Dataset(), Dataset(), Dataset()
    origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = 0
    data.TotalPixelMatrixOriginSequence = [origin]
    measures.PixelSpacing, measures.SliceThickness = [MPP * down / 1e3] * 2, 0.001
    groups.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [groups]
    optics.OpticalPathIdentifier, optics.ICCProfile = "0", PROFILE + b"\0" * (len(PROFILE) % 2)
    data.OpticalPathSequence = [optics]
    data.PixelData = frames.tobytes()
    data["PixelData"].VR = "OB"
    for name in leave_out:
        delattr(data, name)
    data.save_as(path, enforce_file_format=True)


def new_uids():
    return [generate_uid() for _ in range(3)]


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Folder with two levels, a label and an overview; the levels."""
    folder = tmp_path_factory.mktemp("dicom") / "slide"
    folder.mkdir()
    rng = np.random.default_rng(0)
    full = rng.integers(0, 256, (300, 420, 3), dtype=np.uint8)
    half = np.round(full.reshape(150, 2, 210, 2, 3).mean(axis=(1, 3))).astype(np.uint8)
    uids = new_uids()
    write_instance(folder / "b.dcm", half, uids, down=2)
    write_instance(folder / "a.dcm", full, uids)
    write_instance(folder / "label.dcm", np.full((40, 50, 3), 77, dtype=np.uint8), uids, "LABEL")
    write_instance(folder / "overview.dcm", np.full((30, 60, 3), 99, dtype=np.uint8), uids, "OVERVIEW")
    (folder / "notes.txt").write_text("no slide")
    return folder, [full, half]


def test_a_series_is_one_input_named_or_found(series):
    assert find_images(series[0]) == find_images(series[0].parent) == [series[0]]


def test_levels_of_a_series(series):
    folder, levels = series
    with open_slide(folder) as slide:
        assert slide.reader == "wsidicom" and slide.mpp == pytest.approx(MPP)
        assert slide.level_shapes == ((300, 420), (150, 210)) and slide.level_downsamples == (1.0, 2.0)
        for level, image in enumerate(levels):
            d = 2**level
            np.testing.assert_array_equal(slide.read(level, 20 * d, 30 * d, 70, 90), image[20:90, 30:120])
        region = slide.read(0, 290, -5, 20, 15)
        np.testing.assert_array_equal(region[:10, 5:], levels[0][290:, :10])
        assert (region[10:] == 255).all() and (region[:, :5] == 255).all()
        assert slide.icc_profile.startswith(PROFILE)


def test_associated_images(series):
    with open_slide(series[0]) as slide:
        assert sorted(slide.associated) == ["label", "macro"]
        label, macro = slide.associated["label"](), slide.associated["macro"]()
        assert label.shape == (40, 50, 3) and (label == 77).all()
        assert macro.shape == (30, 60, 3) and (macro == 99).all()


def test_one_instance_is_a_slide_of_one_level(series, tmp_path):
    with open_slide(series[0] / "a.dcm") as slide:
        assert slide.level_shapes == ((300, 420),)
    (tmp_path / "without_suffix").write_bytes((series[0] / "a.dcm").read_bytes())
    assert is_slide(tmp_path / "without_suffix")
    with open_slide(tmp_path / "without_suffix", "wsidicom") as slide:
        np.testing.assert_array_equal(slide.read(0, 3, 4, 5, 6), series[1][0][3:8, 4:10])
    with pytest.raises(SlideError, match="none of 1 file"):
        open_slide(series[0] / "label.dcm", "wsidicom")


def test_threads_share_a_slide(series):
    corners = [(row, col) for row in range(0, 240, 17) for col in range(0, 360, 41)]
    with open_slide(series[0]) as slide, ThreadPoolExecutor(4) as pool:
        pixels = list(pool.map(lambda corner: slide.read(0, *corner, 60, 60), corners))
    for (row, col), region in zip(corners, pixels):
        np.testing.assert_array_equal(region, series[1][0][row : row + 60, col : col + 60])


def test_folders_are_recognised(series, tmp_path):
    assert is_slide(series[0])
    assert not is_slide(tmp_path)
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    for index in range(2):
        write_instance(tmp_path / f"{index}.dcm", image, new_uids())
    assert not is_slide(tmp_path)  # two slides: a folder of slides
    assert is_slide(tmp_path / "0.dcm")
    with pytest.raises(SlideError, match="holds 2 slides.*own folder"):
        open_slide(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.dcm").write_bytes(b"nothing")
    assert not is_slide(tmp_path / "broken")
    with pytest.raises(SlideError, match="cannot be read"):
        open_slide(tmp_path / "broken")


@pytest.mark.parametrize("share", [0.001, 0.3, 0.7, 0.99])
def test_truncated_instances_are_refused(series, tmp_path, share):
    content = (series[0] / "a.dcm").read_bytes()
    (tmp_path / "x.dcm").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SlideError, match="(?s)cannot be read.*wsidicom:"):
        open_slide(tmp_path / "x.dcm")


def test_headers_with_gaps_are_refused_by_name(tmp_path):
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    write_instance(tmp_path / "x.dcm", image, new_uids(), leave_out=["ImageType"])
    with pytest.raises(SlideError, match="x.dcm lacks ImageType.*conforms to DICOM"):
        open_slide(tmp_path / "x.dcm")


def test_another_reader_is_logged(series, caplog):
    with caplog.at_level(logging.INFO), open_slide(series[0] / "a.dcm") as slide:
        assert slide.reader == "wsidicom"
    assert "read by wsidicom; passed over: cucim: it reads" in caplog.text


@pytest.mark.skipif(not REAL.is_dir(), reason="no real slides here")
def test_real_file_with_a_defective_header():
    """Its tiles lie in columns and its colours are YCbCr, but its header says neither: reading it would give a jumble."""
    with pytest.raises(SlideError, match="small_dicom.dcm lacks ImageType"):
        open_slide(REAL / "small_dicom.dcm", mpp=0.5)
